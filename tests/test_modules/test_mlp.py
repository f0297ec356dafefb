"""The gated feed-forward sub-module against its formula."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sma.errors import SpecError
from sma.modules.mlp import GatedMLP, GatedMLPSpec
from sma.ragged import rectangular
from tests.test_modules.layouts import LAYOUTS, Layout, assert_matches_loop, draw, first


def make(**fields: Any) -> GatedMLP:
    torch.manual_seed(0)
    module = draw(GatedMLPSpec(**{"hidden_size": 5, **fields}).build(3).double())
    assert isinstance(module, GatedMLP)
    return module


def mlp_loop(module: GatedMLP, x: Tensor) -> Tensor:
    """W_3 (silu(W_1 x) * W_2 x), token by token."""
    first_weight, second_weight = (
        module.in_proj.weight[: module.spec.hidden_size],
        module.in_proj.weight[module.spec.hidden_size :],
    )
    out = []
    for token in x:
        gate = first_weight @ token
        out.append(module.out_proj.weight @ (gate * torch.sigmoid(gate) * (second_weight @ token)))
    return torch.stack(out)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [[4, 0, 2], [0, 0], [1]], ids=str)
def test_mlp_agrees_with_the_loop(lengths: list[int], layout: Layout) -> None:
    module = make()
    x = torch.randn(len(lengths), 4, 3, dtype=torch.float64)
    assert_matches_loop(module, lambda row, _: mlp_loop(module, row), x, first(lengths, 4), layout)


def test_dropout_acts_in_training_only_and_changes_nothing_on_average() -> None:
    module = make(dropout=0.3)
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    exact = make()(rectangular(x))[0]
    assert torch.equal(module.eval()(rectangular(x))[0], exact)
    draws = module.train()(rectangular(x.expand(4000, 2, 3)))[0].unflatten(0, (4000, 2))
    assert (draws.std(0) > 0).all()
    assert ((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / 4000**0.5).all()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param(
            {"hidden_size": 0},
            "GatedMLPSpec: hidden_size=0 must be at least 1; hidden_size: channels of the hidden",
            id="size",
        ),
        pytest.param(
            {"dropout": 1.0}, "GatedMLPSpec: dropout=1.0 must be less than 1.0; dropout: probability", id="dropout"
        ),
        pytest.param(
            {"hidden_size": None}, "GatedMLPSpec: hidden_size=None: input should be a valid integer", id="none"
        ),
    ],
)
def test_impossible_specs_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        make(**fields)
