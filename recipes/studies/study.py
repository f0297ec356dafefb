"""Studies: many runs of one experiment, and one table.

The folder of a study holds the folders of the runs; `table.md`, `table.csv` and `summary.json` are written after
every run.
"""

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sma.errors import SmaError
from sma.recipes.io.claims import run_lock
from sma.recipes.io.command import resuming
from sma.recipes.io.names import plain
from sma.recipes.io.run_folder import SUMMARY, read_checked, write_text
from sma.recipes.reports.results import metric_of, over_seeds
from sma.recipes.reports.table import comma_separated, markdown
from sma.recipes.studies.contract import Asked, Begun, Options, Study, StudyOptions
from sma.recipes.studies.folder import begin, read_study, refuse_changes
from sma.recipes.studies.grid import ERROR, LOG, Results, Run, run_grid
from sma.recipes.tasks.contract import TaskData
from sma.recipes.training.options import CallOptions
from sma.recipes.training.start import check_fits

TABLE, VALUES = "table.md", "table.csv"


def run_study(study: Study[Options, Asked], options: Options) -> dict[str, Any]:
    """Train the unfinished runs, and write the table and the summary after every run; returns the summary.

    Raises:
        SmaError: a name is unknown, the folder has other content, or runs failed; the message is for the user.
    """
    if options.resume is not None:
        refuse_changes(study, options)
    summary, failures, out = conduct(study, options)
    refuse_failures(failures, out, options)
    return summary


def refuse_failures(failures: Sequence[str], out: Path, options: StudyOptions) -> None:
    """Raise one error that lists the failed runs.

    Args:
        failures: names of the failed runs; without any, nothing is raised.
        out: folder of the study.
        options: options of the command, for the resuming command.

    Raises:
        SmaError: a run failed.
    """
    if failures:
        command = resuming(options, out)
        count = "1 run" if len(failures) == 1 else f"{len(failures)} runs"
        raise SmaError(
            f"{count} failed: {', '.join(failures)}; {ERROR} in the folder of each holds the reason, {LOG} the "
            f"traceback, and {command} tries again"
        )


def conduct(study: Study[Options, Asked], options: Options) -> tuple[dict[str, Any], list[str], Path]:
    """Run a study; returns its summary, the names of the failed runs, and its folder.

    Raises:
        SmaError: the command fails; the message is for the user.
    """
    with begin(study, options) as begun:
        spec, chosen, now, out = begun
        check_fits(spec, options)
        data = spec.task.prepare(options.data, progress=options.progress)
        runs = study.runs(spec, chosen, data, out, options.accelerator)
        only = [run.name for run in runs if study.selects(run, now)]
        left = sum(not (out / name / SUMMARY).is_file() for name in only)
        count = "1 run" if len(only) == 1 else f"{len(only)} runs"
        print(f"{spec.task.kind}: {count}, {left} to do, {options.jobs} at a time -> {plain(out)}", flush=True)
        return *_fill(study, begun, data, runs, only, options, options.jobs), out


def report_study(study: Study[Any, Asked], out: Path, options: CallOptions) -> dict[str, Any]:
    """Write the table, the figures and the summary of a study again, from its finished runs; returns the summary.

    Raises:
        SmaError: the command fails; the message is for the user.
    """
    with run_lock(out):
        spec, chosen = read_study(study, out)
        data = spec.task.prepare(options.data, progress=options.progress)
        runs = study.runs(spec, chosen, data, out, options.accelerator)
        return _fill(study, Begun(spec, chosen, chosen, out), data, runs, [], options, 0)[0]


def _fill(
    study: Study[Any, Asked],
    begun: Begun[Asked],
    data: TaskData,
    runs: Sequence[Run],
    only: Sequence[str],
    options: CallOptions,
    jobs: int,
) -> tuple[dict[str, Any], list[str]]:
    """Train some runs of a study, write and print its results; returns its summary and the names of the failed runs."""
    out = begun.out
    clock = _Clock(out, min(jobs, sum(not (out / name / SUMMARY).is_file() for name in only)))
    if not only:
        clock.stop()
    write = partial(_write, study, begun.chosen, out, clock)
    results = run_grid(
        runs,
        out,
        data,
        cache=options.data,
        accelerator=options.accelerator,
        jobs=max(1, jobs),
        progress=options.progress,
        only=only,
        write=write,
    )
    clock.stop()
    more = study.conclude(write(results), begun, data) if results.rows else {}
    summary = write(results, more)
    print(f"\n{markdown(study.table(summary))}")
    files = {TABLE: "table", VALUES: "values", SUMMARY: "summary", **dict.fromkeys(study.figures, "figure")}
    for name, what in files.items():
        if (out / name).is_file():
            print(f"{what:<8} {plain(out / name)}")
    return summary, results.failures


def _write(
    study: Study[Any, Asked],
    chosen: Asked,
    out: Path,
    clock: "_Clock",
    results: Results,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    summary = {**results.facts, **clock.read(), "rows": results.rows, "failed": results.failed}
    summary |= study.summarise(results, chosen, out)
    summary |= {"spread": over_seeds(summary["rows"], metric_of(summary)), **(more or {})}
    table = study.table(summary)
    for name, text in (
        (TABLE, markdown(table)),
        (VALUES, comma_separated(table)),
        (SUMMARY, json.dumps(summary, indent=1)),
    ):
        write_text(out / name, text)
    return summary


class _Clock:
    """The total time of the runs of a study, including that of earlier commands.

    Args:
        out: the folder of the study.
        jobs: number of concurrent runs.
    """

    def __init__(self, out: Path, jobs: int) -> None:
        self._started = time.perf_counter()
        self._stopped: float | None = None
        earlier: dict[str, Any] = {}
        if (out / SUMMARY).exists():
            hint = "delete it to restart the count of time"
            earlier = read_checked(out / SUMMARY, _is_summary, "the summary of a study", hint)
        # Summaries of earlier versions may lack both.
        self._seconds = earlier.get("seconds", 0.0)
        self._jobs = max(earlier.get("jobs", 1), jobs)

    def stop(self) -> None:
        """Stop the clock."""
        self._stopped = self._stopped or time.perf_counter()

    def read(self) -> dict[str, Any]:
        """Total seconds, and the maximum number of concurrent runs."""
        until = time.perf_counter() if self._stopped is None else self._stopped
        return {"jobs": self._jobs, "seconds": round(self._seconds + until - self._started, 1)}


def _is_summary(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("seconds", 0.0), int | float)
        and type(value.get("jobs", 1)) is int
    )
