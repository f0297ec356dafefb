"""The routed layers on which the tests of layers run."""

from typing import Any

import pytest
import torch

from sma import LayerSpec, RoutedLayer
from sma.routers import SMARouter
from tests.cases import balance, normal, spread

WIDTH = 4
GAU: dict[str, Any] = {
    "kind": "gau",
    "query_size": 2,
    "hidden_size": 3,
    "window": 2,
    "position": {"kind": "relative_bias", "max_positions": 4},
}
CAUSAL_GAU = {
    **GAU,
    "bidirectional": False,
    "attention": "relu2",
    "position": {"kind": "relative_bias", "distance": "slot_distance"},
}
LAYERS: dict[str, dict[str, Any]] = {
    "seqboat": {
        "backbone": {"kind": "ema", "state_size": 2},
        "modules": {"attention": GAU},
        "norm": {"kind": "layer_norm", "place": "post"},
    },
    "causal seqboat": {
        "backbone": {"kind": "ema", "state_size": 2, "bidirectional": False, "truncation": 3},
        "modules": {"attention": CAUSAL_GAU},
        "norm": {"kind": "rms_norm"},
        "dropout_on": "sum",
    },
    "several modules": {
        "modules": {
            "attention": {**GAU, "window": None, "attention": "laplace", "position": {"kind": "rotary"}},
            "conv": {"kind": "conv", "kernel_size": 2},
            "mlp": {"kind": "gated_mlp", "hidden_size": 3},
        },
        "norm": {"kind": "layer_norm"},
        "bypass": "identity",
        "activation": "none",
    },
    "no bypass": {
        "backbone": {"kind": "conv", "kernel_size": 3, "bidirectional": True},
        "backbone_activation": "none",
        "modules": {
            "attention": {"kind": "attention", "heads": 2, "position": {"kind": "rotary"}},
            "skip": {"kind": "identity"},
        },
        "norm": {"kind": "scale_norm", "place": "post"},
        "bypass": "none",
    },
    "bare": {"modules": {"mlp": {"kind": "gated_mlp", "hidden_size": 3}}, "bypass": "identity"},
    "always": {"router": {"kind": "always"}, "modules": {"attention": GAU}},
    "never": {"router": {"kind": "never"}, "modules": {"attention": GAU}, "norm": {"kind": "batch_norm"}},
    "no modules": {
        "backbone": {"kind": "attention", "heads": 1, "bidirectional": False},
        "norm": {"kind": "batch_norm", "place": "post"},
    },
}
layers = pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in LAYERS])
some_layers = pytest.mark.parametrize(
    "name", [pytest.param(name, id=name) for name in ("seqboat", "causal seqboat", "several modules")]
)


def make(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> RoutedLayer:
    """Build a layer with random parameters whose router has a rate between 0 and 1."""
    layer = LayerSpec.model_validate({**LAYERS[name], **changes}).build(WIDTH).to(dtype)
    spread(layer)
    if layer.routed is not None and isinstance(layer.routed.router, SMARouter):
        balance(layer.routed.router, layer(normal(3, 7, WIDTH, seed=1, dtype=dtype)).decision)
    return layer.eval()
