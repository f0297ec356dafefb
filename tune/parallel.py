"""Data-parallel training of one model by several processes through Ray Train.

Every process runs the recipe on its shard of every batch, and Lightning averages the gradients. If a process dies, Ray
restarts all of them, and they resume from the last checkpoint of the run folder.
"""

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from pyarrow.fs import LocalFileSystem, copy_files
from ray import train
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment
from ray.train.torch import TorchTrainer

from sma.errors import CheckpointError, SmaError, SpecError
from sma.recipes.experiment import ExperimentSpec
from sma.recipes.io.run_folder import EXPERIMENT, LAST, SUMMARY
from sma.recipes.tasks.contract import Metric
from sma.recipes.training.distributed import DistributedContext
from sma.recipes.training.objective import load_objective
from sma.recipes.training.run import run_experiment
from sma.spec import dump_yaml
from sma.tune.cluster import ResourceSpec, check_resources, cluster
from sma.tune.lifeline import follow
from sma.tune.ray_settings import TRAIN, ray_settings
from sma.tune.scratch import scratch_folder
from sma.tune.sharing import pack_data, unpack_data
from sma.tune.status import StatusActor
from sma.tune.storage import Storage

RAY = "ray"
"""Ray's folder in the run folder during the training. With a URI it holds the checkpoints."""

_PATIENCE = 5.0
"""Timeout of a call of the status actor, in seconds. The call is repeated after a check of the cluster."""


class Workers(NamedTuple):
    """The number of worker processes, and their resources.

    Attributes:
        number: number of workers.
        cpus: cores of a worker, and its threads unless the experiment sets them.
        address: address of a running Ray cluster; None starts one on this machine.
        accelerator: Lightning's name for the device. With GPUs every worker has one.
        restarts: number of times that all workers are restarted after one has died.
    """

    number: int
    cpus: int = 1
    address: str | None = None
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    restarts: int = 3

    @property
    def resources(self) -> ResourceSpec:
        """The resources of one worker."""
        return ResourceSpec(cpus=self.cpus, accelerator=self.accelerator, address=self.address)

    def check_room(self) -> None:
        """Check that the workers fit on the machines, because Ray would wait without a message; joins the cluster.

        Raises:
            SpecError: there are too few cores or GPUs, or there is no cluster at the address.
        """
        room = check_resources(self.resources, self.number, "worker").concurrent
        if room < self.number:
            raise SpecError(
                f"{self.number} workers of {self.cpus} CPUs do not fit; there is room for {room}: lower --workers or "
                "--cpus, or give the --address of a larger cluster"
            )

    def check_experiment(self, spec: ExperimentSpec) -> None:
        """Check that several processes can train an experiment.

        Raises:
            SpecError: its task has no objective, or the processes cannot share its batches evenly.
        """
        spec.task.check_trainable()
        DistributedContext(world_size=self.number).check_batch_size(spec.training.batch_size)

    def check_data(self, spec: ExperimentSpec, data: Any) -> None:
        """Check that the workers can share the batches and the splits.

        Raises:
            SpecError: a batch or a split is too small.
        """
        objective = load_objective(spec.task, data)
        objective.check_shards(spec.training.batch_size, DistributedContext(world_size=self.number))


class WorkerReporter(Checkpoint):
    """Reports the measures of every evaluation, and uploads the run folder if its location is a URI.

    It is a `Checkpoint` because Lightning calls those last, when the checkpoints of the evaluation are in the folder.

    Args:
        status: the status actor.
        metric: the metric of the task.
        folder: the run folder to upload; None if it need not be uploaded.
    """

    def __init__(self, status: Any, metric: Metric, folder: Path | None) -> None:
        self.status, self.metric, self.folder = status, metric, folder

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the measures of the evaluation."""
        if self.folder is not None:
            # A collective call: all workers must make it.
            train.report(
                {}, checkpoint=train.Checkpoint.from_directory(str(self.folder)) if trainer.is_global_zero else None
            )
        if trainer.is_global_zero:
            names = (f"val_{self.metric.name}", "val_loss", "val_rate")
            found = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
            measures = ", ".join(
                f"{name.removeprefix('val_').replace('_', ' ')} {value:.4f}" for name, value in found.items()
            )
            self.status.add_line.remote(f"update {trainer.global_step:,} of {trainer.max_steps:,}: {measures}")


def train_parallel(
    spec: ExperimentSpec,
    storage: Storage,
    workers: Workers,
    *,
    data_folder: Path,
    progress: bool = True,
    on_line: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train one model with several processes; returns the summary. The run folder equals that of a single process.

    An update has `training.batch_size` samples in all, of which every worker gets a shard. The mean of the workers'
    gradients is the gradient of the batch, so the number of workers changes only rounding. Exceptions are computed per
    shard: batch norm without synchronisation, the draws of dropout and of stochastic routers, and the losses in
    `training.losses`. A folder with a checkpoint of the same experiment is resumed with any number of workers.

    Args:
        spec: the experiment.
        storage: the run folder: a path that is the same on all machines, or a URI.
        workers: the number of workers, and their resources.
        data_folder: folder in which data is kept between runs.
        progress: whether to show progress bars while the data is prepared.
        on_line: a function that is called with every line about the training.

    Raises:
        SmaError: the training cannot run; the message is for the user.
    """
    workers.check_experiment(spec)
    workers.check_room()
    data = spec.task.prepare(data_folder, progress=progress)
    workers.check_data(spec, data)
    packed = pack_data(data)
    storage.check_writable()
    storage.write(EXPERIMENT, dump_yaml(spec))
    if storage.folder is not None:
        storage.remove(RAY)
    with ray_settings(TRAIN), cluster(workers.resources, workers.number, packed.num_bytes) as slots:
        status = StatusActor.remote()  # type: ignore[attr-defined]
        task = {
            "spec": spec,
            "location": storage.location,
            "data": ray.put(packed),
            "status": status,
            "cpus": slots.cpus,
            "accelerator": slots.accelerator,
        }
        trainer = TorchTrainer(
            _work,
            train_loop_config=task,
            scaling_config=train.ScalingConfig(
                num_workers=workers.number,
                use_gpu=slots.gpus > 0,
                resources_per_worker={"CPU": slots.cpus, **({"GPU": slots.gpus} if slots.gpus else {})},
            ),
            run_config=train.RunConfig(
                name=RAY,
                storage_path=storage.location,
                failure_config=train.FailureConfig(max_failures=workers.restarts),
                checkpoint_config=train.CheckpointConfig(num_to_keep=1),
            ),
        )
        _follow(trainer, status, workers, on_line)
    summary: dict[str, Any] | None = storage.read_json(SUMMARY)
    if summary is None:
        raise CheckpointError(
            f"the training ended without {storage.address(SUMMARY)}; give a folder that all machines share, or a URI"
        )
    storage.remove(RAY)
    return summary


def _follow(trainer: TorchTrainer, status: Any, workers: Workers, on_line: Callable[[str], None]) -> None:
    """Wait for the end of the training, and pass on the messages of the workers."""
    count, failure = 0, None

    def look() -> None:
        nonlocal count, failure
        with suppress(ray.exceptions.RayError):  # the lifeline detects a lost cluster
            lines, failure = ray.get(status.read.remote(count), timeout=_PATIENCE)
            count += len(lines)
            for line in lines:
                on_line(line)

    try:
        follow(trainer.fit, look)
    except SmaError:
        raise
    except Exception as error:
        if failure is None:
            reason = " ".join(str(error).split())[-600:]
            raise SmaError(
                f"the training failed after {workers.restarts} restarts: {reason}; "
                "the run folder is valid up to its last checkpoint: resume it with --resume"
            ) from error
    if failure is not None:
        raise SmaError(failure)


def _work(task: dict[str, Any]) -> None:
    """The training loop of a worker."""
    status, context = task["status"], train.get_context()
    if ray.get(status.read.remote(0))[1] is not None:
        return
    torch.set_num_threads(task["cpus"])
    distributed = DistributedContext(
        context.get_world_rank(), context.get_world_size(), RayDDPStrategy(), (RayLightningEnvironment(),)
    )
    storage = Storage(task["location"])
    status.add_line.remote(
        f"worker {distributed.rank + 1} of {distributed.world_size}: process {os.getpid()} on {socket.gethostname()}"
    )
    with nullcontext(Path(storage.location)) if storage.is_local else scratch_folder() as folder:
        try:
            _train(task, storage, folder, distributed)
        except SmaError as error:
            ray.get(status.fail.remote(str(error)))
            raise


def _train(task: dict[str, Any], storage: Storage, folder: Path, distributed: DistributedContext) -> None:
    """Run the recipe in a folder, after the download of the last checkpoint if the run folder is a URI."""
    spec, status, uploaded = task["spec"], task["status"], None if storage.is_local else folder
    if uploaded is None and not (folder / EXPERIMENT).is_file():
        raise CheckpointError(
            f"the run folder {str(folder)!r} does not exist on {socket.gethostname()}; "
            "give a shared folder or a URI as --out"
        )
    if uploaded is not None and (checkpoint := train.get_checkpoint()) is not None:
        checkpoint.to_directory(str(folder))
    if distributed.is_rank_zero and (folder / LAST).is_file():
        status.add_line.remote("resuming from the last checkpoint")
    finished = run_experiment(
        spec,
        folder,
        unpack_data(ray.get(task["data"])),
        resume=True,
        accelerator=task["accelerator"],
        progress=False,
        callbacks=[WorkerReporter(status, spec.task.metric, uploaded)],
        distributed=distributed,
        title=f"{spec.task.kind}, {distributed.world_size} workers",
    )
    if not distributed.is_rank_zero:
        return
    if uploaded is not None:
        copy_files(str(folder), storage.root, source_filesystem=LocalFileSystem(), destination_filesystem=storage.files)
    text = finished.report.describe(finished.summary, folder)
    ray.get(status.add_line.remote(text.replace(str(folder), storage.location)))
