"""Verdicts on ranks and on learning rates, from the records "ablation" and "rates".

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

from lora_lab.ablation.compare import smallest_sufficient_rank
from lora_lab.ablation.stats import best_rate, losses_by_rate, powers, ratio_interval, sample_vertices, slope
from lora_lab.studies.claims.compared import bound_together
from lora_lab.studies.claims.deciding import (
    FALLS,
    STANDS,
    Answer,
    Cases,
    Claim,
    above,
    below,
    decide_cases,
    decides,
    within,
)
from lora_lab.studies.claims.measured import MARGIN, MIN_SEEDS, select
from lora_lab.studies.records import Record

FULL = "full"
# The rules, as the setups are named: "r=8, alpha = 32".
SAME_SCALING, FIXED_ALPHA = "alpha = 2r", "alpha = 32"
DATA = {"docs": "SmolLM2-135M", "digits": "not judged, the digits net"}
FACTOR = 1.5  # margin of a rate or of a ratio of rates
TELLS = math.sqrt(15 / 10)  # margin that tells the source's 15 times from its 10
POWER = 0.25  # margin of a power: nearer to -1/2 than to 0 or -1
SMOLLM2_WIDTH = 576
SHORT_RUNS = 100  # steps, below which Schulman et al. state another ratio
# Of the record "ablation", whose best rates suggested the root of the rank.
HINTED_RANKS = (1, 4, 16, 64)


# Ranks


@decides("rank-one-suffices", "loss-flat-from-rank-16", record="ablation", beside="rates")
def rank_is_enough(claim: Claim, record: Record, *wider: Record) -> Answer:
    """Whether a rank is enough beside the largest one, each at its own rate."""
    rank = 1 if claim.id == "rank-one-suffices" else 16
    verdict = smallest_sufficient_rank(record.frame(), MARGIN)
    results = {each.rank: each for each in verdict.ranks}
    largest = max(results)
    if rank not in results or rank == largest:
        return None, f"the record does not compare rank {rank} with a larger one"
    result, seeds = results[rank], len(verdict.seeds)
    if result.lower is None:
        return None, f"rank {rank} is not judged: {result.note}"
    text = f"test loss {result.difference:+.3f} nats ({result.lower:+.3f} to {result.upper:+.3f}) beside rank {largest}"
    text += f", margin {MARGIN:g}, {seeds} seeds"
    for each in (rank, largest):
        tried, best = {row["lr"] for row in record.rows if row["rank"] == each}, results[each].lr
        if best in (min(tried), max(tried)):
            if not any(_is_best_inside(other, record, each, best) for other in wider):
                return None, f"{text}; the rate of rank {each} is at the edge of its grid"
            text += f"; rank {each}'s rate, at the edge of this grid, is the best inside that of the record 'rates'"
    if seeds < MIN_SEEDS:
        return None, f"{text}; fewer than {MIN_SEEDS} seeds"
    return {"enough": True, "too small": False}.get(result.status), text


def _is_best_inside(wider: Record, record: Record, rank: int, rate: float | None) -> bool:
    """Return whether a record "rates" of the same training runs shows a rate as the best inside a wider grid."""
    study, setup = wider.settings["docs"], f"r={rank}, alpha = 2r"
    if setup not in study["setups"]:
        return False
    options = study | study["setups"][setup]
    if any(options[name] != record.settings[name] for name in ("seq_len", "steps", "batch_size")):
        return False
    best = best_rate(losses_by_rate(select(wider, data="docs", setup=setup)))
    return best.tried == rate and not best.edge


# Rates


def best_by_rank(frame: pandas.DataFrame, rule: str) -> dict[int, dict[float, np.ndarray]]:
    """Return rank -> rate -> losses (seeds, blocks) under a rule for alpha, ascending; of one kind of data."""
    setups = frame[frame["setup"].str.endswith(f", {rule}")]
    return {int(cast(float, rank)): losses_by_rate(rows) for rank, rows in setups.groupby("rank")}


def decides_by_rates(*claims: str) -> Callable[[Callable], Callable]:
    """Register a function of the rows of one kind of data; what it answers for the language model decides."""

    def register(answer: Callable[[Claim, pandas.DataFrame], Answer]) -> Callable:
        def decide(claim: Claim, record: Record) -> Answer:
            answers = {data: answer(claim, rows) for data, rows in record.frame().groupby("data")}
            texts = [f"{name}: {answers[data][1]}" for data, name in DATA.items() if data in answers]
            return answers["docs"][0], "; ".join(texts)

        return decides(*claims, record="rates")(decide)

    return register


def _sample_mean_of_ranks(frame: pandas.DataFrame) -> tuple[np.ndarray, str]:
    """Return samples of the mean of log(best rate) over the ranks from 4 on, alpha = 32; and each rank's in words."""
    losses = {rank: of_rank for rank, of_rank in best_by_rank(frame, FIXED_ALPHA).items() if rank >= 4}
    samples = np.mean([sample_vertices(of_rank) for of_rank in losses.values()], axis=0)
    return samples, ", ".join(f"rank {rank} {best_rate(of_rank).tried:g}" for rank, of_rank in losses.items())


@decides_by_rates("lora-rate-ten-times-full", "lora-rate-15-times-full-early")
def times_full(claim: Claim, frame: pandas.DataFrame) -> Answer:
    """The best rates of the ranks from 4 on (their geometric mean), in units of full's, under alpha = 32.

    The second claim is of runs of fewer than 100 steps, the first of longer ones.
    """
    full = losses_by_rate(frame[frame["setup"] == FULL])
    samples, each = _sample_mean_of_ranks(frame)
    at_full = sample_vertices(full)
    lower, upper = ratio_interval(samples, at_full)
    steps = int(frame["steps"].max())
    ratio = math.exp(np.median(samples) - np.median(at_full))
    words = f"{ratio:.1f} times ({lower:.1f} to {upper:.1f}) after {steps} steps; "
    words += f"best rates tried: full {best_rate(full).tried:g}, {each}"
    meant = (steps < SHORT_RUNS) == claim.id.endswith("early")
    return within(lower, upper, claim.stated / TELLS, claim.stated * TELLS) if meant else None, words


@decides_by_rates("best-rate-independent-of-rank")
def independent_of_rank(claim: Claim, frame: pandas.DataFrame) -> Answer:
    """The ratio of the best rates of the ranks from 4 on, as the source states it, under alpha = 32."""
    samples = {rank: sample_vertices(of_rank) for rank, of_rank in best_by_rank(frame, FIXED_ALPHA).items()}
    answer, words = _compare_extremes(samples, claim.stated)
    return answer, f"{words}; over all ranks rate ~ r^p, p = {_power(*slope(samples))}"


def _compare_extremes(samples: Mapping[int, np.ndarray], limit: float) -> Answer:
    """Return whether the best rates of the ranks from 4 on vary by less than a factor.

    They do if the largest of all samples' ratios is below it, and do not if the highest and the lowest of the ranks
    differ by more: noise alone makes the ratio of the extremes larger than 1.
    """
    counted = {rank: of_rank for rank, of_rank in samples.items() if rank >= 4}
    highest, lowest = (extreme(counted, key=lambda rank: np.median(counted[rank])) for extreme in (max, min))
    lower, _ = ratio_interval(counted[highest], counted[lowest])
    every = np.array([*counted.values()])  # (ranks, resamples)
    _, upper = ratio_interval(every.max(axis=0), every.min(axis=0))
    words = f"from rank 4 on the highest best rate is {max(lower, 1.0):.2f} to {upper:.2f} times the lowest (ranks "
    return below(lower, upper, limit), f"{words}{highest} and {lowest})"


@decides("one-rate-for-all-ranks", record="rates", on="the rule for alpha")
def one_rate_for_all(claim: Claim, record: Record) -> Cases:
    """Under either rule for alpha: one rate is fair if the best rates of the ranks hardly differ."""
    for rule in (FIXED_ALPHA, SAME_SCALING):
        losses = best_by_rank(select(record, data="docs"), rule)
        answer, words = _compare_extremes({rank: sample_vertices(each) for rank, each in losses.items()}, claim.stated)
        yield answer, f"{rule}: {words}, best rates tried {min(_tried(losses)):g} to {max(_tried(losses)):g}"


def _tried(losses: Mapping[int, Mapping[float, np.ndarray]]) -> list[float]:
    return [best_rate(of_rank).tried for rank, of_rank in losses.items() if rank >= 4]


@decides("high-rank-wants-high-alpha", record="rates")
def wants_high_alpha(record: Record) -> Answer:
    """The loss of the highest rank with alpha = 2r less that with 32, each at its best rate.

    The bounds hold for all ranks together at which the two rules differ.
    """
    of_rule = [best_by_rank(select(record, data="docs"), rule) for rule in (SAME_SCALING, FIXED_ALPHA)]
    gaps = {}
    for rank in (rank for rank in of_rule[0] if 2 * rank != 32):
        best = [best_rate(losses[rank]) for losses in of_rule]
        if any(each.edge for each in best):
            return None, f"a best rate of rank {rank} is at an edge"
        doubled, fixed = (losses[rank][each.tried] for losses, each in zip(of_rule, best, strict=True))
        gaps[rank] = doubled - fixed
    bounds = {rank: bound_together(gap, len(gaps)) for rank, gap in gaps.items()}
    each = [f"rank {rank} {gaps[rank].mean():+.4f} ({{:+.4f}} to {{:+.4f}})".format(*bounds[rank]) for rank in gaps]
    words = f"validation loss with alpha = 2r less that with 32, each at its best rate: {', '.join(each)}"
    return below(*bounds[max(bounds)], 0), words


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
    """Return (alpha, rank) -> samples of log(best rate), of all LoRA setups under both rules."""
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
    alphas = [alpha for alpha, _ in of_setup]
    words = f"alpha {min(alphas):g} to {max(alphas):g}: rate ~ alpha^p r^q, p = {_power(*of_alpha)}, "
    words += f"q = {_power(*of_rank)}"
    inside = within(*of_alpha[1:], -0.5 - POWER, -0.5 + POWER), within(*of_rank[1:], -POWER, POWER)
    return False if False in inside else None if None in inside else True, words


@decides("rate-law-of-width", record="rates")
def law_of_width(record: Record) -> Answer:
    """The best rates of the ranks from 4 on (their geometric mean) under alpha = 32, beside the law's at this width."""
    law = 5e-4 * (2000 / SMOLLM2_WIDTH) ** 0.781
    samples, each = _sample_mean_of_ranks(record.frame().groupby("data").get_group("docs"))
    lower, upper = ratio_interval(samples, np.zeros_like(samples))
    words = f"{DATA['docs']}: {math.exp(np.median(samples)):.2g} ({lower:.2g} to {upper:.2g}), the law's {law:.2g}"
    return within(lower, upper, law / FACTOR, law * FACTOR), f"{words}; best rates tried: {each}"


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
        lower, upper = bound_together(growth, len(pairs))
        words = f"{low:g} to {high:g} {growth.mean():+.4f} ({lower:+.4f} to {upper:+.4f})"
        cases.append((above(lower, upper), words))
    result = decide_cases(cases, "the rates", always=True)
    words = f"growth of what rank {max(of_rank)} gains on rank 4, in nats, from rate to rate. {result.measured}"
    return {STANDS: True, FALLS: False}.get(result.verdict), words
