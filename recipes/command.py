"""What the command lines of the recipes share: the options of a run, its folder, and errors as sentences."""

import argparse
import errno
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from sma.errors import CheckpointError, SmaError, SpecError, quote, reason
from sma.recipes.experiment import EXPERIMENT, LAST, SUMMARY, ExperimentSpec, load_experiment
from sma.recipes.folders import cache_folder as cache_folder
from sma.recipes.folders import check_run_folder, expand
from sma.recipes.names import plain
from sma.streams import run_command


class CommandOptions(BaseSettings):
    """Settings from the command line, or from variables whose names begin with SMA_."""

    model_config = SettingsConfigDict(env_prefix="SMA_", cli_kebab_case=True, cli_implicit_flags=True, cli_avoid_json=True, extra="forbid")

    @field_validator("*", mode="after")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        """A shell replaces the `~` of `--out ~/x` but not that of `--out=~/x`."""
        return expand(value) if isinstance(value, Path) else value


class RunOptions(CommandOptions):
    """The options of every recipe that trains."""

    spec: Path | None = Field(default=None, description="an experiment of your own instead of a preset: a YAML file")
    set: list[str] = Field(
        default=[],
        description="path=value: change a field before validation, such as layers.layer.router.temperature_scale=0.5; may be repeated",
    )
    seed: int | None = Field(default=None, description="of weights, sample order and dropout; default the preset's")
    out: Path | None = Field(default=None, description="the run folder; default runs/TASK-PRESET-TIME")
    resume: Path | None = Field(default=None, description="go on with the run in this folder")
    data: Path = Field(default_factory=cache_folder, description="where data is kept between runs")
    accelerator: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="the device")
    progress: bool = Field(default=True, description="show a progress bar")

    @property
    def name(self) -> str:
        """The name of the preset, such as `listops_tiny`."""
        raise TypeError(f"{type(self).__name__} must define name")


class OneRunOptions(RunOptions):
    """The options of the recipes that train one model."""

    evaluate: Path | None = Field(default=None, description="test the model of the finished run in this folder again, instead of training")


Options = TypeVar("Options", bound=CommandOptions)


def parse(options: type[Options], arguments: list[str]) -> Options:
    """Read a command line."""
    if "set" not in options.model_fields:
        return CliApp.run(options, cli_args=arguments)
    # By itself, because pydantic-settings cuts the values of a list at commas: {kind: sma, temperature_scale: 0.5} has one.
    parser = argparse.ArgumentParser(prog=options.model_config.get("cli_prog_name"), add_help=False, allow_abbrev=False)
    parser.add_argument("--set", action="append", metavar="path=value")
    known, others = parser.parse_known_args(arguments)
    return CliApp.run(options, cli_args=others, **({"set": known.set} if known.set else {}))


def exit_code(command: Callable[[], object]) -> int:
    """Run a command; errors become sentences and exit codes, and so does a reader of the output that goes away (`sma.streams`)."""
    return run_command(lambda: _exit_code(command))


def _exit_code(command: Callable[[], object]) -> int:
    try:
        command()
    except ValidationError as error:
        for item in error.errors():
            name = "-".join(str(part) for part in item["loc"]).replace("_", "-")
            message = item["msg"].removeprefix("Value error, ")
            _say(f"--{name}={quote(item['input'])}: {message[:1].lower()}{message[1:]}; see --help")
        return 2
    except (SmaError, SettingsError) as error:
        _say(f"error: {error}")
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.filename is None:
            raise
        where = f" ({quote(str(error.filename))})" if error.filename else ""
        _say(f"error: {reason(error)}{where}" + ("; make room, and go on with --resume and the run folder" if full else ""))
        return 2
    except KeyboardInterrupt:
        _say("interrupted; go on with --resume and the run folder")
        return 130
    return 0


def _say(sentences: str) -> None:
    """Print sentences, one a line; what stands in a name is not for the terminal to carry out."""
    print("\n".join(plain(line) for line in sentences.split("\n")), file=sys.stderr)


def experiment(options: RunOptions) -> tuple[ExperimentSpec, Path]:
    """The experiment and the run folder that the options ask for.

    Raises:
        SmaError: a sentence for the user.
    """
    spec, out = _resumed(options) if options.resume is not None else _fresh(options)
    check_run_folder(out)
    return spec, out


def _fresh(options: RunOptions) -> tuple[ExperimentSpec, Path]:
    source = options.spec if options.spec is not None else options.name
    seed = [f"seed={options.seed}"] if options.seed is not None else []
    spec = load_experiment(source, [*options.set, *seed])
    out = options.out or Path("runs") / f"{options.name.replace('_', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"the folder {str(out)!r} is not empty; give another --out, or --resume {out} to go on with the run in it")
    return spec, out


def _resumed(options: RunOptions) -> tuple[ExperimentSpec, Path]:
    out = options.resume
    if out is None or not (out / EXPERIMENT).is_file():
        raise CheckpointError(f"there is no run in {str(out)!r}: {EXPERIMENT} is missing; give the folder of an earlier --out")
    if options.set or options.seed is not None or options.spec is not None:
        raise SpecError("--resume goes on with the experiment as it was; leave --set, --seed and --spec out, or start a new run")
    if (out / SUMMARY).is_file():
        raise CheckpointError(f"the run in {str(out)!r} is finished; its results stand in {out / SUMMARY}")
    if not (out / LAST).is_file():
        print(f"no checkpoint yet in {plain(out)}: starting from the beginning")
    return load_experiment(out / EXPERIMENT), out
