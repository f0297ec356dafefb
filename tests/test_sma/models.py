"""Small models of every form, on which the tests of models run."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from sma import SequenceModel, build
from sma.routers import SMARouter
from tests.cases import balance, generator, normal, spread

GAU = {
    "kind": "gau",
    "query_size": 2,
    "hidden_size": 3,
    "window": 2,
    "position": {"kind": "relative_bias", "max_positions": 4},
}
SEQBOAT = {
    "backbone": {"kind": "ema", "state_size": 2},
    "modules": {"attention": GAU},
    "norm": {"kind": "layer_norm", "place": "post"},
}
CAUSAL = {
    "backbone": {"kind": "ema", "state_size": 2, "bidirectional": False},
    "modules": {"attention": {**GAU, "bidirectional": False}, "conv": {"kind": "conv"}},
    "norm": {"kind": "rms_norm"},
}
TOKENS = {"kind": "token_embedding", "vocabulary": 7, "padding": 0}
MODELS: dict[str, dict[str, Any]] = {
    "classifier": {
        "kind": "sequence_classifier",
        "width": 4,
        "encoder": TOKENS,
        "sinusoid": True,
        "layers": {"repeat": 2, "layer": SEQBOAT},
        "head": {"kind": "mean_pool_mlp", "hidden": 3, "classes": 3},
    },
    "causal encoder": {
        "kind": "sequence_encoder",
        "width": 4,
        "encoder": {"kind": "real_number"},
        "layers": [CAUSAL, {}, CAUSAL],
    },
    "features": {
        "kind": "sequence_classifier",
        "width": 4,
        "encoder": {"kind": "linear", "features": 2},
        "layers": [
            {"backbone": {"kind": "attention", "heads": 2}, "modules": {"mlp": {"kind": "gated_mlp", "hidden_size": 3}}}
        ],
        "head": {"kind": "mean_pool_linear", "classes": 2},
    },
    "no layers": {
        "kind": "sequence_classifier",
        "width": 4,
        "encoder": TOKENS,
        "layers": [],
        "final_norm": {"kind": "scale_norm"},
        "head": {"kind": "mean_pool_linear", "classes": 2},
    },
}
models = pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in MODELS])


def make_model(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> SequenceModel:
    model = build({**MODELS[name], **changes}, seed=0).to(dtype)
    spread(model)
    routers = [layer.routed.router for layer in model.routed_layers if layer.routed is not None]
    for index, router in enumerate(routers):
        assert isinstance(router, SMARouter)
        balance(router, model(inputs_of(name, 3, 6, dtype=dtype)).decisions[index])
    return model.eval()


model_of = functools.cache(make_model)  # for tests that only run it


def inputs_of(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    if batch_is_real(name):
        return normal(*shape, *([2] if name == "features" else []), seed=5, dtype=dtype)
    return torch.randint(1, 7, shape, generator=generator(5))


def batch_is_real(name: str) -> bool:
    return MODELS[name]["encoder"]["kind"] != "token_embedding"
