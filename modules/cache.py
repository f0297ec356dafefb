"""The newest tokens of every stream: the state of sub-modules that look back."""

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, Self

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from sma.checks import check_count
from sma.errors import InputError
from sma.memory import FEWER, check_memory, zeros
from sma.pytree import register_output
from sma.ragged import Ragged
from sma.submodule import State


@register_output
@dataclass(frozen=True)
class Cache(State):
    """What a sub-module keeps of the newest S tokens of every row, in rings: slot s stands at place s modulo S.

    Attributes:
        entries: tensors `(B, S, …)`; zeros where a row has seen fewer than S tokens.
        seen: `(B,)` tokens of each row so far.
        grows: keep every token instead, so S and the cost of a step grow with the stream.
    """

    entries: tuple[Shaped[Tensor, "B S ..."], ...]
    seen: Int[Tensor, "B"]
    grows: bool = field(default=False, metadata={"static": True})

    @property
    def size(self) -> int:
        """Places per row, S."""
        return int(self.entries[0].shape[1])

    @property
    def sizes(self) -> tuple[object, ...]:
        """Tokens per row, None where it grows, and the sizes of what it keeps of each."""
        return (None if self.grows else self.size, *(tuple(entry.shape[2:]) for entry in self.entries))

    @property
    def held(self) -> Int[Tensor, "B"]:
        """Tokens that each row holds."""
        return self.seen.clamp(max=self.size)

    @property
    def slots(self) -> Int[Tensor, "B S"]:
        """The slot of the token at every place, negative at a place that is still empty."""
        newest = self.seen[:, None] - 1
        return newest - (newest - torch.arange(self.size, device=newest.device)) % max(self.size, 1)

    def append(self, tokens: Ragged, *values: Shaped[Tensor, "T ..."]) -> Self:
        """Put tokens behind those of their rows; the oldest make room.

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
        # Where a row brings more tokens than fit, its last ones stay.
        if not self.grows and tokens.rows.shape[0] > size:
            kept = (slot >= seen[tokens.rows] - size).nonzero().squeeze(1)
            values = tuple(value.index_select(0, kept) for value in values)
            slot, rows = slot[kept], tokens.rows[kept]
        else:
            rows = tokens.rows
        place = rows * size + slot % size
        return type(self)(tuple(_put(*pair, place) for pair in zip(entries, values, strict=True)), seen, self.grows)

    def join(self, tokens: Ragged) -> "Joined":
        """Lay out the tokens of every row behind those that it holds.

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
            positions=torch.cat([old, new]),  # of no meaning; `fill` makes real ones where they are kept
            rows=_lay(old, row, new, tokens.rows),
            offsets=offsets,
            lengths=lengths,
            holes=False,
        )
        return Joined(frame, old, new, source.reshape(-1).index_select(0, keep))


class Joined(NamedTuple):
    """Held tokens and new ones of every row, one after another.

    Attributes:
        tokens: all of them, packed; without values.
        old: where the held ones stand.
        new: where the new ones stand, in their order.
        source: where the held ones stood in the flattened cache.
    """

    tokens: Ragged
    old: Int[Tensor, "H"]
    new: Int[Tensor, "T"]
    source: Int[Tensor, "H"]

    def fill(self, entry: Shaped[Tensor, "B S *E"], values: Shaped[Tensor, "T *E"]) -> Shaped[Tensor, "U *E"]:
        """One entry of the cache and the same of the new tokens, laid out."""
        held = entry.flatten(0, 1).index_select(0, self.source)
        return _lay(self.old, held.to(values.dtype), self.new, values)


def empty_cache(
    batch_size: int,
    size: int | None,
    shapes: tuple[tuple[int, ...], ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> Cache:
    """Make the cache of streams that have seen nothing; size None grows."""
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


def _put(entry: Tensor, values: Tensor, place: Tensor) -> Tensor:
    return entry.flatten(0, 1).index_copy(0, place, values.to(entry.dtype)).unflatten(0, entry.shape[:2])


def _lay(old: Tensor, held: Tensor, new: Tensor, values: Tensor) -> Tensor:
    line = values.new_empty(old.shape[0] + new.shape[0], *values.shape[1:])
    return line.index_copy(0, old, held).index_copy(0, new, values)
