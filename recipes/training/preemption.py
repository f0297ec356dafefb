"""The end of a training after a signal, between two updates or in an evaluation. It resumes to the same results."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from sma.recipes.experiment import TrainingSpec
from sma.recipes.io.run_folder import LAST
from sma.recipes.io.signals import Preempted
from sma.recipes.training.callbacks import RandomStates


class Preemption(Callback):
    """Saves the last checkpoint and ends the training after a signal.

    If the signal interrupts an evaluation, the checkpoint has the random states from before it and a flag, so that a
    resumed run repeats the evaluation first.

    Args:
        out: the run folder.
        training: the number of updates and the interval of the evaluations.
        states: the callback that saves the random states in checkpoints.

    Attributes:
        number: number of the received signal; None before one is received.
        install: function that installs the handlers of the signals again, which Lightning replaces; None if signals
            are not handled.
    """

    def __init__(self, out: Path, training: TrainingSpec, states: RandomStates) -> None:
        self.out, self.training, self.states = out, training, states
        self.number: int | None = None
        self.install: Callable[[], None] | None = None
        self._evaluation_pending = False
        self._before_evaluation: tuple[dict[str, Any], dict[str, Any]] | None = None

    def note(self, number: int) -> None:
        """Record a signal. The training ends when the current update is complete."""
        self.number = number

    def state_dict(self) -> dict[str, Any]:
        """The flag of a pending evaluation, which `on_save_checkpoint` sets if one was interrupted."""
        return {"owes_evaluation": False}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the flag."""
        self._evaluation_pending = bool(state_dict["owes_evaluation"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the pending evaluation."""
        if self.install is not None:
            self.install()
            # `note` has recorded an earlier signal too. Lightning's own reaction would end without a checkpoint.
            trainer._signal_connector.received_sigterm = False
        loop = trainer.fit_loop.epoch_loop
        loop.max_steps = self.training.updates
        if self._evaluation_pending:
            self._evaluation_pending = False
            loop.val_loop.restarting = False
            self._remember(trainer)
            # The steps of Lightning's own evaluation between two updates.
            first = trainer._logger_connector._first_loop_iter
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True
            trainer._logger_connector._first_loop_iter = first

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Copy the states that the evaluation after this update changes."""
        done, training = trainer.global_step, self.training
        if done % training.evaluate_every == 0 or done >= training.updates:
            self._remember(trainer)

    def between_updates(self, trainer: Trainer) -> None:
        """End the training if a signal was received. The previous update is complete, and the next has not started.

        Raises:
            Preempted: a signal was received.
        """
        if self.number is not None:
            self._end(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """End the training in the evaluation if a signal was received."""
        if self.number is not None:
            self._evaluation_pending = True
            self._end(trainer)

    on_validation_batch_end = on_validation_start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace the states by those from before the interrupted evaluation."""
        if self._evaluation_pending and self._before_evaluation is not None:
            loops, states = self._before_evaluation
            checkpoint["loops"]["fit_loop"].update(loops)
            checkpoint["callbacks"][self.states.state_key] = states
            checkpoint["callbacks"][self.state_key] = {"owes_evaluation": True}

    def _remember(self, trainer: Trainer) -> None:
        if self.install is not None:
            loops = trainer.fit_loop.epoch_loop.val_loop.state_dict(prefix="epoch_loop.val_loop.")
            self._before_evaluation = copy.deepcopy(loops), self.states.state_dict()

    def _end(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.out / LAST)
        raise Preempted(self.number or 0, self.words(trainer.global_step))

    def words(self, done: int) -> str:
        """The number of saved updates as text."""
        return f"update {done:,} of {self.training.updates:,} is saved"


def has_pending_evaluation(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was written in an evaluation, which a resumed run must repeat."""
    return bool(checkpoint["callbacks"].get(Preemption.__qualname__, {}).get("owes_evaluation"))
