"""A routed module inside a model that is not ours, and the explicit collection of its decisions."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sma.activation import SparseModularActivation
from sma.checks import check_booleans, check_module, check_valid, what_came
from sma.decision import Decision
from sma.errors import InputError
from sma.plain_modules import width_of
from sma.routers import RouterSpec
from sma.submodule import floating_dtype
from sma.summary import listed
from sma.wrap import TokenWise


class RoutedPart(nn.Module):
    """A token-wise module of another model, run on the tokens that a router chooses; the others get zeros.

    Args:
        path: path of the module in the model; its last word is the name of the sub-module.
        module: the module.
        router: spec of the router.

    Shape:
        hidden states `(…, D)` in and out, as the only argument, under any name. The first of three or more axes is
        the rows, and the others are the tokens of a row; with fewer axes there is one row.

    Raises:
        InputError: the module cannot be wrapped as token-wise, or keeps no width; or, at a call, there are other
            arguments, or the collected mask does not fit the tokens.
    """

    def __init__(self, path: str, module: nn.Module, router: RouterSpec) -> None:
        super().__init__()
        self.path = path
        modules = {path.rpartition(".")[2] or "part": TokenWise(module)}
        try:
            width = width_of(modules)
        except InputError:
            raise InputError(
                f"{type(module).__name__} does not map tokens (…, D) alone to tokens (…, D), with D any of its sizes; "
                "give a whole feed-forward block"
            ) from None
        self.routed = SparseModularActivation(router, modules, width=width)
        parameter = next(module.parameters(), None)
        self.routed.router.to(device=None if parameter is None else parameter.device, dtype=floating_dtype(module))

    def forward(self, *hidden: Tensor, **named: Tensor) -> Tensor:
        """Route the tokens, and give the decision to the collectors that are open."""
        x = self._only(*hidden, *named.values())
        rows = x.shape[0] if x.ndim > 2 else 1
        x_BLD = x if x.ndim == 3 else x.reshape(rows, math.prod(x.shape[x.ndim > 2 : -1]), x.shape[-1])
        output = self.routed(x_BLD, valid=_valid_for(self, x_BLD))
        _record(self, output.decision)
        return output.values.reshape(x.shape)

    def _only(self, *given: object) -> Tensor:
        if len(given) == 1 and isinstance(given[0], Tensor) and given[0].ndim:
            return given[0]
        raise InputError(
            f"{self.path} is called with {listed(map(what_came, given)) or 'nothing'}; a routed part takes one tensor "
            "of hidden states (…, D): route a part inside of it, or write an adapter"
        )

    def extra_repr(self) -> str:
        return f"path={self.path!r}"


class _Collector(NamedTuple):
    parts: frozenset[int]
    valid: Tensor | None
    decisions: list[Decision]


_collectors: ContextVar[tuple[_Collector, ...]] = ContextVar("collectors", default=())

# Masks of the last pass: a pass may be repeated in backward when its collector is closed.
_last_masks: WeakKeyDictionary[RoutedPart, Tensor] = WeakKeyDictionary()


@contextmanager
def collect_decisions(model: nn.Module, valid: Tensor | None = None) -> Iterator[list[Decision]]:
    """Collect the decisions of the routed parts of a model, in the order of their calls.

    Nothing is stored on modules. Contexts nest, each with its own decisions; a forward pass that activation
    checkpointing (with `use_reentrant=False`) repeats in backward is collected once, and two forward passes twice. Only
    calls of the thread that opened the context are collected. A repeated pass gets the mask of
    the last pass, also when its context is closed: call backward before the next forward pass.

    Args:
        model: a model that `retrofit` has changed.
        valid: mask `(B, L)`, False at padding, which the routed parts do not get from the model: padding is never
            active. None: no token is padding.

    Raises:
        InputError: the model has no routed part, or the mask is not boolean `(B, L)`; or, in the forward pass, the mask
            does not fit the tokens.
    """
    check_module(model, "sma.collect_decisions")
    parts = frozenset(id(part) for part in model.modules() if isinstance(part, RoutedPart))
    if not parts:
        raise InputError(f"{type(model).__name__} has no routed part; call sma.retrofit first")
    if valid is not None:
        check_booleans(valid, "valid is", {"B": None, "L": None})
    decisions: list[Decision] = []
    token = _collectors.set((*_collectors.get(), _Collector(parts, valid, decisions)))
    try:
        yield decisions
    finally:
        _collectors.reset(token)


def _is_repeated() -> bool:
    """Whether this runs in backward, where activation checkpointing repeats a forward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def _valid_for(part: RoutedPart, x_BLD: Tensor) -> Tensor | None:
    """The mask of the innermost collector that has one."""
    masks = [each.valid for each in _collectors.get() if id(part) in each.parts and each.valid is not None]
    mask = masks[-1] if masks else _last_masks.get(part) if _is_repeated() else None
    if mask is None:
        _last_masks.pop(part, None)
        return None
    try:
        check_valid(x_BLD, mask)
    except InputError as error:
        raise InputError(f"{part.path} has tokens of shape {tuple(x_BLD.shape)}, but {error}") from None
    _last_masks[part] = mask
    return mask


def _record(part: RoutedPart, decision: Decision) -> None:
    if _is_repeated():
        return
    if part.training and not torch.is_grad_enabled() and any(p.requires_grad for p in part.routed.router.parameters()):
        warnings.warn(
            "decisions are collected without gradients, so losses of them train no router; checkpoint with "
            "use_reentrant=False, or leave torch.no_grad()",
            stacklevel=2,
        )
    for collector in _collectors.get():
        if id(part) in collector.parts:
            collector.decisions.append(decision)
