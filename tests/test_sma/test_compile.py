"""A compiled model equals the eager one; and the models of one device equal those of another."""

import pytest
import torch
from torch import nn

from sma import build, load_spec
from tests.cases import generator


def _model_and_batch() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    attention = {"kind": "gau", "query_size": 4, "hidden_size": 8, "window": 3}
    layer = {
        "backbone": {"kind": "ema", "state_size": 2},
        "router": {"kind": "sma", "temperature_scale": 0.3},
        "modules": {"attention": attention, "mlp": {"kind": "gated_mlp", "hidden_size": 8}, "conv": {"kind": "conv"}},
        "norm": {"kind": "layer_norm"},
    }
    spec = {
        "kind": "sequence_classifier",
        "width": 8,
        "encoder": {"kind": "token_embedding", "vocabulary": 9},
        "layers": {"repeat": 2, "layer": layer},
        "head": {"kind": "mean_pool_mlp", "hidden": 8, "classes": 3},
    }
    inputs = torch.randint(0, 9, (3, 20), generator=generator(0))
    return build(load_spec(spec), seed=0), inputs, torch.arange(20) < torch.tensor([20, 11, 4])[:, None]


def _logits_and_gradients(model: nn.Module, inputs: torch.Tensor, valid: torch.Tensor) -> list[torch.Tensor]:
    logits = model(inputs, valid).logits
    return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]


@pytest.mark.slow
def test_a_compiled_model_equals_the_eager_one():
    model, inputs, valid = _model_and_batch()
    expected = _logits_and_gradients(model, inputs, valid)
    compiled = torch.compile(model, dynamic=True)
    torch.testing.assert_close(_logits_and_gradients(compiled, inputs, valid), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_logits_and_gradients(compiled, inputs.flip(1), valid), _logits_and_gradients(model, inputs.flip(1), valid))


@pytest.mark.gpu
def test_a_model_on_a_gpu_equals_the_one_on_the_cpu():
    model, inputs, valid = _model_and_batch()
    expected = _logits_and_gradients(model, inputs, valid)
    found = _logits_and_gradients(model.cuda(), inputs.cuda(), valid.cuda())
    torch.testing.assert_close([tensor.cpu() for tensor in found], expected, rtol=1e-3, atol=1e-4)
