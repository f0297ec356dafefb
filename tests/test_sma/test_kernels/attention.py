"""Windowed attention in one implementation, on tokens in one layout."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sma.kernels import use
from sma.kernels.operator import Name
from sma.modules.sliding_window import Bias, attend
from sma.ragged import Ragged
from tests.test_modules.layouts import Layout, first, lay

Z, H, P = 5, 20, 9  # query and value width, true distances in the table


class Problem(NamedTuple):
    """Tokens with queries, keys and values side by side, a table of biases and an incoming gradient."""

    tokens: Ragged
    bias: Bias | None
    incoming: Tensor


def problem(
    lengths: list[int],
    window: int,
    distance: str = "none",
    layout: Layout = "packed",
    *,
    hidden: int = H,
    dtype: torch.dtype = torch.float64,
    gap: int = 0,
) -> Problem:
    """Random tokens; `gap` is added to all positions of a row except the first five."""
    length = max(1, *lengths)
    active = first(lengths, length)
    positions = torch.randint(1, 4, active.shape).cumsum(1) + gap * (torch.arange(length) >= 5)
    tokens = lay(torch.randn(len(lengths), length, 2 * Z + hidden, dtype=dtype), active, layout, positions)
    bias = None
    if distance == "true_distance":
        bias = Bias(torch.randn(2 * P - 1, dtype=dtype, requires_grad=True), P - 1, over_slots=False)
    elif distance == "slot_distance":
        bias = Bias(torch.randn(6 * window - 1, dtype=dtype, requires_grad=True), 4 * window - 1, over_slots=True)
    # A loss never reads holes, so their gradients are 0.
    incoming = torch.randn(tokens.values.shape[0], hidden, dtype=dtype) * tokens.mask[:, None]
    return Problem(tokens, bias, incoming)


def solve(name: Name, given: Problem, window: int, *, causal: bool = False, **options: Any) -> dict[str, Tensor]:
    """Output and all gradients at real tokens."""
    hidden = given.tokens.values.shape[1] - 2 * Z
    q, k, v = (part.clone().requires_grad_() for part in given.tokens.values.split([Z, Z, hidden], -1))
    inputs = {"q": q, "k": k, "v": v} | ({} if given.bias is None else {"table": given.bias.table})
    with use(name):
        out = attend(q, k, v, given.tokens, window=window, causal=causal, bias=given.bias, **options)
    gradients = torch.autograd.grad(out, list(inputs.values()), given.incoming)
    found = {"output": out.detach(), **dict(zip(inputs, gradients, strict=True))}
    real = given.tokens.mask
    return {name: value if name == "table" else value[real] for name, value in found.items()}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Compare outputs and gradients, relative to the largest element."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = 1 + float(value.abs().max()) if value.numel() else 1.0
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )
