"""The progress of a training as one line of text."""

import time
from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from sma.recipes.io.progress import EVERY, Cell, Line, bar, duration, in_place


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


class Progress(Callback):
    """Shows updates, time left, loss, metric and activation rate in one line.

    The line is replaced in a terminal and in Jupyter. Any other output, such as a file, gets a line per evaluation. A
    test shows its batches, in a terminal and in Jupyter only.

    Args:
        updates: number of updates of the training; 0 for a test alone.
    """

    def __init__(self, updates: int = 0) -> None:
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
        if time.monotonic() - self._shown >= EVERY:
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

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a line."""
        self._line, self._shown = in_place() if trainer.is_global_zero else None, 0.0

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Refresh the line, at most twice a second and after the last batch."""
        done, total = batch_idx + 1, int(trainer.num_test_batches[dataloader_idx])
        if self._line is not None and (done == total or time.monotonic() - self._shown >= EVERY):
            self._shown = time.monotonic()
            self._line.show(f"{bar(done, total)} testing: batch {done:,} of {total:,}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear the line for the results."""
        if self._line is not None:
            self._line.clear()
            self._line = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the line, so that a message begins on a new one."""
        if self._line is not None:
            self._line.end()
