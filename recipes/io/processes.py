"""Functions run concurrently, each in its own process, so that a killed process does not affect the others.

The pools of the standard library are not used: one killed worker breaks the whole pool, and workers outlive their
parent.
"""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Self

from sma.recipes.io.signals import PREEMPTED, Preempted

PATIENCE = 60.0
"""Time for processes to end without being killed, in seconds: a training first completes and saves its update."""


class Processes:
    """Functions in their own processes, at most `jobs` at a time.

    The processes are spawned, not forked, because a fork of a process that has used torch's threads can hang. Leaving
    the block ends those that still run, and so does the end of this process, even by SIGKILL. Otherwise they could
    write to a folder that a new process resumes.

    Args:
        jobs: maximum number of concurrent processes.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[Any, tuple[str, BaseProcess]] = {}

    def __len__(self) -> int:
        """Number of running processes."""
        return len(self._running)

    @property
    def full(self) -> bool:
        """Whether `jobs` processes are running."""
        return len(self) >= self.jobs

    def start(self, name: str, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function that can be imported in a new process."""
        process = self._context.Process(target=_call, args=(function, arguments), name=name, daemon=True)
        process.start()
        self._running[process.sentinel] = name, process

    def wait(self) -> tuple[str, int]:
        """Wait for one of the processes to end.

        Returns:
            its name and exit code: 0 for a function that returned, 1 for one that raised, -n for a process ended by
            signal number n.
        """
        name, ended = self._running.pop(wait(list(self._running))[0])
        ended.join()
        return name, ended.exitcode or 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        running = [process for _, process in self._running.values()]
        for left in running:
            left.terminate()
        until = time.monotonic() + PATIENCE
        for left in running:
            left.join(max(0.0, until - time.monotonic()))
            if left.is_alive():
                left.kill()
                left.join()


def end_with_parent() -> None:
    """Exit this process at once when its parent has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _call(function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    try:
        function(*arguments)
    except Preempted as end:
        print(end, file=sys.stderr)
        sys.exit(PREEMPTED)
