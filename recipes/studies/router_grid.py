"""The grid of the table of routers: which experiments it consists of."""

from collections.abc import Callable
from typing import NamedTuple

from sma.errors import SpecError
from sma.layer import LayerSpec
from sma.recipes.experiment import ExperimentSpec
from sma.recipes.studies.variants import with_routers
from sma.routers import (
    AlwaysRouterSpec,
    BernoulliRouterSpec,
    ExclusiveRouterSpec,
    ExpertChoiceRouterSpec,
    GumbelRouterSpec,
    NeverRouterSpec,
    RandomRouterSpec,
    RouterSpec,
    SMARouterSpec,
    ThresholdRouterSpec,
    TopKRouterSpec,
)

BUDGET = "+budget"
ROUTERS = (
    "sma",
    *(kind + BUDGET for kind in ("sma", "threshold", "gumbel", "bernoulli", "exclusive", "top_k")),
    *("expert_choice", "random", "always", "never"),
)
"""The rows: the kind of the router, and whether a budget steers its rate."""

MIXED = "mixed"
"""The column of the layers that have all sub-modules."""

REPEATED = ("sma", "sma+budget", "always", "random")
"""The rows that are trained with further seeds, in the first column."""

SEEDS = 3
"""Seeds of each of them."""


class Cell(NamedTuple):
    """One run of the table.

    Attributes:
        column: the sub-module that is routed, or `MIXED`.
        router: one of `ROUTERS`.
    """

    column: str
    router: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder below that of the table."""
        return f"{self.column}/{self.router}-{self.seed}"


def columns(spec: ExperimentSpec) -> list[str]:
    """Every sub-module of the model by itself, and all of them in one layer."""
    names = list(dict.fromkeys(name for layer in spec.model.layer_specs for name in layer.modules))
    return [*names, MIXED] if len(names) > 1 else names


def grid(spec: ExperimentSpec) -> list[Cell]:
    """All runs of the table: every router in every column once, then the `REPEATED` ones with two more seeds in the
    first column.
    """
    known = columns(spec)
    cells = [Cell(column, router, spec.seed) for column in known for router in ROUTERS]
    return cells + [
        Cell(known[0], router, spec.seed + more) for more in range(1, SEEDS) for router in REPEATED if known
    ]


def cell_experiment(spec: ExperimentSpec, cell: Cell) -> ExperimentSpec:
    """The experiment of a run: that of the table with the column's sub-modules, the row's routers, and the seed.

    `expert_choice` and `random` run as often as the budget says.

    Args:
        spec: has all sub-modules in its layers, `sma` routers, and a budget with one target.
        cell: which run.

    Raises:
        SpecError: the experiment has other routers, or no such budget.
    """
    budget = spec.training.budget
    if budget is None or not isinstance(budget.target, float):
        raise SpecError("the table needs one rate for all rows that keep one; set training.budget.target to a number")
    layers = tuple(_with_modules(layer, cell.column) for layer in spec.model.layer_specs)
    kind, steered = cell.router.removesuffix(BUDGET), cell.router.endswith(BUDGET)
    spec = spec.replace(
        model=spec.model.replace(layers=layers),
        training=spec.training.replace(budget=budget if steered else None),
        seed=cell.seed,
    )
    own = [layer.router for layer in layers if layer.modules]
    seeds = [(cell.seed * len(own) + place) % 2**31 for place in range(len(own))]
    made = [
        _router(kind, router, budget.target, spec.training.updates, seed)
        for router, seed in zip(own, seeds, strict=True)
    ]
    if any(router.needs_policy_gradient for router in made):  # which is noisy, so they learn slowly
        training = spec.training
        slow = training.router_learning_rate or 0.1 * training.learning_rate
        spec = spec.replace(training=training.replace(router_learning_rate=slow))
    return with_routers(spec, made)


def _with_modules(layer: LayerSpec, column: str) -> LayerSpec:
    return layer.replace(modules={name: part for name, part in layer.modules.items() if column in (name, MIXED)})


def _router(kind: str, own: RouterSpec, rate: float, updates: int, seed: int) -> RouterSpec:
    if not isinstance(own, SMARouterSpec):
        raise SpecError(
            f"the table is made of an experiment whose routers are of the kind 'sma', not {own.kind!r}; "
            "the rows replace them"
        )
    scale = own.temperature_scale
    made: dict[str, Callable[[], RouterSpec]] = {
        "sma": lambda: own,
        "threshold": ThresholdRouterSpec,
        "gumbel": lambda: GumbelRouterSpec(anneal=updates, seed=seed),
        "bernoulli": lambda: BernoulliRouterSpec(seed=seed),
        "exclusive": lambda: ExclusiveRouterSpec(temperature_scale=scale),
        "top_k": lambda: TopKRouterSpec(k=1, skips=1, temperature_scale=scale),
        "expert_choice": lambda: ExpertChoiceRouterSpec(share=rate),
        "random": lambda: RandomRouterSpec(rate=rate, seed=seed),
        "always": AlwaysRouterSpec,
        "never": NeverRouterSpec,
    }
    return made[kind]()
