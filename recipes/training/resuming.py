"""The checkpoint from which a run resumes, and the checks that it is intact and belongs to the same experiment."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from sma.errors import CheckpointError, DataError, parsing, quote
from sma.formats import rename
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.run_folder import DATA, EXPERIMENT, LAST, SUMMARY, is_words, read_checked, refuse_another
from sma.recipes.training.callbacks import read_checkpoint
from sma.recipes.training.module import TrainingModule
from sma.spec import dump_spec

REPLACE = "replace it with a copy of the other one of best.ckpt and last.ckpt, or start a new run"


class Origin(Callback):
    """Saves the experiment in every checkpoint, and checks the states that Lightning has restored.

    Args:
        spec: the experiment.

    Attributes:
        started: whether an update has been made. Until then an error is attributed to the checkpoint.
    """

    def __init__(self, spec: ExperimentSpec) -> None:
        self.spec = spec
        self.started = False

    def state_dict(self) -> dict[str, Any]:
        """The experiment."""
        return {"experiment": dump_spec(self.spec)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the shapes of the states of the optimisers, which torch does not check."""
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape not in (parameter.shape, torch.Size([])):
                        raise CheckpointError(f"the optimiser's {quote(name)} does not have the shape of its parameter")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Record that the checkpoint was valid."""
        self.started = True


def checkpoint_to_resume(
    spec: ExperimentSpec, out: Path, hashes: Mapping[str, str], resume: bool
) -> dict[str, Any] | None:
    """The last checkpoint of a run; None if the run starts from the beginning.

    Args:
        spec: the requested experiment.
        out: the run folder.
        hashes: SHA-256 of the present data, by split or file.
        resume: resume from the checkpoint, if the folder has one.

    Raises:
        CheckpointError: the folder holds a run and `resume` is False, holds another experiment, or its checkpoint is
            damaged.
        DataError: the run began with other data.
    """
    path = out / LAST
    if not resume:
        for name in (SUMMARY, LAST):
            if (out / name).exists():
                raise CheckpointError(
                    f"the folder {str(out)!r} already holds a run ({name}); "
                    "resume it (--resume, in Python resume=True), or give another folder"
                )
        return None
    if not os.path.lexists(path):  # a broken link counts as a damaged checkpoint
        return None
    if (out / EXPERIMENT).exists():
        refuse_another(load_experiment(out / EXPERIMENT), spec, out / EXPERIMENT)
    state = read_checkpoint(path)
    with parsing(f"the checkpoint {str(path)!r}", CheckpointError, REPLACE):
        recorded = state["callbacks"].get(Origin.__qualname__)
        recorded = None if recorded is None else load_experiment(dict(recorded["experiment"]))
    if recorded is not None:  # checkpoints of older versions have no experiment
        refuse_another(recorded, spec, path)
    _check_counts(state, spec.training.updates, path)
    if (out / DATA).exists():  # runs of older versions have none
        hint = "delete it to resume without comparing the data"
        names = changed(read_checked(out / DATA, is_words, "the hashes of the data", hint), hashes)
        if names:
            listed = ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
            raise DataError(
                f"the data differs from that with which the run in {str(out)!r} began: {listed} "
                f"{'has' if len(names) == 1 else 'have'} another hash; "
                "restore the original data, give its folder (--data), or start a new run"
            )
    return state


def _check_counts(state: Mapping[str, Any], updates: int, path: Path) -> None:
    """Check that all counters in a checkpoint have the same number of updates, from which Lightning resumes."""
    done = state["global_step"]
    with parsing(f"the checkpoint {str(path)!r}", CheckpointError, REPLACE):
        loops = state["loops"]["fit_loop"]
        of_optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        counts = [loops["epoch_loop.batch_progress"], loops["epoch_loop.scheduler_progress"], of_optimizer]
        found = {*(count for each in counts for kind in ("total", "current") for count in each[kind].values())}
        epochs = {*(tuple(sorted(loops["epoch_progress"][kind].items())) for kind in ("total", "current"))}
        logged = loops["epoch_loop.state_dict"]["_batches_that_stepped"]
        # Lightning silently skips empty lists.
        (optimizer,), (schedule,) = state["optimizer_states"], state["lr_schedulers"]
        found.add(schedule["last_epoch"])
        if not optimizer["state"]:
            raise ValueError("the states of the optimiser are missing")
    one = tuple(sorted({"ready": 1, "started": 1, "processed": 0, "completed": 0}.items()))
    if not 0 < done <= updates or found != {done} or logged not in (done - 1, done) or epochs != {one}:
        raise CheckpointError(
            f"the counters in the checkpoint {str(path)!r} have different numbers of updates; {REPLACE}"
        )


def check_weights(module: TrainingModule, state: Mapping[str, Any], path: Path) -> None:
    """Check that a checkpoint has the weights of this model, before any weight is replaced. Weights of older versions
    get their present names.

    Raises:
        CheckpointError: a weight is missing, unexpected, or of another shape or dtype; the message has the first one.
    """
    found, own = state["state_dict"], module.state_dict()
    rename(found, own)
    for name in sorted(own.keys() ^ found.keys(), key=str):
        what = "lacks" if name in own else "has an unexpected"
        raise CheckpointError(
            f"the checkpoint {str(path)!r} {what} {quote(name)}, so it belongs to another model; {REPLACE}"
        )
    for name, tensor in own.items():
        given = found[name]
        if (
            not isinstance(given, Tensor)
            or given.shape != tensor.shape
            or given.dtype != tensor.dtype
            or given.layout != tensor.layout
        ):
            theirs = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else quote(given)
            ours = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CheckpointError(
                f"the checkpoint {str(path)!r} belongs to another model: its {name} is {theirs}, that of this model "
                f"{ours}; {REPLACE}"
            )


def changed(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names of the splits or files whose hash differs from the recorded one, or which only one side has."""
    return sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))
