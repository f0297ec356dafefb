"""Targets that a budget cannot reach raise errors before any score bias changes."""

import math
from itertools import pairwise

import pytest

from sma.budget import BudgetController, BudgetSpec
from sma.errors import InputError, SpecError
from sma.routers import ExclusiveRouterSpec, ExpertChoiceRouterSpec, SMARouterSpec, TopKRouterSpec
from tests.streams import exactly

NAMES = ("attention", "mlp", "conv")


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            (
                {"target": 0.0},
                "target=0.0 must be above 0 and at most 1; for a rate of 0 use the router {kind: never}",
            ),
            ({"target": {"mlp": 1.5}}, "target=1.5 must be above 0 and at most 1"),
            ({"target": {"mlp": 0.5}, "over": "total"}, "over='total' keeps one rate, so target must be one number"),
            ({"target": [0.5, {"mlp": 1.5}]}, "target=1.5 must be above 0 and at most 1"),
            ({"target": [0.5, 0.2], "over": "total"}, "over='total' keeps one rate, so target must be one number"),
            ({"target": 0.1, "floor": 0.2}, "floor=0.2 must be at most the target; lower it"),
        ],
    )
    def test_impossible_budgets(self, settings, sentence):
        with pytest.raises(SpecError, match=f"BudgetSpec: .*{sentence}"):
            BudgetSpec(**settings)

    @pytest.mark.parametrize(
        ("spec", "target", "sentence"),
        [
            pytest.param(
                ExpertChoiceRouterSpec(share=0.5),
                0.3,
                "the router kind 'expert_choice' cannot be steered",
                id="not steerable",
            ),
            pytest.param(
                ExclusiveRouterSpec(), 0.5, "the rates of this exclusive router sum between 0 and 1", id="exclusive"
            ),
            pytest.param(TopKRouterSpec(k=1), 0.5, "the rates of this top_k router sum to 1", id="top_k"),
            pytest.param(
                SMARouterSpec(),
                [0.5, 0.2],
                "targets for 2 layers, and 1 are routed; give one for each of those",
                id="layers",
            ),
            pytest.param(
                SMARouterSpec(),
                {"mpl": 0.5},
                "the target of the budget names 'mpl', which is not a sub-module; did you mean 'mlp'",
                id="name",
            ),
        ],
    )
    def test_targets_that_a_router_cannot_reach(self, spec, target, sentence):
        with pytest.raises(InputError, match=sentence):
            BudgetController(BudgetSpec(target=target), [spec.build(5, NAMES)])


class TestTotal:
    def _controller(self, target, specs, costs):
        return BudgetController(
            BudgetSpec(target=target, over="total"), [spec.build(5, NAMES) for spec in specs], costs
        )

    @pytest.mark.parametrize(
        ("costs", "sentence"),
        [
            pytest.param(
                [[1.0, 2.0]],
                "there are costs for [2] sub-modules, by layer; expected one for each of [3]",
                id="too few",
            ),
            pytest.param(
                [[1.0] * 3] * 2,
                "there are costs for [3, 3] sub-modules, by layer; expected one for each of [3]",
                id="layers",
            ),
            pytest.param(
                [[1.0, -2.0, 1.0]],
                "a sub-module costs -2.0; expected a finite number of at least 0, such as its MACs per token",
                id="negative",
            ),
            pytest.param(
                [[1.0, math.nan, 1.0]],
                "a sub-module costs nan; expected a finite number of at least 0, such as its MACs per token",
                id="nan",
            ),
            pytest.param(
                [[0.0] * 3],
                "a total budget weights rates by cost, and all costs are 0; give costs, or use over='each'",
                id="all zero",
            ),
        ],
    )
    def test_impossible_costs_are_refused(self, costs, sentence):
        with pytest.raises(InputError, match=exactly(sentence)):
            self._controller(0.3, [SMARouterSpec()], costs)

    @pytest.mark.parametrize(
        ("target", "specs", "costs", "low", "high"),
        [
            pytest.param(0.4, [ExclusiveRouterSpec()], None, "0", "0.3333", id="exclusive"),
            pytest.param(0.9, [ExclusiveRouterSpec()], [[1.0, 2.0, 5.0]], "0", "0.625", id="exclusive, weighted"),
            pytest.param(0.2, [TopKRouterSpec(k=2)], [[1.0, 2.0, 5.0]], "0.375", "0.875", id="top_k"),
            pytest.param(0.3, [TopKRouterSpec(k=2, skips=1)], None, "0.3333", "0.6667", id="top_k of skips"),
            pytest.param(0.8, [SMARouterSpec(), ExclusiveRouterSpec()], None, "0", "0.6667", id="two layers"),
        ],
    )
    def test_totals_that_no_routing_reaches_are_refused(self, target, specs, costs, low, high):
        ends = f"sum to between {low} and {high}, and the target is {target}; give one in between"
        with pytest.raises(InputError, match=exactly(f"weighted by cost the rates of these routers {ends}")):
            self._controller(target, specs, costs)

    @pytest.mark.parametrize(
        ("target", "specs", "costs"),
        [
            pytest.param(1 / 3, [ExclusiveRouterSpec()], None, id="exclusive at its most"),
            pytest.param(0.6, [ExclusiveRouterSpec()], [[1.0, 2.0, 5.0]], id="exclusive, weighted"),
            pytest.param(1 / 3, [TopKRouterSpec(k=1)], None, id="top_k as it is"),
            pytest.param(0.5, [TopKRouterSpec(k=2, skips=1)], None, id="top_k of skips"),
            pytest.param(0.5, [TopKRouterSpec(k=1), SMARouterSpec()], None, id="top_k beside another"),
            pytest.param(1.0, [SMARouterSpec()], [[0.0, 0.0, 1.0]], id="some cost nothing"),
        ],
    )
    def test_totals_within_reach_are_accepted(self, target, specs, costs):
        self._controller(target, specs, costs)

    def test_a_total_that_no_shift_changes_is_refused(self):
        sentence = (
            "each of these routers runs the same number of sub-modules on every token, "
            "and a shift of all scores changes no total"
        )
        with pytest.raises(
            InputError, match=f"^{sentence}; use over='each', or give them empty choices, such as the skips of top_k$"
        ):
            self._controller(0.5, [TopKRouterSpec(k=2)], [[1.0, 2.0, 5.0]])

    def test_a_router_that_cannot_be_steered_is_refused(self):
        with pytest.raises(InputError, match="the router kind 'expert_choice' cannot be steered"):
            self._controller(0.3, [ExpertChoiceRouterSpec(share=0.3)], None)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(BudgetSpec(target=0.3), id="at-once"),
        pytest.param(BudgetSpec(target=0.3, hold=7), id="held"),
        pytest.param(BudgetSpec(target=0.3, hold=5, anneal=37), id="falling"),
        pytest.param(BudgetSpec(target=0.8, start=0.1, hold=3, anneal=16), id="rising"),
        pytest.param(BudgetSpec(target=0.3, anneal=3), id="shorter-than-its-parts"),
        pytest.param(
            BudgetSpec(target=0.2, start=0.9, anneal=60, exploration=0.4, period=10, until=90), id="exploring"
        ),
        pytest.param(BudgetSpec(target=0.2, exploration=0.4, period=7), id="exploring-for-ever"),
    ],
)
def test_ceiling_is_above_the_schedule_and_rarely_changes(spec: BudgetSpec) -> None:
    ceilings = [spec.ceiling(spec.target, update) for update in range(150)]  # type: ignore[arg-type]
    rates = [spec.scheduled(spec.target, update) for update in range(150)]  # type: ignore[arg-type]
    assert all(ceiling >= rate - 1e-12 for ceiling, rate in zip(ceilings, rates, strict=True))
    assert max(ceilings) <= 1
    assert sum(one != other for one, other in pairwise(ceilings)) <= 10
    if not spec.exploration or spec.until:
        assert ceilings[-1] == pytest.approx(spec.target)
