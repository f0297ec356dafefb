"""Calls of routed parts, and the collection of their decisions."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.errors import InputError
from sma.retrofit import retrofit
from sma.routed_part import collect_decisions
from tests.cases import generator, normal
from tests.test_sma.foreign_models import HALF, OPEN, WIDTH, ids, made


def test_collected_padding_is_never_active():
    model = made()
    retrofit(model, {"layers.*.mlp": OPEN})
    valid = torch.rand(3, 9, generator=generator(2)) < 0.6
    with collect_decisions(model, valid) as decisions:
        model(ids(), valid | (torch.arange(9) == 0))
    assert len(decisions) == 2
    for decision in decisions:
        assert torch.equal(decision.active[..., 0], valid)


def test_contexts_nest_and_two_passes_are_collected_twice():
    model = made()
    retrofit(model, {"layers.*.mlp": HALF})
    with collect_decisions(model) as outer:
        model(ids())
        with collect_decisions(model) as inner:
            model(ids())
        model(ids())
    model(ids())
    assert (len(outer), len(inner)) == (6, 2)
    assert all(a is b for a, b in zip(outer[2:4], inner, strict=True))


@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-after"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
def test_a_pass_recomputed_in_backward_is_collected_once_with_its_mask(reentrant, masked, inside):
    model = made().train()
    retrofit(model, {"layers.*.mlp": HALF})
    other = copy.deepcopy(model)
    model.recompute = True
    model.reentrant = reentrant
    valid = torch.arange(9) < torch.tensor([[9], [5], [2]]) if masked else None
    for each in (model, other):
        with collect_decisions(each, valid) as decisions:
            loss = each(ids()).square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert len(decisions) == 2
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_mask_never_applies_to_the_next_pass_without_one():
    model = made().train()
    model.recompute = True
    retrofit(model, {"layers.*.mlp": OPEN})
    with collect_decisions(model, torch.zeros(3, 9, dtype=torch.bool)) as none:
        model(ids()).sum().backward()
    with collect_decisions(model) as every:
        loss = model(ids()).square().sum()
    loss.backward()
    assert not any(decision.active.any() for decision in none)
    assert all(decision.active.all() for decision in every)


def test_nothing_is_stored_on_modules():
    model = made()
    retrofit(model, {"layers.*.mlp": HALF})
    before = [dict(part.__dict__) for part in model.modules()]
    with collect_decisions(model):
        model(ids())
    assert [dict(part.__dict__) for part in model.modules()] == before


class Called(nn.Module):
    """Calls its feed-forward block by a given function."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.mlp, self.call = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)).double(), call

    def forward(self, x: Tensor) -> Tensor:
        return x + self.call(self.mlp, x)


@pytest.mark.parametrize(
    ("shape", "tokens", "call"),
    [
        pytest.param((3, 5, WIDTH), (3, 5), lambda mlp, x: mlp(x), id="rows"),
        pytest.param((5, WIDTH), (1, 5), lambda mlp, x: mlp(x), id="one-row"),
        pytest.param((WIDTH,), (1, 1), lambda mlp, x: mlp(x), id="one-token"),
        pytest.param((2, 3, 4, WIDTH), (2, 12), lambda mlp, x: mlp(x), id="image"),
        pytest.param((2, 1, 3, 4, WIDTH), (2, 12), lambda mlp, x: mlp(x), id="video"),
        pytest.param((0, 5, WIDTH), (0, 5), lambda mlp, x: mlp(x), id="no-rows"),
        pytest.param((2, 0, 3, WIDTH), (2, 0), lambda mlp, x: mlp(x), id="no-tokens"),
        pytest.param((3, 5, WIDTH), (5, 3), lambda mlp, x: mlp(x.transpose(0, 1)).transpose(0, 1), id="transposed"),
        pytest.param((3, 5, WIDTH), (3, 5), lambda mlp, x: mlp(hidden_states=x), id="by-name"),
        pytest.param((3, 5, WIDTH), (3, 5), lambda mlp, x: mlp(x + mlp(x)), id="twice"),
    ],
)
def test_hidden_states_of_any_shape_are_routed_by_token(shape, tokens, call):
    torch.manual_seed(0)
    model = Called(call)
    part = model.mlp
    retrofit(model, {"mlp": HALF})
    x = normal(*shape)
    with collect_decisions(model) as decisions:
        found = model(x)
    assert all(decision.active.shape == (*tokens, 1) for decision in decisions)
    masks = iter(decision.active for decision in decisions)

    def oracle(*hidden: Tensor, **named: Tensor) -> Tensor:
        (values,) = (*hidden, *named.values())
        return part(values) * next(masks).reshape(*values.shape[:-1], 1)

    model.__dict__["mlp"] = oracle  # found before the registered modules
    torch.testing.assert_close(found, model(x))


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("call", "said"),
    [
        pytest.param(
            lambda mlp, x: mlp(x, x), r"mlp is called with a torch\.Tensor of .*, a torch\.Tensor of", id="two"
        ),
        pytest.param(
            lambda mlp, x: mlp(x, None)[0], r"mlp is called with .*, None; a routed part takes one", id="none"
        ),
        pytest.param(lambda mlp, x: mlp([x]), "mlp is called with a list", id="list"),
        pytest.param(lambda mlp, x: mlp(), "mlp is called with nothing", id="nothing"),
        pytest.param(lambda mlp, x: mlp(x.sum()), r"mlp is called with a torch\.Tensor of shape \(\)", id="scalar"),
    ],
)
def test_a_call_with_anything_but_hidden_states_is_refused(call, said):
    model = Called(call)
    retrofit(model, {"mlp": HALF})
    with pytest.raises(InputError, match=said):
        model(normal(2, 3, WIDTH))


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("valid", "said"),
    [
        pytest.param(torch.ones(3, 9, dtype=torch.int64), r"convert with \.bool\(\)", id="integers"),
        pytest.param(torch.ones(3, dtype=torch.bool), r"expected a boolean tensor of shape \(B, L\)", id="one-axis"),
        pytest.param("mask", "valid is a str", id="text"),
    ],
)
def test_an_invalid_mask_is_refused_before_the_pass(valid, said):
    model = made()
    retrofit(model, {"layers.*.mlp": HALF})
    with pytest.raises(InputError, match=said), collect_decisions(model, valid):
        pytest.fail("the context was entered")


@pytest.mark.usefixtures("as_users_run")
def test_a_mask_that_does_not_fit_the_tokens_is_refused_with_the_part():
    model = made()
    retrofit(model, {"layers.*.mlp": HALF})
    with (
        collect_decisions(model, torch.ones(3, 8, dtype=torch.bool)),
        pytest.raises(InputError, match=r"layers\.0\.mlp has tokens"),
    ):
        model(ids())


def test_collecting_from_a_model_without_routed_parts_is_refused():
    with pytest.raises(InputError, match="has no routed part"), collect_decisions(made()):
        pass
