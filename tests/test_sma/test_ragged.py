"""Compress, extract and segment_reduce against loops, and the two layouts of ragged tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.errors import InputError
from sma.ragged import (
    Ragged,
    compress,
    extract,
    extract_add,
    locate,
    locate_packed,
    locate_static,
    rectangular,
    segment_reduce,
)
from tests import oracles
from tests.cases import generator, gradients, masks, normal, strided

CAPACITIES = pytest.mark.parametrize(
    "capacity", [pytest.param(size, id=f"capacity={size}") for size in (None, 1, 3, 20)]
)


def _batch(active: Tensor, *channels: int) -> Tensor:
    return normal(*active.shape, *(channels or (3,)), seed=active.numel())


def _flat(rows: list[list[oracles.Token]]) -> list[oracles.Token]:
    return [token for row in rows for token in row]


def _real(tokens: Ragged) -> Tensor:
    """The values of the real tokens, without holes."""
    return tokens.values[tokens.mask]


@CAPACITIES
@given(active=masks())
def test_compress_keeps_the_active_tokens_of_every_row_in_order(capacity, active):
    x = _batch(active)
    positions = torch.randint(0, 100, active.shape, generator=generator(1))
    tokens = compress(x, active, positions_BL=positions, capacity=capacity)
    expected, found = oracles.compress(x, active, positions, capacity), oracles.tokens_of(tokens)
    assert tokens.num_rows == active.shape[0]
    assert [len(row) for row in found] == [len(row) for row in expected] == tokens.lengths.tolist()
    for got, want in zip(_flat(found), _flat(expected), strict=True):
        assert (got.place, got.position) == (want.place, want.position)
        assert torch.equal(got.value, want.value)


@given(active=masks())
def test_compress_counts_positions_from_zero_by_default(active):
    for capacity in (None, 2):
        tokens = compress(_batch(active), active, capacity=capacity)
        want = [token.position for token in _flat(oracles.compress(_batch(active), active, capacity=capacity))]
        assert tokens.positions[tokens.mask].tolist() == want


@given(active=masks())
def test_slots_and_longest_follow_from_the_offsets(active):
    tokens = compress(_batch(active), active)
    rows = oracles.tokens_of(tokens)
    assert tokens.slots.tolist() == [slot for row in rows for slot in range(len(row))]
    assert tokens.longest == max([active.shape[1] if tokens.stride is not None else 0, *(len(row) for row in rows)])
    assert tokens.mask.all()


@CAPACITIES
@given(active=masks())
def test_extract_undoes_compress_at_active_positions_and_gives_zeros_elsewhere(capacity, active):
    x = _batch(active)
    tokens = compress(x, active, capacity=capacity)
    kept = active & (active.cumsum(1) <= (capacity or 99))
    assert torch.equal(extract(tokens.values, tokens, x), x.where(kept[..., None], 0))


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_extract_returns_the_dtype_of_the_batch(rate):
    active = torch.rand(2, 5, generator=generator(0)) < rate
    x = normal(2, 5, 3, dtype=torch.float32)
    tokens = compress(x, active)
    narrow = tokens.values.bfloat16()
    for out in (extract(narrow, tokens, x), extract_add(narrow, tokens, torch.zeros_like(x))):
        assert out.dtype == torch.float32
        assert torch.equal(out, x.bfloat16().float().where(active[..., None], 0))


@given(active=masks())
def test_compress_undoes_extract(active):
    tokens = compress(_batch(active), active)
    values = normal(tokens.values.shape[0], 2, seed=5)
    assert torch.equal(compress(extract(values, tokens, _batch(active)), active).values, values)


@given(active=masks())
def test_compress_and_extract_accept_values_of_any_rank(active):
    for channels in ((2, 4), (1,)):
        x = _batch(active, *channels)
        tokens = compress(x, active)
        assert torch.equal(
            extract(tokens.values, tokens, x), x.where(active.reshape(*active.shape, *[1] * len(channels)), 0)
        )
    numbers = normal(*active.shape)
    tokens = compress(numbers, active)
    assert torch.equal(extract(tokens.values, tokens, numbers), numbers.where(active, 0))


@CAPACITIES
@given(active=masks())
def test_compress_and_extract_are_adjoint(capacity, active):
    """<extract(v), x> = <v, compress(x)>, so the gradient of each is the other."""
    x = _batch(active).requires_grad_()
    tokens = compress(x, active, capacity=capacity)
    real = tokens.mask[:, None]
    values = normal(*tokens.values.shape, seed=6).requires_grad_()
    into_batch = (extract(values, tokens, x) * x.detach()).sum()
    into_tokens = (values.detach().where(real, 0) * tokens.values).sum()
    torch.testing.assert_close(into_batch.detach(), into_tokens.detach())
    (by_values,), (by_x,) = torch.autograd.grad(into_batch, [values]), torch.autograd.grad(into_tokens, [x])
    assert torch.equal(by_values, tokens.values.detach().where(real, 0))
    assert torch.equal(by_x, extract(values.detach(), tokens, x.detach()))


@CAPACITIES
@given(active=masks())
def test_extract_add_changes_active_positions_only_and_never_its_input(capacity, active):
    base = _batch(active).requires_grad_()
    kept = base.detach().clone()
    tokens = compress(torch.zeros_like(kept), active, capacity=capacity)
    values = normal(*tokens.values.shape, seed=8).requires_grad_()
    out = extract_add(values, tokens, base)
    assert torch.equal(base, kept)
    assert torch.equal(out, base + extract(values, tokens, base))
    weight = normal(*out.shape, seed=9)
    by_base, by_values = torch.autograd.grad((out * weight).sum(), [base, values])
    assert torch.equal(by_base, weight)
    assert torch.equal(by_values, compress(weight, active, capacity=capacity).values.where(tokens.mask[:, None], 0))


@given(active=masks(), capacity=st.integers(1, 12))
def test_holes_are_never_written_even_if_they_hold_nan(active, capacity):
    x = _batch(active)
    tokens = compress(x, active, capacity=capacity)
    values = tokens.values.where(tokens.mask[:, None], torch.nan)
    kept = active & (active.cumsum(1) <= capacity)
    assert torch.equal(extract(values, tokens, x), x.where(kept[..., None], 0))
    assert torch.equal(extract_add(values, tokens, x), x.where(~kept[..., None], 2 * x))
    padded, mask = tokens.with_values(values).to_padded()
    assert padded.isfinite().all()
    assert not padded[~mask].any()


@given(active=masks(), capacity=st.integers(1, 12))
def test_holes_are_finite_even_where_the_batch_is_not(active, capacity):
    """Sub-modules multiply the values in holes by gradients of 0, and 0 x NaN is NaN."""
    x = _batch(active).where(active[..., None], torch.nan)
    assert compress(x, active, capacity=capacity).values.isfinite().all()


@given(active=masks(), spare=st.integers(0, 3))
def test_static_capacity_equals_packed_when_nothing_overflows(active, spare):
    x = _batch(active)
    most = int(active.sum(1).max()) if active.shape[0] else 0
    packed, static = compress(x, active), compress(x, active, capacity=max(most + spare, 1))
    assert static.values.shape[0] == (active.shape[0] * max(most + spare, 1) if active.shape[1] else 0)
    assert torch.equal(_real(static), packed.values)
    for name in ("index", "positions", "rows"):
        assert torch.equal(getattr(static, name)[static.mask], getattr(packed, name))
    assert torch.equal(static.lengths, packed.lengths)


def test_static_capacity_has_the_same_shapes_for_every_mask():
    shapes = {
        tuple(tuple(part.shape) for part in (tokens.values, tokens.index, tokens.rows, tokens.offsets, tokens.lengths))
        for rate in (0.0, 0.5, 1.0)
        for tokens in [compress(normal(2, 5, 3), torch.rand(2, 5, generator=generator(2)) < rate, capacity=3)]
    }
    assert shapes == {((6, 3), (6,), (6,), (3,), (2,))}


@given(active=masks())
def test_one_search_for_several_masks_equals_compress_for_each(active):
    several = torch.stack([active, ~active, torch.zeros_like(active), torch.ones_like(active)], dim=-1)
    x = _batch(active)
    positions = torch.randint(0, 100, active.shape, generator=generator(1))
    for where in (positions, None):
        for place, tokens in enumerate(locate(several, where)):
            alone = compress(x, several[..., place], positions_BL=where)
            assert tokens.values.shape == (alone.index.shape[0], 0)
            assert (tokens.stride, tokens.holes) == (alone.stride, alone.holes)
            for name in ("index", "positions", "rows", "offsets", "lengths"):
                assert torch.equal(getattr(tokens, name), getattr(alone, name)), name
            values = x.flatten(0, 1) if tokens.stride is not None else x.flatten(0, 1)[tokens.index]
            assert torch.equal(values, alone.values)


@given(active=masks(), spare=st.integers(0, 3))
def test_the_inverse_maps_positions_to_their_slots(active, spare):
    count, most = int(active.sum()), int(active.sum(1).max()) if len(active) else 0
    frames = [
        locate(active[..., None], sizes=[count])[0],
        locate_static(active, max(1, most - 1 + spare)),
        locate_packed(active, max(1, count + spare)),
    ]
    for frame in frames:
        real = [int(place) for place, true in zip(frame.index, frame.mask, strict=True) if true]
        if frame.inverse is None:
            assert count == active.numel()
            assert frame.stride is not None
            continue
        slots = frame.mask.nonzero().squeeze(1).tolist()
        wanted = dict(zip(real, slots, strict=True))
        for place, slot in enumerate(frame.inverse.tolist()):
            assert slot == wanted[place] if place in wanted else slot >= len(frame.index)


def test_all_active_tokens_are_not_copied():
    x = normal(2, 5, 3)
    assert compress(x, torch.ones(2, 5, dtype=torch.bool)).values.data_ptr() == x.data_ptr()


@given(active=masks(), full=st.booleans())
def test_input_that_is_not_contiguous_gives_the_same_tokens(active, full):
    active = torch.ones_like(active) if full else active
    x = _batch(active)
    for capacity, other, mask in (
        (c, *pair) for c in (None, 2) for pair in zip(strided(x), strided(active), strict=True)
    ):
        tokens, plain = compress(other, mask, capacity=capacity), compress(x, active, capacity=capacity)
        assert torch.equal(tokens.values, plain.values)
        for values in strided(tokens.values):
            assert torch.equal(extract(values, tokens, other), extract(plain.values, plain, x))
            assert torch.equal(extract_add(values, tokens, other), extract_add(plain.values, plain, x))


def _layouts(active: Tensor) -> list[tuple[str, Ragged]]:
    """One batch in every layout; `rectangular with holes` has as many tokens per row as the mask."""
    x = _batch(active)
    return [
        ("packed", compress(x, active)),
        ("rectangular", rectangular(x)),
        ("rectangular with holes", rectangular(x, active.sum(1))),
        ("static", compress(x, active, capacity=3)),
    ]


@given(active=masks())
def test_padded_rows_are_left_aligned_and_end_with_zeros(active):
    for name, tokens in _layouts(active):
        padded, mask = tokens.to_padded()
        rows = oracles.tokens_of(tokens)
        assert padded.shape[:2] == mask.shape == (active.shape[0], tokens.longest), name
        for b, row in enumerate(rows):
            assert mask[b].tolist() == [slot < len(row) for slot in range(tokens.longest)]
            assert torch.equal(
                padded[b, : len(row)], torch.stack([token.value for token in row]) if row else padded[b, :0]
            )
            assert not padded[b, len(row) :].any()


@given(active=masks())
def test_from_padded_undoes_to_padded(active):
    for _, tokens in _layouts(active):
        for values in (
            tokens.values,
            normal(tokens.values.shape[0], 2, 2, seed=4),
            normal(tokens.values.shape[0], seed=4),
        ):
            back = tokens.from_padded(tokens.with_values(values).to_padded()[0])
            assert back.shape == values.shape
            assert torch.equal(back[tokens.mask], values[tokens.mask])


@given(active=masks())
def test_gradient_passes_through_padded_rows_to_real_tokens_only(active):
    for _, tokens in _layouts(active):
        values = normal(tokens.values.shape[0], 2, seed=4).requires_grad_()
        padded, mask = tokens.with_values(values).to_padded()
        weight = normal(*padded.shape, seed=5)
        (gradient,) = torch.autograd.grad((padded * weight).sum(), [values])
        assert torch.equal(gradient, tokens.from_padded(weight.where(mask[..., None], 0)))


@given(active=masks())
def test_with_values_changes_nothing_else(active):
    for _, tokens in _layouts(active):
        other = tokens.with_values(normal(tokens.values.shape[0], 7))
        assert other.values.shape[1:] == (7,)
        for name in ("index", "positions", "rows", "offsets", "lengths", "stride", "holes"):
            assert getattr(other, name) is getattr(tokens, name)


@given(active=masks())
def test_rectangular_is_a_view_whose_tokens_are_the_prefixes(active):
    x, lengths = _batch(active), active.sum(1)
    tokens = rectangular(x, lengths)
    prefix = torch.arange(active.shape[1]) < lengths[:, None]
    rows = oracles.tokens_of(tokens)
    assert tokens.values.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert [[token.place for token in row] for row in rows] == [
        [t.place for t in row] for row in oracles.compress(x, prefix)
    ]
    assert torch.equal(extract(tokens.values, tokens, x), x.where(prefix[..., None], 0))


REDUCES = pytest.mark.parametrize("reduce", [pytest.param(name, id=name) for name in ("sum", "mean", "max", "min")])


@st.composite
def row_sizes(draw):
    return draw(st.lists(st.integers(0, 4), max_size=5))


def _offsets(sizes: list[int]) -> list[int]:
    return [sum(sizes[:b]) for b in range(len(sizes) + 1)]


@REDUCES
@pytest.mark.parametrize("backend", ["torch", "auto", pytest.param("scatter", marks=pytest.mark.slow)])
@given(sizes=row_sizes())
def test_segment_reduce_equals_the_loop(reduce, backend, sizes):
    if backend == "scatter":
        pytest.importorskip("torch_scatter", reason="torch-scatter is not installed: make test-all builds it")
    offsets = _offsets(sizes)
    for channels in ((), (3,), (2, 2)):
        values = normal(offsets[-1], *channels, seed=len(sizes)).requires_grad_()
        found = segment_reduce(values, torch.tensor(offsets), reduce, backend=backend)
        expected = oracles.segment_reduce(values, offsets, reduce)
        assert found.dtype == values.dtype
        torch.testing.assert_close(found, expected)
        if offsets[-1]:
            torch.testing.assert_close(gradients(found, [values]), gradients(expected, [values]))


@REDUCES
def test_segment_reduce_of_no_row_is_empty(reduce):
    assert segment_reduce(torch.zeros(0, 3), torch.zeros(1, dtype=torch.long), reduce).shape == (0, 3)


def test_negative_values_and_empty_rows_are_distinguished():
    values, offsets = torch.tensor([-3.0, -1.0, 2.0]), torch.tensor([0, 2, 2, 3])
    assert segment_reduce(values, offsets, "max").tolist() == [-1.0, 0.0, 2.0]
    assert segment_reduce(values, offsets, "min").tolist() == [-3.0, 0.0, 2.0]


@pytest.mark.usefixtures("as_users_run")
class TestWrongInput:
    def test_mask_of_numbers(self):
        with pytest.raises(
            InputError,
            match=r"the mask is of shape \(2, 3\) and dtype torch\.int64; expected a boolean tensor of "
            r"shape \(B = 2, L = 3\): convert with \.bool\(\)$",
        ):
            compress(normal(2, 3, 4), torch.ones(2, 3, dtype=torch.long))

    @pytest.mark.parametrize("shape", [(2, 4), (3, 3), (2,), (2, 3, 1)])
    def test_mask_of_another_shape(self, shape):
        with pytest.raises(InputError, match=r"the mask is .*shape \(.*\) .*; expected .* of shape \(B = 2, L = 3\)$"):
            compress(normal(2, 3, 4), torch.ones(shape, dtype=torch.bool))

    @pytest.mark.parametrize("capacity", [0, -1])
    def test_impossible_capacity(self, capacity):
        with pytest.raises(InputError, match=f"capacity={capacity} must be at least 1 token per row"):
            compress(normal(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), capacity=capacity)

    def test_unknown_reduction(self):
        with pytest.raises(InputError, match="reduce='median' must be 'sum', 'mean', 'max' or 'min'"):
            segment_reduce(normal(2, 3), torch.tensor([0, 2]), "median")

    def test_unknown_backend(self):
        with pytest.raises(InputError, match="backend='numpy' must be 'auto', 'torch' or 'scatter'"):
            segment_reduce(normal(2, 3), torch.tensor([0, 2]), "sum", backend="numpy")

    def test_missing_backend(self, monkeypatch):
        monkeypatch.setattr("sma.segments._torch_scatter", lambda: None)
        with pytest.raises(
            InputError,
            match="backend='scatter' needs torch-scatter: python -m pip install --no-build-isolation torch-scat",
        ):
            segment_reduce(normal(2, 3), torch.tensor([0, 2]), "sum", backend="scatter")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_a_long_row_is_finite_in_half_precision(dtype):
    values, offsets = torch.full((70_000, 2), 30.0, dtype=dtype), torch.tensor([0, 70_000, 70_000])
    mean = segment_reduce(values, offsets, "mean", backend="torch")
    assert mean.dtype is dtype
    assert mean.tolist() == [[30.0, 30.0], [0.0, 0.0]]
