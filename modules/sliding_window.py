"""Sliding-window attention of ragged tokens, whole rows or one step of a stream."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sma.devices import without_autocast
from sma.kernels.weighting import Weighting, weigh
from sma.kernels.windowed_attention import windowed_attention
from sma.modules.cache import Cache
from sma.ragged import Ragged


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
    table, middle, over_slots = (None, 0, False) if bias is None else bias
    return windowed_attention(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        table,
        tokens,
        window=window,
        causal=causal,
        weighting=weighting,
        middle=middle,
        over_slots=over_slots,
        dropout=dropout,
    )


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
