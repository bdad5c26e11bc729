"""The interval of a mean, against numpy and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sphere_plugin.evaluation import interval


def test_mean_and_half_width_are_those_of_numpy_and_scipy() -> None:
    values = np.random.default_rng(1).random(50).tolist()
    made = interval(values)
    assert made.n == 50
    assert made.mean == pytest.approx(np.mean(values))
    assert made.half == pytest.approx(1.96 * np.std(values, ddof=1) / math.sqrt(50))
    low, high = stats.norm.interval(0.95, loc=np.mean(values), scale=stats.sem(values))
    assert (made.mean - made.half, made.mean + made.half) == pytest.approx((low, high), rel=1e-4)


def test_what_was_not_scored_is_left_out() -> None:
    assert interval([1.0, None, 0.0, math.nan]) == interval([1.0, 0.0])
    assert interval([None, 0.25]) == interval([0.25])
    assert (interval([0.25]).mean, interval([0.25]).half) == (0.25, None)
    assert (interval([None]).mean, interval([]).half, interval([]).n) == (None, None, 0)
