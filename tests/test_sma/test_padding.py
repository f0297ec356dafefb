"""Padding moved to the right of a batch and back; holes dropped from ragged tokens and restored."""

from itertools import chain

import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.padding import move, pack, right_padding, unpack
from sma.ragged import compress
from tests import oracles
from tests.cases import generator, masks, normal


@given(active=masks(), capacity=st.none() | st.integers(1, 12))
def test_pack_drops_the_holes_and_nothing_else(active, capacity):
    tokens = compress(normal(*active.shape, 3, seed=active.numel()), active, capacity=capacity)
    packed, real = pack(tokens)
    assert not packed.holes
    if not tokens.holes:
        assert packed is tokens
        assert real is None
        return
    assert packed.stride is None
    assert packed.mask.all()
    found, expected = oracles.tokens_of(packed), oracles.tokens_of(tokens)
    assert [len(row) for row in found] == [len(row) for row in expected] == packed.lengths.tolist()
    for got, want in zip(chain(*found), chain(*expected), strict=True):
        assert (got.place, got.position) == (want.place, want.position)
        assert torch.equal(got.value, want.value)
    assert torch.equal(tokens.values[real], packed.values)


@given(active=masks(), capacity=st.none() | st.integers(1, 12))
def test_unpack_undoes_pack_and_gives_zeros_at_the_holes(active, capacity):
    tokens = compress(normal(*active.shape, 3, seed=active.numel()), active, capacity=capacity)
    packed, real = pack(tokens)
    assert torch.equal(unpack(packed.values, real, tokens), tokens.values.where(tokens.mask[:, None], 0))
    others = normal(packed.values.shape[0], 2, 4, seed=3).requires_grad_()
    unpacked = unpack(others, real, tokens)
    assert torch.equal(unpacked[tokens.mask], others)
    assert not unpacked[~tokens.mask].any()
    (gradient,) = torch.autograd.grad((unpacked * normal(*unpacked.shape, seed=4)).sum(), [others])
    assert torch.equal(gradient, normal(*unpacked.shape, seed=4)[tokens.mask])


@given(valid=masks())
def test_right_padding_moves_valid_tokens_left_in_their_order(valid):
    lengths, order = right_padding(valid)
    assert lengths.tolist() == [sum(row) for row in valid.tolist()]
    x = normal(*valid.shape, 3, seed=valid.numel())
    if order is None:
        assert all(row == sorted(row, reverse=True) for row in valid.tolist())
        return
    moved = move(x, order)
    for b in range(valid.shape[0]):
        assert torch.equal(moved[b, : lengths[b]], x[b][valid[b]])
        assert sorted(order[b].tolist()) == list(range(valid.shape[1]))
    assert torch.equal(move(moved, order.argsort(1)), x)


@given(valid=masks())
def test_move_is_a_gather_along_the_positions(valid):
    order = torch.rand(valid.shape, generator=generator(3)).argsort(1)
    for x in (normal(*valid.shape, 3, seed=valid.numel()), normal(*valid.shape, 2, 2, seed=valid.numel()), valid):
        moved = move(x, order)
        for b in range(valid.shape[0]):
            for t in range(valid.shape[1]):
                assert torch.equal(moved[b, t], x[b, order[b, t]])
