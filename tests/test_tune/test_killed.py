"""Sweeps whose processes are killed, suspended or interrupted."""

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sma.recipes.io.signals import PREEMPTED
from tests.forks import Fork, fork, run_fork
from tests.test_tune.sweeps import wait_for, write_sweep

pytestmark = pytest.mark.slow

IMPORTED = ("sma.tune.driver", "sma.tune.parallel")
LONG = {"training.updates": 400, "training.evaluate_every": 20, "training.batch_size": 16}
PATIENCE = 600.0  # seconds on a free machine


@contextmanager
def driver(*arguments: str, log: Path) -> Iterator[Fork]:
    """A sweep in a separate process, which is killed at the end if it still runs."""
    # There is no cluster at RAY_ADDRESS, which must have no effect without --address.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RAY_ADDRESS": "127.0.0.1:1"}
    words = [*arguments, "--accelerator", "cpu"]
    process = fork("sma.tune", *words, stdout=log, environment=environment, imported=IMPORTED)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def records(folder: Path) -> dict[int, dict[str, Any]]:
    return {int(path.stem): json.loads(path.read_text()) for path in sorted((folder / "records").glob("*.json"))}


def evaluated(folder: Path, number: int, least: int) -> dict[str, Any] | None:
    """The record of a running trial with at least `least` evaluations and a checkpoint; None if there is none."""
    found = records(folder).get(number, {})
    return (
        found
        if len(found.get("history", [])) >= least and found.get("checkpoint") and found["status"] == "running"
        else None
    )


def process_of(record: dict[str, Any]) -> int:
    return int(list(record["busy"])[-1].split()[1])


def alive(process: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def updates(record: dict[str, Any]) -> list[int]:
    return [int(entry["update"]) for entry in record["history"]]


def start(tmp_path: Path, samples: int, settings: dict[str, Any]) -> list[str]:
    space = write_sweep(tmp_path, settings)
    return [
        f"--space={space}",
        f"--samples={samples}",
        "--no-stop",
        f"--storage={tmp_path / 's'}",
        f"--data={tmp_path / 'data'}",
    ]


def test_a_killed_or_suspended_worker_is_replaced_and_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    folder, log = tmp_path / "s", tmp_path / "log"
    stopped = []
    with driver(*start(tmp_path, 1, {**LONG, "training.updates": 300}), "--silence=30", log=log) as process:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            before = wait_for(
                lambda: (
                    (found := evaluated(folder, 0, 2 + 2 * len(stopped))) and process_of(found) not in stopped and found
                ),
                PATIENCE,
                "an evaluation",
            )
            stopped.append(process_of(before))
            os.kill(stopped[-1], number)
        assert process.wait(PATIENCE) == 0, log.read_text()
    after = records(folder)[0]
    assert (after["status"], after["restarts"], len(after["busy"])) == ("finished", 2, 3)
    assert updates(after) == list(range(20, 301, 20))
    assert after["history"][: len(before["history"])] == before["history"]
    assert not any(map(alive, stopped))


def test_a_killed_driver_is_resumed_without_losing_a_finished_trial(tmp_path: Path) -> None:
    folder, log = tmp_path / "s", tmp_path / "log"
    with driver(*start(tmp_path, 4, {**LONG, "training.updates": 200}), log=log) as process:
        wait_for(
            lambda: any(record["status"] == "finished" for record in records(folder).values()),
            PATIENCE,
            "the end of a trial",
        )
        running = wait_for(
            lambda: next((found for number in range(4) if (found := evaluated(folder, number, 1))), None),
            PATIENCE,
            "another trial",
        )
        process.kill()
        process.wait()
    before = records(folder)
    with driver(f"--resume={folder}", f"--data={tmp_path / 'data'}", log=log) as process:
        assert process.wait(PATIENCE) == 0, log.read_text()
    after = records(folder)
    assert [after[number]["status"] for number in range(4)] == ["finished"] * 4
    for number, record in before.items():
        if record["status"] == "finished":
            assert after[number] == record
    again = after[running["number"]]
    assert again["values"] == running["values"]
    assert updates(again) == list(range(20, 201, 20))
    assert len(again["busy"]) == 2
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["trials"], summary["failed"]) == (4, 0)


def test_a_sweep_resumes_after_a_signal(tmp_path: Path) -> None:
    folder, log = tmp_path / "s", tmp_path / "log"
    arguments = start(tmp_path, 1, LONG)
    cases = (
        ([signal.SIGINT], 130, "interrupted"),
        # Schedulers send SIGTERM some time after SIGUSR1.
        ([signal.SIGUSR1, signal.SIGTERM], PREEMPTED, "preempted by SIGUSR1: completed work is kept"),
    )
    for done, (numbers, status, words) in enumerate(cases):
        log.write_text("")
        with driver(*arguments, log=log) as process:
            wait_for(
                lambda done=done: (found := evaluated(folder, 0, 1)) and len(found["busy"]) > done,
                PATIENCE,
                "an evaluation",
            )
            if not done:
                second = run_fork("sma.tune", "--resume", folder, folder=tmp_path, imported=IMPORTED)
            for place, number in enumerate(numbers):
                time.sleep(place)  # simultaneous signals to threads may be reported in any order
                process.send_signal(number)
            assert process.wait(PATIENCE) == status, log.read_text()
        command = (
            f"{words}; resume with: python -m sma.tune --resume {folder} --accelerator cpu --data {tmp_path / 'data'}"
        )
        assert log.read_text().count("resume with") == log.read_text().count(command) == 1
        assert "Traceback" not in log.read_text()
        if not done:
            assert second.returncode == 2
            assert f"'{folder}' is being written by process {process.pid} on " in second.stderr
        left = process_of(records(folder)[0])
        wait_for(lambda left=left: not alive(left), 200, "the end of the trial's process")
        arguments = [f"--resume={folder}", f"--data={tmp_path / 'data'}"]
    with driver(*arguments, log=log) as process:
        assert process.wait(PATIENCE) == 0, log.read_text()
    after = records(folder)[0]
    assert (after["status"], len(after["busy"])) == ("finished", 3)
    assert updates(after) == list(range(20, 401, 20))


@pytest.mark.parametrize(
    ("end", "words"),
    [
        pytest.param(
            "storage", "was removed or moved while the sweep ran: sweep.yaml is missing", id="storage-removed"
        ),
        pytest.param(
            "raylet",
            "the Ray cluster is lost: the raylet of this machine has ended; resume with: python -m",
            id="raylet-killed",
        ),
        pytest.param(
            "gcs_server",
            "the Ray cluster is lost: its GCS server, on the head node has ended; resume with: python -m",
            id="gcs-killed",
        ),
    ],
)
def test_a_sweep_that_loses_its_storage_or_cluster_ends_with_an_error(end: str, words: str, tmp_path: Path) -> None:
    folder, log = tmp_path / "s", tmp_path / "log"
    with driver(*start(tmp_path, 1, LONG), log=log) as process:
        wait_for(lambda: evaluated(folder, 0, 1), PATIENCE, "an evaluation")
        if end == "storage":
            shutil.rmtree(folder)
        else:
            os.kill(child(process.pid, end), signal.SIGKILL)
        assert process.wait(PATIENCE) == 2, log.read_text()
    assert log.read_text().count("error: ") == log.read_text().count(words) == 1
    assert "Traceback" not in log.read_text()
    assert end == "storage" or [record["status"] for record in records(folder).values()] == ["running"]


def child(parent: int, name: str) -> int:
    """The child of a process with this name."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The name may hold spaces and parentheses; after it come state and parent.
            text, _, rest = (folder / "stat").read_text().rpartition(")")
            if int(rest.split()[1]) == parent and text.endswith(f"({name}"):
                return int(folder.name)
    raise AssertionError(f"{parent} has no {name}")
