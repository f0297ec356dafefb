"""Variants of one experiment that differ only in their routers."""

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
    """An experiment whose layers have the activation rates of another variant.

    Attributes:
        variant: name of the other variant.
        make: function that makes the experiment from the activation rate of every routed layer of the other variant.
    """

    variant: str
    make: Callable[[Sequence[float]], ExperimentSpec]


Variant = ExperimentSpec | AtRatesOf


class VariantsOptions(StudyOptions):
    """The options of the recipes that compare variants."""

    preset: Literal["tiny"] = Field(default="tiny", description="tiny: all variants in some minutes on one core")


class VariantsStudy(Study[Options, Chosen]):
    """Variants of one experiment: width, depth, updates, learning rate, data and seeds are the same.

    Attributes:
        known: names of the variants, in the order of training.
        draws_runs: whether every run draws its own figures.
    """

    chosen = Chosen
    older = "arms.json"
    figures: ClassVar[Sequence[str]] = (FIGURE,)
    known: ClassVar[tuple[str, ...]]
    draws_runs: ClassVar[bool] = True

    @abstractmethod
    def variants(self, spec: ExperimentSpec) -> dict[str, Variant]:
        """The variants of an experiment by name; variants whose rates others need are first."""

    @abstractmethod
    def subject(self, spec: ExperimentSpec) -> str:
        """The subject of the comparison, for titles."""

    def names(self, spec: ExperimentSpec) -> dict[str, Sequence[str]]:
        return {"variants": self.known}

    def upgrade(self, older: Any) -> dict[str, Any]:
        return {"variants": older, "seeds": 1}

    def runs(
        self, spec: ExperimentSpec, chosen: Chosen, data: TaskData, out: Path, accelerator: str = "auto"
    ) -> list[Run]:
        runs = []
        for seed in range(spec.seed, spec.seed + (chosen.seeds or 1)):
            # The folder of the first seed has no number, as with a single seed.
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
    """Return the same experiment with random tokens in every layer, at the rates of another variant."""
    return AtRatesOf(
        variant, lambda rates: with_routers(spec, [RandomRouterSpec(rate=rate, seed=spec.seed) for rate in rates])
    )


def with_routers(spec: ExperimentSpec, routers: RouterSpec | Sequence[RouterSpec]) -> ExperimentSpec:
    """Return the same experiment with other routers, and with the applicable budget and losses of decisions.

    If no router learns a rate, the budget and these losses are removed. If no router is stochastic, the policy gradient
    is removed. Routers that learn only from a policy gradient get one with weight 1 if there is none. Layers that
    shared a router do so only if they get the same one.

    Args:
        spec: the experiment.
        routers: one router for all routed layers, or one per routed layer.

    Raises:
        SpecError: the number of routers differs from that of the routed layers.
    """
    routed = [index for index, layer in enumerate(spec.model.layer_specs) if layer.modules]
    each = [routers] * len(routed) if isinstance(routers, RouterSpec) else list(routers)
    if len(each) != len(routed):
        raise SpecError(
            f"there are {len(each)} routers for {len(routed)} routed layers; give one for each of them, or one for all"
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
    shared = spec.model.shared_router and all(router == each[0] for router in each)
    model = spec.model.replace(layers=tuple(layers), shared_router=shared)
    return spec.replace(model=model, training=training)
