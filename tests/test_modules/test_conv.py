"""The short convolution over slots against a loop."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sma.errors import SpecError
from sma.modules.conv import Conv, ConvSpec
from sma.ragged import rectangular
from tests.test_modules.layouts import LAYOUTS, Layout, assert_matches_loop, draw, first, run
from tests.test_modules.loops import conv_loop


def make(width: int = 3, *, seed: int = 0, **fields: Any) -> Conv:
    torch.manual_seed(seed)
    module = draw(ConvSpec(**fields).build(width).double())
    assert isinstance(module, Conv)
    return module


def matches(module: Conv, active: Tensor, layout: Layout) -> None:
    x = torch.randn(*active.shape, module.bias.shape[0], dtype=torch.float64)
    assert_matches_loop(module, lambda row, _: conv_loop(module, row), x, active, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize(
    ("kernel_size", "bidirectional"),
    [(1, False), (2, False), (4, False), (20, False), (1, True), (3, True), (5, True), (21, True)],
)
def test_convolution_agrees_with_the_loop(
    kernel_size: int, bidirectional: bool, activation: str, layout: Layout
) -> None:
    module = make(kernel_size=kernel_size, bidirectional=bidirectional, activation=activation)
    matches(module, first([9, 0, 1, 4, 9], 9), layout)


@given(
    half=st.integers(0, 6),
    bidirectional=st.booleans(),
    layout=st.sampled_from(["packed", "static"]),
    rows=st.integers(1, 4),
    length=st.integers(1, 12),
    rate=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_any_activity_agrees_with_the_loop(
    half: int, bidirectional: bool, layout: Layout, rows: int, length: int, rate: float, seed: int
) -> None:
    module = make(seed=seed, kernel_size=2 * half + 1, bidirectional=bidirectional)
    matches(module, torch.rand(rows, length) < rate, layout)


@pytest.mark.parametrize(("kernel_size", "bidirectional"), [(4, False), (5, True)])
def test_whole_rows_equal_conv1d_of_torch(kernel_size: int, bidirectional: bool) -> None:
    module = make(kernel_size=kernel_size, bidirectional=bidirectional, activation="none")
    x = torch.randn(2, 30, 3, dtype=torch.float64)
    left = kernel_size // 2 if bidirectional else kernel_size - 1
    padded = nn.functional.pad(x.transpose(1, 2), (left, kernel_size - 1 - left))
    wanted = nn.functional.conv1d(padded, module.weight[:, None], module.bias, groups=3).transpose(1, 2)
    torch.testing.assert_close(module(rectangular(x))[0].unflatten(0, (2, 30)), wanted, rtol=0, atol=1e-12)


def test_neighbours_are_active_tokens_at_any_distance() -> None:
    module = make(kernel_size=3)
    x = torch.randn(1, 5, 3, dtype=torch.float64)
    near, far = (module(rectangular(x, None, places[None]))[0] for places in (torch.arange(5), 100 * torch.arange(5)))
    assert torch.equal(near, far)


@pytest.mark.parametrize("place", [1, 5, 8])
@pytest.mark.parametrize("bad", [1e4, float("inf"), float("nan")])
def test_later_tokens_never_change_earlier_results_of_a_causal_convolution(place: int, bad: float) -> None:
    module = make(kernel_size=4)
    x, active = torch.randn(2, 9, 3, dtype=torch.float64), torch.ones(2, 9, dtype=torch.bool)
    changed = x.clone()
    changed[0, place:] = bad
    before, after = run(module, x, active, "packed"), run(module, changed, active, "packed")
    assert torch.equal(after[0, :place], before[0, :place])
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param(
            {"kernel_size": 0},
            "ConvSpec: kernel_size=0 must be at least 1; kernel_size: tokens that one result",
            id="empty",
        ),
        pytest.param(
            {"kernel_size": 4, "bidirectional": True},
            "kernel_size=4 must be odd when bidirectional=true",
            id="no-middle",
        ),
        pytest.param({"activation": "relu"}, "ConvSpec: activation='relu' must be 'silu' or 'none'", id="activation"),
    ],
)
def test_impossible_specs_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        ConvSpec(**fields)
