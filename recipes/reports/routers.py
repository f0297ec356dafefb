"""The table of routers as Markdown and as comma-separated values, made of its summary alone."""

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sma.recipes.io.names import markdown_table, plain

Run = Mapping[str, Any]

_HEAD = ["router", "accuracy", "rate per layer, %", "operations per token", "tokens/s"]


def repeated(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs that differ in their seeds alone, together: mean, least and greatest of what was measured.

    Args:
        runs: finished runs, as `sma.recipes.router_table.run` lists them.

    Returns:
        one entry for each router and column with several seeds: `modules`, `router`, `seeds`, and (mean, least,
        greatest) of `accuracy`, `rate` (over layers and sub-modules) and `operations_per_token`.
    """
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run["modules"], run["router"]].append(run)
    return [
        {"modules": modules, "router": router, "seeds": [run["seed"] for run in group]}
        | {
            "accuracy": _spread([run["accuracy"] for run in group]),
            "rate": _spread([_mean_rate(run) for run in group]),
            "operations_per_token": _spread([run["operations_per_token"] for run in group]),
        }
        for (modules, router), group in groups.items()
        if len(group) > 1
    ]


def markdown(summary: Mapping[str, Any]) -> str:
    """The whole table: a block for every column, one of the repeated runs, the failed ones, and what all of it was
    measured with.
    """
    blocks = []
    first = [run for run in summary["runs"] if run["seed"] == summary["seeds"][0]]
    for column in dict.fromkeys(run["modules"] for run in first):
        rows = [_cells(run) for run in first if run["modules"] == column]
        blocks.append(f"**{column}**, seed {summary['seeds'][0]}\n\n{markdown_table(_HEAD, rows)}")
    for column in dict.fromkeys(group["modules"] for group in summary["repeated"]):
        rows = [_spread_cells(group) for group in summary["repeated"] if group["modules"] == column]
        head = ["router", "seeds", "accuracy", "rate, %", "operations per token"]
        blocks.append(f"**{column}**, several seeds: mean (least to greatest)\n\n{markdown_table(head, rows)}")
    failed = [f"- {run['modules']}/{run['router']}-{run['seed']}: {plain(run['error'])}" for run in summary["failed"]]
    if failed:
        blocks.append("**failed**\n\n" + "\n".join(failed))
    return "\n\n".join([*blocks, _caption(summary)]) + "\n"


def comma_separated(summary: Mapping[str, Any]) -> str:
    """A row for every run; the rates have columns `rate/layer0/NAME`, and those of sub-modules that a run does not have
    are empty.
    """
    rows = []
    for run in summary["runs"]:
        rates = {
            f"rate/layer{layer}/{name}": rate for layer, each in enumerate(run["rates"]) for name, rate in each.items()
        }
        rows.append({name: value for name, value in run.items() if name != "rates"} | rates)
    rows += [dict(run) for run in summary["failed"]]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in rows for name in row)), restval="", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cells(run: Run) -> list[str]:
    names = list(dict.fromkeys(name for rates in run["rates"] for name in rates))
    by_name = {
        name: " / ".join(f"{100 * rates[name]:.0f}" for rates in run["rates"] if name in rates) for name in names
    }
    rates = ", ".join(f"{name} {cell}" if len(names) > 1 else cell for name, cell in by_name.items())
    speed = f"{run['tokens_per_second']:,}" if run["tokens_per_second"] else "-"
    return [run["router"], f"{run['accuracy']:.1%}", rates, f"{run['operations_per_token']:,.0f}", speed]


def _spread_cells(group: Mapping[str, Any]) -> list[str]:
    mean, least, greatest = (100 * value for value in group["accuracy"])
    accuracy = f"{mean:.1f}% ({least:.1f} to {greatest:.1f})"
    mean, least, greatest = (100 * value for value in group["rate"])
    rate = f"{mean:.0f} ({least:.0f} to {greatest:.0f})"
    mean, least, greatest = group["operations_per_token"]
    return [group["router"], str(len(group["seeds"])), accuracy, rate, f"{mean:,.0f} ({least:,.0f} to {greatest:,.0f})"]


def _caption(summary: Mapping[str, Any]) -> str:
    if not summary["runs"]:
        return "No run is finished."
    jobs, samples = summary["jobs"], summary["test_samples"]
    speed = (
        "one run at a time"
        if jobs == 1
        else f"each run beside {jobs - 1} other{'s' if jobs > 2 else ''}, so not to be compared"
    )
    sentences = [
        f"{summary['task']}, {summary['updates']:,} updates for every run.",
        f"{samples:,} test samples: one standard error is at most {50 / samples**0.5:.1f} points.",
        f"Chance {summary['chance']:.1%}, always the commonest answer {summary['majority']:.1%}.",
        f"Operations: multiply-adds of the layers at these rates, in a row of {summary['length']} tokens.",
        f"tokens/s: in training, without evaluation; {speed}.",
        f"{len(summary['runs'])} runs in {summary['seconds'] / 60:.1f} minutes, {jobs} at a time,",
        f"commit {summary['commit']}, {summary['hardware']}, {summary['date']}.",
    ]
    return " ".join(sentences)


def _mean_rate(run: Run) -> float:
    rates = [rate for each in run["rates"] for rate in each.values()]
    return sum(rates) / len(rates)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), min(values), max(values)
