"""Verdicts on ranks, and on learning rates from made-up records whose best rates are planted."""

import dataclasses
import json
import math

import numpy as np
import pytest

from lora_lab import claims, records
from lora_lab.ablation.compare import rates_around
from tests.studies.claims import changed, decide, unchanged, where

# Ranks


def rank_1_inside(rows):
    """Adds a rate beyond the best of rank 1, with higher losses, so that the best is at no edge any more."""
    new = [row | {"lr": 0.016} for row in rows if (row["rank"], row["lr"]) == (1, 0.008)]
    for row in new:
        row |= {name: row[name] and row[name] + 1 for name in ("validation_loss", "test_loss")}
    return rows + new


def rank_1_as_good(rows):
    at_end = [row for row in rows if row["step"] == row["steps"]]
    reference = {row["seed"]: row["test_loss"] for row in at_end if (row["rank"], row["lr"]) == (64, 0.001)}
    is_rank_1 = lambda row: row["rank"] == 1 and row["step"]  # noqa: E731
    return where(is_rank_1, test_loss=lambda row: reference[row["seed"]])(rank_1_inside(rows))


def two_seeds(rows):
    return [row for row in rows if row["seed"] < 2]


ONE, SIXTEEN = "rank-one-suffices", "loss-flat-from-rank-16"
ENOUGH = [  # claim, change, verdict, words
    (ONE, unchanged, "open", "the rate of rank 1 is at the edge of its grid"),
    (ONE, rank_1_inside, "falls", ""),
    (ONE, rank_1_as_good, "stands", ""),
    (SIXTEEN, unchanged, "open", "margin 0.01, 3 seeds"),  # the bounds hold the margin
    (SIXTEEN, two_seeds, "open", "fewer than 3 seeds"),
]


@pytest.mark.parametrize(("claim_id", "change", "verdict", "words"), ENOUGH)
def test_whether_a_rank_is_enough(claim_id, change, verdict, words):
    result = changed(claim_id, change)
    assert (result.verdict, words in result.measured) == (verdict, True), result.measured


def test_a_record_of_wider_grids_shows_that_the_rate_of_rank_one_is_inside():
    (wider,) = records.load_all("rates").values()
    result = changed(ONE, unchanged, wider)
    assert result.verdict == "falls"
    assert "rank 1's rate, at the edge of this grid, is the best inside that of the record 'rates'" in result.measured
    assert claims.verdict(ONE).result.shown_by.count("record ") == 2
    longer = {**wider.settings["docs"]["setups"], "r=1, alpha = 2r": {"steps": 240, "batch_size": 4}}
    other = {**wider.settings, "docs": {**wider.settings["docs"], "setups": longer}}
    assert changed(ONE, unchanged, dataclasses.replace(wider, settings=other)).verdict == "open"


# Rates

RANKS = (1, 2, 4, 8, 16, 32, 64)
SEEDS, BLOCKS = 3, 8


def rows(
    full=1e-4,
    fixed=lambda rank: 1e-3,
    same=lambda rank: 4e-3 / rank**0.5,
    gain=lambda rate: 0.0,
    noise=0.002,
    steps=60,
    more_alpha=0.0,
):
    """Rows of the record: best rates by rank under alpha = 32 and alpha = 2r, and what a doubling of the rank gains.

    ``more_alpha`` is what ranks above 16 gain by alpha = 2r.
    """
    random = np.random.default_rng(0)
    hard = random.normal(0, 0.3, BLOCKS)  # examples differ, for all trials alike
    setups = {"full": (None, None, full, lambda rate: 0.0)}
    for rank in RANKS:
        less = lambda rate, rank=rank: math.log2(rank) * gain(rate)  # noqa: E731
        setups[f"r={rank}, alpha = 32"] = rank, 32, fixed(rank), less
        by_alpha = lambda rate, rank=rank: math.log2(rank) * gain(rate) + more_alpha * (rank > 16)  # noqa: E731
        setups[f"r={rank}, alpha = 2r"] = rank, 2 * rank, same(rank), by_alpha
    for data in ("digits", "docs"):
        for setup, (rank, alpha, best, less) in setups.items():
            for rate in rates_around(best * 1.3):
                for seed in range(SEEDS):
                    loss = 3 + 0.05 * math.log(rate / best) ** 2 - less(rate) + noise * random.normal()
                    blocks = loss + hard + noise * random.normal(size=BLOCKS)
                    yield {
                        **{"data": data, "stage": "choosing", "setup": setup, "rank": rank, "alpha": alpha, "lr": rate},
                        **{"seed": seed, "steps": steps, "step": steps, "outcome": "done", "reason": None},
                        "score_validation": json.dumps(blocks.tolist()),
                        "validation_loss": blocks.mean(),
                    }


TEN, FIFTEEN, LEVEL = "lora-rate-ten-times-full", "lora-rate-15-times-full-early", "best-rate-independent-of-rank"
ROOT, OF_ALPHA = "rate-falls-as-root-of-rank", "rate-falls-as-root-of-alpha"
WIDTH, GAINS = "rate-law-of-width", "rank-gains-at-high-rates"
ONE_RATE, WANTS = "one-rate-for-all-ranks", "high-rank-wants-high-alpha"
HINTED = (1, 4, 16, 64)
LAW = {"fixed": lambda rank: 1e-3, "same": lambda rank: 1e-3 * (32 / (2 * rank)) ** 0.5}
PLANTED = [  # claim, what is planted, verdict, words
    (TEN, {"fixed": lambda rank: 1e-3 if rank >= 4 else 3e-3, "steps": 100}, "stands", "SmolLM2-135M: 10."),
    (TEN, {"full": 3e-5, "steps": 100}, "falls", ""),
    (TEN, {"full": 1e-3, "steps": 100}, "falls", ""),
    (TEN, {"full": 1e-3 / 11.6, "noise": 0.005, "steps": 100}, "open", ""),  # the margin tells it from 15
    (TEN, {"steps": 60}, "open", "after 60 steps"),  # runs too short for this claim
    (FIFTEEN, {"full": 1e-3 / 15}, "stands", ""),
    (FIFTEEN, {"full": 1e-3 / 40}, "falls", ""),
    (FIFTEEN, {"full": 1e-3 / 10}, "falls", ""),
    (FIFTEEN, {"full": 1e-3 / 15, "steps": 100}, "open", ""),  # and too long for this
    (LEVEL, {}, "stands", ""),
    (LEVEL, {"fixed": lambda rank: 1e-3 if rank > 2 else 8e-3}, "stands", ""),  # the claim begins at rank 4
    (LEVEL, {"fixed": lambda rank: 8e-3 / rank}, "falls", "times the lowest (ranks 4 and 64)"),
    (LEVEL, {"fixed": lambda rank: 8e-3 / rank}, "falls", "p = -1.0"),
    (LEVEL, {"fixed": lambda rank: 1e-3 * rank**0.25}, "open", ""),
    (ONE_RATE, {}, "depends", "yes: alpha = 32: from rank 4 on the highest best rate is 1.0"),
    (ONE_RATE, {"same": lambda rank: 1e-3}, "stands", ""),
    (ONE_RATE, {"fixed": lambda rank: 8e-3 / rank}, "falls", ""),
    (ONE_RATE, {"fixed": lambda rank: 1e-3 * rank**0.25, "same": lambda rank: 1e-3}, "open", ""),
    (WANTS, {}, "open", ""),
    (WANTS, {"more_alpha": 0.05}, "stands", "rank 64 -0.05"),
    (WANTS, {"more_alpha": -0.05}, "falls", ""),
    (WANTS, {"more_alpha": 0.05, "noise": 0.1}, "open", ""),
    (ROOT, {}, "stands", ""),
    (ROOT, {"same": lambda rank: 4e-3}, "falls", ""),
    (ROOT, {"same": lambda rank: 4e-3 / rank}, "falls", ""),
    (ROOT, {"noise": 0.3}, "open", ""),
    # The ranks that suggested the root do not judge it.
    (ROOT, {"same": lambda rank: 4e-3 / rank**0.5 if rank in HINTED else 1e-3}, "falls", "over ranks 2, 8, 32, which"),
    (ROOT, {"same": lambda rank: 1e-3 if rank in HINTED else 4e-3 / rank**0.5}, "stands", ""),
    (OF_ALPHA, LAW, "stands", "alpha 2 to 128: rate ~ alpha^p r^q, p = -0.49"),
    (OF_ALPHA, LAW | {"fixed": lambda rank: 1e-3 * rank**0.5}, "falls", ""),
    (OF_ALPHA, LAW | {"same": lambda rank: 1e-3 * 32 / (2 * rank)}, "falls", ""),
    (OF_ALPHA, LAW | {"noise": 0.3}, "open", ""),
    (WIDTH, {"fixed": lambda rank: 1.32e-3}, "stands", ""),
    (WIDTH, {"fixed": lambda rank: 3e-3}, "falls", ""),
    (WIDTH, {"fixed": lambda rank: 1.95e-3, "noise": 0.02}, "open", ""),
    (GAINS, {"gain": lambda rate: 10 * rate, "noise": 0.001}, "stands", ""),
    (GAINS, {"gain": lambda rate: 0.01 - 5 * rate, "noise": 0.001}, "falls", ""),
    (GAINS, {"gain": lambda rate: 5 * rate, "noise": 0.05}, "open", ""),
    (GAINS, {"gain": lambda rate: 10 * rate, "noise": 0.003}, "open", ""),  # each pair of rates alone would be decided
    (GAINS, {"gain": lambda rate: rate, "noise": 1e-4}, "stands", "+0.001"),  # of the sign alone
    (GAINS, {"gain": lambda rate: 0.01 * (rate > 2e-3), "noise": 0.001}, "open", ""),  # else nothing is shown
    (GAINS, {"gain": lambda rate: 5 * rate * (rate < 4e-3), "noise": 0.001}, "falls", ""),  # up and down
]


@pytest.mark.parametrize(("claim_id", "planted", "verdict", "words"), PLANTED)
def test_best_rates(claim_id, planted, verdict, words):
    result = decide(claim_id, "rates", rows(**planted))
    assert (result.verdict, words in result.measured) == (verdict, True), result.measured


@pytest.mark.parametrize("claim_id", [LEVEL, ROOT, WIDTH, GAINS, ONE_RATE, WANTS])
def test_without_the_language_model_nothing_is_decided(claim_id):
    assert decide(claim_id, "rates", [row for row in rows() if row["data"] == "digits"]).verdict == "open"
