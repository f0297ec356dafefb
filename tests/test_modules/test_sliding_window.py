"""Windowed attention of ragged tokens against a loop over queries."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.kernels.weighting import Weighting
from sma.modules.full_attention import attend_all
from sma.modules.sliding_window import Bias, attend
from sma.ragged import Ragged
from tests.test_modules.layouts import LAYOUTS, Layout, assert_same_program, first, lay, run_rows, saved_bytes, spread
from tests.test_modules.loops import attend_loop, bias_loop

WEIGHTINGS: tuple[Weighting, ...] = ("softmax", "relu2", "laplace")
Z, H, P = 2, 3, 9  # query and value width, true distances in the table


def tables(window: int | None) -> dict[str, Tensor]:
    """A table for every kind of distance that exists with this window."""
    found = {"true_distance": torch.randn(2 * P - 1, dtype=torch.float64, requires_grad=True)}
    if window is not None:
        found["slot_distance"] = torch.randn(6 * window - 1, dtype=torch.float64, requires_grad=True)
    return found


def bias_of(table: Tensor | None, distance: str, window: int | None) -> Bias | None:
    if table is None:
        return None
    if distance == "slot_distance":
        assert window is not None
        return Bias(table, 4 * window - 1, over_slots=True)
    return Bias(table, P - 1, over_slots=False)


def attend_tokens(tokens: Ragged, window: int | None, causal: bool, **options: Any) -> Tensor:
    q, k, v = tokens.values.split([Z, Z, H], -1)
    if window is None:
        return attend_all(q, k, v, tokens, causal=causal, **options)
    return attend(q, k, v, tokens, window=window, causal=causal, **options)


def assert_is_the_loop(
    active_BL: Tensor,
    window: int | None,
    causal: bool,
    weighting: Weighting = "softmax",
    distance: str = "none",
    layout: Layout = "packed",
    positions_BL: Tensor | None = None,
) -> None:
    table = tables(window).get(distance)

    def ours(x: Tensor) -> Tensor:
        tokens = lay(x, active_BL, layout, positions_BL)
        out = attend_tokens(tokens, window, causal, weighting=weighting, bias=bias_of(table, distance, window))
        return spread(out, tokens, x)

    def row(values: Tensor, positions: Tensor) -> Tensor:
        q, k, v = values.split([Z, Z, H], -1)
        bias = None if table is None else bias_loop(table, positions, distance, window, P)
        return attend_loop(q, k, v, window=window, causal=causal, weighting=weighting, bias=bias)

    x = torch.randn(*active_BL.shape, 2 * Z + H, dtype=torch.float64)
    parameters = {} if table is None else {"table": table}

    def theirs(x: Tensor) -> Tensor:
        # The loop returns H channels for tokens of 2 Z + H.
        padded = run_rows(
            lambda v, p: torch.cat([row(v, p), v.new_zeros(v.shape[0], 2 * Z)], 1), x, active_BL, positions_BL
        )
        return padded[..., :H]

    assert_same_program(ours, theirs, x, parameters)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [pytest.param(False, id="bidirectional"), pytest.param(True, id="causal")])
@pytest.mark.parametrize("window", [1, 3, 32, 40, 70, 200, None])
def test_rows_around_a_block_agree_with_the_loop(window: int | None, causal: bool, layout: Layout) -> None:
    # A block has 32 slots or half a window: 35 slots at 70, 100 at 200.
    torch.manual_seed(0)
    lengths = [33, 0, 64, 1, 71]
    assert_is_the_loop(first(lengths, max(lengths)), window, causal, layout=layout)


@pytest.mark.parametrize("length", [31, 32, 35, 65, 96, 97, 105])
@pytest.mark.parametrize("window", [1, 40, 70])
def test_multiples_of_a_block_agree_with_the_loop(window: int, length: int) -> None:
    torch.manual_seed(0)
    assert_is_the_loop(first([length], length), window, causal=False, distance="slot_distance")


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 45),
    causal=st.booleans(),
    weighting=st.sampled_from(WEIGHTINGS),
    distance=st.sampled_from(["true_distance", "slot_distance", "none"]),
    layout=st.sampled_from(LAYOUTS),
    offset=st.sampled_from([0, 10**6, 2**31 - 20, 2**40]),
    seed=st.integers(0, 2**16),
)
def test_any_rows_agree_with_the_loop(
    lengths: list[int],
    window: int | None,
    causal: bool,
    weighting: Weighting,
    distance: str,
    layout: Layout,
    offset: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    active = first(lengths, max(1, *lengths))
    # Positions with gaps, as in routed tokens, at some offset of a long stream.
    positions = offset + torch.randint(1, 4, active.shape).cumsum(1)
    assert_is_the_loop(active, window, causal, weighting, distance, layout, positions)


@pytest.mark.parametrize("causal", [pytest.param(False, id="bidirectional"), pytest.param(True, id="causal")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [3, 40, None])
@pytest.mark.parametrize("gap", [2**30 - 2, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**53 + 1, 2**60])
def test_positions_at_any_distance_agree_with_the_loop(
    gap: int, window: int | None, layout: Layout, causal: bool
) -> None:
    torch.manual_seed(0)
    lengths = [45, 0, 7]
    active = first(lengths, 45)
    # Consecutive positions before and after one gap; the rows start far from each other.
    positions = torch.arange(45) + gap * (torch.arange(45) >= 5) + torch.tensor([[0], [3], [gap]])
    assert_is_the_loop(active, window, causal, "softmax", "true_distance", layout, positions)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("causal", [pytest.param(False, id="bidirectional"), pytest.param(True, id="causal")])
def test_a_pair_out_of_reach_has_weight_exactly_zero(causal: bool, weighting: Weighting) -> None:
    torch.manual_seed(0)
    window, place = 3, 45
    x, active = torch.randn(2, 90, 2 * Z + H, dtype=torch.float64), first([90, 60], 90)
    changed = x.clone()
    changed[0, place] = 1e4
    before, after = (
        spread(
            attend_tokens(lay(v, active, "packed"), window, causal, weighting=weighting), lay(v, active, "packed"), v
        )
        for v in (x, changed)
    )
    touched = (before != after).any(-1)
    reached = torch.zeros_like(touched)
    reached[0, (place if causal else place - window) : place + window + 1] = True
    assert not (touched & ~reached).any()
    assert touched[0, place]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("causal", [pytest.param(False, id="bidirectional"), pytest.param(True, id="causal")])
def test_window_as_long_as_the_row_equals_no_window(causal: bool, weighting: Weighting) -> None:
    torch.manual_seed(0)
    tokens = lay(torch.randn(3, 50, 2 * Z + H, dtype=torch.float64), first([50, 7, 0], 50), "packed")
    whole = attend_tokens(tokens, None, causal, weighting=weighting)
    for window in (49, 50, 1000):
        torch.testing.assert_close(
            attend_tokens(tokens, window, causal, weighting=weighting), whole, rtol=1e-12, atol=1e-12
        )
    assert not torch.allclose(attend_tokens(tokens, 48, causal, weighting=weighting), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_row_never_sees_another_row(weighting: Weighting) -> None:
    torch.manual_seed(0)
    x, active = torch.randn(3, 40, 2 * Z + H, dtype=torch.float64), first([40, 13, 33], 40)
    bias = Bias(torch.randn(2 * P - 1, dtype=torch.float64), P - 1, over_slots=False)

    def attended(rows: slice) -> Tensor:
        tokens = lay(x[rows], active[rows], "packed")
        return spread(attend_tokens(tokens, 5, False, weighting=weighting, bias=bias), tokens, x[rows])

    together = attended(slice(None))
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], attended(slice(row, row + 1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("distance", ["none", "true_distance", "slot_distance"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("causal", [pytest.param(False, id="bidirectional"), pytest.param(True, id="causal")])
def test_attend_passes_gradcheck(causal: bool, weighting: Weighting, distance: str, dropout: float) -> None:
    torch.manual_seed(0)
    window, active = 3, first([37, 0, 2], 37)
    tokens = lay(torch.randn(3, 37, 2 * Z + H, dtype=torch.float64), active, "packed")
    q, k, v = (part.clone().requires_grad_() for part in tokens.values.split([Z, Z, H], -1))
    table = tables(window).get(distance)

    def program(q: Tensor, k: Tensor, v: Tensor, *table: Tensor) -> Tensor:
        torch.manual_seed(1)  # gradcheck calls this many times; every call must drop the same weights
        bias = bias_of(table[0], distance, window) if table else None
        return attend(q, k, v, tokens, window=window, causal=causal, weighting=weighting, bias=bias, dropout=dropout)

    inputs = (q, k, v) if table is None else (q, k, v, table)
    assert torch.autograd.gradcheck(program, inputs, fast_mode=True)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_dropping_weights_changes_nothing_on_average(weighting: Weighting) -> None:
    torch.manual_seed(0)
    tokens = lay(torch.randn(1, 12, 2 * Z + H, dtype=torch.float64), first([12], 12), "packed")
    # Copies of one row give many draws in one call.
    draws = lay(tokens.values.expand(4000, 12, 2 * Z + H), first([12] * 4000, 12), "packed")
    wanted = attend_tokens(tokens, 4, False, weighting=weighting)
    found = attend_tokens(draws, 4, False, weighting=weighting, dropout=0.3).unflatten(0, (4000, 12))
    error = found.std(0) / 4000**0.5
    assert (found.std(0) > 0).all()
    assert ((found.mean(0) - wanted).abs() <= 5 * error).all()


def test_dropped_weights_are_zero_and_the_others_grow() -> None:
    torch.manual_seed(0)
    values = torch.zeros(1, 20, 2 * Z + H, dtype=torch.float64)
    values[..., 2 * Z :] = 1  # with equal scores and values a result counts the remaining weights
    tokens = lay(values, first([20], 20), "packed")
    kept = attend_tokens(tokens, None, False, dropout=0.25)[:, 0] * 20 * 0.75
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-9)
    assert 10 <= kept.mean() <= 20
    assert kept.unique().numel() > 1


@pytest.mark.parametrize(("weighting", "layout"), list(itertools.product(WEIGHTINGS, LAYOUTS)))
def test_inputs_are_never_changed(weighting: Weighting, layout: Layout) -> None:
    torch.manual_seed(0)
    tokens = lay(torch.randn(3, 50, 2 * Z + H), first([50, 2, 33], 50), layout)
    q, k, v = (part.clone().requires_grad_() for part in tokens.values.split([Z, Z, H], -1))
    table, incoming = torch.randn(2 * P - 1, requires_grad=True), torch.randn(v.shape)
    watched = (q, k, v, table, incoming, tokens.positions, tokens.rows, tokens.offsets, tokens.lengths)
    copies = [tensor.detach().clone() for tensor in watched]
    out = attend(
        q,
        k,
        v,
        tokens,
        window=3,
        causal=False,
        weighting=weighting,
        bias=Bias(table, P - 1, over_slots=False),
        dropout=0.1,
    )
    result = out.detach().clone()
    out.backward(incoming)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(watched, copies, strict=True))
    assert torch.equal(out, result)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_memory_grows_linearly_with_the_tokens(weighting: Weighting) -> None:
    def kept(length: int) -> int:
        tokens = lay(torch.randn(1, length, 2 * Z + H).requires_grad_(), first([length], length), "packed")
        bias = Bias(torch.randn(2 * P - 1, requires_grad=True), P - 1, over_slots=False)
        return saved_bytes(lambda: attend_tokens(tokens, 16, False, weighting=weighting, bias=bias, dropout=0.1))

    short, long = kept(1000), kept(4000)
    assert short > 1000
    assert long <= 4.2 * short
