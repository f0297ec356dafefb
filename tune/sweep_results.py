"""The results of a sweep, made from its records: a table of all trials, the Pareto front, its specs, a figure and a
summary.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sma.errors import CheckpointError, SpecError
from sma.recipes.io.names import markdown_table, shell_word
from sma.recipes.io.run_folder import SUMMARY
from sma.recipes.reports.figures import attempt
from sma.spec import dump_yaml
from sma.tune.figure import draw_front
from sma.tune.pareto import front
from sma.tune.records import FOLDER, TrialRecord, load_clock, load_records
from sma.tune.space import searched
from sma.tune.storage import Storage
from sma.tune.sweep import MACS, RATE, TIME, SweepSpec
from sma.tune.sweep_folder import load_drivers

CSV, PARQUET, TABLE, FIGURE = "trials.csv", "trials.parquet", "pareto.md", "pareto.png"
BEST = "best"


def trial_row(record: TrialRecord, sweep: SweepSpec) -> dict[str, Any]:
    """The line of a trial in the table of all trials."""
    return {
        "trial": record.number,
        "status": record.status,
        "reason": record.reason,
        "seed": record.seed,
        **_values(record, sweep),
        "updates": record.update,
        "best_update": record.metrics.get("update"),
        **_measures(record),
        "busy_seconds": round(record.seconds, 3),
        "restarts": record.restarts,
        "node": record.node,
        "checkpoint": record.checkpoint,
    }


def pareto_front(records: Sequence[TrialRecord], sweep: SweepSpec) -> list[TrialRecord]:
    """The Pareto front of the finished trials, which were trained equally long; the best quality comes first."""
    done = _finished(records)
    points = [[measure.oriented(record.metrics) for measure in sweep.measures] for record in done]
    chosen = [done[index] for index in front(points)]
    return sorted(chosen, key=lambda record: (sweep.quality.oriented(record.metrics), record.number))


def _finished(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [record for record in records if record.status == "finished"]


def best_trial(records: Sequence[TrialRecord], sweep: SweepSpec) -> TrialRecord | None:
    """The finished trial with the best quality, and among equals the sparsest."""
    return min(
        _finished(records),
        key=lambda record: (sweep.quality.oriented(record.metrics), record.metrics[RATE.name], record.number),
        default=None,
    )


def sparsest_as_good(records: Sequence[TrialRecord], sweep: SweepSpec) -> TrialRecord | None:
    """The finished trial with the lowest activation rate among those at least as good as trial 0; None if there is none
    or if trial 0 is not finished.
    """
    quality = {record.number: sweep.quality.oriented(record.metrics) for record in _finished(records)}
    good = [
        record for record in _finished(records) if record.number and quality[record.number] <= quality.get(0, -math.inf)
    ]
    return min(good, key=lambda record: (record.metrics[RATE.name], record.number), default=None)


def write_results(sweep: SweepSpec, storage: Storage) -> dict[str, Any]:
    """Write the results again from the records; returns the summary.

    Raises:
        CheckpointError: the folder has no records, or cannot be written.
    """
    records = load_records(storage, sweep)
    if not records:
        raise CheckpointError(
            f"the sweep in {storage.address('')!r} has no records yet; "
            f"resume it with: sma sweep --resume {shell_word(storage.address(''))}"
        )
    rows = [trial_row(record, sweep) for record in records]
    _write_tables(rows, storage)
    chosen = pareto_front(records, sweep)
    extremes = [
        record for record in (best_trial(records, sweep), sparsest_as_good(records, sweep)) if record is not None
    ]
    storage.remove(BEST)
    for record in {record.number: record for record in [*chosen, *extremes]}.values():
        storage.write(_spec_name(record), _with_origin(record, sweep))
    storage.write(TABLE, front_table(records, sweep))
    # A failure to draw becomes a warning; a failure to write is an error.
    drawn: list[bytes] = []
    if attempt("the figure of the sweep", lambda: drawn.append(draw_front(records, chosen, sweep))):
        storage.write(FIGURE, drawn[0])
    summary = summarise(records, sweep, storage)
    storage.write_json(SUMMARY, summary)
    return summary


def summarise(records: Sequence[TrialRecord], sweep: SweepSpec, storage: Storage) -> dict[str, Any]:
    """The summary of a sweep, as plain data."""
    counts = {
        status: sum(record.status == status for record in records)
        for status in ("finished", "stopped", "failed", "running")
    }
    clock, drivers = load_clock(storage), load_drivers(storage)
    seconds, driver = sum(clock.values()), (drivers or [{}])[-1]
    slots = driver.get("concurrent", 1)
    by_driver = {each.get("began"): each["concurrent"] for each in drivers}
    room = sum(by_driver.get(began, slots) * spent for began, spent in clock.items())
    busy = sum(record.seconds for record in records)
    found = {record.number: record for record in records}
    baseline, sparsest = found.get(0), sparsest_as_good(records, sweep)
    return {
        "task": sweep.experiment.task.kind,
        "trials": len(records),
        "samples": sweep.samples,
        **counts,
        "failures": [
            {"trial": record.number, "reason": record.reason} for record in records if record.status == "failed"
        ],
        "updates": sweep.updates,
        "objectives": {measure.name: measure.mode for measure in sweep.measures},
        "baseline": _point(baseline, sweep),
        "best": _point(best_trial(records, sweep), sweep),
        "sparsest_as_good_as_baseline": _point(sparsest, sweep),
        "rate_ratio": _rate_ratio(sparsest, baseline),
        "pareto": [_point(record, sweep) for record in pareto_front(records, sweep)],
        "busy_slot_seconds": round(busy, 1),
        "slots": slots,
        "seconds": round(seconds, 1),
        "idle_share": round(max(0.0, 1 - busy / room), 4) if room else None,
        "seed": sweep.experiment.seed,
        "search_seed": sweep.seed,
        **{name: driver.get(name) for name in ("commit", "hardware", "date")},
    }


def front_table(records: Sequence[TrialRecord], sweep: SweepSpec) -> str:
    """The Pareto front and trial 0 as a table in Markdown."""
    chosen = pareto_front(records, sweep)
    shown = [*[record for record in records if record.number == 0 and record not in chosen], *chosen]
    quality = sweep.quality.name
    columns = ["trial", quality, f"test_{quality}", RATE.name, TIME.name, MACS.name, *searched(sweep.space)]
    lines = []
    for record in shown:
        row = trial_row(record, sweep)
        note = "" if record in chosen else " (not on the front)"
        lines.append([f"{record.number}{note}", *(_cell(row.get(name)) for name in columns[1:])])
    return markdown_table(columns, lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _point(record: TrialRecord | None, sweep: SweepSpec) -> dict[str, Any] | None:
    """A trial in the summary: its values and its measures."""
    if record is None:
        return None
    point = {"trial": record.number, "status": record.status, "values": _values(record, sweep)}
    return {**point, **_measures(record), "spec": _spec_name(record)}


def _values(record: TrialRecord, sweep: SweepSpec) -> dict[str, Any]:
    return {path: sweep.value(record.values, path) for path in searched(sweep.space)}


def _measures(record: TrialRecord) -> dict[str, Any]:
    return {name: value for name, value in record.metrics.items() if name != "update"}


def _rate_ratio(sparsest: TrialRecord | None, baseline: TrialRecord | None) -> float | None:
    """Activation rate of the sparsest trial that is as good as trial 0, over that of trial 0."""
    if sparsest is None or baseline is None or not baseline.metrics.get(RATE.name):
        return None
    return round(sparsest.metrics[RATE.name] / baseline.metrics[RATE.name], 4)


def _spec_name(record: TrialRecord) -> str:
    return f"{BEST}/trial_{record.name}.yaml"


def _with_origin(record: TrialRecord, sweep: SweepSpec) -> str:
    quality, metrics = sweep.quality.name, record.metrics
    measured = f"{quality} {metrics[quality]:.4f} at the rate {metrics[RATE.name]:.3f} in validation"
    try:
        return f"# Trial {record.number} of a sweep: {measured}.\n{dump_yaml(sweep.trial(record.values))}"
    except SpecError as error:
        raise CheckpointError(
            f"the record of trial {record.number} ({FOLDER}/{record.name}.json) does not fit its sweep: {error}"
        ) from error


def _write_tables(rows: Sequence[Mapping[str, Any]], storage: Storage) -> None:
    """All trials as CSV and as Parquet, with the same columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    plain = [{name: _plain(row.get(name)) for name in columns} for row in rows]
    writer.writerows(plain)
    storage.write(CSV, text.getvalue())
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({name: _column([row[name] for row in plain]) for name in columns}), buffer)
    storage.write(PARQUET, buffer.getvalue().to_pybytes())


def _plain(value: Any) -> Any:
    """A value for one cell: parts of specs become JSON."""
    return json.dumps(value) if isinstance(value, dict | list | tuple) else value


def _column(values: list[Any]) -> Any:
    """A column of one type. Values of different types become strings."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])
