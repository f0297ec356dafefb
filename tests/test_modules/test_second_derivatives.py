"""Second derivatives are right or refused, never silently wrong."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import sma
from sma.errors import InputError
from sma.submodule import SubModuleSpec
from tests.cases import normal, spread
from tests.test_modules.layouts import LAYOUTS, Layout, first, lay
from tests.test_modules.zoo import SPECS, WIDTH, make

WITHOUT = ("sliding-window attention", "the long convolution", "the scan of an ema")
SLICED = "derivative for aten::_scaled_dot_product"


def _refused(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> str:
    """Compare Hessian-vector products with differences of gradients; return the error message if they are refused."""
    directions = [normal(*parameter.shape, seed=place) for place, parameter in enumerate(parameters)]
    try:
        gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
        along = [(gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True)]
        found = torch.autograd.grad(torch.stack(along).sum(), parameters, allow_unused=True)
    except (InputError, RuntimeError) as error:
        return str(error)
    sides = []
    step = 1e-6
    for side in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=side * step)
        sides.append(torch.autograd.grad(loss(), parameters))
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(direction, alpha=side * step)
    for product, after, before in zip(found, *sides, strict=True):
        wanted = (after - before) / (2 * step)
        torch.testing.assert_close(
            torch.zeros_like(wanted) if product is None else product, wanted, rtol=1e-5, atol=1e-5
        )
    return ""


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in SPECS.items()])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivatives_of_a_sub_module_are_right_or_refused(spec: SubModuleSpec, layout: Layout) -> None:
    module = make(spec)
    x = normal(2, 12, WIDTH).requires_grad_()
    active = first([12, 5], 12)
    message = _refused(lambda: module(lay(x, active, layout))[0].pow(3).sum(), [x, *module.parameters()])
    assert not message or message.startswith((*WITHOUT, SLICED)), message


MLP = {"mlp": {"kind": "gated_mlp", "hidden_size": 4}}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        pytest.param({"backbone": {"kind": "ema", "bidirectional": False}, "modules": MLP}, WITHOUT[2], id="causal"),
        pytest.param({"modules": MLP, "norm": {"kind": "layer_norm"}}, "", id="no backbone"),
        pytest.param({"backbone": {"kind": "ema"}}, WITHOUT[2], id="both ways"),
        pytest.param(
            {"modules": {"attention": {"kind": "gau", "query_size": 4, "hidden_size": 4, "window": 2}}},
            WITHOUT[0],
            id="window",
        ),
    ],
)
def test_second_derivatives_of_a_model_are_right_or_refused(layer: dict[str, object], message: str) -> None:
    spec = {
        "kind": "sequence_classifier",
        "width": 4,
        "encoder": {"kind": "token_embedding", "vocabulary": 9},
        "layers": [layer],
    }
    model = spread(sma.build({**spec, "head": {"kind": "mean_pool_mlp", "hidden": 4, "classes": 3}}, seed=0).double())
    ids = torch.arange(24).reshape(2, 12) % 9
    found = _refused(lambda: model(ids).logits.pow(2).sum(), list(model.parameters()))
    assert found.startswith(message) if message else found == ""
