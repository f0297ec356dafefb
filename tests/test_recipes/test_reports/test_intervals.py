"""Confidence intervals of means, against SciPy."""

import numpy as np
import pytest
from scipy import stats

from sma.recipes.reports.intervals import mean_interval, t_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 6, 7, 20, 21, 100, 101])
def test_quantile_equals_that_of_the_student_t_distribution(freedom):
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-12)


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_interval_equals_that_of_a_paired_t_test(count):
    first, second = np.random.default_rng(count).normal(size=(2, count))
    mean, half = mean_interval(list(first - second))
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_interval_of_equal_values_has_width_zero():
    assert mean_interval([0.25, 0.25, 0.25]) == (0.25, 0.0)
