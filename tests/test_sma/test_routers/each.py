"""One router of every kind, and several of the kinds whose settings matter."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sma.decision import Decision
from sma.routers import (
    AlwaysRouterSpec,
    BernoulliRouterSpec,
    ExclusiveRouterSpec,
    ExpertChoiceRouterSpec,
    ExploreRouterSpec,
    GumbelRouterSpec,
    LinearRouter,
    NeverRouterSpec,
    RandomRouterSpec,
    Router,
    RouterSpec,
    SMARouterSpec,
    SteerableRouter,
    ThresholdRouterSpec,
    TopKRouterSpec,
)
from tests.cases import generator, spread

NAMES = ("attention", "mlp", "conv")
FIELDS = ("active", "confidence", "logits", "p_on")
SPECS: dict[str, RouterSpec] = {
    "sma": SMARouterSpec(temperature_scale=0.3),
    "threshold": ThresholdRouterSpec(),
    "low_threshold": ThresholdRouterSpec(threshold=0.2),
    "gumbel": GumbelRouterSpec(temperature=2.0, final_temperature=0.5, anneal=10, seed=3),
    "bernoulli": BernoulliRouterSpec(seed=4),
    "explore": ExploreRouterSpec(temperature_scale=0.3, tries=0.2, seed=5),
    "exclusive": ExclusiveRouterSpec(temperature_scale=0.3),
    "top_k": TopKRouterSpec(k=2, temperature_scale=0.3),
    "top_k_of_skips": TopKRouterSpec(k=2, skips=2),
    "top_k_of_all": TopKRouterSpec(k=4, skips=1),
    "expert_choice": ExpertChoiceRouterSpec(share=0.3),
    "always": AlwaysRouterSpec(),
    "never": NeverRouterSpec(),
    "random": RandomRouterSpec(rate=0.6),
}

# For each steerable kind, the row of the weights that gives the score of sub-module m for on.
ON_ROW: dict[str, Callable[[int], int]] = {
    "sma": lambda m: 2 * m + 1,
    "gumbel": lambda m: 2 * m + 1,
    "bernoulli": lambda m: 2 * m + 1,
    "explore": lambda m: 2 * m + 1,
    "threshold": lambda m: m,
    "exclusive": lambda m: m + 1,
    "top_k": lambda m: m,
}


def routers(wanted: Callable[[RouterSpec], bool] = lambda spec: True) -> pytest.MarkDecorator:
    """Parametrise a test over all specs, or over some."""
    return pytest.mark.parametrize(
        "spec", [pytest.param(spec, id=name) for name, spec in SPECS.items() if wanted(spec)]
    )


def is_learned(spec: RouterSpec) -> bool:
    """Whether it has weights."""
    return spec.kind not in ("always", "never", "random")


def draws(spec: RouterSpec) -> bool:
    """Whether it samples in training."""
    return spec.stochastic


def is_steerable(spec: RouterSpec) -> bool:
    """Whether a budget can move its rates."""
    return not spec.fixed_rate


def is_causal(spec: RouterSpec) -> bool:
    """Whether it can be streamed."""
    return spec.kind != "expert_choice"


def looks_at_the_score(spec: RouterSpec) -> bool:
    """Whether a separate score switches each sub-module, in training as in evaluation."""
    return spec.kind in ("sma", "threshold")


def router(spec: RouterSpec, width: int = 5, names: Sequence[str] = NAMES, *, seed: int = 3) -> Router:
    """A router in float64 with random parameters and score biases, in training mode, in which some kinds sample."""
    built = spec.build(width, names).double()
    spread(built, seed=seed)
    if isinstance(built, SteerableRouter):
        built.score_bias.copy_(0.5 * torch.randn(len(names), generator=generator(seed), dtype=torch.float64))
    return built


def scored(spec: RouterSpec, width: int = 5, names: Sequence[str] = NAMES) -> LinearRouter:
    """The same as `router`, for kinds with weights."""
    built = router(spec, width, names)
    assert isinstance(built, LinearRouter)
    return built


def token_with_scores(part: LinearRouter, scores: Sequence[float]) -> Tensor:
    """A control state `(1, 1, D)` to which a router gives these scores without score biases.

    The router must have fewer choices than channels.
    """
    wanted = torch.tensor(scores, dtype=torch.float64) - part.bias.detach()
    token = torch.linalg.pinv(part.weight.detach()) @ wanted
    torch.testing.assert_close(part.weight.detach() @ token, wanted)
    return token[None, None]


def clear_score_bias(part: Router) -> None:
    """Set all score biases to 0."""
    if isinstance(part, SteerableRouter):
        part.score_bias.zero_()


def same(found: Decision, wanted: Decision, at: Tensor | None = None) -> None:
    """Assert that two decisions are bit-equal, at some positions or at all."""
    for name in FIELDS:
        one, other = getattr(found, name), getattr(wanted, name)
        assert torch.equal(one if at is None else one[at], other if at is None else other[at]), name
