"""Indices of the true elements of a mask: an operator that places the active tokens of a batch, and its parts."""

from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sma.devices import Answer
from sma.kernels.operator import Name, choose, define


class Found(NamedTuple):
    """The active tokens of a batch of B rows and L tokens each, row after row.

    Attributes:
        at: `(T,)` index in the flattened batch.
        positions: `(T,)` position in the stream.
        rows: `(T,)` row.
        offsets: `(B + 1,)` where the tokens of each row begin and end.
        lengths: `(B,)` active tokens of each row.
        inverse: `(B * L,)` place of each token of the batch among these, at least T where it is not active; or None.
    """

    at: Int[Tensor, "T"]
    positions: Int[Tensor, "T"]
    rows: Int[Tensor, "T"]
    offsets: Int[Tensor, "B1"]
    lengths: Int[Tensor, "B"]
    inverse: Int[Tensor, "N"] | None


def placed(mask_N: Bool[Tensor, "N"], size: int, hole: int) -> tuple[Int[Tensor, "T"], Int[Tensor, "N"]]:
    """The indices of at most `size` true elements, in order, then `hole`; and the rank of each true element, `size` for
    others. Nothing is synchronised with the host.
    """
    slot = torch.where(mask_N, mask_N.cumsum(0) - 1, size)  # all others go to an extra slot
    every = torch.arange(mask_N.shape[0], device=mask_N.device)
    return torch.full((size + 1,), hole, device=mask_N.device).scatter_(0, slot, every)[:size], slot


def lay_out(
    index: Int[Tensor, "T"],
    lengths_B: Int[Tensor, "B"],
    length: int,
    positions_BL: Int[Tensor, "B L"] | None,
    inverse: Int[Tensor, "N"] | None = None,
) -> Found:
    """All fields of `Found`, from the index of the active tokens and their number in each row."""
    rows = torch.div(index, max(length, 1), rounding_mode="floor")
    positions = index - rows * length if positions_BL is None else positions_BL.reshape(-1).index_select(0, index)
    offsets = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))
    return Found(index, positions, rows, offsets, lengths_B, inverse)


def _forward(active_BL: Tensor, ranks_N: Tensor, positions_BL: Tensor | None, count: int) -> tuple[Tensor, ...]:
    index, inverse = placed(active_BL.reshape(-1), count, 0)
    found = lay_out(index, active_BL.sum(1), active_BL.shape[1], positions_BL, inverse)
    return tuple(each for each in found if each is not None)


def _fake(
    active_BL: Tensor, ranks_N: Tensor, positions_BL: Tensor | None, count: int, chosen: Name
) -> tuple[Tensor, ...]:
    rows, length = active_BL.shape
    sizes = count, count, count, rows + 1, rows, rows * length
    return tuple(ranks_N.new_empty(size, dtype=torch.int64) for size in sizes)


_place = define(
    "placing",
    "(Tensor active, Tensor ranks, Tensor? positions, SymInt count) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    plain=_forward,
    fake=_fake,
)


class Search:
    """An asynchronous search for the active tokens of a batch on an accelerator, which begins in the constructor. Only
    `read` and `all_active` wait, for the number of active tokens.

    Args:
        active_BL: mask, at least one element.
        positions_BL: position of each token in its row's stream; default `0 … L - 1`.
    """

    def __init__(self, active_BL: Bool[Tensor, "B L"], positions_BL: Int[Tensor, "B L"] | None) -> None:
        self._active = active_BL.contiguous()
        self._positions = None if positions_BL is None else positions_BL.contiguous()
        # Number of active tokens up to and including each token.
        self._ranks = self._active.view(-1).cumsum(0, dtype=torch.int32)
        self._count = Answer(self._ranks[-1:])

    @cached_property
    def _size(self) -> int:
        return self._count.read()[0]

    @property
    def all_active(self) -> bool:
        """Whether every token is active."""
        return self._size == self._active.numel()

    def read(self) -> Found:
        """The tokens."""
        chosen = choose(self._active.device)
        return Found(*_place(self._active, self._ranks, self._positions, self._size, chosen))
