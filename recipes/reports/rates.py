"""The table and the figure of accuracy against activation rate."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sma.recipes.reports.figures import drawing, save_figure
from sma.recipes.reports.results import Summary, groups, metric_of, value_of
from sma.recipes.reports.table import MACS, MACS_NOTE, RATES_BY_LAYER, Block, Table, caption, measured, variants

FIGURE = "rates.png"


def rates_table(summary: Summary) -> Table:
    """Accuracy, rates and MACs of the trained models, and the accuracies of the calibrated one."""
    metric = metric_of(summary)
    columns = (variants("trained with"), measured(metric), RATES_BY_LAYER, MACS)
    sentences = [MACS_NOTE.format(length=summary["length"])]
    if "calibrated" in summary:
        points = ", ".join(
            f"{point['accuracy']:.1%} at {point['activation_rate']:.1%}" for point in calibrated(summary)
        )
        sentences.append(f"{summary['calibrated_model']} at other rates, without further training: {points}.")
    return Table(summary, [Block(columns, groups(summary["rows"]))], caption(summary, *sentences))


def calibrated(summary: Summary) -> list[dict[str, float]]:
    """The points of the calibrated model, in the order of their rates."""
    return sorted(summary.get("calibrated", []), key=lambda point: point["activation_rate"])


def draw_rates(summaries: Sequence[Summary], out: Path) -> Path:
    """Draw accuracy against the rate into `rates.png`, one panel per study.

    Args:
        summaries: summaries of studies of rates.
        out: the folder of the figure.

    Returns:
        the path of the figure.
    """
    columns = min(2, len(summaries))
    lines = -(-len(summaries) // columns)
    with drawing(7.5 * columns, 4.5 * lines) as figure:
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for axis, summary in zip(axes, summaries, strict=False):
            _draw_panel(axis, summary)
        for axis in axes[len(summaries) :]:
            axis.set_axis_off()
        return save_figure(figure, out / FIGURE)


def _draw_panel(axis: Any, summary: Summary) -> None:
    """Draw one study: the mean of the trained models with its range over the seeds, the calibrated model, and the two
    constant rates.
    """
    trained, ends = [], {}
    for line in groups(summary["rows"]):
        values = [100 * value_of(row, metric_of(summary)) for row in line]
        if line[0]["variant"] in ("always", "never"):
            ends[line[0]["variant"]] = statistics.fmean(values)
        else:
            reached = [100 * rate for row in line if (rate := row["activation_rate"]) is not None]
            trained.append((statistics.fmean(reached), statistics.fmean(values), min(values), max(values)))
    if trained:
        rates, means, low, high = zip(*sorted(trained), strict=True)
        below = [mean - least for mean, least in zip(means, low, strict=True)]
        above = [most - mean for mean, most in zip(means, high, strict=True)]
        axis.errorbar(rates, means, [below, above], marker="o", capsize=3, label="trained at the rate")
    points = [(100 * point["activation_rate"], 100 * point["accuracy"]) for point in calibrated(summary)]
    if points:
        axis.plot(
            *zip(*points, strict=True), "k--.", label=f"{summary['calibrated_model']}, calibrated without training"
        )
    for colour, (name, value) in zip(("tab:green", "tab:red"), ends.items(), strict=False):
        axis.axhline(value, color=colour, linestyle=":", label=f"{name}: {value:.1f} %")
    axis.set_xscale("symlog", linthresh=1)
    ticks = [1, 2, 5, 10, 20, 40, 60, 100]
    axis.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axis.set_xlim(left=0 if any(rate < 0.8 for rate, *_ in [*trained, *points]) else 0.8, right=110)
    axis.set(xlabel="activation rate, %", ylabel="test accuracy, %", title=f"{summary['task']}: accuracy against rate")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
