"""Bounds on a mean of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

CONFIDENCE = 0.95


def t_bounds(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of the values, and its one-sided lower and upper 95 % bounds by Student's t; None for a single value."""
    from scipy.stats import t

    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None, None
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf(CONFIDENCE, n - 1)) * sd / math.sqrt(n)
    return mean, mean - half, mean + half
