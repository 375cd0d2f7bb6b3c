"""Bounds on a mean of paired differences: by Student's t over seeds, or by a bootstrap over seeds and examples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000


def t_bounds(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float | None, float | None]:
    """Mean of the values, and its one-sided lower and upper bounds by Student's t; None for a single value.

    Args:
        values: such as a difference for each seed.
        confidence: of each bound. For bounds that hold for n means together it is 1 - 0.05 / n (Bonferroni).
    """
    from scipy.stats import sem, t  # ttest_1samp would warn where all values are equal

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    distance = float(t.ppf(confidence, len(values) - 1) * sem(values))
    return mean, mean - distance, mean + distance


def outer_bounds(
    values: np.ndarray, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """One-sided bounds of a mean over seeds and blocks of examples, each the outer one of two.

    One is that of a bootstrap over seeds and blocks, which is too narrow with few seeds, and the other Student's t over
    the seeds, which takes the examples as fixed. NaN for a single seed.

    Args:
        values: (seeds, blocks).
        confidence: of each bound, as for :func:`t_bounds`.
        resamples, seed: of the bootstrap.
    """
    _, lower, upper = t_bounds(values.mean(axis=1).tolist(), confidence)
    if lower is None or upper is None:
        return math.nan, math.nan
    samples = resampled_means(values, resamples, seed)
    low, high = np.quantile(samples, [1 - confidence, confidence], method="nearest")
    return min(float(low), lower), max(float(high), upper)


def outer_interval(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The two-sided 95 % interval of a mean over seeds and blocks of examples, as for :func:`outer_bounds`."""
    return outer_bounds(values, (1 + CONFIDENCE) / 2, resamples, seed)


def resampled_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means over seeds and blocks of examples in samples of a bootstrap, which draws both with replacement.

    The other dimensions of ``values`` share the seeds and the examples, so differences between the means are paired.
    Noise of a single trial on a single block is counted up to three times, which makes intervals too wide (Owen 2007,
    "The Pigeonhole Bootstrap", Annals of Applied Statistics 1). Noise of whole trials is drawn from few seeds, which
    makes intervals too narrow: where nothing else varies, a 95 % interval contains a planted value in three cases of
    four with three seeds, and in five of six with five.

    Args:
        values: (..., seeds, blocks).
        resamples: how many samples.
        seed: of the drawing; equal seeds draw equal samples for equal numbers of seeds and blocks.

    Returns:
        (..., resamples).

    Reference: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7, section 2.
    """
    random = np.random.default_rng(seed)
    seeds, blocks = values.shape[-2:]
    by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)  # (resamples, seeds): how often each
    by_block = random.multinomial(blocks, np.full(blocks, 1 / blocks), resamples)  # (resamples, blocks)
    return np.einsum("...sb,ks,kb->...k", values, by_seed, by_block, optimize=True) / (seeds * blocks)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The two-sided 95 % interval of a bootstrap's samples; its ends are samples, which may be infinite."""
    tail = (1 - CONFIDENCE) / 2
    lower, upper = np.quantile(samples, [tail, 1 - tail], method="nearest")
    return float(lower), float(upper)
