"""Multi-head sliding-window attention: a transformer's attention at a cost that is linear in the number of tokens."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sma.kernels.blocks import block_shape, cut, in_reach
from sma.kernels.finite import finite
from sma.modules.cache import Cache
from sma.modules.multihead import MultiHead, MultiHeadSpec
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
        return self.matmuls(width, tokens, pairs)


class LocalAttention(MultiHead):
    r"""$\mathrm{softmax}(Q K^\top / \sqrt{d}) V$ per head, d = `head_size` or D / heads, over the tokens within
    W slots, by PyTorch's fused kernels.

    Token i attends to tokens j of its row with $|i - j| \le W$, causal $0 \le i - j \le W$, where i and j count the
    given tokens: routed, the window holds the last W *active* tokens, at any distance. With W of at least the row's
    length this is `Attention`. Rows are cut into blocks of half a window, so cost and memory grow as T W. The blocks
    are masked, so on a GPU the memory-efficient kernel runs instead of flash attention. A stream keeps the keys and
    values of the last W tokens of each row.

    Args:
        spec: heads, window, direction, positions.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. `in_proj` holds the weights of queries, keys and values.

    Raises:
        SpecError: the width is not a multiple of the heads, or a head has an odd width under rotary positions.

    Reference:
        Child et al., "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509; Beltagy et al., arXiv
        2004.05150.
    """

    spec: LocalAttentionSpec

    def __init__(self, spec: LocalAttentionSpec, width: int) -> None:
        super().__init__(spec, width, spec.window)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged) -> Tensor:
        if tokens.holes:  # a weight of 0 does not remove non-finite values
            q, k, v = (x.where(tokens.mask[:, None, None], 0) for x in (q, k, v))
        (k, v), broken = finite(k, v, axes=2)
        blocks = cut(tokens, self.spec.window, self.causal)
        queries, keys, values = blocks.queries_of(blocks.fill(q)), blocks.seen_by(k), blocks.seen_by(v)
        attended = blocks.tokens_of(self._product(queries, keys, values, blocks.allowed))
        if broken is None:
            return attended
        return attended.masked_fill(in_reach(broken, tokens, self.spec.window, self.causal)[:, None], torch.nan)

    def _attend_stream(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged, before: Cache, after: Cache) -> Tensor:
        longest = tokens.longest
        if longest <= max(1, self.spec.window // 2):
            return self._short(q, k, v, tokens, before, longest)
        joined, (keys, values) = before.join(tokens), before.entries
        queries = q.new_zeros(joined.tokens.rows.shape[0], *q.shape[1:]).index_copy_(0, joined.new, q)
        attended = self._attend(queries, joined.fill(keys, k), joined.fill(values, v), joined.tokens)
        return attended.index_select(0, joined.new)

    def _short(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged, before: Cache, longest: int) -> Tensor:
        """Attend from new tokens that fit into one block to those and to the cache, in the order of its ring buffer."""
        (q, _), (k, _), (v, _) = (tokens.with_values(x).to_padded(longest) for x in (q, k, v))
        keys, values = (torch.cat([entry.to(x.dtype), x], 1) for entry, x in zip(before.entries, (k, v), strict=True))
        newest = before.seen[:, None] + torch.arange(longest, device=q.device)
        slots = torch.cat([before.slots, newest], 1)[:, None]
        distance = newest[..., None] - slots
        allowed = (slots >= 0) & (distance >= 0) & (distance <= self.spec.window)
        return tokens.from_padded(self._contained(q, keys, values, allowed))
