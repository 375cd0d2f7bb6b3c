"""What predicts a result of many runs? Rank correlations, with intervals that know which runs belong together.

    runs = summarise_trials(frame)
    rank_correlations(runs, "forgotten_at_last", ["score_divergence", "score_size", "lr"])

Runs of one setup differ by their seeds alone, so they count as one observation: whole setups are drawn with
replacement, left out, and permuted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_lab.ablation.stats import RESAMPLES, interval

if TYPE_CHECKING:
    import pandas


def rank_correlations(
    runs: pandas.DataFrame,
    target: str,
    predictors: Sequence[str],
    group: Sequence[str] = ("setup", "lr"),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pandas.DataFrame:
    """How well each predictor orders the runs as the target does: Spearman's correlation.

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
    if len(setups) < 4:
        raise ValueError(f"There are runs of {len(setups)} setups, but a correlation over setups needs at least four.")
    whole = np.concatenate(setups)  # (runs, 1 + predictors)
    if constant := [name for name, values in zip(columns, whole.T, strict=True) if np.ptp(values) == 0]:
        raise ValueError(f"{constant[0]!r} is the same in all runs, so it correlates with nothing; leave it out.")
    random, count = np.random.default_rng(seed), len(setups)
    correlations = _spearman(whole)  # (predictors,)
    resampled = np.array(
        [_spearman(np.concatenate([setups[i] for i in random.integers(count, size=count)])) for _ in range(resamples)]
    )  # (resamples, predictors)
    left_out = np.array([_spearman(np.concatenate(setups[:i] + setups[i + 1 :])) for i in range(count)])
    means = np.array([values.mean(axis=0) for values in setups])  # (setups, 1 + predictors)
    of_means = np.abs(_spearman(means))  # (predictors,)
    permuted = np.array(
        [_spearman(np.column_stack([random.permutation(means[:, 0]), means[:, 1:]])) for _ in range(resamples)]
    )  # (resamples, predictors)
    ahead = np.abs(resampled[:, :1]) - np.abs(resampled)  # (resamples, predictors)
    rows = []
    for i, predictor in enumerate(predictors):
        lower, upper = interval(resampled[np.isfinite(resampled[:, i]), i])
        ahead_lower, ahead_upper = interval(ahead[np.isfinite(ahead[:, i]), i])
        rows.append(
            {
                "predictor": predictor,
                "correlation": correlations[i],
                "lower": lower,
                "upper": upper,
                "least": np.nanmin(left_out[:, i]),
                "most": np.nanmax(left_out[:, i]),
                "p": (1 + np.sum(np.abs(permuted[:, i]) >= of_means[i] - 1e-12)) / (1 + resamples),
                "difference": abs(correlations[0]) - abs(correlations[i]),
                "difference_lower": ahead_lower,
                "difference_upper": ahead_upper,
            }
        )
    return pandas.DataFrame(rows)


def _spearman(values: np.ndarray) -> np.ndarray:
    """Rank correlations (predictors,) of the first column with each other one of (runs, 1 + predictors).

    NaN where a column is constant, as in a resample it may be.
    """
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=0)  # (runs, 1 + predictors), ties share their mean
    ranks = ranks - ranks.mean(axis=0)
    lengths = np.linalg.norm(ranks, axis=0)  # (1 + predictors,)
    products = ranks[:, 0] @ ranks[:, 1:]  # (predictors,)
    norms = lengths[0] * lengths[1:]
    return np.divide(products, norms, out=np.full_like(products, np.nan), where=norms > 0)
