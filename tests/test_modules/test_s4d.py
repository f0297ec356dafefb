"""The diagonal state-space model against its recurrence, in every layout and for extreme parameters."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.errors import SpecError, StateError
from sma.modules.s4d import S4D, S4DSpec
from sma.ragged import rectangular
from sma.testing import check_submodule
from tests.test_modules.layouts import LAYOUTS, Layout, along, assert_matches_loop, draw, first, grad
from tests.test_modules.streams import in_chunks

DIRECTIONS = pytest.mark.parametrize(
    "bidirectional", [pytest.param(True, id="bidirectional"), pytest.param(False, id="causal")]
)

CORE = {"activation": "none", "mixing": "none"}


def make(
    width: int = 2, *, spread: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any
) -> S4D:
    """A module with random parameters: steps near `spread` and frequencies near 10 / `spread`, that is, rotations of
    some radians per token.
    """
    torch.manual_seed(seed)
    module = draw(S4DSpec(**{"state_size": 6, **fields}).build(width).to(dtype))
    assert isinstance(module, S4D)
    with torch.no_grad():
        module.log_dt.add_(math.log(spread))
        module.a_im.mul_(10 / spread)
    return module


def s4d_loop(module: S4D, x: Tensor) -> Tensor:
    """One row (n, D), token by token in complex numbers, by the formulas of the docstring."""
    spec, width = module.spec, module.width
    dt = module.log_dt.exp()[:, None].to(x.dtype)
    a = torch.complex(-module.log_a_re.exp(), module.a_im).to(torch.complex128)
    decay, entering = torch.exp(dt * a), torch.expm1(dt * a) / a
    y = module.skip * x
    for direction in range(2 if spec.bidirectional else 1):
        c = torch.view_as_complex(module.c.double())[direction * width : (direction + 1) * width]
        state, out = torch.zeros_like(a), []
        for x_t in x if direction == 0 else x.flip(0):
            state = decay * state + entering * x_t[:, None]
            out.append(2 * (c * state).sum(1).real)
        averaged = torch.stack(out)
        y = y + (averaged if direction == 0 else averaged.flip(0))
    if spec.activation == "gelu":
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
    if module.mix is not None:
        y = y @ module.mix.weight.T + module.mix.bias
    return y[:, :width] * torch.sigmoid(y[:, width:]) if spec.mixing == "glu" else y


def matches(module: S4D, active: Tensor, layout: Layout) -> None:
    x = torch.randn(*active.shape, module.width, dtype=torch.float64)
    assert_matches_loop(module, lambda row, _: s4d_loop(module, row), x, active, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state_size", [2, 6])
@pytest.mark.parametrize("spread", [0.01, 1.0])
@DIRECTIONS
def test_outputs_and_gradients_agree_with_the_recurrence(
    bidirectional: bool, spread: float, state_size: int, layout: Layout
) -> None:
    matches(
        make(spread=spread, state_size=state_size, bidirectional=bidirectional, **CORE),
        first([7, 0, 12, 1], 12),
        layout,
    )


@pytest.mark.parametrize("mixing", ["glu", "linear", "none"])
@pytest.mark.parametrize("activation", ["gelu", "none"])
@DIRECTIONS
def test_activation_and_mixing_follow_the_recurrence(bidirectional: bool, activation: str, mixing: str) -> None:
    matches(make(3, bidirectional=bidirectional, activation=activation, mixing=mixing), first([5, 0, 9], 9), "packed")


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129])
@DIRECTIONS
def test_lengths_around_a_chunk_agree_with_the_recurrence(bidirectional: bool, length: int) -> None:
    matches(make(spread=0.03, bidirectional=bidirectional, **CORE), first([length, length // 2], length), "packed")


@given(
    rate=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    rows=st.integers(1, 4),
    length=st.integers(1, 20),
    width=st.integers(1, 3),
    pairs=st.integers(1, 4),
    bidirectional=st.booleans(),
    layout=st.sampled_from(["packed", "static"]),
    seed=st.integers(0, 2**16),
)
def test_any_activity_agrees_with_the_recurrence(
    rate: float, rows: int, length: int, width: int, pairs: int, bidirectional: bool, layout: Layout, seed: int
) -> None:
    module = make(width, spread=0.1, seed=seed, state_size=2 * pairs, bidirectional=bidirectional)
    matches(module, torch.rand(rows, length) < rate, layout)


@pytest.mark.parametrize("initial", ["lin", "inv"])
@DIRECTIONS
def test_initial_module_agrees_with_the_recurrence(bidirectional: bool, initial: str) -> None:
    torch.manual_seed(0)
    module = S4DSpec(state_size=16, bidirectional=bidirectional, initial=initial).build(3).double()
    matches(module, first([100, 40], 100), "packed")


@DIRECTIONS
def test_gradients_pass_gradcheck(bidirectional: bool) -> None:
    module = make(1, spread=0.1, state_size=4, bidirectional=bidirectional)
    x = torch.randn(1, 70, 1, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def program(x: Tensor, *parts: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, dict(zip(names, parts, strict=True)), (rectangular(x),))[0]
        return result

    assert torch.autograd.gradcheck(program, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("size", [1, 2, 64, 100, 200])
def test_chunks_and_steps_equal_the_whole(size: int) -> None:
    module, x = make(3, spread=0.02, bidirectional=False), torch.randn(2, 200, 3, dtype=torch.float64)
    torch.testing.assert_close(in_chunks(module, x, size), along(module, x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.usefixtures("as_users_run")  # hundreds of steps
def test_float32_streams_stay_near_float64_over_thousands_of_tokens(size: int) -> None:
    torch.manual_seed(0)
    rough = S4DSpec(state_size=16, bidirectional=False, **CORE).build(4)
    exact = S4DSpec(state_size=16, bidirectional=False, **CORE).build(4).double()
    exact.load_state_dict(rough.state_dict())
    x = torch.randn(1, 500 if size == 1 else 8192, 4)
    with torch.no_grad():
        wanted, found = along(exact, x.double()), in_chunks(rough, x, size)
    assert (found[:, -400:] - wanted[:, -400:]).norm() <= 1e-6 * wanted[:, -400:].norm()


@DIRECTIONS
def test_float32_stays_near_float64_over_thousands_of_tokens(bidirectional: bool) -> None:
    torch.manual_seed(0)
    spec = S4DSpec(state_size=16, bidirectional=bidirectional, **CORE)
    rough, exact = spec.build(4), spec.build(4).double()
    exact.load_state_dict(rough.state_dict())
    x, incoming = torch.randn(1, 4096, 4), torch.randn(1, 4096, 4)
    results = []
    for module in (exact, rough):
        leaf = x.to(module.skip.dtype).requires_grad_()
        out = along(module, leaf)
        gradients = torch.autograd.grad(out, [leaf, *module.parameters()], incoming.to(leaf.dtype))
        results.append([tensor.double() for tensor in (out, *gradients)])
    for name, wanted, found in zip(["output", "x", *dict(exact.named_parameters())], *results, strict=True):
        assert (found - wanted).norm() <= 5e-6 * wanted.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("a_im", [0.0, 3.0, 1e9])
@pytest.mark.parametrize("log_a_re", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("log_dt", [-200.0, 0.0, 30.0])
@DIRECTIONS
def test_extreme_parameters_stay_finite(
    bidirectional: bool, log_dt: float, log_a_re: float, a_im: float, dtype: torch.dtype
) -> None:
    # Steps of length 0, states with full or no decay, and A near 0, where (q - 1) / A is 0 / 0.
    module = make(1, bidirectional=bidirectional, dtype=dtype, state_size=2, **CORE)
    with torch.no_grad():
        for parameter, value in ((module.log_dt, log_dt), (module.log_a_re, log_a_re), (module.a_im, a_im)):
            parameter.fill_(value)
    x = torch.randn(2, 70, 1, dtype=dtype, requires_grad=True)
    out = along(module, x)
    out.sum().backward()
    assert {
        name for name, tensor in [("x", x), *module.named_parameters()] if not grad(tensor).isfinite().all()
    } == set()
    wanted = s4d_loop(module.double(), x[0].double())
    if log_dt <= 0 or log_a_re >= 0 or a_im == 0:
        assert (out[0].double() - wanted).norm() <= (1e-5 if dtype is torch.float32 else 1e-9) * wanted.norm()
    else:  # 1e13 radians per token without decay: rounding makes the phase arbitrary after many tokens
        assert out.isfinite().all()


@pytest.mark.parametrize(
    ("initial", "frequencies"),
    [
        pytest.param("lin", [0.0, math.pi, 2 * math.pi], id="lin"),
        pytest.param("inv", [30 / math.pi, 6 / math.pi, 6 / math.pi * 0.2], id="inv"),
    ],
)
def test_initial_parameters_are_those_of_the_authors(initial: str, frequencies: list[float]) -> None:
    torch.manual_seed(0)
    module = S4DSpec(state_size=6, initial=initial, dt_min=0.01, dt_max=0.5, mixing="none").build(4000)
    torch.testing.assert_close(module.a_im, torch.tensor(frequencies).expand(4000, 3))
    torch.testing.assert_close(module.log_a_re.exp(), torch.full((4000, 3), 0.5))
    steps = module.log_dt.exp()
    assert 0.01 <= steps.min() < 0.0101
    assert 0.49 < steps.max() <= 0.5
    assert steps.log().mean().item() == pytest.approx(math.log(0.01 * 0.5) / 2, abs=0.06)
    assert module.c.std().item() == pytest.approx(0.5**0.5, abs=0.01)
    assert module.skip.std().item() == pytest.approx(1, abs=0.05)


@DIRECTIONS
def test_contract_is_kept(bidirectional: bool) -> None:
    check_submodule(S4DSpec(state_size=4, bidirectional=bidirectional), effort=2)


def test_a_state_of_another_size_is_refused() -> None:
    tokens = rectangular(torch.randn(2, 3, 2, dtype=torch.float64))
    with pytest.raises(
        StateError, match=r"S4D got the state of another model: sizes \(2, 2, 5\) instead of \(2, 2, 3\)"
    ):
        make(bidirectional=False)(tokens, make(bidirectional=False, state_size=10).init_state(2))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param(
            {"state_size": 0},
            r"S4DSpec: state_size=0 must be at least 2; state_size: real states per channel",
            id="no-state",
        ),
        pytest.param(
            {"state_size": 7}, r"S4DSpec: state_size=7 must be even: complex states come in conjugate pairs", id="odd"
        ),
        pytest.param({"dt_min": 0.5}, r"S4DSpec: dt_min=0.5 must be at most dt_max=0.1", id="crossed-steps"),
        pytest.param(
            {"dt_max": 0.0}, r"S4DSpec: dt_max=0.0 must be greater than 0.0; dt_max: longest initial step", id="no-step"
        ),
        pytest.param({"initial": "legs"}, r"S4DSpec: initial='legs' must be 'lin' or 'inv'", id="unknown-initial"),
    ],
)
def test_impossible_specs_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        S4DSpec(**fields)
