"""Reference scores of a byte corpus: Witten-Bell counts against a slow oracle, xz against `lzma` and the program."""

import lzma
import math
import random
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import DataError, SpecError
from sma.recipes.reports import reference_scores as scores_module
from sma.recipes.reports.reference_scores import (
    reference_scores,
    witten_bell,
    witten_bell_probabilities,
    xz_after,
    xz_alone,
)

FEW_LETTERS = st.text("abc", min_size=1, max_size=60).map(str.encode)
ANY_BYTES = st.binary(min_size=1, max_size=40)


def noise(size, seed):
    return random.Random(seed).randbytes(size)


def words(size, seed):
    """Learnable text: words of a small vocabulary."""
    rng = random.Random(seed)
    return " ".join(rng.choices(["routers", "choose", "which", "modules", "run"], k=size // 4)).encode()[:size]


def oracle(train, history, byte):
    """The formula of the docstring as a direct recursion."""

    def probability(h):
        lower = 1 / 256 if not h else probability(h[1:])
        followers = Counter(train[i + len(h)] for i in range(len(train) - len(h)) if train[i : i + len(h)] == h)
        if not followers:
            return lower
        return (followers[byte] + len(followers) * lower) / (followers.total() + len(followers))

    return probability(history)


@given(train=st.one_of(FEW_LETTERS, ANY_BYTES), test=st.one_of(FEW_LETTERS, ANY_BYTES), order=st.integers(0, 7))
def test_probabilities_agree_with_the_formula(train, test, order):
    expected = [oracle(train, test[max(0, i - order) : i], byte) for i, byte in enumerate(test)]
    np.testing.assert_allclose(witten_bell_probabilities(train, test, order), expected, rtol=1e-12)
    assert witten_bell(train, test, order) == pytest.approx(-sum(map(math.log2, expected)) / len(test), rel=1e-12)


@given(train=st.one_of(FEW_LETTERS, ANY_BYTES), history=st.one_of(FEW_LETTERS, ANY_BYTES), order=st.integers(0, 7))
def test_probabilities_of_the_next_byte_sum_to_one(train, history, order):
    # The history fills the context, so earlier bytes have no effect and one text holds all 256 continuations.
    history = history.rjust(order, b"a")
    test = b"".join(history + bytes([byte]) for byte in range(256))
    probabilities = witten_bell_probabilities(train, test, order)[len(history) :: len(history) + 1]
    assert len(probabilities) == 256
    assert probabilities.min() > 0
    assert probabilities.sum() == pytest.approx(1.0, rel=1e-12)


@given(train=FEW_LETTERS, test=st.binary(min_size=1, max_size=40), order=st.integers(0, 7))
def test_probabilities_do_not_depend_on_later_bytes(train, test, order):
    whole = witten_bell_probabilities(train, test, order)
    half = len(test) // 2 + 1
    np.testing.assert_array_equal(witten_bell_probabilities(train, test[:half], order), whole[:half])


def test_largest_bytes_in_the_longest_contexts_do_not_overflow():
    train = bytes([255, 0] * 20) + bytes([255] * 20)
    test = bytes([255] * 10 + [0, 255, 0])
    expected = [oracle(train, test[max(0, i - 7) : i], byte) for i, byte in enumerate(test)]
    np.testing.assert_allclose(witten_bell_probabilities(train, test, 7), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [0, 1, 5])
def test_noise_costs_eight_bits_or_more(order):
    assert 8.0 <= witten_bell(noise(40_000, 1), noise(4_000, 2), order) < 9.0


def test_longer_contexts_and_more_text_lower_the_score_of_learnable_text():
    train, test = words(20_000, 1), words(2_000, 2)
    assert witten_bell(train, test, 5) < witten_bell(train, test, 2) < witten_bell(train, test, 0)
    assert witten_bell(train, test, 5) < witten_bell(train[:500], test, 5)


@pytest.mark.parametrize("text", [pytest.param(words(5_000, 1), id="words"), pytest.param(noise(5_000, 1), id="noise")])
def test_xz_score_is_the_size_from_the_lzma_module(text):
    train, test = text[:4_000], text[4_000:]
    assert xz_alone(test) == 8 * len(lzma.compress(test, preset=9)) / 1_000
    assert (
        xz_after(train, test) == 8 * (len(lzma.compress(text, preset=9)) - len(lzma.compress(train, preset=9))) / 1_000
    )


def test_xz_score_does_not_depend_on_the_block_size(monkeypatch):
    train, test = words(4_000, 1), words(1_000, 2)
    expected = xz_alone(test), xz_after(train, test)
    monkeypatch.setattr(scores_module, "_BLOCK", 77)
    assert (xz_alone(test), xz_after(train, test)) == expected


@pytest.mark.skipif(shutil.which("xz") is None, reason="the program xz is not installed")
def test_xz_score_is_the_size_from_the_xz_program():
    text = words(5_000, 3)
    written = subprocess.run(["xz", "-9", "-T1", "--stdout"], input=text, capture_output=True, check=True).stdout
    assert xz_alone(text) == 8 * len(written) / 5_000


def test_xz_does_not_compress_noise_and_copies_earlier_text():
    train, test = noise(20_000, 1), noise(5_000, 2)
    assert xz_alone(test) >= 8.0
    assert xz_after(train, test) >= 8.0
    assert xz_after(train, train[-5_000:]) < 1.0


def test_reference_scores_are_equal_for_every_type_of_input():
    train, test = words(4_000, 1), words(1_000, 2)
    expected = {
        "xz": xz_alone(test),
        "witten_bell_5": witten_bell(train, test, 5),
        "xz_with_training_text": xz_after(train, test),
    }
    assert reference_scores(train, test) == expected
    assert (
        reference_scores(*(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, test))) == expected
    )
    assert reference_scores(*(np.frombuffer(text, dtype=np.uint8) for text in (train, test))) == expected
    assert reference_scores(bytearray(train), memoryview(test)) == expected


def test_keys_name_the_limit_if_only_the_end_of_a_long_text_is_used(monkeypatch):
    monkeypatch.setattr(scores_module, "MAX_BEFORE", 2_000_000)
    train, test = noise(300_000, 1) + bytes(2_000_000), words(100, 1)
    found = reference_scores(train, test)
    assert found == {
        "xz": xz_alone(test),
        "witten_bell_5_last_2MB": witten_bell(bytes(2_000_000), test),
        "xz_with_training_text_last_2MB": xz_after(bytes(2_000_000), test),
    }


@pytest.mark.parametrize("function", [reference_scores, xz_after, witten_bell, witten_bell_probabilities])
@pytest.mark.parametrize(
    ("train", "test", "complaint"),
    [
        pytest.param(b"", b"a", "the training text is empty; at least one byte is required", id="no-training-text"),
        pytest.param(b"a", b"", "the held-out text is empty; at least one byte is required", id="no-test-text"),
        pytest.param(
            torch.zeros(5, dtype=torch.int64),
            b"a",
            r"the training text is int64 of shape \(5,\); give uint8 of one",
            id="tokens-of-8-bytes",
        ),
        pytest.param(
            b"a",
            torch.zeros(2, 3, dtype=torch.uint8),
            r"the held-out text is uint8 of shape \(2, 3\); give uint8 of one",
            id="batch",
        ),
    ],
)
def test_invalid_text_is_refused(function, train, test, complaint):
    with pytest.raises(DataError, match=complaint):
        function(train, test)


def test_xz_of_an_empty_text_is_refused():
    with pytest.raises(DataError, match="the held-out text is empty; at least one byte is required"):
        xz_alone(b"")


@pytest.mark.parametrize("order", [-1, 8])
def test_order_out_of_range_is_refused(order):
    with pytest.raises(SpecError, match=f"order={order} must be 0 to 7, the number of bytes"):
        witten_bell(b"a", b"a", order)
