"""Activation checkpointing: the same gradients in less memory, with the recorded decision."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sma import SequenceModel, build
from sma.routers import Router
from tests.cases import generator, gradients, normal, spread
from tests.test_sma.layers import LAYERS, WIDTH, layers, make

CAUSAL = {**LAYERS["causal seqboat"], "dropout": 0.2}
MODEL: dict[str, Any] = {
    "kind": "sequence_classifier",
    "width": WIDTH,
    "encoder": {"kind": "linear", "features": 2},
    "layers": [CAUSAL, LAYERS["several modules"], {**LAYERS["seqboat"], "dropout": 0.2}],
    "head": {"kind": "mean_pool_linear", "classes": 3},
}


class Jittering(Router):
    """A router whose decisions differ between calls, like those of a nondeterministic operator."""

    def __init__(self, router: Router) -> None:
        super().__init__(router.names)
        self.router, self.calls = router, 0

    def forward(self, control_BLD, valid=None, positions=None, state=None):
        self.calls += 1
        shift = 3 * normal(*control_BLD.shape[:2], 1, seed=self.calls, dtype=control_BLD.dtype)
        return self.router(control_BLD + shift, valid, positions, state)


def _model(spec: dict[str, Any] = MODEL) -> SequenceModel:
    model = build(spec, seed=0).double().train()
    spread(model)
    for layer in model.routed_layers:
        if layer.routed is not None:
            layer.routed.router = Jittering(layer.routed.router)
    return model


def _loss_and_gradients(model: SequenceModel, x: Tensor, valid: Tensor, **options: Any) -> list[Tensor]:
    torch.manual_seed(1)  # for dropout
    output = model(x, valid, **options)
    result = output.pooled if output.logits is None else output.logits
    return [result, *gradients(result, model.parameters())]


@pytest.mark.parametrize("capacity", [None, 2])
def test_gradients_are_the_same_with_dropout_and_a_nondeterministic_router(capacity):
    plain, saving = _model(), _model().recompute_activations()
    x, valid = normal(3, 9, 2), torch.rand(3, 9, generator=generator(1)) < 0.8
    wanted = _loss_and_gradients(plain, x, valid, capacity=capacity)
    found = _loss_and_gradients(saving, x, valid, capacity=capacity)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert [layer.routed.router.calls for layer in saving.routed_layers] == [1, 1, 1]


def test_the_router_of_these_tests_is_nondeterministic():
    model, x = _model().eval(), normal(3, 9, 2)
    assert not torch.equal(model(x).decisions[0].active, model(x).decisions[0].active)


@layers
def test_a_layer_gives_bit_equal_results(name):
    x, valid = normal(3, 7, WIDTH), torch.rand(3, 7, generator=generator(1)) < 0.8
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        layer = make(name, dropout=0.3).train()
        layer.recompute = recompute
        inputs = x.clone().requires_grad_()
        hidden = layer(inputs, valid).hidden.where(valid[..., None], 0)
        found = torch.autograd.grad(hidden.square().sum(), [inputs, *layer.parameters()], materialize_grads=True)
        results.append([hidden, *found, *layer.buffers()])  # batch norm must count the batch once
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("place", ["pre", "post"])
def test_batch_norm_counts_a_batch_once(place):
    layer = make("seqboat", norm={"kind": "batch_norm", "place": place, "momentum": 1.0}).train()
    layer.recompute = True
    before = copy.deepcopy(layer)
    x = normal(3, 7, WIDTH)
    layer(x).hidden.sum().backward()
    before(x)
    assert torch.equal(layer.norm.running_mean, before.norm.running_mean)
    assert layer.norm.running_mean.any()


def test_a_stream_continues_and_its_gradients_are_the_same():
    spec = {**MODEL, "layers": [CAUSAL, CAUSAL]}
    results = []
    for recompute in (False, True):
        model = _model(spec).recompute_activations(recompute)
        state, total = model.init_state(2, dtype=torch.float64), []
        torch.manual_seed(1)
        for chunk in normal(2, 9, 2).split([4, 1, 4], 1):
            output = model(chunk, state=state)
            state = output.state
            total.append(output.hidden)
        hidden = torch.cat(total, 1)
        results.append(
            [hidden, *torch.autograd.grad(hidden.square().sum(), list(model.parameters()), materialize_grads=True)]
        )
        assert [layer.routed.router.calls for layer in model.routed_layers] == [3, 3]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def _saved_bytes(run: Callable[[], object]) -> int:
    """Bytes of the distinct storages that are kept for backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = [run()]
        total = sum(kept.values())
        results.clear()  # only now: freed storages would be reused at the same address
    return total


def test_less_memory_is_kept_for_backward():
    wide = {"kind": "gau", "query_size": 16, "hidden_size": 64, "window": 32}
    layer = {
        "backbone": {"kind": "ema", "state_size": 4},
        "modules": {"attention": wide, "mlp": {"kind": "gated_mlp", "hidden_size": 64}},
    }
    model = build(
        {**MODEL, "width": 32, "layers": {"repeat": 3, "layer": {**layer, "norm": {"kind": "layer_norm"}}}}, seed=0
    )
    x = normal(2, 256, 2, dtype=torch.float32)
    sizes = [_saved_bytes(lambda enabled=enabled: model.recompute_activations(enabled)(x)) for enabled in (False, True)]
    assert sizes[1] < sizes[0] / 3


def test_nothing_is_recomputed_if_no_gradient_is_required():
    model = _model().recompute_activations()
    x = normal(2, 5, 2)
    with torch.no_grad():
        assert not model(x).logits.requires_grad
    assert model.recompute_activations(False) is model
    assert not any(layer.recompute for layer in model.routed_layers)
