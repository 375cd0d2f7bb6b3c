"""Adapters as files: both ways with peft, and every way in which a folder can be wrong."""

import copy
import json
import math
import re
import string
import warnings
from functools import partial

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lab import (
    ContinueLoRA,
    LoRA,
    LoRAConfig,
    LoRALinear,
    RsLoRA,
    adapter_state,
    fit,
    inject,
    load_adapter,
    load_pretrained,
    lora_layers,
    save_adapter,
)
from lora_lab.adapters.edit import switch
from lora_lab.adapters.peft_format import CARD, CONFIG, WEIGHTS, find_values, read_adapter, read_config
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.variants import DoRALinear, LoRAFALinear, PiSSALinear, RsLoRALinear
from tests.helpers import PIXELS, randomise, small_task, snapshot
from tests.tiny_models import Pictures, pictures

IDS = torch.randint(0, 260, (2, 9), generator=torch.Generator().manual_seed(5))


pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:The following .*_pattern keys did not match:RuntimeWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)


def adapted(seed=1, rank=3, alpha=5.0, targets="all-linear", dropout=0.0):
    """A small net with random adapters."""
    model = DigitsMLP(width=16)
    inject(model, LoRAConfig(rank=rank, alpha=alpha, targets=targets, dropout=dropout))
    return randomise(model, seed)


@torch.no_grad()
def logits(model, ids=IDS):
    out = model.eval()(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.fixture
def pair(tiny_hf, hf_folder):
    """A tiny Llama of transformers, and a function that loads the same as ours."""
    theirs = tiny_hf(seed=3)
    folder = hf_folder(theirs)
    return theirs, lambda: load_pretrained(folder, device="cpu")[0]


def check_both(folder, model, make, inputs=PIXELS):
    """The folder loads here bit for bit and in peft to rounding, and is not the base; the model loaded here."""
    back = make()
    load_adapter(back, folder)
    assert torch.equal(logits(back, inputs), logits(model, inputs))
    read = peft.PeftModel.from_pretrained(make(), folder)
    torch.testing.assert_close(logits(read, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model, inputs), logits(make(), inputs), atol=0.01)
    return back


# Both ways with peft


def test_peft_reads_an_adapter_of_a_part_of_the_layers(pair, tmp_path):
    theirs, ours = pair[0], pair[1]()
    names = inject(ours, LoRAConfig(rank=3, exclude=["layers.0.mlp.down_proj", "layers.1.self_attn.q_proj"]))
    read = peft.PeftModel.from_pretrained(theirs, save_adapter(randomise(ours), tmp_path / "adapter"))
    layers = [name for name, module in read.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert [name.removeprefix("base_model.model.") for name in layers] == names
    torch.testing.assert_close(logits(read), logits(ours), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_what_peft_saved_is_read_here_and_gives_the_same_logits(pair, tmp_path, init):
    theirs, load = pair
    base = logits(theirs)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.25, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=init
    )
    saved = randomise(peft.get_peft_model(theirs, config))
    saved.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", auto_mapping={"base_model_class": "Llama"}, revision="main", peft_version="0.21.2")
    ours = load()
    assert len(load_adapter(ours, tmp_path / "adapter")) == 14
    assert all(layer.dropout.p == 0.25 for layer in ours.modules() if isinstance(layer, LoRALinear))
    torch.testing.assert_close(logits(ours), logits(saved), rtol=0, atol=1e-5)
    assert (logits(ours) - base).abs().max() > 0.1


# The files


def test_config_has_pefts_keys(tmp_path):
    model = adapted(rank=3, alpha=5.0, dropout=0.1, targets=["hidden1", "head"])
    assert save_adapter(model, tmp_path / "new" / "folder", base="some-model") == tmp_path / "new" / "folder"
    config = json.loads((tmp_path / "new" / "folder" / CONFIG).read_text())
    assert config.keys() <= {field.name for field in peft.LoraConfig.__dataclass_fields__.values()}
    expected = {"r": 3, "lora_alpha": 5.0, "lora_dropout": 0.1, "target_modules": ["head", "hidden1"]}
    assert config.items() >= (expected | {"base_model_name_or_path": "some-model", "task_type": None}).items()


def folders(**modules):
    """A module in which each of these is called the same, in a folder of its own: "base"."""
    return nn.ModuleDict({folder: nn.ModuleDict({"base": module}) for folder, module in modules.items()})


@pytest.mark.parametrize(
    ("model", "config", "expected"),
    [
        (DigitsTransformer(), {"targets": ["q_proj", "v_proj"]}, ["q_proj", "v_proj"]),
        (DigitsTransformer(), {"targets": ["layers.0.q_proj", "1.v_proj"]}, ["layers.0.q_proj", "layers.1.v_proj"]),
        (folders(a=nn.Linear(4, 4), b=nn.Linear(4, 4)), {}, ["base"]),  # the adapters' own base layers do not count
        (folders(a=nn.Linear(4, 4), b=nn.LayerNorm(4)), {}, ["a.base"]),
    ],
)
def test_targets_are_endings_where_they_name_exactly_these_layers_and_full_names_elsewhere(
    tmp_path, model, config, expected
):
    inject(model, LoRAConfig(rank=1, **config))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == expected


@pytest.mark.parametrize("layer", [None, DoRALinear, PiSSALinear])
def test_an_adapter_is_stored_in_half_precision_and_comes_back_rounded_in_the_models_own(tmp_path, layer):
    model, back = DigitsMLP(width=16), DigitsMLP(width=16)
    inject(model, LoRAConfig(rank=3, alpha=5.0), layer=layer)
    before, base = snapshot(randomise(model)), logits(back, PIXELS)
    save_adapter(model, tmp_path / "whole")
    save_adapter(model, tmp_path / "half", dtype=torch.float16)
    assert snapshot(model) == before
    whole, half = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "half"))
    assert {name: tensor.half().tolist() for name, tensor in whole.items()} == {
        name: tensor.tolist() for name, tensor in half.items()
    }
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    load_adapter(back, tmp_path / "half")
    assert {parameter.dtype for parameter in back.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(back, PIXELS), logits(model, PIXELS), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(logits(back, PIXELS), base, atol=0.1)


@pytest.mark.parametrize("targets", ["all-linear", ["hidden2"]])
def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path, targets):
    model = adapted(rank=3, alpha=5.0, dropout=0.25, targets=targets)
    back = check_both(save_adapter(model, tmp_path), model, partial(DigitsMLP, width=16))
    assert all(torch.equal(adapter_state(back)[name], value) for name, value in adapter_state(model).items())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in back.named_parameters() if parameter.requires_grad] == trained
    assert (back.hidden2.scaling, back.hidden2.dropout.p) == (5 / 3, 0.25)


# Ranks and alphas by layer, variants, kinds of layer


def test_ranks_and_alphas_by_layer_are_saved_and_come_back(tmp_path):
    model = pictures(1)
    state = adapter_state(model)
    for name, rank, alpha in [("places", 1, 2.0), ("hidden", 4, 5.0)]:  # sorted they stand the other way round
        state |= adapter_state(pictures(2, rank, alpha, targets=[name]))
    switch(model, state)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3.0)
    assert list(config["rank_pattern"].items()) == [("^hidden", 4), ("^places", 1)]
    assert list(config["alpha_pattern"].items()) == [("^hidden", 5.0), ("^places", 2.0)]
    back = check_both(tmp_path, model, Pictures)
    found = {name: (layer.rank, layer.alpha) for name, layer in lora_layers(back).items()}
    assert found == {name: (layer.rank, layer.alpha) for name, layer in lora_layers(model).items()}
    assert found == {"patches": (2, 3.0), "places": (1, 2.0), "hidden": (4, 5.0), "head": (2, 3.0)}


class Nested(nn.Module):
    """Two layers, the name of one of which ends in the other's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(64, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6)})

    def forward(self, x):
        return self.inner["proj"](self.proj(x))


def test_a_rank_of_one_layer_is_not_that_of_another_whose_name_ends_alike(tmp_path):
    def nested(rank, alpha):
        model = Nested()
        inject(model, LoRAConfig(rank, alpha))
        return randomise(model)

    model = nested(2, 3.0)
    state = {name: value for name, value in adapter_state(nested(4, 5.0)).items() if name.startswith("proj")}
    switch(model, adapter_state(model) | state)
    assert [layer.rank for layer in lora_layers(model).values()] == [4, 2]
    check_both(save_adapter(model, tmp_path), model, Nested)


def test_a_layer_of_the_same_ending_of_which_the_file_has_nothing_stays_as_it_is_as_in_peft(tmp_path):
    model = nn.ModuleDict({"proj": nn.Linear(64, 6)})
    inject(model, LoRAConfig(2))
    save_adapter(randomise(model), tmp_path)
    ours, theirs = Nested(), Nested()
    with pytest.warns(UserWarning, match=r"'inner\.proj'"):
        assert load_adapter(ours, tmp_path) == ["proj"]
    with pytest.warns(UserWarning, match="missing adapter keys"):
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    torch.testing.assert_close(logits(ours, PIXELS), logits(theirs, PIXELS), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(ours, PIXELS), logits(Nested(), PIXELS), atol=0.1)


VARIANTS = pytest.mark.parametrize(
    ("setting", "kind"), [("use_rslora", RsLoRALinear), ("use_dora", DoRALinear)], ids=["rsLoRA", "DoRA"]
)


@VARIANTS
def test_variants_that_peft_knows_are_saved_as_what_they_are(tmp_path, setting, kind):
    model = pictures(targets=["hidden", "head"], layer=kind)
    switch(model, adapter_state(model) | adapter_state(pictures(2, rank=3, targets=["head"], layer=kind)))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert {name for name in ("use_dora", "use_rslora") if config[name]} == {setting}
    back = check_both(tmp_path, model, Pictures)
    assert {type(layer) for layer in lora_layers(back).values()} == {kind}
    edit(tmp_path, use_dora=False, use_rslora=False)
    refuse(tmp_path, setting, model=Pictures())


@pytest.mark.parametrize(
    ("variants", "kind"),
    [
        ({"use_rslora": True}, RsLoRALinear),
        ({"use_dora": True}, DoRALinear),
        ({"use_dora": True, "use_rslora": True}, DoRALinear),  # with the scaling of rsLoRA
    ],
)
def test_variants_of_peft_are_read(tmp_path, variants, kind):
    config = peft.LoraConfig(r=3, lora_alpha=2.0, target_modules=["hidden", "head"], **variants)
    theirs = randomise(peft.get_peft_model(Pictures(), config))
    theirs.save_pretrained(tmp_path)
    ours = Pictures()
    load_adapter(ours, tmp_path)
    assert {type(layer) for layer in lora_layers(ours).values()} == {kind}
    torch.testing.assert_close(logits(ours, PIXELS), logits(theirs, PIXELS), rtol=1e-5, atol=1e-5)


@VARIANTS
@pytest.mark.parametrize("target", ["places", "patches"])
def test_variants_of_peft_on_layers_that_have_them_not_here_are_refused(tmp_path, setting, kind, target):
    config = peft.LoraConfig(r=3, lora_alpha=2.0, target_modules=[target], **{setting: True})
    randomise(peft.get_peft_model(Pictures(), config)).save_pretrained(tmp_path)
    refuse(tmp_path, kind.__name__, model=Pictures())


@pytest.mark.parametrize(
    ("kind", "rank"), [(None, 2), (LoRAFALinear, 2), (RsLoRALinear, 2), (PiSSALinear, 4), (DoRALinear, 2)]
)
def test_an_adapter_in_memory_becomes_plain_lora_or_dora_and_so_do_kinds_that_peft_does_not_know(tmp_path, kind, rank):
    model, loaded = pictures(targets=["hidden", "head"], layer=kind), DoRALinear if kind is DoRALinear else LoRALinear
    sources = [adapter_state(model)]
    if kind in (LoRAFALinear, PiSSALinear):
        sources.append(save_adapter(model, tmp_path))
        read = peft.PeftModel.from_pretrained(Pictures(), tmp_path)
        torch.testing.assert_close(logits(read, PIXELS), logits(model, PIXELS), rtol=1e-5, atol=1e-5)
    for source in sources:
        back = Pictures()
        load_adapter(back, source)
        assert {(type(layer), layer.rank) for layer in lora_layers(back).values()} == {(loaded, rank)}
        torch.testing.assert_close(logits(back, PIXELS), logits(model, PIXELS), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model, PIXELS), logits(Pictures(), PIXELS), atol=0.1)


def with_table(pair, folder):
    """An adapter of a language model's embedding, with which peft saves the embedding itself."""
    theirs, load = pair
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    saved = randomise(peft.get_peft_model(theirs, config))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        saved.save_pretrained(folder)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(folder / WEIGHTS)
    return saved, load


def untied(load):
    model = load()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def test_the_table_that_peft_saves_beside_an_adapted_embedding_is_accepted_if_it_is_the_models(pair, tmp_path):
    saved, load = with_table(pair, tmp_path)
    ours = untied(load)
    base = logits(ours)
    assert load_adapter(ours, tmp_path) == ["model.embed_tokens"]
    torch.testing.assert_close(logits(ours), logits(saved), rtol=1e-5, atol=1e-5)
    assert (logits(ours) - base).abs().max() > 0.1
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / WEIGHTS).items()}  # the file changes
    save_file(tensors | {key: tensors[key].bfloat16()}, tmp_path / WEIGHTS)
    assert load_adapter(untied(load), tmp_path)  # rounded as the file is, it is the same
    save_file(tensors, tmp_path / WEIGHTS)
    other = untied(load)
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 3] += 1e-3
    refuse(tmp_path, "own weight for 'model.embed_tokens'", model=other)


def test_an_adapter_of_one_side_of_tied_weights_is_refused(pair, tmp_path):
    _, load = with_table(pair, tmp_path)
    refuse(tmp_path, "'model.embed_tokens' is shared", model=load())


# Refusals


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter of a small net, whose header carries no config, as in those of PEFT."""
    folder = save_adapter(adapted(), tmp_path / "adapter")
    rewrite(folder)
    return folder


def refuse(folder, named, error=ValueError, model=None):
    """Loading must fail with a sentence that names this, and leave the model as it was."""
    model = model if model is not None else DigitsMLP(width=16)
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(named)):
        load_adapter(model, folder)
    assert snapshot(model) == before


def edit(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def rewrite(folder, without=(), **more):
    """Store the weights anew, some left out or replaced, without the header's config."""
    tensors = {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}
    tensors |= {f"base_model.model.{name}": value for name, value in more.items()}
    save_file({name: value for name, value in tensors.items() if not name.endswith(tuple(without))}, folder / WEIGHTS)


SETTINGS = [
    ({"use_qalora": True}, "use_qalora"),
    ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["head"]}, "modules_to_save"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ({"target_parameters": ["hidden1.weight"]}, "target_parameters"),
    ({"a_setting_of_a_later_peft": {"strength": 2}}, "a_setting_of_a_later_peft"),
    *(({"init_lora_weights": start}, start) for start in ("pissa", "pissa_niter_4", "olora", "loftq", "corda")),
    *(({"peft_type": kind}, repr(kind)) for kind in ("IA3", "LOHA", None)),
    ({"rank_pattern": {"head": 2}}, "head.lora_A"),
    *(({"rank_pattern": {"head": rank}}, "rank_pattern.head") for rank in (3.0, 0)),
    ({"rank_pattern": [3]}, "rank_pattern"),
    ({"alpha_pattern": {"head": -1}}, "alpha_pattern.head"),
    ({"alpha_pattern": "head"}, "alpha_pattern"),
    *(({"r": rank}, "r is") for rank in (0, "3", 10**20, 3.0)),
    *(({"lora_alpha": alpha}, "lora_alpha") for alpha in (0, None, math.nan, 10**400)),
    *(({"lora_dropout": dropout}, "lora_dropout") for dropout in (1.5, "0.1")),
    ({"target_modules": 5}, "target_modules"),
    ({"base_model_name_or_path": 5}, "base_model_name_or_path"),
    ({"use_dora": "yes"}, "use_dora"),
    ({"use_dora": True}, "lora_magnitude_vector"),
    *(({"r": rank}, f"rank {rank}") for rank in (2, 10**6)),
    *(
        ({setting: {pattern: 3}}, setting)
        for setting in ("rank_pattern", "alpha_pattern")
        for pattern in ("(", "*", "(" * 1000 + ")" * 1000, "(((a{1000}){1000}){1000})", r"(h)\1", "(?=h)head")
    ),
]


TENSORS = [
    ({"hidden2.lora_A.weight": torch.ones(3, 16, dtype=torch.int32)}, "hidden2.lora_A"),
    ({"hidden2.lora_A.weight": torch.ones(3)}, "hidden2.lora_A"),
    ({"hidden2.lora_A.weight": torch.zeros(3, 7)}, "lora_A of 'hidden2' has shape (3, 7)"),
    ({"hidden2.lora_A.weight": torch.zeros(2, 16)}, "hidden2.lora_A"),
    ({"hidden2.lora_B.weight": torch.zeros(16, 1)}, "hidden2.lora_B"),
    *(({"hidden2.lora_A.weight": torch.full((3, 16), x)}, "hidden2.lora_A") for x in (math.nan, math.inf, -math.inf)),
    ({"hidden2.lora_B.weight": torch.full((16, 3), math.nan)}, "hidden2.lora_B"),
    ({"hidden1.lora_magnitude_vector": torch.ones(16)}, "'lora_magnitude_vector'] of 'hidden1'"),
    ({"hidden1.lora_magnitude_vector.weight": torch.ones(16)}, "hidden1.lora_magnitude_vector.weight"),
    ({"hidden1.lora_B.bias": torch.ones(16)}, "hidden1.lora_B.bias"),
]


FILES = [
    *((CONFIG, content) for content in (b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b'"LORA"', b'{"peft_type": "LORA"}')),
    *((WEIGHTS, slice(end)) for end in (0, 4, 100, -1)),
]


def damage(folder, name, content):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[content] if isinstance(content, slice) else content)


REFUSED = [  # a change of the folder, and what must be named
    *((lambda folder, values=values: edit(folder, **values), named) for values, named in SETTINGS),
    *((lambda folder, tensors=tensors: rewrite(folder, **tensors), named) for tensors, named in TENSORS),
    *(
        (lambda folder, x=x: rewrite(folder, without=[f"hidden2.{x}.weight"]), "'hidden2'")
        for x in ("lora_A", "lora_B")
    ),
    *((lambda folder, damaged=damaged: damage(folder, *damaged), damaged[0]) for damaged in FILES),
]


@pytest.mark.parametrize(("change", "named"), REFUSED)
def test_a_folder_that_does_not_hold_an_adapter_that_fits_is_refused(saved, change, named):
    change(saved)
    refuse(saved, named)


@pytest.mark.parametrize(("name", "named"), [(CONFIG, CONFIG), (WEIGHTS, "adapter_model.bin is a pickle")])
def test_a_missing_file_is_named(saved, name, named):
    (saved / name).rename(saved / "adapter_model.bin")
    refuse(saved, named, FileNotFoundError)


STATE = adapter_state(adapted())
PISSA = adapter_state(pictures(targets=["head"], layer=PiSSALinear))
STATES = [
    ({}, "targets=[]"),
    *(
        ({key: value for key, value in STATE.items() if key != name}, name)
        for name in ("head.lora_B", "head.alpha", "head.scaling")
    ),
    (STATE | {"head.other": torch.ones(1)}, "'other'] of 'head'"),
    ({key.replace("head", "tail"): value for key, value in STATE.items()}, "'tail'"),
    *((STATE | {"head.scaling": scaling}, "head.scaling") for scaling in (math.nan, 0)),
    *((STATE | {"head.lora_A": torch.ones(shape)}, "head.lora_A") for shape in ((0, 16), (3,))),
    (STATE | {"head.lora_A": torch.full((3, 16), math.nan)}, "head.lora_A"),
    ({key: value for key, value in PISSA.items() if key != "head.start_A"}, "'start_B'] of 'head'"),
    (PISSA | {"head.start_A": torch.ones(1, 8)}, "lora_B of 'head'"),
]


@pytest.mark.parametrize(("state", "named"), STATES)
def test_an_adapter_in_memory_that_is_none_or_does_not_fit_is_refused(state, named):
    refuse(state, named, model=Pictures() if "head.start_B" in state or "head.start_A" in state else None)


def without_hidden2(instead):
    model = DigitsMLP(width=16)
    model.hidden2 = instead
    return model


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (DigitsMLP(width=24), "base model"),
        (adapted(2), "already has adapters"),
        *((without_hidden2(instead), "'hidden2'") for instead in (None, nn.Identity())),
    ],
)
def test_an_adapter_of_another_model_or_on_top_of_one_is_refused(saved, model, named):
    refuse(saved, named, model=model)


@pytest.mark.parametrize("folder", ["someone/adapter", "", "a\0b", "x" * 5000])
def test_what_is_no_folder_is_refused(folder):
    for call in (partial(load_adapter, DigitsMLP(width=16)), read_adapter, read_config):
        with pytest.raises((FileNotFoundError, ValueError), match=re.escape(repr(folder)[1:12])):
            call(folder)


@pytest.mark.parametrize("values", [{"lora_alpha": 50.0}, {"r": 2}, {"rank_pattern": {"head": 2}}, {"use_dora": True}])
def test_a_config_of_another_save_is_refused(tmp_path, values):
    edit(save_adapter(adapted(), tmp_path), **values)
    refuse(tmp_path, next(iter(values)))


@pytest.mark.parametrize("pattern", [r"((\w+\.?)+)+!", "(.*.*)*!", "(a|a)*!", ".*" * 400 + "!"])
def test_a_pattern_on_which_backtracking_would_never_end_is_evaluated_at_once(saved, pattern):
    edit(saved, rank_pattern={pattern: 5})
    names = [f"layers.{i}.self_attention_with_a_long_name.query_projection" for i in range(200)]
    assert find_values(read_config(saved), "r", names, "") == dict.fromkeys(names, 3)


LAYERS = ["base.layers.1.q_proj", "base.layers.12.q_proj", "layers.1.mlp.up_proj", "q_proj", "1", "x-y.z_9"]
PIECES = [
    *("q_proj", "up_proj", "layers", "base", "mlp", "1", "12", "x-y", "z_9", "q", "_proj"),
    *(r"\.", ".", ".*", ".+", "^", "$", "|", r"\d", r"\d+", "[0-9]+", r"\w+", "[^.]*", "(1|12)", "(?:q|up)_proj", "l?"),
    *(r"\-", r"[a-z_]+", r"\d{1,2}", ".*?", "(layers\\.)*"),
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), min_size=1, max_size=3))
def test_any_pattern_means_here_what_it_means_in_peft(patterns):
    ranks = {pattern: 2 + i for i, pattern in enumerate(patterns)}
    try:
        expected = {name: ranks.get(get_pattern_key(ranks, name), 1) for name in LAYERS}
    except re.error:
        return
    assert find_values({"r": 1, "rank_pattern": ranks}, "r", LAYERS, "") == expected


def test_names_of_layers_with_any_sign_of_text_are_patterns_that_fit_them():
    names = [f"a.{sign}b" for sign in string.punctuation if sign != "."]
    pattern = {f"^{re.escape(name)}": 2 + i for i, name in enumerate(names)}
    found = find_values({"r": 1, "rank_pattern": pattern}, "r", names, "")
    assert list(found.values()) == list(pattern.values())


def test_a_compiled_model_is_saved_and_loaded_by_the_names_of_its_own_layers(tmp_path):
    model, back = adapted(), DigitsMLP(width=16)
    save_adapter(torch.compile(model, backend="eager"), tmp_path)
    assert load_adapter(torch.compile(back, backend="eager"), tmp_path) == list(lora_layers(model))
    assert torch.equal(logits(back, PIXELS), logits(model, PIXELS))


def test_layers_that_the_targets_match_and_the_file_lacks_are_warned_of(tmp_path):
    def blocks(count):
        return nn.ModuleDict({f"block{i}": nn.Sequential(nn.Linear(4, 4)) for i in range(count)})

    model = blocks(2)
    inject(model, LoRAConfig(2, targets=["0"]))
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match=r"2 layers .*'block2\.0'"):
        load_adapter(blocks(4), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(blocks(2), tmp_path)
        edit(tmp_path, exclude_modules=["block2.0", "block3.0"])
        load_adapter(blocks(4), tmp_path)


class Halved(LoRALinear):
    """A variant that no file has a name for."""

    @property
    def scaling(self):
        return self.alpha / self.rank / 2


class Orthogonal(LoRALinear):
    """A start of its own, which is plain LoRA once it is there."""

    def init_factors(self, rank, generator):
        A, B = super().init_factors(rank, generator)
        return nn.init.orthogonal_(A, generator=generator), B


def test_another_start_of_plain_lora_is_saved_as_plain_lora(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    base = copy.deepcopy(model)
    inject(model, LoRAConfig(rank=2), layer=Orthogonal)
    nn.init.normal_(model[0].lora_B)
    load_adapter(base, save_adapter(model, tmp_path))
    x = torch.randn(5, 4)
    assert torch.equal(base(x), model(x))
    assert type(base[0]) is LoRALinear


def changed(name, number):
    model = adapted()
    with torch.no_grad():
        model.get_submodule(name).lora_B[0, 0] = number
    return model


def beside(kind, dropout):
    model = adapted(targets=["hidden1", "head"])
    model.hidden2 = kind(model.hidden2, 3, 5.0, dropout)
    return model


def halved():
    model = DigitsMLP(width=16)
    inject(model, LoRAConfig(rank=2), layer=Halved)
    return model


UNSAVED = [
    (DigitsMLP, {}, "no adapters"),
    *((partial(beside, *kind), {}, "dropout") for kind in ((LoRALinear, 0.5), (RsLoRALinear, 0.0), (DoRALinear, 0.0))),
    (adapted, {"dtype": torch.int8}, "torch.int8"),
    (halved, {}, "Halved"),
    *((partial(changed, "head", math.nan), {"dtype": dtype}, "head.lora_B") for dtype in (None, torch.float16)),
    (partial(changed, "hidden2", 1e5), {"dtype": torch.float16}, "hidden2.lora_B"),
]


@pytest.mark.parametrize(("make", "options", "named"), UNSAVED)
def test_what_cannot_be_saved_is_refused_and_the_old_adapter_stays(tmp_path, saved, make, options, named):
    before = {path: path.read_bytes() for path in saved.iterdir()}
    for folder in (saved, tmp_path / "new"):
        with pytest.raises(ValueError, match=re.escape(named)):
            save_adapter(make(), folder, **options)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_number_that_float16_does_not_hold_is_saved_in_bfloat16(tmp_path):
    save_adapter(changed("hidden2", 1e5), tmp_path, dtype=torch.bfloat16)
    assert load_file(tmp_path / WEIGHTS)["base_model.model.hidden2.lora_B.weight"].max() > 9e4


# The card


OPTIONS = {"steps": 4, "eval_every": 2, "batch_size": 4, "lr": 1e-2, "seed": 3}


def trained(method):
    model = DigitsMLP()
    return model, fit(model, small_task(), method, **OPTIONS)


def rows(folder):
    """The tables of a folder's card as a dictionary."""
    return dict(re.findall(r"^\| (.+?) \| (.*) \|$", (folder / CARD).read_text(), re.MULTILINE))


def test_the_hub_reads_base_and_library_and_people_the_settings(tmp_path):
    model, history = trained(RsLoRA(rank=3, alpha=5, targets=["hidden1", "head"]))
    save_adapter(model, tmp_path, base="some-lab/some-model", history=history)
    card = ModelCard.load(tmp_path / CARD)
    assert (card.data.base_model, card.data.library_name) == ("some-lab/some-model", "peft")
    first, *_, last = (row["validation_loss"] for row in history.rows if row["validation_loss"] is not None)
    expected = {"base_model_name_or_path": "some-lab/some-model", "r": "3", "target_modules": "['head', 'hidden1']"}
    expected |= {"method": "rslora", "steps": "4", "lr": "0.01", "seed": "3"}
    expected |= {"validation_loss, before and after": f"{first:.3f}, {last:.3f}"}
    assert expected.items() <= rows(tmp_path).items()


@pytest.mark.parametrize("base", [None, "smollm2-135m", "a folder/with a model", "../model", "runs/model"])
def test_a_base_that_is_no_name_on_the_hub_is_not_given_to_it(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)  # a folder that exists is no name there either
    save_adapter(adapted(), tmp_path, base=base)
    assert ModelCard.load(tmp_path / CARD).data.base_model is None
    assert rows(tmp_path)["base_model_name_or_path"] == str(base)


def test_the_lab_renews_its_own_card_and_leaves_yours(tmp_path):
    load_adapter(model := DigitsMLP(), adapter_state(trained(LoRA(2))[0]))
    save_adapter(model, tmp_path)
    history = fit(model, small_task(), ContinueLoRA(), **OPTIONS)
    save_adapter(model, tmp_path, history=history)
    assert rows(tmp_path)["continued from"] == history.method["start"]
    renewed = (tmp_path / CARD).read_text()
    mine = "".join(line for line in renewed.splitlines(True) if not line.startswith("<!--")) + "\nMy words.\n"
    (tmp_path / CARD).write_text(mine)
    save_adapter(model, tmp_path)
    assert (tmp_path / CARD).read_text() == mine
