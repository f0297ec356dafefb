"""Attention along whole rows in slices of queries equals the loop and a single slice, and saves memory."""

import pytest
import torch
from torch import Tensor

import sma.modules.full_attention
from sma.kernels.weighting import Weighting
from sma.modules.full_attention import attend_all, pairs
from sma.modules.sliding_window import Bias
from tests.test_modules.layouts import LAYOUTS, Layout, first, lay, saved_bytes, spread
from tests.test_modules.test_sliding_window import WEIGHTINGS, H, P, Z, assert_is_the_loop

LENGTHS = [29, 0, 8, 1, 17]
directions = pytest.mark.parametrize(
    "causal", [pytest.param(False, id="bidirectional"), pytest.param(True, id="causal")]
)
weightings = pytest.mark.parametrize("weighting", WEIGHTINGS)


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sma.modules.full_attention, "SLICE", 8)


def results(
    causal: bool, weighting: Weighting, layout: Layout = "packed", dropout: float = 0.0, bad: float = 0.0
) -> list[Tensor]:
    """The result of every token, and the gradients of tokens and table."""
    torch.manual_seed(0)
    x = torch.randn(len(LENGTHS), max(LENGTHS), 2 * Z + H, dtype=torch.float64)
    x[0, 11, -1] += bad
    table, incoming = (
        torch.randn(2 * P - 1, dtype=torch.float64, requires_grad=True),
        torch.randn(*x.shape[:2], H, dtype=torch.float64),
    )
    x.requires_grad_()
    tokens = lay(x, first(LENGTHS, max(LENGTHS)), layout)
    q, k, v = tokens.values.split([Z, Z, H], -1)
    bias = Bias(table, P - 1, over_slots=False)
    out = spread(attend_all(q, k, v, tokens, causal=causal, weighting=weighting, bias=bias, dropout=dropout), tokens, x)
    return [out, *torch.autograd.grad((out.nan_to_num() * incoming).sum(), [x, table])]


@directions
@weightings
@pytest.mark.parametrize("distance", ["true_distance", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("small_slices")
def test_slices_agree_with_the_loop(causal: bool, weighting: Weighting, distance: str, layout: Layout) -> None:
    torch.manual_seed(0)
    assert_is_the_loop(first(LENGTHS, max(LENGTHS)), None, causal, weighting, distance, layout)


@directions
@weightings
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 8, 28, 29])
def test_slices_of_any_size_equal_one_slice(
    monkeypatch: pytest.MonkeyPatch, causal: bool, weighting: Weighting, layout: Layout, size: int
) -> None:
    wanted = results(causal, weighting, layout)
    monkeypatch.setattr(sma.modules.full_attention, "SLICE", size)
    torch.testing.assert_close(results(causal, weighting, layout), wanted, rtol=1e-12, atol=1e-12)


@directions
@weightings
@pytest.mark.usefixtures("small_slices")
def test_backward_drops_the_weights_that_forward_dropped(causal: bool, weighting: Weighting) -> None:
    torch.manual_seed(0)
    tokens = lay(torch.randn(2, 19, 2 * Z + H, dtype=torch.float64), first([19, 10], 19), "packed")

    def program(values: Tensor) -> Tensor:
        torch.manual_seed(1)  # gradcheck calls this many times; every call must drop the same weights
        return attend_all(*values.split([Z, Z, H], -1), tokens, causal=causal, weighting=weighting, dropout=0.4)

    assert torch.autograd.gradcheck(program, tokens.values.clone().requires_grad_(), fast_mode=True)


@directions
@pytest.mark.usefixtures("small_slices")
def test_a_non_finite_value_reaches_only_the_queries_that_attend_to_it(causal: bool) -> None:
    broken = ~results(causal, "softmax", bad=torch.inf)[0].isfinite().all(-1)
    reached = torch.zeros_like(broken)
    reached[0, 11 if causal else 0 :] = True
    assert torch.equal(broken, reached)


def test_scores_are_not_kept_for_backward() -> None:
    def kept(length: int) -> int:
        tokens = lay(torch.randn(1, length, 2 * Z + H).requires_grad_(), first([length], length), "packed")
        bias = Bias(torch.randn(2 * P - 1, requires_grad=True), P - 1, over_slots=False)
        return saved_bytes(lambda: attend_all(*tokens.values.split([Z, Z, H], -1), tokens, causal=False, bias=bias))

    assert kept(2000) < 2000 * 2000
    assert kept(2000) <= 2.2 * kept(1000)


@pytest.mark.parametrize(
    ("tokens", "causal", "number"), [(0, True, 0), (7, True, 49), (20, False, 400), (20, True, 64 + 128 + 80)]
)
@pytest.mark.usefixtures("small_slices")
def test_pairs_of_causal_slices_exclude_later_keys(tokens: int, causal: bool, number: int) -> None:
    assert pairs(tokens, causal) == number
