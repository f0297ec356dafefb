"""Training of one model by several workers, from the command line.

python -m sma.tune train --task listops --preset tiny --workers 2 --out FOLDER
python -m sma.tune train --resume FOLDER --workers 2
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.errors import CheckpointError, SmaError
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.claims import DRIVER, claim_folder
from sma.recipes.io.command import CommandOptions, resumable, resuming
from sma.recipes.io.folders import lend_home
from sma.recipes.io.names import plain
from sma.recipes.io.option_parser import Cluster, FolderOrURI, Name
from sma.recipes.io.run_folder import EXPERIMENT, SUMMARY
from sma.recipes.io.signals import Preempted, on_preemption
from sma.recipes.training.options import ExperimentOptions
from sma.recipes.training.start import load_requested
from sma.spec import dump_yaml
from sma.yaml_text import read_fields

if TYPE_CHECKING:
    from sma.tune.storage import Storage


class ParallelOptions(ExperimentOptions):
    """Train one model data-parallel on Ray Train, on one machine or a cluster. The experiment and the run folder are
    those of the recipes.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.tune train")

    repeatable: ClassVar[frozenset[str]] = ExperimentOptions.repeatable | {"workers", "cpus", "restarts", "address"}

    task: Name = Field(
        default="listops", description="the task; with --preset the name of a preset, such as listops_tiny"
    )
    preset: Name = Field(default="tiny", description="the experiment of the task, such as tiny or paper")
    workers: int = Field(
        default=2, ge=1, description="number of processes; each gets an equal shard of the training.batch_size samples"
    )
    cpus: int = Field(default=1, ge=1, description="cores of a worker")
    restarts: int = Field(
        default=3,
        ge=0,
        description="maximum number of times that all workers resume from the last checkpoint after one has died",
    )
    address: Cluster | None = Field(
        default=None, description="a running Ray cluster: auto or HOST:PORT; default: one on this machine"
    )
    out: FolderOrURI | None = Field(
        default=None,
        description="the run folder, on a file system that all machines share, or a URI; default runs/TASK-PRESET-TIME",
    )
    resume: FolderOrURI | None = Field(
        default=None, description="resume the run in this folder or URI, with any number of workers"
    )

    @property
    def name(self) -> str:
        return f"{self.task}_{self.preset}"


def train_model(options: ParallelOptions) -> dict[str, Any]:
    """Train a model with these options; returns the summary.

    Raises:
        SmaError: the command fails; the message is for the user.
    """
    lend_home()
    # Ray takes seconds to import, which is not needed for a wrong --set.
    spec = None if options.resume is not None else load_requested(options)
    from sma.tune.parallel import Workers, train_parallel
    from sma.tune.storage import Storage

    workers = Workers(options.workers, options.cpus, options.address, options.accelerator, options.restarts)
    if spec is None:
        storage = Storage(str(options.resume))
        spec = _resumed(options, storage)
        workers.check_experiment(spec)
        with storage.locked():  # The first worker locks the folder later; this raises the error of a busy folder now.
            pass
    else:
        workers.check_experiment(spec)
        workers.check_room()
        storage = _claim(options, spec)
    # The workers start seconds later, and this process writes the folder too.
    with storage.locked(DRIVER):
        print(
            f"{spec.task.kind}: {spec.model.num_parameters():,} parameters, {spec.training.updates:,} updates of "
            f"{spec.training.batch_size} samples, {workers.number} workers -> {plain(storage.address(''))}",
            flush=True,
        )
        with endable(options, storage):
            return train_parallel(
                spec,
                storage,
                workers,
                data_folder=options.data,
                progress=options.progress,
                on_line=partial(print, flush=True),
            )


@contextmanager
def endable(options: CommandOptions, storage: "Storage") -> Iterator[None]:
    """Add the command that resumes to the error that ends the block: Ctrl-C, SIGTERM, SIGUSR1, a full disk, or the loss
    of the cluster.

    Args:
        options: the options of the command.
        storage: the folder.

    Raises:
        SmaError: the cluster is lost.
    """
    from sma.tune.lifeline import ClusterLost

    where, received = storage.address(""), False

    def preempt(number: int) -> None:
        nonlocal received
        if not received:  # further signals do not interrupt the end
            received = True
            raise Preempted(number, "completed work is kept")

    try:
        with on_preemption(preempt), resumable(options, where, lambda: True):
            yield
    except ClusterLost as error:
        raise SmaError(f"{error}; resume with: {resuming(options, where)}") from error


def _claim(options: ParallelOptions, spec: ExperimentSpec) -> "Storage":
    """The folder of a new run. No other process can claim it after the experiment is written into it."""
    from sma.tune.storage import Storage

    storage = Storage(options.out or f"runs/{options.task}-{options.preset}-{datetime.now():%Y%m%d-%H%M%S}")
    if storage.folder is None:
        if storage.names():
            where = storage.address("")
            raise CheckpointError(
                f"the folder {where!r} is not empty; give another --out, or --resume {where} to resume the run in it"
            )
        return storage
    with claim_folder(storage.folder, numbered=options.out is None) as folder:
        claimed = storage if folder == storage.folder else Storage(folder)
        claimed.write(EXPERIMENT, dump_yaml(spec))
    return claimed


def _resumed(options: ParallelOptions, storage: "Storage") -> ExperimentSpec:
    options.refuse_all_but(["resume"], "--resume continues the experiment as it was", "start a new run")
    content = storage.read(EXPERIMENT)
    if content is None:
        raise CheckpointError(
            f"there is no run in {storage.address('')!r}: {EXPERIMENT} is missing; give the folder of an earlier --out"
        )
    if storage.read(SUMMARY) is not None:
        raise CheckpointError(
            f"the run in {storage.address('')!r} is finished; its results are in {storage.address(SUMMARY)}"
        )
    return load_experiment(read_fields(content, storage.address(EXPERIMENT)))
