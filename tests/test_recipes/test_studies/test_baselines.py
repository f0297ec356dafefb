"""Baselines of SeqBoat: layers, parameters, and experiments that have none."""

import json

import pytest
import torch

from sma.errors import SpecError
from sma.ragged import rectangular
from sma.recipes.experiment import RoutingLosses, load_experiment
from sma.recipes.studies.baselines import BASELINES, baseline, with_parameters
from sma.routers import AlwaysRouterSpec
from tests.test_recipes.tiny import EXPERIMENT, tiny


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("preset", ["listops_tiny", "text_paper", "retrieval_paper", "image_paper", "pathfinder_tiny"])
def test_baseline_builds_with_the_predicted_parameters_and_differs_only_in_its_layers(preset, name):
    spec = load_experiment(preset)
    made = baseline(name, spec)
    assert sum(parameter.numel() for parameter in made.model.build().parameters()) == made.model.num_parameters()
    assert made.model.replace(layers=spec.model.layers) == spec.model
    expected = spec.training
    if name not in ("seqboat", "seqboat_full"):
        expected = expected.replace(budget=None, losses=RoutingLosses(), router_learning_rate=None)
    training = made.training.replace(learning_rate=spec.training.learning_rate)
    assert (made.task, training, made.seed) == (spec.task, expected, spec.seed)
    assert load_experiment(json.loads(made.model_dump_json())) == made


def test_baselines_have_the_expected_layers():
    spec = tiny(training__budget="{target: 0.3}", training__updates=200, training__losses="{z: 0.1}")
    layers = {name: baseline(name, spec).model.layer_specs for name in BASELINES}
    assert baseline("seqboat", spec) == spec
    assert [layer.modules["attention"].window for layer in layers["seqboat_full"]] == [None, None]
    assert [(layer.router.kind, layer.modules["attention"].window) for layer in layers["mega_chunk"]] == [
        ("always", 8)
    ] * 2
    assert [layer.router.kind for layer in layers["always"]] == ["always"] * 2
    assert [layer.modules for layer in layers["always"]] == [layer.modules for layer in layers["seqboat"]]
    assert {layer.modules["attention"].kind for layer in layers["mega_chunk"]} == {"chunked_gau"}
    assert [(layer.backbone.kind, dict(layer.modules)) for layer in layers["ema"]] == [("ema", {})] * 2
    assert [(layer.backbone.kind, dict(layer.modules)) for layer in layers["s4d"]] == [("s4d", {})] * 2
    assert [layer.backbone.kind for layer in layers["transformer"]] == ["attention", "gated_mlp"] * 2
    assert [layer.backbone.kind for layer in layers["local_attention"]] == ["local_attention", "gated_mlp"] * 2
    for name in set(BASELINES) - {"seqboat", "seqboat_full"}:  # no budget and no router loss remain
        training = baseline(name, spec).training
        assert (training.budget, training.losses.z) == (None, 0.0)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("width", [24, 30, 40])
def test_equal_parameters_come_from_the_nearest_width(name, width):
    spec = load_experiment("mqar_tiny", [f"model.width={width}"])
    asked = spec.model.num_parameters()
    widths = [spec.replace(model=spec.model.replace(width=each)) for each in (width, *range(4, 400, 4))]
    sizes = [baseline(name, each).model.num_parameters() for each in widths]
    made = with_parameters(name, spec)
    assert abs(made.model.num_parameters() - asked) == min(abs(size - asked) for size in sizes)
    assert made.replace(model=baseline(name, spec).model) == baseline(name, spec)
    assert with_parameters("seqboat", spec) == spec


def test_a_layer_without_attention_keeps_its_place():
    spec = load_experiment("pathfinder_tiny")
    backbone, routed = spec.model.layer_specs
    layers = {name: baseline(name, spec).model.layer_specs for name in BASELINES}
    for name in ("always", "mega_chunk", "seqboat_full", "seqboat", "ema"):
        assert len(layers[name]) == 2
        assert layers[name][0] == backbone
    assert layers["always"][1] == routed.replace(router=AlwaysRouterSpec())
    assert [layer.backbone.kind for layer in layers["s4d"]] == ["s4d"] * 2
    assert [layer.backbone.kind for layer in layers["local_attention"]] == ["local_attention", "gated_mlp"] * 2
    assert {layer.backbone.window for layer in layers["local_attention"][::2]} == {routed.modules["attention"].window}


@pytest.mark.parametrize("name", BASELINES)
def test_a_shared_router_is_dropped_where_no_layer_is_routed(name):
    spec = load_experiment("mqar_tiny", ["shared_router=true"])
    made = baseline(name, spec).model
    assert made.shared_router == any(layer.modules for layer in made.layer_specs)
    assert sum(parameter.numel() for parameter in made.build().parameters()) == made.num_parameters()


def test_mega_chunk_applies_the_always_active_unit_to_fixed_chunks():
    spec = tiny()
    model = baseline("mega_chunk", spec).model.build().eval()
    unit = model.routed_layers[0].routed.submodules["attention"]
    x = torch.randn(1, 20, 8)
    whole = unit(rectangular(x))[0]
    parts = torch.cat([unit.unit(rectangular(x[:, start : start + 8]))[0] for start in (0, 8, 16)])
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("transfomer", [], "unknown model 'transfomer'; did you mean 'transformer'"),
        (
            "ema",
            ["layers.layer.modules={mlp: {kind: gated_mlp, hidden_size: 4}}"],
            "layer 0 of the experiment must be a SeqBoat layer",
        ),
        ("ema", ["layers.layer.backbone=null"], "layer 0 of the experiment must be a SeqBoat layer"),
        ("always", ["layers.layer.modules={}"], "no layer of the experiment has a routed attention"),
    ],
)
def test_baselines_that_cannot_be_built_are_refused(name, settings, complaint):
    with pytest.raises(SpecError, match=complaint):
        baseline(name, load_experiment(EXPERIMENT, settings))


def test_baselines_without_stochastic_routers_have_no_policy_gradient():
    spec = tiny(layers__layer__router="{kind: bernoulli}", training__losses="{policy: 1.0}")
    policies = {name: baseline(name, spec).training.losses.policy for name in BASELINES}
    assert policies == {name: 1.0 if name in ("seqboat", "seqboat_full") else 0.0 for name in BASELINES}
