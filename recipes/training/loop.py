"""The training loop: Lightning's, with checkpoints in a run folder from which a run resumes bit for bit."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from sma.errors import CheckpointError, SmaError, reason
from sma.files import remove_drafts
from sma.recipes.experiment import ExperimentSpec
from sma.recipes.io.claims import run_lock
from sma.recipes.io.run_folder import BEST, DATA, EXPERIMENT, LAST, VERSIONS, is_parts, read_checked, write_text
from sma.recipes.io.signals import Preempted, on_preemption
from sma.recipes.tasks.contract import Metric
from sma.recipes.training.callbacks import (
    AtomicCheckpointIO,
    BestCheckpoint,
    FinalEvaluation,
    LastCheckpoint,
    RandomStates,
    RouterHealth,
    read_checkpoint,
)
from sma.recipes.training.devices import check_device
from sma.recipes.training.distributed import SINGLE_PROCESS, DistributedContext
from sma.recipes.training.execution import for_device, product_precision
from sma.recipes.training.graph import check_graph
from sma.recipes.training.metrics import MetricsLogger
from sma.recipes.training.module import TrainingModule
from sma.recipes.training.objective import Objective
from sma.recipes.training.preemption import Preemption, has_pending_evaluation
from sma.recipes.training.progress import Progress
from sma.recipes.training.provenance import versions
from sma.recipes.training.resuming import REPLACE, Origin, check_weights, checkpoint_to_resume
from sma.recipes.training.stopwatch import Stopwatch
from sma.recipes.training.trainer import interruptible, isolated, make_trainer
from sma.spec import dump_yaml


class Fitted(NamedTuple):
    """The outcome of a training, whose module has the weights of the best checkpoint.

    Attributes:
        trainer: the trainer, for the test.
        best_update: number of updates before the best checkpoint.
        stopwatch: the cost of the whole run so far.
    """

    trainer: Trainer
    best_update: int
    stopwatch: Stopwatch


def writing(out: Path, distributed: DistributedContext = SINGLE_PROCESS) -> AbstractContextManager[object]:
    """Hold the lock of a run folder inside the block. Rank 0 holds it for all ranks.

    Raises:
        CheckpointError: another process holds the lock.
    """
    # A restarted rank may begin before its predecessor has ended.
    wait = 60.0 if distributed.world_size > 1 else 0.0
    return run_lock(out, wait=wait) if distributed.is_rank_zero else nullcontext()


def fit(
    module: TrainingModule,
    objective: Objective[Any, Any],
    spec: ExperimentSpec,
    out: Path,
    *,
    resume: bool = False,
    accelerator: str = "auto",
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    distributed: DistributedContext = SINGLE_PROCESS,
) -> Fitted:
    """Train a module and load its best checkpoint.

    SIGTERM and SIGUSR1 end the training after the current update, or in an evaluation, with a checkpoint from which it
    resumes to the same results. Signals are handled in the main thread of a single process only.

    Args:
        module: the training module of the objective.
        objective: the batches, the hashes of the data and the metric. A run resumes only if the hashes are those with
            which it began.
        spec: the experiment.
        out: the run folder.
        resume: resume from the last checkpoint of the folder, if there is one; False refuses a folder with a run.
        accelerator: Lightning's name for the device: `auto`, `cpu`, `cuda`.
        progress: whether to show the progress.
        callbacks: additional Lightning callbacks.
        distributed: rank and world size. All ranks read the checkpoint; rank 0 writes the folder.

    Raises:
        DataError: a batch or a loss is not finite, or the run began with other data.
        CheckpointError: the folder cannot be written, holds a run and `resume` is False, holds another experiment, or
            its checkpoint is damaged.
        SpecError: the device does not exist.
        Preempted: a signal ended the training.
    """
    device = check_device(accelerator, spec.precision)
    check_graph(spec.training, device, distributed.world_size)
    module.check_capacity()
    stopwatch, origin, states, hashes = Stopwatch(), Origin(spec), RandomStates(), objective.hashes
    preemption = Preemption(out, spec.training, states)
    found = checkpoint_to_resume(spec, out, hashes, resume)
    done = int(found["global_step"]) if found is not None else 0
    if distributed.is_rank_zero:
        _begin_part(spec, out, hashes, done)
    routers = [layer.router for layer in spec.model.layer_specs if layer.modules]
    bars: list[Callback] = [Progress(spec.training.updates)] if progress else []
    # The bar first: it clears its line for the warnings of the others.
    watching = [*bars, states, origin, preemption, FinalEvaluation(), stopwatch, RouterHealth(routers), *callbacks]
    # After the last update Lightning returns at once; one update more lets it make the evaluation that is due.
    more = 1 if found is not None and has_pending_evaluation(found) else 0
    trainer = _trainer(spec, out, accelerator, objective.task.metric, watching, distributed, more)
    if spec.precision == "64-true":
        # Lightning converts the model after loading the weights of a checkpoint, which would round them to float32.
        module.double()
    if found is not None:
        check_weights(module, found, out / LAST)
    del found
    module.between_updates = lambda: preemption.between_updates(trainer)
    batches = for_device(objective.training_batches(spec.training, spec.seed, done, distributed), spec.training, device)
    validation = objective.evaluation_batches("validation", distributed)
    with isolated(distributed), interruptible(), product_precision(spec.training, device), ExitStack() as watched:
        if distributed.world_size == 1:
            preemption.install = watched.enter_context(on_preemption(preemption.note))
        try:
            trainer.fit(module, batches, validation, ckpt_path=str(out / LAST) if done else None)
        except Exception as error:
            if done and not origin.started:
                why = error if isinstance(error, SmaError) else reason(error)
                raise CheckpointError(f"cannot resume from {str(out / LAST)!r}: {why}; {REPLACE}") from error
            raise
    if preemption.number is not None:  # after the last update
        raise Preempted(preemption.number, preemption.words(trainer.global_step))
    # On a shared file system only rank 0 is sure to read the file that it wrote.
    best: Any = trainer.strategy.broadcast(read_checkpoint(out / BEST) if distributed.is_rank_zero else None)
    check_weights(module, best, out / BEST)
    module.load_state_dict(best["state_dict"])
    return Fitted(trainer, int(best["global_step"]), stopwatch)


def _begin_part(spec: ExperimentSpec, out: Path, hashes: Mapping[str, str], done: int) -> None:
    """Write the experiment, the hashes of the data, and the list of software versions of all parts of the run."""
    for folder in (out, *(out / path for path in ("checkpoints", "model"))):
        remove_drafts(folder)
    parts = _read_versions(out / VERSIONS) if done and (out / VERSIONS).exists() else []
    write_text(out / EXPERIMENT, dump_yaml(spec))
    write_text(out / DATA, json.dumps(dict(hashes), indent=1))
    write_text(out / VERSIONS, json.dumps([*parts, {"update": done, **versions()}], indent=1))


def _read_versions(path: Path) -> list[dict[str, Any]]:
    found = read_checked(
        path, is_parts, "the versions of a run", "delete it to resume without the versions of the earlier parts"
    )
    return found if isinstance(found, list) else [{"update": 0, **found}]  # the format of older versions


def _trainer(
    spec: ExperimentSpec,
    out: Path,
    accelerator: str,
    metric: Metric,
    callbacks: list[Callback],
    distributed: DistributedContext,
    more: int,
) -> Trainer:
    training = spec.training
    # Two callbacks, because a monitored one with save_last=True writes the last checkpoint only if it is the best so
    # far (Lightning 2.6).
    best, last = (
        kind(
            out / "checkpoints",
            Path(name).stem,
            monitor=monitor,
            mode=metric.mode,
            enable_version_counter=False,
        )
        for kind, name, monitor in ((BestCheckpoint, BEST, f"val_{metric.name}"), (LastCheckpoint, LAST, None))
    )
    return make_trainer(
        distributed,
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
        enable_progress_bar=False,  # `Progress` shows it
        enable_model_summary=False,
        default_root_dir=out,
        use_distributed_sampler=False,
    )
