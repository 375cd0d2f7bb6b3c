"""Adapters in other programs: what llama.cpp computes of a GGUF file by its own rule, worked by hand, what transformers
makes of a merged folder, and what is refused."""

import copy
import dataclasses
import json
import re
from functools import partial

import gguf
import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

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
from lora_lab.adapters import CONFIG, save_gguf, save_merged, shipped
from lora_lab.adapters.export import load_whole_model
from lora_lab.models.digits import DigitsMLP
from lora_lab.variants import DoRALinear, LoRAFALinear, PiSSALinear, RsLoRALinear
from tests.helpers import command, error_line, logits, names, random_ids, randomise, randomise_all, snapshot
from tests.tiny_models import RELATIVES, fresh, gemma3, gpt2, relative, trained_tokenizer

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
        layer.lora_A, layer.lora_B, layer.alpha = nn.Parameter(A * noise), nn.Parameter(B * noise.T), alpha
    return model


@torch.no_grad()
def change(model, number, name="model.layers.0.mlp.up_proj"):
    """Set one number of an adapter."""
    lora_layers(model)[name].lora_B[0, 0] = number
    return model


def edit(folder, **values):
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | values))
    return folder


def contents(path):
    """(header, tensors) of a file, as the gguf library reads them."""
    reader = gguf.GGUFReader(path)
    header = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}
    return header, tensors


def check_same(path, other):
    """Two files hold the same, but for their names."""
    (header, tensors), (its_header, its_tensors) = contents(path), contents(other)
    assert its_header == header
    assert its_tensors.keys() == tensors.keys()
    assert all(np.array_equal(its_tensors[name], value) for name, value in tensors.items())


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


# An adapter alone


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
def test_llama_cpp_adds_the_models_update_to_each_weight_and_a_folder_gives_the_same_file(
    base, chatter, path, tmp_path, make
):
    shape = {"head_dim": 20, "num_key_value_heads": 1}
    model = make(base(**shape))
    before = snapshot(model)
    assert save_gguf(model, path, dtype="f32") == path
    check_updates(path, model)
    assert snapshot(model) == before
    assert names(path.parent) == ["adapter.gguf"]
    folder = save_adapter(
        model, tmp_path / "adapter", base=str(save_model(base(**shape), tmp_path / "shaped", chatter))
    )
    check_same(path, save_gguf(folder, tmp_path / "adapter.gguf", dtype="f32"))
    change(model, 1.0, next(iter(lora_layers(model))))
    with pytest.raises(AssertionError):
        check_updates(path, model)


def test_plain_lora_is_stored_as_llama_cpps_converter_stores_it(base, path):
    model = adapted(base())
    save_gguf(model, path, dtype="f32")
    header, tensors = contents(path)
    expected = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    assert expected | {"adapter.lora.alpha": 5.0} == {key: header[key] for key in (*expected, "adapter.lora.alpha")}
    assert not any(key.startswith(("llama.", "tokenizer.")) for key in header)
    assert len(tensors) == 2 * len(lora_layers(model)) == 28
    layers = model.model.layers[1]
    A, B = layers.self_attn.k_proj.lora_A.detach().numpy(), layers.self_attn.k_proj.lora_B.detach().numpy()
    assert np.array_equal(tensors["blk.1.attn_k.weight.lora_a"], A)
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # of the 8 rows of a head
    assert np.array_equal(tensors["blk.1.attn_k.weight.lora_b"], B[[*order, *(8 + row for row in order)]])
    with pytest.raises(ValueError, match=r"adapter\.gguf is of type 'adapter', not 'model'"):
        load_pretrained(path)


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
    patterns = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}
    targets = ["q_proj", "k_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=True, **patterns)
    randomise(peft.get_peft_model(tiny_hf(seed=3), config)).save_pretrained(tmp_path / "adapter")
    save_gguf(edit(tmp_path / "adapter", base_model_name_or_path=str(base_folder)), path, dtype="f32")
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


def test_the_base_may_be_a_gguf_file(base, chatter, path, tmp_path):
    save_model(base(), tmp_path / "base.gguf", chatter, "gguf", "f32")
    model = adapted(base())
    save_gguf(save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base.gguf")), path, dtype="f32")
    check_updates(path, model)
    save_gguf(tmp_path / "adapter", path, merged=True, dtype="f32")
    assert torch.equal(*merged_logits(model, path))


# A merged model in a GGUF file


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
def test_a_merged_folder_is_the_saved_merged_model_with_the_tokenizer_that_is_given(
    base, base_folder, chatter, tiny_tokenizer, path, tmp_path, dtype
):
    model = adapted(base())
    folder = save_adapter(model, tmp_path / "adapter", base=str(base_folder))
    save_gguf(folder, path, merged=True, dtype=dtype)
    merge(model)
    save_model(model, tmp_path / "adapter.gguf", chatter, "gguf", dtype)
    assert path.read_bytes() == (tmp_path / "adapter.gguf").read_bytes()
    save_model(base(), tmp_path / "adapter.gguf", chatter, "gguf", dtype)
    assert path.read_bytes() != (tmp_path / "adapter.gguf").read_bytes()
    assert "tokenizer.chat_template" in contents(path)[0]
    save_gguf(folder, path, merged=True, dtype=dtype, tokenizer=tiny_tokenizer)
    assert "tokenizer.chat_template" not in contents(path)[0]


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
    save_gguf(model, path, dtype="f32")
    check_updates(path, model)
    assert contents(path)[0]["general.architecture"] == RELATIVES[kind][2]
    folder = save_adapter(model, tmp_path / "adapter", base=str(relative_folder(kind)))
    check_same(path, save_gguf(folder, tmp_path / "adapter.gguf", dtype="f32"))


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_a_merged_relative_is_the_relative_with_its_adapters_merged(relative_folder, path, tmp_path, kind):
    model = adapted(relative(kind), layer=DoRALinear)
    folder, ids = save_adapter(model, tmp_path / "adapter", base=str(relative_folder(kind))), random_ids(2, 30, 600)
    for source, options in ((model, {"tokenizer": trained_tokenizer(RELATIVES[kind][3])}), (folder, {})):
        save_gguf(source, path, merged=True, dtype="f32", **options)
        theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        torch.testing.assert_close(logits(theirs, ids), logits(model, ids), rtol=0, atol=1e-3)
        assert (logits(theirs, ids) - logits(relative(kind), ids)).abs().max() > 0.1


# A merged model in a folder


@pytest.fixture
def make(base):
    """Makes a small random model of a family."""
    families = {"Qwen2": lambda: relative("Qwen2"), "Gemma 3": lambda: fresh(gemma3), "GPT-2": lambda: fresh(gpt2)}
    return lambda family: families.get(family, base)()


@pytest.fixture
def adapter(make, chatter, tmp_path):
    """The folder of an adapter with its base beside it, and the model that they are: ``adapter("Qwen2")``."""

    def save(family="ours", **options):
        base = save_model(make(family), tmp_path / "base", chatter)
        model = adapted(make(family), **options)
        return save_adapter(model, tmp_path / "adapter", base=str(base)), model

    return save


IDS = random_ids(2, 12, 40)


@pytest.mark.parametrize("family", ["ours", "Qwen2", "Gemma 3", "GPT-2"])
def test_transformers_reads_a_merged_folder_with_the_models_logits(make, adapter, chatter, tmp_path, family):
    folder, model = adapter(family, **({"layer": DoRALinear} if family == "Qwen2" else {}))
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


@pytest.mark.parametrize("family", ["ours", "Qwen2"])
@pytest.mark.parametrize(("dtype", "kind"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_shorter_folder_holds_the_merged_numbers_rounded_once(adapter, tmp_path, family, dtype, kind):
    folder, _ = adapter(family)
    exact, _ = load_whole_model(folder)
    assert not lora_layers(exact)
    save_merged(folder, tmp_path / "merged", dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert theirs.dtype == kind
    for name, value in exact.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value.to(kind)), name


def test_a_tokenizer_in_a_second_format_is_copied(adapter, tmp_path):
    folder, _ = adapter("Gemma 3")
    save_merged(folder, tmp_path / "without")
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"sentences")
    save_merged(folder, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"sentences"
    assert names(tmp_path / "merged") == sorted([*names(tmp_path / "without"), "tokenizer.model"])


# What is refused


class Doubled(LoRALinear):
    """Its update is not scaling * B @ A."""

    def _delta(self):
        return 2 * super()._delta()


def refuse(source, path, named, error=ValueError, **options):
    with pytest.raises(error, match=re.escape(named)):
        save_gguf(source, path, **options)
    assert not path.parent.exists()


REFUSED = [  # what becomes of a base, how it is written, and what must be named
    (lambda model: adapted(model, layer=DoRALinear), {}, "DoRA"),
    (lambda model: adapted(model, layer=Doubled), {}, "Doubled"),
    (lambda model: model, {}, "no adapters"),
    (lambda model: adapted(DigitsMLP(width=16)), {}, "DigitsMLP"),
    (lambda model: adapted(fresh(gpt2)), {}, "GPT2LMHeadModel"),
    (lambda model: adapted(model), {"dtype": "q4_0"}, "q4_0"),
    (lambda model: adapted(model), {"merged": True}, "tokenizer"),
    (lambda model: change(adapted(model), 1e6), {}, "blk.0.ffn_up.weight.lora_b"),
    (lambda model: change(adapted(model), torch.nan), {}, "model.layers.0.mlp.up_proj.lora_B"),
    (lambda model: change(adapted(model), torch.nan), {"merged": True}, "model.layers.0.mlp.up_proj.lora_B"),
]


@pytest.mark.parametrize(("change", "options", "named"), REFUSED)
def test_a_model_that_no_file_can_hold_is_refused(base, path, change, options, named):
    refuse(change(base()), path, named, **options)


def test_a_number_that_is_too_large_for_half_precision_leaves_the_older_file_and_goes_into_float32(base, path):
    model = adapted(base())
    save_gguf(model, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="f32"):
        save_gguf(change(model, 1e6), path)
    assert path.read_bytes() == before
    save_gguf(model, path, dtype="f32")
    check_updates(path, model)


@pytest.mark.parametrize("merged", [False, True])
def test_a_folder_that_no_file_can_hold_is_refused(base, base_folder, chatter, tiny_tokenizer, path, tmp_path, merged):
    folder = save_adapter(adapted(base()), tmp_path / "adapter", base="someone/some-model")
    refuse(folder, path, "'someone/some-model'", FileNotFoundError, merged=merged)
    refuse(folder, path.with_suffix(".bin"), ".bin", merged=merged)
    for change, named in (({"intermediate_size": 40}, "lora_"), ({"num_hidden_layers": 1}, "layers.1.")):
        save_model(base(**change), tmp_path / "other", chatter)
        refuse(edit(folder, base_model_name_or_path=str(tmp_path / "other")), path, named, merged=merged)
    other = save_model(fresh(gpt2), tmp_path / "gpt2", tiny_tokenizer)
    turned = save_adapter(adapted(fresh(gpt2)), tmp_path / "turned", base=str(other))
    refuse(turned, path, "GPT2LMHeadModel", merged=merged)
    refuse(tmp_path / "nowhere", path, "nowhere", FileNotFoundError, merged=merged)
    tied = adapted(base(tie_word_embeddings=False), targets=["embed_tokens"])
    refuse(save_adapter(tied, tmp_path / "tied", base=str(base_folder)), path, "embed_tokens", merged=merged)
    dora = save_adapter(adapted(base(), layer=DoRALinear), tmp_path / "dora", base=str(base_folder))
    if not merged:
        refuse(dora, path, "DoRA")
        return
    tokenizer = json.loads((base_folder / "tokenizer.json").read_text())
    (base_folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "Lowercase"}}))
    refuse(dora, path, "tokenizer", merged=True)


def test_no_folder_that_is_read_is_written_to(base, adapter, tmp_path):
    folder, model = adapter()
    before = {path: path.read_bytes() for place in (folder, tmp_path / "base") for path in place.iterdir()}
    other = save_adapter(model, tmp_path / "other")
    (other / CONFIG).unlink()  # as if its save had been interrupted
    read = folder, tmp_path / "base", tmp_path / "adapter" / ".." / "base"
    for call, says in (
        *((partial(save_merged, folder, each), "holds what is read") for each in read),
        (partial(save_merged, folder, other), "other holds an adapter"),
        (partial(save_adapter, model, tmp_path / "base"), "base holds a model"),
        (partial(save_model, base(), folder), "adapter holds an adapter"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    assert {path: path.read_bytes() for place in (folder, tmp_path / "base") for path in place.iterdir()} == before
    (tmp_path / "config.json").write_text("{}")  # of another program, and so of no model
    save_adapter(model, save_adapter(model, tmp_path))


def test_what_cannot_be_merged_or_written_to_a_folder_is_refused(adapter, tmp_path):
    folder, model = adapter()
    large = save_adapter(change(model, 1e6), tmp_path / "large", base=str(tmp_path / "base"))
    for source, dtype, named in (
        (folder, "q8_0", "'q8_0'"),
        (large, "f16", "model.layers.0.mlp.up_proj.weight"),
        (tmp_path / "nowhere", "f32", "nowhere"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(named)):
            save_merged(source, tmp_path / "merged", dtype)
        assert not (tmp_path / "merged").exists()
    save_merged(large, tmp_path / "merged", "bf16")


# The command


def test_the_command_writes_adapters_and_models_of_every_form(base, base_folder, path, tmp_path, tiny_smollm2, capsys):
    folder = save_adapter(adapted(base()), tmp_path / "adapter", base=str(base_folder))
    for source, out, merged, dtype in (
        (folder, path, False, "f32"),
        (folder, path, True, "f16"),
        (path, tmp_path / "from-gguf", True, "f32"),
        (base_folder, path, False, "f32"),
        ("smollm2-135m", path, False, "q8_0"),
    ):
        assert command("export", source, "--out", out, "--dtype", dtype, *["--merged"] * merged) == 0
        size = sum(each.stat().st_size for each in (out.iterdir() if out.is_dir() else [out]))
        assert f"Written: {out} ({size / 1e6:,.1f} MB)\n" in capsys.readouterr().out
        expected = tmp_path / "expected" / out.name  # a file holds its name
        if source == folder:
            save_gguf(folder, expected, merged=merged, dtype=dtype)
        elif out == path:
            model, tokenizer = load_pretrained(source, device="cpu")
            save_model(model, expected, tokenizer, "gguf", dtype)
        assert not expected.exists() or path.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere", "--out", "x.gguf"), "There is no model 'nowhere'"),
        ((".", "--out", "x.gguf"), "lacks the file config.json"),
        (("nowhere", "--out", "x.bin"), "'x.bin', but the name of a GGUF file must end in .gguf"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert command("export", *arguments) == 1
    assert says in error_line(capsys)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
