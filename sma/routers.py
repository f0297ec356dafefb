"""Routers: which tokens run which sub-modules."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from sma.decision import Decision
from sma.errors import InputError, StateError
from sma.initial import truncated_normal_
from sma.pytree import register_output
from sma.spec import Spec, register
from sma.submodule import NoState, State, StateKind, check_state, no_state, placement


class RouterSpec(Spec):
    """Root of the router kinds."""

    family: ClassVar[str] = "router"
    kind: str

    def build(self, width: int, names: Sequence[str]) -> "Router":
        """Make the router of the named sub-modules for control states of `width` channels."""
        raise TypeError(f"{type(self).__name__} must define build(self, width, names)")

    def num_parameters(self, width: int, modules: int) -> int:
        """Predict the number of parameters of the router of `modules` sub-modules."""
        raise TypeError(f"{type(self).__name__} must define num_parameters(self, width, modules)")

    def operations(self, width: int, modules: int) -> int:
        """Predict the multiply-adds per token."""
        return 0


class Router(nn.Module):
    """Reads the control state of each token and decides which sub-modules run on it.

    Attributes:
        causal: whether a decision depends on no later token of its row.
        names: the sub-modules, in the order of the decision's last axis.
    """

    causal: bool = True
    names: tuple[str, ...]

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        if len(set(names)) != len(names):
            raise InputError(f"the sub-modules of one router need different names, not {list(names)}")
        self.names = tuple(names)

    def forward(
        self,
        control_BLD: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        state: State | None = None,
    ) -> tuple[Decision, State | None]:
        """Decide for every token.

        Args:
            control_BLD: what the router reads.
            valid: False at padding, which is never active; None where there is no padding.
            positions: position of each token in its row's stream, for routers that draw; default `0 … L - 1`.
            state: where the stream stands; None at its beginning.

        Returns:
            the decision, and a new state if and only if one was given.
        """
        raise TypeError(f"{type(self).__name__} must define forward(self, control_BLD, valid, positions, state=None)")

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        """Make the state of `batch_size` streams that have seen nothing; a router that looks at one token at a time inherits this.

        Raises:
            StateError: the router is not causal.
        """
        self._refuse_unless_causal()
        return no_state(batch_size, *placement(self, device, dtype))

    def _continue(self, state: State | None, kind: type[StateKind], control_BLD: Tensor) -> StateKind | None:
        if state is None:
            return None
        self._refuse_unless_causal()
        return check_state(self, state, kind, control_BLD.shape[0])

    def _refuse_unless_causal(self) -> None:
        if not self.causal:
            raise StateError(f"{type(self).__name__} (causal=False) decides by the whole row and cannot continue from a state")


def _keep_valid(active: Tensor, valid: Tensor | None) -> Tensor:
    return active if valid is None else active & valid[..., None]


@register
class SMARouterSpec(RouterSpec):
    """Spec of `SMARouter`."""

    kind: Literal["sma"] = "sma"
    temperature_scale: float = Field(
        default=1.0, ge=1e-4, le=1e4, description="initial temperature, in units of sqrt(width); smaller decides more sharply"
    )

    def build(self, width: int, names: Sequence[str]) -> "SMARouter":
        return SMARouter(self, width, names)

    def num_parameters(self, width: int, modules: int) -> int:
        return 2 * modules * (width + 1) + 1

    def operations(self, width: int, modules: int) -> int:
        return 2 * modules * width


class SMARouter(Router):
    r"""Independent hard decisions, one per sub-module, with a learned temperature.

    $u = W h + b$ holds two scores per sub-module, off and on; $p = \mathrm{softmax}(u / \tau)$ over the two, $\tau = e^s$.
    Active iff $p_1 > p_0$: a tie is inactive. Confidence $c = \max(p)$, which is $p_1$ where active. The gradient goes straight
    through the softmax; the mask carries none, so the router learns only from the tokens that are active.

    Args:
        spec: the initial temperature.
        width: channels of the control state, D.
        names: the sub-modules, M of them.

    Shape:
        control `(B, L, D)`; rows 2m and 2m + 1 of `weight` `(2M, D)` are off and on of sub-module m.

    Reference:
        Ren et al., "Sparse Modular Activation for Efficient Sequence Modeling", arXiv 2306.11197.
    """

    def __init__(self, spec: SMARouterSpec, width: int, names: Sequence[str]) -> None:
        super().__init__(names)
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(2 * len(self.names), width))
        self.bias = nn.Parameter(torch.zeros(2 * len(self.names)))
        self.log_temperature = nn.Parameter(torch.tensor([math.log(spec.temperature_scale * math.sqrt(width))]))
        truncated_normal_(self.weight)

    def forward(
        self,
        control_BLD: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        state: State | None = None,
    ) -> tuple[Decision, State | None]:
        """Decide for every token; see `Router.forward`."""
        self._continue(state, NoState, control_BLD)
        # Near a tie half precision decides by rounding, so the scores are never computed below float32.
        with torch.autocast(control_BLD.device.type, enabled=False):
            wide = torch.promote_types(control_BLD.dtype, torch.float32)
            scores = torch.nn.functional.linear(control_BLD.to(wide), self.weight.to(wide), self.bias.to(wide))
            scores = scores.unflatten(-1, (len(self.names), 2))
            probability = torch.softmax(scores / self.log_temperature.to(wide).exp(), dim=-1)
        off, on = probability.unbind(-1)
        active = _keep_valid(on > off, valid)
        return Decision(active, torch.maximum(on, off), scores, on, self.names), state


class _FixedRouter(Router):
    """A router without parameters."""

    def __init__(self, spec: Any, width: int, names: Sequence[str]) -> None:
        super().__init__(names)
        self.spec = spec

    def _decision(self, control_BLD: Tensor, active: Tensor, valid: Tensor | None, p_on: float) -> Decision:
        active = _keep_valid(active, valid)
        one = torch.ones(active.shape, dtype=torch.promote_types(control_BLD.dtype, torch.float32), device=control_BLD.device)
        logits = torch.stack([one * math.log(max(1 - p_on, 1e-30)), one * math.log(max(p_on, 1e-30))], dim=-1)
        return Decision(active, one, logits, one * p_on, self.names)

    def _mask(self, control_BLD: Tensor, value: bool) -> Tensor:
        return torch.full((*control_BLD.shape[:2], len(self.names)), value, device=control_BLD.device)


class _FixedRouterSpec(RouterSpec):
    def num_parameters(self, width: int, modules: int) -> int:
        return 0


@register
class AlwaysRouterSpec(_FixedRouterSpec):
    """Spec of `AlwaysRouter`."""

    kind: Literal["always"] = "always"

    def build(self, width: int, names: Sequence[str]) -> "AlwaysRouter":
        return AlwaysRouter(self, width, names)


class AlwaysRouter(_FixedRouter):
    """Every valid token runs every sub-module, with confidence exactly 1: the dense layer."""

    def forward(
        self,
        control_BLD: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        state: State | None = None,
    ) -> tuple[Decision, State | None]:
        """Decide for every token; see `Router.forward`."""
        self._continue(state, NoState, control_BLD)
        return self._decision(control_BLD, self._mask(control_BLD, True), valid, 1.0), state


@register
class NeverRouterSpec(_FixedRouterSpec):
    """Spec of `NeverRouter`."""

    kind: Literal["never"] = "never"

    def build(self, width: int, names: Sequence[str]) -> "NeverRouter":
        return NeverRouter(self, width, names)


class NeverRouter(_FixedRouter):
    """No token runs any sub-module: the control that shows what the backbone does alone."""

    def forward(
        self,
        control_BLD: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        state: State | None = None,
    ) -> tuple[Decision, State | None]:
        """Decide for every token; see `Router.forward`."""
        self._continue(state, NoState, control_BLD)
        return self._decision(control_BLD, self._mask(control_BLD, False), valid, 0.0), state


@register
class RandomRouterSpec(_FixedRouterSpec):
    """Spec of `RandomRouter`."""

    kind: Literal["random"] = "random"
    rate: float = Field(ge=0.0, le=1.0, description="probability that a token runs a sub-module")
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of the draws")

    def build(self, width: int, names: Sequence[str]) -> "RandomRouter":
        return RandomRouter(self, width, names)


class RandomRouter(_FixedRouter):
    """Tokens run sub-modules at random: the control for every claim that a router learned something.

    A draw depends on the seed, the sub-module's place, the row and the position only, so a stream cut into chunks is decided as
    the whole is.
    """

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "RandomState":
        """Make the state of `batch_size` streams: each keeps the number of its row wherever it is moved; see `Router.init_state`."""
        return RandomState(torch.arange(batch_size, device=placement(self, device, dtype)[0]))

    def forward(
        self,
        control_BLD: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        state: State | None = None,
    ) -> tuple[Decision, State | None]:
        """Decide for every token; see `Router.forward`."""
        streams = self._continue(state, RandomState, control_BLD)
        rows, length = control_BLD.shape[:2]
        device = control_BLD.device
        if positions is None:
            positions = torch.arange(length, device=device).expand(rows, length)
        row = (torch.arange(rows, device=device) if streams is None else streams.rows)[:, None, None]
        place = torch.arange(len(self.names), device=device)
        draw = keyed_uniform(self.spec.seed, row, positions[..., None], place)
        return self._decision(control_BLD, draw < self.spec.rate, valid, self.spec.rate), state


@register_output
@dataclass(frozen=True)
class RandomState(State):
    """Which row's draws each stream has.

    Attributes:
        rows: numbers of rows.
    """

    rows: Int[Tensor, "B"]

    def reset(self, rows: Bool[Tensor, "B"] | Int[Tensor, "R"]) -> Self:
        """The same state: a row that begins again draws what it drew."""
        return self


def keyed_uniform(seed: int, *keys: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Draw numbers in [0, 1) that depend on the seed and the integer keys alone, not on the order or number of draws."""
    mixed = torch.full((), (seed + 1) * _ODD % 2**62, device=keys[0].device)
    for key in keys:
        mixed = _scramble(mixed ^ (key.long() + 1) * _ODD)
    return (mixed >> 8 & (2**53 - 1)).double() * 2.0**-53


# 2**64 / golden ratio as a signed odd number: multiplying by it spreads neighbouring keys over all bits.
_ODD = -7046029254386353131


def _scramble(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64, on signed 64-bit numbers whose products wrap around."""
    bits = (bits ^ (bits >> 30 & (2**34 - 1))) * -4658895280553007687
    bits = (bits ^ (bits >> 27 & (2**37 - 1))) * -7723592293110705685
    return bits ^ (bits >> 31 & (2**33 - 1))
