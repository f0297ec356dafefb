"""Multi-head attention over all tokens of a row."""

from typing import Literal

import torch
from torch import Tensor

from sma.modules.cache import Cache
from sma.modules.multihead import MultiHead, MultiHeadSpec, finite
from sma.ragged import Ragged
from sma.spec import register
from sma.submodule import MACs


@register
class AttentionSpec(MultiHeadSpec):
    """Spec of `Attention`."""

    kind: Literal["attention"] = "attention"

    def build(self, width: int) -> "Attention":
        return Attention(self, width)

    def macs(self, width: int, tokens: int) -> MACs:
        return MACs(matmul=4 * tokens * width * width + 2 * tokens * tokens * width)


class Attention(MultiHead):
    r"""$\mathrm{softmax}(Q K^\top / \sqrt{d}) V$ per head, d = D / heads, over all tokens of the row, by PyTorch's
    fused kernels.

    Streaming it keeps every key and value, so memory and the cost of a step grow. On a GPU it runs by flash attention
    if causal, or if the rows have equally many tokens; otherwise their ends are masked, and the memory-efficient kernel
    runs.

    Args:
        spec: heads, direction, positions.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. `in_proj` holds the weights of queries, keys and values.

    Raises:
        SpecError: the width is no multiple of the heads, or a head has an odd width under rotary positions.

    Reference:
        Vaswani et al., "Attention Is All You Need", arXiv 1706.03762.
    """

    def __init__(self, spec: AttentionSpec, width: int) -> None:
        super().__init__(spec, width)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged) -> Tensor:
        longest = tokens.longest  # asked once: on a GPU the program waits for the answer
        (q, mask), (k, _), (v, _) = (tokens.with_values(x).to_padded(longest) for x in (q, k, v))
        if not self.causal:
            return tokens.from_padded(self._product(q, k, v, self._mask(mask, tokens)))
        # What lies behind a row's tokens is never seen by them, so no mask is needed.
        k, v, broken = finite(k, v)
        attended = self._product(q, k, v, is_causal=True)
        if broken is not None:
            attended = attended.masked_fill((broken.cumsum(1) > 0)[..., None], torch.nan)
        return tokens.from_padded(attended)

    def _onward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged, before: Cache, after: Cache) -> Tensor:
        q, _ = tokens.with_values(q).to_padded()
        newest = before.seen[:, None] + torch.arange(q.shape[1], device=q.device)
        # What lies behind a row's tokens is empty, and a padded query sees something, so that it has weights.
        allowed = torch.arange(after.size, device=q.device) <= newest[..., None]
        keys, values = (entry.to(q.dtype) for entry in after.entries)
        return tokens.from_padded(self._contained(q, keys, values, allowed))

    def _mask(self, mask_BS: Tensor, tokens: Ragged) -> Tensor | None:
        # Without a mask the flash kernel can run. Rows that are all as long as the longest need none.
        if not tokens.holes and (
            tokens.stride is not None or (tokens.bound is None and tokens.rows.shape[0] == mask_BS.numel())
        ):
            return None
        # A row without tokens would have nothing to attend to; its first hole is harmless, since nobody reads the
        # result.
        first = torch.arange(mask_BS.shape[1], device=mask_BS.device) == 0
        return (mask_BS | first)[:, None, :]
