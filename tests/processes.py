"""Programs in processes of their own that share what takes most of their time, the import of sma and so of torch."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Every program runs in a fork, as `python -c` would run it, up to the end of its interpreter: a child leaves the loop
# and the program below ends with its status.
_SERVE = """
import json, os, sys
import sma

def serve(programs):
    statuses = []
    for number, (program, folder) in enumerate(programs):
        if child := os.fork():
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            continue
        for stream, name in ((1, "out"), (2, "err")):
            file = os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, stream)
            os.close(file)
        os.chdir(folder)
        return program
    with open("statuses.json", "w") as file:
        json.dump(statuses, file)

_program = serve(json.loads(sys.argv.pop()))
if _program is not None:
    del serve, json, sma
    exec(compile(_program, "<string>", "exec"))
"""


class Ended(NamedTuple):
    """What a program left, as `subprocess.CompletedProcess` has it."""

    returncode: int
    stdout: str
    stderr: str


def run_programs(programs: Sequence[tuple[str, Path]], log: Path) -> list[Ended]:
    """Run texts of programs one after another, each in a folder; all of them find sma imported.

    Args:
        programs: text and folder of each.
        log: an empty folder for what they print.
    """
    words = [(program, str(folder)) for program, folder in programs]
    command = [sys.executable, "-c", _SERVE, json.dumps(words)]
    done = subprocess.run(command, cwd=log, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    statuses = json.loads((log / "statuses.json").read_text())
    return [
        Ended(status, *((log / f"{number}.{name}").read_text(encoding="utf-8") for name in ("out", "err")))
        for number, status in enumerate(statuses)
    ]


class Without(NamedTuple):
    """A module that is run as a program, with arguments, by a Python that lacks some packages."""

    blocked: list[str]
    module: str
    words: list[str]


_BLOCKER = """
import runpy, sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
sys.argv[1:] = {words!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def run_without(cases: Sequence[Without], folder: Path) -> list[Ended]:
    """Run programs that need nothing but the core, and assert that none leaves a file."""
    (log := folder / "log").mkdir()
    (empty := folder / "empty").mkdir()
    done = run_programs([(_BLOCKER.format(**case._asdict()), empty) for case in cases], log)
    assert list(empty.iterdir()) == []
    return done
