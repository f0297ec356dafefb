"""Parallel child processes: their exit codes, and their end when the parent ends."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sma.recipes.io.processes import Processes

HOLDING = """
from pathlib import Path
from sma.recipes.io.processes import Processes
from tests.test_recipes.test_io.test_side_by_side import hold

if __name__ == "__main__":
    with Processes(2) as processes:
        for number in (0, 1):
            processes.start(str(number), hold, Path({folder!r}) / str(number))
        processes.wait()
"""


def hold(path: Path) -> None:
    """Hold a lock for minutes; the file appears once the lock is taken."""
    draft = path.with_suffix(".draft").open("w")
    fcntl.flock(draft, fcntl.LOCK_EX)
    os.rename(draft.name, path)
    time.sleep(600)


@pytest.mark.slow
def test_every_exit_code_is_returned_and_no_other_process_stops() -> None:
    calls: dict[str, tuple[Callable[..., object], tuple[Any, ...]]] = {
        "killed": (signal.raise_signal, (signal.SIGKILL,)),
        "left": (os._exit, (3,)),
        "raised": (int, ("x",)),
        "fine": (time.sleep, (0,)),
    }
    ends: dict[str, int] = {}
    with Processes(2) as processes:
        for name, (function, arguments) in calls.items():
            if processes.full:
                ends.update([processes.wait()])
            processes.start(name, function, *arguments)
        while len(processes):
            ends.update([processes.wait()])
    assert ends == {"killed": -signal.SIGKILL, "left": 3, "raised": 1, "fine": 0}


@pytest.mark.slow
def test_processes_end_with_the_context() -> None:
    started = time.monotonic()
    with Processes(2) as processes:
        processes.start("short", time.sleep, 0)
        processes.start("long", time.sleep, 200)
        assert processes.full
        assert processes.wait() == ("short", 0)
        assert not processes.full
    assert time.monotonic() - started < 100


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "holding.py"
    script.write_text(HOLDING.format(folder=str(tmp_path)))
    parent = subprocess.Popen(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    )
    held = [tmp_path / "0", tmp_path / "1"]
    while not all(path.exists() for path in held):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    for path in held:
        with path.open() as file:
            # Blocks while a process holds the lock, so a surviving process makes the test time out.
            fcntl.flock(file, fcntl.LOCK_EX)
