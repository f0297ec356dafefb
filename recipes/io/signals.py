"""Signals by which job schedulers announce that they will end a process: SIGTERM, and SIGUSR1, which `sbatch --signal`
asks for.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED = 75
"""Exit status of a command that such a signal ended: what it did is kept, and it can be repeated (EX_TEMPFAIL of
sysexits.h).
"""

# Windows has one of them.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Preempted(BaseException):
    """The process was told to end. Like `KeyboardInterrupt` no `Exception`, for what goes on after a failure is to end
    too.

    Args:
        number: of the signal.
        words: what was saved.
    """

    def __init__(self, number: int, words: str) -> None:
        super().__init__(f"preempted by {signal.Signals(number).name}: {words}")


class _Handler:
    """Ours, to be told from handlers of others."""

    def __init__(self, act: Callable[[int], object]) -> None:
        self.act = act

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.act(number)


@contextmanager
def on_preemption(act: Callable[[int], object]) -> Iterator[Callable[[], None]]:
    """Call `act` with the number of every such signal for as long as the block runs.

    Only the main thread can; in another nothing happens, and handlers of others stay in force. Yields a function that
    puts the handlers back in force where something has replaced them meanwhile.
    """
    before = (
        {number: signal.getsignal(number) for number in SIGNALS}
        if threading.current_thread() is threading.main_thread()
        else {}
    )
    before = {
        number: found for number, found in before.items() if found == signal.SIG_DFL or isinstance(found, _Handler)
    }
    handler = _Handler(act)

    def install() -> None:
        for number in before:
            signal.signal(number, handler)

    install()
    try:
        yield install
    finally:
        for number, found in before.items():
            signal.signal(number, found)


def end_at_once(number: int) -> None:
    """End the work where it is; whatever is being written stays as it was.

    Raises:
        Preempted: always.
    """
    raise Preempted(number, "what is done is kept")
