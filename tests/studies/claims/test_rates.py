"""Verdicts on learning rates, from made-up records whose best rates are planted."""

import dataclasses
import json
import math

import numpy as np
import pytest

from lora_lab import claims, records
from lora_lab.ablation.compare import rates_around

RANKS = (1, 2, 4, 8, 16, 32, 64)
SEEDS, BLOCKS = 3, 8


@pytest.fixture
def verdict(tmp_path):
    """(claim's id, planted best rates, ...) -> its verdict from a record with those."""

    def verdict(claim_id, **planted):
        write([*rows(**planted)], tmp_path)
        return claims.verdict(claim_id, tmp_path).result

    return verdict


def write(rows, folder):
    """A record of these rows, whose provenance is that of another."""
    (shipped, *_) = records.load_all("ablation").values()
    records.write(dataclasses.replace(shipped, what="rates", rows=rows), folder)


def rows(
    full=1e-4, fixed=lambda rank: 1e-3, same=lambda rank: 4e-3 / rank**0.5, gain=lambda rate: 0.0, noise=0.002, steps=60
):
    """Rows of the record: best rates by rank under alpha = 32 and alpha = 2r, and what a doubling of the rank gains."""
    random = np.random.default_rng(0)
    hard = random.normal(0, 0.3, BLOCKS)  # examples differ, for all trials alike
    setups = {"full": (None, None, full, lambda rate: 0.0)}
    for rank in RANKS:
        less = lambda rate, rank=rank: math.log2(rank) * gain(rate)  # noqa: E731
        setups[f"r={rank}, alpha = 32"] = rank, 32, fixed(rank), less
        setups[f"r={rank}, alpha = 2r"] = rank, 2 * rank, same(rank), less
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


def test_ten_times_full(verdict):
    result = verdict("lora-rate-ten-times-full", fixed=lambda rank: 1e-3 if rank >= 4 else 3e-3, steps=100)
    assert result.verdict == "stands"
    assert "SmolLM2-135M: 10." in result.measured
    assert verdict("lora-rate-ten-times-full", full=3e-5, steps=100).verdict == "falls"
    assert verdict("lora-rate-ten-times-full", full=1e-3, steps=100).verdict == "falls"
    assert verdict("lora-rate-ten-times-full", full=6e-5, noise=0.02, steps=100).verdict == "open"


def test_fifteen_times_full_in_short_runs_and_neither_claim_is_judged_by_runs_of_the_other_length(verdict):
    assert verdict("lora-rate-15-times-full-early", full=1e-3 / 15).verdict == "stands"
    assert verdict("lora-rate-15-times-full-early", full=1e-3 / 40).verdict == "falls"
    assert verdict("lora-rate-15-times-full-early", full=1e-3 / 15, steps=100).verdict == "open"
    assert verdict("lora-rate-ten-times-full", steps=60).verdict == "open"
    assert "after 60 steps" in verdict("lora-rate-ten-times-full", steps=60).measured


def test_a_rate_that_does_not_depend_on_the_rank(verdict):
    assert verdict("best-rate-independent-of-rank").verdict == "stands"
    # The claim begins at rank 4.
    assert verdict("best-rate-independent-of-rank", fixed=lambda rank: 1e-3 if rank > 2 else 8e-3).verdict == "stands"
    falling = verdict("best-rate-independent-of-rank", fixed=lambda rank: 8e-3 / rank)
    assert falling.verdict == "falls"
    assert "times the lowest (ranks 4 and 64)" in falling.measured
    assert "p = -1.0" in falling.measured
    assert verdict("best-rate-independent-of-rank", fixed=lambda rank: 1e-3 * rank**0.25).verdict == "open"


def test_a_rate_that_falls_as_the_root_of_the_rank(verdict):
    assert verdict("rate-falls-as-root-of-rank").verdict == "stands"
    assert verdict("rate-falls-as-root-of-rank", same=lambda rank: 4e-3).verdict == "falls"
    assert verdict("rate-falls-as-root-of-rank", same=lambda rank: 4e-3 / rank).verdict == "falls"
    assert verdict("rate-falls-as-root-of-rank", noise=0.3).verdict == "open"


def test_the_ranks_that_suggested_the_root_do_not_judge_it(verdict):
    hinted = {1, 4, 16, 64}
    result = verdict("rate-falls-as-root-of-rank", same=lambda rank: 4e-3 / rank**0.5 if rank in hinted else 1e-3)
    assert result.verdict == "falls"
    assert "over ranks 2, 8, 32, which are judged" in result.measured
    judged = lambda rank: 1e-3 if rank in hinted else 4e-3 / rank**0.5  # noqa: E731
    assert verdict("rate-falls-as-root-of-rank", same=judged).verdict == "stands"


def test_a_rate_that_falls_as_the_root_of_alpha(verdict):
    law = {"fixed": lambda rank: 1e-3, "same": lambda rank: 1e-3 * (32 / (2 * rank)) ** 0.5}
    stands = verdict("rate-falls-as-root-of-alpha", **law)
    assert stands.verdict == "stands"
    assert "alpha 2 to 128: rate ~ alpha^p r^q, p = -0.49" in stands.measured
    by_rank = {"fixed": lambda rank: 1e-3 * rank**0.5, "same": lambda rank: 1e-3 * (32 / (2 * rank)) ** 0.5}
    assert verdict("rate-falls-as-root-of-alpha", **by_rank).verdict == "falls"
    first_step = {"fixed": lambda rank: 1e-3, "same": lambda rank: 1e-3 * 32 / (2 * rank)}
    assert verdict("rate-falls-as-root-of-alpha", **first_step).verdict == "falls"
    assert verdict("rate-falls-as-root-of-alpha", noise=0.3, **law).verdict == "open"


def test_the_law_of_width(verdict):
    assert verdict("rate-law-of-width", fixed=lambda rank: 1.32e-3).verdict == "stands"
    assert verdict("rate-law-of-width", fixed=lambda rank: 3e-3).verdict == "falls"
    assert verdict("rate-law-of-width", fixed=lambda rank: 1.95e-3, noise=0.02).verdict == "open"


def test_a_higher_rank_gains_more_at_high_rates(verdict):
    shape = {"fixed": lambda rank: 1e-3, "noise": 0.001}
    assert verdict("rank-gains-at-high-rates", gain=lambda rate: 10 * rate, **shape).verdict == "stands"
    assert verdict("rank-gains-at-high-rates", gain=lambda rate: 0.01 - 5 * rate, **shape).verdict == "falls"
    assert verdict("rank-gains-at-high-rates", gain=lambda rate: 5 * rate, noise=0.05).verdict == "open"
    single = verdict("rank-gains-at-high-rates", gain=lambda rate: 10 * rate, **shape | {"noise": 0.003})
    assert single.verdict == "open"  # each pair of rates alone would be decided
    little = verdict("rank-gains-at-high-rates", gain=lambda rate: rate, **shape | {"noise": 1e-4})
    assert (little.verdict, "+0.001" in little.measured) == ("stands", True)  # of the sign alone
    at_the_end = verdict("rank-gains-at-high-rates", gain=lambda rate: 0.01 * (rate > 2e-3), **shape)
    assert at_the_end.verdict == "open"  # between the other rates nothing is shown
    up_and_down = verdict("rank-gains-at-high-rates", gain=lambda rate: 5 * rate * (rate < 4e-3), **shape)
    assert up_and_down.verdict == "falls"


def test_without_the_language_model_nothing_is_decided(tmp_path):
    small = [row for row in rows() if row["data"] == "digits"]
    write(small, tmp_path)
    for claim_id in ("best-rate-independent-of-rank", "rate-falls-as-root-of-rank", "rank-gains-at-high-rates"):
        assert claims.verdict(claim_id, tmp_path).result.verdict == "open"
