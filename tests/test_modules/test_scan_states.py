"""The scan that goes on from states and returns those where rows end, against a loop over the tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.modules.scan import CHUNK, Recurrence, causal_scan, causal_scan_with_state
from tests.streams import near
from tests.test_modules.test_scan import draw_recurrence


def loop(
    x_BLD: Tensor, lengths: list[int], recurrence: Recurrence, initial_BDN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row by row and token by token; a row ends after its length, and its outputs there count no more."""
    decay, out, finals = recurrence.log_decay.exp(), [], []
    for row, length in enumerate(lengths):
        state = torch.zeros_like(decay) if initial_BDN is None else initial_BDN[row]
        final, line = state, [x_BLD.new_zeros(0, x_BLD.shape[2])]
        for place in range(x_BLD.shape[1]):
            state = decay * state + recurrence.inward * x_BLD[row, place, :, None]
            line.append((recurrence.outward * state).sum(1)[None])
            if place == length - 1:
                final = state
        out.append(torch.cat(line))
        finals.append(final)
    return torch.stack(out), torch.stack(finals)


def assert_scan_is_the_loop(lengths: list[int], longest: int, recurrence: Recurrence, initial: bool, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    channels, states = recurrence.log_decay.shape
    x = torch.randn(len(lengths), longest, channels, dtype=torch.float64, generator=source)
    # What lies behind a row's tokens enters as 0.
    x = x.where((torch.arange(longest) < torch.tensor(lengths)[:, None])[..., None], 0).requires_grad_()
    before = (
        torch.randn(len(lengths), channels, states, dtype=torch.float64, generator=source).requires_grad_()
        if initial
        else None
    )
    inputs = [x, *recurrence, *([before] if before is not None else [])]
    scanned = causal_scan_with_state(x, torch.tensor(lengths), recurrence, before)
    results = []
    for out, final in (tuple(scanned), loop(x, lengths, recurrence, before)):
        weights = [
            torch.randn(part.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
            for part in (out, final)
        ]
        total = (out * weights[0]).sum() + (final * weights[1]).sum() + 0 * sum(part.sum() for part in inputs)
        results.append([out, final, *torch.autograd.grad(total, inputs, materialize_grads=True)])
    for found, wanted in zip(*results, strict=True):
        near(found.detach(), wanted.detach())


@pytest.mark.parametrize("initial", [False, True], ids=["from-zeros", "from-states"])
@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])
def test_outputs_final_states_and_gradients_are_the_loop_at_every_number_of_chunks(length: int, initial: bool) -> None:
    lengths = [length, 0, 1, length // 2, min(length, CHUNK), max(length - 1, 0)]
    assert_scan_is_the_loop(lengths, length, draw_recurrence(2, 3), initial, length)


@given(
    lengths=st.lists(st.integers(0, CHUNK + 9), min_size=1, max_size=3),
    more=st.integers(0, 3),
    channels=st.integers(1, 3),
    states=st.integers(1, 4),
    initial=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_scan_is_the_loop_for_any_sizes(
    lengths: list[int], more: int, channels: int, states: int, initial: bool, seed: int
) -> None:
    assert_scan_is_the_loop(lengths, max(lengths) + more, draw_recurrence(channels, states, seed), initial, seed)


@given(seed=st.integers(0, 2**16), cut=st.integers(0, 2 * CHUNK + 3))
def test_a_scan_goes_on_where_another_ended(seed: int, cut: int) -> None:
    recurrence, length = draw_recurrence(2, 3, seed), 2 * CHUNK + 3
    x = torch.randn(2, length, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    first = causal_scan_with_state(x[:, :cut], torch.tensor([cut, cut]), recurrence, None)
    second = causal_scan_with_state(x[:, cut:], torch.tensor([length - cut] * 2), recurrence, first.final)
    whole = causal_scan_with_state(x, torch.tensor([length, length]), recurrence, None)
    near(torch.cat([first.out, second.out], 1), whole.out)
    near(second.final, whole.final)
    near(causal_scan(x[:, cut:], recurrence, first.final), whole.out[:, cut:])
    near(whole.out, causal_scan(x, recurrence))


def test_one_step_is_a_scan_of_one_input() -> None:
    recurrence = draw_recurrence(2, 3)
    x, before = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    scanned = causal_scan_with_state(x[:, None], torch.ones(4, dtype=torch.long), recurrence, before)
    near(recurrence.step(x, before), scanned.final)
    near((recurrence.step(x, before) * recurrence.outward).sum(-1), scanned.out[:, 0])


def test_scan_with_states_passes_gradcheck() -> None:
    recurrence = draw_recurrence(1, 2)
    x = torch.randn(2, CHUNK + 6, 1, dtype=torch.float64, requires_grad=True)
    before = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([CHUNK + 6, 3])

    def program(x: Tensor, before: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        x = x.where((torch.arange(CHUNK + 6) < lengths[:, None])[..., None], 0)
        return tuple(causal_scan_with_state(x, lengths, Recurrence(*parts), before))

    assert torch.autograd.gradcheck(program, (x, before, *recurrence), fast_mode=True)


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2)], ids=["no-rows", "no-tokens"])
def test_nothing_leaves_the_states_as_they_are(shape: tuple[int, int, int]) -> None:
    before = torch.randn(shape[0], 2, 3, dtype=torch.float64)
    scanned = causal_scan_with_state(
        torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0]).long(), draw_recurrence(2, 3), before
    )
    assert scanned.out.shape == shape
    assert torch.equal(scanned.final, before)


@pytest.mark.parametrize("bad", [1e4, torch.inf, torch.nan])
@pytest.mark.parametrize("place", [1, CHUNK - 1, CHUNK, 3 * CHUNK])
def test_no_later_input_touches_an_earlier_output_or_another_row(place: int, bad: float) -> None:
    recurrence = Recurrence(*(part.detach().float() for part in draw_recurrence(2, 3)))
    x, before = torch.randn(2, 4 * CHUNK, 2), torch.randn(2, 2, 3)
    changed, lengths = x.clone(), torch.tensor([4 * CHUNK, 4 * CHUNK - 7])
    changed[0, place:] = bad
    one, other = (causal_scan_with_state(batch, lengths, recurrence, before) for batch in (x, changed))
    assert torch.equal(other.out[0, :place], one.out[0, :place])
    assert torch.equal(other.out[1], one.out[1])
    assert torch.equal(other.final[1], one.final[1])


@pytest.mark.usefixtures("as_users_run")  # a thousand calls
def test_small_decays_add_up_without_drift() -> None:
    # In float32 q = 1 - 1e-7 rounds to the same number in every step; a thousand chunks must still decay by e^-0.0064.
    recurrence = Recurrence(*(torch.full((1, 1), value) for value in (-1e-7, 0.0, 1.0)))
    state = torch.ones(1, 1, 1)
    for _ in range(1000):
        state = causal_scan_with_state(torch.zeros(1, CHUNK, 1), torch.tensor([CHUNK]), recurrence, state).final
    assert state.item() == pytest.approx(0.9936205, abs=3e-6)
