"""Non-finite tokens: a weight of 0 times NaN is NaN, so attention zeroes them and marks the tokens that they reach."""

from functools import reduce

import torch
from torch import Tensor


def all_finite(*values: Tensor) -> bool:
    """Whether the sums of values are finite, and so all values; False where a program cannot read them.

    This costs far less than a mask. But a compiled program cannot branch on a number, the capture of a CUDA graph
    cannot wait for one, and the meta device has none.
    """
    first = values[0]
    if torch.compiler.is_compiling() or first.is_meta or (first.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return bool(reduce(torch.add, (each.detach().sum() for each in values)).isfinite())


def finite(*values: Tensor, axes: int = 1) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Zero the tokens that are not finite in one of several tensors.

    Args:
        values: tokens, of the same leading shape.
        axes: trailing axes that belong to one token.

    Returns:
        the tensors, and a mask of the zeroed tokens; None where all are finite.
    """
    if all_finite(*values):
        return values, None
    broken = ~torch.stack([each.isfinite().flatten(-axes).all(-1) for each in values]).all(0)
    wide = broken.reshape(*broken.shape, *[1] * axes)
    return tuple(each.masked_fill(wide, 0) for each in values), broken
