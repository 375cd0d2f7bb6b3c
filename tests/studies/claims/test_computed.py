"""Verdicts by counting, against paper and pencil, and by computing: each turns where what it shows is broken."""

import dataclasses

import pytest

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
        ("quiz-8b-in-6-gb", "falls", "16.1 GB", 56, "stands"),
        ("qlora-4-times-less-than-lora", "stands", "largest first: llama-65b rank 1 3.77 times", 5, "falls"),
        ("qlora-65b-in-48-gb", "stands", "rank 64 on all layers: 45.3 GiB with 512", 40, "depends"),
        ("checkpointing-costs-a-third", "depends", "llama-3-8b, LoRA r=8 +46 %", 99, "falls"),
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
        ("attention-256-mlp-128", (0.25, 0.24, 0.49, 0.70), "depends"),
        ("attention-256-mlp-128", (0.25, 0.24, 0.49, 0.80), "falls"),
    ],
)
def test_further_numbers_of_the_claim_decide_too(claim_id, values, verdict):
    assert result_of(claim_id, *values).verdict == verdict


def test_the_copies_of_the_heads_gradient_count_where_the_head_is_the_embedding():
    tied = shapes.config("smollm2-135m")
    untied = dataclasses.replace(tied, tie_word_embeddings=False)
    whole, head, for_each_rank = 134_515_008, 49_152 * 576, 305_280
    assert computed.rank_of_equal_memory(tied, gradients=True) == (12 * whole + 8 * head) // (16 * for_each_rank) + 1
    assert computed.rank_of_equal_memory(untied, gradients=True) == 12 * (whole + head) // (16 * for_each_rank) + 1
    assert computed.rank_of_equal_memory(tied, gradients=False) == 8 * whole // (12 * for_each_rank) + 1


# Small layers


def layer_with_both_zero(*arguments, adapted_linear=computed.adapted_linear, **options):
    layer = adapted_linear(*arguments, **options)
    layer.lora_A.data.zero_()
    return layer


def losses_with_usual_a(factor, *others, adam_losses=computed.adam_losses):
    return adam_losses(1, *others)


TURNED = [  # claim, verdict; what is replaced, by what, and the verdict then
    ("b-zero-cannot-learn", "falls", "adapted_linear", layer_with_both_zero, "stands"),
    ("two-real-knobs", "stands", "adam_losses", losses_with_usual_a, "falls"),
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


def test_four_bits_round_away_small_updates_and_keep_their_norm_along_them_alone():
    yes, no = result_of("nf4-merge-loses-90-percent").measured.split(". no: ")
    small = "any weights, 1 % of the weight's norm: 97 % of the codes stay, the"
    assert f"yes: {small} change along the update is 0.97 times the update" in yes
    assert f"{small} whole change is 4.97 times the update" in no
    assert "on the grid" not in yes
