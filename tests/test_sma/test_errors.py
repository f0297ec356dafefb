"""Errors: one base class, and hints with similar names."""

import time
from typing import Any

import pytest

import sma
from sma import errors
from sma.errors import QUOTED, CheckpointError, DataError, SmaError, did_you_mean, parsing, quote
from sma.spec import FrozenDict


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.SpecError, ValueError),
        (errors.InputError, ValueError),
        (errors.StateError, ValueError),
        (errors.DataError, ValueError),
        (errors.CheckpointError, RuntimeError),
    ],
)
def test_every_error_derives_from_sma_error_and_a_builtin_one(error, builtin):
    assert issubclass(error, SmaError)
    assert issubclass(error, builtin)
    assert sma.SmaError is SmaError


@pytest.mark.parametrize(
    ("word", "known", "listed", "hint"),
    [
        pytest.param("gua", ["conv", "gau"], "", "; did you mean 'gau'?", id="near"),
        pytest.param("gua", ["conv", "gau"], "kinds", "; did you mean 'gau'? kinds: conv, gau", id="near and listed"),
        pytest.param("xyz", ["conv", "gau"], "kinds", "; kinds: conv, gau", id="far"),
        pytest.param("xyz", ["conv", "gau"], "", "", id="far and not listed"),
        pytest.param("xyz", [], "fields", "; fields: none", id="nothing known"),
        pytest.param(
            "conv", iter(["conv1", "gau"]), "kinds", "; did you mean 'conv1'? kinds: conv1, gau", id="an iterator"
        ),
    ],
)
def test_hint_names_the_nearest_known_word(word, known, listed, hint):
    assert did_you_mean(word, known, listed) == hint


def test_a_number_in_place_of_a_word_lists_the_known_ones():
    assert did_you_mean(str(3), ["conv"], "kinds") == "; kinds: conv"


@pytest.mark.parametrize(
    ("word", "known"),
    [
        pytest.param("a" * 1_000_000, ["conv", "gau"], id="a word of a megabyte"),
        pytest.param("gua", ["a" * 1_000_000, "b" * 1_000_000], id="known words of a megabyte"),
        pytest.param("a" * 100, [f"{number}" + "ab" * 50 for number in range(1000)], id="a thousand known words"),
    ],
)
def test_hint_takes_bounded_time_and_space(word, known):
    began = time.process_time()
    assert len(did_you_mean(word, known, "kinds")) < 4000
    assert time.process_time() - began < 2


def test_long_list_of_known_words_is_truncated():
    hint = did_you_mean("x", [f"{number:04d}" for number in range(1234)], "fields")
    assert hint.endswith("0048, 0049, … (1,234 in all)")


def _shared(depth: int, container: type) -> Any:
    """Nested containers with shared references, whose `repr` would have 2**depth items."""
    value: Any = "x"
    for _ in range(depth):
        value = {"a": value, "b": value} if container is dict else container((value, value))
    return value


@pytest.mark.parametrize(
    "value",
    [
        _shared(60, list),
        _shared(60, tuple),
        _shared(60, dict),
        FrozenDict(_shared(60, dict)),
        "x" * 10**7,
        10**5000,
        list(range(10**6)),
        [[[[[[[[1]]]]]]]],
        b"\0" * 10**6,
    ],
    ids=["list", "tuple", "dict", "frozen", "text", "integer", "long", "deep", "bytes"],
)
def test_quoted_values_are_short_and_on_one_line(value):
    quoted = quote(value)
    assert 0 < len(quoted) <= QUOTED
    assert "\n" not in quoted


@pytest.mark.parametrize("value", [0.5, "a b", ["x", 1], {"kind": "gau"}, None, True], ids=repr)
def test_short_values_are_quoted_as_they_are(value):
    assert quote(value) == repr(value)


@pytest.mark.parametrize(
    ("cause", "why"),
    [
        (ValueError("bad\nmore"), "bad"),
        (KeyError("name"), "KeyError: 'name'"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError"),
        (MemoryError(), "out of memory"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (AssertionError(), "AssertionError"),
        (ValueError("x" * 10**6), "xxx"),
        (type("PanicException", (BaseException,), {})("index out of range"), "index out of range"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_of_a_parser_name_the_file(cause, why):
    with (
        pytest.raises(CheckpointError, match=f"a.bin cannot be read: {why}") as caught,
        parsing("a.bin", CheckpointError, "get it again"),
    ):
        raise cause
    assert caught.value.__cause__ is cause
    assert len(str(caught.value)) < 300
    assert str(caught.value).endswith("; get it again")


@pytest.mark.parametrize(
    "error", [DataError("ours"), KeyboardInterrupt(), SystemExit(3)], ids=lambda error: type(error).__name__
)
def test_own_errors_and_interruptions_pass_through_a_parser(error):
    with pytest.raises(type(error)) as caught, parsing("a.bin", CheckpointError):
        raise error
    assert caught.value is error
