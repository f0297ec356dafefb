"""Run folders with damaged or forged files: readers name the file and neither execute, allocate nor block on it."""

import functools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sma.recipes.experiment import load_experiment
from sma.recipes.io.run_folder import (
    BEST,
    DATA,
    EXPERIMENT,
    LAST,
    SUMMARY,
    VERSIONS,
    is_parts,
    is_words,
    read_checked,
    read_summary,
)
from sma.recipes.studies.comparison import Comparison, read_efficiency
from sma.recipes.studies.folder import read_study
from sma.recipes.studies.grid import failure, in_words
from sma.recipes.training.classification import Classifier
from sma.recipes.training.evaluation import _finished
from sma.recipes.training.resuming import check_weights, checkpoint_to_resume
from tests.test_fuzz.harness import Target, fuzz, mutate
from tests.test_recipes.tiny import power_failure, tiny, tiny_data, train

SPEC = tiny(training__updates=6, training__evaluate_every=3, training__warmup=1)
VALUES: tuple[Any, ...] = (
    None,
    -1,
    0,
    10**30,
    0.5,
    float("nan"),
    True,
    "x",
    "x" * 10_000,
    [],
    {},
    [[]],
    {"x": 1},
    [None] * 3,
)
TENSORS: tuple[Callable[[], torch.Tensor], ...] = (
    lambda: torch.zeros(0),
    lambda: torch.zeros(3, dtype=torch.int64),
    lambda: torch.zeros(1).expand(1 << 40),
    lambda: torch.tensor(float("nan")),
    lambda: torch.eye(2).to_sparse(),
    lambda: torch.zeros(2, dtype=torch.complex64),
)


@functools.cache
def _sources() -> tuple[Any, Path, Path]:
    """The data, a run that stopped after 3 of 6 updates, and a finished run."""
    folder = Path(tempfile.mkdtemp())
    data = tiny_data(folder / "data")
    with power_failure(4):
        train(SPEC, folder / "stopped", data)
    train(SPEC, folder / "finished", data)
    for path in (folder / "stopped", folder / "finished"):
        shutil.rmtree(path / "tensorboard")
        shutil.rmtree(path / "metrics")
    return data, folder / "stopped", folder / "finished"


def _forge(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """A copy of nested containers in which one value is replaced or missing."""
    if isinstance(value, dict) and value and depth < rng.randint(1, 6):
        key = rng.choice(list(value))
        return {name: _forge(rng, part, depth + 1) if name == key else part for name, part in value.items()}
    if isinstance(value, list) and value and depth < rng.randint(1, 6):
        place = rng.randrange(len(value))
        return [_forge(rng, part, depth + 1) if number == place else part for number, part in enumerate(value)]
    if isinstance(value, dict) and value and rng.random() < 0.3:
        lost = rng.choice(list(value))
        return {name: part for name, part in value.items() if name != lost}
    return rng.choice(TENSORS)() if isinstance(value, torch.Tensor) and rng.random() < 0.7 else rng.choice(VALUES)


def _replace(rng: random.Random, path: Path) -> None:
    """Replace a file by a folder, a pipe, or other content."""
    way = rng.randrange(10)
    content = path.read_bytes()
    if way == 0:
        path.unlink()
        rng.choice((path.mkdir, lambda: os.mkfifo(path), path.touch))()
    elif way <= 4:
        path.write_bytes(mutate(rng, content))
    elif path.suffix == ".ckpt":
        torch.save(_forge(rng, torch.load(path, weights_only=True)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(_forge(rng, json.loads(content))))
    else:
        path.write_bytes(
            rng.choice(
                (
                    b"[" * 5000,
                    b"width: 1e20",
                    content.replace(b"width: 8", b"width: 16"),
                    content.replace(b"seed: 0", b"seed: 1"),
                )
            )
        )


def _stopped(rng: random.Random, folder: Path) -> Path:
    run = folder / "run"
    shutil.copytree(_sources()[1], run)
    _replace(rng, run / rng.choice((LAST, LAST, LAST, DATA, VERSIONS, EXPERIMENT, BEST)))
    return run


def _inspect(run: Path) -> None:
    state = checkpoint_to_resume(SPEC, run, _sources()[0].hashes, True)
    if state is not None:
        check_weights(_learner(), state, run / LAST)
    if (run / VERSIONS).exists():
        read_checked(run / VERSIONS, is_parts, "versions")


@functools.cache
def _learner() -> Classifier:
    return Classifier(SPEC.model.build(), SPEC.training, 10)


def _resumed(run: Path) -> None:
    train(SPEC, run, _sources()[0], resume=True)


def _ended(rng: random.Random, folder: Path) -> Path:
    run = folder / "run"
    shutil.copytree(_sources()[2], run)
    settings = {"seeds": 1, "minutes": None, "length": 64}
    kept, chosen = rng.choice(
        (("compared.json", {"models": ["seqboat"]}), ("study.json", {"study": "compare", "variants": ["seqboat"]}))
    )
    (run / kept).write_text(json.dumps({**chosen, **settings}))
    work = {"milliseconds": 1.5, "megabytes": 2}
    (run / "efficiency.json").write_text(
        json.dumps({"inference": work, "training": work, "device": "cpu", "hardware": "x"})
    )
    (run / "error.txt").write_text("a reason")
    _replace(
        rng,
        run / rng.choice((SUMMARY, SUMMARY, SUMMARY, DATA, EXPERIMENT, kept, kept, "efficiency.json", "error.txt")),
    )
    return run


def _read(run: Path) -> None:
    _finished(run)
    read_summary(run, "task", "data", "test_accuracy", "activation_rates", "seconds")
    read_checked(run / DATA, is_words, "hashes")
    read_efficiency(run / "efficiency.json")
    read_study(Comparison(), run)
    failure(run)
    (run / "error.txt").unlink(missing_ok=True) if (run / "error.txt").is_file() else None
    in_words(run)
    load_experiment(run / EXPERIMENT)


STOPPED = Target(_stopped, _inspect)
RESUMED = Target(_stopped, _resumed)
ENDED = Target(_ended, _read)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("target", "cases"), [("STOPPED", 500), ("RESUMED", 40), ("ENDED", 800)])
def test_damaged_files_of_a_run_are_read_or_refused(target: str, cases: int) -> None:
    counts = fuzz(f"{__name__}:{target}", cases)
    print(target, counts)
    assert counts.others == {}
    assert counts.tried == cases
    assert counts.named > 0
    assert counts.accepted > 0
