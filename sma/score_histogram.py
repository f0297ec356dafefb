"""How far tokens are from being decided otherwise: their histograms, and the shifts of the scores that follow from
them.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Log-odds from the decision, in bins whose width is a share of their distance from 0: those of a router may spread over
# a millionth, at a high temperature, or over thousands, and are resolved alike. 20 bins for each doubling, between
# 2^-64 and 2^64, on either side.
_OCTAVES, _PER_OCTAVE = 64, 20
ZERO = 2 * _OCTAVES * _PER_OCTAVE + 1
BINS = 2 * ZERO
_ABOVE = [2.0 ** (place / _PER_OCTAVE - _OCTAVES) for place in range(ZERO)]
EDGES = [*(-edge for edge in reversed(_ABOVE)), 0.0, *_ABOVE]


def histograms(margins: Float[Tensor, "B L S"], valid: Bool[Tensor, "B L"] | None) -> Int[Tensor, "S N"]:
    """Count the valid tokens by their margins; those that are not finite are left out."""
    counted = margins.isfinite() if valid is None else margins.isfinite() & valid[..., None]
    wide = margins.to(torch.promote_types(margins.dtype, torch.float32))
    # Computed, because looking edges up takes ten times as long. What is nearer to 0 than the first edge has a number
    # below 0.
    grid = wide.abs().log2_().add_(_OCTAVES).mul_(_PER_OCTAVE).clamp_(-1, ZERO - 1)
    # A tie is inactive, so it belongs below 0: bins are closed on the right.
    bins = torch.where(wide > 0, ZERO + grid.ceil().clamp_(min=0), ZERO - 2 - grid.floor()).clamp_(0, BINS - 1)
    rows = margins.shape[-1]
    places = bins.where(counted, BINS).long() + torch.arange(rows, device=margins.device) * (BINS + 1)
    # Not bincount, which waits for a GPU to say how many bins there are.
    total = torch.zeros(rows * (BINS + 1), dtype=torch.int64, device=margins.device)
    return total.scatter_add_(0, places.flatten(), torch.ones_like(places).flatten()).unflatten(0, (rows, BINS + 1))[
        :, :BINS
    ]


def shares_above(counts: Int[Tensor, "S N"]) -> Float[Tensor, "S N1"]:
    """Share of the tokens above each edge; 0 everywhere where there is no token."""
    above = counts.flip(1).cumsum(1).flip(1).double()
    return torch.nn.functional.pad(above, (0, 1)) / counts.sum(1, keepdim=True).clamp(min=1)


def shift_to(rate: float, shares: Float[Tensor, "N1"]) -> float:
    """What has to be added to all scores, in log-odds, for this share of them to be above 0."""
    below = int((shares > rate).sum()) - 1  # the last edge with too many tokens above it
    above = int((shares >= rate).sum())  # the first one with too few
    if above - below > 1:  # edges between, all of them right: the nearest to where the threshold stands
        return -EDGES[min(max(ZERO, below + 1), above - 1)]
    weight = float((shares[below] - rate) / (shares[below] - shares[above]))
    return -(EDGES[below] + weight * (EDGES[above] - EDGES[below]))
