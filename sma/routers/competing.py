"""Routers under which sub-modules compete for tokens, or tokens for sub-modules."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sma.decision import Decision
from sma.errors import SpecError
from sma.routers.contract import keep_valid
from sma.routers.scored import LinearRouter, LinearSpec, TemperedRouter, TemperedSpec
from sma.spec import register
from sma.submodule import State


@register
class ExclusiveRouterSpec(TemperedSpec):
    """Spec of `ExclusiveRouter`."""

    kind: Literal["exclusive"] = "exclusive"

    def build(self, width: int, names: Sequence[str]) -> "ExclusiveRouter":
        return ExclusiveRouter(self, width, names)

    def choices(self, modules: int) -> int:
        return modules + 1


class ExclusiveRouter(TemperedRouter):
    r"""At most one sub-module per token: the one with the largest $p = \mathrm{softmax}((W h + b) / \tau)$ over skip
    and the sub-modules.

    A sub-module is active iff its score is above every other score and above that of skip; a tie runs nothing.
    Confidence $c_m = p_m$.

    Causal. The gradient of a token's choice reaches all M + 1 scores through the softmax; a token that skips carries
    none. Use it where the sub-modules are alternatives, such as MLPs of several sizes.

    Args:
        spec: the initial temperature.
        width: channels of the control state, D.
        names: the sub-modules, M of them.

    Shape:
        control `(B, L, D)`; row 0 of `weight` `(M + 1, D)` is skip. The logits are the best of the other scores and
            the own score.
    """

    def __init__(self, spec: ExclusiveRouterSpec, width: int, names: Sequence[str]) -> None:
        super().__init__(spec, width, names)
        self.maximum_total_rate, self.competing = 1.0, True

    def _spread(self, score_bias: Tensor) -> Tensor:
        return torch.nn.functional.pad(score_bias, (1, 0))

    def _decide(
        self, scores: Tensor, valid: Tensor | None, positions: Tensor | None, streams: State | None
    ) -> Decision:
        scores = _finite(scores)
        probability = self._softmax(scores)[..., 1:].clamp(min=torch.finfo(scores.dtype).tiny)
        best = scores.topk(min(2, scores.shape[-1]), dim=-1).values
        own = scores[..., 1:]
        # The best of the other scores: the second of all for the best one, else the best.
        others = best[..., -1:].where(own == best[..., :1], best[..., :1])
        active = keep_valid(own > others, valid)
        logits = torch.stack([others.expand_as(own), own], dim=-1)
        return Decision(active, probability, logits, probability, self.names, skip_score=scores[..., 0])


def _finite(scores: Tensor) -> Tensor:
    """Clamp scores so that their differences are finite too; NaN stays NaN."""
    most = torch.finfo(scores.dtype).max / 4
    return scores.clamp(-most, most)


def _below(scores: Tensor) -> Tensor:
    """Values below the scores: by one or, where rounding would undo that, by a little more than the rounding."""
    return scores - (1.0 + 2 * torch.finfo(scores.dtype).eps * scores.detach().abs())


@register
class TopKRouterSpec(TemperedSpec):
    """Spec of `TopKRouter`."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=1, ge=1, description="choices that every token makes")
    skips: int = Field(
        default=0, ge=0, le=64, description="empty choices that compete too, with which a token runs fewer than k"
    )

    def build(self, width: int, names: Sequence[str]) -> "TopKRouter":
        if names and self.k > len(names) + self.skips:
            raise SpecError(
                f"TopKRouterSpec: k={self.k} is more than the {len(names)} sub-modules and skips={self.skips} to "
                "choose from; lower k"
            )
        return TopKRouter(self, width, names)

    def choices(self, modules: int) -> int:
        return modules + self.skips


class TopKRouter(TemperedRouter):
    r"""Token choice: every token runs the k sub-modules with the highest scores,
    $p = \mathrm{softmax}((W h + b) / \tau)$, $c_m = p_m$.

    A token always makes k choices; of equal scores the first in the order of the names wins. `skips` adds choices that
    run nothing. A token with NaN scores runs nothing.

    Causal. The gradient of a token's choices reaches all scores through the softmax. Without skips the rates sum to k,
    so the router as a whole cannot die, but its load can be unbalanced: add `losses.load_balance_loss`. This is the
    usual router of mixture-of-experts models.

    Args:
        spec: k, the empty choices, the initial temperature.
        width: channels of the control state, D.
        names: the sub-modules, M of them.

    Shape:
        control `(B, L, D)`; rows of `weight` `(M + skips, D)` are the sub-modules, then the skips. The logits are (the
        k-th best of the other scores, the own).

    Raises:
        SpecError: k is more than the number of choices.

    Reference:
        Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538.
    """

    def __init__(self, spec: TopKRouterSpec, width: int, names: Sequence[str]) -> None:
        super().__init__(spec, width, names)
        self.minimum_total_rate = float(max(spec.k - spec.skips, 0))
        self.maximum_total_rate = float(min(spec.k, len(names)))
        # With several empty choices, or with k > 1, no single choice means that nothing runs.
        self.competing = spec.skips == 0 or (spec.k == 1 and spec.skips == 1)

    def _spread(self, score_bias: Tensor) -> Tensor:
        return torch.nn.functional.pad(score_bias, (0, self.spec.skips))

    def _decide(
        self, scores: Tensor, valid: Tensor | None, positions: Tensor | None, streams: State | None
    ) -> Decision:
        modules, k, scores = len(self.names), self.spec.k, _finite(scores)
        probability = self._softmax(scores)[..., :modules].clamp(min=torch.finfo(scores.dtype).tiny)
        own = scores[..., :modules]
        # Sorted once, ties in the order of the names: topk does not specify which of equal scores it takes.
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :k], True)[..., :modules]
        after = ordered[..., k : k + 1] if k < scores.shape[-1] else _below(ordered[..., -1:])
        others = after.where(chosen, ordered[..., k - 1 : k]) if modules else own
        # The sort ranks NaN highest.
        active = keep_valid(chosen & probability.isfinite(), valid)
        skip = scores[..., modules] if self.competing and self.spec.skips else None
        return Decision(
            active, probability, torch.stack([others, own], dim=-1), probability, self.names, skip_score=skip
        )


@register
class ExpertChoiceRouterSpec(LinearSpec):
    """Spec of `ExpertChoiceRouter`."""

    kind: Literal["expert_choice"] = "expert_choice"
    fixed_rate: ClassVar[bool] = True
    share: float = Field(gt=0.0, le=1.0, description="share of a row's tokens that every sub-module takes")

    @property
    def expected_rate(self) -> float:
        return self.share

    def build(self, width: int, names: Sequence[str]) -> "ExpertChoiceRouter":
        return ExpertChoiceRouter(self, width, names)


class ExpertChoiceRouter(LinearRouter):
    r"""Every sub-module takes its share of the tokens of each row, those with the highest scores;
    $c = \sigma(w h + b)$.

    It takes $\lceil \text{share} \cdot L \rceil$ of a row's L valid tokens; of equal scores the earlier token wins. A
    token with a NaN score counts as padding.

    Not causal: whether a token is taken depends on the whole row. So it cannot be streamed, and in a language model it
    would read the tokens that are to be predicted. The gradient flows through the sigmoid of the tokens that were
    taken. Rates are exact by construction and no router can die. Use it for classification and encoders;
    Mixture-of-Depths uses the same rule. Its rate is its `share` whatever its scores are, so it cannot be steered.

    Args:
        spec: the share.
        width: channels of the control state, D.
        names: the sub-modules, M of them.

    Shape:
        control `(B, L, D)`; row m of `weight` `(M, D)` scores sub-module m. The logits are the middle between the last
        score that was taken and the first that was not, and the own score; `p_on` is their softmax.

    Reference:
        Zhou et al., "Mixture-of-Experts with Expert Choice Routing", arXiv 2202.09368; Raposo et al.,
        "Mixture-of-Depths", arXiv 2404.02258.
    """

    causal = False

    def _decide(
        self, scores: Tensor, valid: Tensor | None, positions: Tensor | None, streams: State | None
    ) -> Decision:
        confidence = torch.sigmoid(scores).clamp(min=torch.finfo(scores.dtype).tiny)
        real = keep_valid(~scores.isnan(), valid)
        lengths = real.sum(1, keepdim=True)
        # In floating point 0.07 * 100 is slightly above 7, and must not give 8.
        taken = (lengths.double() * self.spec.share - 1e-9).ceil().long().clamp(min=1).minimum(lengths)
        ordered, order = scores.detach().masked_fill(~real, -math.inf).sort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter(
            1, order, torch.arange(scores.shape[1], device=scores.device)[:, None].expand_as(order)
        )
        active = (rank < taken) & real
        middle = self._middle(ordered, taken, lengths)
        logits = torch.stack([middle.expand_as(scores), scores], dim=-1)
        return Decision(active, confidence, logits, torch.sigmoid(scores - middle), self.names)

    def _middle(self, ordered: Tensor, taken: Tensor, lengths: Tensor) -> Tensor:
        """A threshold below the last score that is taken: the middle between it and the next score; where all are
        taken, one less.
        """
        if ordered.shape[1] == 0:
            return ordered.sum(1, keepdim=True)
        last = ordered.take_along_dim((taken - 1).clamp(min=0), dim=1)
        following = ordered.take_along_dim(taken.clamp(max=ordered.shape[1] - 1), dim=1)
        middle = last / 2 + following / 2
        # Between adjacent floats there is no middle, and the half of the sum may round to the upper one.
        middle = middle.where(middle < last, following)
        return middle.where(taken < lengths, _below(last)).where(lengths > 0, 0.0)
