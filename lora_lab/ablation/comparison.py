"""Setups compared, each at its own best learning rate, on seeds and examples that took no part in choosing it.

    study = Study(setups, lrs, choosing=range(2), judging=range(2, 5), chosen_on=64, judged_on={"test": 256})
    frame = pandas.concat(compare_tuned(model, task, study, "runs/study"))
    print(differences(frame, "full", margin=0.01))

A method that is tried at another's rate is not judged but handicapped, and one that is judged where it was chosen is
flattered. A setup whose best rate is at the edge of its grid, even after the grid was widened, gets no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lora_lab.ablation.blocks import BlockLosses, block_losses_of
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.learning_rate import choose_rate, labelled, last_rows, tune
from lora_lab.ablation.run import ablate
from lora_lab.ablation.stats import RESAMPLES, outer_interval
from lora_lab.costs.fake import Factory
from lora_lab.task import Task

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Study:
    """What is compared, and how it is judged.

    Args:
        setups: how each trains, by name; its own rate and seed do not count.
        lrs: the rates with which each setup begins. One with a single rate is judged at it, as others chose it.
        choosing: the seeds that choose each setup's rate.
        judging: other seeds, which train at the rate that was chosen; none, if the rates are all that is asked for.
        chosen_on: how many validation examples choose, from the first.
        judged_on: of each part, how many examples judge.
        block: neighbouring examples that are drawn together (:mod:`lora_lab.ablation.blocks`).
        widen, beyond: how many rates may be added to a grid, and shall lie on either side of its best.
        answered: whether the answers to the prompts of the test part judge, too (as for
            :class:`lora_lab.ablation.blocks.BlockLosses`).

    Raises:
        ValueError: a setup has no rates or a rate no setup, or a seed both chooses and judges.
    """

    setups: Mapping[str, Trial]
    lrs: Mapping[str, Sequence[float]]
    choosing: Sequence[int]
    judging: Sequence[int]
    chosen_on: int
    judged_on: Mapping[str, int]
    block: int = 4
    widen: int = 4
    beyond: int = 1
    answered: bool = False

    def __post_init__(self) -> None:
        if unequal := self.setups.keys() ^ self.lrs.keys():
            raise ValueError(f"setups and lrs must name the same, but {sorted(unequal)} are only in one of them.")
        if both := sorted(set(self.choosing) & set(self.judging)):
            raise ValueError(f"The seeds {both} both choose and judge; judge with others.")

    @property
    def trials(self) -> list[Trial]:
        """The trials that run in any case: those of the first grids, and the judging trials.

        The rates of the judging trials are not known in advance, so the first rate of each grid stands in for them.
        """
        grids = {setup: lrs for setup, lrs in self.lrs.items() if len(lrs) > 1}
        chosen = [(setup, lr, seed) for setup, lrs in grids.items() for lr in lrs for seed in self.choosing]
        judged = [(setup, lrs[0], seed) for setup, lrs in self.lrs.items() for seed in self.judging]
        return [replace(self.setups[setup], lr=lr, seed=seed) for setup, lr, seed in (*chosen, *judged)]


def compare_tuned(
    model_factory: nn.Module | Factory,
    task: Task | Callable[[], Task],
    study: Study,
    folder: str | Path,
    **options: Any,
) -> Iterator[pandas.DataFrame]:
    """Choose each setup's rate, then train all at their rates on the judging seeds.

    Args:
        model_factory, task, **options: as for :func:`lora_lab.ablation.ablate`.
        study: what is compared.
        folder: for results, from which a study that was stopped goes on. Trials that are judged on other examples are
            in other folders inside.

    Yields:
        Tables as ablate returns them, with the columns ``setup``, ``stage`` ("choosing", then "judging") and ``edge``
        ("smallest" or "largest" where the chosen rate is that of all tried, else "").
    """
    lrs: dict[str, float | None] = {setup: lrs[0] for setup, lrs in study.lrs.items() if len(lrs) == 1}
    edges = dict.fromkeys(lrs, "")
    if tunable := {setup: template for setup, template in study.setups.items() if setup not in lrs}:
        judge = BlockLosses({"validation": study.chosen_on}, study.block)
        tuned = tune(
            model_factory,
            task,
            tunable,
            study.lrs,
            study.choosing,
            Path(folder) / f"choosing-{study.chosen_on}-{study.block}",
            widen=study.widen,
            beyond=study.beyond,
            judge=judge,
            **options,
        )
        choices = {str(setup): choose_rate(last_rows(rows), study.choosing) for setup, rows in tuned.groupby("setup")}
        lrs |= {setup: choice.lr for setup, choice in choices.items()}
        edges |= {setup: choice.edge for setup, choice in choices.items()}
        yield tuned.assign(stage="choosing", edge=tuned["setup"].map(edges))
    trials = {
        setup: [replace(template, lr=lrs[setup], seed=seed) for seed in study.judging]
        for setup, template in study.setups.items()
        if lrs[setup] is not None
    }
    if any(trials.values()):
        judge = BlockLosses(study.judged_on, study.block, study.answered)
        every = [trial for of_setup in trials.values() for trial in of_setup]
        parts = "-".join(f"{part}-{examples}" for part, examples in study.judged_on.items())
        place = Path(folder) / f"judging-{parts}-{study.block}{'-answered' * study.answered}"
        table = ablate(model_factory, task, every, place, judge=judge, **options)
        judged = labelled(table, trials)
        yield judged.assign(stage="judging", edge=judged["setup"].map(edges))


def differences(
    frame: pandas.DataFrame,
    reference: str,
    part: str = "test",
    margin: float = 0.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pandas.DataFrame:
    """Each setup's loss minus the reference's, after the last step of the judging trials.

    The interval is that of :func:`lora_lab.ablation.stats.outer_interval`. It does not include the uncertainty in the
    choice of the rates.

    Args:
        frame: what :func:`compare_tuned` yields, together.
        reference: the setup that the others are compared with.
        part: of the task; or "accuracy", where answers judged: then "lower" is worse.
        margin: the difference that does not matter, in the task's unit of loss.
        resamples, seed: of the bootstrap over seeds and blocks of examples.

    Returns:
        Columns ``setup``, ``lr``, ``loss`` (mean over seeds and examples), ``difference``, ``lower`` and ``upper`` (the
        two-sided 95 % interval; NaN for one seed), ``seeds`` and ``verdict``: "lower" or "higher" if the interval is
        beyond the margin, "equal" if it is within, "open" if neither or with one seed; "edge" if nothing is known
        beyond the rate of the setup or of the reference; "failed" if a seed has no result or no rate could be chosen.
        Of the reference itself: "reference".

    Raises:
        ValueError: the reference has no results for all seeds.
    """
    import pandas

    rows = last_rows(frame[frame["stage"] == "judging"])
    seeds = sorted(rows["seed"].unique())
    losses, edges = {}, {}
    lrs = dict.fromkeys(frame[frame["stage"].isin(["choosing", "judging"])]["setup"].unique(), math.nan)
    for setup, of_setup in rows.groupby("setup", sort=False):
        lrs[setup], edges[setup] = of_setup["lr"].iloc[0], of_setup["edge"].iloc[0]
        done = of_setup[of_setup["outcome"] == "done"].sort_values("seed")
        if done["seed"].tolist() == seeds:
            losses[setup] = np.array([block_losses_of(row, part) for row in done.to_dict("records")])
    if reference not in losses:
        raise ValueError(f"{reference!r} has no results for all seeds to compare with; there are {[*losses]}.")
    table = []
    for setup, lr in lrs.items():
        row = {"setup": setup, "lr": lr, "seeds": len(seeds), "verdict": "failed"}
        if setup in losses:
            row["loss"] = losses[setup].mean()
            paired = losses[setup] - losses[reference]
            lower, upper = outer_interval(paired, resamples, seed)
            row |= {"difference": paired.mean(), "lower": lower, "upper": upper}
            row["verdict"] = _verdict(lower, upper, margin)
            if edges[setup] or edges[reference]:
                row["verdict"] = "edge"
            if setup == reference:
                row["verdict"] = "reference"
        table.append(row)
    return pandas.DataFrame(table)[["setup", "lr", "loss", "difference", "lower", "upper", "seeds", "verdict"]]


def _verdict(lower: float, upper: float, margin: float) -> str:
    if upper < -margin:
        return "lower"
    if lower > margin:
        return "higher"
    return "equal" if -margin <= lower and upper <= margin else "open"
