"""How far tokens are from being decided otherwise: their histograms, and the shifts of the scores that follow from them."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Log-odds from the decision, in bins that are fine near 0, because those of a new router spread over some hundredths, and coarse far
# off: 0.001 (e^k - 1) of a grid, up to 10^4 on either side.
BINS, _SCALE = 1024, 0.001
_RANGE = math.log1p(1e4 / _SCALE)
ZERO = BINS // 2
EDGES = [math.copysign(_SCALE * math.expm1(_RANGE * abs(place / ZERO - 1)), place - ZERO) for place in range(BINS + 1)]


def histograms(margins: Float[Tensor, "B L S"], valid: Bool[Tensor, "B L"] | None) -> Int[Tensor, "S N"]:
    """Count the valid tokens by their margins; those that are not finite are left out."""
    counted = margins.isfinite() if valid is None else margins.isfinite() & valid[..., None]
    # A tie is inactive, so it belongs below 0: bins are closed on the right. Computed, because looking edges up takes ten times as long.
    grid = margins.abs().div_(_SCALE).log1p_().mul_(ZERO / _RANGE).copysign_(margins)
    bins = grid.ceil_().add_(ZERO - 1).clamp_(0, BINS - 1)
    rows = margins.shape[-1]
    places = bins.where(counted, BINS).long() + torch.arange(rows, device=margins.device) * (BINS + 1)
    # Not bincount, which waits for a GPU to say how many bins there are.
    total = torch.zeros(rows * (BINS + 1), dtype=torch.int64, device=margins.device)
    return total.scatter_add_(0, places.flatten(), torch.ones_like(places).flatten()).unflatten(0, (rows, BINS + 1))[:, :BINS]


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
