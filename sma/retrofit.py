"""Routed parts in a model that is not ours: token-wise modules, such as feed-forward blocks, routed in place."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from sma.batches import batches_of, takes
from sma.budget import BudgetController
from sma.budget_spec import BudgetSpec
from sma.calibration import calibrate
from sma.checks import check_instance, what_came
from sma.decision import Decision
from sma.describe import align
from sma.errors import InputError, did_you_mean, quote
from sma.routed_part import RoutedPart as RoutedPart
from sma.routed_part import collect_decisions as collect_decisions
from sma.routers import RouterSpec
from sma.spec import load_spec
from sma.stats import RateCount


@dataclass(frozen=True)
class Target:
    """A token-wise part of a model, and the replacement by its routed form.

    Attributes:
        path: path of the part in the model, for messages and tables.
        module: maps `(…, D)` to `(…, D)`, each token independently, without the residual.
        replacements: given the routed module, the modules that replace others, by their paths.
    """

    path: str
    module: nn.Module
    replacements: Callable[[nn.Module], Mapping[str, nn.Module]]


Adapter = Callable[[nn.Module], Iterable[Target]]
"""Finds the parts of a model that consist of several modules."""


class _PassOn(nn.Module):
    """Replaces the first of two modules; the routed second one calls it."""

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
    """Replaces the second of two modules: adds the residual to the routed part, and normalises."""

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


class Retrofitted:
    """A model with routed parts; shows, steers and undoes the routing.

    Attributes:
        model: the model, which was changed in place.
        parts: the routed parts by path.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, tuple[Target, RouterSpec]]) -> None:
        self.model = model
        self.parts = {path: _routed_part(target, spec) for path, (target, spec) in targets.items()}
        for index, part in enumerate(self.parts.values()):
            part.routed.router.layer_index = index  # a key of a router's draws
        new = {path: dict(target.replacements(self.parts[path])) for path, (target, _) in targets.items()}
        self._replaced = _check_replacements(model, new)
        self._trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        known = set(model.modules())
        for path, module in (item for modules in new.values() for item in modules.items()):
            for each in module.modules():
                if each not in known:
                    each.training = self._replaced[path].training
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

    @property
    def costs(self) -> list[list[float]]:
        """MACs per token of every part, in the form that `BudgetController` takes."""
        return [[float(self._macs(part))] for part in self.parts.values()]

    def _check_routed(self) -> None:
        if not self.parts:
            raise InputError(f"the retrofit of {type(self.model).__name__} was undone; call sma.retrofit again")

    def budget(self, spec: BudgetSpec | float | Mapping[str, Any]) -> BudgetController:
        """The controller that holds the rates of the parts at a target: call its `update(decisions, valid)` after every
        update, with what `collect_decisions` collected.

        Args:
            spec: the budget, its fields, or its target.

        Raises:
            InputError: a router cannot be steered to the target, or the model is no longer routed.
        """
        self._check_routed()
        fields = spec if isinstance(spec, Mapping) else {"target": spec}
        made = spec if isinstance(spec, BudgetSpec) else BudgetSpec(**fields)
        return BudgetController(made, [part.routed.router for part in self.parts.values()], self.costs)

    def calibrate(self, data: Sequence[Any], rate: Any, **options: Any) -> RateCount:
        """Set the activation rates without training, as `sma.calibrate`.

        Args:
            data: batches: inputs, or pairs of inputs and valid mask. The model is called on the inputs, and gets the
                mask as `attention_mask` if it takes one.
            rate: the target, as in `sma.calibrate`.
            options: further arguments of `sma.calibrate`.

        Raises:
            InputError: as `sma.calibrate`, or the model is no longer routed.
        """
        self._check_routed()
        batches_of(data, "calibrate")
        return calibrate(_WithDecisions(self), data, rate, **options)

    def undo(self) -> nn.Module:
        """Restore the original modules with their current weights, and the earlier `requires_grad` of the parameters;
        returns the model.
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
        self.costs = retrofitted.costs

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

    A skipped part returns zeros, so its result should be added to a residual stream. With
    `gate: straight_through` and everything active the model is the original bit by bit.

    Args:
        model: any model.
        targets: routers by target. A target is a pattern of paths in which `*` stands for any one part of a path, such
            as `model.layers.*.mlp`, or an adapter such as `intermediate_and_output`. A router is a spec, its fields, or
            a kind.
        train: `routers` freezes everything else.

    Returns:
        a handle to preview, steer and undo the routed parts.

    Raises:
        InputError: a target matches nothing, a part twice, or a part inside of another; a part cannot be wrapped as
            token-wise; or the model is retrofitted already.
    """
    check_instance(model, nn.Module, "retrofit got", "give the model")
    if not isinstance(targets, Mapping) or not targets:
        raise InputError(f"targets is {what_came(targets)}; expected a mapping of patterns or adapters to routers")
    if train not in ("all", "routers"):
        raise InputError(f"train={quote(train)}; expected 'all' or 'routers'")
    if any(isinstance(part, RoutedPart) for part in model.modules()):
        raise InputError(
            f"{type(model).__name__} is retrofitted already; undo() that first, or give all targets at once"
        )
    found: dict[str, tuple[Target, RouterSpec]] = {}
    for key, router in targets.items():
        spec = load_spec({"kind": router} if isinstance(router, str) else router, "router")
        for target in _matching(model, key) if isinstance(key, str) else _adapted(model, key):
            if target.path in found:
                raise InputError(f"two targets match {quote(target.path)}; route each part once")
            found[target.path] = (target, spec)
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

    def replacing(path: str) -> Callable[[nn.Module], Mapping[str, nn.Module]]:
        return lambda routed: {path: routed}

    return [Target(path, module, replacing(path)) for path, module in matching.items()]


def _adapted(model: nn.Module, adapter: Adapter) -> list[Target]:
    """The targets that an adapter finds."""
    if not callable(adapter):
        raise InputError(
            f"a target is {what_came(adapter)}; expected a pattern of paths, such as 'layers.*.mlp', or an adapter"
        )
    name, found = getattr(adapter, "__name__", type(adapter).__name__), adapter(model)
    targets = list(found) if isinstance(found, Iterable) else [found]
    for target in targets:
        check_instance(target, Target, f"the adapter {name} returned", "see sma.retrofit.Target")
    if not targets:
        raise InputError(f"the adapter {name} finds no part in {type(model).__name__}")
    return targets


def _check_replacements(model: nn.Module, new: Mapping[str, Mapping[str, nn.Module]]) -> dict[str, nn.Module]:
    """Check which modules are to be replaced, and return them by their paths.

    Args:
        model: the model.
        new: the new modules by their paths, by target.

    Raises:
        InputError: the model lacks one, it is shared, or two targets replace it or a module inside of it.
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    owners: dict[str, str] = {}
    for target, modules in new.items():
        for path in modules:
            if path not in paths or not path:
                raise InputError(f"the target {quote(target)} replaces {quote(path)}, which the model does not have")
            if path in owners:
                raise InputError(f"the targets {quote(owners[path])} and {quote(target)} both replace {quote(path)}")
            owners[path] = target
            shared = [other for other, each in paths.items() if each is paths[path] and other != path]
            if shared:
                raise InputError(f"{quote(path)} is also {quote(shared[0])}; a part that is shared cannot be routed")
    inside = [(a, b) for a in owners for b in owners if b.startswith(f"{a}.")]
    if inside:
        raise InputError(f"the target {quote(inside[0][1])} lies inside of {quote(inside[0][0])}; route one of them")
    return {path: paths[path] for path in owners}


def _nearest(pattern: str, paths: Iterable[str]) -> str:
    """The hint of the pattern that was meant: paths in which numbers are stars."""
    patterns = sorted({".".join("*" if word.isdigit() else word for word in path.split(".")) for path in paths if path})
    return did_you_mean(pattern, patterns, "patterns")


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    owner._modules[name] = module
