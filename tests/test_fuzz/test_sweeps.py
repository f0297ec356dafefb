"""Damaged files of a sweep: records, clock, drivers, the sweep itself and the histories of its trials."""

import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sma.errors import CheckpointError
from sma.spec import dump_yaml
from sma.tune.records import load_clock, load_records
from sma.tune.storage import Storage
from sma.tune.sweep_folder import load_drivers, load_sweep
from sma.tune.sweep_results import front_table, summarise, trial_row
from sma.tune.trial import HISTORY, TrialReporter
from tests.test_fuzz.harness import Target, fuzz, mutate
from tests.test_recipes.tiny import tiny
from tests.test_tune.sweeps import done_trial, small_sweep

WINDOW = "layers.layer.modules.attention.window"
PLAIN = small_sweep(samples=8)
FILES: dict[str, Any] = {
    **{
        f"records/{number:04d}.json": asdict(
            done_trial(number, 0.5, 0.1 * number + 0.1, **({WINDOW: 4} if number else {}))
        )
        for number in range(3)
    },
    "clock.json": {"1.0": 20.0, "100.0": 20.0},
    "drivers.json": [
        {"concurrent": 2, "cpus": 1, "gpus": 0.0, "commit": "abc", "hardware": "a machine", "date": "2001-02-03"}
    ],
}
STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    3,
    10**400,
    1e308,
    float("nan"),
    "x" * 5000,
    "\ud800",
    [],
    {},
    [[]] * 50,
    {"update": 1},
)


def change(rng: random.Random, value: Any) -> Any:
    """A copy of plain data in which one value is replaced, often by one of another type."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {
                **{name: each for name, each in value.items() if name != key},
                **({"strange": 1} if rng.random() < 0.5 else {}),
            }
        return {**value, key: change(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], change(rng, value[at]), *value[at + 1 :]]
    return rng.choice(STRANGE)


def damage(rng: random.Random, content: Any) -> bytes:
    if rng.random() < 0.6:
        return json.dumps(change(rng, content)).encode()
    if rng.random() < 0.1:
        return rng.choice((b"", b"[" * 100_000, b"null", b"1" * 5000, b'{"a":' * 5000, b"\xff\xfe", b"{}" * 3))
    return mutate(rng, json.dumps(content, indent=1).encode())


def make_folder(rng: random.Random, folder: Path) -> Storage:
    storage = Storage(folder / "s")
    broken = rng.choice(sorted(FILES))
    for name, content in FILES.items():
        storage.write(name, damage(rng, content) if name == broken else json.dumps(content))
    return storage


def read_folder(storage: Storage) -> None:
    """Read the records and make every result of them except the figures."""
    records = load_records(storage, PLAIN)
    load_clock(storage), load_drivers(storage)
    json.dumps(summarise(records, PLAIN, storage), allow_nan=False)
    json.dumps([trial_row(record, PLAIN) for record in records])
    front_table(records, PLAIN)


def make_sweep_file(rng: random.Random, folder: Path) -> Storage:
    content = dump_yaml(PLAIN)
    digits = [at for at, letter in enumerate(content) if letter.isdigit()]
    at = rng.choice(digits)
    other = content[:at] + str(rng.randrange(10)) + content[at + 1 :]
    (folder / "sweep.yaml").write_bytes(mutate(rng, content.encode()) if rng.random() < 0.7 else other.encode())
    return Storage(folder)


def make_history(rng: random.Random, folder: Path) -> Path:
    history = [{"update": update, "accuracy": 0.5, "rate": 0.25} for update in (10, 20)]
    (folder / HISTORY).write_bytes(damage(rng, history))
    return folder


def read_history(folder: Path) -> None:
    reporter = TrialReporter(tiny(), folder, "accuracy", 8, 0.0)
    reporter.restore()
    [entry for entry in reporter.history if entry["update"] < 30]


RECORDS = Target(make_folder, read_folder)
SWEEP = Target(make_sweep_file, load_sweep)
HISTORIES = Target(make_history, read_history)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cases"), [("RECORDS", 600), ("SWEEP", 60), ("HISTORIES", 400)])
def test_damaged_files_of_a_sweep_are_read_or_refused(name: str, cases: int) -> None:
    counts = fuzz(f"tests.test_fuzz.test_sweeps:{name}", cases)
    print(name, counts)
    assert counts.others == {}
    assert counts.named > 0
    assert counts.accepted > 0


@pytest.mark.parametrize("name", ["sweep.yaml", "clock.json", "drivers.json", "records/0001.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_path_that_is_not_a_plain_file_is_refused_without_blocking(name: str, kind: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for each, content in FILES.items():
        storage.write(each, json.dumps(content))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{name}.*a plain file is required"):
        load_sweep(storage) if name == "sweep.yaml" else read_folder(storage)
