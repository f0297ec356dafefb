"""Forked programs behave like those in a new interpreter."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import fork, run_fork, run_without
from tests.test_tune.sweeps import wait_for

PROGRAM = """
import atexit, json, os, sys
if __name__ == "__main__":
    atexit.register(lambda: print("at the end"))
    print(json.dumps([sys.argv[1:], os.getcwd(), sorted(set(os.environ) - {"LC_CTYPE"}), sys.path[0]]), flush=True)
    print("an error", file=sys.stderr, flush=True)
    {ending}
"""


def test_a_child_process_handles_sigint_even_if_the_tests_ignore_it() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit this; conftest.py restores it."""
    program = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('ignored')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        pytest.param("sys.exit(7)", 7, id="status"),
        pytest.param("raise SystemExit('why')", 1, id="message"),
        pytest.param("os.kill(os.getpid(), 9)", -signal.SIGKILL, id="killed"),
    ],
)
def test_a_fork_behaves_like_a_new_interpreter(ending: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.replace("{ending}", ending))
    environment = {**os.environ, "OWN": "1"}
    command = [sys.executable, "-m", "program", "a b", "--c"]
    wanted = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = run_fork(
        "program", *command[3:], folder=tmp_path, cwd=tmp_path, environment=environment, imported=("json",)
    )
    assert found == (status, wanted.stdout, wanted.stderr)
    assert json.loads(found.stdout.splitlines()[0])[0] == ["a b", "--c"]


def test_a_blocked_package_cannot_be_imported(tmp_path: Path) -> None:
    found = run_without(["lightning", "ray"], "lightning.pytorch", folder=tmp_path)
    assert (found.returncode, found.stdout) == (1, "")
    assert "No module named 'lightning'" in found.stderr


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
