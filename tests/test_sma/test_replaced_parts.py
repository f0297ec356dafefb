"""Models with quantised, parametrised or adapter-wrapped linear maps: no part may read the weights of another."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sma
from sma.errors import CheckpointError
from sma.interop.seqboat import from_reference, to_reference
from sma.model import SequenceModel
from sma.submodule import device_and_dtype, floating_dtype
from tests.test_interop.test_seqboat import recorded

MODULES: dict[str, dict[str, Any]] = {
    "gau": {"kind": "gau", "query_size": 4, "hidden_size": 8, "window": 4, "bidirectional": False},
    "chunked": {"kind": "chunked_gau", "query_size": 4, "hidden_size": 8, "window": 4, "bidirectional": False},
    "attention": {"kind": "attention", "heads": 2, "bidirectional": False, "position": {"kind": "rotary"}},
    "local": {"kind": "local_attention", "heads": 2, "window": 3, "bidirectional": False},
    "mlp": {"kind": "gated_mlp", "hidden_size": 8},
    "s4d": {"kind": "s4d", "state_size": 4, "bidirectional": False},
    "conv": {"kind": "conv"},
}


def _model(modules: dict[str, Any] = MODULES, router: str = "always") -> SequenceModel:
    layer = {
        "backbone": {"kind": "ema", "bidirectional": False, "state_size": 4},
        "router": {"kind": router},
        "modules": modules,
    }
    spec = {
        "kind": "sequence_classifier",
        "width": 8,
        "encoder": {"kind": "linear", "features": 3},
        "layers": [layer],
        "head": {"kind": "mean_pool_mlp", "hidden": 6, "classes": 3},
    }
    return sma.build(spec, seed=0).eval()


class Adapter(nn.Module):
    """A low-rank adapter that exposes no attribute of the map that it wraps."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, linear.in_features, dtype=linear.weight.dtype))
        self.up = nn.Parameter(torch.zeros(linear.out_features, 2, dtype=linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.down.T @ self.up.T
        return out


class Packed(nn.Module):
    """A map with an integer weight, as in weight-only quantisation."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.get_buffer("weight").to(x.dtype) * self.get_buffer("scale").to(x.dtype)).T


def _replaced(model: SequenceModel, make: Callable[[nn.Linear], nn.Module]) -> SequenceModel:
    for part in list(model.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.Linear):
                setattr(part, name, make(child))
    return model


def _quantised(model: SequenceModel) -> SequenceModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: SequenceModel = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return found


REPLACEMENTS: dict[str, Callable[[SequenceModel], SequenceModel]] = {
    "quantised": _quantised,
    "parametrised": lambda model: _replaced(model, nn.utils.parametrizations.weight_norm),
    "adapted": lambda model: _replaced(model, Adapter),
    "packed": lambda model: _replaced(model, Packed),
}
every_replacement = pytest.mark.parametrize("name", REPLACEMENTS)
X = torch.randn(2, 9, 3)
VALID = torch.arange(9) < torch.tensor([[9], [5]])


def _stream(model: SequenceModel, valid: Tensor) -> Tensor:
    state, logits = model.init_state(2), torch.empty(0)
    for start in (0, 4, 8):
        output = model(X[:, start : start + 4], valid[:, start : start + 4], state)
        state, logits = output.state, output.logits
    return logits


@every_replacement
@torch.no_grad()
def test_a_model_with_replaced_maps_runs_and_streams(name):
    whole = _model()
    model = REPLACEMENTS[name](copy.deepcopy(whole))
    logits = model(X, VALID).logits
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, whole(X, VALID).logits, atol=0.2, rtol=0.2)
    if name not in ("quantised", "packed"):
        torch.testing.assert_close(logits, whole(X, VALID).logits)
        torch.testing.assert_close(_stream(model, VALID), logits)
    assert _stream(model, VALID).isfinite().all()


# Quantised maps of torch accept float32 only.
@pytest.mark.parametrize("name", sorted(REPLACEMENTS.keys() - {"quantised"}))
def test_autocast_never_lowers_the_precision_of_the_residual_stream(name):
    model = REPLACEMENTS[name](_model())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(X, VALID).hidden.dtype is torch.float32


@every_replacement
def test_replaced_maps_run_without_active_tokens(name):
    model = REPLACEMENTS[name](_model(router="never"))
    assert model(X, VALID).logits.isfinite().all()
    with torch.no_grad():
        assert _stream(model, VALID).isfinite().all()


@every_replacement
def test_states_and_random_inputs_have_a_floating_dtype(name):
    model = REPLACEMENTS[name](_model())
    for tensor in sma.pytree.tensors(model.init_state(2)):
        assert not tensor.dtype.is_floating_point or tensor.dtype in (torch.float32, torch.float64)
    assert model.encoder.random_inputs(2, 3).dtype is torch.float32


def test_the_first_floating_tensor_defines_the_dtype_and_the_first_tensor_the_device():
    mixed = nn.Module()
    mixed.register_parameter("packed", nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    assert floating_dtype(mixed) is None
    assert device_and_dtype(mixed, None, None) == (torch.device("cpu"), torch.float32)
    mixed.register_buffer("scale", torch.zeros(2, dtype=torch.bfloat16))
    assert device_and_dtype(mixed, None, None)[1] is torch.bfloat16
    only_buffers = nn.Module()
    only_buffers.register_buffer("scale", torch.zeros(2, device="meta", dtype=torch.float64))
    assert device_and_dtype(only_buffers, None, None) == (torch.device("meta"), torch.float64)


def test_packed_weights_cannot_be_converted_to_the_reference():
    case = recorded("causal_softmax_rotary")
    layer = from_reference(case.info["kind"], case.info["config"], case.weights())
    with pytest.raises(
        CheckpointError, match=r"^the part of 'mx_proj\.weight' was replaced by one that packs its weights"
    ):
        to_reference(_quantised(layer))
