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
    """Names of the options that belong to one call of the command: a call that resumes its work may give them again."""

    _program: str | None = PrivateAttr(default=None)
    _positional: str | None = PrivateAttr(default=None)

    @field_validator("*", mode="after")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        """A shell replaces the `~` of `--out ~/x` but not that of `--out=~/x`."""
        return expand(value) if isinstance(value, Path) else value

    @property
    def program(self) -> str:
        """The command that was called, such as `sma train`."""
        return self._program or _name(type(self))

    def refuse(self, names: Iterable[str], why: str, instead: str = "") -> None:
        """Refuse options that would be ignored.

        Args:
            names: of the fields.
            why: they would be, such as `--spec has a task of its own`.
            instead: what to do if the options were meant.

        Raises:
            SpecError: one of them is given; names all that are.
        """
        given = [name for name in type(self).model_fields if name in self.model_fields_set & set(names)]
        if given:
            shown = ", ".join(map(self._shown, given))
            raise SpecError(f"{why}; leave {shown} out{f', or {instead}' if instead else ''}")

    def refuse_all_but(self, names: Iterable[str], why: str, instead: str = "") -> None:
        """Refuse all options but some and the `repeatable` ones; see `refuse`."""
        self.refuse(set(type(self).model_fields) - {*names, *self.repeatable}, why, instead)

    def _shown(self, name: str) -> str:
        """A field as the command line, or the environment, gives it."""
        if name == self._positional:
            return name.upper()
        flag, variable = f"--{name.replace('_', '-')}", f"SMA_{name.upper()}"
        return f"{flag} (from the variable {variable})" if variable in os.environ else flag


@contextmanager
def resumable(options: CommandOptions, folder: object, begun: Callable[[], bool]) -> Iterator[None]:
    """Add the command that resumes to what ends the block from outside: Ctrl-C, a signal, or a full disk.

    Of nested blocks the outermost counts.

    Args:
        options: of the command. The `repeatable` ones that are given are given again.
        folder: of what is resumed.
        begun: whether the folder holds something that can be resumed.
    """
    try:
        yield
    except (KeyboardInterrupt, Preempted, OSError) as end:
        if begun():
            end.add_note(f"resume with: {resuming(options, folder)}")
        raise


def resuming(options: CommandOptions, folder: object) -> str:
    """The whole command that resumes; see `resumable`."""
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
        options: what the command takes.
        words: those after the name of the command; None: those of this process.
        program: the name of the command; None: that of the class.
        positional: the field that is given without an option, such as the task in `sma train listops`.
        unless: the fields of which one must be given where that one is not, although it has a default.

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
    """Run a command; errors become messages and exit codes, and so does a reader of the output that goes away
    (`sma.streams`).

    | exit code | |
    |---|---|
    | 0 | done |
    | 2 | an error, with one message |
    | 75 | ended by SIGTERM or SIGUSR1 (`sma.recipes.io.signals.PREEMPTED`): what is done is kept |
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
    """What the outermost `resumable` block added, also where a second signal disturbed the end."""
    notes = getattr(error, "__notes__", [])
    if notes or error.__context__ is None:
        return notes[-1] if notes else ""
    return _last_note(error.__context__)


def _print_error(text: str) -> None:
    """Print lines on stderr, with escapes for control characters in names, which a terminal would execute."""
    print("\n".join(plain(line) for line in text.split("\n")), file=sys.stderr)
