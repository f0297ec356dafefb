"""The driver's callback: records every report, and shows a table of the trials.

Ray's `CLIReporter` is not used. It omits the trials of earlier drivers of a resumed sweep, ranks trials by one metric,
and prints the whole table again at every report.
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
from sma.tune.pulse import Listener, forget_pulses
from sma.tune.records import TrialRecord, clock_key, load_clock, save_clock
from sma.tune.storage import Storage
from sma.tune.sweep import RATE, SweepSpec
from sma.tune.sweep_folder import SWEEP, check_same
from sma.tune.trial import Unwritable

IDLE = 300.0
"""Minimum timeout for the start of the process of a trial, in seconds."""


class Recorder(tune.Callback):
    """Writes the record of a trial at every event, and the duration of the sweep; kills processes without heartbeats.

    Args:
        sweep: the sweep.
        storage: its folder.
        records: records of earlier trials.
        began: time at which this driver started its cluster, by `time.time`.
        progress: whether to show a table on a terminal, or elsewhere a line per trial.
        needs: resources of a trial as text, for error messages.

    Attributes:
        failure: the error that ends the sweep, or None.
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
        """The key of the heartbeats of a trial."""
        return f"{self._prefix}/{number}"

    def look(self) -> None:
        """Raise the error that ended the sweep, in the main thread."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Stop writing, because another process may soon hold the lock of the folder."""
        with self._lock:
            self._closed = True

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Check the folder and the heartbeats, several times a second."""
        if not self.listener.due:
            return
        self._guard(lambda: check_same(self.storage, self._content))
        actors = {trial: actor for trial in trials if (actor := trial.temporary_state.ray_actor) is not None}
        if actors or all(trial.is_finished() for trial in trials):
            self._ran = time.monotonic()
        elif time.monotonic() - self._ran > (limit := max(IDLE, self.sweep.silence)):
            self._fail(
                SmaError(
                    f"no machine of the cluster has started a trial for {limit:g} s; "
                    f"make sure that one has {self.needs} free, and resume with --resume"
                )
            )
        for trial, actor in actors.items():
            number = trial.config["number"]
            if self.listener.silent(self.pulse_key(number), actor._actor_id):
                self._silenced.add(number)
                self.listener.restart(self.pulse_key(number))
                ray.kill(actor)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record the start of a trial."""
        self._keep(self._record(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an evaluation, the end, or a failure of a trial."""
        record = self._record(trial)
        self._silenced.discard(record.number)
        record.status, record.reason = result["status"], result["reason"]
        record.metrics, record.history, record.node = result["metrics"], result["history"], result["host"]
        record.busy[f"{result['began']:.3f} {result['process']}"] = round(result["busy"], 3)
        if record.status == "running" and result.get("done"):
            record.status = "stopped"  # by halving
        self._keep(record)

    def on_checkpoint(self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: Any, **info: Any) -> None:
        """Record the location of a stored run folder."""
        record = self._record(trial)
        record.checkpoint = self.storage.relative(checkpoint.path)
        self._keep(record)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record the restart of a trial whose process died."""
        record = self._record(trial)
        self._check_cause(trial)
        record.restarts += 1
        self._keep(record)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record the end of a trial. It was stopped if its last report has the status `running`."""
        record = self._record(trial)
        if record.status == "running":
            record.status = "stopped"
        self._keep(record)
        self._print_line(record)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record the failure of a trial whose process died more often than `restarts` allows."""
        record = self._record(trial)
        cause = self._check_cause(trial)
        record.status, record.reason = "failed", self._reason(record, cause)
        self._keep(record)
        self._print_line(record)

    def __enter__(self) -> "Recorder":
        """Open the table."""
        if self.progress and sys.stderr.isatty():
            console = Console(stderr=True)
            self.live = Live(self._table(console), console=console, refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Write the duration, and stop updating the table."""
        with suppress(SmaError):  # the error is already in `failure`
            self._tick()
        self.close()
        if kind is None:  # otherwise the cluster may be lost, and the call would block
            forget_pulses(map(self.pulse_key, self.records))
        if self.live is not None:
            self.live.stop()

    def __getstate__(self) -> dict[str, Any]:
        """The state for the copy that Ray pickles, without the terminal, the lock and the listener."""
        own = {"live": None, "_lock": None, "listener": None, "failure": None}
        return {**self.__dict__, **own}

    def _record(self, trial: Trial) -> TrialRecord:
        number = trial.config["number"]
        if number not in self.records:
            self.records[number] = TrialRecord(number, trial.config["values"], self.sweep.experiment.seed)
        return self.records[number]

    def _keep(self, record: TrialRecord) -> None:
        def write() -> None:
            # A removed folder must not be created again with this record alone.
            check_same(self.storage, self._content)
            record.save(self.storage)

        self._guard(write)
        self._tick()
        if self.live is not None:
            self.live.update(self._table(self.live.console))

    def _tick(self) -> None:
        self.clock[clock_key(self.began)] = round(time.time() - self.began, 3)
        self._guard(lambda: save_clock(self.storage, self.clock))

    def _guard(self, write: Callable[[], object]) -> None:
        """Call a function that accesses the folder, unless the driver has stopped writing. An error ends the sweep."""
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
        """The cause of the death of a process.

        Raises:
            Unwritable: the storage cannot be written, which a restart of the trial would only repeat.
        """
        cause = cause_of(trial)
        if isinstance(cause, Unwritable):
            self._fail(cause)
        return cause

    def _reason(self, record: TrialRecord, cause: BaseException | str | None) -> str:
        """The reason of the failure of a trial whose process died, in one line."""
        times = f"its process died {record.restarts + 1} times" if record.restarts else "its process died"
        if record.number in self._silenced:
            return f"{times}, the last time because it had no heartbeat for {self.sweep.silence:g} s (--silence)"
        if cause is None:
            return f"{times}, and Ray kept no reason"
        text = cause if isinstance(cause, str) else f"{type(cause).__name__}: {cause}"
        return f"{times}: {' '.join(text.split())[:500]}"

    def _print_line(self, record: TrialRecord) -> None:
        if self.progress and self.live is None:
            done = sum(other.status != "running" for other in self.records.values())
            cells = "  ".join(cell for cell in _cells(record, self.sweep) if cell)
            print(f"{done} of {self.sweep.samples}: trial {cells}", file=sys.stderr, flush=True)

    def _table(self, console: Console) -> Table:
        return trial_table(self.records.values(), self.sweep, console.height - FRAME)


FRAME = 4
"""Number of lines besides the trials: those of the table's frame, and one for the cursor."""


def trial_table(records: Iterable[TrialRecord], sweep: SweepSpec, rows: int) -> Table:
    """The table of the running, the best and the latest trials for a terminal.

    Args:
        records: all trials.
        sweep: the sweep.
        rows: maximum number of trials.
    """
    known = sorted(records, key=lambda record: record.number)
    shown = _select_rows(known, sweep, rows)
    counts = {
        status: sum(record.status == status for record in known)
        for status in ("running", "finished", "stopped", "failed")
    }
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    title = f"{sweep.samples} trials of {sweep.updates:,} updates: {summary or 'none yet'}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    names = ["trial", "status", "update", sweep.quality.name.replace("_per_", "/"), "rate"]
    lines = [_cells(record, sweep) for record in shown]
    for column, name in enumerate(names):
        # With a fixed width, because rich shrinks all columns without one if the terminal is too narrow.
        width = max(map(len, [name, *(cells[column] for cells in lines)]))
        table.add_column(name, width=width, justify="left" if name == "status" else "right")
    table.add_column("values")
    for *cells, values in lines:
        table.add_row(*cells, Text(values, no_wrap=True, overflow="ellipsis"))
    if len(shown) < len(known):
        table.add_row("…", f"{len(known) - len(shown)} more")
    return table


def _select_rows(records: Sequence[TrialRecord], sweep: SweepSpec, rows: int) -> list[TrialRecord]:
    """At most `rows` trials: first the running ones, then the best, then the latest."""
    running = [record for record in records if record.status == "running"]
    others = [record for record in records if record.status != "running"]
    if len(records) <= rows:
        return [*running, *others]
    room = max(1, rows - 1)  # the last line shows the number of the other trials
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
    """The values that a trial changes, with the last parts of their paths."""
    ends = Counter(_end(path, 1) for path in record.values)
    names = {path: _end(path, 1 if ends[_end(path, 1)] == 1 else 2) for path in record.values}
    return (
        ", ".join(
            f"{names[path]}={value:.3g}" if isinstance(value, float) else f"{names[path]}={value}"
            for path, value in record.values.items()
        )
        or "the unchanged experiment"
    )


def _end(path: str, steps: int) -> str:
    return ".".join(path.split(".")[-steps:])


def _cells(record: TrialRecord, sweep: SweepSpec) -> list[str]:
    measures = [(sweep.quality.name, ".4f"), (RATE.name, ".3f")]
    numbers = [f"{record.metrics[name]:{style}}" if name in record.metrics else "" for name, style in measures]
    values = f"{record.reason} ({describe_values(record)})" if record.reason else describe_values(record)
    return [str(record.number), record.status, f"{record.update:,}", *numbers, values]


def cause_of(trial: Trial) -> BaseException | str | None:
    """The cause of the last death of a trial's process, from Ray's files on this machine; None if there are none."""
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
