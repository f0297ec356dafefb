"""Causal models for the laws of streams, which contain every causal kind of sub-module, router, norm and encoder."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma import SequenceModel, build
from sma.layer import RoutedLayer
from sma.modules.ema import EMA
from sma.norms import BatchNorm
from sma.routers import SMARouter
from tests.cases import balance, generator, normal, spread

WIDTH, FEATURES, VOCABULARY = 4, 2, 7
GAU: dict[str, Any] = {"kind": "gau", "query_size": 2, "hidden_size": 3, "window": 2, "bidirectional": False}
EMA_BACKBONE: dict[str, Any] = {"kind": "ema", "state_size": 2, "bidirectional": False}
SEQBOAT = {
    "backbone": {**EMA_BACKBONE, "truncation": 3},
    "modules": {
        "attention": {**GAU, "attention": "relu2", "position": {"kind": "relative_bias", "distance": "slot_distance"}}
    },
    "norm": {"kind": "rms_norm"},
    "dropout_on": "sum",
}
EVERYTHING = {
    "backbone": EMA_BACKBONE,
    "modules": {
        "all": {
            **GAU,
            "window": None,
            "attention": "laplace",
            "position": {"kind": "relative_bias", "max_positions": 4},
        },
        "heads": {"kind": "attention", "heads": 2, "bidirectional": False, "position": {"kind": "rotary"}},
        "conv": {"kind": "conv", "kernel_size": 3},
        "mlp": {"kind": "gated_mlp", "hidden_size": 3},
        "skip": {"kind": "identity"},
    },
    "norm": {"kind": "batch_norm", "place": "post"},
    "bypass": "identity",
}
DRAWN = {
    "backbone": {"kind": "conv", "kernel_size": 2},
    "router": {"kind": "random", "rate": 0.5, "seed": 3},
    "modules": {"attention": {**GAU, "position": {"kind": "rotary"}}, "average": {**EMA_BACKBONE, "truncation": 2}},
    "norm": {"kind": "scale_norm", "place": "post"},
    "bypass": "none",
}
PLAIN = {
    "backbone": {"kind": "attention", "heads": 1, "bidirectional": False},
    "norm": {"kind": "layer_norm"},
    "activation": "none",
}
TOKENS = {"kind": "token_embedding", "vocabulary": VOCABULARY, "padding": 0}
CAUSAL: dict[str, dict[str, Any]] = {
    "seqboat": {
        "kind": "sequence_classifier",
        "width": WIDTH,
        "encoder": TOKENS,
        "sinusoid": True,
        "layers": {"repeat": 2, "layer": SEQBOAT},
        "head": {"kind": "mean_pool_mlp", "hidden": 3, "classes": 3},
    },
    "everything": {
        "kind": "sequence_encoder",
        "width": WIDTH,
        "encoder": {"kind": "linear", "features": FEATURES},
        "layers": [EVERYTHING, PLAIN],
        "final_norm": {"kind": "batch_norm"},
    },
    "drawn": {
        "kind": "sequence_classifier",
        "width": WIDTH,
        "encoder": {"kind": "real_number"},
        "sinusoid": True,
        "layers": [DRAWN, {**SEQBOAT, "router": {"kind": "always"}}, {**SEQBOAT, "router": {"kind": "never"}}],
        "head": {"kind": "mean_pool_linear", "classes": 2},
    },
    "language model": {"kind": "language_model", "width": WIDTH, "encoder": TOKENS, "layers": [SEQBOAT]},
    "no layers": {"kind": "sequence_encoder", "width": WIDTH, "encoder": TOKENS, "layers": []},
}
WINDOWED = ["seqboat", "drawn", "language model", "no layers"]
causal_models = pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in CAUSAL])
LAYERS = {"seqboat": SEQBOAT, "everything": EVERYTHING, "drawn": DRAWN, "plain": PLAIN}
causal_layers = pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in LAYERS.items()])


def far_from_the_start(part: nn.Module) -> None:
    """Draw parameters and running statistics; delta and alpha get a standard deviation of 2."""
    spread(part)
    source = generator(4)
    with torch.no_grad():
        for module in part.modules():
            if isinstance(module, EMA):
                module.delta.mul_(3)
                module.alpha.mul_(3)
            if isinstance(module, BatchNorm):
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=source))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=source))


def make_model(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> SequenceModel:
    """A causal model in evaluation mode whose routers have rates between 0 and 1."""
    model = build({**CAUSAL[name], **changes}, seed=0).to(dtype).eval()
    far_from_the_start(model)
    for index, layer in enumerate([layer for layer in model.routed_layers if layer.routed is not None]):
        router = layer.routed.router
        if isinstance(router, SMARouter):
            balance(router, model(inputs_of(model, 3, 12, dtype=dtype)).decisions[index])
            with torch.no_grad():  # sharper scores, so that a different decision changes the results
                router.log_temperature -= 2
    return model


model_of = functools.cache(make_model)  # for tests that only run it


def make_layer(spec: dict[str, Any]) -> RoutedLayer:
    """A causal layer in evaluation mode whose router has a rate between 0 and 1."""
    model = build({"kind": "sequence_encoder", "width": WIDTH, "encoder": TOKENS, "layers": [spec]}, seed=0)
    layer = model.routed_layers[0].double().eval()
    far_from_the_start(layer)
    if layer.routed is not None and isinstance(layer.routed.router, SMARouter):
        balance(layer.routed.router, layer(normal(3, 12, WIDTH, seed=1)).decision)
    return layer


def inputs_of(model: SequenceModel, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs of a model: ids or numbers, `(B, L)` or `(B, L, F)`."""
    kind = model.spec.encoder.kind
    if kind == "token_embedding":
        return torch.randint(1, VOCABULARY, shape, generator=generator(5))
    return normal(*shape, *([FEATURES] if kind == "linear" else []), seed=5, dtype=dtype)
