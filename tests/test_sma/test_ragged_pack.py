"""Ragged tokens without their holes, and back."""

from itertools import chain

import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.ragged import compress, pack, unpack
from tests import oracles
from tests.cases import masks, normal


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
