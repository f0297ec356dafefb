"""The newest tokens of every stream: the state of sub-modules that look back, and the base class of those."""

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, Self

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from sma.checks import check_causal, check_count, check_sizes
from sma.errors import InputError
from sma.memory import FEWER, check_memory, zeros
from sma.padding import pack
from sma.pytree import register_output
from sma.ragged import Ragged
from sma.submodule import State, SubModule, device_and_dtype


@register_output
@dataclass(frozen=True)
class Cache(State):
    """Tensors of the newest S tokens of every row, in ring buffers: slot s has index s modulo S.

    Attributes:
        entries: tensors of shape (B, S, …), with zeros where a row has seen fewer than S tokens.
        seen: number of tokens of each row so far, shape (B,).
        grows: whether every token is kept instead, so that S and the cost of a step grow with the stream.
    """

    entries: tuple[Shaped[Tensor, "B S ..."], ...]
    seen: Int[Tensor, "B"]
    grows: bool = field(default=False, metadata={"static": True})

    @property
    def size(self) -> int:
        """Tokens that a row can hold, S."""
        return int(self.entries[0].shape[1])

    @property
    def sizes(self) -> tuple[object, ...]:
        """Tokens per row, None where it grows, and the sizes of the entries of one token."""
        return (None if self.grows else self.size, *(tuple(entry.shape[2:]) for entry in self.entries))

    @property
    def held(self) -> Int[Tensor, "B"]:
        """Number of tokens that each row holds."""
        return self.seen.clamp(max=self.size)

    @property
    def slots(self) -> Int[Tensor, "B S"]:
        """Slot of the token at every index, negative where there is none yet."""
        newest = self.seen[:, None] - 1
        return newest - (newest - torch.arange(self.size, device=newest.device)) % max(self.size, 1)

    def append(self, tokens: Ragged, *values: Shaped[Tensor, "T ..."]) -> Self:
        """Append tokens to their rows, in the place of the oldest ones.

        Args:
            tokens: packed, without holes.
            values: one tensor per entry, a value per token.
        """
        if tokens.rows.shape[0] == 0:
            return self
        seen = self.seen + tokens.lengths
        entries, size = self.entries, self.size
        if self.grows:
            more = max(int(seen.max()) - size, 0)
            entries, size = (
                tuple(torch.nn.functional.pad(entry, (0, 0) * (entry.ndim - 2) + (0, more)) for entry in entries),
                size + more,
            )
        if size == 0:
            return type(self)(entries, seen, self.grows)
        slot = self.seen[tokens.rows] + tokens.slots
        rows = tokens.rows
        if not self.grows and rows.shape[0] > size:  # a row with more new tokens than slots keeps the last ones
            kept = (slot >= seen[rows] - size).nonzero().squeeze(1)
            slot, rows, *values = (part.index_select(0, kept) for part in (slot, rows, *values))  # type: ignore[assignment]
        index = rows * size + slot % size
        written = (
            entry.flatten(0, 1).index_copy(0, index, value.to(entry.dtype)).unflatten(0, entry.shape[:2])
            for entry, value in zip(entries, values, strict=True)
        )
        return type(self)(tuple(written), seen, self.grows)

    def join(self, tokens: Ragged) -> "Joined":
        """Lay out the new tokens of every row after those that it holds.

        Args:
            tokens: packed, without holes.
        """
        held, size = self.held, self.size
        rank = torch.arange(size, device=held.device)
        source = torch.arange(held.shape[0], device=held.device)[:, None] * size + (
            (self.seen - held)[:, None] + rank
        ) % max(size, 1)
        keep = (rank < held[:, None]).reshape(-1).nonzero().squeeze(1)
        row = torch.div(keep, max(size, 1), rounding_mode="floor")
        lengths = held + tokens.lengths
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        old = offsets[row] + keep % max(size, 1)
        new = (offsets[:-1] + held)[tokens.rows] + tokens.slots
        frame = Ragged(
            values=tokens.values.new_empty(old.shape[0] + new.shape[0], 0),
            index=torch.arange(old.shape[0] + new.shape[0], device=old.device),
            positions=torch.cat([old, new]),  # placeholders; a kind that caches positions fills them in
            rows=_lay(old, row, new, tokens.rows),
            offsets=offsets,
            lengths=lengths,
            holes=False,
        )
        return Joined(frame, old, new, source.reshape(-1).index_select(0, keep))


class Joined(NamedTuple):
    """Held tokens and new ones of every row, one after another.

    Attributes:
        tokens: all of them, packed, without values.
        old: indices of the held ones.
        new: indices of the new ones, in their order.
        source: indices of the held ones in the flattened cache.
    """

    tokens: Ragged
    old: Int[Tensor, "H"]
    new: Int[Tensor, "T"]
    source: Int[Tensor, "H"]

    def fill(self, entry: Shaped[Tensor, "B S *E"], values: Shaped[Tensor, "T *E"]) -> Shaped[Tensor, "U *E"]:
        """An entry of the cache and the same values of the new tokens, laid out."""
        held = entry.flatten(0, 1).index_select(0, self.source)
        return _lay(self.old, held.to(values.dtype), self.new, values)


def empty_cache(
    batch_size: int,
    size: int | None,
    shapes: tuple[tuple[int, ...], ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> Cache:
    """Make the cache of streams that have seen no token; with `size=None` it grows."""
    check_count(batch_size, "batch_size")
    seen = zeros((batch_size,), "a cache", device=device, dtype=torch.int64)
    needed = sum(
        batch_size * (size or 0) * prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    check_memory(needed, "a cache", device=device, error=InputError, hint=FEWER)
    entries = (
        torch.zeros(batch_size, size or 0, *shape, device=device, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    return Cache(tuple(entries), seen, grows=size is None)


class CachedSubModule(SubModule):
    """A sub-module whose state is a `Cache`.

    Args:
        size: number of the newest tokens of each row that a stream keeps; None for all of them.
        shapes: sizes of each entry of one token, in the dtype of the tokens; an entry of shape () holds positions.
    """

    def __init__(self, size: int | None, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.cache_size, self.entry_shapes = size, shapes

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        """Make the state of streams that have seen no token; see `SubModule.init_state`.

        Where the state keeps all tokens, memory and the cost of a step grow with the stream.
        """
        check_causal(self)
        device, dtype = device_and_dtype(self, device, dtype)
        dtypes = tuple(dtype if shape else torch.int64 for shape in self.entry_shapes)
        return empty_cache(batch_size, self.cache_size, self.entry_shapes, device, dtypes)

    def _resume(self, state: State | None, tokens: Ragged) -> tuple[Cache | None, Ragged, Int[Tensor, "P"] | None]:
        """Check the state that `forward` was given, and drop the holes of tokens that continue from one."""
        cache = self._continue(state, Cache, tokens)
        if cache is None:
            return None, tokens, None
        check_sizes(self, cache.sizes, (self.cache_size, *self.entry_shapes))
        return cache, *pack(tokens)


def _lay(old: Tensor, held: Tensor, new: Tensor, values: Tensor) -> Tensor:
    line = values.new_empty(old.shape[0] + new.shape[0], *values.shape[1:])
    return line.index_copy_(0, old, held).index_copy_(0, new, values)
