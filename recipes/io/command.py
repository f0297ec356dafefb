"""The base of all command lines: options, error messages, exit codes."""

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import PrivateAttr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from sma.errors import SmaError, SpecError, quote, reason
from sma.recipes.io.folders import expand
from sma.recipes.io.isolation import hidden_variables
from sma.recipes.io.names import plain, shell_word
from sma.recipes.io.option_parser import mistakes, option_parser
from sma.recipes.io.signals import PREEMPTED, Preempted, end_at_once, on_preemption
from sma.streams import run_command


class CommandOptions(BaseSettings):
    """Settings from the command line, or from variables whose names begin with SMA_."""

    model_config = SettingsConfigDict(env_prefix="SMA_", extra="forbid")

    repeatable: ClassVar[frozenset[str]] = frozenset()
    """Names of the options that apply to one call of the command, so a call that resumes may repeat them."""

    _program: str | None = PrivateAttr(default=None)
    _positional: str | None = PrivateAttr(default=None)

    @field_validator("*", mode="after")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        """A shell replaces the `~` of `--out ~/x` but not that of `--out=~/x`."""
        return expand(value) if isinstance(value, Path) else value

    @property
    def program(self) -> str:
        """Name of the called command, such as `sma train`."""
        return self._program or _name(type(self))

    def refuse(self, names: Iterable[str], why: str, instead: str = "") -> None:
        """Refuse options that would be ignored.

        Args:
            names: names of the fields.
            why: reason, such as `--spec has its own task`.
            instead: an alternative for the user.

        Raises:
            SpecError: at least one of them is given; the message lists all of them.
        """
        given = [name for name in type(self).model_fields if name in self.model_fields_set & set(names)]
        if given:
            shown = ", ".join(map(self._shown, given))
            raise SpecError(f"{why}; leave {shown} out{f', or {instead}' if instead else ''}")

    def refuse_all_but(self, names: Iterable[str], why: str, instead: str = "") -> None:
        """Refuse all options but some and the `repeatable` ones; see `refuse`."""
        self.refuse(set(type(self).model_fields) - {*names, *self.repeatable}, why, instead)

    def _shown(self, name: str) -> str:
        """The name of a field on the command line or in the environment."""
        if name == self._positional:
            return name.upper()
        flag, variable = f"--{name.replace('_', '-')}", f"SMA_{name.upper()}"
        return f"{flag} (from the variable {variable})" if variable in os.environ else flag


@contextmanager
def resumable(options: CommandOptions, folder: object, begun: Callable[[], bool]) -> Iterator[None]:
    """Add a note with the resuming command to an external interruption of the block: Ctrl-C, a signal, or a full disk.

    The note of the outermost block is shown.

    Args:
        options: options of the command. The note repeats the given `repeatable` ones.
        folder: folder of the interrupted work.
        begun: whether the folder has work that can be resumed.
    """
    try:
        yield
    except (KeyboardInterrupt, Preempted, OSError) as end:
        if begun():
            end.add_note(f"resume with: {resuming(options, folder)}")
        raise


def resuming(options: CommandOptions, folder: object) -> str:
    """The complete command that resumes; see `resumable`."""
    words = [options.program, "--resume", shell_word(folder)]
    for name in sorted(options.model_fields_set & options.repeatable):
        value, flag = getattr(options, name), name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", shell_word(value)]
    return " ".join(words)


Options = TypeVar("Options", bound=CommandOptions)


def parse(
    options: type[Options],
    words: Sequence[str] | None,
    *,
    program: str | None = None,
    positional: str | None = None,
    unless: Sequence[str] = (),
) -> Options:
    """Read a command line.

    Args:
        options: class of the options.
        words: arguments after the name of the command; None: those of this process.
        program: name of the command; None: that of the class.
        positional: the field that is given without an option, such as the task in `sma train listops`.
        unless: fields of which one is required if the positional field is not given, although it has a default.

    Raises:
        SpecError: one message per mistake.
    """
    given = option_parser(options, program or _name(options), positional).read(sys.argv[1:] if words is None else words)
    try:
        made = options(**vars(given))
    except ValidationError as error:
        raise SpecError("\n".join(mistakes(error, options, positional))) from error
    made._program, made._positional = program, positional
    if positional is not None and unless and not made.model_fields_set & {positional, *unless}:
        others = ", ".join(map(made._shown, unless))
        raise SpecError(f"give {made._shown(positional)}, or one of {others}; see {made.program} --help")
    return made


def _name(options: type[CommandOptions]) -> str:
    return str(options.model_config.get("cli_prog_name"))


def exit_code(command: Callable[[], object]) -> int:
    """Run a command. Errors become messages and exit codes; so does a closed reader of the output (`sma.streams`).

    | exit code | |
    |---|---|
    | 0 | done |
    | 2 | an error, with one message |
    | 75 | ended by SIGTERM or SIGUSR1 (`sma.recipes.io.signals.PREEMPTED`): completed work is kept |
    | 130 | ended by Ctrl-C |
    """
    return run_command(lambda: _exit_code(command))


def _exit_code(command: Callable[[], object]) -> int:
    try:
        with hidden_variables(), on_preemption(end_at_once):
            command()
    except (SmaError, SettingsError) as error:
        _print_error("\n".join(f"error: {line}" for line in str(error).split("\n")))
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.filename is None:
            raise
        where = f" ({quote(str(error.filename))})" if error.filename else ""
        _print_error(
            f"error: {reason(error)}{where}"
            + (f"; make room, and {_last_note(error) or 'repeat the command'}" if full else "")
        )
        return 2
    except Preempted as end:
        _print_error(f"{end}; {_last_note(end) or 'repeat the command'}")
        return PREEMPTED
    except KeyboardInterrupt as end:
        _print_error("; ".join(filter(None, ["interrupted", _last_note(end)])))
        return 130
    return 0


def _last_note(error: BaseException) -> str:
    """The note of the outermost `resumable` block, even if a second signal interrupted the end."""
    notes = getattr(error, "__notes__", [])
    if notes or error.__context__ is None:
        return notes[-1] if notes else ""
    return _last_note(error.__context__)


def _print_error(text: str) -> None:
    """Print lines on stderr, with escapes for control characters in names, which a terminal would execute."""
    print("\n".join(plain(line) for line in text.split("\n")), file=sys.stderr)
