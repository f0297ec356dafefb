"""Outputs are pytrees, as torch.export, compile and vmap require."""

from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch.utils import _pytree

from sma import Decision, LayerSpec, ModelOutput, Ragged, RoutedOutput, State, build, compress
from sma.layer import LayerOutput
from sma.pytree import map_tensors, register_output
from sma.ragged import rectangular
from sma.routers import RandomRouterSpec, SMARouterSpec
from tests.cases import normal

MODEL = {
    "kind": "sequence_classifier",
    "width": 4,
    "encoder": {"kind": "linear", "features": 3},
    "layers": [{"modules": {"mlp": {"kind": "gated_mlp", "hidden_size": 2}}}],
    "head": {"kind": "mean_pool_linear", "classes": 2},
}


def _decision() -> Decision:
    return SMARouterSpec().build(4, ["a", "b"])(normal(2, 3, 4))[0]


OUTPUTS = pytest.mark.parametrize(
    ("make", "tensors"),
    [
        pytest.param(lambda: compress(normal(2, 3, 4), torch.eye(2, 3).bool()), 6, id="Ragged"),
        pytest.param(lambda: rectangular(normal(2, 3, 4), torch.tensor([1, 2])), 6, id="rectangular Ragged"),
        pytest.param(_decision, 4, id="Decision"),
        pytest.param(lambda: RoutedOutput(normal(2, 3, 4), _decision()), 5, id="RoutedOutput"),
        pytest.param(
            lambda: LayerSpec.model_validate({"modules": {"i": {"kind": "identity"}}}).build(4)(
                normal(2, 3, 4).float()
            ),
            5,
            id="LayerOutput",
        ),
        pytest.param(lambda: LayerSpec().build(4)(normal(2, 3, 4).float()), 1, id="LayerOutput without a decision"),
        pytest.param(lambda: build(MODEL, 0)(normal(2, 3, 3).float()), 7, id="ModelOutput"),
    ],
)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple) and one and isinstance(one[0], Decision):
        return all(_equal(*pair) for pair in zip(one, other, strict=True))
    if type(one) in (Decision, Ragged, RoutedOutput, LayerOutput, ModelOutput):
        return type(one) is type(other) and all(
            _equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)
        )
    return one == other


@OUTPUTS
def test_unflatten_undoes_flatten(make, tensors):
    value = make()
    leaves, tree = _pytree.tree_flatten(value)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == tensors
    assert _equal(_pytree.tree_unflatten(leaves, tree), value)


@OUTPUTS
def test_structure_survives_serialisation(make, tensors):
    """torch.export writes the structure of the output of a model into its file."""
    tree = _pytree.tree_structure(make())
    assert _pytree.treespec_loads(_pytree.treespec_dumps(tree)) == tree


@OUTPUTS
def test_leaves_are_named_by_their_fields(make, tensors):
    value = make()
    names = [
        _pytree.keystr(path)
        for path, leaf in _pytree.tree_flatten_with_path(value)[0]
        if isinstance(leaf, torch.Tensor)
    ]
    assert len(set(names)) == tensors
    assert {name.split(".")[1].split("[")[0] for name in names} <= {field.name for field in fields(value)}


@OUTPUTS
def test_leaves_need_not_be_tensors(make, tensors):
    names = _pytree.tree_map(lambda leaf: "x", make())
    assert set(_pytree.tree_leaves(names)) == {"x"}


@OUTPUTS
def test_outputs_are_frozen(make, tensors):
    value = make()
    name = fields(value)[0].name
    with pytest.raises(FrozenInstanceError, match=f"cannot assign to field '{name}'"):
        setattr(value, name, None)


def test_names_and_layout_are_structure_not_leaves():
    tokens, decision = rectangular(normal(2, 3, 4)), _decision()
    assert _pytree.tree_structure(tokens) != _pytree.tree_structure(replace(tokens, stride=None))
    assert _pytree.tree_structure(tokens) != _pytree.tree_structure(replace(tokens, holes=True))
    assert _pytree.tree_structure(decision) != _pytree.tree_structure(replace(decision, names=("b", "a")))


def test_map_tensors_maps_every_tensor_and_keeps_the_rest():
    output = build(MODEL, 0)(normal(2, 3, 3).float())
    wide = map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, output)
    assert wide.hidden.dtype == wide.logits.dtype == wide.decisions[0].confidence.dtype == torch.float64
    assert wide.decisions[0].active.dtype == torch.bool
    assert (wide.decisions[0].names, wide.state) == (("mlp",), None)


@register_output
@dataclass(frozen=True)
class _Count(State):
    seen: torch.Tensor


def test_state_can_select_rows_detach_and_move():
    state = _Count(normal(3, 2).requires_grad_() * 2)
    assert torch.equal(state.select(torch.tensor([2, 0, 2])).seen, state.seen[[2, 0, 2]])
    assert type(state.select(torch.tensor([1]))) is _Count
    assert state.seen.requires_grad
    assert not state.detach().seen.requires_grad
    assert state.to("meta").seen.device.type == "meta"


def test_vmap_maps_over_a_decision():
    router = RandomRouterSpec(rate=0.5).build(4, ["a"])
    decision = router(normal(2, 3, 4))[0]
    flipped = torch.vmap(lambda part: map_tensors(lambda tensor: tensor.flip(0), part))(decision)
    assert torch.equal(flipped.p_on, decision.p_on.flip(1))
    assert torch.equal(flipped.active, decision.active.flip(1))
    assert flipped.names == ("a",)
