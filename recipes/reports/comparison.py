"""The table of SeqBoat and its baselines."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from sma.recipes.io.names import markdown_table
from sma.recipes.reports.results import Row, Summary, groups, metric_of
from sma.recipes.reports.table import (
    MEAN_RATE,
    PARAMETERS,
    Block,
    Column,
    Table,
    caption,
    markdown,
    measured,
    variants,
)

REFERENCE = "transformer"
"""The reference model, whose relative speed and memory are 1."""

Work = Literal["inference", "training"]
WORKS: tuple[Work, ...] = get_args(Work)
Line = Sequence[Row]


def comparison_table(summary: Summary) -> Table:
    """The metric, parameters, activation rate, and speed and memory relative to those of the transformer."""
    reference = _cost_of(REFERENCE, summary["rows"])
    columns = [variants("model"), measured(metric_of(summary)), PARAMETERS, MEAN_RATE]
    for work in WORKS:
        columns += _relative_columns(work, reference)
    minutes = summary["minutes"]
    times = [] if minutes is None else [f"Training time of each model: {minutes:g} min."]
    return Table(
        summary,
        [Block(columns, groups(summary["rows"]))],
        caption(summary, *times, _speed_note(summary)),
        lambda row: _relative_values(row, reference),
    )


def tasks_table(summaries: Mapping[str, Summary]) -> str:
    """The results on several tasks as Markdown, followed by the table of each task."""
    columns = [measured(metric_of(summary)) for summary in summaries.values()]
    names = list(dict.fromkeys(row["variant"] for summary in summaries.values() for row in summary["rows"]))
    lines = []
    for name in names:
        found = [[row for row in summary["rows"] if row["variant"] == name] for summary in summaries.values()]
        cells = zip(columns, found, strict=True)
        lines.append([name, *(column.cell(rows) if rows else "-" for column, rows in cells)])
    tables = (f"**{task}**\n\n{markdown(comparison_table(summary)).rstrip()}" for task, summary in summaries.items())
    head = " / ".join(dict.fromkeys(column.head for column in columns))
    return "\n\n".join([markdown_table([head, *summaries], lines), *tables]) + "\n"


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
