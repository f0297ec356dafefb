"""The table and the figure of variants of one model."""

from pathlib import Path

from sma.recipes.reports.figures import drawing, label, save_figure
from sma.recipes.reports.results import Row, Summary, groups, layer_rates, metric_of, value_of
from sma.recipes.reports.table import (
    MACS,
    MACS_NOTE,
    RATES_BY_LAYER,
    SECONDS,
    TOKENS_PER_SECOND,
    Block,
    Table,
    caption,
    measured,
    speed_note,
    variants,
)

FIGURE = "comparison.png"
COLUMNS = (RATES_BY_LAYER, MACS, TOKENS_PER_SECOND, SECONDS)


def variants_table(summary: Summary) -> Table:
    """The metric of the task, rates, MACs and time of every variant."""
    columns = (variants("variant"), measured(metric_of(summary)), *COLUMNS)
    sentences = MACS_NOTE.format(length=summary["length"]), speed_note(summary)
    return Table(summary, [Block(columns, groups(summary["rows"]))], caption(summary, *sentences))


def highest_rate(row: Row) -> float:
    """Return the activation rate of the layer that is active most often; 0 where nothing is routed."""
    return max(layer_rates(row["rates"]), default=0.0)


def draw_variants(summary: Summary, out: Path, title: str) -> Path:
    """Draw the metric of the variants against their MACs into `comparison.png`, a point for every seed."""
    metric = metric_of(summary)
    scale, unit = (100, ", %") if metric.percent else (1, "")
    label_y = f"test {metric.name.replace('_', ' ')}{unit}"
    with drawing(7, 4.5) as figure:
        axis = figure.subplots()
        for line in groups(summary["rows"]):
            points = [(row["macs_per_token"] / 1000, scale * value_of(row, metric)) for row in line]
            axis.plot(*zip(*points, strict=True), "o", markersize=8)
            axis.annotate(
                f"{label(line[0]['variant'], 40)} ({highest_rate(line[0]):.0%})",
                points[0],
                xytext=(7, 5),
                textcoords="offset points",
                fontsize=9,
            )
        axis.margins(x=0.25, y=0.15)
        axis.set(xlabel="thousand MACs per token, layers only", ylabel=label_y, title=title)
        axis.grid(alpha=0.3)
        return save_figure(figure, out / FIGURE)
