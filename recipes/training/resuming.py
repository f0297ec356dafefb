"""What a run goes on from: the checkpoint in its folder, if it is one of the same experiment and whole."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from sma.errors import CheckpointError, DataError, parsing, quote
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.run_folder import DATA, EXPERIMENT, LAST, SUMMARY, is_words, read_checked, refuse_another
from sma.recipes.training.callbacks import read_checkpoint
from sma.recipes.training.module import TrainingModule
from sma.spec import dump_spec

REPLACE = "put a copy of the other one of best.ckpt and last.ckpt in its place, or start a new run"


class Origin(Callback):
    """Keeps the experiment with every checkpoint, and looks at what Lightning has put back of one.

    Args:
        spec: the experiment.

    Attributes:
        started: whether an update has been made: until then errors are taken for those of the checkpoint that a run
            goes on from.
    """

    def __init__(self, spec: ExperimentSpec) -> None:
        self.spec = spec
        self.started = False

    def state_dict(self) -> dict[str, Any]:
        """The experiment."""
        return {"experiment": dump_spec(self.spec)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the states of the optimisers, which torch takes in any shape."""
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape not in (parameter.shape, torch.Size([])):
                        raise CheckpointError(f"the optimiser's {quote(name)} has another shape than its parameter")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """The checkpoint was a good one."""
        self.started = True


def checkpoint_to_resume(
    spec: ExperimentSpec, out: Path, hashes: Mapping[str, str], resume: bool
) -> dict[str, Any] | None:
    """The last checkpoint of a run, for it to go on from; None: the run begins.

    Args:
        spec: the experiment that is asked for.
        out: the run folder.
        hashes: of the data that there is.
        resume: go on from the checkpoint, where the folder has one.

    Raises:
        CheckpointError: the folder holds a run and nobody asked to resume, or that of another experiment, or the
            checkpoint is damaged.
        DataError: the run began with other data.
    """
    path = out / LAST
    if not resume:
        for name in (SUMMARY, LAST):
            if (out / name).exists():
                raise CheckpointError(
                    f"the folder {str(out)!r} holds a run already ({name}); "
                    "resume it (--resume), or give another folder"
                )
        return None
    if not os.path.lexists(path):  # a link that leads to nothing is no beginning
        return None
    if (out / EXPERIMENT).exists():
        refuse_another(load_experiment(out / EXPERIMENT), spec, out / EXPERIMENT)
    state = read_checkpoint(path)
    with parsing(f"the checkpoint {str(path)!r}", CheckpointError, REPLACE):
        recorded = state["callbacks"].get(Origin.__qualname__)
        recorded = None if recorded is None else load_experiment(dict(recorded["experiment"]))
    if recorded is not None:  # those of older versions do not say
        refuse_another(recorded, spec, path)
    _check_counts(state, spec.training.updates, path)
    if (out / DATA).exists():  # runs of older versions have none
        hint = "delete it to go on without comparing the data"
        _refuse_other_data(read_checked(out / DATA, is_words, "the hashes of the data", hint), hashes, out)
    return state


def _check_counts(state: Mapping[str, Any], updates: int, path: Path) -> None:
    """Check that all that counts in a checkpoint has counted the same updates, by which Lightning knows what is to be
    done next.
    """
    done = state["global_step"]
    with parsing(f"the checkpoint {str(path)!r}", CheckpointError, REPLACE):
        loops = state["loops"]["fit_loop"]
        of_optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        counts = [loops["epoch_loop.batch_progress"], loops["epoch_loop.scheduler_progress"], of_optimizer]
        found = {*(count for each in counts for kind in ("total", "current") for count in each[kind].values())}
        epochs = {*(tuple(sorted(loops["epoch_progress"][kind].items())) for kind in ("total", "current"))}
        logged = loops["epoch_loop.state_dict"]["_batches_that_stepped"]
        # Lightning takes none for nothing to put back.
        (optimizer,), (schedule,) = state["optimizer_states"], state["lr_schedulers"]
        found.add(schedule["last_epoch"])
        if not optimizer["state"]:
            raise ValueError("the states of the optimiser are missing")
    one = tuple(sorted({"ready": 1, "started": 1, "processed": 0, "completed": 0}.items()))
    if not 0 < done <= updates or found != {done} or logged not in (done - 1, done) or epochs != {one}:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} does not agree with itself about the updates that were made; {REPLACE}"
        )


def check_weights(module: TrainingModule, state: Mapping[str, Any], path: Path) -> None:
    """Check that a checkpoint has the weights of this model, before any is replaced.

    Raises:
        CheckpointError: names the first that differs.
    """
    found, own = state["state_dict"], module.state_dict()
    for name in sorted(own.keys() ^ found.keys(), key=str):
        what = "lacks" if name in own else "has in excess"
        raise CheckpointError(f"the checkpoint {str(path)!r} {what} {quote(name)}, it is of another model; {REPLACE}")
    for name, tensor in own.items():
        given = found[name]
        if (
            not isinstance(given, Tensor)
            or given.shape != tensor.shape
            or given.dtype != tensor.dtype
            or given.layout != tensor.layout
        ):
            there = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else quote(given)
            here = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CheckpointError(
                f"the checkpoint {str(path)!r} is of another model: {name} is {there} there, and {here} here; {REPLACE}"
            )


def changed(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The splits or files whose hash is not the recorded one, or that there were not."""
    return sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))


def _refuse_other_data(recorded: Mapping[str, str], hashes: Mapping[str, str], out: Path) -> None:
    names = changed(recorded, hashes)
    if names:
        listed = ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
        raise DataError(
            f"the data is not that with which the run in {str(out)!r} began: {listed} "
            f"{'has' if len(names) == 1 else 'have'} another hash; "
            "put the data of then back or name its folder (--data), or start a new run"
        )
