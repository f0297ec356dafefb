"""The table of a study as Markdown and as comma-separated values, made of its summary alone."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sma.recipes.io.names import markdown_table, plain
from sma.recipes.reports.results import Failure, Row, Summary, metric_of, value_of
from sma.recipes.tasks.contract import ClassificationTask, Metric


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        head: heading of the column.
        cell: function from the rows of one variant, one per seed, to the text of a cell.
    """

    head: str
    cell: Callable[[Sequence[Row]], str]


class Block(NamedTuple):
    """A part of a table.

    Attributes:
        columns: the columns.
        lines: the rows of one variant, one per seed, for every line.
        title: title above the block; empty for none.
    """

    columns: Sequence[Column]
    lines: Sequence[Sequence[Row]]
    title: str = ""


class Table(NamedTuple):
    """The table of a study.

    Attributes:
        summary: summary of the study.
        blocks: blocks of the table, from top to bottom.
        caption: conditions of the measurements.
        values: function from a row to further values of the CSV file, by their columns.
    """

    summary: Summary
    blocks: Sequence[Block]
    caption: str
    values: Callable[[Row], Mapping[str, Any]] = lambda row: {}


def markdown(table: Table) -> str:
    """Write a table as Markdown: the blocks, the failed runs, and the caption."""
    parts = []
    for block in table.blocks:
        if block.lines:
            parts += [f"**{plain(block.title)}**"] if block.title else []
            lines = [[column.cell(line) for column in block.columns] for line in block.lines]
            parts.append(markdown_table([column.head for column in block.columns], lines))
    failed: Sequence[Failure] = table.summary["failed"]
    if failed:
        parts += ["**failed**", "\n".join(f"- {plain(run['name'])}: {plain(run['error'])}" for run in failed)]
    return "\n\n".join([*parts, table.caption]) + "\n"


def comma_separated(table: Table) -> str:
    """Write a table as comma-separated values: a line for every run, finished or failed.

    The columns are the keys of `Row`, without `name`; a nested value has one column for each of its parts, such as
    `rate/layer0/NAME` and `inference_milliseconds`. A cell without a value is empty.
    """
    lines: list[dict[str, Any]] = [{**_flat(row), **table.values(row)} for row in table.summary["rows"]]
    lines += [{key: value for key, value in run.items() if key != "name"} for run in table.summary["failed"]]
    labels = [name for name in ("column", "variant", "seed") if any(name in line for line in lines)]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys([*labels, *(name for line in lines for name in line)])), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key == "rates":
            flat |= {
                f"rate/layer{layer}/{name}": rate
                for layer, each in enumerate(row["rates"])
                for name, rate in each.items()
            }
        elif isinstance(value, dict):
            flat |= {f"{key}_{part}": number for part, number in value.items()}
        elif key != "name":
            flat[key] = value
    return flat


def spread(values: Sequence[float], form: str = ",.0f", unit: str = "") -> str:
    """Write values of several seeds as `mean (min to max)`, and a single value without a range.

    Args:
        values: at least one value.
        form: format of a value.
        unit: unit after the mean.
    """
    mean = f"{statistics.fmean(values):{form}}{unit}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def measured(metric: Metric) -> Column:
    """Return the column of the metric of a task."""

    def cell(line: Sequence[Row]) -> str:
        values = [value_of(row, metric) for row in line]
        return spread([100 * value for value in values], ".1f", "%") if metric.percent else spread(values, ".3f")

    return Column(metric.name.replace("_", " "), cell)


def _mean_rate(unit: str) -> Callable[[Sequence[Row]], str]:
    def cell(line: Sequence[Row]) -> str:
        rates = [100 * rate for row in line if (rate := row["activation_rate"]) is not None]
        return spread(rates, ".0f", unit) if rates else "-"

    return cell


def _rates_by_layer(line: Sequence[Row]) -> str:
    """The rates of every sub-module layer by layer, as means over the seeds."""
    layers = list(zip(*(row["rates"] for row in line), strict=True))
    names = list(dict.fromkeys(name for layer in layers for name in layer[0]))
    cells = []
    for name in names:
        means = (statistics.fmean(each[name] for each in layer) for layer in layers if name in layer[0])
        rates = " / ".join(f"{100 * mean:.0f}" for mean in means)
        cells.append(f"{name} {rates}" if len(names) > 1 else rates)
    return ", ".join(cells) or "-"


def _tokens_per_second(line: Sequence[Row]) -> str:
    speeds = [speed for row in line if (speed := row["tokens_per_second"]) is not None]
    return spread(speeds) if speeds else "-"


ACCURACY = measured(ClassificationTask.metric)
PARAMETERS = Column("parameters", lambda line: f"{line[0]['parameters']:,}")
MEAN_RATE = Column("activation rate", _mean_rate("%"))
MEAN_RATE_PERCENT = Column("rate, %", _mean_rate(""))
RATES_BY_LAYER = Column("rate per layer, %", _rates_by_layer)
MACS = Column("MACs per token", lambda line: spread([row["macs_per_token"] for row in line]))
TOKENS_PER_SECOND = Column("tokens/s", _tokens_per_second)
SECONDS = Column("seconds", lambda line: spread([row["seconds"] for row in line]))
SEEDS = Column("seeds", lambda line: str(len(line)))


def variants(head: str) -> Column:
    """Return the first column of a table, which names the variant."""
    return Column(head, lambda line: line[0]["variant"])


MACS_NOTE = "MACs: multiply-accumulates of the layers at these rates, in a row of {length} tokens."
"""Explanation of the column `MACS`, for captions."""


def speed_note(summary: Summary) -> str:
    """Return the explanation of the column `TOKENS_PER_SECOND`, for captions."""
    jobs = summary["jobs"]
    others = f"each run beside {jobs - 1} other{'s' if jobs > 2 else ''}, so not comparable"
    return f"tokens/s: in training, without evaluation; {'one run at a time' if jobs == 1 else others}."


def caption(summary: Summary, *sentences: str) -> str:
    """Return the conditions of the measurements of a study.

    Args:
        summary: summary of the study.
        sentences: explanations of its columns.
    """
    rows: Sequence[Row] = summary["rows"]
    if not rows:
        return "No run is finished."
    updates = sorted({row["updates"] for row in rows})
    made = f"{updates[0]:,}" if len(updates) == 1 else f"{updates[0]:,} to {updates[-1]:,}"
    seeds = sorted({row["seed"] for row in rows})
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}: mean (min to max)"
    samples, minutes, metric = summary["test_samples"], summary["seconds"] / 60, metric_of(summary)
    error = f": one standard error is at most {50 / samples**0.5:.1f} points" if metric.percent else ""
    facts = [f"{summary['task']}, {made} updates; {which}.", f"{samples:,} test samples{error}."]
    if metric.mode == "min":
        facts.append(f"A lower {metric.name.replace('_', ' ')} is better.")
    if "chance" in summary:
        facts.append(f"Chance {summary['chance']:.1%}, majority class {summary['majority']:.1%}.")
    sentences = (
        *facts,
        *sentences,
        f"{len(rows)} run{'s' if len(rows) > 1 else ''} in {minutes:.1f} minutes, {summary['jobs']} at a time,",
        f"commit {summary['commit']}, {summary['hardware']}, {summary['date']}.",
    )
    return " ".join(sentences)
