"""The look at the sums, and attention that may not look: what is compiled, or captured in a CUDA graph."""

import pytest
import torch

import sma.modules.finite
from sma.modules.finite import all_finite
from tests.test_modules import zoo
from tests.test_modules.layouts import LAYOUTS, Layout, first, run
from tests.test_modules.zoo import SPECS, WIDTH

ATTENTIONS = [name for name in SPECS if name.split("-")[0] in ("attention", "local", "gau", "chunked")]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_is_found_in_any_tensor(bad: float) -> None:
    good, other = torch.ones(2, 3), torch.zeros(4)
    assert all_finite(good, other)
    assert all_finite(torch.empty(0))
    other[1] = bad
    assert not all_finite(good, other)
    assert not all_finite(other, good)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [0.0, torch.nan])
def test_attention_that_may_not_look_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, layout: Layout, bad: float
) -> None:
    torch.manual_seed(0)
    x, active = torch.randn(3, 14, WIDTH, dtype=torch.float64), first([14, 0, 5], 14)
    x[0, 6] += bad
    module = zoo.make(SPECS[name])
    wanted = run(module, x, active, layout)
    monkeypatch.setattr(sma.modules.finite, "all_finite", lambda *values: False)
    torch.testing.assert_close(run(module, x, active, layout), wanted, rtol=1e-12, atol=1e-12, equal_nan=True)
