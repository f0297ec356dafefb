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
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.errors import SmaError, SpecError, did_you_mean
from sma.recipes.io.claims import claim_folder
from sma.recipes.io.command import CommandOptions, exit_code, parse
from sma.recipes.io.folders import cache_folder, lend_home
from sma.recipes.io.names import plain, shell_word
from sma.recipes.io.option_parser import Cluster, File, Folder, FolderOrURI, Name, Names, Setting
from sma.recipes.io.presets import check_preset
from sma.streams import end_process
from sma.tune.sweep import SweepSpec, make_sweep, read_sweep, shipped_sweeps
from sma.tune.train import TrainOptions, endable, train

if TYPE_CHECKING:
    from sma.tune.cluster import ResourceSpec
    from sma.tune.storage import Storage

COMMANDS = ("report", "train")


class Options(CommandOptions):
    """Search how sparse and how wide a model should be: many trainings of one experiment on Ray Tune.

    Two commands besides: `sma report` writes the results of a sweep again, `python -m sma.tune train` trains one model
    with several workers.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.tune")

    repeatable: ClassVar[frozenset[str]] = frozenset(
        {"cpus", "gpus", "accelerator", "concurrent", "address", "data", "silence", "progress"}
    )

    task: Name = Field(
        default="listops", description="what to learn; with --preset the name of a shipped sweep, such as listops_tiny"
    )
    preset: Name = Field(default="tiny", description="which sweep of the task")
    space: File | None = Field(default=None, description="a sweep of your own instead of a shipped one: a YAML file")
    spec: File | None = Field(default=None, description="an experiment of your own as trial 0: a YAML file")
    set: list[Setting] = Field(
        default=[],
        description="change a field in all trials, such as training.updates=2000; may be repeated",
    )
    seed: int | None = Field(default=None, description="of the trainings; default the experiment's")
    search_seed: int | None = Field(default=None, description="of the search; default 0")
    samples: int | None = Field(
        default=None, description="trials, trial 0 among them, which is the experiment as it is; default 16"
    )
    objectives: Names | None = Field(
        default=None, description="of quality, rate, time, macs, with commas; default quality,rate"
    )
    stop: bool = Field(default=True, description="stop the weak by their quality")
    grace: int | None = Field(
        default=None, description="updates before which no trial is stopped; default a quarter of them"
    )
    reduction: float | None = Field(
        default=None, description="one in so many trials goes on from one rung to the next; default 2"
    )
    silence: float | None = Field(
        default=None,
        gt=0.0,
        description="seconds without a batch trained or evaluated after which the process of a trial is replaced; "
        "default 1800",
    )
    storage: FolderOrURI | None = Field(
        default=None, description="the folder of the sweep, or a URI; default runs/sweep-TASK-PRESET-TIME"
    )
    resume: FolderOrURI | None = Field(default=None, description="resume the sweep in this folder")
    cpus: int = Field(default=1, ge=1, description="cores of a trial")
    gpus: float | None = Field(
        default=None, ge=0.0, description="GPUs of a trial, such as 0.25; default one if there are any"
    )
    concurrent: int | None = Field(default=None, ge=1, description="trials at once; default as many as fit")
    address: Cluster | None = Field(
        default=None, description="a running Ray cluster: auto or HOST:PORT; default: one on this machine"
    )
    data: Folder = Field(default_factory=cache_folder, description="where data is kept between runs")
    accelerator: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="the device")
    progress: bool = Field(default=True, description="show bars, and a table of the trials")


class ReportOptions(CommandOptions):
    """Write tables, figure, best specs and summary of a sweep again, from the records of its trials."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.tune report")

    folder: FolderOrURI = Field(description="the folder of the sweep, or its URI")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        name, rest = given[0], given[1:]
    elif any(word.partition("=")[0] == "--workers" for word in given):
        # Only a training has them, also without the word.
        name, rest = "train", given
    else:
        name, rest = "", given
    return exit_code(lambda: _run(name, rest))


def _run(name: str, given: list[str]) -> None:
    if name == "report":
        report(parse(ReportOptions, given, positional="folder"))
    elif name == "train":
        train(parse(TrainOptions, given))
    elif given and not given[0].startswith("-"):
        raise SpecError(
            f"unknown command {given[0]!r}{did_you_mean(given[0], COMMANDS, 'commands')}; without one a sweep is run"
        )
    else:
        search(parse(Options, given))


def search(options: Options) -> dict[str, Any]:
    """Run a sweep as the options say; returns the summary.

    Raises:
        SmaError: a sentence for the user.
    """
    lend_home()
    # Ray takes seconds to import; --help and a wrong --set need not wait for it.
    from sma.tune.cluster import ResourceSpec, check_resources
    from sma.tune.folder import load_sweep, start_sweep
    from sma.tune.storage import Storage

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
        return _search(sweep, storage, resources, options)


def _search(sweep: SweepSpec, storage: "Storage", resources: "ResourceSpec", options: Options) -> dict[str, Any]:
    from sma.tune.driver import run_sweep

    print(
        f"{sweep.samples} trials of {sweep.updates:,} updates on {sweep.experiment.task.kind} -> "
        f"{plain(storage.address(''))}",
        flush=True,
    )
    with endable(options, storage):
        summary = run_sweep(sweep, storage, resources, data_folder=options.data, progress=options.progress)
    _describe(summary, storage, sweep.quality.name)
    if summary["failed"] == summary["trials"]:
        raise SmaError(
            "all trials failed, see why above; start a new sweep when that is mended: "
            f"{storage.address('')} keeps the records"
        )
    return summary


@contextmanager
def _claimed(options: Options) -> "Iterator[Storage]":
    """The folder of a new sweep, which no other process has or takes meanwhile."""
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
        SmaError: a sentence for the user.
    """
    lend_home()
    from sma.tune.folder import load_sweep
    from sma.tune.results import write_results
    from sma.tune.storage import Storage

    storage = Storage(options.folder)
    sweep = load_sweep(storage)
    with storage.locked():
        summary = write_results(sweep, storage)
    _describe(summary, storage, sweep.quality.name)
    return summary


def _sweep(options: Options) -> SweepSpec:
    stopping: dict[str, Any] = {
        name: getattr(options, name) for name in ("grace", "reduction") if getattr(options, name) is not None
    }
    if options.space is not None:
        options.refuse(["task", "preset"], "--space is a sweep of its own")
    else:
        check_preset(f"{options.task}_{options.preset}", shipped_sweeps(), "sweep")
    if not options.stop:
        options.refuse(["grace", "reduction"], "--no-stop trains every trial to its end")
    source = read_sweep(options.space or f"{options.task}_{options.preset}", options.spec)
    settings = [*options.set, *([f"seed={options.seed}"] if options.seed is not None else [])]
    sweep = make_sweep(
        source,
        settings=settings,
        samples=options.samples,
        objectives=None
        if options.objectives is None
        else tuple(name.strip() for name in options.objectives.split(",")),
        seed=options.search_seed,
        stopping=stopping or None,
    )
    changed = [*(f"{path}={value}" for path, value in (source.get("settings") or {}).items()), *settings]
    if changed:
        print(f"in all trials: {plain(', '.join(changed))}")
    return sweep if options.stop else sweep.replace(stopping=None)


def _describe(summary: dict[str, Any], storage: Any, quality: str) -> None:
    """Print the end of a sweep in words; `quality` is the column of the metric."""
    from sma.tune.results import FIGURE, TABLE

    print(f"{summary['finished']} trials finished, {summary['stopped']} stopped early, {summary['failed']} failed")
    reasons: dict[str, list[str]] = defaultdict(list)
    for failure in summary["failures"]:
        reasons[failure["reason"]].append(str(failure["trial"]))
    for reason, trials in reasons.items():
        print(f"  trial{'s' if len(trials) > 1 else ''} {', '.join(trials)} failed: {plain(reason)}")
    if quality in (summary["best"] or {}):
        for title, key in (
            ("trial 0", "baseline"),
            ("best", "best"),
            ("sparsest as good", "sparsest_as_good_as_baseline"),
        ):
            point = summary[key]
            if point is not None and quality in point:
                where = (
                    f"trial {point['trial']}, {storage.address(point['spec'])}"
                    if key != "baseline"
                    else "the experiment as it is"
                )
                print(
                    f"{title:<17} {quality.replace('_', ' ')} {point[quality]:.4f}, "
                    f"rate {point['rate']:.3f}: {plain(where)}"
                )
    _describe_front(summary, storage, quality)
    if summary["idle_share"] is not None:
        print(f"{summary['seconds']:,.0f} s in {summary['slots']} slots, {summary['idle_share']:.0%} of them idle")
    print(f"results           {plain(storage.address(''))}: summary.json, trials.csv, {TABLE}, {FIGURE}, best/")


def _describe_front(summary: dict[str, Any], storage: Any, quality: str) -> None:
    """Print the trials of the Pareto front, and the command that trains one of them."""
    points = summary["pareto"]
    if not points:
        return
    print(f"Pareto front      {len(points)} of {summary['finished']} finished trials")
    for point in points:
        print(f"  trial {point['trial']:<9} {quality.replace('_', ' ')} {point[quality]:.4f}, rate {point['rate']:.3f}")
    if storage.folder is not None:
        spec = storage.address(points[0]["spec"])
        print(f"train one         sma train --spec {shell_word(spec)}")


if __name__ == "__main__":
    end_process(main())
