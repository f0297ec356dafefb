"""Full attention of ragged tokens: every pair of a row, by slices of C queries, so that memory is T C."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sma.devices import without_autocast
from sma.kernels.blocked_attention import narrowed
from sma.kernels.finite import finite
from sma.kernels.weighting import Weighting, weigh
from sma.modules.sliding_window import Bias
from sma.ragged import Ragged, lay_padded

# Queries of a slice, C. The scores of a slice fit into the cache of a CPU. A whole row of 4,096 at once took four times
# the memory and more time.
SLICE = 512


def pairs(tokens: int, causal: bool) -> int:
    """Pairs that are multiplied for a row of `tokens` tokens: all; if causal, those with keys up to the slice's end."""
    return sum((stop - start) * (stop if causal else tokens) for start, stop in _slices(tokens, SLICE))


def attend_all(
    q: Float[Tensor, "T Z"],
    k: Float[Tensor, "T Z"],
    v: Float[Tensor, "T H"],
    tokens: Ragged,
    *,
    causal: bool,
    weighting: Weighting = "softmax",
    bias: Bias | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "T H"]:
    """`sma.modules.sliding_window.attend` without a window; backward recomputes the scores of a slice.

    Args:
        q, k, v, tokens, causal, weighting, bias, dropout: as there; the bias counts original positions.
    """
    longest, compiling = tokens.longest, torch.compiler.is_compiling()
    with without_autocast(q.device):
        (q, real), (k, _), (v, _) = (tokens.with_values(x.to(v.dtype)).to_padded(longest) for x in (q, k, v))
        positions = _padded(narrowed(tokens.positions), tokens, longest)
        # A row without tokens attends to its first hole, so that its weights are defined; no result is read there.
        seen = real | (torch.arange(longest, device=real.device) == 0)
        (v,), broken = finite(v)
        table = None if bias is None else bias.table
        parts = []
        # A compiler cannot unroll an unknown number of slices, and chooses itself what to save.
        for start, stop in _slices(longest, longest if compiling else SLICE):
            keys = slice(0, stop if causal else longest)
            part = partial(
                _attend_slice,
                positions_BC=positions[:, start:stop],
                positions_BK=positions[:, keys],
                seen_BK=seen[:, keys],
                broken_BK=None if broken is None else broken[:, keys],
                start=start if causal else None,
                middle=0 if bias is None else bias.middle,
                weighting=weighting,
                dropout=dropout,
            )
            inputs = q[:, start:stop], k[:, keys], v[:, keys], table
            if compiling or longest <= SLICE or not torch.is_grad_enabled():
                parts.append(part(*inputs))
            else:
                parts.append(checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=dropout > 0))
        return tokens.from_padded(torch.cat(parts, 1) if parts else v)


def _padded(values: Int[Tensor, "T"], tokens: Ragged, longest: int) -> Int[Tensor, "B S"]:
    """`Ragged.to_padded` for integers."""
    if tokens.stride is not None:
        return values.unflatten(0, (tokens.num_rows, longest))
    return lay_padded(values, tokens, longest)


def _slices(tokens: int, size: int) -> list[tuple[int, int]]:
    if tokens <= size:
        return [(0, tokens)]
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _attend_slice(
    q_BCZ: Tensor,
    k_BKZ: Tensor,
    v_BKH: Tensor,
    table: Tensor | None,
    *,
    positions_BC: Int[Tensor, "B C"],
    positions_BK: Int[Tensor, "B K"],
    seen_BK: Tensor,
    broken_BK: Tensor | None,
    start: int | None,
    middle: int,
    weighting: Weighting,
    dropout: float,
) -> Tensor:
    """Attention of the queries from slot `start` on to all their keys; None if they attend to later keys too."""
    wide = torch.promote_types(v_BKH.dtype, torch.float32)
    scores = torch.bmm(q_BCZ, k_BKZ.transpose(1, 2)).to(wide)
    if table is not None:
        index = (positions_BK[:, None, :] - positions_BC[:, :, None]).add_(middle).clamp_(0, table.shape[0] - 1)
        scores = scores + table.to(wide).index_select(0, index.reshape(-1)).reshape(scores.shape)
    hidden = ~seen_BK[:, None]
    if start is not None:
        slots = torch.arange(seen_BK.shape[1], device=seen_BK.device)
        hidden = hidden | (slots > slots[start:, None][: q_BCZ.shape[1]])
    weights = weigh(scores.masked_fill(hidden, -torch.inf), weighting)
    out = torch.bmm(torch.nn.functional.dropout(weights, dropout).to(v_BKH.dtype), v_BKH)
    if broken_BK is None:
        return out
    return out.masked_fill((broken_BK[:, None] & ~hidden).any(-1, keepdim=True), torch.nan)
