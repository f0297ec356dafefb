"""The study of routers: every router with every sub-module."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import AliasChoices, Field

from sma.errors import SpecError
from sma.layer import LayerSpec
from sma.recipes.experiment import ExperimentSpec
from sma.recipes.io.option_parser import Names
from sma.recipes.reports.results import Summary
from sma.recipes.reports.routers import router_table
from sma.recipes.reports.table import Table
from sma.recipes.studies.contract import Chosen, Study, StudyOptions, variants_field
from sma.recipes.studies.grid import Run
from sma.recipes.studies.variants import with_routers
from sma.recipes.tasks.contract import TaskData
from sma.routers import RouterSpec
from sma.spec import kinds

BUDGET = "+budget"
OPTIONS: dict[str, dict[str, Any]] = {
    "margin": {"gate": "margin"},
    "root_margin": {"gate": "root_margin"},
    "straight_through": {"gate": "straight_through"},
    "open": {"initial_bias": 4.0},
    "conv": {"control_conv": 4},
    "shared": {},
}
"""Settings of the router in the rows `sma-OPTION`; with `shared` all layers have one router."""

POLICY = "explore-policy"
"""The row of the router `explore` that is trained by the policy gradient too."""

ROUTERS = (
    "sma",
    *(kind + BUDGET for kind in ("sma", "threshold", "gumbel", "bernoulli", "explore", POLICY, "exclusive", "top_k")),
    *(f"sma-{option}{budget}" for option in OPTIONS for budget in ("", BUDGET)),
    *("expert_choice", "random", "always", "never"),
)
"""The rows: kind of the router, its option, and whether a budget steers its rate."""

MIXED = "mixed"
"""The column whose layers have all sub-modules."""

REPEATED = ("sma", "sma+budget", "always", "random")
"""The rows that are trained with several seeds in the first column."""

SEEDS = 3
"""Number of seeds of each of these rows."""


class TableOptions(StudyOptions):
    """The options of the table of routers."""

    task: Literal["listops", "pathfinder", "recall", "mqar"] = Field(default="listops", description="the task")
    preset: Literal["tiny", "binary"] = Field(
        default="tiny",
        description="tiny: on listops 108 runs of less than a minute on one core each, on other tasks minutes each; "
        "binary: ListOps of two arguments per operator, minutes each",
    )
    variants: Names | None = variants_field(ROUTERS)
    columns: Names | None = Field(
        default=None,
        validation_alias=AliasChoices("modules", "columns"),
        description=f"columns to train, such as gau,{MIXED}; default: each sub-module alone, and all in one layer",
    )
    seeds: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description=f"seeds of every router in every column; default: 1, and {SEEDS} of {', '.join(REPEATED)} in the "
        "first column",
    )
    jobs: int = Field(
        default=2, ge=1, description="number of concurrent runs, each in its own process; 1 trains in this process"
    )

    @property
    def name(self) -> str:
        name = f"{self.task}_{self.preset}"
        return "listops_router_table_tiny" if name == "listops_tiny" else name


class TableChosen(Chosen):
    """Settings of a table.

    Attributes:
        columns: the sub-modules, and `MIXED`.
    """

    columns: list[str] = Field(min_length=1)


class RouterTable(Study[TableOptions, TableChosen]):
    """Every router in every column."""

    name = "router_table"
    chosen = TableChosen
    older = "chosen.json"
    selections: ClassVar[Mapping[str, str]] = {"variants": "router", "columns": "column"}

    def experiment(self, options: TableOptions) -> ExperimentSpec:
        spec = super().experiment(options)
        if not columns(spec):
            raise SpecError(
                "the table needs an experiment whose layers have sub-modules; set model.layers.layer.modules"
            )
        return spec

    def names(self, spec: ExperimentSpec) -> dict[str, Sequence[str]]:
        return {"variants": rows(spec), "columns": columns(spec)}

    def upgrade(self, older: Any) -> dict[str, Any]:
        return {"variants": older["routers"], "columns": older["modules"], "seeds": None}

    def check(self, spec: ExperimentSpec, chosen: TableChosen) -> None:
        grid(spec, chosen.seeds)

    def runs(
        self, spec: ExperimentSpec, chosen: TableChosen, data: TaskData, out: Path, accelerator: str = "auto"
    ) -> list[Run]:
        return grid(spec, chosen.seeds)

    def selects(self, run: Run, chosen: TableChosen) -> bool:
        return super().selects(run, chosen) and run.column in chosen.columns

    def table(self, summary: Summary) -> Table:
        return router_table(summary)


def columns(spec: ExperimentSpec) -> list[str]:
    """The columns: each sub-module of the model alone, and all of them in one layer."""
    names = list(dict.fromkeys(name for layer in spec.model.layer_specs for name in layer.modules))
    return [*names, MIXED] if len(names) > 1 else names


def rows(spec: ExperimentSpec) -> list[str]:
    """The routers of the table: all of them; in a language model only causal ones."""
    return [row for row in ROUTERS if not (spec.model.scores_positions and row == "expert_choice")]


def grid(spec: ExperimentSpec, seeds: int | None = None) -> list[Run]:
    """All runs of the table.

    Args:
        spec: see `router_experiment`.
        seeds: number of seeds of every router in every column; None: 1, and `SEEDS` for the `REPEATED` routers in the
            first column.

    Raises:
        SpecError: the table cannot be derived from the experiment.
    """
    known = columns(spec)
    cells = [(column, router, 0) for column in known for router in rows(spec)]
    if seeds is None:
        cells += [(known[0], router, more) for more in range(1, SEEDS) for router in REPEATED]
    else:
        cells += [(column, router, more) for more in range(1, seeds) for column, router, _ in cells]
    return [
        Run(
            f"{column}/{router}-{spec.seed + more}",
            router,
            spec.seed + more,
            router_experiment(spec, column, router, spec.seed + more),
            column=column,
        )
        for column, router, more in cells
    ]


def router_experiment(spec: ExperimentSpec, column: str, router: str, seed: int) -> ExperimentSpec:
    """The experiment of a run: the table's, with the sub-modules of the column, the routers of the row, and the seed.

    The rate of `expert_choice` and `random` is the target of the budget.

    Args:
        spec: an experiment whose layers have all sub-modules, with a budget that has one target. The routers of the row
            replace its routers, and keep the settings of fields that both kinds have.
        column: the sub-module that is routed, or `MIXED`.
        router: one of `ROUTERS`.
        seed: seed of the run.

    Raises:
        SpecError: the experiment has no such budget.
    """
    budget = spec.training.budget
    if budget is None or not isinstance(budget.target, float):
        raise SpecError("the table needs one target rate for all its rows; set training.budget.target to a number")
    layers = tuple(_with_modules(layer, column) for layer in spec.model.layer_specs)
    steered = router.endswith(BUDGET)
    kind, _, option = router.removesuffix(BUDGET).partition("-")
    spec = spec.replace(
        model=spec.model.replace(layers=layers),
        training=spec.training.replace(budget=budget if steered else None),
        seed=seed,
    )
    own = [layer.router for layer in layers if layer.modules]
    seeds = [(seed * len(own) + index) % 2**31 for index in range(len(own))]
    taught = spec.training.losses.policy
    made = [
        _router(kind, option, each, budget.target, spec.training.updates, draws)
        for each, draws in zip(own, seeds, strict=True)
    ]
    spec = with_routers(spec, made)
    training = spec.training
    if option == "shared":
        spec = spec.replace(model=spec.model.replace(shared_router=True))
    if option == "policy" or any(router.needs_policy_gradient for router in made):
        # A policy gradient is noisy, so the routers have a lower learning rate.
        slow = training.router_learning_rate or 0.1 * training.learning_rate
        losses = training.losses.replace(policy=taught or 1.0)
        training = training.replace(router_learning_rate=slow, losses=losses)
    elif taught:  # the settings of the preset are for a policy gradient
        training = training.replace(router_learning_rate=None, losses=training.losses.replace(policy=0.0))
    return spec.replace(training=training)


def _with_modules(layer: LayerSpec, column: str) -> LayerSpec:
    return layer.replace(modules={name: part for name, part in layer.modules.items() if column in (name, MIXED)})


def _router(kind: str, option: str, own: RouterSpec, rate: float, updates: int, seed: int) -> RouterSpec:
    """The spec of a registered router that replaces another; it keeps the settings of the fields that both have."""
    # One skip beside the sub-modules, so that a router that always takes the best choice can run none of them.
    given = {"kind": kind, "rate": rate, "share": rate, "anneal": updates, "seed": seed, "skips": 1}
    values = {**dict(own), **given, **OPTIONS.get(option, {})}
    made = kinds("router")[kind]
    return cast(RouterSpec, made.model_validate({name: values[name] for name in made.model_fields if name in values}))
