"""Sliding-window attention of ragged tokens in blocks of C slots: cost T (2 W + C), no padding to the longest row."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.autograd import first_derivative
from sma.devices import without_autocast
from sma.modules.blocks import BlockLayout, Blocks, cut
from sma.modules.cache import Cache
from sma.modules.finite import finite
from sma.ragged import Ragged

Weighting = Literal["softmax", "relu2", "laplace"]

# Mean and standard deviation of Mega's laplace function, which approximates relu^2.
LAPLACE_MEAN, LAPLACE_STD = 0.707107, 0.282095


class Bias(NamedTuple):
    """Learned numbers per distance, added to the scores.

    Attributes:
        table: one entry per distance, shape (P,).
        middle: index of distance 0; distances beyond the table take the last entry on their side.
        over_slots: whether distances count active tokens instead of original positions.
    """

    table: Float[Tensor, "P"]
    middle: int
    over_slots: bool


def attend(
    q: Float[Tensor, "T Z"],
    k: Float[Tensor, "T Z"],
    v: Float[Tensor, "T H"],
    tokens: Ragged,
    *,
    window: int,
    causal: bool,
    weighting: Weighting = "softmax",
    bias: Bias | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "T H"]:
    r"""Sliding-window attention of one head: $o_i = \sum_j w(q_i \cdot k_j + b_{ij}) v_j$ over the tokens j of the
    row in reach of i.

    Args:
        q, k, v: queries, already scaled, keys and values of the tokens.
        tokens: rows and positions of the tokens.
        window: slots in reach, |i - j| <= window.
        causal: only j <= i.
        weighting: `softmax` over the reach; `relu2` or `laplace` of each score. A pair out of reach has weight 0.
        bias: added to the scores.
        dropout: probability of dropping a weight.
    """
    blocks = cut(tokens, window, causal)
    table, index = None, None
    if bias is not None:
        table, index = bias.table, _bias_index(blocks, bias, tokens.positions)
    if torch.compiler.is_compiling():
        return _attend_compiled(q, k, v, table, index, blocks, weighting, dropout)
    result: Tensor = _BlockAttention.apply(q, k, v, table, index, blocks, weighting, dropout)
    return result


def attend_one(
    q: Float[Tensor, "T Z"],
    k: Float[Tensor, "T Z"],
    v: Float[Tensor, "T H"],
    tokens: Ragged,
    cache: Cache,
    *,
    weighting: Weighting = "softmax",
    bias: Bias | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "T H"]:
    """Causal `attend` for at most one new token per row, which attends to itself and to the cache of its row.

    Args:
        q, k, v, tokens, weighting, bias, dropout: as in `attend`; the tokens are packed, without holes.
        cache: keys, values and positions.
    """
    all_rows = tokens.rows.shape[0] == tokens.num_rows
    keys, values, positions, slots, seen = (
        part if all_rows else part.index_select(0, tokens.rows) for part in (*cache.entries, cache.slots, cache.seen)
    )
    with without_autocast(q.device):
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k = q.to(v.dtype), k.to(v.dtype)
        scores = torch.bmm(q[:, None], keys.to(v.dtype).transpose(1, 2)).squeeze(1).to(wide)
        own = (q * k).sum(-1, keepdim=True).to(wide)
        if bias is not None:
            distance = slots - seen[:, None] if bias.over_slots else positions - tokens.positions[:, None]
            table = bias.table.to(wide)
            scores = scores + table[(distance + bias.middle).clamp(0, table.shape[0] - 1)]
            own = own + table[bias.middle]
        scores = torch.cat([scores.masked_fill(slots < 0, -torch.inf), own], dim=1)
        weights = torch.nn.functional.dropout(weigh(scores, weighting), dropout).to(v.dtype)
        return torch.bmm(weights[:, None, :-1], values.to(v.dtype)).squeeze(1) + weights[:, -1:] * v


def _bias_index(blocks: Blocks, bias: Bias, given: Int[Tensor, "T"]) -> Int[Tensor, "n C K"] | Int[Tensor, "C K"]:
    """Index into the table of every pair; over slots it is the same for every block."""
    last = bias.table.shape[0] - 1
    if bias.over_slots:
        keys = torch.arange(blocks.shape.keys, device=blocks.indices.device, dtype=torch.int32) - blocks.shape.before
        return (keys - keys[blocks.shape.before :][: blocks.shape.queries, None] + bias.middle).clamp_(0, last)
    # A slot without a token is never attended, so its position does not matter.
    positions = narrowed(blocks.positions, given)
    distance = blocks.keys_of(positions)[:, None, :] - blocks.queries_of(positions)[:, :, None]
    return distance.add_(bias.middle).clamp_(0, last).int()


def narrowed(positions: Int[Tensor, "*S"], given: Int[Tensor, "T"]) -> Int[Tensor, "*S"]:
    """Positions as 32-bit numbers where all differences of the given ones fit into 30 bits; else unchanged.

    The differences of all pairs are the largest tensor of an attention with a bias, so this halves its size. On an
    accelerator the comparison would be a synchronisation, and a compiler writes no differences to memory: there
    positions stay wide.
    """
    if torch.compiler.is_compiling() or given.device.type != "cpu" or given.numel() == 0:
        return positions
    low, high = (int(bound) for bound in given.aminmax())
    return (positions - low).int() if high - low < 2**30 else positions


class _BlockAttention(torch.autograd.Function):
    """Saves one (n, C, K) tensor for backward, where a chain of operators would save four."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor | None,
        index: Tensor | None,
        blocks: Blocks,
        weighting: Weighting,
        dropout: float,
    ) -> Tensor:
        allowed = blocks.allowed
        with without_autocast(q.device):
            wide = torch.promote_types(v.dtype, torch.float32)
            q, k = q.to(v.dtype), k.to(v.dtype)
            (v,), broken = finite(v)
            filled_q, filled_k, filled_v = blocks.fill(q), blocks.fill(k), blocks.fill(v)
            scores = torch.bmm(blocks.queries_of(filled_q), blocks.keys_of(filled_k).transpose(1, 2)).to(wide)
            if table is not None:
                scores += table.to(wide)[index]
            scores.masked_fill_(~allowed, -torch.inf)
            weights = weigh(scores, weighting)
            keep = torch.rand_like(weights) >= dropout if dropout else None
            used = weights if keep is None else weights * keep / (1 - dropout)
            out = torch.bmm(used.to(v.dtype), blocks.keys_of(filled_v))
            if broken is not None:
                out = out.masked_fill(_reached(broken, blocks), torch.nan)
            out = blocks.tokens_of(out)
        kept = weights if weighting == "softmax" else scores
        # Activation checkpointing cannot free what is not in save_for_backward, so the rest is sizes alone.
        ctx.save_for_backward(filled_q, filled_k, filled_v, kept, keep, out, index, blocks.indices)
        ctx.shape, ctx.count, ctx.weighting, ctx.dropout = blocks.shape, blocks.count, weighting, dropout
        ctx.table = None if table is None else (table.shape[0], table.dtype)
        return out

    @staticmethod
    @first_derivative("sliding-window attention")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        filled_q, filled_k, filled_v, kept, keep, out, index, indices = ctx.saved_tensors
        blocks, weighting = BlockLayout(ctx.shape, ctx.count, indices), ctx.weighting
        narrow, wide = filled_v.dtype, kept.dtype
        weights = kept if weighting == "softmax" else weigh(kept, weighting)
        share = keep / (1 - ctx.dropout) if keep is not None else None
        grad_blocks = blocks.queries_of(blocks.fill(grad.to(narrow)))
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
            grad_scores = grad_weights.mul_(_slope(kept, weighting))
        grad_table = None
        if ctx.table is not None:
            size, dtype = ctx.table
            pairs = grad_scores if index.ndim == 3 else grad_scores.sum(0)
            grad_table = grad_scores.new_zeros(size).index_add_(0, index.reshape(-1), pairs.reshape(-1)).to(dtype)
        grad_scores = grad_scores.to(narrow)
        grad_q = blocks.tokens_of(torch.bmm(grad_scores, blocks.keys_of(filled_k)))
        grad_k = blocks.fold(torch.bmm(grad_scores.transpose(1, 2), blocks.queries_of(filled_q)))
        grad_k, grad_v = blocks.tokens_of_filled(grad_k), blocks.tokens_of_filled(grad_v)
        return grad_q, grad_k, grad_v, grad_table, None, None, None, None


def _attend_compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    index: Tensor | None,
    blocks: Blocks,
    weighting: Weighting,
    dropout: float,
) -> Tensor:
    """`_BlockAttention` as a chain of operators, which a compiler differentiates, fuses and saves as it chooses."""
    with without_autocast(q.device):
        wide = torch.promote_types(v.dtype, torch.float32)
        (v,), broken = finite(v)
        filled_q, filled_k, filled_v = (blocks.fill(x.to(v.dtype)) for x in (q, k, v))
        scores = torch.bmm(blocks.queries_of(filled_q), blocks.keys_of(filled_k).transpose(1, 2)).to(wide)
        if table is not None and index is not None:
            scores = scores + table.to(wide)[index]
        weights = torch.nn.functional.dropout(
            weigh(scores.masked_fill(~blocks.allowed, -torch.inf), weighting), dropout
        )
        out = torch.bmm(weights.to(v.dtype), blocks.keys_of(filled_v))
        return blocks.tokens_of(out if broken is None else out.masked_fill(_reached(broken, blocks), torch.nan))


def _reached(broken: Bool[Tensor, "T"], blocks: Blocks) -> Bool[Tensor, "n C 1"]:
    """The slots that attend to a broken token."""
    return (blocks.keys_of(blocks.fill(broken))[:, None] & blocks.allowed).any(-1, keepdim=True)


def weigh(scores: Tensor, weighting: Weighting) -> Tensor:
    """Weights of scores; a score of -inf, that of a pair out of reach, gives exactly 0."""
    if weighting == "softmax":
        return torch.softmax(scores, dim=-1)
    if weighting == "relu2":
        positive = scores.relu()
        return positive * positive if torch.is_grad_enabled() else positive.square_()
    return torch.special.erf((scores - LAPLACE_MEAN) / (LAPLACE_STD * 2**0.5)).add_(1).mul_(0.5)


def _slope(scores: Tensor, weighting: Weighting) -> Tensor:
    """Derivative of a weight by its score."""
    if weighting == "relu2":
        return scores.relu().mul_(2)
    return torch.exp(-0.5 * ((scores - LAPLACE_MEAN) / LAPLACE_STD).square()).div_(LAPLACE_STD * (2 * torch.pi) ** 0.5)
