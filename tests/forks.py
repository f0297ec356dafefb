"""Programs in forks of a process that has already imported torch, lightning or sma, which takes seconds."""

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
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# The server forks a child per request. The child leaves the loop of `serve` and runs its module as `python -m` would,
# until its interpreter exits.
_SERVER = """
import importlib, json, os, runpy, sys

_before = dict(os.environ)
for _name in sys.argv[1:]:
    importlib.import_module(_name)
_changed = {name: value for name, value in os.environ.items() if _before.get(name) != value}

def serve():
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            response = os.waitstatus_to_exitcode(status) if pid else None
        elif not (response := os.fork()):
            return request
        print(json.dumps([request["number"], response]), flush=True)

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in _request["blocked"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

_request = serve()
if _request is not None:
    os.environ.clear()
    os.environ.update({**_request["environment"], **_changed})
    os.chdir(_request["cwd"])
    for _stream, _name in enumerate((os.devnull, _request["stdout"], _request["stderr"])):
        _file = os.open(_name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(_file, _stream)
        os.close(_file)
    sys.path[0] = _request["cwd"]
    sys.meta_path.insert(0, Blocker())
    sys.argv = ["-m", *_request["arguments"]]
    runpy.run_module(_request["module"], run_name="__main__", alter_sys=True)
"""


class Completed(NamedTuple):
    """Exit status and output of a program, as in `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


class Fork:
    """A running program, with some methods of `subprocess.Popen`."""

    def __init__(self, server: "_Server", pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.request({"pid": self.pid})
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
    """The process that is forked for each program. It exits when its standard input is closed."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, *modules],
            cwd=ROOT,
            # Otherwise compilers start worker processes, each of which imports torch.
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.requests = 0
        atexit.register(self.process.communicate)

    def request(self, fields: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests += 1
        self.process.stdin.write(json.dumps({**fields, "number": self.requests}) + "\n")
        self.process.stdin.flush()
        # Skip the response to a request of an earlier test that timed out while it waited.
        while (response := json.loads(self.process.stdout.readline()))[0] != self.requests:
            pass
        return response[1]


_server = cache(_Server)


def fork(
    module: str,
    *arguments: object,
    stdout: Path,
    stderr: Path | None = None,
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
    imported: tuple[str, ...] = ("sma.recipes.training.run",),
    blocked: Sequence[str] = (),
) -> Fork:
    """Start `python -m module arguments…` in a fork.

    Args:
        module: the module.
        arguments: its command-line arguments.
        stdout: file to which its standard output is appended.
        stderr: file to which its standard error is appended; None: that of stdout.
        cwd: its working directory.
        environment: its environment variables, except those that the imports change; None: those of this process.
        imported: modules that are imported before the fork.
        blocked: packages that it cannot import, as if they were not installed.
    """
    server = _server(imported)
    for file in (stdout, stderr or stdout):  # the caller may read them at once
        file.touch()
    request = {
        "module": module,
        "arguments": [str(argument) for argument in arguments],
        "stdout": str(stdout.resolve()),
        "stderr": str((stderr or stdout).resolve()),
        "cwd": str(cwd),
        "environment": dict(os.environ) if environment is None else environment,
        "blocked": list(blocked),
    }
    return Fork(server, server.request(request))


def run_fork(module: str, *arguments: object, folder: Path, timeout: float = 600.0, **options: Any) -> Completed:
    """Run `python -m module arguments…` in a fork until it exits, as `subprocess.run` does.

    Args:
        module: the module.
        arguments: its command-line arguments.
        folder: a folder for two files with its output.
        timeout: maximum time, in seconds.
        options: options of `fork`.
    """
    number = len([*folder.glob("fork*")])
    out, err = folder / f"fork{number}.out", folder / f"fork{number}.err"
    process = fork(module, *arguments, stdout=out, stderr=err, **options)
    try:
        status = process.wait(timeout)
    finally:
        process.kill()
    return Completed(status, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


def run_without(blocked: Sequence[str], module: str, *arguments: object, folder: Path) -> Completed:
    """Run `python -m module arguments…` without some packages, and assert that it leaves no file.

    Args:
        blocked: the packages.
        module: the module.
        arguments: its command-line arguments.
        folder: a folder for its output.
    """
    (empty := folder / "empty").mkdir(exist_ok=True)
    done = run_fork(module, *arguments, folder=folder, cwd=empty, imported=("sma",), blocked=blocked)
    assert list(empty.iterdir()) == []
    return done
