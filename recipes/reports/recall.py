"""The figure of models of associative recall."""

from collections.abc import Sequence
from pathlib import Path

from sma.recipes.reports.classification import ClassificationReport, rates_over_training
from sma.recipes.reports.figures import drawing, save_figure
from sma.recipes.reports.results import Row, Summary, groups
from sma.recipes.reports.variants import highest_rate
from sma.recipes.tasks.recall import ROLES

FIGURE = "recall.png"


def first_seed(rows: Sequence[Row]) -> list[Row]:
    """Return the first row of every variant."""
    return [group[0] for group in groups(rows)]


def draw_recall(report: ClassificationReport, shown: str, summary: Summary, out: Path, title: str) -> Path:
    """Draw the active tokens of one model, the accuracies over training, and the rate sweep, into `recall.png`."""
    examples = report.examples[:3]
    colours = {"key": "tab:orange", "value": "tab:red", "query": "tab:green", "distractor": "0.75"}
    with drawing(16, 1.3 * len(examples) + 4) as figure:
        figure.suptitle(f"{title}; dark: {shown} activated attention", fontsize=13)
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
                f"{example.guess} of {example.target} queries answered correctly; k: key, v: value, ?: queried key",
                fontsize=9,
                loc="left",
            )
        curves, sweep = figure.add_subplot(grid[-1, :2]), figure.add_subplot(grid[-1, 2])
        for run in first_seed(summary["rows"]):
            name = run["variant"]
            points = rates_over_training(out / run["name"]).get("val_accuracy", [])
            (line,) = curves.plot(*zip(*points, strict=True), "-o", markersize=3, label=name)
            sweep.plot(highest_rate(run), run["accuracy"], "o", markersize=8, color=line.get_color(), label=name)
        if "calibrated" in summary:
            points = summary["calibrated"]
            sweep.plot(
                [point["highest_rate"] for point in points],
                [point["accuracy"] for point in points],
                "k--.",
                label="seqboat, rate sweep",
            )
        curves.set(xlabel="update", ylabel="validation accuracy", ylim=(-0.02, 1.02))
        sweep.set(
            xlabel="activation rate, highest layer", ylabel="test accuracy", xlim=(-0.03, 1.03), ylim=(-0.02, 1.02)
        )
        # At a height without curves and points: accuracies are either high or near chance.
        curves.legend(fontsize=8, loc="center", ncols=5)
        sweep.legend(fontsize=8, loc="lower right")
        for axis in (curves, sweep):
            axis.grid(alpha=0.3)
        return save_figure(figure, out / FIGURE)
