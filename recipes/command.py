"""What the command lines of the recipes share: the options of a run, its folder, and errors as sentences."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from sma.errors import CheckpointError, SmaError, SpecError, quote, reason
from sma.recipes.claims import claim_folder, run_lock
from sma.recipes.devices import check_device
from sma.recipes.estimates import check_data_fits, check_update_fits
from sma.recipes.experiment import EXPERIMENT, LAST, SUMMARY, ExperimentSpec, load_experiment
from sma.recipes.folders import cache_folder as cache_folder
from sma.recipes.folders import check_run_folder, expand
from sma.recipes.isolation import hidden_variables
from sma.recipes.names import plain
from sma.recipes.run_files import read_summary, refuse_another
from sma.recipes.signals import PREEMPTED, Preempted, end_at_once, on_preemption
from sma.streams import run_command


class CommandOptions(BaseSettings):
    """Settings from the command line, or from variables whose names begin with SMA_."""

    model_config = SettingsConfigDict(
        env_prefix="SMA_", cli_kebab_case=True, cli_implicit_flags=True, cli_avoid_json=True, extra="forbid"
    )

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
        description="path=value: change a field before validation, "
        "such as layers.layer.router.temperature_scale=0.5; may be repeated",
    )
    seed: int | None = Field(default=None, description="of weights, sample order and dropout; default the preset's")
    out: Path | None = Field(default=None, description="the run folder; default runs/TASK-PRESET-TIME")
    resume: Path | None = Field(default=None, description="go on with the run in this folder")
    auto_resume: bool = Field(
        default=False,
        description="go on with what is in the folder --out, where it began: a command that a job scheduler may repeat",
    )
    data: Path = Field(default_factory=cache_folder, description="where data is kept between runs")
    accelerator: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="the device")
    progress: bool = Field(default=True, description="show a progress bar")

    @property
    def name(self) -> str:
        """The name of the preset, such as `listops_tiny`."""
        raise TypeError(f"{type(self).__name__} must define name")


class OneRunOptions(RunOptions):
    """The options of the recipes that train one model."""

    evaluate: Path | None = Field(
        default=None, description="test the model of the finished run in this folder again, instead of training"
    )


Options = TypeVar("Options", bound=CommandOptions)


def parse(options: type[Options], arguments: list[str]) -> Options:
    """Read a command line."""
    if "set" not in options.model_fields:
        return CliApp.run(options, cli_args=arguments)
    # By itself, because pydantic-settings cuts the values of a list at commas: {kind: sma, temperature_scale: 0.5} has
    # one.
    parser = argparse.ArgumentParser(prog=options.model_config.get("cli_prog_name"), add_help=False, allow_abbrev=False)
    parser.add_argument("--set", action="append", metavar="path=value")
    known, others = parser.parse_known_args(arguments)
    return CliApp.run(options, cli_args=others, **({"set": known.set} if known.set else {}))


def exit_code(command: Callable[[], object]) -> int:
    """Run a command; errors become sentences and exit codes, and so does a reader of the output that goes away
    (`sma.streams`).

    | exit code | |
    |---|---|
    | 0 | done |
    | 2 | an error, in one sentence |
    | 75 | ended by SIGTERM or SIGUSR1 (`sma.recipes.signals.PREEMPTED`): what is done is kept |
    | 130 | ended by Ctrl-C |
    """
    return run_command(lambda: _exit_code(command))


def _exit_code(command: Callable[[], object]) -> int:
    try:
        with hidden_variables(), on_preemption(end_at_once):
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
        _say(
            f"error: {reason(error)}{where}"
            + ("; make room, and go on with --resume and the run folder" if full else "")
        )
        return 2
    except Preempted as end:
        _say(str(end))
        return PREEMPTED
    except KeyboardInterrupt:
        _say("interrupted; go on with --resume and the run folder")
        return 130
    return 0


def _say(sentences: str) -> None:
    """Print sentences, one a line; what stands in a name is not for the terminal to carry out."""
    print("\n".join(plain(line) for line in sentences.split("\n")), file=sys.stderr)


class Start(NamedTuple):
    """What a recipe that trains one model is to do.

    Attributes:
        spec: the experiment.
        out: the run folder, whose lock is held.
        resume: whether to go on with what is in it.
        summary: of a run that is finished, with which nothing is to be done; None: it is not.
    """

    spec: ExperimentSpec
    out: Path
    resume: bool
    summary: dict[str, Any] | None = None


@contextmanager
def experiment(options: RunOptions) -> Iterator[Start]:
    """Yield the experiment and the run folder that the options ask for; the folder is locked as long.

    Raises:
        SmaError: a sentence for the user.
    """
    asked = None
    if options.resume is None:
        asked = asked_experiment(options)
    elif options.set or options.seed is not None or options.spec is not None:
        raise SpecError(
            "--resume goes on with the experiment as it was; leave --set, --seed and --spec out, or start a new run"
        )
    with folder_of(options, EXPERIMENT, "run") as (out, began):
        if not began:
            yield Start(cast(ExperimentSpec, asked), out, False)
            return
        kept = load_experiment(out / EXPERIMENT)
        refuse_another(kept, asked or kept, out / EXPERIMENT)
        if (out / SUMMARY).exists():
            if asked is None:
                raise CheckpointError(f"the run in {str(out)!r} is finished; its results stand in {out / SUMMARY}")
            print(f"the run in {plain(out)} is finished; its results stand in {plain(out / SUMMARY)}")
            yield Start(kept, out, True, read_summary(out))
            return
        check_fits(kept, options)
        if not os.path.lexists(out / LAST):
            print(f"no checkpoint yet in {plain(out)}: starting from the beginning")
        yield Start(kept, out, True)


def asked_experiment(options: RunOptions) -> ExperimentSpec:
    """The experiment that the options describe, on a device that there is.

    Raises:
        SpecError: it is not valid, or there is no such device.
    """
    source = options.spec if options.spec is not None else options.name
    seed = [f"seed={options.seed}"] if options.seed is not None else []
    spec = load_experiment(source, [*options.set, *seed])
    check_fits(spec, options)
    return spec


def check_fits(spec: ExperimentSpec, options: RunOptions) -> None:
    """Check that an experiment can be run with these options: that there is the device, and that data and model can
    fit.

    Raises:
        SpecError: what is missing.
    """
    check_update_fits(spec, check_device(options.accelerator, spec.precision))
    check_data_fits(spec, options.data)


@contextmanager
def folder_of(options: RunOptions, began_by: str, what: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folder that the options name, locked, and whether there is something in it to go on with.

    Args:
        options: the command line.
        began_by: the file in it by which that is known.
        what: is in it, in a word.

    Raises:
        SmaError: there is nothing to go on with, something else is in it, or another process writes it.
    """
    if options.resume is not None:
        if options.auto_resume:
            raise SpecError("--resume goes on in any case; leave --auto-resume out, or give --out instead of --resume")
        if not (options.resume / began_by).is_file():
            raise CheckpointError(
                f"there is no {what} in {str(options.resume)!r}: {began_by} is missing; "
                "give the folder of an earlier --out"
            )
        check_run_folder(options.resume)
        with run_lock(options.resume):
            yield options.resume, True
        return
    if options.auto_resume:
        if options.out is None:
            raise SpecError("--auto-resume needs --out: without it the folder has another name every time")
        if (options.out / began_by).is_file():
            with run_lock(options.out):
                yield options.out, True
            return
    if options.out is not None:
        check_run_folder(options.out)
    default = Path("runs") / f"{options.name.replace('_', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
    with claim_folder(options.out or default, numbered=options.out is None) as out:
        yield out, False
