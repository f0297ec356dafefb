"""Confidence intervals of means of few values, such as differences over seeds."""

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    r"""Mean of values, and half the width of its 95 % confidence interval: $t \, s / \sqrt n$, with the quantile t of
    Student's distribution with n - 1 degrees of freedom and the standard deviation s.

    Args:
        values: n independent values of a normal distribution, at least two.
    """
    freedom = len(values) - 1
    return statistics.fmean(values), t_quantile(freedom) * statistics.stdev(values) / math.sqrt(len(values))


def t_quantile(freedom: int) -> float:
    """The t at which Student's distribution has the probability `CONFIDENCE` between -t and t, by bisection."""
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t over the square root of the degrees of freedom
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, freedom) < CONFIDENCE else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _probability(angle: float, freedom: int) -> float:
    """Probability between -t and t; Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4."""
    sine, cosine, odd = math.sin(angle), math.cos(angle), freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for step in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * step / (step + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
