"""Random batches, in every layout and cut into chunks; and modules with parameters far from their initial values."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sma.init import seeded
from sma.ragged import Ragged, compress, rectangular
from sma.routers import Router

Module = TypeVar("Module", bound=nn.Module)

Layout = Literal["packed", "capacity", "rectangular"]


@dataclass(frozen=True)
class Example:
    """A random batch with one row per length.

    Attributes:
        lengths: positions of each row.
        rate: share of the positions that are active.
        cuts: sizes of the first chunks when the batch is streamed; one more chunk holds the rest.
        layout: how active tokens are laid out.
        seed: seed of all random numbers.
    """

    lengths: tuple[int, ...]
    rate: float
    cuts: tuple[int, ...]
    layout: Layout
    seed: int

    @property
    def length(self) -> int:
        """Positions of the longest row, L."""
        return max(self.lengths)

    def inside(self) -> Tensor:
        """Mask `(B, L)` of the positions that a row has."""
        return torch.arange(self.length) < torch.tensor(self.lengths)[:, None]

    def active(self) -> Tensor:
        """Mask `(B, L)` of random positions, different in every row."""
        return self.inside() & (torch.rand(len(self.lengths), self.length) < self.rate)

    def chunks(self) -> Iterator[slice]:
        """The chunks of the stream, empty ones among them."""
        start = 0
        for size in (*self.cuts, self.length):
            yield slice(start, min(start + size, self.length))
            start = min(start + size, self.length)

    def steps(self) -> Iterator[slice]:
        """Chunks of one position."""
        return (slice(position, position + 1) for position in range(self.length))


def examples(copies: int = 1) -> st.SearchStrategy[Example]:
    """Batches of 1 to 4 rows of up to 70 positions: more than a chunk of the scan and than several windows.

    The lengths are repeated `copies` times, so that the number of rows is a multiple of `copies`.
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
    """Lay out the active tokens of a batch, with random numbers of the size of `garbage` in the holes."""
    if layout == "packed" or active_BL.shape[1] == 0:
        return compress(x_BLD, active_BL, positions_BL=positions_BL)
    if positions_BL is None:
        positions_BL = torch.arange(active_BL.shape[1]).expand_as(active_BL)
    tokens = compress(x_BLD, active_BL, positions_BL=positions_BL, capacity=active_BL.shape[1])
    if layout == "rectangular":
        # The layout in which a backbone gets a padded batch: indices and positions continue through the holes.
        values, positions = (part.unflatten(0, active_BL.shape) for part in (tokens.values, tokens.positions))
        tokens = replace(rectangular(values, active_BL.sum(1), positions), index=tokens.index)
    noise = torch.randn_like(tokens.values) * garbage
    return tokens.with_values(tokens.values.where(tokens.mask[:, None], noise))


def put_back(values: Tensor, tokens: Ragged, shape: torch.Size) -> Tensor:
    """Results at the positions of their tokens, `(B, L, D)`; zeros elsewhere, without the results of holes."""
    real = tokens.mask.nonzero().squeeze(1)
    out = values.new_zeros(shape[0] * shape[1], values.shape[1])
    return out.index_add(0, tokens.index[real], values[real]).unflatten(0, shape[:2])


@torch.no_grad()
def spread_parameters(module: Module) -> Module:
    """Move every parameter, particularly those of routers, far from its initial value, at which a wrong decay, bias or
    gain could pass.
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


def reproducible(build: Callable[[], Module], dtype: torch.dtype = torch.float64, seed: int = 0) -> Module:
    """Build a module with spread parameters, the same ones for a seed in every dtype, in evaluation mode."""
    with seeded(seed):
        return spread_parameters(build().to(torch.float64)).to(dtype).eval()
