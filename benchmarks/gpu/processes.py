"""Measuring processes: forked before they use the device, ended at a deadline, with recorded failures."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.gpu.results import Results

# Seconds between two checks whether processes have ended.
_PAUSE = 0.02


class Child(NamedTuple):
    """A process.

    Attributes:
        name: name of its measurement.
        pid: its process id, also that of its group.
    """

    name: str
    pid: int


def fork(results: Results, name: str, until: float, function: Callable[[], object], group: bool = True) -> Child:
    """Run a function in a separate process and record its exception, except the exit status of a `SystemExit`.

    The parent must not have used the device: its context cannot be forked.

    Args:
        results: file of the failures.
        name: name of the phase.
        until: `time.monotonic()` soon after which the process ends even if its parent has ended.
        function: the function to run.
        group: whether it leads a group of processes, which `end` ends with it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(name, pid)
    status = 1
    try:
        if group:
            os.setpgrp()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(max(1, math.ceil(until - time.monotonic()) + 5))
        function()
        status = 0
    except SystemExit as leaves:
        status = leaves.code if isinstance(leaves.code, int) else 1
    except BaseException as error:
        results.fail(error, phase=name)
    finally:
        os._exit(status)


def wait(results: Results, children: list[Child], until: float) -> bool:
    """Wait for processes and remove them from the list; end and record those that miss the deadline.

    Returns:
        whether all ended by themselves, without a failure.
    """
    fine = True
    while children:
        for child in list(children):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if not pid:
                continue
            children.remove(child)
            fine = fine and status == 0
            if os.WIFSIGNALED(status):
                name = signal.Signals(os.WTERMSIG(status)).name
                results.add("failed", phase=child.name, reason=f"the process was ended by {name}")
        if children and time.monotonic() > until:
            for child in children:
                results.add("stopped", phase=child.name, reason="the time of the phase was over")
            end(children)
            return False
        if children:
            time.sleep(_PAUSE)
    return fine


def end(children: list[Child]) -> None:
    """End processes and their children, and remove them from the list."""
    for child in children:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has ended, or has no group yet
        finally:
            _reap(child)
    children.clear()


def _reap(child: Child) -> None:
    try:
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def in_parallel(results: Results, name: str, until: float, functions: Sequence[Callable[[], object]]) -> None:
    """Run functions in a few processes, one per processor at most."""
    count = min(len(functions), os.cpu_count() or 1, 12)

    def some(first: int) -> None:
        for function in functions[first::count]:
            function()

    children = [fork(results, name, until, partial(some, first), group=False) for first in range(count)]
    wait(results, children, until)
