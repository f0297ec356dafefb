"""Routers with linear scores, and with a learned temperature."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from sma.checks import check_batch
from sma.decision import Decision
from sma.devices import is_sharded, without_autocast
from sma.init import truncated_normal_
from sma.routers.contract import Router, RouterSpec
from sma.routers.steerable import SteerableRouter
from sma.submodule import State


class LinearSpec(RouterSpec):
    """Base of the specs of routers with linear scores."""

    def choices(self, modules: int) -> int:
        """Number of scores per token, one for each row of the weight."""
        return modules

    def num_parameters(self, width: int, modules: int) -> int:
        return self.choices(modules) * (width + 1)

    def macs_per_token(self, width: int, modules: int) -> int:
        return self.choices(modules) * width


class LinearRouter(Router):
    """A router with linear scores: $u = W h + b$, one row per choice.

    Args:
        spec: spec of the router.
        width: channels of the control state, D.
        names: the sub-modules, M of them.
        choices: rows of W; default those of the spec.

    Attributes:
        weight: `(choices, D)`, initialised from a truncated normal distribution of standard deviation 0.02.
        bias: `(choices,)`, initialised to 0.
    """

    def __init__(self, spec: Any, width: int, names: Sequence[str], choices: int | None = None) -> None:
        super().__init__(names)
        self.spec = spec
        self.width = width
        choices = spec.choices(len(names)) if choices is None else choices
        self.weight = nn.Parameter(torch.empty(choices, width))
        self.bias = nn.Parameter(torch.zeros(choices))
        truncated_normal_(self.weight)

    def forward(
        self,
        control_BLD: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        state: State | None = None,
    ) -> tuple[Decision, State | None]:
        check_batch(control_BLD, valid, self.width, "control_BLD is")
        streams = self._continue(state, self.state_kind, control_BLD)
        with without_autocast(control_BLD.device):
            control_BLD, after = self._mix(control_BLD, valid, streams)
            return self._decide(self._scores(control_BLD), valid, positions, streams), after

    def _mix(self, control_BLD: Tensor, valid: Tensor | None, state: State | None) -> tuple[Tensor, State | None]:
        """The scored values, and the state after these tokens; by default the tokens themselves."""
        return control_BLD, state

    def _scores(self, control_BLD: Tensor) -> Tensor:
        """One score per choice."""
        # Near a tie half precision decides by rounding, so the scores are never computed below float32.
        wide = torch.promote_types(control_BLD.dtype, torch.float32)
        return nn.functional.linear(control_BLD.to(wide), self.weight.to(wide), self._biases(wide))

    def _biases(self, wide: torch.dtype) -> Float[Tensor, "choices"]:
        """Biases of the scores."""
        return self.bias.to(wide)

    def _decide(
        self, scores: Tensor, valid: Tensor | None, positions: Tensor | None, streams: State | None
    ) -> Decision:
        """Decide by scores `(B, L, choices)` in float32 or wider; positions and state are those of `forward`."""
        raise TypeError(f"{type(self).__name__} must define _decide(self, scores, valid, positions, streams)")


class ScoredRouter(LinearRouter, SteerableRouter):
    """A `LinearRouter` whose rates can be steered: it adds the score bias of a budget to the scores for on."""

    def _biases(self, wide: torch.dtype) -> Float[Tensor, "choices"]:
        return super()._biases(wide) + self._spread(self.score_bias.to(wide))

    def _spread(self, score_bias: Tensor) -> Tensor:
        """Expand the score biases `(M,)` to `(choices,)`; by default the choices are the sub-modules."""
        return score_bias


def gathered(tensor: Tensor) -> Tensor:
    """Gather a tensor that is sharded over the ranks (`fully_shard`), which every rank must call; return any other
    unchanged.
    """
    whole: Tensor = cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor
    return whole


def probability_on(scores: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """The softmax of scores `(…, 2)` for on, as the sigmoid of their difference: finite for all finite scores."""
    return torch.sigmoid((scores[..., 1] - scores[..., 0]) / temperature)


class TemperedSpec(LinearSpec):
    """Base of the specs of routers with a learned temperature."""

    temperature_scale: float = Field(
        default=1.0,
        ge=1e-4,
        le=1e4,
        description="initial temperature, in units of sqrt(width); smaller decides more sharply",
    )

    def num_parameters(self, width: int, modules: int) -> int:
        return super().num_parameters(width, modules) + 1


class TemperedRouter(ScoredRouter):
    r"""A router with scores and a learned temperature $\tau = e^s$, one for all sub-modules,
    $s_0 = \ln(\text{scale} \sqrt{D})$.
    """

    def __init__(self, spec: TemperedSpec, width: int, names: Sequence[str], choices: int | None = None) -> None:
        super().__init__(spec, width, names, choices)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(spec.temperature_scale * math.sqrt(width))]))

    @property
    def temperature(self) -> Tensor:
        exponent = gathered(self.log_temperature.detach())[0]
        return exponent.to(torch.promote_types(exponent.dtype, torch.float32)).exp()

    def _softmax(self, scores: Tensor) -> Tensor:
        """The softmax over the last axis, of differences to the maximum: their overflow gives 0, not NaN."""
        shifted = scores - scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores
        return torch.softmax(shifted / self.log_temperature.to(scores.dtype).exp(), dim=-1)
