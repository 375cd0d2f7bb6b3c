"""Methods: what each makes trainable, the mark it leaves, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from lora_lab import FullFineTuning, Llama, LoRA, LoRAConfig, PartialFineTuning, inject, lora_layers, merge
from lora_lab.methods import Method
from lora_lab.models.digits import DigitsMLP, DigitsTransformer


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model):
    return [(name, id(m)) for name, m in model.named_modules()], trainable(model), model.state_dict().keys()


@pytest.fixture
def frozen():
    """A net that somebody has frozen, all but one bias."""
    model = DigitsTransformer()
    model.requires_grad_(False)
    model.head.bias.requires_grad_(True)
    return model


def test_full_fine_tuning_trains_every_parameter(frozen):
    before = copy.deepcopy(frozen.state_dict())
    FullFineTuning().prepare(frozen, seed=0)
    assert trainable(frozen) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())


def test_full_fine_tuning_trains_a_tied_matrix_once(tiny_config):
    model = Llama(tiny_config)
    FullFineTuning().prepare(model, seed=0)
    (group,) = FullFineTuning().groups(model)
    assert len({id(p) for p in group["params"]}) == len(group["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("modules", [("head",), ("head", "layers.1"), ("layers.0.q_proj", "norm")])
def test_partial_fine_tuning_trains_the_named_modules_and_nothing_else(frozen, modules):
    PartialFineTuning(modules).prepare(frozen, seed=0)
    every = dict(frozen.named_parameters())
    expected = {name for name in every if any(name.startswith(module + ".") for module in modules)}
    assert trainable(frozen) == expected
    assert 0 < len(expected) < len(every)


@pytest.mark.parametrize("name", ["heads", "layers.2", "", "proj"])
def test_partial_fine_tuning_names_an_unknown_module_and_changes_nothing(frozen, name):
    before = snapshot(frozen)
    with pytest.raises(ValueError, match=rf"no module '{name}'.*\['embed', 'layers', 'norm', 'head'\]"):
        PartialFineTuning(["norm", name]).prepare(frozen, seed=0)
    assert snapshot(frozen) == before
    PartialFineTuning(["norm"]).prepare(frozen, seed=0)  # a refusal leaves no mark


def test_lora_trains_the_adapters_and_nothing_else(frozen):
    method = LoRA(rank=3, alpha=5, dropout=0.1, targets=["q_proj", "v_proj"])
    method.prepare(frozen, seed=0)
    assert trainable(frozen) == {
        f"layers.{i}.{name}_proj.lora_{part}" for i in range(2) for name in "qv" for part in "AB"
    }
    for layer in lora_layers(frozen).values():
        assert (layer.rank, layer.scaling, layer.dropout.p) == (3, 5 / 3, 0.1)


def test_lora_equals_inject_with_the_same_numbers_and_seed():
    ours, reference, other = DigitsMLP(), DigitsMLP(), DigitsMLP()
    LoRA(rank=2, alpha=4, exclude=["head"]).prepare(ours, seed=7)
    inject(reference, LoRAConfig(rank=2, alpha=4, exclude=["head"]), seed=7)
    LoRA(rank=2, alpha=4, exclude=["head"]).prepare(other, seed=8)
    assert ours.state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in ours.state_dict().items())
    assert not torch.equal(ours.hidden1.lora_A, other.hidden1.lora_A)
    assert type(ours.head) is nn.Linear


def test_lora_checks_its_numbers_when_it_is_made():
    with pytest.raises(ValueError, match="rank is 0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="targets is 'q_proj'"):
        LoRA(targets="q_proj")


METHODS = pytest.mark.parametrize("method", [FullFineTuning(), PartialFineTuning(("head",)), LoRA(rank=2)])


@METHODS
def test_groups_hold_all_that_is_trainable_and_nothing_else(method):
    model = DigitsMLP()
    method.prepare(model, seed=0)
    grouped = [parameter for group in method.groups(model) for parameter in group["params"]]
    assert [id(p) for p in grouped] == [id(p) for p in model.parameters() if p.requires_grad]


@METHODS
@pytest.mark.parametrize("second", [FullFineTuning(), PartialFineTuning(("head",)), LoRA(rank=2)])
def test_a_model_can_be_made_ready_once_only(method, second):
    model = DigitsMLP()
    method.prepare(model, seed=0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"already been made ready for '{method.name}'.*freshly loaded"):
        second.prepare(model, seed=0)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="already been made ready"):
        second.prepare(copy.deepcopy(model), seed=0)


@METHODS
def test_a_model_with_adapters_is_refused_until_they_are_merged(method):
    model = DigitsMLP()
    inject(model, LoRAConfig(rank=2))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"already has adapters on 3 layers; merge them with merge\(model\)"):
        method.prepare(model, seed=0)
    assert snapshot(model) == before
    merge(model)
    method.prepare(model, seed=0)
    assert trainable(model)


def test_a_method_that_would_train_nothing_says_so():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match="'partial' leaves no parameter"):
        PartialFineTuning(("1",)).prepare(model, seed=0)
    with pytest.raises(ValueError, match="'partial' leaves no parameter"):
        PartialFineTuning(()).prepare(model, seed=0)


def test_a_failed_injection_leaves_no_mark():
    model = DigitsMLP()
    with pytest.raises(ValueError, match="matches no module"):
        LoRA(targets=["q_proj"]).prepare(model, seed=0)
    LoRA(targets=["head"]).prepare(model, seed=0)


def test_a_method_that_does_not_say_how_is_a_programming_error():
    class Nameless(Method):
        name = "nameless"

    with pytest.raises(TypeError, match="Nameless must say how"):
        Nameless().prepare(DigitsMLP(), seed=0)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (FullFineTuning(), {"name": "full"}),
        (PartialFineTuning(["head"]), {"name": "partial", "modules": ["head"]}),
        (
            LoRA(rank=4, alpha=2, targets=["head"]),
            {"name": "lora", "rank": 4, "alpha": 2, "dropout": 0.0, "targets": ["head"], "exclude": ()},
        ),
    ],
)
def test_settings_are_the_method_as_plain_data(method, expected):
    assert method.settings() == expected
