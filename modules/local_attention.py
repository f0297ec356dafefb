"""Multi-head attention inside a window of tokens: the usual transformer's, at a cost that is linear in their number."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sma.modules.blocks import block_shape, cut, in_reach
from sma.modules.cache import Cache
from sma.modules.multihead import MultiHead, MultiHeadSpec, finite
from sma.ragged import Ragged
from sma.spec import register
from sma.submodule import MACs


@register
class LocalAttentionSpec(MultiHeadSpec):
    """Spec of `LocalAttention`."""

    kind: Literal["local_attention"] = "local_attention"
    window: int = Field(ge=1, description="active tokens in reach on each side, W; the kind 'attention' attends to all")

    def build(self, width: int) -> "LocalAttention":
        return LocalAttention(self, width)

    def macs(self, width: int, tokens: int) -> MACs:
        pairs = block_shape(tokens, self.window, not self.bidirectional).pairs(tokens)
        return MACs(matmul=4 * tokens * width * width + 2 * pairs * width)


class LocalAttention(MultiHead):
    r"""$\mathrm{softmax}(Q K^\top / \sqrt{d}) V$ per head, d = D / heads, over the tokens within W slots, by PyTorch's
    fused kernels.

    Token i attends to tokens j of its row with $|i - j| \le W$, causal $0 \le i - j \le W$, where i and j count the
    tokens that it is given: routed, it reaches the last W *active* tokens, however far back they stand. With W of at
    least the row's length it is `Attention`. Rows are cut into blocks of half a window, so cost and memory grow as T W.
    The blocks are masked, so on a GPU the memory-efficient kernel runs, not flash attention. Streaming it keeps the
    keys and values of the last W tokens of each row.

    Args:
        spec: heads, window, direction, positions.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. `in_proj` holds the weights of queries, keys and values.

    Raises:
        SpecError: the width is no multiple of the heads, or a head has an odd width under rotary positions.

    Reference:
        Child et al., "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509; Beltagy et al., arXiv
        2004.05150.
    """

    spec: LocalAttentionSpec

    def __init__(self, spec: LocalAttentionSpec, width: int) -> None:
        super().__init__(spec, width, spec.window)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged) -> Tensor:
        if tokens.holes:  # whatever stands there would be multiplied by 0
            q, k, v = (x.where(tokens.mask[:, None, None], 0) for x in (q, k, v))
        k, v, broken = finite(k, v)
        blocks = cut(tokens, self.spec.window, self.causal)
        queries, keys, values = blocks.queries_of(blocks.fill(q)), blocks.seen_by(k), blocks.seen_by(v)
        attended = self._product(queries, keys, values, blocks.allowed).flatten(0, 1).index_select(0, blocks.places)
        if broken is None:
            return attended
        return attended.masked_fill(in_reach(broken, tokens, self.spec.window, self.causal)[:, None], torch.nan)

    def _onward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged, before: Cache, after: Cache) -> Tensor:
        longest = tokens.longest
        if longest <= max(1, self.spec.window // 2):
            return self._short(q, k, v, tokens, before, longest)
        joined, (keys, values) = before.join(tokens), before.entries
        queries = q.new_zeros(joined.tokens.rows.shape[0], *q.shape[1:]).index_copy(0, joined.new, q)
        attended = self._whole(queries, joined.fill(keys, k), joined.fill(values, v), joined.tokens)
        return attended.index_select(0, joined.new)

    def _short(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged, before: Cache, longest: int) -> Tensor:
        """New tokens that fit into one block: of every row against what it holds, in the order of the ring."""
        (q, _), (k, _), (v, _) = (tokens.with_values(x).to_padded(longest) for x in (q, k, v))
        keys, values = (torch.cat([entry.to(x.dtype), x], 1) for entry, x in zip(before.entries, (k, v), strict=True))
        newest = before.seen[:, None] + torch.arange(longest, device=q.device)
        slots = torch.cat([before.slots, newest], 1)[:, None]
        distance = newest[..., None] - slots
        allowed = (slots >= 0) & (distance >= 0) & (distance <= self.spec.window)
        return tokens.from_padded(self._contained(q, keys, values, allowed))
