"""The table and the figure of SeqBoat and its baselines."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, get_args

from sma.recipes.io.names import markdown_table
from sma.recipes.reports.figures import drawing, label, save_figure
from sma.recipes.reports.results import Row, Summary, groups, layer_rates, metric_of, value_of
from sma.recipes.reports.table import (
    MEAN_RATE,
    PARAMETERS,
    RATES_BY_LAYER,
    Block,
    Column,
    Table,
    caption,
    markdown,
    measured,
    variants,
)

FIGURE = "comparison.png"

REFERENCE = "transformer"
"""The reference model, whose relative speed and memory are 1."""

Work = Literal["inference", "training"]
WORKS: tuple[Work, ...] = get_args(Work)
Line = Sequence[Row]


def comparison_table(summary: Summary) -> Table:
    """The metric, parameters, activation rate, and speed and memory relative to those of the transformer."""
    reference = _cost_of(REFERENCE, summary["rows"])
    columns = [variants("model"), measured(metric_of(summary)), PARAMETERS, MEAN_RATE]
    minutes = summary["minutes"]
    notes = [] if minutes is None else [f"Training time of each model: {minutes:g} min."]
    if summary["measured_length"] is not None:
        notes.append(_speed_note(summary))
        for work in WORKS:
            columns += _relative_columns(work, reference)
    return Table(
        summary,
        [Block(columns, groups(summary["rows"]))],
        caption(summary, *notes),
        lambda row: _relative_values(row, reference),
    )


def tasks_table(summaries: Mapping[str, Summary]) -> str:
    """The results of several comparisons as Markdown, the activation rates, and the table of each.

    Args:
        summaries: the summary of every comparison, by its task or its settings.
    """
    head = " / ".join(dict.fromkeys(measured(metric_of(summary)).head for summary in summaries.values()))
    parts = [_across(head, summaries, [measured(metric_of(summary)) for summary in summaries.values()])]
    routed = {
        part: {**summary, "rows": [row for row in summary["rows"] if row["rates"]]}
        for part, summary in summaries.items()
    }
    if any(summary["rows"] for summary in routed.values()):
        parts.append(_across(RATES_BY_LAYER.head, routed, [RATES_BY_LAYER] * len(routed)))
    parts += [f"**{part}**\n\n{markdown(comparison_table(summary)).rstrip()}" for part, summary in summaries.items()]
    return "\n\n".join(parts) + "\n"


def _across(head: str, summaries: Mapping[str, Summary], columns: Sequence[Column]) -> str:
    """A table with a line for every model and a column for every comparison."""
    lines = []
    for name in _models(summaries):
        found = [[row for row in summary["rows"] if row["variant"] == name] for summary in summaries.values()]
        cells = zip(columns, found, strict=True)
        lines.append([name, *(column.cell(rows) if rows else "-" for column, rows in cells)])
    return markdown_table([head, *summaries], lines)


def _models(summaries: Mapping[str, Summary]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for summary in summaries.values() for row in summary["rows"]))


def draw_parts(summaries: Mapping[str, Summary], out: Path) -> Path:
    """Draw the metric of every model over several comparisons, and its rates, into `comparison.png`: means of seeds."""
    metrics = [metric_of(summary) for summary in summaries.values()]
    scale, unit = (100, ", %") if all(metric.percent for metric in metrics) else (1, "")
    names = " / ".join(dict.fromkeys(metric.name.replace("_", " ") for metric in metrics))
    with drawing(12, 4.5) as figure:
        measure, rates_axis = figure.subplots(1, 2)
        for name in _models(summaries):
            rows = [
                (index, row)
                for index, summary in enumerate(summaries.values())
                for row in summary["rows"]
                if row["variant"] == name
            ]
            points = _means([(index, scale * value_of(row, metrics[index])) for index, row in rows])
            (line,) = measure.plot(*zip(*points, strict=True), "-o", markersize=5, label=label(name, 40))
            by_layer: dict[int, list[tuple[int, float]]] = defaultdict(list)
            for index, row in rows:
                for layer, rate in enumerate(layer_rates(row["rates"])):
                    by_layer[layer].append((index, 100 * rate))
            by_layer = {layer: _means(each) for layer, each in by_layer.items()}
            for (layer, points), style in zip(by_layer.items(), cycle(("-o", "--s", ":^", "-.d")), strict=False):
                text = f"{label(name, 40)}, layer {layer}"
                rates_axis.plot(*zip(*points, strict=True), style, color=line.get_color(), label=text)
        measure.set(ylabel=f"test {names}{unit}")
        rates_axis.set(ylabel="activation rate, %", ylim=(-3, 103))
        for axis in (measure, rates_axis):
            axis.set_xticks(range(len(summaries)), [label(part, 40) for part in summaries], fontsize=8)
            axis.margins(x=0.1)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=7)
        return save_figure(figure, out / FIGURE)


def _means(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """One point for each x: the mean over the seeds."""
    found: dict[int, list[float]] = defaultdict(list)
    for x, y in points:
        found[x].append(y)
    return [(x, statistics.fmean(each)) for x, each in found.items()]


def _speed_note(summary: Summary) -> str:
    rows: Line = summary["rows"]
    if not any(work in row for row in rows for work in WORKS):
        return "Speed and memory are not measured yet."
    if _cost_of(REFERENCE, rows):
        unit = f"the {REFERENCE}'s is 1"
    else:
        trained = any(row["variant"] == REFERENCE for row in rows)
        why = f"the {REFERENCE} was not measured" if trained else f"the {REFERENCE} is not among the models"
        unit = f"{why}, so they are in milliseconds and megabytes"
    # A comparison that was resumed on another machine has several.
    where = " and ".join(sorted({row["measured_on"] for row in rows if "measured_on" in row}))
    tokens = f"{summary['measured_length']:,} random tokens"
    return f"Speed and peak memory of one row of {tokens}{f' on {where}' if where else ''}: {unit}."


def _cost_of(variant: str, rows: Line) -> Mapping[str, Any]:
    """The row of a variant with a measured cost; empty if there is none."""
    return next((dict(row) for row in rows if row["variant"] == variant and WORKS[0] in row), {})


def _relative_columns(work: Work, reference: Mapping[str, Any]) -> list[Column]:
    """Speed and memory, relative to those of the reference if it was measured."""

    def cell(line: Line, index: int) -> str:
        mine = line[0].get(work)
        if mine is None:
            return "-"
        if not reference:
            return (f"{mine['milliseconds']:.0f} ms", f"{mine['megabytes']:.0f} MB")[index]
        times = _relative(line[0], reference, work)[index]
        return "-" if times is None else f"{times:.2f}x"

    return [Column(f"{work}: speed", lambda line: cell(line, 0)), Column("memory", lambda line: cell(line, 1))]


def _relative_values(row: Row, reference: Mapping[str, Any]) -> dict[str, float | None]:
    """The columns `inference_relative_speed` and so on of the CSV file: the transformer's is 1."""
    return {
        f"{work}_relative_{what}": None if times is None else round(times, 4)
        for work in WORKS
        for what, times in zip(("speed", "memory"), _relative(row, reference, work), strict=True)
    }


def _relative(row: Row, reference: Mapping[str, Any], work: Work) -> tuple[float | None, float | None]:
    """Speed and memory of a model divided by those of the reference; None if they are not known."""
    mine, other = row.get(work), reference.get(work)
    if mine is None or other is None:
        return None, None
    return _ratio(other["milliseconds"], mine["milliseconds"]), _ratio(mine["megabytes"], other["megabytes"])


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None
