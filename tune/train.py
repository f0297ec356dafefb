"""Training of one model by several workers, from the command line.

python -m sma.tune train --task listops --preset tiny --workers 2 --out FOLDER
python -m sma.tune train --resume FOLDER --workers 2
"""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.errors import CheckpointError, SmaError, SpecError
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.claims import DRIVER, claim_folder
from sma.recipes.io.command import CommandOptions
from sma.recipes.io.folders import cache_folder
from sma.recipes.io.names import plain, shell_word
from sma.recipes.io.option_parser import Cluster, File, Folder, FolderOrURI, Name, Setting
from sma.recipes.io.run_folder import EXPERIMENT, SUMMARY
from sma.recipes.io.signals import PREEMPTED, Preempted, on_preemption
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
    with resumable(
        options, storage.address(""), {"workers", "cpus", "restarts", "address", "data", "accelerator", "progress"}
    ):
        return train_parallel(spec, storage, workers, data_folder=options.data, progress=options.progress, say=_say)


@contextmanager
def resumable(options: CommandOptions, where: str, kept: Collection[str]) -> Iterator[None]:
    """Where the block is ended from outside, say the whole command that goes on: by Ctrl-C, SIGTERM, SIGUSR1, or the
    end of the cluster.

    Args:
        options: what was given.
        where: the folder.
        kept: names of the options that must be given again.

    Raises:
        SystemExit: a signal ended it; with status 130 for Ctrl-C, `PREEMPTED` for others.
        SmaError: the cluster is lost.
    """
    from sma.tune.lifeline import ClusterLost

    try:
        with on_preemption(_end_once()):
            yield
    except KeyboardInterrupt:
        interrupted("interrupted", 130, resuming(options, where, kept))
    except Preempted as end:
        interrupted(str(end), PREEMPTED, resuming(options, where, kept))
    except ClusterLost as error:
        raise SmaError(f"{error}; go on with: {resuming(options, where, kept)}") from error


def _end_once() -> Callable[[int], None]:
    """What ends the work at the first signal; further ones do not disturb the end."""
    numbers: list[int] = []

    def act(number: int) -> None:
        numbers.append(number)
        if len(numbers) == 1:
            raise Preempted(number, "what is done is kept")

    return act


def interrupted(why: str, status: int, command: str) -> NoReturn:
    """Leave with a status, and the command that goes on."""
    print(f"{why}; go on with: {command}", file=sys.stderr)
    raise SystemExit(status)


def resuming(options: CommandOptions, where: str, kept: Collection[str]) -> str:
    """The whole command that goes on; see `resumable`."""
    words = [str(options.model_config.get("cli_prog_name")), "--resume", shell_word(where)]
    for name in sorted(options.model_fields_set & {*kept}):
        value, flag = getattr(options, name), name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", shell_word(value)]
    return " ".join(words)


def _claim(options: TrainOptions, spec: ExperimentSpec) -> "Storage":
    """The folder of a new run, which no other process can take once the experiment stands in it."""
    from sma.tune.storage import Storage

    storage = Storage(options.out or f"runs/{options.task}-{options.preset}-{datetime.now():%Y%m%d-%H%M%S}")
    if storage.folder is None:
        if storage.names():
            where = storage.address("")
            raise CheckpointError(
                f"the folder {where!r} is not empty; give another --out, "
                f"or --resume {where} to go on with the run in it"
            )
        return storage
    with claim_folder(storage.folder, numbered=options.out is None) as folder:
        claimed = storage if folder == storage.folder else Storage(folder)
        claimed.write(EXPERIMENT, dump_yaml(spec))
    return claimed


def _say(line: str) -> None:
    print(line, flush=True)


def _fresh(options: TrainOptions) -> ExperimentSpec:
    source = options.spec if options.spec is not None else f"{options.task}_{options.preset}"
    return load_experiment(source, [*options.set, *([f"seed={options.seed}"] if options.seed is not None else [])])


def _resumed(options: TrainOptions, storage: "Storage") -> ExperimentSpec:
    given = sorted(options.model_fields_set & {"task", "preset", "spec", "set", "seed", "out"})
    if given:
        names = ", ".join("--" + name for name in given)
        raise SpecError(f"--resume goes on with the experiment as it was; leave {names} out, or start a new run")
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
