"""Spec of a budget: target rates and their schedule, and checks that routers can reach them."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from sma.checks import check_known, check_number
from sma.errors import InputError, quote
from sma.routers import Router, SteerableRouter
from sma.routers.steerable import steerable
from sma.spec import FrozenMapping, Spec

ANNEALING_PARTS = 8
"""Number of parts of `anneal` in which an upper bound of the rates is constant."""


class BudgetSpec(Spec):
    """Spec of `BudgetController`: target rates and their schedule."""

    target: float | FrozenMapping[float] | tuple[float | FrozenMapping[float], ...] = Field(
        description="activation rate to keep, above 0 and at most 1: one for all sub-modules, one per name (others are "
        "not steered), or a list with one of these for every routed layer"
    )
    over: Literal["each", "total"] = Field(
        default="each",
        description="each: every sub-module of every layer keeps the target; total: the mean over all, weighted by "
        "their cost, does, and the routers divide it among themselves",
    )
    start: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="rate of the first update, so that routers learn from many tokens at first",
    )
    hold: int = Field(default=0, ge=0, description="updates at the rate `start`")
    anneal: int = Field(default=0, ge=0, description="updates in which the rate then falls, or rises, to the target")
    exploration: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="amplitude of the rate above its target, as a share of the target, so tokens near the threshold "
        "are activated periodically; fades out during the training",
    )
    period: int = Field(default=100, ge=2, description="updates of one oscillation")
    until: int | None = Field(
        default=None, ge=1, description="update at which exploration has faded out; null: it never fades"
    )
    speed: float = Field(
        default=0.1, gt=0.0, le=1.0, description="share of the gap to the right score bias that one update closes"
    )
    floor: float = Field(
        default=0.01,
        ge=0.0,
        lt=1.0,
        description="rate below which a router counts as dying and is revived at once; at most the target",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        layers = self.target if isinstance(self.target, tuple) else (self.target,)
        rates = [rate for layer in layers for rate in (layer.values() if isinstance(layer, Mapping) else [layer])]
        bad = [rate for rate in rates if not 0 < rate <= 1]
        if bad:
            raise ValueError(
                f"target={bad[0]} must be above 0 and at most 1; for a rate of 0 use the router {{kind: never}}"
            )
        if self.over == "total" and not isinstance(self.target, float):
            raise ValueError("over='total' keeps one rate, so target must be one number")
        if any(self.floor > rate for rate in rates):
            raise ValueError(f"floor={self.floor} must be at most the target; lower it")
        return self

    @property
    def settled(self) -> int:
        """Update from which the rate is at its target, except for oscillations that never fade."""
        return max(self.hold + self.anneal, (self.until or 0) if self.exploration else 0)

    def ceiling(self, target: float, update: int) -> float:
        """An upper bound of the rates to keep around update `update`, which changes at most ten times in a training.

        It is that of one eighth of `anneal`, with the whole amplitude of the exploration. Static capacities follow it.
        """
        part = math.floor(ANNEALING_PARTS * (update - self.hold) / self.anneal) if self.anneal else ANNEALING_PARTS
        # A rate that falls is highest at the beginning of the part, one that rises at its end.
        shares = [min(max(each / ANNEALING_PARTS, 0.0), 1.0) for each in (part, part + 1)]
        if update < self.hold:
            shares = [0.0]
        rate = max(self.start * (target / self.start) ** share for share in shares)
        exploring = self.exploration if self.until is None or update < self.until else 0.0
        return min(1.0, rate * (1 + exploring))

    def scheduled(self, target: float, update: int) -> float:
        """The rate to keep at update `update`, counted from 0."""
        return float(self.schedule(torch.tensor([target], dtype=torch.float64), torch.tensor(update))[0])

    def schedule(self, targets: Float[Tensor, "S"], update: Int[Tensor, ""]) -> Float[Tensor, "S"]:
        """The rates to keep at an update, counted from 0, on the device of the targets."""
        done = (((update - self.hold) / self.anneal).clamp(0, 1) if self.anneal else update >= self.hold).double()
        # Geometric, because learning depends on the ratio of the tokens that a router keeps to those that it drops.
        rates = self.start * (targets / self.start) ** done
        if self.exploration:
            fading = 1.0 if self.until is None else (1 - update / self.until).clamp(min=0)
            rates = rates * (1 + self.exploration * fading * 0.5 * (1 - (2 * math.pi * update / self.period).cos()))
        return rates.clamp(max=1.0)


class Steered(NamedTuple):
    """A sub-module that is steered.

    Attributes:
        layer: index of its routed layer.
        column: index in the router's names.
        target: rate to keep.
        cost: weight in a total budget.
    """

    layer: int
    column: int
    target: float
    cost: float


def steered_by(spec: BudgetSpec, routers: Sequence[Router], costs: Sequence[Sequence[float]] | None) -> list[Steered]:
    """Return the sub-modules that a budget steers, layer by layer; see `BudgetController`.

    Raises:
        InputError: a target names an unknown sub-module, a router cannot reach its target, or a cost is invalid.
    """
    if costs is None:
        costs = [[1.0] * len(router.names) for router in routers]
    _check_costs(costs, routers)
    if isinstance(spec.target, tuple):
        if len(spec.target) != len(routers):
            raise InputError(
                f"the budget has targets for {len(spec.target)} layers, and {len(routers)} are routed; "
                "give one for each of those"
            )
        by_layer = [_by_name(target, [router]) for target, router in zip(spec.target, routers, strict=True)]
    else:
        by_layer = [_by_name(spec.target, routers)] * len(routers)
    found = []
    for layer, router in enumerate(routers):
        targets = {name: by_layer[layer][name] for name in router.names if name in by_layer[layer]}
        if targets and spec.over == "each":
            steerable(router).check_targets(targets)
        for name, target in targets.items():
            column = router.names.index(name)
            found.append(Steered(layer, column, target, float(costs[layer][column])))
    if found and spec.over == "total":
        # A router without sub-modules has nothing to steer.
        pairs = [(steerable(router), each) for router, each in zip(routers, costs, strict=True) if router.names]
        _check_total(found[0].target, pairs)
    return found


def _check_costs(costs: Sequence[Sequence[float]], routers: Sequence[Router]) -> None:
    wanted = [len(router.names) for router in routers]
    if not isinstance(costs, Sequence) or not all(isinstance(layer, list | tuple) for layer in costs):
        raise InputError(
            f"costs={quote(costs)} must be a list with a list of numbers for each layer, of sizes {wanted}"
        )
    given = [len(layer) for layer in costs]
    if given != wanted:
        raise InputError(f"there are costs for {given} sub-modules, by layer; expected one for each of {wanted}")
    for layer in costs:
        for cost in layer:
            check_number(cost, "the cost of a sub-module")
    bad = [cost for layer in costs for cost in layer if not 0 <= cost < math.inf]  # in this form it is true for NaN too
    if bad:
        raise InputError(
            f"a sub-module costs {bad[0]}; expected a finite number of at least 0, such as its MACs per token"
        )


def _check_total(target: float, pairs: Sequence[tuple[SteerableRouter, Sequence[float]]]) -> None:
    """Check that one shift of all scores can bring the mean rate, weighted by cost, to the target.

    Args:
        target: mean rate.
        pairs: every router, and the costs of its sub-modules.
    """
    everything = math.fsum(cost for _, layer in pairs for cost in layer)
    if not everything:
        raise InputError("a total budget weights rates by cost, and all costs are 0; give costs, or use over='each'")
    low = math.fsum(_first(router.minimum_total_rate, sorted(layer)) for router, layer in pairs) / everything
    high = (
        math.fsum(_first(router.maximum_total_rate, sorted(layer, reverse=True)) for router, layer in pairs)
        / everything
    )
    if not low - 1e-6 <= target <= high + 1e-6:
        raise InputError(
            f"weighted by cost the rates of these routers sum to between {low:.4g} and {high:.4g}, and the target is "
            f"{target:g}; give one in between"
        )
    if high - low > 1e-6 and all(
        router.minimum_total_rate >= min(router.maximum_total_rate, len(router.names)) for router, _ in pairs
    ):
        raise InputError(
            "each of these routers runs the same number of sub-modules on every token, and a shift of all scores "
            "changes no total; use over='each', or give them empty choices, such as the skips of top_k"
        )


def _first(count: float, costs: Sequence[float]) -> float:
    """The sum of the first `count` costs; a fractional count includes a part of the last one."""
    return math.fsum(cost * min(1.0, max(0.0, count - index)) for index, cost in enumerate(costs))


def _by_name(target: float | Mapping[str, float], routers: Sequence[Router]) -> Mapping[str, float]:
    names = list(dict.fromkeys(name for router in routers for name in router.names))
    if not isinstance(target, Mapping):
        return dict.fromkeys(names, target)
    check_known(target, names, "the target of the budget")
    return target
