"""What all command lines share: options, errors with one message, exit codes."""

import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import PrivateAttr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from sma.errors import SmaError, SpecError, quote, reason
from sma.recipes.io.folders import cache_folder as cache_folder
from sma.recipes.io.folders import expand
from sma.recipes.io.isolation import hidden_variables
from sma.recipes.io.names import plain
from sma.recipes.io.option_parser import mistakes, option_parser
from sma.recipes.io.signals import PREEMPTED, Preempted, end_at_once, on_preemption
from sma.streams import run_command


class CommandOptions(BaseSettings):
    """Settings from the command line, or from variables whose names begin with SMA_."""

    model_config = SettingsConfigDict(env_prefix="SMA_", extra="forbid")

    _program: str | None = PrivateAttr(default=None)

    @field_validator("*", mode="after")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        """A shell replaces the `~` of `--out ~/x` but not that of `--out=~/x`."""
        return expand(value) if isinstance(value, Path) else value

    @property
    def program(self) -> str:
        """The command that was called, such as `sma train`."""
        return self._program or _name(type(self))


Options = TypeVar("Options", bound=CommandOptions)


def parse(
    options: type[Options], words: Sequence[str], *, program: str | None = None, positional: str | None = None
) -> Options:
    """Read a command line.

    Args:
        options: what the command takes.
        words: those after the name of the command.
        program: the name of the command; None: that of the class.
        positional: the field that is given without an option, such as the task in `sma train listops`.

    Raises:
        SpecError: one message per mistake.
    """
    given = option_parser(options, program or _name(options), positional).read(words)
    try:
        made = options(**vars(given))
    except ValidationError as error:
        raise SpecError("\n".join(mistakes(error, options, positional))) from error
    made._program = program
    return made


def _name(options: type[CommandOptions]) -> str:
    return str(options.model_config.get("cli_prog_name"))


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
