r"""Which learning rate is best? Grids that are widened until the best rate is inside, and a vertex with an interval.

    template = Trial(LoRA(8, 16), 1e-3, steps=60)
    frame = tune(model, task, {"r=8": template}, {"r=8": rates_around(1e-3)}, range(3), "runs/rates")
    print(best_rate(losses_by_rate(frame)))

Around its minimum the loss is nearly a parabola in the logarithm of the learning rate, whereas a grid knows its best
rate only up to a factor. The vertex of the parabola through the best rate of the grid and its two neighbours is finer:
from the slopes s of the mean losses on either side, taken at the middles x of the two intervals in log(lr), it is where
the slope is zero:

    log(lr*) = x_left - s_left (x_right - x_left) / (s_right - s_left)

The interval is from a bootstrap over the seeds and, where losses are known by blocks of examples, over those
(:func:`lora_lab.ablation.stats.resampled_means`, which states how far it can be trusted with few seeds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_lab.ablation.compare import last_rows
from lora_lab.ablation.stats import CONFIDENCE, RESAMPLES, interval, losses_by_seed, resampled_means

if TYPE_CHECKING:
    import pandas


def losses_by_rate(frame: pandas.DataFrame) -> dict[float, np.ndarray]:
    """Return rate -> the validation losses of one setup's trials after the last step, (seeds, blocks of examples).

    There are several blocks if the trials were judged by :class:`lora_lab.ablation.stats.BlockLosses`. Only rates that
    have a result for every seed are there.

    Raises:
        ValueError: there is no such rate, or the frame has several setups.
    """
    if "setup" in frame and frame["setup"].nunique() > 1:
        raise ValueError(f"The frame has the setups {[*frame['setup'].unique()]}, but must have one; select its rows.")
    losses = {float(lr): values for lr, values in losses_by_seed(last_rows(frame), "lr", "validation").items()}
    if not losses:
        raise ValueError("No learning rate has a result for every seed; run the trials that are missing.")
    return losses


@dataclass(frozen=True)
class BestRate:
    """The best learning rate, as far as the trials tell.

    Args:
        tried: the rate of the lowest mean loss among those tried.
        loss: that mean, in the task's unit.
        vertex: of the parabola; None if ``tried`` is at an edge.
        lower, upper: the two-sided 95 % interval of the vertex; None where it reaches beyond the rates tried, and if
            there is only one loss a rate, so that there is no interval.
        edge: "smallest" or "largest" where ``tried`` is that of the rates that count, else "".
        seeds, blocks: how many were resampled.
    """

    tried: float
    loss: float
    vertex: float | None
    lower: float | None
    upper: float | None
    edge: str
    seeds: int
    blocks: int

    def __str__(self) -> str:
        if self.vertex is None:
            return f"{self.tried:.3g}, the {self.edge} rate tried, so the best may lie beyond"
        if self.seeds * self.blocks == 1:
            return f"{self.vertex:.3g} (one loss per rate, so no interval; best rate tried: {self.tried:.3g})"
        lower = "below all tried" if self.lower is None else f"{self.lower:.3g}"
        upper = "above all tried" if self.upper is None else f"{self.upper:.3g}"
        seeds = f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        return f"{self.vertex:.3g} ({CONFIDENCE:.0%}, {seeds}: {lower} to {upper}; best rate tried: {self.tried:.3g})"


def best_rate(losses: Mapping[float, np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> BestRate:
    """Return the vertex of the parabola around the rate of the lowest mean loss, with its interval.

    Args:
        losses: rate -> losses (seeds, blocks), the same seeds and examples for all rates.
        resamples: of the bootstrap.
        seed: of the resampling.
    """
    rates, values = _stack(losses)
    means = values.mean(axis=(1, 2))  # (rates,)
    lowest = int(means.argmin())
    log_vertex = _log_vertices(np.log(rates), means[:, None])[0]
    bounds = map(math.exp, interval(sample_vertices(losses, resamples, seed)))
    lower, upper = (bound if 0 < bound < math.inf and values[0].size > 1 else None for bound in bounds)
    return BestRate(
        tried=float(rates[lowest]),
        loss=float(means[lowest]),
        vertex=float(np.exp(log_vertex)) if math.isfinite(log_vertex) else None,
        lower=lower,
        upper=upper,
        edge="" if math.isfinite(log_vertex) else "largest" if log_vertex > 0 else "smallest",
        seeds=values.shape[1],
        blocks=values.shape[2],
    )


def sample_vertices(losses: Mapping[float, np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return log(lr*) in each sample of the bootstrap, (resamples,); infinite where the lowest mean is at an edge.

    Setups that were trained on the same seeds and judged on the same examples, and are resampled by the same ``seed``,
    share their samples, so that differences of these numbers are paired.
    """
    rates, values = _stack(losses)
    return _log_vertices(np.log(rates), resampled_means(values, resamples, seed))


def slope(samples: Mapping[int, np.ndarray] | Mapping[float, np.ndarray]) -> tuple[float, float, float]:
    """Return how the best rate goes with one size, such as the rank: p in lr* ~ x^p, as :func:`powers`."""
    (power,) = powers({(x,): of_size for x, of_size in samples.items()})
    return power


def powers(samples: Mapping[tuple[float, ...], np.ndarray]) -> list[tuple[float, float, float]]:
    """Return how the best rate goes with several sizes, such as alpha and rank: p and q in lr* ~ x^p y^q.

    By least squares in logarithms. Where a best rate is beyond its grid it may be anywhere there, and so may the power.

    Args:
        samples: (x, y, ...) -> what :func:`sample_vertices` returned there; more of them than sizes.

    Returns:
        For each size the median of its power over the samples, NaN if it is beyond the grids, and the bounds of its
        two-sided 95 % interval, infinite where the grids do not bound it.

    Raises:
        ValueError: there are too few sizes to fit, or they do not differ.
    """
    sizes = np.log(np.array([*samples]))  # (setups, sizes)
    design = np.column_stack([sizes, np.ones(len(sizes))])
    if sizes.ndim < 2 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError(f"A power cannot be fitted to the sizes {[*samples]}; give more that differ.")
    vertices = np.array([*samples.values()])  # (setups, resamples)
    fitted = []
    for weights in np.linalg.pinv(design)[:-1]:  # (setups,): what each setup contributes to the power of a size
        with np.errstate(invalid="ignore"):  # beyond two grids in opposite directions: unknown
            power = np.where(weights[:, None] == 0, 0, weights[:, None] * vertices).sum(axis=0)
        middle = float(np.median(np.nan_to_num(power, nan=math.inf, posinf=math.inf, neginf=-math.inf)))
        fitted.append((middle if math.isfinite(middle) else math.nan, *_bounds(power)))
    return fitted


def ratio_interval(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Return the two-sided 95 % interval of a ratio of best rates, 0 or infinite where a grid does not bound it.

    Args:
        above, below: what :func:`sample_vertices` returned for the two, with equal samples.
    """
    with np.errstate(invalid="ignore"):  # beyond both grids: nothing is known of the ratio
        lower, upper = _bounds(above - below)
    return math.exp(lower), math.exp(upper)


def _bounds(samples: np.ndarray) -> tuple[float, float]:
    """Return the interval of samples; those unknown (NaN) count as the lowest and as the highest."""
    lower, _ = interval(np.nan_to_num(samples, nan=-math.inf, posinf=math.inf, neginf=-math.inf))
    _, upper = interval(np.nan_to_num(samples, nan=math.inf, posinf=math.inf, neginf=-math.inf))
    return lower, upper


def _stack(losses: Mapping[float, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return ascending rates, and their losses (rates, seeds, blocks)."""
    rates = np.array(sorted(losses))
    return rates, np.array([losses[rate] for rate in rates])


def _log_vertices(x: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Return vertices (samples,) from log rates x (rates,) and mean losses (rates, samples); infinite at an edge."""
    lowest = means.argmin(axis=0)  # (samples,)
    vertices = np.where(lowest == 0, -math.inf, math.inf)  # (samples,)
    (inside,) = np.nonzero((lowest > 0) & (lowest < len(x) - 1))
    i = lowest[inside]
    left, here, right = (means[i + side, inside] for side in (-1, 0, 1))
    falling, rising = (here - left) / (x[i] - x[i - 1]), (right - here) / (x[i + 1] - x[i])
    middle_left, middle_right = (x[i - 1] + x[i]) / 2, (x[i] + x[i + 1]) / 2
    curvature = rising - falling
    # Three equal losses have no vertex; the middle one is as good as any.
    share = np.divide(-falling, curvature, out=np.full_like(curvature, 0.5), where=curvature > 0)
    vertices[inside] = middle_left + share * (middle_right - middle_left)
    return vertices
