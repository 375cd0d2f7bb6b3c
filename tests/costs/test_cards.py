"""Predictions for cards that are not here: operations by hand, and what others measured."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from lora_lab import FullFineTuning, Llama, LoRA, records, speed
from lora_lab.costs.cards import CARDS, EFFICIENCY, Efficiency, cost_model, roofline
from lora_lab.costs.timing import OperatorCall
from lora_lab.models import shapes
from lora_lab.models.llama import LlamaConfig

BF16, FP32 = torch.bfloat16, torch.float32
L40S = CARDS["l40s"]
WHOLE = Efficiency(matmul=1.0, memory=1.0, launch_s=0.0)  # the datasheet's rates as they are


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


def test_every_card_has_its_source_and_numbers_in_single_units():
    for card in CARDS.values():
        assert "NVIDIA" in card.source
        assert card.source.rsplit(" ", 1)[1].isdigit()
        assert 1.5 < card.half_flops / card.float32_flops < 20
        assert 3e11 <= card.bytes_per_second <= 5e12
        assert 16 * 2**30 <= card.memory_bytes <= 141 * 2**30


def test_an_unknown_card_is_refused_with_the_names_of_the_others():
    with pytest.raises(ValueError, match=r"No card is known by the name 'h1000'; use one of: v100, t4, .*h200"):
        cost_model("h1000")
    assert cost_model("L40S").where == cost_model("l40s").where


# Operations


def test_a_large_product_takes_its_flops_at_the_rate_of_its_dtype():
    seconds = roofline(L40S, WHOLE)
    assert seconds(product(4096, 4096, 4096)) == pytest.approx(2 * 4096**3 / 362.05e12)
    assert seconds(product(4096, 4096, 4096, FP32)) == pytest.approx(2 * 4096**3 / 91.6e12)
    half = roofline(L40S, Efficiency(0.5, 1.0, 0.0))
    assert half(product(4096, 4096, 4096)) == pytest.approx(4 * 4096**3 / 362.05e12)


def test_a_thin_product_takes_its_bytes_at_the_bandwidth():
    thin, moved = product(840, 3072, 32, FP32), 4 * (840 * 3072 + 3072 * 32 + 840 * 32)
    assert roofline(L40S, WHOLE)(thin) == pytest.approx(moved / 864e9)
    assert roofline(L40S, Efficiency(1.0, 0.5, 0.0))(thin) == pytest.approx(2 * moved / 864e9)


def test_a_small_operation_takes_a_launch_unless_it_shares_one():
    of_list = OperatorCall("_foreach_mul_", 32, of_list=True)
    assert roofline(L40S)(OperatorCall("mul", 48)) == EFFICIENCY.launch_s
    assert roofline(L40S)(of_list) == pytest.approx(32 / 864e9 / EFFICIENCY.memory)


# Steps


def test_a_prediction_says_that_it_was_not_measured_and_costs_say_what_they_are_made_of(tiny_config):
    costs = cost_model("t4")
    found = costs.predict(partial(Llama, tiny_config), {"full": FullFineTuning(), "LoRA": LoRA(4)}, 2, 16)
    assert "batch 2 x 16, NVIDIA T4, from the datasheet, not measured" in str(found)
    assert found.to_dict()["setting"].endswith("not measured")
    assert str(costs).splitlines()[0] == "Costs on NVIDIA T4, from the datasheet, not measured"
    for words in ("65.0 TFLOP/s x 0.69", "320 GB/s x 0.77", "NVIDIA T4 datasheet, 2019"):
        assert words in str(costs), words
    assert re.search(r"So LoRA is (slower|faster)\.", str(found))
    for doubt in (
        r"The NVIDIA T4 has no bfloat16, so its rate is that of float16; at 70 W its clock may fall\.",
        r"fitted to two steps on an L40S, and 5 us for a launch are assumed\. .*an aim of 25 %: see docs/costs\.md\.",
    ):
        assert any(re.search(doubt, text) for text in found.doubts), doubt
        assert re.search(doubt, str(found))


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
def test_a_step_that_the_card_has_no_memory_for_is_doubted():
    wide = partial(Llama, LlamaConfig(32768, 8192, 65536, 4, 64, 8, 128))  # eight billion parameters in few blocks
    attention, mlp, ends = 2 * (64 + 8) * 128 * 8192, 3 * 8192 * 65536, 2 * 32768 * 8192
    parameters = ends + 4 * (attention + mlp) + (2 * 4 + 1) * 8192
    methods = {"full": FullFineTuning(), "LoRA": LoRA(8)}
    found = cost_model("l40s").predict(wide, methods, 4, 512, dtype=BF16)
    assert doubts(found) == ["memory", "fit"]
    size = 8 * parameters / 2**30  # weight, gradient and two averages of two bytes, for each parameter
    assert found.doubts[0] == (
        f"Weights, gradients and optimiser state alone need {size:.1f} GiB (full), more than the 48 GiB of the card, "
        "so the step does not fit."
    )
    large = cost_model("a100-80gb").predict(wide, {"full": FullFineTuning()}, 4, 512, dtype=BF16)
    assert doubts(large) == ["fit"]


def predicted_for_all_blocks(config, *args, **options):
    """A prediction for an L40S from models of two and four blocks: by the datasheet all but the first cost the same."""
    few, more = (
        speed.cards.cost_model("l40s").predict(
            partial(Llama, replace(config, num_hidden_layers=blocks)), *args, **options
        )
        for blocks in (2, 4)
    )
    times = (config.num_hidden_layers - 4) / 2
    seconds = {
        name: {cause: s + times * (s - few.seconds[name][cause]) for cause, s in parts.items()}
        for name, parts in more.seconds.items()
    }
    return replace(more, seconds=seconds)


@pytest.mark.slow
def test_full_fine_tuning_was_three_times_slower_on_an_l40s_because_adamw_moved_all_weights():
    rows = {row["experiment"]: row["tokens_per_second"] for row in records.published("peft-metamathqa").rows}
    measured = rows["lora/llama-3.2-3B-rank32"] / rows["full-finetuning/llama-3.2-3B-lr_0.00001"]
    assert measured == pytest.approx(3.1, abs=0.05)
    found = predicted_for_all_blocks(
        shapes.config("llama-3.2-3b"),
        {"LoRA": LoRA(32, 64, targets=["q_proj", "v_proj"]), "full": FullFineTuning()},
        4,
        210,
        dtype=BF16,
        optimizer="adamw-foreach",
    )
    assert found.ratio("full") == pytest.approx(measured, rel=0.25)
    assert found.changes("full")[speed.UPDATE] > 0.8 * (found.total_s("full") - found.total_s("LoRA"))
    assert doubts(found) == ["fit"]  # launches are few
