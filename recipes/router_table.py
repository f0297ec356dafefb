"""Every router with every sub-module, at equal updates, and the most important ones with three seeds: one table.

python recipes/router_table.py --out runs/routers
python recipes/router_table.py --only sma,always --modules gau,conv
python recipes/router_table.py --resume runs/routers
"""

import csv
import io
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.errors import CheckpointError, SmaError, SpecError, did_you_mean
from sma.recipes.arms import with_routers
from sma.recipes.command import RunOptions, exit_code, experiment, parse
from sma.recipes.experiment import EXPERIMENT, SUMMARY, ExperimentSpec, load_experiment, write_text
from sma.recipes.tasks import TaskData
from sma.routers import (
    AlwaysRouterSpec,
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
from sma.spec import dump_yaml
from sma.stats import operation_count

BUDGET = "+budget"
ROUTERS = (
    "sma",
    *(kind + BUDGET for kind in ("sma", "threshold", "gumbel", "exclusive", "top_k")),
    *("expert_choice", "random", "always", "never"),
)
"""The rows: the kind of the router, and whether a budget steers its rate."""

MIXED = "mixed"
"""The column of the layers that have all sub-modules."""

REPEATED = ("sma", "sma+budget", "always", "random")
"""The rows that are trained with further seeds, in the first column."""

SEEDS = 3
CHOSEN, ERROR, LOG = "grid.json", "error.txt", "log.txt"


class Options(RunOptions):
    """Train every router with every sub-module, and write the table of accuracy, rates, operations and speed."""

    model_config = SettingsConfigDict(cli_prog_name="router_table")

    preset: Literal["tiny"] = Field(default="tiny", description="48 runs of less than a minute on one core each")
    only: str | None = Field(default=None, description=f"routers to train, with commas between; default {','.join(ROUTERS)}")
    modules: str | None = Field(default=None, description=f"columns to train, such as gau,{MIXED}; default every sub-module, and all in one")
    jobs: int = Field(default=2, ge=1, description="runs side by side, each in a process of its own; 1 trains in this one")

    @property
    def name(self) -> str:
        return f"listops_router_table_{self.preset}"


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
    """All runs of the table: every router in every column once, then the `REPEATED` ones with two more seeds in the first column."""
    known = columns(spec)
    cells = [Cell(column, router, spec.seed) for column in known for router in ROUTERS]
    return cells + [Cell(known[0], router, spec.seed + more) for more in range(1, SEEDS) for router in REPEATED if known]


def cell_experiment(spec: ExperimentSpec, cell: Cell) -> ExperimentSpec:
    """The experiment of a run: that of the table with the column's sub-modules, the row's routers, and the seed.

    `expert_choice` and `random` run as often as the budget says. The routers of all layers that draw have different seeds: with the
    same one, the same tokens would run everywhere.

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
        model=spec.model.replace(layers=layers), training=spec.training.replace(budget=budget if steered else None), seed=cell.seed
    )
    own = [layer.router for layer in layers if layer.modules]
    seeds = range(cell.seed * len(own), (cell.seed + 1) * len(own))
    return with_routers(
        spec, [_router(kind, router, budget.target, spec.training.updates, seed) for router, seed in zip(own, seeds, strict=True)]
    )


def _with_modules(layer: Any, column: str) -> Any:
    return layer.replace(modules={name: part for name, part in layer.modules.items() if column in (name, MIXED)})


def _router(kind: str, own: RouterSpec, rate: float, updates: int, seed: int) -> RouterSpec:
    if not isinstance(own, SMARouterSpec):
        raise SpecError(f"the table is made of an experiment whose routers are of the kind 'sma', not {own.kind!r}; the rows replace them")
    scale = own.temperature_scale
    made: dict[str, Callable[[], RouterSpec]] = {
        "sma": lambda: own,
        "threshold": ThresholdRouterSpec,
        "gumbel": lambda: GumbelRouterSpec(anneal=updates, seed=seed),
        "exclusive": lambda: ExclusiveRouterSpec(temperature_scale=scale),
        "top_k": lambda: TopKRouterSpec(k=1, skips=1, temperature_scale=scale),
        "expert_choice": lambda: ExpertChoiceRouterSpec(share=rate),
        "random": lambda: RandomRouterSpec(rate=rate, seed=seed),
        "always": AlwaysRouterSpec,
        "never": NeverRouterSpec,
    }
    return made[kind]()
