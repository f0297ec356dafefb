"""Histograms of margins, the distances of tokens from the decision threshold, and shifts that change rates."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Bins of log-odds whose width is a share of their distance from 0: the margins of a router may spread over a millionth,
# at a high temperature, or over thousands, and have the same relative resolution. On either side there are 20 bins for
# each doubling, between 2^-64 and 2^64.
_OCTAVES, _PER_OCTAVE = 64, 20
ZERO = 2 * _OCTAVES * _PER_OCTAVE + 1
BINS = 2 * ZERO
_ABOVE = [2.0 ** (index / _PER_OCTAVE - _OCTAVES) for index in range(ZERO)]
EDGES = [*(-edge for edge in reversed(_ABOVE)), 0.0, *_ABOVE]


def histograms(margins: Float[Tensor, "B L S"], valid: Bool[Tensor, "B L"] | None) -> Int[Tensor, "S N"]:
    """Count the valid tokens by their margins, without non-finite ones."""
    known = margins.isfinite() if valid is None else margins.isfinite() & valid[..., None]
    wide = margins.to(torch.promote_types(margins.dtype, torch.float32))
    # Computed, because a search of the edges takes ten times as long. A margin below the first edge gets a negative
    # index.
    grid = wide.abs().log2_().add_(_OCTAVES).mul_(_PER_OCTAVE).clamp_(-1, ZERO - 1)
    # A tie is inactive and belongs below 0, so bins are closed on the right.
    bins = torch.where(wide > 0, ZERO + grid.ceil().clamp_(min=0), ZERO - 2 - grid.floor()).clamp_(0, BINS - 1)
    rows = margins.shape[-1]
    index = bins.where(known, BINS).long() + torch.arange(rows, device=margins.device) * (BINS + 1)
    # Not bincount, which synchronises with a GPU for the number of bins.
    total = torch.zeros(rows * (BINS + 1), dtype=torch.int64, device=margins.device)
    total.scatter_add_(0, index.flatten(), torch.ones_like(index).flatten())
    return rearrange(total, "(S N) -> S N", S=rows)[:, :BINS]


def shares_above(counts: Int[Tensor, "S N"]) -> Float[Tensor, "S N1"]:
    """Share of the tokens above each edge; 0 without tokens."""
    above = counts.flip(1).cumsum(1).flip(1).double()
    return torch.nn.functional.pad(above, (0, 1)) / counts.sum(1, keepdim=True).clamp(min=1)


def shift_to(
    rate: Float[Tensor, "#S"], shares: Float[Tensor, "S N1"], edges: Float[Tensor, "N1"]
) -> Float[Tensor, "S"]:
    """Log-odds to add to all scores so that this share of them is above 0; undefined without tokens.

    Computed on the device of the shares, without a synchronisation.

    Args:
        rate: the shares to reach.
        shares: result of `shares_above`.
        edges: `EDGES`, as a tensor.
    """
    below = (shares > rate[:, None]).sum(1) - 1  # the last edge with too many tokens above it
    above = (shares >= rate[:, None]).sum(1)  # the first one with too few
    # Where every edge in between fits, the nearest to the threshold; otherwise a point between two neighbours.
    nearest = (below + 1).clamp(min=ZERO).minimum(above - 1)
    last = edges.shape[0] - 1
    below_it, above_it = below.clamp(0, last), above.clamp(0, last)
    more, fewer = (shares.gather(1, index[:, None]).squeeze(1) for index in (below_it, above_it))
    low, high = edges[below_it], edges[above_it]
    between = low + (more - rate) / (more - fewer) * (high - low)
    return -torch.where(above - below > 1, edges[nearest.clamp(0, last)], between)
