"""The sub-module that returns its tokens."""

import pytest
import torch

from sma.errors import SpecError
from sma.modules.identity import IdentitySpec
from sma.submodule import MACs
from tests.test_modules.layouts import LAYOUTS, Layout, first, grad, lay, run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_identity_returns_its_tokens(dtype: torch.dtype, layout: Layout) -> None:
    x, active = torch.randn(3, 4, 2).to(dtype), first([4, 0, 2], 4)
    out = run(IdentitySpec().build(2), x, active, layout)
    assert out.dtype is dtype
    assert torch.equal(out, x.where(active[..., None], 0))


def test_identity_passes_gradients_through() -> None:
    x = torch.randn(2, 3, 2, requires_grad=True)
    incoming = torch.randn(6, 2)
    IdentitySpec().build(2)(lay(x, first([3, 3], 3), "packed"))[0].backward(incoming)
    assert torch.equal(grad(x), incoming.unflatten(0, (2, 3)))


def test_identity_costs_nothing() -> None:
    assert IdentitySpec().macs(64, 1000) == MACs()
    assert list(IdentitySpec().build(64).parameters()) == []


def test_identity_takes_no_settings() -> None:
    with pytest.raises(SpecError, match="IdentitySpec: unknown field 'width'"):
        IdentitySpec.model_validate({"width": 3})
