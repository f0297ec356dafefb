"""Measures of updates that stay on their device until the host needs them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from sma.stats import RateCount


class Measures(NamedTuple):
    """What is measured in one update or evaluation batch. No shape depends on the routing or on the targets.

    Attributes:
        loss: loss of the task, without routing losses.
        rates: active and valid tokens of every routed layer.
        metric: arguments of the metric of the task.
        tokens: number of tokens.
        overflow: number of active tokens beyond the capacity, over all layers; None without a capacity.
    """

    loss: Tensor
    rates: RateCount
    metric: tuple[Tensor, ...]
    tokens: Tensor | int
    overflow: Tensor | None = None


class Average(Metric):
    """Sum over number of values, which are summed before they are added; 0 without a value.

    Args:
        dtype: dtype of the sum.
    """

    sum: Tensor
    count: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.add_state("sum", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add the sum of some values, and their number."""
        self.sum += total
        self.count += count

    def compute(self) -> Tensor:
        """The mean."""
        return self.sum / self.count.clamp(min=1)


class UnseenLosses:
    """Losses on an accelerator that the host has not seen, because it would have to wait for each of them."""

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []

    def add(self, update: int, loss: Tensor) -> None:
        """Keep a copy of the loss of an update."""
        self._losses.append((update, loss.detach().clone()))

    def first_bad(self) -> tuple[int, float] | None:
        """Wait for the losses and forget them.

        Returns:
            the update and the value of the first loss that is not finite; None if all are finite.
        """
        kept, self._losses = self._losses, []
        values = torch.stack([loss for _, loss in kept]).tolist() if kept else []
        bad = ((update, value) for (update, _), value in zip(kept, values, strict=True) if not math.isfinite(value))
        return next(bad, None)
