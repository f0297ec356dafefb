"""The beginning of the commands that train: what they are asked for, its run folder, and what is there already."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
from sma.recipes.training.options import RunOptions


class Start(NamedTuple):
    """What a recipe that trains one model is to do.

    Attributes:
        spec: the experiment.
        out: the run folder, whose lock is held.
        resume: whether to go on with what is in it.
        summary: of a run that is finished, with which nothing is to be done; None: it is not.
    """

    spec: ExperimentSpec
    out: Path
    resume: bool
    summary: dict[str, Any] | None = None


@contextmanager
def experiment(options: RunOptions) -> Iterator[Start]:
    """Yield the experiment and the run folder that the options ask for; the folder is locked as long.

    Raises:
        SmaError: a sentence for the user.
    """
    if options.resume is not None:
        options.refuse_all_but(
            ["resume", "auto_resume"], "--resume continues the experiment as it was", "start a new run"
        )
    asked = None if options.resume is not None else asked_experiment(options)
    with folder_of(options, EXPERIMENT, "run") as (out, began):
        if not began:
            yield Start(cast(ExperimentSpec, asked), out, False)
            return
        kept = load_experiment(out / EXPERIMENT)
        refuse_another(kept, asked or kept, out / EXPERIMENT)
        if (out / SUMMARY).exists():
            if asked is None:
                raise CheckpointError(f"the run in {str(out)!r} is finished; its results stand in {out / SUMMARY}")
            print(f"the run in {plain(out)} is finished; its results stand in {plain(out / SUMMARY)}")
            yield Start(kept, out, True, read_summary(out))
            return
        check_fits(kept, options)
        if not os.path.lexists(out / LAST):
            print(f"no checkpoint yet in {plain(out)}: starting from the beginning")
        yield Start(kept, out, True)


def asked_experiment(options: RunOptions) -> ExperimentSpec:
    """The experiment that the options describe, on a device that there is.

    Raises:
        SpecError: it is not valid, or there is no such preset or device.
    """
    if options.spec is not None:
        options.refuse(("task", "preset"), "--spec has the task and the training of its own")
    else:
        check_preset(options.name)
    source = options.spec if options.spec is not None else options.name
    seed = [f"seed={options.seed}"] if options.seed is not None else []
    spec = load_experiment(source, [*options.set, *seed])
    check_fits(spec, options)
    return spec


def check_fits(spec: ExperimentSpec, options: RunOptions) -> None:
    """Check that an experiment can be run with these options: that there is the device, and that data and model can
    fit.

    Raises:
        SpecError: what is missing.
    """
    check_update_fits(spec, check_device(options.accelerator, spec.precision))
    check_data_fits(spec, options.data)


@contextmanager
def folder_of(options: RunOptions, began_by: str, what: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folder that the options name, locked, and whether there is something in it to go on with.

    Args:
        options: the command line.
        began_by: the file in it by which that is known.
        what: is in it, in a word.

    Raises:
        SmaError: there is nothing to go on with, something else is in it, or another process writes it.
    """
    if options.resume is not None:
        if options.auto_resume:
            raise SpecError("--resume resumes in any case; leave --auto-resume out, or give --out instead of --resume")
        if not (options.resume / began_by).is_file():
            raise CheckpointError(
                f"there is no {what} in {str(options.resume)!r}: {began_by} is missing; "
                "give the folder of an earlier --out"
            )
        check_run_folder(options.resume)
        with run_lock(options.resume), _resumable(options, options.resume, began_by):
            yield options.resume, True
        return
    if options.auto_resume:
        if options.out is None:
            raise SpecError("--auto-resume needs --out: without it the folder has another name every time")
        if (options.out / began_by).is_file():
            with run_lock(options.out), _resumable(options, options.out, began_by):
                yield options.out, True
            return
    if options.out is not None:
        check_run_folder(options.out)
    name = options.spec.stem if options.spec is not None else options.name.replace("_", "-")
    default = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    with (
        claim_folder(options.out or default, numbered=options.out is None) as out,
        _resumable(options, out, began_by),
    ):
        yield out, False


def _resumable(options: RunOptions, out: Path, began_by: str) -> AbstractContextManager[None]:
    return resumable(options, out, lambda: (out / began_by).is_file())
