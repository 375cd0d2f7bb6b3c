"""What `lora-lab record rates` and `rank_advice` plan, and what the second runs on small nets."""

import json
from dataclasses import replace

import pytest
import torch

from lora_lab import FullFineTuning, LoRA, evaluate, fit
from lora_lab.ablation.compare import Study
from lora_lab.ablation.rank_advice import SPECTRAL, assess
from lora_lab.studies import rates
from lora_lab.studies.recorder import Planned, plan_trial, record_tuned

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def tiny_plan(device):
    """Ranks 1 and 64 for a moment, on one planted task and on few pictures of digits."""
    trials = {f"r={rank}": plan_trial(LoRA(rank, 2 * rank), 6, 16) for rank in (1, 64)}
    lrs = dict.fromkeys(trials, (1e-2, 2e-2))
    study = Study(trials, lrs, [0], [1, 2], 40, {"validation": 40, "test": 60}, widen=1)
    return {
        "planted 2": Planned(study, source=lambda device: rates.imitate(2, device), small=True),
        "digits 100": Planned(study, source=lambda device: rates.read_moved_digits(100, device), small=True),
    }


@pytest.fixture(scope="module")
def rows(small_world):
    recorder = record_tuned("rank_advice", tiny_plan, rates.run_high_rank)
    return list(recorder.rows(CPU)), recorder


def test_runs_at_the_highest_rank_are_those_of_its_rate_and_of_the_judging_seeds(rows):
    for data in ("planted 2", "digits 100"):
        of_task = [row for row in rows[0] if row["data"] == data]
        (lr,) = {row["lr"] for row in of_task if row["stage"] == "judging" and row["setup"] == "r=64"}
        high = [row for row in of_task if row["stage"] == "high rank"]
        assert [(row["lr"], row["seed"], row["rank"]) for row in high] == [(lr, 1, 64), (lr, 2, 64)]
        assert {row["margin"] for row in high} == {rates.MARGINS[data.split()[0]]}
        for row in high:
            assert all(1 <= row[f"score_{name}"] <= 64 for name in SPECTRAL)


def test_the_loss_at_full_rank_is_that_of_the_run(rows):
    row = next(row for row in rows[0] if row["stage"] == "high rank" and row["data"] == "digits 100")
    model, task = rates.read_moved_digits(100, CPU)
    fit(model, task, LoRA(64, 128), lr=row["lr"], seed=row["seed"], steps=6, batch_size=16, progress=False)
    losses = json.loads(row["score_truncated"])
    assert losses["64"] == pytest.approx(evaluate(model, task, limit=40), rel=1e-3)
    assert losses["1"] != pytest.approx(losses["64"], rel=1e-3)


def test_the_rows_can_be_assessed(rows):
    inside = [row | {"edge": ""} for row in rows[0]]  # so short a grid may end at an edge
    for row in inside:
        if row["stage"] == "judging" and row["setup"] == "r=1":
            row["score_test"] = "[0.0]"
    advice = assess(inside)
    assert advice.table.set_index("task")["high"].to_dict() == {"planted 2": 1, "digits 100": 1}
    assert advice.works is None


def test_rows_are_lines_and_a_stopped_record_goes_on(rows, no_trial_runs):
    before, recorder = rows
    again = list(recorder.rows(CPU))
    assert [row.get("score_truncated") for row in again] == [row.get("score_truncated") for row in before]
    assert all(recorder.line(row) for row in before)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_rules_are_chosen_on_planted_ranks_and_judged_on_five_other_tasks_or_more(device):
    plans = rates.plan_rank_advice(device)
    judged = [name for name in plans if not name.startswith("planted")]
    assert len(plans) - len(judged) == len(rates.PLANTED) >= 5
    assert {"docs", *rates.DOWNSTREAM} <= set(judged)
    assert len(judged) >= 5
    for name, planned in plans.items():
        every = rates.RANKS if device == CUDA or name not in rates.DOWNSTREAM else (1, 4, 16, 64)
        assert list(planned.study.setups) == [f"r={rank}" for rank in every]
        assert all(trial.method.alpha == 2 * trial.method.rank for trial in planned.study.setups.values())


def test_the_trials_that_choose_on_docs_are_those_of_the_record_of_rates():
    own, theirs = (plan(CPU)["docs"].study for plan in (rates.plan_rank_advice, rates.plan_rates))
    assert (own.chosen_on, own.block, list(own.choosing)) == (theirs.chosen_on, theirs.block, list(theirs.choosing))
    for rank in rates.RANKS:
        setup, same = f"r={rank}", f"r={rank}, alpha = 2r"
        assert own.lrs[setup] == theirs.lrs[same]
        assert own.setups[setup] == theirs.setups[same]
        assert own.setups[setup] != replace(theirs.setups[same], steps=59)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_full_fine_tuning_and_seven_ranks_under_two_rules_are_tuned(device):
    for planned in rates.plan_rates(device).values():
        study = planned.study
        assert len(study.setups) == 1 + 2 * 7
        assert study.setups["full"].method == FullFineTuning()
        assert study.setups["r=64, alpha = 2r"].method == LoRA(64, 128)
        assert study.setups["r=64, alpha = 32"].method == LoRA(64, 32)
        assert study.setups["r=16, alpha = 2r"] == study.setups["r=16, alpha = 32"]
        assert len(study.choosing) >= 3
        assert all(len(grid) == 5 for grid in study.lrs.values())


def test_the_base_is_in_half_precision_for_lora_on_the_language_model_alone():
    plan = rates.plan_rates(CPU)
    assert plan["docs"].study.setups["r=1, alpha = 2r"].lean.base_dtype == torch.bfloat16
    assert plan["docs"].study.setups["full"].lean is None
    assert plan["digits"].study.setups["r=1, alpha = 2r"].lean is None
