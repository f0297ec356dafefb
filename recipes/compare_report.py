"""The table of a comparison as Markdown and as comma-separated values, made of its summary alone."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

REFERENCE = "transformer"
"""The model whose speed and memory are 1."""

_HEAD = ["model", "accuracy", "parameters", "activation rate", "inference: speed", "memory", "training: speed", "memory"]


def markdown(summary: Mapping[str, Any]) -> str:
    """The table: accuracy with its spread over seeds, parameters, activation rate, and speed and memory beside the transformer's."""
    models = summary["models"]
    table = _table(_HEAD, [[name, *_cells(row, models)] for name, row in models.items()])
    failed = "\n".join(f"- {run['model']}-{run['seed']}: {run['error']}" for run in summary["failed"])
    return "\n\n".join([table, *([f"**failed**\n\n{failed}"] if failed else []), caption(summary)]) + "\n"


def markdown_of_several(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The accuracies on all tasks, and then the table of each."""
    models = list(dict.fromkeys(name for summary in summaries.values() for name in summary["models"]))
    rows = []
    for name in models:
        found = [summary["models"].get(name) for summary in summaries.values()]
        rows.append([name, *("-" if row is None else _spread([100 * value for value in row["accuracy"]], "%") for row in found)])
    table = _table(["accuracy", *summaries], rows)
    return "\n\n".join([table, *(f"**{task}**\n\n{markdown(summary).rstrip()}" for task, summary in summaries.items())]) + "\n"


def caption(summary: Mapping[str, Any]) -> str:
    """What the figures were measured with."""
    models = summary["models"]
    if not models:
        return "No run is finished."
    seeds = sorted({seed for row in models.values() for seed in row["seeds"]})
    updates = sorted({row["updates"] for row in models.values()})
    asked = (
        f"{updates[0]:,} updates for every model"
        if summary["minutes"] is None
        else f"{summary['minutes']:g} minutes for every model, which are {updates[0]:,} to {updates[-1]:,} updates"
    )
    samples = summary["test_samples"]
    reference = (
        "the transformer's is 1" if REFERENCE in models else f"there is no {REFERENCE} here, so they are in milliseconds and megabytes"
    )
    return " ".join(
        [
            f"{summary['task']}, {asked}; seeds {', '.join(map(str, seeds))}: mean (least to greatest).",
            f"{samples:,} test samples: one standard error is at most {50 / samples**0.5:.1f} points.",
            f"Chance {summary['chance']:.1%}, always the commonest answer {summary['majority']:.1%}.",
            f"Speed and peak memory of one row of {summary['length']:,} random tokens: {reference}.",
            f"Commit {summary['commit']}, {summary['hardware']}, {summary['date']}.",
        ]
    )


def comma_separated(summary: Mapping[str, Any]) -> str:
    """A row for every run; what was measured once for a model stands in all of its rows."""
    rows = []
    for name, row in summary["models"].items():
        once = {f"{work}_{what}": value for work in ("inference", "training") for what, value in row.get(work, {}).items()}
        for place, seed in enumerate(row["seeds"]):
            each = {what: row[what][place] for what in ("accuracy", "activation_rate", "tokens_per_second", "seconds")}
            rows.append({"model": name, "seed": seed, **each, "parameters": row["parameters"], "updates": row["updates"], **once})
    rows += [dict(run) for run in summary["failed"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Mapping[str, Any], models: Mapping[str, Any]) -> list[str]:
    accuracy = _spread([100 * value for value in row["accuracy"]], "%")
    rates = [100 * rate for rate in row["activation_rate"] if rate is not None]
    cells = [accuracy, f"{row['parameters']:,}", _spread(rates, "%", digits=0) if rates else "-"]
    for work in ("inference", "training"):
        if work not in row:
            cells += ["-", "-"]
            continue
        reference = models.get(REFERENCE, {}).get(work)
        mine = row[work]
        if reference is None:
            cells += [f"{mine['milliseconds']:.0f} ms", f"{mine['megabytes']:.0f} MB"]
        else:
            cells += [_times(reference["milliseconds"], mine["milliseconds"]), _times(mine["megabytes"], reference["megabytes"])]
    return cells


def _times(above: float, below: float) -> str:
    return f"{above / below:.2f}x" if below else "-"


def _spread(values: Sequence[float], unit: str, digits: int = 1) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}{unit}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
