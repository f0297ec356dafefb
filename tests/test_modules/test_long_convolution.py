"""Convolution by Fourier transform against sums over lags."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.modules.long_convolution import long_convolution
from tests.test_modules.layouts import assert_same_program


def convolve_loop(x_BLD: Tensor, ahead_DK: Tensor, reverse_DK: Tensor, skip_D: Tensor) -> Tensor:
    """y_t = skip x_t + sum over l of ahead_l x_{t-l} + reverse_l x_{t+l}."""
    length, columns = x_BLD.shape[1], []
    for t in range(length):
        column = skip_D * x_BLD[:, t]
        for lag in range(ahead_DK.shape[1]):
            if t - lag >= 0:
                column = column + ahead_DK[:, lag] * x_BLD[:, t - lag]
            if t + lag < length:
                column = column + reverse_DK[:, lag] * x_BLD[:, t + lag]
        columns.append(column)
    return torch.stack(columns, 1)


def assert_is_the_loop(rows: int, length: int, channels: int, taps: int) -> None:
    shapes = {"ahead": (channels, taps), "reverse": (channels, taps), "skip": (channels,)}
    kernels = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    assert_same_program(
        lambda x: long_convolution(x, *kernels.values()),
        lambda x: convolve_loop(x, *kernels.values()),
        torch.randn(rows, length, channels, dtype=torch.float64),
        kernels,
    )


@pytest.mark.parametrize(
    ("length", "taps"), [(1, 1), (2, 2), (2, 1), (3, 3), (8, 8), (9, 5), (16, 1), (17, 17), (25, 24)]
)
def test_convolution_equals_the_sum_over_lags(length: int, taps: int) -> None:
    assert_is_the_loop(2, length, 3, taps)


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64, 65])
def test_numbers_of_channels_around_a_group_equal_the_sum_over_lags(channels: int) -> None:
    assert_is_the_loop(3, 6, channels, 4)


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 20),
    channels=st.integers(1, 3),
    share=st.floats(0, 1),
)
def test_convolution_of_any_size_equals_the_sum_over_lags(rows: int, length: int, channels: int, share: float) -> None:
    assert_is_the_loop(rows, length, channels, 1 + round(share * (length - 1)))


def test_the_ends_of_a_row_never_wrap_around() -> None:
    ahead, reverse, skip = (
        torch.full(shape, fill, dtype=torch.float64) for shape, fill in (((1, 30), 1.0), ((1, 30), 0.0), ((1,), 0.0))
    )
    x = torch.zeros(1, 30, 1, dtype=torch.float64)
    x[0, -1] = 1
    torch.testing.assert_close(long_convolution(x, ahead, reverse, skip), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(long_convolution(x.flip(1), reverse, ahead, skip), x.flip(1), rtol=0, atol=1e-14)


def test_convolution_passes_gradcheck() -> None:
    parts = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7, 2), (2, 5), (2, 5), (2,)))
    assert torch.autograd.gradcheck(long_convolution, tuple(parts))


def test_convolution_of_a_non_contiguous_batch_is_the_same() -> None:
    ahead, reverse, skip = torch.randn(4, 9), torch.randn(4, 9), torch.randn(4)
    x = torch.randn(9, 4, 3).permute(2, 0, 1)
    torch.testing.assert_close(
        long_convolution(x, ahead, reverse, skip), long_convolution(x.contiguous(), ahead, reverse, skip)
    )


def test_inputs_are_never_changed() -> None:
    x, ahead, reverse = (
        torch.randn(2, 9, 4, requires_grad=True),
        torch.randn(4, 9, requires_grad=True),
        torch.randn(4, 9),
    )
    skip, incoming = torch.ones(4), torch.randn(2, 9, 4)
    watched = (x, ahead, reverse, skip, incoming)
    copies = [tensor.detach().clone() for tensor in watched]
    long_convolution(x, ahead, reverse, skip).backward(incoming)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(watched, copies, strict=True))
