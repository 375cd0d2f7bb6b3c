"""Verdicts by counting, against paper and pencil, and by computing: each turns where what it shows is broken."""

import dataclasses
import math

import pytest
import torch

from lora_lab.models import shapes
from lora_lab.studies.claims import computed
from lora_lab.studies.claims.deciding import judge, read_claims


def result_of(claim_id, *values):
    """The result on a claim, perhaps with other numbers from its first on."""
    claim = read_claims()[claim_id]
    values = [*values, *claim.values[len(values) :]]
    return judge(dataclasses.replace(claim, values=values, number=" ".join(map("{:g}".format, values)))).result


@pytest.mark.parametrize(
    ("shape", "targets", "expected"),
    [
        (shapes.config("smollm2-135m"), computed.ALL, 305_280),  # 30 blocks: 2 x 1152 + 2 x 768 + 3 x 2112
        (shapes.config("smollm2-135m"), computed.QV, 57_600),
        (computed.LLAMA_2_7B, computed.ALL, 2_498_560),  # 32 blocks: 4 x 8192 + 3 x 15104
        (computed.LLAMA_65B, computed.ALL, 799_539_200 // 64),  # 80 blocks: 4 x 16384 + 3 x 30208
        (shapes.config("llama-3-8b"), computed.MLP, 1_769_472),
    ],
)
def test_parameters_for_each_rank(shape, targets, expected):
    assert computed.adapter_size(shape, targets) == expected


def test_parameters_of_whole_models():
    assert computed.parameters(computed.LLAMA_2_7B) == 6_738_415_616
    assert computed.parameters(computed.LLAMA_65B) == 65_285_660_672
    assert computed.parameters(shapes.config("smollm2-135m")) == 134_515_008
    assert computed.GPT3_ADAPTER == 18_874_368
    assert computed.parameters(shapes.config("smollm2-135m"), "_proj") == 106_168_320  # which QLoRA quantises


@pytest.mark.parametrize(
    ("claim_id", "verdict", "measured", "other", "turned"),
    [
        ("checkpoint-10000-times-smaller", "stands", "9,285 times", 3000, "falls"),
        ("hundred-models-354-gb", "stands", "354 GB", 450, "falls"),
        ("vera-lora-count", "stands", "159.9 million", 80, "falls"),
        ("double-quantisation-0-37-bits", "stands", "0.373 bits", 0.5, "falls"),
        ("quiz-8b-in-6-gb", "falls", "16.1 GB", 56, "stands"),
        ("two-percent-of-the-compute", "falls", "72 % of the FLOPs", 72, "stands"),
        ("gpt3-needs-1-2-tb", "untestable", "6.85 bytes a weight", 2.8, "stands"),
        ("adapters-are-small", "depends", "all layers of smollm2-135m, rank 192: 43.6 %", 50, "stands"),
        ("qlora-4-times-less-than-lora", "depends", "yes: llama-65b rank 1 3.77 times. no: ", 99, "falls"),
        ("checkpoint-ratio-elsewhere", "depends", "rank 4 on query and value matrices, 584", 10, "stands"),
        ("two-percent-of-the-parameters", "depends", "all layers: 0.26 % of llama-3-8b", 20, "falls"),
        ("full-7b-112-gb-lora-15", "stands", "107.8 and 14.6 GB; 1 % is rank 27", 99, "falls"),
        ("25-percent-faster-gpt3", "depends", "24.6 % less time", 99, "falls"),
        ("qlora-65b-in-48-gb", "stands", "rank 64 on all layers: 45.3 GiB with 512", 40, "depends"),
        ("checkpointing-costs-a-third", "depends", "llama-3-8b, LoRA r=8 +46 %", 99, "falls"),
        ("last-block-a-third", "depends", "matrices alone 0.34", 0.9, "falls"),
    ],
)
def test_the_number_of_the_claim_decides(claim_id, verdict, measured, other, turned):
    result = result_of(claim_id)
    assert (result.verdict, result.machine) == (verdict, "any")
    assert measured in result.measured
    assert result_of(claim_id, other).verdict == turned


@pytest.mark.parametrize(
    ("claim_id", "values", "verdict"),
    [
        ("25-percent-faster-gpt3", (25, 32.5, 43.1), "depends"),
        ("25-percent-faster-gpt3", (25, 30.0, 30.0), "falls"),
        ("attention-256-mlp-128", (0.25, 0.24, 0.49, 0.70), "depends"),
        ("attention-256-mlp-128", (0.25, 0.24, 0.49, 0.80), "falls"),
        ("full-7b-112-gb-lora-15", (15.12, 56), "falls"),
    ],
)
def test_further_numbers_of_the_claim_decide_too(claim_id, values, verdict):
    assert result_of(claim_id, *values).verdict == verdict


def test_a_high_rank_has_more_flops_than_full_fine_tuning():
    assert computed.flop_ratio("smollm2-135m", 146) <= 1 < computed.flop_ratio("smollm2-135m", 148)
    result = result_of("never-more-flops-than-full")
    assert result.verdict == "falls"
    assert "rank 148 1.00" in result.measured


def test_a_formula_for_square_matrices_counts_too_much_where_they_are_not():
    result = result_of("two-l-d-r-parameters")
    assert result.verdict == "depends"
    assert "69,120 r by the formula, 57,600 r counted" in result.measured


def test_the_copies_of_the_heads_gradient_count_where_the_head_is_the_embedding():
    tied = shapes.config("smollm2-135m")
    untied = dataclasses.replace(tied, tie_word_embeddings=False)
    whole, head, for_each_rank = 134_515_008, 49_152 * 576, 305_280
    assert computed.rank_of_equal_memory(tied, gradients=True) == (12 * whole + 8 * head) // (16 * for_each_rank) + 1
    assert computed.rank_of_equal_memory(untied, gradients=True) == 12 * (whole + head) // (16 * for_each_rank) + 1
    assert computed.rank_of_equal_memory(tied, gradients=False) == 8 * whole // (12 * for_each_rank) + 1


# Small layers


def inject_with_b(model, config, inject=computed.inject):
    names = inject(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1)
    return names


def clear_b(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()


def layer_with_both_zero(*arguments, adapted_linear=computed.adapted_linear, **options):
    layer = adapted_linear(*arguments, **options)
    layer.lora_A.data.zero_()
    return layer


def first_matrix_alone(*shape, seed=0, random_matrix=computed.random_matrix, **options):
    return random_matrix(*shape, seed=seed, **options) * (seed == 0)


def losses_with_usual_a(factor, *others, adam_losses=computed.adam_losses):
    return adam_losses(1, *others)


TURNED = [  # claim, verdict; what is replaced, by what, and the verdict then
    ("fresh-adapter-changes-nothing", "stands", "inject", inject_with_b, "falls"),
    ("b-zero-cannot-learn", "falls", "adapted_linear", layer_with_both_zero, "stands"),
    ("subtracting-recovers-w0", "falls", "random_matrix", first_matrix_alone, "stands"),
    ("merged-adds-no-latency", "stands", "merge", lambda model: None, "falls"),  # two small products more
    ("merged-computes-the-same", "stands", "merge", clear_b, "falls"),
    ("two-real-knobs", "stands", "adam_losses", losses_with_usual_a, "falls"),
    ("alpha-is-a-learning-rate", "stands", "adam_losses", losses_with_usual_a, "falls"),
    ("many-terms-mean-structure", "falls", "gaussian", lambda shape, generator: torch.ones(shape), "stands"),
    ("lower-loss-better-answers", "falls", "random_matrix", lambda *shape: torch.zeros(shape), "stands"),
    ("nf4-merge-loses-90-percent", "depends", "near", lambda value, claimed: claimed != 1, "falls"),
]


@pytest.mark.parametrize(("claim_id", "verdict", "name", "other", "turned"), TURNED)
def test_a_verdict_turns_where_what_it_shows_is_broken(monkeypatch, claim_id, verdict, name, other, turned):
    assert result_of(claim_id).verdict == verdict
    monkeypatch.setattr(f"{computed.__name__}.{name}", other)
    assert result_of(claim_id).verdict == turned


def test_the_losses_have_different_rates_for_a_and_b():
    plain = computed.adam_losses(1, 0.01, 0.01, 8.0)
    assert plain[0] == computed.adam_losses(1, 0.02, 0.01, 8.0)[0]
    assert computed.adam_losses(1, 0.02, 0.01, 8.0)[-1] != pytest.approx(plain[-1], rel=1e-4)
    assert computed.adam_losses(1, 0.01, 0.02, 8.0)[1] != pytest.approx(plain[1], rel=1e-4)


def test_random_directions_are_below_the_threshold():
    result = result_of("any-direction-is-an-intruder")
    assert result.verdict == "stands"
    assert float(result.measured.split()[0]) == pytest.approx(math.sqrt(2 * math.log(4096) / 4096), rel=0.12)


def test_four_bits_round_away_small_updates_and_keep_their_norm_along_them_alone():
    yes, no = result_of("nf4-merge-loses-90-percent").measured.split(". no: ")
    small = "any weights, 1 % of the weight's norm: 97 % of the codes stay, the"
    assert f"yes: {small} change along the update is 0.97 times the update" in yes
    assert f"{small} whole change is 4.97 times the update" in no
    assert "on the grid" not in yes
