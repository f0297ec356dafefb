"""Budgets: steer the activation rates of learned routers, in training and on a trained model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from sma.activation import SparseModularActivation, check_valid
from sma.decision import Decision
from sma.errors import InputError, did_you_mean
from sma.model import ModelSpec, SequenceModel
from sma.routers import Router
from sma.spec import FrozenMapping, Spec
from sma.stats import RateCount, count_rates


class BudgetSpec(Spec):
    """Spec of `BudgetController`: which rates to keep, and how to come there."""

    target: float | FrozenMapping[float] | tuple[float | FrozenMapping[float], ...] = Field(
        description="activation rate to keep, above 0 and at most 1: one for all sub-modules, one per name (others are left alone), or a "
        "list with such a thing for every routed layer"
    )
    over: Literal["each", "total"] = Field(
        default="each",
        description="each: every sub-module of every layer keeps the target; total: the mean over all, weighted by their cost, does, "
        "and the routers divide it among themselves",
    )
    start: float = Field(
        default=1.0, gt=0.0, le=1.0, description="rate of the first update, so that routers learn from many tokens at first"
    )
    hold: int = Field(default=0, ge=0, description="updates at the rate `start`")
    anneal: int = Field(default=0, ge=0, description="updates in which the rate then falls, or rises, to the target")
    exploration: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="swing of the rate above its target, as a share of the target, so that tokens near the threshold are tried now and "
        "then; fades out with the training",
    )
    period: int = Field(default=100, ge=2, description="updates of one swing")
    until: int | None = Field(default=None, ge=1, description="update at which exploration has faded out; null: it never fades")
    speed: float = Field(default=0.1, gt=0.0, le=1.0, description="share of the gap to the right offset that one update closes")
    floor: float = Field(
        default=0.01, ge=0.0, lt=1.0, description="rate below which a router counts as dying and is revived at once; at most the target"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        layers = self.target if isinstance(self.target, tuple) else (self.target,)
        rates = [rate for layer in layers for rate in (layer.values() if isinstance(layer, Mapping) else [layer])]
        bad = [rate for rate in rates if not 0 < rate <= 1]
        if bad:
            raise ValueError(f"target={bad[0]} must be above 0 and at most 1; for no activity at all use the router {{kind: never}}")
        if self.over == "total" and not isinstance(self.target, float):
            raise ValueError("over='total' keeps one rate, so target must be one number")
        if any(self.floor > rate for rate in rates):
            raise ValueError(f"floor={self.floor} must be at most the target; lower it")
        return self

    @property
    def settled(self) -> int:
        """Updates after which the rate stands at its target, but for swings that never fade."""
        return max(self.hold + self.anneal, (self.until or 0) if self.exploration else 0)

    def scheduled(self, target: float, update: int) -> float:
        """The rate to keep at update number `update`, counted from 0."""
        done = min(1.0, max(0.0, (update - self.hold) / self.anneal)) if self.anneal else float(update >= self.hold)
        if self.hold == self.anneal == 0:
            done = 1.0
        # In the logarithm, because what a router learns depends on the ratio of the tokens it keeps to those it gives up.
        rate = self.start * (target / self.start) ** done
        fading = 1.0 if self.until is None else max(0.0, 1 - update / self.until)
        swing = self.exploration * fading * 0.5 * (1 - math.cos(2 * math.pi * update / self.period))
        return min(1.0, rate * (1 + swing))


SURE = 4.0
"""Log-odds at which a router that samples counts as running everything: 98 % of the draws."""


class Steered(NamedTuple):
    """A sub-module that is steered.

    Attributes:
        layer: number of its routed layer.
        place: in the router's names.
        target: rate to keep.
        cost: weight in a total budget.
    """

    layer: int
    place: int
    target: float
    cost: float


class BudgetController(nn.Module):
    r"""Keeps the activation rates of routers at a target by moving their offsets.

    After every update it counts, over all ranks, how many tokens would be active at any offset, finds the one that gives the
    scheduled rate, and moves the router's offset a share `speed` of the way; an update of many tokens counts more than one of few.
    The offset is a buffer of the router, so it is saved with the model, and forward never changes it. The loss and its gradient are
    untouched; a router that has died or saturated is moved until tokens reach it again.

    Args:
        spec: target and schedule.
        routers: of the routed layers, in the order of the decisions.
        costs: per layer and sub-module, any unit; needed for `over: total` only. Default: all cost the same.

    Raises:
        InputError: a target names no sub-module, or a router cannot reach its target.

    Example:
        ``controller = BudgetController.of(model, BudgetSpec(target=0.3))``, and after each update
        ``controller.update(output.decisions, valid)``.
    """

    updates: Tensor
    usual_tokens: Tensor

    def __init__(self, spec: BudgetSpec, routers: Sequence[Router], costs: Sequence[Sequence[float]] | None = None) -> None:
        super().__init__()
        self.spec = spec
        # In a tuple, so that the routers' parameters are not counted as the controller's own.
        self.routers = tuple(routers)
        self.steered = _steered(spec, routers, costs)
        self._by_layer: dict[int, list[int]] = {}
        for number, steered in enumerate(self.steered):
            self._by_layer.setdefault(steered.layer, []).append(number)
        self._idling = [layer for layer in self._by_layer if self.routers[layer].competing]
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("usual_tokens", torch.zeros((), dtype=torch.float64))

    @classmethod
    def of(cls, model: nn.Module, spec: BudgetSpec, length: int = 1024) -> Self:
        """Make the controller of a model; a total budget is weighted by the operations of the sub-modules on rows of `length` tokens."""
        model_spec = getattr(model, "spec", None)
        costs = module_costs(model_spec, length) if spec.over == "total" and isinstance(model_spec, ModelSpec) else None
        return cls(spec, routers_of(model), costs)

    @torch.no_grad()
    def update(self, decisions: Sequence[Decision], valid: Bool[Tensor, "B L"] | None = None) -> None:
        """Move the offsets after one update; every rank calls it with decisions of its own.

        Args:
            decisions: one per routed layer, of the forward pass of this update.
            valid: False at padding; None where there is none.

        Raises:
            InputError: the number of decisions or the mask does not fit.
        """
        counts = self.count(decisions, valid)
        self.move(counts, self.spec.speed * self._weight(counts))
        self.updates += 1

    def count(self, decisions: Sequence[Decision], valid: Bool[Tensor, "B L"] | None = None) -> Int[Tensor, "S N"]:
        """Count the tokens of all ranks by how far their scores are from the decision, for every steered sub-module, and then by how far
        they are from running nothing at all.
        """
        if len(decisions) != len(self.routers):
            raise InputError(f"there are {len(decisions)} decisions for {len(self.routers)} routers; give those of all routed layers")
        counts = []
        for steered in self.steered:
            decision, unit = decisions[steered.layer], self.routers[steered.layer].unit
            check_valid(decision.active, valid)
            logits = decision.logits[..., steered.place, :].double()
            counts.append(_histogram((logits[..., 1] - logits[..., 0]) / unit - self._more(steered), valid))
        for layer in self._idling:
            margins = self.routers[layer].idle_margins(decisions[layer])
            counts.append(torch.zeros_like(counts[0]) if margins is None else _histogram(margins.double(), valid))
        total = torch.stack(counts) if counts else torch.zeros(0, BINS, dtype=torch.int64)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return total

    def _more(self, steered: Steered) -> float:
        """Log-odds above the threshold that a token needs to count as active."""
        everyone = self.spec.scheduled(steered.target, int(self.updates)) >= 1.0
        return SURE if everyone and self.routers[steered.layer].samples else 0.0

    def _weight(self, counts: Tensor) -> float:
        """Tokens of this update over the usual number: where batches hold rows of like length, short rows would count too much."""
        tokens = float(counts[0].sum()) if self.steered else 0.0
        if not tokens:
            return 1.0
        self.usual_tokens += (tokens - self.usual_tokens) * (0.02 if self.usual_tokens else 1.0)
        return min(tokens / float(self.usual_tokens), 1 / self.spec.speed)

    def move(self, counts: Int[Tensor, "S N"], speed: float) -> None:
        """Move the offsets a share `speed` of the way that the counts ask for."""
        if not self.steered or not int(counts[0].sum()):  # nobody saw a valid token
            return
        shares, update = _shares(counts), int(self.updates)
        wanted = self._in_total(shares, update) if self.spec.over == "total" else self._each(shares, update)
        for place, steered in enumerate(self.steered):
            step = speed * wanted[place]
            if float(shares[place, ZERO]) < self.spec.floor:  # a dying router learns from nobody: back to its floor at once
                step = max(step, _shift(shares[place], self.spec.floor))
            router = self.routers[steered.layer]
            if router.offset is not None:  # never so here: routers without were refused by check_targets
                router.offset[steered.place] += step * router.unit

    def _in_total(self, shares: Tensor, update: int) -> list[float]:
        """One shift for all, so that the mean weighted by cost comes to the target."""
        weights = torch.tensor([steered.cost for steered in self.steered], dtype=torch.float64, device=shares.device)
        mean = (shares[: len(self.steered)] * (weights / weights.sum())[:, None]).sum(0)
        return [_shift(mean, self.spec.scheduled(self.steered[0].target, update))] * len(self.steered)

    def _each(self, shares: Tensor, update: int) -> list[float]:
        """The shift of each sub-module by itself; of those that compete, of all against running nothing and of each against the others."""
        targets = [self.spec.scheduled(steered.target, update) for steered in self.steered]
        wanted = [0.0] * len(targets)
        for layer, places in self._by_layer.items():
            router = self.routers[layer]
            total = sum(targets[place] for place in places)
            scale = min(1.0, router.most / total)
            for place in places:
                wanted[place] = _shift(shares[place], scale * targets[place])
            if router.competing and len(places) == len(router.names):
                common = sum(wanted[place] for place in places) / len(places)
                idle = len(targets) + self._idling.index(layer)
                together = _shift(shares[idle], scale * total) if float(shares[idle, 0]) else 0.0
                for place in places:
                    wanted[place] += together - common
        return wanted

    def extra_repr(self) -> str:
        return f"target={self.spec.target}, over={self.spec.over!r}, routers={len(self.routers)}"


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model, in the order of its decisions."""
    return [part.router for part in model.modules() if isinstance(part, SparseModularActivation)]


def module_costs(spec: ModelSpec, length: int) -> list[list[float]]:
    """Multiply-adds per token of every sub-module of every routed layer, on rows of `length` tokens."""
    layers = [layer for layer in spec.layer_specs if layer.modules]
    return [[part.operations(spec.width, length).total / length for part in layer.modules.values()] for layer in layers]


def _steered(spec: BudgetSpec, routers: Sequence[Router], costs: Sequence[Sequence[float]] | None) -> list[Steered]:
    if isinstance(spec.target, tuple):
        if len(spec.target) != len(routers):
            raise InputError(
                f"the budget has targets for {len(spec.target)} layers, and {len(routers)} are routed; give one for each of those"
            )
        by_layer = [_by_name(target, [router]) for target, router in zip(spec.target, routers, strict=True)]
    else:
        by_layer = [_by_name(spec.target, routers)] * len(routers)
    found = []
    for layer, router in enumerate(routers):
        targets = {name: by_layer[layer][name] for name in router.names if name in by_layer[layer]}
        if targets:
            router.check_targets(targets if spec.over == "each" else {})
        for name, target in targets.items():
            place = router.names.index(name)
            found.append(Steered(layer, place, target, 1.0 if costs is None else costs[layer][place]))
    return found


def _by_name(target: float | Mapping[str, float], routers: Sequence[Router]) -> Mapping[str, float]:
    names = list(dict.fromkeys(name for router in routers for name in router.names))
    if not isinstance(target, Mapping):
        return dict.fromkeys(names, target)
    for name in target:
        if name not in names:
            raise InputError(
                f"no layer has a sub-module {name!r}, for which the budget has a target{did_you_mean(name, names, 'sub-modules')}"
            )
    return target


# Log-odds from the decision, in bins that are fine near 0 and coarse far off: 0.01 sinh of a grid, up to 10^4 on either side.
BINS, _SCALE, _RANGE = 1024, 0.01, 14.5
ZERO = BINS // 2


def _edges(device: torch.device) -> Float[Tensor, "N1"]:
    return torch.linspace(-_RANGE, _RANGE, BINS + 1, dtype=torch.float64, device=device).sinh() * _SCALE


def _histogram(margins: Float[Tensor, "B L"], valid: Bool[Tensor, "B L"] | None) -> Int[Tensor, "N"]:
    margins = margins.flatten() if valid is None else margins[valid]
    # A tie is inactive, so it belongs below 0: bins are closed on the right.
    return torch.bucketize(margins, _edges(margins.device)[1:-1]).bincount(minlength=BINS)


def _shares(counts: Int[Tensor, "S N"]) -> Float[Tensor, "S N1"]:
    """Share of the tokens above each edge."""
    above = counts.flip(1).cumsum(1).flip(1).double()
    return torch.nn.functional.pad(above, (0, 1)) / counts.sum(1, keepdim=True).clamp(min=1)


def _shift(shares: Float[Tensor, "N1"], rate: float) -> float:
    """What has to be added to all scores, in log-odds, for this share of them to be above 0."""
    edges = _edges(shares.device)
    below = int((shares > rate).sum()) - 1  # the last edge with too many tokens above it
    above = int((shares >= rate).sum())  # the first one with too few
    if above - below > 1:  # edges between, all of them right: the nearest to where the threshold stands
        return -float(edges[min(max(ZERO, below + 1), above - 1)])
    weight = float((shares[below] - rate) / (shares[below] - shares[above]))
    return -float(edges[below] + weight * (edges[above] - edges[below]))


class Batches(NamedTuple):
    """A batch of `calibrate`: what the model takes."""

    inputs: Tensor
    valid: Tensor | None = None


@torch.no_grad()
def calibrate(
    model: SequenceModel,
    data: Iterable[Any],
    rate: float | Mapping[str, float] | Sequence[float | Mapping[str, float]],
    *,
    over: Literal["each", "total"] = "each",
    passes: int = 8,
    tolerance: float = 0.005,
) -> RateCount:
    """Turn the activation rates of a trained model up or down, by moving the offsets of its routers.

    Nothing is trained. The rates are measured on the data in evaluation mode, and pass by pass the offsets are set to what reaches
    the target; several passes, because later layers see what earlier ones then do.

    Args:
        model: its routers' offsets are changed, nothing else.
        data: batches that can be gone through again, such as a list or a DataLoader: inputs, pairs of inputs and valid mask, or
            objects with these attributes.
        rate: above 0 and at most 1: one for all sub-modules, one per name, or a list with such a thing for every routed layer.
        over: `each` sub-module of each layer, or the `total`, weighted by operations.
        passes: through the data, at most.
        tolerance: largest distance from the target at which it stops early.

    Returns:
        the rates that were reached, measured in the last pass.

    Raises:
        InputError: the data is empty or can be gone through only once, or a router cannot be steered to the rate.
    """
    if iter(data) is data:
        raise InputError("calibrate goes through the data several times, and this can be gone through only once: give a list of batches")
    spec = BudgetSpec(target=tuple(rate) if isinstance(rate, Sequence) else rate, over=over, floor=0.0)
    training = model.training
    model.eval()
    try:
        for number in range(passes + 1):
            rates, counts, controller = _measure(model, data, spec)
            if number == passes or _gap(rates, controller) <= tolerance:
                break
            controller.move(counts, speed=1.0)
    finally:
        model.train(training)
    return rates


def _measure(model: SequenceModel, data: Iterable[Any], spec: BudgetSpec) -> tuple[RateCount, Tensor, BudgetController]:
    controller, rates, counts = None, None, None
    for item in data:
        inputs, valid = _batch(item)
        if controller is None:
            controller = BudgetController.of(model, spec, max(1, inputs.shape[1]))
        decisions = model(inputs, valid).decisions
        seen, found = count_rates(decisions, valid), controller.count(decisions, valid)
        rates, counts = (seen, found) if rates is None or counts is None else (rates + seen, counts + found)
    if controller is None or rates is None or counts is None:
        raise InputError("calibrate got no batch; give it some of the data that the model is to run on")
    return rates, counts, controller


def _batch(item: Any) -> Batches:
    if isinstance(item, Tensor):
        return Batches(item)
    if hasattr(item, "inputs"):
        return Batches(item.inputs, getattr(item, "valid", None))
    return Batches(*item[:2])


def _gap(rates: RateCount, controller: BudgetController) -> float:
    found = rates.rates
    pairs = [
        (float(found[steered.layer, rates.names.index(controller.routers[steered.layer].names[steered.place])]), steered)
        for steered in controller.steered
    ]
    if controller.spec.over == "total":
        cost = sum(steered.cost for _, steered in pairs)
        return abs(sum(rate * steered.cost for rate, steered in pairs) / cost - pairs[0][1].target) if pairs else 0.0
    return max((abs(rate - steered.target) for rate, steered in pairs), default=0.0)
