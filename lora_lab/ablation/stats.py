"""Bounds on a mean of paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


def t_bounds(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of the values, and its one-sided lower and upper 95 % bounds by Student's t; None for a single value."""
    from scipy.stats import t  # not its ttest_1samp, which warns where all values are equal

    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return mean, None, None
    distance = float(t.ppf(CONFIDENCE, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - distance, mean + distance
