"""What curves tell of learning, overfitting and forgetting: where early stopping would have stopped, and at what price.

    frame = pandas.concat(by_size(...))     # ways x sizes of the training set x rates on one seed, then all seeds
    found = measures(frame)                 # one row a trial: what it learned, lost again, and forgot
    best = tuned(found)                     # each way to train at its own best rate
    compared(best, "overfit")               # against full fine-tuning, paired by seed
    equal = at_equal_learning(frame, best)  # what each had forgotten when all had learned as much

A frame is what :func:`lora_lab.ablation.ablate` returns, with one column more: ``way``, a name for how it was trained.
With a column ``n_train`` as well, all is done for each size of the training set by itself.

To stop early is not another run: a run that was evaluated often holds every shorter one, where the rate does not
depend on the number of steps (``schedule="constant"``). The loss at the best evaluation is the lowest of several, so it
is a little too good; all ways have that in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_lab.ablation.grid import Trial
from lora_lab.ablation.run import ablate
from lora_lab.ablation.verdict import t_bounds
from lora_lab.rehearse import Factory
from lora_lab.tasks.base import Task

if TYPE_CHECKING:
    import pandas

_NEEDED = ("way", "lr", "seed", "outcome", "step", "validation_loss", "off_domain_loss", "gap")


def by_size(
    model_factory: nn.Module | Factory,
    task_of: Callable[[int, int], Task | Callable[[], Task]],
    trial_of: Callable[[str, float, int, int], Trial],
    lrs: Mapping[str, Sequence[float]],
    sizes: Sequence[int],
    seeds: Sequence[int],
    folder: str | Path | None = None,
    choose: int = 1,
    **options: Any,
) -> Iterator[pandas.DataFrame]:
    """For each size of the training set choose each way's learning rate on the first seeds, and run all others at it.

    A way of which no rate ends well on a choosing seed is not run on the others.

    Args:
        model_factory, folder, **options: as for :func:`lora_lab.ablation.ablate`.
        task_of: (size, seed) -> the task; it should draw its examples by the seed, for few examples differ much.
        trial_of: (way, lr, seed, size) -> the trial.
        lrs: the rates that each way tries.
        choose: how many of the seeds choose. One is cheap, and its choice hangs by a thread where rates nearly tie.

    Yields:
        A frame with the columns ``way`` and ``n_train`` for each size and seed, in this order, as it is done.

    Raises:
        ValueError: ``choose`` is out of range, or two ways make the same trial.
    """
    import pandas

    if not 1 <= choose <= len(seeds):
        raise ValueError(f"choose is {choose}, but it must be from 1 to the number of seeds, {len(seeds)}.")
    for size in sizes:
        chosen, tried = lrs, []
        for place, seed in enumerate(seeds):
            trials = {way: [trial_of(way, lr, seed, size) for lr in rates] for way, rates in chosen.items()}
            every = [*chain.from_iterable(trials.values())]
            frame = ablate(model_factory, task_of(size, seed), every, folder, **options)
            identity = {"task": frame["task"].iloc[0], "model": frame["model"].iloc[0]}
            way_of = {trial.bound(**identity).key: way for way, group in trials.items() for trial in group}
            if len(way_of) < sum(len(set(group)) for group in trials.values()):
                raise ValueError("Two ways make the same trial, so their results could not be told apart; name one.")
            frame = frame.assign(way=frame["key"].map(way_of), n_train=size)
            yield frame
            tried.append(frame)
            if place == choose - 1:
                so_far = pandas.concat(tried, ignore_index=True)
                if not (so_far["outcome"] == "done").any():
                    break
                chosen = {row["way"]: (row["lr"],) for row in tuned(measures(so_far)).to_dict("records")}


def measures(frame: pandas.DataFrame) -> pandas.DataFrame:
    """One row for each trial that ended well.

    Columns: those of the trial (``n_train`` if there is one, ``way``, ``lr``, ``seed``); ``best_step``, the evaluation
    of the lowest validation loss, where early stopping stops; ``best_loss`` there; ``learned``, how far below the loss
    before training that is; ``last_loss``; ``overfit``, how far the loss rose again by the last step; ``gap``, the
    generalisation gap then; ``forgotten`` and ``forgotten_at_last``, how much higher the off-domain loss is than before
    training, at the best step and at the last; ``test_loss`` after the last, if the frame has it.

    Raises:
        ValueError: the frame lacks a column, or a trial its evaluation before training.
    """
    import pandas

    if missing := [name for name in _NEEDED if name not in frame]:
        raise ValueError(f"The frame lacks the columns {missing}; give what ablate returns, with a column 'way'.")
    by, rows = _identity(frame), []
    for values, curve in frame[frame["outcome"] == "done"].groupby(by, sort=False):
        curve = curve.sort_values("step")
        first, last = curve.iloc[0], curve.iloc[-1]
        if first["step"] != 0 or curve["step"].duplicated().any():
            raise ValueError(f"The trial {dict(zip(by, values, strict=True))} needs one row for each step, from 0 on.")
        best = curve.loc[curve["validation_loss"].idxmin()]
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
        if "test_loss" in curve:
            row["test_loss"] = last["test_loss"]
        rows.append(dict(zip(by, values, strict=True)) | row)
    return pandas.DataFrame(rows)


def tuned(found: pandas.DataFrame) -> pandas.DataFrame:
    """The rows at each way's best rate: the lowest mean of ``best_loss`` over the seeds that all its rates have.

    A column ``edge`` is added: whether that rate is the "smallest" or "largest" of those that ended well, so that a
    better one may lie beyond, or the "only" one.

    Args:
        found: what :func:`measures` returns.

    Raises:
        ValueError: there are no trials, or the rates of a way have no seed in common.
    """
    import pandas

    if found.empty:
        raise ValueError("There is no trial that ended well, so no rate can be chosen; try lower rates.")
    parts, shared = [], [name for name in _identity(found) if name not in ("lr", "seed")]
    for values, own in found.groupby(shared, sort=False):
        table = own.pivot(index="seed", columns="lr", values="best_loss").dropna()
        if table.empty:
            raise ValueError(f"The rates of {values} have no seed in common; run each of them with one seed at least.")
        rates = [float(rate) for rate in table.columns]
        rate = float(table.mean().idxmin())
        edge = "only" if len(rates) == 1 else {rates[0]: "smallest", rates[-1]: "largest"}.get(rate, "")
        parts.append(own[own["lr"] == rate].assign(edge=edge))
    return pandas.concat(parts, ignore_index=True)


def compared(best: pandas.DataFrame, column: str, reference: str = "full") -> pandas.DataFrame:
    """Each way's mean of a column, and its difference from one way's, paired by seed, with one-sided 95 % bounds.

    Args:
        best: one row for each way and seed (and ``n_train``): of :func:`tuned` or :func:`at_equal_learning`.
        column: what is compared.
        reference: the way that the others are held against; at a size where it has no result, they have no difference.

    Returns:
        Columns ``n_train`` (if there is one), ``way``, ``mean``, ``least``, ``most``, ``seeds``, and for all but the
        reference ``difference``, ``lower`` and ``upper``; bounds need two seeds.

    Raises:
        ValueError: the reference is not there.
    """
    import pandas

    if reference not in set(best["way"]):
        raise ValueError(f"There is no way {reference!r} to compare with; there are {sorted(set(best['way']))}.")
    rows = []
    for size, own in best.groupby("n_train") if "n_train" in best else [(None, best)]:
        table = own.pivot(index="seed", columns="way", values=column)
        for way in dict.fromkeys(own["way"]):
            values = table[way].dropna()
            row = {} if size is None else {"n_train": size}
            row |= {
                "way": way,
                "mean": values.mean(),
                "least": values.min(),
                "most": values.max(),
                "seeds": len(values),
            }
            if way != reference and reference in table:
                paired = (table[way] - table[reference]).dropna().tolist()
                if paired:
                    row |= dict(zip(("difference", "lower", "upper"), t_bounds(paired), strict=True))
            rows.append(row)
    return pandas.DataFrame(rows)


def at_equal_learning(frame: pandas.DataFrame, best: pandas.DataFrame) -> pandas.DataFrame:
    """What each way had forgotten when all had learned as much: a fair price for the same good.

    For each seed the amount is what the way that learned least had learned at its best. Each curve is followed from
    the start to where it first gets there, on straight lines between evaluations. A seed for which some way learned
    nothing has no such amount and is left out.

    Args:
        frame: as for :func:`measures`.
        best: the trials to compare, as :func:`tuned` returns them.

    Returns:
        Columns ``n_train`` (if there is one), ``seed``, ``way``, ``learned`` (the same for all ways), ``forgotten``.
    """
    import pandas

    by, rows = _identity(frame), []
    curves = {values: curve.sort_values("step") for values, curve in frame.groupby(by)}
    for values, own in best.groupby([name for name in by if name not in ("way", "lr")]):
        amount = own["learned"].min()
        if not amount > 0:
            continue
        for trial in own.to_dict("records"):
            curve = curves[tuple(trial[name] for name in by)]
            learned = (curve["validation_loss"].iloc[0] - curve["validation_loss"]).tolist()
            lost = (curve["off_domain_loss"] - curve["off_domain_loss"].iloc[0]).tolist()
            shared = dict(zip([name for name in by if name not in ("way", "lr")], values, strict=True))
            rows.append({**shared, "way": trial["way"], "learned": amount, "forgotten": _where(learned, lost, amount)})
    columns = [*(name for name in by if name not in ("way", "lr")), "way", "learned", "forgotten"]
    return pandas.DataFrame(rows, columns=columns)


def _where(learned: Sequence[float], lost: Sequence[float], amount: float) -> float:
    """What was lost where ``amount`` is first learned."""
    after = next(i for i, value in enumerate(learned) if value >= amount)
    if after == 0:
        return lost[0]
    before = after - 1
    share = (amount - learned[before]) / (learned[after] - learned[before])
    return lost[before] + share * (lost[after] - lost[before])


def _identity(frame: pandas.DataFrame) -> list[str]:
    """The columns that tell trials apart."""
    return [name for name in ("n_train", "way", "lr", "seed") if name in frame]
