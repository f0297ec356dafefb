"""Ragged tokens cut into blocks that see the slots around them: the layout of sliding-window attention."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sma.ragged import Ragged


class BlockShape(NamedTuple):
    """Sizes of a block: `queries` slots, which see themselves, `before` earlier slots and `after` later ones."""

    queries: int
    before: int
    after: int

    @property
    def keys(self) -> int:
        """Slots that a block sees."""
        return self.before + self.queries + self.after

    def pairs(self, tokens: int) -> int:
        """Pairs of slots that are multiplied for a row of `tokens` tokens, including those out of reach."""
        return -(-tokens // self.queries) * self.queries * self.keys


def block_shape(longest: int, window: int, causal: bool) -> BlockShape:
    """Choose the sizes of blocks for rows of up to `longest` tokens.

    A row that fits into one window is one block that sees itself. A longer one is cut into blocks of half a window.
    They see 2.5 windows, where blocks of a whole window see 3; the products of smaller blocks are less efficient.
    """
    longest = max(longest, 1)
    if longest <= max(window, 32):
        return BlockShape(longest, 0, 0)
    queries = min(longest, max(32, window // 2))
    reach = min(window, longest - 1)
    return BlockShape(queries, reach, 0 if causal else reach)


@dataclass(frozen=True)
class BlockLayout:
    """The indices of a batch's tokens in blocks of C slots: with the margins, S = before + n C + after slots.

    Attributes:
        shape: sizes of a block.
        count: blocks of all rows, n.
        indices: slot of each token in the flattened `(n * C)` blocks, shape (T,).
    """

    shape: BlockShape
    count: int
    indices: Int[Tensor, "T"]

    def fill(self, values: Shaped[Tensor, "T *E"]) -> Shaped[Tensor, "S *E"]:
        """Lay values out in blocks, with zeros in slots without a token."""
        shape = self.shape
        padded = values.new_zeros(shape.before + self.count * shape.queries + shape.after, *values.shape[1:])
        return padded.index_copy_(0, self.indices + shape.before if shape.before else self.indices, values)

    def tokens_of(self, blocks: Shaped[Tensor, "n C *E"]) -> Shaped[Tensor, "T *E"]:
        """The values of the tokens in blocks."""
        return blocks.flatten(0, 1).index_select(0, self.indices)

    def tokens_of_filled(self, filled: Shaped[Tensor, "S *E"]) -> Shaped[Tensor, "T *E"]:
        """The values of the tokens in what `fill` laid out."""
        return filled.index_select(0, self.indices + self.shape.before)

    def queries_of(self, filled: Tensor) -> Shaped[Tensor, "n C ..."]:
        """The slots of every block."""
        shape = self.shape
        return filled[shape.before : shape.before + self.count * shape.queries].unflatten(
            0, (self.count, shape.queries)
        )

    def keys_of(self, filled: Tensor) -> Shaped[Tensor, "n K ..."]:
        """The slots that every block sees; an overlapping view, unless compiled."""
        if torch.compiler.is_compiling():  # a compiler supports no overlapping views of unknown sizes
            starts = torch.arange(self.count, device=filled.device)[:, None] * self.shape.queries
            return filled[starts + torch.arange(self.shape.keys, device=filled.device)]
        step = filled.stride(0)
        size = (self.count, self.shape.keys, *filled.shape[1:])
        return filled.as_strided(size, (self.shape.queries * step, step, *filled.stride()[1:]), filled.storage_offset())

    def seen_by(self, values: Float[Tensor, "T *E"]) -> Float[Tensor, "n K *E"]:
        """The values that every block sees, for operators that PyTorch differentiates; `fold` sums the gradients."""
        if torch.compiler.is_compiling():
            return self.keys_of(self.fill(values))
        seen: Tensor = _Seen.apply(values, self)
        return seen

    def fold(self, windows: Float[Tensor, "n K E"]) -> Float[Tensor, "S E"]:
        """Sum over the blocks that see a slot: the transpose of `keys_of`."""
        shape = self.shape
        channels = windows.shape[2]
        if shape.keys == shape.queries:
            return windows.reshape(-1, channels)
        out = windows.new_zeros(shape.before + self.count * shape.queries + shape.after, channels)
        for start in range(0, shape.keys, shape.queries):  # these parts of different blocks do not overlap
            part = windows[:, start : start + shape.queries]
            out.as_strided(part.shape, (shape.queries * channels, channels, 1), start * channels).add_(part)
        return out


def count_blocks(tokens: Ragged, window: int, causal: bool) -> tuple[BlockShape, int]:
    """Choose the sizes of blocks for a batch, and how many there are.

    A CPU reads the lengths of the rows. On other devices, where that is a synchronisation, and in a compiled graph the
    sizes follow from those of tensors: for T tokens in B rows at most T // C + B blocks.
    """
    if tokens.stride is not None:
        shape = block_shape(tokens.stride, window, causal)
        return shape, tokens.num_rows * -(-tokens.stride // shape.queries)
    total = tokens.rows.shape[0]
    if tokens.bound is not None or tokens.offsets.device.type != "cpu":
        shape = block_shape(total if tokens.bound is None else tokens.bound, window, causal)
        return shape, total // shape.queries + tokens.num_rows
    counts = (tokens.offsets[1:] - tokens.offsets[:-1]).tolist()
    shape = block_shape(max(counts, default=0), window, causal)
    return shape, sum(-(-each // shape.queries) for each in counts)


def lay_out(
    rows: Int[Tensor, "T"], offsets: Int[Tensor, "B1"], shape: BlockShape, count: int
) -> tuple[BlockLayout, Int[Tensor, "T"]]:
    """Cut every row into blocks: the layout, and the rank of each token in its row."""
    size = shape.queries
    per_row = torch.div(offsets[1:] - offsets[:-1] + size - 1, size, rounding_mode="floor")
    starts = (per_row.cumsum(0) - per_row) * size
    slots = torch.arange(rows.shape[0], device=rows.device) - offsets[rows]
    return BlockLayout(shape, count, starts[rows] + slots), slots


def attended(
    layout: BlockLayout, rows: Int[Tensor, "T"], real: Bool[Tensor, "T"] | None, window: int, causal: bool
) -> Bool[Tensor, "n C K"]:
    """Which slots a slot attends to; a slot without a real token attends to itself."""
    shape = layout.shape
    numbers = rows + 1  # 0 where there is no token
    filled = layout.fill(numbers if real is None else numbers.where(real, 0))
    allowed = layout.queries_of(filled)[:, :, None] == layout.keys_of(filled)[:, None, :]
    # Slots of one block are consecutive, so the distance of a pair depends on its indices in the block alone.
    own = torch.arange(shape.queries, device=rows.device)[:, None]
    distance = torch.arange(shape.keys, device=rows.device) - shape.before - own
    if causal:
        allowed &= distance <= 0
    if shape.keys > window:
        allowed &= distance.abs() <= window
    return allowed


@dataclass(frozen=True)
class Blocks(BlockLayout):
    """The layout of a batch's tokens in blocks, and which pairs of slots attend.

    Attributes:
        allowed: which slots a slot attends to, shape (n, C, K); a slot without a token attends to itself.
    """

    allowed: Bool[Tensor, "n C K"]


def cut(tokens: Ragged, window: int, causal: bool) -> Blocks:
    """Lay out the tokens of a batch in blocks."""
    shape, count = count_blocks(tokens, window, causal)
    layout, slots = lay_out(tokens.rows, tokens.offsets, shape, count)
    real = slots < tokens.lengths[tokens.rows] if tokens.holes else None
    return Blocks(shape, count, layout.indices, attended(layout, tokens.rows, real, window, causal))


class _Seen(torch.autograd.Function):
    """Overlapping views whose gradient `fold` sums; PyTorch's own gradient indexes every element."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: BlockLayout) -> Tensor:
        ctx.save_for_backward(layout.indices)
        ctx.shape, ctx.count = layout.shape, layout.count
        return layout.keys_of(layout.fill(values))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout = BlockLayout(ctx.shape, ctx.count, *ctx.saved_tensors)
        return layout.tokens_of_filled(layout.fold(grad.flatten(2))).unflatten(1, grad.shape[2:]), None


def in_reach(marked: Bool[Tensor, "T"], tokens: Ragged, window: int, causal: bool) -> Bool[Tensor, "T"]:
    """Whether a marked token is within reach of each token; at holes the result has no meaning."""
    first, slots = tokens.offsets[tokens.rows], tokens.slots
    nearest = slots if causal else (slots + window).minimum(tokens.lengths[tokens.rows] - 1)
    before = torch.nn.functional.pad(marked.cumsum(0), (1, 0))
    return before[first + nearest + 1] > before[first + (slots - window).clamp(min=0)]


def whole_tiles(tokens: int | torch.SymInt) -> Any:
    """A number of tokens, rounded up to whole tiles for every tile size of the kernels."""
    return -(-tokens // 128) * 128
