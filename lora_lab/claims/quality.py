"""Verdicts from the record ``quality``: LoRA beside full fine-tuning, each at its own learning rate.

A case is one rank after one number of steps. What decides it is LoRA's test loss minus full fine-tuning's. Of all cases
the lower bounds hold together with 95 % certainty, and so do the upper ones (Bonferroni: each at 1 - 0.05 / cases).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lora_lab.ablation.blocks import block_losses_of
from lora_lab.ablation.stats import CONFIDENCE, outer_bounds
from lora_lab.claims.deciding import Result, decides, over_cases, turned_by
from lora_lab.claims.facts import Claim
from lora_lab.claims.measured import MARGIN, MIN_SEEDS
from lora_lab.records import Record

FULL = "full"


@dataclass(frozen=True)
class Gap:
    """By how much LoRA's test loss is above full fine-tuning's after equally many steps.

    Args:
        rank, steps: the case.
        values: in nats per token, (seeds, blocks of test examples).
        at_edge: a learning rate is at the edge of its grid, so that a better one may lie beyond.
    """

    rank: int
    steps: int
    values: np.ndarray
    at_edge: bool

    def is_as_good(self, cases: int) -> bool | None:
        """Whether LoRA is as good as full fine-tuning or better, within the margin; None if it is undecided."""
        lower, upper = self.bounds(cases)
        return None if self.at_edge else True if upper < MARGIN else False if lower > MARGIN else None

    def bounds(self, cases: int) -> tuple[float, float]:
        """The one-sided bounds that hold for so many cases together."""
        return outer_bounds(self.values, 1 - (1 - CONFIDENCE) / cases)

    def in_words(self, cases: int) -> str:
        """The case, the mean and its bounds; a star where a rate is at an edge."""
        lower, upper = self.bounds(cases)
        mark = "*" * self.at_edge
        return f"rank {self.rank}, {self.steps} steps{mark}: {self.values.mean():+.3f} ({lower:+.3f} to {upper:+.3f})"


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
            lora, reference = (
                np.array([block_losses_of(row, "test") for row in each.to_dict("records")]) for each in (rows, full)
            )
            at_edge = bool(rows["edge"].fillna("").any() or full["edge"].fillna("").any())
            rank, budget = int(rows["rank"].tolist()[0]), int(rows["steps"].tolist()[0])
            cases.append(Gap(rank, budget, lora - reference, at_edge))
    return sorted(cases, key=lambda gap: (gap.rank, gap.steps))


@decides("lora-equals-full-fine-tuning", record="quality")
def as_good_as_full(claim: Claim, record: Record) -> Result:
    """Each rank after each number of steps, where "as good" allows for the margin."""
    every = gaps(record)
    answers = [gap.is_as_good(len(every)) for gap in every]
    conditions = [{"the rank": gap.rank, "the number of steps": gap.steps} for gap in every]
    cases = [(answer, gap.in_words(len(every))) for answer, gap in zip(answers, every, strict=True)]
    return _explained(over_cases(cases, turned_by(zip(answers, conditions, strict=True))), every)


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
    return _explained(over_cases(cases, "the rank"), every)


def _explained(result: Result, every: Sequence[Gap]) -> Result:
    edges = ". *: a rate is at the edge of its grid" * any(gap.at_edge for gap in every)
    seeds = sorted({len(gap.values) for gap in every})
    text = "LoRA's test loss minus full fine-tuning's in nats, "
    text += f"{' or '.join(map(str, seeds))} seeds, margin {MARGIN:g}"
    return Result(result.verdict, f"{text}. {result.measured}{edges}", result.on)
