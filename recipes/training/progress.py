"""The progress of a training as one line of text: in a terminal, in Jupyter, and in files."""

import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

_CELLS = 16
"""Number of characters of the bar."""

_EVERY = 0.5
"""Seconds between two refreshes of the bar."""


def duration(seconds: float) -> str:
    """A duration as minutes and seconds, with hours from one hour on: `1:05`, `2:00:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress_text(done: int, total: int, left: float | None, measures: Mapping[str, float]) -> str:
    """The updates, the time left and the measures: `update 20 of 60, 0:35 left: loss 2.301, rate 0.310`.

    Args:
        done: number of updates.
        total: number of updates of the whole training.
        left: estimate of the seconds left; None if there is none.
        measures: the last measures by name.
    """
    time_left = "" if left is None or done >= total else f", {duration(left)} left"
    shown = ", ".join(f"{name} {value:.3f}" for name, value in measures.items())
    return f"update {done:,} of {total:,}{time_left}{': ' if shown else ''}{shown}"


def evaluated(logged: Mapping[str, Any]) -> dict[str, float]:
    """The measures for the line of an evaluation: the loss of the last update, and the means of the validation split.

    Args:
        logged: measures by their logged names. Those of single layers are left out.
    """
    means = {name: value for name, value in logged.items() if name.startswith("val_") and "/" not in name}
    named = {f"validation {name.removeprefix('val_').replace('_', ' ')}": float(value) for name, value in means.items()}
    return ({"loss": float(logged["loss"])} if "loss" in logged else {}) | named


def bar(done: int, total: int) -> str:
    """The bar of the updates, in ASCII, which every terminal can show."""
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


class Progress(Callback):
    """Shows updates, time left, loss, metric and activation rate in one line.

    The line is replaced in a terminal and in Jupyter. Any other output, such as a file, gets a line per evaluation.

    Args:
        updates: number of updates of the training.
    """

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self._line: Line | Cell | None = None
        self._began, self._first, self._shown = 0.0, 0, 0.0

    def _text(self, trainer: Trainer, measures: Mapping[str, float]) -> str:
        done = min(trainer.global_step, self.updates)
        own = done - self._first
        left = (time.monotonic() - self._began) / own * (self.updates - done) if own > 0 else None
        return progress_text(done, self.updates, left, measures)

    def _refresh(self, trainer: Trainer, what: str | None = None) -> None:
        if self._line is not None:
            self._shown = time.monotonic()
            measures: Any = trainer.progress_bar_metrics
            text = what or self._text(trainer, measures)
            self._line.show(f"{bar(trainer.global_step, self.updates)} {text}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the line."""
        self._began, self._first = time.monotonic(), trainer.global_step
        self._line = in_place() if trainer.is_global_zero else None
        self._refresh(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refresh the line. The measures are read from the device at most twice a second."""
        if time.monotonic() - self._shown >= _EVERY:
            self._refresh(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show that the validation split is evaluated."""
        self._refresh(trainer, f"{progress_text(trainer.global_step, self.updates, None, {})}, evaluating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear the line for the warnings of other callbacks, until the next update; or print one."""
        if self._line is not None:
            self._line.clear()
            self._shown = 0.0
        elif trainer.is_global_zero:
            print(self._text(trainer, evaluated(trainer.callback_metrics)), flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the line."""
        if self._line is not None:
            self._refresh(trainer)
            self._line.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the line, so that a message begins on a new one."""
        if self._line is not None:
            self._line.end()
