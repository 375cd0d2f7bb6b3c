"""Losses by blocks and a rank correlation: against torch, scipy and planted answers."""

import json

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from lora_lab import evaluate
from lora_lab.ablation import Grid, ablate
from lora_lab.ablation.stats import BlockLosses, block_losses_of, rank_correlations
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import Llama
from lora_lab.tasks import Pair, digits, from_pairs
from lora_lab.tasks.generate import answers

pytestmark = pytest.mark.usefixtures("one_thread")


# Blocks


@torch.no_grad()
def test_each_number_is_the_mean_loss_of_its_block():
    model, task = DigitsMLP(), digits()
    scores = BlockLosses({"validation": 20, "test": 8})(model, task)
    losses = json.loads(scores["validation"])
    assert len(losses) == 3  # of 8, 8 and 4 examples
    for loss, rows in zip(losses, (slice(0, 8), slice(8, 16), slice(16, 20)), strict=True):
        part = task.validation[rows]
        assert loss == pytest.approx(F.cross_entropy(model(part.inputs), part.targets).item(), abs=1e-6)
    assert losses[0] != losses[1]
    assert json.loads(scores["test"]) == [pytest.approx(evaluate(model, task, "test", 8, 8), abs=1e-6)]


def test_answers_are_counted_in_the_same_blocks(tiny_config, chatter):
    pairs = [Pair(f"{i} apples?", ("good", "bad")[i % 2]) for i in range(60)]
    task = from_pairs(chatter, pairs, metric="classification")
    scores = BlockLosses({"test": 5}, 2, answered=True)(Llama(tiny_config, seed=3), task)
    references = [pair.answer for pair in task.pairs["test"][:5]]
    guess = answers(Llama(tiny_config, seed=3), task)[0]
    right = [reference == guess for reference in references]  # an untrained model gives every prompt the same answer
    assert json.loads(scores["accuracy"]) == [sum(right[:2]) / 2, sum(right[2:4]) / 2, float(right[4])]
    assert len(json.loads(scores["test"])) == 3
    assert "accuracy" not in BlockLosses({"test": 5}, 2)(Llama(tiny_config, seed=3), task)


def test_a_model_is_left_in_the_mode_in_which_it_was():
    model = DigitsMLP().train()
    BlockLosses({"validation": 8})(model, digits())
    assert model.training


def test_a_sweep_keeps_them_and_a_row_gives_them_back(tmp_path):
    trials = Grid([2], [1e-2], [0], steps=2, batch_size=4, eval_every=2, eval_examples=8)
    frame = ablate(DigitsMLP(), digits(), trials, tmp_path, judge=BlockLosses({"validation": 24}), progress=False)
    first, last = frame.to_dict("records")
    losses = block_losses_of(last, "validation")
    assert len(losses) == 3
    assert losses[0] == pytest.approx(last["validation_loss"], abs=1e-6)  # of the first 8 examples
    assert block_losses_of(first, "validation") == [first["validation_loss"]]  # only the last row is judged
    assert block_losses_of(last, "test") == [last["test_loss"]]  # and only on validation


# Rank correlations


def runs(setups=12, seeds=3, noise=0.1, seed=0):
    """Runs whose target follows "cause" (by a curve), is opposed to "mirror", and is unrelated to "chance"."""
    random = np.random.default_rng(seed)
    causes, chances = random.normal(size=(2, setups))
    rows = []
    for setup in range(setups):
        for _ in range(seeds):
            cause = causes[setup] + noise * random.normal()
            row = {"setup": f"s{setup}", "lr": 1e-3, "cause": cause, "mirror": -(cause**3), "chance": chances[setup]}
            rows.append(row | {"target": np.exp(cause) + noise * random.normal()})
    return pandas.DataFrame(rows)


def table(frame, *predictors):
    return rank_correlations(frame, "target", predictors).set_index("predictor")


def test_correlations_are_spearmans_with_ties_and_without_rows_that_lack_a_value():
    frame = runs(noise=0.5)
    for tied in (frame, frame.assign(cause=frame["cause"].round())):
        found = table(tied, "cause", "mirror", "chance")["correlation"]
        for name in ("cause", "mirror", "chance"):
            assert found[name] == pytest.approx(spearmanr(tied["target"], tied[name]).statistic)
    frame.loc[0, "cause"] = np.nan
    assert table(frame, "cause").equals(table(frame.drop(0), "cause"))


def test_a_planted_cause_is_above_chance_and_ahead_of_what_has_none():
    found = table(runs(), "cause", "mirror", "chance")
    assert found.loc["cause", "lower"] > 0.8
    assert found.loc["mirror", "upper"] < -0.8
    assert found.loc["chance", "lower"] < 0 < found.loc["chance", "upper"]
    assert found.loc["chance", "difference_lower"] > 0
    assert found.loc["mirror", "difference_lower"] <= 0 <= found.loc["mirror", "difference_upper"]
    back = table(runs(), "chance", "cause").loc["cause"]
    assert back["difference_upper"] == pytest.approx(-found.loc["chance", "difference_lower"], abs=0.15)
    assert back["difference_upper"] < 0


def test_more_seeds_of_the_same_setups_are_no_more_evidence():
    def width(setups, seeds):
        row = table(runs(setups, seeds, noise=0.5, seed=3), "cause").iloc[0]
        return row["upper"] - row["lower"]

    assert width(6, 60) > 0.5 * width(6, 3) > width(60, 3)


def test_what_cannot_be_correlated_is_refused():
    with pytest.raises(ValueError, match="runs of 3 setups"):
        table(runs(3), "cause")
