"""Programs in forks of a process that has already imported what takes seconds: torch, lightning, sma."""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# A child leaves the loop and runs its module as `python -m` would, up to the end of its interpreter.
_SERVE = """
import importlib, json, os, runpy, sys

_before = dict(os.environ)
for _name in sys.argv[1:]:
    importlib.import_module(_name)
_changed = {name: value for name, value in os.environ.items() if _before.get(name) != value}

def serve():
    for line in sys.stdin:
        asked = json.loads(line)
        if "pid" in asked:
            pid, status = os.waitpid(asked["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            return asked
        print(json.dumps([asked["number"], answer]), flush=True)

_asked = serve()
if _asked is not None:
    os.environ.clear()
    os.environ.update({**_asked["environment"], **_changed})
    os.chdir(_asked["cwd"])
    for _stream, _name in enumerate((os.devnull, _asked["stdout"], _asked["stderr"])):
        _file = os.open(_name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(_file, _stream)
        os.close(_file)
    sys.path[0] = _asked["cwd"]
    sys.argv = ["-m", *_asked["words"]]
    runpy.run_module(_asked["module"], run_name="__main__", alter_sys=True)
"""


class Fork:
    """A running program, with what `subprocess.Popen` has of it."""

    def __init__(self, server: "_Server", pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask({"pid": self.pid})
        return self.returncode

    def wait(self, timeout: float = 600.0) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Server:
    """The process whose forks are the programs; it ends when its input does."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, *modules],
            cwd=ROOT,
            # Compilers would start processes of their own, each of which imports torch.
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.asked = 0
        atexit.register(self.process.communicate)

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.asked += 1
        self.process.stdin.write(json.dumps({**question, "number": self.asked}) + "\n")
        self.process.stdin.flush()
        # The time of an earlier test may have ended between a question and its answer.
        while (answer := json.loads(self.process.stdout.readline()))[0] != self.asked:
            pass
        return answer[1]


_server = cache(_Server)


def fork(
    module: str,
    *words: object,
    stdout: Path,
    stderr: Path | None = None,
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
    imported: tuple[str, ...] = ("sma.recipes.training.run",),
) -> Fork:
    """Start `python -m module words…` in a fork.

    Args:
        module: the module.
        words: its arguments.
        stdout: the file to which it appends what it prints.
        stderr: the same of its errors; None: that of stdout.
        cwd: its folder.
        environment: its variables, except for what the imports read; None: those of this process.
        imported: modules that it finds imported.
    """
    server = _server(imported)
    for file in (stdout, stderr or stdout):  # a caller may read them at once
        file.touch()
    question = {
        "module": module,
        "words": [str(word) for word in words],
        "stdout": str(stdout.resolve()),
        "stderr": str((stderr or stdout).resolve()),
        "cwd": str(cwd),
        "environment": dict(os.environ) if environment is None else environment,
    }
    return Fork(server, server.ask(question))


def run_fork(module: str, *words: object, folder: Path, timeout: float = 600.0, **options: Any) -> Any:
    """Run `python -m module words…` in a fork to its end, as `subprocess.run` does.

    Args:
        module: the module.
        words: its arguments.
        folder: a folder for two files with what it prints.
        timeout: its maximum time in seconds.
        options: those of `fork`.
    """
    number = len([*folder.glob("fork*")])
    out, err = folder / f"fork{number}.out", folder / f"fork{number}.err"
    process = fork(module, *words, stdout=out, stderr=err, **options)
    try:
        status = process.wait(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, status, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
