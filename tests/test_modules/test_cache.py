"""The cache of the newest tokens of every stream against one list per row."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.modules.cache import Cache, empty_cache
from sma.pytree import tensors
from sma.ragged import Ragged
from tests.streams import copied, same_bits

CPU = torch.device("cpu")
# Two entries of different rank and dtype, as in the attention units.
SHAPES, DTYPES = ((2,), ()), (torch.float64, torch.int64)


@dataclass
class Row:
    """All tokens of one stream, in order."""

    tokens: list[int] = field(default_factory=list)

    def held(self, size: int | None) -> list[int]:
        return self.tokens if size is None else self.tokens[len(self.tokens) - min(size, len(self.tokens)) :]


def chunk(counts: list[int], first: int = 1) -> tuple[Ragged, list[list[int]]]:
    """Packed tokens, `counts[b]` in row b, numbered from `first`; and these numbers by row."""
    total = sum(counts)
    numbers = list(range(first, first + total))
    rows = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)], dtype=torch.long)
    offsets = torch.tensor([sum(counts[:row]) for row in range(len(counts) + 1)])
    values = torch.tensor(numbers, dtype=torch.float64)[:, None]
    place = torch.arange(total)
    tokens = Ragged(values, place, place, rows, offsets, torch.tensor(counts, dtype=torch.long), holes=False)
    return tokens, [numbers[int(offsets[row]) : int(offsets[row + 1])] for row in range(len(counts))]


def values_of(tokens: Ragged) -> tuple[Tensor, Tensor]:
    """The cached entries of a token with the number n: (n, -n) and n."""
    return torch.cat([tokens.values, -tokens.values], 1), tokens.values[:, 0].long()


def read(cache: Cache, row: int) -> dict[int, int]:
    """A mapping from slot to token number for one row of the cache, read entry by entry."""
    found = {}
    for place in range(cache.size):
        slot = int(cache.slots[row, place])
        if slot >= 0:
            number = int(cache.entries[1][row, place])
            assert cache.entries[0][row, place].tolist() == [number, -number]
            found[slot] = number
        else:
            assert not any(bool(entry[row, place].any()) for entry in cache.entries)
    return found


sizes = st.none() | st.integers(0, 5)
histories = st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), max_size=5)


def fill(size: int | None, history: list[list[int]]) -> tuple[Cache, list[Row], int]:
    """A cache after some chunks, the same tokens as lists, and the next token number."""
    cache, rows, next_number = empty_cache(3, size, SHAPES, CPU, DTYPES), [Row() for _ in range(3)], 1
    for counts in history:
        tokens, numbers = chunk(counts, next_number)
        cache = cache.append(tokens, *values_of(tokens))
        next_number += sum(counts)
        for row, new in zip(rows, numbers, strict=True):
            row.tokens.extend(new)
    return cache, rows, next_number


@given(size=sizes, history=histories)
def test_a_cache_holds_the_newest_tokens_of_every_row_at_their_slots(
    size: int | None, history: list[list[int]]
) -> None:
    cache, rows, _ = fill(size, history)
    assert cache.grows == (size is None)
    assert cache.size == (max((len(row.tokens) for row in rows), default=0) if size is None else size)
    assert cache.seen.tolist() == [len(row.tokens) for row in rows]
    assert cache.held.tolist() == [len(row.held(size)) for row in rows]
    for number, row in enumerate(rows):
        held = row.held(size)
        first = len(row.tokens) - len(held)
        assert read(cache, number) == {first + rank: token for rank, token in enumerate(held)}


@given(size=sizes, history=histories, counts=st.lists(st.integers(0, 8), min_size=3, max_size=3))
def test_join_appends_new_tokens_to_the_cached_ones_of_their_row(
    size: int | None, history: list[list[int]], counts: list[int]
) -> None:
    cache, rows, next_number = fill(size, history)
    tokens, new = chunk(counts, next_number)
    joined = cache.join(tokens)
    along = joined.tokens
    wanted = [row.held(size) + fresh for row, fresh in zip(rows, new, strict=True)]
    assert along.lengths.tolist() == [len(row) for row in wanted]
    assert (along.stride, along.holes) == (None, False)
    for entry, values in zip(cache.entries, values_of(tokens), strict=True):
        line = joined.fill(entry, values)
        assert line.dtype == values.dtype
        numbers = line[:, 0] if line.ndim == 2 else line
        assert numbers.tolist() == [number for row in wanted for number in row]
    assert along.rows.tolist() == [place for place, row in enumerate(wanted) for _ in row]
    assert along.slots.tolist() == [slot for row in wanted for slot in range(len(row))]
    assert sorted([*joined.old.tolist(), *joined.new.tolist()]) == list(range(len(along.rows)))
    assert along.rows[joined.new].tolist() == tokens.rows.tolist()


@given(size=sizes, history=histories, counts=st.lists(st.integers(0, 8), min_size=3, max_size=3))
def test_one_chunk_equals_one_token_at_a_time(size: int | None, history: list[list[int]], counts: list[int]) -> None:
    cache, _, number = fill(size, history)
    tokens, new = chunk(counts, number)
    at_once = cache.append(tokens, *values_of(tokens))
    for rank in range(max(counts)):
        one, _ = chunk([int(rank < count) for count in counts])
        numbers = torch.tensor([[float(row[rank])] for row in new if rank < len(row)], dtype=torch.float64)
        cache = cache.append(one, *values_of(one.with_values(numbers)))
    assert same_bits(cache, at_once)


@given(size=sizes, history=histories, counts=st.lists(st.integers(0, 8), min_size=3, max_size=3))
def test_append_never_changes_a_cache_in_place(size: int | None, history: list[list[int]], counts: list[int]) -> None:
    cache, _, number = fill(size, history)
    kept = copied(cache)
    tokens, _ = chunk(counts, number)
    cache.append(tokens, *values_of(tokens))
    cache.join(tokens).fill(cache.entries[0], values_of(tokens)[0]).zero_()
    assert same_bits(cache, kept)


@given(size=sizes, history=histories, idle=st.integers(0, 2))
def test_a_row_without_new_tokens_keeps_its_entries(size: int | None, history: list[list[int]], idle: int) -> None:
    cache, _, number = fill(size, history)
    tokens, _ = chunk([0 if row == idle else 4 for row in range(3)], number)
    after = cache.append(tokens, *values_of(tokens))
    assert after.seen[idle] == cache.seen[idle]
    assert read(after, idle) == read(cache, idle)
    assert all(
        torch.equal(new[idle, : cache.size], old[idle]) for new, old in zip(after.entries, cache.entries, strict=True)
    )


@pytest.mark.parametrize("size", [2, 7, None])
def test_gradients_reach_the_cached_tokens_only(size: int | None) -> None:
    tokens, _ = chunk([5, 0, 3])
    values = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    cache = empty_cache(3, size, ((2,),), CPU, (torch.float64,)).append(tokens, values)
    (gradient,) = torch.autograd.grad(cache.entries[0].sum(), [values])
    kept = [slot >= count - (size or count) for count in (5, 3) for slot in range(count)]
    assert gradient[:, 0].bool().tolist() == kept


def test_append_converts_to_the_dtype_of_the_cache_and_join_to_that_of_the_tokens() -> None:
    tokens, _ = chunk([2])
    cache = empty_cache(1, 3, ((2,),), CPU, (torch.float32,)).append(tokens, torch.ones(2, 2, dtype=torch.bfloat16))
    assert cache.entries[0].dtype is torch.float32
    assert cache.join(tokens).fill(cache.entries[0], torch.ones(2, 2, dtype=torch.bfloat16)).dtype is torch.bfloat16


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("size", [0, 3, None])
def test_a_new_cache_is_empty(size: int | None, rows: int) -> None:
    cache: Any = empty_cache(rows, size, SHAPES, CPU, DTYPES)
    assert (cache.batch_size, cache.size, cache.grows) == (rows, size or 0, size is None)
    assert [tensor.dtype for tensor in tensors(cache)] == [*DTYPES, torch.int64]
    assert (cache.slots < 0).all()
    joined = cache.join(chunk([0] * rows)[0])
    assert joined.tokens.rows.shape == (0,)


@given(size=sizes, history=histories)
def test_a_reset_row_is_empty_and_can_be_filled_again(size: int | None, history: list[list[int]]) -> None:
    cache, rows, number = fill(size, history)
    cache = cache.reset(torch.tensor([False, True, False]))
    assert read(cache, 1) == {}
    tokens, new = chunk([1, 4, 0], number)
    after = cache.append(tokens, *values_of(tokens))
    fresh = Row(new[1]).held(size)
    assert read(after, 1) == {4 - len(fresh) + rank: token for rank, token in enumerate(fresh)}
    assert read(after, 2) == {
        len(rows[2].tokens) - len(rows[2].held(size)) + rank: token for rank, token in enumerate(rows[2].held(size))
    }
