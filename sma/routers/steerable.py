"""Routers whose activation rates a budget can move."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from sma.decision import Decision
from sma.errors import InputError
from sma.routers.contract import Router, kind_of


class SteerableRouter(Router):
    """A router whose activation rates can be steered (`sma.budget`, `sma.calibrate`).

    It adds `score_bias` to the scores for on and decides by its logits: a valid token is active iff
    `logits[..., 1] > logits[..., 0]`, except where it breaks ties itself or samples. The score bias is a buffer that
    `forward` never changes. It stays in float32 or wider when the model is converted: in half precision the steps of a
    budget would round to 0.

    Attributes:
        score_bias: `(M,)`, initialised to 0.
        minimum_total_rate: the smallest sum of the activation rates.
        maximum_total_rate: the largest sum of the activation rates.
        competing: whether the sub-modules take tokens only from each other and, where there is one, from the choice to
            run nothing.
    """

    minimum_total_rate: float = 0.0
    maximum_total_rate: float = math.inf
    competing: bool = False
    score_bias: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.register_buffer("score_bias", torch.zeros(len(self.names)))

    @property
    def temperature(self) -> float | Tensor:
        """Scores per unit of log-odds."""
        return 1.0

    def skip_margins(self, decision: Decision) -> Float[Tensor, "B L"] | None:
        """Margin of the best sub-module over the option to run none, in log-odds; None if that option has no score."""
        if decision.skip_score is None:
            return None
        return (decision.logits[..., 1].amax(-1) - decision.skip_score) / self.temperature

    def check_targets(self, targets: Mapping[str, float]) -> None:
        """Check that activation rates, by sub-module, can be reached together; sub-modules without a target may have
        any rate.

        Raises:
            InputError: they cannot; the message gives the reason.
        """
        total, free = sum(targets.values()), len(self.names) - len(targets)
        low, high = self.minimum_total_rate, self.maximum_total_rate
        if low - free - 1e-6 <= total <= high + 1e-6:
            return
        sums = f"to {low:g}" if low == high else f"between {low:g} and {high:g}"
        others = f", to which the {free} without a target add {free} at most" if free and total < low else ""
        raise InputError(
            f"the rates of this {kind_of(self)} router sum {sums}, but the targets {dict(targets)} to {total:g}{others}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Convert or move the tensors, as `to` and `half` do through this method, but keep the score bias wide."""
        before = self.score_bias
        super()._apply(fn, recurse)
        if self.score_bias.dtype in (torch.bfloat16, torch.float16):
            self.score_bias = before.to(self.score_bias.device, torch.float32)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load, and widen a score bias in half precision that replaced this one (`assign=True`)."""
        super()._load_from_state_dict(*args)
        self.score_bias = self.score_bias.to(torch.promote_types(self.score_bias.dtype, torch.float32))


def steerable(router: Router) -> SteerableRouter:
    """Return a router whose activation rates can be steered.

    Raises:
        InputError: it cannot be steered; the message names an alternative.
    """
    if not isinstance(router, SteerableRouter):
        raise InputError(
            f"the router kind {kind_of(router)!r} cannot be steered to a rate; use one that can, such as 'sma', or "
            "derive your own from sma.routers.SteerableRouter"
        )
    return router
