"""Adapters as GGUF files: what llama.cpp computes from them by its own rule, worked by hand, and what is refused."""

import copy
import dataclasses
import json
import re

import gguf
import numpy as np
import peft
import pytest
import torch

from lora_lab import (
    Llama,
    LoRAConfig,
    LoRALinear,
    inject,
    load_adapter,
    load_pretrained,
    lora_layers,
    merge,
    save_adapter,
    save_model,
)
from lora_lab.adapters import CONFIG, save_gguf, shipped
from lora_lab.adapters.edit import set_factors
from lora_lab.models.digits import DigitsMLP
from lora_lab.variants import DoRALinear, LoRAFALinear, PiSSALinear, RsLoRALinear
from tests.helpers import command, error_line, logits, names, random_ids, randomise, randomise_all, snapshot
from tests.tiny_models import RELATIVES, fresh, gpt2, relative, trained_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def base(tiny_config):
    """Makes a tiny random Llama of ours."""

    def make(**changes):
        return randomise_all(Llama(dataclasses.replace(tiny_config, **changes)).eval())

    return make


@pytest.fixture
def base_folder(base, chatter, tmp_path):
    """The folder of a tiny model, with a tokenizer."""
    return save_model(base(), tmp_path / "base", chatter)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "adapter.gguf"


def adapted(model, rank=3, alpha=5.0, **options):
    inject(model, LoRAConfig(rank, alpha, targets=options.pop("targets", "all-linear")), **options)
    return randomise(model)


@torch.no_grad()
def uneven(model):
    """Every layer gets a rank and an alpha of its own."""
    for i, layer in enumerate(lora_layers(model).values()):
        rank, alpha = 1 + i % 4, 2.0 + i % 3
        A, B = layer.lora_A[:1].repeat(rank, 1), layer.lora_B[:, :1].repeat(1, rank)
        noise = torch.randn(rank, 1, generator=torch.Generator().manual_seed(i))
        set_factors(layer, {"lora_A": A * noise, "lora_B": B * noise.T}, alpha)
    return model


def contents(path):
    """(header, tensors) of a file, as the gguf library reads them."""
    reader = gguf.GGUFReader(path)
    header = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}
    return header, tensors


def llama_cpp_updates(path, config, names):
    """What llama.cpp adds to each weight, alpha / rank * B A with the file's alpha and the tensor's rank, in float64.

    The rows of a Llama's queries and keys are put back from its order into Hugging Face's, one by one.
    """
    header, tensors = contents(path)
    architecture = header["general.architecture"]
    in_file = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    result = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        A, B = tensors[f"{name}.lora_a"].astype(np.float64), tensors[f"{name}.lora_b"].astype(np.float64)
        update = A @ B.T if name == "token_embd.weight" else B @ A  # of an embedding's A it looks up rows
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            half = config.head_dim // 2
            rows = np.arange(len(update))
            head, place = np.divmod(rows, config.head_dim)
            one, pair = np.divmod(place, half)
            update = update[head * config.head_dim + 2 * pair + one]
        result[name] = header["adapter.lora.alpha"] / B.shape[1] * update
    updates = {name: in_file.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in names}
    return {name: result[theirs] for name, theirs in updates.items() if theirs in result}


def check_updates(path, model, tolerance=1e-6):
    """The file adds to each weight what the model's adapter does, and not what another's does."""
    layers = lora_layers(model)
    every = [name.replace(".base.", ".").removesuffix(".weight") for name in model.state_dict()]
    updates = llama_cpp_updates(path, model.config, every)
    assert updates.keys() == layers.keys()
    for name, layer in layers.items():
        expected = layer.delta().double().numpy()
        assert np.abs(updates[name] - expected).max() <= tolerance * np.abs(expected).max(), name
    assert len({update.tobytes() for update in updates.values()}) == len(layers)


# Unmerged


KINDS = {
    "LoRA": lambda model: adapted(model),
    "two targets": lambda model: adapted(model, targets=["q_proj", "v_proj"]),
    "rsLoRA": lambda model: adapted(model, rank=4, layer=RsLoRALinear),
    "LoRA-FA": lambda model: adapted(model, layer=LoRAFALinear),
    "PiSSA": lambda model: adapted(model, layer=PiSSALinear),
    "ranks and alphas of their own": lambda model: uneven(adapted(model)),
    "rsLoRA with ranks of their own": lambda model: uneven(adapted(model, layer=RsLoRALinear)),
}
ALL = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@ALL
def test_llama_cpp_adds_the_models_update_to_each_weight(base, path, make):
    model = make(base(head_dim=20, num_key_value_heads=1))
    before = snapshot(model)
    assert save_gguf(model, path, dtype="f32") == path
    check_updates(path, model)
    assert snapshot(model) == before
    assert names(path.parent) == ["adapter.gguf"]
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B[0, 0] += 1
    with pytest.raises(AssertionError):
        check_updates(path, model)


@ALL
def test_a_folder_gives_the_file_that_the_model_gives(base, base_folder, path, tmp_path, make):
    model = make(base())
    save_gguf(model, path, dtype="f32")
    folder = save_adapter(model, tmp_path / "adapter", base=str(base_folder))
    save_gguf(folder, tmp_path / "adapter.gguf", dtype="f32")
    (header, tensors), (its_header, its_tensors) = contents(path), contents(tmp_path / "adapter.gguf")
    assert its_header == header
    assert its_tensors.keys() == tensors.keys()
    assert all(np.array_equal(its_tensors[name], value) for name, value in tensors.items())


def test_plain_lora_is_stored_as_llama_cpps_converter_stores_it(base, path):
    model = adapted(base())
    save_gguf(model, path, dtype="f32")
    header, tensors = contents(path)
    assert header["general.architecture"] == "llama"
    assert header["general.type"] == "adapter"
    assert header["adapter.type"] == "lora"
    assert header["adapter.lora.alpha"] == 5.0
    assert not any(key.startswith(("llama.", "tokenizer.")) for key in header)
    assert len(tensors) == 2 * len(lora_layers(model)) == 28
    layers = model.model.layers[1]
    A, B = layers.self_attn.k_proj.lora_A.detach().numpy(), layers.self_attn.k_proj.lora_B.detach().numpy()
    assert np.array_equal(tensors["blk.1.attn_k.weight.lora_a"], A)
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # of the 8 rows of a head
    assert np.array_equal(tensors["blk.1.attn_k.weight.lora_b"], B[[*order, *(8 + row for row in order)]])
    assert not np.array_equal(tensors["blk.1.attn_k.weight.lora_b"], B)
    assert np.array_equal(tensors["blk.1.ffn_down.weight.lora_b"], layers.mlp.down_proj.lora_B.detach().numpy())


def test_the_embedding_and_the_head_are_adapted_where_they_are_not_tied(base, path):
    model = adapted(base(tie_word_embeddings=False), targets=["embed_tokens", "lm_head", "o_proj"])
    save_gguf(model, path, dtype="f32")
    check_updates(path, model)
    _, tensors = contents(path)
    assert tensors["token_embd.weight.lora_a"].shape == (260, 3)  # a row for each token, as llama.cpp looks them up
    assert tensors["output.weight.lora_a"].shape == (3, 32)


@pytest.mark.parametrize(("dtype", "tolerance", "exact"), [("f16", 2e-3, 1e-5), ("q8_0", 4e-2, 2e-3)])
def test_shorter_files_round(base, path, dtype, tolerance, exact):
    model = uneven(adapted(base()))
    save_gguf(model, path, dtype=dtype)
    check_updates(path, model, tolerance)
    with pytest.raises(AssertionError):
        check_updates(path, model, exact)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_up.weight.lora_a"] == {"f16": "F16", "q8_0": "Q8_0"}[dtype]
    assert kinds["blk.0.ffn_up.weight.lora_b"] == "F16"  # its rows are shorter than a block


def test_an_adapter_of_pefts_own_is_written(base_folder, path, tmp_path, tiny_hf):
    theirs = tiny_hf(seed=3)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"k_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 3},
    )
    randomise(peft.get_peft_model(theirs, config)).save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": str(base_folder)}))
    save_gguf(tmp_path / "adapter", path, dtype="f32")
    model, _ = load_pretrained(base_folder, device="cpu")
    load_adapter(model, tmp_path / "adapter")
    assert {layer.rank for layer in lora_layers(model).values()} == {2, 4}
    check_updates(path, model)


def test_a_shipped_adapter_is_written_without_its_model(path):
    save_gguf(shipped("sentiment"), path)
    header, tensors = contents(path)
    assert header["adapter.lora.alpha"] == 4.0
    assert len(tensors) == 420
    assert tensors["blk.29.attn_q.weight.lora_b"].shape == (576, 2)
    assert path.stat().st_size < 1.3e6


def test_the_base_may_be_a_gguf_file(base, base_folder, chatter, path, tmp_path):
    save_model(base(), tmp_path / "base.gguf", chatter, "gguf", "f32")
    model = adapted(base())
    for each in (tmp_path / "base.gguf", base_folder):
        save_gguf(save_adapter(model, tmp_path / "adapter", base=str(each)), path, dtype="f32")
        check_updates(path, model)
        save_gguf(tmp_path / "adapter", tmp_path / "merged.gguf", merged=True, dtype="f32")
        assert torch.equal(*merged_logits(model, tmp_path / "merged.gguf"))


# Merged


def merged_logits(model, path):
    plain, ids = copy.deepcopy(model), random_ids(2, 30)
    merge(plain)
    return logits(plain, ids), logits(load_pretrained(path, device="cpu")[0], ids)


@pytest.mark.parametrize("make", [*KINDS.values(), lambda m: adapted(m, layer=DoRALinear)], ids=[*KINDS, "DoRA"])
def test_a_merged_model_is_the_model_with_its_adapters_merged(base, chatter, path, make):
    model = make(base())
    before = snapshot(model)
    assert save_gguf(model, path, merged=True, dtype="f32", tokenizer=chatter) == path
    assert snapshot(model) == before
    assert torch.equal(*merged_logits(model, path))
    assert (merged_logits(model, path)[1] - logits(base(), random_ids(2, 30))).abs().max() > 0.1
    tokenizer = load_pretrained(path, device="cpu")[1]
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == chatter.chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_a_merged_folder_is_the_saved_merged_model(base, base_folder, chatter, path, tmp_path, dtype):
    model = adapted(base())
    folder = save_adapter(model, tmp_path / "adapter", base=str(base_folder))
    save_gguf(folder, path, merged=True, dtype=dtype)
    merge(model)
    save_model(model, tmp_path / "adapter.gguf", chatter, "gguf", dtype)
    assert path.read_bytes() == (tmp_path / "adapter.gguf").read_bytes()
    save_model(base(), tmp_path / "adapter.gguf", chatter, "gguf", dtype)
    assert path.read_bytes() != (tmp_path / "adapter.gguf").read_bytes()


def test_another_tokenizer_may_be_given_for_a_folder(base, base_folder, tiny_tokenizer, path, tmp_path):
    folder = save_adapter(adapted(base()), tmp_path / "adapter", base=str(base_folder))
    for tokenizer in (None, tiny_tokenizer):
        save_gguf(folder, path, merged=True, tokenizer=tokenizer)
        assert ("tokenizer.chat_template" in contents(path)[0]) == (tokenizer is None)


# Relatives, which are models of transformers


@pytest.fixture
def relative_folder(tmp_path):
    """The folder of a relative, with its tokenizer."""

    def save(kind, **changes):
        return save_model(relative(kind, **changes), tmp_path / "base", trained_tokenizer(RELATIVES[kind][3]))

    return save


@pytest.mark.parametrize("kind", RELATIVES)
@pytest.mark.parametrize("make", [KINDS[name] for name in ("PiSSA", "rsLoRA with ranks of their own")])
def test_an_adapter_of_a_relative_is_added_to_each_of_its_weights(relative_folder, path, tmp_path, kind, make):
    model = make(relative(kind))
    before = snapshot(model)
    save_gguf(model, path, dtype="f32")
    check_updates(path, model)
    assert snapshot(model) == before
    header, tensors = contents(path)
    assert header["general.architecture"] == RELATIVES[kind][2]
    folder = save_adapter(model, tmp_path / "adapter", base=str(relative_folder(kind)))
    save_gguf(folder, tmp_path / "adapter.gguf", dtype="f32")
    its_header, its_tensors = contents(tmp_path / "adapter.gguf")
    assert its_header == header
    assert all(np.array_equal(its_tensors[name], value) for name, value in tensors.items())
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B[0, 0] += 1
    with pytest.raises(AssertionError):
        check_updates(path, model)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_a_merged_relative_is_the_relative_with_its_adapters_merged(relative_folder, path, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    model = adapted(relative(kind), layer=DoRALinear)
    folder, ids = save_adapter(model, tmp_path / "adapter", base=str(relative_folder(kind))), random_ids(2, 30, 600)
    for source, options in ((model, {"tokenizer": trained_tokenizer(RELATIVES[kind][3])}), (folder, {})):
        save_gguf(source, path, merged=True, dtype="f32", **options)
        theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        torch.testing.assert_close(logits(theirs, ids), logits(model, ids), rtol=0, atol=1e-3)
        assert (logits(theirs, ids) - logits(relative(kind), ids)).abs().max() > 0.1


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_of_another_family_is_refused_with_the_remedy(path, tmp_path, tiny_tokenizer, merged):
    base = save_model(fresh(gpt2), tmp_path / "base", tiny_tokenizer)
    folder = save_adapter(adapted(fresh(gpt2)), tmp_path / "adapter", base=str(base))
    refuse(folder, path, r"is a GPT2LMHeadModel, but .*--merged --out FOLDER.*convert_hf_to_gguf\.py", merged=merged)


def test_what_no_file_holds_is_refused_before_the_weights_are_read(relative_folder, path, tmp_path):
    base = relative_folder("Qwen2")
    folder = save_adapter(adapted(relative("Qwen2")), tmp_path / "adapter", base=str(base))
    (base / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks the file"):
        save_gguf(folder, path, merged=True)
    settings = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(settings | {"normalizer": {"type": "Lowercase"}}))
    refuse(folder, path, r"tokenizer.*convert_hf_to_gguf\.py", merged=True)
    save_gguf(folder, path)  # the adapter alone holds none


# What is refused


class Doubled(LoRALinear):
    """Its update is not scaling * B @ A."""

    def _delta(self):
        return 2 * super()._delta()


def refuse(source, path, says, error=ValueError, **options):
    with pytest.raises(error, match=says) as caught:
        save_gguf(source, path, **options)
    assert re.search(r"\. [A-Z]", str(caught.value)) is None  # one sentence
    assert not path.parent.exists()


@pytest.mark.parametrize(("layer", "name"), [(DoRALinear, "DoRALinear"), (Doubled, "Doubled")])
def test_an_update_that_is_no_product_must_be_merged(base, path, layer, name):
    model = adapted(base(), layer=layer)
    refuse(model, path, rf"'model\.layers\.0\.self_attn\.q_proj' has an adapter of type {name}.*merged=True")


def test_a_folder_with_dora_must_be_merged(base, base_folder, path, tmp_path):
    folder = save_adapter(adapted(base(), layer=DoRALinear), tmp_path / "adapter", base=str(base_folder))
    refuse(folder, path, "type DoRA, whose update is more than .*merged=True")
    save_gguf(folder, path, merged=True)


def test_pefts_pissa_which_changed_its_base_is_refused(base, base_folder, path, tmp_path):
    folder = save_adapter(adapted(base()), tmp_path / "adapter", base=str(base_folder))
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | {"init_lora_weights": "pissa"}))
    for merged in (False, True):
        refuse(folder, path, "sets init_lora_weights to 'pissa', which changes the result", merged=merged)


def test_what_is_no_llama_with_adapters_is_refused(base, path, tmp_path):
    refuse(base(), path, "has no adapters; call inject")
    for model in (DigitsMLP(width=16), fresh(gpt2)):
        refuse(adapted(model), path, rf"is a {type(model).__name__}, but .* a lora_lab\.Llama .*--merged --out FOLDER")
    refuse(tmp_path, path, f"lacks the file {CONFIG}", FileNotFoundError)
    refuse(tmp_path / "nowhere", path, "There is no folder .*nowhere", FileNotFoundError)


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_without_its_base_or_of_another_is_refused(base, chatter, path, tmp_path, merged):
    folder = save_adapter(adapted(base()), tmp_path / "adapter", base="someone/some-model")
    says = "adapts the model 'someone/some-model' .*which is neither a folder nor a .gguf file here; write its path"
    refuse(folder, path, says, FileNotFoundError, merged=merged)
    save_model(base(intermediate_size=40), tmp_path / "other", chatter)
    save_adapter(adapted(base()), folder, base=str(tmp_path / "other"))
    refuse(folder, path, "has shape .*; is it the adapter's own base model", merged=merged)
    save_model(base(num_hidden_layers=1), tmp_path / "other", chatter)
    refuse(folder, path, "has no such layer; is it the adapter's own base model", merged=merged)


def test_an_adapter_on_a_tied_embedding_is_refused(base, base_folder, path, tmp_path):
    model = adapted(base(tie_word_embeddings=False), targets=["embed_tokens"])
    folder = save_adapter(model, tmp_path / "adapter", base=str(base_folder))
    refuse(folder, path, "shared with another module")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("adapter.bin", {}, r"must end in \.gguf"),
        ("adapter.gguf", {"dtype": "q4_0"}, "dtype is 'q4_0', but .* one of f32, f16, q8_0"),
        ("adapter.gguf", {"merged": True}, "holds its tokenizer too; pass tokenizer="),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(base, tmp_path, name, options, says):
    refuse(adapted(base()), tmp_path / "out" / name, says, **options)


def test_a_number_that_is_too_large_is_refused_and_the_older_file_stays(base, path):
    model = adapted(base())
    save_gguf(model, path)
    before = path.read_bytes()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.lora_B[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight\.lora_b holds a number of magnitude 1e\+06.*'f32'"):
        save_gguf(model, path)
    assert path.read_bytes() == before
    save_gguf(model, path, dtype="f32")
    check_updates(path, model)


def test_an_adapters_file_is_not_loaded_as_a_model(base, path):
    save_gguf(adapted(base()), path)
    with pytest.raises(ValueError, match=r"adapter\.gguf is a GGUF file of type adapter, not a model.*load_adapter"):
        load_pretrained(path)


# The command


def test_the_command_writes_an_adapter_alone_or_merged(base, base_folder, path, tmp_path, capsys):
    model = adapted(base())
    folder = save_adapter(model, tmp_path / "adapter", base=str(base_folder))
    assert command("export", folder, "--out", path, "--dtype", "f32") == 0
    assert capsys.readouterr().out == f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)\n"
    check_updates(path, model)
    assert command("export", folder, "--out", path, "--merged") == 0
    save_gguf(folder, tmp_path / "adapter.gguf", merged=True, dtype="f16")
    assert path.read_bytes() == (tmp_path / "adapter.gguf").read_bytes()


def test_the_command_writes_a_whole_model(base, base_folder, chatter, path, tiny_smollm2, capsys):
    assert command("export", base_folder, "--out", path, "--dtype", "f32") == 0
    assert torch.equal(
        logits(load_pretrained(path, device="cpu")[0], random_ids(1, 9)), logits(base(), random_ids(1, 9))
    )
    assert command("export", "smollm2-135m", "--out", path, "--dtype", "q8_0") == 0
    theirs, _ = load_pretrained(tiny_smollm2, device="cpu")
    ours, _ = load_pretrained(path, device="cpu")
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere", "--out", "x.gguf"), "There is no model 'nowhere'"),
        ((".", "--out", "x.gguf"), f". holds neither an adapter ({CONFIG}) nor a model (config.json)."),
        (("nowhere", "--out", "x.bin"), "--out is 'x.bin'; end it in .gguf for llama.cpp and Ollama, or add --merged"),
        (("nowhere", "--out", "x", "--merged"), "There is no model 'nowhere'"),
        ((".", "--out", "x", "--merged"), f". holds neither an adapter ({CONFIG}) nor a model (config.json)."),
        (("nowhere", "--out", "x", "--merged", "--dtype", "q8_0"), "dtype is 'q8_0', but a folder is written in one"),
        (("nowhere", "--out", "x.gguf", "--dtype", "f64"), "dtype is 'f64'"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert command("export", *arguments) == 1
    assert says in error_line(capsys)
    assert names(tmp_path) == []


def test_an_adapter_with_a_number_that_is_not_finite_is_not_written(base, chatter, path):
    model = adapted(base())
    name, layer = next(iter(lora_layers(model).items()))
    with torch.no_grad():
        layer.lora_A[0, 0] = torch.nan
    for options in ({}, {"merged": True, "tokenizer": chatter}):
        with pytest.raises(ValueError, match=f"^{re.escape(name)}.lora_A holds numbers that are NaN or infinite"):
            save_gguf(model, path, **options)
        assert not path.exists()
