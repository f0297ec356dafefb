"""Command lines with errors in the format of specs: one message, with the most similar known word."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from sma.errors import QUOTED, SpecError, nearest, quote


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises errors of this project and does not accept abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Raise an error of argparse as an error of this project.

        Raises:
            SpecError: always.
        """
        raise SpecError(f"{_cut(message.removeprefix('argument '))}; see {self.prog} --help")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Read a command line.

        Raises:
            SpecError: an argument is unknown, a value is missing, or a value is not valid.
        """
        arguments, unknown = self.parse_known_args(words)
        if not unknown:
            return arguments
        word = unknown[0]
        if word.startswith("-"):
            self._refuse_option(word.partition("=")[0])
        settings = "=" in word and "--set" in self.options()
        hint = "write --set before each PATH=VALUE" if settings else f"see {self.prog} --help"
        raise SpecError(f"{self.prog} takes no further argument {quote(word)}; {hint}")

    def options(self) -> list[str]:
        """The long options that the help lists."""
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        return [option for action in shown for option in action.option_strings if option.startswith("--")]

    def _refuse_option(self, name: str) -> NoReturn:
        word = next((each.metavar for each in self._get_positional_actions() if f"--{each.dest}" == name), None)
        near = nearest(name, self.options())
        if word is not None:
            hint = f"write {word} without an option: {self.prog} {word}"
        elif near is not None:
            hint = f"did you mean {near}?"
        else:
            hint = f"see {self.prog} --help"
        raise SpecError(f"{_cut(name)}: unknown option; {hint}")


def _cut(text: str) -> str:
    return text if len(text) <= 3 * QUOTED else f"{text[: 3 * QUOTED - 3]}..."
