"""Functions run side by side, each in a process of its own, so that one that is killed takes no other with it.

Not a pool of the standard library: there one killed worker breaks the whole pool, and the others outlive their parent.
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
"""Seconds for processes to end by themselves: a training first completes its update, and saves it."""


class Processes:
    """Functions in processes of their own, at most `jobs` at a time.

    The processes are started afresh, not forked: a fork of a process that has used torch's threads can hang. Leaving
    the block, by an error or Ctrl-C too, ends those that still run; so does the end of this process, even by SIGKILL:
    nothing must go on writing to a folder that a new process may resume.

    Args:
        jobs: processes at a time.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[Any, tuple[str, BaseProcess]] = {}

    def __len__(self) -> int:
        """Number of processes that run."""
        return len(self._running)

    @property
    def full(self) -> bool:
        """Whether `jobs` processes run."""
        return len(self) >= self.jobs

    def start(self, name: str, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function that can be imported in a new process."""
        process = self._context.Process(target=_call, args=(function, arguments), name=name, daemon=True)
        process.start()
        self._running[process.sentinel] = name, process

    def wait(self) -> tuple[str, int]:
        """Wait for one of the processes to end.

        Returns:
            its name and exit code: 0 for a function that returned, 1 for one that raised, -n for a process that signal
            number n ended.
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
    """End this process, at once, when the process that started it has ended: nothing else would tell it."""
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
