"""Ragged tokens cut into blocks, each of which sees the slots around it: the layout of attention inside a window."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sma.ragged import Ragged


class BlockShape(NamedTuple):
    """How rows are cut: a block of `queries` slots sees `before` slots ahead of it, itself, and `after` slots behind
    it.
    """

    queries: int
    before: int
    after: int

    @property
    def keys(self) -> int:
        """Slots that a block sees."""
        return self.before + self.queries + self.after

    def pairs(self, tokens: int) -> int:
        """Pairs of slots that are multiplied for a row of `tokens` tokens, those out of reach included."""
        return -(-tokens // self.queries) * self.queries * self.keys


def block_shape(longest: int, window: int, causal: bool) -> BlockShape:
    """Choose the blocks for rows of up to `longest` tokens.

    A row that fits into one window is one block that sees itself. A longer one is cut into blocks of half a window:
    they see 2.5 windows, against 3 for blocks of a whole one; the products of still smaller blocks are less efficient.
    """
    longest = max(longest, 1)
    if longest <= max(window, 32):
        return BlockShape(longest, 0, 0)
    queries = min(longest, max(32, window // 2))
    reach = min(window, longest - 1)
    return BlockShape(queries, reach, 0 if causal else reach)


@dataclass(frozen=True)
class Blocks:
    """The tokens of a batch laid out in blocks.

    Attributes:
        shape: slots of a block and what it sees.
        count: blocks of all rows together, n.
        places: `(T,)` slot of each token in the flattened `(n * C)` blocks.
        allowed: `(n, C, K)` which slot a slot may attend; a slot without a token always sees itself.
        positions: `(before + n C + after,)` position in the stream at each slot.
        slots: `(before + n C + after,)` rank in its row at each slot.
    """

    shape: BlockShape
    count: int
    places: Int[Tensor, "T"]
    allowed: Bool[Tensor, "n C K"]
    positions: Int[Tensor, "S"]
    slots: Int[Tensor, "S"]

    def fill(self, values: Shaped[Tensor, "T *E"]) -> Shaped[Tensor, "S *E"]:
        """Lay values out in blocks, zeros elsewhere."""
        shape = self.shape
        padded = values.new_zeros(shape.before + self.count * shape.queries + shape.after, *values.shape[1:])
        return padded.index_copy(0, self.places + shape.before if shape.before else self.places, values)

    def queries_of(self, filled: Tensor) -> Shaped[Tensor, "n C ..."]:
        """The slots of every block."""
        shape = self.shape
        return filled[shape.before : shape.before + self.count * shape.queries].unflatten(
            0, (self.count, shape.queries)
        )

    def keys_of(self, filled: Tensor) -> Shaped[Tensor, "n K ..."]:
        """The slots that every block sees; an overlapping view, unless compiled."""
        if torch.compiler.is_compiling():  # the compiler knows no overlapping views of a size that it does not know
            starts = torch.arange(self.count, device=filled.device)[:, None] * self.shape.queries
            return filled[starts + torch.arange(self.shape.keys, device=filled.device)]
        step = filled.stride(0)
        size = (self.count, self.shape.keys, *filled.shape[1:])
        return filled.as_strided(size, (self.shape.queries * step, step, *filled.stride()[1:]), filled.storage_offset())

    def seen_by(self, values: Float[Tensor, "T *E"]) -> Float[Tensor, "n K *E"]:
        """The values that every block sees, for operators that PyTorch differentiates: gradients are added up by
        `fold`.
        """
        if torch.compiler.is_compiling():
            return self.keys_of(self.fill(values))
        seen: Tensor = _Seen.apply(values, self)
        return seen

    def fold(self, windows: Float[Tensor, "n K E"]) -> Float[Tensor, "S E"]:
        """Add up what every block says of the slots it sees: the transpose of `keys_of`."""
        shape = self.shape
        channels = windows.shape[2]
        if shape.keys == shape.queries:
            return windows.reshape(-1, channels)
        out = windows.new_zeros(shape.before + self.count * shape.queries + shape.after, channels)
        for start in range(0, shape.keys, shape.queries):  # parts of different blocks that do not overlap
            part = windows[:, start : start + shape.queries]
            out.as_strided(part.shape, (shape.queries * channels, channels, 1), start * channels).add_(part)
        return out


def cut(tokens: Ragged, window: int, causal: bool) -> Blocks:
    """Lay out the tokens of a batch in blocks."""
    device, slots = tokens.rows.device, tokens.slots
    if tokens.stride is not None or tokens.bound is not None:
        shape = block_shape(tokens.longest, window, causal)
    else:  # longest row and number of blocks by one look at the lengths: on a GPU the program waits for it
        counts = (tokens.offsets[1:] - tokens.offsets[:-1]).tolist()
        shape = block_shape(max(counts, default=0), window, causal)
    size = shape.queries
    if tokens.stride is not None:
        per_row = -(-tokens.stride // size)
        starts = torch.arange(tokens.num_rows, device=device) * per_row
        count = tokens.num_rows * per_row
    else:
        per_row_B = torch.div(tokens.offsets[1:] - tokens.offsets[:-1] + size - 1, size, rounding_mode="floor")
        starts = per_row_B.cumsum(0) - per_row_B
        # As many blocks as there can be where the rows cannot be looked at.
        count = (
            sum(-(-each // size) for each in counts)
            if tokens.bound is None
            else tokens.rows.shape[0] // size + tokens.num_rows
        )
    places = starts[tokens.rows] * size + slots

    def lay(values: Tensor, empty: int) -> Tensor:
        line = values.new_full((shape.before + count * size + shape.after,), empty)
        return line.index_copy_(0, places + shape.before, values)

    row_of = tokens.rows.where(tokens.mask, -1) if tokens.holes else tokens.rows
    blocks = Blocks(
        shape, count, places, torch.empty(0, 0, 0, dtype=torch.bool), lay(tokens.positions, 0), lay(slots, 0)
    )
    rows = lay(row_of, -1)
    allowed = blocks.queries_of(rows)[:, :, None] == blocks.keys_of(rows)[:, None, :]
    # Slots of one block run on, so the distance of a pair depends on its places in the block alone.
    distance = torch.arange(shape.keys, device=device) - shape.before - torch.arange(size, device=device)[:, None]
    if causal:
        allowed &= distance <= 0
    if shape.keys > window:
        allowed &= distance.abs() <= window
    return Blocks(shape, count, places, allowed, blocks.positions, blocks.slots)


class _Seen(torch.autograd.Function):
    """PyTorch's own gradient of an overlapping view goes through an index of every element."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, blocks: Blocks) -> Tensor:
        ctx.save_for_backward(blocks.places)
        ctx.shape, ctx.count = blocks.shape, blocks.count
        return blocks.keys_of(blocks.fill(values))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        nothing = places[:0]  # the rest of the layout is for the scores alone
        blocks = Blocks(ctx.shape, ctx.count, places, nothing.bool().reshape(0, 0, 0), nothing, nothing)
        return blocks.fold(grad.flatten(2)).index_select(0, places + blocks.shape.before).unflatten(
            1, grad.shape[2:]
        ), None


def in_reach(marked: Bool[Tensor, "T"], tokens: Ragged, window: int, causal: bool) -> Bool[Tensor, "T"]:
    """Whether a marked token is within reach of each token; of no meaning at holes."""
    first, slots = tokens.offsets[tokens.rows], tokens.slots
    nearest = slots if causal else (slots + window).minimum(tokens.lengths[tokens.rows] - 1)
    before = torch.nn.functional.pad(marked.cumsum(0), (1, 0))
    return before[first + nearest + 1] > before[first + (slots - window).clamp(min=0)]
