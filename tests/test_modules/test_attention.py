"""Multi-head attention over whole rows against a loop over heads and queries."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.errors import SpecError
from sma.modules.attention import Attention, AttentionSpec
from sma.modules.local_attention import LocalAttentionSpec
from sma.modules.multihead import MultiHeadSpec
from sma.positions import NoPositionSpec, RelativeBiasSpec, RotarySpec
from tests.test_modules.layouts import (
    LAYOUTS,
    Layout,
    along,
    assert_matches_loop,
    assert_near_under_autocast,
    draw,
    first,
    lay,
    run,
)
from tests.test_modules.loops import attention_loop

POSITIONS = {"rotary": RotarySpec(), "none": NoPositionSpec()}
both_kinds = pytest.mark.parametrize(
    ("kind", "window"),
    [pytest.param(AttentionSpec, {}, id="attention"), pytest.param(LocalAttentionSpec, {"window": 6}, id="local")],
)
DIRECTIONS = [pytest.param(True, id="bidirectional"), pytest.param(False, id="causal")]


def make(
    position: str = "rotary", *, width: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any
) -> Attention:
    torch.manual_seed(seed)
    module = draw(AttentionSpec(**{"heads": 2, "position": POSITIONS[position], **fields}).build(width).to(dtype), 0.7)
    assert isinstance(module, Attention)
    return module


def matches(module: Attention, active: Tensor, layout: Layout, positions: Tensor | None = None) -> None:
    x = torch.randn(*active.shape, module.out_proj.in_features, dtype=torch.float64)
    assert_matches_loop(
        module, lambda values, places: attention_loop(module, values, places), x, active, layout, positions
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("position", sorted(POSITIONS))
@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_attention_agrees_with_the_loop(bidirectional: bool, position: str, heads: int, layout: Layout) -> None:
    matches(make(position, heads=heads, bidirectional=bidirectional), first([9, 0, 1, 4], 9), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "head_size"), [(1, 2), (3, 4), (2, 10)])
@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_heads_of_any_size_agree_with_the_loop(bidirectional: bool, heads: int, head_size: int, layout: Layout) -> None:
    module = make(heads=heads, head_size=head_size, bidirectional=bidirectional)
    x, active = torch.randn(4, 9, 8, dtype=torch.float64), first([9, 0, 1, 4], 9)
    assert_matches_loop(module, lambda values, places: attention_loop(module, values, places), x, active, layout)


@given(
    position=st.sampled_from(sorted(POSITIONS)),
    heads=st.sampled_from([1, 2]),
    bidirectional=st.booleans(),
    layout=st.sampled_from(["packed", "static"]),
    rows=st.integers(1, 3),
    length=st.integers(1, 15),
    rate=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    offset=st.sampled_from([0, 10**6]),
    seed=st.integers(0, 2**16),
)
def test_any_activity_agrees_with_the_loop(
    position: str,
    heads: int,
    bidirectional: bool,
    layout: Layout,
    rows: int,
    length: int,
    rate: float,
    offset: int,
    seed: int,
) -> None:
    module = make(position, width=4, seed=seed, heads=heads, bidirectional=bidirectional)
    positions = offset + torch.randint(1, 4, (rows, length)).cumsum(1)
    matches(module, torch.rand(rows, length) < rate, layout, positions)


@both_kinds
def test_rotary_angles_far_along_a_stream_are_exact(kind: type[MultiHeadSpec], window: dict[str, int]) -> None:
    torch.manual_seed(0)
    module = draw(kind(**window, heads=2, position=RotarySpec()).build(8), 0.7)
    x, places = torch.randn(2, 20, 8), torch.arange(20).expand(2, 20)
    torch.testing.assert_close(along(module, x, places + 10**6), along(module, x, places), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [1, 7, 19])
def test_later_tokens_never_change_earlier_results_of_causal_attention(place: int) -> None:
    module = make(bidirectional=False)
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    changed = x.clone()
    changed[0, place:] = 1e4
    before, after = along(module, x), along(module, changed)
    torch.testing.assert_close(after[0, :place], before[0, :place], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-12)
    assert not torch.allclose(after[0, place], before[0, place])


@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_a_row_alone_equals_the_row_in_a_batch(bidirectional: bool) -> None:
    module = make(bidirectional=bidirectional)
    x, active = torch.randn(3, 20, 8, dtype=torch.float64), first([20, 0, 7], 20)
    together = run(module, x, active, "packed")
    alone = run(module, x[2:, :7], active[2:, :7], "packed")
    torch.testing.assert_close(together[2:, :7], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bidirectional", DIRECTIONS)
@pytest.mark.parametrize("layout", ["packed", "static"])
def test_autocast_is_finite_and_near_float32(layout: Layout, bidirectional: bool, dtype: torch.dtype) -> None:
    module = make(bidirectional=bidirectional, dtype=torch.float32)
    x, active = torch.randn(3, 20, 8), first([20, 0, 7], 20)
    assert_near_under_autocast(module, lambda x: run(module, x, active, layout), x, dtype)


def test_dropout_acts_in_training_only_and_changes_nothing_on_average() -> None:
    module = make(attention_dropout=0.3)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    exact = along(make(), x)
    torch.testing.assert_close(along(module.eval(), x), exact, rtol=0, atol=1e-12)
    draws = along(module.train(), x.expand(4000, 6, 8))
    assert (draws.std(0) > 0).all()
    assert ((draws.mean(0) - exact[0]).abs() <= 5 * draws.std(0) / 4000**0.5).all()


@pytest.mark.parametrize(
    ("fields", "width", "complaint"),
    [
        pytest.param(
            {"heads": 3}, 8, "{kind}: heads=3 must divide the width 8 of the tokens; or set head_size", id="heads"
        ),
        pytest.param(
            {"heads": 4, "position": RotarySpec()},
            12,
            "heads=4 give 3 channels each: rotary positions turn pairs of channels",
            id="odd",
        ),
    ],
)
@both_kinds
def test_widths_that_do_not_fit_are_refused(
    kind: type[MultiHeadSpec], window: dict[str, int], fields: dict[str, Any], width: int, complaint: str
) -> None:
    with pytest.raises(SpecError, match=complaint.format(kind=kind.__name__)):
        kind(**window, **fields).build(width)


@both_kinds
def test_an_odd_head_size_with_rotary_positions_is_refused(kind: type[MultiHeadSpec], window: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="head_size=5: rotary positions turn pairs of channels"):
        kind(**window, heads=3, head_size=5, position=RotarySpec())


@both_kinds
def test_a_bias_table_is_refused(kind: type[MultiHeadSpec], window: dict[str, int]) -> None:
    with pytest.raises(
        SpecError,
        match=r"position kind 'relative_bias' adds a table, which needs the gau sub-module; use \{kind: rotary\} or "
        r"\{kind: none\}",
    ):
        kind(**window, position=RelativeBiasSpec())


@pytest.mark.parametrize(("lengths", "needed"), [([6, 6], False), ([6], False), ([6, 5], True), ([6, 0], True)])
def test_packed_rows_of_equal_length_need_no_mask(lengths: list[int], needed: bool) -> None:
    torch.manual_seed(0)
    module = AttentionSpec(heads=2).build(4).double()
    x, active = torch.randn(len(lengths), 6, 4, dtype=torch.float64), first(lengths, 6)
    tokens = lay(x, active, "packed")
    assert (module._mask(tokens.to_padded()[1], tokens) is not None) == needed
    torch.testing.assert_close(run(module, x, active, "packed"), run(module, x, active, "static"))
