"""The Triton kernels of the EMA scan, in Triton's interpreter if there is no GPU, against a loop over the tokens."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from sma.kernels.ema import chunk_of
from tests.test_sma.test_kernels.ema_cases import Inputs, assert_is_the_loop, draw, gradients, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

CASES = {
    "causal": draw(2, 37, states=3),
    "bidirectional": draw(2, 19, 2, directions=2),
    "truncated": draw(1, 35, 2, truncation=6),
    "truncated both ways": draw(1, 21, 2, directions=2, truncation=17),
    "ragged streams": draw(4, 19, 2, streams=True, lengths=[19, 0, 17, 3]),
    "one chunk of streams": draw(1, 3, 2, streams=True),
    "more channels and states than a program": draw(1, 3, 34, 19, directions=2),
    "one token": draw(1, 1, 1, 1, directions=2),
    "no token": draw(2, 0, streams=True),
    "no row": draw(0, 5),
}
cases = pytest.mark.parametrize("inputs", [pytest.param(inputs, id=name) for name, inputs in CASES.items()])


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill new memory with NaN, so that elements that no kernel writes are detected."""
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@cases
def test_kernels_equal_the_loop_in_float64(inputs: Inputs) -> None:
    assert_is_the_loop(inputs, "triton")


@pytest.mark.parametrize("name", ["truncated", "one chunk of streams"])
def test_kernels_equal_the_loop_in_float32(name: str) -> None:
    assert_is_the_loop(CASES[name].to(torch.float32), "triton", tolerance=1e-6)


def test_half_precision_inputs_are_rounded_once() -> None:
    inputs = draw(1, 5, 2, directions=2).to(torch.float32)
    half = inputs._replace(x=inputs.x.detach().half().requires_grad_())
    found, wanted = (run(each, "triton").out for each in (half, half._replace(x=half.x.float())))
    assert found.dtype is torch.float16
    assert torch.equal(found, wanted.half())
    assert torch.autograd.grad(found.float().sum(), half.x)[0].dtype is torch.float16


@pytest.mark.parametrize("bad", [1e4, torch.inf, torch.nan])
@pytest.mark.parametrize("truncation", [None, 3])
def test_no_later_input_changes_an_earlier_result_or_another_channel(truncation: int | None, bad: float) -> None:
    inputs = draw(1, 20, 2, truncation=truncation).to(torch.float32)
    changed = inputs.x.detach().clone()
    changed[0, 17, 1] = bad
    before, after = (run(each, "triton").out for each in (inputs, inputs._replace(x=changed)))
    assert torch.equal(after[0, :17], before[0, :17])
    assert torch.equal(after[..., 0], before[..., 0])
    assert not torch.equal(after[0, 17:, 1], before[0, 17:, 1])


@pytest.mark.parametrize("directions", [1, 2], ids=["causal", "bidirectional"])
def test_a_nan_reaches_the_same_outputs_as_in_the_plain_implementation(directions: int) -> None:
    inputs = draw(2, 19, 2, directions=directions).to(torch.float32)
    with torch.no_grad():
        inputs.x[0, 17, 1] = torch.nan
    found, wanted = (run(inputs, name).out for name in ("triton", "plain"))
    assert torch.equal(found.isnan(), wanted.isnan())


@pytest.mark.parametrize("log_decay", [-36.0, -1e-7, 0.0])
def test_extreme_decays_equal_the_loop(log_decay: float) -> None:
    inputs = draw(1, 19, 1, directions=2).to(torch.float32)
    inputs = inputs._replace(log_decay=torch.full_like(inputs.log_decay, log_decay).requires_grad_())
    assert_is_the_loop(inputs, "triton", tolerance=1e-6)


def test_two_runs_are_bit_equal() -> None:
    inputs = draw(2, 5, 2, directions=2).to(torch.float32)
    one, other = (gradients(run(inputs, "triton"), inputs) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_strides_of_the_rows_do_not_matter() -> None:
    inputs = draw(2, 19, 4)
    wide = torch.cat([inputs.x.detach()] * 2, dim=2)[..., :4]
    turned = inputs.x.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1)
    wanted = run(inputs, "triton").out
    assert all(torch.equal(run(inputs._replace(x=x), "triton").out, wanted) for x in (wide, turned))


def test_chunks_are_longer_with_more_rows() -> None:
    assert [chunk_of(rows, 4096, 128) for rows in (1, 2, 8, 50)] == [16, 32, 64, 128]


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run")  # the shape checker refuses symbolic sizes
@pytest.mark.parametrize("name", ["bidirectional", "ragged streams"])
def test_operator_passes_the_checks_of_torch(name: str) -> None:
    torch.library.opcheck(torch.ops.sma.ema.default, (*CASES[name], "triton"))


def test_lengths_need_not_be_contiguous() -> None:
    inputs = CASES["ragged streams"]
    assert inputs.lengths is not None
    column = torch.stack([inputs.lengths, torch.ones_like(inputs.lengths)], 1)[:, 0]
    assert not column.is_contiguous()
    assert_is_the_loop(inputs._replace(lengths=column), "triton")


def test_a_decay_factor_of_e_to_the_minus_30_equals_the_loop() -> None:
    inputs = draw(1, 9, 2)
    inputs = inputs._replace(log_decay=(inputs.log_decay.detach() * 0 - 30.0).requires_grad_())
    assert_is_the_loop(inputs, "triton")
