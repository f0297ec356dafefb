"""The gated attention unit against a loop over its tokens."""

import itertools
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma import SparseModularActivation
from sma.errors import SpecError
from sma.modules.attention import AttentionSpec
from sma.modules.gau import GatedAttentionUnit, GAUSpec
from sma.positions import NoPositionSpec, PositionSpec, RelativeBiasSpec, RotarySpec
from sma.ragged import rectangular
from sma.routers import AlwaysRouterSpec
from tests.test_modules.layouts import (
    LAYOUTS,
    Layout,
    along,
    assert_matches_loop,
    assert_near_under_autocast,
    assert_truncated_normal,
    draw,
    first,
    grad,
    lay,
    run,
)
from tests.test_modules.loops import gau_loop

WIDTH = 5
ATTENTIONS = ("softmax", "relu2", "laplace")
POSITIONS: dict[str, PositionSpec] = {
    "true_distance": RelativeBiasSpec(max_positions=9),
    "slot_distance": RelativeBiasSpec(distance="slot_distance"),
    "rotary": RotarySpec(),
    "none": NoPositionSpec(),
}
DIRECTIONS = [pytest.param(True, id="bidirectional"), pytest.param(False, id="causal")]


def make(
    position: str = "true_distance",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    std: float = 1.0,
    **fields: Any,
) -> GatedAttentionUnit:
    torch.manual_seed(seed)
    spec = GAUSpec(**{"query_size": 4, "hidden_size": 3, "position": POSITIONS[position], **fields})
    module = draw(spec.build(WIDTH).to(dtype), std)
    assert isinstance(module, GatedAttentionUnit)
    return module


def matches(module: GatedAttentionUnit, active: Tensor, layout: Layout, positions: Tensor | None = None) -> None:
    x = torch.randn(*active.shape, WIDTH, dtype=torch.float64)
    assert_matches_loop(module, lambda values, places: gau_loop(module, values, places), x, active, layout, positions)


COMBINATIONS = [
    pytest.param(*combination, id="-".join(str(part) for part in combination))
    for combination in itertools.product(ATTENTIONS, POSITIONS, (None, 1, 5, 40), LAYOUTS)
    if not (combination[1] == "slot_distance" and combination[2] is None)
]


@pytest.mark.parametrize(("attention", "position", "window", "layout"), COMBINATIONS)
@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_unit_agrees_with_the_loop(
    bidirectional: bool, attention: str, position: str, window: int | None, layout: Layout
) -> None:
    module = make(position, attention=attention, window=window, bidirectional=bidirectional)
    # Longer than the window and a block of 32; one token; none; shorter than the window. Routed rows have gaps.
    lengths = [35, 1, 0, 4]
    if layout == "rectangular":
        matches(module, first(lengths, 35), layout)
        return
    active = torch.zeros(4, 70, dtype=torch.bool)
    for row, count in enumerate(lengths):
        active[row, torch.randperm(70)[:count]] = True
    matches(module, active, layout)


@given(
    attention=st.sampled_from(ATTENTIONS),
    position=st.sampled_from(sorted(POSITIONS)),
    window=st.none() | st.integers(1, 20),
    bidirectional=st.booleans(),
    layout=st.sampled_from(["packed", "static"]),
    rows=st.integers(1, 3),
    length=st.integers(1, 40),
    rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_any_activity_agrees_with_the_loop(
    attention: str,
    position: str,
    window: int | None,
    bidirectional: bool,
    layout: Layout,
    rows: int,
    length: int,
    rate: float,
    seed: int,
) -> None:
    if position == "slot_distance" and window is None:
        window = 7
    module = make(position, seed=seed, attention=attention, window=window, bidirectional=bidirectional)
    matches(module, torch.rand(rows, length) < rate, layout)


@pytest.mark.parametrize("position", ["true_distance", "rotary"])
def test_positions_of_a_stream_agree_with_the_loop(position: str) -> None:
    active = first([40, 33], 40)
    stream = 10**6 + torch.randint(1, 5, (2, 40)).cumsum(1)
    matches(make(position, window=6), active, "packed", stream)


@pytest.mark.parametrize(
    ("position", "counts_slots"), [("true_distance", False), ("rotary", False), ("slot_distance", True), ("none", True)]
)
def test_original_positions_matter_unless_the_spec_counts_slots(position: str, counts_slots: bool) -> None:
    module = make(position, window=5)
    x = torch.randn(1, 12, WIDTH, dtype=torch.float64)
    near, far = along(module, x), along(module, x, 3 * torch.arange(12)[None])
    assert torch.equal(near, far) == counts_slots


def test_distances_beyond_the_table_share_its_last_entries() -> None:
    module = make("true_distance")  # 9 positions
    x = torch.randn(1, 2, WIDTH, dtype=torch.float64)
    places = [torch.tensor([[0, distance]]) for distance in (7, 8, 9, 500)]
    inside, last, beyond, far = (along(module, x, place) for place in places)
    assert torch.equal(last, beyond)
    assert torch.equal(last, far)
    assert not torch.allclose(inside, last)


@pytest.mark.parametrize("window", [4, 40, None])
@pytest.mark.parametrize("position", ["relative_bias", "rotary"])
@pytest.mark.parametrize("gap", [2**31, 2**32 - 1, 2**32, 2**32 + 3, 2**40])
@torch.no_grad()
def test_streams_with_gaps_beyond_32_bits_agree_with_the_whole(gap: int, position: str, window: int | None) -> None:
    kinds = {"relative_bias": RelativeBiasSpec(max_positions=9), "rotary": RotarySpec()}
    spec = GAUSpec(query_size=4, hidden_size=6, window=window, bidirectional=False, position=kinds[position])
    torch.manual_seed(0)
    unit = draw(spec.build(5).double())
    routed = SparseModularActivation(AlwaysRouterSpec().build(5, ["unit"]), {"unit": unit})
    x, positions = (
        torch.randn(2, 12, 5, dtype=torch.float64),
        torch.arange(12) + gap * (torch.arange(12) >= 6) + torch.tensor([[0], [gap]]),
    )
    whole = routed(x, positions=positions).values
    for size in (1, 2, 5):
        state, parts = routed.init_state(2), []
        for start in range(0, 12, size):
            chunk = slice(start, start + size)
            output = routed(x[:, chunk], positions=positions[:, chunk], state=state)
            state = output.state
            parts.append(output.values)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_scores_are_right_in_rows_of_more_tokens_than_the_largest_float16(bidirectional: bool) -> None:
    unit = GAUSpec(query_size=2, hidden_size=2, bidirectional=bidirectional, attention="relu2").build(2)
    tokens = rectangular(torch.zeros(1, 70_000, 2))
    scaled = unit._scaled(torch.full((70_000, 2), 1000.0, dtype=torch.float16), tokens, None)
    assert scaled.dtype is torch.float16
    torch.testing.assert_close(scaled[-1].float(), torch.full((2,), 1000 / 70_000), rtol=1e-3, atol=0)


@pytest.mark.parametrize("offset", [10**6, 10**6 + 12345])
def test_rotary_angles_far_along_a_stream_are_exact(offset: int) -> None:
    # Rotary scores depend on distances only. Angles in float32 would have an error of 0.03 rad here.
    module = make("rotary", window=6, dtype=torch.float32)
    x = torch.randn(2, 40, WIDTH)
    places = torch.arange(40).expand(2, 40)
    torch.testing.assert_close(along(module, x, places + offset), along(module, x, places), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["true_distance", "rotary", "none"])
@pytest.mark.parametrize("bidirectional", DIRECTIONS)
def test_no_window_equals_a_window_as_long_as_the_row(bidirectional: bool, position: str) -> None:
    x = torch.randn(2, 45, WIDTH, dtype=torch.float64)
    whole = make(position, bidirectional=bidirectional)
    for window in (44, 45, 300):
        windowed = make(position, bidirectional=bidirectional, window=window)
        torch.testing.assert_close(along(windowed, x), along(whole, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("place", [1, 31, 32, 33, 69])
def test_later_tokens_never_change_earlier_results_of_a_causal_unit(
    place: int, window: int | None, attention: str
) -> None:
    module = make("true_distance", attention=attention, window=window, bidirectional=False)
    x = torch.randn(2, 70, WIDTH, dtype=torch.float64)
    changed = x.clone()
    changed[0, place:] = 1e4
    before, after = along(module, x), along(module, changed)
    assert torch.equal(after[0, :place], before[0, :place])
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0, place], before[0, place])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("window", [None, 5])
def test_a_row_alone_equals_the_row_in_a_batch(window: int | None, attention: str) -> None:
    module = make("true_distance", attention=attention, window=window)
    x, active = torch.randn(3, 40, WIDTH, dtype=torch.float64), first([40, 13, 33], 40)
    together = run(module, x, active, "packed")
    for row in range(3):
        alone = run(module, x[row : row + 1], active[row : row + 1], "packed")
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("position", sorted(POSITIONS))
def test_autocast_is_finite_and_near_float32(position: str, attention: str, dtype: torch.dtype) -> None:
    module = make(position, attention=attention, window=6, dtype=torch.float32, std=0.5)
    x = torch.randn(2, 70, WIDTH)
    assert_near_under_autocast(module, lambda x: along(module, x), x, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_modules_give_finite_results_of_their_dtype(dtype: torch.dtype) -> None:
    module = make(window=6, dtype=dtype, std=0.5)
    x = torch.randn(2, 70, WIDTH, dtype=dtype, requires_grad=True)
    out = along(module, x)
    out.float().sum().backward()
    assert out.dtype is dtype
    assert out.isfinite().all()
    assert all(grad(tensor).isfinite().all() for tensor in (x, *module.parameters()))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_unit_passes_gradcheck(attention: str) -> None:
    module = make("true_distance", attention=attention, window=3)
    tokens = lay(torch.randn(2, 36, WIDTH, dtype=torch.float64), first([36, 2], 36), "packed")
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


@pytest.mark.parametrize("field", ["value_dropout", "attention_dropout"])
def test_dropout_acts_in_training_only_and_changes_nothing_on_average(field: str) -> None:
    dropout: dict[str, Any] = {field: 0.3}
    module = make(window=4, **dropout)
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    exact = along(make(window=4), x)
    assert torch.equal(along(module.eval(), x), exact)
    draws = along(module.train(), x.expand(4000, 9, WIDTH))
    assert (draws.std(0) > 0).any()
    assert ((draws.mean(0) - exact[0]).abs() <= 5 * draws.std(0) / 4000**0.5).all()


def test_initial_weights_are_those_of_the_authors() -> None:
    torch.manual_seed(0)
    module = GAUSpec(query_size=400, hidden_size=300, position=RelativeBiasSpec(max_positions=2000)).build(200)
    for name in ("in_proj.weight", "out_proj.weight", "gain", "bias_table"):
        assert_truncated_normal(dict(module.named_parameters())[name], 0.02)
    for name in ("in_proj.bias", "out_proj.bias", "offset"):
        assert not dict(module.named_parameters())[name].any(), name


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param(
            {"window": 0},
            "GAUSpec: window=0 must be at least 1; window: .*use window=null to attend to all",
            id="window",
        ),
        pytest.param(
            {"attention": "sofmax"}, r"GAUSpec: attention='sofmax' must be .*; did you mean 'softmax'\?", id="attention"
        ),
        pytest.param(
            {"position": POSITIONS["slot_distance"]},
            "distance='slot_distance' needs a window, which sizes its table",
            id="slots",
        ),
        pytest.param(
            {"position": RotarySpec(), "query_size": 3},
            "query_size=3: rotary positions turn pairs of channels, so their number must be even",
            id="odd-rotary",
        ),
        pytest.param({"attention_dropout": 1.0}, "GAUSpec: attention_dropout=1.0 must be less than 1", id="dropout"),
    ],
)
def test_impossible_specs_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        GAUSpec(**{"query_size": 4, "hidden_size": 3, **fields})


class CoarseSpec(PositionSpec):
    """Third-party positions: a table of biases, and queries and keys negated at odd positions."""

    kind: Literal["coarse"] = "coarse"
    has_table: ClassVar[bool] = True
    turns: ClassVar[bool] = True

    def table_size(self, window: int | None) -> int:
        return 17

    def table_center(self, window: int | None) -> int:
        return 8

    def check_attention(self, window: int | None, channels: int, what: str) -> None:
        if channels % 4:
            raise ValueError(f"{what}: give coarse positions a multiple of 4 channels")

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        return x * (1 - 2 * (positions % 2)).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def test_third_party_positions_add_biases_and_rotate() -> None:
    """A table of the same size gives the same biases. At even positions no sign changes, so the results are equal."""
    torch.manual_seed(0)
    coarse, own = (
        GAUSpec(query_size=4, hidden_size=6, window=3, position=position).build(5).double()
        for position in (CoarseSpec(), RelativeBiasSpec(max_positions=9))
    )
    own.load_state_dict(draw(coarse).state_dict())
    x = torch.randn(1, 12, 5, dtype=torch.float64)
    even = rectangular(x, None, 2 * torch.arange(12)[None])
    assert torch.equal(coarse(even)[0], own(even)[0])
    mixed = rectangular(x)
    assert not torch.allclose(coarse(mixed)[0], own(mixed)[0])
    with pytest.raises(SpecError, match="query_size=6: give coarse positions a multiple of 4 channels"):
        GAUSpec(query_size=6, hidden_size=6, position=CoarseSpec())
    with pytest.raises(SpecError, match="position kind 'coarse' adds a table, which needs the gau sub-module"):
        AttentionSpec(position=CoarseSpec())
