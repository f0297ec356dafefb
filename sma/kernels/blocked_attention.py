"""Windowed attention in PyTorch, in blocks of C slots: cost T (2 W + C), no padding to the longest row."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sma.kernels.blocks import BlockLayout, BlockShape, attended, lay_out
from sma.kernels.finite import finite
from sma.kernels.weighting import Weighting, slope, weigh


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    rows: Tensor,
    positions: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    keep: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Attend; keeps one (n, C, K) tensor for backward, whereas autograd of the single operators would keep four."""
    window, causal, weighting, middle, over_slots, dropout, sizes = settings
    shape, wide = BlockShape(*sizes[:3]), torch.promote_types(v.dtype, torch.float32)
    blocks, slots = lay_out(rows, offsets, shape, sizes[3])
    allowed = attended(blocks, rows, None if lengths is None else slots < lengths[rows], window, causal)
    (v,), broken = finite(v)
    filled_q, filled_k, filled_v = blocks.fill(q), blocks.fill(k), blocks.fill(v)
    scores = torch.bmm(blocks.queries_of(filled_q), blocks.keys_of(filled_k).transpose(1, 2)).to(wide)
    index = []
    if table is not None:
        last = table.shape[0] - 1
        index = [
            _slot_index(shape, middle, last, rows.device) if over_slots else _index(blocks, positions, middle, last)
        ]
        scores += table.to(wide)[index[0]]
    scores.masked_fill_(~allowed, -torch.inf)
    weights = weigh(scores, weighting)
    used = weights if keep is None else weights * keep / (1 - dropout)
    out = torch.bmm(used.to(v.dtype), blocks.keys_of(filled_v))
    if broken is not None:
        out = out.masked_fill(_reached(broken, blocks, allowed), torch.nan)
    kept = weights if weighting == "softmax" else scores
    return blocks.tokens_of(out), [filled_q, filled_k, filled_v, kept, blocks.indices, *index]


def fake_kept(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, over_slots: bool, sizes: Sequence[Any]
) -> list[Tensor]:
    """The tensors that `forward` keeps, without values."""
    shape, count = BlockShape(*sizes[:3]), sizes[3]
    filled = shape.before + count * shape.queries + shape.after
    pairs = (count, shape.queries, shape.keys)
    kept = [x.new_empty(filled, x.shape[1]) for x in (q, k, v)]
    kept += [v.new_empty(pairs, dtype=torch.promote_types(v.dtype, torch.float32))]
    kept += [v.new_empty(q.shape[0], dtype=torch.int64)]
    if table is not None:
        kept += [v.new_empty(pairs[1:] if over_slots else pairs, dtype=torch.int32)]
    return kept


def backward(
    grad: Tensor,
    out: Tensor,
    kept: list[Tensor],
    table: Tensor | None,
    keep: Tensor | None,
    window: int,
    causal: bool,
    weighting: Weighting,
    middle: int,
    over_slots: bool,
    dropout: float,
    sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and of the table (empty without one)."""
    filled_q, filled_k, filled_v, weights, indices, *index = kept
    blocks = BlockLayout(BlockShape(*sizes[:3]), sizes[3], indices)
    narrow, wide = filled_v.dtype, weights.dtype
    scores = weights
    if weighting != "softmax":
        weights = weigh(scores, weighting)
    share = keep / (1 - dropout) if keep is not None else None
    grad_blocks = blocks.queries_of(blocks.fill(grad))
    used = (weights if share is None else weights * share).to(narrow)
    grad_v = blocks.fold(torch.bmm(used.transpose(1, 2), grad_blocks))
    grad_weights = torch.bmm(grad_blocks, blocks.keys_of(filled_v).transpose(1, 2)).to(wide)
    if share is not None:
        grad_weights *= share
    if weighting == "softmax":
        # The sum over the keys of weight times its gradient is the product of the output and its gradient.
        inner = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        grad_scores = grad_weights.sub_(blocks.queries_of(blocks.fill(inner))).mul_(weights)
    else:
        grad_scores = grad_weights.mul_(slope(scores, weighting))
    if table is None:
        grad_table = grad.new_empty(0)
    else:
        pairs = grad_scores.sum(0) if over_slots else grad_scores
        grad_table = grad_scores.new_zeros(table.shape[0])
        grad_table = grad_table.index_add_(0, index[0].reshape(-1), pairs.reshape(-1)).to(table.dtype)
    grad_scores = grad_scores.to(narrow)
    grad_q = blocks.tokens_of(torch.bmm(grad_scores, blocks.keys_of(filled_k)))
    grad_k = blocks.fold(torch.bmm(grad_scores.transpose(1, 2), blocks.queries_of(filled_q)))
    return grad_q, blocks.tokens_of_filled(grad_k), blocks.tokens_of_filled(grad_v), grad_table


def _slot_index(shape: BlockShape, middle: int, last: int, device: torch.device) -> Int[Tensor, "C K"]:
    """Index into the table of every pair by slot distance, the same for every block."""
    keys = torch.arange(shape.keys, device=device, dtype=torch.int32) - shape.before
    return (keys - keys[shape.before :][: shape.queries, None] + middle).clamp_(0, last)


def _index(blocks: BlockLayout, positions: Int[Tensor, "T"], middle: int, last: int) -> Int[Tensor, "n C K"]:
    """Index into the table of every pair by the distance of positions."""
    # A slot without a token is never attended, so its position does not matter.
    filled = blocks.fill(narrowed(positions))
    distance = blocks.keys_of(filled)[:, None, :] - blocks.queries_of(filled)[:, :, None]
    return distance.add_(middle).clamp_(0, last).int()


def narrowed(positions: Int[Tensor, "T"]) -> Int[Tensor, "T"]:
    """Positions as 32-bit numbers where all their differences fit into 30 bits; else unchanged.

    The differences of all pairs are the largest tensor of an attention with a bias, so this halves its size. On an
    accelerator the comparison would be a synchronisation, and a compiler writes no differences to memory: there
    positions stay wide.
    """
    if torch.compiler.is_compiling() or positions.device.type != "cpu" or positions.numel() == 0:
        return positions
    low, high = (int(bound) for bound in positions.aminmax())
    return (positions - low).int() if high - low < 2**30 else positions


def _reached(broken: Bool[Tensor, "T"], blocks: BlockLayout, allowed: Bool[Tensor, "n C K"]) -> Bool[Tensor, "n C 1"]:
    """The slots that attend to a broken token."""
    return (blocks.keys_of(blocks.fill(broken))[:, None] & allowed).any(-1, keepdim=True)
