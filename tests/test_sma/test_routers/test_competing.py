"""Exclusive, top-k and expert choice: sub-modules compete for tokens, or tokens for sub-modules."""

import math
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import InputError, SpecError
from sma.routers import ExclusiveRouterSpec, ExpertChoiceRouterSpec, TopKRouterSpec
from tests.cases import generator, masks, normal
from tests.streams import exactly, near
from tests.test_sma.test_routers.each import NAMES, clear_score_bias, router, same, scored, token_with_scores


class TestExclusive:
    @pytest.mark.parametrize("chosen", [None, 0, 1, 2])
    def test_each_single_sub_module_and_none_is_chosen_by_some_token(self, chosen):
        part = scored(ExclusiveRouterSpec())
        clear_score_bias(part)
        best = 0 if chosen is None else chosen + 1
        decision = part(token_with_scores(part, [1.0 if choice == best else 0.0 for choice in range(4)]))[0]
        assert decision.active[0, 0].tolist() == [m == chosen for m in range(3)]

    @given(valid=masks(), scale=st.floats(0.01, 100))
    def test_a_token_runs_one_sub_module_at_most(self, valid, scale):
        decision = router(ExclusiveRouterSpec(temperature_scale=scale))(scale * normal(*valid.shape, 5), valid)[0]
        assert (decision.active.sum(-1) <= 1).all()
        assert (decision.p_on.sum(-1) < 1 + 1e-9).all()

    @pytest.mark.parametrize(
        "scores",
        [
            pytest.param([1.0, 1.0, 0.0, 0.0], id="with skip"),
            pytest.param([0.0, 1.0, 1.0, 0.0], id="between sub-modules"),
            pytest.param([1.0, 1.0, 1.0, 1.0], id="of all"),
        ],
    )
    def test_ties_between_the_best_scores_run_nothing(self, scores):
        part = ExclusiveRouterSpec().build(5, NAMES)
        with torch.no_grad():
            part.weight.zero_()
            part.bias.copy_(torch.tensor(scores))
        assert not part(torch.zeros(1, 2, 5))[0].active.any()

    def test_the_logits_are_the_best_other_score_and_the_own_one(self):
        part = router(ExclusiveRouterSpec())
        control = normal(2, 9, 5)
        scores = part._scores(control)
        for m in range(3):
            off, on = part(control)[0].logits[..., m, :].unbind(-1)
            others = torch.cat([scores[..., : m + 1], scores[..., m + 2 :]], dim=-1)
            assert torch.equal(on, scores[..., m + 1])
            assert torch.equal(off, others.amax(-1))

    def test_ties_below_the_best_do_not_matter(self):
        part = ExclusiveRouterSpec().build(5, NAMES)
        with torch.no_grad():
            part.weight.zero_()
            part.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
        assert part(torch.zeros(1, 1, 5))[0].active[0, 0].tolist() == [False, True, False]

    @pytest.mark.parametrize(
        "targets", [{"mlp": 1.0}, {"attention": 0.6, "mlp": 0.3, "conv": 0.1}, dict.fromkeys(NAMES, 1 / 3), {}]
    )
    def test_targets_that_sum_to_at_most_1_can_be_reached(self, targets):
        router(ExclusiveRouterSpec()).check_targets(targets)

    def test_targets_that_sum_to_more_are_refused(self):
        sentence = (
            "the rates of this exclusive router sum between 0 and 1, but the targets {'attention': 0.6, 'mlp': "
            "0.5} to 1.1"
        )
        with pytest.raises(InputError, match=exactly(sentence)):
            router(ExclusiveRouterSpec()).check_targets({"attention": 0.6, "mlp": 0.5})


def _subsets(k: int, skips: int) -> list[frozenset[int]]:
    return [
        frozenset(subset) for size in range(max(k - skips, 0), min(k, 3) + 1) for subset in combinations(range(3), size)
    ]


class TestTopK:
    @pytest.mark.parametrize(
        ("k", "skips", "subset"),
        [
            pytest.param(k, skips, subset, id=f"{k} of {skips} skips {sorted(subset)}")
            for k, skips in ((1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (2, 2), (4, 1))
            for subset in _subsets(k, skips)
        ],
    )
    def test_every_k_subset_is_chosen_by_some_token_and_smaller_ones_with_skips(self, k, skips, subset):
        part = scored(TopKRouterSpec(k=k, skips=skips), width=7)
        clear_score_bias(part)
        chosen = [m in subset for m in range(3)] + [skip < k - len(subset) for skip in range(skips)]
        decision = part(token_with_scores(part, [1.0 if on else -1.0 for on in chosen]))[0]
        assert decision.active[0, 0].tolist() == chosen[:3]

    @given(valid=masks(), k=st.integers(1, 5), skips=st.integers(0, 3), ties=st.booleans())
    def test_every_token_makes_exactly_k_choices(self, valid, k, skips, ties):
        k = min(k, 3 + skips)
        part, control = router(TopKRouterSpec(k=k, skips=skips)), normal(*valid.shape, 5)
        if ties:
            with torch.no_grad():
                part.weight.zero_()
        chosen = part(control, valid)[0].active.sum(-1)[valid]
        assert ((chosen >= k - skips) & (chosen <= k)).all()
        if not skips:
            assert (chosen == k).all()

    @given(scores=st.lists(st.integers(0, 2), min_size=5, max_size=5), k=st.integers(1, 5))
    def test_of_equal_scores_the_first_name_wins(self, scores, k):
        part = TopKRouterSpec(k=k, skips=2).build(4, NAMES)
        with torch.no_grad():
            part.weight.zero_()
            part.bias.copy_(torch.tensor(scores))
        best = sorted(range(5), key=lambda choice: -scores[choice])[:k]  # sorted is stable
        assert part(torch.zeros(2, 3, 4))[0].active.tolist() == [[[m in best for m in range(3)]] * 3] * 2

    def test_confidence_is_the_share_of_the_softmax_over_skips_too(self):
        part, control = scored(TopKRouterSpec(k=2, skips=1)), normal(2, 3, 5)
        clear_score_bias(part)
        scores = control @ part.weight.T + part.bias
        near(part(control)[0].confidence, (scores / part.log_temperature.exp()).softmax(-1)[..., :3])

    def test_more_choices_than_sub_modules_and_skips_are_refused(self):
        sentence = "TopKRouterSpec: k=5 is more than the 3 sub-modules and skips=1 to choose from; lower k"
        with pytest.raises(SpecError, match=exactly(sentence)):
            TopKRouterSpec(k=5, skips=1).build(5, NAMES)

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [({"k": 0}, "k=0 must be at least 1"), ({"skips": -1}, "skips=-1 must be at least 0")],
    )
    def test_impossible_numbers_of_choices_are_refused(self, settings, complaint):
        with pytest.raises(SpecError, match=f"TopKRouterSpec: {complaint}"):
            TopKRouterSpec(**settings)

    @pytest.mark.parametrize(
        ("k", "skips", "rates"),
        [
            (1, 0, [1 / 3] * 3),
            (1, 0, [0.7, 0.2, 0.1]),
            (2, 0, [0.9, 0.9, 0.2]),
            (2, 1, [0.4] * 3),
            (2, 1, [0.6] * 3),
            (2, 2, [0.0] * 3),
        ],
    )
    def test_targets_that_sum_to_the_number_of_choices_can_be_reached(self, k, skips, rates):
        router(TopKRouterSpec(k=k, skips=skips)).check_targets(dict(zip(NAMES, rates, strict=True)))

    @pytest.mark.parametrize(
        ("k", "skips", "rates", "said"),
        [
            pytest.param(1, 0, [0.2, 0.2, 0.2], "sum to 1, but the targets .* to 0.6", id="too few"),
            pytest.param(2, 0, [0.9, 0.9, 0.9], "sum to 2, but the targets .* to 2.7", id="too many"),
            pytest.param(
                2, 1, [0.2, 0.2, 0.2], "sum between 1 and 2, but the targets .* to 0.6", id="too few of skips"
            ),
            pytest.param(
                1, 3, [0.9, 0.9, 0.2], "sum between 0 and 1, but the targets .* to 2$", id="too many of skips"
            ),
        ],
    )
    def test_targets_with_another_sum_are_refused(self, k, skips, rates, said):
        with pytest.raises(InputError, match=f"the rates of this top_k router {said}"):
            router(TopKRouterSpec(k=k, skips=skips)).check_targets(dict(zip(NAMES, rates, strict=True)))

    @pytest.mark.parametrize(
        ("k", "skips", "targets"),
        [
            (1, 0, {"attention": 0.3}),
            (1, 0, {}),
            (2, 0, {"attention": 0.3, "mlp": 0.7}),
            (2, 0, {"attention": 1.0, "mlp": 1.0}),
            (2, 1, {"mlp": 0.0}),
        ],
    )
    def test_sub_modules_without_a_target_complete_the_sum(self, k, skips, targets):
        router(TopKRouterSpec(k=k, skips=skips)).check_targets(targets)

    @pytest.mark.parametrize(
        ("k", "targets", "said"),
        [
            (
                2,
                {"attention": 0.3, "mlp": 0.3},
                "sum to 2, but the targets .* to 0.6, to which the 1 without a target add 1 at most$",
            ),
            (
                3,
                {"attention": 0.3},
                "sum to 3, but the targets .* to 0.3, to which the 2 without a target add 2 at most$",
            ),
            (1, {"attention": 0.8, "mlp": 0.7}, "sum to 1, but the targets .* to 1.5$"),
        ],
    )
    def test_targets_that_the_other_rates_cannot_complete_are_refused(self, k, targets, said):
        with pytest.raises(InputError, match=f"the rates of this top_k router {said}"):
            router(TopKRouterSpec(k=k)).check_targets(targets)


class TestExpertChoice:
    def test_nan_tokens_leave_the_capacity_to_the_others(self):
        part, control = router(ExpertChoiceRouterSpec(share=0.4)), normal(3, 9, 5)
        broken = torch.rand(3, 9, generator=generator(1)) < 0.5
        broken[2] = True
        found = part(control.masked_fill(broken[..., None], math.nan))[0]
        wanted = part(control, ~broken)[0]
        assert not found.active[broken].any()
        same(found, wanted, at=~broken)

    @given(valid=masks(length=30), share=st.integers(1, 100).map(lambda percent: percent / 100))
    def test_every_sub_module_takes_exactly_its_share_of_the_valid_tokens_of_a_row_rounded_up(self, valid, share):
        active = router(ExpertChoiceRouterSpec(share=share))(normal(*valid.shape, 5), valid)[0].active
        wanted = [math.ceil(Fraction(str(share)) * count) for count in valid.sum(1).tolist()]
        assert active.sum(1).tolist() == [[count] * 3 for count in wanted]

    @pytest.mark.parametrize(
        ("share", "length", "taken"), [(0.07, 100, 7), (0.1, 30, 3), (1e-12, 5, 1), (1.0, 7, 7), (0.5, 0, 0)]
    )
    def test_the_share_is_rounded_up_without_rounding_errors(self, share, length, taken):
        active = (
            ExpertChoiceRouterSpec(share=share).build(5, NAMES)(normal(1, length, 5, dtype=torch.float32))[0].active
        )
        assert active.sum(1).tolist() == [[taken] * 3]

    def test_of_equal_scores_the_earlier_token_wins(self):
        part = ExpertChoiceRouterSpec(share=0.5).build(1, ["mlp"])
        with torch.no_grad():
            part.weight.fill_(1.0)
        control = torch.tensor([1.0, 2.0, 1.0, 1.0, 9.0, 1.0, 0.0])[None, :, None]
        valid = torch.tensor([[True, True, True, True, False, True, True]])
        assert part(control, valid)[0].active[0, :, 0].tolist() == [True, True, True, False, False, False, False]

    def test_active_tokens_are_those_whose_score_for_on_is_larger(self):
        part = router(ExpertChoiceRouterSpec(share=0.4))
        for valid in (None, torch.rand(3, 9) < 0.7):
            decision = part(normal(3, 9, 5), valid)[0]
            off, on = decision.logits.unbind(-1)
            real = torch.ones(3, 9, dtype=torch.bool) if valid is None else valid
            assert torch.equal(decision.active[real], (on > off)[real])
            assert torch.equal(decision.active[real], (decision.p_on > 0.5)[real])

    def test_later_tokens_change_the_choice_so_it_is_not_causal(self):
        part = ExpertChoiceRouterSpec(share=0.5).build(1, ["mlp"])
        with torch.no_grad():
            part.weight.fill_(1.0)
        assert not part.causal
        assert part(torch.tensor([[[1.0], [0.0]]]))[0].active[0, 0, 0]
        assert not part(torch.tensor([[[1.0], [2.0]]]))[0].active[0, 0, 0]

    @pytest.mark.parametrize(("share", "rule"), [(0.0, "greater than 0"), (1.5, "at most 1")])
    def test_an_impossible_share_is_refused(self, share, rule):
        with pytest.raises(SpecError, match=rf"ExpertChoiceRouterSpec: share={share} must be {rule}"):
            ExpertChoiceRouterSpec(share=share)
