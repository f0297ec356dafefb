"""Associative recall in noise: five models that differ only in their routers."""

from collections.abc import Sequence
from typing import Any, ClassVar

from sma.checkpoint import load
from sma.errors import SpecError
from sma.recipes.experiment import ExperimentSpec, RoutingLosses
from sma.recipes.io.option_parser import Names
from sma.recipes.reports.classification import measure_activation
from sma.recipes.reports.figures import attempt
from sma.recipes.reports.recall import FIGURE, draw_recall, first_seed
from sma.recipes.reports.results import Summary
from sma.recipes.reports.variants import FIGURE as COMPARISON
from sma.recipes.studies.contract import Begun, Chosen, variants_field
from sma.recipes.studies.rates import rate_sweep
from sma.recipes.studies.variants import Variant, VariantsOptions, VariantsStudy, at_random, with_routers
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.routers import AlwaysRouterSpec, NeverRouterSpec, SMARouterSpec

VARIANTS = ("seqboat", "sma", "always", "never", "random")
RATES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.8)
"""The activation rates of the rate sweep."""


class RecallOptions(VariantsOptions):
    """The options of the recipe."""

    variants: Names | None = variants_field(VARIANTS)

    @property
    def name(self) -> str:
        return f"recall_{self.preset}"


class Recall(VariantsStudy[RecallOptions]):
    """`seqboat` (sampled decisions under a budget), `sma` (the paper's router without a budget), `always`, `never`, and
    `random` at the rates of seqboat; then the trained seqboat at other rates without further training.
    """

    name = "recall"
    known = VARIANTS
    figures: ClassVar[Sequence[str]] = (COMPARISON, FIGURE)
    draws_runs = False  # the figures of a run show one answer per sample, and a sample of this task has several

    def check(self, spec: ExperimentSpec, chosen: Chosen) -> None:
        if not isinstance(spec.task, ClassificationTask):
            raise SpecError(
                f"the metric of the task {spec.task.kind!r} is {spec.task.metric.name!r}, and the study of recall "
                "compares accuracies; use a classification task"
            )

    def subject(self, spec: ExperimentSpec) -> str:
        return "Associative recall"

    def variants(self, spec: ExperimentSpec) -> dict[str, Variant]:
        random = at_random(spec, "seqboat")
        return {
            "seqboat": spec,
            "sma": _free(with_routers(spec, SMARouterSpec(temperature_scale=0.3))),
            "always": _free(with_routers(spec, AlwaysRouterSpec())),
            "never": _free(with_routers(spec, NeverRouterSpec())),
            "random": random._replace(make=lambda rates: _free(random.make(rates))),
        }

    def conclude(self, summary: Summary, begun: Begun[Chosen], data: TaskData) -> dict[str, Any]:
        found = super().conclude(summary, begun, data)
        rows = first_seed(summary["rows"])
        # Read from the folder, so that a resumed study has the same results.
        models = {row["variant"]: load(begun.out / row["name"] / "model") for row in rows}
        reports = {name: measure_activation(model, data.test, data) for name, model in models.items()}
        for name, report in reports.items():
            print(f"{name}: tokens that run attention\n{report.describe_roles()}")
        if "seqboat" in models:
            budget = begun.spec.training.budget
            over = "each" if budget is None else budget.over
            found["calibrated"] = rate_sweep(models["seqboat"], data, RATES, over)
            print("seqboat at other rates, without further training")
            for point in found["calibrated"]:
                print(
                    f"  target {point['asked']:4.0%}  highest rate {point['highest_rate']:6.1%}  accuracy "
                    f"{point['accuracy']:6.1%}"
                )
        shown = "seqboat" if "seqboat" in reports else next(iter(reports))
        title = f"Associative recall, seed {rows[0]['seed']}"
        attempt(
            f"the figure of recall in {begun.out}",
            lambda: draw_recall(reports[shown], shown, {**summary, **found}, begun.out, title),
        )
        return found


def _free(spec: ExperimentSpec) -> ExperimentSpec:
    """Return the same experiment without a budget and losses of decisions."""
    return spec.replace(training=spec.training.replace(budget=None, losses=RoutingLosses(), router_learning_rate=None))
