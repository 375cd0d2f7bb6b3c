"""The task planted: a hidden update of known rank."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import Examples, planted

PARTS = ("train", "validation", "test", "off_domain")


def one_layer():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 12))


def least_squares(examples):
    """The weight (12, 20) and bias (12,) that explain the answers best, and what they leave unexplained."""
    inputs = F.pad(examples.inputs.double(), (0, 1), value=1.0)
    solution = torch.linalg.lstsq(inputs, examples.targets.double()).solution
    return solution[:-1].T, solution[-1], examples.targets.double() - inputs @ solution


@pytest.mark.parametrize("rank", [1, 4])
def test_the_hidden_update_has_exactly_the_rank_and_the_size_of_the_weight(rank):
    model = one_layer()
    task = planted(model, rank=rank, noise=0.1)
    weight, bias, rest = least_squares(task.validation)
    sizes = torch.linalg.svdvals(weight - model[0].weight.detach().double())
    assert sizes[rank - 1] > 0.05 * sizes[0]
    assert sizes[rank:].max() < 1e-5 * sizes[0]
    assert float(sizes.norm()) == pytest.approx(float(model[0].weight.detach().norm()), rel=1e-4)
    torch.testing.assert_close(bias, model[0].bias.double(), rtol=0, atol=1e-5)
    assert rest.abs().max() < 1e-4


def test_noise_is_in_the_training_answers_only():
    model = one_layer()
    task, clean = planted(model, rank=2, noise=0.3), planted(model, rank=2, noise=0.0)
    for part in PARTS[1:]:
        assert torch.equal(task.parts[part].targets, clean.parts[part].targets)
    assert torch.equal(task.train.inputs, clean.train.inputs)
    noise = task.train.targets - clean.train.targets
    everything = torch.cat([clean.parts[part].targets for part in PARTS[:3]])
    assert float(noise.std()) == pytest.approx(0.3 * float(everything.std()), rel=0.05)
    assert abs(float(noise.mean())) < 0.02 * float(everything.std())
    assert least_squares(clean.train)[2].abs().max() < 1e-4
    assert least_squares(task.train)[2].std() > 0.2 * float(everything.std())


def test_off_domain_answers_are_the_models_own_three_times_as_far_out():
    model = one_layer()
    task = planted(model, rank=2)
    with torch.no_grad():
        assert torch.equal(task.off_domain.targets, model(task.off_domain.inputs))
        assert not torch.allclose(task.validation.targets, model(task.validation.inputs), atol=0.1)
    assert float(task.off_domain.inputs.std()) == pytest.approx(3.0, rel=0.05)
    assert float(task.train.inputs.std()) == pytest.approx(1.0, rel=0.05)


def test_parts_of_planted_share_no_input():
    task = planted(one_layer(), n_train=40)
    assert [len(part) for part in task.parts.values()] == [40, 256, 256, 256]
    rows = [tuple(row) for part in task.parts.values() for row in part.inputs.tolist()]
    assert len(set(rows)) == len(rows)


def test_planted_touches_the_target_layers_only_and_leaves_the_model_alone():
    model = DigitsMLP(width=16).train()
    before = copy.deepcopy(model.state_dict())
    task = planted(model, rank=3, noise=0.0, targets=["head"])
    assert model.training is True
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    inputs = task.validation.inputs
    with torch.no_grad():
        hidden = F.relu(model.hidden2(F.relu(model.hidden1(inputs))))
        assert not torch.allclose(model(inputs), task.validation.targets, atol=1e-2)
    assert least_squares(Examples(hidden, task.validation.targets))[2].abs().max() < 1e-4
    everywhere = planted(model, rank=3, noise=0.0)
    assert least_squares(Examples(hidden, everywhere.validation.targets))[2].abs().max() > 1e-2


def test_planted_repeats_by_seed_and_leaves_the_global_generator_alone():
    model = one_layer()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = planted(model, seed=4).fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert planted(model, seed=4).fingerprint == first
    assert planted(model, seed=5).fingerprint != first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"noise": -0.1}, "noise is -0.1"),
        ({"rank": 0}, "rank is 0"),
        ({"targets": ["head"]}, "'head' matches no module"),
        ({"n_train": 0}, "n_train is 0"),
        ({"noise": 10**400}, "noise is 1"),
        ({"model": nn.Flatten()}, "A Flatten has no linear layer"),
    ],
)
def test_planted_says_what_is_wrong(options, says):
    with pytest.raises(ValueError, match=says):
        planted(**{"model": one_layer(), **options})


def test_answers_of_planted_carry_no_graph():
    task = planted(one_layer())
    assert not any(part.targets.requires_grad for part in task.parts.values())


def test_a_planted_task_is_made_on_the_cpu_wherever_the_model_is(monkeypatch):
    model, moved = one_layer(), []
    monkeypatch.setattr(nn.Module, "cpu", lambda self: moved.append(self) or self)
    planted(model)
    assert len(moved) == 1  # a copy:
    assert moved[0] is not model


def test_a_planted_task_is_of_the_type_of_the_models_weights():
    task = planted(one_layer().double())
    assert {part.inputs.dtype for part in task.parts.values()} == {torch.float64}
    assert {part.targets.dtype for part in task.parts.values()} == {torch.float64}
