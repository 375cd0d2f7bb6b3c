"""Methods: what each makes trainable, the mark it leaves, what it refuses, and how each trains."""

import copy
import dataclasses
import pickle
from collections import OrderedDict
from dataclasses import dataclass

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from lora_lab import (
    ContinueLoRA,
    DoRA,
    FullFineTuning,
    Llama,
    LoRA,
    LoRAConfig,
    LoRAFA,
    LoRALinear,
    LoRAPlus,
    PartialFineTuning,
    PiSSA,
    RsLoRA,
    adapter_state,
    fit,
    inject,
    lora_layers,
    merge,
)
from lora_lab.methods import AsItIs
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.models.quantize import quantize_nf4
from lora_lab.tasks import mean_squared_error, planted
from lora_lab.train import DataOrder
from lora_lab.variants import DoRALinear, LoRAFALinear, PiSSALinear, RsLoRALinear
from tests.helpers import snapshot


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def frozen():
    """A net that somebody has frozen, all but one bias."""
    model = DigitsTransformer()
    model.requires_grad_(False)
    model.head.bias.requires_grad_(True)
    return model


@pytest.mark.parametrize("modules", [("head",), ("head", "layers.1"), ("layers.0.q_proj", "norm")])
def test_partial_fine_tuning_trains_the_named_modules_and_nothing_else(frozen, modules):
    PartialFineTuning(modules).prepare(frozen, seed=0)
    every = dict(frozen.named_parameters())
    expected = {name for name in every if any(name.startswith(module + ".") for module in modules)}
    assert trainable(frozen) == expected
    assert 0 < len(expected) < len(every)


def test_partial_fine_tuning_trains_no_module_that_is_not_named_through_a_shared_weight(tiny_config):
    model = Llama(tiny_config)
    before = snapshot(model)
    for names, other in ((["lm_head"], "model.embed_tokens"), (["model"], "lm_head")):
        with pytest.raises(
            ValueError,
            match=rf"^'{names[0]}' shares a weight with '{other}', so training one trains the other; name both in "
            r"modules, or neither\.$",
        ):
            PartialFineTuning(names).prepare(model, seed=0)
    assert snapshot(model) == before
    PartialFineTuning(["lm_head", "model.embed_tokens"]).prepare(model, seed=0)
    assert trainable(model) == {"model.embed_tokens.weight"}
    untied = Llama(dataclasses.replace(tiny_config, tie_word_embeddings=False))
    PartialFineTuning(["lm_head"]).prepare(untied, seed=0)
    assert trainable(untied) == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("modules", "named"), [("head", "'head'"), ([1], r"\[1\]"), (["idle"], "'idle'"), (["absent"], "'absent'")]
)
def test_partial_fine_tuning_names_what_it_cannot_train(modules, named):
    model = nn.Sequential(OrderedDict(head=nn.Linear(3, 2), idle=nn.Tanh()))
    with pytest.raises(ValueError, match=rf"{named}.*(must be a list|no parameter|top level)"):
        PartialFineTuning(modules).prepare(model, seed=0)
    assert trainable(model) == {"head.weight", "head.bias"}


def test_a_module_with_two_names_is_one_module():
    model = nn.Module()
    model.first = model.second = nn.Linear(3, 2)
    PartialFineTuning(["first"]).prepare(model, seed=0)
    assert trainable(model) == {"first.weight", "first.bias"}


LAYERS = {
    LoRA: LoRALinear,
    RsLoRA: RsLoRALinear,
    LoRAFA: LoRAFALinear,
    PiSSA: PiSSALinear,
    DoRA: DoRALinear,
    LoRAPlus: LoRALinear,
}
KINDS = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.name)
METHODS = pytest.mark.parametrize(
    "method",
    [FullFineTuning(), PartialFineTuning(("head",)), *(kind(rank=2) for kind in LAYERS)],
    ids=lambda method: method.name,
)


@METHODS
@pytest.mark.parametrize("second", [FullFineTuning(), PartialFineTuning(("head",)), LoRA(rank=2)])
def test_a_model_can_be_made_ready_once_only(method, second):
    model = DigitsMLP()
    method.prepare(model, seed=0)
    before = snapshot(model)
    says = (
        "already has adapters on 3 layers" if isinstance(method, LoRA) else f"already been prepared for '{method.name}'"
    )
    for again in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=rf"{says}.*freshly loaded"):
            second.prepare(again, seed=0)
    assert snapshot(model) == before


@pytest.mark.parametrize("second", [FullFineTuning(), LoRA(rank=2)], ids=lambda method: method.name)
def test_a_merged_model_can_be_trained_again_and_one_whose_weights_were_trained_cannot(second):
    model = pretrained()
    fit(model, TASK, LoRA(rank=2), steps=2, lr=1e-2)
    merge(model)
    weight = model.head.weight.clone()
    fit(model, TASK, second, steps=2, lr=1e-2)
    base = model.head.base.weight if isinstance(second, LoRA) else weight
    assert torch.equal(base, weight)
    trained = pretrained()
    FullFineTuning().prepare(trained, seed=0)
    inject(trained, LoRAConfig(rank=2))
    fit(trained, TASK, ContinueLoRA(), steps=1, lr=1e-2)
    merge(trained)
    with pytest.raises(
        ValueError, match=r"already been prepared for 'full', which changes its weights.*load_state_dict"
    ):
        second.prepare(trained, seed=0)
    fresh = pretrained()
    fresh.load_state_dict(trained.state_dict())
    second.prepare(fresh, seed=0)
    assert torch.equal((fresh.head.base if isinstance(second, LoRA) else fresh.head).weight, trained.head.weight)


def test_a_method_that_trains_adapters_and_more_leaves_a_mark():
    @dataclass(frozen=True)
    class WithHead(LoRA):
        name = "with head"

        def _prepare(self, model, seed):
            super()._prepare(model, seed)
            model.head.base.bias.requires_grad_(True)

    model = DigitsMLP()
    WithHead(rank=2).prepare(model, seed=0)
    merge(model)
    with pytest.raises(ValueError, match="already been prepared for 'with head'"):
        LoRA(rank=2).prepare(model, seed=0)


def test_as_it_is_trains_what_requires_gradients_already_and_changes_nothing(frozen):
    before = copy.deepcopy(frozen.state_dict())
    for _ in range(2):  # it leaves no mark
        AsItIs().prepare(frozen, seed=0)
    assert trainable(frozen) == {"head.bias"}
    assert [id(p) for p in AsItIs().groups(frozen)[0]["params"]] == [id(frozen.head.bias)]
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    FullFineTuning().prepare(frozen, seed=0)  # nor does anything keep another method from it
    AsItIs().prepare(frozen, seed=0)
    assert len(trainable(frozen)) == len(list(frozen.parameters()))


USUAL = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": "all-linear", "exclude": []}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (FullFineTuning(), {"name": "full"}),
        (PartialFineTuning(["head"]), {"name": "partial", "modules": ["head"]}),
        (AsItIs(), {"name": "as it is"}),
        (LoRA(4, targets=["head"]), USUAL | {"name": "lora", "rank": 4, "targets": ["head"]}),
        *[
            (kind(exclude=["head"]), USUAL | {"name": name, "exclude": ["head"]})
            for kind, name in {RsLoRA: "rslora", LoRAFA: "lora-fa", PiSSA: "pissa", DoRA: "dora"}.items()
        ],
        (LoRAPlus(), USUAL | {"name": "lora+", "ratio": 4.0}),
    ],
)
def test_settings_are_the_method_as_plain_data_and_a_method_is_its_values(method, expected):
    assert method.settings() == expected
    assert pickle.loads(pickle.dumps(method)) == method
    assert method != LoRA(rank=3)
    with pytest.raises(ValueError, match="ratio is 0"):
        LoRAPlus(ratio=0)


# The variants of LoRA


@KINDS
def test_a_variant_equals_inject_with_its_layer_and_the_same_numbers_and_seed(kind):
    ours, reference = DigitsMLP(), DigitsMLP()
    kind(rank=2, alpha=3, dropout=0.25, exclude=["head"]).prepare(ours, seed=7)
    inject(reference, LoRAConfig(2, 3, 0.25, exclude=["head"]), seed=7, layer=LAYERS[kind])
    assert {name: type(layer) for name, layer in lora_layers(ours).items()} == dict.fromkeys(
        ("hidden1", "hidden2"), LAYERS[kind]
    )
    assert trainable(ours) == trainable(reference)
    assert ours.state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in ours.state_dict().items())
    assert all((layer.rank, layer.alpha, layer.dropout.p) == (2, 3, 0.25) for layer in lora_layers(ours).values())


def pretrained():
    return DigitsMLP(width=16, seed=3)


TASK = planted(pretrained(), rank=2, noise=0.0, n_train=64)
RATES = {LoRAPlus: 2e-3}  # the others' is 2e-2


def train(kind):
    model, options = pretrained(), {"steps": 30, "lr": RATES.get(kind, 2e-2), "batch_size": 16, "eval_every": 10}
    return model, fit(model, TASK, kind(rank=2, alpha=4), **options)


@KINDS
def test_a_variant_learns_and_the_base_keeps_its_bits(kind):
    model, history = train(kind)
    assert history.rows[-1]["validation_loss"] < 0.7 * history.rows[0]["validation_loss"]
    before, (start, untrained) = pretrained(), (pretrained(), kind(rank=2, alpha=4))
    untrained.prepare(start, seed=0)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.base.weight, before.get_submodule(name).weight)
        assert torch.equal(layer.base.bias, before.get_submodule(name).bias)
        for part, value in layer.named_parameters(recurse=False):
            kept = torch.equal(value, getattr(start.get_submodule(name), part))
            assert kept is (kind is LoRAFA and part == "lora_A")
        if kind is PiSSA:
            assert torch.equal(layer.start_A, start.get_submodule(name).start_A)
    assert history.method["name"] == kind.name
    assert history.trainable_parameters == sum(p.numel() for p in start.parameters() if p.requires_grad)
    untrained_loss = mean_squared_error(before, TASK.validation.inputs, TASK.validation.targets)
    assert history.rows[0]["validation_loss"] == pytest.approx(untrained_loss.item(), rel=1e-6)


# LoRA+


def test_learning_rates_of_lora_plus_are_those_of_pefts_optimizer():
    ours, names = DigitsMLP(), ["hidden1", "hidden2", "head"]
    method = LoRAPlus(rank=2, ratio=4.0)
    method.prepare(ours, seed=0)
    found = {id(p): 0.01 * group.get("lr_factor", 1.0) for group in method.groups(ours) for p in group["params"]}
    theirs = peft.get_peft_model(DigitsMLP(), peft.LoraConfig(r=2, target_modules=names))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4.0)
    expected = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name in names:
        layer, twin = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert found[id(layer.lora_A)] == expected[id(twin.lora_A["default"].weight)] == 0.01
        assert found[id(layer.lora_B)] == expected[id(twin.lora_B["default"].weight)] == 0.04
    assert len(found) == len(expected) == 6


@pytest.mark.parametrize("method", [FullFineTuning(), PartialFineTuning(["head"])], ids=lambda method: method.name)
def test_weights_in_blocks_cannot_be_trained_but_adapted(method):
    model = DigitsMLP(width=64)
    quantize_nf4(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="are quantised blocks, which have no gradient; use a LoRA method"):
        method.prepare(model, seed=0)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    LoRA(rank=2).prepare(model, seed=0)
    assert any(parameter.requires_grad for parameter in model.parameters())


# Continuing


def trained_once(kind=LoRA, steps=4):
    model = pretrained()
    fit(model, TASK, kind(rank=2), steps=steps, lr=1e-2)
    return model


def test_adapters_that_are_there_are_trained_on_from_where_they_are():
    model = trained_once()
    loss = mean_squared_error(model, TASK.validation.inputs, TASK.validation.targets).item()
    first = adapter_state(model)
    history = fit(model, TASK, ContinueLoRA(), steps=4, lr=1e-2)
    assert history.rows[0]["validation_loss"] == pytest.approx(loss, rel=1e-6)
    assert not any(torch.equal(value, first[name]) for name, value in adapter_state(model).items() if "lora_" in name)
    fresh = pretrained()
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.base.weight, fresh.get_submodule(name).weight)
    assert history.method["name"] == "continue"
    again = fit(trained_once(), TASK, ContinueLoRA(), steps=4, lr=1e-2)
    assert [row["train_loss"] for row in again.rows] == [row["train_loss"] for row in history.rows]
    assert again.method == history.method  # the hash of the same start
    other = fit(trained_once(steps=5), TASK, ContinueLoRA(), steps=1, lr=1e-2)
    assert other.method["start"] != history.method["start"]


@pytest.mark.parametrize("kind", [LoRA, LoRAFA, PiSSA, DoRA, RsLoRA])
def test_each_kind_of_adapter_continues_as_it_was_trained(kind):
    model = trained_once(kind)
    expected = trainable(model)
    model.requires_grad_(True)
    ContinueLoRA().prepare(model, 0)
    assert trainable(model) == expected
    assert fit(model, TASK, ContinueLoRA(), steps=1, lr=1e-3).trainable_parameters == sum(
        parameter.numel() for name, parameter in model.named_parameters() if name in expected
    )


def test_continuing_equals_adam_by_hand_from_the_same_adapters():
    model = trained_once()
    by_hand = copy.deepcopy(model)
    fit(model, TASK, ContinueLoRA(), steps=3, lr=1e-2, batch_size=8, schedule="constant", warmup=0, clip=None)
    parameters = [parameter for parameter in by_hand.parameters() if parameter.requires_grad]
    optimizer, order = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0), DataOrder(len(TASK.train), 0)
    for step in range(3):
        batch = TASK.train[order.rows(8 * step, 8)]
        optimizer.zero_grad()
        mean_squared_error(by_hand, batch.inputs, batch.targets).backward()
        optimizer.step()
    for name, value in adapter_state(by_hand).items():
        torch.testing.assert_close(adapter_state(model)[name], value, rtol=0, atol=1e-6)
