"""What the processes have that tests start."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import Ended, run_programs


def test_a_process_reacts_to_control_c_however_the_tests_were_started() -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('ignored')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "")


@pytest.mark.slow
def test_programs_end_as_if_each_had_an_interpreter(tmp_path: Path) -> None:
    (folder := tmp_path / "folder").mkdir()
    programs = [
        "import sys, os; print(__name__, sys.argv, sorted(os.listdir()))",
        "import sys; print('x', file=sys.stderr); sys.exit(3)",
        "import atexit; atexit.register(print, 'last'); raise SystemExit('why')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ]
    assert run_programs([(program, folder) for program in programs], tmp_path) == [
        Ended(0, "__main__ ['-c'] []\n", ""),
        Ended(3, "", "x\n"),
        Ended(1, "last\n", "why\n"),
        Ended(-signal.SIGKILL, "", ""),
    ]
