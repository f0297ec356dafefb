"""Measures of updates that stay on their device until the host needs them."""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from sma.decision import Decision
from sma.stats import RateCount, count_rates


class Measures(NamedTuple):
    """Measures of one update or evaluation batch. No shape depends on the routing or on the targets.

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


def overflow_of(decisions: Sequence[Decision]) -> Tensor | None:
    """Number of active tokens beyond a capacity, over all layers; None without a capacity."""
    beyond = [decision.overflow.sum() for decision in decisions if decision.overflow is not None]
    return torch.stack(beyond).sum() if beyond else None


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


class Overflow(NamedTuple):
    """Active tokens that found no slot in a capacity.

    Attributes:
        beyond: number of these tokens, over all layers.
        activated: number of tokens that the routers activated.
    """

    beyond: int = 0
    activated: int = 0

    @property
    def share(self) -> float:
        """Fraction of the activated tokens that are beyond the capacity; 0 without activated tokens."""
        return self.beyond / max(1, self.activated)

    def plus(self, other: "Overflow") -> "Overflow":
        """The sum of the counts of two periods."""
        return Overflow(self.beyond + other.beyond, self.activated + other.activated)


class RateMetric(Metric):
    """Activation rate of every sub-module of every routed layer, over all batches and all ranks.

    Args:
        layers: the sub-modules of every routed layer.
    """

    active: Tensor
    valid: Tensor
    overflow: Tensor

    def __init__(self, layers: Sequence[tuple[str, ...]]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        names = {name for layer in layers for name in layer}
        self.add_state("active", torch.zeros(len(self.layers), len(names), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("valid", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("overflow", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, decisions: Sequence[Decision], valid: Tensor) -> None:
        """Add one batch."""
        self.add(count_rates(decisions, valid))

    def add(self, count: RateCount, overflow: Tensor | None = None) -> None:
        """Add the counts of one batch, and its number of active tokens beyond a capacity."""
        if overflow is not None:
            self.overflow += overflow
        self.active += count.active.to(self.active.device)  # without a routed layer they are on the CPU
        self.valid += count.valid.to(self.valid.device)

    def compute(self) -> Tensor:
        """The rates; see `RateCount.rates`."""
        return RateCount(self.active, self.valid, self.layers).rates

    def by_name(self) -> dict[str, float]:
        """The rates by their logged names, such as `layer0/attention`."""
        layers = RateCount(self.active, self.valid, self.layers).by_layer()
        return {f"layer{index}/{name}": rate for index, layer in enumerate(layers) for name, rate in layer.items()}

    def overflowed(self) -> Overflow:
        """The active tokens beyond the capacity, and all that the routers activated; all ranks must call it."""
        with self.sync_context():
            beyond = int(self.overflow)
            return Overflow(beyond, beyond + int(self.active.sum()))

    def measures(self, split: str) -> dict[str, float]:
        """The rates of a split over all ranks by their logged names, their mean first; resets the metric."""
        with self.sync_context():
            rates = self.by_name()
        self.reset()
        mean = {f"{split}_rate": sum(rates.values()) / len(rates)} if rates else {}
        return mean | {f"{split}_rate/{name}": rate for name, rate in rates.items()}


class Scores(nn.ModuleDict):
    """Measures of one split: the metric of the task, and the activation rates of the routed layers.

    Args:
        name: name of the metric, which is logged as `SPLIT_NAME`.
        metric: the metric.
        layers: names of the sub-modules of every routed layer.
        short: name of the metric in the progress bar and in checkpoints; None: `name`.
    """

    def __init__(self, name: str, metric: Metric, layers: Sequence[tuple[str, ...]], short: str | None = None) -> None:
        super().__init__({short or name: metric, "rates": RateMetric(layers)})
        self.name, self.short = name, short or name

    def add(self, measures: Measures) -> None:
        """Add one batch."""
        cast(Metric, self[self.short]).update(*measures.metric)
        cast(RateMetric, self["rates"]).add(measures.rates, measures.overflow)

    def compute(self, split: str) -> dict[str, float]:
        """The measures by their logged names; resets them."""
        metric = cast(Metric, self[self.short])
        measures = {f"{split}_{self.name}": float(metric.compute())}
        metric.reset()
        return measures | cast(RateMetric, self["rates"]).measures(split)


class UnseenLosses:
    """Losses that are still on an accelerator, because the host would have to wait for each of them."""

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []

    def add(self, update: int, loss: Tensor) -> None:
        """Keep a copy of the loss of an update."""
        self._losses.append((update, loss.detach().clone()))

    def first_bad(self) -> tuple[int, float] | None:
        """Wait for the losses and drop them.

        Returns:
            the update and the value of the first loss that is not finite; None if all are finite.
        """
        kept, self._losses = self._losses, []
        values = torch.stack([loss for _, loss in kept]).tolist() if kept else []
        bad = ((update, value) for (update, _), value in zip(kept, values, strict=True) if not math.isfinite(value))
        return next(bad, None)
