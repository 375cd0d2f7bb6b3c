"""Verdicts on learning rates, from the record "rates": best rates by rank, under two rules for alpha.

A best rate is the vertex of a parabola, and what compares best rates has the interval of a bootstrap over seeds and
blocks of examples (:mod:`lora_lab.ablation.stats`). Those of the language model are judged; the digits net is
stated beside it. Each claim has a margin: it stands if the interval lies within the margin around what is claimed,
falls if it lies outside, and is open otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import cast

import numpy as np
import pandas

from lora_lab.ablation.stats import (
    CONFIDENCE,
    best_rate,
    losses_by_rate,
    outer_bounds,
    powers,
    ratio_interval,
    sample_vertices,
    slope,
)
from lora_lab.studies.claims.deciding import FALLS, STANDS, Answer, Claim, decide_cases, decides, excludes_zero, within
from lora_lab.studies.records import Record

FULL = "full"
SAME_SCALING, FIXED_ALPHA = "alpha = 2r", "alpha = 32"  # the rules, as the setups are named: "r=8, alpha = 32"
DATA = {"docs": "SmolLM2-135M", "digits": "the digits net"}
FACTOR = 1.5  # margin of a rate or of a ratio of rates
POWER = 0.25  # margin of a power: nearer to -1/2 than to 0 or -1
SMOLLM2_WIDTH = 576
SHORT_RUNS = 100  # steps, below which Schulman et al. state another ratio
HINTED_RANKS = (1, 4, 16, 64)  # of the record "ablation", whose best rates suggested the root of the rank


def best_by_rank(frame: pandas.DataFrame, rule: str) -> dict[int, dict[float, np.ndarray]]:
    """rank -> rate -> losses (seeds, blocks) under a rule for alpha, ascending; of one kind of data."""
    setups = frame[frame["setup"].str.endswith(f", {rule}")]
    return {int(cast(float, rank)): losses_by_rate(rows) for rank, rows in setups.groupby("rank")}


def _group_by_data(record: Record) -> dict[str, pandas.DataFrame]:
    """data -> its rows: the language model first, which is judged."""
    frame = record.frame()
    return {data: frame[frame["data"] == data] for data in DATA if (frame["data"] == data).any()}


def decides_by_rates(*claims: str) -> Callable[[Callable], Callable]:
    """Register a function that answers claims from the rows of one kind of data, with words, as what decides them."""

    def register(answer: Callable[[Claim, pandas.DataFrame], Answer]) -> Callable:
        def decide(claim: Claim, record: Record) -> Answer:
            return _decide_on_language_model(
                {data: answer(claim, frame) for data, frame in _group_by_data(record).items()}
            )

        for claim_id in claims:
            decides(claim_id, record="rates")(decide)
        return answer

    return register


def _decide_on_language_model(answers: Mapping[str, Answer]) -> Answer:
    """Return whether a claim holds, from the answers by data, of which the language model's counts."""
    if "docs" not in answers:
        return None, "the record has no language model"
    texts = (f"{'' if data == 'docs' else 'not judged, '}{DATA[data]}: {words}" for data, (_, words) in answers.items())
    return answers["docs"][0], "; ".join(texts)


def _mean_of_ranks(frame: pandas.DataFrame) -> tuple[np.ndarray, str]:
    """Samples of the mean of log(best rate) over the ranks from 4 on, under alpha = 32; and each rank's in words."""
    losses = {rank: of_rank for rank, of_rank in best_by_rank(frame, FIXED_ALPHA).items() if rank >= 4}
    samples = np.mean([sample_vertices(of_rank) for of_rank in losses.values()], axis=0)
    return samples, ", ".join(f"rank {rank} {best_rate(of_rank).tried:g}" for rank, of_rank in losses.items())


@decides_by_rates("lora-rate-ten-times-full", "lora-rate-15-times-full-early")
def times_full(claim: Claim, frame: pandas.DataFrame) -> Answer:
    """The best rates of the ranks from 4 on (their geometric mean), in units of full's, under alpha = 32.

    The second claim is of runs of fewer than 100 steps, the first of longer ones.
    """
    in_short_runs = claim.id.endswith("early")
    full = losses_by_rate(frame[frame["setup"] == FULL])
    samples, each = _mean_of_ranks(frame)
    at_full = sample_vertices(full)
    lower, upper = ratio_interval(samples, at_full)
    steps = int(frame["steps"].max())
    words = (
        f"{math.exp(np.median(samples) - np.median(at_full)):.1f} times ({lower:.1f} to {upper:.1f}) after {steps} "
        f"steps; best rates tried: full {best_rate(full).tried:g}, {each}"
    )
    meant = (steps < SHORT_RUNS) == in_short_runs
    answer = within(lower, upper, claim.stated / FACTOR, claim.stated * FACTOR) if meant else None
    return answer, words


@decides_by_rates("best-rate-independent-of-rank")
def independent_of_rank(claim: Claim, frame: pandas.DataFrame) -> Answer:
    """The ratio of the best rates of the ranks from 4 on, as the source states it, under alpha = 32.

    It stands if the largest of all samples' ratios is below the claimed factor, and falls if the highest and the lowest
    of the ranks differ by more: noise alone makes the ratio of the extremes larger than 1.
    """
    losses = best_by_rank(frame, FIXED_ALPHA)
    samples = {rank: sample_vertices(of_rank) for rank, of_rank in losses.items()}
    counted = {rank: samples[rank] for rank in samples if rank >= 4}
    medians = {rank: float(np.median(of_rank)) for rank, of_rank in counted.items()}
    highest, lowest = max(medians, key=medians.__getitem__), min(medians, key=medians.__getitem__)
    lower, _ = ratio_interval(counted[highest], counted[lowest])
    every = np.array([*counted.values()])  # (ranks, resamples)
    _, upper = ratio_interval(every.max(axis=0), every.min(axis=0))
    answer = True if upper < claim.stated else False if lower > claim.stated else None
    words = (
        f"from rank 4 on the highest best rate is {max(lower, 1.0):.2f} to {upper:.2f} times the lowest (ranks "
        f"{highest} and {lowest}); over all ranks rate ~ r^p, p = {_power(*slope(samples))}"
    )
    return answer, words


@decides_by_rates("rate-falls-as-root-of-rank")
def falls_as_root(claim: Claim, frame: pandas.DataFrame) -> Answer:
    """The power p in rate ~ r^p under alpha = 2r, beside -1/2, over the ranks that did not suggest it."""
    of_rank = {rank: sample_vertices(losses) for rank, losses in best_by_rank(frame, SAME_SCALING).items()}
    new = {rank: samples for rank, samples in of_rank.items() if rank not in HINTED_RANKS}
    power, judged = slope(of_rank), slope(new)
    if math.isnan(power[0]):
        return None, "the best rates of some ranks are at an edge"
    words = f"rate ~ r^p, p = {_power(*judged)} over ranks {', '.join(map(str, new))}, which are judged; "
    return within(*judged[1:], -0.5 - POWER, -0.5 + POWER), f"{words}{_power(*power)} over all ranks"


def _power(power: float, lower: float, upper: float) -> str:
    ends = ("unbounded" if math.isinf(end) else f"{end:+.2f}" for end in (lower, upper))
    return f"{power:+.2f} ({' to '.join(ends)})"


def by_alpha_and_rank(frame: pandas.DataFrame) -> dict[tuple[float, float], np.ndarray]:
    """(alpha, rank) -> samples of log(best rate), of all LoRA setups under both rules."""
    return {
        (2.0 * rank if rule == SAME_SCALING else 32.0, float(rank)): sample_vertices(losses)
        for rule in (SAME_SCALING, FIXED_ALPHA)
        for rank, losses in best_by_rank(frame, rule).items()
    }


@decides_by_rates("rate-falls-as-root-of-alpha")
def falls_as_root_of_alpha(claim: Claim, frame: pandas.DataFrame) -> Answer:
    """The powers p and q in rate ~ alpha^p r^q over both rules, beside -1/2 and 0."""
    of_setup = by_alpha_and_rank(frame)
    of_alpha, of_rank = powers(of_setup)
    if math.isnan(of_alpha[0]):
        return None, "the best rates of some setups are at an edge"
    inside = [
        within(lower, upper, stated - POWER, stated + POWER)
        for (_, lower, upper), stated in ((of_alpha, -0.5), (of_rank, 0.0))
    ]
    alphas = [alpha for alpha, _ in of_setup]
    words = f"alpha {min(alphas):g} to {max(alphas):g}: rate ~ alpha^p r^q, p = {_power(*of_alpha)}, "
    words += f"q = {_power(*of_rank)}"
    return False if False in inside else None if None in inside else True, words


@decides("rate-law-of-width", record="rates")
def law_of_width(claim: Claim, record: Record) -> Answer:
    """The best rates of the ranks from 4 on (their geometric mean) under alpha = 32, beside the law's at this width."""
    law = 5e-4 * (2000 / SMOLLM2_WIDTH) ** 0.781
    samples, each = _mean_of_ranks(_group_by_data(record)["docs"])
    lower, upper = ratio_interval(samples, np.zeros_like(samples))
    answer = within(lower, upper, law / FACTOR, law * FACTOR)
    mean = f"{math.exp(np.median(samples)):.2g} ({lower:.2g} to {upper:.2g})"
    words = f"{mean}, the law's {law:.2g}; best rates tried: {each}"
    return _decide_on_language_model({"docs": (answer, words)})


@decides_by_rates("rank-gains-at-high-rates")
def gains_at_high_rates(claim: Claim, frame: pandas.DataFrame) -> Answer:
    """What the largest rank gains on rank 4 at each rate that both tried, compared with the next lower one, alpha = 32.

    The claim is of the sign, and the bounds hold for all these pairs of rates together.
    """
    of_rank = best_by_rank(frame, FIXED_ALPHA)
    small, large = of_rank[4], of_rank[max(of_rank)]
    pairs = [*pairwise(sorted(set(small) & set(large)))]
    cases = []
    for low, high in pairs:
        growth = (small[high] - large[high]) - (small[low] - large[low])  # (seeds, blocks)
        lower, upper = outer_bounds(growth, 1 - (1 - CONFIDENCE) / len(pairs))
        words = f"{low:g} to {high:g} {growth.mean():+.4f} ({lower:+.4f} to {upper:+.4f})"
        cases.append((excludes_zero(lower, upper), words))
    result = decide_cases(cases, "the rates", always=True)
    words = f"growth of what rank {max(of_rank)} gains on rank 4, in nats, from rate to rate. {result.measured}"
    return {STANDS: True, FALLS: False}.get(result.verdict), words
