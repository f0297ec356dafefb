"""SMA, threshold and gumbel: independent decisions about every sub-module."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import SpecError
from sma.routers import GumbelRouterSpec, RouterSpec, SMARouterSpec, ThresholdRouterSpec
from sma.routers import sampled as module_of_gumbel
from tests import oracles
from tests.cases import gradients, normal
from tests.streams import near
from tests.test_sma.test_routers.each import (
    NAMES,
    clear_score_bias,
    looks_at_the_score,
    router,
    routers,
    same,
    scored,
    token_with_scores,
)

SUBSETS = [frozenset(m for m, on in enumerate(switches) if on) for switches in product([False, True], repeat=3)]


def _is_independent(spec: RouterSpec) -> bool:
    return spec.kind in ("sma", "threshold", "gumbel", "bernoulli", "explore")


@routers(_is_independent)
@pytest.mark.parametrize(
    "subset", [pytest.param(subset, id="".join(map(str, sorted(subset))) or "none") for subset in SUBSETS]
)
def test_every_subset_is_chosen_by_some_token(spec, subset):
    part = scored(spec, width=7).eval()
    clear_score_bias(part)
    on = [3.0 if m in subset else -3.0 for m in range(3)]
    scores = on if spec.kind == "threshold" else [score for score in on for score in (0.0, score)]
    assert part(token_with_scores(part, scores))[0].active[0, 0].tolist() == [m in subset for m in range(3)]


@routers(looks_at_the_score)
def test_ties_are_inactive(spec):
    part = spec.build(5, NAMES)
    with torch.no_grad():
        part.weight.zero_()
        if spec.kind == "threshold":
            part.bias.fill_(math.log(spec.threshold / (1 - spec.threshold)))
    decision = part(normal(2, 3, 5, dtype=torch.float32))[0]
    assert not decision.active.any()
    assert (decision.p_on == 0.5).all()


class TestSMA:
    def test_confidence_is_the_larger_of_the_two_probabilities(self):
        decision = router(SMARouterSpec())(normal(2, 9, 5))[0]
        near(decision.confidence, torch.maximum(decision.p_on, 1 - decision.p_on))
        assert (decision.confidence >= 0.5).all()

    @pytest.mark.parametrize("scale", [1.0, 0.3])
    @pytest.mark.parametrize("width", [1, 80])
    def test_temperature_starts_at_its_scale_times_the_root_of_the_width(self, scale, width):
        part = SMARouterSpec(temperature_scale=scale).build(width, NAMES)
        assert part.log_temperature.shape == (1,)
        torch.testing.assert_close(part.log_temperature.exp().item(), scale * math.sqrt(width))
        torch.testing.assert_close(part.temperature, part.log_temperature.detach().exp()[0])

    def test_temperature_that_would_make_infinite_scores_is_refused(self):
        with pytest.raises(
            SpecError,
            match=r"SMARouterSpec: temperature_scale=1e-05 must be at least 0\.0001; temperature_scale: initial temp",
        ):
            SMARouterSpec(temperature_scale=1e-5)

    @pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
    def test_huge_scores_over_the_smallest_temperature_give_no_nan(self, size):
        part, control = (
            SMARouterSpec(temperature_scale=1e-4).build(5, NAMES),
            normal(2, 3, 5, dtype=torch.float32) * size,
        )
        control.requires_grad_()
        decision = part(control)[0]
        assert decision.confidence.isfinite().all()
        assert all(
            gradient.isfinite().all() for gradient in gradients(decision.confidence, [control, *part.parameters()])
        )


class TestThreshold:
    @given(threshold=st.floats(1e-3, 1 - 1e-3))
    def test_a_token_is_active_where_its_gate_is_above_the_threshold(self, threshold):
        decision = router(ThresholdRouterSpec(threshold=threshold))(3 * normal(1, 30, 5))[0]
        clear = (decision.confidence - threshold).abs() > 1e-12
        assert torch.equal(decision.active[clear], (decision.confidence > threshold)[clear])

    @pytest.mark.parametrize("threshold", [5e-324, 1e-300, 1e-9, 1 - 1e-12])
    def test_a_threshold_near_its_ends_has_a_finite_score(self, threshold):
        decision = ThresholdRouterSpec(threshold=threshold).build(5, NAMES)(normal(1, 4, 5, dtype=torch.float32))[0]
        assert decision.logits.isfinite().all()
        near(
            decision.logits[..., 0].double(),
            torch.full((1, 4, 3), math.log(threshold) - math.log1p(-threshold)).double(),
            1e-6,
        )

    @pytest.mark.parametrize(("threshold", "rule"), [(0.0, "greater than 0"), (1.0, "less than 1")])
    def test_a_threshold_that_no_gate_can_cross_is_refused(self, threshold, rule):
        with pytest.raises(SpecError, match=rf"ThresholdRouterSpec: threshold={threshold} must be {rule}"):
            ThresholdRouterSpec(threshold=threshold)


class TestGumbel:
    def _rate(self, part, score, count=20000):
        with torch.no_grad():
            part.weight.zero_()
            part.bias.copy_(torch.tensor([0.3, 0.3 + score] * 3))
        return part(torch.zeros(2, count // 2, 5))[0].active.double().mean((0, 1))

    @pytest.mark.parametrize("seed", [0, 7])
    @pytest.mark.parametrize("score", [-4.0, -0.5, 0.0, 1.0, 3.0])
    def test_rate_is_the_sigmoid_of_the_score_for_on_minus_off(self, score, seed):
        count, wanted = 20000, 1 / (1 + math.exp(-score))
        part = GumbelRouterSpec(seed=seed).build(5, NAMES)
        bound = 4.5 * math.sqrt(wanted * (1 - wanted) / count)
        assert self._rate(part, score, count).tolist() == pytest.approx([wanted] * 3, abs=bound)
        torch.testing.assert_close(part(torch.zeros(1, 1, 5))[0].p_on[0, 0].tolist(), [wanted] * 3, rtol=0, atol=1e-6)

    def _active(self, positions=None, *, update=0, seed=0, rows=1, count=20000):
        part = GumbelRouterSpec(seed=seed).build(5, NAMES)
        part.set_step(update)
        with torch.no_grad():
            part.weight.zero_()
        return part(torch.zeros(rows, count, 5), None, positions)[0].active

    def test_draws_of_updates_rows_positions_sub_modules_and_seeds_are_independent(self):
        count = 20000
        here = self._active(rows=2)
        others = {
            "update": self._active(update=1)[0, :, 0],
            "far update": self._active(update=10**6)[0, :, 0],
            "row": here[1, :, 0],
            "position": self._active(torch.arange(1, count + 1)[None])[0, :, 0],
            "sub-module": here[0, :, 1],
            "seed": self._active(seed=1)[0, :, 0],
        }
        for name, other in others.items():
            product = (here[0, :, 0].double() - 0.5) * (other.double() - 0.5)
            assert 4 * float(product.mean()) == pytest.approx(0, abs=4.5 / math.sqrt(count)), name

    def test_an_update_number_always_draws_the_same(self):
        part, control = router(GumbelRouterSpec()), normal(2, 9, 5)
        first = part(control)[0]
        part.set_step(1)
        assert not torch.equal(part(control)[0].active, first.active)
        part.set_step(0)
        same(part(control)[0], first)

    def test_evaluation_draws_nothing(self):
        part, control = router(GumbelRouterSpec()).eval(), normal(2, 9, 5)
        decision = part(control)[0]
        part.set_step(1000)
        later = part(control)[0]
        for name in ("active", "logits", "p_on"):
            assert torch.equal(getattr(later, name), getattr(decision, name))
        assert torch.equal(decision.active, decision.p_on > 0.5)

    def test_draws_of_a_row_depend_on_its_number_only(self):
        part, control = router(GumbelRouterSpec()), normal(1, 40, 5).expand(3, -1, -1)
        whole = part(control)[0]
        assert not torch.equal(whole.active[0], whole.active[1])
        few = part(control[:2])[0]
        assert torch.equal(few.active, whole.active[:2])

    def test_confidence_is_exactly_1_with_the_gradient_of_the_annealed_relaxed_sample(self):
        spec = GumbelRouterSpec(temperature=3.0, final_temperature=0.4, anneal=8)
        part, control = scored(spec), normal(2, 5, 5).requires_grad_()
        for update, temperature in ((0, 3.0), (2, 3.0 * (0.4 / 3.0) ** 0.25), (8, 0.4), (99, 0.4)):
            part.set_step(update)
            decision = part(control)[0]
            assert (decision.confidence == 1).all()
            noise = oracles.gumbel_noise(part, 2, 5)
            off, on = (decision.logits + noise).unbind(-1)
            inputs = [control, part.weight, part.bias]
            near_all(gradients(decision.confidence, inputs), gradients(torch.sigmoid((on - off) / temperature), inputs))

    @pytest.mark.parametrize("anneal", [0, 1])
    def test_after_anneal_updates_the_temperature_is_final(self, anneal):
        part, control = (
            scored(GumbelRouterSpec(temperature=3.0, final_temperature=0.4, anneal=anneal)),
            normal(1, 5, 5).requires_grad_(),
        )
        part.set_step(anneal)
        decision = part(control)[0]
        off, on = (decision.logits + oracles.gumbel_noise(part, 1, 5)).unbind(-1)
        near_all(gradients(decision.confidence, [control]), gradients(torch.sigmoid((on - off) / 0.4), [control]))

    def test_the_number_of_updates_is_saved(self):
        part, fresh, control = router(GumbelRouterSpec()), router(GumbelRouterSpec(), seed=5), normal(2, 9, 5)
        part.set_step(17)
        assert set(part.state_dict()) == {"weight", "bias", "score_bias", "updates"}
        fresh.load_state_dict(part.state_dict())
        assert int(fresh.updates) == 17
        same(fresh(control)[0], part(control)[0])

    def test_logits_are_those_without_the_noise(self):
        part, control = router(GumbelRouterSpec()), normal(2, 9, 5)
        drawn, plain = part(control)[0], part.eval()(control)[0]
        assert torch.equal(drawn.logits, plain.logits)
        assert torch.equal(drawn.p_on, plain.p_on)
        assert not torch.equal(drawn.active, plain.active)

    def test_the_smallest_and_largest_draws_give_finite_gradients(self, monkeypatch):
        part, control = router(GumbelRouterSpec()).float(), normal(2, 9, 5, dtype=torch.float32).requires_grad_()
        for draw in (0.0, 1 - 2.0**-53):
            monkeypatch.setattr(
                module_of_gumbel,
                "draw_for_tokens",
                lambda like, *_, draw=draw: torch.full(like.shape, draw, dtype=torch.float64),
            )
            confidence = part(control)[0].confidence
            assert (confidence == 1).all()
            assert all(gradient.isfinite().all() for gradient in gradients(confidence, [control, part.weight]))

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"final_temperature": 2.0}, "final_temperature=2.0 must be at most temperature=1.0; annealing cools"),
            ({"final_temperature": 1e-9}, "final_temperature=1e-09 must be at least 0.0001"),
            ({"temperature": 0.0}, "temperature=0.0 must be at least 0.0001"),
            ({"anneal": -1}, "anneal=-1 must be at least 0"),
        ],
    )
    def test_impossible_temperatures_are_refused(self, settings, complaint):
        with pytest.raises(SpecError, match=f"GumbelRouterSpec: .*{complaint}"):
            GumbelRouterSpec(**settings)


def near_all(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Compare lists of tensors."""
    for one, other in zip(found, wanted, strict=True):
        near(one, other)
