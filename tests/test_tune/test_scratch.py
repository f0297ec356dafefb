import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sma.tune import scratch
from sma.tune.scratch import scratch_folder

KILLED = """
import os, signal, sys, tempfile
tempfile.tempdir = sys.argv[1]
from sma.tune.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "file").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_removed_at_the_end_of_its_block(machine: Path) -> None:
    with scratch_folder() as folder:
        assert list(machine.iterdir()) == [folder]
    assert list(machine.iterdir()) == []


def test_the_next_process_removes_the_folder_of_a_killed_one(machine: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(machine)], check=False)
    (left,) = machine.iterdir()
    others = [machine / "sma-ray-another.machine-1-x", machine / "of somebody"]
    for other in others:
        other.mkdir()
    with scratch_folder() as mine, scratch_folder() as second:
        assert sorted(machine.iterdir()) == sorted([*others, mine, second])
    assert not left.exists()
    assert sorted(machine.iterdir()) == sorted(others)


def test_a_process_of_another_user_counts_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr("os.kill", refuse)
    assert scratch._is_alive(1)
