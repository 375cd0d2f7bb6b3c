"""Learning, overfitting and forgetting, read off the curves: where early stopping would have stopped, and the price.

    frame = pandas.concat(by_size(...))     # methods x sizes of the training set x rates on one seed, then all seeds
    trials = summarise_trials(frame)        # one row a trial: what it learned, lost again, and forgot
    best = trials.merge(best_rates(frame))  # each setup at its own best rate
    compare_by_seed(best, "overfit")        # with full fine-tuning, paired by seed
    equal = at_equal_learning(frame, best)  # what each had forgotten when all had learned as much
    frame = at_rates(..., best_rates(frame, slack=0.05), seeds)  # train all rates that tie on seeds that did not choose
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
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_lab.ablation.compare import compare_by_seed, each_size, judge, trial_columns
from lora_lab.ablation.results import SCORE
from lora_lab.system.schema import Share, check

if TYPE_CHECKING:
    from pandas import DataFrame


_WORDS = {"lower": "less", "higher": "more", "equal": "open", "open": "open"}  # how much a setup overfits or forgets
_PLACES = (0.5, 0.0, 1.0)  # where in its steps a mean training loss may lie


def summarise_trials(frame: DataFrame) -> DataFrame:
    """Return one row for each trial that ended well.

    Columns: those of the trial (``n_train`` if there is one, ``setup``, ``lr``, ``seed``); ``best_step``, the step
    of the lowest validation loss, where early stopping stops; ``best_loss`` there; ``learned``, how far below the loss
    before training that is; ``last_loss``; ``overfit``, how far the loss rose again by the last step; ``gap``, the
    generalisation gap then; ``forgotten`` and ``forgotten_at_last``, how much higher the off-domain loss is than before
    training, at the best step and at the last; ``test_loss`` and the scores of a judge after the last, if the frame has
    them.

    Raises:
        ValueError: a trial lacks its evaluation before training, or has two of one step.
    """
    import pandas

    rows = []
    for trial, curve in _each_curve(frame[frame["outcome"] == "done"]):
        first, last = curve.iloc[0], curve.iloc[-1]
        if first["step"] != 0 or curve["step"].duplicated().any():
            raise ValueError(f"The trial {trial} needs one row for each step, from 0 on.")
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
        rows.append(trial | row)
    return pandas.DataFrame(rows)


def at_equal_learning(frame: DataFrame, best: DataFrame, share: float = 1.0) -> DataFrame:
    """Return what each method had forgotten when all had learned as much: the price of the same gain.

    For each seed the amount is what the method that learned least had learned at its best. Each curve is followed from
    the start to where it first gets there, on straight lines between evaluations. A seed for which some method learned
    nothing has no such amount and is left out.

    Near its best a curve is flat while its setup goes on forgetting, so the setup that learned least is read late. A
    smaller ``share`` of the amount is read where all curves are still steep; trust what holds for several shares.

    Args:
        frame: as for :func:`summarise_trials`.
        best: the trials to compare: rows of :func:`summarise_trials` at each setup's best rate.
        share: of the amount, above 0 and at most 1.

    Returns:
        Columns ``n_train`` (if there is one), ``seed``, ``setup``, ``learned`` (the same for all), ``forgotten``.

    Raises:
        ValueError: the share is out of range.
    """
    import pandas

    check(share, Share, "share")
    by, rows = trial_columns(frame), []
    common = [name for name in by if name not in ("setup", "lr")]  # what the methods that are compared share
    chosen = frame.merge(best[by].drop_duplicates())  # the other trials' curves are not needed
    curves = {tuple(trial.values()): curve for trial, curve in _each_curve(chosen)}
    for _, compared in best.groupby(common):
        amount = share * compared["learned"].min()
        if not amount > 0:
            continue
        for trial in compared.to_dict("records"):
            curve = curves[tuple(trial[name] for name in by)]
            learned = (curve["validation_loss"].iloc[0] - curve["validation_loss"]).tolist()
            lost = (curve["off_domain_loss"] - curve["off_domain_loss"].iloc[0]).tolist()
            rows.append(trial | {"learned": amount, "forgotten": interpolate_at(learned, lost, amount)})
    return pandas.DataFrame(rows, columns=[*common, "setup", "learned", "forgotten"])


def compare_over_rates(
    frame: DataFrame, column: str, reference: str = "full", share: float | None = None, train_loss: float | None = None
) -> DataFrame:
    """Compare each method with one over all pairs of their rates: does a difference depend on the rate chosen?

    Args:
        frame: as for :func:`summarise_trials`; each method at the rates that might be chosen, see `best_rates`.
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

    trials, by, rows = summarise_trials(frame), trial_columns(frame), []
    if reference not in set(trials["setup"]):
        raise ValueError(f"There is no method {reference!r} to compare with; there are {sorted(set(trials['setup']))}.")

    def compared(pair: DataFrame) -> list[DataFrame]:
        """Return what two setups at one rate each are compared by."""
        if share is not None:
            return [at_equal_learning(frame, pair, share)]
        if train_loss is not None:
            return [at_training_loss(frame.merge(pair[by]), [train_loss], place) for place in _PLACES]
        return [pair]

    for size, of_size in each_size(trials):
        rates = {
            setup: [rate for _, rate in tried.groupby("lr")] for setup, tried in of_size.groupby("setup", sort=False)
        }
        for setup, others in rates.items():
            pairs = [*product(rates.get(reference, []), others)]
            if setup == reference or not pairs:
                continue
            tables = [table for pair in pairs for table in compared(pandas.concat(pair))]
            complete = all({reference, setup} <= set(table["setup"]) for table in tables)
            parts = [compare_by_seed(table, column, reference) for table in tables if complete]
            bounds = _add_verdicts(parts, reference)
            words = set(bounds["verdict"])
            verdict = "flips" if {"less", "more"} <= words else words.pop() if len(words) == 1 else "open"
            row = size | {"setup": setup, "pairs": len(pairs)}
            rows.append(row | {"lower": bounds["lower"].min(), "upper": bounds["upper"].max(), "verdict": verdict})
    return pandas.DataFrame(rows)


def by_stopping_point(frame: DataFrame, column: str = "overfit", reference: str = "full") -> DataFrame:
    """Compare each method with one as if training had stopped at each evaluation: does the last step decide?

    The first evaluation after the start is left out: no loss has risen there, unless training did nothing but harm.

    Args:
        frame: as for :func:`summarise_trials`, of one rate for each setup (and size).
        column: one that :func:`summarise_trials` returns.
        reference: the method that the others are compared with.

    Returns:
        As `compare_by_seed`, without the reference, with the columns ``step`` and ``verdict``: "less" or "more" if both
        bounds say so, else "open".

    Raises:
        ValueError: a setup has several rates, or fewer than two seeds in common with the reference; or as
            `compare_by_seed`.
    """
    parts = []
    for _, of_size in each_size(frame):
        for step in sorted(of_size["step"].dropna().unique())[2:]:
            stopped = summarise_trials(of_size[of_size["step"] <= step])
            parts.append(compare_by_seed(stopped, column, reference).assign(step=step))
    return _add_verdicts(parts, reference)


def training_losses(curve: DataFrame, place: float = 0.5) -> np.ndarray:
    """Return a trial's training loss at each of its evaluations, NaN where it is not known: (evaluations,).

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


def at_training_loss(frame: DataFrame, losses: Sequence[float], place: float = 0.5) -> DataFrame:
    """Return the validation loss of each trial where its training loss first comes down to given values.

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

    rows = []
    for trial, curve in _each_curve(frame[frame["outcome"] == "done"]):
        known = curve.assign(training=training_losses(curve, place)).dropna(subset="training")
        validation, training = known["validation_loss"].tolist(), known["training"].tolist()
        for loss in losses:
            if training and training[0] > loss >= min(training):
                there = interpolate_at([-value for value in training], validation, -loss)
                rows.append({**trial, "train_loss": loss, "validation_loss": there})
    return pandas.DataFrame(rows, columns=[*trial_columns(frame), "train_loss", "validation_loss"])


def by_training_loss(frame: DataFrame, losses: Sequence[float], reference: str = "full") -> DataFrame:
    """Compare the validation loss of each method with one's at equal training losses.

    A higher validation loss at the same training loss is a larger generalisation gap, wherever training stops. It is
    decided only if it does not matter where in its steps a mean training loss is placed (:func:`training_losses`):
    before them, in their middle and after them.

    Args:
        frame: as for :func:`at_training_loss`, of one rate for each setup (and size).
        losses: training losses. Where some method has fewer than two seeds in common with the reference that come down
            to one, for each of the three places, it has no row.
        reference: the method that the others are compared with.

    Returns:
        As `compare_by_seed`, without the reference, with the columns ``train_loss`` and ``verdict``, as
        :func:`by_stopping_point`. The difference is that of the middle, the bounds are the outermost of the three.

    Raises:
        ValueError: a setup has several rates, or no method can be compared at a loss; or as `compare_by_seed`.
    """
    import pandas

    parts = [
        compare_by_seed(of_loss, "validation_loss", reference).assign(train_loss=loss, place=place)
        for place in _PLACES
        for loss, of_loss in at_training_loss(frame, losses, place).groupby("train_loss", sort=False)
        if reference in set(of_loss["setup"])
    ]
    if not parts:
        return _add_verdicts([], reference)
    table = pandas.concat(parts, ignore_index=True).dropna(subset="lower")
    case = table.groupby([name for name in ("n_train", "setup", "train_loss") if name in table])
    bounds = {"lower": case["lower"].transform("min"), "upper": case["upper"].transform("max")}
    judged = (table["place"] == 0.5) & (case["place"].transform("count") == len(_PLACES))
    return _add_verdicts([table.assign(**bounds)[judged].drop(columns="place")], reference)


def _add_verdicts(parts: Sequence[DataFrame], reference: str) -> DataFrame:
    """Return comparisons with one method, together, without that method's own rows and with a verdict for each."""
    import pandas

    table = pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame(columns=["setup", "lower"])
    table = table[table["setup"] != reference].reset_index(drop=True)
    if table.empty or table["lower"].isna().any():
        raise ValueError(f"Each setup needs two seeds in common with {reference!r} to be compared; train more seeds.")
    bounds = table[["lower", "upper"]].to_numpy()
    return table.assign(verdict=[_WORDS[judge(*of_setup)] for of_setup in bounds])


def interpolate_at(learned: Sequence[float], lost: Sequence[float], amount: float) -> float:
    """Return what is lost where ``amount`` is first learned, on straight lines between evaluations.

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


def _each_curve(frame: DataFrame) -> Iterator[tuple[dict[str, Any], DataFrame]]:
    """Yield each trial, as the columns that identify it, and its rows by step."""
    by = trial_columns(frame)
    for values, curve in frame.groupby(by, sort=False):
        yield dict(zip(by, values, strict=True)), curve.sort_values("step")
