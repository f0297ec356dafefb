"""What the driver does at every report: keep it, and show it."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from rich.console import Console
from rich.live import Live
from rich.table import Table

from sma.tune.records import CLOCK, TrialRecord
from sma.tune.storage import Storage
from sma.tune.sweep import OPERATIONS, RATE, TIME, SweepSpec


class Recorder(tune.Callback):
    """Writes the record of a trial at everything that happens to it, and the seconds that the sweep has taken.

    Args:
        sweep: the sweep.
        storage: its folder.
        records: of the trials that there were.
        began: when this driver started its cluster, by `time.time`.
        progress: show a table on a terminal, a line per trial elsewhere.
    """

    def __init__(self, sweep: SweepSpec, storage: Storage, records: Sequence[TrialRecord], began: float, progress: bool) -> None:
        self.sweep, self.storage, self.began, self.progress = sweep, storage, began, progress
        self.records = {record.number: record for record in records}
        self.clock: dict[str, float] = storage.read_json(CLOCK) or {}
        self.live: Live | None = None

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial runs."""
        self._keep(self._record(trial))

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        """An evaluation, the end, or a failure of its own."""
        record = self._record(trial)
        record.status, record.reason = result["status"], result["reason"]
        record.metrics, record.history, record.node = result["metrics"], result["history"], result["host"]
        record.busy[f"{result['began']:.3f} {result['process']}"] = round(result["busy"], 3)
        self._keep(record)

    def on_checkpoint(self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: Any, **info: Any) -> None:
        """A run folder was stored."""
        record = self._record(trial)
        record.checkpoint = self.storage.relative(checkpoint.path)
        self._keep(record)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Its process died, and it gets another."""
        record = self._record(trial)
        record.restarts += 1
        self._keep(record)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """It ended; one that is still running by its own account was stopped."""
        record = self._record(trial)
        if record.status == "running":
            record.status = "stopped"
        self._keep(record)
        self._say(record)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Its process died too often."""
        record = self._record(trial)
        record.status, record.reason = "failed", _last_words(trial, self.sweep.restarts)
        self._keep(record)
        self._say(record)

    def __enter__(self) -> "Recorder":
        """Open the table."""
        if self.progress and sys.stderr.isatty():
            self.live = Live(self._table(), console=Console(stderr=True), refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the table as it is."""
        self._tick()
        if self.live is not None:
            self.live.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Ray keeps a copy of its callbacks; the terminal cannot be a part of it."""
        return {**self.__dict__, "live": None}

    def _record(self, trial: Trial) -> TrialRecord:
        number = trial.config["number"]
        if number not in self.records:
            self.records[number] = TrialRecord(number, trial.config["values"], self.sweep.experiment.seed)
        return self.records[number]

    def _keep(self, record: TrialRecord) -> None:
        record.save(self.storage)
        self._tick()
        if self.live is not None:
            self.live.update(self._table())

    def _tick(self) -> None:
        self.clock[f"{self.began:.3f}"] = round(time.time() - self.began, 3)
        self.storage.write_json(CLOCK, self.clock)

    def _say(self, record: TrialRecord) -> None:
        if self.progress and self.live is None:
            done = sum(other.status != "running" for other in self.records.values())
            words = "  ".join(row for row in _cells(record, self.sweep) if row)
            print(f"{done} of {self.sweep.samples}: trial {words}", file=sys.stderr, flush=True)

    def _table(self) -> Table:
        return trial_table(self.records.values(), self.sweep)


def trial_table(records: Iterable[TrialRecord], sweep: SweepSpec) -> Table:
    """All trials as a table for a terminal."""
    table = Table()
    for name in ("trial", "status", "updates", sweep.quality.name, "rate", "µs/token", "operations/token", "values"):
        table.add_column(name, overflow="fold")
    for record in sorted(records, key=lambda record: record.number):
        table.add_row(*_cells(record, sweep))
    return table


def describe_values(record: TrialRecord) -> str:
    """What a trial changes, with the ends of the paths."""
    return ", ".join(f"{short_name(path)}={_number(value)}" for path, value in record.values.items()) or "the experiment as it is"


def short_name(path: str) -> str:
    """The end of a path, with what it belongs to."""
    return ".".join(path.split(".")[-2:])


def _cells(record: TrialRecord, sweep: SweepSpec) -> list[str]:
    metrics = record.metrics
    numbers = [
        f"{metrics[name]:{style}}" if metrics.get(name) is not None else ""
        for name, style in ((sweep.quality.name, ".4f"), (RATE.name, ".3f"), (TIME.name, ".1f"), (OPERATIONS.name, ",.0f"))
    ]
    what = describe_values(record) + (f" ({record.reason})" if record.reason else "")
    return [str(record.number), record.status, f"{record.update:,} / {sweep.updates:,}", *numbers, what]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _last_words(trial: Trial, restarts: int) -> str:
    """Why Ray gave a trial up, in one line."""
    error = trial.get_error()
    times = f"its process died {restarts + 1} times" if restarts else "its process died"
    if isinstance(error, ray.exceptions.RayActorError) or error is None:
        return f"{times}: {' '.join(str(error or 'no reason known').split())[:500]}"
    return " ".join(f"{times}: {type(error).__name__}: {error}".split())[:500]
