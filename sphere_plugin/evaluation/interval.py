"""A mean and how far it can be trusted, as the paper's Table 1 gives them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev

# Half the width, in standard errors, of the interval that holds 95 % of a normal distribution.
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Interval:
    """mean ± half.

    Attributes:
        mean: None where there is no value.
        half: half the width of the 95 % interval, 1.96·s/√n; None for fewer than two values.
        n: how many values.
    """

    mean: float | None
    half: float | None
    n: int


def interval(values: Iterable[float | None]) -> Interval:
    """The mean of ``values`` and its 95 % interval, s being the sample's standard deviation (n − 1).

    None, and numbers that are not finite, are left out.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return Interval(None, None, 0)
    half = NORMAL_95 * stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return Interval(fmean(known), half, len(known))
