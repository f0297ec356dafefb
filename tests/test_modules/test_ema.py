"""The damped moving average against its recurrence, in every layout and for extreme parameters."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import SpecError
from sma.modules.ema import EMA, EMASpec
from tests.test_modules.layouts import (
    LAYOUTS,
    Layout,
    along,
    assert_matches_loop,
    assert_truncated_normal,
    draw,
    first,
    grad,
    run,
)
from tests.test_modules.loops import ema_loop
from tests.test_modules.streams import in_chunks

DIRECTIONS = [pytest.param(True, id="bidirectional"), pytest.param(False, id="causal")]


def make(
    width: int = 2, *, spread: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any
) -> EMA:
    """A module whose delta and alpha have the standard deviation `spread`; 0.2 would not reveal a wrong recurrence."""
    torch.manual_seed(seed)
    module = draw(EMASpec(**{"state_size": 3, **fields}).build(width).to(dtype))
    assert isinstance(module, EMA)
    with torch.no_grad():
        module.delta.mul_(spread)
        module.alpha.mul_(spread)
    return module


def matches(module: EMA, lengths: list[int], layout: Layout, length: int | None = None) -> None:
    x = torch.randn(len(lengths), length or max(lengths), module.width, dtype=torch.float64)
    assert_matches_loop(module, lambda row, _: ema_loop(module, row), x, first(lengths, x.shape[1]), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("states", [1, 2, 5])
@pytest.mark.parametrize("spread", [0.2, 2.0, 30.0])
@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_kernel_form_equals_the_recurrence(bidirectional: bool, spread: float, states: int, layout: Layout) -> None:
    matches(make(spread=spread, state_size=states, bidirectional=bidirectional), [7, 0, 12, 1], layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("truncation", [1, 2, 3, 11, 12, 13, 40])
@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_truncated_kernel_equals_the_recurrence_over_the_last_inputs(
    bidirectional: bool, truncation: int, layout: Layout
) -> None:
    matches(make(truncation=truncation, bidirectional=bidirectional), [7, 0, 12, 1], layout)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_lengths_around_a_chunk_agree_with_the_recurrence(bidirectional: bool, length: int) -> None:
    matches(make(bidirectional=bidirectional), [length, length // 2], "packed")


@pytest.mark.parametrize("truncation", [1, 63, 64, 65, 100])
@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_truncations_around_a_chunk_agree_with_the_recurrence(bidirectional: bool, truncation: int) -> None:
    matches(make(1, truncation=truncation, bidirectional=bidirectional, state_size=2), [130], "packed")


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    width=st.integers(1, 3),
    states=st.integers(1, 4),
    truncation=st.none() | st.integers(1, 25),
    bidirectional=st.booleans(),
    spread=st.sampled_from([0.2, 2.0, 30.0]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
)
def test_any_sizes_agree_with_the_recurrence(
    lengths: list[int],
    width: int,
    states: int,
    truncation: int | None,
    bidirectional: bool,
    spread: float,
    layout: Layout,
    seed: int,
) -> None:
    module = make(
        width, spread=spread, seed=seed, state_size=states, truncation=truncation, bidirectional=bidirectional
    )
    matches(module, lengths, layout, length=max(1, *lengths))


@pytest.mark.parametrize("layout", ["static", "rectangular"])
@pytest.mark.parametrize("truncation", [None, 9])
@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_layouts_agree(bidirectional: bool, truncation: int | None, layout: Layout) -> None:
    module = make(3, bidirectional=bidirectional, truncation=truncation)
    x, active = torch.randn(4, 70, 3, dtype=torch.float64), first([70, 0, 65, 3], 70)
    torch.testing.assert_close(run(module, x, active, layout), run(module, x, active, "packed"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_every_output_after_a_non_finite_input_is_non_finite(bad: float) -> None:
    module = make(1, bidirectional=False, spread=0.2, dtype=torch.float32)
    x = torch.randn(1, 200, 1)
    x[0, 70] = bad
    assert not along(module, x)[0, 70:].isfinite().any()


@pytest.mark.parametrize("size", [1, 3, 21])
def test_a_truncated_stream_forgets_inputs_older_than_the_kernel(size: int) -> None:
    module = make(1, spread=0.2, truncation=5, bidirectional=False)
    x = torch.zeros(1, 21, 1, dtype=torch.float64)
    x[0, 10] = 1
    seen = in_chunks(module, x, size)[0, :, 0].abs() > 1e-12
    assert seen.nonzero().squeeze(1).tolist() == list(range(10, 15))


@pytest.mark.parametrize("truncation", [None, 5, 1000])
@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.usefixtures("as_users_run")  # hundreds of steps
def test_float32_streams_stay_near_float64_over_thousands_of_tokens(size: int, truncation: int | None) -> None:
    exact = make(4, bidirectional=False, truncation=truncation, state_size=8)
    rough = make(4, bidirectional=False, truncation=truncation, state_size=8).float()
    exact.load_state_dict(rough.state_dict())
    x = torch.randn(1, 500 * size if size == 1 else 8192, 4)
    with torch.no_grad():
        wanted, found = along(exact, x.double()), in_chunks(rough, x, size)
    assert (found[:, -400:] - wanted[:, -400:]).norm() <= 1e-6 * wanted[:, -400:].norm()


def test_bidirectional_average_depends_on_both_sides() -> None:
    module = make(1, spread=0.2)
    x = torch.zeros(1, 21, 1, dtype=torch.float64)
    x[0, 10] = 1
    out = along(module, x)[0, :, 0]
    assert (out[:10].abs() > 0).all()
    assert (out[11:].abs() > 0).all()


def test_truncation_limits_the_outputs_that_an_input_reaches() -> None:
    module = make(1, spread=0.2, truncation=5)
    x = torch.zeros(1, 21, 1, dtype=torch.float64)
    x[0, 10] = 1
    seen = along(module, x)[0, :, 0].abs() > 1e-9
    assert seen.nonzero().squeeze(1).tolist() == list(range(6, 15))


@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_truncation_longer_than_the_row_changes_nothing(bidirectional: bool) -> None:
    x = torch.randn(2, 40, 2, dtype=torch.float64)
    long = make(bidirectional=bidirectional, truncation=40)
    whole = make(bidirectional=bidirectional)
    torch.testing.assert_close(along(long, x), along(whole, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [5, 150])
@pytest.mark.parametrize("delta", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("alpha", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_extreme_decay_gives_no_nan(
    bidirectional: bool, alpha: float, delta: float, length: int, dtype: torch.dtype
) -> None:
    # delta = alpha = 200 gives q = 0: the state holds the current token only, and log q is -inf.
    module = make(1, bidirectional=bidirectional, dtype=dtype, truncation=3 if length == 5 else None)
    with torch.no_grad():
        module.delta.fill_(delta)
        module.alpha.fill_(alpha)
    x = torch.randn(2, length, 1, dtype=dtype, requires_grad=True)
    out = along(module, x)
    out.sum().backward()
    torch.testing.assert_close(out[0], ema_loop(module, x[0]), rtol=1e-4, atol=1e-4 if dtype is torch.float32 else 1e-9)
    assert {
        name for name, tensor in [("x", x), *module.named_parameters()] if not grad(tensor).isfinite().all()
    } == set()


@pytest.mark.parametrize("truncation", [None, 1000])
@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_float32_stays_near_float64_over_thousands_of_tokens(bidirectional: bool, truncation: int | None) -> None:
    exact = make(4, spread=1.0, bidirectional=bidirectional, truncation=truncation, state_size=16)
    rough = make(4, spread=1.0, bidirectional=bidirectional, truncation=truncation, state_size=16).float()
    rough.load_state_dict(exact.state_dict())
    exact.load_state_dict(rough.state_dict())
    x = torch.randn(1, 4096, 4)
    incoming = torch.randn(1, 4096, 4)
    results = []
    for module in (exact, rough):
        dtype = module.omega.dtype
        leaf = x.to(dtype).requires_grad_()
        out = along(module, leaf)
        gradients = torch.autograd.grad(out, [leaf, *module.parameters()], incoming.to(dtype))
        results.append([tensor.double() for tensor in (out, *gradients)])
    for name, wanted, found in zip(["output", "x", *dict(exact.named_parameters())], *results, strict=True):
        assert (found - wanted).norm() <= 2e-6 * wanted.norm(), name


@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_no_tokens_give_zero_gradients_instead_of_none(bidirectional: bool) -> None:
    module = make(bidirectional=bidirectional)
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    run(module, x, torch.zeros(3, 5, dtype=torch.bool), "packed").sum().backward()
    assert all(torch.equal(grad(parameter), torch.zeros_like(parameter)) for parameter in module.parameters())


def test_initial_weights_are_those_of_the_authors() -> None:
    torch.manual_seed(0)
    module = EMASpec(state_size=5).build(4000)
    assert_truncated_normal(module.delta, 0.2)
    assert_truncated_normal(module.alpha, 0.2)
    assert_truncated_normal(module.gamma, 1.0)
    assert_truncated_normal(module.omega, 1.0)
    assert_truncated_normal(module.beta - torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])[:, None], 0.02)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param(
            {"state_size": 0},
            r"EMASpec: state_size=0 must be at least 1; state_size: states per channel",
            id="no-state",
        ),
        pytest.param(
            {"truncation": 0},
            r"EMASpec: truncation=0 must be at least 1; truncation: length of the kernel",
            id="no-kernel",
        ),
        pytest.param({"states": 3}, r"EMASpec: unknown field 'states'; did you mean 'state_size'\?", id="unknown"),
    ],
)
def test_impossible_specs_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        EMASpec(**fields)
