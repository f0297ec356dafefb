"""What a study measured: a row for every finished run, and its spread over seeds."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict


class Failure(TypedDict):
    """A run that failed.

    Attributes:
        name: the folder of the run, below that of the study.
        variant: what is compared.
        column: the part of the table, where it has several.
        seed: of the experiment.
        error: the reason, on one line.
    """

    name: str
    variant: str
    column: NotRequired[str]
    seed: int
    error: str


class Row(TypedDict):
    """A finished run.

    Attributes:
        name: the folder of the run, below that of the study.
        variant: what is compared.
        column: the part of the table, where it has several.
        seed: of the experiment.
        accuracy: on the test split.
        activation_rate: mean over the routed layers on the test split; None where nothing is routed.
        rates: activation rate of every sub-module of every routed layer on the test split.
        macs_per_token: multiply-accumulates of the layers at these rates, in a row of the test split's mean length.
        tokens_per_second: in training, without evaluation; None where no update was timed.
        seconds: of the whole run.
        parameters: of the model.
        updates: of the training.
        inference: cost of a forward pass, where it was measured: `milliseconds` and `megabytes`.
        training: cost of a forward and a backward pass, where it was measured.
        measured_on: the hardware of these two.
    """

    name: str
    variant: str
    column: NotRequired[str]
    seed: int
    accuracy: float
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


SPREAD = ("accuracy", "activation_rate", "macs_per_token")
"""The measures whose spread over seeds stands in a summary."""

Summary = Mapping[str, Any]
"""What a study writes into `summary.json`:

| key | |
|---|---|
| `task`, `chance`, `majority`, `data` | of the task; missing until a run is finished |
| `updates` | of every run; null where they differ |
| `seeds` | of all runs, that of the experiment first |
| `commit`, `hardware`, `date` | of all runs, with commas between where they differ |
| `test_samples`, `length` | number of test samples and their mean length in tokens |
| `jobs`, `seconds` | runs at a time at most, and the time of all |
| `rows`, `failed` | a `Row` or a `Failure` for every run, in the order of the grid |
| `spread` | `over_seeds` of the rows |

A study may add keys.
"""


def layer_rates(rates: Sequence[Mapping[str, float]]) -> list[float]:
    """Return the activation rate of every routed layer; of several sub-modules the mean."""
    return [sum(layer.values()) / len(layer) for layer in rates]


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows that differ in their seeds alone, in their order."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row.get("column", ""), row["variant"]].append(row)
    return list(found.values())


def over_seeds(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Summarise the rows that differ in their seeds alone.

    Returns:
        for each variant with several seeds: its labels, `seeds`, and `mean`, `min` and `max` of each of the measures
        `SPREAD` that all of them have.
    """
    spreads = []
    for group in groups(rows):
        if len(group) == 1:
            continue
        labels = {key: value for key, value in group[0].items() if key in ("column", "variant")}
        measures: dict[str, Any] = {}
        for measure in SPREAD:
            values = [value for row in group if (value := row[measure]) is not None]  # type: ignore[literal-required]
            if len(values) == len(group):
                measures[measure] = {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
        spreads.append({**labels, "seeds": [row["seed"] for row in group], **measures})
    return spreads
