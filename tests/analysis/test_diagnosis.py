"""diagnose: each check meets the fault that it is for, as users had it, and a healthy twin; on our models and PEFT's.

The threads are those of the public issue trackers: peft#137 is issue 137 of huggingface/peft.
"""

import copy
import re
import warnings
from collections import OrderedDict, namedtuple

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lab import DoRA, LoRA, LoRAConfig, LoRAFA, LoRALinear, PiSSA, RsLoRA, inject, merge
from lora_lab.analysis.diagnosis import diagnose
from lora_lab.variants import PiSSALinear
from tests.helpers import snapshot

pytestmark = pytest.mark.usefixtures("seeded")


CHECKS = ["adapters", "trainable", "dtype", "optimizer", "update", "base", "loading"]
WHOSE = pytest.mark.parametrize("whose", ["ours", "peft"])
Report = namedtuple("Report", ["missing_keys", "unexpected_keys"])


class Net(nn.Module):
    """Two linear layers and a norm with running statistics; the first may be computed under a checkpoint."""

    def __init__(self, reentrant=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.norm, self.second = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant is None:
            hidden = torch.tanh(self.first(x))
        else:
            hidden = checkpoint(lambda x: torch.tanh(self.first(x)), x, use_reentrant=self.reentrant)
        return self.second(self.norm(hidden))


class Words(nn.Module):
    """An embedding under a linear layer."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.words, self.head = nn.Embedding(7, 5), nn.Linear(5, 4)

    def forward(self, ids):
        return self.head(self.words(ids))


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(7)


def adapted(whose, net=None, targets=("first", "second"), **options):
    """A net with adapters, ours or peft's, in eval mode, so that the norm's statistics stay."""
    net = net if net is not None else Net()
    if whose == "ours":
        inject(net, LoRAConfig(rank=2, alpha=4, targets=list(targets)), **options)
        return net.eval()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), **options)
    torch.manual_seed(0)  # peft draws A from the global generator
    return peft.get_peft_model(net, config).eval()


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train(model, optimizer, inputs=X, steps=3):
    """As many steps as peft's page on troubleshooting has one wait before looking whether weights changed."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return model


def trained(whose, net=None, inputs=X, **options):
    model = adapted(whose, net, **options)
    return train(model, adamw(model), inputs)


def statuses(diagnosis):
    return {finding.check: finding.status for finding in diagnosis.findings}


def text(diagnosis, check):
    return next(finding.text for finding in diagnosis.findings if finding.check == check)


def problems(diagnosis):
    return [finding.check for finding in diagnosis.problems]


def adapters_of(model):
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


# A healthy model


@WHOSE
def test_a_trained_model_is_healthy_in_every_check(whose):
    base, model = Net(), adapted(whose)
    optimizer = adamw(model)
    train(model, optimizer)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data[0, :] = 0  # single zeros are no update of zero
    fresh = adapted(whose)
    report = fresh.load_state_dict(adapters_of(model), strict=False)
    assert len(report.missing_keys) > 0  # the base's, which an adapter's file does not hold
    diagnosis = diagnose(model, optimizer, base, report)
    assert statuses(diagnosis) == dict.fromkeys(CHECKS, "ok"), str(diagnosis)
    assert (diagnosis.ok, diagnosis.problems) == (True, ())
    assert diagnose(fresh, base=base, load_report=report).ok
    counts = {"adapters": "2", "trainable": "4 of 4", "optimizer": "0 of 4", "update": "0 of 2", "base": "9 of 9"}
    assert all(count in text(diagnosis, check) for check, count in counts.items())
    without_argument = dict.fromkeys(("optimizer", "base", "loading"), "not checked")
    assert statuses(diagnose(model)) == dict.fromkeys(CHECKS, "ok") | without_argument


@pytest.mark.parametrize("method", [LoRA, RsLoRA, LoRAFA, PiSSA, DoRA], ids=lambda method: method.name)
def test_every_variant_is_healthy_once_it_is_trained_and_zero_before(method):
    model = Net().eval()
    method(rank=2, alpha=4).prepare(model, seed=0)
    untrained = diagnose(model, base=Net())
    assert problems(untrained) == ["update"]
    assert "zero: 2 of 2 (in 'first' " in text(untrained, "update")
    optimizer = adamw(model)
    assert diagnose(model, optimizer, Net()).ok  # but the update is not checked yet
    diagnosis = diagnose(train(model, optimizer), optimizer, Net())
    assert statuses(diagnosis) == dict.fromkeys(CHECKS, "ok") | {"loading": "not checked"}


# No adapters


@WHOSE
def test_a_model_whose_adapters_were_merged_or_never_put_on_has_none(whose):
    model = trained(whose)
    assert diagnose(model).ok
    if whose == "ours":
        merge(model)
    else:
        model = model.merge_and_unload()
    for plain in (model, Net()):
        diagnosis = diagnose(plain)
        assert "adapters" in problems(diagnosis)
        assert "This Net has no adapters" in text(diagnosis, "adapters")
        assert statuses(diagnosis)["update"] == "not checked"
    assert problems(diagnose(Net())) == ["adapters"]
    assert problems(diagnose(Net().requires_grad_(False))) == ["adapters", "trainable"]
    assert "outside the adapters: 6, such as 'first.weight'; " in text(diagnose(Net()), "trainable")
    assert statuses(diagnose(Net(), base=Net()))["base"] == "ok"  # the norm's statistics are frozen
    assert statuses(diagnose(nn.Linear(2, 2), base=nn.Linear(2, 2)))["base"] == "not checked"


def test_half_of_a_pair_is_no_adapter():
    half = Net()
    half.first.lora_A = nn.Parameter(torch.zeros(2, 6))
    assert problems(diagnose(half)) == ["adapters"]
    half.first.lora_B = nn.Parameter(torch.ones(5, 2))
    assert "zero: 1 of 1 (in 'first' A is all zeros)" in text(diagnose(half), "update")


class Gated(LoRALinear):
    """A layer of one's own, with a part that no other has."""

    parts = (*LoRALinear.parts, "gate")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.base(x) + self.gate * (super().forward(x) - self.base(x))


def test_the_parts_of_a_layer_of_ones_own_belong_to_the_adapter():
    model = trained("ours", layer=Gated)
    assert diagnose(model, base=Net()).ok
    assert "6 of 6; outside the adapters: 0; trainable parameters: 42." in text(diagnose(model), "trainable")
    without_gates = torch.optim.SGD([p for name, p in model.named_parameters() if "lora_" in name], lr=0.1)
    assert "lacks: 2 of 6, such as 'first.gate'; " in text(diagnose(model, without_gates), "optimizer")


# Nothing trainable


def test_peft_184_an_adapter_loaded_without_is_trainable_trains_nothing(tmp_path):
    trained("peft").save_pretrained(tmp_path)
    for is_trainable in (False, True):
        model = peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=is_trainable)
        diagnosis = diagnose(model, base=Net())
        assert problems(diagnosis) == ([] if is_trainable else ["trainable"])
        assert statuses(diagnosis)["dtype"] == ("ok" if is_trainable else "not checked")
        assert ("is_trainable=True" in text(diagnosis, "trainable")) is not is_trainable


@WHOSE
def test_a_model_that_was_frozen_after_the_adapters_were_put_on_trains_nothing_or_its_head_alone(whose):
    model = trained(whose)
    head = next(p for name, p in model.named_parameters() if name.endswith("norm.bias"))
    for trains_head in (False, True):
        model.requires_grad_(False)
        head.requires_grad_(trains_head)
        outside = "1, such as " if trains_head else "0; "
        assert problems(diagnose(model)) == ["trainable"]
        assert f"in adapters: 0 of 4; outside the adapters: {outside}" in text(diagnose(model), "trainable")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "lora_" in name)
        assert diagnose(model).ok


# float16


@WHOSE
def test_diffusers_6086_adapters_in_float16_are_refused_by_a_grad_scaler(whose):
    """diffusers#6086, "Attempting to unscale FP16 gradients"."""
    if whose == "ours":
        faulty, healthy = adapted("ours").half(), adapted("ours", Net().half())
    else:
        faulty = peft.get_peft_model(
            Net().half(), peft.LoraConfig(target_modules=["first", "second"]), autocast_adapter_dtype=False
        ).eval()
        healthy = adapted("peft", Net().half())
    for model, is_faulty in ((faulty, True), (healthy, False)):
        optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu")
        scaler.scale(model(X.half()).float().square().mean()).backward()
        if is_faulty:
            with pytest.raises(ValueError, match="FP16 gradients"):
                scaler.unscale_(optimizer)
        else:
            scaler.step(optimizer)
        diagnosis = diagnose(model, optimizer, Net().half())
        assert problems(diagnosis) == (["dtype"] if is_faulty else [])
        assert ("in float16: 4 of 4, such as " if is_faulty else "stored in float32.") in text(diagnosis, "dtype")


# The optimiser


@WHOSE
def test_an_optimizer_made_before_the_adapters_does_not_know_them(whose):
    """peft's page on troubleshooting: the training runs, and the model does not improve."""
    net = Net()
    early = torch.optim.AdamW(net.parameters(), lr=0.05)
    model = adapted(whose, net)
    before = model(X)
    assert torch.equal(train(model, early)(X), before)
    assert problems(diagnose(model, early, Net())) == ["optimizer"]
    assert "lacks: 4 of 4, such as " in text(diagnose(model, early, Net()), "optimizer")
    late = adamw(model)
    assert not torch.equal(train(model, late)(X), before)
    assert statuses(diagnose(model, late, Net()))["optimizer"] == "ok"


@WHOSE
def test_an_optimizer_made_before_the_model_was_moved_holds_other_parameters(whose, monkeypatch):
    """peft's page on troubleshooting; a move makes new parameters on some devices, and here as torch's setting asks."""
    model = adapted(whose)
    before_the_move = adamw(model)
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    model.double()
    assert re.search("lacks: 4 of 4, such as .* does not: 4; ", text(diagnose(model, before_the_move), "optimizer"))
    assert statuses(diagnose(model, adamw(model)))["optimizer"] == "ok"


@WHOSE
def test_an_optimizer_may_hold_frozen_parameters_but_none_of_another_model_and_every_adapters(whose):
    model, other = trained(whose), nn.Linear(2, 2)
    everything = torch.optim.SGD(model.parameters(), lr=0.1)
    assert diagnose(model, everything).ok
    everything.add_param_group({"params": [other.weight]})
    all_but_one = torch.optim.SGD([p for p in model.parameters() if p.requires_grad][:-1], lr=0.1)
    for optimizer, says in ((everything, "lacks: 0 of 4; .* does not: 1;"), (all_but_one, "lacks: 1 of 4, such as ")):
        diagnosis = diagnose(model, optimizer)
        assert problems(diagnosis) == ["optimizer"]
        assert re.search(says, text(diagnosis, "optimizer"))


# An update of zero


@WHOSE
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_peft_137_a_reentrant_checkpoint_lets_no_gradient_through_to_the_adapters(whose):
    """peft#137, and open-unlearning#178, where all lora_B were zero after training."""
    losses = []
    for reentrant, inputs in ((True, X), (False, X), (True, X.clone().requires_grad_())):
        model = adapted(whose, Net(reentrant))
        optimizer = adamw(model)
        train(model, optimizer, inputs)
        losses.append(float(model(X).square().mean().detach()))
        diagnosis = diagnose(model, optimizer, Net())
        is_faulty = reentrant and not inputs.requires_grad
        assert problems(diagnosis) == (["update"] if is_faulty else [])
        assert ("zero: 1 of 2 (in 'first' B is all zeros)" in text(diagnosis, "update")) is is_faulty
    assert losses[0] > losses[1] == losses[2]  # the layer above learned, so the loss fell all the same


@WHOSE
def test_an_embeddings_adapter_is_zero_by_its_a(whose):
    fresh = diagnose(adapted(whose, Words(), targets=["words", "head"]))
    assert "zero: 2 of 2 (in 'words' A is all zeros)" in text(fresh, "update")
    model = trained(whose, Words(), IDS, targets=["words", "head"])
    assert diagnose(model, base=Words()).ok
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "words" in name and p.shape == (2, 7)).zero_()
    diagnosis = diagnose(model, base=Words())
    assert problems(diagnosis) == ["update"]
    assert "zero: 1 of 2 (in 'words' A is all zeros)" in text(diagnosis, "update")


@WHOSE
def test_before_the_first_step_an_update_of_zero_is_as_it_should_be_and_without_an_optimizer_a_problem(whose):
    model = adapted(whose)
    assert problems(diagnose(model)) == ["update"]
    momentum = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for optimizer in (adamw(model), momentum):
        assert not any(optimizer.state[p] for p in model.parameters())  # looking makes empty entries
        fresh = diagnose(model, optimizer)
        assert fresh.ok
        assert statuses(fresh)["update"] == "not checked"
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()  # a step in which nothing came to the adapters
        assert problems(diagnose(model, optimizer)) == ["update"]
    for state in optimizer.state.values():  # as an optimiser has it that makes its state at once
        state["step"] = torch.tensor(0.0)
    assert statuses(diagnose(model, optimizer))["update"] == "not checked"


def test_pissas_update_is_zero_where_a_and_b_are_where_they_started():
    model = adapted("ours", layer=PiSSALinear)
    assert "(in 'first' A and B are equal to their start)" in text(diagnose(model), "update")
    model.first.lora_B.data.add_(0.1)
    assert "zero: 1 of 2 (in 'second' " in text(diagnose(model), "update")
    model.second.lora_A.data.add_(0.1)
    assert diagnose(model).ok


@pytest.mark.parametrize(("start", "expected"), [("pissa", "not checked"), ("orthogonal", "not checked"), (True, "ok")])
def test_whether_pefts_adapters_learned_cannot_be_told_where_they_did_not_start_from_zeros(start, expected):
    model = trained("peft", init_lora_weights=start)
    diagnosis = diagnose(model)
    assert statuses(diagnosis)["update"] == expected
    assert (f"init_lora_weights is {start}" in text(diagnosis, "update")) is (expected == "not checked")


@WHOSE
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_adapters_on_the_meta_device_have_no_values(whose, part):
    model = trained(whose)
    for module in list(model.modules()):
        if whose == "ours" and isinstance(module, LoRALinear):
            setattr(module, part, nn.Parameter(getattr(module, part).to("meta")))
        elif isinstance(module, peft.tuners.lora.Linear):
            getattr(module, part).to("meta")
    assert "zero: 2 of 2 (in 'first' A or B is on the meta device" in text(diagnose(model), "update")


def test_each_of_pefts_adapters_on_a_layer_is_looked_at_by_its_name():
    model = trained("peft")
    model.add_adapter("spare", peft.LoraConfig(r=2, target_modules=["first", "second"]))
    diagnosis = diagnose(model)
    assert text(diagnosis, "adapters") == "Layers with adapters: 2."
    assert "zero: 2 of 4 (in 'first', adapter 'spare', B is all zeros)" in text(diagnosis, "update")
    model.delete_adapter("spare")
    assert diagnose(model).ok


# The base


@WHOSE
def test_peft_1836_a_merge_in_place_changes_the_base_and_taking_it_back_does_not_restore_its_bits(whose):
    """peft#1836 and #1904, microsoft/LoRA#190: weights that a merge in place, or its reversal, left changed."""
    model = trained(whose)
    assert statuses(diagnose(model, base=Net()))["base"] == "ok"
    if whose == "peft":
        model.merge_adapter()
        merged = diagnose(model, base=Net())
        model.unmerge_adapter()
    else:
        deltas = {name: model.get_submodule(name).delta() for name in ("first", "second")}
        with torch.no_grad():
            for name, delta in deltas.items():
                model.get_submodule(name).base.weight.add_(delta)
            merged = diagnose(model, base=Net())
            for name, delta in deltas.items():
                model.get_submodule(name).base.weight.sub_(delta)
    assert problems(merged) == ["base"]
    assert "that differ from base: 2 of 9, such as 'first.weight'; " in text(merged, "base")
    assert problems(diagnose(model, base=Net())) == ["base"]


@WHOSE
@pytest.mark.parametrize("name", ["first.weight", "second.bias", "norm.weight", "norm.running_mean"])
def test_one_changed_number_anywhere_in_the_frozen_part_is_found_and_named(whose, name):
    net, base = Net(), Net()
    for each in (net, base):
        each.register_buffer("empty", torch.empty(0))  # which shares no memory
    model = trained(whose, net)
    for given in (base, base.state_dict(), dict(base.state_dict())):
        assert statuses(diagnose(model, base=given))["base"] == "ok"
    with torch.no_grad():
        base.state_dict()[name].view(-1)[-1].add_(1e-3)
    diagnosis = diagnose(model, base=base.state_dict())
    assert problems(diagnosis) == ["base"]
    assert f"that differ from base: 1 of 10, such as {name!r}; " in text(diagnosis, "base")


@WHOSE
def test_a_base_that_is_inside_the_model_cannot_show_a_change(whose):
    net = Net()
    same_memory = net.state_dict()
    copied = copy.deepcopy(same_memory)
    model = trained(whose, net)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("norm.bias")).add_(1.0)
    for inside in (net, same_memory):
        diagnosis = diagnose(model, base=inside)
        assert statuses(diagnosis)["base"] == "not checked"
        assert "share base's memory: 9 of 9, such as " in text(diagnosis, "base")
    assert problems(diagnose(model, base=copied)) == ["base"]


@WHOSE
def test_a_base_of_other_names_is_not_compared_and_one_that_lacks_a_name_is_not_called_ok(whose):
    model, values = trained(whose), Net().state_dict()
    for base, count in (
        ({f"model.{name}": value for name, value in values.items()}, 9),
        ({name: value for name, value in values.items() if name != "second.bias"}, 1),
        ({name: value.to("meta") for name, value in values.items()}, 9),
    ):
        diagnosis = diagnose(model, base=base)
        assert statuses(diagnosis)["base"] == "not checked"
        assert f"have no counterpart in base: {count} of 9, such as " in text(diagnosis, "base")
    assert problems(diagnose(model, base=values | {"second.weight": torch.zeros(4, 6)})) == ["base"]
    model.get_submodule("first" if whose == "ours" else "base_model.model.first").to("meta")
    assert "have no counterpart in base: 2 of 9" in text(diagnose(model, base=values), "base")


@WHOSE
def test_the_bases_values_are_compared_in_the_models_own_dtype(whose):
    model = trained(whose, Net().bfloat16(), X.bfloat16())
    assert statuses(diagnose(model, base=Net()))["base"] == "ok"


@WHOSE
def test_a_copy_of_the_adapted_model_from_before_training_is_a_base_too(whose):
    model = adapted(whose)
    before = copy.deepcopy(model)
    train(model, adamw(model))
    assert statuses(diagnose(model, base=before))["base"] == "ok"


def test_a_head_that_peft_trains_beside_the_adapters_is_no_change_of_the_base():
    model = trained("peft", targets=["first"], modules_to_save=["second"])
    assert "9 of 9" in text(diagnose(model, base=Net()), "base")
    model.requires_grad_(False)  # as it is loaded for use
    assert "equal to base's: 9 of 9" in text(diagnose(model, base=Net()), "base")
    with torch.no_grad():
        model.base_model.model.second.original_module.weight.add_(1.0)
    assert "such as 'second.weight'" in text(diagnose(model, base=Net()), "base")


@WHOSE
def test_a_layer_whose_name_begins_with_that_of_an_adapted_one_is_compared_too(whose):
    def net():
        torch.manual_seed(0)
        layers = {name: nn.Linear(6, 6) for name in ("proj", "proj2")}
        return nn.Sequential(OrderedDict(layers))

    model, base = trained(whose, net(), targets=["proj"]), net()
    assert "equal to base's: 4 of 4" in text(diagnose(model, base=base), "base")
    with torch.no_grad():
        base.proj2.weight.add_(1.0)
    assert "that differ from base: 1 of 4, such as 'proj2.weight'" in text(diagnose(model, base=base), "base")


def test_an_adapted_layer_by_itself_is_a_model_too():
    base = nn.Linear(6, 5)
    layer = LoRALinear(copy.deepcopy(base), rank=2, alpha=4)
    optimizer = adamw(layer)
    train(layer, optimizer)
    assert diagnose(layer, optimizer, base).ok
    layer.base.bias.data.add_(1.0)
    assert "differ from base: 1 of 2" in text(diagnose(layer, optimizer, base), "base")


# Loading


@WHOSE
def test_transformers_36594_an_adapter_of_another_class_of_model_leaves_every_b_at_zero(whose):
    """transformers#36594 (lora_B stays zero with AutoModel) and peft#1389: the keys differ by a level of names."""
    source = trained(whose)
    if whose == "ours":
        state = adapters_of(source)
        load = nn.Module.load_state_dict
        shifted = {f"model.{name}": value for name, value in state.items()}
        options = {"strict": False}
    else:
        state = peft.get_peft_model_state_dict(source)
        load = peft.set_peft_model_state_dict
        shifted = {name.replace("base_model.model.", "base_model.model.model."): v for name, v in state.items()}
        options = {}
    model = adapted(whose)
    diagnosis = diagnose(model, base=Net(), load_report=load(model, shifted, **options))
    assert problems(diagnosis) == ["update", "loading"]
    assert re.search(r"not filled: 4, such as .*; stored tensors not used: 4, such as ", text(diagnosis, "loading"))
    healthy = diagnose(model, base=Net(), load_report=load(model, dict(state), **options))
    assert healthy.ok
    assert statuses(healthy)["loading"] == "ok"


@pytest.mark.parametrize(
    ("missing", "unexpected", "counts"),
    [
        (["model.embed.weight", "x.base_layer.weight"], [], (0, 0)),
        (["x.lora_B.default.weight"], [], (1, 0)),
        (["x.lora_embedding_A.default"], [], (1, 0)),
        (["x.weight", "x.lora_A"], [], (1, 0)),
        (["x.lora_magnitude_vector.default.weight"], [], (1, 0)),
        ([], ["y.lora_A.weight", "z"], (0, 2)),
    ],
)
def test_only_adapter_keys_count_as_missing_and_every_key_counts_as_left_over(missing, unexpected, counts):
    diagnosis = diagnose(trained("ours"), load_report=Report(missing, unexpected))
    assert problems(diagnosis) == ([] if counts == (0, 0) else ["loading"])
    assert tuple(map(int, re.findall(r": (\d+)", text(diagnosis, "loading")))) == counts


# What a diagnosis is, and what it leaves alone


@WHOSE
def test_nothing_about_the_model_the_optimizer_the_base_or_the_generators_changes(whose):
    model, base = adapted(whose, Net()).train(), Net()
    optimizer = adamw(model)
    model(X).square().mean().backward()
    optimizer.step()

    def look():
        state = [{key: float(value.sum()) for key, value in s.items()} for s in optimizer.state.values()]
        return snapshot(model), snapshot(base), state, torch.get_rng_state().tolist(), torch.is_grad_enabled()

    before = look()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagnose(model, optimizer, base, Report([], []))
    assert look() == before


@pytest.mark.parametrize(
    ("argument", "error"), [("optimizer", ValueError), ("base", ValueError), ("load_report", TypeError)]
)
def test_what_is_not_what_an_argument_asks_for_is_named(argument, error):
    with pytest.raises(error, match=f"^{argument} is 'a.json', but it must be "):
        diagnose(nn.Linear(2, 2), **{argument: "a.json"})
