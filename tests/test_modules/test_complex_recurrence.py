"""Kernels of linear recurrences with complex decay, and extreme decays; test_scan_states.py tests the scans."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.modules.complex_recurrence import ComplexRecurrence, kernels, minus_one
from sma.modules.scan import causal_scan
from tests.test_modules.layouts import assert_same_program, grad


def draw_recurrence(channels: int, pairs: int, seed: int = 0) -> ComplexRecurrence:
    """Decays from almost 1 (a = -0.001) to e^-1, and angles of more than a full turn."""
    source = torch.Generator().manual_seed(seed)
    log_decay = -(10 ** torch.empty(channels, pairs, dtype=torch.float64).uniform_(-3, 0, generator=source))
    angle = 5 * torch.randn(channels, pairs, dtype=torch.float64, generator=source)
    outward = torch.randn(channels, 2 * pairs, dtype=torch.float64, generator=source)
    return ComplexRecurrence(log_decay.requires_grad_(), angle.requires_grad_(), outward.requires_grad_())


def as_complex(halves: Tensor) -> Tensor:
    return torch.complex(*halves.chunk(2, dim=-1))


@given(taps=st.integers(1, 300), pairs=st.integers(1, 5), sets=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_kernels_equal_the_direct_formula(taps: int, pairs: int, sets: int, seed: int) -> None:
    recurrence = draw_recurrence(2, pairs, seed)
    outward = torch.randn(sets, 2, 2 * pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def direct(outward: Tensor) -> Tensor:
        exponent = torch.complex(recurrence.log_decay, recurrence.angle)
        power = torch.exp(exponent[..., None] * torch.arange(taps))
        return 2 * torch.einsum("sdp,dpl->sdl", as_complex(outward).conj() / 2, power).real

    exponents = {"log_decay": recurrence.log_decay, "angle": recurrence.angle}
    assert_same_program(lambda outward: kernels(recurrence, outward, taps), direct, outward, exponents)


def test_an_undamped_oscillator_keeps_its_phase_in_float32() -> None:
    # After 100,000 tokens of 3.1 rad, an angle multiplied in float32 would have an error of 0.02.
    angle = torch.full((1, 1), 3.1, dtype=torch.float64)
    outward = torch.tensor([[2.0, 0.0]])
    found = kernels(ComplexRecurrence(torch.zeros_like(angle), angle, outward), outward[None], 100_000)[0, 0]
    assert found.dtype is torch.float32
    torch.testing.assert_close(
        found.double(), 2 * torch.cos(3.1 * torch.arange(100_000, dtype=torch.float64)), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0, 20.0])
def test_minus_one_is_exact_near_zero(size: float) -> None:
    turns = torch.linspace(0.5 * math.pi, 1.5 * math.pi, 21, dtype=torch.float64)  # exponents with a negative real part
    z = torch.polar(torch.full_like(turns, size), turns)
    series = sum((z**n / math.factorial(n) for n in range(2, 9)), z)
    wanted = series if size < 0.01 else torch.exp(z) - 1
    torch.testing.assert_close(torch.complex(*minus_one(z.real, z.imag)), wanted, rtol=1e-13, atol=0)


def test_exponents_of_1e170_give_finite_outputs_and_zero_gradients() -> None:
    exponents = [torch.full((1, 1), value, dtype=torch.float64, requires_grad=True) for value in (-1e170, 1e170)]
    out = causal_scan(torch.randn(1, 150, 1), ComplexRecurrence(*exponents, torch.ones(1, 2)))
    out.sum().backward()
    assert out.isfinite().all()
    assert [grad(part).item() for part in exponents] == [0.0, 0.0]
