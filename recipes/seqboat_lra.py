"""SeqBoat on the tasks of the Long Range Arena.

python recipes/seqboat_lra.py --task listops --preset tiny
python recipes/seqboat_lra.py --resume RUN
"""

import argparse
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from sma.errors import CheckpointError, SmaError, SpecError
from sma.recipes.experiment import EXPERIMENT, LAST, SUMMARY, load_experiment
from sma.recipes.report import describe_run, draw


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparse-modular-activation"


class Options(BaseSettings):
    """Train SeqBoat on a task of the Long Range Arena and evaluate it."""

    model_config = SettingsConfigDict(
        env_prefix="SMA_", cli_prog_name="seqboat_lra", cli_kebab_case=True, cli_implicit_flags=True, cli_avoid_json=True, extra="forbid"
    )

    task: Literal["listops"] = Field(default="listops", description="what to learn")
    preset: Literal["tiny", "paper"] = Field(default="tiny", description="minutes on two cores, or the paper's setting")
    spec: Path | None = Field(default=None, description="an experiment of your own instead of a preset: a YAML file")
    set: list[str] = Field(
        default=[],
        description="path=value: change a field before validation, such as layers.layer.router.temperature_scale=0.5; may be repeated",
    )
    seed: int | None = Field(default=None, description="of weights, sample order and dropout; default the preset's")
    out: Path | None = Field(default=None, description="the run folder; default runs/TASK-PRESET-TIME")
    resume: Path | None = Field(default=None, description="go on with the run in this folder")
    data: Path = Field(default_factory=_cache, description="where data is kept between runs")
    accelerator: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="the device")
    progress: bool = Field(default=True, description="show a progress bar")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        run(_parse(sys.argv[1:] if arguments is None else arguments))
    except ValidationError as error:
        for item in error.errors():
            name = "-".join(str(part) for part in item["loc"]).replace("_", "-")
            print(f"--{name}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}; see --help", file=sys.stderr)
        return 2
    except (SmaError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; go on with --resume and the run folder", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str]) -> Options:
    # By itself, because pydantic-settings cuts the values of a list at commas: {kind: sma, temperature_scale: 0.5} has one.
    parser = argparse.ArgumentParser(prog="seqboat_lra", add_help=False, allow_abbrev=False)
    parser.add_argument("--set", action="append", metavar="path=value")
    known, others = parser.parse_known_args(arguments)
    return CliApp.run(Options, cli_args=others, **({"set": known.set} if known.set else {}))


def run(options: Options) -> dict[str, Any]:
    """Train and evaluate as the options say; returns the summary.

    Raises:
        SmaError: a sentence for the user.
    """
    spec, out = _resumed(options) if options.resume is not None else _fresh(options)
    from sma.recipes.run import run_experiment  # Lightning takes seconds to import; --help and a wrong --set need not wait for it

    data = spec.task.prepare(options.data, progress=options.progress)
    title = f"SeqBoat on {spec.task.kind}"
    print(
        f"{title}: {len(data.train):,} samples, {spec.model.num_parameters():,} parameters, {spec.training.updates:,} updates -> {out}",
        flush=True,
    )
    finished = run_experiment(spec, out, data, accelerator=options.accelerator, progress=options.progress)
    draw(finished.report, out, f"{title}: test accuracy {finished.summary['test_accuracy']:.1%}, seed {spec.seed}")
    print(describe_run(finished.summary, finished.report, out))
    return finished.summary


def _fresh(options: Options) -> tuple[Any, Path]:
    source = options.spec if options.spec is not None else f"{options.task}_{options.preset}"
    seed = [f"seed={options.seed}"] if options.seed is not None else []
    spec = load_experiment(source, [*options.set, *seed])
    out = options.out or Path("runs") / f"{options.task}-{options.preset}-{datetime.now():%Y%m%d-%H%M%S}"
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"the folder {str(out)!r} is not empty; give another --out, or --resume {out} to go on with the run in it")
    return spec, out


def _resumed(options: Options) -> tuple[Any, Path]:
    out = options.resume
    if out is None or not (out / EXPERIMENT).is_file():
        raise CheckpointError(f"there is no run in {str(out)!r}: {EXPERIMENT} is missing; give the folder of an earlier --out")
    if options.set or options.seed is not None or options.spec is not None:
        raise SpecError("--resume goes on with the experiment as it was; leave --set, --seed and --spec out, or start a new run")
    if (out / SUMMARY).is_file():
        raise CheckpointError(f"the run in {str(out)!r} is finished; its results stand in {out / SUMMARY}")
    if not (out / LAST).is_file():
        print(f"no checkpoint yet in {out}: starting from the beginning")
    return load_experiment(out / EXPERIMENT), out


if __name__ == "__main__":
    sys.exit(main())
