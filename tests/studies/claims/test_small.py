"""Verdicts from small bases, from records with planted answers, and how they turn."""

from dataclasses import replace

import numpy as np
import pytest

from lora_lab.studies import records
from lora_lab.studies.claims.deciding import verdict as verdict_of
from lora_lab.studies.claims.small import gaps_on
from tests.studies.claims import decide, make

BASES, RANKS, STEPS = ("tiny-64-0, numpy", "tiny-128-0, numpy"), (1, 8, 64), (60, 240, 720)


def rows(gap, seeds=8, noise=0.002, edge="", blocks=0.05):
    """Rows in which LoRA's loss is above that of the blocks by ``gap(base, rank, steps)``, and that above full's."""
    random, made = np.random.default_rng(0), []
    for base in BASES:
        for steps in STEPS:
            pages = 3 - 0.0005 * steps + 0.3 * random.random(12)
            setups = {"full": (None, 0.0), "blocks": (None, blocks)}
            setups |= {f"r={rank}": (rank, blocks + gap(base, rank, steps)) for rank in RANKS}
            for setup, (rank, above) in setups.items():
                shared = {"stage": "judging", "data": base, "outcome": "done", "step": steps, "steps": steps}
                shared |= {"setup": f"{setup}, {steps} steps", "rank": rank, "edge": edge, "lr": 1e-3}
                for seed in range(2, 2 + seeds):
                    losses = {
                        part: (pages + above + random.normal(0, noise, 12)).tolist() for part in ("test", "validation")
                    }
                    made.append(shared | {"seed": seed} | {f"score_{part}": str(each) for part, each in losses.items()})
    return made


def verdict(claim, *arguments, **options):
    return decide(claim, "tiny_rank", rows(*arguments, **options))


def level(base, rank, steps):
    return 0.0


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (level, "stands"),
        (lambda base, rank, steps: 0.1, "falls"),
        (lambda base, rank, steps: 0.1 * (rank == 1), "depends"),
        (lambda base, rank, steps: 0.1 * (base == BASES[0]), "depends"),
        (lambda base, rank, steps: 0.01, "open"),
    ],
)
def test_lora_is_as_good_as_the_blocks_where_its_gap_is_within_the_margin(gap, expected):
    found = verdict("small-lora-equals-full-blocks", gap)
    assert found.verdict == expected
    assert verdict("small-lora-equals-full", gap).verdict == "falls"  # which trains the embedding, too


def test_what_it_depends_on_is_said():
    assert verdict("small-lora-equals-full-blocks", lambda base, rank, steps: 0.1 * (rank == 1)).on == "the rank"
    assert verdict("small-lora-equals-full-blocks", lambda base, rank, steps: 0.1 * (steps == 60)).on == (
        "the number of steps"
    )


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (lambda base, rank, steps: steps / 5000 * (rank < 64), "stands"),
        (lambda base, rank, steps: -steps / 5000 * (rank < 64), "falls"),
        (lambda base, rank, steps: 0.2 * (rank < 64), "open"),  # behind from the beginning, and no further
        (lambda base, rank, steps: (1 - 2 * (rank == 8)) * steps / 5000, "depends"),
    ],
)
def test_a_rank_falls_behind_if_its_gap_grows_with_the_text(gap, expected):
    assert verdict("small-low-ranks-fall-behind", gap).verdict == expected


@pytest.mark.parametrize("claim", ["small-lora-equals-full-blocks", "small-low-ranks-fall-behind"])
def test_a_rate_at_an_edge_decides_nothing(claim):
    assert verdict(claim, lambda base, rank, steps: 0.1 + steps / 5000, edge="largest").verdict == "open"


def test_fewer_than_eight_seeds_decide_nothing():
    with pytest.raises(ValueError, match="fewer than 8 seeds"):
        dict(gaps_on(make("tiny_rank", rows(level, seeds=7)), "blocks"))


def test_one_page_that_differs_widens_the_bounds():
    record = make("tiny_rank", rows(level))
    one = dict(gaps_on(record, "blocks"))[BASES[0]][8, 60]
    assert one.as_good is True
    odd = replace(one, values=one.values + 0.3 * np.eye(12)[0])
    assert odd.as_good is None


def test_machines_that_measured_a_base_each_are_judged_together(tmp_path):
    every = rows(lambda base, rank, steps: 0.1 * (base == BASES[0]))
    for base, device in zip(BASES, ("One CPU", "Another CPU"), strict=True):
        part = replace(make("tiny_rank", [row for row in every if row["data"] == base]), device=device)
        records.write(part, tmp_path)
    found = verdict_of("small-lora-equals-full-blocks", tmp_path)
    assert (found.result.verdict, found.result.on) == ("depends", "the base")
    assert found.result.machine == "Another CPU and One CPU"
