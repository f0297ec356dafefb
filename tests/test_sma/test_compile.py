"""A compiled model equals the eager one; and the models of one device equal those of another."""

import subprocess
import sys
from pathlib import Path

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
@pytest.mark.timeout(900)
def test_a_compiled_model_equals_the_eager_one():
    # In a process of its own: the suite's shape checker wraps every function, and torch.compile cannot look through it.
    folder = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-m", "tests.test_sma.test_compile"], cwd=folder, capture_output=True, text=True, timeout=800)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.gpu
def test_a_model_on_a_gpu_equals_the_one_on_the_cpu():
    model, inputs, valid = _model_and_batch()
    expected = _logits_and_gradients(model, inputs, valid)
    found = _logits_and_gradients(model.cuda(), inputs.cuda(), valid.cuda())
    torch.testing.assert_close([tensor.cpu() for tensor in found], expected, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    eager, ids, mask = _model_and_batch()
    compiled = torch.compile(eager, dynamic=True)
    for batch in (ids, ids.flip(1)):
        found, wanted = _logits_and_gradients(compiled, batch, mask), _logits_and_gradients(eager, batch, mask)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    print("equal")
