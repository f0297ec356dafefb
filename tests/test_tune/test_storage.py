import os
import socket
from pathlib import Path

import pytest

from sma.errors import CheckpointError, DataError
from sma.tune.folder import load_sweep, start_sweep
from sma.tune.records import TrialRecord, load_records
from sma.tune.storage import Storage
from tests.test_tune.sweeps import done_trial, small_sweep


@pytest.fixture(params=["path", "uri"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(tmp_path / "sweep") if request.param == "path" else Storage(f"file://{tmp_path}/sweep")


def test_what_is_written_is_read(storage: Storage) -> None:
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


def test_a_sweep_and_its_records_are_found_again(storage: Storage) -> None:
    sweep = small_sweep()
    start_sweep(sweep, storage)
    records = [done_trial(number, 0.5, 0.2, window=None) for number in (11, 2, 0)]
    for record in records:
        record.save(storage)
    assert load_sweep(storage) == sweep
    assert load_records(storage) == sorted(records, key=lambda record: record.number)


def test_a_folder_of_another_sweep_is_refused(storage: Storage) -> None:
    start_sweep(small_sweep(), storage)
    with pytest.raises(CheckpointError, match=r"belongs to another sweep; give another --storage, or --resume .*sweep"):
        start_sweep(small_sweep(), storage)


def test_a_folder_of_something_else_is_refused(storage: Storage) -> None:
    storage.write("thesis.tex", "")
    with pytest.raises(CheckpointError, match=r"is not empty and holds no sweep"):
        start_sweep(small_sweep(), storage)
    with pytest.raises(CheckpointError, match=r"there is no sweep in .*sweep.yaml is missing"):
        load_sweep(storage)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_leave_to_write_is_refused(tmp_path: Path) -> None:
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


def test_a_uri_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma.tune.storage.PATIENCE", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"s3://bucket/sweep?endpoint_override=127.0.0.1:{silent.getsockname()[1]}&scheme=http&region=us-east-1"
        with pytest.raises(CheckpointError, match=r"'s3://bucket/.*' has not answered for 2 s; check the address, the network"):
            Storage(uri)


def test_what_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Storage(tmp_path).write_json("a.json", {"loss": float("nan")})


@pytest.mark.parametrize("content", ["{", '{"number": 1}', '{"number": 1, "values": {}, "seed": 0, "colour": 3}', "[]"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    storage = Storage(tmp_path)
    done_trial(0, 0.5, 0.5).save(storage)
    storage.write("records/0001.json", content)
    with pytest.raises(CheckpointError, match=r"records/0001.json.*the trial.* is run again"):
        load_records(storage)


def test_seconds_of_a_trial_are_those_of_all_its_processes() -> None:
    record = TrialRecord(0, {}, 0, busy={"1.0 7": 2.5, "9.0 8": 4.0})
    assert record.seconds == 6.5
    assert record.update == 0


@pytest.mark.parametrize("name", ["caf\udce9", "x::y", "~no-such-user/x"])
def test_folder_that_cannot_be_the_storage_is_a_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the path of the run folder .* (is not valid Unicode|has '::')|begins with the home folder"):
        Storage(name if name.startswith("~") else tmp_path / name)
