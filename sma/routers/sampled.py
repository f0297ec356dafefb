"""Routers that sample their decisions in training, to explore."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sma.checks import check_count
from sma.decision import Decision
from sma.routers.contract import keep_valid
from sma.routers.draws import DrawingRouter, draw_for_tokens
from sma.routers.scored import LinearSpec, ScoredRouter, TemperedRouter, TemperedSpec, probability_on
from sma.spec import register
from sma.submodule import State


class SampledSpec(LinearSpec):
    """Base of the specs of routers that sample."""

    stochastic: ClassVar[bool] = True
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of the draws")

    def choices(self, modules: int) -> int:
        return 2 * modules


class SampledRouter(DrawingRouter, ScoredRouter):
    r"""In training two Gumbel draws are added to the scores for off and on: $v = W h + b + g$; active iff $v_1 > v_0$,
    which has the probability $\sigma(u_1 - u_0)$. In evaluation nothing is drawn.

    The draws depend only on the seed, the number of updates, the row, the position and the sub-module, so chunks of a
    stream agree with the whole. The recipes call `set_step` with the number of updates; your own training loop must
    do so too, or the noise stays the same. Every rank of a distributed training numbers the rows of its own shard, so
    rows with the same index in two shards get the same draws. The rank is not a key of a draw, because ranks that share
    a row (tensor or context parallelism) must draw the same for it.
    """

    stochastic = True
    updates: Tensor

    def __init__(self, spec: SampledSpec, width: int, names: Sequence[str]) -> None:
        super().__init__(spec, width, names)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def set_step(self, updates: int) -> None:
        if not isinstance(updates, Tensor):
            check_count(updates, "updates")
        self.updates.fill_(updates)

    def _decide(
        self, scores: Tensor, valid: Tensor | None, positions: Tensor | None, streams: State | None
    ) -> Decision:
        noise = self._noise(scores, positions, streams) if self.training else torch.zeros_like(scores)
        return self._sample(scores.unflatten(-1, (-1, 2)), noise.unflatten(-1, (-1, 2)), valid)

    def _noise(self, scores: Tensor, positions: Tensor | None, streams: State | None) -> Tensor:
        # A draw is never 1; a draw of 0, whose logarithm is infinite, moves by half a step of the grid.
        draw = draw_for_tokens(scores, positions, streams, self.draws, self.updates).clamp(min=2.0**-54)
        return (-(-draw.log()).log()).to(scores.dtype)

    def _sample(self, scores: Tensor, noise: Tensor, valid: Tensor | None) -> Decision:
        """Decide by scores and noise, `(B, L, M, 2)`."""
        raise TypeError(f"{type(self).__name__} must define _sample(self, scores, noise, valid)")

    def _spread(self, score_bias: Tensor) -> Tensor:
        return torch.nn.functional.pad(score_bias[:, None], (1, 0)).reshape(-1)


@register
class GumbelRouterSpec(SampledSpec):
    """Spec of `GumbelRouter`."""

    kind: Literal["gumbel"] = "gumbel"
    temperature: float = Field(default=1.0, ge=1e-4, le=1e4, description="initial temperature of the relaxation")
    final_temperature: float = Field(
        default=0.3, ge=1e-4, le=1e4, description="temperature of the relaxation from update `anneal` on"
    )
    anneal: int = Field(
        default=2000, ge=0, description="updates from the first temperature to the final one, geometrically"
    )

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.final_temperature > self.temperature:
            raise ValueError(
                f"final_temperature={self.final_temperature} must be at most temperature={self.temperature}; "
                "annealing cools"
            )
        return self

    def build(self, width: int, names: Sequence[str]) -> "GumbelRouter":
        return GumbelRouter(self, width, names)


class GumbelRouter(SampledRouter):
    r"""A `SampledRouter` that learns through the relaxed sample: straight-through Gumbel-softmax.

    The confidence is exactly 1. Its gradient is that of $\mathrm{softmax}(v / \tau)_1$, where $\tau$ falls from
    `temperature` to `final_temperature`.

    Causal. Tokens that were not sampled carry no gradient, but every token has a chance to be sampled, so a rare
    sub-module is tried again. Use it where `sma` settles too early. The logits are without noise, so a budget holds the
    rate in evaluation; the rate in training is the mean of `p_on`.

    Args:
        spec: temperatures and seed.
        width: channels of the control state, D.
        names: the sub-modules, M of them.

    Shape:
        control `(B, L, D)`; rows 2m and 2m + 1 of `weight` `(2M, D)` are off and on of sub-module m.

    Reference:
        Jang et al., "Categorical Reparameterization with Gumbel-Softmax", arXiv 1611.01144.
    """

    def _sample(self, scores: Tensor, noise: Tensor, valid: Tensor | None) -> Decision:
        noisy = scores + noise
        spec: Any = self.spec
        done = (self.updates.double() / spec.anneal).clamp(max=1.0) if spec.anneal else self.updates.double().fill_(1.0)
        temperature = spec.temperature * (spec.final_temperature / spec.temperature) ** done
        relaxed = probability_on(noisy, temperature.to(scores.dtype))
        confidence = 1 + (relaxed - relaxed.detach())
        active = keep_valid(noisy[..., 1] > noisy[..., 0], valid)
        return Decision(active, confidence, scores, probability_on(scores), self.names)


@register
class BernoulliRouterSpec(SampledSpec):
    """Spec of `BernoulliRouter`."""

    kind: Literal["bernoulli"] = "bernoulli"
    needs_policy_gradient: ClassVar[bool] = True

    def build(self, width: int, names: Sequence[str]) -> "BernoulliRouter":
        return BernoulliRouter(self, width, names)


class BernoulliRouter(SampledRouter):
    r"""A `SampledRouter` that learns a stochastic policy, $a \sim \mathrm{Bernoulli}(\sigma(u_1 - u_0))$.

    The confidence is exactly 1 and its gradient 0. Only `sma.losses.policy_gradient_loss` trains the router: it
    compares the losses of rows in which a token was active with those of rows in which it was not.

    Causal. Use it where a token matters to *other* tokens, such as a key and value that they attend to. The gradient
    through a confidence misses that effect, because a confidence scales the token's own result. A gradient that scales
    the token's keys and values measures a small change of the token, not its absence. The score function is unbiased
    for both, at the price of a high variance: it needs many rows, and losses by position where the targets are at
    positions.

    Args:
        spec: seed of the draws.
        width: channels of the control state, D.
        names: the sub-modules, M of them.

    Shape:
        control `(B, L, D)`; rows 2m and 2m + 1 of `weight` `(2M, D)` are off and on of sub-module m.

    Reference:
        Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", 1992;
        Bengio et al., "Conditional Computation in Neural Networks for faster models", arXiv 1511.06297.
    """

    def _sample(self, scores: Tensor, noise: Tensor, valid: Tensor | None) -> Decision:
        noisy = scores + noise
        p_on = probability_on(scores)
        confidence = 1 + 0 * p_on  # gradients of zeros, never None, for every loss
        return Decision(keep_valid(noisy[..., 1] > noisy[..., 0], valid), confidence, scores, p_on, self.names)


@register
class ExploreRouterSpec(SampledSpec, TemperedSpec):
    """Spec of `ExploreRouter`."""

    kind: Literal["explore"] = "explore"
    tries: float = Field(
        default=0.02, gt=0.0, lt=0.5, description="probability that a decision is reversed in training, as a trial"
    )

    def build(self, width: int, names: Sequence[str]) -> "ExploreRouter":
        return ExploreRouter(self, width, names)


class ExploreRouter(SampledRouter, TemperedRouter):
    r"""The decisions of `sma`, some of which are reversed in training: $p = \mathrm{softmax}(u / \tau)$, active iff
    $p_1 > p_0$, in training with probability `tries` iff not. Confidence $c = p_1$.

    Two gradients train it. The gradient of the confidence also flows from the tokens that were activated on trial. It
    measures the value of results that the router had switched off, and exists even without other active tokens. With
    `sma.losses.policy_gradient_loss`, reversed decisions become more probable if their row had a lower loss than the
    other rows. This includes the value of a token to *other* tokens, which `bernoulli` measures by drawing every
    decision.

    Causal. Training and evaluation differ in the trials only, which change few tokens of a row; `p_on` is the
    probability of being active, `tries` or 1 - `tries` in training.

    Args:
        spec: the initial temperature, the probability and the seed of the trials.
        width: channels of the control state, D.
        names: the sub-modules, M of them.

    Shape:
        control `(B, L, D)`; rows 2m and 2m + 1 of `weight` `(2M, D)` are off and on of sub-module m.

    Reference:
        the trials are those of an epsilon-greedy policy; Sutton and Barto, "Reinforcement Learning", 2018, section 2.2.
    """

    def _decide(
        self, scores: Tensor, valid: Tensor | None, positions: Tensor | None, streams: State | None
    ) -> Decision:
        scores = scores.unflatten(-1, (len(self.names), 2))
        p = probability_on(scores, self.log_temperature.to(scores.dtype).exp())
        active, p_on = scores[..., 1] > scores[..., 0], p
        if self.training:
            spec: Any = self.spec
            tried = draw_for_tokens(p, positions, streams, self.draws, self.updates) < spec.tries
            # The value is the probability of the draw, the gradient that of p, for losses of the rate.
            p_on = torch.where(active, 1 - spec.tries, spec.tries) + (1 - 2 * spec.tries) * (p - p.detach())
            active = (active ^ tried) & p.isfinite()
        confidence = p.clamp(min=torch.finfo(p.dtype).tiny)
        return Decision(keep_valid(active, valid), confidence, scores, p_on, self.names)
