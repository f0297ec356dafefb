"""Base class of the multi-head attentions: fields, projections, streams, and products that confine a NaN."""

from typing import Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sma.errors import SpecError
from sma.init import reset_linear_
from sma.kernels.finite import finite
from sma.modules.cache import Cache, CachedSubModule
from sma.padding import unpack
from sma.positions import NoPositionSpec, PositionSpec
from sma.ragged import Ragged
from sma.submodule import MACs, State, SubModuleSpec


class MultiHeadSpec(SubModuleSpec):
    """Fields of every multi-head attention."""

    heads: int = Field(default=4, ge=1, description="attention heads; they share the channels equally")
    head_size: int | None = Field(
        default=None, ge=1, description="channels of a head; null: the width divided by the number of heads"
    )
    bidirectional: bool = Field(default=True, description="attend to later tokens too; false is causal")
    position: PositionSpec = Field(default=NoPositionSpec(), description="rotary or none")
    attention_dropout: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="probability of dropping an attention weight"
    )

    @model_validator(mode="after")
    def _position_fits(self) -> Self:
        if self.position.has_table:
            raise ValueError(
                f"position kind {self.position.kind!r} adds a table, which needs the gau sub-module; "
                "use {kind: rotary} or {kind: none}"
            )
        if self.head_size is not None:
            self.position.check_attention(getattr(self, "window", None), self.head_size, f"head_size={self.head_size}")
        return self

    def channels(self, width: int) -> int:
        """Channels of all heads together."""
        return width if self.head_size is None else self.heads * self.head_size

    def num_parameters(self, width: int) -> int:
        channels = self.channels(width)
        return 3 * channels * (width + 1) + (channels + 1) * width

    def matmuls(self, width: int, tokens: int, pairs: int) -> MACs:
        """MACs of a row of `tokens` tokens in which `pairs` pairs of a query and a key are multiplied."""
        return MACs(matmul=(4 * tokens * width + 2 * pairs) * self.channels(width))


class MultiHead(CachedSubModule):
    """Projections to queries, keys and values of every head, and from all heads to the result.

    A subclass defines which tokens attend to which. The result is the sum of what each head contributes, so heads can
    also be separate sub-modules, each with a decision per token: `heads=1`, and `head_size` channels.

    Args:
        spec: heads, direction, positions.
        width: channels of every token, D.
        window: tokens of each row that a stream keeps; None for all.

    Raises:
        SpecError: the width is not a multiple of the heads, or a head has an odd width under rotary positions.
    """

    def __init__(self, spec: MultiHeadSpec, width: int, window: int | None = None) -> None:
        _check_heads(spec, width, window)
        channels = spec.channels(width)
        head = spec.heads, channels // spec.heads
        super().__init__(window, head, head)
        self.spec = spec
        self.causal = not spec.bidirectional
        self.in_proj = nn.Linear(width, 3 * channels)
        self.out_proj = nn.Linear(channels, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights of both linear maps, and set their biases to 0."""
        for linear in (self.in_proj, self.out_proj):
            reset_linear_(linear)

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Attend along every row; see `SubModule.forward`."""
        cache, packed, real = self._resume(state, tokens)
        q, k, v = self.in_proj(packed.values).unflatten(-1, (3, *self.entry_shapes[0])).unbind(1)
        if self.spec.position.turns:
            q, k = self.spec.position.turn(torch.stack([q, k], 1), packed.positions).unbind(1)
        if cache is None:
            return self.out_proj(self._attend(q, k, v, packed)), None
        after = cache.append(packed, k, v)
        attended = self._attend_stream(q, k, v, packed, cache, after)
        return unpack(self.out_proj(attended), real, tokens), after

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged) -> Tensor:
        """Attend along rows from their beginning; `(T, heads, d)` in, `(T, D)` out."""
        raise TypeError(f"{type(self).__name__} must define _attend(self, q, k, v, tokens)")

    def _attend_stream(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged, before: Cache, after: Cache) -> Tensor:
        """Attend where streams continue; the tokens are packed, without holes."""
        raise TypeError(f"{type(self).__name__} must define _attend_stream(self, q, k, v, tokens, before, after)")

    def _product(
        self,
        q: Float[Tensor, "N Q H d"],
        k: Float[Tensor, "N K H d"],
        v: Float[Tensor, "N K H d"],
        allowed: Bool[Tensor, "N #Q K"] | None = None,
        *,
        is_causal: bool = False,
    ) -> Float[Tensor, "N Q D"]:
        """Attend by PyTorch's fused kernels; every query needs at least one allowed key."""
        dropout = self.spec.attention_dropout if self.training else 0.0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if allowed is None else allowed[:, None]
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
        )
        return attended.transpose(1, 2).flatten(2)

    def _contained(
        self,
        q: Float[Tensor, "N Q H d"],
        k: Float[Tensor, "N K H d"],
        v: Float[Tensor, "N K H d"],
        allowed: Bool[Tensor, "N Q K"],
    ) -> Float[Tensor, "N Q D"]:
        """Attend so that a non-finite key or value makes only the results of queries in its reach NaN."""
        (k, v), broken = finite(k, v, axes=2)
        attended = self._product(q, k, v, allowed)
        if broken is None:
            return attended
        return attended.masked_fill((allowed & broken[:, None]).any(-1, keepdim=True), torch.nan)


def _check_heads(spec: MultiHeadSpec, width: int, window: int | None) -> None:
    if spec.head_size is not None:
        return
    name = type(spec).__name__
    if width % spec.heads:
        raise SpecError(f"{name}: heads={spec.heads} must divide the width {width} of the tokens; or set head_size")
    channels = width // spec.heads
    try:
        spec.position.check_attention(window, channels, f"heads={spec.heads} give {channels} channels each")
    except ValueError as error:
        raise SpecError(f"{name}: {error}") from None
