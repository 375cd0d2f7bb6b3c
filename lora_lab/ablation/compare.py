r"""Choose each setup's learning rate, compare setups in pairs at those rates, and say what the bounds allow to say.

    frame = tune(model, task, {"r=8": Trial(LoRA(8, 16), 1e-3)}, {"r=8": rates_around(1e-3)}, range(3), "runs/rates")
    seeds = {"choosing": range(2), "judging": range(2, 5), "chosen_on": 64, "judged_on": {"test": 256}}
    print(compare_losses(pandas.concat(compare_tuned(model, task, setups, lrs, "runs/study", **seeds)), "full"))
    print(smallest_sufficient_rank(load("runs/ranks"), margin=0.01))

The same rules hold for methods and for ranks:

1. A rate is chosen by the mean VALIDATION loss over the seeds. It counts only if it has a result for every seed: one
   that diverged for some seeds would otherwise be judged by those that suit it.
2. A rate at the edge of its grid says only that the best may lie beyond, so the grid is widened, and no verdict rests
   on such a rate.
3. Setups are judged by the TEST loss, which took no part in the choice; and where a study can pay for it, on other
   seeds too. A setup that is tried at another's rate is handicapped, and one that is judged where it was chosen is
   flattered.
4. Trials are paired by seed (the same order of the data), which removes the noise that they share:

       d_s = loss(setup, seed s) - loss(reference, seed s)

5. The mean of d over n seeds has one-sided 95 % bounds from Student's t (Student 1908, Biometrika 6), with
   sd the standard deviation of d:

       mean(d) -+ t(0.95, n - 1) sd / sqrt(n)

   They hold for as few as two seeds if d is roughly normal. A percentile bootstrap does not: over three seeds its
   95 % interval holds the true value in only about three quarters of all cases.
6. The bounds are held against a margin that is named beforehand (:func:`judge`).

Bounds hold for each setup by itself and take the chosen rates as given; and they hold on this task, this model and
this number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
from pydantic import Field

from lora_lab.ablation.grid import Trial
from lora_lab.ablation.results import OUT_OF_MEMORY, OUTCOME, PROVENANCE, SCORE, STOPPED, last_rows
from lora_lab.ablation.run import ModelOrFactory, TaskOrFactory, ablate
from lora_lab.ablation.stats import CONFIDENCE, BlockLosses, block_losses_of, losses_by_seed, outer_bounds, t_bounds
from lora_lab.system.schema import NotNegative, Positive, Size, check
from lora_lab.system.wording import count_noun

if TYPE_CHECKING:
    from pandas import DataFrame

Grids = Mapping[str, Sequence[float]]  # setup -> its rates


# Verdicts


def judge(lower: float, upper: float, margin: float = 0.0) -> Literal["lower", "higher", "equal", "open"]:
    """Return the verdict on a difference, of losses or of times, from its bounds.

    Args:
        lower, upper: of the difference; NaN, where too few seeds give none, leaves it open.
        margin: the difference that does not matter.
    """
    if upper < -margin:
        return "lower"
    if lower > margin:
        return "higher"
    return "equal" if -margin <= lower and upper <= margin else "open"


# The choice of a rate


def rates_around(centre: float, factor: float = 2.0, count: int = 5) -> tuple[float, ...]:
    """Return an ascending grid of rates, each ``factor`` times the one before, with ``centre`` in the middle.

    Raises:
        ValueError: the centre is not positive, the factor not above 1, or the count below 1.
    """
    check(centre, Positive, "centre")
    check(factor, Annotated[float, Field(gt=1)], "factor")
    check(count, Size, "count")
    return tuple(_round_rate(centre * factor ** (i - count // 2)) for i in range(count))


def _round_rate(rate: float) -> float:
    return float(f"{rate:.3g}")


@dataclass(frozen=True)
class Choice:
    """The rate of the lowest mean loss among those that have a result for every seed.

    ``lr`` and ``loss`` are None if there is none. ``note`` lists the rates that do not count, with the reason, and an
    edge of the grid that was stopped early where nothing else lies beyond the choice. ``edge`` is "smallest",
    "largest" or "only" where nothing is known beyond the rate: rates that are missing or ran out of memory say nothing,
    whereas one that diverged or was stopped is worse. ``diverged`` is the rate next to the choice if it diverged and no
    rate that counts lies beyond; the best may lie between the two.
    """

    lr: float | None
    loss: float | None
    note: str = ""
    edge: str = ""
    diverged: float | None = None


def _losses_of_trials(frame: DataFrame, best: bool) -> DataFrame:
    """Return one row for each trial, with the ``loss`` that counts (:func:`choose_rates`); NaN if there is none."""
    if not best:
        rows = last_rows(frame)
        losses = [fmean(block_losses_of(row, "validation")) for row in rows.to_dict("records")]
        return rows.assign(loss=np.where((rows["outcome"] == "done") & rows["test_loss"].notna(), losses, math.nan))
    trial = trial_columns(frame)
    losses = frame.groupby(trial)["validation_loss"].transform("min").where(frame["outcome"] == "done")
    return frame.assign(loss=losses, reason=frame.get("reason", "")).drop_duplicates(trial)


def trial_columns(frame: DataFrame) -> list[str]:
    """Return the columns that identify a trial of a table: ``n_train`` if there is one, ``setup``, ``lr``, ``seed``."""
    return [name for name in ("n_train", "setup", "lr", "seed") if name in frame]


def _choose(trials: DataFrame, seeds: Sequence[int], slack: float = 0.0) -> list[Choice]:
    """Return the best rate of one setup, or with a ``slack`` all that are at most so much worse, ascending.

    Args:
        trials: a row each, as of :func:`_losses_of_trials`.
        seeds: which a rate needs to count.
    """
    means, stopped, diverged, notes = {}, [], [], []
    for lr, rows in trials.groupby("lr"):  # ascending
        losses = rows.set_index("seed")["loss"].reindex([*seeds])
        failures = rows.loc[rows["outcome"] == "failed", "reason"]
        if len(failures) and not failures.str.startswith(OUT_OF_MEMORY).any():
            diverged.append(lr)
        if failures.empty and (rows["outcome"] == STOPPED).any():  # validation has ruled it out already
            stopped.append(lr)
        elif losses.isna().any():
            lacking = ", ".join(map(str, losses.index[losses.isna()]))
            notes.append(f"lr {lr:g} does not count (no result for seed {lacking})")
        else:
            means[lr] = fmean(losses)
    if not means:
        return [Choice(None, None, ", ".join(notes))]
    known, lowest, highest = sorted({*means, *stopped, *diverged}), min(means), max(means)
    best = min(means, key=lambda lr: means[lr])  # of equal means, the smaller rate
    for lr, name, last in ((trials["lr"].min(), "smallest", lowest), (trials["lr"].max(), "largest", highest)):
        if lr in stopped and best == last:
            notes.append(f"lr {lr:g}, the {name} tried, was stopped early")
    choices = []
    for lr in [lr for lr in means if means[lr] <= means[best] + slack] if slack else [best]:
        edge = "only" if len(known) == 1 else {known[0]: "smallest", known[-1]: "largest"}.get(lr, "")
        above = [each for each in diverged if each > lr == highest]
        below = [each for each in diverged if each < lr == lowest]
        beside = [*above, *reversed(below), None][0]
        choices.append(Choice(float(lr), means[lr], ", ".join(notes), edge, beside))
    return choices


def best_rates(frame: DataFrame, slack: float = 0.0) -> DataFrame:
    """Return each setup's best rate, and those that tie with it, by the mean loss over the seeds that its rates share.

    The loss is the lowest of each trial. On a few seeds rates that nearly tie are indistinguishable, and what is
    compared later may differ much between them. So train them all on other seeds (:func:`at_rates`), and see whether a
    verdict holds for each (:func:`lora_lab.ablation.overfitting.compare_over_rates`).

    Args:
        frame: what :func:`lora_lab.ablation.ablate` returns, with a column ``setup``; with a column ``n_train`` each
            size of the training set has its own rates. A rate that was stopped on some seed cannot be the best.
        slack: how much worse than the best a rate may be, in the units of the loss.

    Returns:
        Columns ``n_train`` (if there is one), ``setup``, ``lr`` and ``edge``, as of :class:`Choice`.

    Raises:
        ValueError: the slack is negative, no trial ended well, or the rates of a setup have no seed in common.
    """
    import pandas

    found = _choose_each(frame, True, slack=check(slack, NotNegative, "slack"))
    rows = [
        {**setup, "lr": one.lr, "edge": one.edge} for setup, choices in found for one in choices if one.lr is not None
    ]
    if not rows:
        raise ValueError("There is no trial that ended well, so no rate can be chosen; try lower rates.")
    return pandas.DataFrame(rows)


def _choose_each(
    frame: DataFrame, best: bool, seeds: Sequence[int] | None = None, slack: float = 0.0
) -> Iterator[tuple[dict[str, Any], list[Choice]]]:
    """Yield each setup (at each size), and its choices by the seeds, or by those that its rates share."""
    names = [name for name in trial_columns(frame) if name not in ("lr", "seed")]
    for values, of_setup in _losses_of_trials(frame, best).groupby(names, sort=False):
        counted = seeds
        if counted is None:
            stopped = of_setup.loc[of_setup["outcome"] == STOPPED, "lr"]
            left = of_setup[(of_setup["outcome"] == "done") & ~of_setup["lr"].isin(stopped)]
            of_rates = [*left.groupby("lr")["seed"].agg(set)]
            counted = sorted(set.intersection(*of_rates)) if of_rates else sorted(set(of_setup["seed"]))
            if not counted:
                raise ValueError(f"The rates of {values} have no seed in common; run each of them with one at least.")
        yield dict(zip(names, values, strict=True)), _choose(of_setup, counted, slack)


def choose_rates(frame: DataFrame, seeds: Sequence[int] | None = None, *, best: bool = False) -> dict[Any, Choice]:
    """Return the choice of each setup.

    Args:
        frame: trials of one task, with a column ``setup``.
        seeds: which a rate needs to count; None means those that the rates of its setup share.
        best: the lowest validation loss of a trial counts, for training that is stopped early; not that after the last
            step (by :class:`BlockLosses`, where such a judge was).
    """
    return {setup["setup"]: choices[0] for setup, choices in _choose_each(frame, best, seeds)}


# Grids that are widened until the best rate is inside


def _next_rate(choice: Choice, grid: Sequence[float], beyond: int) -> float | None:
    """Return the rate to try next, if too few lie above or below the best one; None if enough do, or it was tried."""
    if choice.lr is None or len(grid) < 2:
        return None
    below = grid.index(choice.lr)
    above = len(grid) - 1 - below
    if choice.diverged is not None:
        rate = math.sqrt(choice.lr * choice.diverged)
    elif choice.edge == "smallest" or below < beyond:
        rate = grid[0] ** 2 / grid[1]
    elif choice.edge == "largest" or above < beyond:
        rate = grid[-1] ** 2 / grid[-2]
    else:
        return None
    rate = _round_rate(rate)
    return None if rate in grid else rate


def _widen(
    run: Callable[[Grids], tuple[Any, Mapping[str, Choice]]], lrs: Grids, widen: int, beyond: int = 1
) -> tuple[Any, Mapping[str, Choice]]:
    """Run setups at their rates, and at rates beyond while the best of one is at the edge of its grid.

    Args:
        run: rates -> what it found, and each setup's choice; trials that were run before should cost nothing.
        lrs, widen, beyond: as for :func:`tune`.
    """
    grids = {setup: sorted({float(lr) for lr in rates}) for setup, rates in lrs.items()}
    most = {setup: len(grid) + widen for setup, grid in grids.items()}
    while True:
        found, choices = run(grids)
        open_grids = {setup: grid for setup, grid in grids.items() if setup in choices and len(grid) < most[setup]}
        added = {setup: _next_rate(choices[setup], grid, beyond) for setup, grid in open_grids.items()}
        if not any(added.values()):
            return found, choices
        grids |= {setup: sorted([*grids[setup], rate]) for setup, rate in added.items() if rate}


def tune(
    model_factory: ModelOrFactory,
    task: TaskOrFactory,
    setups: Mapping[str, Trial],
    lrs: Grids,
    seeds: Sequence[int],
    folder: str | Path | None = None,
    *,
    widen: int = 4,
    beyond: int = 1,
    **options: Any,
) -> DataFrame:
    """Train each setup at its rates, and at rates beyond as long as the best is at the edge.

    A rate at the edge of its grid says only that the best may lie further out, so no verdict can rest on it. Between
    the best rate and one beyond it that diverged another is added, halfway by factors.

    Args:
        model_factory, task, folder, **options: as for :func:`lora_lab.ablation.ablate`.
        setups: how each trains; its own rate and seed do not count. Setups may be equal: they share their trials.
        lrs: the rates to begin with. A grid goes on by the ratio at its edge; one of a single rate does not.
        seeds: train at each rate.
        widen: how many rates may be added to a grid.
        beyond: how many rates shall lie on either side of the best. With one the best is inside; with two the interval
            of :func:`lora_lab.ablation.stats.best_rate` is mostly bounded too, for which the best of every
            sample must be inside.

    Returns:
        The table of ablate with a column ``setup``, in the order of ``setups``.

    Raises:
        ValueError: as ablate.
    """
    with nullcontext(folder) if folder is not None else TemporaryDirectory() as place:

        def run(grids: Grids) -> tuple[DataFrame, dict[str, Choice]]:
            trials = {
                setup: [replace(template, lr=lr, seed=seed) for lr in grids[setup] for seed in seeds]
                for setup, template in setups.items()
            }
            frame = ablate_setups(model_factory, task, trials, place, **options)
            return frame, choose_rates(frame, seeds)

        frame, _ = _widen(run, lrs, widen, beyond)
    return frame


def ablate_setups(
    model_factory: ModelOrFactory,
    task: TaskOrFactory,
    trials: Mapping[str, Sequence[Trial]],
    folder: str | Path | None = None,
    **options: Any,
) -> DataFrame:
    """Return the table of :func:`ablate` for the trials of several setups, with a column ``setup``, setup after setup.

    Trials that two setups share are there twice.
    """
    import pandas

    table = ablate(model_factory, task, [*chain(*trials.values())], folder, **options)
    identity = dict(table[["task", "model"]].iloc[0])
    keys = {setup: [replace(trial, **identity).key for trial in of_setup] for setup, of_setup in trials.items()}
    parts = [table[table["key"].isin(of_setup)].assign(setup=setup) for setup, of_setup in keys.items()]
    return pandas.concat(parts, ignore_index=True)


def tune_by_seed(
    run: Callable[[int, Grids], DataFrame], lrs: Grids, seeds: Sequence[int], widen: int, best: bool
) -> tuple[list[DataFrame], dict[str, Choice]]:
    """Choose each setup's learning rate on seeds that have a task, or a model, of their own.

    Rates that were stopped on one seed (:class:`lora_lab.ablation.Halving`) are not tried on the next.

    Args:
        run: (seed, rates) -> the table of :func:`lora_lab.ablation.ablate` with a column ``setup``. A trial that was
            run before is asked for again, so it should keep results in a folder.
        lrs: the rates that each setup tries first.
        seeds: choose.
        widen: how many rates may be added to a grid.
        best: as for :func:`choose_rates`.

    Returns:
        The frames of the seeds, and the choice of each setup of which a trial ended well.
    """
    import pandas

    def run_seeds(grids: Grids) -> tuple[list[DataFrame], dict[str, Choice]]:
        frames, left = [], grids
        for seed in seeds:
            frame = run(seed, left)
            frames.append(frame)
            rows = frame[frame["outcome"] == STOPPED]
            stopped = set(zip(rows["setup"], rows["lr"], strict=True))
            left = {setup: [lr for lr in rates if (setup, lr) not in stopped] for setup, rates in left.items()}
        return frames, choose_rates(pandas.concat(frames, ignore_index=True), best=best)

    frames, choices = _widen(run_seeds, lrs, widen)
    return frames, {setup: choice for setup, choice in choices.items() if choice.lr is not None}


def by_size(
    model_factory: ModelOrFactory,
    task_of: Callable[[int, int], TaskOrFactory],
    trial_of: Callable[[str, float, int, int], Trial],
    lrs: Grids,
    sizes: Sequence[int],
    seeds: Sequence[int],
    **options: Any,
) -> Iterator[DataFrame]:
    """Train each setup at each of its rates on each seed, for each size of the training set.

    Args:
        model_factory, **options: as for :func:`lora_lab.ablation.ablate`.
        task_of: (size, seed) -> the task; it should draw its examples by the seed, for few examples differ much.
        trial_of: (setup, lr, seed, size) -> the trial.
        lrs: the rates of each setup.

    Yields:
        A frame with the columns ``setup`` and ``n_train`` for each size and seed, as soon as it is done. Its setups are
        in the order of ``lrs``.
    """
    for size in sizes:
        for seed in seeds:
            trials = {setup: [trial_of(setup, lr, seed, size) for lr in rates] for setup, rates in lrs.items()}
            yield ablate_setups(model_factory, task_of(size, seed), trials, **options).assign(n_train=size)


def at_rates(rates: DataFrame, **options: Any) -> DataFrame:
    """Return the frames of :func:`by_size`, together, with each setup at its own rates at each size.

    So rates that tie are trained on seeds that did not choose them.

    Args:
        rates: columns ``n_train``, ``setup``, ``lr``, such as the :func:`best_rates` of seeds that chose.
        **options: as for :func:`by_size`.
    """
    import pandas

    frames = []
    for size, of_size in rates.groupby("n_train"):
        lrs = {str(setup): rows["lr"].tolist() for setup, rows in of_size.groupby("setup", sort=False)}
        frames += by_size(lrs=lrs, sizes=[int(cast(float, size))], **options)
    return pandas.concat(frames, ignore_index=True)


# Studies: rates chosen on some seeds, setups judged on others


def compare_tuned(
    model_factory: ModelOrFactory,
    task: TaskOrFactory,
    setups: Mapping[str, Trial],
    lrs: Grids,
    folder: str | Path,
    *,
    choosing: Sequence[int],
    judging: Sequence[int],
    chosen_on: int,
    judged_on: Mapping[str, int],
    block: int = 4,
    widen: int = 4,
    beyond: int = 1,
    answered: bool = False,
    **options: Any,
) -> Iterator[DataFrame]:
    """Choose each setup's rate, then train all at their rates on the judging seeds.

    Args:
        model_factory, task, **options: as for :func:`lora_lab.ablation.ablate`.
        setups: how each trains, by name; its own rate and seed do not count.
        lrs: the rates with which each setup begins. One with a single rate is judged at it, as others chose it.
        folder: for results, from which a study that was stopped goes on. Trials that are judged on other examples are
            in other folders inside.
        choosing: the seeds that choose each setup's rate.
        judging: other seeds, which train at the rate that was chosen; none, if the rates are all that is asked for.
        chosen_on: how many validation examples choose, from the first.
        judged_on: of each part, how many examples judge.
        block, answered: as for :class:`lora_lab.ablation.stats.BlockLosses`, of the trials that judge.
        widen, beyond: as for :func:`tune`.

    Yields:
        Tables as ablate returns them, with the columns ``setup``, ``stage`` ("choosing", then "judging") and ``edge``
        ("smallest" or "largest" where the chosen rate is that of all tried, else "").

    Raises:
        ValueError: a seed both chooses and judges.
    """
    if both := sorted(set(choosing) & set(judging)):
        raise ValueError(f"The seeds {both} both choose and judge; judge with others.")
    chosen = {setup: Choice(rates[0], None) for setup, rates in lrs.items()}
    if tunable := {setup: trial for setup, trial in setups.items() if len(lrs[setup]) > 1}:
        place = Path(folder) / f"choosing-{chosen_on}-{block}"
        grids = {"widen": widen, "beyond": beyond, "judge": BlockLosses({"validation": chosen_on}, block)}
        tuned = tune(model_factory, task, tunable, lrs, choosing, place, **grids, **options)
        chosen |= choose_rates(tuned, choosing)
        yield tuned.assign(stage="choosing", edge=[chosen[setup].edge for setup in tuned["setup"]])
    trials = {
        setup: [replace(template, lr=chosen[setup].lr, seed=seed) for seed in judging]
        for setup, template in setups.items()
        if chosen[setup].lr is not None
    }
    if any(trials.values()):
        parts = "-".join(f"{part}-{examples}" for part, examples in judged_on.items())
        place = Path(folder) / f"judging-{parts}-{block}{'-answered' * answered}"
        judge = BlockLosses(judged_on, block, answered)
        judged = ablate_setups(model_factory, task, trials, place, judge=judge, **options)
        yield judged.assign(stage="judging", edge=[chosen[setup].edge for setup in judged["setup"]])


# Comparisons in pairs


def compare_losses(frame: DataFrame, reference: str, part: str = "test", margin: float = 0.0) -> DataFrame:
    """Compare each setup's loss with the reference's, after the last step of the judging trials.

    The interval is that of :func:`lora_lab.ablation.stats.outer_bounds`. It does not include the uncertainty in the
    choice of the rates.

    Args:
        frame: what :func:`compare_tuned` yields, together.
        reference: the setup that the others are compared with.
        part: of the task; or "accuracy", where answers judged: then "lower" is worse.
        margin: the difference that does not matter, in the task's unit of loss.

    Returns:
        Columns ``setup``, ``lr``, ``loss`` (mean over seeds and examples), ``difference``, ``lower`` and ``upper`` (the
        two-sided 95 % interval; NaN for one seed), ``seeds``, and ``verdict``, as of :func:`judge`. It is "open" where
        ``why`` says what forbids one: "edge" if nothing is known beyond the rate of the setup or of the reference;
        "failed" if a seed has no result or no rate could be chosen; "reference" of the reference itself.

    Raises:
        ValueError: the reference has no results for all seeds.
    """
    import pandas

    rows = last_rows(frame[frame["stage"] == "judging"])
    setups = frame[frame["stage"].isin(["choosing", "judging"])]["setup"].unique()
    first, losses = rows.drop_duplicates("setup").set_index("setup"), losses_by_seed(rows, "setup", part)
    if reference not in losses:
        raise ValueError(f"{reference!r} has no results for all seeds to compare with; there are {[*losses]}.")
    table = []
    for setup in setups:
        row = {"setup": setup, "lr": first["lr"].get(setup, math.nan), "seeds": rows["seed"].nunique()}
        why = "failed"
        if setup in losses:
            paired = losses[setup] - losses[reference]
            lower, upper = outer_bounds(paired, (1 + CONFIDENCE) / 2)
            row |= {"loss": losses[setup].mean(), "difference": paired.mean(), "lower": lower, "upper": upper}
            why = "edge" if first["edge"][setup] or first["edge"][reference] else ""
            why = "reference" if setup == reference else why
        verdict = "open" if why else judge(row["lower"], row["upper"], margin)
        table.append(row | {"verdict": verdict, "why": why})
    return pandas.DataFrame(table)[["setup", "lr", "loss", "difference", "lower", "upper", "seeds", "verdict", "why"]]


def compare_by_seed(best: DataFrame, column: str, reference: str = "full") -> DataFrame:
    """Compare each setup's mean of a column with the reference's, in pairs by seed, with one-sided 95 % bounds.

    Args:
        best: one row for each setup and seed (and ``n_train``), such as those of
            :func:`lora_lab.ablation.overfitting.summarise_trials` at the :func:`best_rates`.
        column: what is compared.
        reference: the setup that the others are compared with; where it has no result, they have no difference.

    Returns:
        Columns ``n_train`` (if there is one), ``setup``, ``mean``, ``least``, ``most``, ``seeds``, ``difference``,
        ``lower`` and ``upper``; these three are NaN for the reference, and bounds need two seeds.

    Raises:
        ValueError: the reference is not there, or a setup has several rows of a seed, as with several rates.
    """
    import pandas

    if reference not in set(best["setup"]):
        raise ValueError(f"There is no method {reference!r} to compare with; there are {sorted(set(best['setup']))}.")
    rows = []
    for size, of_size in each_size(best):
        if (twice := of_size.duplicated(["setup", "seed"])).any():
            setup = of_size.loc[twice, "setup"].iloc[0]
            raise ValueError(f"The setup {setup!r} has several rows of one seed; select those of one learning rate.")
        table = of_size.pivot(index="seed", columns="setup", values=column)
        for setup in of_size["setup"].unique():
            values = table[setup].dropna()
            row = size | {"setup": setup, "mean": values.mean(), "least": values.min(), "most": values.max()}
            paired = (table[setup] - table[reference]).dropna().tolist() if reference in table else []
            bounds = t_bounds(paired) if paired and setup != reference else [math.nan] * 3
            row["seeds"], row["difference"], row["lower"], row["upper"] = len(values), *bounds
            rows.append(row)
    return pandas.DataFrame(rows)


def each_size(frame: DataFrame) -> Iterator[tuple[dict[str, Any], DataFrame]]:
    """Yield the rows of each size of the training set, with its column; all rows if there is no column ``n_train``."""
    if "n_train" not in frame:
        yield {}, frame
        return
    for size, of_size in frame.groupby("n_train"):
        yield {"n_train": size}, of_size


# Which rank is enough

# All else is a setting, and settings must be equal for a comparison to be one.
_MAY_VARY = ("key", "rank", "alpha", "lr", "seed", *OUTCOME, *PROVENANCE)
_STATUS = {"lower": "enough", "equal": "enough", "higher": "too small", "open": "open"}


@dataclass(frozen=True)
class RankResult:
    """One rank at its best learning rate.

    ``difference`` is the mean over seeds of loss(rank) - loss(largest rank) on the test part, in the task's unit of
    loss, and ``lower`` and ``upper`` are its one-sided 95 % bounds; they are None for the largest rank, for one seed,
    and for a rank that could not be judged. ``status`` is "reference" (the largest rank), "enough" (lower or equal),
    "too small" (higher), "open" (more seeds are needed) or "not judged", and ``note`` says why, where that is not
    plain.
    """

    rank: int
    status: str
    lr: float | None = None
    validation_loss: float | None = None
    test_loss: float | None = None
    difference: float | None = None
    lower: float | None = None
    upper: float | None = None
    note: str = ""


@dataclass(frozen=True)
class RankVerdict:
    """The smallest sufficient rank, or that the trials do not decide it; ``print`` shows the whole table.

    ``rank`` is None where it is undecided. ``reason`` is one sentence, ``ranks`` holds each rank's numbers from the
    smallest to the largest, and ``notes`` are sentences on what weakens the answer.
    """

    rank: int | None
    reason: str
    method: str
    margin: float
    seeds: tuple[int, ...]
    ranks: tuple[RankResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The verdict in a few words."""
        return "undecided" if self.rank is None else f"rank {self.rank} is enough"

    @property
    def losses(self) -> dict[int, float]:
        """rank -> mean test loss at its chosen rate; ranks that could not be judged are left out."""
        return {one.rank: one.test_loss for one in self.ranks if one.test_loss is not None}

    def frame(self) -> DataFrame:
        """Return a row for each rank: rate, test loss, difference from the largest rank, bounds and status."""
        import pandas

        columns = ["rank", "lr", "test_loss", "difference", "lower", "upper", "status"]
        return pandas.DataFrame([*self.ranks])[columns]

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict and each rank's numbers, in values of JSON."""
        return {"answer": self.answer, **asdict(self)}

    def __str__(self) -> str:
        notes = [f"rank {one.rank}: {one.note}" for one in self.ranks if one.note] + [*self.notes]
        return "\n".join(
            [
                f"{self.method}: {self.answer}: {self.reason}",
                f"{count_noun(len(self.seeds), 'seed')}, margin {self.margin:g}; losses on the test part; differences "
                f"from the largest rank, with one-sided {CONFIDENCE:.0%} bounds",
                self.frame().to_string(index=False, na_rep="-", float_format="{:.4g}".format),
                *(f"Note: {note}" for note in notes),
            ]
        )


def smallest_sufficient_rank(frame: DataFrame, margin: float = 0.01) -> RankVerdict:
    """Return the smallest rank whose loss is at most ``margin`` above the largest rank's, as far as the seeds can tell.

    A rank is enough if the upper bound of its difference lies below the margin, and too small if the lower bound lies
    above it. If none is enough, and some rank is neither, more seeds are needed.

    Args:
        frame: what :func:`lora_lab.ablation.run.ablate` or ``load`` returns, of one task, one model and one setting
            of everything but rank, alpha, learning rate and seed. Trials without a rank are left out.
        margin: the difference of losses that does not matter, in the task's unit (nats for cross-entropy); positive.

    Raises:
        ValueError: the margin is not positive; or the frame mixes methods or settings, holds a trial twice, or has
            fewer than two ranks.
    """
    margin = check(margin, Positive, "margin")
    trials = last_rows(frame[frame["rank"].notna()])
    tried = sorted(map(int, trials["rank"].unique()))
    if len(tried) < 2:
        raise ValueError(f"The frame has the ranks {tried}, but it takes two to compare them.")
    _check_comparable(trials)
    seeds = tuple(sorted(map(int, trials["seed"].unique())))
    choices, losses = {}, {}
    for rank in tried:
        of_rank = trials[trials["rank"] == rank]
        (choice,) = _choose(_losses_of_trials(of_rank, best=False), seeds)
        choices[rank] = choice
        if choice.lr is not None:
            chosen = of_rank[of_rank["lr"] == choice.lr].sort_values("seed")
            losses[rank] = chosen["test_loss"].to_numpy()
    ranks = tuple(_judge_rank(rank, choice, losses, tried[-1], margin) for rank, choice in choices.items())
    rank, reason = _answer(ranks, len(seeds), margin)
    notes = tuple(_notes(choices, ranks, margin))
    return RankVerdict(rank, reason, str(trials["method"].iloc[0]), margin, seeds, ranks, notes)


def judge_ranks(frame: DataFrame, margin: float) -> RankVerdict:
    """Return the smallest rank whose loss is at most ``margin`` above the highest's, where other seeds chose the rates.

    The one-sided 95 % bounds are those of :func:`lora_lab.ablation.stats.outer_bounds`, over seeds and examples.

    Args:
        frame: what :func:`compare_tuned` yields, together; each setup has a rank of its own.
        margin: the difference of losses that does not matter, in the task's unit; positive.

    Raises:
        ValueError: the margin is not positive, or the highest rank has no results for all seeds.
    """
    margin = check(margin, Positive, "margin")
    trials = last_rows(frame)
    judging = trials[trials["stage"] == "judging"]
    ranks_of = {str(setup): int(rank) for setup, rank in trials.groupby("setup")["rank"].first().sort_values().items()}
    highest, table = [*ranks_of][-1], losses_by_seed(judging, "setup", "test")
    compared = {row["setup"]: row for row in compare_losses(frame, highest).to_dict("records")}
    results = []
    for setup, rank in ranks_of.items():
        row: Any = compared[setup]
        known: Any = {"lr": row["lr"], "test_loss": row["loss"]}
        why = row["why"]
        if why == "failed":
            results.append(RankResult(rank, "not judged", note="it has no result for each seed"))
        elif why == "reference":
            results.append(RankResult(rank, why, **known))
        else:
            lower, upper = outer_bounds(table[setup] - table[highest])
            status = "open" if why else _STATUS[judge(max(lower, -margin), upper, margin)]
            note = (
                "its best learning rate, or that of the highest rank, is at the edge of the rates tried" if why else ""
            )
            known |= {"difference": row["difference"], "lower": lower, "upper": upper, "note": note}
            results.append(RankResult(rank, status, **known))
    seeds = tuple(sorted(map(int, judging["seed"].unique())))
    rank, reason = _answer(results, len(seeds), margin)
    maybe = [str(one.rank) for one in results if one.status == "open" and rank is not None and one.rank < rank]
    notes = (f"rank {', '.join(maybe)} may be enough, too; more seeds would tell.",) if maybe else ()
    return RankVerdict(rank, reason, str(trials["method"].iloc[0]), margin, seeds, tuple(results), notes)


def _notes(choices: Mapping[int, Choice], ranks: Sequence[RankResult], margin: float) -> Iterator[str]:
    """Yield a sentence for each thing that weakens the answer: incomplete rates, a bad reference, an edge."""
    for rank, choice in choices.items():
        if choice.note and choice.lr:
            yield f"rank {rank}: {choice.note}."
    if better := [str(one.rank) for one in ranks if one.upper is not None and one.upper < -margin]:
        yield (
            f"rank {', '.join(better)}: better than the largest by more than the margin, which is then not a fair "
            "reference; try more learning rates."
        )
    for edge, name in {"smallest": "smallest", "largest": "largest", "only": "only one"}.items():
        if at := [str(rank) for rank, choice in choices.items() if choice.edge == edge]:
            *others, last = at
            which = f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"
            yield f"the best learning rate of {which} is the {name} tried, so a better one may lie beyond."


def _check_comparable(rows: DataFrame) -> None:
    """Raise ValueError if the trials, a row each, cannot be compared with each other."""
    settings = [(name, rows) for name in map(str, rows) if name not in _MAY_VARY and not name.startswith(SCORE)]
    settings += [("alpha", of_rank) for _, of_rank in rows.groupby("rank") if "alpha" in rows]
    for name, alike in settings:
        if len(values := alike[name].drop_duplicates().tolist()) > 1:
            raise ValueError(
                f"The frame mixes {name} {values[0]!r} and {values[1]!r}, which cannot be compared; select one of them."
            )
    if (repeated := rows.duplicated(["rank", "lr", "seed"])).any():
        first = rows.loc[repeated, ["rank", "lr", "seed"]].iloc[0].to_dict()
        raise ValueError(f"The frame holds {first} twice; drop_duplicates removes repeated rows.")


def _judge_rank(rank: int, choice: Choice, losses: Mapping[int, np.ndarray], largest: int, margin: float) -> RankResult:
    """Return what the test losses of a rank say beside those of the largest: rank -> losses (seeds,)."""
    if rank not in losses:
        return RankResult(rank, "not judged", note=f"no learning rate has a result for every seed: {choice.note}")
    known = {"lr": choice.lr, "validation_loss": choice.loss, "test_loss": fmean(losses[rank])}
    if rank == largest:
        return RankResult(rank, "reference", **known)
    if largest not in losses:
        return RankResult(rank, "not judged", **known, note="the largest rank has no result to compare it with")
    known["difference"], lower, upper = t_bounds((losses[rank] - losses[largest]).tolist())
    if math.isnan(lower):
        return RankResult(rank, "open", **known, note="one seed has no spread to judge by")
    verdict = judge(max(lower, -margin), upper, margin)  # by how much the rank is better does not matter
    return RankResult(rank, _STATUS[verdict], **known, lower=lower, upper=upper)


def _answer(ranks: Sequence[RankResult], seeds: int, margin: float) -> tuple[int | None, str]:
    """Return the rank, or None, and why."""
    *smaller, largest = ranks
    if largest.status == "not judged":
        why = f"the largest rank, {largest.rank}, has no learning rate with a result for every seed: run those first."
        return None, why
    if seeds < 2:
        return None, "more seeds needed: one seed cannot tell a difference from chance."
    enough = next((one.rank for one in smaller if one.status == "enough"), None)
    unsettled = [one.rank for one in smaller if one.status in ("open", "not judged")]
    if enough is None and unsettled:
        names = ", ".join(map(str, unsettled))
        return None, f"more seeds needed: no smaller rank is shown to be enough, and rank {names} may be."
    if enough is None:
        return largest.rank, f"every smaller rank loses more than {margin:g}; a larger one may be better still."
    sure = f"with {CONFIDENCE:.0%} confidence its loss is less than {margin:g} above that of rank {largest.rank}."
    return enough, sure
