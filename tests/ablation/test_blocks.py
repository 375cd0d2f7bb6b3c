"""Losses by blocks: that they are those of the examples, and what a row without them gives."""

import json

import pytest
import torch
from torch.nn import functional as F

from lora_lab import evaluate
from lora_lab.ablation import Grid, ablate
from lora_lab.ablation.blocks import BlockLosses, block_losses_of
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import Llama
from lora_lab.tasks import Pair, digits, from_pairs
from lora_lab.tasks.generate import answers

pytestmark = pytest.mark.usefixtures("one_thread")


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
