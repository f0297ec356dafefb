"""The scan that continues from states and returns the final state of every row, against a loop over the tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.kernels.chunks import CHUNK
from sma.modules.complex_recurrence import ComplexRecurrence
from sma.modules.scan import advance, causal_scan
from tests.streams import near
from tests.test_modules.test_complex_recurrence import as_complex, draw_recurrence

lengths_of_chunks = pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])


def loop(x_BLD: Tensor, lengths: list[int], recurrence: ComplexRecurrence, before_BDN: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row and token by token; a row ends after its length, and its later outputs are undefined."""
    decay = torch.exp(torch.complex(recurrence.log_decay, recurrence.angle))
    weight = as_complex(recurrence.outward).conj()
    before_BDN = as_complex(before_BDN)
    out, finals = [], []
    for row, length in enumerate(lengths):
        state = final = before_BDN[row]
        line = [x_BLD.new_zeros(0, x_BLD.shape[2])]
        for position in range(x_BLD.shape[1]):
            state = decay * state + x_BLD[row, position, :, None]
            line.append((weight * state).sum(1).real[None])
            if position == length - 1:
                final = state
        out.append(torch.cat(line))
        finals.append(torch.cat([final.real, final.imag], -1))
    return torch.stack(out), torch.stack(finals)


def assert_scan_is_the_loop(lengths: list[int], longest: int, recurrence: ComplexRecurrence, initial: bool) -> None:
    channels, size = recurrence.outward.shape
    x = torch.randn(len(lengths), longest, channels, dtype=torch.float64)
    # The inputs after a row's tokens are 0.
    x = x.where((torch.arange(longest) < torch.tensor(lengths)[:, None])[..., None], 0).requires_grad_()
    before = (torch.randn(len(lengths), channels, size, dtype=torch.float64) * initial).requires_grad_()
    inputs = [x, *recurrence, before]
    results, weights = [], None
    for out, final in (advance(x, torch.tensor(lengths), recurrence, before), loop(x, lengths, recurrence, before)):
        weights = weights or [torch.randn_like(part) for part in (out, final)]
        total = (out * weights[0]).sum() + (final * weights[1]).sum() + 0 * sum(part.sum() for part in inputs)
        results.append([out, final, *torch.autograd.grad(total, inputs, materialize_grads=True)])
    for found, wanted in zip(*results, strict=True):
        near(found.detach(), wanted.detach())
    if not initial:
        near(causal_scan(x, recurrence).detach(), results[1][0].detach())


@pytest.mark.parametrize("initial", [False, True], ids=["from-zeros", "from-states"])
@lengths_of_chunks
def test_outputs_final_states_and_gradients_equal_the_loop_for_any_number_of_chunks(length: int, initial: bool) -> None:
    torch.manual_seed(length)
    lengths = [length, 0, 1, length // 2, min(length, CHUNK), length - 1] if length > 1 else [1, 1]
    assert_scan_is_the_loop(lengths, length, draw_recurrence(2, 3), initial)


@given(
    lengths=st.lists(st.integers(0, CHUNK + 9), min_size=1, max_size=3),
    more=st.integers(2, 4),
    channels=st.integers(1, 3),
    states=st.integers(1, 4),
    initial=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_scan_equals_the_loop_for_any_sizes(
    lengths: list[int], more: int, channels: int, states: int, initial: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    assert_scan_is_the_loop(lengths, max(lengths) + more, draw_recurrence(channels, states, seed), initial)


@given(seed=st.integers(0, 2**16), cut=st.integers(0, 2 * CHUNK + 3))
def test_a_scan_continues_where_another_ended(seed: int, cut: int) -> None:
    recurrence, length = draw_recurrence(2, 3, seed), 2 * CHUNK + 3
    x = torch.randn(2, length, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    zeros = x.new_zeros(2, *recurrence.outward.shape)
    first = advance(x[:, :cut], torch.tensor([cut, cut]), recurrence, zeros)
    second = advance(x[:, cut:], torch.tensor([length - cut] * 2), recurrence, first.final)
    whole = advance(x, torch.tensor([length, length]), recurrence, zeros)
    near(torch.cat([first.out, second.out], 1), whole.out)
    near(second.final, whole.final)


def test_one_step_equals_a_scan_of_one_input() -> None:
    recurrence = draw_recurrence(2, 3)
    x = torch.randn(4, 1, 2, dtype=torch.float64)
    before = torch.randn(4, *recurrence.outward.shape, dtype=torch.float64)
    lengths = torch.ones(4, dtype=torch.long)
    step = advance(x, lengths, recurrence, before)
    scanned = advance(torch.nn.functional.pad(x, (0, 0, 0, 1)), lengths, recurrence, before)
    near(step.final, scanned.final)
    near(step.out, scanned.out[:, :1])


def test_scan_with_states_passes_gradcheck() -> None:
    recurrence = draw_recurrence(1, 2)
    x = torch.randn(2, CHUNK + 6, 1, dtype=torch.float64, requires_grad=True)
    before = torch.randn(2, *recurrence.outward.shape, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([CHUNK + 6, 3])

    def program(x: Tensor, before: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        x = x.where((torch.arange(CHUNK + 6) < lengths[:, None])[..., None], 0)
        return tuple(advance(x, lengths, type(recurrence)(*parts), before))

    assert torch.autograd.gradcheck(program, (x, before, *recurrence), fast_mode=True)


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2)], ids=["no-rows", "no-tokens"])
def test_empty_inputs_keep_the_states_and_give_zero_gradients(shape: tuple[int, int, int]) -> None:
    recurrence, x = draw_recurrence(2, 3), torch.zeros(shape, dtype=torch.float64)
    before = torch.randn(shape[0], *recurrence.outward.shape, dtype=torch.float64)
    scanned = advance(x, torch.zeros(shape[0]).long(), recurrence, before)
    assert scanned.out.shape == shape
    assert torch.equal(scanned.final, before)
    out = causal_scan(x, recurrence)
    assert out.shape == shape
    assert [part.abs().max().item() for part in torch.autograd.grad(out.sum(), list(recurrence))] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [1e4, 1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("position", [1, CHUNK - 1, CHUNK, 3 * CHUNK, 4 * CHUNK - 1])
def test_no_later_input_changes_an_earlier_output_or_another_row(position: int, bad: float) -> None:
    drawn = draw_recurrence(2, 3)
    recurrence = drawn._replace(outward=drawn.outward.float())
    x, before = torch.randn(2, 4 * CHUNK, 2), torch.randn(2, *recurrence.outward.shape)
    changed, lengths = x.clone(), torch.tensor([4 * CHUNK, 4 * CHUNK - 7])
    changed[0, position:] = bad
    one, other = (advance(batch, lengths, recurrence, before) for batch in (x, changed))
    assert torch.equal(other.out[0, :position], one.out[0, :position])
    assert not torch.equal(other.out[0, position:], one.out[0, position:])
    assert torch.equal(other.out[1], one.out[1])
    assert torch.equal(other.final[1], one.final[1])
    assert torch.equal(causal_scan(changed, recurrence)[0, :position], causal_scan(x, recurrence)[0, :position])


@pytest.mark.usefixtures("as_users_run")  # a thousand calls
def test_small_decays_and_turns_add_up_without_drift() -> None:
    # q = e^(-1e-7 + i 1e-6) in float32 would repeat the same rounding error in every step. A thousand chunks decay by
    # e^-0.0064 and rotate by 0.064 rad.
    exponent = (torch.full((1, 1), value, dtype=torch.float64) for value in (-1e-7, 1e-6))
    recurrence = ComplexRecurrence(*exponent, torch.ones(1, 2))
    state, turned = torch.tensor([[[1.0, 0.0]]]), torch.tensor([math.cos(0.064), math.sin(0.064)])
    for _ in range(1000):
        state = advance(torch.zeros(1, CHUNK, 1), torch.tensor([CHUNK]), recurrence, state).final
    assert state.flatten().tolist() == pytest.approx((0.9936205 * turned).tolist(), abs=3e-6)
