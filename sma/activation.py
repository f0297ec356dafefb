"""Sparse modular activation: a router and the sub-modules it chooses from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sma.around import ALONE, Around
from sma.capacity import Capacity, check_capacity, place
from sma.checks import (
    check_batch,
    check_beside,
    check_causal,
    check_count,
    check_decision,
    check_dtype,
    check_number,
    check_sizes,
    check_state,
    require_seen,
    what_came,
)
from sma.containers import dict_of
from sma.decision import Decision
from sma.errors import InputError, StateError, quote
from sma.memory import zeros
from sma.plain_modules import check_submodules, width_of
from sma.pytree import register_output
from sma.ragged import Places, Ragged, extract_add_, fill_holes, find
from sma.replay import check_selection
from sma.routers import Router, RouterSpec
from sma.routers.contract import keep_valid
from sma.routers.scored import LinearRouter
from sma.spec import load_spec
from sma.submodule import State, SubModule, device_and_dtype, may_skip


@register_output
@dataclass(frozen=True)
class RoutedState(State):
    """State of `SparseModularActivation` for B streams.

    Attributes:
        router: state of the router.
        modules: states of the sub-modules, by name.
        seen: number of valid tokens of each row so far; None where a layer or a model counts them.
    """

    router: State
    modules: dict[str, State]
    seen: Int[Tensor, "B"] | None


@register_output
@dataclass(frozen=True)
class RoutedOutput:
    """Output of `SparseModularActivation`.

    Attributes:
        values: sum over the sub-modules of activity times confidence times result; zeros where nothing was active.
            Inside a layer, which adds bypass, residual and activation in the same call, the result of `Around.after`.
        decision: the routing decision.
        state: state of the streams after this call; None unless one was given.
    """

    values: Float[Tensor, "B L D"]
    decision: Decision
    state: RoutedState | None = None


class Routing(NamedTuple):
    """A decision, and the tokens of each sub-module.

    Attributes:
        decision: the routing decision.
        frames: returns the tokens of each sub-module, without values; rectangular without holes where it runs on all
            tokens. On an accelerator the host waits for the number of tokens.
        state: state of the router.
    """

    decision: Decision
    frames: Callable[[], list[Ragged]]
    state: State | None


def _is_gathered(frame: Ragged) -> bool:
    return frame.stride is None or frame.holes


def _gathered(frames: Sequence[Ragged], like: Tensor) -> Places:
    """The places of the tokens of all sub-modules that do not run on the whole batch."""
    some = [frame for frame in frames if _is_gathered(frame)]
    if len(some) == 1:
        return Places(some[0].index, some[0].inverse)
    return Places(torch.cat([*(frame.index for frame in some), like.new_zeros(0, dtype=torch.int64)]), None)


class SparseModularActivation(nn.Module):
    r"""$y_t = \sum_m a_t^m c_t^m f_m(\mathrm{compress}(x))_t$: every token runs the sub-modules its router chose, and
    only those.

    Args:
        router: the router, whose `names` are the keys of `modules`; or a spec or a kind such as `"sma"` to build it.
        modules: the sub-modules, which work on ragged tokens, by name. `TokenWise` and `RowWise` wrap plain modules.
        dropout: probability of dropping a channel of a sub-module's result.
        width: channels of the tokens, D, for a router that is to be built; default what the sub-modules take.

    Shape:
        x `(B, L, D)` in, values `(B, L, D)` out.

    Raises:
        InputError: the names of the router and of the sub-modules differ, there are no sub-modules,
            `torch.nn.ModuleDict` cannot hold a name, a sub-module is a plain module, or the width does not follow from
            them.

    Reference:
        Ren et al., "Sparse Modular Activation for Efficient Sequence Modeling", arXiv 2306.11197.
    """

    if TYPE_CHECKING:
        __call__: Callable[..., RoutedOutput]  # which nn.Module types as Any

    def __init__(
        self,
        router: Router | RouterSpec | str,
        modules: Mapping[str, nn.Module],
        dropout: float = 0.0,
        *,
        width: int | None = None,
    ) -> None:
        super().__init__()
        check_submodules(modules)
        if isinstance(router, str | Mapping | RouterSpec):
            source = {"kind": router} if isinstance(router, str) else router
            router = load_spec(source, "router").build(width_of(modules, width), list(modules))
        if not hasattr(router, "names"):
            raise InputError(f"the router is {what_came(router)}; expected a Router, a spec of one, or a kind: 'sma'")
        if set(router.names) != set(modules):
            raise InputError(
                f"the router decides about {list(router.names)}, but the sub-modules are {list(modules)}; "
                "use the same names"
            )
        dotted = [name for name in router.names if "." in name or not name]
        if dotted:
            raise InputError(
                f"the sub-module name {dotted[0]!r} must be a word without dots, by which torch finds its parameters"
            )
        check_free(router.names, "sub-module", InputError)
        self.router = router
        self.submodules = dict_of({name: cast(SubModule, modules[name]) for name in router.names})
        check_number(dropout, "dropout")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout={dropout} must be at least 0 and below 1: the probability of dropping a channel")
        self.dropout = float(dropout)

    @property
    def causal(self) -> bool:
        """Whether neither the router nor a sub-module looks ahead."""
        return self.router.causal and all(bool(module.causal) for module in self.submodules.values())

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RoutedState:
        """Make the initial state of `batch_size` streams.

        Raises:
            StateError: the router or a sub-module is not causal.
        """
        self.check_causal()
        check_count(batch_size, "batch_size")
        device, dtype = device_and_dtype(self, device, dtype)
        seen = zeros((batch_size,), "the state of a routed layer", dtype=torch.int64, device=device)
        parts = {name: part.init_state(batch_size, device=device, dtype=dtype) for name, part in self._parts.items()}
        return RoutedState(self.router.init_state(batch_size, device=device, dtype=dtype), parts, seen)

    def check_causal(self) -> None:
        """Check that a stream can be continued.

        Raises:
            StateError: the router or a sub-module is not causal; the message names it.
        """
        for name, part in {"router": self.router, **self._parts}.items():
            check_causal(part, name)

    def check(self, state: RoutedState) -> None:
        """Check that a state belongs to these sub-modules.

        Raises:
            StateError: it belongs to others.
        """
        check_sizes(self, sorted(state.modules), sorted(self.router.names), "parts")

    @property
    def _parts(self) -> dict[str, SubModule]:
        return dict(self.submodules.items())

    def forward(
        self,
        x_BLD: Float[Tensor, "B L D"],
        *,
        control_BLD: Float[Tensor, "B L E"] | None = None,
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        state: RoutedState | None = None,
        capacity: Capacity | None = None,
        decision: Decision | Bool[Tensor, "B L M"] | None = None,
        around: Around | None = None,
    ) -> RoutedOutput:
        """Route every token.

        Args:
            x_BLD: tokens.
            control_BLD: control states for the router; default the tokens themselves.
            valid: False at padding, on whichever side; None where there is none.
            positions: position of each token in its row's stream; default the number of valid tokens of the row before
                it, those of earlier chunks included.
            state: state of the streams; None at their beginning.
            capacity: maximum number of tokens of a row per sub-module, which runs on the earliest active ones: an
                integer, a float in (0, 1] as a share of the valid tokens, a `PerBatch` for all rows, or a mapping of
                these by sub-module. No shape then depends on the data. None sets no maximum.
            decision: a decision to replay, or its mask: which tokens run which sub-modules. Scores and confidences are
                those of the router as it is now, see `Router.replay`; padding is never active. None: the router's.
            around: computations of a layer, which has checked and aligned the batch and counts the tokens of its
                streams; None without one.

        Raises:
            InputError: the shapes or dtypes do not fit, the capacity is impossible, or the router's decision does not
                fit these tokens.
            StateError: the state does not fit, the router or a sub-module is not causal, or a capacity comes with a
                state.
        """
        control_BLD = x_BLD if control_BLD is None else control_BLD
        seen = None
        if around is None:
            seen = self._check_inputs(x_BLD, control_BLD, valid, positions, state, capacity)
            decision = None if decision is None else check_selection(decision, self.router.names, x_BLD, "decision")
            if positions is None and (valid is not None or seen is not None):
                rank = torch.arange(x_BLD.shape[1], device=x_BLD.device)[None] if valid is None else valid.cumsum(1) - 1
                positions = (rank if seen is None else rank + seen[:, None]).expand(x_BLD.shape[:2])
            # The gradient of the router's weights multiplies padding by 0, and 0 x NaN is NaN.
            if valid is not None:
                control_BLD = control_BLD.where(valid[..., None], 0)
            around = ALONE
        selected = decision.active if isinstance(decision, Decision) else decision
        routing = self._route(control_BLD, valid, positions, state, capacity, selected)
        values, after = keeping_nothing(around.recompute, self._combine, x_BLD, routing, state, around)
        if after is not None and seen is not None:
            after = replace(after, seen=seen + (x_BLD.shape[1] if valid is None else valid.sum(1)))
        return RoutedOutput(values, routing.decision, after)

    def _check_inputs(
        self,
        x_BLD: Tensor,
        control_BLD: Tensor,
        valid: Tensor | None,
        positions: Tensor | None,
        state: RoutedState | None,
        capacity: Capacity | None,
    ) -> Tensor | None:
        """Check the arguments of a call without a layer; return the number of tokens in earlier chunks of each row, if
        there is a state.
        """
        # Checked here, so that the message names the tokens and not the argument of the router.
        router = self.router if control_BLD is x_BLD else None
        check_batch(x_BLD, valid, router.width if isinstance(router, LinearRouter) else None)
        check_dtype(self, x_BLD)
        check_beside(x_BLD, None if control_BLD is x_BLD else control_BLD, positions)
        check_capacity(capacity, self.router.names, state)
        if state is None:
            return None
        self.check_causal()
        self.check(check_state(self, state, RoutedState, x_BLD.shape[0]))
        return require_seen(self, state.seen)

    def _route(
        self,
        control_BLD: Float[Tensor, "B L E"],
        valid: Bool[Tensor, "B L"] | None,
        positions: Int[Tensor, "B L"] | None,
        state: RoutedState | None,
        capacity: Capacity | None,
        selected: Bool[Tensor, "B L M"] | None,
    ) -> Routing:
        """Decide for every token and locate the tokens of each sub-module; only the router's decision is checked."""
        decision, after = self.router(control_BLD, valid, positions, None if state is None else state.router)
        check_decision(self.router.names, decision, control_BLD, f"the decision of {type(self.router).__name__}")
        if selected is not None:
            # A router that is not a `Router` has no `replay`, so its confidences are kept.
            replay = getattr(self.router, "replay", None)
            decision = replace(decision if replay is None else replay(decision, selected), active=selected)
        if valid is not None:  # third-party routers may activate padding
            decision = replace(decision, active=keep_valid(decision.active, valid))
        if capacity is None:
            return Routing(decision, find(decision.active, positions), after)
        kept, frames = place(decision.active, capacity, decision.names, valid, positions)
        overflow = decision.active.sum(1) - kept.sum(1)
        return Routing(replace(decision, active=kept, overflow=overflow), lambda: frames, after)

    def _combine(
        self, x_BLD: Float[Tensor, "B L D"], routing: Routing, state: RoutedState | None, around: Around
    ) -> tuple[Float[Tensor, "B L D"], RoutedState | None]:
        """Run the sub-modules on their tokens, and add the results, in place, to the bypass."""
        x_TD = x_BLD.flatten(0, 1)
        decision, submodules = routing.decision, self.submodules
        out_TD, gathered = around.before(x_TD, lambda: _gathered(routing.frames(), x_TD))
        frames = routing.frames()
        sizes = [frame.index.shape[0] for frame in frames if _is_gathered(frame)]
        # No split and no selection for a single sub-module, because the gradient of each is another pass.
        chosen = iter(gathered.split(sizes) if len(sizes) > 1 else [gathered])
        confidences = decision.confidence.unbind(-1) if len(frames) > 1 else [decision.confidence.flatten(1)]
        states: dict[str, State] = {}
        values: Tensor | None = None
        for column, frame in enumerate(frames):
            # If all tokens run, nothing was gathered, and the values are the batch itself.
            name, values_TD = decision.names[column], next(chosen) if _is_gathered(frame) else x_TD
            before = None if state is None else state.modules[name]
            # `is_compiling` first, because the number of tokens is unknown in a compiled graph.
            if not torch.compiler.is_compiling() and frame.index.shape[0] == 0 and may_skip(submodules[name]):
                after = before
                if around.join is not None:
                    values = around.join(out_TD, None, confidences[column], frame, 0.0)
            else:
                tokens = frame.with_values(fill_holes(values_TD, frame))
                result_TD, after = self._checked(name, submodules[name](tokens, before), values_TD)
                if around.join is not None:
                    dropout = self.dropout if self.training else 0.0
                    values = around.join(out_TD, result_TD, confidences[column], tokens, dropout)
                else:
                    weighted_TD = self._weighted(result_TD, confidences[column], tokens)
                    out_TD = extract_add_(weighted_TD, tokens, out_TD)
            if after is not None:
                states[name] = after
            elif state is not None:
                raise StateError(
                    f"{name!r} ({type(self.submodules[name]).__name__}) was given a state and returned none; "
                    "see SubModule.forward"
                )
        values = around.after(out_TD.reshape(x_BLD.shape)) if values is None else values.reshape(x_BLD.shape)
        if state is None or routing.state is None:
            return values, None
        return values, RoutedState(routing.state, states, state.seen)

    def _checked(self, name: str, result: Any, values_TD: Tensor) -> tuple[Tensor, State | None]:
        """Check the result of a sub-module, and return it.

        Raises:
            InputError: it is not a tuple of results and a state, or there is not one result per token.
        """
        kind = type(self.submodules[name]).__name__
        if not isinstance(result, tuple) or len(result) != 2:
            raise InputError(
                f"the sub-module {name!r} ({kind}) returned {what_came(result)}; expected a tuple of the results "
                "(T, D) and the state, None unless one was given: see SubModule.forward"
            )
        if not isinstance(result[0], Tensor) or result[0].shape != values_TD.shape:
            raise InputError(
                f"the sub-module {name!r} ({kind}) returned {what_came(result[0])} as its results; expected a "
                f"tensor of shape {tuple(values_TD.shape)}, one result per token"
            )
        return result

    def _weighted(self, values: Tensor, confidence_BL: Tensor, tokens: Ragged) -> Tensor:
        # A hole has the confidence of another token, which may not be finite, and 0 x NaN is NaN in the gradient.
        confidence = fill_holes(confidence_BL.reshape(-1).index_select(0, tokens.index), tokens)
        values = nn.functional.dropout(values, self.dropout) if self.training else values
        return values * confidence.to(values.dtype)[:, None]


def keeping_nothing(recompute: bool, part: Callable[..., Any], *inputs: Any) -> Any:
    """Call a part; with `recompute`, its activations are recomputed in backward instead of kept."""
    return checkpoint(part, *inputs, use_reentrant=False) if recompute and torch.is_grad_enabled() else part(*inputs)


def check_free(names: Iterable[str], what: str, error: type[Exception]) -> None:
    """Check that `torch.nn.ModuleDict` has no attributes with the names of sub-modules.

    Raises:
        Exception: `error`: it has one; `what` begins the name in the message.
    """
    taken = [name for name in names if hasattr(nn.ModuleDict(), name)]
    if taken:
        raise error(
            f"the {what} name {quote(taken[0])} is taken by torch.nn.ModuleDict; "
            f"choose another, such as {taken[0] + '_'!r}"
        )
