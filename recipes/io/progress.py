"""The progress of a task as one line of text: in a terminal, in Jupyter, and in files."""

import shutil
import sys
import time
from types import TracebackType
from typing import Any, Self

_CELLS = 16
"""Number of characters of the bar."""

EVERY = 0.5
"""Seconds between two refreshes of a line."""


def duration(seconds: float) -> str:
    """A duration as minutes and seconds, with hours from one hour on: `1:05`, `2:00:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def bar(done: int, total: int) -> str:
    """A bar in ASCII, which every terminal can show."""
    filled = _CELLS * done // max(1, total)
    return f"[{'#' * filled}{'.' * (_CELLS - filled)}]"


class Line:
    """A line in a terminal that is replaced by the next one."""

    def __init__(self) -> None:
        self._width = 0

    def show(self, text: str) -> None:
        """Replace the line."""
        text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be replaced
        sys.stdout.write(f"\r{text:<{self._width}}")
        sys.stdout.flush()
        self._width = len(text)

    def clear(self) -> None:
        """Remove the line, so that a message can be printed."""
        self.show("")
        sys.stdout.write("\r")
        sys.stdout.flush()

    def end(self) -> None:
        """Keep the line; what is printed next begins on a new one."""
        sys.stdout.write("\n")
        sys.stdout.flush()


class Cell:
    """A line in the output of a notebook's cell. Messages are outputs of their own."""

    def __init__(self) -> None:
        from IPython.display import display

        self._handle: Any = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, text: str) -> None:
        """Replace the line."""
        self._handle.update({"text/plain": text}, raw=True)

    def clear(self) -> None:
        """Leave the line."""

    def end(self) -> None:
        """Leave the line."""


def in_place() -> Line | Cell | None:
    """The line of this output, if it is a terminal or a notebook; None for others, such as files."""
    if "ipykernel" in sys.modules and type(sys.stdout).__module__.startswith("ipykernel"):
        return Cell()
    return Line() if sys.stdout.isatty() else None


class Counter:
    """Shows how much of a task is done, in one line: `[####............] ListOps: 2,500 of 10,000, 0:35 left`.

    The line is replaced in a terminal and in Jupyter, without a thread, because processes may be forked. Any other
    output gets a line at the end.

    Args:
        title: start of the line.
        total: number of items; None if it is unknown.
        shown: whether to show anything.
        in_bytes: whether bytes are counted, which are shown in MB.
    """

    def __init__(self, title: str, total: int | None, *, shown: bool = True, in_bytes: bool = False) -> None:
        self.title, self.total, self.done = title, total, 0
        self._shown, self._in_bytes = shown, in_bytes
        self._line: Line | Cell | None = None
        self._began, self._first, self._refreshed = 0.0, 0, 0.0

    def __enter__(self) -> Self:
        self._line = in_place() if self._shown else None
        self.restart(0, self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._line is not None:
            self._line.show(self._text())
            self._line.end()
        elif self._shown and error is None:
            print(self._text(), flush=True)

    def restart(self, done: int, total: int | None) -> None:
        """Count from `done`: the time left is estimated from the items that follow."""
        self.total, self._began, self._first = total, time.monotonic(), done
        self.update(done)

    def update(self, done: int) -> None:
        """Set the number of items that are done."""
        self.done = done
        if self._line is not None and time.monotonic() - self._refreshed >= EVERY:
            self._refreshed = time.monotonic()
            self._line.show(self._text())

    def advance(self, count: int) -> None:
        """Add to the number of items that are done."""
        self.update(self.done + count)

    def _amount(self, count: int) -> str:
        return f"{count / 1e6:,.1f}" if self._in_bytes else f"{count:,}"

    def _text(self) -> str:
        unit = " MB" if self._in_bytes else ""
        if not self.total:
            return f"{self.title}: {self._amount(self.done)}{unit}"
        own, rest = self.done - self._first, self.total - self.done
        left = f", {duration((time.monotonic() - self._began) / own * rest)} left" if own > 0 and rest > 0 else ""
        counts = f"{self._amount(self.done)} of {self._amount(self.total)}{unit}"
        return f"{bar(self.done, self.total)} {self.title}: {counts}{left}"
