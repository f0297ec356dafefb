"""The table of a comparison as Markdown and as comma-separated values, made of its summary alone."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sma.recipes.io.names import markdown_table, plain

REFERENCE = "transformer"
"""The model whose speed and memory are 1."""

WORKS = ("inference", "training")

_HEAD = [
    "model",
    "accuracy",
    "parameters",
    "activation rate",
    "inference: speed",
    "memory",
    "training: speed",
    "memory",
]


def markdown(summary: Mapping[str, Any]) -> str:
    """The table: accuracy with its spread over seeds, parameters, activation rate, and speed and memory beside the
    transformer's.
    """
    models = summary["models"]
    table = markdown_table(_HEAD, [[name, *_cells(row, models)] for name, row in models.items()])
    failed = "\n".join(f"- {run['model']}-{run['seed']}: {plain(run['error'])}" for run in summary["failed"])
    return "\n\n".join([table, *([f"**failed**\n\n{failed}"] if failed else []), caption(summary)]) + "\n"


def markdown_of_several(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The accuracies on all tasks, and then the table of each."""
    models = list(dict.fromkeys(name for summary in summaries.values() for name in summary["models"]))
    rows = []
    for name in models:
        found = [summary["models"].get(name) for summary in summaries.values()]
        rows.append(
            [name, *("-" if row is None else _spread([100 * value for value in row["accuracy"]], "%") for row in found)]
        )
    table = markdown_table(["accuracy", *summaries], rows)
    return (
        "\n\n".join([table, *(f"**{task}**\n\n{markdown(summary).rstrip()}" for task, summary in summaries.items())])
        + "\n"
    )


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
    return " ".join(
        [
            f"{summary['task']}, {asked}; seeds {', '.join(map(str, seeds))}: mean (least to greatest).",
            f"{samples:,} test samples: one standard error is at most {50 / samples**0.5:.1f} points.",
            f"Chance {summary['chance']:.1%}, always the commonest answer {summary['majority']:.1%}.",
            _what_speed_is(summary),
            f"Commit {summary['commit']}, {summary['hardware']}, {summary['date']}.",
        ]
    )


def _what_speed_is(summary: Mapping[str, Any]) -> str:
    models = summary["models"]
    if not any(work in row for row in models.values() for work in WORKS):
        return "Speed and memory are not measured yet."
    if WORKS[0] in models.get(REFERENCE, {}):
        unit = f"the {REFERENCE}'s is 1"
    else:
        why = f"the {REFERENCE} was not measured" if REFERENCE in models else f"there is no {REFERENCE} here"
        unit = f"{why}, so they are in milliseconds and megabytes"
    # A comparison that was resumed on another machine can have several.
    where = " and ".join(sorted({row["measured_on"] for row in models.values() if "measured_on" in row}))
    return (
        f"Speed and peak memory of one row of {summary['length']:,} random tokens{f' on {where}' if where else ''}: "
        f"{unit}."
    )


def comma_separated(summary: Mapping[str, Any]) -> str:
    """A row for every run; what was measured once for a model stands in all of its rows.

    The columns `inference_relative_speed` and so on are those of the table: the transformer's is 1.
    """
    rows = []
    for name, row in summary["models"].items():
        once = {f"{work}_{what}": value for work in WORKS for what, value in row.get(work, {}).items()}
        for work in WORKS:
            speed, memory = _relative(row, summary["models"], work)
            once |= {f"{work}_relative_speed": _rounded(speed), f"{work}_relative_memory": _rounded(memory)}
        once["measured_on"] = row.get("measured_on", "")
        for place, seed in enumerate(row["seeds"]):
            each = {what: row[what][place] for what in ("accuracy", "activation_rate", "tokens_per_second", "seconds")}
            rows.append(
                {
                    "model": name,
                    "seed": seed,
                    **each,
                    "parameters": row["parameters"],
                    "updates": row["updates"],
                    **once,
                }
            )
    rows += [dict(run) for run in summary["failed"]]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in rows for name in row)), restval="", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cells(row: Mapping[str, Any], models: Mapping[str, Any]) -> list[str]:
    accuracy = _spread([100 * value for value in row["accuracy"]], "%")
    rates = [100 * rate for rate in row["activation_rate"] if rate is not None]
    cells = [accuracy, f"{row['parameters']:,}", _spread(rates, "%", digits=0) if rates else "-"]
    for work in WORKS:
        if work in row and work not in models.get(REFERENCE, {}):
            cells += [f"{row[work]['milliseconds']:.0f} ms", f"{row[work]['megabytes']:.0f} MB"]
        else:
            cells += ["-" if times is None else f"{times:.2f}x" for times in _relative(row, models, work)]
    return cells


def _relative(row: Mapping[str, Any], models: Mapping[str, Any], work: str) -> tuple[float | None, float | None]:
    """How many times as fast as the reference a model is, and how many times its memory it takes; None where that is
    not known.
    """
    mine, reference = row.get(work), models.get(REFERENCE, {}).get(work)
    if mine is None or reference is None:
        return None, None
    return _ratio(reference["milliseconds"], mine["milliseconds"]), _ratio(mine["megabytes"], reference["megabytes"])


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _spread(values: Sequence[float], unit: str, digits: int = 1) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}{unit}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
