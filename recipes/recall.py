"""Associative recall in noise: what attention is for, on the few tokens that need it.

python recipes/recall.py
python recipes/recall.py --arms seqboat,never --out runs/recall
python recipes/recall.py --resume runs/recall

Five models that differ in their router alone: `seqboat` (sampled decisions under a budget, learned from what they led
to), `sma` (the paper's router, by itself), `always`, `never`, and `random` at the rates that seqboat reached. Then the
dial: the trained seqboat at other rates, without training.
"""

if not __package__:  # a script: its Python may not have the package
    __import__("environment")

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from pydantic_settings import SettingsConfigDict
from torch import Tensor

from sma.budget import calibrate
from sma.checkpoint import load
from sma.model import SequenceModel
from sma.recipes.experiment import ExperimentSpec, RoutingLosses
from sma.recipes.io.command import exit_code, parse
from sma.recipes.io.names import plain
from sma.recipes.io.run_folder import SUMMARY, write_text
from sma.recipes.reports.classification import ClassificationReport, measure, rates_over_training
from sma.recipes.reports.figures import attempt, drawing, save_figure
from sma.recipes.studies.routed import ArmsOptions, comparison
from sma.recipes.studies.variants import Arm, at_random, run_arms, with_routers
from sma.recipes.tasks.batch import asked
from sma.recipes.tasks.contract import TaskData
from sma.routers import AlwaysRouterSpec, NeverRouterSpec, SMARouterSpec
from sma.stats import count_rates

ARMS = ("seqboat", "sma", "always", "never", "random")
FIGURE = "recall.png"
DIAL = (0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.8)
ROLES = {"k": "key", "v": "value", "?": "query", "·": "distractor"}


class Options(ArmsOptions):
    """Train five models on associative recall that differ in their router alone, and show which tokens SeqBoat
    chose.
    """

    model_config = SettingsConfigDict(cli_prog_name="recall")

    arms: str | None = Field(default=None, description=f"which to train, with commas between; default {','.join(ARMS)}")

    @property
    def name(self) -> str:
        return f"recall_{self.preset}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run(parse(Options, sys.argv[1:] if arguments is None else arguments)))


def recall_arms(spec: ExperimentSpec) -> dict[str, Arm]:
    """The five experiments: width, depth, updates, learning rate, data and seed are the same."""

    def free(changed: ExperimentSpec) -> ExperimentSpec:
        return changed.replace(
            training=changed.training.replace(budget=None, losses=RoutingLosses(), router_learning_rate=None)
        )

    return {
        "seqboat": spec,
        "sma": free(with_routers(spec, SMARouterSpec(temperature_scale=0.3))),
        "always": free(with_routers(spec, AlwaysRouterSpec())),
        "never": free(with_routers(spec, NeverRouterSpec())),
        "random": lambda results: free(at_random(spec, results, "seqboat")),
    }


def run(options: Options) -> dict[str, Any]:
    """Train and compare as the options say; returns the summary.

    Raises:
        SmaError: a sentence for the user.
    """
    with comparison(options, ARMS) as (spec, chosen, out):
        data = spec.task.prepare(options.data, progress=options.progress)
        title = f"Associative recall, seed {spec.seed}"
        summary = run_arms(
            recall_arms(spec),
            out,
            data,
            only=chosen,
            title=title,
            accelerator=options.accelerator,
            progress=options.progress,
        )
        # Of what the folder holds, so that a comparison that is resumed shows the same.
        reports = {name: measure(load(out / name / "model"), data.test, data) for name in summary["models"]}
        for name, report in reports.items():
            print(f"{name}: which tokens run attention\n{_roles_in_words(report)}")
        if "seqboat" in summary["models"]:
            summary["calibrated"] = dial(load(out / "seqboat" / "model"), data)
            write_text(out / SUMMARY, json.dumps(summary, indent=1))
            print("seqboat turned to other rates, without training")
            for point in summary["calibrated"]:
                print(
                    f"  asked {point['asked']:4.0%}  highest rate {point['activation_rate']:6.1%}  accuracy "
                    f"{point['accuracy']:6.1%}"
                )
        shown = "seqboat" if "seqboat" in reports else next(iter(reports))
        if attempt(f"the figure of the comparison in {out}", lambda: draw(reports[shown], shown, summary, out, title)):
            print(f"figure   {plain(out / FIGURE)}")
        print(f"summary  {plain(out / SUMMARY)}")
        return summary


def dial(model: SequenceModel, data: TaskData) -> list[dict[str, float]]:
    """Accuracy on the test split at other activation rates, to which the offsets are set on the validation split."""
    points = []
    validation, test = (
        [data.collate([split[n] for n in part.tolist()]) for part in torch.arange(len(split)).split(200)]
        for split in (data.validation, data.test)
    )
    for asked_rate in DIAL:
        calibrate(model, validation, asked_rate)
        right, asked_for, counts = 0, 0, []
        for batch in test:
            with torch.no_grad():
                output = model(batch.inputs, batch.valid)
            scores, targets = asked(cast(Tensor, output.logits), batch.targets)
            right, asked_for = right + int((scores.argmax(-1) == targets).sum()), asked_for + len(targets)
            counts.append(count_rates(output.decisions, batch.valid))
        points.append(
            {
                "asked": asked_rate,
                "activation_rate": float(reduce(add, counts).rates.max()),
                "accuracy": right / asked_for,
            }
        )
    return points


def rates_by_role(report: ClassificationReport) -> dict[str, list[float]]:
    """The activation rate per layer of keys, values, queries and distractors."""
    total: dict[str, list[float]] = {}
    count: dict[str, int] = defaultdict(int)
    for text, (rates, number) in report.by_text.items():
        role = ROLES[text[0]]
        before = total.get(role, [0.0] * len(rates))
        total[role] = [a + number * b for a, b in zip(before, rates, strict=True)]
        count[role] += number
    return {role: [rate / count[role] for rate in total[role]] for role in ROLES.values() if role in total}


def _roles_in_words(report: ClassificationReport) -> str:
    rows = rates_by_role(report)
    return "\n".join(
        f"  {role:<11}" + "  ".join(f"layer {place}: {rate:6.1%}" for place, rate in enumerate(rows[role]))
        for role in rows
    )


def draw(report: ClassificationReport, shown: str, summary: Mapping[str, Any], out: Path, title: str) -> Path:
    """Draw which tokens one model chose, how the accuracy of all grew, and what the dial does, into `recall.png`."""
    examples = report.examples[:3]
    colours = {"key": "tab:orange", "value": "tab:red", "query": "tab:green", "distractor": "0.75"}
    with drawing(16, 1.3 * len(examples) + 4) as figure:
        figure.suptitle(f"{title}: dark where {shown} ran attention", fontsize=13)
        grid = figure.add_gridspec(len(examples) + 1, 3, height_ratios=[1.0] * len(examples) + [3.0])
        for row, example in enumerate(examples):
            axis = figure.add_subplot(grid[row, :])
            layers, positions = example.active.shape
            axis.imshow(example.active.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
            axis.set_yticks(range(layers), [f"layer {layer}" for layer in range(layers)], fontsize=8)
            axis.set_xticks(range(positions), example.texts, fontsize=7, family="monospace", rotation=90)
            for label, text in zip(axis.get_xticklabels(), example.texts, strict=True):
                label.set_color(colours[ROLES[text[0]]])
            axis.tick_params(which="both", length=0)
            axis.set_title(
                f"{example.guess} of {example.target} queries answered right; k key, v value, ? the key asked for",
                fontsize=9,
                loc="left",
            )
        curves, dialled = figure.add_subplot(grid[-1, :2]), figure.add_subplot(grid[-1, 2])
        for name, model in summary["models"].items():
            points = rates_over_training(out / name).get("val_accuracy", [])
            (line,) = curves.plot(*zip(*points, strict=True), "-o", markersize=3, label=name)
            dialled.plot(
                model["activation_rate"], model["accuracy"], "o", markersize=8, color=line.get_color(), label=name
            )
        if "calibrated" in summary:
            points = summary["calibrated"]
            dialled.plot(
                [point["activation_rate"] for point in points],
                [point["accuracy"] for point in points],
                "k--.",
                label="seqboat, dialled",
            )
        curves.set(xlabel="update", ylabel="validation accuracy", ylim=(-0.02, 1.02))
        dialled.set(
            xlabel="activation rate, highest layer", ylabel="test accuracy", xlim=(-0.03, 1.03), ylim=(-0.02, 1.02)
        )
        # Where no curve and no point is: accuracies go together near the top and near what chance gives.
        curves.legend(fontsize=8, loc="center", ncols=5)
        dialled.legend(fontsize=8, loc="lower right")
        for axis in (curves, dialled):
            axis.grid(alpha=0.3)
        return save_figure(figure, out / FIGURE)


if __name__ == "__main__":
    sys.exit(main())
