"""Multi-head attention to all tokens of a row."""

from typing import Literal

import torch
from torch import Tensor

from sma.kernels.finite import finite
from sma.modules.cache import Cache
from sma.modules.multihead import MultiHead, MultiHeadSpec
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
        return self.matmuls(width, tokens, tokens * tokens)


class Attention(MultiHead):
    r"""$\mathrm{softmax}(Q K^\top / \sqrt{d}) V$ per head, d = `head_size` or D / heads, over all tokens of the
    row, by PyTorch's fused kernels.

    A stream keeps every key and value, so memory and the cost of a step grow. On a GPU, flash attention runs if it is
    causal or if all rows have equally many tokens. Otherwise a mask hides the ends of rows, and the memory-efficient
    kernel runs.

    Args:
        spec: heads, direction, positions.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. `in_proj` holds the weights of queries, keys and values.

    Raises:
        SpecError: the width is not a multiple of the heads, or a head has an odd width under rotary positions.

    Reference:
        Vaswani et al., "Attention Is All You Need", arXiv 1706.03762.
    """

    def __init__(self, spec: AttentionSpec, width: int) -> None:
        super().__init__(spec, width)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged) -> Tensor:
        longest = tokens.longest  # read once: on a GPU it is a synchronisation
        (q, mask), (k, _), (v, _) = (tokens.with_values(x).to_padded(longest) for x in (q, k, v))
        if not self.causal:
            return tokens.from_padded(self._product(q, k, v, self._mask(mask, tokens)))
        # A causal query never attends to the padding after its row, so no mask is needed.
        (k, v), broken = finite(k, v, axes=2)
        attended = self._product(q, k, v, is_causal=True)
        if broken is not None:
            attended = attended.masked_fill((broken.cumsum(1) > 0)[..., None], torch.nan)
        return tokens.from_padded(attended)

    def _attend_stream(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged, before: Cache, after: Cache) -> Tensor:
        q, _ = tokens.with_values(q).to_padded()
        newest = before.seen[:, None] + torch.arange(q.shape[1], device=q.device)
        # Slots after the tokens of a row are empty. A padded query attends to earlier tokens, so its weights exist.
        allowed = torch.arange(after.size, device=q.device) <= newest[..., None]
        keys, values = (entry.to(q.dtype) for entry in after.entries)
        return tokens.from_padded(self._contained(q, keys, values, allowed))

    def _mask(self, mask_BS: Tensor, tokens: Ragged) -> Tensor | None:
        # Without a mask the flash kernel can run. Rows of equal length need none.
        if not tokens.holes and (
            tokens.stride is not None or (tokens.bound is None and tokens.rows.shape[0] == mask_BS.numel())
        ):
            return None
        # A row without tokens attends to its first hole, so that its weights are defined; no result is read there.
        first = torch.arange(mask_BS.shape[1], device=mask_BS.device) == 0
        return (mask_BS | first)[:, None, :]
