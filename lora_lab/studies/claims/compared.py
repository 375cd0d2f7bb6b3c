"""Verdicts from losses that are compared by seed: the records "quality", "head_start", "overfitting" and "ablation".

In "quality" and "head_start" a case is one net, one number of examples or steps, and so on. Many cases are looked at,
of which some would seem decided by chance alone, so the bounds of all cases of a claim hold together with 95 %
certainty (Bonferroni: each at 1 - 0.05 / cases). What the test loss decides counts only if a second measure does not
point the other way: the validation loss, whose pages of the manual are others, or the right answers.

Forgetting is KL(base || tuned) on text that the base wrote. It is compared after equally many steps, and where both
have learned as much, at several shares of what the lesser one learned.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, groupby
from typing import Any, cast

import numpy as np
import pandas
from scipy.stats import t

from lora_lab.ablation import overfitting
from lora_lab.ablation.compare import last_rows
from lora_lab.ablation.stats import (
    CONFIDENCE,
    best_rate,
    block_losses_of,
    losses_by_rate,
    outer_bounds,
    t_bounds,
)
from lora_lab.studies.claims import deciding
from lora_lab.studies.claims.deciding import OPEN, Cases, Result, below, decide_cases, decides
from lora_lab.studies.claims.measured import MARGIN, MIN_SEEDS, PARTS, select
from lora_lab.studies.records import Record


@dataclass(frozen=True)
class Gap:
    """By how much one way of training has a higher test loss than another, in one of several cases.

    Args:
        values: in nats, (seeds, blocks of test examples) or (seeds,).
        beside: the same of a second measure, of which more is worse, too; may be empty.
        at_edge: a learning rate is at the edge of its grid, so that a better one may lie beyond.
        margin: by how much a loss may be higher and yet as good.
        cases: of how many cases the bounds hold together.
        untrained: the second way's mean loss is no lower than a guess's, so that it is no reference.
    """

    values: np.ndarray
    beside: np.ndarray
    at_edge: bool
    margin: float = 0.0
    cases: int = 1
    untrained: bool = False

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """The one-sided bounds of the mean."""
        return bound_together(self.values, self.cases)

    @property
    def gain(self) -> tuple[float, float, float]:
        """The mean gain, which is how much lower the loss of the first way is, and its bounds."""
        lower, upper = self.bounds
        return 0.0 - statistics.fmean(self.values.tolist()), 0.0 - upper, 0.0 - lower

    @property
    def as_good(self) -> bool | None:
        """Whether the first way is as good or better; None if it is undecided.

        That is so if the bounds hold the margin, a rate is at an edge, the second measure points the other way, or the
        second way has learned nothing.
        """
        doubtful = self.at_edge or self.contradicted or self.untrained
        return None if doubtful else below(*self.bounds, self.margin)

    @cached_property
    def contradicted(self) -> bool:
        """Whether the test loss and the second measure point in opposite directions.

        They do if the test loss is as good, but the second measure is surely worse and may exceed the margin; or if
        the test loss is not as good, but the second measure is. The bounds of the second measure are those of this
        case alone: doubt needs less evidence than a decision.
        """
        as_good = below(*self.bounds, self.margin)
        if as_good is None or not self.beside.size:
            return False
        lower, upper = bound_together(self.beside, 1)
        return lower > 0 and upper >= self.margin if as_good else upper < self.margin

    @property
    def mark(self) -> str:
        """The marks that :func:`_explain` explains."""
        return "*" * self.at_edge + "**" * self.contradicted + "***" * self.untrained


def bound_together(values: np.ndarray, cases: int) -> tuple[float, float]:
    """Return one-sided bounds of a mean over seeds, or over seeds and blocks, which hold for so many means together."""
    confidence = 1 - (1 - CONFIDENCE) / cases
    if values.ndim == 2:
        return outer_bounds(values, confidence)
    _, lower, upper = t_bounds(values.tolist(), confidence)
    return lower, upper


def _bound_all(every: Mapping[Any, Gap]) -> dict[Any, Gap]:
    """Return the cases with bounds that hold for all of them together."""
    return {case: replace(gap, cases=len(every)) for case, gap in every.items()}


def _explain(result: Result, what: str, shown: Collection[Gap], doubt: str) -> Result:
    """Return the result with what was compared, and what the marks of its cases mean."""
    notes = ". *: a rate is at the edge of its grid" if any(gap.at_edge for gap in shown) else ""
    notes += f". **: {doubt}" if any(gap.contradicted for gap in shown) else ""
    notes += ". ***: from scratch it is no better than a guess" if any(gap.untrained for gap in shown) else ""
    return replace(result, measured=f"{what}. {result.measured}{notes}")


# LoRA beside full fine-tuning, each at its own learning rate

TOKENS_A_STEP = 512  # of the record "quality", at most: 4 x 64, or 8 x 64 on a GPU


def gaps(record: Record, reference: str = "full", seeds: int = MIN_SEEDS) -> dict[tuple[int, int], Gap]:
    """Return LoRA's gap to a reference in test loss by (rank, steps), beside it that in validation loss.

    Args:
        record: of one model and text.
        reference: the setup's name up to its number of steps.
        seeds: that judge, at least.

    Raises:
        ValueError: a case has fewer seeds with a result for both.
    """
    judged = select(record, stage="judging", outcome="done").sort_values("seed")
    every = {}
    for (rank, steps), lora in judged.groupby(["rank", "steps"]):  # full fine-tuning has no rank
        full = judged[judged["setup"] == f"{reference}, {steps:g} steps"]
        if lora["seed"].tolist() != full["seed"].tolist() or len(lora) < seeds:
            setup = lora["setup"].iloc[0]
            raise ValueError(f"{setup}: fewer than {seeds} seeds have a result for it and for {reference!r}")
        test, validation = (block_losses(lora, part) - block_losses(full, part) for part in ("test", "validation"))
        at_edge = bool(pandas.concat([lora, full])["edge"].fillna("").any())
        every[int(cast(float, rank)), int(cast(float, steps))] = Gap(test, validation, at_edge, MARGIN)
    return _bound_all(every)


def block_losses(rows: pandas.DataFrame, part: str) -> np.ndarray:
    """Return the losses of blocks of a part, a row of the table each, (seeds, blocks)."""
    return np.array([block_losses_of(row, part) for row in rows.to_dict("records")])  # (seeds, blocks)


@decides("lora-equals-full-fine-tuning", record="quality", beside="rates")
def as_good_as_full(record: Record, *others: Record) -> Result:
    """Each rank after each number of steps, where "as good" allows for the margin; beside it what "rates" has."""
    every = gaps(record)
    result = _explain_gaps(decide_cases(list_gaps(every), ("the rank", "the number of steps")), every)
    beside = "".join(f". {_at_fixed_alpha(other)}" for other in others)
    return replace(result, measured=f"{result.measured}{beside}")


def _at_fixed_alpha(rates: Record) -> str:
    """Return what LoRA of the highest rank loses with alpha = 32 on the machine of a record "rates", in words."""
    docs = select(rates, data="docs")
    setup = f"r={docs['rank'].max():g}, alpha = 32"
    lora, full = (min(losses_by_rate(docs[docs["setup"] == name]).values(), key=np.mean) for name in (setup, "full"))
    lower, upper = bound_together(lora - full, 1)
    words = f"{(lora - full).mean():+.3f} ({lower:+.3f} to {upper:+.3f})"
    return f"Beside it, not judged, on the {rates.device}, validation, {setup}: {words}"


@decides("low-ranks-run-out-of-capacity", record="quality")
def runs_out_of_capacity(record: Record) -> Result:
    """A rank follows, and then falls behind, if it is as good after few steps and not after more.

    One that is behind after the fewest steps, when it trains more numbers than it has read tokens, is not behind for
    lack of capacity. A rank that is as good after each number of steps that decides shows neither.
    """
    every, of_ranks, cases = gaps(record), defaultdict(list), []
    trained = record.frame().groupby("rank")["trainable_parameters"].first()
    for as_good, words, rank, steps in list_gaps(every):
        of_ranks[rank].append((as_good, words, steps))
    for rank, of_rank in of_ranks.items():  # from few steps to many
        turns = {(early[0], late[0]) for early, late in combinations(of_rank, 2)}
        first, _, steps = of_rank[0]
        behind_with_room = first is False and trained[rank] > steps * TOKENS_A_STEP
        turned = False if (False, True) in turns or behind_with_room else (True, False) in turns or None
        words = ", ".join(words for _, words, _ in of_rank)
        room = f"trains {trained[rank]:,.0f} numbers, and has read at most {steps * TOKENS_A_STEP:,} tokens at first"
        cases.append((turned, f"{words} ({room})"))
    return _explain_gaps(decide_cases(cases, "the rank"), every)


def list_gaps(every: Mapping[tuple[int, int], Gap]) -> Cases:
    """Yield whether LoRA is as good in each case, the case in words, its rank and its number of steps."""
    for (rank, steps), gap in every.items():
        lower, upper = gap.bounds
        words = f"{gap.values.mean():+.3f} ({lower:+.3f} to {upper:+.3f}; validation {gap.beside.mean():+.3f})"
        words += ", better" * (upper < 0 and gap.as_good is True)
        yield gap.as_good, f"rank {rank}, {steps} steps{gap.mark}: {words}", rank, steps


def _explain_gaps(result: Result, every: Mapping[Any, Gap]) -> Result:
    """Return the result with what was compared, on how many seeds and with which margin."""
    seeds = " or ".join(map(str, sorted({len(gap.values) for gap in every.values()})))
    text = f"LoRA's test loss minus full fine-tuning's in nats, {seeds} seeds, margin {MARGIN:g}"
    return _explain(result, text, every.values(), "the validation loss points the other way")


TRIAL = ["rank", "alpha", "lr", "seed", "steps"]  # what tells trials of LoRA apart


@decides("same-loss-on-another-machine", record="rates", beside="quality", on="the learning rate")
def repeats_elsewhere(record: Record, *others: Record) -> Cases:
    """The validation losses of trials of LoRA that both records have, on the examples of both; by the rate.

    A rate counts as high from the best one of its rank on.
    """
    ours, best = select(record, data="docs"), {}
    ours = ours[ours["setup"].str.endswith("alpha = 2r")]
    for rank, of_rank in ours.groupby("rank"):
        best[rank] = best_rate(losses_by_rate(of_rank)).tried
    for other in others:
        both = ours.merge(other.frame(), on=TRIAL, suffixes=("_here", "_there")).dropna(subset="rank")
        differences = {True: [], False: []}  # whether the rate is high
        for row in both.to_dict("records"):
            here, there = (json.loads(row[f"score_validation_{where}"]) for where in ("here", "there"))
            size = min(len(here), len(there))
            difference = abs(statistics.fmean(there[:size]) - statistics.fmean(here[:size]))
            differences[row["lr"] >= best[row["rank"]]].append(difference)
        for high, words in ((False, "below the best rate"), (True, "from the best rate on")):
            if found := differences[high]:
                same = sum(difference <= MARGIN for difference in found)
                yield same == len(found), f"{words} {same} of {len(found)} are, the largest difference {max(found):.3f}"


# Fine-tuning beside training from scratch

# As the setups, the language model's data and the numbers of pictures are named in the record.
FINE_TUNED, FROM_SCRATCH, LONGER = "fine-tuned", "from scratch", "from scratch, longer"
DOCS, SIZES = "docs", (10, 40, 160, 500)
FEW = 240  # examples at most, of "few examples"
GUESS = {"moved": math.log(10), "inverted": math.log(10), "other digits": math.log(5)}  # a guess's loss, by classes
CONDITIONS = ("the change of the data", "the net", "the number of examples")
Case = tuple[str, str, int]  # of these


def gains(record: Record, reference: str = FROM_SCRATCH) -> dict[Case, Gap]:
    """Return the cases of a record in its order; beside the test loss is the share of wrong answers, if any are given.

    Args:
        record: of the kind "head_start".
        reference: a way of training from scratch, which fine-tuning is compared with. Cases without it are left out.

    Raises:
        ValueError: a case has fewer than three seeds with a result for both.
    """
    every = {}
    judged = select(record, stage="judging", outcome="done")
    for (data, model, n_train), case in judged.groupby(["data", "model", "n_train"], sort=False):
        case = case[case["setup"].isin([FINE_TUNED, reference])]
        if reference not in set(case["setup"]):
            continue
        loss, right = (
            case.pivot(index="seed", columns="setup", values=name) for name in ("test_loss", "score_accuracy")
        )
        higher = (loss[FINE_TUNED] - loss[reference]).dropna()
        if len(higher) < MIN_SEEDS:
            raise ValueError(f"{data}, {model}, {n_train} examples: fewer than {MIN_SEEDS} seeds")
        wrong = (right[reference] - right[FINE_TUNED])[higher.index].dropna()
        at_edge = bool(case["edge"].fillna("").any())
        untrained = bool(loss[reference].mean() >= GUESS.get(str(data), math.inf))
        every[data, model, n_train] = Gap(higher.to_numpy(float), wrong.to_numpy(float), at_edge, untrained=untrained)
    return _bound_all(every)


def table(every: Mapping[Case, Gap]) -> pandas.DataFrame:
    """Return the cases as rows, with bounds that hold for all of them together.

    Columns: ``data``, ``model``, ``n_train``, ``at_edge``, ``answer`` (:attr:`Gap.as_good`; None if it is undecided),
    the gain in nats (``mean``, ``lower``, ``upper``) and in percentage points of right answers (``points``,
    ``points_lower``, ``points_upper``; NaN where nothing is answered).
    """
    rows = []
    for case, gap in every.items():
        points = [100 * each for each in replace(gap, values=gap.beside).gain] if gap.beside.size else [math.nan] * 3
        rows.append([*case, gap.at_edge, gap.as_good, *gap.gain, *points])
    columns = "data model n_train at_edge answer mean lower upper points points_lower points_upper"
    return pandas.DataFrame(rows, columns=columns.split()).astype({"answer": object})


def _describe(cases: Cases) -> Cases:
    """Yield the answers in words, cases that differ in their examples alone together where their answers are equal."""
    key = lambda case: (*case[2:4], str(case[0]))  # noqa: E731
    for (data, model, _), group in groupby(sorted(cases, key=key), key):
        answers, shown, _, _, sizes = zip(*group, strict=True)
        numbers = ", ".join(f"{size:,}{gap.mark}" for size, gap in zip(sizes, shown, strict=True))
        means, lowest, highest = zip(*(gap.gain for gap in shown), strict=True)
        mean = " to ".join(dict.fromkeys(f"{extreme(means):+.2f}" for extreme in (min, max)))
        bounds = f"(bounds {min(lowest):+.2f} to {max(highest):+.2f})"
        yield answers[0], f"{data}, {model}, {numbers} examples: {mean} nats {bounds}"


def _decide_gains(cases: Sequence[tuple[Any, ...]]) -> Result:
    """Return the verdict from cases: the answer, the gap and its conditions."""
    on = deciding.find_turning_conditions(cases, CONDITIONS)
    result, shown = decide_cases(_describe(cases), on), [gap for _, gap, *_ in cases]
    return _explain(result, "gain of fine-tuning in test loss", shown, "the right answers differ the other way")


@decides("fine-tuning-beats-scratch", record="head_start")
def beats_scratch(record: Record) -> Result:
    """Test losses after equally many steps, where there are few examples."""
    every = _bound_all({case: gap for case, gap in gains(record).items() if case[2] <= FEW})
    return _decide_gains([(gap.as_good, gap, *case) for case, gap in every.items()])


def _on_digits(record: Record) -> dict[Case, Gap]:
    return _bound_all({case: gap for case, gap in gains(record).items() if case[0] != DOCS})


@decides("head-start-shrinks-with-data", record="head_start")
def shrinks_with_data(record: Record) -> Result:
    """The gain with the fewest examples minus that with the most, in the nets and changes that gain with the fewest.

    Gains are those in test loss, by which the rates were chosen.
    """
    every, (fewest, *_, most) = _on_digits(record), SIZES
    few = _bound_all({case[:2]: gap for case, gap in every.items() if case[2] == fewest and not gap.contradicted})
    shrunk, cases = {}, []
    for name, gap in few.items():
        many = every[(*name, most)]
        if gap.as_good:
            shrunk[name] = Gap(gap.values - many.values, np.array([]), many.at_edge)
    for (data, model), gap in _bound_all(shrunk).items():
        words = "{:+.2f} nats (bounds {:+.2f} to {:+.2f})".format(*gap.gain)
        cases.append((gap.as_good, f"{data}, {model}: {words}"))
    result = decide_cases(cases, "the net and the change of the data")
    if len(cases) == 1:
        result = Result(OPEN, f"{result.measured} (a single case shows no rule)")
    text = f"gain with {fewest} examples minus gain with {most}, only where a gain with {fewest} is decided"
    without = "; ".join(map(", ".join, sorted({case[:2] for case in every} - {*shrunk})))
    left_out = f". no gain decided with {fewest}: {without}" if without else ""
    return replace(result, measured=f"{text}. {result.measured}{left_out}")


@decides("fine-tuning-needs-fewer-steps", record="head_start")
def fewer_steps(record: Record) -> Result:
    """It holds if fine-tuning is better than a longer training from scratch, and fails if it is worse than one as long.

    Steps of pre-training are not counted: they are paid once.
    """
    as_long, longer = _on_digits(record), gains(record, LONGER)
    cases = []
    for case in as_long | longer:
        short, long = (replace(every[case], cases=len(as_long) + len(longer)) for every in (as_long, longer))
        better, worse = long.as_good is True, short.as_good is False
        decisive = short if not better and (worse or short.contradicted) else long
        cases.append((better or (False if worse else None), decisive, *case))
    result = _decide_gains(cases)
    compared = "yes: lower than from scratch after as many steps as pre-training and fine-tuning have together"
    compared += "; no: higher than from scratch after as many as fine-tuning alone; not decided: neither"
    return replace(result, measured=f"{result.measured}. ({compared})")


# Overfitting

LESS = {"less": True, "more": False}  # what the tables of lora_lab.ablation.overfitting say, of LoRA
Doubts = Mapping[tuple[int, str], str]  # size, LoRA setup -> why it may not be judged, or ""


def select_inner_rates(record: Record) -> tuple[pandas.DataFrame, Doubts]:
    """Return the curves at each method's best rate; and which pairs of a LoRA setup and full fine-tuning may be judged.

    A pair may be judged if neither LoRA's rate nor full fine-tuning's is at the edge of its grid, with enough seeds.
    Seeds that chose a rate are left out, and so is a cosine, which contains no shorter run.
    """
    curves = select(record, stage="judging", schedule="constant")
    edge = {(int(row["n_train"]), str(row["setup"])): str(row["edge"]) for row in curves.to_dict("records")}
    seeds = curves.groupby(["n_train", "setup"])["seed"].nunique()
    doubts = {}
    for size, setup in sorted(key for key in edge if key[1].startswith("LoRA")):
        at = [name for name in ("full", setup) if edge[size, name]]
        few = min(seeds[size, setup], seeds[size, "full"]) < MIN_SEEDS
        why = f"the rate of {' and '.join(at)} is at an edge" if at else f"fewer than {MIN_SEEDS} seeds" if few else ""
        doubts[size, setup] = why and f"{size} examples, {setup}: {why}"
    return curves, doubts


def _list_verdicts(table: pandas.DataFrame, column: str, doubts: Doubts) -> tuple[list[str], str]:
    """Return the verdicts of the pairs that may be judged, or else of all, and where it is less, more or undecided."""
    judged, words, texts = [pair for pair, doubt in doubts.items() if not doubt], [], []
    for size, setup in judged or doubts:
        rows = table[(table["n_train"] == size) & (table["setup"] == setup)]
        words += rows["verdict"].tolist()
        parts = [
            f"{'undecided' if word == OPEN else word} at {', '.join(f'{value:g}' for value in of_word[column])}"
            for word, of_word in rows.groupby("verdict", sort=False)
        ]
        texts.append(f"{size} examples, {setup}: {'; '.join(parts)}")
    return words, ". ".join(texts)


@decides("lora-overfits-less", record="overfitting")
def overfits_less(record: Record) -> Result:
    """The rise of the validation loss since its lowest, LoRA's beside full fine-tuning's, at every stopping point.

    A method that is merely slower has risen less after equally many steps. So the validation loss where both fit the
    training set equally well counts, too.
    """
    curves, doubts = select_inner_rates(record)
    rises = overfitting.by_stopping_point(curves)
    rises = rises[(rises["lower"] != 0) | (rises["upper"] != 0)]  # otherwise no loss has risen yet
    at_stops, text = _list_verdicts(rises, "step", doubts)
    at_equal_fit, beside = _list_at_equal_fit(curves, doubts)
    text = f"rise of LoRA's validation loss beside full fine-tuning's, if both stop after a step: {text}. {beside}"
    on = "whether steps or training losses are equal"
    if "more" in at_stops or "less" in at_equal_fit:
        on = f"the stopping point, rank and size, and {on}"
    return _decide_verdicts([*at_stops, *at_equal_fit], text, on, doubts)


@decides("better-at-equal-fit", record="overfitting")
def better_at_equal_fit(record: Record) -> Result:
    """The validation loss where both methods fit the training set equally well."""
    curves, doubts = select_inner_rates(record)
    return _decide_verdicts(*_list_at_equal_fit(curves, doubts), "the training loss", doubts)


def _list_at_equal_fit(curves: pandas.DataFrame, doubts: Doubts) -> tuple[list[str], str]:
    """Return the verdicts where both methods have equal training losses, and the same in words."""
    fits = overfitting.by_training_loss(curves, [3.0, 2.0, 1.5, 1.0, 0.6])
    fits.loc[fits["seeds"] < MIN_SEEDS, "verdict"] = OPEN
    verdicts, text = _list_verdicts(fits, "train_loss", doubts)
    words = "LoRA's validation loss beside full fine-tuning's, where both have a training loss in nats"
    return verdicts, f"{words}: {text}"


def _decide_verdicts(verdicts: Sequence[str], text: str, on: str, doubts: Doubts) -> Result:
    """Return the result from the verdicts of comparisons, in words; it is open if no pair may be judged."""
    if all(doubts.values()):
        return Result(OPEN, f"{'; '.join(doubts.values())}. At these rates: {text}")
    result = decide_cases([(LESS.get(verdict), "") for verdict in verdicts], on)
    left_out = [f"not judged: {doubt}" for doubt in doubts.values() if doubt]
    return replace(result, measured="; ".join([text, *left_out]))


# Forgetting

SHARES = (0.5, 0.8, 0.95)  # of what the lesser one learned


@decides("learns-less-forgets-less", record="overfitting")
def forgets_less(record: Record) -> Result:
    """What LoRA has forgotten less what full fine-tuning has, after equally many steps, wherever training stops."""
    curves, doubts = select_inner_rates(record)
    table = overfitting.by_stopping_point(curves, "forgotten_at_last")
    table["verdict"] = _judge_together(table)
    verdicts, text = _list_verdicts(table, "step", doubts)
    words = f"KL from the base beside full fine-tuning's, if both stop after a step: {text}"
    return _decide_verdicts(verdicts, words, "the number of examples, with which the rates differ", doubts)


@decides("forgets-less-at-equal-learning", record="overfitting")
def forgets_less_at_equal_learning(record: Record) -> Result:
    """The same where both have learned as much: a case is decided if all shares say the same."""
    curves, doubts = select_inner_rates(record)
    tables = [overfitting.compare_over_rates(curves, "forgotten", share=share) for share in SHARES]
    tables = [table.set_index(["n_train", "setup"]) for table in tables]
    judged, cases = pandas.DataFrame([_judge_together(table) for table in tables]), []
    for pair in [pair for pair, doubt in doubts.items() if not doubt]:
        words = set(judged[pair])
        bounds = [[float(cast(float, table.loc[pair, end])) for end in ("lower", "upper")] for table in tables]
        ends = " ".join(f"{np.mean(each):+.3f} ({each[0]:+.3f} to {each[1]:+.3f})" for each in bounds)
        answer = LESS.get(words.pop()) if len(words) == 1 else None
        cases.append((answer, f"{pair[0]} examples, {pair[1]}: {ends}"))
    result = decide_cases(cases, "the rank and the number of examples")
    at = ", ".join(f"{100 * share:g}" for share in SHARES)
    words = f"KL from the base, LoRA's less full fine-tuning's, with {len(record.settings['judging'])} seeds"
    words += f", at {at} % of equal learning, with the bounds of each alone"
    return replace(result, measured="; ".join([f"{words}. {result.measured}", *filter(None, doubts.values())]))


def _judge_together(table: pandas.DataFrame) -> pandas.Series:
    """Return "less", "more" or "open" by bounds that hold for all rows together, from the bounds of single rows."""
    freedom = table["seeds"].min() - 1 if "seeds" in table else MIN_SEEDS - 1
    single, joint = (t.ppf(each, freedom) for each in (CONFIDENCE, 1 - (1 - CONFIDENCE) / len(table)))
    middle, half = (table["lower"] + table["upper"]) / 2, (table["upper"] - table["lower"]) / 2 * joint / single
    words = np.where(middle + half < 0, "less", np.where(middle - half > 0, "more", OPEN))
    return pandas.Series(words, index=table.index)


@decides("off-domain-rise-is-the-methods", record="ablation", on="the rank", always=True)
def off_domain_by_rate(record: Record) -> Cases:
    """Off-domain losses of one rank at two rates whose mean validation losses differ by at most the margin.

    The bounds hold for all such pairs together.
    """
    frame = last_rows(record.frame())
    pairs = []
    for rank, trials in frame[frame["outcome"] == "done"].groupby("rank"):
        parts = [trials.pivot(index="seed", columns="lr", values=f"{part}_loss").dropna() for part in PARTS]
        for low, high in combinations(parts[0].columns, 2):
            tie, risen = ((of_part[high] - of_part[low]).tolist() for of_part in parts)
            if abs(statistics.fmean(tie)) <= MARGIN and len(risen) >= MIN_SEEDS:
                pairs.append((f"rank {rank:g} at {low:g} and {high:g}", tie, risen))
    for words, tie, risen in pairs:
        lower, upper = bound_together(np.array(risen), len(pairs))
        same = lower <= 0 <= upper
        too_wide = same and max(-lower, upper) > MARGIN
        words += ": validation {:+.3f} ({:+.3f} to {:+.3f})".format(*t_bounds(tie))
        words += f", off-domain {statistics.fmean(risen):+.3f} ({lower:+.3f} to {upper:+.3f})"
        yield None if too_wide else same, words
