"""Grids of runs, sequential or concurrent; a failed run does not stop the others."""

import os
import signal
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from sma.errors import CheckpointError, SmaError, SpecError
from sma.files import read_file
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.names import plain
from sma.recipes.io.processes import Processes
from sma.recipes.io.run_folder import EXPERIMENT, LIMIT, SUMMARY, read_summary, refuse_another, write_text
from sma.recipes.reports.results import Failure, Row, layer_rates
from sma.recipes.tasks.contract import ClassificationTask, Metric, TaskData, TaskSpec
from sma.stats import count_macs
from sma.streams import make_tolerant

ERROR, LOG = "error.txt", "log.txt"
"""The files of a failed run: the reason on one line, and its output with the traceback."""

SHARED, OPTIONAL = ("task", "data"), ("chance", "majority")
ORIGIN = ("commit", "hardware", "date")
"""Provenance that a study records once for all its runs."""

NEEDED = ("activation_rates", "tokens_per_second", "seconds", "parameters", "updates")
"""Entries of a run's summary in its row, besides the metric of the task."""

Experiment = ExperimentSpec | Callable[[Mapping[str, Row]], ExperimentSpec]


@dataclass(frozen=True)
class Run:
    """A run of a study.

    Attributes:
        name: its subfolder in the folder of the study.
        variant: name of the variant.
        seed: seed of the experiment.
        experiment: the experiment, or a function that makes it from the finished rows by name.
        needs: names of the runs whose rows this function reads; they precede this run in the grid.
        column: part of the table that has the run, if there are several.
        title: start of the titles of the figures of the run; None draws no figures.
    """

    name: str
    variant: str
    seed: int
    experiment: Experiment
    needs: tuple[str, ...] = ()
    column: str | None = None
    title: str | None = None

    @property
    def labels(self) -> dict[str, Any]:
        """The labels of the run in a summary."""
        column = {} if self.column is None else {"column": self.column}
        return {"name": self.name, **column, "variant": self.variant, "seed": self.seed}


class Results(NamedTuple):
    """The contents of the folders of a grid.

    Attributes:
        rows: rows of the finished runs, in the order of the grid.
        failed: the failed runs, in the order of the grid.
        tried: names of the runs selected for training.
        facts: common facts of all runs, see `sma.recipes.reports.results.Summary`.
    """

    rows: list[Row]
    failed: list[Failure]
    tried: list[str]
    facts: dict[str, Any]

    @property
    def failures(self) -> list[str]:
        """Names of the failed runs among those selected."""
        return [run["name"] for run in self.failed if run["name"] in self.tried]


class Trainer(Protocol):
    """Trains or resumes an experiment in a folder, and writes its summary."""

    def __call__(
        self,
        spec: ExperimentSpec,
        folder: Path,
        data: TaskData,
        *,
        accelerator: str,
        progress: bool,
        title: str | None,
    ) -> object:
        """Train, test, and write `summary.json`, which marks the run as finished."""


def train(
    spec: ExperimentSpec, folder: Path, data: TaskData, *, accelerator: str, progress: bool, title: str | None
) -> None:
    """Train an experiment, or resume it from its last checkpoint."""
    # Lightning takes seconds to import, which --help does not need.
    from sma.recipes.training.run import run_experiment

    run_experiment(spec, folder, data, resume=True, accelerator=accelerator, progress=progress, title=title)


def run_grid(
    runs: Sequence[Run],
    out: Path,
    data: TaskData,
    *,
    cache: Path,
    accelerator: str = "auto",
    jobs: int = 1,
    progress: bool = False,
    only: Collection[str] | None = None,
    write: Callable[[Results], object] = lambda results: None,
    trainer: Trainer = train,
) -> Results:
    """Train the unfinished runs of a grid, and resume the interrupted ones.

    A failed run does not stop the others. Its folder has the reason in `error.txt` and the traceback in `log.txt`. A
    run also fails if a run that it needs has failed, or is neither finished nor selected.

    Args:
        runs: the grid.
        out: folder of the study.
        data: data of their task, for runs in this process.
        cache: the data folder, for runs in other processes.
        accelerator: Lightning's name for the device: `auto`, `cpu`, `cuda`.
        jobs: number of concurrent runs, each in its own process; 1 trains in this process.
        progress: whether to show a bar, for runs in this process.
        only: names of the runs to train; other finished runs are listed. None: all.
        write: function called with the results at the start and after every run.
        trainer: an importable function that trains one run.

    Raises:
        CheckpointError: a folder holds a run of another experiment.
        SpecError: the runs have several tasks, or one needs a run that does not precede it.
    """
    grid = _Grid(runs, out, data, _check(runs, out))
    waiting = [run for run in runs if run.name not in grid.rows and (only is None or run.name in only)]
    grid.tried = [run.name for run in waiting]
    for name in grid.tried:
        (out / name / ERROR).unlink(missing_ok=True)
    write(grid.results())
    running: dict[str, Run] = {}
    with Processes(jobs) as processes:
        while waiting or running:
            left = {*running, *(run.name for run in waiting)}
            run = next((run for run in waiting if not left & {*run.needs}), None)
            if run is None or processes.full:
                name, code = processes.wait()
                _note_death(out / name, code)
                grid.note_end(running.pop(name))
                write(grid.results())
                continue
            waiting.remove(run)
            spec = _experiment(run, grid.rows, out)
            if spec is not None:
                size = f"{spec.model.num_parameters():,} parameters, {spec.training.updates:,} updates"
                print(f"{run.name}: {size} -> {plain(out / run.name)}", flush=True)
                if jobs > 1:
                    running[run.name] = run
                    processes.start(
                        run.name, _train_alone, trainer, spec, out / run.name, cache, accelerator, run.title
                    )
                    continue
                _train(trainer, spec, out / run.name, lambda: data, accelerator, run.title, progress)
            grid.note_end(run)
            write(grid.results())
    return grid.results()


class _Grid:
    """The rows of a grid, updated when a run ends."""

    def __init__(self, runs: Sequence[Run], out: Path, data: TaskData, task: TaskSpec) -> None:
        self.runs = runs
        self.out = out
        self.metric = task.metric
        self.length = _mean_length(task, data)
        self.samples = len(data.test)
        self.tried: list[str] = []
        self.ended = 0
        self.summaries: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, Row] = {}
        for run in runs:
            self._read(run)

    def note_end(self, run: Run) -> None:
        """Read the result of a run, and print it."""
        self._read(run)
        self.ended += 1
        print(f"[{self.ended}/{len(self.tried)}] {run.name}: {in_words(self.out / run.name, self.metric)}", flush=True)

    def results(self) -> Results:
        """The contents of the folders."""
        failed: list[Failure] = []
        for run in self.runs:
            if run.name not in self.rows and (reason := failure(self.out / run.name)) is not None:
                failed.append(cast(Failure, {**run.labels, "error": reason}))
        rows = [self.rows[run.name] for run in self.runs if run.name in self.rows]
        return Results(rows, failed, list(self.tried), self._facts(rows))

    def _facts(self, rows: Sequence[Row]) -> dict[str, Any]:
        summaries = [self.summaries[row["name"]] for row in rows]
        updates = {row["updates"] for row in rows}
        return {
            **{key: summaries[0][key] for key in (*SHARED, *OPTIONAL) if summaries and key in summaries[0]},
            "metric": self.metric._asdict(),
            "updates": updates.pop() if len(updates) == 1 else None,
            # Runs of different times can have different values.
            **{key: ", ".join(sorted({str(run.get(key)) for run in summaries})) for key in ORIGIN},
            "test_samples": self.samples,
            "length": self.length,
            "seeds": list(dict.fromkeys([self.runs[0].seed, *(row["seed"] for row in rows)])),
        }

    def _read(self, run: Run) -> None:
        folder = self.out / run.name
        if not (folder / SUMMARY).is_file():
            return
        found = read_summary(folder, *SHARED, self.metric.key, *NEEDED)
        spec = run.experiment if isinstance(run.experiment, ExperimentSpec) else load_experiment(folder / EXPERIMENT)
        rates = found["activation_rates"]
        layers = layer_rates(rates)
        self.summaries[run.name] = found
        row: dict[str, Any] = {
            **run.labels,
            self.metric.name: found[self.metric.key],
            "activation_rate": sum(layers) / len(layers) if layers else None,
            "rates": rates,
            "macs_per_token": count_macs(spec.model, self.length, rates).per_token,
            **{key: found[key] for key in ("tokens_per_second", "seconds", "parameters", "updates")},
        }
        self.rows[run.name] = cast(Row, row)


def failure(folder: Path) -> str | None:
    """Return why a run failed, on one line; None if it did not."""
    return (
        read_file(folder / ERROR, LIMIT, CheckpointError).decode(errors="replace")
        if (folder / ERROR).is_file()
        else None
    )


def in_words(folder: Path, metric: Metric = ClassificationTask.metric) -> str:
    """Return how a run ended."""
    if (reason := failure(folder)) is not None:
        return f"failed: {reason}"
    run = read_summary(folder, metric.key, "seconds")
    return f"{metric.headline(run[metric.key]).removeprefix('test ')} after {run['seconds']:.0f} s"


def _mean_length(task: TaskSpec, data: Any) -> int:
    """Mean number of positions of a test sample."""
    if (lengths := getattr(data.test, "lengths", None)) is not None:
        return max(1, round(float(lengths.double().mean())))
    # Lightning takes seconds to import, and is not needed if the data has lengths.
    from sma.recipes.training.objective import load_objective

    return load_objective(task, data).typical_row


def _check(runs: Sequence[Run], out: Path) -> TaskSpec:
    """Check a grid; returns its task."""
    before: set[str] = set()
    task: TaskSpec | None = None
    for run in runs:
        if missing := [name for name in run.needs if name not in before]:
            raise SpecError(f"the run {run.name!r} needs {missing[0]!r}, which must precede it in the grid")
        before.add(run.name)
        if not isinstance(run.experiment, ExperimentSpec):
            continue
        task = task or run.experiment.task
        if run.experiment.task != task:
            raise SpecError(
                f"the run {run.name!r} has the task {run.experiment.task} and the runs before it {task}; "
                "the runs of a grid must have one task"
            )
        task.check_trainable()
        _refuse_another(run.experiment, out / run.name)
    if task is None:
        raise SpecError("a grid needs at least one run whose experiment is given")
    return task


def _refuse_another(spec: ExperimentSpec, folder: Path) -> None:
    path = folder / EXPERIMENT
    if path.exists():
        refuse_another(load_experiment(path), spec, path, "give another --out, or delete it to run it again")


def _experiment(run: Run, rows: Mapping[str, Row], out: Path) -> ExperimentSpec | None:
    """Return the experiment of a run; None if it cannot be made, with the reason in its folder."""
    if isinstance(run.experiment, ExperimentSpec):
        return run.experiment
    try:
        if missing := [name for name in run.needs if name not in rows]:
            failed = failure(out / missing[0]) is not None
            raise SpecError(
                f"the run needs the results of {missing[0]!r}, which "
                + ("failed" if failed else f"was not trained; train {missing[0]!r} too")
            )
        spec = run.experiment({name: rows[name] for name in run.needs})
        _refuse_another(spec, out / run.name)
    except SmaError as error:
        write_text(out / run.name / ERROR, _on_one_line(error))
        return None
    return spec


def _train_alone(
    trainer: Trainer, spec: ExperimentSpec, folder: Path, cache: Path, accelerator: str, title: str | None
) -> None:
    """Train in a separate process with its output in the folder, because lines of concurrent runs would be mixed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    make_tolerant()
    _train(trainer, spec, folder, lambda: spec.task.prepare(cache, progress=False), accelerator, title)


def _train(
    trainer: Trainer,
    spec: ExperimentSpec,
    folder: Path,
    data: Callable[[], TaskData],
    accelerator: str,
    title: str | None,
    progress: bool = False,
) -> None:
    try:
        trainer(spec, folder, data(), accelerator=accelerator, progress=progress, title=title)
    except Exception as error:  # any exception: the other runs continue
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG).open("a", encoding="utf-8", errors="backslashreplace") as log:
            traceback.print_exc(file=log)
        write_text(folder / ERROR, _on_one_line(error))


def _note_death(folder: Path, code: int) -> None:
    """Write the reason of a process that ended without writing it."""
    if code and not (folder / ERROR).is_file():
        name = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        write_text(folder / ERROR, f"ended {name}")


def _on_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
