"""Histograms of margins against counts, and shifts against their effect."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.score_histogram import BINS, EDGES, ZERO, histograms, shares_above, shift_to
from tests.cases import masks, normal

MARGINS = st.lists(
    st.floats(-3e4, 3e4) | st.sampled_from([0.0, -0.0, 5e-324, -5e-324, 1e-30, -1e-30, math.nan, math.inf, -math.inf]),
    max_size=12,
)


def test_edges_increase_from_far_below_0_to_far_above_it():
    assert sorted(set(EDGES)) == EDGES
    assert EDGES[ZERO] == 0
    assert EDGES[0] == -EDGES[-1] < -9000


@given(margins=MARGINS)
def test_every_finite_margin_is_counted_between_its_edges_and_no_other(margins):
    counts = histograms(torch.tensor(margins, dtype=torch.float64).reshape(1, -1, 1), None)[0]
    wanted = [0] * BINS
    for margin in filter(math.isfinite, margins):
        above = [place for place in range(1, BINS) if EDGES[place] < margin]  # right-closed, outer bins open
        wanted[max(above, default=0)] += 1
    # Edges may have rounding errors in the last digit, but the edge 0 is exact.
    assert counts.sum() == sum(wanted)
    assert (counts.cumsum(0) - torch.tensor(wanted).cumsum(0)).abs().max() <= len(margins)
    assert int(counts[ZERO:].sum()) == sum(margin > 0 for margin in margins if math.isfinite(margin))
    for margin in filter(math.isfinite, margins):
        (place,) = histograms(torch.tensor([[[margin]]], dtype=torch.float64), None)[0].nonzero()[:, 0].tolist()
        assert place == 0 or EDGES[place] <= margin * (1 + math.copysign(1e-9, margin))
        assert place == BINS - 1 or margin * (1 - math.copysign(1e-9, margin)) <= EDGES[place + 1]


@given(valid=masks())
def test_padding_is_not_counted_and_sub_modules_are_counted_separately(valid):
    margins = normal(*valid.shape, 3)
    counts = histograms(margins, valid)
    for place in range(3):
        kept = margins[..., place][valid].reshape(1, -1, 1)
        assert torch.equal(counts[place], histograms(kept, None)[0])
    assert torch.equal(margins, normal(*valid.shape, 3))


def _shift(rate, margins):
    edges = torch.tensor(EDGES, dtype=torch.float64)
    rates = torch.tensor([rate], dtype=torch.float64)
    return float(shift_to(rates, shares_above(histograms(margins, None)), edges)[0])


@given(size=st.integers(1, 200), rate=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_after_the_shift_the_requested_share_is_above_0(size, rate, seed):
    margins = 5 * normal(1, size, 1, seed=seed)
    shift = _shift(rate, margins)
    # Within the width of a bin, and within one token.
    slack = 0.033 * (0.001 + abs(shift))
    low, high = (float(((margins + shift + side) > 0).double().mean()) for side in (-slack, slack))
    assert low - 1 / size <= rate <= high + 1 / size


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_a_rate_on_target_needs_no_shift(rate):
    margins = torch.where(torch.arange(10) < 10 * rate, 1.0, -1.0).reshape(1, 10, 1)
    assert _shift(rate, margins) == 0
