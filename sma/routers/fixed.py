"""Routers that do not learn: the dense layer, and the controls of every claim that a router learned something."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from sma.decision import Decision
from sma.routers.contract import Router, RouterSpec, keep_valid
from sma.routers.draws import RandomState, draw_for_tokens
from sma.spec import register
from sma.submodule import NoState, State, placement


class _FixedRouter(Router):
    """A router without parameters."""

    def __init__(self, spec: Any, width: int, names: Sequence[str]) -> None:
        super().__init__(names)
        self.spec = spec

    def _decision(self, control_BLD: Tensor, active: Tensor, valid: Tensor | None, p_on: float) -> Decision:
        active = keep_valid(active, valid)
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
        draw = draw_for_tokens(self._mask(control_BLD, True), positions, streams, self.spec.seed)
        return self._decision(control_BLD, draw < self.spec.rate, valid, self.spec.rate), state
