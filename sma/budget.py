"""Budgets: hold the activation rates of learned routers at a target while they are trained."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sma.activation import SparseModularActivation
from sma.budget_spec import BudgetSpec as BudgetSpec
from sma.budget_spec import steered_by
from sma.checks import check_count, check_decisions, check_instance, check_module, check_names
from sma.decision import Decision
from sma.errors import InputError, quote
from sma.model import ModelSpec
from sma.moved import former_names
from sma.routers import Router
from sma.routers.steerable import steerable
from sma.score_histogram import BINS, EDGES, ZERO, histograms, shares_above, shift_to
from sma.weights import unwrapped

SURE = 4.0
"""Log-odds from which a stochastic router counts as always active: 98 % of the draws."""


class BudgetController(nn.Module):
    r"""Keeps the activation rates of routers at a target through their score biases.

    After every update it counts, over all ranks, how many tokens would be active at any score bias. It finds the score
    bias of the scheduled rate and moves that of the router a share `speed` of the way; updates with more tokens count
    more. The score bias is a buffer of the router: it is saved with the model, and forward never changes it. Loss and
    gradient are not affected. The score bias of a dead or saturated router moves until its rate changes.

    Args:
        spec: target and schedule.
        routers: routers of the routed layers, in the order of the decisions.
        costs: costs by layer and sub-module, in any unit, for `over: total`. Default: equal costs.

    Raises:
        InputError: a target names an unknown sub-module, a router cannot reach its target, or a cost is invalid.

    Example:
        ``controller = BudgetController.of(model, BudgetSpec(target=0.3))``, and after each update
        ``controller.update(output.decisions, valid)``.
    """

    updates: Tensor
    usual_tokens: Tensor
    targets: Tensor
    costs: Tensor
    edges: Tensor

    def __init__(
        self, spec: BudgetSpec, routers: Sequence[Router], costs: Sequence[Sequence[float]] | None = None
    ) -> None:
        super().__init__()
        self.spec = check_instance(spec, BudgetSpec, "BudgetController got", "write BudgetSpec(target=0.3)")
        if not isinstance(routers, Sequence) or not all(isinstance(router, Router) for router in routers):
            raise InputError(f"BudgetController takes a list of routers, not {quote(routers)}; give routers_of(model)")
        # In a tuple, so that the parameters of the routers are not those of the controller.
        self.routers = tuple(routers)
        self.steered = steered_by(spec, routers, costs)
        self._by_layer: dict[int, list[int]] = {}
        for index, steered in enumerate(self.steered):
            self._by_layer.setdefault(steered.layer, []).append(index)
        self._steerable = {layer: steerable(self.routers[layer]) for layer in self._by_layer}
        self.skipping = [layer for layer, router in self._steerable.items() if router.competing]
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("usual_tokens", torch.zeros((), dtype=torch.float64))
        # Constants of `move`, on its device. Not saved: they follow from the spec and the costs.
        for name, values in (
            ("targets", [each.target for each in self.steered]),
            ("costs", [each.cost for each in self.steered]),
            ("edges", EDGES),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, and keep the numbers wide: in float16 a number of tokens overflows."""
        wide = {name: getattr(self, name) for name in ("usual_tokens", "targets", "costs", "edges")}
        super()._apply(fn, recurse)
        for name, before in wide.items():
            if getattr(self, name).dtype is not before.dtype:
                setattr(self, name, before.to(getattr(self, name).device))
        return self

    @classmethod
    def of(cls, model: nn.Module, spec: BudgetSpec, length: int = 1024) -> Self:
        """Make the controller of a model; a total budget is weighted by the MACs of the sub-modules on rows of
        `length` tokens.

        Raises:
            InputError: as for the class; or the budget is a total, and the model has neither a spec with the costs of
                its sub-modules nor an attribute `costs`.
        """
        check_module(model, "BudgetController.of")
        check_instance(spec, BudgetSpec, "BudgetController.of got", "write BudgetSpec(target=0.3)")
        check_count(length, "length", 1, ": tokens of a row")
        costs = None
        if spec.over == "total":
            inner = unwrapped(model)[1]
            model_spec, costs = getattr(inner, "spec", None), getattr(inner, "costs", None)
            if isinstance(model_spec, ModelSpec):
                costs = module_costs(model_spec, length)
            elif costs is None:
                raise InputError(
                    f"{type(model).__name__} has no spec with the costs of its sub-modules, by which a total budget "
                    "is weighted; give the costs: BudgetController(spec, routers_of(model), costs)"
                )
        return cls(spec, routers_of(model), costs)

    @torch.no_grad()
    def update(self, decisions: Sequence[Decision], valid: Bool[Tensor, "B L"] | None = None) -> None:
        """Move the score biases after one update; every rank calls it with its own decisions.

        Args:
            decisions: one per routed layer, from the forward pass of this update.
            valid: False at padding; None where there is none.

        Raises:
            InputError: the decisions do not belong to the routers, or the mask does not fit.
        """
        counts = self.count(decisions, valid)
        if self.steered:  # the same on all ranks, so that none waits
            counts = over_all_ranks(counts).to(self.updates.device)
            self.move(counts, self.spec.speed * self._weight(counts))
        self.updates += 1

    @torch.no_grad()
    def count(self, decisions: Sequence[Decision], valid: Bool[Tensor, "B L"] | None = None) -> Int[Tensor, "S N"]:
        """Count the tokens of this rank by margin: for every steered sub-module, then for the empty choice of every
        layer with competing sub-modules.

        Raises:
            InputError: the decisions do not belong to the routers, or the mask does not fit.
        """
        check_decisions(decisions, type(self).__name__, valid)
        if len(decisions) != len(self.routers):
            raise InputError(
                f"there are {len(decisions)} decisions for {len(self.routers)} routers; give those of all routed layers"
            )
        for layer, (decision, router) in enumerate(zip(decisions, self.routers, strict=True)):
            check_names(decision, router.names, f"decision {layer}")
        own, skipping = [torch.zeros(0, BINS, dtype=torch.int64, device=self.updates.device)], []
        for layer, numbers in self._by_layer.items():
            decision, router = decisions[layer], self._steerable[layer]
            off, on = decision.logits.unbind(-1)
            margins = (on - off) / router.temperature
            if len(numbers) < len(router.names):
                margins = torch.stack([margins[..., self.steered[number].column] for number in numbers], -1)
            if router.stochastic:  # a rate of 1 counts only the tokens that almost every draw activates
                everyone = self.spec.schedule(self.targets[_span(numbers)], self.updates) >= 1.0
                margins = margins - (SURE * everyone).to(margins)
            skip = router.skip_margins(decision)
            counts = histograms(margins if skip is None else torch.cat([margins, skip[..., None]], -1), valid)
            own.append(counts[: len(numbers)])
            if router.competing:
                skipping.append(counts[len(numbers) :] if skip is not None else torch.zeros_like(counts[:1]))
        return torch.cat([part.to(own[-1].device) for part in (*own, *skipping)])

    def _weight(self, counts: Tensor) -> Tensor:
        """Tokens of this update over the usual number: in batches by length, short rows would count too much."""
        tokens, usual = counts.sum(1).max().double(), self.usual_tokens
        updated = usual + (tokens - usual) * (0.02 + 0.98 * (usual == 0).double())
        weight = (tokens / updated).clamp(max=1 / self.spec.speed).where(tokens > 0, 1.0)
        usual.copy_(updated.where(tokens > 0, usual))
        return weight

    @torch.no_grad()
    def move(self, counts: Int[Tensor, "S N"], speed: float | Tensor) -> None:
        """Move the score biases a share `speed` of the way to those that the counts require, where there are tokens.

        All of it runs on the device of the controller, without a synchronisation.
        """
        if not self.steered:
            return
        counts = counts.to(self.updates.device)
        shares, seen = shares_above(counts), counts.any(1)
        steps = speed * (self._in_total(shares, seen) if self.spec.over == "total" else self._each(shares, seen))
        # A dying router does not learn, so it returns to the floor at once.
        own, some = shares[: len(self.steered)], seen[: len(self.steered)]
        floor = steps.maximum(shift_to(torch.full_like(self.targets, self.spec.floor), own, self.edges))
        steps = floor.where(some & (own[:, ZERO] < self.spec.floor), steps)
        for layer, numbers in self._by_layer.items():
            router = self._steerable[layer]
            change = steps[_span(numbers)]
            if len(numbers) < len(router.names):
                by_column = {self.steered[number].column: steps[number] for number in numbers}
                none = steps.new_zeros(())
                change = torch.stack([by_column.get(column, none) for column in range(len(router.names))])
            change = change.to(router.score_bias) * router.temperature
            router.score_bias.add_(change.where(change.isfinite(), 0))

    def _in_total(self, shares: Tensor, seen: Tensor) -> Float[Tensor, "S"]:
        """One shift for all, so that the mean weighted by cost reaches the target; 0 for layers at their limits."""
        own, seen = shares[: len(self.steered)], seen[: len(self.steered)]
        weights = self.costs * seen
        mean = ((weights / weights.sum())[:, None] * own).sum(0, keepdim=True)
        step = shift_to(self.spec.schedule(self.targets[:1], self.updates), mean, self.edges)
        moving = []
        for layer, numbers in self._by_layer.items():
            router = self._steerable[layer]
            low, high = router.minimum_total_rate, min(router.maximum_total_rate, len(numbers))
            total = own[_span(numbers), ZERO].sum()
            # At a limit the score bias would drift without an effect on the rates.
            free = torch.where(step > 0, total <= high - 1e-9, total >= low + 1e-9) & (low < high)
            moving.append(free.expand(len(numbers)))
        return step.where(torch.cat(moving) & seen & (weights.sum() > 0), 0)

    def _each(self, shares: Tensor, seen: Tensor) -> Float[Tensor, "S"]:
        """The shift of each sub-module; with competition, a common shift against the empty choice and one against the
        others.
        """
        targets = self.spec.schedule(self.targets, self.updates)
        rates, totals = [], {}
        for layer, numbers in self._by_layer.items():
            router, own = self._steerable[layer], targets[_span(numbers)]
            if router.maximum_total_rate < len(numbers):
                own = own * (router.maximum_total_rate / own.sum()).clamp(max=1.0)
            rates.append(own)
            if router.competing:
                totals[layer] = own.sum(0, keepdim=True)
        shifts = shift_to(torch.cat([*rates, *totals.values()]), shares, self.edges).where(seen, 0)
        wanted, together = shifts[: len(self.steered)], shifts[len(self.steered) :]
        if not totals:
            return wanted
        parts = []
        for layer, numbers in self._by_layer.items():
            own, count = wanted[_span(numbers)], len(numbers)
            if layer in totals and count == len(self._steerable[layer].names):
                # All competitors move, so each makes a part of the relative shift.
                own = together[self.skipping.index(layer)] + (count - 1) / count * (own - own.sum() / count)
            parts.append(own)
        return torch.cat(parts)

    def extra_repr(self) -> str:
        return f"target={self.spec.target}, over={self.spec.over!r}, routers={len(self.routers)}"


def _span(numbers: Sequence[int]) -> slice:
    """Slice of the sub-modules of one layer, whose indices are consecutive."""
    return slice(numbers[0], numbers[-1] + 1)


def over_all_ranks(counts: Tensor) -> Tensor:
    """Sum over the ranks of a distributed training, in place; without one, return the counts unchanged."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return counts


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model, in the order of its decisions."""
    return [part.router for part in model.modules() if isinstance(part, SparseModularActivation)]


def module_costs(spec: ModelSpec, length: int) -> list[list[float]]:
    """MACs per token of every sub-module of every routed layer, on rows of `length` tokens."""
    layers = [layer for layer in spec.layer_specs if layer.modules]
    return [[part.macs(spec.width, length).total / length for part in layer.modules.values()] for layer in layers]


__getattr__ = former_names(__name__, calibrate="sma.calibration.calibrate")
