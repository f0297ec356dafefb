"""Both parts keep their contracts, and so does a model of them."""

from pathlib import Path

import pytest
from sma import load_spec
from sma.testing import check_model, check_router, check_submodule

from sma_shift.novelty import NoveltyRouterSpec
from sma_shift.token_shift import TokenShiftSpec

MODEL = Path(__file__).resolve().parents[1] / "model.yaml"


@pytest.mark.parametrize("hidden_size", [1, 6])
def test_token_shift_keeps_the_contract(hidden_size: int) -> None:
    check_submodule(TokenShiftSpec(hidden_size=hidden_size), effort=10)


@pytest.mark.parametrize("modules", [1, 3])
def test_novelty_keeps_the_contract(modules: int) -> None:
    check_router(NoveltyRouterSpec(), modules=modules, effort=10)


def test_the_model_keeps_the_contract() -> None:
    check_model(load_spec(MODEL, overrides={"width": 6}), effort=3)
