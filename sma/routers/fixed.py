"""Routers that do not learn: the dense layer, and controls for the contribution of a learned router."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from sma.checks import check_batch
from sma.decision import Decision
from sma.routers.contract import Router, RouterSpec, keep_valid
from sma.routers.draws import DrawingRouter, draw_for_tokens
from sma.spec import register
from sma.submodule import State


class _FixedRouterSpec(RouterSpec):
    fixed_rate: ClassVar[bool] = True

    def num_parameters(self, width: int, modules: int) -> int:
        return 0


class _FixedRouter(Router):
    """A router without parameters, with one probability for all tokens and sub-modules."""

    p_on: float

    def __init__(self, spec: Any, width: int, names: Sequence[str]) -> None:
        super().__init__(names)
        self.spec = spec

    def forward(
        self,
        control_BLD: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        state: State | None = None,
    ) -> tuple[Decision, State | None]:
        check_batch(control_BLD, valid, what="control_BLD is")
        streams = self._continue(state, self.state_kind, control_BLD)
        shape = (*control_BLD.shape[:2], len(self.names))
        one = torch.ones(shape, dtype=torch.promote_types(control_BLD.dtype, torch.float32), device=control_BLD.device)
        active = keep_valid(self._choose(one, positions, streams), valid)
        logits = torch.stack([one * math.log(max(1 - self.p_on, 1e-30)), one * math.log(max(self.p_on, 1e-30))], dim=-1)
        return Decision(active, one, logits, one * self.p_on, self.names), state

    def _choose(self, like_BLM: Tensor, positions: Tensor | None, streams: State | None) -> Tensor:
        """Which tokens run which sub-modules."""
        return torch.full_like(like_BLM, bool(self.p_on), dtype=torch.bool)


@register
class AlwaysRouterSpec(_FixedRouterSpec):
    """Spec of `AlwaysRouter`."""

    kind: Literal["always"] = "always"
    expected_rate: ClassVar[float] = 1.0

    def build(self, width: int, names: Sequence[str]) -> "AlwaysRouter":
        return AlwaysRouter(self, width, names)


class AlwaysRouter(_FixedRouter):
    """Every valid token runs every sub-module, with confidence exactly 1: the dense layer.

    Causal. It has no parameters and no gradient. Use it as the dense baseline of a routed layer, in accuracy and time.
    """

    p_on = 1.0


@register
class NeverRouterSpec(_FixedRouterSpec):
    """Spec of `NeverRouter`."""

    kind: Literal["never"] = "never"
    expected_rate: ClassVar[float] = 0.0

    def build(self, width: int, names: Sequence[str]) -> "NeverRouter":
        return NeverRouter(self, width, names)


class NeverRouter(_FixedRouter):
    """No token runs any sub-module.

    Causal. It has no parameters and no gradient; the sub-modules' parameters get gradients of zeros. Use it as the
    control that shows the accuracy of the backbone alone.
    """

    p_on = 0.0


@register
class RandomRouterSpec(_FixedRouterSpec):
    """Spec of `RandomRouter`."""

    kind: Literal["random"] = "random"
    rate: float = Field(ge=0.0, le=1.0, description="probability that a token runs a sub-module")
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of the draws")

    @property
    def expected_rate(self) -> float:
        return self.rate

    def build(self, width: int, names: Sequence[str]) -> "RandomRouter":
        return RandomRouter(self, width, names)


class RandomRouter(DrawingRouter, _FixedRouter):
    """Tokens run sub-modules at random: the control for the contribution of a learned router.

    A draw depends only on the seed, the layer, the sub-module's index, the row and the position. Chunks of a stream are
    therefore decided as the whole, and training as evaluation. The pattern is fixed: row b of every batch, of every
    update and of every rank of a distributed training runs the same positions; another `seed` gives another pattern.

    Causal, with confidence exactly 1. It has no parameters and no gradient. Use it with the rate of the learned router.
    """

    def __init__(self, spec: RandomRouterSpec, width: int, names: Sequence[str]) -> None:
        super().__init__(spec, width, names)
        self.p_on = spec.rate

    def _choose(self, like_BLM: Tensor, positions: Tensor | None, streams: State | None) -> Tensor:
        return draw_for_tokens(like_BLM, positions, streams, self.draws) < self.spec.rate
