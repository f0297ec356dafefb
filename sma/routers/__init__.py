"""Routers: which tokens run which sub-modules."""

from sma.routers.competing import (
    ExclusiveRouter,
    ExclusiveRouterSpec,
    ExpertChoiceRouter,
    ExpertChoiceRouterSpec,
    TopKRouter,
    TopKRouterSpec,
)
from sma.routers.contract import Router, RouterSpec
from sma.routers.draws import RandomState, keyed_uniform
from sma.routers.fixed import (
    AlwaysRouter,
    AlwaysRouterSpec,
    NeverRouter,
    NeverRouterSpec,
    RandomRouter,
    RandomRouterSpec,
)
from sma.routers.independent import SMARouter, SMARouterSpec, ThresholdRouter, ThresholdRouterSpec
from sma.routers.sampled import (
    BernoulliRouter,
    BernoulliRouterSpec,
    ExploreRouter,
    ExploreRouterSpec,
    GumbelRouter,
    GumbelRouterSpec,
)
from sma.routers.scored import LinearRouter, ScoredRouter
from sma.routers.steerable import SteerableRouter

__all__ = [
    "AlwaysRouter",
    "AlwaysRouterSpec",
    "BernoulliRouter",
    "BernoulliRouterSpec",
    "ExclusiveRouter",
    "ExclusiveRouterSpec",
    "ExpertChoiceRouter",
    "ExpertChoiceRouterSpec",
    "ExploreRouter",
    "ExploreRouterSpec",
    "GumbelRouter",
    "GumbelRouterSpec",
    "LinearRouter",
    "NeverRouter",
    "NeverRouterSpec",
    "RandomRouter",
    "RandomRouterSpec",
    "RandomState",
    "Router",
    "RouterSpec",
    "SMARouter",
    "SMARouterSpec",
    "ScoredRouter",
    "SteerableRouter",
    "ThresholdRouter",
    "ThresholdRouterSpec",
    "TopKRouter",
    "TopKRouterSpec",
    "keyed_uniform",
]
