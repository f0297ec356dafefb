"""Sizes of Fourier transforms, and the layout of kernels for them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.kernels.fourier import circular_kernel, fast_length
from tests.test_modules.test_long_convolution import convolve_loop


def test_a_circular_sum_with_the_laid_out_kernel_equals_the_convolution() -> None:
    x, ahead, reverse, skip = (torch.randn(shape) for shape in ((2, 7, 3), (3, 5), (3, 5), (3,)))
    circular = circular_kernel(ahead, reverse, skip, 7)
    size = circular.shape[1]
    assert size >= 7 + 5 - 1
    columns = [torch.stack([circular[:, (t - u) % size] * x[:, u] for u in range(7)]).sum(0) for t in range(7)]
    torch.testing.assert_close(torch.stack(columns, 1), convolve_loop(x, ahead, reverse, skip))


def is_smooth(number: int) -> bool:
    for prime in (2, 3, 5):
        while number % prime == 0:
            number //= prime
    return number == 1


@given(least=st.integers(1, 2**21))
def test_a_fast_length_is_even_and_has_small_prime_factors(least: int) -> None:
    length = fast_length(least)
    assert length >= least
    assert length % 2 == 0
    assert is_smooth(length)


@given(least=st.integers(43, 2**21))
def test_a_fast_length_wastes_at_most_a_seventh(least: int) -> None:
    assert 7 * fast_length(least) <= 8 * least


@given(first=st.integers(1, 2**14), second=st.integers(1, 2**14))
def test_a_longer_sequence_never_needs_a_shorter_transform(first: int, second: int) -> None:
    assert fast_length(min(first, second)) <= fast_length(max(first, second))
