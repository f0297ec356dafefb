"""Forked programs behave as those that a new interpreter runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import fork, run_fork
from tests.test_tune.sweeps import wait_for

PROGRAM = """
import atexit, json, os, sys
if __name__ == "__main__":
    atexit.register(lambda: print("at the end"))
    print(json.dumps([sys.argv[1:], os.getcwd(), sorted(set(os.environ) - {"LC_CTYPE"}), sys.path[0]]))
    print("an error", file=sys.stderr)
    sys.exit(7)
"""


def test_a_fork_does_what_a_new_interpreter_does(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "OWN": "1"}
    command = [sys.executable, "-m", "program", "a b", "--c"]
    wanted = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = run_fork(
        "program", *command[3:], folder=tmp_path, cwd=tmp_path, environment=environment, imported=("json",)
    )
    assert (found.returncode, found.stdout, found.stderr) == (7, wanted.stdout, wanted.stderr)
    assert json.loads(found.stdout.splitlines()[0])[0] == ["a b", "--c"]


def test_a_signal_ends_a_fork(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)")
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, -signal.SIGINT)):
        log = tmp_path / f"log{number}"
        process = fork("program", stdout=log, cwd=tmp_path, imported=("json",))
        wait_for(lambda log=log: log.exists() and "begun" in log.read_text(), 60, "the start")
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired, match="timed out"):
            process.wait(0.01)
        process.send_signal(number)
        assert process.wait(60) == status
    assert "KeyboardInterrupt" in log.read_text()
