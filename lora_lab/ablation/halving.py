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
from typing import Any

from lora_lab.ablation.grid import Trial
from lora_lab.ablation.stats import t_bounds
from lora_lab.system.schema import NotNegative, Share, check_fields

# The outcome of a trial that waits at a rung, and the folder of its checkpoint in the sweep's.
PAUSED = "paused"
_KEPT = 0.25  # the share of the rates left that always goes on from a rung, the best ones; at least one
Curves = Mapping[float, Mapping[int, Mapping[int, float]]]  # rate -> seed -> step -> validation loss


@dataclass(frozen=True, kw_only=True)
class Halving:
    """When the rates of a group are compared, and which of them are stopped.

    Args:
        rungs: where rates are compared, as shares of a trial's steps; each is at the first evaluation from there on. A
            rung needs an earlier evaluation too, between the end of the warm-up and half its step.
        slack: a rate is never stopped for a difference up to this, in the task's unit of loss.
        best_so_far: compare the lowest validation losses so far, where training is to be stopped early at its best
            step (:mod:`lora_lab.ablation.overfitting`), and not those at the rung.

    Raises:
        ValueError: a number is out of range.
    """

    rungs: Sequence[Share] = (0.2, 0.4, 0.6, 0.8)
    slack: NotNegative = 0.0
    best_so_far: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rungs", tuple(sorted(self.rungs)))
        check_fields(self)

    def check(self, trials: Iterable[Trial]) -> None:
        """Raise ValueError if the rates of some group are not evaluated at any rung."""
        for first, *others in _groups(trials):
            if any(trial.lr != first.lr for trial in others) and not self.rungs_at(first):
                raise ValueError(
                    f"eval_every is {first.eval_every} for {first.steps} steps, {first.warmup} of them warm-up, so "
                    "there is no rung at which learning rates can be compared; use a smaller eval_every, a shorter "
                    "warm-up, more steps or no halving."
                )

    def rungs_at(self, trial: Trial) -> list[tuple[int, int]]:
        """Return the steps of a trial's rungs, each with the evaluation from which the trend is followed."""
        rungs = {}
        evaluated = [step for step in range(1, trial.steps) if trial.evaluates(step)]
        for share in self.rungs:
            step = next((each for each in evaluated if each >= share * trial.steps), trial.steps)
            earlier = [each for each in evaluated if max(1, trial.warmup_steps) <= each <= step / 2]
            if step < trial.steps and earlier:
                rungs[step] = earlier[-1]
        return list(rungs.items())

    def decide(
        self, curves: Curves, trial: Trial, failed: Collection[float] = ()
    ) -> tuple[dict[float, str], int | None]:
        """Decide which rates are stopped: the same answer for the same curves, however far they go beyond the rungs.

        Args:
            curves: as far as they are known.
            trial: any of the group, which differ in learning rate and seed alone.
            failed: rates with a seed that failed.

        Returns:
            The rates that are stopped, each with the reason; and the step to which the others must train before the
            next decision, None to the end.
        """
        stopped = dict.fromkeys(failed, "another seed failed at this learning rate, so it cannot be chosen")
        left = {lr: by_seed for lr, by_seed in sorted(curves.items()) if lr not in failed}
        # Every rate has failed: no choice can be made, so the other seeds go on and show what they can.
        if not left:
            return {}, None
        for step, earlier in self.rungs_at(trial):
            if len(left) < 2:
                break
            if any(step not in curve for by_seed in left.values() for curve in by_seed.values()):
                return stopped, step
            stopped |= self._rule_out(left, step, earlier, trial)
            left = {lr: by_seed for lr, by_seed in left.items() if lr not in stopped}
        return stopped, None

    def _rule_out(self, curves: Curves, step: int, earlier: int, trial: Trial) -> dict[float, str]:
        """Return the rates to stop at a rung, with the reasons."""
        seeds = sorted(set.intersection(*map(set, curves.values())))
        if not seeds:
            return {}
        means = {lr: statistics.fmean(self._loss(of[seed], step) for seed in seeds) for lr, of in curves.items()}
        best, *others = sorted(means, key=lambda lr: (means[lr], lr))
        stopped = {}
        for lr in others[math.ceil(_KEPT * len(means)) - 1 :]:
            if trial.schedule != "constant" and lr > best:
                continue
            pairs = [(curves[lr][seed], curves[best][seed]) for seed in seeds]
            mean, lower, _ = t_bounds([self._loss(curve, step) - self._loss(of_best, step) for curve, of_best in pairs])
            at_end = statistics.fmean(self._extrapolate(*pair, step, earlier, trial.steps) for pair in pairs)
            if min(mean if math.isnan(lower) else lower, at_end) <= self.slack:
                continue
            stopped[lr] = (
                f"validation loss {means[lr]:.4g} after {step} of {trial.steps} steps, {mean:.2g} above learning rate "
                f"{best:g}, and by the trend {at_end:.2g} after the last step"
            )
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
        # The best rate may have had its best already, so the curve alone is followed.
        if self.best_so_far:
            fall = (curve[earlier] - curve[step]) * log_steps
            return min(now, curve[step] - fall - self._loss(best, step))
        return now + (now - (curve[earlier] - best[earlier])) * log_steps


def next_round(
    halving: Halving, trials: Iterable[Trial], results: Mapping[str, Any]
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
    due = {}
    stopped = {}
    for group in _groups(trials):
        curves, outcomes = {}, {}
        for trial in group:
            result = results.get(trial.key, {})
            outcomes[trial] = result.get("outcome")
            history = result.get("history") or {"rows": []}
            evaluated = [row for row in history["rows"] if row["validation_loss"] is not None]
            curves.setdefault(trial.lr, {})[trial.seed] = {row["step"]: row["validation_loss"] for row in evaluated}
        failed = {trial.lr for trial in group if outcomes[trial] == "failed"}
        ruled_out, until = halving.decide(curves, group[0], failed)
        for trial in group:
            if outcomes[trial] in ("done", "failed"):
                continue
            if trial.lr in ruled_out:
                stopped[trial] = ruled_out[trial.lr]
            elif until is None or until not in curves[trial.lr][trial.seed]:
                due.setdefault(until, []).append(trial)
    return due, stopped


def _groups(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Return trials that differ in learning rate and seed alone, together."""
    groups = {}
    for trial in trials:
        groups.setdefault(replace(trial, lr=1.0, seed=0), []).append(trial)
    return [*groups.values()]
