"""The gated attention unit inside fixed chunks: the attention of Mega-chunk."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from sma.modules.gau import GatedAttentionUnit, GAUSpec
from sma.modules.windowed import block_shape
from sma.pytree import register_output
from sma.ragged import Ragged, pack, rectangular, unpack
from sma.spec import register
from sma.submodule import Operations, State, SubModule, placement


@register
class ChunkedGAUSpec(GAUSpec):
    """Spec of `ChunkedGAU`."""

    kind: Literal["chunked_gau"] = "chunked_gau"  # type: ignore[assignment]
    window: int = Field(ge=1, description="active tokens of a chunk: each attends to those of its own chunk, W at most, and to no others")

    def build(self, width: int) -> "ChunkedGAU":  # type: ignore[override]
        return ChunkedGAU(self, width)

    def operations(self, width: int, tokens: int) -> Operations:
        chunk = min(self.window, tokens)
        pairs = chunks_of(tokens, self.window) * block_shape(chunk, self.window, not self.bidirectional).pairs(chunk)
        dense = width * (self.query_size + 3 * self.hidden_size)
        return Operations(tokens * dense + pairs * (self.query_size + self.hidden_size))


@register_output
@dataclass(frozen=True)
class ChunkedState(State):
    """Where the streams of `ChunkedGAU` stand.

    Attributes:
        unit: of the attention unit, in the chunk that is being read.
        seen: tokens of each row so far.
    """

    unit: State
    seen: Int[Tensor, "B"]


class ChunkedGAU(SubModule):
    r"""$y_t = f(x_{cW}, \dots, x_{cW + W - 1})_{t - cW}$, $c = \lfloor t / W \rfloor$: chunks of W tokens that know nothing of each other.

    f is the gated attention unit. Chunks count the tokens that it is given, so routed ones hold W active tokens, wherever those stand.
    Positions stay those of the row.

    Args:
        spec: as of the unit; its window is W.
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

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ChunkedState:
        """Make the state of streams that have seen nothing; see `SubModule.init_state`."""
        self._refuse_unless_causal()
        device, dtype = placement(self, device, dtype)
        inner = self.unit.init_state(batch_size, device=device, dtype=dtype)
        return ChunkedState(inner, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Run every chunk by itself; see `SubModule.forward`."""
        before = self._continue(state, ChunkedState, tokens)
        if before is not None:
            packed, real = pack(tokens)
            values, after = self._go_on(packed, before)
            return unpack(values, real, tokens), after
        if not tokens.holes:  # then rectangular tokens are packed ones too
            tokens = replace(tokens, stride=None)
        if tokens.stride is None:
            values, _ = self.unit(cut_packed(tokens, self.spec.window))
            return values, None
        rows, length = tokens.num_rows, tokens.stride
        if not length:  # there is nothing to cut, and the unit gives zero gradients
            return self.unit(tokens)[0], None
        chunks = cut_rectangular(tokens, self.spec.window)
        values, _ = self.unit(chunks)
        filled = chunks_of(length, self.spec.window) * (chunks.stride or 0)
        return values.reshape(rows, filled, values.shape[1])[:, :length].flatten(0, 1), None

    def _go_on(self, tokens: Ragged, state: ChunkedState) -> tuple[Tensor, ChunkedState]:
        """Chunk after chunk, the rows side by side: each goes on in its chunk, or begins the next."""
        size = self.spec.window
        inner, seen = state.unit, state.seen
        slot = seen[tokens.rows] + tokens.slots
        turn = torch.div(slot, size, rounding_mode="floor") - torch.div(seen, size, rounding_mode="floor")[tokens.rows]
        values = tokens.values
        for number in range(int(turn.max()) + 1 if turn.numel() else 0):
            chosen = (turn == number).nonzero().squeeze(1)
            counts = torch.bincount(tokens.rows[chosen], minlength=tokens.num_rows)
            # A row that has filled its chunk starts afresh with its next token, and only then.
            inner = inner.reset((counts > 0) & (seen % size == 0))
            part = replace(
                tokens,
                **{name: getattr(tokens, name).index_select(0, chosen) for name in ("values", "index", "positions", "rows")},
                offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
                lengths=counts,
            )
            found, after = self.unit(part, inner)
            inner, seen = after, seen + counts
            values = values.index_copy(0, chosen, found)
        return values, ChunkedState(inner, seen)


def chunks_of(length: int, size: int) -> int:
    """Chunks of `size` that hold `length` tokens; at least one."""
    return max(1, -(-length // size))


def cut_packed(tokens: Ragged, size: int) -> Ragged:
    """Make rows of at most `size` tokens of packed ones; a row gives as many as the longest, empty ones too."""
    each = chunks_of(tokens.longest, size)
    lengths = (tokens.lengths[:, None] - torch.arange(each, device=tokens.lengths.device) * size).clamp(0, size).reshape(-1)
    rows = tokens.rows * each + torch.div(tokens.slots, size, rounding_mode="floor")
    bound = None if tokens.bound is None else min(size, tokens.bound)
    return replace(tokens, rows=rows, offsets=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), lengths=lengths, bound=bound)


def cut_rectangular(tokens: Ragged, size: int) -> Ragged:
    """Make rows of `size` tokens of rectangular ones; the last of each row is filled up with holes."""
    rows, length = tokens.num_rows, tokens.stride or 0
    each = chunks_of(length, size)
    size = min(size, max(length, 1))
    more = each * size - length
    starts = torch.arange(each, device=tokens.lengths.device) * size

    def cut(part: Tensor) -> Tensor:
        part = part.unflatten(0, (rows, length))
        return torch.nn.functional.pad(part, (0, 0) * (part.ndim - 2) + (0, more)).reshape(rows * each, size, *part.shape[2:])

    lengths = (tokens.lengths[:, None] - starts).clamp(0, size).reshape(-1) if tokens.holes or more else None
    return rectangular(cut(tokens.values), lengths, cut(tokens.positions))
