"""Shapes of well-known models against transformers and published counts, and configs read from folders."""

import dataclasses
import json

import pytest
import torch

from lora_lab import Llama
from lora_lab.models import shapes
from lora_lab.models.pretrained import architecture

NAMES = pytest.mark.parametrize("name", shapes.names())
LLAMAS = [name for name in shapes.names() if not name.startswith("qwen")]
QWENS = [name for name in shapes.names() if name.startswith("qwen")]


def built(config):
    """Name -> shape of the parameters of our Llama, a tied head counted once."""
    with torch.device("meta"):
        model = Llama(config)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def count(parameters):
    return sum(torch.Size(shape).numel() for shape in parameters.values())


def hf_config(config):
    """The same shape as a config of transformers: Qwen2's where q, k and v have biases."""
    from transformers import LlamaConfig, Qwen2Config

    values = dataclasses.asdict(config)
    scaling = values.pop("rope_scaling")
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    if scaling is not None:
        scaling["original_max_position_embeddings"] = scaling.pop("original_context")
        rope |= scaling | {"rope_type": "llama3"}
    if values.pop("attention_bias"):
        return Qwen2Config(**values, rope_parameters=rope)
    return LlamaConfig(**values, rope_parameters=rope)


def built_by_transformers(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(config))
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


# The table


def test_the_models_are_listed_and_described():
    assert {"smollm2-135m", "llama-3.2-1b", "llama-3-8b", "llama-3-70b", "qwen2.5-7b"} <= set(shapes.names())
    assert shapes.config("llama-3-8b").num_hidden_layers == 32
    shapes.names().clear()  # a copy
    assert shapes.names()


@NAMES
def test_a_model_built_without_memory_has_the_published_number_of_parameters(name):
    row = shapes.TABLE[name]
    assert count(built(row.config)) == row.parameters + row.extra_parameters
    assert row.card
    wider = dataclasses.replace(row.config, intermediate_size=row.config.intermediate_size + 1)
    assert count(built(wider)) > row.parameters + row.extra_parameters


def test_the_count_of_one_model_worked_by_hand():
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024  # q and o; k and v, of 8 heads of 128
    layer = attention + 3 * 4096 * 14336 + 2 * 4096
    assert shapes.TABLE["llama-3-8b"].parameters == 2 * 128256 * 4096 + 32 * layer + 4096 == 8_030_261_248


@pytest.mark.parametrize("name", LLAMAS)
def test_a_llama_has_the_parameters_that_transformers_builds(name):
    assert built(shapes.config(name)) == built_by_transformers(shapes.config(name))
    assert shapes.TABLE[name].extra_parameters == 0


@pytest.mark.parametrize("name", QWENS)
def test_a_qwen_has_the_parameters_that_transformers_builds_and_the_biases_that_are_extra(name):
    row = shapes.TABLE[name]
    theirs = built_by_transformers(row.config)
    assert count(theirs) == row.parameters
    extra = {key: shape for key, shape in built(row.config).items() if key not in theirs}
    assert built(row.config) == theirs | extra
    assert {key.split(".", 3)[3] for key in extra} == {"self_attn.o_proj.bias"}
    assert count(extra) == row.extra_parameters


@NAMES
def test_heads_and_widths_fit(name):
    config = shapes.config(name)
    assert config.num_attention_heads * config.head_dim == config.hidden_size
    assert config.vocab_size % 64 == 0


def test_the_row_of_the_real_model_is_what_its_file_says(smollm2):
    model, _ = smollm2
    expected = dataclasses.replace(shapes.config("smollm2-135m"), rms_norm_eps=model.config.rms_norm_eps)
    assert model.config == expected
    assert model.config.rms_norm_eps == pytest.approx(1e-5)  # the file keeps it in float32
    assert model.config != dataclasses.replace(expected, rope_theta=10_000.0)


@pytest.mark.parametrize("bad", ["llama-3-9b", "", "SmolLM2-135M"])
def test_an_unknown_name_is_refused(bad):
    with pytest.raises(ValueError, match=f"'{bad}'"):
        shapes.config(bad)


# A folder's config


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.2-1b", "llama-3-70b"])
def test_a_folder_that_transformers_wrote_has_its_shape_without_weights_or_tokenizer(tmp_path, name):
    hf_config(shapes.config(name)).save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        (config,) = architecture(folder).args
        assert config == shapes.config(name) != shapes.config("llama-3-8b")


REFUSED = [
    ({"hidden_size": ...}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"num_attention_heads": None}, "None"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ('{"half": ', "config.json"),
    ("[1]", "config.json"),
    ("null", "config.json"),
]


@pytest.mark.parametrize(("change", "named"), REFUSED, ids=str)
def test_a_config_that_cannot_be_built_is_refused(tmp_path, change, named):
    hf_config(shapes.config("smollm2-135m")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    if isinstance(change, dict):
        config = json.loads(path.read_text()) | change
        change = json.dumps({key: value for key, value in config.items() if value is not ...})
    path.write_text(change)
    with pytest.raises(ValueError, match=named):
        architecture(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        architecture(tmp_path)
