"""Training of one model by several workers, from the command line.

python -m sma.tune train --task listops --preset tiny --workers 2 --out FOLDER
python -m sma.tune train --resume FOLDER --workers 2
"""

import sys
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.errors import CheckpointError, SpecError
from sma.recipes.command import CommandOptions, cache_folder
from sma.recipes.experiment import EXPERIMENT, SUMMARY, ExperimentSpec, load_experiment
from sma.recipes.names import plain, shell_word
from sma.yaml_text import read_fields

if TYPE_CHECKING:
    from sma.tune.storage import Storage


class TrainOptions(CommandOptions):
    """Train one model data-parallel on Ray Train: the recipe's experiment and run folder, several processes, one machine or a cluster."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.tune train")

    task: str = Field(default="listops", description="what to learn; with --preset the name of a preset, such as listops_tiny")
    preset: str = Field(default="tiny", description="which experiment of the task")
    spec: Path | None = Field(default=None, description="an experiment of your own instead of a preset: a YAML file")
    set: list[str] = Field(default=[], description="path=value: change a field, such as training.updates=2000; may be repeated")
    seed: int | None = Field(default=None, description="of weights, sample order and dropout; default the preset's")
    workers: int = Field(default=2, ge=1, description="processes; each takes an equal part of every batch of training.batch_size samples")
    cpus: int = Field(default=1, ge=1, description="cores of a worker")
    restarts: int = Field(default=3, ge=0, description="how often all go on from the last checkpoint after one has died")
    address: str | None = Field(default=None, description="a running Ray cluster: auto or HOST:PORT; default: one on this machine")
    out: str | None = Field(default=None, description="the run folder, which all machines see, or a URI; default runs/TASK-PRESET-TIME")
    resume: str | None = Field(default=None, description="go on with the run in this folder or URI, with any number of workers")
    data: Path = Field(default_factory=cache_folder, description="where data is kept between runs")
    accelerator: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="the device; with GPUs each worker gets one")
    progress: bool = Field(default=True, description="show bars while data is prepared, and every evaluation")


def train(options: TrainOptions) -> dict[str, Any]:
    """Train as the options say; returns the summary.

    Raises:
        SmaError: a sentence for the user.
    """
    spec = None if options.resume is not None else _fresh(options)  # a wrong --set need not wait for Ray, which takes seconds to import
    from sma.tune.parallel import Workers, train_parallel
    from sma.tune.storage import Storage

    workers = Workers(options.workers, options.cpus, options.address, options.accelerator, options.restarts)
    storage = Storage(options.resume or options.out or f"runs/{options.task}-{options.preset}-{datetime.now():%Y%m%d-%H%M%S}")
    if spec is None:
        spec = _resumed(options, storage)
    elif storage.names():
        where = storage.address("")
        raise CheckpointError(f"the folder {where!r} is not empty; give another --out, or --resume {where} to go on with the run in it")
    workers.check_experiment(spec)
    print(
        f"{spec.task.kind}: {spec.model.num_parameters():,} parameters, {spec.training.updates:,} updates of {spec.training.batch_size} "
        f"samples, {workers.number} workers -> {plain(storage.address(''))}",
        flush=True,
    )
    try:
        return train_parallel(spec, storage, workers, data_folder=options.data, progress=options.progress, say=_say)
    except KeyboardInterrupt:
        interrupted(options, storage.address(""), {"workers", "cpus", "restarts", "address", "data", "accelerator", "progress"})


def interrupted(options: CommandOptions, where: str, kept: Collection[str]) -> NoReturn:
    """Leave after Ctrl-C, with the whole command that goes on.

    Args:
        options: what was given.
        where: the folder.
        kept: names of the options that must be given again.
    """
    print(f"interrupted; go on with: {resuming(options, where, kept)}", file=sys.stderr)
    raise SystemExit(130)


def resuming(options: CommandOptions, where: str, kept: Collection[str]) -> str:
    """The whole command that goes on; see `interrupted`."""
    words = [str(options.model_config.get("cli_prog_name")), "--resume", shell_word(where)]
    for name in sorted(options.model_fields_set & {*kept}):
        value, flag = getattr(options, name), name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", shell_word(value)]
    return " ".join(words)


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
        raise CheckpointError(f"there is no run in {storage.address('')!r}: {EXPERIMENT} is missing; give the folder of an earlier --out")
    if storage.read(SUMMARY) is not None:
        raise CheckpointError(f"the run in {storage.address('')!r} is finished; its results stand in {storage.address(SUMMARY)}")
    return load_experiment(read_fields(content, storage.address(EXPERIMENT)))
