"""Routers that sample in training: every token is tried now and then, and what it was worth is learned."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sma.decision import Decision
from sma.routers.contract import RouterSpec, keep_valid
from sma.routers.draws import DrawingRouter, draw_for_tokens
from sma.routers.scored import ScoredRouter
from sma.spec import register
from sma.submodule import State


class SampledSpec(RouterSpec):
    """What the specs of routers that sample have in common."""

    stochastic: ClassVar[bool] = True
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of the draws")

    def num_parameters(self, width: int, modules: int) -> int:
        return 2 * modules * (width + 1)

    def macs_per_token(self, width: int, modules: int) -> int:
        return 2 * modules * width


class SampledRouter(DrawingRouter, ScoredRouter):
    r"""In training two Gumbel draws are added to the scores off and on: $v = W h + b + g$; active iff $v_1 > v_0$,
    which happens with probability $\sigma(u_1 - u_0)$. In evaluation nothing is drawn.

    The draws depend on the seed, the number of updates, the row, the position and the sub-module alone, so that chunks
    agree with the whole. The recipes tell the router the number of updates; a training loop of your own calls
    `set_step`, or the noise stays the same. Ranks of a distributed training number the rows of their own parts, so rows
    at the same place of two parts meet the same draws: a rank is no key, because ranks that share a row (tensor or
    context parallelism) must draw alike for it.
    """

    stochastic = True
    updates: Tensor

    def __init__(self, spec: SampledSpec, width: int, names: Sequence[str]) -> None:
        super().__init__(spec, width, names, 2 * len(names))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def set_step(self, updates: int) -> None:
        self.updates.fill_(updates)

    def _decide(
        self, scores: Tensor, valid: Tensor | None, positions: Tensor | None, streams: State | None
    ) -> Decision:
        noise = self._noise(scores, positions, streams) if self.training else torch.zeros_like(scores)
        return self._sample(scores.unflatten(-1, (-1, 2)), noise.unflatten(-1, (-1, 2)), valid)

    def _noise(self, scores: Tensor, positions: Tensor | None, streams: State | None) -> Tensor:
        # A draw is never 1, and one of 0, whose logarithm is infinite, moves by half a step of their grid.
        draw = draw_for_tokens(scores, positions, streams, self.draws, self.updates).clamp(min=2.0**-54)
        return (-(-draw.log()).log()).to(scores.dtype)

    def _sample(self, scores: Tensor, noise: Tensor, valid: Tensor | None) -> Decision:
        """Decide by scores and noise, `(B, L, M, 2)`."""
        raise TypeError(f"{type(self).__name__} must define _sample(self, scores, noise, valid)")

    def _spread(self, score_bias: Tensor) -> Tensor:
        return torch.nn.functional.pad(score_bias[:, None], (1, 0)).reshape(-1)


def p_of(scores: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """The softmax of scores `(…, 2)` for on, as the sigmoid of their difference: finite whatever the scores are."""
    return torch.sigmoid((scores[..., 1] - scores[..., 0]) / temperature)


@register
class GumbelRouterSpec(SampledSpec):
    """Spec of `GumbelRouter`."""

    kind: Literal["gumbel"] = "gumbel"
    temperature: float = Field(default=1.0, ge=1e-4, le=1e4, description="of the relaxation, at the first update")
    final_temperature: float = Field(
        default=0.3, ge=1e-4, le=1e4, description="of the relaxation, from update `anneal` on"
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
    r"""Samples in training, and learns through the relaxed sample: straight-through Gumbel-softmax.

    Samples as every `SampledRouter`. The confidence is exactly 1; its gradient is that of
    $\mathrm{softmax}(v / \tau)_1$, $\tau$ falling from `temperature` to `final_temperature`.

    Causal. Tokens that were not sampled carry no gradient, but every token is sampled now and then, so that a rare
    sub-module is tried again. Use it where `sma` settles too early. The logits are those without noise, so a budget
    holds the rate of the evaluation; in training it is the mean of `p_on`.

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
        relaxed = p_of(noisy, self._temperature.to(scores.dtype))
        confidence = 1 + (relaxed - relaxed.detach())
        active = keep_valid(noisy[..., 1] > noisy[..., 0], valid)
        return Decision(active, confidence, scores, p_of(scores), self.names)

    @property
    def _temperature(self) -> Tensor:
        spec: Any = self.spec
        done = (self.updates.double() / spec.anneal).clamp(max=1.0) if spec.anneal else self.updates.double().fill_(1.0)
        return spec.temperature * (spec.final_temperature / spec.temperature) ** done


@register
class BernoulliRouterSpec(SampledSpec):
    """Spec of `BernoulliRouter`."""

    kind: Literal["bernoulli"] = "bernoulli"
    needs_policy_gradient: ClassVar[bool] = True

    def build(self, width: int, names: Sequence[str]) -> "BernoulliRouter":
        return BernoulliRouter(self, width, names)


class BernoulliRouter(SampledRouter):
    r"""Samples in training, and learns from what the samples led to: a stochastic policy.

    Samples as every `SampledRouter`: $a \sim \mathrm{Bernoulli}(\sigma(u_1 - u_0))$. The confidence is exactly 1 and
    its gradient 0: the router is trained by `sma.losses.policy_gradient_loss` alone, which asks whether rows in which a
    token was active came to a smaller loss than rows in which it was not.

    Causal. Use it where a token is worth something to *others*, as a key and value that they attend to, say. The
    gradient through a confidence does not see that: it scales the token's own result. Nor would one that scales the
    token's keys and values, for it tells what a little less of the token does, and not what its absence does. The score
    function is unbiased for both, and its variance is the price: it needs many rows, and `reward to go` where the
    answers stand at positions.

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
        p_on = p_of(scores)
        confidence = 1 + 0 * p_on  # zero gradients and never None, whatever losses there are
        return Decision(keep_valid(noisy[..., 1] > noisy[..., 0], valid), confidence, scores, p_on, self.names)
