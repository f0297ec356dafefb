"""Reductions over the rows of ragged tokens."""

from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sma.checks import check_integers, check_tensor
from sma.errors import InputError, quote

Reduce = Literal["sum", "mean", "max", "min"]


def expand_to(mask: Tensor, like: Tensor) -> Tensor:
    """Append axes of size 1, so that a tensor over tokens or rows applies to all their channels."""
    return mask.reshape(*mask.shape, *([1] * (like.ndim - mask.ndim)))


def segment_reduce(
    values: Float[Tensor, "T *D"],
    offsets: Int[Tensor, "B1"],
    reduce: Reduce,
    *,
    backend: Literal["auto", "torch", "scatter"] = "auto",
) -> Float[Tensor, "B *D"]:
    """Reduce the tokens of every row to one value; an empty row gives 0.

    Args:
        values: tokens of all rows, packed.
        offsets: `(B + 1,)`, where the tokens of row b are `offsets[b] … offsets[b + 1]`.
        reduce: `sum`, `mean`, `max` or `min`.
        backend: `auto` takes torch-scatter for `max` and `min` where it is installed (about 4 times faster there; for
            sums torch itself is as fast); `torch` and `scatter` force one.

    Raises:
        InputError: an argument is not a tensor, `reduce` or `backend` is unknown, or torch-scatter is not installed.
    """
    check_tensor(values, "the values are")
    check_integers(offsets, "the offsets are", {"B + 1": None})
    if not offsets.numel():
        raise InputError("the offsets are empty; expected B + 1 integers, the first of which is 0")
    if reduce not in ("sum", "mean", "max", "min"):
        raise InputError(f"reduce={quote(reduce)} must be 'sum', 'mean', 'max' or 'min'")
    scatter = _torch_scatter()
    if backend == "scatter" and scatter is None:
        raise InputError(
            "backend='scatter' needs torch-scatter: python -m pip install --no-build-isolation torch-scatter"
        )
    if backend not in ("auto", "torch", "scatter"):
        raise InputError(f"backend={quote(backend)} must be 'auto', 'torch' or 'scatter'")
    if scatter is not None and (backend == "scatter" or (backend == "auto" and reduce in ("max", "min"))):
        reduced: Tensor = scatter.segment_csr(values.contiguous(), offsets, reduce=reduce)
        return reduced
    counts = offsets[1:] - offsets[:-1]
    rows = torch.repeat_interleave(
        torch.arange(counts.shape[0], device=values.device), counts, output_size=values.shape[0]
    )
    out = values.new_zeros((counts.shape[0], *values.shape[1:]))
    if reduce == "sum":
        return out.index_add_(0, rows, values)
    if reduce == "mean":
        # In float32 or wider, because in float16 the sum and the length of a long row overflow.
        wide = torch.promote_types(values.dtype, torch.float32)
        total = out.to(wide).index_add_(0, rows, values.to(wide))
        return (total / expand_to(counts.clamp(min=1), total)).to(values.dtype)
    index = expand_to(rows, values).expand_as(values)
    return out.scatter_reduce(0, index, values, "amax" if reduce == "max" else "amin", include_self=False)


@cache
def _torch_scatter() -> ModuleType | Any | None:
    try:
        import torch_scatter
    except ImportError:
        return None
    return torch_scatter
