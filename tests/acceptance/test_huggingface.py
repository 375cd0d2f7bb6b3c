"""Eight families of Hugging Face models: adapted, trained, saved, read by PEFT, merged; and GGUF files read back."""

import json

import gguf
import peft
import pytest
import torch
import transformers
from torch import nn

import lora_lab as ll
from lora_lab.tasks import Examples, Task
from tests.acceptance import ROOT

CONFIGS = ROOT / "tests" / "data" / "configs"
SMALL = {  # what makes each config's model tiny
    "bert-base-uncased": {},
    "gemma-3-1b": {"head_dim": 8, "layer_types": None},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2},
    "mistral-7b": {"head_dim": None},
    "mixtral-8x7b": {"num_local_experts": 2},
    "olmo-2-7b": {},
    "phi-2": {"partial_rotary_factor": 0.5},
    "qwen3-8b": {"head_dim": 8, "layer_types": None},
    "t5-small": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2},
    "vit-base-patch16-224": {"image_size": 16, "patch_size": 4},
}
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16, "n_positions": 16}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}


def model_of(name):
    """Return a tiny random model of a config's family."""
    stored = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    changes = {key: value for key, value in SIZES.items() if key in stored}
    changes |= {key: value for key, value in TOKENS.items() if key in stored} | SMALL[name]
    changes |= {key: 0.0 for key, value in stored.items() if "drop" in key and isinstance(value, float)}
    config = transformers.AutoConfig.for_model(**(stored | changes))
    kind = getattr(transformers, stored["architectures"][0])
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def task_of(model):
    """Return pictures with their classes, or tokens of which each is the one before plus one."""
    parts = {}
    for seed, (part, n) in enumerate({"train": 32, "validation": 8, "test": 8, "off_domain": 8}.items()):
        generator = torch.Generator().manual_seed(seed)
        if model.main_input_name == "pixel_values":
            inputs = torch.randn(n, 3, 16, 16, generator=generator)
            parts[part] = Examples(inputs, (inputs.mean((1, 2, 3)) > 0).long())
        else:
            tokens = 3 + (torch.randint(37, (n, 1), generator=generator) + torch.arange(9)) % 37
            parts[part] = Examples(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return Task("rows", **parts)


@torch.no_grad()
def outputs(model, task):
    given = {model.main_input_name: task.test.inputs}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = task.test.targets
    return model(**given)[0]


@pytest.mark.filterwarnings("ignore:'all-linear' does not reach weights:UserWarning")
@pytest.mark.parametrize("name", SMALL)
def test_a_family_is_trained_saved_read_by_peft_and_merged(name, tmp_path):
    base, model, twin, theirs = (model_of(name) for _ in range(4))
    task = task_of(model)
    before = ll.evaluate(model, task)
    assert torch.equal(outputs(model, task), outputs(base, task))
    ll.fit(model, task, ll.LoRA(rank=4, alpha=8), steps=24, lr=2e-2, batch_size=8, seed=0)
    assert ll.evaluate(model, task) < before
    expected = outputs(model, task)
    assert (expected - outputs(base, task)).abs().max() > 0.01
    ll.save_adapter(model, tmp_path)
    names = ll.load_adapter(twin, tmp_path)
    assert names == list(ll.lora_layers(model))
    assert torch.equal(outputs(twin, task), expected)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    torch.testing.assert_close(outputs(theirs.get_base_model(), task), expected, rtol=1e-4, atol=1e-4)
    ll.merge(twin)
    torch.testing.assert_close(outputs(twin, task), expected, rtol=1e-4, atol=1e-4)
    assert ll.diagnose(model, base=base).ok
    assert ll.spectra.report(None, model)["layer"].tolist() == names


def test_a_model_and_tokenizer_of_transformers_are_loaded_trained_and_saved_for_transformers(stranger, sums, tmp_path):
    model, tokenizer = ll.load_pretrained(stranger, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stranger)
    ids = torch.tensor([tokenizer.encode("3 plus one?")])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert (
        tokenizer.encode("3 plus one?")
        == transformers.AutoTokenizer.from_pretrained(stranger)("3 plus one?")["input_ids"]
    )
    task = ll.tasks.from_jsonl(tokenizer, sums)
    ll.fit(model, task, ll.FullFineTuning(), steps=2, lr=1e-2, batch_size=4)
    ll.save_model(model, tmp_path / "tuned", tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
        assert (again(ids).logits - theirs(ids).logits).abs().max() > 0.01


# GGUF


def tensors_of(path):
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors
    }


@pytest.mark.parametrize(("dtype", "error"), [("f32", 0.0), ("f16", 1e-3), ("q8_0", 2e-2)])
def test_a_model_is_exported_as_gguf_and_read_back(stranger, tmp_path, dtype, error):
    model, tokenizer = ll.load_pretrained(stranger, device="cpu")
    path = ll.save_model(model, tmp_path / "model.gguf", tokenizer, "gguf", dtype)
    again, words = ll.load_pretrained(path, device="cpu")
    ids = torch.tensor([tokenizer.encode("1 plus one?")])
    with torch.no_grad():
        difference = (again(ids) - model(ids)).norm() / model(ids).norm()
    assert difference <= error
    assert words.encode("1 plus one?") == tokenizer.encode("1 plus one?")
    stored = tensors_of(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stranger).state_dict()
    torch.testing.assert_close(stored["token_embd.weight"], theirs["model.embed_tokens.weight"], rtol=0.02, atol=0.02)


def test_an_adapter_is_exported_as_gguf_and_holds_the_update(stranger, adapter, tmp_path):
    model, tokenizer = ll.load_pretrained(stranger, device="cpu")
    ll.load_adapter(model, adapter)
    path = ll.adapters.save_gguf(model, tmp_path / "adapter.gguf", dtype="f32")
    fields, stored = gguf.GGUFReader(path).fields, tensors_of(path)
    assert fields["general.architecture"].contents() == "llama"
    layers = ll.lora_layers(model)
    assert len(stored) == 2 * len(layers)
    down = layers["model.layers.1.mlp.down_proj"]
    A, B = (stored[f"blk.1.ffn_down.weight.lora_{part}"] for part in "ab")
    torch.testing.assert_close(fields["adapter.lora.alpha"].contents() / len(A) * B @ A, down.delta().detach())
    merged = ll.adapters.save_gguf(model, tmp_path / "merged.gguf", merged=True, dtype="f32", tokenizer=tokenizer)
    whole, _ = ll.load_pretrained(merged, device="cpu")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(whole(ids), model(ids), rtol=1e-4, atol=1e-4)
        with ll.adapters.off(model):
            assert (whole(ids) - model(ids)).abs().max() > 0.01


def test_a_damaged_or_foreign_file_is_refused_by_name(stranger, adapter, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="down_proj"):
        ll.load_adapter(model, adapter)  # of another base
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ValueError, match=r"model\.gguf"):
        ll.load_pretrained(tmp_path / "model.gguf", device="cpu")
