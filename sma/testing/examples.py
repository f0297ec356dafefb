"""Random batches, in every layout and cut into chunks; and parameters that are spread."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sma.ragged import Ragged, compress, rectangular
from sma.routers import Router

Layout = Literal["packed", "capacity", "rectangular"]


@dataclass(frozen=True)
class Example:
    """A random batch: as many rows as `lengths`, and whatever else is drawn, from the seed.

    Attributes:
        lengths: positions of each row.
        rate: share of the positions that are active.
        cuts: sizes of the first chunks when the batch is streamed; the rest is one chunk more.
        layout: how active tokens are laid out.
        seed: of all random numbers.
    """

    lengths: tuple[int, ...]
    rate: float
    cuts: tuple[int, ...]
    layout: Layout
    seed: int

    @property
    def length(self) -> int:
        """The longest row, L."""
        return max(self.lengths)

    def inside(self) -> Tensor:
        """`(B, L)`: the positions that a row has."""
        return torch.arange(self.length) < torch.tensor(self.lengths)[:, None]

    def active(self) -> Tensor:
        """`(B, L)`: random positions of the rows; rows disagree."""
        return self.inside() & (torch.rand(len(self.lengths), self.length) < self.rate)

    def chunks(self) -> Iterator[slice]:
        """The chunks of the stream, empty ones among them."""
        start = 0
        for size in (*self.cuts, self.length):
            yield slice(start, min(start + size, self.length))
            start = min(start + size, self.length)

    def steps(self) -> Iterator[slice]:
        """Chunks of one position."""
        return (slice(place, place + 1) for place in range(self.length))


def examples(copies: int = 1) -> st.SearchStrategy[Example]:
    """Batches of 1 to 4 rows of up to 70 positions: over the size of a chunk of the scan and several windows.

    The lengths are repeated `copies` times, so that the number of rows is a multiple of that.
    """
    lengths = (
        st.lists(st.one_of(st.integers(0, 9), st.integers(0, 70)), min_size=1, max_size=4)
        .filter(any)
        .map(lambda drawn: tuple(drawn) * copies)
    )
    cuts = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), max_size=5).map(tuple)
    return st.builds(
        Example,
        lengths=lengths,
        rate=st.sampled_from([1.0, 0.5, 0.1]),
        cuts=cuts,
        layout=st.sampled_from(["packed", "capacity", "rectangular"]),
        seed=st.integers(0, 999),
    )


def lay(
    x_BLD: Tensor, active_BL: Tensor, layout: Layout, positions_BL: Tensor | None = None, garbage: float = 0.0
) -> Ragged:
    """The active tokens of a batch in one layout, with random numbers of the size of `garbage` in the holes."""
    if layout == "packed" or active_BL.shape[1] == 0:
        return compress(x_BLD, active_BL, positions_BL=positions_BL)
    if positions_BL is None:
        positions_BL = torch.arange(active_BL.shape[1]).expand_as(active_BL)
    tokens = compress(x_BLD, active_BL, positions_BL=positions_BL, capacity=active_BL.shape[1])
    if layout == "rectangular":
        # As a backbone is given a padded batch: places and positions run on through the holes.
        counts = active_BL.sum(1)
        frame = rectangular(
            tokens.values.unflatten(0, active_BL.shape), counts, tokens.positions.unflatten(0, active_BL.shape)
        )
        tokens = Ragged(
            frame.values,
            tokens.index,
            frame.positions,
            frame.rows,
            frame.offsets,
            frame.lengths,
            frame.stride,
            frame.holes,
        )
    noise = torch.randn_like(tokens.values) * garbage
    return tokens.with_values(tokens.values.where(tokens.mask[:, None], noise))


def place(values: Tensor, tokens: Ragged, shape: torch.Size) -> Tensor:
    """Results at the places of their tokens, `(B, L, D)`; zeros elsewhere, and nothing of the holes."""
    real = tokens.mask.nonzero().squeeze(1)
    out = values.new_zeros(shape[0] * shape[1], values.shape[1])
    return out.index_add(0, tokens.index[real], values[real]).unflatten(0, shape[:2])


@torch.no_grad()
def spread_parameters(module: nn.Module) -> nn.Module:
    """Move every parameter far from its initial value, where a wrong decay, bias or gain would pass; routers most of
    all.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.add_(torch.randn_like(parameter) * (2 if fan_in == 1 else fan_in**-0.5))
    for part in module.modules():
        if isinstance(part, Router):
            for parameter in part.parameters():
                parameter.mul_(30 if parameter.ndim > 1 else 0.3)
    return module


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Max |found - wanted| / max(1, max |wanted|); infinite where one is not a number and the other is."""
    if found.shape != wanted.shape:
        raise AssertionError(f"a shape of {tuple(found.shape)} instead of {tuple(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    if not torch.equal(found.isnan(), wanted.isnan()):
        return float("inf")
    difference = (found - wanted).detach().double().nan_to_num(0.0).abs().max()
    return float(difference / max(1.0, float(wanted.detach().double().nan_to_num(0.0).abs().max())))


def require_near(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Raise unless two tensors agree."""
    difference = largest_difference(found, wanted)
    if not difference <= tolerance:
        raise AssertionError(f"{what}: relative difference {difference:.1e}, allowed {tolerance:.0e}")


def require(condition: bool, complaint: str) -> None:
    """Raise unless a condition holds."""
    if not condition:
        raise AssertionError(complaint)
