"""The start of the commands that train: the requested experiment, its run folder, and the work that is resumed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

from sma.errors import CheckpointError, SpecError
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.claims import claim_folder, run_lock
from sma.recipes.io.command import resumable
from sma.recipes.io.folders import check_run_folder
from sma.recipes.io.names import plain
from sma.recipes.io.presets import check_preset
from sma.recipes.io.run_folder import EXPERIMENT, LAST, SUMMARY, read_summary, refuse_another
from sma.recipes.training.devices import check_device
from sma.recipes.training.estimates import check_data_fits, check_update_fits
from sma.recipes.training.graph import check_graph
from sma.recipes.training.options import ExperimentOptions, RunOptions


class Start(NamedTuple):
    """The experiment and the run folder of a command that trains one model.

    Attributes:
        spec: the experiment.
        out: the run folder, whose lock is held.
        resume: whether the run in the folder is resumed.
        summary: summary of a finished run; None for other runs.
    """

    spec: ExperimentSpec
    out: Path
    resume: bool
    summary: dict[str, Any] | None = None


@contextmanager
def experiment(options: RunOptions) -> Iterator[Start]:
    """Yield the experiment and the run folder of the options; the folder is locked inside the block.

    Raises:
        SmaError: the command fails; the message is for the user.
    """
    if options.resume is not None:
        options.refuse_all_but(
            ["resume", "auto_resume"], "--resume continues the experiment as it was", "start a new run"
        )
    requested = None if options.resume is not None else requested_experiment(options)
    with folder_of(options, EXPERIMENT, "run") as (out, started):
        if not started:
            yield Start(cast(ExperimentSpec, requested), out, False)
            return
        kept = load_experiment(out / EXPERIMENT)
        refuse_another(kept, requested or kept, out / EXPERIMENT)
        if (out / SUMMARY).exists():
            if requested is None:
                raise CheckpointError(f"the run in {str(out)!r} is finished; its results are in {out / SUMMARY}")
            print(f"the run in {plain(out)} is finished; its results are in {plain(out / SUMMARY)}")
            yield Start(kept, out, True, read_summary(out))
            return
        check_fits(kept, options)
        if not os.path.lexists(out / LAST):
            print(f"no checkpoint yet in {plain(out)}: starting from the beginning")
        yield Start(kept, out, True)


def requested_experiment(options: RunOptions) -> ExperimentSpec:
    """The experiment of the options, after the check that it can run on the device.

    Raises:
        SpecError: the experiment is not valid or does not fit, or the preset or the device does not exist.
    """
    spec = load_requested(options)
    check_fits(spec, options)
    return spec


def load_requested(options: ExperimentOptions) -> ExperimentSpec:
    """The experiment of the options.

    Raises:
        SpecError: the experiment is not valid, or the preset does not exist.
    """
    if options.spec is not None:
        options.refuse(("task", "preset"), "--spec has its own task and training")
    else:
        check_preset(options.name)
    seed = [f"seed={options.seed}"] if options.seed is not None else []
    return load_experiment(options.name if options.spec is None else options.spec, [*options.set, *seed])


def check_fits(spec: ExperimentSpec, options: RunOptions) -> None:
    """Check that the device exists, and that the data and the model fit into memory and onto the disk.

    Raises:
        SpecError: one of them does not.
    """
    device = check_device(options.accelerator, spec.precision)
    check_graph(spec.training, device)
    check_update_fits(spec, device)
    check_data_fits(spec, options.data)


@contextmanager
def folder_of(options: RunOptions, marker: str, what: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folder of the options, locked, and whether it holds work that can be resumed.

    Args:
        options: the command line.
        marker: the file that a folder with such work has.
        what: the noun for the work in error messages, such as `run`.

    Raises:
        SmaError: the folder has no such work to resume, holds something else, or is locked by another process.
    """
    folder = options.out if options.resume is None else options.resume
    if options.resume is not None:
        if options.auto_resume:
            raise SpecError("--resume resumes in any case; leave --auto-resume out, or give --out instead of --resume")
        if not (options.resume / marker).is_file():
            raise CheckpointError(
                f"there is no {what} in {str(options.resume)!r}: {marker} is missing; "
                "give the folder of an earlier --out"
            )
    elif options.auto_resume and folder is None:
        raise SpecError("--auto-resume needs --out: without it the folder has another name every time")
    if folder is not None:
        check_run_folder(folder)
        if options.resume is not None or (options.auto_resume and (folder / marker).is_file()):
            with run_lock(folder), resumable(options, folder, (folder / marker).is_file):
                yield folder, True
            return
    name = options.spec.stem if options.spec is not None else options.name.replace("_", "-")
    default = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    with (
        claim_folder(folder or default, numbered=folder is None) as out,
        resumable(options, out, (out / marker).is_file),
    ):
        yield out, False
