"""Non-finite tokens: a weight of 0 times NaN is NaN, so attention zeroes them and marks the tokens that they reach."""

import math
from functools import reduce

import torch
from torch import Tensor


def all_finite(*values: Tensor) -> bool:
    """Whether the sums of values are finite, and so all values; False where a program cannot read them.

    On a CPU this costs far less than a mask. But a compiled program cannot branch on a number, and an accelerator would
    make the host wait for it.
    """
    if torch.compiler.is_compiling() or values[0].device.type != "cpu":
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
    # The largest magnitude is one pass; a NaN is its own largest magnitude.
    sizes = (torch.linalg.vector_norm(each.detach().flatten(-axes), math.inf, -1) for each in values)
    broken = ~reduce(torch.maximum, sizes).isfinite()
    wide = broken.reshape(*broken.shape, *[1] * axes)
    return tuple(each.masked_fill(wide, 0) for each in values), broken
