"""Routers without parameters."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.routers import AlwaysRouterSpec, NeverRouterSpec, RandomRouterSpec
from tests.cases import generator, masks, normal
from tests.test_sma.test_routers.each import NAMES


class TestFixed:
    @given(valid=masks())
    def test_always_activates_every_valid_token_with_confidence_exactly_1(self, valid):
        decision = AlwaysRouterSpec().build(5, NAMES)(normal(*valid.shape, 5), valid)[0]
        assert torch.equal(decision.active, valid[..., None].expand(*valid.shape, 3))
        assert (decision.confidence == 1).all()
        assert (decision.p_on == 1).all()

    @given(valid=masks())
    def test_never_activates_nothing(self, valid):
        decision = NeverRouterSpec().build(5, NAMES)(normal(*valid.shape, 5), valid)[0]
        assert not decision.active.any()
        assert (decision.p_on == 0).all()

    @pytest.mark.parametrize("spec", [AlwaysRouterSpec(), NeverRouterSpec(), RandomRouterSpec(rate=0.3)])
    def test_the_softmax_of_the_logits_is_the_probability(self, spec):
        decision = spec.build(5, NAMES)(normal(2, 3, 5))[0]
        torch.testing.assert_close(decision.logits.softmax(-1)[..., 1], decision.p_on)


class TestRandom:
    def _active(self, positions, *, rows=1, rate=0.5, seed=0, names=NAMES):
        router = RandomRouterSpec(rate=rate, seed=seed).build(2, names)
        return router(torch.zeros(rows, positions.shape[-1], 2), None, positions.expand(rows, -1))[0].active

    @given(cut=st.integers(0, 40), seed=st.integers(0, 2**31 - 1))
    def test_chunks_are_decided_as_the_whole(self, cut, seed):
        whole = self._active(torch.arange(40), rows=2, seed=seed)
        parts = [self._active(part, rows=2, seed=seed) for part in (torch.arange(cut), torch.arange(cut, 40))]
        assert torch.equal(torch.cat(parts, dim=1), whole)

    def test_order_of_the_positions_does_not_matter(self):
        order = torch.randperm(40, generator=generator(0))
        assert torch.equal(self._active(order, rows=2), self._active(torch.arange(40), rows=2)[:, order])

    def test_default_positions_count_from_zero(self):
        router = RandomRouterSpec(rate=0.5).build(2, NAMES)
        assert torch.equal(router(torch.zeros(3, 40, 2))[0].active, self._active(torch.arange(40), rows=3))

    def test_control_state_does_not_matter(self):
        router = RandomRouterSpec(rate=0.5).build(2, NAMES)
        assert torch.equal(router(normal(3, 40, 2))[0].active, router(normal(3, 40, 2, seed=1))[0].active)

    def test_more_rows_or_sub_modules_never_change_the_others(self):
        few, many = self._active(torch.arange(40), rows=2, names=NAMES[:2]), self._active(torch.arange(40), rows=5)
        assert torch.equal(many[:2, :, :2], few)

    @pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
    @pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
    def test_rate_is_near_the_requested_rate(self, rate, seed):
        count = 20000
        active = self._active(torch.arange(count // 2) + 10**6, rows=2, rate=rate, seed=seed)
        bound = 4.5 * math.sqrt(rate * (1 - rate) / count)
        assert active.double().mean((0, 1)).tolist() == pytest.approx([rate] * 3, abs=bound)

    def test_rates_0_and_1_are_exact(self):
        assert not self._active(torch.arange(1000), rate=0.0).any()
        assert self._active(torch.arange(1000), rate=1.0).all()

    def test_draws_of_rows_sub_modules_seeds_and_neighbours_are_independent(self):
        count = 20000
        here = self._active(torch.arange(count), rows=2)[..., 0].double() - 0.5
        others = {
            "row": here[1],
            "sub-module": self._active(torch.arange(count))[0, :, 1].double() - 0.5,
            "seed": self._active(torch.arange(count), seed=1)[0, :, 0].double() - 0.5,
            "next position": self._active(torch.arange(1, count + 1))[0, :, 0].double() - 0.5,
        }
        for name, other in others.items():
            assert 4 * float((here[0] * other).mean()) == pytest.approx(0, abs=4.5 / math.sqrt(count)), name
