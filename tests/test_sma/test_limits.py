"""The limits in docs/execution.md raise errors instead of giving silently wrong results."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import sma

SPEC = {
    "kind": "sequence_classifier",
    "width": 8,
    "encoder": {"kind": "token_embedding", "vocabulary": 9},
    "layers": [
        {
            "backbone": {"kind": "ema"},
            "modules": {"attention": {"kind": "gau", "query_size": 4, "hidden_size": 8, "window": 4}},
        }
    ],
    "head": {"kind": "mean_pool_mlp", "hidden": 8, "classes": 3},
}
IDS = torch.arange(40).reshape(2, 20) % 9


def _logits(model: torch.nn.Module) -> Callable[..., Any]:
    return lambda parameters, ids=IDS: functional_call(model, parameters, (ids,)).logits


TRANSFORMS: dict[str, Callable[[torch.nn.Module, dict[str, torch.Tensor]], object]] = {
    "grad": lambda model, own: grad(lambda given: _logits(model)(given).sum())(own),
    "per-sample": lambda model, own: vmap(grad(lambda given, row: _logits(model)(given, row[None]).sum()), (None, 0))(
        own, IDS
    ),
    "jvp": lambda model, own: jvp(
        _logits(model), (own,), ({name: torch.ones_like(value) for name, value in own.items()},)
    ),
    "trace": lambda model, own: torch.jit.trace(model, IDS, strict=False),
    "script": lambda model, own: torch.jit.script(model),
    "fx": lambda model, own: torch.fx.symbolic_trace(model),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_unsupported_transforms_raise(transform: str, as_users_run: None) -> None:
    model = sma.build(SPEC, seed=0)
    with pytest.raises((RuntimeError, torch.fx.proxy.TraceError, sma.SmaError)):
        TRANSFORMS[transform](model, dict(model.named_parameters()))


def test_functional_call_and_data_parallel_on_one_device_work() -> None:
    model, other = sma.build(SPEC, seed=0), sma.build(SPEC, seed=1)
    wanted = other(IDS).logits
    assert torch.equal(_logits(model)(dict(other.named_parameters())), wanted)
    assert torch.equal(torch.nn.DataParallel(other)(IDS).logits, wanted)
