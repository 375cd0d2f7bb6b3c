"""Bounds on a mean of paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


def t_bounds(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of the values, and its one-sided lower and upper 95 % bounds by Student's t; None for a single value."""
    from scipy.stats import sem, t  # ttest_1samp would warn where all values are equal

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    distance = float(t.ppf(CONFIDENCE, len(values) - 1) * sem(values))
    return mean, mean - distance, mean + distance
