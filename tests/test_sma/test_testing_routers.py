"""The conformance kit accepts every built-in router and detects each deliberate bug."""

import re
from collections.abc import Sequence

import pytest

from sma.errors import InputError
from sma.routers import Router, RouterSpec
from sma.testing import ConformanceError, check_router
from sma.testing.router_laws import ROUTER_LAWS
from tests.test_sma.broken_routers import BROKEN, Rising, Tied
from tests.test_sma.test_routers.each import routers

LAWS = {law.__name__ for law in ROUTER_LAWS}
EXEMPT = {
    "top_k": ["ties_are_inactive"],
    "gumbel": ["training_decides_as_evaluation", "active_is_where_on_beats_off", "gradients_are_right"],
    "bernoulli": ["training_decides_as_evaluation", "active_is_where_on_beats_off"],
    "explore": ["training_decides_as_evaluation", "active_is_where_on_beats_off"],
}


@routers()
def test_every_built_in_router_conforms(spec: RouterSpec, as_users_run: None) -> None:
    check_router(spec, exempt=EXEMPT.get(spec.kind, []), effort=4)


def test_a_router_without_a_spec_conforms(as_users_run: None) -> None:
    check_router(Rising, modules=2, effort=8)


@pytest.mark.parametrize(
    ("broken", "law"), [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}") for case in BROKEN]
)
def test_the_kit_detects_the_bug(broken: type[Rising], law: str, as_users_run: None) -> None:
    with pytest.raises(ConformanceError, match=rf"^the router .*{broken.__name__}'> breaks 1 of 1 laws:\n  {law}: "):
        check_router(broken, effort=6, exempt=LAWS - {law})


class MiscountedSpec(RouterSpec):
    kind: str = "miscounted"

    def build(self, width: int, names: Sequence[str]) -> Router:
        return Rising(width, names)

    def num_parameters(self, width: int, modules: int) -> int:
        return width


def test_the_kit_reports_a_wrong_prediction(as_users_run: None) -> None:
    sentence = (
        f"the router 'miscounted' breaks 1 of {len(LAWS)} laws:\n"
        "  spec_predicts_and_survives: num_parameters predicts 4, and the router has 10"
    )
    with pytest.raises(ConformanceError, match=f"^{sentence}"):
        check_router(MiscountedSpec(), modules=2, effort=1)


def test_every_law_has_a_router_that_breaks_it() -> None:
    assert {law for _, law in BROKEN} | {"spec_predicts_and_survives"} == LAWS


def test_laws_from_which_a_router_is_exempt_are_not_tested(as_users_run: None) -> None:
    check_router(Tied, exempt=["ties_are_inactive"], effort=2)


def test_exemption_from_an_unknown_law_is_refused() -> None:
    sentence = (
        "there is no law 'ties_are_active' to be exempt from; "
        "did you mean 'ties_are_inactive'? laws: returns_a_decision, "
    )
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}"):
        check_router(Tied, exempt=["ties_are_active"])
