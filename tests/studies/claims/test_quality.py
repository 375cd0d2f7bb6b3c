"""Verdicts from a record of quality with planted differences, and how they turn."""

import numpy as np
import pytest

from lora_lab import claims, records
from lora_lab.studies.claims.quality import Gap, gaps
from tests.helpers import COMMIT

RANKS, STEPS = (1, 8, 64), (60, 240, 960)
LEVEL = {(rank, steps): 0.0 for rank in RANKS for steps in STEPS}


@pytest.fixture
def verdict(tmp_path):
    """(claim's id, differences by rank and steps, noise, seeds, edge) -> the result from a record with them.

    ``on_validation`` holds those that are others on the validation examples.
    """

    def verdict(claim_id, differences, noise=0.001, seeds=6, edge="", on_validation=None):
        random, rows = np.random.default_rng(0), []
        for steps in STEPS:
            reference = 3 - 0.001 * steps + 0.2 * random.random(10)  # blocks differ, and more steps lower the loss
            setups = {"full": (None, 0.0)} | {f"r={rank}": (rank, differences[rank, steps]) for rank in RANKS}
            for setup, (rank, difference) in setups.items():
                shared = {"stage": "judging", "data": "docs", "lr": 1e-3, "outcome": "done", "step": steps}
                shared |= {"steps": steps, "setup": f"{setup}, {steps} steps", "rank": rank, "edge": edge}
                of_part = {"test": difference, "validation": (on_validation or {}).get((rank, steps), difference)}
                for seed in range(seeds):
                    losses = {part: reference + gap + random.normal(0, noise, 10) for part, gap in of_part.items()}
                    scores = {f"score_{part}": str(of_blocks.tolist()) for part, of_blocks in losses.items()}
                    rows.append(shared | {"seed": seed} | scores)
        record = records.Record("quality", "A CPU", {"cpu": "x"}, COMMIT, "2026-11-29", "a command", {}, rows)
        records.write(record, tmp_path)
        return claims.verdict(claim_id, tmp_path).result

    return verdict


def test_lora_is_as_good_where_the_bounds_are_within_the_margin(verdict):
    equal = "lora-equals-full-fine-tuning"
    assert verdict(equal, LEVEL).verdict == "stands"
    assert verdict(equal, dict.fromkeys(LEVEL, -0.1)).verdict == "stands"  # better is good enough
    assert verdict(equal, dict.fromkeys(LEVEL, 0.1)).verdict == "falls"
    by_rank = verdict(equal, {case: 0.1 * (case[0] == 1) for case in LEVEL})
    assert str(by_rank) == "depends on the rank"
    assert "margin 0.01. yes: rank 8, 60 steps: " in by_rank.measured
    assert "no: rank 1, 60 steps: +0.100 (" in by_rank.measured
    both = verdict(equal, {case: 0.1 * (case in [(1, 240), (1, 960), (8, 960)]) for case in LEVEL})
    assert str(both) == "depends on the rank and the number of steps"


def test_a_rank_runs_out_of_capacity_if_it_is_as_good_at_first_and_not_later(verdict):
    capacity = "low-ranks-run-out-of-capacity"
    falls_behind = {case: 0.1 * (case in [(1, 240), (1, 960), (8, 960)]) for case in LEVEL}
    assert verdict(capacity, falls_behind).verdict == "open"  # rank 64 shows no turn
    assert verdict(capacity, falls_behind | {(64, 960): 0.1}).verdict == "stands"
    assert verdict(capacity, {case: 0.1 * (case[1] == 60) for case in LEVEL}).verdict == "falls"
    assert verdict(capacity, falls_behind | {(64, 60): 0.1}).verdict == "depends"
    assert verdict(capacity, dict.fromkeys(LEVEL, 0.1)).verdict == "open"
    assert verdict(capacity, LEVEL).verdict == "open"


def test_what_breaks_a_rule_decides_nothing(verdict):
    equal = "lora-equals-full-fine-tuning"
    assert verdict(equal, LEVEL, noise=0.2).verdict == "open"
    at_edge = verdict(equal, LEVEL, edge="largest")
    assert at_edge.verdict == "open"
    assert at_edge.measured.endswith("*: a rate is at the edge of its grid")
    assert verdict(equal, LEVEL, seeds=2).measured.endswith("and for full fine-tuning)")


def test_what_the_validation_loss_contradicts_is_undecided(verdict):
    equal = "lora-equals-full-fine-tuning"
    assert str(verdict(equal, {case: 0.1 * (case == (1, 60)) for case in LEVEL})).startswith("depends")
    behind = {case: 0.1 * (case == (1, 60)) for case in LEVEL}
    doubted = verdict(equal, behind, on_validation={(1, 60): 0.0})
    assert "not decided: rank 1, 60 steps**: +0.100 (" in doubted.measured
    assert "; validation +0.000)" in doubted.measured or "; validation -0.000)" in doubted.measured
    assert doubted.measured.endswith("**: the validation loss points the other way")
    assert verdict(equal, dict.fromkeys(LEVEL, 0.0), on_validation=dict.fromkeys(LEVEL, 0.1)).verdict == "open"
    near = verdict(equal, LEVEL, on_validation=dict.fromkeys(LEVEL, 0.008))  # worse there, but within the margin
    assert near.verdict == "stands"
    assert verdict(equal, LEVEL, on_validation=dict.fromkeys(LEVEL, 0.01), noise=0.002).verdict == "open"
    agreeing = verdict(equal, dict.fromkeys(LEVEL, 0.05), on_validation=dict.fromkeys(LEVEL, 0.1))
    assert agreeing.verdict == "falls"
    assert "**" not in agreeing.measured


def test_a_validation_loss_that_decides_nothing_contradicts_nothing():
    test, validation = np.array([[-0.001], [0.0], [0.001]]), np.array([[-0.02], [0.01], [0.04]])
    assert not Gap(8, 60, test, validation, False).contradicted(1)
    assert Gap(8, 60, test, validation, False).is_as_good(1) is True
    assert Gap(8, 60, test, validation + 0.1, False).contradicted(1)


def test_bounds_are_wider_for_more_cases():
    values = np.array([[0.0], [0.002], [0.004], [0.006]])
    gap = Gap(8, 60, values, values, False)
    lower, upper = gap.bounds(1)
    assert gap.is_as_good(1) is True
    assert gap.bounds(20)[0] < lower < 0.003 < upper < 0.01 < gap.bounds(20)[1]
    assert gap.is_as_good(20) is None


def test_gaps_are_taken_seed_by_seed(verdict, tmp_path):
    verdict("lora-equals-full-fine-tuning", {case: 0.01 * case[0] for case in LEVEL}, noise=0)
    (record,) = records.load_all("quality", tmp_path).values()
    every = gaps(record)
    assert [(gap.rank, gap.steps) for gap in every] == list(LEVEL)
    for gap in every:
        assert gap.values == pytest.approx(np.full((6, 10), 0.01 * gap.rank))
