"""Routers that decide about every sub-module independently: any subset of them can run, also none."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sma.checks import check_count, check_sizes
from sma.decision import Decision
from sma.fused import with_gradient
from sma.routers.contract import keep_valid
from sma.routers.control import ControlConv, ControlState
from sma.routers.scored import LinearSpec, ScoredRouter, TemperedRouter, TemperedSpec, probability_on
from sma.spec import register
from sma.submodule import State, device_and_dtype


@register
class SMARouterSpec(TemperedSpec):
    """Spec of `SMARouter`."""

    kind: Literal["sma"] = "sma"
    gate: Literal["probability", "margin", "root_margin", "straight_through"] = Field(
        default="probability",
        description="confidence of a token of probability p: p (the paper's); 2p - 1; its square root; 1, with the "
        "gradient of p",
    )
    initial_bias: float = Field(
        default=0.0, ge=-100.0, le=100.0, description="initial log-odds of being active; 4 starts with 98 % active"
    )

    control_conv: int | None = Field(
        default=None,
        ge=2,
        le=256,
        description="tokens of a causal depthwise convolution with silu over the control states, which are then "
        "scored; null: each token is scored by itself",
    )

    def build(self, width: int, names: Sequence[str]) -> "SMARouter":
        return SMARouter(self, width, names)

    def choices(self, modules: int) -> int:
        return 2 * modules

    def num_parameters(self, width: int, modules: int) -> int:
        conv = 0 if self.control_conv is None else width * (self.control_conv + 1)
        return super().num_parameters(width, modules) + conv

    def macs_per_token(self, width: int, modules: int) -> int:
        return super().macs_per_token(width, modules) + self.elementwise_macs_per_token(width, modules)

    def elementwise_macs_per_token(self, width: int, modules: int) -> int:
        return width * (self.control_conv or 0)


class SMARouter(TemperedRouter):
    r"""Independent hard decisions, one per sub-module, with a learned temperature: the router of the paper, and the
    default.

    $u = W h + b$ holds two scores per sub-module, off and on; $p = \mathrm{softmax}(u / \tau)$ over the two,
    $\tau = e^s$.
    Active iff $p_1 > p_0$: a tie is inactive. With $p = \max(p_0, p_1)$, which is $p_1$ where active, the confidence is

    - `probability`: $p$, which jumps from 0 to one half where a token becomes active;
    - `margin`: $2p - 1$, which starts at 0 there;
    - `root_margin`: $\sqrt{2p - 1 + 10^{-5}}$, at most 1;
    - `straight_through`: 1, with the gradient of $p$: with everything active, a layer is its dense baseline bit by bit.

    With `control_conv`, h is first convolved over the last K valid tokens of its row, see `ControlConv`; a stream keeps
    K - 1 of them.

    Causal. The gradient flows through the softmax of the active tokens only, so a router without active tokens stops
    learning; `sma.budget` revives it. Training and evaluation decide alike, without sampling. Use it by default.

    Args:
        spec: the initial temperature, the gate, the initial log-odds of being active, and the convolution.
        width: channels of the control state, D.
        names: the sub-modules, M of them.

    Shape:
        control `(B, L, D)`; rows 2m and 2m + 1 of `weight` `(2M, D)` are off and on of sub-module m.

    Reference:
        Ren et al., "Sparse Modular Activation for Efficient Sequence Modeling", arXiv 2306.11197; the root of the
        margin and the convolution: github.com/microsoft/ArchScale.
    """

    spec: SMARouterSpec

    def __init__(self, spec: SMARouterSpec, width: int, names: Sequence[str]) -> None:
        super().__init__(spec, width, names)
        with torch.no_grad():
            self.bias[1::2] = spec.initial_bias * spec.temperature_scale * math.sqrt(width)
        self.conv = None if spec.control_conv is None else ControlConv(width, spec.control_conv)
        if self.conv is not None:
            self.state_kind = ControlState

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Make the initial state of `batch_size` streams; see `Router.init_state`."""
        if self.conv is None:
            return super().init_state(batch_size, device=device, dtype=dtype)
        check_count(batch_size, "batch_size")
        return self.conv.init_state(batch_size, *device_and_dtype(self, device, dtype))

    def _mix(self, control_BLD: Tensor, valid: Tensor | None, state: State | None) -> tuple[Tensor, State | None]:
        if self.conv is None:
            return control_BLD, state
        if isinstance(state, ControlState):
            check_sizes(self, tuple(state.newest.shape[1:]), self.conv.sizes, "control states")
        wide = torch.promote_types(control_BLD.dtype, torch.float32)
        return self.conv(control_BLD.to(wide), valid, state)

    def _spread(self, score_bias: Tensor) -> Tensor:
        return torch.nn.functional.pad(score_bias[:, None], (1, 0)).reshape(-1)

    def _decide(
        self, scores: Tensor, valid: Tensor | None, positions: Tensor | None, streams: State | None
    ) -> Decision:
        scores = scores.unflatten(-1, (len(self.names), 2))
        # The scores decide, because at a high temperature the probability rounds to a tie.
        on = scores[..., 1] > scores[..., 0]
        p_on, confidence = tempered_choice(scores, on, self.log_temperature, self.spec.gate)
        return Decision(keep_valid(on, valid), confidence, scores, p_on, self.names)

    def replay(self, decision: Decision, active: Tensor) -> Decision:
        # The larger of the two probabilities is that of the router's own choice.
        return replace(decision, active=active, confidence=_confidence(decision.p_on, self.spec.gate))


def _confidence(p: Tensor, gate: str) -> Tensor:
    """Confidence of a choice of probability p, in (0, 1]."""
    least = torch.finfo(p.dtype).tiny
    if gate == "probability":
        return p.clamp(min=least)
    if gate == "margin":
        return (2 * p - 1).clamp(min=least)
    if gate == "root_margin":
        return ((2 * p - 1).clamp(min=0) + 1e-5).sqrt().clamp(max=1)
    return 1 + (p - p.detach())


def _confidence_slope(p: Tensor, gate: str) -> Tensor:
    """Derivative of the confidence by the probability."""
    least = torch.finfo(p.dtype).tiny
    if gate == "probability":
        return (p >= least).to(p.dtype)
    margin = 2 * p - 1
    if gate == "margin":
        return 2 * (margin >= least).to(p.dtype)
    if gate == "root_margin":
        root = (margin.clamp(min=0) + 1e-5).sqrt()
        return ((margin >= 0) & (root <= 1)) / root
    return torch.ones_like(p)


def _tempered_choice_backward(
    grad_p: Tensor, grad_confidence: Tensor, scores: Tensor, on: Tensor, log_temperature: Tensor, gate: str
) -> tuple[Tensor, Tensor]:
    temperature = log_temperature.to(scores.dtype).exp()
    margin = (scores[..., 1] - scores[..., 0]) / temperature
    p_on = torch.sigmoid(margin)
    chosen = p_on.where(on, 1 - p_on)
    slope = grad_confidence * _confidence_slope(chosen, gate)
    grad_margin = (grad_p + slope.where(on, -slope)) * p_on * (1 - p_on)
    grad_scores = torch.stack([-grad_margin, grad_margin], -1) / temperature
    return grad_scores, -(grad_margin * margin).sum().to(log_temperature.dtype).reshape(1)


@with_gradient(_tempered_choice_backward)
def tempered_choice(scores: Tensor, on: Tensor, log_temperature: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    """The probability of on, and the confidence of the choice."""
    p_on = probability_on(scores, log_temperature.to(scores.dtype).exp())
    return p_on, _confidence(p_on.where(on, 1 - p_on), gate)


@register
class ThresholdRouterSpec(LinearSpec):
    """Spec of `ThresholdRouter`."""

    kind: Literal["threshold"] = "threshold"
    threshold: float = Field(default=0.5, gt=0.0, lt=1.0, description="a token is active where its sigmoid is above it")

    def build(self, width: int, names: Sequence[str]) -> "ThresholdRouter":
        return ThresholdRouter(self, width, names)


class ThresholdRouter(ScoredRouter):
    r"""Independent sigmoid gates: $c = \sigma(w h + b)$, active iff $c > \theta$.

    Causal. The gradient flows through the sigmoid of the active tokens only. It has half the parameters of `sma`, and
    its confidence can be small: with a low threshold a sub-module fades in, where `sma` switches it on at one half.

    Args:
        spec: the threshold.
        width: channels of the control state, D.
        names: the sub-modules, M of them.

    Shape:
        control `(B, L, D)`; row m of `weight` `(M, D)` scores sub-module m. The logits are
        $(\mathrm{logit}\,\theta, w h + b)$, and `p_on` is their softmax.
    """

    def _decide(
        self, scores: Tensor, valid: Tensor | None, positions: Tensor | None, streams: State | None
    ) -> Decision:
        # In double precision, because in float32 a threshold near 0 or 1 rounds to it and its score would be infinite.
        threshold = math.log(self.spec.threshold / (1 - self.spec.threshold))
        # The smallest normal number, because a confidence must be above 0, to which a sigmoid can round.
        confidence = torch.sigmoid(scores).clamp(min=torch.finfo(scores.dtype).tiny)
        logits = torch.stack([torch.full_like(scores, threshold), scores], dim=-1)
        return Decision(
            keep_valid(scores > threshold, valid), confidence, logits, torch.sigmoid(scores - threshold), self.names
        )
