"""The trainer of a run: Lightning's, told everything that it would guess from the environment."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader
from torchmetrics.utilities import prints

from sma.recipes.io.isolation import hidden_variables
from sma.recipes.training.distributed import ALONE, Team


@contextmanager
def isolated(team: Team = ALONE) -> Iterator[None]:
    """Hide from Lightning what the environment says about schedulers, ranks and settings; the team says who takes part.

    As it is imported Lightning also decides by the environment which process may write and print, and may have done so
    before.
    """
    speakers: list[Any] = [rank_zero_only, prints.rank_zero_only]
    before = [speaker.rank for speaker in speakers]
    with hidden_variables(ranks=team.size == 1):
        for speaker in speakers:
            speaker.rank = team.rank
        try:
            yield
        finally:
            for speaker, rank in zip(speakers, before, strict=True):
                speaker.rank = rank


@contextmanager
def interruptible() -> Iterator[None]:
    """Lightning answers Ctrl-C with an exit and ignores the signal from then on; for the caller it is a
    `KeyboardInterrupt`.

    An exit that something else asked for, such as a callback, stays one.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def make_trainer(team: Team = ALONE, *, plugins: tuple[Any, ...] = (), **options: Any) -> Trainer:
    """A trainer on one device of this process, as one of a team or alone.

    Args:
        team: the processes that train together; with one of them there is no other environment than this process.
        plugins: of Lightning, besides those of the team.
        options: of Lightning's `Trainer`.
    """
    environment = () if team.plugins else (LightningEnvironment(),)
    with isolated(team):
        return Trainer(devices=1, strategy=team.strategy, plugins=[*plugins, *team.plugins, *environment], **options)


def run_test(
    trainer: Trainer, learner: LightningModule, batches: DataLoader[Any], team: Team = ALONE
) -> Mapping[str, float]:
    """What the model measures on the test split, by the logged names."""
    with isolated(team), interruptible():
        return trainer.test(learner, batches, verbose=False)[0]
