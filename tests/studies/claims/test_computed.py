"""Verdicts by computing with small layers: each turns where the thing it shows is broken."""

import math

import pytest
import torch

from lora_lab.studies.claims import computed
from lora_lab.studies.claims.deciding import judge, read_claims


def result_of(claim_id):
    return judge(read_claims()[claim_id])


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
    ("many-terms-mean-structure", "falls", "rank.gaussian", lambda shape, generator: torch.ones(shape), "stands"),
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
