"""FLOPs of a step against torch's own counter and against cases by hand."""

import functools
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_lab import (
    DoRA,
    FullFineTuning,
    Lean,
    Llama,
    LlamaConfig,
    LoRA,
    LoRAFA,
    PartialFineTuning,
    PiSSA,
)
from lora_lab.costs.fake import batch_for, fake_copy, last_blocks
from lora_lab.costs.flops import PARTS, PASSES, break_even_rank, closed_form, flops
from lora_lab.costs.setup import Setup
from lora_lab.methods import AsItIs
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.models.shapes import config

ATEN = torch.ops.aten
COUNTING = sys.modules["lora_lab.costs.flops"]  # the package has a function of that name
DIGITS = (torch.rand(5, 64), torch.zeros(5, dtype=torch.long))
FORWARD, INPUT, WEIGHT, AGAIN = PASSES


def torch_count(factory, method, batch_size=2, seq_len=16, batch=None, custom=None, **options):
    """What FlopCounterMode counts in one step, under the plain formula of attention."""
    setup = Setup(method, **options)
    with fake_copy(factory) as twin, sdpa_kernel(SDPBackend.MATH):
        given = batch_for(twin, batch_size, seq_len) if batch is None else batch
        parts, weights = setup.batches(tuple(torch.zeros(t.shape, dtype=t.dtype) for t in given))
        step = setup.step(twin)
        with FlopCounterMode(display=False, custom_mapping=custom) as counter:
            step(parts, weights)
    return counter.get_total_flops()


def mean_square(model, inputs, targets):
    return F.mse_loss(model(inputs), targets)


# FLOPs by hand


def test_one_layer_of_two_by_three_by_hand():
    batch = (torch.zeros(4, 3), torch.zeros(4, 2))
    found = flops(lambda: nn.Sequential(nn.Linear(3, 2)), FullFineTuning(), batch=batch, loss=mean_square)
    product = 2 * 4 * 3 * 2  # two operations, four examples, six weights
    # Nobody wants the input's gradient.
    assert found.counts == {("layers", FORWARD): product, ("layers", WEIGHT): product}
    assert found.total == 96
    assert found.tokens == 4


def test_two_layers_with_adapters_by_hand():
    def net():
        return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 5))

    batch = (torch.zeros(4, 3), torch.zeros(4, 5))
    found = flops(net, LoRA(rank=7), batch=batch, loss=mean_square)
    once = 2 * 4  # operations and examples
    assert found.counts == {
        ("layers", FORWARD): once * (6 + 10),
        ("layers", INPUT): once * 10,  # of the second layer alone
        ("adapters", FORWARD): once * 7 * (3 + 2 + 2 + 5),
        ("adapters", INPUT): once * 7 * (2 + 2 + 5),  # of both B, and of the second A
        ("adapters", WEIGHT): once * 7 * (3 + 2 + 2 + 5),
    }


def test_the_digits_net_by_hand():
    first, second, third = 64 * 16, 16 * 16, 16 * 10
    assert flops(partial(DigitsMLP, 16), FullFineTuning(), batch=DIGITS).counts == {
        ("layers", FORWARD): 10 * (first + second + third),
        ("layers", INPUT): 10 * (second + third),
        ("layers", WEIGHT): 10 * (first + second + third),
    }


# The tiny Llama: width 32, inner 48, 2 blocks, 4 heads of 8 with 2 for keys and values, 260 tokens.
M = 2 * (32 * 32 + 16 * 32 + 16 * 32 + 32 * 32 + 3 * 32 * 48)
E = 260 * 32
P = 2 * (64 + 48 + 48 + 64 + 3 * 80)  # for each rank
FIRST = 32 * 32 + 2 * 16 * 32  # q, k and v of the first block, under which LoRA trains nothing


def T(s):
    return 2 * s * 32 * 2


def on_paper(config, method, s):
    """The closed form of a step of two sequences."""
    with torch.device("meta"):
        method.prepare(model := Llama(config), 0)
    return closed_form(model, 2 * s, s)


@pytest.mark.parametrize("s", [3, 16])
def test_full_fine_tuning_of_the_tiny_llama_is_the_formula_exactly(tiny_config, s):
    found = flops(partial(Llama, tiny_config), FullFineTuning(), 2, s)
    once = 2 * 2 * s
    assert found.counts == {
        ("layers", FORWARD): once * M,
        ("layers", INPUT): once * M,
        ("layers", WEIGHT): once * M,
        ("head", FORWARD): once * E,
        ("head", INPUT): once * E,
        ("head", WEIGHT): once * E,
        ("attention", FORWARD): once * T(s),
        ("attention", INPUT): once * 2 * T(s),
    }
    assert found.total == sum(on_paper(tiny_config, FullFineTuning(), s).values()) == once * (3 * M + 3 * E + 3 * T(s))
    assert found.tokens == 2 * s


@pytest.mark.parametrize("rank", [1, 4])
def test_lora_on_the_tiny_llama_is_the_formula_less_the_first_blocks_inputs(tiny_config, rank):
    found, paper = flops(partial(Llama, tiny_config), LoRA(rank), 2, 16), on_paper(tiny_config, LoRA(rank), 16)
    once = 2 * 32
    assert sum(paper.values()) == once * (2 * M + 2 * E + 3 * T(16) + 3 * P * rank)
    assert found.total == sum(paper.values()) - once * (FIRST + 3 * 32 * rank)
    assert found.counts["adapters", WEIGHT] == once * P * rank
    assert found.part("attention") == once * 3 * T(16)
    assert ("layers", WEIGHT) not in found.counts


def test_a_frozen_a_has_no_gradient(tiny_config):
    both, one = (flops(partial(Llama, tiny_config), method, 2, 16) for method in (LoRA(4), LoRAFA(4)))
    A = 4 * 2 * (4 * 32 + 2 * 32 + 48)  # its numbers: all layers read 32, down_proj 48
    assert both.counts["adapters", WEIGHT] - one.counts["adapters", WEIGHT] == 2 * 32 * A
    papers = [on_paper(tiny_config, method, 16) for method in (LoRA(4), LoRAFA(4))]
    assert papers[1] == papers[0] | {"adapters": papers[0]["adapters"] - 2 * 32 * A}


# FLOPs, torch's own counter


WAYS = {
    "full": (FullFineTuning(), {}),
    "LoRA": (LoRA(4), {}),
    "LoRA with dropout": (LoRA(4, dropout=0.1), {}),
    "LoRA-FA": (LoRAFA(4), {}),
    "DoRA": (DoRA(4), {}),
    "PiSSA": (PiSSA(4), {}),
    "one block": (PartialFineTuning(["model.layers.1"]), {}),
    "queries": (LoRA(4, targets=["q_proj"]), {}),
    "head": (LoRA(4, targets=["lm_head", "q_proj"]), {}),
    "full, checkpointing": (FullFineTuning(), {"gradient_checkpointing": True}),
    "LoRA, checkpointing": (LoRA(4), {"gradient_checkpointing": True}),
    "LoRA, bfloat16": (LoRA(4), {"dtype": torch.bfloat16}),
    "LoRA, NF4": (LoRA(4), {"nf4": True}),
    "full, autocast": (FullFineTuning(), {"autocast": torch.bfloat16}),
    "LoRA, autocast": (LoRA(4), {"autocast": torch.bfloat16}),
    "full, two micro-batches": (FullFineTuning(), {"accumulate": 2}),
    "full, SGD": (FullFineTuning(), {"optimizer": "sgd"}),
}


# Attention's backward pass goes to what is trained, or to what is below: of four products queries alone want two.
PASSED = {"one block": 1 / 2, "queries": 3 / 4, "head": 3 / 4}
SEPARATE = LlamaConfig(260, 32, 48, 2, 4, 2, 8, attention_bias=True)  # an untied head may have an adapter


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_total_is_torchs_and_the_parts_are_whose_they_are(way):
    method, options = WAYS[way]
    found = flops(partial(Llama, SEPARATE), method, 2, 16, **options)
    assert found.total == torch_count(partial(Llama, SEPARATE), method, **options)
    assert found.total == sum(map(found.part, PARTS)) == sum(map(found.in_pass, PASSES))
    assert found.part("other") == 0
    once = 2 * 32
    assert found.counts["layers", FORWARD] == once * M
    assert found.counts["head", FORWARD] == found.counts["head", INPUT] == once * E
    assert found.counts["attention", FORWARD] == once * T(16)
    assert found.counts["attention", INPUT] == once * 2 * T(16) * PASSED.get(way, 1)
    full = way.startswith("full")
    assert found.counts.get(("layers", WEIGHT), 0) == once * M * (1 if full else 0.5 if way == "one block" else 0)
    assert found.counts.get(("head", WEIGHT), 0) == once * E * full
    assert (found.in_pass(AGAIN) > 0) == ("checkpointing" in way)
    assert (found.part("adapters") > 0) == (not full and way != "one block")


def test_the_lean_step_is_counted_whole_though_torch_leaves_out_its_sums_in_place(tiny_config):
    factory, lean = partial(Llama, tiny_config), {"lean": Lean()}
    found, plain = flops(factory, LoRA(4), 2, 16, **lean), flops(factory, LoRA(4), 2, 16)
    assert torch_count(factory, LoRA(4), **lean) < found.total
    in_place = {ATEN.addmm_: lambda total, left, right, *_, **__: 2 * left[0] * left[1] * right[1]}  # of shapes
    assert found.total == torch_count(factory, LoRA(4), custom=in_place, **lean)
    for part in ("layers", "head", "attention"):
        assert found.part(part) == plain.part(part)
    assert found.counts["adapters", WEIGHT] == plain.counts["adapters", WEIGHT]


def test_with_many_rows_the_lean_step_multiplies_by_the_sum_and_it_is_the_layers(tiny_config):
    found = flops(partial(Llama, tiny_config), LoRA(4), 8, 64, lean=Lean())  # 512 rows, over twice the width
    plain = flops(partial(Llama, tiny_config), LoRA(4), 8, 64)
    assert found.part("layers") == plain.part("layers")
    assert found.counts["adapters", FORWARD] < plain.counts["adapters", FORWARD]


def test_a_model_that_another_library_made_ready(tiny_hf):
    from peft import LoraConfig, get_peft_model

    model = tiny_hf()
    alone = flops(model, LoRA(4), 2, 16, loss=hf_loss)
    ready = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    found = flops(ready, AsItIs(), 2, 16, loss=hf_loss)
    assert found.counts == alone.counts


def hf_loss(model, inputs, targets):
    return model(input_ids=inputs, labels=targets, use_cache=False).loss


def test_convolutions_are_counted_by_pass():
    def net():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten())

    batch = (torch.zeros(5, 1, 8, 8), torch.zeros(5, 32))
    found = flops(net, FullFineTuning(), batch=batch, loss=mean_square)
    first, second = 2 * 5 * 36 * 9 * 4, 2 * 5 * 16 * 9 * 8  # places, numbers a patch, channels
    assert found.counts["layers", FORWARD] == first + second
    assert found.counts["layers", INPUT] == second
    assert found.total == torch_count(net, FullFineTuning(), batch=batch, loss=mean_square)


def test_attention_of_a_net_for_digits_by_hand():
    found = flops(DigitsTransformer, FullFineTuning(), batch=DIGITS)
    assert found.counts["attention", FORWARD] == 2 * 2 * 2 * 5 * 8 * 8 * 48  # two products in each of two blocks
    assert found.total == torch_count(DigitsTransformer, FullFineTuning(), batch=DIGITS)


class Biased(nn.Module):
    """Attention with a learnt number for each pair of positions."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8, bias=False)
        self.places = nn.Parameter(torch.zeros(5, 5))

    def forward(self, x):
        x = self.project(x)
        return (x @ x.transpose(1, 2) + self.places).softmax(-1) @ x


def test_a_product_that_is_summed_into_a_gradient_is_no_weight_gradient():
    batch = (torch.zeros(3, 5, 8), torch.zeros(3, 5, 8))
    found = flops(Biased, FullFineTuning(), batch=batch, loss=mean_square)
    assert found.counts == {
        ("layers", FORWARD): 2 * 15 * 64,
        ("layers", WEIGHT): 2 * 15 * 64,
        ("attention", FORWARD): 2 * 2 * 15 * 5 * 8,
        ("attention", INPUT): 2 * 4 * 15 * 5 * 8,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("method", "weights", "s"), [(FullFineTuning(), 3, 128), (LoRA(8), 2, 2048)])
def test_smollm2_is_within_one_per_cent_of_the_formula(method, weights, s):
    M, E, P, T = 106_168_320, 28_311_552, 305_280 * 8, 2 * s * 576 * 30
    found = flops("smollm2-135m", method, 2, s)
    expected = 4 * s * (weights * (M + E) + 3 * T + (3 * P if weights == 2 else 0))
    assert found.total == pytest.approx(expected, rel=0.01)
    assert sum(on_paper(config("smollm2-135m"), method, s).values()) == expected
    assert found.part("attention") == 4 * s * 3 * T > {128: 0.03, 2048: 0.3}[s] * found.total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (FullFineTuning(), {}),
        (LoRA(4), {"gradient_checkpointing": True}),
        (DoRA(4, targets=["q_proj"]), {"accumulate": 2}),
        (LoRA(4, targets=["down_proj"]), {"nf4": True}),
        (LoRA(4, targets=["down_proj"]), {"lean": Lean()}),
    ],
    ids=str,
)
def test_flops_from_two_and_three_blocks_are_those_of_all(tiny_config, method, options, monkeypatch):
    def deep():
        return Llama(replace(tiny_config, num_hidden_layers=7))

    depths, plain = [], COUNTING.FlopCounter
    monkeypatch.setattr(
        COUNTING, "FlopCounter", lambda step: depths.append(len(step.model.model.layers)) or plain(step)
    )
    few = flops(deep, method, 2, 8, **options)
    monkeypatch.setattr("lora_lab.costs.setup.blocks_are_alike", lambda model: False)
    assert few == flops(deep, method, 2, 8, **options)  # the counts and the setting
    assert depths == [2, 3, 7]


def test_lora_on_smollm2_has_more_flops_than_full_fine_tuning_above_rank_147():
    def by_hand(blocks):  # 2 (M + E) - FIRST + 3 T + (3 P - 3 * 576) r <= 3 (M + E) + 3 T
        M, E, P, first = 3_538_944 * blocks, 28_311_552, 10_176 * blocks, 576 * (576 + 2 * 192)
        return (M + E + first) // (3 * P - 3 * 576)

    assert by_hand(30) == 147  # lesson 05 counts all 30 blocks
    assert break_even_rank(partial(Llama, replace(config("smollm2-135m"), num_hidden_layers=3)), 1, 8) == by_hand(3)


def test_the_break_even_rank_of_the_tiny_llama_by_hand(tiny_config):
    # 2 (M + E) - FIRST + 3 T + (3 P - 3 * 32) r <= 3 (M + E) + 3 T
    assert break_even_rank(partial(Llama, tiny_config), 2, 16) == (M + E + FIRST) // (3 * P - 96) == 9
    assert break_even_rank(partial(Llama, LlamaConfig(2, 2, 2, 1, 1, 1, 2)), 2, 16) == 0  # adapters above their layers


DEEP = LlamaConfig(64, 32, 64, 6, 4, 4, 8)


@functools.cache
def deep_in_full():
    return flops(partial(Llama, DEEP), FullFineTuning(), 2, 16)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_adapters_in_the_top_blocks_end_the_backward_pass_there(n):
    with torch.device("meta"):
        names = last_blocks(Llama(DEEP), n)
    assert len(names) == 7 * n
    assert names[0] == f"model.layers.{6 - n}.self_attn.q_proj"
    found = flops(partial(Llama, DEEP), LoRA(2, targets=names), 2, 16)
    full = deep_in_full()
    block = 2 * 32 * (4 * 32 * 32 + 3 * 32 * 64)
    assert found.counts["layers", FORWARD] == 6 * block
    assert found.counts["layers", INPUT] == n * block - 2 * 32 * 3 * 32 * 32  # less q, k and v of the lowest
    paper = on_paper(DEEP, LoRA(2, targets=names), 16)
    assert paper["layers"] == (6 + n) * block == full.part("layers") * (1 + n / 6) / 3
    assert found.counts["attention", INPUT] == full.counts["attention", INPUT] * n / 6
    assert paper["attention"] == found.part("attention")


# What is refused, and what is left alone


TINY = partial(Llama, LlamaConfig(260, 32, 48, 2, 4, 2, 8))
REFUSED = [
    (lambda: flops(TINY, LoRA(4), 2, 16, lean=Lean(threads=2)), ValueError, "lean.threads is 2"),
    (lambda: flops(TINY, LoRA(4), 2), ValueError, "seq_len is None"),
    (lambda: flops(TINY, LoRA(4), 0, 16), ValueError, "batch_size is 0"),
    (lambda: flops("smollm2", LoRA(4), 2, 16), ValueError, "There is no model 'smollm2'"),
    (lambda: last_blocks(TINY(), 3), ValueError, "count is 3"),
    (lambda: last_blocks(DigitsMLP(), 1), ValueError, "count is 1"),
]


@pytest.mark.parametrize(("call", "error", "says"), REFUSED)
def test_wrong_values_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
