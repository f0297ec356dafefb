"""Padding: moved to the right of a batch and back, dropped from ragged tokens and restored."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.ragged import Ragged


def pack(tokens: Ragged) -> tuple[Ragged, Int[Tensor, "P"] | None]:
    """Drop the holes of ragged tokens.

    Returns:
        the real tokens, packed, and their indices among the given ones, or None where all are real.
    """
    if not tokens.holes:
        return tokens, None
    real = tokens.mask.nonzero().squeeze(1)
    values, index, positions, rows = (
        part.index_select(0, real) for part in (tokens.values, tokens.index, tokens.positions, tokens.rows)
    )
    offsets = torch.nn.functional.pad(tokens.lengths.cumsum(0), (1, 0))
    return Ragged(values, index, positions, rows, offsets, tokens.lengths, holes=False), real


def unpack(values: Float[Tensor, "P *D"], real: Int[Tensor, "P"] | None, tokens: Ragged) -> Float[Tensor, "T *D"]:
    """Undo `pack` for results, with zeros at the holes."""
    if real is None:
        return values
    return values.new_zeros(tokens.rows.shape[0], *values.shape[1:]).index_copy_(0, real, values)


def right_padding(
    valid_BL: Bool[Tensor, "B L"], static: bool = False
) -> tuple[Int[Tensor, "B"], Int[Tensor, "B L"] | None]:
    """Compute the order that moves padding to the right.

    Args:
        valid_BL: False at padding.
        static: return an order for every mask, without a check, as compiled or captured programs need it.

    Returns:
        the number of valid tokens of each row, and the order `(B, L)`: valid tokens first, in their order; None where
        the padding is on the right already.
    """
    lengths = valid_BL.sum(1)
    if not (static or torch.compiler.is_compiling()) and bool((valid_BL[:, 1:] <= valid_BL[:, :-1]).all()):
        return lengths, None
    return lengths, torch.argsort(~valid_BL, dim=1, stable=True)


def inverse_order(order_BL: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """The order by which `move` undoes a move by `order_BL`, without a sort."""
    positions = torch.arange(order_BL.shape[1], device=order_BL.device)
    return torch.empty_like(order_BL).scatter_(1, order_BL, positions.expand_as(order_BL))


def move(x_BLD: Tensor, order_BL: Int[Tensor, "B L"]) -> Tensor:
    """Reorder the positions of every row: result[b, t] = x[b, order[b, t]]."""
    index = order_BL.reshape(*order_BL.shape, *[1] * (x_BLD.ndim - 2)).expand(*order_BL.shape, *x_BLD.shape[2:])
    return x_BLD.gather(1, index)
