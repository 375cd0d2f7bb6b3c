"""The divergence of a model from its base: a case worked by hand, torch's distributions, and what the penalty does."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from lora_lab import Lean, LoRA, evaluate, fit
from lora_lab.analysis.divergence import NearBase, divergence, mean_divergence
from lora_lab.inject import inject, lora_layers
from lora_lab.lean.step import apply_lean
from lora_lab.models.llama import Llama
from lora_lab.task import IGNORE, cross_entropy
from lora_lab.tasks import Examples, Task


@pytest.fixture
def base(tiny_config):
    return Llama(tiny_config, seed=3)


@pytest.fixture
def task(tiny_config):
    def part(n, seed):
        ids = torch.randint(0, tiny_config.vocab_size, (n, 10), generator=torch.Generator().manual_seed(seed))
        targets = ids[:, 1:].clone()
        targets[:, :3] = IGNORE
        return Examples(ids[:, :-1], targets)

    return Task("tokens", part(16, 0), part(6, 1), part(6, 2), part(6, 3), unit="tokens")


def moved(base, scale=0.5):
    """The base with an adapter that does something."""
    model = copy.deepcopy(base)
    inject(model, LoRA(2, 4), 0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.add_(scale * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_two_coins():
    before, after = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(divergence(before, after)) == pytest.approx(expected)
    assert float(divergence(after, before)) != pytest.approx(expected)
    assert float(divergence(before, before + 3.0)) == pytest.approx(0, abs=1e-6)  # logits, not probabilities


@torch.no_grad()
def test_the_mean_divergence_is_over_the_targets_that_count(base, task):
    tuned = moved(base)
    inputs, counts = task.validation.inputs, task.validation.targets != IGNORE
    first, second = (Categorical(logits=model(inputs)[counts]) for model in (base, tuned))
    expected = float(kl_divergence(first, second).mean())
    assert mean_divergence(base, tuned, task, "validation", batch_size=4) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01
    assert mean_divergence(base, base, task) == pytest.approx(0, abs=1e-6)
    assert mean_divergence(tuned, base, task) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("lean", [False, True])
def test_the_penalised_loss_is_cross_entropy_plus_the_weighted_divergence_in_training_alone(base, task, lean):
    model, batch = copy.deepcopy(base), (task.train.inputs, task.train.targets)
    inject(model, LoRA(2, 4), 0)
    if lean:
        apply_lean(model, Lean())
    with torch.no_grad():
        for name, layer in lora_layers(moved(base)).items():
            lora_layers(model)[name].lora_B.copy_(layer.lora_B)
    counts = batch[1] != IGNORE
    with torch.no_grad():
        plain = float(cross_entropy(model, *batch))
        expected = float(divergence(base(batch[0])[counts], model(batch[0])[counts]))
    model.train()
    loss = NearBase(0.5)(model, *batch).detach()
    assert float(loss) == pytest.approx(plain + 0.5 * expected, rel=1e-4)
    assert float(loss) > plain + 0.003
    assert float(NearBase(0)(model, *batch).detach()) == pytest.approx(plain, rel=1e-5)
    model.eval()
    assert float(NearBase(0.5)(model, *batch).detach()) == pytest.approx(plain, rel=1e-5)
    assert all(layer.lora_B.requires_grad for layer in lora_layers(model).values())


def test_a_penalty_holds_a_model_nearer_to_its_base(base, task):
    distances = []
    for weight in (0.0, 100.0):
        model, penalised = copy.deepcopy(base), replace(task, loss=NearBase(weight))
        fit(model, penalised, LoRA(4, 8), steps=20, lr=1e-2, batch_size=8, lean=Lean(), progress=False)
        distances.append(mean_divergence(base, model, task, "train"))
        assert evaluate(model, penalised) == pytest.approx(evaluate(model, task), rel=1e-5)
    assert distances[1] < 0.7 * distances[0]
    assert replace(task, loss=NearBase(0.0)).fingerprint != replace(task, loss=NearBase(100.0)).fingerprint


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"weight is -1, but it must be 0 or a positive number"):
        NearBase(-1)
