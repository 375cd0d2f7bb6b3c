"""Verdicts from the record ``quality``: LoRA beside full fine-tuning, each at its own learning rate.

A case is one rank after one number of steps. What decides it is LoRA's test loss minus full fine-tuning's. Of all cases
the lower bounds hold together with 95 % certainty, and so do the upper ones (Bonferroni: each at 1 - 0.05 / cases).

Test and validation examples are from different pages of the manual, and a difference on one can be another on the
other. So what the test loss decides counts only if the validation loss does not point the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas

from lora_lab.ablation.stats import CONFIDENCE, losses_by_seed, outer_bounds
from lora_lab.studies.claims.deciding import Claim, Result, decide_cases, decides, find_turning_conditions
from lora_lab.studies.claims.measured import MARGIN, MIN_SEEDS
from lora_lab.studies.records import Record

FULL = "full"


@dataclass(frozen=True)
class Gap:
    """By how much LoRA's test loss is above full fine-tuning's after equally many steps.

    Args:
        rank, steps: the case.
        values: in nats per token, (seeds, blocks of test examples).
        validation: the same on the validation examples.
        at_edge: a learning rate is at the edge of its grid, so that a better one may lie beyond.
    """

    rank: int
    steps: int
    values: np.ndarray
    validation: np.ndarray
    at_edge: bool

    def is_as_good(self, cases: int) -> bool | None:
        """Whether LoRA is as good as full fine-tuning or better, within the margin; None if it is undecided.

        That is so if the bounds hold the margin, a rate is at an edge, or the validation loss points the other way.
        """
        return None if self.at_edge or self.contradicted(cases) else _within_margin(*self.bounds(cases))

    def contradicted(self, cases: int) -> bool:
        """Whether the validation loss points the other way than what the test loss decides.

        Where LoRA is as good on the test examples, it is worse there, and not surely within the margin; where it is
        behind, it is as good there. The bounds of the validation loss are those of this case alone: doubt needs less
        evidence than a decision.
        """
        answer, (lower, upper) = _within_margin(*self.bounds(cases)), outer_bounds(self.validation)
        return lower > 0 and upper >= MARGIN if answer else answer is False and upper < MARGIN

    def bounds(self, cases: int) -> tuple[float, float]:
        """The one-sided bounds that hold for so many cases together."""
        return outer_bounds(self.values, 1 - (1 - CONFIDENCE) / cases)

    def in_words(self, cases: int) -> str:
        """The case, the mean and its bounds, and the mean of the validation loss; marks as in ``NOTES``."""
        lower, upper = self.bounds(cases)
        marks = "*" * self.at_edge + "**" * self.contradicted(cases)
        means = f"{self.values.mean():+.3f} ({lower:+.3f} to {upper:+.3f}; validation {self.validation.mean():+.3f})"
        return f"rank {self.rank}, {self.steps} steps{marks}: {means}"


NOTES = {"*": "a rate is at the edge of its grid", "**": "the validation loss points the other way"}


def _within_margin(lower: float, upper: float) -> bool | None:
    return True if upper < MARGIN else False if lower > MARGIN else None


def gaps(record: Record) -> list[Gap]:
    """The cases of a record, by rank and steps.

    Raises:
        ValueError: a case has fewer than three seeds with a result for both methods.
    """
    frame = record.frame()
    judged = frame[(frame["stage"] == "judging") & (frame["outcome"] == "done")].sort_values("seed")
    cases = []
    for steps, of_steps in judged.groupby("steps"):
        by_setup = {str(setup): rows for setup, rows in of_steps.groupby("setup")}
        full = by_setup.pop(f"{FULL}, {steps:g} steps")
        for setup, rows in by_setup.items():
            if rows["seed"].tolist() != full["seed"].tolist() or len(rows) < MIN_SEEDS:
                raise ValueError(f"{setup}: fewer than {MIN_SEEDS} seeds have a result for it and for full fine-tuning")
            at_edge = bool(rows["edge"].fillna("").any() or full["edge"].fillna("").any())
            rank, budget = int(rows["rank"].tolist()[0]), int(rows["steps"].tolist()[0])
            both = pandas.concat([full.assign(setup=FULL), rows])
            of_part = (losses_by_seed(both, "setup", part) for part in ("test", "validation"))
            on_test, on_validation = (losses[setup] - losses[FULL] for losses in of_part)
            cases.append(Gap(rank, budget, on_test, on_validation, at_edge))
    return sorted(cases, key=lambda gap: (gap.rank, gap.steps))


@decides("lora-equals-full-fine-tuning", record="quality")
def as_good_as_full(claim: Claim, record: Record) -> Result:
    """Each rank after each number of steps, where "as good" allows for the margin."""
    every = gaps(record)
    answers = [gap.is_as_good(len(every)) for gap in every]
    conditions = [{"the rank": gap.rank, "the number of steps": gap.steps} for gap in every]
    cases = [(answer, gap.in_words(len(every))) for answer, gap in zip(answers, every, strict=True)]
    return _explain(decide_cases(cases, find_turning_conditions(zip(answers, conditions, strict=True))), every)


@decides("low-ranks-run-out-of-capacity", record="quality")
def runs_out_of_capacity(claim: Claim, record: Record) -> Result:
    """A rank follows, and then falls behind, if it is as good after few steps and not after more.

    A rank that is behind, or as good, after each number of steps that decides shows neither.
    """
    every = gaps(record)
    cases = []
    for rank in dict.fromkeys(gap.rank for gap in every):
        of_rank = [gap for gap in every if gap.rank == rank]
        answers = [gap.is_as_good(len(every)) for gap in of_rank]
        turns = {(early, late) for early, late in combinations(answers, 2) if None not in (early, late)}
        answer = False if (False, True) in turns else True if (True, False) in turns else None
        cases.append((answer, ", ".join(gap.in_words(len(every)) for gap in of_rank)))
    return _explain(decide_cases(cases, "the rank"), every)


def _explain(result: Result, every: Sequence[Gap]) -> Result:
    marked = {"*": any(gap.at_edge for gap in every), "**": any(gap.contradicted(len(every)) for gap in every)}
    notes = "".join(f". {mark}: {note}" for mark, note in NOTES.items() if marked[mark])
    seeds = sorted({len(gap.values) for gap in every})
    text = "LoRA's test loss minus full fine-tuning's in nats, "
    text += f"{' or '.join(map(str, seeds))} seeds, margin {MARGIN:g}"
    return Result(result.verdict, f"{text}. {result.measured}{notes}", result.on)
