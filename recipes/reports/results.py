"""The results of a study: a row for every finished run, and the spread over seeds."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from sma.recipes.tasks.contract import ClassificationTask, Metric


class Labels(TypedDict):
    """The labels of a run.

    Attributes:
        name: folder of the run, relative to that of the study.
        variant: name of the variant.
        column: part of the table, if it has several.
        seed: seed of the experiment.
    """

    name: str
    variant: str
    column: NotRequired[str]
    seed: int


class Failure(Labels):
    """A failed run.

    Attributes:
        error: reason of the failure, on one line.
    """

    error: str


class Row(Labels):
    """A finished run. The metric of the task has its own key, its name; see `value_of`.

    Attributes:
        accuracy: accuracy on the test split, if that is the metric of the task.
        activation_rate: mean activation rate of the routed layers on the test split; None without routed layers.
        rates: activation rate of every sub-module of every routed layer on the test split.
        macs_per_token: multiply-accumulates of the layers at these rates, in a row of the test split's mean length.
        tokens_per_second: speed of the training without evaluation; None if no update was timed.
        seconds: duration of the whole run.
        parameters: number of parameters of the model.
        updates: number of updates of the training.
        inference: `milliseconds` and `megabytes` of a forward pass, if measured.
        training: `milliseconds` and `megabytes` of a forward and a backward pass, if measured.
        measured_on: hardware of these two measurements.
    """

    accuracy: NotRequired[float]
    activation_rate: float | None
    rates: list[dict[str, float]]
    macs_per_token: float
    tokens_per_second: int | None
    seconds: float
    parameters: int
    updates: int
    inference: NotRequired[dict[str, float]]
    training: NotRequired[dict[str, float]]
    measured_on: NotRequired[str]


SPREAD = ("activation_rate", "macs_per_token")
"""Measures whose spread over seeds is in a summary, after that of the metric of the task."""

Summary = Mapping[str, Any]
"""Content of the `summary.json` of a study:

| key | value |
|---|---|
| `task`, `data`, and `chance`, `majority` of a classification | facts of the task; missing until a run is finished |
| `metric` | the metric of the task, a `Metric`; summaries without it have accuracies |
| `updates` | number of updates of every run; null if they differ |
| `seeds` | seeds of all runs, that of the experiment first |
| `commit`, `hardware`, `date` | provenance of all runs, separated by commas if they differ |
| `test_samples`, `length` | number of test samples and their mean length in tokens |
| `jobs`, `seconds` | maximum number of concurrent runs, and the time of all runs |
| `rows`, `failed` | a `Row` or a `Failure` for every run, in the order of the grid |
| `spread` | `over_seeds` of the rows |

A study may add keys.
"""


def metric_of(summary: Summary) -> Metric:
    """Return the metric by which the runs of a study are compared."""
    return Metric(**summary["metric"]) if "metric" in summary else ClassificationTask.metric


def value_of(row: Row, metric: Metric) -> float:
    """Return the value of the metric of a run on the test split."""
    value: float = row[metric.name]  # type: ignore[literal-required]
    return value


def layer_rates(rates: Sequence[Mapping[str, float]]) -> list[float]:
    """Return the activation rate of every routed layer, the mean over its sub-modules."""
    return [sum(layer.values()) / len(layer) for layer in rates]


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows that differ only in their seeds, in their order."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row.get("column", ""), row["variant"]].append(row)
    return list(found.values())


def over_seeds(rows: Sequence[Row], metric: Metric = ClassificationTask.metric) -> list[dict[str, Any]]:
    """Summarise the rows that differ only in their seeds.

    Returns:
        for each variant with several seeds: its labels, `seeds`, and `mean`, `min` and `max` of the metric, and of each
        measure in `SPREAD` that all rows have.
    """
    spreads = []
    for group in groups(rows):
        if len(group) == 1:
            continue
        labels = {key: value for key, value in group[0].items() if key in ("column", "variant")}
        measures: dict[str, Any] = {}
        for measure in (metric.name, *SPREAD):
            values = [value for row in group if (value := row[measure]) is not None]  # type: ignore[literal-required]
            if len(values) == len(group):
                measures[measure] = {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
        spreads.append({**labels, "seeds": [row["seed"] for row in group], **measures})
    return spreads
