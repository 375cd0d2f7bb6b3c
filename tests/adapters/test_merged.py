"""Merged models as Hugging Face folders: what transformers makes of them, and what is refused."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_lab import Llama, LoRAConfig, inject, load_pretrained, lora_layers, merge, save_adapter, save_model
from lora_lab.adapters import CONFIG, load_merged, save_gguf, save_merged
from lora_lab.variants import DoRALinear
from tests.helpers import command, error_line, logits, names, random_ids, randomise, randomise_all
from tests.tiny_models import fresh, gemma3, gpt2, relative


@pytest.fixture
def make(tiny_config):
    """Makes a small random model of a family."""
    families = {
        "ours": lambda: randomise_all(Llama(tiny_config).eval()),
        "Qwen2": lambda: relative("Qwen2"),
        "Gemma 3": lambda: fresh(gemma3),
        "GPT-2": lambda: fresh(gpt2),
    }
    return lambda family: families[family]()


@pytest.fixture
def adapter(make, chatter, tmp_path):
    """The folder of an adapter with its base beside it, and the model that they are: ``adapter("Qwen2")``."""

    def save(family="ours", **options):
        base = save_model(make(family), tmp_path / "base", chatter)
        model = make(family)
        inject(model, LoRAConfig(3, 5.0), **options)
        return save_adapter(randomise(model), tmp_path / "adapter", base=str(base)), model

    return save


FAMILIES = ["ours", "Qwen2", "Gemma 3", "GPT-2"]
IDS = random_ids(2, 12, 40)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_a_merged_folder_with_the_models_logits(make, adapter, chatter, tmp_path, family):
    folder, model = adapter(family)
    assert save_merged(folder, tmp_path / "merged") == tmp_path / "merged"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(theirs, IDS), logits(model, IDS), rtol=0, atol=1e-4)
    assert (logits(theirs, IDS) - logits(make(family), IDS)).abs().max() > 0.1
    assert theirs.dtype == torch.float32
    text = "the other day </s>"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text)["input_ids"] == chatter.encode(text)
    again, tokenizer = load_pretrained(tmp_path / "merged", device="cpu")
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=0, atol=1e-4)
    assert tokenizer.chat_template == chatter.chat_template
    assert CONFIG not in names(tmp_path / "merged")


def test_dora_is_merged_too(adapter, tmp_path):
    folder, model = adapter(layer=DoRALinear)
    save_merged(folder, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(theirs, IDS), logits(model, IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["ours", "Qwen2"])
@pytest.mark.parametrize(("dtype", "kind"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_shorter_folder_holds_the_merged_numbers_rounded_once(adapter, tmp_path, family, dtype, kind):
    folder, _ = adapter(family)
    exact, _ = load_merged(folder)
    assert not lora_layers(exact)
    save_merged(folder, tmp_path / "merged", dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert theirs.dtype == kind
    rounded = theirs.state_dict()
    for name, value in exact.state_dict().items():
        assert torch.equal(rounded[name], value.to(kind)), name
        assert not torch.equal(rounded[name].float(), value), name


def test_a_tokenizer_in_a_second_format_is_copied(adapter, tmp_path):
    folder, _ = adapter("Gemma 3")
    save_merged(folder, tmp_path / "without")
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"sentences")
    save_merged(folder, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"sentences"
    assert names(tmp_path / "merged") == sorted([*names(tmp_path / "without"), "tokenizer.model"])


def refuse(source, folder, says, error=ValueError, **options):
    before = names(folder) if folder.is_dir() else None
    with pytest.raises(error, match=says) as caught:
        save_merged(source, folder, **options)
    assert re.search(r"\. [A-Z]", str(caught.value)) is None  # one sentence
    assert before == (names(folder) if folder.is_dir() else None)


def test_no_folder_that_is_read_is_written_to(adapter, tmp_path):
    folder, model = adapter()
    for each in (folder, tmp_path / "base", tmp_path / "adapter" / ".." / "base"):
        refuse(folder, each, "holds what is read, which would be lost; choose another folder")
    other = save_adapter(model, tmp_path / "other")
    refuse(folder, other, "other holds an adapter, and transformers loads a model with the adapter that is in its")
    (tmp_path / "file").write_text("mine")
    refuse(folder, tmp_path / "file", "is a file, but a folder is to be written there")
    assert (tmp_path / "file").read_text() == "mine"
    torch.testing.assert_close(logits(load_pretrained(tmp_path / "base")[0], IDS), logits(load_base(model), IDS))


def test_a_model_and_an_adapter_are_not_saved_in_one_folder(adapter, chatter, tmp_path):
    folder, model = adapter()
    base = tmp_path / "base"
    before = {path: path.read_bytes() for place in (folder, base) for path in place.iterdir()}
    both = "and transformers loads a model with the adapter that is in its folder; name another folder for the"
    with pytest.raises(ValueError, match=rf"base holds a model, {both} adapter\.$"):
        save_adapter(model, base)
    merge(model)
    with pytest.raises(ValueError, match=rf"adapter holds an adapter, {both} model\.$"):
        save_model(model, folder, chatter)
    assert {path: path.read_bytes() for place in (folder, base) for path in place.iterdir()} == before


def test_an_adapter_whose_save_was_interrupted_counts_as_one(make, adapter, tmp_path):
    folder, _ = adapter()
    folder.rename(tmp_path / "new")
    (tmp_path / "new" / CONFIG).unlink()
    with pytest.raises(ValueError, match="new holds an adapter"):
        save_model(make("ours"), tmp_path / "new")
    assert CONFIG in names(tmp_path / "new")


def test_a_config_of_another_program_is_no_model(adapter, tmp_path):
    _, model = adapter()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    save_adapter(model, tmp_path / "mine")
    save_adapter(model, tmp_path / "mine")


def load_base(model):
    """The model without its adapters."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.zero_()
    return model


def test_what_cannot_be_merged_or_written_is_refused(make, adapter, tmp_path):
    folder, model = adapter()
    out = tmp_path / "merged"
    refuse(folder, out, "dtype is 'q8_0', but a folder is written in one of f32, f16, bf16", dtype="q8_0")
    refuse(tmp_path / "nowhere", out, "There is no model", FileNotFoundError)
    with torch.no_grad():
        lora_layers(model)["model.layers.0.mlp.up_proj"].lora_B[0, 0] = 1e6
    large = save_adapter(model, tmp_path / "large", base=str(tmp_path / "base"))
    refuse(large, out, r"model\.layers\.0\.mlp\.up_proj\.weight holds a number that f16 does not; .*'f32'", dtype="f16")
    save_merged(large, out, "bf16")
    homeless = save_adapter(model, tmp_path / "homeless", base="someone/some-model")
    refuse(homeless, tmp_path / "second", "adapts the model 'someone/some-model' .*which is neither", FileNotFoundError)


@pytest.mark.parametrize("family", ["ours", "GPT-2"])
def test_the_command_writes_a_merged_folder_of_every_family(adapter, tmp_path, capsys, family):
    folder, model = adapter(family)
    out = tmp_path / "merged"
    assert command("export", folder, "--out", out, "--merged") == 0
    size = sum(path.stat().st_size for path in out.iterdir())
    assert f"Written: {out} ({size / 1e6:,.1f} MB)\n" in capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(theirs, IDS), logits(model, IDS), rtol=0, atol=1e-4)
    assert command("export", folder, "--out", out, "--merged", "--dtype", "bf16") == 0
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_the_command_writes_a_whole_model_to_a_folder_too(adapter, chatter, tmp_path):
    _, model = adapter()
    save_gguf(model, tmp_path / "merged.gguf", merged=True, dtype="f32", tokenizer=chatter)
    assert command("export", tmp_path / "merged.gguf", "--out", tmp_path / "merged", "--merged") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(theirs, IDS), logits(model, IDS), rtol=0, atol=1e-4)


def test_an_adapter_alone_is_no_folder(adapter, tmp_path, capsys):
    folder, _ = adapter()
    assert command("export", folder, "--out", tmp_path / "merged") == 1
    assert "end it in .gguf for llama.cpp and Ollama, or add --merged for the whole model" in error_line(capsys)
    assert not (tmp_path / "merged").exists()
