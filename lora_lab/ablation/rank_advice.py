r"""Which rank is enough, from one run at a high rank? Rules that predict it, and how far they are from a sweep.

    scores = UpdateRanks(RANKS, examples=64)(model, task)    # of a model with adapters of rank 64, after training
    advice = assess(rows)                                    # of the record "rank_advice"
    print(advice.rule, advice.table, advice.works)

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
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_lab.ablation.compare import compare_losses
from lora_lab.ablation.results import SCORE
from lora_lab.adapters.edit import resize
from lora_lab.analysis.spectra import updates
from lora_lab.rank import effective_rank, energy_rank, stable_rank
from lora_lab.task import Task
from lora_lab.train import evaluate

if TYPE_CHECKING:
    import pandas

SPECTRAL = {f"energy_rank_{share}": partial(energy_rank, share=share / 100) for share in (50, 80, 90, 95, 99)}
SPECTRAL |= {"effective_rank": effective_rank, "stable_rank": stable_rank}
TRUNCATION, CONSTANT = "truncation_rank", "constant"
GUESS = 8  # the constant to beat
_TRUNCATED = "truncated"


@dataclass(frozen=True)
class UpdateRanks:
    """A judge for :func:`lora_lab.ablation.ablate`: what a run with LoRA says about the rank that is enough.

    Its scores are the medians over layers of the statistics of :data:`SPECTRAL`; and "truncated", a text such as
    '{"1": 2.41, "8": 2.31}': the validation losses with every update cut to each rank. The judged model is cut too.

    Args:
        ranks: to cut to.
        examples: of the validation part, how many, from its first.
        batch_size: how many are evaluated together.
    """

    ranks: Sequence[int]
    examples: int
    batch_size: int = 4

    def __call__(self, model: nn.Module, task: Task) -> dict[str, float | str]:
        spectra = [update.svd.S for update in updates(None, model, progress=False).values()]
        scores: dict[str, float | str] = {
            name: statistics.median(float(statistic(S)) for S in spectra) for name, statistic in SPECTRAL.items()
        }
        losses = {}
        for rank in sorted(self.ranks, reverse=True):
            resize(model, rank)
            losses[rank] = round(evaluate(model, task, "validation", self.batch_size, self.examples), 6)
        return scores | {_TRUNCATED: json.dumps(losses)}


def truncation_rank(losses: Mapping[int, float], margin: float) -> int:
    """The smallest rank from which on no truncated loss is more than the margin above that of the largest rank.

    Args:
        losses: rank -> loss with every update cut to that rank.
        margin: the difference that does not matter, in the task's unit of loss.
    """
    ranks = sorted(losses, reverse=True)
    too_small = [rank for rank in ranks if losses[rank] - losses[ranks[0]] > margin]
    return min(rank for rank in ranks if rank > max(too_small, default=0))


def ranks_left(frame: pandas.DataFrame, margin: float) -> tuple[int, int] | None:
    """The ranks between which the smallest that is enough may lie, as far as a sweep tells.

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
    judged = table[table["why"] == ""]
    if judged.empty:
        return None
    enough = min(judged.loc[judged["upper"] < margin, "rank"], default=ranks.max())
    too_small = max(judged.loc[(judged["lower"] > margin) & (judged["rank"] < enough), "rank"], default=0)
    return int(ranks[ranks > too_small].min()), int(enough)


@dataclass(frozen=True)
class HighRankRun:
    """One run at a high rank: its statistics, and what the sweep on the same task says of the rank that is enough.

    Args:
        task: its name.
        seed: of the run.
        values: statistic -> value, of all in :data:`SPECTRAL`, :data:`TRUNCATION` and :data:`CONSTANT`.
        largest: the rank of the run.
        left: the ranks between which the smallest that is enough may lie (:func:`ranks_left`).
    """

    task: str
    seed: int
    values: Mapping[str, float]
    largest: int
    left: tuple[int, int]


@dataclass(frozen=True)
class Rule:
    """The rank that is enough, predicted as the power of two nearest to a multiple of one statistic."""

    statistic: str
    factor: float

    def predict(self, values: Mapping[str, float], largest: int) -> int:
        """The rank, at most the largest.

        Args:
            values: statistic -> value.
            largest: the rank of the run.
        """
        doublings = round(math.log2(self.factor * values[self.statistic]))
        return 2 ** min(max(doublings, 0), round(math.log2(largest)))

    def errors(self, runs: Iterable[HighRankRun]) -> dict[str, float]:
        """Task -> mean over its runs of log2(predicted / nearest of the ranks left), in doublings."""

        def error(run: HighRankRun) -> float:
            predicted, (low, high) = self.predict(run.values, run.largest), run.left
            return math.log2(predicted / min(max(predicted, low), high))

        return mean_by_task(runs, error)

    def __str__(self) -> str:
        return f"{self.factor:.3g} times {self.statistic}"


def mean_by_task(runs: Iterable[HighRankRun], number: Callable[[HighRankRun], float]) -> dict[str, float]:
    """Return task -> mean over its runs of a number of each run."""
    by_task: dict[str, list[float]] = {}
    for run in runs:
        by_task.setdefault(run.task, []).append(number(run))
    return {task: statistics.fmean(numbers) for task, numbers in by_task.items()}


def fit_rule(statistic: str, runs: Sequence[HighRankRun]) -> tuple[Rule, float]:
    """The rule with the factor that suits most of the runs, and its mean absolute error in doublings, unrounded.

    The factor is the median of (enough rank / statistic), taken over the tasks on a logarithmic scale. Each task counts
    once. The enough rank is the smallest rank that the sweep shows to be enough.
    """
    doublings = mean_by_task(runs, lambda run: math.log2(run.left[1] / run.values[statistic])).values()
    middle = statistics.median(doublings)
    return Rule(statistic, 2**middle), statistics.fmean(abs(each - middle) for each in doublings)


def choose_rule(runs: Sequence[HighRankRun]) -> Rule:
    """The rule, of all statistics but the constant, whose mean absolute error on these runs is the smallest."""
    fitted = [fit_rule(statistic, runs) for statistic in (*SPECTRAL, TRUNCATION)]
    return min(fitted, key=lambda each: each[1])[0]


@dataclass(frozen=True)
class Assessment:
    """A rule that was chosen on the planted tasks, and how far it is from the sweeps on the others.

    Args:
        rule: that was chosen.
        table: a row for each task that a sweep decides: ``task``, ``planted`` (True if it took part in the choice),
            ``low`` and ``high`` (:func:`ranks_left`), ``predicted`` (of each run), ``error`` (in doublings, the mean
            over the runs) and ``constant_error`` (of always :data:`GUESS`).
        undecided: the tasks on which the largest rank has no result inside its grid of rates, which do not count.
    """

    rule: Rule
    table: pandas.DataFrame
    undecided: tuple[str, ...]

    @property
    def judged(self) -> pandas.DataFrame:
        """The rows of the tasks that took no part in the choice."""
        return self.table[~self.table["planted"]]

    @property
    def works(self) -> bool | None:
        """Whether the rule is within a doubling on every judged task, and on average nearer than the constant.

        None with fewer than three judged tasks, or if these do not distinguish it from the constant.
        """
        errors, constant = self.judged["error"].abs(), self.judged["constant_error"].abs()
        if len(errors) < 3 or (errors.max() <= 1 and errors.mean() == constant.mean()):
            return None
        return bool(errors.max() <= 1 and errors.mean() < constant.mean())


def assess(rows: Iterable[Mapping[str, Any]]) -> Assessment:
    """Choose a rule on the planted tasks, and judge it on the others.

    Args:
        rows: of the record "rank_advice".

    Raises:
        ValueError: the sweeps decide no planted task.
    """
    import pandas

    frame, runs, undecided = pandas.DataFrame([dict(row) for row in rows]), [], []
    for task, of_task in frame.groupby("data", sort=False):
        high = of_task[of_task["stage"] == "high rank"]
        margin = float(high["margin"].max())
        sweep = of_task[of_task["stage"] != "high rank"]
        left = ranks_left(sweep, margin) if len(high) else None
        if left is None:
            undecided.append(str(task))
            continue
        for row in high[high["outcome"] == "done"].to_dict("records"):
            values = values_of({name: row[SCORE + name] for name in (*SPECTRAL, _TRUNCATED)}, margin)
            runs.append(HighRankRun(str(task), int(row["seed"]), values, int(row["rank"]), left))
    planted = [run for run in runs if is_planted(run.task)]
    if not planted:
        raise ValueError("The sweeps decide no planted task, so no rule can be chosen; run more seeds of those.")
    rule = choose_rule(planted)
    errors, constant = rule.errors(runs), Rule(CONSTANT, GUESS).errors(runs)
    table = []
    for task, error in errors.items():
        of_task = [run for run in runs if run.task == task]
        row = {"task": task, "planted": is_planted(task)} | dict(zip(("low", "high"), of_task[0].left, strict=True))
        row["predicted"] = [rule.predict(run.values, run.largest) for run in of_task]
        table.append(row | {"error": error, "constant_error": constant[task]})
    return Assessment(rule, pandas.DataFrame(table), tuple(undecided))


def values_of(scores: Mapping[str, Any], margin: float) -> dict[str, float]:
    """The values of all statistics from the scores of :class:`UpdateRanks`.

    Args:
        scores: by name.
        margin: the difference that does not matter, in the task's unit of loss.
    """
    losses = {int(rank): loss for rank, loss in json.loads(scores[_TRUNCATED]).items()}
    spectral = {name: float(scores[name]) for name in SPECTRAL}
    return {**spectral, TRUNCATION: float(truncation_rank(losses, margin)), CONSTANT: 1.0}


def is_planted(task: str) -> bool:
    """Whether the rule is chosen on this task, by its name."""
    return task.startswith("planted")
