"""What the multi-head attentions share: fields, projections, streams, and products that a NaN cannot cross."""

from typing import Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sma.checks import check_causal, check_sizes
from sma.errors import SpecError
from sma.init import reset_linear_
from sma.modules.cache import Cache, empty_cache
from sma.modules.finite import all_finite
from sma.padding import pack, unpack
from sma.positions import NoPositionSpec, PositionSpec
from sma.ragged import Ragged
from sma.submodule import State, SubModule, SubModuleSpec, device_and_dtype


class MultiHeadSpec(SubModuleSpec):
    """Fields of every multi-head attention; no kind by itself."""

    heads: int = Field(default=4, ge=1, description="attention heads; they share the channels equally")
    bidirectional: bool = Field(default=True, description="attend to later tokens too; false is causal")
    position: PositionSpec = Field(default=NoPositionSpec(), description="rotary or none")
    attention_dropout: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="probability of dropping an attention weight"
    )

    @model_validator(mode="after")
    def _has_no_table(self) -> Self:
        if self.position.has_table:
            raise ValueError(
                f"position kind {self.position.kind!r} adds a table, which needs the gau sub-module; "
                "use {kind: rotary} or {kind: none}"
            )
        return self

    def num_parameters(self, width: int) -> int:
        return 4 * width * (width + 1)


class MultiHead(SubModule):
    """Queries, keys and values of every head, and a result mixed from all heads; subclasses say who attends to whom.

    Args:
        spec: heads, direction, positions.
        width: channels of every token, D.
        window: tokens of each row that a stream keeps; None for all.

    Raises:
        SpecError: the width is no multiple of the heads, or a head has an odd width under rotary positions.
    """

    def __init__(self, spec: MultiHeadSpec, width: int, window: int | None = None) -> None:
        super().__init__()
        _check_heads(spec, width, window)
        self.spec = spec
        self.width = width
        self.window = window
        self.causal = not spec.bidirectional
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters."""
        for linear in (self.in_proj, self.out_proj):
            reset_linear_(linear)

    @property
    def _head(self) -> tuple[int, int]:
        """The shape of a key and of a value."""
        return self.spec.heads, self.width // self.spec.heads

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        """Make the state of streams that have seen nothing: the keys and values of the last W tokens of each row.

        Without a window it keeps all of them, so memory and the cost of a step grow; see `SubModule.init_state`.
        """
        check_causal(self)
        device, dtype = device_and_dtype(self, device, dtype)
        return empty_cache(batch_size, self.window, (self._head, self._head), device, (dtype, dtype))

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Attend along every row; see `SubModule.forward`."""
        cache = self._continue(state, Cache, tokens)
        given, real = tokens, None
        if cache is not None:
            check_sizes(self, cache.sizes, (self.window, self._head, self._head))
            tokens, real = pack(tokens)
        qkv = self.in_proj(tokens.values).unflatten(-1, (3, *self._head))
        q, k, v = qkv.unbind(1)
        if self.spec.position.turns:
            q, k = self.spec.position.turn(torch.stack([q, k], 1), tokens.positions).unbind(1)
        if cache is None:
            attended, after = self._whole(q, k, v, tokens), None
        else:
            after = cache.append(tokens, k, v)
            attended = self._onward(q, k, v, tokens, cache, after)
        return unpack(self.out_proj(attended), real, given), after

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged) -> Tensor:
        """Attend along rows from their beginning; `(T, heads, d)` in, `(T, D)` out."""
        raise TypeError(f"{type(self).__name__} must define _whole(self, q, k, v, tokens)")

    def _onward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged, before: Cache, after: Cache) -> Tensor:
        """Attend where streams go on; the tokens are packed, without holes."""
        raise TypeError(f"{type(self).__name__} must define _onward(self, q, k, v, tokens, before, after)")

    def _product(
        self,
        q: Float[Tensor, "N Q H d"],
        k: Float[Tensor, "N K H d"],
        v: Float[Tensor, "N K H d"],
        allowed: Bool[Tensor, "N #Q K"] | None = None,
        *,
        is_causal: bool = False,
    ) -> Float[Tensor, "N Q D"]:
        """Attend by PyTorch's fused kernels; every query must be allowed something."""
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
        """Attend so that a key or value that is not finite makes NaN of the queries that are allowed it, and of no
        others.
        """
        k, v, broken = finite(k, v)
        attended = self._product(q, k, v, allowed)
        return (
            attended
            if broken is None
            else attended.masked_fill((allowed & broken[:, None]).any(-1, keepdim=True), torch.nan)
        )


def finite(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values `(…, heads, d)` with zeros for tokens that are not finite: a weight of 0 times NaN is NaN.

    Returns:
        the keys, the values, and a mask `(…)` of the tokens that are not finite; None where all are.
    """
    if all_finite(k, v):
        return k, v, None
    broken = ~(k.isfinite() & v.isfinite()).flatten(-2).all(-1)
    return k.masked_fill(broken[..., None, None], 0), v.masked_fill(broken[..., None, None], 0), broken


def _check_heads(spec: MultiHeadSpec, width: int, window: int | None) -> None:
    name = type(spec).__name__
    if width % spec.heads:
        raise SpecError(f"{name}: heads={spec.heads} must divide the width {width} of the tokens")
    channels = width // spec.heads
    try:
        spec.position.check_attention(window, channels, f"heads={spec.heads} give {channels} channels each")
    except ValueError as error:
        raise SpecError(f"{name}: {error}") from None
