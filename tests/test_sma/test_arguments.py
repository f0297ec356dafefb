"""Mistakes on a command line give one error message each."""

import pytest

from sma.arguments import ArgumentParser
from sma.errors import SpecError


@pytest.fixture
def parser():
    parser = ArgumentParser(prog="sma paint")
    parser.add_argument("colour", metavar="COLOUR", nargs="?")
    parser.add_argument("--width", type=int, metavar="NUMBER")
    parser.add_argument("--set", action="append", metavar="PATH=VALUE")
    return parser


def test_a_line_without_mistakes_is_read(parser):
    read = parser.read(["red", "--width=3", "--set", "a=1", "--set", "b=2"])
    assert (read.colour, read.width, read.set) == ("red", 3, ["a=1", "b=2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--widht", "3"], r"^--widht: unknown option; did you mean --width\?$", id="typo"),
        pytest.param(["--widht=3"], r"^--widht: unknown option; did you mean --width\?$", id="typo with a value"),
        pytest.param(["--zzz"], r"^--zzz: unknown option; see sma paint --help$", id="nothing near"),
        pytest.param(["--widt", "3"], r"^--widt: unknown option; did you mean --width\?$", id="abbreviation"),
        pytest.param(
            ["--colour", "red"],
            r"^--colour: unknown option; write COLOUR without an option: sma paint COLOUR$",
            id="positional",
        ),
        pytest.param(["red", "blue"], "^sma paint takes no further argument 'blue'; see sma paint --help$", id="word"),
        pytest.param(
            ["red", "a=1"],
            "^sma paint takes no further argument 'a=1'; write --set before each PATH=VALUE$",
            id="setting",
        ),
        pytest.param(["--width"], "^--width: expected one argument; see sma paint --help$", id="no value"),
        pytest.param(["--width", "x"], "^--width: invalid int value: 'x'; see sma paint --help$", id="no number"),
    ],
)
def test_a_mistake_is_one_message(parser, words, message):
    with pytest.raises(SpecError, match=message):
        parser.read(words)


@pytest.mark.parametrize("words", [["--" + "z" * 10_000], ["red", "z" * 10_000]], ids=["option", "word"])
def test_long_arguments_are_truncated_in_messages(parser, words):
    with pytest.raises(SpecError, match="zzz") as caught:
        parser.read(words)
    assert len(str(caught.value)) < 1000
