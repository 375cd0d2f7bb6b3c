r"""Losses by blocks of examples, and what may be said of them: bounds, intervals and the best learning rate.

    frame = ablate(model, task, trials, folder, judge=BlockLosses({"validation": 256, "test": 512}))
    block_losses_of(row, "test")        # of a row of the frame: 64 losses of 8 examples each
    print(best_rate(losses_by_rate(frame)))

The mean loss of a few hundred examples depends on the choice of examples as much as on the seed. Trials that are
compared share their examples, and a bootstrap over seeds and blocks of examples measures both effects.

Around its minimum the loss is nearly a parabola in the logarithm of the learning rate, whereas a grid knows its best
rate only up to a factor. The vertex of the parabola through the best rate of the grid and its two neighbours is finer:
from the slopes s of the mean losses on either side, taken at the middles x of the two intervals in log(lr), it is where
the slope is zero:

    log(lr*) = x_left - s_left (x_right - x_left) / (s_right - s_left)

Its interval is that of the bootstrap (:func:`resampled_means`, which states how far it can be trusted with few seeds).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import nn

from lora_lab.ablation.results import SCORE, last_rows
from lora_lab.system.distributed import ALONE
from lora_lab.task import Task
from lora_lab.tasks.generate import answers
from lora_lab.tasks.instruction import PairTask
from lora_lab.train import batch_losses

if TYPE_CHECKING:
    from pandas import DataFrame

CONFIDENCE = 0.95
RESAMPLES = 2000
_TAIL = (1 - CONFIDENCE) / 2  # of a two-sided interval
_DIGITS = 6  # after the decimal point


@dataclass(frozen=True)
class BlockLosses:
    """A judge for :func:`lora_lab.ablation.ablate`: the mean loss of each block of neighbouring examples.

    Its scores are texts by part, such as "[2.310521, 2.294387]".

    Args:
        examples: of each part, how many, from its first; examples are in random order.
        block: examples in a block, which are evaluated together. The last block may have fewer, and still counts as
            much as the others.
        answered: the prompts of the test part are answered too (:func:`lora_lab.tasks.generate.answers`): the score
            "accuracy" is the share of answers in each block that equal the reference. For a PairTask only.
    """

    examples: Mapping[str, int]
    block: int = 8
    answered: bool = False

    def __call__(self, model: nn.Module, task: Task) -> dict[str, str]:
        """Return a score for each part, and perhaps the accuracy: the numbers of its blocks, rounded, as a text."""
        scores = {}
        for part, limit in self.examples.items():
            losses = batch_losses(model, task, part, self.block, limit, by_length=False, processes=ALONE)
            scores[part] = [loss.item() for loss, _ in losses]
        if self.answered:
            scores["accuracy"] = self._accuracies(model, cast(PairTask, task))
        return {name: json.dumps([round(each, _DIGITS) for each in by_block]) for name, by_block in scores.items()}

    def _accuracies(self, model: nn.Module, task: PairTask) -> list[float]:
        """Return the share of right answers in each block of the test part."""
        limit = self.examples.get("test")
        predictions = answers(model, task, limit=limit)
        right = [a == pair.answer for a, pair in zip(predictions, task.pairs["test"][:limit], strict=True)]
        return [statistics.fmean(right[start : start + self.block]) for start in range(0, len(right), self.block)]


def losses_by_seed(rows: DataFrame, by: str, part: str) -> dict[Any, np.ndarray]:
    """Return the losses of trials with a result for every seed, as :func:`block_losses_of` gives them.

    Args:
        rows: the last row of each trial.
        by: the column in which those that belong together agree, such as "setup" or "lr".
        part: as for :func:`block_losses_of`.

    Returns:
        Each value of that column, ascending -> (seeds, blocks).
    """
    seeds = sorted(rows["seed"].unique())
    done, columns = rows[rows["outcome"] == "done"].sort_values("seed"), [SCORE + part, f"{part}_loss"]
    return {
        value: np.array([block_losses_of(row, part) for row in of_value.filter(columns).to_dict("records")])
        for value, of_value in done.groupby(by)
        if of_value["seed"].tolist() == seeds
    }


def block_losses_of(row: Mapping[Any, Any], part: str) -> list[float]:
    """Return the losses of a trial's blocks; those of one block if it was not judged by :class:`BlockLosses`.

    Args:
        row: the trial's last row in the table, which has the score, or ``<part>_loss``.
        part: such as "validation"; or "accuracy", for the shares of right answers.
    """
    text = row.get(SCORE + part)
    return json.loads(text) if isinstance(text, str) else [float(row[f"{part}_loss"])]


def t_bounds(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Return the mean of the values, and its one-sided lower and upper bounds by Student's t; NaN for a single value.

    Args:
        values: such as a difference for each seed.
        confidence: of each bound. For bounds that hold for n means together it is 1 - 0.05 / n (Bonferroni).
    """
    from scipy.stats import sem, t  # ttest_1samp would warn where all values are equal

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    distance = float(t.ppf(confidence, len(values) - 1) * sem(values))
    return mean, mean - distance, mean + distance


def outer_bounds(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return one-sided bounds of a mean over seeds and blocks of examples, each the outer one of two.

    One is that of a bootstrap over seeds and blocks, which is too narrow with few seeds, and the other Student's t over
    the seeds, which takes the examples as fixed. NaN for a single seed.

    Args:
        values: (seeds, blocks).
        confidence: of each bound, as for :func:`t_bounds`.
    """
    _, lower, upper = t_bounds(values.mean(axis=1).tolist(), confidence)
    low, high = np.quantile(resampled_means(values), [1 - confidence, confidence], method="nearest")
    return float(np.minimum(low, lower)), float(np.maximum(high, upper))  # which pass NaN on


def resampled_means(values: np.ndarray) -> np.ndarray:
    """Return means over seeds and blocks of examples in samples of a bootstrap, which draws both with replacement.

    The other dimensions of ``values`` share the seeds and the examples, so differences between the means are paired;
    and arrays with equal numbers of seeds and blocks share their samples. Noise of a single trial on a single block is
    counted up to three times, which makes intervals too wide (Owen 2007, "The Pigeonhole Bootstrap", Annals of Applied
    Statistics 1). Noise of whole trials is drawn from few seeds, which makes intervals too narrow: where nothing else
    varies, a 95 % interval contains a planted value in three cases of four with three seeds, and in five of six with
    five.

    Args:
        values: (..., seeds, blocks).

    Returns:
        (..., resamples).

    Reference: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7, section 2.
    """
    seeds, blocks = values.shape[-2:]
    by_seed, by_block = _resample(seeds, blocks)
    return np.einsum("...sb,ks,kb->...k", values, by_seed, by_block, optimize=True) / (seeds * blocks)


@lru_cache(maxsize=8)
def _resample(seeds: int, blocks: int) -> list[np.ndarray]:
    """Return how often each seed is in each sample, (resamples, seeds), and each block, (resamples, blocks)."""
    random = np.random.default_rng(0)
    return [random.multinomial(n, np.full(n, 1 / n), RESAMPLES) for n in (seeds, blocks)]


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Return the two-sided 95 % interval of a bootstrap's samples; its ends are samples, which may be infinite.

    Those unknown (NaN) count as the lowest and as the highest.
    """
    lower = np.quantile(np.where(np.isnan(samples), -math.inf, samples), _TAIL, method="nearest")
    upper = np.quantile(np.where(np.isnan(samples), math.inf, samples), 1 - _TAIL, method="nearest")
    return float(lower), float(upper)


def rank_correlations(runs: DataFrame, target: str, predictors: Sequence[str]) -> DataFrame:
    """Return how well each predictor orders the runs as the target does: Spearman's correlation, with intervals.

    Runs of one setup differ by their seeds alone, so they count as one observation: the two-sided 95 % intervals are
    those of a bootstrap that draws whole setups with replacement.

    Args:
        runs: one row a run, with ``setup`` and ``lr``; a row that lacks the target or a predictor is left out.
        target: the column that is to be predicted.
        predictors: columns; the others are compared with the first.

    Returns:
        Columns ``predictor``, ``correlation``, ``lower`` and ``upper``; and ``difference_lower`` and
        ``difference_upper``: by how much the first predictor's correlation is further from zero, in the same resamples.
        All are NaN for a column that is constant.

    Raises:
        ValueError: there are fewer than four setups.
    """
    import pandas
    from scipy.stats import rankdata

    columns = [target, *predictors]
    runs = runs.dropna(subset=columns)
    setups = [of_setup[columns].to_numpy(float) for _, of_setup in runs.groupby(["setup", "lr"], dropna=False)]
    if (count := len(setups)) < 4:
        raise ValueError(f"There are runs of {count} setups, but a correlation over setups needs at least four.")

    def correlate(drawn: Iterable[int]) -> np.ndarray:
        ranks = rankdata(np.concatenate([setups[i] for i in drawn]), axis=0)  # ties share their mean
        # NaN where a column is constant, as it may be by chance.
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.corrcoef(ranks, rowvar=False)[0, 1:]  # (predictors,)

    random = np.random.default_rng(0)
    samples = np.array([correlate(random.integers(count, size=count)) for _ in range(RESAMPLES)])
    ahead = np.abs(samples[:, :1]) - np.abs(samples)  # (resamples, predictors)
    table = {"predictor": [*predictors], "correlation": correlate(range(count))}
    for prefix, values in {"": samples, "difference_": ahead}.items():
        bounds = np.nanquantile(values, [_TAIL, 1 - _TAIL], axis=0, method="nearest")
        table |= zip((f"{prefix}lower", f"{prefix}upper"), bounds, strict=True)
    return pandas.DataFrame(table)


# The best learning rate


def losses_by_rate(frame: DataFrame) -> dict[float, np.ndarray]:
    """Return rate -> the validation losses of one setup's trials after the last step, (seeds, blocks of examples).

    There are several blocks if the trials were judged by :class:`lora_lab.ablation.stats.BlockLosses`. Only rates that
    have a result for every seed are there.

    Raises:
        ValueError: there is no such rate, or the frame has several setups.
    """
    if "setup" in frame and frame["setup"].nunique() > 1:
        raise ValueError(f"The frame has the setups {[*frame['setup'].unique()]}, but must have one; select its rows.")
    losses = losses_by_seed(last_rows(frame), "lr", "validation")
    if not losses:
        raise ValueError("No learning rate has a result for every seed; run the trials that are missing.")
    return losses


@dataclass(frozen=True)
class BestRate:
    """The best learning rate, as far as the trials tell.

    Args:
        tried: the rate of the lowest mean loss among those tried.
        vertex: of the parabola; None if ``tried`` is at an edge.
        lower, upper: the middle 95 % of the vertices of the samples; :func:`resampled_means` states how often such an
            interval holds the true value. None where it reaches beyond the rates tried, and if there is only one loss
            a rate, so that there is no interval.
        edge: "smallest" or "largest" where ``tried`` is that of the rates that count, else "".
        seeds, blocks: how many were resampled.
    """

    tried: float
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
        return f"{self.vertex:.3g} (resampled, {seeds}: {lower} to {upper}; best rate tried: {self.tried:.3g})"


def best_rate(losses: Mapping[float, np.ndarray]) -> BestRate:
    """Return the vertex of the parabola around the rate of the lowest mean loss, with its interval.

    Args:
        losses: rate -> losses (seeds, blocks), the same seeds and examples for all rates.

    Raises:
        ValueError: the losses of two rates differ in shape, or there is no rate.
    """
    rates, values = _stack(losses)
    means = values.mean(axis=(1, 2))  # (rates,)
    lowest = int(means.argmin())
    log_vertex = _log_vertices(np.log(rates), means[:, None])[0]
    bounds = map(math.exp, interval(sample_vertices(losses)))
    lower, upper = (bound if 0 < bound < math.inf and values[0].size > 1 else None for bound in bounds)
    return BestRate(
        tried=float(rates[lowest]),
        vertex=float(np.exp(log_vertex)) if math.isfinite(log_vertex) else None,
        lower=lower,
        upper=upper,
        edge="" if math.isfinite(log_vertex) else "largest" if log_vertex > 0 else "smallest",
        seeds=values.shape[1],
        blocks=values.shape[2],
    )


def sample_vertices(losses: Mapping[float, np.ndarray]) -> np.ndarray:
    """Return log(lr*) in each sample of the bootstrap, (resamples,); infinite where the lowest mean is at an edge.

    Setups that were trained on the same seeds and judged on the same examples share their samples, so that differences
    of these numbers are paired.
    """
    rates, values = _stack(losses)
    return _log_vertices(np.log(rates), resampled_means(values))


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
            unused = abs(weights[:, None]) < 1e-9  # zero, but for rounding, which must not make infinity of infinity
            power = np.where(unused, 0, weights[:, None] * vertices).sum(axis=0)
        middle = float(np.median(np.nan_to_num(power, nan=math.inf, posinf=math.inf, neginf=-math.inf)))
        fitted.append((middle if math.isfinite(middle) else math.nan, *interval(power)))
    return fitted


def ratio_interval(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Return the two-sided 95 % interval of a ratio of best rates, 0 or infinite where a grid does not bound it.

    Args:
        above, below: what :func:`sample_vertices` returned for the two, with equal samples.
    """
    with np.errstate(invalid="ignore"):  # beyond both grids: nothing is known of the ratio
        lower, upper = interval(above - below)
    return math.exp(lower), math.exp(upper)


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
