import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sma.errors import CheckpointError, DataError
from sma.tune.cluster import Slots
from sma.tune.records import TrialRecord, load_clock, load_records
from sma.tune.storage import Storage
from sma.tune.sweep_folder import add_driver, check_same, load_sweep, start_sweep
from tests.test_tune.sweeps import done_trial, small_sweep

pytestmark = pytest.mark.slow  # servers, and processes that hold locks


@pytest.fixture(params=["path", "uri"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(tmp_path / "sweep") if request.param == "path" else Storage(f"file://{tmp_path}/sweep")


def test_read_returns_written_content(storage: Storage) -> None:
    assert storage.read("a/b.txt") is None
    assert storage.names() == []
    storage.write("a/b.txt", "one")
    storage.write("a/b.txt", "two")
    assert storage.read("a/b.txt") == b"two"
    assert storage.names("a") == ["b.txt"]
    assert storage.relative(storage.root + "/a/b.txt") == "a/b.txt"
    storage.remove("a")
    storage.remove("a")
    assert storage.names() == []


def test_a_sweep_and_its_records_are_loaded_as_written(storage: Storage) -> None:
    sweep = small_sweep()
    start_sweep(sweep, storage)
    records = [done_trial(number, 0.5, 0.2, window=None) for number in (11, 2, 0)]
    for record in records:
        record.save(storage)
    assert load_sweep(storage) == sweep
    assert load_records(storage) == sorted(records, key=lambda record: record.number)


def test_a_folder_of_another_sweep_is_refused(storage: Storage) -> None:
    start_sweep(small_sweep(), storage)
    with pytest.raises(
        CheckpointError, match=r"belongs to another sweep; give another --storage, or resume it with --resume .*sweep"
    ):
        start_sweep(small_sweep(), storage)


def test_a_folder_with_other_files_is_refused(storage: Storage) -> None:
    storage.write("thesis.tex", "")
    with pytest.raises(CheckpointError, match=r"is not empty and holds no sweep"):
        start_sweep(small_sweep(), storage)
    with pytest.raises(CheckpointError, match=r"there is no sweep in .*sweep.yaml is missing"):
        load_sweep(storage)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"cannot write .*must be writable"):
        start_sweep(small_sweep(), Storage(tmp_path / "sweep"))


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot (write|read the folder) .*file/sweep"):
        start_sweep(small_sweep(), Storage(tmp_path / "file" / "sweep"))


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"cannot use the storage 'floppy://a'"):
        Storage("floppy://a")


def test_a_uri_without_a_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma.tune.storage.PATIENCE", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"s3://bucket/sweep?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http&region=us-east-1"
        with pytest.raises(
            CheckpointError, match=r"'s3://bucket/.*' has not answered for 2 s; check the address, the network"
        ):
            Storage(uri)


def test_non_finite_numbers_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Storage(tmp_path).write_json("a.json", {"loss": float("nan")})


@pytest.mark.parametrize("content", ["{", '{"number": 1}', '{"number": 1, "values": {}, "seed": 0, "colour": 3}', "[]"])
def test_the_error_names_a_damaged_record(tmp_path: Path, content: str) -> None:
    storage = Storage(tmp_path)
    done_trial(0, 0.5, 0.5).save(storage)
    storage.write("records/0001.json", content)
    with pytest.raises(CheckpointError, match=r"records/0001.json.*run .* trial again"):
        load_records(storage)


def test_seconds_of_a_trial_are_the_sum_over_its_processes() -> None:
    record = TrialRecord(0, {}, 0, busy={"1.0 7": 2.5, "9.0 8": 4.0})
    assert record.seconds == 6.5
    assert record.update == 0


@pytest.mark.parametrize("name", ["caf\udce9", "x::y", "~no-such-user/x"])
def test_a_path_with_an_unsupported_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"the path of the run folder .* (is not valid Unicode|contains '::')|begins with the home folder",
    ):
        Storage(name if name.startswith("~") else tmp_path / name)


@pytest.mark.parametrize("name", ["a b", "a$x_$", "100%41", "[1]", "ü ☃", "#a?b", "{draft}", "-x"])
def test_a_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path / name)
    start_sweep(small_sweep(), storage)
    done_trial(0, 0.5, 0.5).save(storage)
    assert (tmp_path / name / "records" / "0000.json").is_file()
    assert [record.number for record in load_records(storage, load_sweep(storage))] == [0]


def test_a_locked_folder_is_refused_to_other_processes(tmp_path: Path) -> None:
    storage, code = Storage(tmp_path), "import sys; from sma.tune.__main__ import main; sys.exit(main(sys.argv[1:]))"
    start_sweep(small_sweep(), storage)
    done_trial(0, 0.5, 0.5).save(storage)
    with storage.locked():
        done = subprocess.run(
            [sys.executable, "-c", code, "report", str(tmp_path)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert f"is being written by process {os.getpid()} on {socket.gethostname()!r}" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"number": 2},
            r"0001.json is not a record of a trial of this sweep: number=2 differs from the name",
            id="name",
        ),
        pytest.param({"values": {"colour": 1}}, r"values has 'colour', which the sweep does not search", id="values"),
        pytest.param({"metrics": {"accuracy": 0.5}}, r"the trial is finished, and metrics has no rate", id="measure"),
        pytest.param({"history": [{"accuracy": 0.5}]}, r"an evaluation in its history has no update", id="update"),
        pytest.param({"number": True}, r"'number': input should be a valid integer", id="type"),
        pytest.param({"metrics": {"accuracy": 10**400}}, r"metrics.accuracy", id="huge"),
    ],
)
def test_the_error_names_an_inconsistent_record(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("records/0001.json", json.dumps({**asdict(done_trial(1, 0.5, 0.5)), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_records(storage, small_sweep())


def test_non_finite_numbers_are_not_read(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for text in ("NaN", "-Infinity", "1e999"):
        storage.write("clock.json", f'{{"1.0": {text}}}')
        with pytest.raises(
            CheckpointError, match=rf"clock.json.*cannot be read: {text} is not a finite number; remove it"
        ):
            load_clock(storage)


def test_a_replaced_or_removed_folder_is_refused(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    start_sweep(small_sweep(), storage)
    content = storage.read("sweep.yaml")
    check_same(storage, content)
    storage.write("sweep.yaml", "samples: 3")
    with pytest.raises(CheckpointError, match=r"holds another sweep now"):
        check_same(storage, content)
    (tmp_path / "sweep.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"was removed or moved while the sweep ran"):
        check_same(storage, content)


def test_a_driver_gets_a_new_folder_even_if_the_list_of_drivers_is_lost(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("trials/driver-4/0000/x", "")
    assert add_driver(storage, Slots(1, 1, 0.0)) == 5
