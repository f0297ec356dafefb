"""What the driver does at every report: keep it, and show it."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sma.tune.records import CLOCK, TrialRecord
from sma.tune.storage import Storage
from sma.tune.sweep import RATE, SweepSpec


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
            console = Console(stderr=True)
            self.live = Live(self._table(console), console=console, refresh_per_second=2)
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
            self.live.update(self._table(self.live.console))

    def _tick(self) -> None:
        self.clock[f"{self.began:.3f}"] = round(time.time() - self.began, 3)
        self.storage.write_json(CLOCK, self.clock)

    def _say(self, record: TrialRecord) -> None:
        if self.progress and self.live is None:
            done = sum(other.status != "running" for other in self.records.values())
            words = "  ".join(cell for cell in _cells(record, self.sweep) if cell)
            print(f"{done} of {self.sweep.samples}: trial {words}", file=sys.stderr, flush=True)

    def _table(self, console: Console) -> Table:
        return trial_table(self.records.values(), self.sweep, console.height - FRAME)


FRAME = 4
"""Lines of the table that are no trials, and one for the cursor."""


def trial_table(records: Iterable[TrialRecord], sweep: SweepSpec, rows: int) -> Table:
    """The trials that run, the best and the latest as a table for a terminal.

    Args:
        records: all trials.
        sweep: the sweep.
        rows: how many there is room for.
    """
    known = sorted(records, key=lambda record: record.number)
    shown = _most_telling(known, sweep, rows)
    counts = {status: sum(record.status == status for record in known) for status in ("running", "finished", "stopped", "failed")}
    words = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    title = f"{sweep.samples} trials of {sweep.updates:,} updates: {words or 'none yet'}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    names = ["trial", "status", "update", sweep.quality.name.replace("_per_", "/"), "rate"]
    lines = [_cells(record, sweep) for record in shown]
    for place, name in enumerate(names):
        # Of a given width, because rich takes the room that is missing from all columns without one, down to nothing.
        width = max(map(len, [name, *(cells[place] for cells in lines)]))
        table.add_column(name, width=width, justify="left" if name == "status" else "right")
    table.add_column("values")
    for *cells, values in lines:
        table.add_row(*cells, Text(values, no_wrap=True, overflow="ellipsis"))
    if len(shown) < len(known):
        table.add_row("…", f"{len(known) - len(shown)} more")
    return table


def _most_telling(records: Sequence[TrialRecord], sweep: SweepSpec, rows: int) -> list[TrialRecord]:
    """As many trials as there is room for: first those that run, then the best, then the latest."""
    running = [record for record in records if record.status == "running"]
    others = [record for record in records if record.status != "running"]
    if len(records) <= rows:
        return [*running, *others]
    room = max(1, rows - 1)  # a line says that there are more
    finished = [record for record in others if record.status == "finished"]
    best = sorted(finished, key=lambda record: sweep.quality.oriented(record.metrics))[: max(0, room - len(running) + 1) // 2]
    latest = sorted((record for record in others if record not in best), key=lambda record: max(record.busy, default=""), reverse=True)
    return [*running, *best, *latest][:room]


def describe_values(record: TrialRecord) -> str:
    """What a trial changes, with the ends of the paths."""
    ends = Counter(_end(path, 1) for path in record.values)
    names = {path: _end(path, 1 if ends[_end(path, 1)] == 1 else 2) for path in record.values}
    return ", ".join(f"{names[path]}={_number(value)}" for path, value in record.values.items()) or "the experiment as it is"


def _end(path: str, steps: int) -> str:
    return ".".join(path.split(".")[-steps:])


def _cells(record: TrialRecord, sweep: SweepSpec) -> list[str]:
    measures = [(sweep.quality.name, ".4f"), (RATE.name, ".3f")]
    numbers = [f"{record.metrics[name]:{style}}" if name in record.metrics else "" for name, style in measures]
    values = f"{record.reason} ({describe_values(record)})" if record.reason else describe_values(record)
    return [str(record.number), record.status, f"{record.update:,}", *numbers, values]


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _last_words(trial: Trial, restarts: int) -> str:
    """Why Ray gave a trial up, in one line."""
    error = trial.get_error()
    times = f"its process died {restarts + 1} times" if restarts else "its process died"
    if isinstance(error, ray.exceptions.RayActorError) or error is None:
        return f"{times}: {' '.join(str(error or 'no reason known').split())[:500]}"
    return " ".join(f"{times}: {type(error).__name__}: {error}".split())[:500]
