"""Linear recurrences with constant decay: kernel and chunked scan against a loop over the tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.modules.scan import CHUNK, Recurrence, causal_scan
from tests.test_modules.layouts import assert_same_program, grad
from tests.test_modules.loops import recurrence_loop


def draw_recurrence(channels: int, states: int, seed: int = 0, fastest: float = 3.0) -> Recurrence:
    """Decays from almost 1 (log q = -0.001) to e^-fastest."""
    generator = torch.Generator().manual_seed(seed)
    slow_to_fast = (
        -(10 ** torch.empty(channels, states, dtype=torch.float64).uniform_(-3, 0, generator=generator)) * fastest
    )
    inward, outward = (torch.randn(channels, states, dtype=torch.float64, generator=generator) for _ in range(2))
    return Recurrence(slow_to_fast.requires_grad_(), inward.requires_grad_(), outward.requires_grad_())


def assert_scan_is_the_loop(x: Tensor, recurrence: Recurrence) -> None:
    def loop(x_BLD: Tensor) -> Tensor:
        decay = recurrence.log_decay.exp()
        return torch.stack([recurrence_loop(row, decay, recurrence.inward, recurrence.outward) for row in x_BLD])

    assert_same_program(lambda x_BLD: causal_scan(x_BLD, recurrence), loop, x, recurrence._asdict())


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 5 * CHUNK + 3])
def test_scan_is_the_loop_at_every_number_of_chunks(length: int) -> None:
    torch.manual_seed(length)
    assert_scan_is_the_loop(torch.randn(2, length, 2, dtype=torch.float64), draw_recurrence(2, 3))


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 2 * CHUNK + 5),
    channels=st.integers(1, 3),
    states=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_scan_is_the_loop_for_any_sizes(rows: int, length: int, channels: int, states: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, length, channels, dtype=torch.float64)
    assert_scan_is_the_loop(x, draw_recurrence(channels, states, seed))


def test_scan_of_a_non_contiguous_batch_is_the_same() -> None:
    recurrence = draw_recurrence(4, 2)
    x = torch.randn(150, 4, 3, dtype=torch.float64).permute(2, 0, 1)
    assert torch.equal(causal_scan(x, recurrence), causal_scan(x.contiguous(), recurrence))


def test_scan_passes_gradcheck() -> None:
    recurrence = draw_recurrence(1, 2)
    x = torch.randn(1, CHUNK + 6, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *parts: causal_scan(x, Recurrence(*parts)), (x, *recurrence), fast_mode=True
    )


def test_scan_passes_states_on_without_loss_over_many_chunks() -> None:
    # An impulse under a decay of e^-0.001 is still e^-4 after 4000 tokens.
    recurrence = Recurrence(*(torch.full((1, 1), value, dtype=torch.float64) for value in (-0.001, 1.0, 1.0)))
    x = torch.zeros(1, 4001, 1, dtype=torch.float64)
    x[0, 0] = 1
    wanted = torch.exp(-0.001 * torch.arange(4001, dtype=torch.float64))
    torch.testing.assert_close(causal_scan(x, recurrence)[0, :, 0], wanted, rtol=1e-11, atol=0)


@given(taps=st.integers(1, 300), states=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_kernel_is_the_impulse_response(taps: int, states: int, seed: int) -> None:
    recurrence = draw_recurrence(2, states, seed)
    impulse = torch.zeros(taps, 2, dtype=torch.float64)
    impulse[0] = 1
    assert_same_program(
        lambda scale: scale * recurrence.kernel(taps),
        lambda scale: (
            scale * recurrence_loop(impulse, recurrence.log_decay.exp(), recurrence.inward, recurrence.outward).T
        ),
        torch.ones((), dtype=torch.float64),
        recurrence._asdict(),
    )


@pytest.mark.parametrize("log_decay", [-1e4, -36.0, -1e-12, 0.0])
def test_kernel_stays_finite_at_extreme_decay(log_decay: float) -> None:
    parts = [torch.full((1, 1), value, dtype=torch.float32, requires_grad=True) for value in (log_decay, 1.0, 1.0)]
    kernel = Recurrence(*parts).kernel(1000)
    kernel.sum().backward()
    assert kernel[0, 0] == 1
    torch.testing.assert_close(kernel[0], torch.exp(log_decay * torch.arange(1000)), rtol=1e-6, atol=0)
    assert all(grad(part).isfinite().all() for part in parts)
