"""What all command lines share: options, errors with one message, exit codes."""

import argparse
import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError, field_validator
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from sma.errors import SmaError, quote, reason
from sma.recipes.io.folders import cache_folder as cache_folder
from sma.recipes.io.folders import expand
from sma.recipes.io.isolation import hidden_variables
from sma.recipes.io.names import plain
from sma.recipes.io.signals import PREEMPTED, Preempted, end_at_once, on_preemption
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
    | 75 | ended by SIGTERM or SIGUSR1 (`sma.recipes.io.signals.PREEMPTED`): what is done is kept |
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
