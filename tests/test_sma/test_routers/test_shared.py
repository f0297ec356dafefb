"""One router for all layers: shared parameters, summed gradients, score biases by layer, and sharing in files."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sma
from sma.budget import BudgetController, BudgetSpec, routers_of
from sma.calibration import calibrate
from sma.describe import describe
from sma.errors import SpecError
from sma.model import SequenceModel
from sma.testing import check_model
from tests.cases import spread

LAYER: dict[str, Any] = {
    "backbone": {"kind": "ema", "state_size": 2, "bidirectional": False},
    "router": {"kind": "sma", "control_conv": 2, "temperature_scale": 0.3},
    "modules": {"mlp": {"kind": "gated_mlp", "hidden_size": 4}, "conv": {"kind": "conv", "kernel_size": 2}},
}
SPEC: dict[str, Any] = {
    "kind": "language_model",
    "width": 4,
    "encoder": {"kind": "token_embedding", "vocabulary": 7},
    "layers": {"repeat": 3, "layer": LAYER},
    "shared_router": True,
}


def built(**fields: Any) -> SequenceModel:
    model = sma.build({**SPEC, **fields}, seed=0).double()
    spread(model)
    return model


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(7, (3, 9), generator=generator), torch.rand(3, 9, generator=generator) < 0.8


def test_all_layers_share_the_parameters_of_the_first():
    first, *others = routers_of(built())
    for other in others:
        assert other is not first
        assert [id(part) for part in other.parameters()] == [id(part) for part in first.parameters()]
        assert other.score_bias is not first.score_bias
    assert [router.layer_index for router in routers_of(built())] == [0, 1, 2]


@given(width=st.sampled_from([1, 4, 6]), repeat=st.integers(1, 4), taps=st.sampled_from([None, 3]))
def test_the_spec_counts_shared_parameters_once(width, repeat, taps):
    layer = {**LAYER, "router": {**LAYER["router"], "control_conv": taps}}
    spec = sma.load_spec({**SPEC, "width": width, "layers": {"repeat": repeat, "layer": layer}})
    count = sum(parameter.numel() for parameter in sma.build(spec, seed=0).parameters())
    assert spec.num_parameters() == count
    description = describe(spec)
    assert description.total.parameters == count
    assert description.total.macs == describe(spec.replace(shared_router=False)).total.macs


def test_a_shared_router_equals_separate_routers_of_equal_parameters():
    shared, separate = built(), built(shared_router=False)
    separate.load_state_dict(shared.state_dict())
    ids, valid = batch()
    found, wanted = shared(ids, valid), separate(ids, valid)
    assert torch.equal(found.logits, wanted.logits)
    for output in (found, wanted):
        output.logits[valid].square().sum().backward()
    parts = [dict(router.named_parameters()) for router in routers_of(separate)]
    for name, parameter in routers_of(shared)[0].named_parameters():
        total = torch.stack([part[name].grad for part in parts]).sum(0)
        torch.testing.assert_close(parameter.grad, total, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("way", ["file", "deepcopy", "dtype", "state_dict"])
def test_parameters_stay_shared_after_saving_copying_and_conversion(way, tmp_path):
    model = built().float()
    routers_of(model)[1].score_bias.fill_(0.5)
    match way:
        case "file":
            again = sma.load(sma.save(model, tmp_path))
        case "deepcopy":
            again = copy.deepcopy(model)
        case "dtype":
            again = copy.deepcopy(model).double()
        case _:
            again = sma.build(model.spec, seed=1)
            again.load_state_dict(model.state_dict())
    ids = {id(part) for router in routers_of(again) for part in router.parameters()}
    assert len(ids) == len(list(routers_of(again)[0].parameters()))
    assert [router.score_bias.tolist() for router in routers_of(again)] == [[0.0, 0.0], [0.5, 0.5], [0.0, 0.0]]
    tokens, valid = batch()
    torch.testing.assert_close(again.float()(tokens, valid).logits, model(tokens, valid).logits)


def test_one_step_of_an_optimiser_updates_all_layers_equally():
    model = built()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, valid = batch()
    model(ids, valid).logits[valid].square().mean().backward()
    before = routers_of(model)[0].weight.clone()
    optimizer.step()
    assert not torch.equal(routers_of(model)[2].weight, before)
    assert torch.equal(routers_of(model)[0].weight, routers_of(model)[2].weight)


def test_budgets_and_calibration_keep_score_biases_by_layer():
    model = built(layers={"repeat": 2, "layer": LAYER})
    ids = torch.randint(7, (8, 60), generator=torch.Generator().manual_seed(1))
    controller = BudgetController.of(model, BudgetSpec(target={"mlp": 0.2, "conv": 0.6}))
    with torch.no_grad():
        for _ in range(80):
            controller.update(model(ids).decisions)
    rates = [decision.rate().tolist() for decision in model(ids).decisions]
    assert rates == [pytest.approx([0.2, 0.6], abs=0.08)] * 2
    assert not torch.equal(*(router.score_bias for router in routers_of(model)))
    reached = calibrate(model, [ids], [{"mlp": 0.1, "conv": 0.1}, {"mlp": 0.7, "conv": 0.7}]).by_layer()
    assert [layer["mlp"] for layer in reached] == pytest.approx([0.1, 0.7], abs=0.08)


def test_layers_with_a_shared_router_draw_independently():
    model = sma.build({**SPEC, "layers": {"repeat": 2, "layer": {**LAYER, "router": {"kind": "bernoulli"}}}}, seed=0)
    control = torch.zeros(2, 200, 4)
    first, second = (router.train()(control)[0].active for router in routers_of(model))
    assert not torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run")
def test_a_model_with_a_shared_router_keeps_the_contract():
    check_model(sma.load_spec(SPEC), effort=3)


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        pytest.param([LAYER, {**LAYER, "router": {"kind": "sma"}}], "routed layer 1 has sma for", id="other-router"),
        pytest.param(
            [LAYER, {**LAYER, "modules": {"mlp": LAYER["modules"]["mlp"]}}],
            r"routed layer 1 has sma for \['mlp'\] and routed layer 0 sma for \['mlp', 'conv'\]",
            id="other-modules",
        ),
        pytest.param([{"backbone": LAYER["backbone"]}], "needs layers with routed modules", id="nothing-routed"),
    ],
)
def test_layers_that_cannot_share_a_router_are_refused(layers, found):
    with pytest.raises(SpecError, match=found):
        sma.load_spec({**SPEC, "layers": layers})


def test_layers_without_routed_modules_do_not_matter():
    plain = {"backbone": LAYER["backbone"]}
    model = sma.build({**SPEC, "layers": [plain, LAYER, plain, LAYER]}, seed=0)
    assert [router.layer_index for router in routers_of(model)] == [1, 3]
    assert routers_of(model)[0].weight is routers_of(model)[1].weight
