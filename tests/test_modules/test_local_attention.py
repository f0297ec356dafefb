"""Multi-head attention inside a window against a loop over heads and queries."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.errors import SpecError
from sma.kernels.blocks import in_reach
from sma.modules.attention import AttentionSpec
from sma.modules.local_attention import LocalAttention, LocalAttentionSpec
from sma.modules.multihead import MultiHead
from sma.positions import NoPositionSpec, RotarySpec
from tests.streams import steps
from tests.test_modules.layouts import (
    LAYOUTS,
    Layout,
    along,
    assert_matches_loop,
    assert_near_under_autocast,
    assert_same_program,
    draw,
    first,
    lay,
    run,
    saved_bytes,
)
from tests.test_modules.loops import attention_loop, reach
from tests.test_modules.streams import stream

POSITIONS = {"rotary": RotarySpec(), "none": NoPositionSpec()}
DIRECTIONS = pytest.mark.parametrize(
    "bidirectional", [pytest.param(True, id="bidirectional"), pytest.param(False, id="causal")]
)


def make(
    window: int = 5,
    *,
    position: str = "rotary",
    width: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **fields: Any,
) -> LocalAttention:
    torch.manual_seed(seed)
    spec = LocalAttentionSpec(**{"heads": 2, "window": window, "position": POSITIONS[position], **fields})
    module = draw(spec.build(width).to(dtype), 0.7)
    assert isinstance(module, LocalAttention)
    return module


def full_attention(module: LocalAttention) -> MultiHead:
    """Full attention with the same weights."""
    fields = {name: getattr(module.spec, name) for name in AttentionSpec.model_fields if name != "kind"}
    whole = AttentionSpec(**fields).build(module.out_proj.in_features).to(module.out_proj.weight.dtype)
    whole.load_state_dict(module.state_dict())
    return whole


def matches(
    module: LocalAttention, active: Tensor, layout: Layout, positions: Tensor | None = None, scale: float = 1.0
) -> None:
    x = scale * torch.randn(*active.shape, module.out_proj.in_features, dtype=torch.float64)
    assert_matches_loop(
        module, lambda values, places: attention_loop(module, values, places), x, active, layout, positions
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "position"), [(1, "none"), (4, "rotary")])
@DIRECTIONS
@pytest.mark.parametrize("window", [1, 5, 40, 70])
def test_attention_agrees_with_the_loop(
    window: int, bidirectional: bool, heads: int, position: str, layout: Layout
) -> None:
    # A block has 32 slots or half a window. Rows have more than two blocks, a block and a token, one token, or none.
    matches(
        make(window, position=position, heads=heads, bidirectional=bidirectional), first([65, 0, 33, 1], 65), layout
    )


@given(
    window=st.integers(1, 20) | st.sampled_from([64, 100]),
    position=st.sampled_from(sorted(POSITIONS)),
    heads=st.sampled_from([1, 2]),
    bidirectional=st.booleans(),
    layout=st.sampled_from(["packed", "static"]),
    rows=st.integers(1, 3),
    length=st.integers(1, 50),
    rate=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    offset=st.sampled_from([0, 10**6]),
    seed=st.integers(0, 2**16),
)
def test_any_activity_agrees_with_the_loop(
    window: int,
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
    module = make(window, position=position, width=4, seed=seed, heads=heads, bidirectional=bidirectional)
    positions = offset + torch.randint(1, 4, (rows, length)).cumsum(1)
    matches(module, torch.rand(rows, length) < rate, layout, positions)


@DIRECTIONS
def test_scores_that_overflow_an_exponential_agree_with_the_loop(bidirectional: bool) -> None:
    # Scores of some thousands: the largest score gets the whole weight.
    matches(make(bidirectional=bidirectional), first([41, 7], 41), "packed", scale=30.0)


@DIRECTIONS
@pytest.mark.parametrize("position", sorted(POSITIONS))
@pytest.mark.parametrize("window", [44, 45, 300])
def test_a_window_over_the_whole_row_equals_full_attention(window: int, position: str, bidirectional: bool) -> None:
    module = make(window, position=position, bidirectional=bidirectional)
    whole, active = full_attention(module), first([45, 0, 33], 45)
    names = [name for name, _ in module.named_parameters()]
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in module.named_parameters()}

    def program(part: MultiHead) -> Any:
        def call(x: Tensor) -> Tensor:
            tokens = lay(x, active, "packed")
            return torch.func.functional_call(part, {name: parameters[name] for name in names}, (tokens,))[0]

        return call

    assert_same_program(program(module), program(whole), torch.randn(3, 45, 8, dtype=torch.float64), parameters, 1e-11)


@given(
    window=st.integers(1, 9),
    causal=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    rate=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 999),
)
def test_in_reach_agrees_with_the_loop(
    window: int, causal: bool, layout: Layout, lengths: list[int], rate: float, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    tokens = lay(torch.randn(len(lengths), 20, 1, generator=source), first(lengths, 20), layout)
    marked = (torch.rand(tokens.rows.shape[0], generator=source) < rate) & tokens.mask
    found = in_reach(marked, tokens, window, causal)
    for place in tokens.mask.nonzero().flatten().tolist():
        start, slot = int(tokens.offsets[tokens.rows[place]]), int(tokens.slots[place])
        seen = reach(slot, int(tokens.lengths[tokens.rows[place]]), window, causal)
        assert bool(found[place]) == any(bool(marked[start + other]) for other in seen)


@DIRECTIONS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize(("window", "place"), [(5, 0), (5, 31), (5, 40), (40, 3), (40, 79), (100, 50)])
def test_non_finite_values_reach_their_window_only(window: int, place: int, bad: float, bidirectional: bool) -> None:
    module = make(window, bidirectional=bidirectional)
    x = torch.randn(2, 80, 8, dtype=torch.float64)
    clean, x[0, place, 3] = along(module, x), bad
    found = along(module, x)
    distance = torch.arange(80) - place
    hit = (distance.abs() <= window) if bidirectional else (distance >= 0) & (distance <= window)
    assert torch.equal(found[0].isnan().all(-1), hit)
    torch.testing.assert_close(found[0, ~hit], clean[0, ~hit], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], clean[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "chunks", [pytest.param(steps(30), id="steps"), pytest.param([slice(0, 9), slice(9, 30)], id="chunks")]
)
def test_non_finite_values_leave_a_stream_after_their_window(chunks: list[slice]) -> None:
    module = make(6, bidirectional=False)
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    active = first([30, 30], 30)
    x[0, 10] = torch.nan
    active[0, 12] = False  # the window counts active tokens
    found, _ = stream(module, x, active, chunks)
    assert found[0].isnan().all(-1).nonzero().flatten().tolist() == [10, 11, 13, 14, 15, 16, 17]
    assert not found[1].isnan().any()


@pytest.mark.parametrize("place", [1, 31, 32, 33, 69])
@pytest.mark.parametrize(("dtype", "value"), [(torch.float64, 1e4), (torch.float32, 1e30)], ids=str)
def test_later_tokens_never_change_earlier_results_of_causal_attention(
    place: int, dtype: torch.dtype, value: float
) -> None:
    module = make(bidirectional=False, dtype=dtype)
    x = torch.randn(2, 70, 8, dtype=dtype)
    changed = x.clone()
    changed[0, place:] = value
    before, after = along(module, x), along(module, changed)
    assert torch.equal(after[0, :place], before[0, :place])
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0, place], before[0, place])


@DIRECTIONS
def test_attention_passes_gradcheck(bidirectional: bool) -> None:
    module = make(3, bidirectional=bidirectional)
    tokens = lay(torch.randn(2, 36, 8, dtype=torch.float64), first([36, 2], 36), "packed")
    names = list(dict(module.named_parameters()))

    def program(values: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (tokens.with_values(values),)
        )[0]

    inputs = (
        tokens.values.clone().requires_grad_(),
        *(parameter.detach().requires_grad_() for parameter in module.parameters()),
    )
    assert torch.autograd.gradcheck(program, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["packed", "static"])
@DIRECTIONS
def test_autocast_is_finite_and_near_float32(bidirectional: bool, layout: Layout, dtype: torch.dtype) -> None:
    module = make(bidirectional=bidirectional, dtype=torch.float32)
    x, active = torch.randn(3, 50, 8), first([50, 0, 7], 50)
    assert_near_under_autocast(module, lambda x: run(module, x, active, layout), x, dtype)


def test_dropout_acts_in_training_only_and_changes_nothing_on_average() -> None:
    module, x = make(3, attention_dropout=0.3), torch.randn(1, 9, 8, dtype=torch.float64)
    exact = along(make(3), x)
    torch.testing.assert_close(along(module.eval(), x), exact, rtol=0, atol=1e-12)
    draws = along(module.train(), x.expand(4000, 9, 8))
    assert (draws.std(0) > 0).all()
    assert ((draws.mean(0) - exact[0]).abs() <= 5 * draws.std(0) / 4000**0.5).all()


@DIRECTIONS
def test_memory_grows_as_tokens_times_window(bidirectional: bool) -> None:
    def kept(length: int, window: int) -> int:
        module = make(window, bidirectional=bidirectional, dtype=torch.float32)
        x = torch.randn(1, length, 8, requires_grad=True)
        return saved_bytes(lambda: along(module, x))

    assert kept(4096, 64) <= 2.1 * kept(2048, 64)
    assert kept(4096, 128) <= 2.1 * kept(4096, 64)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param(
            {},
            "LocalAttentionSpec: 'window' is required; window: active tokens in reach on each side, W",
            id="no-window",
        ),
        pytest.param(
            {"window": None},
            "LocalAttentionSpec: window=None: input should be a valid integer; .*; the kind 'attention' attends to all",
            id="null-window",
        ),
        pytest.param(
            {"window": 0},
            "LocalAttentionSpec: window=0 must be at least 1; window: active tokens in reach",
            id="window",
        ),
        pytest.param(
            {"window": 3, "attention_dropout": 1.0},
            "LocalAttentionSpec: attention_dropout=1.0 must be less",
            id="dropout",
        ),
    ],
)
def test_impossible_specs_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        LocalAttentionSpec(**fields)
