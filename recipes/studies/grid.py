"""Many runs, one at a time or side by side; one that fails does not stop the others."""

import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from sma.errors import CheckpointError
from sma.files import read_file
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.processes import side_by_side
from sma.recipes.io.run_folder import EXPERIMENT, LIMIT, SUMMARY, read_summary, refuse_another, write_text
from sma.recipes.tasks.contract import TaskData
from sma.streams import make_tolerant

ERROR, LOG = "error.txt", "log.txt"
"""The files of a run that failed: the reason in a line, and all that it had to say."""


def unfinished(specs: Mapping[str, ExperimentSpec], out: Path) -> dict[str, ExperimentSpec]:
    """The runs that are still to be made, by their folders below `out`.

    Raises:
        CheckpointError: one of the folders holds a run of another experiment.
    """
    for name, spec in specs.items():
        path = out / name / EXPERIMENT
        if path.exists():
            refuse_another(load_experiment(path), spec, path, "give another --out, or delete it to run it again")
    return {name: spec for name, spec in specs.items() if not (out / name / SUMMARY).is_file()}


def train_all(
    specs: Mapping[str, ExperimentSpec],
    out: Path,
    data: TaskData,
    *,
    cache: Path,
    accelerator: str = "auto",
    jobs: int = 1,
) -> Iterator[str]:
    """Train runs; gives the name of each as it ends, finished or failed. An interrupted run goes on where it was.

    Args:
        specs: by the names of their folders below `out`.
        out: the folder of all.
        data: of their task, for runs in this process.
        cache: where the data is kept, for runs in others.
        accelerator: Lightning's name for the device.
        jobs: at most so many at a time, each in a process of its own; 1 trains in this one.
    """
    for name in specs:
        (out / name / ERROR).unlink(missing_ok=True)
    if jobs == 1:
        for name, spec in specs.items():
            _train(spec, out / name, lambda: data, accelerator)
            yield name
        return
    calls = {name: (_train_alone, (spec, out / name, cache, accelerator)) for name, spec in specs.items()}
    for name, code in side_by_side(calls, jobs):
        if code and not (out / name / ERROR).is_file():
            write_text(
                out / name / ERROR,
                f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}",
            )
        yield name


def failure(folder: Path) -> str | None:
    """Why a run failed, in a line; None if it did not."""
    return (
        read_file(folder / ERROR, LIMIT, CheckpointError).decode(errors="replace")
        if (folder / ERROR).is_file()
        else None
    )


def in_words(folder: Path) -> str:
    """How a run ended."""
    if (reason := failure(folder)) is not None:
        return f"failed: {reason}"
    run = read_summary(folder, "test_accuracy", "seconds")
    return f"accuracy {run['test_accuracy']:.1%} after {run['seconds']:.0f} s"


def _train_alone(spec: ExperimentSpec, folder: Path, cache: Path, accelerator: str) -> None:
    """A run in a process of its own, which says what it has to say in its folder: lines of several runs would be
    mixed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    make_tolerant()
    _train(spec, folder, lambda: spec.task.prepare(cache, progress=False), accelerator)


def _train(spec: ExperimentSpec, folder: Path, data: Callable[[], TaskData], accelerator: str) -> None:
    try:
        # Lightning takes seconds to import; --help need not wait for it.
        from sma.recipes.training.run import run_experiment

        run_experiment(spec, folder, data(), resume=True, accelerator=accelerator, progress=False)
    except Exception as error:  # whatever it is: the other runs go on
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG).open("a", encoding="utf-8", errors="backslashreplace") as log:
            traceback.print_exc(file=log)
        write_text(folder / ERROR, " ".join(f"{type(error).__name__}: {error}".split()))
