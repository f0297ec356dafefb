"""Multi-head attention over all tokens of a row."""

from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sma.errors import SpecError
from sma.initial import reset_linear_
from sma.modules.cache import Cache, empty_cache
from sma.positions import NoPositionSpec, PositionSpec, RelativeBiasSpec, RotarySpec, rotate
from sma.ragged import Ragged, pack, unpack
from sma.spec import register
from sma.submodule import Operations, State, SubModule, SubModuleSpec, check_sizes, placement


@register
class AttentionSpec(SubModuleSpec):
    """Spec of `Attention`."""

    kind: Literal["attention"] = "attention"
    heads: int = Field(default=4, ge=1, description="attention heads; they share the channels equally")
    bidirectional: bool = Field(default=True, description="attend to later tokens too; false is causal")
    position: PositionSpec = Field(default=NoPositionSpec(), description="rotary or none")
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="probability of dropping an attention weight")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.position, RelativeBiasSpec):
            raise ValueError("position kind 'relative_bias' needs the gau sub-module; use {kind: rotary} or {kind: none}")
        return self

    def build(self, width: int) -> "Attention":
        return Attention(self, width)

    def num_parameters(self, width: int) -> int:
        return 4 * width * (width + 1)

    def operations(self, width: int, tokens: int) -> Operations:
        return Operations(4 * tokens * width * width + 2 * tokens * tokens * width)


class Attention(SubModule):
    r"""$\mathrm{softmax}(Q K^\top / \sqrt{d}) V$ per head, d = D / heads, over all tokens of the row, by PyTorch's fused kernels.

    Args:
        spec: heads, direction, positions.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. `fused` holds the weights of queries, keys and values.

    Raises:
        SpecError: the width is no multiple of the heads, or a head has an odd width under rotary positions.

    Reference:
        Vaswani et al., "Attention Is All You Need", arXiv 1706.03762.
    """

    def __init__(self, spec: AttentionSpec, width: int) -> None:
        super().__init__()
        _check_heads(spec, width)
        self.spec = spec
        self.causal = not spec.bidirectional
        self.fused = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters."""
        for linear in (self.fused, self.out):
            reset_linear_(linear)

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cache:
        """Make the state of streams that have seen nothing: every key and value, so memory and the cost of a step grow.

        See `SubModule.init_state`.
        """
        self._refuse_unless_causal()
        device, dtype = placement(self, device, dtype)
        shape = (self.spec.heads, self.out.in_features // self.spec.heads)
        return empty_cache(batch_size, None, (shape, shape), device, (dtype, dtype))

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Attend along every row; see `SubModule.forward`."""
        cache = self._continue(state, Cache, tokens)
        given, real = tokens, None
        if cache is not None:
            shape = (self.spec.heads, self.out.in_features // self.spec.heads)
            check_sizes(self, cache.sizes, (None, shape, shape))
            tokens, real = pack(tokens)
        q, k, v = self.fused(tokens.values).unflatten(-1, (3, self.spec.heads, -1)).unbind(1)
        if isinstance(self.spec.position, RotarySpec):
            q, k = (rotate(x, tokens.positions, self.spec.position.base) for x in (q, k))
        if cache is None:
            attended = self._whole(q, k, v, tokens)
        else:
            after = cache.append(tokens, k, v)
            attended = self._onward(q, tokens, cache, after)
            cache = after
        return unpack(self.out(attended), real, given), cache

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged) -> Tensor:
        (q, mask), (k, _), (v, _) = (tokens.with_values(x).to_padded() for x in (q, k, v))
        broken = None
        if self.causal:
            k, v, broken = _finite(k, v)
            broken = broken.cumsum(1) > 0
        attended = self._product(q, k, v, attn_mask=self._mask(mask, tokens), is_causal=self.causal)
        if broken is not None:
            attended = attended.masked_fill(broken[..., None], torch.nan)
        return tokens.from_padded(attended)

    def _onward(self, q: Tensor, tokens: Ragged, before: Cache, after: Cache) -> Tensor:
        (k, v), (q, _) = after.entries, tokens.with_values(q).to_padded()
        k, v, broken = _finite(k.to(q.dtype), v.to(q.dtype))
        newest = before.seen[:, None] + torch.arange(q.shape[1], device=q.device)
        # What lies behind a row's tokens is empty, and a padded query sees something, so that it has weights.
        reach = torch.arange(k.shape[1], device=q.device) <= newest[..., None]
        attended = self._product(q, k, v, attn_mask=reach[:, None])
        return tokens.from_padded(attended.masked_fill((reach & broken[:, None]).any(-1, keepdim=True), torch.nan))

    def _product(self, q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, is_causal: bool = False) -> Tensor:
        dropout = self.spec.attention_dropout if self.training else 0.0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        return attended.transpose(1, 2).flatten(2)

    def _mask(self, mask_BS: Tensor, tokens: Ragged) -> Tensor | None:
        # Causal: what lies behind a row's tokens is never seen by them, so no mask is needed.
        if self.causal or (tokens.stride is not None and not tokens.holes):
            return None
        # A row without tokens would have nothing to attend to; its first hole is harmless, since nobody reads the result.
        first = torch.arange(mask_BS.shape[1], device=mask_BS.device) == 0
        return (mask_BS | first)[:, None, None, :]


def _finite(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with zeros for tokens that are not finite, and which those are: a weight of 0 times NaN is NaN."""
    broken = ~(k.isfinite().all(-1) & v.isfinite().all(-1)).all(-1)
    return k.masked_fill(broken[..., None, None], 0), v.masked_fill(broken[..., None, None], 0), broken


def _check_heads(spec: AttentionSpec, width: int) -> None:
    if width % spec.heads:
        raise SpecError(f"AttentionSpec: heads={spec.heads} must divide the width {width} of the tokens")
    if isinstance(spec.position, RotarySpec) and width // spec.heads % 2:
        raise SpecError(f"AttentionSpec: heads={spec.heads} give {width // spec.heads} channels each; rotary positions need an even number")
