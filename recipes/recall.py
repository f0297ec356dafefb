"""Associative recall in noise: what attention is for, on the few tokens that need it.

python recipes/recall.py
python recipes/recall.py --arms seqboat,never --out runs/recall
python recipes/recall.py --resume runs/recall

Five models that differ in their router alone: `seqboat` (SMA under a budget), `sma` (the same without the budget), `always`, `never`, and
`random` at the rates that seqboat reached.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.recipes.arms import Arm, Result, layer_rates, run_arms, with_routers
from sma.recipes.command import exit_code, parse
from sma.recipes.experiment import ExperimentSpec
from sma.recipes.routed import ArmsOptions, comparison
from sma.routers import AlwaysRouterSpec, NeverRouterSpec, RandomRouterSpec

if TYPE_CHECKING:
    from sma.recipes.report import Report

ARMS = ("seqboat", "sma", "always", "never", "random")
FIGURE = "recall.png"
ROLES = {"k": "key", "v": "value", "?": "query", "·": "distractor"}


class Options(ArmsOptions):
    """Train five models on associative recall that differ in their router alone, and show which tokens SeqBoat chose."""

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
    free = spec.replace(training=spec.training.replace(budget=None))

    def random(results: Mapping[str, Result]) -> ExperimentSpec:
        # Another seed in every layer: with the same one the same tokens would run everywhere.
        rates = layer_rates(results, "seqboat")
        return with_routers(free, [RandomRouterSpec(rate=rate, seed=spec.seed + place) for place, rate in enumerate(rates)])

    return {
        "seqboat": spec,
        "sma": free,
        "always": with_routers(free, AlwaysRouterSpec()),
        "never": with_routers(free, NeverRouterSpec()),
        "random": random,
    }


def run(options: Options) -> dict[str, Any]:
    """Train and compare as the options say; returns the summary.

    Raises:
        SmaError: a sentence for the user.
    """
    spec, chosen, out = comparison(options, ARMS)
    data = spec.task.prepare(options.data, progress=options.progress)
    title = f"Associative recall, seed {spec.seed}"
    reports: dict[str, Report] = {}
    summary = run_arms(
        recall_arms(spec),
        out,
        data,
        only=chosen,
        title=title,
        accelerator=options.accelerator,
        progress=options.progress,
        after=lambda name, finished: reports.update({name: finished.report}),
    )
    for name, report in reports.items():
        print(f"{name}: which tokens run attention\n{_roles_in_words(report)}")
    if reports:
        shown = "seqboat" if "seqboat" in reports else next(iter(reports))
        draw(reports[shown], shown, list(summary["models"]), out, title)
        print(f"figure   {out / FIGURE}")
    print(f"summary  {out / 'summary.json'}")
    return summary


def rates_by_role(report: "Report") -> dict[str, list[float]]:
    """The activation rate per layer of keys, values, queries and distractors."""
    total: dict[str, list[float]] = {}
    count: dict[str, int] = defaultdict(int)
    for text, (rates, number) in report.by_text.items():
        role = ROLES[text[0]]
        before = total.get(role, [0.0] * len(rates))
        total[role] = [a + number * b for a, b in zip(before, rates, strict=True)]
        count[role] += number
    return {role: [rate / count[role] for rate in total[role]] for role in ROLES.values() if role in total}


def _roles_in_words(report: "Report") -> str:
    rows = rates_by_role(report)
    return "\n".join(f"  {role:<11}" + "  ".join(f"layer {place}: {rate:6.1%}" for place, rate in enumerate(rows[role])) for role in rows)


def draw(report: "Report", shown: str, names: list[str], out: Path, title: str) -> Path:
    """Draw which tokens one model chose, and how the accuracy of all grew, into `recall.png`."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from sma.recipes.report import rates_over_training

    examples = report.examples[:3]
    colours = {"key": "tab:orange", "value": "tab:red", "query": "tab:green", "distractor": "0.75"}
    figure, axes = plt.subplots(
        len(examples) + 1, 1, figsize=(16, 1.3 * len(examples) + 4), height_ratios=[1.0] * len(examples) + [3.0], layout="constrained"
    )
    figure.suptitle(f"{title}: dark where {shown} ran attention", fontsize=13)
    for axis, example in zip(axes[:-1], examples, strict=True):
        layers, positions = example.active.shape
        axis.imshow(example.active.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        axis.set_yticks(range(layers), [f"layer {layer}" for layer in range(layers)], fontsize=8)
        axis.set_xticks(range(positions), example.texts, fontsize=6, family="monospace", rotation=90)
        for label, text in zip(axis.get_xticklabels(), example.texts, strict=True):
            label.set_color(colours[ROLES[text[0]]])
        axis.tick_params(which="both", length=0)
        axis.set_title(
            f"{example.guess} of {example.target} queries answered right; k key, v value, ? the key asked for", fontsize=9, loc="left"
        )
    for name in names:
        points = rates_over_training(out / name).get("val_accuracy", [])
        if points:
            axes[-1].plot(*zip(*points, strict=True), "-o", markersize=3, label=name)
    axes[-1].set(xlabel="update", ylabel="validation accuracy", ylim=(-0.02, 1.02))
    if axes[-1].lines:
        axes[-1].legend(fontsize=9)
    axes[-1].grid(alpha=0.3)
    path = out / FIGURE
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())
