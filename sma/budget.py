"""Budgets: steer the activation rates of learned routers, in training and on a trained model."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sma.activation import SparseModularActivation, check_valid
from sma.decision import Decision
from sma.errors import InputError
from sma.margins import BINS, ZERO, histograms, shares_above, shift_to
from sma.model import ModelSpec
from sma.routers import Router
from sma.stats import RateCount, count_rates
from sma.submodule import placement
from sma.targets import BudgetSpec as BudgetSpec
from sma.targets import Steered, steered_by

SURE = 4.0
"""Log-odds at which a router that samples counts as running everything: 98 % of the draws."""


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
        InputError: a target names no sub-module, a router cannot reach its target, or a cost is impossible.

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
        self.steered = steered_by(spec, routers, costs)
        self._by_layer: dict[int, list[int]] = {}
        for number, steered in enumerate(self.steered):
            self._by_layer.setdefault(steered.layer, []).append(number)
        self._idling = [layer for layer in self._by_layer if self.routers[layer].competing]
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("usual_tokens", torch.zeros((), dtype=torch.float64))

    @classmethod
    def of(cls, model: nn.Module, spec: BudgetSpec, length: int = 1024) -> Self:
        """Make the controller of a model; a total budget is weighted by the operations of the sub-modules on rows of `length` tokens.

        Raises:
            InputError: as of the class; or the budget is a total, and the model has no spec that says what its sub-modules cost.
        """
        costs = None
        if spec.over == "total":
            model_spec = getattr(_unwrapped(model), "spec", None)
            if not isinstance(model_spec, ModelSpec):
                raise InputError(
                    f"{type(model).__name__} has no spec that says what its sub-modules cost, by which a total budget is weighted; "
                    "give the costs: BudgetController(spec, routers_of(model), costs)"
                )
            costs = module_costs(model_spec, length)
        return cls(spec, routers_of(model), costs)

    @torch.no_grad()
    def update(self, decisions: Sequence[Decision], valid: Bool[Tensor, "B L"] | None = None) -> None:
        """Move the offsets after one update; every rank calls it with decisions of its own.

        Args:
            decisions: one per routed layer, of the forward pass of this update.
            valid: False at padding; None where there is none.

        Raises:
            InputError: the decisions are not those of the routers, or the mask does not fit.
        """
        counts = self.count(decisions, valid)
        if self.steered:  # on all ranks or on none, so that none waits for the others
            counts = over_all_ranks(counts).cpu()
            self.move(counts, self.spec.speed * self._weight(counts))
        self.updates += 1

    @torch.no_grad()
    def count(self, decisions: Sequence[Decision], valid: Bool[Tensor, "B L"] | None = None) -> Int[Tensor, "S N"]:
        """Count the tokens of this rank by how far their scores are from the decision, for every steered sub-module, and then by how far
        they are from running nothing at all, for every layer in which sub-modules compete.
        """
        self._check(decisions, valid)
        update = int(self.updates)
        own, idling = [torch.zeros(0, BINS, dtype=torch.int64)], []
        for layer, numbers in self._by_layer.items():
            decision, router = decisions[layer], self.routers[layer]
            off, on = decision.logits.unbind(-1)
            margins = (on - off) / router.unit
            if len(numbers) < len(router.names):
                margins = margins[..., [self.steered[number].place for number in numbers]]
            more = [self._more(self.steered[number], update) for number in numbers]
            if any(more):
                margins = margins - margins.new_tensor(more)
            idle = router.idle_margins(decision)
            counts = histograms(margins if idle is None else torch.cat([margins, idle[..., None]], -1), valid)
            own.append(counts[: len(numbers)])
            if router.competing:
                idling.append(counts[len(numbers) :] if idle is not None else torch.zeros_like(counts[:1]))
        return torch.cat([part.to(own[-1].device) for part in (*own, *idling)])

    def _check(self, decisions: Sequence[Decision], valid: Tensor | None) -> None:
        if len(decisions) != len(self.routers):
            raise InputError(f"there are {len(decisions)} decisions for {len(self.routers)} routers; give those of all routed layers")
        for layer, (decision, router) in enumerate(zip(decisions, self.routers, strict=True)):
            if decision.names != router.names:
                raise InputError(
                    f"decision {layer} is about {list(decision.names)}, and the router of that layer about {list(router.names)}; "
                    "give the decisions of the same model, in the order of its layers"
                )
            check_valid(decision.active, valid)

    def _more(self, steered: Steered, update: int) -> float:
        """Log-odds above the threshold that a token needs to count as active."""
        everyone = self.spec.scheduled(steered.target, update) >= 1.0
        return SURE if everyone and self.routers[steered.layer].samples else 0.0

    def _weight(self, counts: Tensor) -> float:
        """Tokens of this update over the usual number: where batches hold rows of like length, short rows would count too much."""
        tokens, usual = float(counts.sum(1).max()), float(self.usual_tokens)
        if not tokens:
            return 1.0
        usual += (tokens - usual) * (0.02 if usual else 1.0)
        self.usual_tokens.fill_(usual)
        return min(tokens / usual, 1 / self.spec.speed)

    @torch.no_grad()
    def move(self, counts: Int[Tensor, "S N"], speed: float) -> None:
        """Move the offsets a share `speed` of the way that the counts ask for, where there are any."""
        counts = counts.cpu()
        shares, seen, update = shares_above(counts), counts.any(1).tolist(), int(self.updates)
        wanted = self._in_total(shares, seen, update) if self.spec.over == "total" else self._each(shares, seen, update)
        for layer, numbers in self._by_layer.items():
            router, steps = self.routers[layer], [0.0] * len(self.routers[layer].names)
            for number in numbers:
                step = speed * wanted[number]
                # A dying router learns from nobody: back to its floor at once.
                if seen[number] and float(shares[number, ZERO]) < self.spec.floor:
                    step = max(step, shift_to(self.spec.floor, shares[number]))
                steps[self.steered[number].place] = step
            if router.offset is not None:  # never so here: routers without were refused
                change = router.offset.new_tensor(steps) * router.unit
                router.offset.add_(change.where(change.isfinite(), 0))

    def _in_total(self, shares: Tensor, seen: Sequence[bool], update: int) -> list[float]:
        """One shift for all, so that the mean weighted by cost comes to the target; none for a layer that cannot follow it further."""
        wanted = [0.0] * len(self.steered)
        weights = torch.tensor([steered.cost * some for steered, some in zip(self.steered, seen, strict=False)], dtype=torch.float64)
        if not weights.any():
            return wanted
        mean = (shares[: len(self.steered)] * (weights / weights.sum())[:, None]).sum(0)
        step = shift_to(self.spec.scheduled(self.steered[0].target, update), mean)
        for layer, numbers in self._by_layer.items():
            least, most = self.routers[layer].least, min(self.routers[layer].most, len(numbers))
            total = float(shares[numbers, ZERO].sum())
            # Its offset would drift without end, and every rate stay as it is.
            stuck = least >= most or (total > most - 1e-9 if step > 0 else total < least + 1e-9)
            for number in numbers:
                wanted[number] = step if seen[number] and not stuck else 0.0
        return wanted

    def _each(self, shares: Tensor, seen: Sequence[bool], update: int) -> list[float]:
        """The shift of each sub-module by itself; of those that compete, of all against running nothing and of each against the others."""
        targets = [self.spec.scheduled(steered.target, update) for steered in self.steered]
        wanted = [0.0] * len(targets)
        for layer, numbers in self._by_layer.items():
            router = self.routers[layer]
            total = sum(targets[number] for number in numbers)
            scale = min(1.0, router.most / total)
            for number in numbers:
                wanted[number] = shift_to(scale * targets[number], shares[number]) if seen[number] else 0.0
            if router.competing and len(numbers) == len(router.names):
                common = sum(wanted[number] for number in numbers) / len(numbers)
                idle = len(targets) + self._idling.index(layer)
                together = shift_to(scale * total, shares[idle]) if seen[idle] else 0.0
                for number in numbers:
                    # A shift against the others is theirs against this one too: all of them move, so each a part of the way.
                    wanted[number] = together + (len(numbers) - 1) / len(numbers) * (wanted[number] - common)
        return wanted

    def extra_repr(self) -> str:
        return f"target={self.spec.target}, over={self.spec.over!r}, routers={len(self.routers)}"


def over_all_ranks(counts: Tensor) -> Tensor:
    """The sum over the ranks of a distributed training, in place; without one, as they are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return counts


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model, in the order of its decisions."""
    return [part.router for part in model.modules() if isinstance(part, SparseModularActivation)]


def module_costs(spec: ModelSpec, length: int) -> list[list[float]]:
    """Multiply-adds per token of every sub-module of every routed layer, on rows of `length` tokens."""
    layers = [layer for layer in spec.layer_specs if layer.modules]
    return [[part.operations(spec.width, length).total / length for part in layer.modules.values()] for layer in layers]


def _unwrapped(model: nn.Module) -> nn.Module:
    """What DistributedDataParallel, torch.compile and their like were put around."""
    while not hasattr(model, "spec"):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


class Batches(NamedTuple):
    """A batch of `calibrate`: what the model takes."""

    inputs: Tensor
    valid: Tensor | None = None


@torch.no_grad()
def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    rate: float | Mapping[str, float] | Sequence[float | Mapping[str, float]],
    *,
    over: Literal["each", "total"] = "each",
    passes: int = 8,
    tolerance: float = 0.005,
) -> RateCount:
    """Turn the activation rates of a trained model up or down, by moving the offsets of its routers.

    Nothing is trained. The rates are measured on the data in evaluation mode, and pass by pass the offsets are set to what reaches
    the target; several passes, because later layers see what earlier ones then do. A target that is missed after all passes is a warning.

    In a distributed process group every rank calls it with data of its own, of any number of batches; all come to the same offsets.

    Args:
        model: a `SequenceModel`, wrapped by DistributedDataParallel or not; its routers' offsets are changed, nothing else.
        data: batches that can be gone through again, such as a list or a DataLoader: inputs, pairs of inputs and valid mask, or
            objects with these attributes.
        rate: above 0 and at most 1: one for all sub-modules, one per name, or a list with such a thing for every routed layer.
        over: `each` sub-module of each layer, or the `total`, weighted by operations on rows of the mean length.
        passes: through the data, at most.
        tolerance: largest distance from the target at which it stops early.

    Returns:
        the rates that were reached, measured in the last pass, over all ranks.

    Raises:
        InputError: the data has no valid token, is of another form or can be gone through only once, or a router cannot be steered to
            the rate.
    """
    if passes < 0:
        raise InputError(f"passes={passes} must be at least 0: how often calibrate goes through the data to move the offsets")
    if iter(data) is data:
        raise InputError("calibrate goes through the data several times, and this can be gone through only once: give a list of batches")
    if isinstance(model, DistributedDataParallel):
        model = model.module  # whose forward does not wait for ranks that have fewer batches
    spec = BudgetSpec(target=_numbers(rate), over=over, floor=0.0)
    controller, training = BudgetController.of(model, spec), [part for part in model.modules() if part.training]
    model.eval()
    try:
        for number in range(passes + 1):
            rates, counts, length = _measure(model, data, controller)
            if over == "total" and number == 0:
                controller = BudgetController.of(model, spec, length)
            gap, reached = _furthest(rates, controller)
            if gap <= tolerance:
                break
            if number < passes:
                controller.move(counts, speed=1.0)
        else:
            warnings.warn(
                f"calibrate did not come within {tolerance:g} of the target in {passes} passes: {reached}; give it more data or passes, "
                "or a rate that the scores allow (equal ones are decided alike)",
                stacklevel=3,  # past the decorator
            )
    finally:
        for part in training:
            part.training = True
    return rates


def _measure(model: nn.Module, data: Iterable[Any], controller: BudgetController) -> tuple[RateCount, Tensor, int]:
    """The rates and the counts of the data of all ranks, and the mean number of tokens of a row."""
    device, layers = placement(model, None, None)[0], tuple(router.names for router in controller.routers)
    shapes = (
        (3,),
        (len(layers), len({name for layer in layers for name in layer})),
        (len(controller.steered) + len(controller._idling), BINS),
    )
    sizes, active, counts = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes)
    for item in data:
        inputs, valid = _batch(item)
        decisions = model(inputs, valid).decisions
        counts += controller.count(decisions, valid).to(device)
        active += count_rates(decisions, valid).active.to(device)
        tokens = inputs.shape[0] * inputs.shape[1] if valid is None else int(valid.sum())
        sizes += sizes.new_tensor([1, inputs.shape[0], tokens])
    # Once in a pass and in one piece, so that the ranks meet however many batches each of them has.
    total = over_all_ranks(torch.cat([sizes, active.flatten(), counts.flatten()]))
    sizes, active, counts = (
        part.view(shape) for part, shape in zip(total.split([math.prod(shape) for shape in shapes]), shapes, strict=True)
    )
    batches, rows, tokens = sizes.tolist()
    if not batches:
        raise InputError("calibrate got no batch; give it some of the data that the model is to run on")
    if not tokens:
        raise InputError("calibrate got no valid token, so there are no rates; give it data with some")
    return RateCount(active, sizes[2], layers), counts, max(1, round(tokens / rows))


def _numbers(rate: Any) -> Any:
    """A target as plain numbers."""
    if isinstance(rate, Mapping):
        return {name: _numbers(value) for name, value in rate.items()}
    if isinstance(rate, Sequence) and not isinstance(rate, str):
        return tuple(map(_numbers, rate))
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise InputError(
            f"the rate {rate!r} is a {type(rate).__name__}; required is a number such as 0.3, one for every name, or a list of these for "
            "the routed layers"
        )
    return float(rate)


def _batch(item: Any) -> Batches:
    if isinstance(item, Tensor):
        return Batches(item)
    if isinstance(item, tuple | list) and item:
        return Batches(*item[:2])
    if not hasattr(item, "inputs"):
        raise InputError(
            f"a batch of calibrate is a {type(item).__name__}; required are inputs, a pair (inputs, valid), or an object with "
            "the attributes inputs and valid"
        )
    return Batches(item.inputs, getattr(item, "valid", None))


def _furthest(rates: RateCount, controller: BudgetController) -> tuple[float, str]:
    """The largest distance from a target, and what was reached there."""
    found, gaps, spent = rates.rates.tolist(), [(0.0, "")], []
    for steered in controller.steered:
        name = controller.routers[steered.layer].names[steered.place]
        reached = found[steered.layer][rates.names.index(name)]
        spent.append(reached * steered.cost)
        told = f"{name!r} of routed layer {steered.layer} runs at a rate of {reached:.4f}, and {steered.target:g} was asked"
        gaps.append((abs(reached - steered.target), told))
    if controller.spec.over == "each" or not spent:
        return max(gaps)
    mean, target = sum(spent) / sum(steered.cost for steered in controller.steered), controller.steered[0].target
    return abs(mean - target), f"weighted by cost the rates come to {mean:.4f}, and {target:g} was asked"
