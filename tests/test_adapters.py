"""Adapters as files: both ways with the real peft library, and every way in which a folder can be wrong."""

import copy
import json
import os
import signal
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lab import LoRAConfig, LoRALinear, adapter_state, inject, load_adapter, load_pretrained, save_adapter
from lora_lab.adapters import CONFIG, WEIGHTS
from lora_lab.models.digits import DigitsMLP, DigitsTransformer

IDS = torch.randint(0, 260, (2, 9), generator=torch.Generator().manual_seed(5))
PIXELS = torch.randn(5, 64, generator=torch.Generator().manual_seed(7))
TARGETS = pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["attention", "all-linear"])
# What peft writes beside the numbers, as of its version 0.21; none of it changes what an adapter computes.
HARMLESS = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": {"base_model_class": "DigitsMLP", "parent_library": "lora_lab.models.digits"},
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


@torch.no_grad()
def randomise(model, seed=1):
    """Give every adapter random numbers, in A and in B."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def adapted(seed=1, rank=3, alpha=5.0, targets="all-linear", dropout=0.0):
    """A small net with random adapters."""
    model = DigitsMLP(width=16)
    inject(model, LoRAConfig(rank=rank, alpha=alpha, targets=targets, dropout=dropout))
    return randomise(model, seed)


@torch.no_grad()
def logits(model, ids=IDS):
    out = model.eval()(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def snapshot(model):
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    return modules, [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()]


@pytest.fixture
def pair(tiny_hf, hf_folder):
    """A tiny Llama of transformers, and a function that loads the same as ours."""
    theirs = tiny_hf(seed=3)
    folder = hf_folder(theirs)
    return theirs, lambda: load_pretrained(folder, device="cpu")[0]


# Both ways with peft


@TARGETS
def test_peft_reads_what_is_saved_here_and_gives_the_same_logits(pair, tmp_path, targets):
    theirs, load = pair
    base = logits(theirs)
    ours = load()
    names = inject(ours, LoRAConfig(rank=3, alpha=5, targets=targets))
    randomise(ours)
    folder = save_adapter(ours, tmp_path / "adapter")
    read = peft.PeftModel.from_pretrained(theirs, folder)
    layers = [name for name, module in read.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert [name.removeprefix("base_model.model.") for name in layers] == names
    torch.testing.assert_close(logits(read), logits(ours), rtol=0, atol=1e-5)
    assert (logits(read) - base).abs().max() > 0.1


@TARGETS
@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_what_peft_saved_is_read_here_and_gives_the_same_logits(pair, tmp_path, targets, init):
    theirs, load = pair
    base = logits(theirs)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.25, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=init
    )
    saved = randomise(peft.get_peft_model(theirs, config))
    saved.save_pretrained(tmp_path / "adapter")
    ours = load()
    names = load_adapter(ours, tmp_path / "adapter")
    assert len(names) == (14 if targets == "all-linear" else 4)
    assert all(layer.dropout.p == 0.25 for layer in ours.modules() if isinstance(layer, LoRALinear))
    torch.testing.assert_close(logits(ours), logits(saved), rtol=0, atol=1e-5)
    assert (logits(ours) - base).abs().max() > 0.1


def test_peft_reads_an_adapter_of_the_real_model(smollm2, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode("The with statement is used to")])
    ours = copy.deepcopy(model)
    inject(ours, LoRAConfig(rank=8, alpha=16))
    randomise(ours)
    save_adapter(ours, tmp_path)
    shape = {name: value for name, value in vars(model.config).items() if name != "rope_theta"}
    config = LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": model.config.rope_theta})
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    theirs.load_state_dict(model.state_dict(), assign=True)
    base = logits(theirs, ids)
    assert torch.equal(base, logits(model, ids))
    expected = logits(ours, ids)
    found = logits(peft.PeftModel.from_pretrained(theirs, tmp_path), ids)
    assert (expected - base).abs().max() > 1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_peft_reads_adapters_named_in_full_and_adapts_no_other_layer(pair, tmp_path):
    theirs, load = pair
    ours = load()
    names = inject(ours, LoRAConfig(rank=2, alpha=5, exclude=["layers.0.mlp.down_proj", "layers.1.self_attn.q_proj"]))
    randomise(ours)
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == names
    read = peft.PeftModel.from_pretrained(theirs, tmp_path)
    layers = [name for name, module in read.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert [name.removeprefix("base_model.model.") for name in layers] == names
    torch.testing.assert_close(logits(read), logits(ours), rtol=0, atol=1e-5)


class SameEnding(nn.Module):
    """A linear layer and another kind of module whose names end alike."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"proj": nn.Linear(64, 6)})
        self.outer = nn.ModuleDict({"proj": nn.LayerNorm(6)})

    def forward(self, x):
        return self.outer["proj"](self.inner["proj"](x))


def test_peft_reads_adapters_beside_another_kind_of_module_of_the_same_ending(tmp_path):
    torch.manual_seed(0)
    ours = SameEnding()
    theirs = copy.deepcopy(ours)
    inject(ours, LoRAConfig(rank=2, alpha=5))
    save_adapter(randomise(ours), tmp_path)
    read = peft.PeftModel.from_pretrained(theirs, tmp_path)
    torch.testing.assert_close(logits(read, PIXELS), logits(ours, PIXELS), rtol=0, atol=1e-5)


# The files


def test_config_has_pefts_keys(tmp_path):
    model = adapted(rank=3, alpha=5.0, dropout=0.1, targets=["hidden1", "head"])
    assert save_adapter(model, tmp_path / "new" / "folder", base="some-model") == tmp_path / "new" / "folder"
    config = json.loads((tmp_path / "new" / "folder" / CONFIG).read_text())
    expected = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 5.0,
        "lora_dropout": 0.1,
        "target_modules": ["head", "hidden1"],
        "base_model_name_or_path": "some-model",
        "task_type": None,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    assert {name: config[name] for name in expected} == expected
    assert config.keys() <= {field.name for field in peft.LoraConfig.__dataclass_fields__.values()}


def test_a_language_model_is_noted_as_one(pair, tmp_path):
    _, load = pair
    model = load()
    inject(model, LoRAConfig(rank=1))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == "CAUSAL_LM"


def test_weights_have_pefts_names_and_hold_the_adapters(tmp_path):
    model = adapted(targets=["hidden1"])
    save_adapter(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert set(stored) == {f"base_model.model.hidden1.lora_{part}.weight" for part in "AB"}
    assert torch.equal(stored["base_model.model.hidden1.lora_A.weight"], model.hidden1.lora_A)
    assert torch.equal(stored["base_model.model.hidden1.lora_B.weight"], model.hidden1.lora_B)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"targets": ["q_proj", "v_proj"]}, ["q_proj", "v_proj"]),
        ({}, ["down_proj", "embed", "head", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ({"targets": ["layers.1.q_proj"]}, ["layers.1.q_proj"]),
        ({"targets": ["layers.0.q_proj", "v_proj"]}, ["layers.0.q_proj", "layers.0.v_proj", "layers.1.v_proj"]),
    ],
)
def test_targets_are_endings_where_they_name_exactly_these_layers_and_full_names_elsewhere(tmp_path, config, expected):
    model = DigitsTransformer()
    inject(model, LoRAConfig(rank=1, **config))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == expected


@pytest.mark.parametrize("targets", ["all-linear", ["hidden2"]])
def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path, targets):
    model = adapted(rank=3, alpha=5.0, dropout=0.25, targets=targets)
    save_adapter(model, tmp_path)
    back = DigitsMLP(width=16)
    base = logits(back, PIXELS)
    names = load_adapter(back, tmp_path)
    assert names == [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert torch.equal(logits(back, PIXELS), logits(model, PIXELS))
    assert not torch.equal(logits(back, PIXELS), base)
    for name, value in adapter_state(model).items():
        assert torch.equal(value, adapter_state(back)[name])
    assert {name for name, p in back.named_parameters() if p.requires_grad} == set(adapter_state(model))
    assert back.hidden2.scaling == 5 / 3
    assert back.hidden2.dropout.p == 0.25


def test_adapters_of_a_half_precision_model_are_stored_in_float32(tmp_path):
    model = DigitsMLP(width=16).bfloat16()
    inject(model, LoRAConfig(rank=2))
    save_adapter(randomise(model), tmp_path)
    back = DigitsMLP(width=16).bfloat16()
    load_adapter(back, tmp_path)
    assert back.head.lora_B.dtype == torch.float32
    assert torch.equal(back.head.lora_B, model.head.lora_B)


def test_saving_over_an_older_adapter_leaves_only_the_new_one(tmp_path):
    save_adapter(adapted(seed=1, rank=2), tmp_path)
    newer = adapted(seed=2, rank=4, targets=["hidden1"])
    save_adapter(newer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    back = DigitsMLP(width=16)
    assert load_adapter(back, tmp_path) == ["hidden1"]
    assert torch.equal(logits(back, PIXELS), logits(newer, PIXELS))


def test_a_model_without_adapters_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(DigitsMLP(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("rank", "alpha", "dropout"), [(4, 5.0, 0.0), (3, 6.0, 0.0), (3, 5.0, 0.5)])
def test_adapters_that_differ_in_their_numbers_cannot_be_saved(tmp_path, rank, alpha, dropout):
    model = adapted(rank=3, alpha=5.0, targets=["hidden1", "head"])
    model.hidden2 = LoRALinear(model.hidden2, rank, alpha, dropout)
    with pytest.raises(ValueError, match=r"differ in \(rank, alpha, dropout\)"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Refusals


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter of a small net."""
    return save_adapter(adapted(), tmp_path / "adapter")


def refuse(folder, says, error=ValueError, model=None):
    """Loading must fail with one sentence and leave the model as it was."""
    model = model if model is not None else DigitsMLP(width=16)
    model.hidden1.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(error, match=says):
        load_adapter(model, folder)
    assert snapshot(model) == before


def edit(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def rewrite(folder, without=(), **more):
    """Store the weights anew, some left out or replaced, and without the header's note, as peft's files are."""
    names = {f"base_model.model.{name}.weight" for name in without}
    tensors = {name: value for name, value in load_file(folder / WEIGHTS).items() if name not in names}
    save_file(tensors | {f"base_model.model.{name}": value for name, value in more.items()}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("rank_pattern", {"hidden1": 2}),
        ("alpha_pattern", {"hidden1": 9}),
        ("modules_to_save", ["head"]),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4, "gamma": 1e-3}),
        ("monteclora_config", {"num_samples": 8}),
        ("target_parameters", ["hidden1.weight"]),
        ("use_bdlora", {"nblocks": 2}),
        ("a_setting_of_a_later_peft", {"strength": 2}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
    ],
)
def test_settings_of_peft_that_change_the_result_are_refused_by_name(saved, name, value):
    edit(saved, **{name: value})
    refuse(saved, rf"sets {name} to .*not built here")


def test_settings_of_peft_that_change_nothing_are_accepted(saved):
    edit(saved, **HARMLESS)
    back = DigitsMLP(width=16)
    load_adapter(back, saved)
    assert torch.equal(logits(back, PIXELS), logits(adapted(), PIXELS))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_of_peft_that_also_changed_the_base_are_refused(tmp_path, init):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["hidden1", "head"], init_lora_weights=init)
    randomise(peft.get_peft_model(DigitsMLP(width=16), config)).save_pretrained(tmp_path)
    refuse(tmp_path, "init_lora_weights")


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "PROMPT_TUNING", None])
def test_other_types_of_adapter_are_refused(saved, kind):
    edit(saved, peft_type=kind)
    refuse(saved, f"type {kind!r}, but only 'LORA'")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    refuse(saved, f"lacks the file {name}", FileNotFoundError)


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_a_missing_entry_of_the_config_is_named(saved, name):
    config = json.loads((saved / CONFIG).read_text())
    del config[name]
    (saved / CONFIG).write_text(json.dumps(config))
    refuse(saved, f"lacks the entry '{name}'")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b'"LORA"'])
def test_a_damaged_config_is_refused(saved, content):
    (saved / CONFIG).write_bytes(content)
    refuse(saved, CONFIG)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_damaged_weights_are_refused(saved, keep):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:keep])
    refuse(saved, f"{WEIGHTS} is damaged")


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_missing_half_of_an_adapter_is_named(saved, part):
    rewrite(saved, without=[f"hidden2.{part}"])
    refuse(saved, f"lacks {part} of 'hidden2'")


@pytest.mark.parametrize(("part", "shape"), [("lora_A", (3, 7)), ("lora_A", (2, 16)), ("lora_B", (16, 1))])
def test_a_wrong_shape_is_named(saved, part, shape):
    rewrite(saved, **{f"hidden2.{part}.weight": torch.zeros(shape)})
    refuse(saved, rf"{part} of 'hidden2' has shape \({shape[0]}, {shape[1]}\)")


def test_a_rank_in_the_config_that_the_weights_do_not_have_is_refused(saved):
    rewrite(saved)
    edit(saved, r=2)
    refuse(saved, r"lora_A of '\w+' has shape \(3, \d+\), but this model and rank 2 ask for \(2, \d+\)")


@pytest.mark.parametrize("change", [{"lora_alpha": 50.0}, {"r": 2}])
def test_weights_and_config_of_two_saves_are_refused(saved, change):
    edit(saved, **change)
    refuse(saved, "two different saves")


def test_an_adapter_of_another_model_is_refused(saved):
    refuse(saved, "base model", model=DigitsMLP(width=24))
    other = DigitsMLP(width=16)
    del other.hidden2
    refuse(saved, "'hidden2', but the model has no such layer", model=other)
    other = DigitsMLP(width=16)
    other.hidden2 = nn.Identity()
    refuse(saved, "'hidden2', but the model has a Identity there", model=other)


def test_a_name_that_would_also_match_another_layer_is_refused(tmp_path):
    model = nn.ModuleDict({"proj": nn.Linear(4, 4)})
    inject(model, LoRAConfig(rank=2))
    save_adapter(model, tmp_path)
    other = nn.ModuleDict({"proj": nn.Linear(4, 4), "inner": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"adapts 'proj', but a target of that name would also adapt 'inner\.proj'"):
        load_adapter(other, tmp_path)
    assert snapshot(other) == before


@pytest.mark.parametrize("key", ["hidden1.lora_magnitude_vector.weight", "hidden1.weight", "hidden1.lora_embedding_A"])
def test_tensors_of_another_kind_are_refused(saved, key):
    rewrite(saved, **{key: torch.zeros(16)})
    refuse(saved, f"{key}.* is no lora_A or lora_B")


def test_weights_without_tensors_are_refused(saved):
    save_file({}, saved / WEIGHTS)
    refuse(saved, "holds no tensors")


def test_a_second_load_is_refused(saved):
    model = DigitsMLP(width=16)
    load_adapter(model, saved)
    with pytest.raises(ValueError, match="already has adapters on 3 layers"):
        load_adapter(model, saved)
    assert torch.equal(logits(model, PIXELS), logits(adapted(), PIXELS))
    other = DigitsMLP(width=16)
    inject(other, LoRAConfig(targets=["head"]))
    before = snapshot(other)
    with pytest.raises(ValueError, match="already has adapters on 1 layers"):
        load_adapter(other, saved)
    assert snapshot(other) == before


# A process that is killed while it saves

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import lora_lab.adapters as adapters
from lora_lab.lora import LoRAConfig, inject, lora_layers
from lora_lab.models.digits import DigitsMLP

folder, point = Path(sys.argv[1]), sys.argv[2]
model = DigitsMLP(width=16)
inject(model, LoRAConfig(rank=3, alpha=5.0, targets=sys.argv[3:]))
with torch.no_grad():
    for layer in lora_layers(model).values():
        layer.lora_B.fill_(0.5)


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def half(tensors, path, metadata):
    whole(tensors, path, metadata=metadata)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    die()


def config(path, value):
    written(path, value)
    die()


whole, written = adapters.save_file, adapters.write_json
if point == "before the config":
    adapters.write_json = die
elif point == "after the config":
    adapters.write_json = config
elif point == "before the weights":
    adapters.save_file = die
elif point == "within the weights":
    adapters.save_file = half
adapters.save_adapter(model, folder, base="new")
die()
"""


@pytest.mark.parametrize(
    ("point", "targets"),
    [
        ("before the config", ["hidden1"]),
        ("after the config", ["hidden1"]),
        ("after the config", ["hidden1", "hidden2", "head"]),
        ("before the weights", ["hidden1"]),
        ("within the weights", ["hidden1"]),
        ("after", ["hidden1"]),
    ],
)
def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new_one_or_an_error(tmp_path, point, targets):
    old = adapted()  # of the same rank and alpha as the new one; base, weights and perhaps targets tell them apart
    save_adapter(old, tmp_path, base="old")
    command = [sys.executable, "-c", KILLED, str(tmp_path), point, *targets]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    model = DigitsMLP(width=16)
    try:
        names = load_adapter(model, tmp_path)
    except (ValueError, FileNotFoundError):
        assert point != "after"
        return
    base = json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"]
    if base == "old":
        assert point != "after"
        assert torch.equal(logits(model, PIXELS), logits(old, PIXELS))
    else:
        assert names == targets
        assert torch.equal(model.hidden1.lora_B, torch.full((16, 3), 0.5))
