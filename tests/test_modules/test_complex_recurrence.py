"""Linear recurrences with complex decay: kernels and chunked scan against a loop over the tokens in complex numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.modules.complex_recurrence import ComplexRecurrence, kernels, minus_one
from sma.modules.scan import CHUNK, causal_scan, causal_scan_with_state
from tests.streams import near
from tests.test_modules.layouts import assert_same_program, grad

INITIAL = pytest.mark.parametrize("initial", [False, True], ids=["from-zeros", "from-states"])


def draw_recurrence(channels: int, pairs: int, seed: int = 0) -> ComplexRecurrence:
    """Decays from almost 1 (a = -0.001) to e^-1, and angles of more than a full turn."""
    source = torch.Generator().manual_seed(seed)
    log_decay = -(10 ** torch.empty(channels, pairs, dtype=torch.float64).uniform_(-3, 0, generator=source))
    angle = 5 * torch.randn(channels, pairs, dtype=torch.float64, generator=source)
    outward = torch.randn(channels, 2 * pairs, dtype=torch.float64, generator=source)
    return ComplexRecurrence(log_decay.requires_grad_(), angle.requires_grad_(), outward.requires_grad_())


def as_complex(halves: Tensor) -> Tensor:
    return torch.complex(*halves.chunk(2, dim=-1))


def loop(
    x_BLD: Tensor, lengths: list[int], recurrence: ComplexRecurrence, initial_BDN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row by row and token by token; a row ends after its length, and its outputs there count no more."""
    decay = torch.exp(torch.complex(recurrence.log_decay, recurrence.angle))
    weight, out, finals = as_complex(recurrence.outward).conj() / 2, [], []
    for row, length in enumerate(lengths):
        state = torch.zeros_like(decay) if initial_BDN is None else as_complex(initial_BDN[row])
        final, line = state, [x_BLD.new_zeros(0, x_BLD.shape[2])]
        for place in range(x_BLD.shape[1]):
            state = decay * state + x_BLD[row, place, :, None]
            line.append(2 * (weight * state).sum(1).real[None])
            if place == length - 1:
                final = state
        out.append(torch.cat(line))
        finals.append(torch.cat([final.real, final.imag], dim=-1))
    return torch.stack(out), torch.stack(finals)


def assert_scan_is_the_loop(
    lengths: list[int], longest: int, recurrence: ComplexRecurrence, initial: bool, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    channels, size = recurrence.outward.shape
    x = torch.randn(len(lengths), longest, channels, dtype=torch.float64, generator=source)
    # What lies behind a row's tokens enters as 0.
    x = x.where((torch.arange(longest) < torch.tensor(lengths)[:, None])[..., None], 0).requires_grad_()
    before = torch.randn(len(lengths), channels, size, dtype=torch.float64, generator=source) * initial
    before.requires_grad_()
    inputs = [x, *recurrence, before]
    scanned = causal_scan_with_state(x, torch.tensor(lengths), recurrence, before)
    results = []
    for out, final in (tuple(scanned), loop(x, lengths, recurrence, before)):
        weights = [
            torch.randn(part.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
            for part in (out, final)
        ]
        total = (out * weights[0]).sum() + (final * weights[1]).sum()
        results.append([out, final, *torch.autograd.grad(total, inputs, materialize_grads=True)])
    for found, wanted in zip(*results, strict=True):
        near(found.detach(), wanted.detach())
    if not initial:
        near(causal_scan(x, recurrence).detach(), results[1][0].detach())


@INITIAL
@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])
def test_outputs_final_states_and_gradients_are_the_loop_at_every_number_of_chunks(length: int, initial: bool) -> None:
    lengths = [length, 0, length // 2, max(length - 1, 0)]
    assert_scan_is_the_loop(lengths, length, draw_recurrence(2, 3), initial, length)


@given(
    lengths=st.lists(st.integers(0, CHUNK + 9), min_size=1, max_size=3),
    more=st.integers(1, 3),
    channels=st.integers(1, 3),
    pairs=st.integers(1, 4),
    initial=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_scan_is_the_loop_for_any_sizes(
    lengths: list[int], more: int, channels: int, pairs: int, initial: bool, seed: int
) -> None:
    assert_scan_is_the_loop(lengths, max(lengths) + more, draw_recurrence(channels, pairs, seed), initial, seed)


def test_one_step_is_a_scan_of_one_input() -> None:
    recurrence = draw_recurrence(2, 3)
    x, before = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, 6, dtype=torch.float64)
    scanned = causal_scan_with_state(x[:, None], torch.ones(4, dtype=torch.long), recurrence, before)
    near(recurrence.step(x, before), scanned.final)
    near((recurrence.step(x, before) * recurrence.outward).sum(-1), scanned.out[:, 0])


def test_scan_passes_gradcheck() -> None:
    recurrence = draw_recurrence(1, 2)
    x = torch.randn(2, CHUNK + 6, 1, dtype=torch.float64, requires_grad=True)
    before = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([CHUNK + 6, 3])

    def program(x: Tensor, before: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        x = x.where((torch.arange(CHUNK + 6) < lengths[:, None])[..., None], 0)
        return tuple(causal_scan_with_state(x, lengths, ComplexRecurrence(*parts), before))

    assert torch.autograd.gradcheck(program, (x, before, *recurrence), fast_mode=True)


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2)], ids=["no-rows", "no-tokens"])
def test_nothing_leaves_the_states_as_they_are(shape: tuple[int, int, int]) -> None:
    before = torch.randn(shape[0], 2, 6, dtype=torch.float64)
    scanned = causal_scan_with_state(
        torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0]).long(), draw_recurrence(2, 3), before
    )
    assert scanned.out.shape == shape
    assert torch.equal(scanned.final, before)


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2)], ids=["no-rows", "no-tokens"])
def test_scan_of_nothing_is_nothing_with_a_gradient(shape: tuple[int, int, int]) -> None:
    recurrence = draw_recurrence(2, 3)
    out = causal_scan(torch.zeros(shape, dtype=torch.float64), recurrence)
    assert out.shape == shape
    out.sum().backward()
    assert [grad(part).abs().max().item() for part in recurrence] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [1e4, 1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("place", [1, CHUNK - 1, CHUNK, 3 * CHUNK])
def test_no_later_input_touches_an_earlier_output_or_another_row(place: int, bad: float) -> None:
    drawn = draw_recurrence(2, 3)
    recurrence = drawn._replace(outward=drawn.outward.float())
    x, before = torch.randn(2, 4 * CHUNK, 2), torch.randn(2, 2, 6)
    changed, lengths = x.clone(), torch.tensor([4 * CHUNK, 4 * CHUNK - 7])
    changed[0, place:] = bad
    one, other = (causal_scan_with_state(batch, lengths, recurrence, before) for batch in (x, changed))
    assert torch.equal(other.out[0, :place], one.out[0, :place])
    assert not torch.equal(other.out[0, place:], one.out[0, place:])
    assert torch.equal(other.out[1], one.out[1])
    assert torch.equal(other.final[1], one.final[1])


@given(taps=st.integers(1, 300), pairs=st.integers(1, 5), sets=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_kernels_are_the_direct_formula(taps: int, pairs: int, sets: int, seed: int) -> None:
    recurrence = draw_recurrence(2, pairs, seed)
    outward = torch.randn(sets, 2, 2 * pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def direct(outward: Tensor) -> Tensor:
        exponent = torch.complex(recurrence.log_decay, recurrence.angle)
        power = torch.exp(exponent[..., None] * torch.arange(taps))
        return 2 * torch.einsum("sdp,dpl->sdl", as_complex(outward).conj() / 2, power).real

    exponents = {"log_decay": recurrence.log_decay, "angle": recurrence.angle}
    assert_same_program(lambda outward: kernels(recurrence, outward, taps), direct, outward, exponents)


def test_an_undamped_oscillator_keeps_its_phase_in_float32() -> None:
    # After 100,000 tokens of 3.1 rad; an angle multiplied in float32 would be off by 0.02.
    angle = torch.full((1, 1), 3.1, dtype=torch.float64)
    outward = torch.tensor([[2.0, 0.0]])
    found = kernels(ComplexRecurrence(torch.zeros_like(angle), angle, outward), outward[None], 100_000)[0, 0]
    assert found.dtype is torch.float32
    torch.testing.assert_close(
        found.double(), 2 * torch.cos(3.1 * torch.arange(100_000, dtype=torch.float64)), rtol=0, atol=2e-6
    )


@pytest.mark.usefixtures("as_users_run")  # a thousand calls
def test_slow_decay_and_turning_add_up_without_drift() -> None:
    # In float32 q = e^(-1e-7 + 1e-6 i) rounds to the same number in every step; a thousand chunks decay by e^-0.0064
    # and turn by 0.064.
    exponent = (torch.full((1, 1), value, dtype=torch.float64) for value in (-1e-7, 1e-6))
    recurrence = ComplexRecurrence(*exponent, torch.ones(1, 2))
    state = torch.tensor([[[1.0, 0.0]]])
    for _ in range(1000):
        state = causal_scan_with_state(torch.zeros(1, CHUNK, 1), torch.tensor([CHUNK]), recurrence, state).final
    wanted = [math.exp(-0.0064) * part for part in (math.cos(0.064), math.sin(0.064))]
    assert state.flatten().tolist() == pytest.approx(wanted, abs=3e-6)


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0, 20.0])
def test_minus_one_is_exact_near_zero(size: float) -> None:
    turns = torch.linspace(0.5 * math.pi, 1.5 * math.pi, 21, dtype=torch.float64)  # exponents with a negative real part
    z = torch.polar(torch.full_like(turns, size), turns)
    series = sum((z**n / math.factorial(n) for n in range(2, 9)), z)
    wanted = series if size < 0.01 else torch.exp(z) - 1
    torch.testing.assert_close(torch.complex(*minus_one(z.real, z.imag)), wanted, rtol=1e-13, atol=0)


def test_decay_beyond_all_numbers_gives_zeros_and_no_gradient() -> None:
    exponents = [torch.full((1, 1), value, dtype=torch.float64, requires_grad=True) for value in (-1e170, 1e170)]
    out = causal_scan(torch.randn(1, 150, 1), ComplexRecurrence(*exponents, torch.ones(1, 2)))
    out.sum().backward()
    assert out.isfinite().all()
    assert [grad(part).item() for part in exponents] == [0.0, 0.0]
