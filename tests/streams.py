"""Tools for tests of streams: chunks, comparisons of tensors and states."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from sma.pytree import map_tensors, tensors
from sma.submodule import State
from tests.cases import SIDES, pad

# Tests of streams run a model once per chunk and once per token, so their examples are slower than others.
few = settings(max_examples=max(1, settings.default.max_examples // 6 if settings.default else 4))


@st.composite
def cuts(draw: st.DrawFn, length: int, most: int = 4) -> list[slice]:
    """Cut `length` tokens into chunks; a chunk may be empty or hold all tokens."""
    inner = draw(st.lists(st.integers(0, length), max_size=most - 1).map(sorted))
    return [slice(start, end) for start, end in pairwise([0, *inner, length])]


def steps(length: int) -> list[slice]:
    """One chunk per token."""
    return [slice(place, place + 1) for place in range(length)]


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    """Assert equality within a tolerance, relative to the largest expected magnitude or 1, whichever is larger."""
    largest = float(wanted.detach().abs().max()) if wanted.numel() and wanted.dtype is not torch.bool else 0.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, largest))


def copied(state: Any) -> Any:
    """A copy of a state that shares no memory with it."""
    return map_tensors(torch.clone, state)


def same_bits(one: State, other: State) -> bool:
    """Whether two states are equal bit by bit."""
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return all(left.dtype == right.dtype and torch.equal(left, right) for left, right in pairs)


def near_states(found: State, wanted: State, tolerance: float = 1e-9) -> None:
    """Assert that two states are equal within a tolerance; a cache may be longer than the other by empty slots."""
    for one, other in zip(tensors(found), tensors(wanted), strict=True):
        if one.ndim > 1 and one.shape[1] != other.shape[1]:
            shared = min(one.shape[1], other.shape[1])
            assert not one[:, shared:].any()
            assert not other[:, shared:].any()
            one, other = one[:, :shared], other[:, :shared]
        assert one.dtype == other.dtype
        near(one, other, tolerance)


def exactly(sentence: str) -> str:
    """A regular expression that matches exactly this text."""
    return f"^{re.escape(sentence)}$"


@dataclass(frozen=True)
class Plan:
    """How a batch of rows is streamed.

    Attributes:
        chunks: chunks of every row. All rows have equally many; their sizes may differ, and some may be empty.
        side: side of the padding in a chunk.
        extra: padding of the longest row of every chunk.
    """

    chunks: list[list[slice]]
    side: str = "right"
    extra: int = 0


@st.composite
def plans(draw: st.DrawFn, rows: int, length: int, count: int = 4) -> Plan:
    """Plans to stream `rows` rows of `length` tokens; each row is cut at different positions."""
    inner = st.lists(st.integers(0, length), min_size=count - 1, max_size=count - 1).map(sorted)
    chunks = [[slice(*ends) for ends in pairwise([0, *draw(inner), length])] for _ in range(rows)]
    return Plan(chunks, draw(st.sampled_from(sorted(SIDES))), draw(st.integers(0, 2)))


def even(parts: list[slice], rows: int) -> Plan:
    """The same chunks for every row, without padding."""
    return Plan([parts] * rows)


Call = Callable[[Tensor, Tensor | None, Any], tuple[Sequence[Tensor], Any]]


def flow(call: Call, inputs: Tensor, plan: Plan, state: Any, fill: float = 0.0) -> tuple[list[Tensor], Any]:
    """Stream a batch: `call(chunk, valid, state)` returns tensors `(B, L, ...)` and a state.

    Returns:
        these tensors for the valid tokens of all chunks together, and the last state.
    """
    found: list[list[list[Tensor]]] = []
    for parts in zip(*plan.chunks, strict=True):
        batch, valid = pad(
            [row[part] for row, part in zip(inputs, parts, strict=True)], plan.side, extra=plan.extra, fill=fill
        )
        outputs, state = call(batch, None if valid.all() and not plan.extra else valid, state)
        found.append([[output[row][valid[row]] for row in range(len(inputs))] for output in outputs])
    return [
        torch.stack([torch.cat(chunks) for chunks in zip(*rows, strict=True)]) for rows in zip(*found, strict=True)
    ], state
