"""Shapes of well-known models against transformers and published counts, and configs read from folders."""

import dataclasses
import json
import math

import pytest
import torch

from lora_lab import Llama
from lora_lab.models import shapes
from lora_lab.models.pretrained import architecture

# The number of parameters of each model, a tied head counted once, as its card states it.
PUBLISHED = {
    "smollm2-135m": 134_515_008,  # HuggingFaceTB/SmolLM2-135M, and so on
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3.2-1b": 1_235_814_400,  # meta-llama/Llama-3.2-1B
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,  # meta-llama/Meta-Llama-3-8B
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,  # Qwen/Qwen2.5-0.5B
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
}
NAMES = pytest.mark.parametrize("name", PUBLISHED)


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

    return (Qwen2Config if config.attention_bias else LlamaConfig)(**shapes.config_to_hf(config, torch.float32))


def built_by_transformers(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(config))
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


# The table


def test_the_count_of_one_model_worked_by_hand():
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024  # q and o; k and v, of 8 heads of 128
    layer = attention + 3 * 4096 * 14336 + 2 * 4096
    assert PUBLISHED["llama-3-8b"] == 2 * 128256 * 4096 + 32 * layer + 4096 == 8_030_261_248


@NAMES
def test_a_model_has_the_parameters_that_are_published_and_that_transformers_builds(name):
    config = shapes.config(name)
    ours, theirs = built(config), built_by_transformers(config)
    assert count(theirs) == PUBLISHED[name]
    # Where Qwen2.5 has biases on q, k and v, our Llama has one on o too.
    extra = {f"model.layers.{i}.self_attn.o_proj.bias" for i in range(config.num_hidden_layers)}
    assert ours.keys() - theirs.keys() == (extra if name.startswith("qwen") else set())
    assert ours == theirs | {key: (config.hidden_size,) for key in ours.keys() - theirs.keys()}
    wider = dataclasses.replace(config, intermediate_size=config.intermediate_size + 1)
    assert built(wider) != ours


def test_every_model_of_the_table_is_published():
    assert shapes.TABLE.keys() == PUBLISHED.keys()


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
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"model_type": "mistral", "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"text_config": {"n_layers": 10**9}}, "n_layers is 1000000000"),
    ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
    ({"head_dim": 2**30}, "head_dim is 1073741824"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
    ({"rope_parameters": {"rope_theta": math.nan}}, "rope_theta is nan"),
    ({"rope_parameters": {"rope_theta": "10000"}}, "rope_theta is '10000'"),
    ({"rope_parameters": 5}, "rope_parameters is 5"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
    ({"architectures": [5]}, "architectures.0 is 5"),
    ({"architectures": "Llama"}, "architectures is 'Llama'"),
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
