"""Lightning's trainer, with explicit settings instead of those that it derives from the environment."""

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

    Lightning also reads the rank from the environment at its import, to decide whether this process may write and
    print. The block overrides that rank.
    """
    decorators: list[Any] = [rank_zero_only, prints.rank_zero_only]
    before = [decorator.rank for decorator in decorators]
    with hidden_variables(ranks=distributed.world_size == 1):
        for decorator in decorators:
            decorator.rank = distributed.rank
        try:
            yield
        finally:
            for decorator, rank in zip(decorators, before, strict=True):
                decorator.rank = rank


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on Ctrl-C, which Lightning turns into `SystemExit` before it ignores the signal.

    A `SystemExit` with another cause, such as a callback, is passed on.
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
    """Make a trainer on one device of this process.

    Args:
        distributed: rank and world size. A single process ignores those in the environment.
        plugins: Lightning's plugins besides those of the context.
        options: options of Lightning's `Trainer`.
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
    """Test a module; returns the measures of the test split by their logged names."""
    with isolated(distributed), interruptible():
        return trainer.test(module, batches, verbose=False)[0]
