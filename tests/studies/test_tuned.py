"""What the studies of tuned setups plan; what those of them that do more than tune make of small ones, and write."""

import itertools
import json
from functools import partial

import pytest
import torch

from lora_lab import FullFineTuning, LoRA, evaluate, fit
from lora_lab.ablation.rank_advice import SPECTRAL, UpdateRanks, assess
from lora_lab.studies import tuned
from lora_lab.studies.recorder import BlockSweep, plan_setups, record_sweeps

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def sweeps(plan, device=CPU):
    return {sweep.data: sweep for sweep in plan(device)}


def trials_of(sweep):
    return {setup: trial for setup, (trial, _) in sweep.setups.items()}


# What is planned

PLANS = [tuned.plan_quality, tuned.plan_rates]


@pytest.mark.parametrize("plan", PLANS)
def test_seeds_that_judge_did_not_choose_and_a_gpu_does_more(plan):
    small, large = (sweeps(plan, device)["docs"] for device in (CPU, CUDA))
    assert small.setups.keys() == large.setups.keys()
    assert len(large.choosing) + len(large.judging) > len(small.choosing) + len(small.judging)
    assert len(small.choosing) >= 2
    assert len(small.judging) >= 3 or plan is tuned.plan_rates
    for sweep in (small, large):
        assert not set(sweep.choosing) & set(sweep.judging)
        factors = [high / low for lrs in sweep.lrs.values() for low, high in itertools.pairwise(lrs)]
        assert all(1.69 < factor < 2.01 for factor in factors)
        assert all(len(lrs) >= 3 for lrs in sweep.lrs.values())
        for trial in trials_of(sweep).values():
            assert trial.lean is None or trial.method != FullFineTuning()


def test_ten_seeds_judge_the_advice_on_at_least_three_tasks_that_did_not_choose_it():
    planned = sweeps(tuned.plan_rank_advice)
    assert sum(not data.startswith("planted") for data in planned) >= 3
    for sweep in planned.values():
        assert len(sweep.judging) == 10
        assert not set(sweep.choosing) & set(sweep.judging)
        assert list(sweep.setups)[-1] == "r=64"


# Rank advice


def plan_few_ranks(device):
    """Ranks 1 and 64 for a moment, on one planted task and on few pictures of digits."""
    setups = plan_setups({f"r={rank}": (LoRA(rank, 2 * rank), (1e-2, 2e-2)) for rank in (1, 64)}, 6, 16)
    on = {"chosen_on": 40, "judged_on": {"validation": 40, "test": 60}, "widen": 1, "seq_len": None}
    rerun = UpdateRanks(tuned.RANKS, 40), tuned.advise
    sources = {"planted 2": partial(tuned.imitate, 2), "digits 100": partial(tuned.read_moved_digits, 100)}
    for data, source in sources.items():
        yield BlockSweep(setups, [0], [1, 2], data=data, source=source, rerun=rerun, **on)


@pytest.fixture(scope="module")
def advised(small_world):
    made = record_sweeps("rank_advice", plan_few_ranks)
    return list(made.rows(CPU)), made


def test_runs_at_the_highest_rank_are_those_of_its_rate_and_of_the_judging_seeds(advised):
    for data in ("planted 2", "digits 100"):
        of_task = [row for row in advised[0] if row["data"] == data]
        (lr,) = {row["lr"] for row in of_task if row["stage"] == "judging" and row["setup"] == "r=64"}
        high = [row for row in of_task if row["stage"] == "high rank"]
        assert [(row["lr"], row["seed"], row["rank"]) for row in high] == [(lr, 1, 64), (lr, 2, 64)]
        assert {row["margin"] for row in high} == {tuned.MARGINS[data.split()[0]]}
        for row in high:
            assert all(1 <= row[f"score_{name}"] <= 64 for name in SPECTRAL)


def test_the_loss_at_full_rank_is_that_of_the_run(advised):
    row = next(row for row in advised[0] if row["stage"] == "high rank" and row["data"] == "digits 100")
    model, task = tuned.read_moved_digits(100, CPU)
    fit(model, task, LoRA(64, 128), lr=row["lr"], seed=row["seed"], steps=6, batch_size=16, progress=False)
    losses = json.loads(row["score_truncated"])
    assert losses["64"] == pytest.approx(evaluate(model, task, limit=40), rel=1e-3)
    assert losses["1"] != pytest.approx(losses["64"], rel=1e-3)


def test_the_rows_can_be_assessed(advised):
    inside = [row | {"edge": ""} for row in advised[0]]  # so short a grid may end at an edge
    for row in inside:
        if row["stage"] == "judging" and row["setup"] == "r=1":
            row["score_test"] = "[0.0]"
    advice = assess(inside)
    assert advice.undecided == ()
    assert advice.errors["constant_error"].to_dict() == {"digits 100": 3.0}  # always 8, where 1 is enough
    assert advice.works is None


def test_a_stopped_record_goes_on(advised, no_trial_runs):
    before, made = advised
    again = list(made.rows(CPU))
    assert [row.get("score_truncated") for row in again] == [row.get("score_truncated") for row in before]
