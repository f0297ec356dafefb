"""The errors: one base, and hints that name near matches."""

import pytest

import sma
from sma import errors
from sma.errors import SmaError, did_you_mean


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
def test_every_error_is_ours_and_a_builtin_one(error, builtin):
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
        pytest.param("conv", iter(["conv1", "gau"]), "kinds", "; did you mean 'conv1'? kinds: conv1, gau", id="an iterator"),
    ],
)
def test_hint_names_the_nearest_known_word(word, known, listed, hint):
    assert did_you_mean(word, known, listed) == hint


def test_a_word_that_is_no_text_is_hinted_too():
    assert did_you_mean(str(3), ["conv"], "kinds") == "; kinds: conv"
