"""Variants of one experiment that differ in their routers alone, trained side by side."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from sma.errors import SpecError
from sma.recipes.experiment import ExperimentSpec, RoutingLosses
from sma.recipes.reports.figures import attempt
from sma.recipes.reports.results import Row, Summary, layer_rates
from sma.recipes.reports.table import Table
from sma.recipes.reports.variants import FIGURE, draw_variants, variants_table
from sma.recipes.studies.contract import Begun, Chosen, Options, Study, StudyOptions
from sma.recipes.studies.grid import Run
from sma.recipes.tasks.contract import TaskData
from sma.routers import RandomRouterSpec, RouterSpec


class AtRatesOf(NamedTuple):
    """An experiment whose layers run as often as those of another variant.

    Attributes:
        variant: the other one.
        make: makes the experiment from the activation rate of every routed layer there.
    """

    variant: str
    make: Callable[[Sequence[float]], ExperimentSpec]


Variant = ExperimentSpec | AtRatesOf


class VariantsOptions(StudyOptions):
    """The options of the recipes that compare variants."""

    preset: Literal["tiny"] = Field(default="tiny", description="all variants in some minutes on one core")


class VariantsStudy(Study[Options, Chosen]):
    """Variants of one experiment: width, depth, updates, learning rate, data and seeds are the same.

    Attributes:
        known: names of the variants, in the order of training.
        draws_runs: whether every run draws figures of its own.
    """

    chosen = Chosen
    older = "arms.json"
    figures: ClassVar[Sequence[str]] = (FIGURE,)
    known: ClassVar[tuple[str, ...]]
    draws_runs: ClassVar[bool] = True

    @abstractmethod
    def variants(self, spec: ExperimentSpec) -> dict[str, Variant]:
        """The variants of an experiment by name; those whose rates others need come first."""

    @abstractmethod
    def subject(self, spec: ExperimentSpec) -> str:
        """What is compared, for titles."""

    def names(self, spec: ExperimentSpec) -> dict[str, Sequence[str]]:
        return {"variants": self.known}

    def upgrade(self, older: Any) -> dict[str, Any]:
        return {"variants": older, "seeds": 1}

    def runs(self, spec: ExperimentSpec, chosen: Chosen, data: TaskData, out: Path) -> list[Run]:
        runs = []
        for seed in range(spec.seed, spec.seed + (chosen.seeds or 1)):
            # The first seed has no number in its folder, as when there was only one.
            folders = {name: name if seed == spec.seed else f"{name}-{seed}" for name in self.known}
            for name, variant in self.variants(spec.replace(seed=seed)).items():
                title = f"{self.subject(spec)}, {name}" if self.draws_runs else None
                if isinstance(variant, ExperimentSpec):
                    runs.append(Run(folders[name], name, seed, variant, title=title))
                else:
                    needed = folders[variant.variant]
                    made = _at_rates(variant, needed)
                    runs.append(Run(folders[name], name, seed, made, needs=(needed,), title=title))
        return runs

    def conclude(self, summary: Summary, begun: Begun[Chosen], data: TaskData) -> dict[str, Any]:
        seeds = ", ".join(map(str, dict.fromkeys(row["seed"] for row in summary["rows"])))
        title = f"{self.subject(begun.spec)}, seed {seeds}"
        attempt(f"the figure of the study in {begun.out}", lambda: draw_variants(summary, begun.out, title))
        return {}

    def table(self, summary: Summary) -> Table:
        return variants_table(summary)


def _at_rates(variant: AtRatesOf, needed: str) -> Callable[[Mapping[str, Row]], ExperimentSpec]:
    return lambda rows: variant.make(layer_rates(rows[needed]["rates"]))


def at_random(spec: ExperimentSpec, variant: str) -> AtRatesOf:
    """Return the same experiment with every layer run on tokens drawn at random, as often as in another variant."""
    return AtRatesOf(
        variant, lambda rates: with_routers(spec, [RandomRouterSpec(rate=rate, seed=spec.seed) for rate in rates])
    )


def with_routers(spec: ExperimentSpec, routers: RouterSpec | Sequence[RouterSpec]) -> ExperimentSpec:
    """Return the same experiment with other routers, and with the budget and the losses of decisions that they can
    learn from.

    Where none of them learns a rate there is no budget and no such loss; where none samples, no policy gradient; and
    routers that learn from it alone get one of the weight 1 if there is none.

    Args:
        spec: the experiment.
        routers: one for all layers that route, or one for each of them.

    Raises:
        SpecError: the number of routers is not that of the layers that route.
    """
    routed = [index for index, layer in enumerate(spec.model.layer_specs) if layer.modules]
    each = [routers] * len(routed) if isinstance(routers, RouterSpec) else list(routers)
    if len(each) != len(routed):
        raise SpecError(
            f"there are {len(each)} routers for {len(routed)} layers that route; "
            "give one for each of them, or one for all"
        )
    layers = list(spec.model.layer_specs)
    for index, router in zip(routed, each, strict=True):
        layers[index] = layers[index].replace(router=router)
    training = spec.training
    if all(router.fixed_rate for router in each):
        training = training.replace(budget=None, losses=RoutingLosses())
    elif not any(router.stochastic for router in each):
        training = training.replace(losses=training.losses.replace(policy=0.0))
    elif not training.losses.policy and any(router.needs_policy_gradient for router in each):
        training = training.replace(losses=training.losses.replace(policy=1.0))
    return spec.replace(model=spec.model.replace(layers=tuple(layers)), training=training)
