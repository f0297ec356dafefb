"""Routers that switch every sub-module on or off by itself: any subset, the empty one too."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sma.decision import Decision
from sma.routers.contract import RouterSpec, keep_valid
from sma.routers.scored import ScoredRouter, TemperedRouter, TemperedSpec
from sma.spec import register
from sma.submodule import State


@register
class SMARouterSpec(TemperedSpec):
    """Spec of `SMARouter`."""

    kind: Literal["sma"] = "sma"

    def build(self, width: int, names: Sequence[str]) -> "SMARouter":
        return SMARouter(self, width, names)

    def num_parameters(self, width: int, modules: int) -> int:
        return 2 * modules * (width + 1) + 1

    def macs_per_token(self, width: int, modules: int) -> int:
        return 2 * modules * width


class SMARouter(TemperedRouter):
    r"""Independent hard decisions, one per sub-module, with a learned temperature: the router of the paper, and the
    default.

    $u = W h + b$ holds two scores per sub-module, off and on; $p = \mathrm{softmax}(u / \tau)$ over the two,
    $\tau = e^s$.
    Active iff $p_1 > p_0$: a tie is inactive. Confidence $c = \max(p)$, which is $p_1$ where active.

    Causal. The gradient goes straight through the softmax; the mask carries none, so the router learns only from the
    tokens that are active, and one that no token activates learns nothing more: `sma.budget` keeps it alive. The same
    in training and in evaluation. Use it unless something speaks for another: any subset of the sub-modules, nothing
    drawn, confidences of one half and more.

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
        super().__init__(spec, width, names, 2 * len(names))

    def _spread(self, score_bias: Tensor) -> Tensor:
        return torch.nn.functional.pad(score_bias[:, None], (1, 0)).reshape(-1)

    def _decide(
        self, scores: Tensor, valid: Tensor | None, positions: Tensor | None, streams: State | None
    ) -> Decision:
        scores = scores.unflatten(-1, (len(self.names), 2))
        off, on = scores.unbind(-1)
        # The softmax over two is the sigmoid of their difference. The scores decide: at a high temperature it rounds to
        # a tie.
        p_on = torch.sigmoid((on - off) / self.log_temperature.to(scores.dtype).exp())
        return Decision(keep_valid(on > off, valid), torch.maximum(p_on, 1 - p_on), scores, p_on, self.names)


@register
class ThresholdRouterSpec(RouterSpec):
    """Spec of `ThresholdRouter`."""

    kind: Literal["threshold"] = "threshold"
    threshold: float = Field(default=0.5, gt=0.0, lt=1.0, description="a token is active where its sigmoid is above it")

    def build(self, width: int, names: Sequence[str]) -> "ThresholdRouter":
        return ThresholdRouter(self, width, names)

    def num_parameters(self, width: int, modules: int) -> int:
        return modules * (width + 1)

    def macs_per_token(self, width: int, modules: int) -> int:
        return modules * width


class ThresholdRouter(ScoredRouter):
    r"""Independent sigmoid gates: $c = \sigma(w h + b)$, active iff $c > \theta$.

    Causal. The gradient goes through the sigmoid of the active tokens alone. Half the parameters of `sma`, and a
    confidence that can be small: with a low threshold a sub-module fades in, where `sma` switches it on at one half.

    Args:
        spec: the threshold.
        width: channels of the control state, D.
        names: the sub-modules, M of them.

    Shape:
        control `(B, L, D)`; row m of `weight` `(M, D)` scores sub-module m. The logits are
        $(\mathrm{logit}\,\theta, w h + b)$, and `p_on` is their softmax.
    """

    def __init__(self, spec: ThresholdRouterSpec, width: int, names: Sequence[str]) -> None:
        super().__init__(spec, width, names, len(names))

    def _decide(
        self, scores: Tensor, valid: Tensor | None, positions: Tensor | None, streams: State | None
    ) -> Decision:
        # In double precision, because a threshold near 0 or 1 rounds to it in float32, and its score would be infinite.
        threshold = scores.new_tensor(math.log(self.spec.threshold / (1 - self.spec.threshold)))
        # The smallest normal number, because a confidence is above 0 everywhere, and a sigmoid can round to it.
        confidence = torch.sigmoid(scores).clamp(min=torch.finfo(scores.dtype).tiny)
        logits = torch.stack([threshold.expand_as(scores), scores], dim=-1)
        return Decision(
            keep_valid(scores > threshold, valid), confidence, logits, torch.sigmoid(scores - threshold), self.names
        )
