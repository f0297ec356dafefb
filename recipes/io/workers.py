"""Parallel computation with results in order, so that they do not depend on the number of processes.

The pool is that of the standard library. This file adds a limit of the results computed in advance, and workers that
end with their parent, even if it is killed.
"""

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from sma.errors import DataError, SpecError
from sma.recipes.io.processes import end_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None
) -> Generator[Result, None, None]:
    """Yield `function(item)` for every item, in their order, computed by `workers` processes.

    Close the generator (`contextlib.closing`) to end the processes before the last item. A daemon computes the results
    itself, because it must not have children.

    Args:
        function: a function that can be pickled, such as one of a module, or a `functools.partial` of one.
        items: the items, consumed a few in advance.
        workers: number of processes; None: one per core that this process may use.

    Raises:
        SpecError: `workers` is below 1.
        DataError: a process died.
    """
    if workers is not None and workers < 1:
        raise SpecError(f"workers={workers} must be at least 1; leave it out to use every core")
    workers = workers or free_cores()
    if workers == 1 or multiprocessing.current_process().daemon:
        yield from map(function, items)
        return
    source = iter(items)
    pool = ProcessPoolExecutor(workers, initializer=_initialise_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        while True:
            waiting.extend(
                pool.submit(function, item) for item in itertools.islice(source, 2 * workers + 1 - len(waiting))
            )
            if not waiting:
                return
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that generates data died; with too little memory give workers=1, and in a script put the call "
            "under 'if __name__ == \"__main__\":'"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def free_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _initialise_worker() -> None:
    """Ignore interrupts, which the parent handles, and exit when the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
