"""Verdicts from the record ``head_start``: fine-tuning against training from scratch, by net, change and examples.

A case is one net, one change of the data and one number of examples. What decides it is the difference of the test
losses over the seeds that were judged, unless the right answers differ the other way. So many cases are looked at that
some would seem decided by chance alone, so of all cases of a claim the lower bounds hold together with 95 % certainty,
and so do the upper ones (Bonferroni: each at 1 - 0.05 / cases).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, cast

from lora_lab.ablation.stats import CONFIDENCE, t_bounds
from lora_lab.studies.claims.deciding import (
    OPEN,
    Claim,
    Result,
    decide_cases,
    decides,
    excludes_zero,
    find_turning_conditions,
)
from lora_lab.studies.claims.measured import MIN_SEEDS
from lora_lab.studies.records import Record

if TYPE_CHECKING:
    import pandas

# As the setups, the language model's data and the numbers of pictures are named in the record.
FINE_TUNED, FROM_SCRATCH, LONGER = "fine-tuned", "from scratch", "from scratch, longer"
DOCS, SIZES = "docs", (10, 40, 160, 500)
FEW = 240  # examples at most, of "few examples"


@dataclass(frozen=True)
class Gain:
    """By how much fine-tuning has the lower test loss than training from scratch, for each seed, in nats.

    Args:
        data, model, n_train: the case.
        values: one for each seed.
        at_edge: a learning rate is at the edge of its grid, so that a better one may lie beyond.
        right: by how much the share of right answers is higher, for each seed; empty where nothing is answered.
    """

    data: str
    model: str
    n_train: int
    values: Sequence[float]
    at_edge: bool
    right: Sequence[float] = ()

    @property
    def conditions(self) -> dict[str, str | int]:
        """What the cases differ in, as for :func:`lora_lab.studies.claims.deciding.find_turning_conditions`."""
        return {"the change of the data": self.data, "the net": self.model, "the number of examples": self.n_train}

    def bounds(self, cases: int) -> tuple[float, float, float]:
        """The mean, and its one-sided bounds that hold for so many cases together."""
        return _bounds(self.values, cases)

    def answer(self, cases: int) -> bool | None:
        """Whether fine-tuning is better; None if it is undecided.

        That is so if the bounds hold zero or a rate is at an edge, or if the one that has the lower loss answers worse.
        """
        _, lower, upper = self.bounds(cases)
        return None if self.at_edge or self.contradicted(cases) else excludes_zero(lower, upper)

    def contradicted(self, cases: int) -> bool:
        """Whether the one that has the lower loss answers worse, with bounds clear of zero.

        The bounds of the answers are those of this case alone: doubt needs less evidence than a decision.
        """
        (_, lower, upper), (_, worst, best) = self.bounds(cases), _bounds(self.right or [0.0, 0.0], 1)
        return (lower > 0 and best < 0) or (upper < 0 and worst > 0)

    def marks(self, cases: int) -> str:
        """The marks of the case, as in ``NOTES``."""
        return "*" * self.at_edge + "**" * self.contradicted(cases)


def _bounds(values: Sequence[float], cases: int) -> tuple[float, float, float]:
    return cast(tuple[float, float, float], t_bounds(values, 1 - (1 - CONFIDENCE) / cases))  # never of a single seed


def gains(record: Record, reference: str = FROM_SCRATCH) -> list[Gain]:
    """The cases of a record in its order.

    Args:
        record: of the kind "head_start".
        reference: a way of training from scratch, which fine-tuning is compared with. Cases without it are left out.

    Raises:
        ValueError: a case has fewer than three seeds with a result for both.
    """
    frame = record.frame()
    judged = frame[(frame["stage"] == "judging") & (frame["outcome"] == "done")]
    every = []
    for (data, model, n_train), case in judged.groupby(["data", "model", "n_train"], sort=False):
        if reference not in set(case["setup"]):
            continue
        losses = case.pivot(index="seed", columns="setup", values="test_loss")[[FINE_TUNED, reference]].dropna()
        if len(losses) < MIN_SEEDS:
            raise ValueError(f"{data}, {model}, {n_train} examples: fewer than {MIN_SEEDS} seeds")
        right = case.pivot(index="seed", columns="setup", values="score_accuracy").loc[losses.index]
        right = (right[FINE_TUNED] - right[reference]).dropna().tolist()
        edges = case[case["setup"].isin([FINE_TUNED, reference])]["edge"]
        values = (losses[reference] - losses[FINE_TUNED]).tolist()
        every.append(Gain(str(data), str(model), cast(int, n_train), values, bool(edges.fillna("").any()), right))
    return every


def table(every: Sequence[Gain]) -> pandas.DataFrame:
    """The cases as rows, with bounds that hold for all of them together.

    Columns: ``data``, ``model``, ``n_train``, ``at_edge``, ``answer`` (:meth:`Gain.answer`; None if it is undecided),
    the gain in nats (``mean``, ``lower``, ``upper``) and in percentage points of right answers (``points``,
    ``points_lower``, ``points_upper``; NaN where nothing is answered).
    """
    import pandas

    rows = []
    for gain in every:
        case = {"data": gain.data, "model": gain.model, "n_train": gain.n_train, "at_edge": gain.at_edge}
        case |= {"answer": gain.answer(len(every))}
        case |= dict(zip(("mean", "lower", "upper"), gain.bounds(len(every)), strict=True))
        points = [100 * each for each in _bounds(gain.right, len(every))] if gain.right else [math.nan] * 3
        rows.append(case | dict(zip(("points", "points_lower", "points_upper"), points, strict=True)))
    return pandas.DataFrame(rows).astype({"answer": object})


def _describe(answered: Iterable[tuple[Gain, bool | None]], cases: int) -> Iterator[tuple[bool | None, str]]:
    """The answers, cases that differ in their examples alone together where their answers are equal."""
    key = lambda pair: (pair[0].data, pair[0].model, str(pair[1]))  # noqa: E731
    for (data, model, _), pairs in groupby(sorted(answered, key=key), key):
        gained, answers = zip(*pairs, strict=True)
        sizes = ", ".join(f"{gain.n_train:,}{gain.marks(cases)}" for gain in gained)
        each = [gain.bounds(cases) for gain in gained]
        lower, upper = min(low for _, low, _ in each), max(high for *_, high in each)
        means = " to ".join(dict.fromkeys(f"{extreme(mean for mean, *_ in each):+.2f}" for extreme in (min, max)))
        yield answers[0], f"{data}, {model}, {sizes} examples: {means} nats (bounds {lower:+.2f} to {upper:+.2f})"


NOTES = {"*": "a rate is at the edge of its grid", "**": "the right answers differ the other way"}


def _decide_gains(every: Sequence[Gain], always: bool = False) -> Result:
    answered = [(gain, gain.answer(len(every))) for gain in every]
    on = find_turning_conditions((answer, gain.conditions) for gain, answer in answered)
    return _explain(decide_cases(_describe(answered, len(every)), on, always), every, len(every))


def _explain(result: Result, shown: Sequence[Gain], cases: int) -> Result:
    """The result with what was compared, and what the marks of its cases mean."""
    marks = {gain.marks(cases) for gain in shown}
    notes = "".join(f". {mark}: {note}" for mark, note in NOTES.items() if mark in marks)
    return replace(result, measured=f"gain of fine-tuning in test loss. {result.measured}{notes}")


@decides("fine-tuning-beats-scratch", record="head_start")
def beats_scratch(claim: Claim, record: Record) -> Result:
    """Test losses after equally many steps, where there are few examples."""
    return _decide_gains([gain for gain in gains(record) if gain.n_train <= FEW])


@decides("never-train-from-scratch", record="head_start")
def scratch_never_pays(claim: Claim, record: Record) -> Result:
    """Test losses after equally many steps, for all numbers of examples: one case is enough to refute it."""
    return _decide_gains(gains(record), always=True)


@decides("head-start-shrinks-with-data", record="head_start")
def shrinks_with_data(claim: Claim, record: Record) -> Result:
    """The gain with the fewest examples minus that with the most, in the nets and changes that gain with the fewest.

    Gains are those in test loss, by which the rates were chosen.
    """
    of_size = {(gain.data, gain.model, gain.n_train): gain for gain in gains(record) if gain.data != DOCS}
    names = dict.fromkeys((data, model) for data, model, _ in of_size)
    pairs = [
        (of_size[(*name, SIZES[0])], of_size[(*name, SIZES[-1])])
        for name in names
        if (*name, SIZES[0]) in of_size and not of_size[(*name, SIZES[0])].contradicted(len(of_size))
    ]
    begun = [(few, many) for few, many in pairs if few.answer(len(pairs))]
    cases = []
    for few, many in begun:
        shrunk = [a - b for a, b in zip(few.values, many.values, strict=True)]
        difference = replace(few, values=shrunk, right=(), at_edge=many.at_edge)
        mean, lower, upper = difference.bounds(len(begun))
        words = f"{few.data}, {few.model}: {mean:+.2f} nats (bounds {lower:+.2f} to {upper:+.2f})"
        cases.append((difference.answer(len(begun)), words))
    result = decide_cases(cases, "the net and the change of the data")
    if len(cases) == 1:
        result = Result(OPEN, f"{result.measured} (a single case shows no rule)")
    text = f"gain with {SIZES[0]} examples minus gain with {SIZES[-1]}, only where a gain with {SIZES[0]} is decided"
    without = sorted({*names} - {(few.data, few.model) for few, _ in begun})
    left_out = f". no gain decided with {SIZES[0]}: {'; '.join(map(', '.join, without))}" if without else ""
    return Result(result.verdict, f"{text}. {result.measured}{left_out}", result.on)


@decides("fine-tuning-needs-fewer-steps", record="head_start")
def fewer_steps(claim: Claim, record: Record) -> Result:
    """It holds if fine-tuning is better than a longer training from scratch, and fails if it is worse than one as long.

    Steps of pre-training are not counted: they are paid once.
    """
    every, longer = [gain for gain in gains(record) if gain.data != DOCS], gains(record, LONGER)
    cases = len(every) + len(longer)
    answered = []
    for short, long in zip(every, longer, strict=True):
        better, worse = long.answer(cases) is True, short.answer(cases) is False
        decisive = short if not better and (worse or short.contradicted(cases)) else long
        answered.append((decisive, better or (False if worse else None)))
    on = find_turning_conditions((answer, gain.conditions) for gain, answer in answered)
    result = _explain(decide_cases(_describe(answered, cases), on), [gain for gain, _ in answered], cases)
    compared = "yes: lower than from scratch after as many steps as pre-training and fine-tuning have together"
    compared += "; no: higher than from scratch after as many as fine-tuning alone; not decided: neither"
    return replace(result, measured=f"{result.measured}. ({compared})")
