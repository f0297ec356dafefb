"""The EMA scan in plain PyTorch against a loop over the tokens, and the checks of PyTorch for its operator."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import InputError
from sma.kernels import implementation
from sma.kernels.chunks import CHUNK
from tests.test_sma.test_kernels.ema_cases import assert_is_the_loop, draw, run

LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5]
directions = pytest.mark.parametrize("directions", [pytest.param(1, id="causal"), pytest.param(2, id="bidirectional")])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("truncation", [None, 1, 5, CHUNK + 6])
@directions
def test_scan_equals_the_loop_for_any_number_of_chunks(directions: int, truncation: int | None, length: int) -> None:
    assert_is_the_loop(draw(2, length, directions=directions, truncation=truncation), "plain")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
def test_streams_equal_the_loop_for_any_number_of_chunks(ragged: bool, length: int) -> None:
    lengths = [length, 0, 1, length // 2, length - 1] if ragged else None
    assert_is_the_loop(draw(5, length, streams=True, lengths=lengths), "plain")


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 2 * CHUNK + 5),
    channels=st.integers(1, 3),
    states=st.integers(1, 4),
    directions=st.integers(1, 2),
    truncation=st.none() | st.integers(1, 2 * CHUNK),
    seed=st.integers(0, 2**16),
)
def test_scan_equals_the_loop_for_any_sizes(
    rows: int, length: int, channels: int, states: int, directions: int, truncation: int | None, seed: int
) -> None:
    inputs = draw(rows, length, channels, states, directions=directions, truncation=truncation, seed=seed)
    assert_is_the_loop(inputs, "plain")


@pytest.mark.parametrize("streams", [False, True], ids=["rows", "streams"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no-rows", "no-tokens"])
def test_empty_inputs_give_empty_results_and_zero_gradients(shape: tuple[int, int], streams: bool) -> None:
    inputs = draw(*shape, streams=streams)
    out, end = run(inputs, "plain")
    assert out.shape == (*shape, 3)
    found = torch.autograd.grad(out.sum() + end.sum(), list(inputs.leaves.values()), materialize_grads=True)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)


@directions
def test_rows_that_are_not_contiguous_give_the_same_results(directions: int) -> None:
    inputs = draw(3, 150, 4, directions=directions)
    turned = inputs.x.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(run(inputs._replace(x=turned), "plain").out, run(inputs, "plain").out)


@pytest.mark.parametrize("bad", [1e4, 1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("position", [1, CHUNK - 1, CHUNK, 3 * CHUNK - 1])
@pytest.mark.parametrize("truncation", [None, 7])
def test_no_later_input_changes_an_earlier_result_or_another_row(
    truncation: int | None, position: int, bad: float
) -> None:
    inputs = draw(2, 3 * CHUNK, truncation=truncation).to(torch.float32)
    changed = inputs.x.detach().clone()
    changed[0, position:, 1] = bad
    before, after = (run(each, "plain").out for each in (inputs, inputs._replace(x=changed)))
    assert torch.equal(after[0, :position], before[0, :position])
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :, [0, 2]], before[0, :, [0, 2]])
    assert not torch.equal(after[0, position:, 1], before[0, position:, 1])


def test_states_cross_many_chunks_without_loss_of_precision() -> None:
    # An impulse under a decay of e^-0.001 is still e^-4 after 4000 tokens.
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    x = torch.zeros(1, 4001, 1, dtype=torch.float64)
    x[0, 0] = 1
    inputs = draw(1, 1)._replace(x=x, log_decay=-0.001 * one, weight=one, skip=torch.zeros(1, dtype=torch.float64))
    wanted = torch.exp(-0.001 * torch.arange(4001, dtype=torch.float64))
    torch.testing.assert_close(run(inputs, "plain").out[0, :, 0], wanted, rtol=1e-11, atol=0)


@pytest.mark.parametrize("log_decay", [-1e4, -36.0, -1e-12, 0.0])
@directions
def test_extreme_decays_stay_finite(directions: int, log_decay: float) -> None:
    inputs = draw(1, 1000, directions=directions).to(torch.float32)
    inputs = inputs._replace(log_decay=torch.full_like(inputs.log_decay, log_decay).requires_grad_())
    out = run(inputs, "plain").out
    found = torch.autograd.grad(out.sum(), list(inputs.leaves.values()))
    assert all(each.isfinite().all() for each in (out, *found))


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run")  # the shape checker refuses symbolic sizes
@pytest.mark.parametrize(
    ("directions", "streams"), [(1, False), (2, False), (1, True)], ids=["causal", "both", "stream"]
)
def test_operator_passes_the_checks_of_torch(directions: int, streams: bool) -> None:
    inputs = draw(2, CHUNK + 6, directions=directions, streams=streams, lengths=[CHUNK + 6, 3] if streams else None)
    arguments = (*inputs, "plain")
    torch.library.opcheck(torch.ops.sma.ema.default, arguments)
    torch.library.opcheck(torch.ops.sma.ema.default, tuple(a.detach() if torch.is_tensor(a) else a for a in arguments))


def test_second_derivatives_are_refused() -> None:
    inputs = draw(1, 5)
    with pytest.raises(InputError, match="the scan of an ema has no second derivatives"):
        torch.autograd.grad(run(inputs, "plain").out.sum(), inputs.x, create_graph=True)


def test_the_operator_is_registered_by_name() -> None:
    assert implementation("ema", "cpu").name == "plain"
