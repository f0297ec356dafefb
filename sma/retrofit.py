"""Routed parts in a model that is not ours: token-wise modules, such as feed-forward blocks, routed in place."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sma.activation import SparseModularActivation
from sma.batches import batches_of, takes
from sma.budget import BudgetController
from sma.budget_spec import BudgetSpec
from sma.calibration import calibrate
from sma.checks import check_instance, check_valid, what_came
from sma.decision import Decision
from sma.describe import align
from sma.errors import InputError, did_you_mean, quote
from sma.routers import RouterSpec
from sma.spec import load_spec
from sma.stats import RateCount
from sma.submodule import floating_dtype
from sma.wrap import TokenWise


@dataclass(frozen=True)
class Target:
    """A token-wise part of a model, and how its routed form stands in its place.

    Attributes:
        path: path of the part in the model, for messages and tables.
        module: maps `(…, D)` to `(…, D)`, each token by itself, without the residual.
        replacements: given the routed module, the modules that replace others, by their paths.
    """

    path: str
    module: nn.Module
    replacements: Callable[[nn.Module], Mapping[str, nn.Module]]


Adapter = Callable[[nn.Module], Iterable[Target]]
"""Finds the parts of a model that are no single module."""


class RoutedPart(nn.Module):
    """A token-wise module of another model, run on the tokens that a router chooses; the others get zeros.

    Args:
        path: path of the module in the model; its last word is the name of the sub-module.
        module: the module.
        router: spec of the router.

    Shape:
        hidden states `(B, L, D)` or `(L, D)` in and out.
    """

    def __init__(self, path: str, module: nn.Module, router: RouterSpec) -> None:
        super().__init__()
        self.path = path
        self.routed = SparseModularActivation(router, {_name_of(path): TokenWise(module)})
        parameter = next(module.parameters(), None)
        self.routed.router.to(device=None if parameter is None else parameter.device, dtype=floating_dtype(module))

    def forward(self, hidden: Tensor) -> Tensor:
        """Route the tokens, and give the decision to the collectors that are open."""
        x_BLD = hidden if hidden.ndim == 3 else hidden[None]
        valid = _valid_for(self, x_BLD)
        output = self.routed(x_BLD, valid=valid)
        _record(self, output.decision)
        return output.values.view_as(hidden)

    def extra_repr(self) -> str:
        return f"path={self.path!r}"


class _PassOn(nn.Module):
    """Stands in the place of the first of two modules, which the routed second one calls."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class _TwoModules(nn.Module):
    """The feed-forward block of two modules: dropout(dense(intermediate(x)))."""

    def __init__(self, intermediate: nn.Module, dense: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.intermediate, self.dense, self.dropout = intermediate, dense, dropout

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.dense(self.intermediate(hidden)))


class _ResidualAndNorm(nn.Module):
    """Stands in the place of the second of two modules: adds the residual to the routed part, and normalises."""

    def __init__(self, routed: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.routed, self.norm = routed, norm

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        values = self.routed(residual) + residual
        return values if self.norm is None else self.norm(values)


def intermediate_and_output(model: nn.Module) -> list[Target]:
    """Find the feed-forward blocks that are two modules, `intermediate` and `output`, as in BERT and older ViT of
    transformers: `output(intermediate(x), x)` adds the residual, and normalises if it has a `LayerNorm`.
    """

    def target(path: str, layer: Any) -> Target:
        two, norm = layer.output, getattr(layer.output, "LayerNorm", None)
        block = _TwoModules(layer.intermediate, two.dense, two.dropout)
        before = f"{path}." if path else ""
        return Target(
            f"{before}output",
            block,
            lambda routed: {f"{before}intermediate": _PassOn(), f"{before}output": _ResidualAndNorm(routed, norm)},
        )

    return [
        target(path, part)
        for path, part in model.named_modules()
        if hasattr(part, "intermediate") and hasattr(getattr(part, "output", None), "dense")
    ]


class _Collector(NamedTuple):
    parts: frozenset[int]
    valid: Tensor | None
    decisions: list[Decision]


_collectors: ContextVar[tuple[_Collector, ...]] = ContextVar("collectors", default=())


@contextmanager
def collect_decisions(model: nn.Module, valid: Tensor | None = None) -> Iterator[list[Decision]]:
    """Collect the decisions of the routed parts of a model, in the order of their calls.

    Nothing is stored on modules. Contexts nest, each with decisions of its own; a forward pass that activation
    checkpointing repeats in backward is collected once, and two forward passes twice.

    Args:
        model: a model that `retrofit` has changed.
        valid: mask `(B, L)`, False at padding, which the routed parts do not get from the model: padding is never
            active. None: no token is padding.

    Raises:
        InputError: the model has no routed part; or, in the forward pass, the mask does not fit the tokens.
    """
    parts = frozenset(id(part) for part in model.modules() if isinstance(part, RoutedPart))
    if not parts:
        raise InputError(f"{type(model).__name__} has no routed part; call sma.retrofit first")
    decisions: list[Decision] = []
    token = _collectors.set((*_collectors.get(), _Collector(parts, valid, decisions)))
    try:
        yield decisions
    finally:
        _collectors.reset(token)


def _valid_for(part: RoutedPart, x_BLD: Tensor) -> Tensor | None:
    """The mask of the innermost collector that has one."""
    masks = [each.valid for each in _collectors.get() if id(part) in each.parts and each.valid is not None]
    if not masks:
        return None
    try:
        check_valid(x_BLD, masks[-1])
    except InputError as error:
        raise InputError(f"{part.path} has tokens of shape {tuple(x_BLD.shape)}, but {error}") from None
    return masks[-1]


def _record(part: RoutedPart, decision: Decision) -> None:
    if torch._C._current_graph_task_id() != -1:  # in backward, where activation checkpointing repeats the pass
        return
    for collector in _collectors.get():
        if id(part) in collector.parts:
            collector.decisions.append(decision)


class Retrofitted:
    """A model of somebody else with routed parts: what was routed, and how to steer and undo it.

    Attributes:
        model: the model, which was changed in place.
        parts: the routed parts by path.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, tuple[Target, RouterSpec]]) -> None:
        self.model = model
        self.parts: dict[str, RoutedPart] = {}
        self._replaced: dict[str, nn.Module] = {}
        self._trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        made = [(target, _routed_part(target, spec)) for target, spec in targets.values()]
        known = set(model.modules())
        for index, (target, part) in enumerate(made):
            part.routed.router.layer_index = index  # a key of what a router draws
            self.parts[target.path] = part
            for path, module in target.replacements(part).items():
                self._replaced[path] = model.get_submodule(path)
                for new in module.modules():
                    if new not in known:
                        new.training = self._replaced[path].training
                _set(model, path, module)

    def preview(self) -> str:
        """A table of the routed parts: parameters of the part and of its router, MACs per token, and the MACs that a
        skipped token saves.
        """
        rows = [("part", "parameters", "router", "MACs saved per skipped token")]
        for path, part in self.parts.items():
            own, routing = (
                sum(parameter.numel() for parameter in each.parameters())
                for each in (part.routed.submodules, part.routed.router)
            )
            rows.append((path, f"{own:,}", f"{routing:,}", f"{self._macs(part):,}"))
        return "\n".join(align(rows, right=range(1, 4)))

    @staticmethod
    def _macs(part: RoutedPart) -> int:
        """MACs per token of a token-wise part: the sizes of its matrices."""
        return sum(parameter.numel() for parameter in part.routed.submodules.parameters() if parameter.ndim == 2)

    def budget(self, spec: BudgetSpec | float | Mapping[str, Any]) -> BudgetController:
        """The controller that holds the rates of the parts at a target: call its `update(decisions, valid)` after every
        update, with what `collect_decisions` collected.

        Args:
            spec: the budget, its fields, or its target.

        Raises:
            InputError: a router cannot be steered to the target.
        """
        fields = spec if isinstance(spec, Mapping) else {"target": spec}
        made = spec if isinstance(spec, BudgetSpec) else BudgetSpec(**fields)
        parts = list(self.parts.values())
        return BudgetController(made, [part.routed.router for part in parts], [[float(self._macs(p))] for p in parts])

    def calibrate(self, data: Sequence[Any], rate: Any, **options: Any) -> RateCount:
        """Set the activation rates without training, as `sma.calibrate`.

        Args:
            data: batches: inputs, or pairs of inputs and valid mask. The model is called on the inputs, and gets the
                mask as `attention_mask` if it takes one.
            rate: the target, as in `sma.calibrate`.
            options: further arguments of `sma.calibrate`.

        Raises:
            InputError: as `sma.calibrate`.
        """
        batches_of(data, "calibrate")
        return calibrate(_WithDecisions(self), data, rate, **options)

    def undo(self) -> nn.Module:
        """Put the original modules back, with the weights that they have now, and what was trained before; returns the
        model.
        """
        for path, module in self._replaced.items():
            _set(self.model, path, module)
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        self.parts, self._replaced = {}, {}
        return self.model

    def __repr__(self) -> str:
        return f"Retrofitted({type(self.model).__name__}, {len(self.parts)} routed parts)"


class _Output(NamedTuple):
    decisions: list[Decision]


class _WithDecisions(nn.Module):
    """Calls a retrofitted model, and returns its decisions."""

    def __init__(self, retrofitted: Retrofitted) -> None:
        super().__init__()
        self.model = retrofitted.model

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> _Output:
        with collect_decisions(self.model, valid) as decisions:
            if valid is not None and takes(self.model, inputs, attention_mask=valid):
                self.model(inputs, attention_mask=valid)
            else:
                self.model(inputs)
        return _Output(decisions)


def retrofit(
    model: nn.Module,
    targets: Mapping[str | Adapter, RouterSpec | Mapping[str, Any] | str],
    train: Literal["all", "routers"] = "all",
) -> Retrofitted:
    """Route token-wise parts of a model, in place.

    A part that is skipped returns zeros, so it should be one whose result is added to a residual stream. With
    `gate: straight_through` and everything active the model is the original bit by bit.

    Args:
        model: any model.
        targets: routers by target. A target is a pattern of paths in which `*` stands for any one part of a path, such
            as `model.layers.*.mlp`, or an adapter such as `intermediate_and_output`. A router is a spec, its fields, or
            a kind.
        train: `routers` freezes everything else.

    Returns:
        the handle by which the parts are previewed, steered and undone.

    Raises:
        InputError: a target matches nothing, a part twice, or a part inside of another; a part cannot be wrapped as
            token-wise; or the model is retrofitted already.
    """
    check_instance(model, nn.Module, "retrofit got", "give the model")
    if not isinstance(targets, Mapping) or not targets:
        raise InputError(f"targets is {what_came(targets)}; required is a mapping of patterns or adapters to routers")
    if train not in ("all", "routers"):
        raise InputError(f"train={quote(train)}; required is 'all' or 'routers'")
    if any(isinstance(part, RoutedPart) for part in model.modules()):
        raise InputError(
            f"{type(model).__name__} is retrofitted already; undo() that first, or give all targets at once"
        )
    found: dict[str, tuple[Target, RouterSpec]] = {}
    for key, router in targets.items():
        spec = load_spec({"kind": router} if isinstance(router, str) else router, "router")
        matching = _matching(model, key) if isinstance(key, str) else list(key(model))
        if not matching:
            raise InputError(f"the adapter {getattr(key, '__name__', key)} finds no part in {type(model).__name__}")
        for target in matching:
            if target.path in found:
                raise InputError(f"two targets match {quote(target.path)}; route each part once")
            found[target.path] = (target, spec)
    inside = [(a, b) for a in found for b in found if b.startswith(f"{a}.")]
    if inside:
        raise InputError(f"the target {quote(inside[0][1])} lies inside of {quote(inside[0][0])}; route one of them")
    made = Retrofitted(model, found)
    if train == "routers":
        model.requires_grad_(False)
        for part in made.parts.values():
            part.routed.router.requires_grad_(True)
    return made


def _routed_part(target: Target, spec: RouterSpec) -> RoutedPart:
    try:
        return RoutedPart(target.path, target.module, spec)
    except InputError as error:
        raise InputError(f"{quote(target.path)} cannot be routed: {error}") from None


def _matching(model: nn.Module, pattern: str) -> list[Target]:
    words = pattern.split(".")
    paths: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    matching = {
        path: module
        for path, module in paths.items()
        if path and len(parts := path.split(".")) == len(words) and all(map(fnmatchcase, parts, words))
    }
    if not matching:
        raise InputError(f"no module of {type(model).__name__} matches {quote(pattern)}{_nearest(pattern, paths)}")
    for path, module in matching.items():
        others = [other for other, each in paths.items() if each is module and other != path]
        if others:
            raise InputError(f"{quote(path)} is also {quote(others[0])}; a part that is shared cannot be routed")

    def replacing(path: str) -> Callable[[nn.Module], Mapping[str, nn.Module]]:
        return lambda routed: {path: routed}

    return [Target(path, module, replacing(path)) for path, module in matching.items()]


def _nearest(pattern: str, paths: Iterable[str]) -> str:
    """The hint of the pattern that was meant: paths in which numbers are stars."""
    patterns = sorted({".".join("*" if word.isdigit() else word for word in path.split(".")) for path in paths if path})
    return did_you_mean(pattern, patterns, "patterns")


def _name_of(path: str) -> str:
    return path.rpartition(".")[2] or "part"


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    owner._modules[name] = module
