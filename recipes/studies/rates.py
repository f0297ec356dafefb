"""Accuracy against activation rate: models trained at several rates, and one model calibrated to others."""

import statistics
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from sma.budget import BudgetSpec
from sma.calibration import calibrate
from sma.checkpoint import load
from sma.errors import SpecError
from sma.model import SequenceModel
from sma.recipes.experiment import ExperimentSpec
from sma.recipes.io.option_parser import Names
from sma.recipes.io.run_folder import SUMMARY, read_checked
from sma.recipes.reports.figures import attempt
from sma.recipes.reports.rates import FIGURE, draw_rates, rates_table
from sma.recipes.reports.results import Summary, layer_rates
from sma.recipes.reports.table import Table
from sma.recipes.studies.contract import Begun, Chosen, Study, StudyOptions
from sma.recipes.studies.folder import NEW, read_study
from sma.recipes.studies.grid import Run
from sma.recipes.studies.variants import with_routers
from sma.recipes.tasks.batch import select_scored
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.routers import AlwaysRouterSpec, NeverRouterSpec
from sma.stats import count_rates

ENDS = {"always": AlwaysRouterSpec(), "never": NeverRouterSpec()}
"""The variants with a constant rate, beside those of the budgets."""

CALIBRATED = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 0.8)
"""The rates to which a trained model is calibrated."""


class RatesOptions(StudyOptions):
    """The options of the recipe."""

    task: Literal["pathfinder", "mqar", "recall", "listops", "digits"] = Field(
        default="pathfinder", description="the task"
    )
    preset: Literal["tiny", "binary"] = Field(
        default="tiny",
        description="tiny: minutes on one core for each model; binary: ListOps of two arguments per operator",
    )
    rates: Names = Field(default="0.05,0.1,0.2,0.4", description="activation rates at which models are trained")
    beside: Names | None = Field(
        default=None, description="folders of finished studies of rates, separated by commas, drawn in the same figure"
    )

    @property
    def name(self) -> str:
        return f"{self.task}_{self.preset}"


class RatesChosen(Chosen):
    """The settings of a study of rates.

    Attributes:
        rates: activation rates at which models are trained.
        beside: absolute paths of the folders of other studies, drawn in the same figure.
    """

    rates: list[float] = Field(min_length=1)
    beside: list[str] = Field(default=[])


class Rates(Study[RatesOptions, RatesChosen]):
    """The experiment at several target rates, with attention on every token, and without any; then the model of the
    highest target at other rates, calibrated on the validation split.
    """

    name = "rates"
    chosen = RatesChosen
    older = "rates.json"
    figures: ClassVar[Sequence[str]] = (FIGURE,)

    def settings(self, options: RatesOptions) -> dict[str, Any]:
        beside = [str(Path(word.strip()).resolve()) for word in (options.beside or "").split(",") if word.strip()]
        for folder in beside:
            self.finished(folder)
        return {**super().settings(options), "rates": _rates(options.rates), "beside": beside}

    def finished(self, folder: str) -> Summary:
        """Read the summary of a study of rates.

        Raises:
            SmaError: the folder holds none.
        """
        if not (Path(folder) / SUMMARY).is_file():
            raise SpecError(f"{folder!r} is not the folder of a finished study of rates; give one, or omit --beside")
        read_study(self, Path(folder))
        return cast(Summary, read_checked(Path(folder) / SUMMARY, _has_rows, "the summary of a study", NEW))

    def names(self, spec: ExperimentSpec) -> dict[str, Sequence[str]]:
        return {"variants": ("trained", *ENDS)}

    def experiment(self, options: RatesOptions) -> ExperimentSpec:
        """The preset, with a budget if it has none: held for a quarter of the updates, then reached in a quarter."""
        spec = super().experiment(options)
        training = spec.training
        if training.budget is not None or options.spec is not None:
            return spec
        budget = BudgetSpec(target=0.5, hold=training.updates // 4, anneal=training.updates // 4)
        return spec.replace(training=training.replace(budget=budget))

    def check(self, spec: ExperimentSpec, chosen: RatesChosen) -> None:
        if not isinstance(spec.task, ClassificationTask):
            raise SpecError(
                f"the metric of the task {spec.task.kind!r} is {spec.task.metric.name!r}, and this study compares "
                "accuracies; use a classification task"
            )
        if spec.training.budget is None:
            raise SpecError("the models are trained under a budget; set training.budget.target to a rate")
        if not any(layer.modules for layer in spec.model.layer_specs):
            raise SpecError("the experiment has no routed layer, so it has no activation rate; add modules to a layer")
        for rate in chosen.rates:
            _at(spec, rate)

    def runs(
        self, spec: ExperimentSpec, chosen: RatesChosen, data: TaskData, out: Path, accelerator: str = "auto"
    ) -> list[Run]:
        made = {variant_of(rate): _at(spec, rate) for rate in chosen.rates}
        made |= {name: with_routers(spec, router) for name, router in ENDS.items()}
        seeds = range(spec.seed, spec.seed + (chosen.seeds or 1))
        return [
            Run(f"{name}-{seed}", name, seed, each.replace(seed=seed)) for name, each in made.items() for seed in seeds
        ]

    def selects(self, run: Run, chosen: RatesChosen) -> bool:
        return (run.variant if run.variant in ENDS else "trained") in chosen.variants

    def conclude(self, summary: Summary, begun: Begun[RatesChosen], data: TaskData) -> dict[str, Any]:
        names = [variant_of(rate) for rate in sorted(begun.chosen.rates, reverse=True)]
        rows = {row["variant"]: row for row in reversed(summary["rows"])}  # the first seed of each
        found: dict[str, Any] = {}
        name = next((name for name in names if name in rows), None)
        if name is not None:
            budget = begun.spec.training.budget
            over = "each" if budget is None else budget.over
            points = rate_sweep(load(begun.out / rows[name]["name"] / "model"), data, CALIBRATED, over)
            found = {"calibrated": points, "calibrated_model": rows[name]["name"]}

        def draw() -> Path:
            others = [self.finished(folder) for folder in begun.chosen.beside]
            return draw_rates([{**summary, **found}, *others], begun.out)

        attempt(f"the figure of the study in {begun.out}", draw)
        return found

    def table(self, summary: Summary) -> Table:
        return rates_table(summary)


def _has_rows(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("rows"), list) and bool(value["rows"])


def variant_of(rate: float) -> str:
    """The name of the variant that is trained at a rate."""
    return f"rate={rate:g}"


def _at(spec: ExperimentSpec, rate: float) -> ExperimentSpec:
    budget = spec.training.budget
    if budget is None:
        return spec  # refused by `check`
    return spec.replace(training=spec.training.replace(budget=budget.replace(target=rate)))


def _rates(given: str) -> list[float]:
    try:
        found = [float(word) for word in given.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < 1 for rate in found) or len(set(found)) < len(found):
        raise SpecError(
            f"--rates {given!r} must be different activation rates between 0 and 1, separated by commas: 0.05,0.1,0.2"
        )
    return found


def rate_sweep(
    model: SequenceModel,
    data: TaskData,
    rates: Sequence[float] = CALIBRATED,
    over: Literal["each", "total"] = "each",
) -> list[dict[str, float]]:
    """Measure the test accuracy at other activation rates, calibrated on the validation split without further training.

    Args:
        model: a trained model of the task.
        data: the prepared data of the task.
        rates: the rates, above 0 and at most 1.
        over: what each rate holds for: `each` sub-module, or the `total`, as in `calibrate`.

    Returns:
        a point for every rate: `asked`, the mean `activation_rate` of the layers on the test split, the `highest_rate`
        of a layer, and `accuracy`.
    """
    model.eval()
    points = []
    validation, test = (
        [data.collate([split[n] for n in part.tolist()]) for part in torch.arange(len(split)).split(200)]
        for split in (data.validation, data.test)
    )
    for asked_rate in rates:
        calibrate(model, validation, asked_rate, over=over)
        right, asked_for, counts = 0, 0, []
        for batch in test:
            with torch.no_grad():
                output = model(batch.inputs, batch.valid)
            scores, targets = select_scored(cast(Tensor, output.logits), batch.targets)
            right, asked_for = right + int((scores.argmax(-1) == targets).sum()), asked_for + len(targets)
            counts.append(count_rates(output.decisions, batch.valid))
        layers = layer_rates(reduce(add, counts).by_layer())
        points.append(
            {
                "asked": asked_rate,
                "activation_rate": statistics.fmean(layers),
                "highest_rate": max(layers),
                "accuracy": right / asked_for,
            }
        )
    return points
