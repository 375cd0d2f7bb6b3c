"""Which rank is enough, from one run: statistics against numpy's, and rules on planted answers and their opposites."""

import json

import numpy as np
import pandas
import pytest
import torch

from lora_lab import LoRA, LoRAConfig, evaluate, fit, inject, lora_layers
from lora_lab.ablation import rank_advice
from lora_lab.ablation.rank_advice import (
    SPECTRAL,
    TRUNCATION,
    UpdateRanks,
    assess,
    choose_rule,
    measure_errors,
    predict_ranks,
    ranks_left,
    truncation_rank,
)
from lora_lab.lean import Lean
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import Llama
from lora_lab.tasks import digits
from tests.helpers import randomise
from tests.studies.conftest import sentences

pytestmark = pytest.mark.usefixtures("one_thread")


def adapted():
    model = DigitsMLP(width=32)
    inject(model, LoRAConfig(8, 16, targets=["hidden1", "hidden2"]))
    return randomise(model)


def dense_copy(rank):
    """The same model with the rank-limited updates added to its weights, by numpy."""
    model, dense = adapted(), DigitsMLP(width=32)
    for name, layer in lora_layers(model).items():
        delta = 2 * layer.lora_B.detach().double().numpy() @ layer.lora_A.detach().double().numpy()
        U, S, Vh = np.linalg.svd(delta, full_matrices=False)
        cut = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        dense.get_submodule(name).weight.data += torch.tensor(cut, dtype=torch.float32)
    return dense


def singular_values():
    for layer in lora_layers(adapted()).values():
        yield np.linalg.svd(2 * (layer.lora_B @ layer.lora_A).detach().double().numpy(), compute_uv=False)[:8]


# The judge


def test_statistics_are_medians_over_layers_of_what_numpy_computes():
    scores = UpdateRanks([8, 2], 40)(adapted(), digits())
    spectra = [S / S[0] for S in singular_values()]
    stable = [(S**2).sum() for S in spectra]
    energy = [1 + int((np.cumsum(S**2) < 0.9 * (S**2).sum()).sum()) for S in spectra]
    assert scores["stable_rank"] == pytest.approx(np.median(stable), rel=1e-5)
    assert scores["energy_rank_90"] == pytest.approx(np.median(energy))
    assert scores["stable_rank"] < scores["effective_rank"] < 8
    assert scores["energy_rank_50"] < scores["energy_rank_99"]


def test_losses_are_those_of_dense_models_with_truncated_updates():
    losses = {int(rank): loss for rank, loss in json.loads(scores_of_cuts()["truncated"]).items()}
    assert losses.keys() == {8, 4, 1}
    for rank, loss in losses.items():
        assert loss == pytest.approx(evaluate(dense_copy(rank), digits(), limit=40), abs=1e-5)
    assert losses[1] != pytest.approx(losses[8], rel=1e-3)


def scores_of_cuts():
    return UpdateRanks([1, 8, 4], 40)(adapted(), digits())


def test_a_model_of_the_lean_step_is_cut_as_any_other(tiny_config):
    scores = {}
    for lean in (None, Lean()):
        model = Llama(tiny_config, seed=3)
        task = sentences(tiny_config.vocab_size)
        fit(model, task, LoRA(4, 8), lr=0.05, steps=6, batch_size=4, lean=lean, progress=False)
        scores[lean] = UpdateRanks([4, 1], 5)(model, task)
    cuts = [json.loads(each["truncated"]) for each in scores.values()]
    assert cuts[0] == pytest.approx(cuts[1], abs=1e-4)
    assert abs(cuts[0]["1"] - cuts[0]["4"]) > 1e-3
    assert scores[None]["stable_rank"] == pytest.approx(scores[Lean()]["stable_rank"], rel=1e-2)


# Statistics and the sweep


def test_the_truncation_rank_is_the_smallest_from_which_on_nothing_is_lost():
    losses = {64: 1.0, 16: 1.005, 4: 1.02, 1: 1.5}
    assert truncation_rank(losses, 0.01) == 16
    assert truncation_rank(losses, 0.001) == 64
    assert truncation_rank(losses, 1.0) == 1
    assert truncation_rank({64: 1.0, 16: 1.02, 4: 1.0, 1: 1.5}, 0.01) == 64  # a smaller rank that is better by luck


def sweep(excess, edge="", noise=0.001):
    """Rows of a sweep in which each rank's loss is so much above the largest's."""
    random, rows = np.random.default_rng(0), []
    for rank, above in excess.items():
        for seed in range(4):
            losses = (2 + above + noise * random.normal(size=10)).tolist()
            rows.append({"setup": f"r={rank}", "rank": rank, "stage": "judging", "lr": 1e-3, "edge": edge})
            rows[-1] |= {"seed": seed, "outcome": "done", "step": 4, "steps": 4, "score_test": json.dumps(losses)}
    return rows


@pytest.mark.parametrize(
    ("excess", "expected"),
    [
        ({1: 0.5, 4: 0.1, 16: 0.002, 64: 0.0}, (16, 16)),
        ({1: 0.5, 4: 0.001, 16: 0.0, 64: 0.0}, (4, 4)),
        ({1: -0.1, 4: -0.1, 16: -0.1, 64: 0.0}, (1, 1)),
        ({1: 0.5, 4: 0.3, 16: 0.1, 64: 0.0}, (64, 64)),
        ({1: 0.5, 4: 0.001, 16: 0.1, 64: 0.0}, (4, 4)),  # a larger rank that is too small by bad luck
    ],
)
def test_a_sweep_without_noise_leaves_one_rank(excess, expected):
    assert ranks_left(pandas.DataFrame(sweep(excess)), 0.01) == expected


def test_noise_leaves_more_ranks_and_an_edge_all():
    noisy = sweep({1: 0.5, 4: 0.012, 16: 0.009, 64: 0.0}, noise=0.02)
    assert ranks_left(pandas.DataFrame(noisy), 0.01) == (4, 64)
    assert ranks_left(pandas.DataFrame(noisy), 0.1) == (4, 4)
    assert ranks_left(pandas.DataFrame(sweep({1: 0.5, 4: 0.001, 64: 0.0}, edge="largest")), 0.01) is None


# Rules


def runs_of(*runs, **statistics):
    """A table of runs (task, low, high), in which statistics are the same or have a value for each run."""
    values = dict.fromkeys((*SPECTRAL, TRUNCATION), 3.0) | statistics
    return pandas.DataFrame(runs, columns=["task", "low", "high"]).assign(rank=64, **values)


def test_a_rule_predicts_the_nearest_power_of_two_up_to_the_largest():
    runs = runs_of(*[("a", 1, 1)] * 5, stable_rank=[0.1, 1.3, 3.0, 6.0, 400.0])
    assert predict_ranks(runs, "stable_rank", 2.0).tolist() == [1, 2, 8, 16, 64]


def test_errors_are_in_doublings_and_each_run_of_a_task_counts():
    runs = runs_of(("a", 8, 8), ("a", 8, 8), ("b", 1, 1), ("c", 2, 16), ("d", 8, 16), stable_rank=[3, 12, 3, 3, 3])
    errors = measure_errors(runs, predict_ranks(runs, "stable_rank", 4 / 3))  # predicted are 4, 16, 4, 4, 4
    assert errors.to_dict() == {"a": 0.0, "b": 2.0, "c": 0.0, "d": -1.0}


@pytest.mark.parametrize("statistic", ["stable_rank", "energy_rank_95", TRUNCATION])
def test_the_statistic_that_follows_the_answer_is_chosen_with_its_factor(statistic):
    answers = [("planted 1", 1, 1), ("planted 2", 4, 4), ("planted 8", 16, 16)] * 2
    runs = runs_of(*answers, **{statistic: [4 * rank for _, rank, _ in answers]})
    rule = choose_rule(runs)
    assert rule == (statistic, pytest.approx(1 / 4))
    assert set(measure_errors(runs, predict_ranks(runs, *rule))) == {0.0}
    assert set(measure_errors(runs, pandas.Series(4, runs.index))) == {2.0, 0.0, -2.0}


def record_rows(answers):
    """task -> (the sweep's rank, the stable rank of its runs); other statistics say nothing."""
    rows = []
    for task, (rank, stable) in answers.items():
        excess = {1: 0.0 if rank == 1 else 0.5, 4: 0.0 if rank <= 4 else 0.5, 16: 0.0 if rank <= 16 else 0.5, 64: 0.0}
        rows += [{"data": task, "margin": None, **row} for row in sweep(excess)]
        for seed in range(3):
            scores = {f"score_{name}": 5.0 for name in SPECTRAL} | {"score_stable_rank": stable}
            scores["score_truncated"] = json.dumps({64: 1.0, 1: 1.0})
            row = {"data": task, "stage": "high rank", "rank": 64, "margin": 0.01, "seed": seed, "outcome": "done"}
            rows.append(row | scores)
    return rows


PLANTED = {"planted 1": (1, 2.0), "planted 4": (4, 8.0), "planted 16": (16, 32.0)}


def test_a_rule_that_holds_on_other_tasks_works():
    advice = assess(record_rows(PLANTED | {"digits 1": (1, 2.0), "digits 2": (64, 120.0), "docs": (16, 30.0)}))
    assert (advice.statistic, advice.factor) == ("stable_rank", pytest.approx(0.5))
    assert advice.errors["error"].to_dict() == {"digits 1": 0.0, "digits 2": 0.0, "docs": 0.0}
    assert advice.errors["constant_error"].tolist() == [3.0, -3.0, -1.0]
    assert advice.works is True


def test_a_rule_that_fails_on_other_tasks_does_not_work():
    advice = assess(record_rows(PLANTED | {"digits 1": (64, 2.0), "digits 2": (1, 120.0), "docs": (16, 30.0)}))
    assert advice.statistic == "stable_rank"
    assert advice.errors["error"].tolist() == [-6.0, 6.0, 0.0]
    assert advice.works is False


OFF = {"digits 1": (4, 16.0), "digits 2": (16, 64.0), "docs": (4, 16.0)}  # the rule is off by a doubling each
ALIKE = dict.fromkeys(("digits 1", "digits 2", "docs"), (4, 8.0))  # they do not tell the rule from a constant of 4


@pytest.mark.parametrize(
    ("others", "guess", "works"),
    [
        (OFF, 8, None),  # as 8 is
        (OFF, 4, False),
        (ALIKE, 4, None),
        (ALIKE | {"style": (1, 2.0)}, 4, True),
        ({"digits 1": (1, 2.0), "docs": (16, 30.0)}, 8, None),  # too few
    ],
)
def test_a_rule_has_to_beat_the_constant_on_three_other_tasks(monkeypatch, others, guess, works):
    monkeypatch.setattr(rank_advice, "GUESS", guess)
    assert assess(record_rows(PLANTED | others)).works is works


def test_tasks_whose_largest_rank_has_no_result_or_an_edge_do_not_count():
    rows = record_rows(PLANTED)
    at_edge = [{"data": "docs", "margin": None, **row} for row in sweep({1: 0.5, 4: 0.0, 64: 0}, edge="largest")]
    high = [row | {"data": "docs"} for row in rows if row["data"] == "planted 1" and row["stage"] == "high rank"]
    advice = assess(rows + at_edge + high)
    assert advice.undecided == ("docs",)
    assert advice.errors.empty
    inside = [{"data": "docs", "margin": None, **row} for row in sweep({1: 0.5, 4: 0.0, 64: 0})]
    assert assess(rows + inside + high).undecided == ()
    assert assess(rows + inside).undecided == ("docs",)  # no run at the highest rank has a result
    with pytest.raises(ValueError, match="no planted task"):
        assess(at_edge + high)
