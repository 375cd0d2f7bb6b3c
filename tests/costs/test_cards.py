"""Predictions for cards that are not here: operations by hand, and what others measured."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from lora_lab import FullFineTuning, Llama, LoRA
from lora_lab.costs.cards import CARDS, LAUNCH_S, MEMORY_SHARE, cost_model, roofline
from lora_lab.costs.timing import UPDATE, OperatorCall
from lora_lab.models import shapes
from lora_lab.models.llama import LlamaConfig
from lora_lab.studies import records

BF16, FP32 = torch.bfloat16, torch.float32
L40S = CARDS["l40s"]
WHOLE = 1.0, 1.0, 0.0  # the datasheet's rates as they are


def product(rows, inner, columns, dtype=BF16):
    moved = dtype.itemsize * (rows * inner + inner * columns + rows * columns)
    return OperatorCall("mm", moved, 2 * rows * inner * columns, dtype)


# The cards


def test_rates_are_those_of_dense_matrices():
    sparse = {"rtx-3090": 142, "rtx-a6000": 309.7, "rtx-4090": 330.3, "a10": 250, "l4": 242, "l40s": 733}
    sparse |= {"a100-40gb": 624, "a100-80gb": 624, "h100-pcie": 1513, "h100-sxm": 1979, "h200": 1979}
    assert CARDS.keys() - sparse.keys() == {"v100", "t4"}  # which have no structured sparsity
    for name, tera in sparse.items():  # which datasheets print beside the dense rate, or instead of it
        assert 2 * CARDS[name].half_flops == pytest.approx(tera * 1e12, rel=0.015), name


def test_every_card_has_its_numbers_in_single_units():
    for card in CARDS.values():
        assert 1.5 < card.half_flops / card.float32_flops < 20
        assert 3e11 <= card.bytes_per_second <= 5e12
        assert 16 * 2**30 <= card.memory_bytes <= 141 * 2**30


def test_an_unknown_card_is_refused_with_the_names_of_the_others():
    with pytest.raises(ValueError, match=r"No card is known by the name 'h1000'; use one of: v100, t4, .*h200"):
        cost_model("h1000")
    assert cost_model("L40S").where == cost_model("l40s").where


# Operations


def test_a_large_product_takes_its_flops_at_the_rate_of_its_dtype():
    seconds = roofline(L40S, *WHOLE)
    assert seconds(product(4096, 4096, 4096)) == pytest.approx(2 * 4096**3 / 362.05e12)
    assert seconds(product(4096, 4096, 4096, FP32)) == pytest.approx(2 * 4096**3 / 91.6e12)
    half = roofline(L40S, 0.5, 1.0, 0.0)
    assert half(product(4096, 4096, 4096)) == pytest.approx(4 * 4096**3 / 362.05e12)


def test_a_thin_product_takes_its_bytes_at_the_bandwidth():
    thin, moved = product(840, 3072, 32, FP32), 4 * (840 * 3072 + 3072 * 32 + 840 * 32)
    assert roofline(L40S, *WHOLE)(thin) == pytest.approx(moved / 864e9)
    assert roofline(L40S, 1.0, 0.5, 0.0)(thin) == pytest.approx(2 * moved / 864e9)


def test_a_small_operation_takes_a_launch_unless_it_shares_one():
    of_list = OperatorCall("_foreach_mul_", 32, of_list=True)
    assert roofline(L40S)(OperatorCall("mul", 48)) == LAUNCH_S
    assert roofline(L40S)(of_list) == pytest.approx(32 / 864e9 / MEMORY_SHARE)


# Steps


def test_a_prediction_says_that_it_was_not_measured_and_what_is_doubtful(tiny_config):
    costs, methods = cost_model("t4"), {"full": FullFineTuning(), "LoRA": LoRA(4)}
    need = 16 * sum(each.numel() for each in Llama(tiny_config).parameters())  # weight, gradient and two averages
    for share, memory in ((1.1, set()), (0.9, {"memory"})):
        small = replace(costs, card=replace(costs.card, memory_bytes=int(share * need)))
        found = small.predict(partial(Llama, tiny_config), methods, 2, 16)
        assert {"card", "fit"} | memory == set(doubts(found)) - {"launches"}
    assert any("(full), more than" in doubt for doubt in found.doubts)  # and not LoRA
    assert found.to_dict()["setting"].endswith("NVIDIA T4, from the datasheet, not measured")


def doubts(found):
    """Which doubts a prediction has, in a word each."""
    words = {"Launches alone": "launches", "Weights, gradients": "memory", "The NVIDIA": "card", "The shares": "fit"}
    return [word for doubt in found.doubts for start, word in words.items() if doubt.startswith(start)]


@pytest.mark.slow
def test_many_launches_are_doubted():
    """LitGPT's step of Llama 2 7B took 142 ms, where 41 are predicted."""
    litgpt = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128)
    for config, method, share in (
        (litgpt, LoRA(8, targets=["q_proj", "v_proj"]), r"4\d"),
        (shapes.config("smollm2-135m"), LoRA(8), r"9\d"),
    ):
        model = partial(Llama, replace(config, num_hidden_layers=6))  # the share is nearly that of all 30 or 32 blocks
        found = cost_model("a100-40gb").predict(model, {"LoRA": method}, 1, 128, dtype=BF16)
        assert doubts(found) == ["launches", "fit"]
        assert re.match(rf"Launches alone make up {share} % \(LoRA\) of the predicted time, and each", found.doubts[0])


@pytest.mark.slow
def test_full_fine_tuning_was_three_times_slower_on_an_l40s_because_adamw_moved_all_weights():
    rows = {row["experiment"]: row["tokens_per_second"] for row in records.published("peft-metamathqa").rows}
    measured = rows["lora/llama-3.2-3B-rank32"] / rows["full-finetuning/llama-3.2-3B-lr_0.00001"]
    assert measured == pytest.approx(3.1, abs=0.05)
    methods = {"LoRA": LoRA(32, 64, targets=["q_proj", "v_proj"]), "full": FullFineTuning()}
    models = [partial(Llama, replace(shapes.config("llama-3.2-3b"), num_hidden_layers=count)) for count in (2, 4)]
    options = {"dtype": BF16, "optimizer": "adamw-foreach"}
    few, more = (cost_model("l40s").predict(model, methods, 4, 210, **options) for model in models)
    assert doubts(more) == ["fit"]  # launches are few
    lora, full = (more.total_s(name) + 12 * (more.total_s(name) - few.total_s(name)) for name in methods)
    assert full / lora == pytest.approx(measured, rel=0.25)  # of 28 blocks, as each but the first costs the same
    update = 13 * more.changes("full")[UPDATE] - 12 * few.changes("full")[UPDATE]
    assert update > 0.8 * (full - lora)
