"""The kernels of windowed attention in Triton's interpreter, against the loop over tokens and the plain operator."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sma.kernels import implementation, use
from sma.kernels.weighting import Weighting
from sma.kernels.windowed_attention import _forward
from sma.modules.sliding_window import Bias, attend
from tests.test_modules.layouts import LAYOUTS, Layout, assert_same_program, first, lay, run_rows, spread
from tests.test_modules.loops import attend_loop, bias_loop
from tests.test_sma.test_kernels.attention import H, P, Problem, Z, assert_close, problem, solve

pytest.importorskip("triton", reason="triton has no wheel for this platform")

# The interpreter computes both branches of a `where` with numpy, which warns about the unused one.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

WEIGHTINGS: tuple[Weighting, ...] = ("softmax", "relu2", "laplace")
# More than two tiles of queries and of keys; rows that cross tiles, empty rows, one token, and more than the window.
LENGTHS, WINDOW = [80, 0, 1, 33, 60, 0], 37

cases = pytest.mark.parametrize(
    ("weighting", "distance", "causal", "layout"),
    [
        pytest.param("softmax", "none", False, "packed", id="softmax"),
        pytest.param("softmax", "true_distance", False, "static", id="softmax-true-holes"),
        pytest.param("softmax", "slot_distance", True, "packed", id="softmax-slot-causal"),
        pytest.param("softmax", "none", True, "rectangular", id="softmax-causal-holes"),
        pytest.param("relu2", "true_distance", False, "packed", id="relu2-true"),
        pytest.param("relu2", "slot_distance", False, "static", id="relu2-slot-holes"),
        pytest.param("relu2", "none", True, "packed", id="relu2-causal"),
        pytest.param("laplace", "true_distance", True, "packed", id="laplace-true-causal"),
        pytest.param("laplace", "slot_distance", False, "static", id="laplace-slot-holes"),
    ],
)


@cases
def test_kernels_agree_with_the_loop(weighting: Weighting, distance: str, causal: bool, layout: Layout) -> None:
    active = first(LENGTHS, 80)
    positions = torch.randint(1, 4, active.shape).cumsum(1)
    table = {
        "true_distance": torch.randn(2 * P - 1, dtype=torch.float64, requires_grad=True),
        "slot_distance": torch.randn(6 * WINDOW - 1, dtype=torch.float64, requires_grad=True),
    }.get(distance)
    middle = P - 1 if distance == "true_distance" else 4 * WINDOW - 1
    bias = None if table is None else Bias(table, middle, over_slots=distance == "slot_distance")

    def ours(x: Tensor) -> Tensor:
        tokens = lay(x, active, layout, positions)
        q, k, v = tokens.values.split([Z, Z, H], -1)
        with use("triton"):
            out = attend(q, k, v, tokens, window=WINDOW, causal=causal, weighting=weighting, bias=bias)
        return spread(out, tokens, x)

    def row(values: Tensor, at: Tensor) -> Tensor:
        q, k, v = values.split([Z, Z, H], -1)
        added = None if table is None else bias_loop(table, at, distance, WINDOW, P)
        out = attend_loop(q, k, v, window=WINDOW, causal=causal, weighting=weighting, bias=added)
        return torch.cat([out, values.new_zeros(len(values), 2 * Z)], 1)

    x = torch.randn(*active.shape, 2 * Z + H, dtype=torch.float64)
    parameters = {} if table is None else {"table": table}
    assert_same_program(ours, lambda x: run_rows(row, x, active, positions)[..., :H], x, parameters, tolerance=1e-12)


@pytest.mark.parametrize("lengths", [[0, 0], [1], [0, 64, 0], [65], [31, 32, 33]], ids=str)
@pytest.mark.parametrize("window", [1, 64, 500])
def test_any_tiles_agree_with_the_plain_operator(lengths: list[int], window: int) -> None:
    given = problem(lengths, window, "true_distance")
    assert_close(solve("triton", given, window), solve("plain", given, window))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_holes_only_give_zeros(layout: Layout) -> None:
    given = problem([0, 0, 0], 3, "slot_distance", layout)
    found = solve("triton", given, 3)
    assert not any(value.any() for value in found.values())


def test_holes_have_the_result_zero() -> None:
    given = problem([5, 0, 2], 3, layout="static")
    q, k, v = given.tokens.values.split([Z, Z, H], -1)
    with use("triton"):
        out = attend(q, k, v, given.tokens, window=3, causal=False)
    assert not out[~given.tokens.mask].any()


@pytest.mark.parametrize("hidden", [1, 130, 300])
def test_values_in_several_slices_agree_with_the_plain_operator(hidden: int) -> None:
    given = problem([70, 3], 20, "slot_distance", hidden=hidden)
    assert_close(solve("triton", given, 20), solve("plain", given, 20))


@pytest.mark.parametrize("gap", [2**30, 2**31 - 1, 2**32 + 1, 2**60])
def test_positions_at_any_distance_agree_with_the_plain_operator(gap: int) -> None:
    given = problem([40, 7], 12, "true_distance", gap=gap)
    assert_close(solve("triton", given, 12), solve("plain", given, 12))


def _widened(given: Problem) -> Problem:
    assert given.bias is not None
    tokens = given.tokens.with_values(given.tokens.values.double())
    bias = given.bias._replace(table=given.bias.table.detach().double().requires_grad_())
    return given._replace(tokens=tokens, bias=bias, incoming=given.incoming.double())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 4e-3)])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_other_dtypes_agree_with_float64(dtype: torch.dtype, tolerance: float, weighting: Weighting) -> None:
    given = problem([70, 0, 30], 20, "true_distance", dtype=dtype)
    wide = _widened(given)
    found = solve("triton", given, 20, weighting=weighting)
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(found, dtype)
    wanted = solve("plain", wide, 20, weighting=weighting)
    assert_close({name: value.double() for name, value in found.items()}, wanted, tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_operands_of_products_are_rounded_to_tf32(
    weighting: Weighting, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor cores truncate the last 13 bits. Without rounding first, errors lie between 1e-3 and 2.2e-3."""
    _cut_operands(monkeypatch)
    monkeypatch.setattr("sma.kernels.gpu.windowed_attention.input_precision", lambda dtype: "tf32")
    given = problem([70, 0, 45], 20, "true_distance", hidden=300, dtype=torch.float32)
    given.tokens.values[:, : 2 * Z] /= 3  # scores below 1, because weightings are steep at larger ones
    wide = _widened(given)
    found = solve("triton", given, 20, causal=causal, weighting=weighting)
    for name, exact in solve("plain", wide, 20, causal=causal, weighting=weighting).items():
        assert 1e-5 < (found[name] - exact).norm() / exact.norm() < 9e-4, name


def _cut_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make products of the interpreter truncate their operands as tensor cores do."""
    from triton.runtime import interpreter

    def cut(operand: Any) -> Any:
        bits = operand.data.astype(np.float32).view(np.int32)
        return (bits & -(2**13)).view(np.float32)

    def dot(self: Any, x: Any, y: Any, total: Any, *rest: Any) -> Any:
        return interpreter.TensorHandle(cut(x) @ cut(y) + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_non_finite_values_reach_equal_outputs_in_tf32(weighting: Weighting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma.kernels.gpu.windowed_attention.input_precision", lambda dtype: "tf32")
    given = problem([40, 30, 0, 20], 6, "true_distance", dtype=torch.float32)
    # The last is the NaN that NVIDIA's instructions return; adding to its bits would give a small number.
    for place, bits in ((50, 0x7F800000), (60, 0x7FFFFFFF)):
        given.tokens.values[place, 2 * Z + 1] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    found, wanted = (solve(name, given, 6, weighting=weighting) for name in ("triton", "plain"))
    assert torch.equal(found["output"].isnan(), wanted["output"].isnan())
    assert found["output"].isnan().any()
    fine = wanted["v"].isfinite()
    assert (found["v"] - wanted["v"])[fine].norm() < 1e-2 * wanted["v"][fine].norm()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    ("part", "bad", "causal"),
    [
        ("q", torch.nan, False),
        ("k", torch.inf, False),
        ("k", -torch.inf, True),
        ("v", torch.nan, True),
        ("v", torch.inf, False),
    ],
)
def test_non_finite_values_reach_the_same_outputs_as_in_the_plain_operator(
    weighting: Weighting, causal: bool, part: str, bad: float
) -> None:
    given = problem([40, 30, 0, 20], 6, "true_distance")
    column = {"q": 0, "k": Z, "v": 2 * Z + 1}[part]
    given.tokens.values[50, column] = bad
    found, wanted = (
        solve(name, given, 6, causal=causal, weighting=weighting)["output"] for name in ("triton", "plain")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert found[:40].isfinite().all()
    assert found[70:].isfinite().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_non_finite_values_give_the_finite_gradients_of_the_plain_operator(weighting: Weighting) -> None:
    given = problem([40, 30], 6)
    given.tokens.values[50, -1] = torch.nan
    found, wanted = (solve(name, given, 6, weighting=weighting) for name in ("triton", "plain"))
    for name in ("q", "k", "v"):
        fine = wanted[name].isfinite()
        torch.testing.assert_close(found[name][fine], wanted[name][fine], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("distance", ["true_distance", "slot_distance"])
def test_deterministic_gradient_of_the_table_agrees(monkeypatch: pytest.MonkeyPatch, distance: str) -> None:
    from sma.kernels.gpu import windowed_attention

    given = problem([70, 0, 41], 9, distance, "static")
    wanted = solve("plain", given, 9)
    # Several slices of queries.
    monkeypatch.setattr(windowed_attention, "BUFFER", 64 * 19)
    torch.use_deterministic_algorithms(True)
    try:
        found = solve("triton", given, 9)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, wanted)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_backward_drops_the_weights_that_forward_dropped(weighting: Weighting) -> None:
    """Gradients agree with finite differences under one seed, so backward drops the same weights as forward."""
    given = problem([50, 20], 12, "slot_distance")
    bias = given.bias

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        torch.manual_seed(3)
        assert bias is not None
        options: dict[str, Any] = {"weighting": weighting, "bias": bias._replace(table=table), "dropout": 0.4}
        with use("triton"):
            return attend(q, k, v, given.tokens, window=12, causal=True, **options)

    assert bias is not None
    inputs = [*(x.clone().requires_grad_() for x in given.tokens.values.split([Z, Z, H], -1)), bias.table]
    gradients = torch.autograd.grad(run(*inputs), inputs, given.incoming)
    step = 1e-6
    for index, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        sides = []
        for sign in (1, -1):
            moved = [x.detach() for x in inputs]
            moved[index] = moved[index] + sign * step * direction
            sides.append((run(*moved) * given.incoming).sum())
        difference = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-6)


def test_dropped_weights_are_zero_and_the_others_grow() -> None:
    tokens = lay(torch.zeros(1, 90, 2 * Z + H, dtype=torch.float64), first([90], 90), "packed")
    q, k = torch.zeros(2, 90, Z, dtype=torch.float64)
    v = torch.eye(90, dtype=torch.float64)  # with equal scores a result is the row of weights
    with use("triton"):
        weights = attend(q, k, v, tokens, window=100, causal=False, dropout=0.25)
        others = attend(q, k, v, tokens, window=100, causal=False, dropout=0.25)
    kept = weights * 90 * 0.75
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-12)
    assert 0.72 < kept.mean() < 0.78
    assert not torch.equal(weights, others)


@pytest.mark.slow
@cases
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_operator_passes_torchs_own_checks(
    weighting: Weighting, distance: str, causal: bool, layout: Layout, dropout: float
) -> None:
    given = problem([9, 0, 4], 3, distance, layout)
    tokens = given.tokens
    q, k, v = (x.clone().requires_grad_() for x in tokens.values.split([Z, Z, H], -1))
    calls: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sma.kernels.windowed_attention._forward", lambda *a: calls.append(a) or (v, []))
        for name in ("plain", "triton"):
            with use(name):
                attend(q, k, v, tokens, window=3, causal=causal, weighting=weighting, bias=given.bias, dropout=dropout)
    for call in calls:
        torch.library.opcheck(_forward, call)


def test_a_cpu_uses_the_plain_operator() -> None:
    assert implementation("windowed_attention", "cpu").name == "plain"


@pytest.mark.parametrize("part", ["q", "k", "v", "incoming"])
def test_the_largest_floats_never_spread_in_tf32(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """The largest floats do not round to infinity, which would reach every pair of a tile."""
    given = problem([40], 3, dtype=torch.float32)
    values, incoming = given.tokens.values.clone(), given.incoming.clone()
    column = {"q": 0, "k": Z, "v": 2 * Z}.get(part)
    (incoming if column is None else values)[30, column or 0] = torch.finfo(torch.float32).max
    given = given._replace(tokens=given.tokens.with_values(values), incoming=incoming)
    monkeypatch.setattr("sma.kernels.gpu.windowed_attention.input_precision", lambda dtype: "tf32")
    found = solve("triton", given, 3, causal=True, weighting="relu2")
    for name, value in found.items():
        far = torch.ones(40, dtype=torch.bool)
        far[24:37] = False
        assert value[far].isfinite().all(), name


def test_a_table_need_not_be_contiguous() -> None:
    given = problem([9, 4], 3, "slot_distance")
    assert given.bias is not None
    column = torch.stack([given.bias.table.detach(), torch.full_like(given.bias.table, 7.0)], 1)[:, 0].requires_grad_()
    assert not column.is_contiguous()
    found = solve("triton", given._replace(bias=given.bias._replace(table=column)), 3)
    assert_close(found, solve("triton", given, 3))
