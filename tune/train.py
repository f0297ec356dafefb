"""Training of one model by several workers, from the command line.

python -m sma.tune train --task listops --preset tiny --workers 2 --out FOLDER
python -m sma.tune train --resume FOLDER --workers 2
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.errors import CheckpointError, SmaError
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.claims import DRIVER, claim_folder
from sma.recipes.io.command import CommandOptions, resumable, resuming
from sma.recipes.io.folders import cache_folder, lend_home
from sma.recipes.io.names import plain
from sma.recipes.io.option_parser import Cluster, File, Folder, FolderOrURI, Name, Setting
from sma.recipes.io.presets import check_preset
from sma.recipes.io.run_folder import EXPERIMENT, SUMMARY
from sma.recipes.io.signals import Preempted, on_preemption
from sma.spec import dump_yaml
from sma.yaml_text import read_fields

if TYPE_CHECKING:
    from sma.tune.parallel import Workers
    from sma.tune.storage import Storage


class TrainOptions(CommandOptions):
    """Train one model data-parallel on Ray Train: the recipe's experiment and run folder, several processes, one
    machine or a cluster.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.tune train")

    repeatable: ClassVar[frozenset[str]] = frozenset(
        {"workers", "cpus", "restarts", "address", "data", "accelerator", "progress"}
    )

    task: Name = Field(
        default="listops", description="what to learn; with --preset the name of a preset, such as listops_tiny"
    )
    preset: Name = Field(default="tiny", description="which experiment of the task")
    spec: File | None = Field(default=None, description="an experiment of your own instead of a preset: a YAML file")
    set: list[Setting] = Field(default=[], description="change a field, such as training.updates=2000; may be repeated")
    seed: int | None = Field(default=None, description="of weights, sample order and dropout; default the preset's")
    workers: int = Field(
        default=2, ge=1, description="processes; each takes an equal part of every batch of training.batch_size samples"
    )
    cpus: int = Field(default=1, ge=1, description="cores of a worker")
    restarts: int = Field(
        default=3, ge=0, description="how often all go on from the last checkpoint after one has died"
    )
    address: Cluster | None = Field(
        default=None, description="a running Ray cluster: auto or HOST:PORT; default: one on this machine"
    )
    out: FolderOrURI | None = Field(
        default=None, description="the run folder, which all machines see, or a URI; default runs/TASK-PRESET-TIME"
    )
    resume: FolderOrURI | None = Field(
        default=None, description="resume the run in this folder or URI, with any number of workers"
    )
    data: Folder = Field(default_factory=cache_folder, description="where data is kept between runs")
    accelerator: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="the device; with GPUs each worker gets one"
    )
    progress: bool = Field(default=True, description="show bars while data is prepared, and every evaluation")


def train(options: TrainOptions) -> dict[str, Any]:
    """Train as the options say; returns the summary.

    Raises:
        SmaError: a sentence for the user.
    """
    lend_home()
    # A wrong --set need not wait for Ray, which takes seconds to import.
    spec = None if options.resume is not None else _fresh(options)
    from sma.tune.parallel import Workers
    from sma.tune.storage import Storage

    workers = Workers(options.workers, options.cpus, options.address, options.accelerator, options.restarts)
    if spec is None:
        storage = Storage(str(options.resume))
        spec = _resumed(options, storage)
        workers.check_experiment(spec)
        with storage.locked():  # which the first worker will do; whether another one has the folder is known now
            pass
    else:
        workers.check_experiment(spec)
        workers.check_room()
        storage = _claim(options, spec)
    # The workers begin after seconds, and this process writes, too.
    with storage.locked(DRIVER):
        return _train(spec, storage, workers, options)


def _train(spec: ExperimentSpec, storage: "Storage", workers: "Workers", options: TrainOptions) -> dict[str, Any]:
    from sma.tune.parallel import train_parallel

    print(
        f"{spec.task.kind}: {spec.model.num_parameters():,} parameters, {spec.training.updates:,} updates of "
        f"{spec.training.batch_size} samples, {workers.number} workers -> {plain(storage.address(''))}",
        flush=True,
    )
    with endable(options, storage):
        return train_parallel(spec, storage, workers, data_folder=options.data, progress=options.progress, say=_say)


@contextmanager
def endable(options: CommandOptions, storage: "Storage") -> Iterator[None]:
    """Add the whole command that resumes to what ends the block from outside: Ctrl-C, SIGTERM, SIGUSR1, a full disk, or
    the end of the cluster.

    Args:
        options: of the command.
        storage: the folder.

    Raises:
        SmaError: the cluster is lost.
    """
    from sma.tune.lifeline import ClusterLost

    where = storage.address("")
    try:
        with on_preemption(_end_once()), resumable(options, where, lambda: True):
            yield
    except ClusterLost as error:
        raise SmaError(f"{error}; resume with: {resuming(options, where)}") from error


def _end_once() -> Callable[[int], None]:
    """What ends the work at the first signal; further ones do not disturb the end."""
    numbers: list[int] = []

    def act(number: int) -> None:
        numbers.append(number)
        if len(numbers) == 1:
            raise Preempted(number, "what is done is kept")

    return act


def _claim(options: TrainOptions, spec: ExperimentSpec) -> "Storage":
    """The folder of a new run, which no other process can take once the experiment stands in it."""
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


def _say(line: str) -> None:
    print(line, flush=True)


def _fresh(options: TrainOptions) -> ExperimentSpec:
    name = f"{options.task}_{options.preset}"
    if options.spec is not None:
        options.refuse(["task", "preset"], "--spec has the task and the training of its own")
    else:
        check_preset(name)
    source = options.spec if options.spec is not None else name
    return load_experiment(source, [*options.set, *([f"seed={options.seed}"] if options.seed is not None else [])])


def _resumed(options: TrainOptions, storage: "Storage") -> ExperimentSpec:
    options.refuse_all_but(["resume"], "--resume continues the experiment as it was", "start a new run")
    content = storage.read(EXPERIMENT)
    if content is None:
        raise CheckpointError(
            f"there is no run in {storage.address('')!r}: {EXPERIMENT} is missing; give the folder of an earlier --out"
        )
    if storage.read(SUMMARY) is not None:
        raise CheckpointError(
            f"the run in {storage.address('')!r} is finished; its results stand in {storage.address(SUMMARY)}"
        )
    return load_experiment(read_fields(content, storage.address(EXPERIMENT)))
