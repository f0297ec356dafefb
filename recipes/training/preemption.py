"""A training that ends on a signal: it stops between two updates, or in an evaluation, and goes on from there to the
same results.
"""

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

    A checkpoint of an evaluation that was left says so: whoever goes on from it evaluates first. It holds the random
    states from before that evaluation.

    Args:
        out: the run folder.
        training: says after which updates there is an evaluation.
        states: the random states, as they go into checkpoints.

    Attributes:
        number: of the signal that came; None: none did.
        install: puts the handlers of the signals back in force, which Lightning replaces; None where signals are not
            watched.
    """

    def __init__(self, out: Path, training: TrainingSpec, states: RandomStates) -> None:
        self.out, self.training, self.states = out, training, states
        self.number: int | None = None
        self.install: Callable[[], None] | None = None
        self._owes_evaluation = False
        self._before_evaluation: tuple[dict[str, Any], dict[str, Any]] | None = None

    def note(self, number: int) -> None:
        """A signal has come; nothing is done about it before what is being computed is complete."""
        self.number = number

    def state_dict(self) -> dict[str, Any]:
        """Whether the evaluation after the last update is still to be made."""
        return {"owes_evaluation": False}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What the checkpoint owes."""
        self._owes_evaluation = bool(state_dict["owes_evaluation"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the evaluation that is owed."""
        if self.install is not None:
            self.install()
            # A signal that came before this was noted here too; what Lightning does about it saves nothing.
            trainer._signal_connector.received_sigterm = False
        loop = trainer.fit_loop.epoch_loop
        loop.max_steps = self.training.updates
        if self._owes_evaluation:
            self._owes_evaluation = False
            loop.val_loop.restarting = False
            self._remember(trainer)
            # As Lightning itself evaluates between two updates.
            first = trainer._logger_connector._first_loop_iter
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True
            trainer._logger_connector._first_loop_iter = first

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember what an evaluation changes."""
        done, training = trainer.global_step, self.training
        if done % training.evaluate_every == 0 or done >= training.updates:
            self._remember(trainer)

    def between_updates(self, trainer: Trainer) -> None:
        """End the training here if a signal has come: everything about the update before is complete, and nothing of
        the next has begun.

        Raises:
            Preempted: it has.
        """
        if self.number is not None:
            self._end(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the evaluation."""
        self._leave_evaluation(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Leave the evaluation."""
        self._leave_evaluation(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the state of before the evaluation that is left."""
        if self._owes_evaluation and self._before_evaluation is not None:
            loops, states = self._before_evaluation
            checkpoint["loops"]["fit_loop"].update(loops)
            checkpoint["callbacks"][self.states.state_key] = states
            checkpoint["callbacks"][self.state_key] = {"owes_evaluation": True}

    def _remember(self, trainer: Trainer) -> None:
        if self.install is not None:
            loops = trainer.fit_loop.epoch_loop.val_loop.state_dict(prefix="epoch_loop.val_loop.")
            self._before_evaluation = copy.deepcopy(loops), self.states.state_dict()

    def _leave_evaluation(self, trainer: Trainer) -> None:
        if self.number is not None:
            self._owes_evaluation = True
            self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.out / LAST)
        raise Preempted(self.number or 0, self.words(trainer.global_step))

    def words(self, done: int) -> str:
        """What is saved."""
        return f"update {done:,} of {self.training.updates:,} is saved"


def owes_evaluation(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was written in an evaluation, which is to be made again."""
    return bool(checkpoint["callbacks"].get(Preemption.__qualname__, {}).get("owes_evaluation"))
