"""Functions run side by side, each in a process of its own, so that one that is killed takes no other with it."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from sma.recipes.io.signals import PREEMPTED, Preempted

PATIENCE = 60.0
"""Seconds for processes to end by themselves: a training first completes its update, and saves it."""


def side_by_side(
    calls: Mapping[str, tuple[Callable[..., object], tuple[Any, ...]]], jobs: int
) -> Iterator[tuple[str, int]]:
    """Call functions in new processes, at most `jobs` at a time; gives the name and the exit code of each as it ends.

    The processes are started afresh, not forked: a fork of a process that has used torch's threads can hang. Whoever
    stops asking, by an error or Ctrl-C, ends those that still run; so does its own end, even by SIGKILL: nothing must
    go on writing to a folder that a new process may go on with.

    Args:
        calls: by name, in the order of starting: a function that can be imported, and its arguments.
        jobs: at most so many at a time.

    Returns:
        an iterator of names and exit codes: 0 for a function that returned, 1 for one that raised, -n for a process
        that signal number n ended.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(calls.items())[::-1]
    running: dict[Any, tuple[str, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, (function, arguments) = waiting.pop()
                process = context.Process(target=_call, args=(function, arguments), name=name, daemon=True)
                process.start()
                running[process.sentinel] = name, process
            for sentinel in wait(list(running)):
                name, ended = running.pop(sentinel)
                ended.join()
                yield name, ended.exitcode or 0
    finally:
        for _, left in running.values():
            left.terminate()
        until = time.monotonic() + PATIENCE
        for _, left in running.values():
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
