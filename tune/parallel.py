"""One model trained by several processes at once, each on its part of every batch, through Ray Train.

All of them run the recipe as one process would; Lightning averages their gradients. Where a process dies, Ray starts
all of them again, and they go on from the last checkpoint of the run folder.
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
from sma.tune.environment import ray_settings
from sma.tune.lifeline import follow
from sma.tune.scratch import scratch_folder
from sma.tune.sharing import PackedData, pack_data, unpack_data
from sma.tune.storage import Storage

RAY = "ray"
"""Ray's own folder in the run folder while it trains; behind a URI the checkpoints lie there."""


_PATIENCE = 5.0
"""Seconds in which the actor to which the workers talk must answer; then the cluster is looked at, and it is asked
again.
"""


class Workers(NamedTuple):
    """How many processes train, and what they get.

    Attributes:
        number: how many.
        cpus: cores of each, and threads where the experiment does not say.
        address: of a running Ray cluster; None: one on this machine.
        accelerator: Lightning's name for the device; with a GPU, one for each process.
        restarts: how often all of them are started again after one has died.
    """

    number: int
    cpus: int = 1
    address: str | None = None
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    restarts: int = 3

    @property
    def resources(self) -> ResourceSpec:
        """Of one process."""
        return ResourceSpec(cpus=self.cpus, accelerator=self.accelerator, address=self.address)

    def check_room(self) -> None:
        """Refuse what the machines cannot hold, for which Ray would wait without a word; joins the cluster at the
        address.

        Raises:
            SpecError: there are fewer cores or GPUs, or no cluster.
        """
        room = check_resources(self.resources, self.number, "worker").concurrent
        if room < self.number:
            raise SpecError(
                f"{self.number} workers of {self.cpus} CPUs do not fit, there is room for {room}; lower --workers or "
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


@ray.remote(num_cpus=0)
class Board:
    """What the workers say to the process that started them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failure: str | None = None

    def say(self, line: str) -> None:
        """Add a line for the user."""
        self.lines.append(line)

    def fail(self, reason: str) -> None:
        """Note that trying again would only fail again."""
        self.failure = self.failure or reason

    def read(self, start: int) -> tuple[list[str], str | None]:
        """The lines from number `start` on, and why the training failed, if it did."""
        return self.lines[start:], self.failure


class WorkerReporter(Checkpoint):
    """Says how every evaluation went; behind a URI it sends the run folder there.

    A `Checkpoint` to Lightning, which calls those last: when it looks at the folder, the checkpoints of this evaluation
    are in it.

    Args:
        board: where it says so.
        metric: the metric of the task.
        folder: the run folder, if it must be sent.
    """

    def __init__(self, board: Any, metric: Metric, folder: Path | None) -> None:
        self.board, self.metric, self.folder = board, metric, folder

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what was measured."""
        if self.folder is not None:
            # All of them must call it, and it waits for all.
            train.report(
                {}, checkpoint=train.Checkpoint.from_directory(str(self.folder)) if trainer.is_global_zero else None
            )
        if trainer.is_global_zero:
            names = (f"val_{self.metric.name}", "val_loss", "val_rate")
            found = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
            measures = ", ".join(
                f"{name.removeprefix('val_').replace('_', ' ')} {value:.4f}" for name, value in found.items()
            )
            self.board.say.remote(f"update {trainer.global_step:,} of {trainer.max_steps:,}: {measures}")


def train_parallel(
    spec: ExperimentSpec,
    storage: Storage,
    workers: Workers,
    *,
    data_folder: Path,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train one model with several processes, and leave the run folder that one process would leave; returns the
    summary.

    The batch of an update is that of one process, `training.batch_size` samples or stretches of a text, of which every
    worker takes its part; the mean of their gradients is the gradient of the batch, so that the number of workers
    changes nothing but rounding. What looks at a whole batch by other means sees a worker's part of it: batch norm that
    is not synchronised, the draws of dropout and of routers that sample, and the losses in `training.losses`. A folder
    with a checkpoint of the same experiment goes on from there, whatever number of workers wrote it.

    Args:
        spec: the experiment.
        storage: the run folder: one that all machines see under the same path, or a URI.
        workers: how many, and what they get.
        data_folder: where data is kept between runs.
        progress: show bars while data is prepared.
        say: is called with every line about the training.

    Raises:
        SmaError: a sentence for the user.
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
    with ray_settings({}), cluster(workers.resources, workers.number, packed.num_bytes) as slots:
        board = Board.remote()  # type: ignore[attr-defined]
        task = {"spec": spec, "location": storage.location, "data": ray.put(packed), "board": board, "cpus": slots.cpus}
        trainer = TorchTrainer(
            _work,
            train_loop_config={**task, "accelerator": slots.accelerator},
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
        _follow(trainer, board, workers, say)
    summary: dict[str, Any] | None = storage.read_json(SUMMARY)
    if summary is None:
        raise CheckpointError(
            f"the training is over, and there is no {storage.address(SUMMARY)}; all machines must see this folder"
        )
    storage.remove(RAY)
    return summary


def _follow(trainer: TorchTrainer, board: Any, workers: Workers, say: Callable[[str], None]) -> None:
    """Wait for the end and pass on what the workers say."""
    count, failure = 0, None

    def look() -> None:
        nonlocal count, failure
        with suppress(ray.exceptions.RayError):  # of a cluster that is lost, which is found out elsewhere
            lines, failure = ray.get(board.read.remote(count), timeout=_PATIENCE)
            count += len(lines)
            for line in lines:
                say(line)

    try:
        follow(trainer.fit, look)
    except SmaError:
        raise
    except Exception as error:
        if failure is None:
            reason = " ".join(str(error).split())[-600:]
            raise SmaError(
                f"the training failed after {workers.restarts} restarts: {reason}; "
                "what is in the run folder is good up to its last checkpoint"
            ) from error
    if failure is not None:
        raise SmaError(failure)


def _work(task: dict[str, Any]) -> None:
    """What every process does."""
    board, context = task["board"], train.get_context()
    if ray.get(board.read.remote(0))[1] is not None:
        return
    torch.set_num_threads(task["cpus"])
    distributed = DistributedContext(
        context.get_world_rank(), context.get_world_size(), RayDDPStrategy(), (RayLightningEnvironment(),)
    )
    storage = Storage(task["location"])
    board.say.remote(
        f"worker {distributed.rank + 1} of {distributed.world_size}: process {os.getpid()} on {socket.gethostname()}"
    )
    with nullcontext(Path(storage.location)) if storage.is_local else scratch_folder() as folder:
        try:
            _train(
                task["spec"],
                unpack_data(_packed(task["data"])),
                storage,
                folder,
                distributed,
                board,
                task["accelerator"],
            )
        except SmaError as error:
            ray.get(board.fail.remote(str(error)))
            raise


def _packed(reference: Any) -> PackedData:
    packed: PackedData = ray.get(reference)
    return packed


def _train(
    spec: ExperimentSpec,
    data: Any,
    storage: Storage,
    folder: Path,
    distributed: DistributedContext,
    board: Any,
    accelerator: str,
) -> None:
    """Run the recipe in a folder that holds what there is to go on from."""
    if storage.is_local and not (folder / EXPERIMENT).is_file():
        raise CheckpointError(
            f"{socket.gethostname()} does not see the run folder {str(folder)!r}; "
            "give a shared folder or a URI as --out"
        )
    checkpoint = None if storage.is_local else train.get_checkpoint()
    if checkpoint is not None:
        checkpoint.to_directory(str(folder))
    if distributed.is_rank_zero and (folder / LAST).is_file():
        board.say.remote("going on from the last checkpoint")
    finished = run_experiment(
        spec,
        folder,
        data,
        resume=True,
        accelerator=accelerator,
        progress=False,
        callbacks=[WorkerReporter(board, spec.task.metric, None if storage.is_local else folder)],
        distributed=distributed,
        title=f"{spec.task.kind}, {distributed.world_size} workers",
    )
    if not distributed.is_rank_zero:
        return
    if not storage.is_local:
        copy_files(str(folder), storage.root, source_filesystem=LocalFileSystem(), destination_filesystem=storage.files)
    words = finished.report.describe(finished.summary, folder)
    ray.get(board.say.remote(words.replace(str(folder), storage.location)))
