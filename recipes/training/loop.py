"""A run: train an experiment and leave everything worth keeping in one folder."""

import json
import logging
import platform
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from sma.checkpoint import save
from sma.errors import CheckpointError, SmaError, reason
from sma.files import remove_drafts
from sma.recipes.experiment import ExperimentSpec
from sma.recipes.io.claims import run_lock
from sma.recipes.io.run_folder import (
    BEST,
    DATA,
    EXPERIMENT,
    LAST,
    SUMMARY,
    VERSIONS,
    is_parts,
    read_checked,
    write_text,
)
from sma.recipes.io.signals import Preempted, on_preemption
from sma.recipes.reports.figures import attempt
from sma.recipes.training.callbacks import (
    AtomicCheckpointIO,
    Bar,
    BestCheckpoint,
    FinalEvaluation,
    LastCheckpoint,
    RandomStates,
    RouterHealth,
    read_checkpoint,
)
from sma.recipes.training.devices import check_device
from sma.recipes.training.distributed import ALONE, Team, of_all
from sma.recipes.training.metrics import MetricsLogger
from sma.recipes.training.module import Learner
from sma.recipes.training.preemption import Preemption, owes_evaluation
from sma.recipes.training.resuming import REPLACE, Origin, check_weights, checkpoint_to_resume
from sma.recipes.training.trainer import interruptible, isolated, make_trainer
from sma.spec import dump_yaml


class Spent(NamedTuple):
    """What a training has taken.

    Attributes:
        elapsed: seconds, everything included.
        updating: seconds in updates, without evaluation, checkpoints and reading data.
        tokens: that were trained on, by all processes.
    """

    elapsed: float = 0.0
    updating: float = 0.0
    tokens: int = 0


class Stopwatch(Callback):
    """What this part of a training has taken; what the parts before an interruption took is kept in the checkpoint.

    Attributes:
        seconds: of this part, in updates.
        earlier: of the parts before, up to the checkpoint that this one goes on from.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.earlier = Spent()
        self._began = self._since = time.perf_counter()
        self._tokens = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop."""
        self.seconds += time.perf_counter() - self._since
        self._tokens = int(getattr(pl_module, "tokens_seen", 0))

    def spent(self) -> Spent:
        """By all parts so far; of several processes all must ask."""
        elapsed, updating, tokens = self.earlier
        return Spent(
            elapsed + time.perf_counter() - self._began, updating + self.seconds, tokens + sum(of_all(self._tokens))
        )

    def state_dict(self) -> dict[str, Any]:
        """What all parts took."""
        return self.spent()._asdict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.earlier = Spent(**state_dict)


class Fitted(NamedTuple):
    """A learner with the weights of its best checkpoint, and what its training took.

    Attributes:
        trainer: for evaluating it.
        best_update: after which the best checkpoint was written.
        stopwatch: knows what the whole run has taken so far.
    """

    trainer: Trainer
    best_update: int
    stopwatch: Stopwatch


@contextmanager
def writing(out: Path, team: Team = ALONE) -> Iterator[None]:
    """Hold the lock of a run folder while a run is made in it; of a team the first process does.

    Raises:
        CheckpointError: another process holds it.
    """
    # The process of a team that was started again may be there before the one whose place it takes has ended.
    with run_lock(out, wait=60.0 if team.size > 1 else 0.0) if team.writes else nullcontext():
        yield


def fit(
    learner: Learner,
    spec: ExperimentSpec,
    out: Path,
    training: Callable[[int], DataLoader[Any]],
    validation: DataLoader[Any],
    hashes: Mapping[str, str],
    *,
    resume: bool = False,
    accelerator: str = "auto",
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    team: Team = ALONE,
) -> Fitted:
    """Train a learner and load its best checkpoint.

    SIGTERM and SIGUSR1 end the training after the update that is being made, or in an evaluation, with a checkpoint
    from which it goes on to the same results; in one process only, and in its main thread.

    Args:
        learner: what is trained.
        spec: the experiment.
        out: the run folder.
        training: makes the batches that are left after so many updates.
        validation: batches of the validation split.
        hashes: of the data, by split or file; those of the first update are kept, and a run goes on with the same only.
        resume: go on from the last checkpoint of the folder, where it has one; False refuses a folder that has.
        accelerator: Lightning's name for the device: `auto`, `cpu`, `cuda`.
        progress: show a bar.
        callbacks: of Lightning, that watch the training.
        team: the processes that train it together; all of them read the checkpoint they go on from, the first one
            writes the folder.

    Raises:
        DataError: a batch or a loss that is not finite, or other data than the run began with.
        CheckpointError: the folder cannot be written, holds a run that is not to be resumed or another one, or a
            damaged checkpoint.
        SpecError: there is no such device.
        Preempted: a signal ended the training.
    """
    check_device(accelerator, spec.precision)
    stopwatch, origin, states = Stopwatch(), Origin(spec), RandomStates()
    preemption = Preemption(out, spec.training, states)
    found = checkpoint_to_resume(spec, out, hashes, resume)
    done = int(found["global_step"]) if found is not None else 0
    if team.writes:
        _begin_part(spec, out, hashes, done)
    routers = [layer.router for layer in spec.model.layer_specs if layer.modules]
    bars: list[Callback] = [Bar(spec.training.updates)] if progress else []
    watching = [states, origin, preemption, FinalEvaluation(), stopwatch, RouterHealth(routers), *bars, *callbacks]
    # After the last update Lightning has nothing to do, and does not see that an evaluation is owed.
    more = 1 if found is not None and owes_evaluation(found) else 0
    trainer = _trainer(spec, out, accelerator, learner, watching, team, more)
    if spec.precision == "64-true":
        # Lightning converts the model only after it has put back the weights of a checkpoint, which would lose half of
        # their digits.
        learner.double()
    if found is not None:
        check_weights(learner, found, out / LAST)
    del found
    learner.between_updates = lambda: preemption.between_updates(trainer)
    with isolated(team), interruptible(), ExitStack() as watched:
        if team.size == 1:
            preemption.install = watched.enter_context(on_preemption(preemption.note))
        try:
            trainer.fit(learner, training(done), validation, ckpt_path=str(out / LAST) if done else None)
        except SmaError as error:
            if done and not origin.started:
                raise CheckpointError(f"cannot go on from {str(out / LAST)!r}: {error}; {REPLACE}") from error
            raise
        except Exception as error:
            if done and not origin.started:
                raise CheckpointError(f"cannot go on from {str(out / LAST)!r}: {reason(error)}; {REPLACE}") from error
            raise
    if preemption.number is not None:  # it came too late for an update
        raise Preempted(preemption.number, preemption.words(trainer.global_step))
    # Only the first process is sure to see the file that it wrote.
    best: Any = trainer.strategy.broadcast(read_checkpoint(out / BEST) if team.writes else None)
    check_weights(learner, best, out / BEST)
    learner.load_state_dict(best["state_dict"])
    return Fitted(trainer, int(best["global_step"]), stopwatch)


def _begin_part(spec: ExperimentSpec, out: Path, hashes: Mapping[str, str], done: int) -> None:
    """Write down what a run is made of; its versions are a list, because a run that is resumed can have several."""
    for folder in (out, *(out / path for path in ("checkpoints", "model"))):
        remove_drafts(folder)
    parts = _parts(out / VERSIONS) if done and (out / VERSIONS).exists() else []
    write_text(out / EXPERIMENT, dump_yaml(spec))
    write_text(out / DATA, json.dumps(dict(hashes), indent=1))
    write_text(out / VERSIONS, json.dumps([*parts, {"update": done, **versions()}], indent=1))


def _parts(path: Path) -> list[dict[str, Any]]:
    found = read_checked(
        path, is_parts, "the versions of a run", "delete it to go on without those of the parts before"
    )
    return found if isinstance(found, list) else [{"update": 0, **found}]  # as older versions wrote it


def prepare(spec: ExperimentSpec, team: Team = ALONE) -> None:
    """Set the seed, the threads and what Lightning says, before the model is built."""
    _quiet()
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    # The weights have a seed of their own; this one is for dropout, which must not fall on the same places everywhere.
    seed = (spec.seed + 1_000_003 * team.rank) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def finish(
    spec: ExperimentSpec,
    out: Path,
    learner: Learner,
    fitted: Fitted,
    results: dict[str, Any],
    team: Team = ALONE,
    figures: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Save the model and write the summary: what was measured, and what it was measured with; returns the summary.

    `figures` is called with the summary before it is written: a run that has one is finished, and nothing of it is made
    again. What it raises becomes a warning.
    """
    spent, device = fitted.stopwatch.spent(), fitted.trainer.strategy.root_device.type
    summary = {
        "task": spec.task.kind,
        **results,
        "parameters": spec.model.num_parameters(),
        "updates": spec.training.updates,
        "best_update": fitted.best_update,
        "seconds": round(spent.elapsed, 1),
        "tokens_per_second": round(spent.tokens / spent.updating) if spent.updating else None,
        "seed": spec.seed,
        "commit": commit(),
        "hardware": hardware(device),
        "device": device,
        "date": datetime.now(UTC).date().isoformat(),
    }
    if team.writes:
        save(learner.model, out / "model")
        if figures is not None:
            attempt(f"the figure of the run in {out}", lambda: figures(summary))
        write_text(out / SUMMARY, json.dumps(summary, indent=1))
    return summary


def rates_by_module(measured: Mapping[str, float], learner: Learner) -> list[dict[str, float]]:
    """The activation rate of every sub-module of every routed layer in the test."""
    return [
        {name: measured[f"test_rate/layer{layer}/{name}"] for name in names}
        for layer, names in enumerate(learner.module_names)
    ]


def rates_by_layer(measured: Mapping[str, float], learner: Learner) -> list[float]:
    """The mean activation rate of every routed layer in the test."""
    return [sum(rates.values()) / len(rates) for rates in rates_by_module(measured, learner)]


def _trainer(
    spec: ExperimentSpec,
    out: Path,
    accelerator: str,
    learner: Learner,
    callbacks: list[Callback],
    team: Team,
    more: int,
) -> Trainer:
    training = spec.training
    # Two, because save_last=True of a monitored one writes the last checkpoint only when it is the best so far
    # (Lightning 2.6).
    best, last = (
        kind(
            out / "checkpoints",
            Path(name).stem,
            monitor=monitor,
            mode=learner.monitor_mode,
            enable_version_counter=False,
        )
        for kind, name, monitor in ((BestCheckpoint, BEST, learner.monitor), (LastCheckpoint, LAST, None))
    )
    return make_trainer(
        team,
        plugins=(AtomicCheckpointIO(),),
        accelerator=accelerator,
        precision=spec.precision,
        max_steps=training.updates + more,
        max_epochs=1,
        val_check_interval=min(training.evaluate_every, training.updates),
        gradient_clip_val=training.clip_norm,
        callbacks=[best, last, *callbacks],
        logger=[
            MetricsLogger(out, name="metrics", flush_logs_every_n_steps=1),
            TensorBoardLogger(out, name="tensorboard", version=""),
        ],
        log_every_n_steps=training.log_every,
        num_sanity_val_steps=0,
        enable_progress_bar=any(isinstance(callback, Bar) for callback in callbacks),
        enable_model_summary=False,
        default_root_dir=out,
        use_distributed_sampler=False,
    )


def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # Resuming in the middle of an epoch is what the sampler was made for.
    warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch ended.*")


def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers of a run, and the commit."""
    packages = ("sparse-modular-activation", "torch", "lightning", "torchmetrics", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, "commit": commit()}


def commit() -> str | None:
    """The commit of the checkout that is running, with `-dirty` after it where files differ; None outside a
    checkout.
    """
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def hardware(device: str | None = None, threads: int | None = None) -> str:
    """A device in words.

    Args:
        device: `cpu` or `cuda`; None: what a run gets that does not say.
        threads: of the CPU; None: those of this process.
    """
    if torch.cuda.is_available() if device is None else device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {threads or torch.get_num_threads()} threads"
