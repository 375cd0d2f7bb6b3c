"""Which layers are adapted and by what: the registry, refusals, tied weights, and what "all-linear" does not reach."""

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_lab import LoRA, LoRAConfig, LoRALinear, adapter_state, inject, layers, lora_layers, merge, save_adapter
from lora_lab.adapters.edit import off, switch
from lora_lab.adapters.peft_format import load_adapter
from lora_lab.inject import match_layers
from lora_lab.layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRAOutProjection, lora_class, register
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.quantize import BlockLinear
from lora_lab.variants import DoRALinear, RsLoRALinear
from tests.helpers import perturbed, randomise, relative_error, snapshot
from tests.tiny_models import PICTURES, SHAPE, Pictures, bert, falcon, fresh, gpt2, llama, mixtral, t5, vit, whisper


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(layers, "_REGISTERED", dict(layers._REGISTERED))
    torch.manual_seed(0)


class EveryKind(nn.Module):
    """One layer of each kind that is known from the start."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.words = nn.Embedding(7, 4)
        self.image = nn.Conv2d(2, 3, 3)
        self.gpt = hf.pytorch_utils.Conv1D(5, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.blocks = BlockLinear(torch.zeros(2, 20, dtype=torch.uint8), "Q4_1", (2, 32))
        self.norm = nn.LayerNorm(4)


# The registry


def test_each_kind_of_layer_has_its_class_and_others_have_none():
    found = {name: lora_class(module) for name, module in EveryKind().named_modules() if name}
    assert found == {
        "linear": LoRALinear,
        "words": LoRAEmbedding,
        "image": LoRAConv2d,
        "gpt": LoRAConv1D,
        "attention": None,
        "attention.out_proj": LoRAOutProjection,
        "blocks": LoRALinear,
        "norm": None,
    }


@pytest.mark.filterwarnings("ignore:'all-linear' does not reach")
def test_all_linear_means_layers_registered_as_linear_and_names_mean_any():
    assert inject(EveryKind(), LoRAConfig(rank=2)) == ["linear", "gpt", "attention.out_proj", "blocks"]
    named = ["words", "image", "linear"]
    model = EveryKind()
    assert inject(model, LoRAConfig(rank=2, targets=named)) == ["linear", "words", "image"]
    assert [type(layer) for layer in lora_layers(model).values()] == [LoRALinear, LoRAEmbedding, LoRAConv2d]


def test_a_variant_is_put_only_where_it_derives_from_the_class_of_the_kind():
    model = EveryKind()
    fits = {name for name, module in model.named_modules() if name and lora_class(module, RsLoRALinear)}
    assert fits == {"linear", "blocks"}
    with pytest.raises(ValueError, match="'words' matches 'words', a Embedding, which cannot be adapted here"):
        inject(model, LoRAConfig(rank=2, targets=["linear", "words"]), layer=DoRALinear)

    class Louder(LoRAEmbedding):
        @property
        def scaling(self):
            return 2 * super().scaling

    inject(model, LoRAConfig(rank=2, alpha=3, targets=["words"]), layer=Louder)
    assert type(model.words) is Louder
    assert model.words.scaling == 3.0


class Named(nn.Linear):
    """Computes as nn.Linear does, has a constructor of its own, and carries something."""

    def __init__(self, width):
        super().__init__(width, 5, bias=False)
        self.note = "kept"


class Apart(nn.Linear):
    """Has a forward pass of its own, of which nobody knows what it computes."""

    def forward(self, x):
        return x @ self.weight.sign().T


class InBytes(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)


class WithScales(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.register_buffer("scales", torch.ones(8))


class InEightBits(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


class Router(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return scores.sigmoid(), scores


@pytest.mark.parametrize("device", ["cpu", "meta", "fake"])
@pytest.mark.parametrize(
    ("make", "fits"),
    [
        (lambda: Named(8), True),
        (lambda: hf.models.falcon.modeling_falcon.FalconLinear(8, 5), True),
        (lambda: Apart(8, 5), False),
        (InBytes, False),
        (WithScales, False),
        (InEightBits, False),
        (lambda: Router(8, 5), False),
        (lambda: hf.integrations.bitnet.AutoBitLinear(8, 8), False),
        (lambda: hf.integrations.finegrained_fp8.FP8Linear(8, 8), False),
        (lambda: torch.nn.utils.parametrizations.weight_norm(Named(8)), False),
    ],
)
def test_a_class_derived_from_linear_is_adapted_if_it_inherits_the_forward_and_holds_a_plain_matrix(make, fits, device):
    with FakeTensorMode() if device == "fake" else torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.ModuleDict({"first": nn.Linear(8, 8), "own": make()})
        assert match_layers(model, "all-linear", ()) == {"first": LoRALinear} | ({"own": LoRALinear} if fits else {})
        if not fits:
            with pytest.raises(ValueError, match=rf"'own' matches 'own', a {type(model['own']).__name__}, which"):
                inject(model, LoRAConfig(targets=["own"]))


@pytest.mark.parametrize("layer", [LoRALinear, RsLoRALinear, DoRALinear])
def test_a_merged_layer_of_a_derived_class_keeps_its_class_and_what_it_carries(layer):
    base = Named(4)
    model, x = nn.ModuleDict({"own": base}), torch.randn(6, 4)
    inject(model, LoRAConfig(rank=2), layer=layer)
    nn.init.normal_(model["own"].lora_B)
    before, expected = base.weight.clone(), model["own"](x)
    merge(model)
    assert (type(model["own"]), model["own"].note) == (Named, "kept")
    torch.testing.assert_close(model["own"](x), expected)
    assert (base(x) - expected).abs().max() > 0.1
    assert torch.equal(base.weight, before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Doubling(nn.Linear):
    """A layer that computes twice what nn.Linear does."""

    def forward(self, x):
        return 2 * super().forward(x)


class LoRADoubling(LoRALinear):
    def forward(self, x):
        narrow = nn.functional.linear(self.dropout(x), self.lora_A)
        return self.base(x) + 2 * self.scaling * nn.functional.linear(narrow, self.lora_B)

    def merged(self):
        plain = copy.deepcopy(self.base)
        plain.weight = nn.Parameter(self.weight.detach(), requires_grad=False)
        return plain


@pytest.mark.parametrize("base", [Doubling, f"{__name__}.Doubling"], ids=["class", "name"])
def test_a_layer_of_ones_own_joins_by_register(base, tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), Doubling(5, 3))
    original, x = copy.deepcopy(model), torch.randn(6, 4)
    register(base, LoRADoubling, linear=True)
    assert inject(model, LoRAConfig(rank=2, alpha=3)) == ["0", "1"]
    assert type(model[1]) is LoRADoubling
    assert torch.equal(model(x), original(x))
    nn.init.normal_(model[1].lora_B)
    changed = model(x)
    assert (changed - original(x)).abs().max() > 0.1
    with off(model):
        assert torch.equal(model(x), original(x))
    state = adapter_state(model)
    save_adapter(model, tmp_path)
    back = copy.deepcopy(original)
    load_adapter(back, tmp_path)
    assert torch.equal(back(x), changed)
    nn.init.zeros_(back[1].lora_B)
    switch(back, state)
    assert torch.equal(back(x), changed)
    assert merge(model) == ["0", "1"]
    assert type(model[1]) is Doubling
    torch.testing.assert_close(model(x), changed)


# All or nothing


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_constructor_that_fails_leaves_the_model_as_it_was(error, at):
    made = []

    class Failing(LoRALinear):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
            if len(made) == at:
                raise error("no more")

    model = DigitsMLP(width=4)
    model.hidden1.bias.requires_grad_(False)
    model.hidden2.eval()
    before = snapshot(model)
    with pytest.raises(error, match="no more"):
        inject(model, LoRAConfig(rank=2), layer=Failing)
    assert len(made) == at
    assert made[0].base is model.hidden1
    assert snapshot(model) == before
    made.clear()
    assert inject(model, LoRAConfig(rank=2)) == ["hidden1", "hidden2", "head"]


@pytest.mark.parametrize("make", [gpt2, falcon, Pictures])
def test_every_kind_of_layer_is_merged_over_another_base(make):
    """The update is that of the adapter, the rest the other base's, and neither changes."""
    model = fresh(make)
    other = perturbed(model).bfloat16()
    targets = PICTURES[:3] if make is Pictures else "all-linear"
    names = inject(model, LoRAConfig(rank=2, alpha=3, targets=targets))
    updates = {name: layer.delta() for name, layer in lora_layers(randomise(model)).items()}
    before, kinds = snapshot(other), {name: type(other.get_submodule(name)) for name in names}
    rest = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith(tuple(names))}
    assert merge(model, into="full-precision", base=other) == names
    assert snapshot(other) == before
    for name, update in updates.items():
        found, full = model.get_submodule(name), other.get_submodule(name)
        assert type(found) is kinds[name]
        assert found.weight.dtype == torch.float32
        assert relative_error(found.weight, full.weight.float() + update) < 1e-6
        bias = getattr(full, "bias", None)
        assert bias is None or torch.equal(found.bias, bias.float())
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in rest.items())
    assert rest


# Tied weights


def shared_parameter():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    return model, ["a", "b"]


def shared_module():
    layer = nn.Linear(3, 3)
    return nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": nn.Linear(3, 3)}), ["a"]


def shared_with_an_embedding():
    model = nn.ModuleDict({"words": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "c": nn.Linear(3, 3)})
    model["head"].weight = model["words"].weight
    return model, ["words", "head"]


def shared_blocks():
    model = nn.ModuleDict(
        {name: BlockLinear(torch.zeros(2, 20, dtype=torch.uint8), "Q4_1", (2, 32)) for name in ("a", "b", "c")}
    )
    model["b"].packed = model["a"].packed
    return model, ["a", "b"]


def tied_llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, tie_word_embeddings=True)), ["embed_tokens", "lm_head"]


def tied_gpt2():
    return gpt2(tied=True), ["wte", "lm_head"]


def tied_t5():
    return t5(), ["shared"]


@pytest.mark.parametrize(
    "make", [shared_parameter, shared_module, shared_with_an_embedding, shared_blocks, tied_llama, tied_gpt2, tied_t5]
)
def test_neither_side_of_a_tied_pair_is_adapted(make):
    model, tied = make()
    for target in tied:
        before = snapshot(model)
        with pytest.raises(ValueError, match=rf"weight of '[\w.]*{target}' is shared with another module"):
            inject(model, LoRAConfig(rank=2, targets=[target]))
        assert snapshot(model) == before


@pytest.mark.parametrize(
    ("make", "free"),
    [
        (shared_parameter, ["c"]),
        (shared_module, ["c"]),
        (shared_with_an_embedding, ["c"]),
        (tied_llama, ["q_proj", "up_proj"]),
        (tied_gpt2, ["c_attn", "wpe"]),
        (tied_t5, ["q", "wi", "relative_attention_bias"]),
    ],
)
def test_merging_changes_the_weights_of_adapted_layers_only_and_unties_none(make, free):
    model, _ = make()
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    names = inject(model, LoRAConfig(rank=2, targets=free))
    assert merge(randomise(model)) == names
    after = dict(model.named_parameters(remove_duplicate=False))
    adapted = {f"{name}.weight" for name in names}
    assert after.keys() == before.keys()
    assert {name for name in after if not torch.equal(after[name], values[name])} == adapted
    own = adapted | {f"{name}.bias" for name in names}
    assert all((after[name] is before[name]) for name in after if name not in own)
    assert len(set(map(id, after.values()))) < len(after)  # the pair is tied still


# What "all-linear" does not reach


def reached(model, **options):
    """(names, warnings) of an inject with "all-linear"."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = inject(model, LoRAConfig(rank=2, **options))
    return names, caught


def test_experts_of_a_mixture_are_named_as_not_adapted():
    names, (warning,) = reached(mixtral())
    assert all("self_attn" in name for name in names)
    for block in (0, 1):
        for part in ("gate_up_proj", "down_proj"):
            assert f"model.layers.{block}.mlp.experts.{part}" in str(warning.message)
    assert warning.filename == __file__
    assert reached(mixtral(), exclude=["experts"])[1] == reached(mixtral(), targets=["q_proj"])[1] == []


def test_the_joint_projection_of_torchs_attention_is_named():
    names, (warning,) = reached(nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4)))
    assert names == ["0.out_proj", "1"]
    assert "0.in_proj_weight." in str(warning.message)
    _, (warning,) = reached(nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True)))
    assert "0.q_proj_weight, 0.k_proj_weight, 0.v_proj_weight." in str(warning.message)


def test_layers_that_a_variant_leaves_out_are_named():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "gpt": hf.pytorch_utils.Conv1D(5, 4)})
    model["plain"] = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match=r"attention\.in_proj_weight, attention\.out_proj\.weight, gpt\.weight"):
        assert inject(model, LoRAConfig(rank=2), layer=DoRALinear) == ["plain"]


@pytest.mark.parametrize(
    "make", [llama, bert, vit, whisper, lambda: tied_gpt2()[0], lambda: tied_t5()[0], lambda: DigitsMLP(width=4)]
)
def test_models_whose_every_linear_layer_is_reached_give_no_warning(make):
    model = make()
    modules = dict(model.named_modules())
    names, caught = reached(model)
    assert [str(warning.message) for warning in caught] == []
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kinds = (nn.Linear, hf.pytorch_utils.Conv1D)
    assert set(names) == {name for name, m in modules.items() if isinstance(m, kinds) and m is not head}
    assert any(parameter.ndim == 3 for parameter in model.parameters()) is (make in (vit, whisper))


# What is no number, no model, no config


def adapted():
    """A small net with random adapters."""
    model = DigitsMLP(width=16)
    inject(model, LoRAConfig(rank=2))
    return randomise(model)


@pytest.mark.parametrize("kind", [LoRAConfig, LoRA])
def test_numbers_of_numpy_and_torch_become_pythons_and_any_collection_of_names_is_accepted(kind):
    for number in (np.array, torch.tensor):
        config = kind(number(4), number(8.0), number(0.5))
        assert config == kind(4, 8.0, 0.5)
        assert [type(value) for value in (config.rank, config.alpha, config.dropout)] == [int, float, float]
    for names in (["head"], {"head"}, {"head": 1}.keys(), np.array(["head"])):
        config = kind(2, targets=names, exclude=names)
        assert hash(config) == hash(kind(2, targets=["head"], exclude=["head"]))
        assert json.dumps([config.targets, config.exclude]) == '[["head"], ["head"]]'
    assert kind(2, targets={"head", "hidden1", "hidden2"}).targets == ("head", "hidden1", "hidden2")


def test_a_rank_above_the_shorter_side_of_every_layer_is_warned_of():
    shapes = {"linear": 4, "words": 4, "image": 3, "gpt": 4}  # the shorter sides: 4 x 4, 7 x 4, 3 x (2 * 3 * 3), 4 x 5
    for name, shorter in shapes.items():
        with pytest.warns(UserWarning, match=rf"rank is {shorter + 1}, but a rank of {shorter} can already"):
            inject(EveryKind(), LoRAConfig(shorter + 1, targets=[name]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, shorter in shapes.items():
            inject(EveryKind(), LoRAConfig(shorter, targets=[name]))
        inject(EveryKind(), LoRAConfig(4, targets=["image", "words"]))  # enough for one of them
        model = EveryKind()
        before, trainable = snapshot(model), [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises(UserWarning, match="rank is 5"):
            inject(model, LoRAConfig(5, targets=["linear"]))
    assert snapshot(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


# What is refused


def with_third(layer):
    return lambda: nn.ModuleDict({"first": nn.Linear(3, 3), "third": layer})


def adapted_in_part():
    model = DigitsMLP(width=4)
    inject(model, LoRAConfig(rank=2, targets=["hidden1", "hidden2"]))
    return model


THIRD = {"targets": ["first", "third"]}
REFUSED = [  # of inject: the model, the config's values, what must be named
    (EveryKind, {"targets": ["lineer"]}, "'lineer'"),
    (EveryKind, {"targets": ["linear", "lineer"]}, "'lineer'"),
    (EveryKind, {"targets": ["norm"]}, "norm"),
    (EveryKind, {"targets": ["linear"], "exclude": ["linear"]}, "linear"),
    (EveryKind, {"exclude": ["words", "lineer"]}, "'lineer'.*image"),
    (with_third(nn.Sequential(nn.Linear(3, 3))), {"exclude": ["third"]}, "'third'"),  # which would leave nothing out
    (lambda: nn.Sequential(nn.ReLU()), {}, "Sequential"),
    (lambda: DigitsMLP(width=16), {"rank": 10**6}, "1000000.* 1024 .*64"),
    (with_third(nn.Embedding(5, 3, max_norm=1.0)), THIRD, "max_norm"),
    (with_third(nn.Conv2d(4, 4, 3, groups=2)), THIRD, "groups=2"),
    (with_third(nn.MultiheadAttention(4, 2)), {"targets": ["first", "out_proj"], "dropout": 0.1}, r"dropout is 0\.1"),
    *[(adapted_in_part, {"targets": targets}, "on 2 layers") for targets in (["hidden1"], ["base"], ["head"])],
]


@pytest.mark.parametrize(("make", "values", "named"), REFUSED)
def test_what_inject_refuses_leaves_the_model_as_it_was(make, values, named):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=named):
        inject(model, LoRAConfig(**{"rank": 2} | values))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda model: merge(model, "block"), "'block'"),
        (lambda model: merge(model, "full-precision"), "full-precision"),
        (lambda model: merge(model, base=DigitsMLP(width=16)), "base"),
        (lambda model: merge(model, "full-precision", DigitsMLP(width=8)), "'hidden1'"),
        (lambda model: merge(model, "full-precision", adapted()), "'hidden1'"),
        (lambda model: merge(model, "full-precision", nn.ModuleDict({"hidden1": nn.Linear(64, 16)})), "'hidden2'"),
        (lambda model: merge(model.hidden1), "LoRALinear"),
    ],
)
def test_what_merge_refuses_leaves_the_model_as_it_was(call, named):
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match=named):
        call(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["hidden2.lora_A", "head.lora_B", "hidden1.base.weight"])
def test_a_merge_of_numbers_that_are_not_finite_is_refused_and_the_model_stays(name, number):
    model = adapted()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = number
    before = repr(snapshot(model))
    with pytest.raises(ValueError, match=rf"^{name.replace('.base', '')} holds numbers that are NaN or infinite"):
        merge(model)
    assert repr(snapshot(model)) == before
