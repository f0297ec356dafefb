"""Inputs for the tests: masks of many shapes, batches padded on any side, and modules with random parameters."""

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sma.decision import Decision
from sma.routers import SMARouter

# Location of the padding in a row: a function of the numbers of padded and real positions returns the real positions.
SIDES: dict[str, Callable[[int, int], list[int]]] = {
    "right": lambda padding, real: list(range(real)),
    "left": lambda padding, real: list(range(padding, padding + real)),
    "middle": lambda padding, real: [*range((real + 1) // 2), *range((real + 1) // 2 + padding, padding + real)],
    "both": lambda padding, real: list(range(padding // 2, padding // 2 + real)),
}
sides = pytest.mark.parametrize("side", [pytest.param(name, id=name) for name in SIDES])


@st.composite
def masks(draw: st.DrawFn, rows: int = 4, length: int = 9) -> Tensor:
    """`(B, L)` masks: B or L may be 0; all False, all True, or mixed."""
    shape = draw(st.integers(0, rows)), draw(st.integers(0, length))
    return torch.rand(shape, generator=generator(draw(st.integers(0, 999)))) < draw(
        st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])
    )


def generator(seed: int) -> torch.Generator:
    """A random number generator, independent of the global one."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normally distributed numbers, which depend only on the seed and not on earlier draws."""
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def strided(x: Tensor) -> list[Tensor]:
    """Copies of a tensor with other strides: with gaps between the elements, and with the first two axes swapped."""
    gaps = x.new_zeros([2 * size for size in x.shape])[tuple(slice(None, None, 2) for _ in x.shape)]
    return [gaps.copy_(x), *([x.transpose(0, 1).contiguous().transpose(0, 1)] if x.ndim > 1 else [])]


def pad(rows: Sequence[Tensor], side: str, *, extra: int = 2, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Stack rows `(L_b, ...)`, each padded by at least `extra` positions; returns the batch and its mask."""
    length = max((row.shape[0] for row in rows), default=0) + extra
    batch = torch.full((len(rows), length, *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
    valid = torch.zeros(len(rows), length, dtype=torch.bool)
    for b, row in enumerate(rows):
        at = torch.tensor(SIDES[side](length - row.shape[0], row.shape[0]), dtype=torch.long)
        batch[b, at] = row
        valid[b, at] = True
    return batch, valid


def gradients(output: Tensor, inputs: Iterable[Tensor], seed: int = 7) -> list[Tensor]:
    """Gradients of a random projection of the output; raises if an input has no gradient."""
    return list(
        torch.autograd.grad(
            (output * normal(*output.shape, seed=seed, dtype=output.dtype)).sum(), list(inputs), retain_graph=True
        )
    )


def spread(module: nn.Module, scale: float = 0.7, seed: int = 3) -> nn.Module:
    """Draw every parameter from a normal distribution: many wrong formulas pass with the default initialisation."""
    source = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=source, dtype=torch.float64))
    return module


@torch.no_grad()
def balance(router: SMARouter, decision: Decision) -> None:
    """Shift the biases of a router so that half of the tokens of its last decision become active in each sub-module."""
    margins = (decision.logits[..., 1] - decision.logits[..., 0]).flatten(0, 1).sort(0).values
    middle = len(margins) // 2
    router.bias[1::2] -= (margins[middle] + margins[middle - 1]) / 2
