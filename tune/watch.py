"""What the driver does at every report: keep it, and show it.

Not by Ray's `CLIReporter`, which lists the trials of this driver alone, and no trial that an interrupted sweep has
finished; ranks them by one metric; and prints its table anew each time, whatever the height of the terminal.
"""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.tune.experiment import Trial
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sma.errors import SmaError
from sma.tune.folder import SWEEP, check_same
from sma.tune.pulse import Listener, forget_pulses
from sma.tune.records import TrialRecord, load_clock, save_clock
from sma.tune.storage import Storage
from sma.tune.sweep import RATE, SweepSpec
from sma.tune.trial import Unwritable

IDLE = 300.0
"""Seconds in which a process of a trial must come into being, at least."""


class Recorder(tune.Callback):
    """Writes the record of a trial at everything that happens to it, and the seconds that the sweep has taken; ends
    silent processes.

    Args:
        sweep: the sweep.
        storage: its folder.
        records: of the trials that there were.
        began: when this driver started its cluster, by `time.time`.
        progress: show a table on a terminal, a line per trial elsewhere.
        needs: what a trial gets, in words.

    Attributes:
        failure: why nothing more can be written or run; the sweep ends with it.
    """

    def __init__(
        self,
        sweep: SweepSpec,
        storage: Storage,
        records: Sequence[TrialRecord],
        began: float,
        progress: bool,
        needs: str = "CPUs",
    ) -> None:
        self.sweep, self.storage, self.began, self.progress, self.needs = sweep, storage, began, progress, needs
        self.records = {record.number: record for record in records}
        self.clock: dict[str, float] = load_clock(storage)
        self.live: Live | None = None
        self.failure: BaseException | None = None
        self.listener = Listener(sweep.silence)
        self._content = storage.read(SWEEP)
        self._prefix = f"sma-pulse/{os.getpid()}-{began:.3f}"
        self._silenced: set[int] = set()
        self._ran = time.monotonic()
        self._closed, self._lock = False, threading.RLock()

    def pulse_key(self, number: int) -> str:
        """Under which a trial leaves its signs of life."""
        return f"{self._prefix}/{number}"

    def look(self) -> None:
        """Raise what ended the sweep, for the main thread."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Write nothing more: the folder may soon be another process's."""
        with self._lock:
            self._closed = True

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Several times a second: look after the folder and the processes."""
        if not self.listener.due:
            return
        self._guard(lambda: check_same(self.storage, self._content))
        actors = {trial: actor for trial in trials if (actor := trial.temporary_state.ray_actor) is not None}
        if actors or all(trial.is_finished() for trial in trials):
            self._ran = time.monotonic()
        elif time.monotonic() - self._ran > (limit := max(IDLE, self.sweep.silence)):
            self._fail(
                SmaError(
                    f"no machine of the cluster has taken up a trial for {limit:g} s; "
                    f"are there {self.needs} left on one?"
                )
            )
        for trial, actor in actors.items():
            number = trial.config["number"]
            if self.listener.silent(self.pulse_key(number), actor._actor_id):
                self._silenced.add(number)
                self.listener.restart(self.pulse_key(number))
                ray.kill(actor)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial runs."""
        self._keep(self._record(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """An evaluation, the end, or a failure of its own."""
        record = self._record(trial)
        self._silenced.discard(record.number)
        record.status, record.reason = result["status"], result["reason"]
        record.metrics, record.history, record.node = result["metrics"], result["history"], result["host"]
        record.busy[f"{result['began']:.3f} {result['process']}"] = round(result["busy"], 3)
        if record.status == "running" and result.get("done"):
            record.status = "stopped"  # by halving, which has decided already
        self._keep(record)

    def on_checkpoint(self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: Any, **info: Any) -> None:
        """A run folder was stored."""
        record = self._record(trial)
        record.checkpoint = self.storage.relative(checkpoint.path)
        self._keep(record)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Its process died, and it gets another."""
        record = self._record(trial)
        self._check_cause(trial)
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
        cause = self._check_cause(trial)
        record.status, record.reason = "failed", self._last_words(record, cause)
        self._keep(record)
        self._say(record)

    def __enter__(self) -> "Recorder":
        """Open the table."""
        if self.progress and sys.stderr.isatty():
            console = Console(stderr=True)
            self.live = Live(self._table(console), console=console, refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Leave the table as it is."""
        with suppress(SmaError):  # where it cannot be written, that is known
            self._tick()
        self.close()
        if kind is None:  # otherwise the cluster may be lost, and would be waited for
            forget_pulses(map(self.pulse_key, self.records))
        if self.live is not None:
            self.live.stop()

    def __getstate__(self) -> dict[str, Any]:
        """Ray keeps a copy of its callbacks; the terminal cannot be a part of it."""
        own = {"live": None, "_lock": None, "listener": None, "failure": None}
        return {**self.__dict__, **own}

    def _record(self, trial: Trial) -> TrialRecord:
        number = trial.config["number"]
        if number not in self.records:
            self.records[number] = TrialRecord(number, trial.config["values"], self.sweep.experiment.seed)
        return self.records[number]

    def _keep(self, record: TrialRecord) -> None:
        def write() -> None:
            # What was removed must not come into being again, with this record alone.
            check_same(self.storage, self._content)
            record.save(self.storage)

        self._guard(write)
        self._tick()
        if self.live is not None:
            self.live.update(self._table(self.live.console))

    def _tick(self) -> None:
        self.clock[f"{self.began:.3f}"] = round(time.time() - self.began, 3)
        self._guard(lambda: save_clock(self.storage, self.clock))

    def _guard(self, write: Callable[[], object]) -> None:
        """Do something with the folder, if it is this driver's still; what goes wrong ends the sweep."""
        with self._lock:
            if self._closed or self.failure is not None:
                return
            try:
                write()
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        raise error

    def _check_cause(self, trial: Trial) -> BaseException | str | None:
        """Why a process died; storage that nobody can write is no fault of the trial, which the sweep would only try
        again.

        Raises:
            Unwritable: that is why.
        """
        cause = cause_of(trial)
        if isinstance(cause, Unwritable):
            self._fail(cause)
        return cause

    def _last_words(self, record: TrialRecord, cause: BaseException | str | None) -> str:
        """Why a trial was given up, in one line."""
        times = f"its process died {record.restarts + 1} times" if record.restarts else "its process died"
        if record.number in self._silenced:
            return f"{times}, the last time because it gave no sign of life for {self.sweep.silence:g} s (--silence)"
        if cause is None:
            return f"{times}, and Ray kept no reason"
        words = cause if isinstance(cause, str) else f"{type(cause).__name__}: {cause}"
        return f"{times}: {' '.join(words.split())[:500]}"

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
    counts = {
        status: sum(record.status == status for record in known)
        for status in ("running", "finished", "stopped", "failed")
    }
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
    best = sorted(finished, key=lambda record: sweep.quality.oriented(record.metrics))[
        : max(0, room - len(running) + 1) // 2
    ]
    latest = sorted(
        (record for record in others if record not in best),
        key=lambda record: max(record.busy, default=""),
        reverse=True,
    )
    return [*running, *best, *latest][:room]


def describe_values(record: TrialRecord) -> str:
    """What a trial changes, with the ends of the paths."""
    ends = Counter(_end(path, 1) for path in record.values)
    names = {path: _end(path, 1 if ends[_end(path, 1)] == 1 else 2) for path in record.values}
    return (
        ", ".join(f"{names[path]}={_number(value)}" for path, value in record.values.items())
        or "the experiment as it is"
    )


def _end(path: str, steps: int) -> str:
    return ".".join(path.split(".")[-steps:])


def _cells(record: TrialRecord, sweep: SweepSpec) -> list[str]:
    measures = [(sweep.quality.name, ".4f"), (RATE.name, ".3f")]
    numbers = [f"{record.metrics[name]:{style}}" if name in record.metrics else "" for name, style in measures]
    values = f"{record.reason} ({describe_values(record)})" if record.reason else describe_values(record)
    return [str(record.number), record.status, f"{record.update:,}", *numbers, values]


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def cause_of(trial: Trial) -> BaseException | str | None:
    """Why the process of a trial died the last time, from the files in which Ray keeps it on this machine; None where
    there are none.
    """
    with suppress(Exception):
        error = cloudpickle.loads(Path(trial.pickled_error_file or "").read_bytes())
        if isinstance(error, ray.exceptions.RayTaskError):
            return error.cause if isinstance(error.cause, BaseException) else str(error.cause)
        if isinstance(error, ray.exceptions.RayActorError):
            text = str(error)
            return text[max(0, text.find("The actor is dead because")) :]
        if isinstance(error, BaseException):
            return error
    with suppress(Exception):
        lines = Path(trial.error_file or "").read_text(encoding="utf-8").split("\n")
        return next(line for line in reversed(lines) if line.strip())
    return None
