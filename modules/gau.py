"""Gated attention unit: the sub-module that SeqBoat routes, and its variant inside fixed chunks."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self, cast

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from sma.checks import check_causal
from sma.fused import silu_slope, with_gradient
from sma.init import reset_linear_, truncated_normal_
from sma.kernels.blocks import block_shape
from sma.kernels.weighting import Weighting
from sma.memory import zeros
from sma.modules.cache import Cache, CachedSubModule
from sma.modules.full_attention import attend_all, pairs
from sma.modules.sliding_window import Bias, attend, attend_one
from sma.padding import pack, unpack
from sma.positions import PositionSpec, RelativeBiasSpec
from sma.pytree import register_output
from sma.ragged import Ragged, rectangular
from sma.spec import register
from sma.submodule import MACs, State, SubModule, SubModuleSpec, device_and_dtype, may_skip


@register
class GAUSpec(SubModuleSpec):
    """Spec of `GatedAttentionUnit`."""

    kind: Literal["gau"] = "gau"
    query_size: int = Field(ge=1, description="channels of a query and a key, Z")
    hidden_size: int = Field(ge=1, description="channels of a value and of the gate, H")
    window: int | None = Field(
        default=None, ge=1, description="active tokens in reach on each side, W; use window=null to attend to all"
    )
    bidirectional: bool = Field(default=True, description="attend to later tokens too; false is causal")
    attention: Weighting = Field(default="softmax", description="function from scores to weights")
    position: PositionSpec = Field(default=RelativeBiasSpec(), description="how positions enter the scores")
    value_dropout: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="probability of dropping a channel of a value"
    )
    attention_dropout: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="probability of dropping an attention weight"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.position.check_attention(self.window, self.query_size, f"query_size={self.query_size}")
        return self

    def attending_to_all(self) -> Self:
        """The same attention over all active tokens instead of a window."""
        return self.replace(window=None, position=self.position.without_window())

    def in_chunks(self, window: int) -> "ChunkedGAUSpec":
        """The same attention inside fixed chunks of `window` active tokens."""
        fields = {name: getattr(self, name) for name in type(self).model_fields if name not in ("kind", "window")}
        return ChunkedGAUSpec(window=window, **fields)

    def build(self, width: int) -> "GatedAttentionUnit":
        return GatedAttentionUnit(self, width)

    def num_parameters(self, width: int) -> int:
        projected = self.query_size + 2 * self.hidden_size
        table = self.position.table_size(self.window)
        return (width + 1) * projected + 4 * self.query_size + (self.hidden_size + 1) * width + table

    def pairs(self, tokens: int) -> int:
        """Pairs of slots that are multiplied for a row of `tokens` tokens."""
        if self.window is None:
            return pairs(tokens, not self.bidirectional)
        return block_shape(tokens, self.window, not self.bidirectional).pairs(tokens)

    def macs(self, width: int, tokens: int) -> MACs:
        dense = width * (self.query_size + 3 * self.hidden_size)
        return MACs(matmul=tokens * dense + self.pairs(tokens) * (self.query_size + self.hidden_size))


class GatedAttentionUnit(CachedSubModule):
    r"""One-head attention with a gate.

    $(z, r, v) = \mathrm{silu}(W x + b)$; $q = g_0 z + b_0$, $k = g_1 z + b_1$; $y = W_o (\mathrm{attend}(q, k, v) \odot
    r) + b_o$. Scores: `softmax` $q \cdot k / \sqrt Z$ plus bias; `relu2` and `laplace` $q \cdot k / n$ plus bias, n =
    2W (causal: W), without a window the row's number of tokens (causal: so far).

    Args:
        spec: sizes, window, weighting, positions.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. The reach is |slot distance| <= W, causal: only back. A stream keeps keys,
            values and positions of the last W tokens of each row; without a window, of all tokens.

    Reference:
        Hua et al., "Transformer Quality in Linear Time", arXiv 2202.10447; Ma et al., arXiv 2209.10655.
    """

    def __init__(self, spec: GAUSpec, width: int) -> None:
        super().__init__(spec.window, (spec.query_size,), (spec.hidden_size,), ())
        self.spec = spec
        self.causal = not spec.bidirectional
        self.in_proj = nn.Linear(width, spec.query_size + 2 * spec.hidden_size)
        self.out_proj = nn.Linear(spec.hidden_size, width)
        self.gain = nn.Parameter(torch.empty(2, spec.query_size))
        self.offset = nn.Parameter(torch.zeros(2, spec.query_size))
        size = spec.position.table_size(spec.window)
        self.bias_table = nn.Parameter(torch.empty(size)) if size else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters from the authors' distributions."""
        for linear in (self.in_proj, self.out_proj):
            reset_linear_(linear)
        truncated_normal_(self.gain)
        nn.init.zeros_(self.offset)
        if self.bias_table is not None:
            truncated_normal_(self.bias_table)

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Attend along every row; see `SubModule.forward`."""
        spec = self.spec
        cache, packed, real = self._resume(state, tokens)
        q, k, gate, v = gau_inputs(self.in_proj(packed.values), self.gain, self.offset)
        if spec.position.turns:
            q, k = spec.position.turn(torch.stack([q, k], 1), packed.positions).unbind(1)
        q = self._scaled(q, packed, cache)
        v = nn.functional.dropout(v, spec.value_dropout, self.training)
        attended, after = self._attend(q, k, v, packed, cache)
        return unpack(self.out_proj(attended * gate), real, tokens), after

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Ragged, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        spec, bias = self.spec, self._bias()
        dropout = spec.attention_dropout if self.training else 0.0
        if cache is not None and tokens.longest <= 1:
            attended = attend_one(q, k, v, tokens, cache, weighting=spec.attention, bias=bias, dropout=dropout)
            return attended, cache.append(tokens, k, v, tokens.positions)
        reach = attend_all if spec.window is None else partial(attend, window=spec.window)
        block = partial(reach, causal=self.causal, weighting=spec.attention, bias=bias, dropout=dropout)
        if cache is None:
            return block(q, k, v, tokens), None
        joined, (keys, values, positions) = cache.join(tokens), cache.entries
        along = replace(joined.tokens, positions=joined.fill(positions, tokens.positions))
        queries = q.new_zeros(along.rows.shape[0], q.shape[1]).index_copy_(0, joined.new, q)
        attended = block(queries, joined.fill(keys, k), joined.fill(values, v), along)
        return attended.index_select(0, joined.new), cache.append(tokens, k, v, tokens.positions)

    def _scaled(self, q: Tensor, tokens: Ragged, cache: Cache | None) -> Tensor:
        spec = self.spec
        if spec.attention == "softmax":
            return q * spec.query_size**-0.5
        if spec.window is not None:
            return q / (spec.window if self.causal else 2 * spec.window)
        if not self.causal:
            count = tokens.lengths[tokens.rows]
        else:
            count = tokens.slots + 1 if cache is None else tokens.slots + 1 + cache.seen[tokens.rows]
        # Wide, because a number of 65,520 tokens overflows float16.
        wide = torch.promote_types(q.dtype, torch.float32)
        return (q.to(wide) / count.clamp(min=1).to(wide)[:, None]).to(q.dtype)

    def _bias(self) -> Bias | None:
        if self.bias_table is None:
            return None
        position = self.spec.position
        return Bias(self.bias_table, position.table_center(self.spec.window), over_slots=position.over_slots)


def _gau_inputs_backward(
    grad_q: Tensor, grad_k: Tensor, grad_gate: Tensor, grad_v: Tensor, projected: Tensor, gain: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(projected.dtype, torch.float32)
    z = nn.functional.silu(projected[:, : gain.shape[1]]).to(wide)
    both = torch.stack([grad_q, grad_k]).to(wide)
    narrow = gain.to(projected.dtype)
    grads = torch.cat([grad_q * narrow[0] + grad_k * narrow[1], grad_gate, grad_v], dim=1)
    grad_projected = (grads * silu_slope(projected)).to(projected.dtype)
    return grad_projected, (both * z).sum(1).to(gain.dtype), both.sum(1).to(offset.dtype)


@with_gradient(_gau_inputs_backward)
def gau_inputs(projected: Tensor, gain: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, gates and values of the projected tokens (T, Z + 2 H)."""
    size = gain.shape[1]
    hidden = (projected.shape[1] - size) // 2
    z, gate, v = nn.functional.silu(projected).split([size, hidden, hidden], dim=-1)
    gain, offset = gain.to(z.dtype), offset.to(z.dtype)
    return z * gain[0] + offset[0], z * gain[1] + offset[1], gate, v


@register
class ChunkedGAUSpec(GAUSpec):
    """Spec of `ChunkedGAU`."""

    kind: Literal["chunked_gau"] = "chunked_gau"  # type: ignore[assignment]
    window: int = Field(
        ge=1,
        description="active tokens of a chunk, W; each attends only to the tokens of its own chunk",
    )

    def build(self, width: int) -> "ChunkedGAU":  # type: ignore[override]
        return ChunkedGAU(self, width)

    def pairs(self, tokens: int) -> int:
        return chunks_of(tokens, self.window) * super().pairs(min(self.window, tokens))


@register_output
@dataclass(frozen=True)
class ChunkedState(State):
    """State of the streams of `ChunkedGAU`.

    Attributes:
        unit: state of the attention unit in the current chunk.
        seen: number of tokens of each row so far, shape (B,).
    """

    unit: State
    seen: Int[Tensor, "B"]


class ChunkedGAU(SubModule):
    r"""$y_t = f(x_{cW}, \dots, x_{cW + W - 1})_{t - cW}$, $c = \lfloor t / W \rfloor$: independent chunks of W
    tokens.

    f is the gated attention unit. Chunks count the given tokens: routed, a chunk holds W active tokens, at any
    distance. Positions stay those of the row.

    Args:
        spec: that of the unit; its window is W.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out.

    Reference:
        Ma et al., "Mega: Moving Average Equipped Gated Attention", arXiv 2209.10655, section 3.5.
    """

    def __init__(self, spec: ChunkedGAUSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.unit = GatedAttentionUnit(spec, width)
        self.causal = self.unit.causal

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ChunkedState:
        """Make the state of streams that have seen no token; see `SubModule.init_state`."""
        check_causal(self)
        device, dtype = device_and_dtype(self, device, dtype)
        inner = self.unit.init_state(batch_size, device=device, dtype=dtype)
        return ChunkedState(inner, zeros((batch_size,), "the state of ChunkedGAU", dtype=torch.int64, device=device))

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Run every chunk independently; see `SubModule.forward`."""
        before = self._continue(state, ChunkedState, tokens)
        if before is not None:
            packed, real = pack(tokens)
            values, after = self._continue_chunks(packed, before)
            return unpack(values, real, tokens), after
        if not tokens.holes:  # then rectangular tokens are packed ones too
            tokens = replace(tokens, stride=None)
        if tokens.stride is None:
            values, _ = self.unit(cut_packed(tokens, self.spec.window))
            return values, None
        rows, length = tokens.num_rows, tokens.stride
        if not length:  # the unit gives zero gradients without tokens
            return self.unit(tokens)[0], None
        chunks = cut_rectangular(tokens, self.spec.window)
        values, _ = self.unit(chunks)
        filled = chunks_of(length, self.spec.window) * (chunks.stride or 0)
        return values.reshape(rows, filled, values.shape[1])[:, :length].flatten(0, 1), None

    def _continue_chunks(self, tokens: Ragged, state: ChunkedState) -> tuple[Tensor, ChunkedState]:
        """Run the unit three times: on the ends of current chunks, on whole chunks, on the beginnings of new ones."""
        size, seen = self.spec.window, state.seen
        first = torch.div(seen, size, rounding_mode="floor")
        last = torch.div(seen + tokens.lengths - 1, size, rounding_mode="floor") - first
        turn = torch.div(seen[tokens.rows] + tokens.slots, size, rounding_mode="floor") - first[tokens.rows]
        begins, ends = turn == 0, (turn > 0) & (turn == last[tokens.rows])
        # The state of a full chunk is reset only by the next token of its row. Whole chunks need no state.
        steps = ((begins, seen % size == 0), (~(begins | ends), None), (ends, torch.ones_like(seen, dtype=torch.bool)))
        inner, found = state.unit, []
        for chosen, reset in steps:
            indices = chosen.nonzero().squeeze(1)
            if may_skip(self.unit) and indices.shape[0] == 0:
                continue
            part = _select(tokens, indices)
            if reset is None:
                values, _ = self.unit(cut_packed(part, size))
            else:
                values, after = self.unit(part, inner.reset(reset & (part.lengths > 0)))
                inner = cast(State, after)
            found.append((indices, values))
        if not found:
            return tokens.values, state
        order, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        return torch.empty_like(values).index_copy_(0, order, values), ChunkedState(inner, seen + tokens.lengths)


def _select(tokens: Ragged, indices: Int[Tensor, "P"]) -> Ragged:
    """Select packed tokens, in order, as packed tokens of the same rows."""
    values, index, positions, rows = (
        part.index_select(0, indices) for part in (tokens.values, tokens.index, tokens.positions, tokens.rows)
    )
    lengths = torch.bincount(rows, minlength=tokens.num_rows)
    return Ragged(
        values, index, positions, rows, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), lengths, holes=False
    )


def chunks_of(length: int, size: int) -> int:
    """Number of chunks of `size` that hold `length` tokens; at least one."""
    return max(1, -(-length // size))


def cut_packed(tokens: Ragged, size: int) -> Ragged:
    """Cut rows of packed tokens into rows of at most `size`; every row gives equally many, some of them empty."""
    each = chunks_of(tokens.longest, size)
    lengths = (
        (tokens.lengths[:, None] - torch.arange(each, device=tokens.lengths.device) * size).clamp(0, size).reshape(-1)
    )
    rows = tokens.rows * each + torch.div(tokens.slots, size, rounding_mode="floor")
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    if tokens.holes:  # they follow the tokens of the last row
        rows = rows.where(tokens.mask, tokens.num_rows * each - 1)
        offsets = torch.cat([offsets[:-1], tokens.offsets[-1:]])
    bound = None if tokens.bound is None else min(size, tokens.bound)
    return replace(tokens, rows=rows, offsets=offsets, lengths=lengths, bound=bound)


def cut_rectangular(tokens: Ragged, size: int) -> Ragged:
    """Cut rows of rectangular tokens into rows of `size`; holes fill up the last of each row."""
    rows, length = tokens.num_rows, tokens.stride or 0
    each = chunks_of(length, size)
    size = min(size, max(length, 1))
    more = each * size - length
    starts = torch.arange(each, device=tokens.lengths.device) * size

    def cut(part: Tensor) -> Tensor:
        part = part.unflatten(0, (rows, length))
        return torch.nn.functional.pad(part, (0, 0) * (part.ndim - 2) + (0, more)).reshape(
            rows * each, size, *part.shape[2:]
        )

    lengths = (tokens.lengths[:, None] - starts).clamp(0, size).reshape(-1) if tokens.holes or more else None
    return rectangular(cut(tokens.values), lengths, cut(tokens.positions))
