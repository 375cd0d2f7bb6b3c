"""Learning, overfitting and forgetting, read off the curves: where early stopping would have stopped, and the price.

    frame = pandas.concat(by_size(...))     # methods x sizes of the training set x rates on one seed, then all seeds
    trials = summarise_trials(frame)        # one row a trial: what it learned, lost again, and forgot
    best = at_best_rate(trials)             # each setup at its own best rate
    compare(best, "overfit")                # with full fine-tuning, paired by seed
    equal = at_equal_learning(frame, best)  # what each had forgotten when all had learned as much
    frame = at_rates(..., near_ties(trials, 0.05), seeds)  # train all rates that tie on seeds that did not choose
    verdicts = compare_over_rates(frame, "overfit")  # over all rates in the frame: does the choice of a rate decide?
    by_stopping_point(frame, "overfit")     # does the stopping point decide?
    by_training_loss(frame, [1.0, 0.5])     # the validation loss where all fit the training set equally well

A frame is what :func:`lora_lab.ablation.ablate` returns, with one more column: ``setup``, a name for how it trained.
With a column ``n_train`` as well, each size of the training set is treated by itself.

Stopping early needs no other run: a run that was evaluated often contains every shorter one, if the learning rate does
not depend on the number of steps (``schedule="constant"``). The loss at the best evaluation is the lowest of several,
so it is a little too good; this holds for all methods alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lora_lab.ablation.grid import Trial
from lora_lab.ablation.learning_rate import rate_beyond
from lora_lab.ablation.results import SCORE, STOPPED
from lora_lab.ablation.run import ablate
from lora_lab.ablation.stats import t_bounds
from lora_lab.costs.fake import Factory
from lora_lab.task import Task

if TYPE_CHECKING:
    import pandas


_PLACES = (0.5, 0.0, 1.0)  # where in its steps a mean training loss may lie
_NEEDED = ("setup", "lr", "seed", "outcome", "step", "validation_loss", "off_domain_loss", "gap")


def by_size(
    model_factory: nn.Module | Factory,
    task_of: Callable[[int, int], Task | Callable[[], Task]],
    trial_of: Callable[[str, float, int, int], Trial],
    lrs: Mapping[str, Sequence[float]],
    sizes: Sequence[int],
    seeds: Sequence[int],
    folder: str | Path | None = None,
    choose: int = 1,
    widen: int = 0,
    **options: Any,
) -> Iterator[pandas.DataFrame]:
    """For each size of the training set choose each setup's learning rate on the first seeds, and run the rest at it.

    A method of which no rate ends well on a choosing seed is not run on the others. With ``halving`` among the options,
    rates that were stopped on one choosing seed are not tried on the next.

    Args:
        model_factory, folder, **options: as for :func:`lora_lab.ablation.ablate`.
        task_of: (size, seed) -> the task; it should draw its examples by the seed, for few examples differ much.
        trial_of: (method, lr, seed, size) -> the trial.
        lrs: the rates that each method tries.
        choose: how many of the seeds choose. One is cheap, but unreliable where rates nearly tie.
        widen: how many rates may be added to a grid while its best rate is at the edge.

    Yields:
        A frame with the columns ``setup`` and ``n_train`` for each size and seed, in this order: those of the seeds
        that choose as soon as they have chosen, the others as soon as they are done. Its setups are in the order of
        ``lrs``.

    Raises:
        ValueError: ``choose`` is out of range, or two methods make the same trial.
    """

    if not 1 <= choose <= len(seeds):
        raise ValueError(f"choose is {choose}, but it must be from 1 to the number of seeds, {len(seeds)}.")

    def run(size: int, seed: int, lrs: Mapping[str, Sequence[float]]) -> pandas.DataFrame:
        trials = {setup: [trial_of(setup, lr, seed, size) for lr in rates] for setup, rates in lrs.items()}
        frame = ablate(model_factory, task_of(size, seed), [*chain(*trials.values())], folder, **options)
        identity = {"task": frame["task"].iloc[0], "model": frame["model"].iloc[0]}
        setup_of = {trial.bound(**identity).key: setup for setup, group in trials.items() for trial in group}
        if len(setup_of) < sum(len(set(group)) for group in trials.values()):
            raise ValueError("Two methods make the same trial, so their results are indistinguishable; name one.")
        frame = frame.assign(setup=frame["key"].map(setup_of), n_train=size)
        place = {setup: number for number, setup in enumerate(lrs)}
        return frame.sort_values("setup", key=lambda setups: setups.map(place), kind="stable")

    for size in sizes:
        frames, chosen = tune_by_seed(partial(run, size), lrs, seeds[:choose], widen)
        yield from frames
        for seed in seeds[choose:] if chosen else ():
            yield run(size, seed, chosen)


def tune_by_seed(
    run: Callable[[int, Mapping[str, Sequence[float]]], pandas.DataFrame],
    lrs: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    widen: int,
    by: str = "best_loss",
) -> tuple[list[pandas.DataFrame], dict[str, tuple[float]]]:
    """Choose each setup's learning rate on seeds that have a task, or a model, of their own.

    Args:
        run: (seed, setup -> rates) -> the table of :func:`lora_lab.ablation.ablate` with a column ``setup``. A trial
            that was run before is asked for again, so it should keep results in a folder.
        lrs: the rates that each setup tries first.
        seeds: choose.
        widen: how many rates may be added to a grid while its best rate is at the edge.
        by: as for :func:`at_best_rate`.

    Returns:
        The frames of the seeds, and each setup's best rate; no rates if no trial ended well.
    """
    import pandas

    grids = {setup: tuple(rates) for setup, rates in lrs.items()}
    most = {setup: len(set(rates)) + widen for setup, rates in grids.items()}
    while True:
        frames, left = [], grids
        for seed in seeds:
            frames.append(run(seed, left))
            rows = frames[-1][frames[-1]["outcome"] == STOPPED]
            stopped = set(zip(rows["setup"], rows["lr"], strict=True))
            left = {setup: [lr for lr in rates if (setup, lr) not in stopped] for setup, rates in left.items()}
        so_far = pandas.concat(frames, ignore_index=True)
        if not (so_far["outcome"] == "done").any():
            return frames, {}
        best = at_best_rate(summarise_trials(so_far), so_far, by).drop_duplicates("setup").set_index("setup")
        beyond = {
            str(setup): edge
            for setup, edge in best["edge"].items()
            if edge in ("smallest", "largest") and len(set(grids[str(setup)])) < most[str(setup)]
        }
        if not beyond:
            return frames, {str(setup): (lr,) for setup, lr in best["lr"].items()}
        grids |= {setup: (*grids[setup], rate_beyond(grids[setup], edge)) for setup, edge in beyond.items()}


def at_rates(
    model_factory: nn.Module | Factory,
    task_of: Callable[[int, int], Task | Callable[[], Task]],
    trial_of: Callable[[str, float, int, int], Trial],
    rates: pandas.DataFrame,
    seeds: Sequence[int],
    folder: str | Path | None = None,
    **options: Any,
) -> pandas.DataFrame:
    """Train each setup at each of its rates on each seed, such as all rates that tie on seeds that did not choose.

    Args:
        model_factory, task_of, trial_of, folder, **options: as for :func:`by_size`.
        rates: columns ``n_train``, ``setup``, ``lr``, as :func:`near_ties` returns them.

    Returns:
        The frames of :func:`by_size`, together.
    """
    import pandas

    frames = []
    for size in sorted(set(rates["n_train"].astype(int))):
        of_size = rates[rates["n_train"] == size]
        lrs = {str(setup): rows["lr"].tolist() for setup, rows in of_size.groupby("setup", sort=False)}
        frames += by_size(model_factory, task_of, trial_of, lrs, [size], seeds, folder, choose=len(seeds), **options)
    return pandas.concat(frames, ignore_index=True)


def summarise_trials(frame: pandas.DataFrame) -> pandas.DataFrame:
    """One row for each trial that ended well.

    Columns: those of the trial (``n_train`` if there is one, ``setup``, ``lr``, ``seed``); ``best_step``, the step
    of the lowest validation loss, where early stopping stops; ``best_loss`` there; ``learned``, how far below the loss
    before training that is; ``last_loss``; ``overfit``, how far the loss rose again by the last step; ``gap``, the
    generalisation gap then; ``forgotten`` and ``forgotten_at_last``, how much higher the off-domain loss is than before
    training, at the best step and at the last; ``test_loss`` and the scores of a judge after the last, if the frame has
    them.

    Raises:
        ValueError: the frame lacks a column, or a trial its evaluation before training.
    """
    import pandas

    if missing := [name for name in _NEEDED if name not in frame]:
        raise ValueError(f"The frame lacks the columns {missing}; give what ablate returns, with a column 'setup'.")
    by, rows = _identity(frame), []
    for values, curve in frame[frame["outcome"] == "done"].groupby(by, sort=False):
        curve = curve.sort_values("step")
        first, last = curve.iloc[0], curve.iloc[-1]
        if first["step"] != 0 or curve["step"].duplicated().any():
            raise ValueError(f"The trial {first[by].to_dict()} needs one row for each step, from 0 on.")
        best = curve.iloc[int(curve["validation_loss"].argmin())]
        row = {
            "best_step": int(best["step"]),
            "best_loss": best["validation_loss"],
            "learned": first["validation_loss"] - best["validation_loss"],
            "last_loss": last["validation_loss"],
            "overfit": last["validation_loss"] - best["validation_loss"],
            "gap": last["gap"],
            "forgotten": best["off_domain_loss"] - first["off_domain_loss"],
            "forgotten_at_last": last["off_domain_loss"] - first["off_domain_loss"],
        }
        row |= {name: last[name] for name in map(str, curve) if name == "test_loss" or name.startswith(SCORE)}
        rows.append(dict(zip(by, values, strict=True)) | row)
    return pandas.DataFrame(rows)


def at_best_rate(
    trials: pandas.DataFrame, frame: pandas.DataFrame | None = None, by: str = "best_loss"
) -> pandas.DataFrame:
    """The rows at each method's best rate: the lowest mean loss over the seeds that all its rates have.

    A column ``edge`` is added: whether that rate is the "smallest" or "largest" of those that ended well, so that a
    better one may lie beyond, or the "only" one.

    Args:
        trials: what :func:`summarise_trials` returns.
        frame: what it summarises, if trials of it were stopped: their rates cannot be the best, but count for ``edge``.
        by: the loss that counts: "best_loss", for training that is stopped early, or "last_loss".

    Raises:
        ValueError: there are no trials, or the rates of a method have no seed in common.
    """
    import pandas

    parts = []
    stopped = trials[:0] if frame is None else frame[frame["outcome"] == STOPPED]
    if len(stopped):  # on some seed; on others a rate may have gone on
        of_rate = [*_shared(trials), "lr"]
        trials = trials[~trials.set_index(of_rate).index.isin(stopped.set_index(of_rate).index)]
    for of_setup, means in _by_rate(trials, by):
        rate = means.idxmin()
        shared = of_setup[_shared(trials)].drop_duplicates()
        rates = sorted({*means.index, *stopped.merge(shared)["lr"]})
        edge = "only" if len(rates) == 1 else {rates[0]: "smallest", rates[-1]: "largest"}.get(rate, "")
        parts.append(of_setup[of_setup["lr"] == rate].assign(edge=edge))
    return pandas.concat(parts, ignore_index=True)


def near_ties(trials: pandas.DataFrame, slack: float) -> pandas.DataFrame:
    """The rates that are as good as the best: a mean of ``best_loss`` that is at most ``slack`` above the best rate's.

    On a few seeds such rates are indistinguishable, and what is compared later may differ much between them. So train
    them all on other seeds, and see whether a verdict holds for each (:func:`compare_over_rates`).

    Args:
        trials: what :func:`summarise_trials` returns, of the seeds that choose.
        slack: in the units of the loss; 0 leaves the best rate.

    Returns:
        Columns ``n_train`` (if there is one), ``setup``, ``lr``.

    Raises:
        ValueError: the slack is negative; or as :func:`at_best_rate`.
    """
    import pandas

    if not slack >= 0:
        raise ValueError(f"slack is {slack}, but it must be 0 or a positive loss.")
    parts = []
    for of_setup, means in _by_rate(trials):
        ties = of_setup[of_setup["lr"].isin(means.index[means <= means.min() + slack])]
        parts.append(ties.sort_values("lr")[[*_shared(ties), "lr"]].drop_duplicates())
    return pandas.concat(parts, ignore_index=True)


def _by_rate(trials: pandas.DataFrame, by: str = "best_loss") -> Iterator[tuple[pandas.DataFrame, pandas.Series]]:
    """Each setup's trials (at each size), and each rate's mean loss over the seeds that all rates have."""
    if trials.empty:
        raise ValueError("There is no trial that ended well, so no rate can be chosen; try lower rates.")
    for values, of_setup in trials.groupby(_shared(trials), sort=False):
        table = of_setup.pivot(index="seed", columns="lr", values=by).dropna()
        if table.empty:
            raise ValueError(f"The rates of {values} have no seed in common; run each of them with one seed at least.")
        yield of_setup, table.mean()


def compare(best: pandas.DataFrame, column: str, reference: str = "full") -> pandas.DataFrame:
    """Each method's mean of a column, and its difference from one method's, paired by seed, with one-sided 95 % bounds.

    Args:
        best: one row for each setup and seed (and ``n_train``): of :func:`at_best_rate` or :func:`at_equal_learning`.
        column: what is compared.
        reference: the setup that the others are compared with; where it has no result, they have no difference.

    Returns:
        Columns ``n_train`` (if there is one), ``setup``, ``mean``, ``least``, ``most``, ``seeds``, and for all but the
        reference ``difference``, ``lower`` and ``upper``; bounds need two seeds.

    Raises:
        ValueError: the reference is not there.
    """
    import pandas

    if reference not in set(best["setup"]):
        raise ValueError(f"There is no method {reference!r} to compare with; there are {sorted(set(best['setup']))}.")
    rows = []
    for size, of_size in best.groupby("n_train") if "n_train" in best else [(None, best)]:
        table = of_size.pivot(index="seed", columns="setup", values=column)
        for setup in of_size["setup"].unique():
            values = table[setup].dropna()
            row = {} if size is None else {"n_train": size}
            row |= {
                "setup": setup,
                "mean": values.mean(),
                "least": values.min(),
                "most": values.max(),
                "seeds": len(values),
            }
            if setup != reference and reference in table:
                paired = (table[setup] - table[reference]).dropna().tolist()
                if paired:
                    row |= dict(zip(("difference", "lower", "upper"), t_bounds(paired), strict=True))
            rows.append(row)
    return pandas.DataFrame(rows)


def at_equal_learning(frame: pandas.DataFrame, best: pandas.DataFrame, share: float = 1.0) -> pandas.DataFrame:
    """What each method had forgotten when all had learned as much: the price of the same gain.

    For each seed the amount is what the method that learned least had learned at its best. Each curve is followed from
    the start to where it first gets there, on straight lines between evaluations. A seed for which some method learned
    nothing has no such amount and is left out.

    Near its best a curve is flat while its setup goes on forgetting, so the setup that learned least is read late. A
    smaller ``share`` of the amount is read where all curves are still steep; trust what holds for several shares.

    Args:
        frame: as for :func:`summarise_trials`.
        best: the trials to compare, as :func:`at_best_rate` returns them.
        share: of the amount, above 0 and at most 1.

    Returns:
        Columns ``n_train`` (if there is one), ``seed``, ``setup``, ``learned`` (the same for all), ``forgotten``.

    Raises:
        ValueError: the share is out of range.
    """
    import pandas

    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, but it must be above 0 and at most 1.")
    by, rows = _identity(frame), []
    common = [name for name in by if name not in ("setup", "lr")]  # what the methods that are compared share
    frame = frame.merge(best[by].drop_duplicates())  # the other trials' curves are not needed
    curves = {values: curve.sort_values("step") for values, curve in frame.groupby(by)}
    for values, compared in best.groupby(common):
        amount = share * compared["learned"].min()
        if not amount > 0:
            continue
        for trial in compared.to_dict("records"):
            curve = curves[tuple(trial[name] for name in by)]
            learned = (curve["validation_loss"].iloc[0] - curve["validation_loss"]).tolist()
            lost = (curve["off_domain_loss"] - curve["off_domain_loss"].iloc[0]).tolist()
            row = {**dict(zip(common, values, strict=True)), "setup": trial["setup"], "learned": amount}
            rows.append({**row, "forgotten": interpolate_at(learned, lost, amount)})
    return pandas.DataFrame(rows, columns=[*common, "setup", "learned", "forgotten"])


def compare_over_rates(
    frame: pandas.DataFrame,
    column: str,
    reference: str = "full",
    share: float | None = None,
    train_loss: float | None = None,
) -> pandas.DataFrame:
    """Each method compared with one, over all pairs of their rates: does a difference depend on the rate chosen?

    Args:
        frame: as for :func:`summarise_trials`; each method at the rates that might be chosen, see :func:`near_ties`.
        column: one that :func:`summarise_trials` returns, or with a ``share`` one of :func:`at_equal_learning`, or with
            a ``train_loss`` the "validation_loss".
        reference: the method that the others are compared with.
        share, train_loss: None compares at each trial's own best or last step. Give one of them at most. With a
            ``train_loss`` each pair of rates is compared for all three places of a mean (:func:`training_losses`).

    Returns:
        Columns ``n_train`` (if there is one), ``setup``, ``pairs`` (of rates), ``lower`` and ``upper`` (the outermost
        of the one-sided 95 % bounds of the paired differences) and ``verdict``: "less" or "more" if each pair's bounds
        say so, "flips" if some say less and some more, else "open".

    Raises:
        ValueError: the reference is not there, or a pair of rates has fewer than two seeds in common.
    """
    import pandas

    trials, rows = summarise_trials(frame), []
    if reference not in set(trials["setup"]):
        raise ValueError(f"There is no method {reference!r} to compare with; there are {sorted(set(trials['setup']))}.")
    for size, of_size in trials.groupby("n_train") if "n_train" in trials else [(None, trials)]:
        references = [at_rate for _, at_rate in of_size[of_size["setup"] == reference].groupby("lr")]
        for setup, of_setup in of_size[of_size["setup"] != reference].groupby("setup", sort=False):
            others = [at_rate for _, at_rate in of_setup.groupby("lr")]
            pairs = [pandas.concat(pair) for pair in product(references, others)]
            if not pairs:
                continue
            if share is not None:
                curves = frame[frame["setup"].isin([reference, setup])]
                pairs = [at_equal_learning(curves, pair, share) for pair in pairs]
            elif train_loss is not None:
                by = _identity(frame)
                curves = [frame.merge(pair[by]) for pair in pairs]
                pairs = [at_training_loss(curve, [train_loss], place) for curve in curves for place in _PLACES]
            complete = all({reference, setup} <= set(pair["setup"]) for pair in pairs)
            tables = [compare(pair, column, reference) for pair in pairs if complete]
            bounds = pandas.concat(tables).query("setup == @setup") if complete else pandas.DataFrame()
            if "lower" not in bounds or bounds["lower"].isna().any():
                raise ValueError(f"{setup!r} and {reference!r} need two seeds in common at each rate to be compared.")
            row = {} if size is None else {"n_train": size}
            row |= {
                "setup": setup,
                "pairs": len(references) * len(others),
                "lower": bounds["lower"].min(),
                "upper": bounds["upper"].max(),
            }
            rows.append({**row, "verdict": _over_all(bounds["lower"], bounds["upper"])})
    return pandas.DataFrame(rows)


def by_stopping_point(frame: pandas.DataFrame, column: str = "overfit", reference: str = "full") -> pandas.DataFrame:
    """Each method compared with one as if training had stopped at each evaluation: does the last step decide?

    The first evaluation after the start is left out: no loss has risen there, unless training did nothing but harm.

    Args:
        frame: as for :func:`summarise_trials`, of one rate for each setup (and size).
        column: one that :func:`summarise_trials` returns.
        reference: the method that the others are compared with.

    Returns:
        As :func:`compare`, without the reference, with the columns ``step`` and ``verdict``: "less" or "more" if both
        bounds say so, else "open".

    Raises:
        ValueError: a setup has several rates, or fewer than two seeds in common with the reference; or as
            :func:`compare`.
    """
    parts = []
    for _, of_size in frame.groupby("n_train") if "n_train" in frame else [(None, frame)]:
        for step in sorted(of_size["step"].dropna().unique())[2:]:
            stopped = compare(_of_one_rate(summarise_trials(of_size[of_size["step"] <= step])), column, reference)
            parts.append(stopped.assign(step=step))
    return _with_verdicts(parts, reference)


def training_losses(curve: pandas.DataFrame, place: float = 0.5) -> np.ndarray:
    """A trial's training loss at each of its evaluations, NaN where it is not known: (evaluations,).

    A history has the mean over the steps since the evaluation before (the validation loss minus the gap). Where in
    these steps the loss has that value, it does not say. Between two such places a straight line is followed.

    Args:
        curve: the rows of one trial, as for :func:`summarise_trials`, by step.
        place: 0 if the mean is that of the model before these steps, 0.5 of the one in their middle, 1 after them.
    """
    steps = curve["step"].to_numpy(float)
    means = (curve["validation_loss"] - curve["gap"]).to_numpy(float)
    starts = np.concatenate([[0.0], steps[:-1]])
    places = starts + place * (steps - starts)
    known = ~np.isnan(means)
    if not known.any():
        return means
    return np.interp(steps, places[known], means[known], left=math.nan, right=math.nan)


def at_training_loss(frame: pandas.DataFrame, losses: Sequence[float], place: float = 0.5) -> pandas.DataFrame:
    """The validation loss of each trial where its training loss first comes down to given values.

    Between evaluations a straight line is followed.

    Args:
        frame: as for :func:`summarise_trials`.
        losses: training losses.
        place: as for :func:`training_losses`.

    Returns:
        Columns ``n_train`` (if there is one), ``setup``, ``lr``, ``seed``, ``train_loss`` (one of ``losses``) and
        ``validation_loss``. A trial has no row for a loss that it never comes down to, or is below from the first.
    """
    import pandas

    by, rows = _identity(frame), []
    for values, curve in frame[frame["outcome"] == "done"].groupby(by, sort=False):
        curve = curve.sort_values("step")
        known = curve.assign(training=training_losses(curve, place)).dropna(subset="training")
        validation, training = known["validation_loss"].tolist(), known["training"].tolist()
        for loss in losses:
            if training and training[0] > loss >= min(training):
                there = interpolate_at([-value for value in training], validation, -loss)
                identity = dict(zip(by, values, strict=True))
                rows.append({**identity, "train_loss": loss, "validation_loss": there})
    return pandas.DataFrame(rows, columns=[*by, "train_loss", "validation_loss"])


def by_training_loss(frame: pandas.DataFrame, losses: Sequence[float], reference: str = "full") -> pandas.DataFrame:
    """The validation loss of each method compared with one's at equal training losses.

    A higher validation loss at the same training loss is a larger generalisation gap, wherever training stops. It is
    decided only if it does not matter where in its steps a mean training loss is placed (:func:`training_losses`):
    before them, in their middle and after them.

    Args:
        frame: as for :func:`at_training_loss`, of one rate for each setup (and size).
        losses: training losses. Where some method has fewer than two seeds in common with the reference that come down
            to one, for each of the three places, it has no row.
        reference: the method that the others are compared with.

    Returns:
        As :func:`compare`, without the reference, with the columns ``train_loss`` and ``verdict``, as
        :func:`by_stopping_point`. The difference is that of the middle, the bounds are the outermost of the three.

    Raises:
        ValueError: a setup has several rates, or no method can be compared at any of the losses; or as :func:`compare`.
    """
    import pandas

    parts = []
    for place in _PLACES:
        rows = _of_one_rate(at_training_loss(frame, losses, place))
        for loss, of_loss in rows.groupby("train_loss", sort=False):
            if reference in set(of_loss["setup"]):
                table = compare(of_loss, "validation_loss", reference)
                if "lower" in table:
                    parts.append(table.dropna(subset="lower").assign(train_loss=loss, place=place))
    if not parts:
        return _with_verdicts(parts, reference)
    table = pandas.concat(parts, ignore_index=True)
    case = table.groupby([name for name in ("n_train", "setup", "train_loss") if name in table])
    bounds = {"lower": case["lower"].transform("min"), "upper": case["upper"].transform("max")}
    judged = (table["place"] == 0.5) & (case["place"].transform("count") == len(_PLACES))
    return _with_verdicts([table.assign(**bounds)[judged].drop(columns="place")], reference)


def _of_one_rate(rows: pandas.DataFrame) -> pandas.DataFrame:
    """The rows, after a check that each setup has one rate."""
    for _, of_setup in rows.groupby(_shared(rows)):
        if len(rates := sorted(of_setup["lr"].unique())) > 1:
            raise ValueError(
                f"The setup {of_setup['setup'].iloc[0]!r} has the rates {', '.join(map('{:g}'.format, rates))}, "
                "but must have one; select the rows of one rate."
            )
    return rows


def _with_verdicts(parts: Sequence[pandas.DataFrame], reference: str) -> pandas.DataFrame:
    """Comparisons with one method, together, without that method's own rows and with a verdict for each."""
    import pandas

    table = pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame(columns=["setup"])
    table = table[table["setup"] != reference].reset_index(drop=True)
    if table.empty or "lower" not in table or table["lower"].isna().any():
        raise ValueError(f"Each setup needs two seeds in common with {reference!r} to be compared; train more seeds.")
    bounds = zip(table["lower"], table["upper"], strict=True)
    return table.assign(verdict=["less" if upper < 0 else "more" if lower > 0 else "open" for lower, upper in bounds])


def bounds_table(compared: pandas.DataFrame, digits: int = 2) -> pandas.DataFrame:
    """Bounds and verdicts for reading: a row for each setup, a column for each size of the training set.

    Args:
        compared: what :func:`compare_over_rates` returns, with sizes.
        digits: after the decimal point.
    """
    cells = [
        f"{row.lower:+.{digits}f} to {row.upper:+.{digits}f}: {row.verdict}" for row in compared.itertuples(index=False)
    ]
    wide = compared.assign(cell=cells).pivot(index="setup", columns="n_train", values="cell")
    return wide.loc[compared["setup"].unique()].rename(columns="{:,} examples".format).rename_axis(columns=None)


def _over_all(lower: pandas.Series, upper: pandas.Series) -> str:
    """The verdict of several differences' bounds together."""
    less, more = upper < 0, lower > 0
    if less.any() and more.any():
        return "flips"
    return "less" if less.all() else "more" if more.all() else "open"


def interpolate_at(learned: Sequence[float], lost: Sequence[float], amount: float) -> float:
    """What is lost where ``amount`` is first learned, on straight lines between evaluations.

    Raises:
        ValueError: so much is never learned.
    """
    after = next((i for i, value in enumerate(learned) if value >= amount), None)
    if after is None:
        raise ValueError("This run never learned that much; take the smaller amount.")
    if after == 0:
        return lost[0]
    before = after - 1
    share = (amount - learned[before]) / (learned[after] - learned[before])
    return lost[before] + share * (lost[after] - lost[before])


def _identity(frame: pandas.DataFrame) -> list[str]:
    """The columns that identify a trial."""
    return [name for name in ("n_train", "setup", "lr", "seed") if name in frame]


def _shared(frame: pandas.DataFrame) -> list[str]:
    """The columns that the rates and seeds of a method have in common."""
    return [name for name in _identity(frame) if name not in ("lr", "seed")]
