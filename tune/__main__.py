"""Sweeps, and training by several workers, from the command line.

python -m sma.tune --task listops --preset tiny --samples 16 --storage FOLDER
python -m sma.tune --resume FOLDER
python -m sma.tune report FOLDER
python -m sma.tune train --task listops --preset tiny --workers 2 --out FOLDER
"""

if __name__ == "__main__":
    from sma.commands.extras import require_extra

    require_extra("tune")

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.errors import SmaError, SpecError, did_you_mean
from sma.recipes.io.claims import claim_folder
from sma.recipes.io.command import CommandOptions, exit_code, parse
from sma.recipes.io.folders import lend_home
from sma.recipes.io.names import plain, shell_word
from sma.recipes.io.option_parser import Cluster, File, FolderOrURI, Name, Names, Setting
from sma.recipes.io.presets import check_preset
from sma.recipes.training.options import CallOptions
from sma.streams import end_process
from sma.tune.sweep import SweepSpec, make_sweep, read_sweep, shipped_sweeps
from sma.tune.train import ParallelOptions, endable, train_model

if TYPE_CHECKING:
    from sma.tune.storage import Storage

COMMANDS = ("report", "train")


class Options(CallOptions):
    """Search for the best sparsity and width of a model, with many trainings of one experiment on Ray Tune.

    Two more commands: `sma report` writes the results of a sweep again, `python -m sma.tune train` trains one model
    with several workers.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.tune")

    repeatable: ClassVar[frozenset[str]] = CallOptions.repeatable | {"cpus", "gpus", "concurrent", "address", "silence"}

    task: Name = Field(
        default="listops", description="the task; with --preset the name of a shipped sweep, such as listops_tiny"
    )
    preset: Name = Field(default="tiny", description="the sweep of the task, such as tiny")
    space: File | None = Field(default=None, description="your own sweep instead of a shipped one: a YAML file")
    spec: File | None = Field(default=None, description="your own experiment as trial 0: a YAML file")
    set: list[Setting] = Field(
        default=[],
        description="change a field in all trials, such as training.updates=2000; may be repeated",
    )
    seed: int | None = Field(default=None, description="seed of the trainings; default: that of the experiment")
    search_seed: int | None = Field(default=None, description="seed of the search; default 0")
    samples: int | None = Field(
        default=None, description="number of trials, including trial 0, the unchanged experiment; default 16"
    )
    objectives: Names | None = Field(
        default=None,
        description="objectives of the search, separated by commas: quality, rate, time, macs; default quality,rate",
    )
    stop: bool = Field(
        default=True, description="stop trials early that rank low among the others after equally many updates"
    )
    grace: int | None = Field(
        default=None, description="updates before which no trial is stopped; default a quarter of them"
    )
    reduction: float | None = Field(
        default=None, description="one in this many trials continues to the next rung; default 2"
    )
    silence: float | None = Field(
        default=None,
        gt=0.0,
        description="seconds without a batch of training or evaluation after which the process of a trial is "
        "replaced; default 1800",
    )
    storage: FolderOrURI | None = Field(
        default=None, description="the folder of the sweep, or a URI; default runs/sweep-TASK-PRESET-TIME"
    )
    resume: FolderOrURI | None = Field(default=None, description="resume the sweep in this folder")
    cpus: int = Field(default=1, ge=1, description="cores of a trial")
    gpus: float | None = Field(
        default=None, ge=0.0, description="GPUs of a trial, such as 0.25; default one if the machines have any"
    )
    concurrent: int | None = Field(
        default=None, ge=1, description="number of concurrent trials; default as many as fit on the machines"
    )
    address: Cluster | None = Field(
        default=None, description="a running Ray cluster: auto or HOST:PORT; default: one on this machine"
    )


class ReportOptions(CommandOptions):
    """Write the tables, the figure, the best specs and the summary of a sweep again, from the records of its trials."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.tune report")

    folder: FolderOrURI = Field(description="the folder or the URI of the sweep")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_code(lambda: _run(given))


def _run(given: list[str]) -> None:
    command = given[0] if given else ""
    if command == "report":
        report(parse(ReportOptions, given[1:], positional="folder"))
    elif command == "train":
        train_model(parse(ParallelOptions, given[1:]))
    elif any(word.partition("=")[0] == "--workers" for word in given):  # only `train` has this option
        train_model(parse(ParallelOptions, given))
    elif command and not command.startswith("-"):
        raise SpecError(
            f"unknown command {command!r}{did_you_mean(command, COMMANDS, 'commands')}; without one a sweep is run"
        )
    else:
        search(parse(Options, given))


def search(options: Options) -> dict[str, Any]:
    """Run a sweep with these options; returns the summary.

    Raises:
        SmaError: the command fails; the message is for the user.
    """
    lend_home()
    # Ray takes seconds to import, which is not needed for --help and a wrong --set.
    from sma.tune.cluster import ResourceSpec, check_resources
    from sma.tune.driver import run_sweep
    from sma.tune.storage import Storage
    from sma.tune.sweep_folder import load_sweep, start_sweep

    resources = ResourceSpec(**{name: getattr(options, name) for name in ResourceSpec.model_fields})
    with ExitStack() as stack:
        if options.resume is not None:
            options.refuse_all_but(["resume"], "--resume continues the sweep as it was", "start a new sweep")
            storage = Storage(options.resume)
            sweep = load_sweep(storage)
            stack.enter_context(storage.locked())
        else:
            sweep = _sweep(options)
            check_resources(resources, sweep.samples)
            storage = stack.enter_context(_claimed(options))
            start_sweep(sweep, storage)
        if options.silence is not None:
            sweep = sweep.replace(silence=options.silence)
        print(
            f"{sweep.samples} trials of {sweep.updates:,} updates on {sweep.experiment.task.kind} -> "
            f"{plain(storage.address(''))}",
            flush=True,
        )
        with endable(options, storage):
            summary = run_sweep(sweep, storage, resources, data_folder=options.data, progress=options.progress)
    _print_results(summary, storage, sweep.quality.name)
    if summary["failed"] == summary["trials"]:
        raise SmaError(
            "all trials failed, for the reasons above; correct the cause and start a new sweep: "
            f"{storage.address('')} keeps the records"
        )
    return summary


@contextmanager
def _claimed(options: Options) -> "Iterator[Storage]":
    """The folder of a new sweep, locked against other processes."""
    from sma.tune.storage import Storage

    if options.storage is None:
        name = f"sweep-{options.task}-{options.preset}-{datetime.now():%Y%m%d-%H%M%S}"
        with claim_folder(Path("runs") / name, numbered=True) as folder:
            yield Storage(folder)
        return
    storage = Storage(options.storage)
    with storage.locked():
        yield storage


def report(options: ReportOptions) -> dict[str, Any]:
    """Write the results of a sweep again; returns the summary.

    Raises:
        SmaError: the command fails; the message is for the user.
    """
    lend_home()
    from sma.tune.storage import Storage
    from sma.tune.sweep_folder import load_sweep
    from sma.tune.sweep_results import write_results

    storage = Storage(options.folder)
    sweep = load_sweep(storage)
    with storage.locked():
        summary = write_results(sweep, storage)
    _print_results(summary, storage, sweep.quality.name)
    return summary


def _sweep(options: Options) -> SweepSpec:
    if options.space is not None:
        options.refuse(["task", "preset"], "--space replaces the shipped sweep")
    else:
        check_preset(f"{options.task}_{options.preset}", shipped_sweeps(), "sweep")
    if not options.stop:
        options.refuse(["grace", "reduction"], "--no-stop trains every trial to its end")
    stopping = {name: value for name in ("grace", "reduction") if (value := getattr(options, name)) is not None}
    source = read_sweep(options.space or f"{options.task}_{options.preset}", options.spec)
    settings = [*options.set, *([f"seed={options.seed}"] if options.seed is not None else [])]
    objectives = options.objectives
    sweep = make_sweep(
        source,
        settings=settings,
        samples=options.samples,
        objectives=None if objectives is None else tuple(name.strip() for name in objectives.split(",")),
        seed=options.search_seed,
        stopping={**(source.get("stopping") or {}), **stopping} if stopping else None,
    )
    changed = [*(f"{path}={value}" for path, value in (source.get("settings") or {}).items()), *settings]
    if changed:
        print(f"in all trials: {plain(', '.join(changed))}")
    return sweep if options.stop else sweep.replace(stopping=None)


def _print_results(summary: dict[str, Any], storage: "Storage", quality: str) -> None:
    """Print the results of a sweep; `quality` is the column of the metric."""
    from sma.tune.sweep_results import FIGURE, TABLE

    def measures(point: dict[str, Any]) -> str:
        return f"{quality.replace('_', ' ')} {point[quality]:.4f}, rate {point['rate']:.3f}"

    print(f"{summary['finished']} trials finished, {summary['stopped']} stopped early, {summary['failed']} failed")
    reasons: dict[str, list[str]] = defaultdict(list)
    for failure in summary["failures"]:
        reasons[failure["reason"]].append(str(failure["trial"]))
    for reason, trials in reasons.items():
        print(f"  trial{'s' if len(trials) > 1 else ''} {', '.join(trials)} failed: {plain(reason)}")
    for key, title in _POINTS.items() if summary["best"] is not None else ():
        point = summary[key]
        if point is not None and quality in point:
            own = f"trial {point['trial']}, {storage.address(point['spec'])}"
            print(f"{title:<17} {measures(point)}: {plain('the unchanged experiment' if key == 'baseline' else own)}")
    if points := summary["pareto"]:
        print(f"Pareto front      {len(points)} of {summary['finished']} finished trials")
        for point in points:
            print(f"  trial {point['trial']:<9} {measures(point)}")
        if storage.folder is not None:
            print(f"train one         sma train --spec {shell_word(storage.address(points[0]['spec']))}")
    if summary["idle_share"] is not None:
        print(f"{summary['seconds']:,.0f} s in {summary['slots']} slots, {summary['idle_share']:.0%} of them idle")
    print(f"results           {plain(storage.address(''))}: summary.json, trials.csv, {TABLE}, {FIGURE}, best/")


_POINTS = {"baseline": "trial 0", "best": "best", "sparsest_as_good_as_baseline": "sparsest as good"}
"""Titles of the printed trials, by their keys in the summary."""


if __name__ == "__main__":
    end_process(main())
