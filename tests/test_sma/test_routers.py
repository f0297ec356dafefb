"""Every router keeps the contract; the SMA router against a loop over tokens; draws that depend on their keys alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import InputError, SpecError, StateError
from sma.routers import AlwaysRouterSpec, NeverRouterSpec, RandomRouterSpec, Router, RouterSpec, SMARouter, SMARouterSpec, keyed_uniform
from sma.spec import kinds
from sma.submodule import State
from tests import oracles
from tests.cases import generator, gradients, masks, normal, spread, strided
from tests.streams import copied, cuts, exactly, near, same_bits

NAMES = ["attention", "mlp", "conv"]
ROUTERS = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=spec.kind)
        for spec in (SMARouterSpec(temperature_scale=0.3), AlwaysRouterSpec(), NeverRouterSpec(), RandomRouterSpec(rate=0.6))
    ],
)


def _router(spec: RouterSpec, width: int = 5, names: list[str] | None = None) -> Router:
    router = spec.build(width, NAMES if names is None else names).double()
    spread(router)
    return router


def test_these_tests_know_every_router():
    assert set(kinds("router")) == {spec.values[0].kind for spec in ROUTERS.args[1]}


@ROUTERS
@given(valid=masks())
def test_padding_is_never_active(spec, valid):
    router, control = _router(spec), normal(*valid.shape, 5)
    decision, everywhere = router(control, valid)[0], router(control)[0]
    assert not decision.active[~valid].any()
    assert torch.equal(decision.active, everywhere.active & valid[..., None])


@ROUTERS
@given(valid=masks())
def test_decision_has_the_shapes_and_ranges_of_the_contract(spec, valid):
    decision, state = _router(spec)(normal(*valid.shape, 5), valid)
    assert state is None
    assert decision.names == tuple(NAMES)
    assert decision.active.shape == decision.confidence.shape == decision.p_on.shape == (*valid.shape, 3)
    assert decision.logits.shape == (*valid.shape, 3, 2)
    assert decision.active.dtype == torch.bool
    assert ((decision.confidence > 0) & (decision.confidence <= 1)).all()
    assert ((decision.p_on >= 0) & (decision.p_on <= 1)).all()
    assert decision.logits.isfinite().all()


@ROUTERS
def test_decision_is_the_same_in_training_and_in_evaluation(spec):
    router, control = _router(spec), normal(2, 7, 5)
    training, evaluation = router.train()(control)[0], router.eval()(control)[0]
    for name in ("active", "confidence", "logits", "p_on"):
        assert torch.equal(getattr(training, name), getattr(evaluation, name))


@ROUTERS
def test_decision_never_looks_ahead(spec):
    router, control = _router(spec), normal(2, 7, 5)
    changed = torch.cat([control[:, :4], 100 * normal(2, 3, 5, seed=1)], dim=1)
    before, after = router(control)[0], router(changed)[0]
    assert router.causal
    for name in ("active", "confidence", "logits", "p_on"):
        assert torch.equal(getattr(before, name)[:, :4], getattr(after, name)[:, :4])


@ROUTERS
def test_decision_ignores_what_stands_at_padding(spec):
    router, control, valid = _router(spec), normal(2, 7, 5), torch.rand(2, 7, generator=generator(0)) < 0.6
    for junk in (1e4, math.nan, math.inf):
        decision = router(control.where(valid[..., None], junk), valid)[0]
        clean = router(control, valid)[0]
        assert torch.equal(decision.active, clean.active)
        assert torch.equal(decision.confidence[valid], clean.confidence[valid])


@ROUTERS
def test_control_state_that_is_not_contiguous_gives_the_same_decision(spec):
    router, control = _router(spec), normal(2, 7, 5)
    for other in strided(control):
        torch.testing.assert_close(router(other)[0].confidence, router(control)[0].confidence)


@ROUTERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scores_and_confidences_are_never_below_float32(spec, dtype):
    router = spec.build(5, NAMES).to(dtype)
    decision = router(normal(1, 4, 5, dtype=dtype))[0]
    for name in ("confidence", "logits", "p_on"):
        assert getattr(decision, name).dtype == torch.promote_types(dtype, torch.float32)


@ROUTERS
@given(valid=masks(rows=3, length=8), chunks=cuts(8))
def test_decisions_of_chunks_are_those_of_the_whole(spec, valid, chunks):
    router, control = _router(spec), normal(*valid.shape, 5)
    positions = valid.cumsum(1) - 1
    whole, none = router(control, valid, positions)
    assert none is None
    state, parts = router.init_state(valid.shape[0]), []
    kept = copied(state)
    for part in chunks:
        decision, after = router(control[:, part], valid[:, part], positions[:, part], state)
        parts.append(decision)
        assert type(after) is type(state)
        assert same_bits(state, kept)
        state = after
    for name in ("active", "confidence", "logits", "p_on"):
        near(torch.cat([getattr(decision, name) for decision in parts], 1), getattr(whole, name))


@ROUTERS
def test_rows_keep_their_decisions_wherever_their_states_are_moved(spec):
    router, control, positions = _router(spec), normal(4, 6, 5), torch.arange(6).expand(4, 6)
    whole = router(control, None, positions)[0].active
    rows = torch.tensor([3, 1, 1])
    state = router.init_state(4).select(rows).reset(torch.tensor([True, False, False]))
    assert torch.equal(router(control[rows], None, positions[rows], state)[0].active, whole[rows])


@ROUTERS
def test_router_refuses_a_state_that_is_not_its_own(spec):
    router, wanted = _router(spec), "RandomState" if spec.kind == "random" else "NoState"
    name = type(router).__name__
    with pytest.raises(StateError, match=exactly(f"{name} got a state of class State; it needs {wanted}: see init_state")):
        router(normal(1, 2, 5), state=State())
    sentence = f"{name} got a state of 3 streams for a batch of 2 rows; make one with init_state(2), or take rows with state.select"
    with pytest.raises(StateError, match=exactly(sentence)):
        router(normal(2, 2, 5), state=router.init_state(3))


class LookingAhead(Router):
    """A router that decides by the whole row."""

    causal = False

    def forward(self, control_BLD, valid=None, positions=None, state=None):
        self._continue(state, State, control_BLD)


def test_router_that_looks_ahead_refuses_every_state():
    router = LookingAhead(NAMES)
    for call in (lambda: router.init_state(1), lambda: router(normal(1, 2, 5), state=State())):
        with pytest.raises(
            StateError, match=exactly("LookingAhead (causal=False) decides by the whole row and cannot continue from a state")
        ):
            call()


@ROUTERS
def test_sub_modules_of_one_router_have_different_names(spec):
    with pytest.raises(InputError, match=r"the sub-modules of one router need different names, not \['a', 'b', 'a'\]"):
        spec.build(5, ["a", "b", "a"])


@ROUTERS
@pytest.mark.parametrize("modules", [0, 1, 3])
def test_router_has_as_many_parameters_as_its_spec_predicts(spec, modules):
    router = spec.build(5, NAMES[:modules])
    assert sum(parameter.numel() for parameter in router.parameters()) == spec.num_parameters(5, modules)


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
    def test_scores_say_the_probability(self, spec):
        decision = spec.build(5, NAMES)(normal(2, 3, 5))[0]
        torch.testing.assert_close(decision.logits.softmax(-1)[..., 1], decision.p_on)


class TestSMA:
    @given(rows=st.integers(0, 3), length=st.integers(0, 5), width=st.integers(1, 6), modules=st.integers(1, 3), scale=st.floats(0.01, 100))
    def test_every_token_is_decided_by_the_formula(self, rows, length, width, modules, scale):
        router = _router(SMARouterSpec(temperature_scale=scale), width, NAMES[:modules])
        assert isinstance(router, SMARouter)
        control = normal(rows, length, width, seed=width).requires_grad_()
        decision = router(control)[0]
        for b in range(rows):
            for t in range(length):
                for m, (on, confidence) in enumerate(oracles.decide(router, control[b, t])):
                    assert bool(decision.active[b, t, m]) == on
                    torch.testing.assert_close(decision.confidence[b, t, m], confidence)
                    torch.testing.assert_close(decision.p_on[b, t, m], confidence if on else 1 - confidence)
                    temperature = router.log_temperature.exp()
                    score = decision.logits[b, t, m] / temperature
                    torch.testing.assert_close(score.softmax(-1)[1], decision.p_on[b, t, m])

    def test_gradient_is_that_of_the_formula(self):
        router, control = _router(SMARouterSpec()), normal(2, 3, 5).requires_grad_()
        inputs = [control, *router.parameters()]
        expected = [[torch.stack([c for _, c in oracles.decide(router, control[b, t])]) for t in range(3)] for b in range(2)]
        by_hand = torch.stack([torch.stack(row) for row in expected])
        torch.testing.assert_close(gradients(router(control)[0].confidence, inputs), gradients(by_hand, inputs))

    def test_gradient_check_in_float64(self):
        router, control = _router(SMARouterSpec()), normal(2, 3, 5).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: router(x)[0].confidence, [control])

    def test_ties_are_inactive(self):
        router = SMARouterSpec().build(5, NAMES)
        with torch.no_grad():
            router.weight.zero_()
        decision = router(normal(2, 3, 5, dtype=torch.float32))[0]
        assert not decision.active.any()
        assert (decision.confidence == 0.5).all()

    @pytest.mark.parametrize("scale", [1.0, 0.3])
    @pytest.mark.parametrize("width", [1, 80])
    def test_temperature_starts_at_its_scale_times_the_root_of_the_width(self, scale, width):
        router = SMARouterSpec(temperature_scale=scale).build(width, NAMES)
        assert router.log_temperature.shape == (1,)
        torch.testing.assert_close(router.log_temperature.exp().item(), scale * math.sqrt(width))

    def test_temperature_that_would_make_infinite_scores_is_refused(self):
        with pytest.raises(
            SpecError, match=r"SMARouterSpec: temperature_scale=1e-05 must be at least 0\.0001; temperature_scale: initial temp"
        ):
            SMARouterSpec(temperature_scale=1e-5)

    def test_weights_start_from_a_cut_normal_distribution_and_biases_at_zero(self):
        router = SMARouterSpec().build(2000, NAMES)
        assert router.weight.shape == (6, 2000)
        assert router.weight.abs().max() <= 0.04
        assert router.weight.std().item() == pytest.approx(0.0176, abs=0.0005)  # 0.02 cut at 2 standard deviations
        assert not router.bias.any()

    def test_rows_of_the_weights_are_off_and_on_of_each_sub_module(self):
        router = SMARouterSpec().build(5, NAMES)
        for m in range(3):
            with torch.no_grad():
                router.weight.zero_()
                router.bias.copy_(torch.tensor([1.0, 0.0] * 3))
                router.bias[2 * m : 2 * m + 2] = torch.tensor([0.0, 1.0])
            assert router(normal(1, 1, 5, dtype=torch.float32))[0].active[0, 0].tolist() == [place == m for place in range(3)]

    @pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
    def test_huge_scores_give_no_nan(self, size):
        router, control = SMARouterSpec(temperature_scale=1e-4).build(5, NAMES), normal(2, 3, 5, dtype=torch.float32) * size
        control.requires_grad_()
        decision = router(control)[0]
        assert decision.confidence.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients(decision.confidence, [control, *router.parameters()]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_does_not_reach_the_scores(self, dtype):
        router, control = SMARouterSpec().build(64, NAMES), normal(2, 9, 64, dtype=torch.float32)
        plain = router(control)[0]
        with torch.autocast("cpu", dtype=dtype):
            inside = router(control)[0]
        for name in ("active", "confidence", "logits", "p_on"):
            assert torch.equal(getattr(inside, name), getattr(plain, name))

    def test_the_mask_carries_no_gradient(self):
        decision = _router(SMARouterSpec())(normal(1, 2, 5).requires_grad_())[0]
        assert not decision.active.requires_grad
        assert decision.confidence.requires_grad


class TestRandom:
    def _active(self, positions, *, rows=1, rate=0.5, seed=0, names=NAMES):
        router = RandomRouterSpec(rate=rate, seed=seed).build(2, names)
        return router(torch.zeros(rows, positions.shape[-1], 2), None, positions.expand(rows, -1))[0].active

    @given(cut=st.integers(0, 40), seed=st.integers(0, 2**31 - 1))
    def test_chunks_are_decided_as_the_whole_is(self, cut, seed):
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

    def test_more_rows_or_sub_modules_leave_the_others_alone(self):
        few, many = self._active(torch.arange(40), rows=2, names=NAMES[:2]), self._active(torch.arange(40), rows=5)
        assert torch.equal(many[:2, :, :2], few)

    @pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
    @pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
    def test_rate_is_near_the_asked_rate(self, rate, seed):
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

    def test_draws_are_uniform(self):
        draws = keyed_uniform(3, torch.arange(20000))
        assert draws.dtype == torch.float64
        assert 0 <= draws.min() < draws.max() < 1
        counts = torch.histc(draws, bins=20, min=0, max=1)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 45  # chi-squared with 19 degrees of freedom: 1 in 1000

    @given(seed=st.integers(0, 2**31 - 1), position=st.integers(0, 2**40), row=st.integers(0, 99), place=st.integers(0, 9))
    def test_a_draw_is_splitmix64_of_its_keys(self, seed, position, row, place):
        draw = keyed_uniform(seed, torch.tensor(row), torch.tensor(position), torch.tensor(place))
        assert draw.item() == _splitmix_uniform(seed, row, position, place)


def _splitmix_uniform(seed: int, *keys: int) -> float:
    """The same in whole numbers of any size, so that recorded runs and negative controls can be repeated."""
    whole = 2**64 - 1
    golden = 0x9E3779B97F4A7C15
    mixed = (seed + 1) * golden % 2**62
    for key in keys:
        mixed ^= (key + 1) * golden & whole
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & whole
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & whole
        mixed ^= mixed >> 31
    return (mixed >> 8) % 2**53 / 2**53
