"""Time and tokens of a training, summed over its interruptions."""

import time
from typing import Any, NamedTuple

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from sma.recipes.training.distributed import all_gather_object


class Spent(NamedTuple):
    """Cost of a training.

    Attributes:
        elapsed: total time, in seconds.
        updating: time in updates, in seconds, without evaluation, checkpoints and reading data.
        tokens: number of tokens in the updates, over all ranks.
    """

    elapsed: float = 0.0
    updating: float = 0.0
    tokens: int = 0


class Stopwatch(Callback):
    """Measures the cost of a training. The checkpoint holds the cost up to it, to which a resumed run adds its own.

    Attributes:
        seconds: time in updates since the start or the last resumption, in seconds.
        earlier: cost up to the checkpoint from which the run resumed.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.earlier = Spent()
        self._began = self._since = time.perf_counter()
        self._tokens: int | Tensor = 0  # a tensor is read at the end, because the host would wait for it

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of an update."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the time of the update."""
        self.seconds += time.perf_counter() - self._since
        self._tokens = getattr(pl_module, "tokens_seen", 0)

    def spent(self) -> Spent:
        """The cost of the training so far; all ranks must call it."""
        elapsed, updating, tokens = self.earlier
        seconds = elapsed + time.perf_counter() - self._began
        return Spent(seconds, updating + self.seconds, tokens + sum(all_gather_object(int(self._tokens))))

    def state_dict(self) -> dict[str, Any]:
        """The cost of the training so far."""
        return self.spent()._asdict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the cost up to the checkpoint."""
        self.earlier = Spent(**state_dict)
