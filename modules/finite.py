"""Values that are not finite: a weight of 0 times NaN is NaN, so attention takes them out and marks whom they reach."""

import torch
from torch import Tensor


def all_finite(*values: Tensor) -> bool:
    """Whether one look at the sums says that every value is finite; False too where a program may not look.

    Looking costs far less than a mask. But what is compiled cannot branch on a number, what a CUDA graph captures
    cannot wait for it, and on the meta device there is none.
    """
    first = values[0]
    if torch.compiler.is_compiling() or first.is_meta or (first.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    total = first.detach().sum()
    for other in values[1:]:
        total = total + other.detach().sum()
    return bool(total.isfinite())
