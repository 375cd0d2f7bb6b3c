"""Stop trials that validation rules out: the learning rates of a group are compared while they train.

    frame = ablate(model, task, grid, "runs/ranks", halving=Halving())

Trials that differ in learning rate and seed alone form a group, such as a rank. All rates of a group train to a rung,
the ones that are not expected to become the best any more are stopped, and the others go on to the next rung. This is
successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943, section 3; Li et al. 2018, Hyperband, JMLR 18,
section 3) with three conditions more. Rates are compared by their mean validation loss over the seeds, and one that
trails the best is stopped only if

1. the difference is beyond the noise of the seeds: the one-sided 95 % lower bound of the paired differences d_s is
   above the slack, and
2. it is not catching up. A high rate falls fast and may end worse, so the lead at a rung is not enough. From
   the step h at half the rung's step n, the difference is followed on a straight line in the logarithm of the step to
   the last step N, and its mean must be above the slack there too:

       d_s(N) = d_s(n) + (d_s(n) - d_s(h)) * log(N / n) / log(n / h)

   h is not within the warm-up, where no rate has come to its peak yet; and

3. it is lower than the best rate, unless the schedule is constant. Under a decaying schedule the loss of a high rate
   falls further in the last steps, which its curve up to there does not show.

All the same a rate may be stopped that would have become the best, most often one that is nearly as good. A ``slack``
of the margin of the verdict makes it rarer and saves less; `benchmarks/halving.py` measures both.

Every trial keeps the learning-rate schedule of its full number of steps, and trials are compared at equal steps. Test
losses take no part. A rate with a seed that failed cannot be chosen, so its other seeds are stopped too, unless every
rate has failed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from lora_lab.ablation.grid import Trial
from lora_lab.ablation.results import SCORE, STOPPED
from lora_lab.ablation.stats import CONFIDENCE, t_bounds
from lora_lab.system.schema import NotNegative, Size, check_fields

if TYPE_CHECKING:
    import pandas

PAUSED = "paused"  # the outcome of a trial that waits at a rung, and the folder of its checkpoint in the sweep's
Curves = Mapping[float, Mapping[int, Mapping[int, float]]]  # rate -> seed -> step -> validation loss


@dataclass(frozen=True)
class GroupSteps:
    """What the trials of a group have in common.

    Args:
        steps: of a whole trial.
        warmup: steps of warm-up. No rate has come to its peak before its end.
        evaluated: the steps with a validation loss, ascending.
        decays: whether the learning rate falls after the warm-up.
    """

    steps: int
    warmup: int
    evaluated: Sequence[int]
    decays: bool = False

    @classmethod
    def of(cls, trial: Trial) -> GroupSteps:
        """Return those of a trial's group."""
        evaluated = [step for step in range(1, trial.steps + 1) if trial.evaluates(step)]
        return cls(trial.steps, trial.warmup_steps, evaluated, trial.schedule != "constant")


class Decision(NamedTuple):
    """Which rates of a group are stopped, as far as it has trained.

    Args:
        stopped: rate -> the step and the reason, in words. The step is None if another seed failed.
        until: the step to which the other rates must train before the next decision; None is to the end.
    """

    stopped: dict[float, tuple[int | None, str]]
    until: int | None


@dataclass(frozen=True, kw_only=True)
class Halving:
    """When the rates of a group are compared, and which of them are stopped.

    Args:
        rungs: where rates are compared, as shares of a trial's steps; each is at the first evaluation from there on. A
            rung needs an earlier evaluation too, between the end of the warm-up and half its step.
        keep: the share of the rates left that always goes on from a rung, the best ones; at least one.
        slack: a rate is never stopped for a difference up to this, in the task's unit of loss.
        choose: how many of a group's seeds choose the rate, the lowest ones; default: all. The others train only at
            the rates that are left after the last rung. One seed is cheap, but shows no noise, so that near ties are
            decided by chance: give a ``slack`` then, such as the margin of the verdict.
        best_so_far: compare the lowest validation losses so far, where training is to be stopped early at its best
            step (:mod:`lora_lab.ablation.overfitting`), and not those at the rung.
        cautious: whether noise, trend and schedule count. Without, all rates but the best ``keep`` are stopped at each
            rung, as in the papers.

    Raises:
        ValueError: a number is out of range, or there is no rung.
    """

    rungs: Sequence[float] = (0.2, 0.4, 0.6, 0.8)
    keep: Annotated[float, Field(ge=0, le=1)] = 0.25
    slack: NotNegative = 0.0
    choose: Size | None = None
    best_so_far: bool = False
    cautious: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rungs", tuple(self.rungs))
        check_fields(self)
        if not self.rungs or not all(0 < rung < 1 for rung in self.rungs) or sorted(self.rungs) != [*self.rungs]:
            raise ValueError(f"rungs is {self.rungs!r}, but it must be shares of the steps between 0 and 1, ascending.")

    def check(self, trials: Iterable[Trial]) -> None:
        """Raise ValueError if the rates of some group are not evaluated at any rung."""
        for first, *others in _groups(trials):
            if any(trial.lr != first.lr for trial in others) and not self.rungs_at(GroupSteps.of(first)):
                raise ValueError(
                    f"eval_every is {first.eval_every} for {first.steps} steps, {first.warmup} of them warm-up, so "
                    "there is no rung at which learning rates can be compared; use a smaller eval_every, a shorter "
                    "warm-up, more steps or no halving."
                )

    def choosing(self, seeds: Iterable[int]) -> list[int]:
        """Return those of a group's seeds that choose the rate, ascending."""
        return sorted(set(seeds))[: self.choose]

    def rungs_at(self, plan: GroupSteps) -> list[tuple[int, int | None]]:
        """Return the steps of the rungs, each with the evaluation from which the trend is followed."""
        rungs = {}
        for share in self.rungs:
            step = next((each for each in plan.evaluated if each >= share * plan.steps), plan.steps)
            earlier = [each for each in plan.evaluated if max(1, plan.warmup) <= each <= step / 2]
            if step < plan.steps and (earlier or not self.cautious):
                rungs[step] = earlier[-1] if earlier else None
        return list(rungs.items())

    def decide(self, curves: Curves, plan: GroupSteps, failed: Collection[float] = ()) -> Decision:
        """Decide which rates are stopped: the same answer for the same curves, however far they go beyond the rungs.

        Args:
            curves: of the seeds that choose, as far as they are known.
            plan: of the trials.
            failed: rates with a seed that failed.
        """
        reason = "another seed failed at this learning rate, so it cannot be chosen"
        stopped: dict[float, tuple[int | None, str]] = {lr: (None, reason) for lr in failed}
        left = {lr: by_seed for lr, by_seed in sorted(curves.items()) if lr not in failed}
        if not left:  # every rate has failed: no choice can be made, so the other seeds go on and show what they can
            return Decision({}, None)
        for step, earlier in self.rungs_at(plan):
            if len(left) < 2:
                break
            if any(step not in curve for by_seed in left.values() for curve in by_seed.values()):
                return Decision(stopped, step)
            for lr, reason in self._rule_out(left, step, earlier, plan):
                stopped[lr] = step, reason
                del left[lr]
        return Decision(stopped, None)

    def _rule_out(self, curves: Curves, step: int, earlier: int | None, plan: GroupSteps) -> list[tuple[float, str]]:
        """Return the rates to stop at a rung, with reasons."""
        seeds = sorted(set.intersection(*map(set, curves.values())))
        if not seeds:
            return []
        means = {lr: statistics.fmean(self._loss(of[seed], step) for seed in seeds) for lr, of in curves.items()}
        best, *others = sorted(means, key=lambda lr: (means[lr], lr))
        stopped = []
        for lr in others[max(1, math.ceil(self.keep * len(means))) - 1 :]:
            pairs = [(curves[lr][seed], curves[best][seed]) for seed in seeds]
            now = [self._loss(curve, step) - self._loss(of_best, step) for curve, of_best in pairs]
            mean, lower, _ = t_bounds(now)
            reason = f"validation loss {means[lr]:.4g} after {step} of {plan.steps} steps, "
            reason += f"{mean:.2g} above learning rate {best:g}"
            if self.cautious and earlier is not None:
                at_end = statistics.fmean(self._extrapolate(*pair, step, earlier, plan.steps) for pair in pairs)
                lower = mean if lower is None else lower
                if (plan.decays and lr > best) or min(lower, at_end) <= self.slack:
                    continue
                sure = f", at least {lower:.2g} with {CONFIDENCE:.0%} confidence" if len(seeds) > 1 else ""
                reason += f"{sure}, and by the trend {at_end:.2g} after the last step"
            stopped.append((lr, f"{reason}; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"))
        return stopped

    def _loss(self, curve: Mapping[int, float], step: int) -> float:
        """Return the loss by which a curve is compared at a step."""
        return min(value for each, value in curve.items() if each <= step) if self.best_so_far else curve[step]

    def _extrapolate(
        self, curve: Mapping[int, float], best: Mapping[int, float], step: int, earlier: int, last: int
    ) -> float:
        """Return a seed's difference to the best rate after the last step, by the trend since ``earlier``."""
        log_steps = math.log(last / step) / math.log(step / earlier)
        now = self._loss(curve, step) - self._loss(best, step)
        if self.best_so_far:  # the best rate may have had its best already, so the curve alone is followed
            fall = (curve[earlier] - curve[step]) * log_steps
            return min(now, curve[step] - fall - self._loss(best, step))
        return now + (now - (curve[earlier] - best[earlier])) * log_steps


def next_round(
    halving: Halving, trials: Iterable[Trial], results: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[int | None, list[Trial]], dict[Trial, str]]:
    """Return what a sweep does next: the trials to train, by the step to which (None is the end), and those stopped.

    Args:
        halving: the rule.
        trials: of the sweep.
        results: of the trials that have begun, by key: "outcome" and "history", as in their files.

    Returns:
        The trials to train, and those that are stopped for now with the reasons. (A rate that fails after its rivals
        were stopped lets them go on.)
    """
    due: dict[int | None, list[Trial]] = {}
    stopped = {}
    for group in _groups(trials):
        choosing = halving.choosing(trial.seed for trial in group)
        curves: dict[float, dict[int, dict[int, float]]] = {}
        for trial in group:
            if trial.seed in choosing:
                history = results.get(trial.key, {}).get("history") or {"rows": []}
                losses = {row["step"]: row["validation_loss"] for row in history["rows"]}
                known = {step: loss for step, loss in losses.items() if loss is not None}
                curves.setdefault(trial.lr, {})[trial.seed] = known
        outcomes = {trial: results.get(trial.key, {}).get("outcome") for trial in group}
        failed = {trial.lr for trial in group if outcomes[trial] == "failed"}
        ruled_out, until = halving.decide(curves, GroupSteps.of(group[0]), failed)
        for trial in group:
            if outcomes[trial] in ("done", "failed"):
                continue
            if trial.lr in ruled_out:
                stopped[trial] = ruled_out[trial.lr][1]
            elif until is None or (trial.seed in choosing and until not in curves[trial.lr][trial.seed]):
                due.setdefault(until, []).append(trial)
    return due, stopped


def _groups(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Return trials that differ in learning rate and seed alone, together."""
    groups: dict[Trial, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(replace(trial, lr=1.0, seed=0), []).append(trial)
    return [*groups.values()]


def replay(frame: pandas.DataFrame, halving: Halving, group: Sequence[str] = ("method", "rank")) -> pandas.DataFrame:
    """Return the frame that :func:`lora_lab.ablation.ablate` would have returned with ``halving``, from one without.

    Args:
        frame: what ablate returned, each trial evaluated several times. Without a column ``warmup``, a tenth of the
            steps is the warm-up; without a column ``schedule``, it is constant.
        group: the columns that the rates and seeds of a group have in common.

    Raises:
        ValueError: no trial was evaluated where a rung could be.
    """
    import pandas

    parts, rungs = [], 0
    unknown = [name for name in map(str, frame) if name == "test_loss" or name.startswith(SCORE)]
    for _, of_group in frame.groupby([*group], sort=False, dropna=False):
        first, seeds = of_group.iloc[0], halving.choosing(of_group["seed"])
        done = of_group[of_group["outcome"] == "done"]
        curves: dict[Any, dict[Any, dict[int, float]]] = {lr: {} for lr in done["lr"]}  # pandas knows no types of keys
        for (lr, seed), rows in done[done["seed"].isin(seeds)].groupby(["lr", "seed"]):
            curves[lr][seed] = dict(zip(rows["step"].astype(int), rows["validation_loss"], strict=True))
        steps_of = [set(curve) for by_seed in curves.values() for curve in by_seed.values()]
        evaluated = sorted(set.intersection(*steps_of)) if steps_of else []
        steps, decays = int(first["steps"]), first.get("schedule", "constant") != "constant"
        plan = GroupSteps(steps, int(first.get("warmup", steps // 10)), evaluated, decays)
        rungs += len(halving.rungs_at(plan))
        failed = set(of_group.loc[of_group["outcome"] == "failed", "lr"])
        for lr, (step, reason) in halving.decide(curves, plan, failed).stopped.items():
            if step is not None:  # when a seed failed is not recorded, so the others count in full
                at_rate = of_group["lr"] == lr
                begun = of_group["step"] <= of_group["seed"].isin(seeds) * step  # the other seeds' settings alone
                lost = {"outcome": STOPPED, "reason": reason, **dict.fromkeys(unknown, math.nan)}
                of_group = pandas.concat([of_group[~at_rate], of_group[at_rate & begun].assign(**lost)])
        parts.append(of_group)
    if not rungs:
        raise ValueError(
            f"These trials were evaluated at the steps {sorted(set(map(int, frame['step'].dropna())))} only, so "
            "nothing can be stopped between; run them with a smaller eval_every."
        )
    return pandas.concat(parts, ignore_index=True)


def share_of_steps(frame: pandas.DataFrame) -> float:
    """Return the steps that trials took, as a share of those that they were to take; failed ones count in full."""
    last = frame.assign(taken=frame["step"].where(frame["outcome"] == STOPPED, frame["steps"]).fillna(0))
    names = ("key",) if "key" in frame else ("n_train", "setup", "method", "rank", "lr", "seed")
    identity = [name for name in names if name in frame]
    last = last.groupby(identity, dropna=False)[["taken", "steps"]].max()
    return float(last["taken"].sum() / last["steps"].sum())
