"""Losses by blocks of examples, and what may be said of them: bounds, intervals and rank correlations.

    frame = ablate(model, task, trials, folder, judge=BlockLosses({"validation": 256, "test": 512}))
    block_losses_of(row, "test")    # of a row of the frame: 64 losses of 8 examples each

The mean loss of a few hundred examples depends on the choice of examples as much as on the seed. Trials that are
compared share their examples, and a bootstrap over seeds and blocks of examples measures both effects.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import nn

from lora_lab.ablation.results import SCORE
from lora_lab.task import Task
from lora_lab.tasks.generate import answers
from lora_lab.tasks.instruction import PairTask
from lora_lab.train import batch_losses

if TYPE_CHECKING:
    import pandas

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
        scores = {
            part: [loss.item() for loss, _ in batch_losses(model, task, part, self.block, limit)]
            for part, limit in self.examples.items()
        }
        if self.answered:
            scores["accuracy"] = self._accuracies(model, cast(PairTask, task))
        return {name: json.dumps([round(each, _DIGITS) for each in by_block]) for name, by_block in scores.items()}

    def _accuracies(self, model: nn.Module, task: PairTask) -> list[float]:
        limit = self.examples.get("test")
        predictions = answers(model, task, limit=limit)
        right = [a == pair.answer for a, pair in zip(predictions, task.pairs["test"][:limit], strict=True)]
        return [statistics.fmean(right[start : start + self.block]) for start in range(0, len(right), self.block)]


def losses_by_seed(rows: pandas.DataFrame, by: str, part: str) -> dict[Any, np.ndarray]:
    """Return the losses of trials with a result for every seed, as :func:`block_losses_of` gives them.

    Args:
        rows: the last row of each trial.
        by: the column in which those that belong together agree, such as "setup" or "lr".
        part: as for :func:`block_losses_of`.

    Returns:
        Each value of that column, ascending -> (seeds, blocks).
    """
    seeds = sorted(rows["seed"].unique())
    done = rows[rows["outcome"] == "done"].sort_values("seed")
    return {
        value: np.array([block_losses_of(row, part) for row in of_value.to_dict("records")])
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


def t_bounds(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float | None, float | None]:
    """Return the mean of the values, and its one-sided bounds by Student's t; None for a single value.

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
    """Return one-sided bounds of a mean over seeds and blocks of examples, each the outer one of two.

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


def resampled_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return means over seeds and blocks of examples in samples of a bootstrap, which draws both with replacement.

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
    """Return the two-sided 95 % interval of a bootstrap's samples; its ends are samples, which may be infinite."""
    lower, upper = np.quantile(samples, [_TAIL, 1 - _TAIL], method="nearest")
    return float(lower), float(upper)


def rank_correlations(
    runs: pandas.DataFrame,
    target: str,
    predictors: Sequence[str],
    group: Sequence[str] = ("setup", "lr"),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pandas.DataFrame:
    """Return how well each predictor orders the runs as the target does: Spearman's correlation, with intervals.

    Runs of one setup differ by their seeds alone, so they count as one observation: whole setups are drawn with
    replacement, left out, and permuted.

    Args:
        runs: one row a run; a row that lacks the target or a predictor is left out.
        target: the column that is to be predicted.
        predictors: columns; the others are compared with the first.
        group: columns that runs of the same setup have in common.
        resamples: of the bootstrap, and how many permutations.
        seed: of the drawing.

    Returns:
        Columns ``predictor``; ``correlation``; ``lower`` and ``upper`` (two-sided 95 % interval from a bootstrap over
        setups); ``least`` and ``most`` (each setup left out once); ``p`` (the share of permutations of the setups'
        means whose correlation is as far from zero as theirs); ``difference``, ``difference_lower`` and
        ``difference_upper``: by how much the first predictor's correlation is further from zero, in the same resamples.

    Raises:
        ValueError: there are fewer than four setups, or a column is constant.
    """
    import pandas

    columns = [target, *predictors]
    runs = runs.dropna(subset=columns)
    setups = [of_setup[columns].to_numpy(float) for _, of_setup in runs.groupby([*group], dropna=False)]
    if (count := len(setups)) < 4:
        raise ValueError(f"There are runs of {count} setups, but a correlation over setups needs at least four.")
    if constant := [name for name in columns if runs[name].nunique() == 1]:
        raise ValueError(f"{constant[0]!r} is the same in all runs, so it correlates with nothing; leave it out.")

    def correlate(drawn: Iterable[int]) -> np.ndarray:
        return _spearman(np.concatenate([setups[i] for i in drawn]))  # (predictors,)

    random, everything = np.random.default_rng(seed), range(count)
    correlations = correlate(everything)
    resampled = np.array([correlate(random.integers(count, size=count)) for _ in range(resamples)])
    left_out = np.array([correlate([i for i in everything if i != without]) for without in everything])
    means = np.array([values.mean(axis=0) for values in setups])  # (setups, 1 + predictors)
    permuted = np.array(
        [_spearman(np.column_stack([random.permutation(means[:, 0]), means[:, 1:]])) for _ in range(resamples)]
    )  # (resamples, predictors)
    as_far = np.abs(permuted) >= np.abs(_spearman(means)) - 1e-12  # (resamples, predictors)
    ahead = np.abs(resampled[:, :1]) - np.abs(resampled)  # (resamples, predictors)
    (lower, upper), (ahead_lower, ahead_upper) = (
        np.nanquantile(samples, [_TAIL, 1 - _TAIL], axis=0, method="nearest") for samples in (resampled, ahead)
    )
    return pandas.DataFrame(
        {
            "predictor": [*predictors],
            "correlation": correlations,
            "lower": lower,
            "upper": upper,
            "least": np.nanmin(left_out, axis=0),
            "most": np.nanmax(left_out, axis=0),
            "p": (1 + as_far.sum(axis=0)) / (1 + resamples),
            "difference": np.abs(correlations[0]) - np.abs(correlations),
            "difference_lower": ahead_lower,
            "difference_upper": ahead_upper,
        }
    )


def _spearman(values: np.ndarray) -> np.ndarray:
    """Return rank correlations (predictors,) of the first column with each other one of (runs, 1 + predictors).

    NaN where a column is constant, as in a resample it may be.
    """
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=0)  # (runs, 1 + predictors), ties share their mean
    ranks = ranks - ranks.mean(axis=0)
    lengths = np.linalg.norm(ranks, axis=0)  # (1 + predictors,)
    products, norms = ranks[:, 0] @ ranks[:, 1:], lengths[0] * lengths[1:]  # (predictors,)
    return np.divide(products, norms, out=np.full_like(products, np.nan), where=norms > 0)
