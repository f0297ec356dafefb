"""The kernel that places the active tokens of a batch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sma.kernels.launch import launch

_BLOCK = 1024


# fmt: off
@triton.jit(do_not_specialize=["size", "length", "count"])
def place_tokens(
    active, ranks, given, index, positions, rows, offsets, lengths, inverse, size, length, count,
    GIVEN: tl.constexpr, BLOCK: tl.constexpr
):
    """Process BLOCK tokens: active ones write to the slot of their rank, the last one of a row writes its count."""
    # fmt: on
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    on = tl.load(active + i, mask=inside, other=0) != 0
    rank = tl.load(ranks + i, mask=inside, other=0)
    slot = rank - 1
    row = i // length
    position = (i - row * length).to(tl.int64)
    if GIVEN:
        position = tl.load(given + i, mask=inside, other=0)
    tl.store(inverse + i, tl.where(on, slot, count).to(tl.int64), mask=inside)
    tl.store(index + slot, i.to(tl.int64), mask=on)
    tl.store(positions + slot, position, mask=on)
    tl.store(rows + slot, row.to(tl.int64), mask=on)
    last = inside & ((i + 1) % length == 0)
    before = tl.load(ranks + i - length, mask=last & (row > 0), other=0)
    tl.store(lengths + row, (rank - before).to(tl.int64), mask=last)
    tl.store(offsets + row + 1, rank.to(tl.int64), mask=last)
    tl.store(offsets + i, tl.zeros((BLOCK,), tl.int64), mask=i == 0)


def forward(active_BL: Tensor, ranks_N: Tensor, positions_BL: Tensor | None, count: int) -> tuple[Tensor, ...]:
    """The fields of `sma.kernels.placing.Found`.

    Args:
        active_BL: mask, at least one element, contiguous.
        ranks_N: number of active tokens up to and including each token, int32.
        positions_BL: position of each token in its row's stream; None: `0 … L - 1`.
        count: number of active tokens.
    """
    rows, length = active_BL.shape
    sizes = count, count, count, rows + 1, rows, rows * length
    index, positions, row, offsets, lengths, inverse = made = tuple(
        torch.empty(size, dtype=torch.int64, device=active_BL.device) for size in sizes
    )
    given = ranks_N if positions_BL is None else positions_BL
    launch(
        place_tokens,
        (-(-rows * length // _BLOCK),),
        *(active_BL.view(torch.uint8), ranks_N, given, index, positions, row, offsets, lengths, inverse),
        *(rows * length, length, count),
        GIVEN=positions_BL is not None,
        BLOCK=_BLOCK,
    )
    return made
