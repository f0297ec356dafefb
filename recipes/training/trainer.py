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
from sma.recipes.training.distributed import SINGLE_PROCESS, DistributedContext


@contextmanager
def isolated(distributed: DistributedContext = SINGLE_PROCESS) -> Iterator[None]:
    """Hide the variables of schedulers, ranks and settings from Lightning; rank and world size come from the context.

    As it is imported Lightning also decides by the environment which process may write and print, and may have done so
    before.
    """
    speakers: list[Any] = [rank_zero_only, prints.rank_zero_only]
    before = [speaker.rank for speaker in speakers]
    with hidden_variables(ranks=distributed.world_size == 1):
        for speaker in speakers:
            speaker.rank = distributed.rank
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


def make_trainer(
    distributed: DistributedContext = SINGLE_PROCESS, *, plugins: tuple[Any, ...] = (), **options: Any
) -> Trainer:
    """A trainer on one device of this process, as one rank of several or as the only one.

    Args:
        distributed: rank and world size; a single process takes no others from the environment.
        plugins: Lightning's plugins besides those of the context.
        options: of Lightning's `Trainer`.
    """
    environment = () if distributed.plugins else (LightningEnvironment(),)
    with isolated(distributed):
        return Trainer(
            devices=1, strategy=distributed.strategy, plugins=[*plugins, *distributed.plugins, *environment], **options
        )


def run_test(
    trainer: Trainer,
    module: LightningModule,
    batches: DataLoader[Any],
    distributed: DistributedContext = SINGLE_PROCESS,
) -> Mapping[str, float]:
    """Measures of the test split, by their logged names."""
    with isolated(distributed), interruptible():
        return trainer.test(module, batches, verbose=False)[0]
