r"""Which rank is enough, from one run at a high rank? Rules that predict it, and how far they are from a sweep.

    scores = UpdateRanks(RANKS, examples=64)(model, task)    # of a model with adapters of rank 64, after training
    advice = assess(rows)                                    # of the record "rank_advice"
    print(advice.statistic, advice.factor, advice.errors, advice.works)

A rule multiplies one statistic of the run by a factor, and takes the nearest power of two. The statistics are medians
over the layers of what :mod:`lora_lab.rank` says of each update's singular values; and the "truncation rank": the
smallest rank to which all updates can be cut (the nearest matrix of that rank; Eckart and Young 1936, Psychometrika 1)
so that the validation loss rises by no more than the margin.

Both are chosen on tasks with a planted update, and judged on the others: the statistic and the factor that are best
on the tasks on which they are judged would always look good. What has to be beaten is a constant, which does not look
at the run at all. A sweep leaves a range of ranks: above those that it shows to be too small, up to the smallest that
it shows to be enough. Errors are in doublings outside that range: log2(predicted rank / nearest rank of the range).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lora_lab.ablation.compare import compare_losses
from lora_lab.ablation.results import SCORE
from lora_lab.adapters.edit import resize
from lora_lab.analysis.spectra import updates
from lora_lab.rank import effective_rank, energy_rank, stable_rank
from lora_lab.task import Task
from lora_lab.train import evaluate

if TYPE_CHECKING:
    from pandas import DataFrame, Series

SPECTRAL = {f"energy_rank_{share}": partial(energy_rank, share=share / 100) for share in (50, 80, 90, 95, 99)}
SPECTRAL |= {"effective_rank": effective_rank, "stable_rank": stable_rank}
TRUNCATION = "truncation_rank"
GUESS = 8  # the constant to beat
_TRUNCATED, _BATCH = "truncated", 4


@dataclass(frozen=True)
class UpdateRanks:
    """A judge for :func:`lora_lab.ablation.ablate`: what a run with LoRA says about the rank that is enough.

    Its scores are the medians over layers of the statistics of :data:`SPECTRAL`; and "truncated", a text such as
    '{"1": 2.41, "8": 2.31}': the validation losses with every update cut to each rank. The judged model is cut too.

    Args:
        ranks: to cut to.
        examples: of the validation part, how many, from its first.
    """

    ranks: Sequence[int]
    examples: int

    def __call__(self, model: nn.Module, task: Task) -> dict[str, float | str]:
        spectra = [update.svd.S for update in updates(None, model, progress=False).values()]
        scores = {name: statistics.median(float(statistic(S)) for S in spectra) for name, statistic in SPECTRAL.items()}
        losses = {}
        for rank in sorted(self.ranks, reverse=True):
            resize(model, rank)
            losses[rank] = round(evaluate(model, task, "validation", _BATCH, self.examples), 6)
        return scores | {_TRUNCATED: json.dumps(losses)}


def truncation_rank(losses: Mapping[int, float], margin: float) -> int:
    """Return the smallest rank from which on no truncated loss is more than the margin above that of the largest rank.

    Args:
        losses: rank -> loss with every update cut to that rank.
        margin: the difference that does not matter, in the task's unit of loss.
    """
    too_small = [rank for rank in losses if losses[rank] - losses[max(losses)] > margin]
    return min(rank for rank in losses if rank > max(too_small, default=0))


def ranks_left(frame: DataFrame, margin: float) -> tuple[int, int] | None:
    """Return the ranks between which the smallest that is enough may lie, as far as a sweep tells.

    A rank is too small if the lower bound of its loss less that of the largest rank
    (:func:`lora_lab.ablation.compare.compare_losses`) is above the margin, and enough if the upper bound is below it.

    Args:
        frame: what :func:`lora_lab.ablation.compare.compare_tuned` yields for setups that differ in rank.
        margin: the difference that does not matter, in the task's unit of loss.

    Returns:
        The rank after the largest that is too small, and the smallest that is enough (the largest of all, if no other
        is); None if the largest rank's rate is at the edge of its grid.

    Raises:
        ValueError: the largest rank has no results for all seeds.
    """
    ranks = frame.drop_duplicates("setup").set_index("setup")["rank"].astype(int)
    table = compare_losses(frame, str(ranks.idxmax()), margin=margin).set_index("setup").assign(rank=ranks)
    judged = table[table["why"] == ""]  # nothing forbids a verdict
    if judged.empty:
        return None
    enough = min(judged.loc[judged["upper"] < margin, "rank"], default=ranks.max())
    too_small = max(judged.loc[(judged["lower"] > margin) & (judged["rank"] < enough), "rank"], default=0)
    return int(ranks[ranks > too_small].min()), int(enough)


# Runs are a table with a row for each run at a high rank: ``task``, ``rank`` (of the run), ``low`` and ``high``
# (:func:`ranks_left`), and a column for each statistic in :data:`SPECTRAL`, and for :data:`TRUNCATION`.


def choose_rule(runs: DataFrame) -> tuple[str, float]:
    """Return the statistic, and its factor, whose mean absolute error on these runs is the smallest.

    A statistic's factor is the median of (enough rank / statistic), taken over the tasks on a logarithmic scale, so
    that each task counts once. The enough rank is the smallest rank that the sweep shows to be enough.
    """
    factors, errors = {}, {}
    for statistic in (*SPECTRAL, TRUNCATION):
        factors[statistic], errors[statistic] = _fit_factor(runs["high"] / runs[statistic], runs["task"])
    best = min(errors, key=lambda statistic: errors[statistic])
    return best, factors[best]


def _fit_factor(ratios: Series, tasks: Series) -> tuple[float, float]:
    """Return the factor that suits most tasks, and the mean absolute error that it leaves, in doublings.

    Args:
        ratios: enough rank / statistic of each run, (runs,).
        tasks: of the runs, (runs,).
    """
    of_tasks = ratios.transform(np.log2).groupby(tasks).mean()  # (tasks,)
    middle = of_tasks.median()
    return float(2**middle), (of_tasks - middle).abs().mean()


def predict_ranks(runs: DataFrame, statistic: str, factor: float) -> Series:
    """Return the power of two nearest to the factor times the statistic of each run, at most the run's rank."""
    doublings = np.log2(factor * runs[statistic]).round()
    return 2.0 ** doublings.clip(lower=0, upper=np.log2(runs["rank"]).round())


def measure_errors(runs: DataFrame, predicted: Series) -> Series:
    """Return task -> mean over its runs of log2(predicted / nearest of the ranks left), in doublings."""
    nearest = predicted.clip(lower=runs["low"], upper=runs["high"])
    return (predicted / nearest).transform(np.log2).groupby(runs["task"], sort=False).mean()


@dataclass(frozen=True)
class Advice:
    """A rule that was chosen on the planted tasks, and how far it is from the sweeps on the others.

    Args:
        statistic, factor: the rule.
        errors: task -> ``error`` (in doublings, the mean over its runs) and ``constant_error`` (of always
            :data:`GUESS`), of the tasks that a sweep decides and that took no part in the choice.
        undecided: the tasks on which the largest rank has no result inside its grid of rates, which do not count.
    """

    statistic: str
    factor: float
    errors: DataFrame
    undecided: tuple[str, ...]

    @property
    def works(self) -> bool | None:
        """Whether the rule is within a doubling on every judged task, and on average nearer than the constant.

        None with fewer than three judged tasks, or if these do not distinguish it from the constant.
        """
        errors, constant = self.errors["error"].abs(), self.errors["constant_error"].abs()
        if len(errors) < 3 or (errors.max() <= 1 and errors.mean() == constant.mean()):
            return None
        return bool(errors.max() <= 1 and errors.mean() < constant.mean())


def assess(rows: Iterable[Mapping[str, Any]]) -> Advice:
    """Choose a rule on the planted tasks, and judge it on the others.

    Args:
        rows: of the record "rank_advice".

    Raises:
        ValueError: the sweeps decide no planted task.
    """
    import pandas

    frame, found, undecided = pandas.DataFrame([*rows]), [], []
    for task, of_task in frame.groupby("data", sort=False):
        at_high_rank = of_task["stage"] == "high rank"
        margin = float(of_task.loc[at_high_rank, "margin"].max())
        left = ranks_left(of_task[~at_high_rank], margin) if at_high_rank.any() else None
        if left is None:
            undecided.append(str(task))
            continue
        for row in of_task[at_high_rank & (of_task["outcome"] == "done")].to_dict("records"):
            losses = {int(rank): loss for rank, loss in json.loads(row[SCORE + _TRUNCATED]).items()}
            values = {name: row[SCORE + name] for name in SPECTRAL} | {TRUNCATION: truncation_rank(losses, margin)}
            found.append({"task": str(task), "rank": row["rank"], "low": left[0], "high": left[1], **values})
    runs = pandas.DataFrame(found, columns=["task", "rank", "low", "high", *SPECTRAL, TRUNCATION])
    planted = runs["task"].str.startswith("planted")
    if not planted.any():
        raise ValueError("The sweeps decide no planted task, so no rule can be chosen; run more seeds of those.")
    rule, judged = choose_rule(runs[planted]), runs[~planted]
    constant = pandas.Series(GUESS, judged.index)
    errors = {
        "error": measure_errors(judged, predict_ranks(judged, *rule)),
        "constant_error": measure_errors(judged, constant),
    }
    return Advice(*rule, pandas.DataFrame(errors), tuple(undecided))
