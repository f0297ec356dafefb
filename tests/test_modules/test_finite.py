"""The check of sums for non-finite values, and attention without it, as in compiled code and CUDA graphs."""

import pytest
import torch

import sma.kernels.finite
from sma.kernels.finite import all_finite, finite
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
def test_attention_without_the_check_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, layout: Layout, bad: float
) -> None:
    torch.manual_seed(0)
    x, active = torch.randn(3, 14, WIDTH, dtype=torch.float64), first([14, 0, 5], 14)
    x[0, 6] += bad
    module = zoo.make(SPECS[name])
    wanted = run(module, x, active, layout)
    monkeypatch.setattr(sma.kernels.finite, "all_finite", lambda *values: False)
    torch.testing.assert_close(run(module, x, active, layout), wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_values_that_cannot_be_read_give_the_mask_without_a_check() -> None:
    values = torch.ones(4, 3, device="meta")  # tensors on meta have no values to read
    assert not all_finite(values)
    (zeroed,), broken = finite(values)
    assert zeroed.shape == (4, 3)
    assert broken is not None
    assert broken.shape == (4,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mask_marks_non_finite_tokens_but_not_large_ones(dtype: torch.dtype) -> None:
    values = torch.full((5, 2, 3), torch.finfo(dtype).max, dtype=dtype)
    values[1, 0, 2], values[2, 1, 0], values[3, 1, 1] = torch.nan, torch.inf, -torch.inf
    other = torch.zeros(5, 1, 1, dtype=dtype)
    other[4] = torch.nan
    (zeroed, _), broken = finite(values, other, axes=2)
    assert broken is not None
    assert broken.tolist() == [False, True, True, True, True]
    assert bool(zeroed.isfinite().all())
    torch.testing.assert_close(zeroed[0], values[0])
