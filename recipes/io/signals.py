"""Signals of job schedulers before they end a process: SIGTERM, and SIGUSR1 with `sbatch --signal=USR1@…`."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED = 75
"""Exit status of a command that was ended by such a signal, and can be resumed (EX_TEMPFAIL of sysexits.h)."""

# Windows has only SIGTERM.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Preempted(BaseException):
    """The process received a signal to end. Like `KeyboardInterrupt` it is not an `Exception`, so handlers of failures
    do not catch it.

    Args:
        number: number of the signal.
        words: end of the message: what was saved.
    """

    def __init__(self, number: int, words: str) -> None:
        super().__init__(f"preempted by {signal.Signals(number).name}: {words}")


class _Handler:
    """A handler with its own type, which distinguishes it from the handlers of other packages."""

    def __init__(self, act: Callable[[int], object]) -> None:
        self.act = act

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.act(number)


@contextmanager
def on_preemption(act: Callable[[int], object]) -> Iterator[Callable[[], None]]:
    """Call `act` with the number of every such signal during the block.

    Only the main thread can handle signals; in another thread nothing changes. Handlers of other packages are kept.
    Yields a function that installs the handlers again if another package has replaced them.
    """
    main = threading.current_thread() is threading.main_thread()
    found = {number: signal.getsignal(number) for number in SIGNALS if main}
    before = {number: old for number, old in found.items() if old == signal.SIG_DFL or isinstance(old, _Handler)}
    handler = _Handler(act)

    def install() -> None:
        for number in before:
            signal.signal(number, handler)

    install()
    try:
        yield install
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def end_at_once(number: int) -> None:
    """End the process immediately; atomic writes leave the old files.

    Raises:
        Preempted: always.
    """
    raise Preempted(number, "completed work is kept")
