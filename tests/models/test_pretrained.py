"""Real weights in and out: the cache and its accidents, GGUF files, Hugging Face folders, and what is saved."""

import copy
import filecmp
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lab import LoRAConfig, inject, load_pretrained, save_model
from lora_lab.models import pretrained
from lora_lab.models.llama import RopeScaling
from lora_lab.models.pretrained import load_tokenizer
from lora_lab.models.quantize import BlockEmbedding, BlockLinear, BlockWeight
from tests.helpers import logits, names, random_ids, relative_error, run_killed, run_python
from tests.models.test_gguf import VARIANTS

ENTRY = "smollm2-135m-v1"
TEXTS = ["Once upon a time", "in  2024, 3.14 and 1 000 000", "<|im_start|>user\nGrüße 😀<|im_end|>"]


def same_logits(one, other):
    return all(torch.equal(logits(one, ids), logits(other, ids)) for ids in (random_ids(1, 1), random_ids(2, 40)))


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def hf_load(folder):
    from transformers import AutoModelForCausalLM

    mapped = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # transformers leaves the weights in the mapped file, unaligned, and the product of a matrix with one row
    # rounds by the alignment. A copy lies as every new tensor does.
    return copy.deepcopy(mapped)


# The real model's weights


def test_all_weights_are_bit_equal_to_the_gguf_librarys(smollm2, gguf_reader):
    model, _ = smollm2
    raw = {tensor.name: tensor for tensor in gguf_reader.tensors}
    names_in_file = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    compared = set()
    for name, ours in model.named_parameters():  # the tied head counts once
        tensor = raw[names_in_file.get_name(name, try_suffixes=(".weight",))]
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # The file keeps the two numbers of a pair side by side; here the first ones of all pairs come first.
            rows = [
                64 * head + 2 * pair + one for head in range(len(theirs) // 64) for one in (0, 1) for pair in range(32)
            ]
            assert not np.array_equal(ours.detach().numpy(), theirs)
            theirs = theirs[rows]
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        assert np.array_equal(ours.detach().numpy().view(np.uint32), theirs.view(np.uint32)), name
        compared.add(tensor.name)
    assert compared == set(raw)
    assert len(compared) == 272


# The cache


@pytest.fixture(scope="module")
def raced(smollm2_gguf, tmp_path_factory):
    """A cache with the GGUF file, and what two processes said that then loaded the model at the same time."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / smollm2_gguf.name).symlink_to(smollm2_gguf)
    code = """
from lora_lab.models import pretrained
whole = pretrained.read_gguf
def told(path):
    print("converts")
    return whole(path)
pretrained.read_gguf = told
model, tokenizer = pretrained.load_pretrained(device="cpu", keep_blocks=True)
import torch
print(sum(parameter.sum(dtype=torch.float64).item() for parameter in model.parameters()))
"""
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda _: run_python(code, LORA_LAB_CACHE=str(cache)), range(2))
    yield cache, [process.stdout.split("\n") for process in done]
    shutil.rmtree(cache)


@pytest.mark.slow
def test_two_processes_at_once_both_load_and_only_one_converts(smollm2_gguf, in_blocks, raced):
    cache, said = raced
    total = sum(parameter.sum(dtype=torch.float64).item() for parameter in in_blocks.parameters())
    assert sum("converts" in lines for lines in said) == 1
    for lines in said:
        assert float(lines[-2]) == pytest.approx(total, rel=1e-12)
    assert [name for name in names(cache) if name[0] != "."] == [smollm2_gguf.name, ENTRY]
    usual = smollm2_gguf.parent / ENTRY
    assert filecmp.cmpfiles(cache / ENTRY, usual, names(usual), shallow=False) == (names(usual), [], [])


@pytest.fixture(scope="module")
def loaded(raced):
    """What a process has imported that loaded the entry alone, in blocks and then in full, and the peak after each."""
    cache, _ = raced
    (cache / pretrained.FILE).unlink()
    code = """
import json, sys, torch
from lora_lab.models import pretrained
from lora_lab.system.device import peak_bytes
peaks = [peak_bytes(torch.device("cpu"))]
for keep in (True, False):
    model, _ = pretrained.load_pretrained(device="cpu", keep_blocks=keep)
    peaks.append(peak_bytes(torch.device("cpu")))
    del model
imported = sorted({"gguf", "transformers", "peft", "safetensors", "tokenizers"} & set(sys.modules))
print(json.dumps([imported, *peaks]))
"""
    return json.loads(run_python(code, LORA_LAB_CACHE=str(cache)).stdout)


@pytest.mark.slow
def test_once_converted_it_loads_without_the_gguf_file_gguf_or_transformers(loaded):
    imported, *_ = loaded
    assert imported == ["safetensors", "tokenizers"]


@pytest.mark.slow
def test_the_peak_of_loading_shows_whether_the_dense_model_was_ever_built(loaded):
    _, before, in_blocks, dense = loaded
    assert 90 < (in_blocks - before) / 1e6 < 320
    assert 500 < (dense - before) / 1e6 < 1100


@pytest.mark.parametrize("renames", range(1, 6))  # the last is that of the entry itself
def test_a_conversion_killed_half_way_loses_nothing_and_the_next_load_converts(
    tiny, tiny_tokenizer, empty_cache, monkeypatch, renames
):
    path = save_model(tiny(), empty_cache / pretrained.FILE, tiny_tokenizer, "gguf", "q8_0")
    monkeypatch.setattr(pretrained, "_check_hash", lambda *_: None)  # it is not the published file
    run_killed(load_pretrained, renames)
    assert [name for name in names(empty_cache) if name[0] != "."] == [path.name]
    assert any(name.startswith(".lora_lab-new-") for name in names(empty_cache))  # so it was killed in the middle
    assert same_weights(load_pretrained(device="cpu")[0], load_pretrained(path, device="cpu")[0])
    assert [name for name in names(empty_cache) if name[0] != "."] == [path.name, ENTRY]


# GGUF files, written here as llama.cpp writes them


def interleaved(rows, heads):
    """The order in which llama.cpp keeps the rows of q and k."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture
def write_gguf(tmp_path, tiny_tokenizer):
    """Writes a model of transformers as a GGUF file, and gives it the weights that the file then holds.

    Args:
        kind: how matrices are kept.
        header: entries to put in place of the usual ones (None: leave it out).
        extra: more tensors, or other ones (None: leave it out).
    """

    def write(model, kind="F32", header=None, extra=None, architecture="llama"):
        config = model.config
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        tokens = sorted(tiny_tokenizer.backend.get_vocab().items(), key=lambda item: item[1])
        entries = {
            "llama.context_length": config.max_position_embeddings,
            "llama.embedding_length": config.hidden_size,
            "llama.block_count": config.num_hidden_layers,
            "llama.feed_forward_length": config.intermediate_size,
            "llama.attention.head_count": config.num_attention_heads,
            "llama.attention.head_count_kv": config.num_key_value_heads,
            "llama.attention.key_length": config.head_dim,
            "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "llama.rope.freq_base": config.rope_parameters["rope_theta"],
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [token for token, _ in tokens],
            "tokenizer.ggml.token_type": [1] * 258 + [3, 3],
            "tokenizer.ggml.merges": ["t h", "th e"],
            "tokenizer.ggml.bos_token_id": 258,
            "tokenizer.ggml.eos_token_id": 259,
        } | (header or {})
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        for key, value in entries.items():
            if value is not None:
                add[type(value)](key, value)
        names_in_file = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        tensors = {}
        for name, parameter in model.named_parameters():  # the tied head counts once
            value, heads = parameter.detach().numpy(), None
            if ".q_proj." in name or ".k_proj." in name:
                heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
                value = interleaved(value, heads)
            stored_as = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
            stored = gguf.quants.quantize(value, stored_as)
            tensors[names_in_file.get_name(name, try_suffixes=(".weight", ".bias"))] = (stored, stored_as)
            value = gguf.quants.dequantize(stored, stored_as)
            if heads is not None:
                value = value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(value.copy()))
        for name, value in (tensors | (extra or {})).items():
            if value is not None:
                writer.add_tensor(name, value[0], raw_dtype=value[1])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


NARROW = {"hidden_size": 64, "intermediate_size": 96}
KINDS_OF_FILES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
SHAPES = [
    {"tie_word_embeddings": False},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"head_dim": 20},
    {"num_key_value_heads": 4},
    {"rms_norm_eps": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [*((kind, NARROW) for kind in KINDS_OF_FILES), *(("F32", changes) for changes in SHAPES)],
    ids=[*KINDS_OF_FILES, *(", ".join(changes) for changes in SHAPES)],
)
def test_gguf_files_of_every_kind_and_shape_load_with_transformers_logits(tiny_hf, write_gguf, kind, changes):
    theirs = tiny_hf(**changes)
    before = copy.deepcopy(theirs)
    ours, tokenizer = load_pretrained(write_gguf(theirs, kind), device="cpu")
    assert same_weights(ours, theirs)
    assert same_logits(ours, theirs)
    assert same_logits(ours, before) == (kind == "F32")  # all others round
    assert tokenizer.decode(tokenizer.encode("the <s>")) == "the <s>"


@pytest.mark.parametrize(("kind", "high"), [("Q4_K", [1, 3]), ("Q6_K", [209])])
def test_k_quants_are_read_as_by_the_gguf_library(tiny_hf, write_gguf, kind, high):
    kind = gguf.GGMLQuantizationType[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (32, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    blocks[:, high] = 0  # the high bytes of the scales in float16, which must be finite
    path = write_gguf(tiny_hf(intermediate_size=256), extra={"blk.1.ffn_down.weight": (blocks, kind)})
    found = load_pretrained(path, device="cpu")[0].model.layers[1].mlp.down_proj.weight
    assert np.array_equal(found.detach().numpy(), gguf.quants.dequantize(blocks, kind))
    assert len(found.unique()) > 1000


def test_the_tokenizer_of_a_gguf_file_is_read_without_its_model(tiny_hf, write_gguf, monkeypatch):
    path = write_gguf(tiny_hf())
    whole = load_pretrained(path, device="cpu")[1]
    monkeypatch.setattr(pretrained, "read_gguf", lambda _: pytest.fail("the model was read"))
    tokenizer = load_tokenizer(path)
    assert tokenizer.backend.to_str() == whole.backend.to_str()
    assert (tokenizer.eos_id, tokenizer.chat_template) == (whole.eos_id, whole.chat_template)


def test_gguf_entries_that_may_be_absent_have_the_formats_defaults(tiny_hf, write_gguf):
    theirs = tiny_hf(num_key_value_heads=4)
    absent = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")
    ours, _ = load_pretrained(write_gguf(theirs, header={f"llama.{key}": None for key in absent}), device="cpu")
    assert same_logits(ours, theirs)


def llama3_factors(theta, half, factor, original):
    """The divisor of each frequency, as llama.cpp's converter computes it (low 1, high 4)."""
    factors = []
    for i in range(half):
        wavelength = 2 * math.pi * theta ** (i / half)
        smooth = (original / wavelength - 1) / (4 - 1)
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def rope_tensor(factors):
    return {"rope_freqs.weight": (factors, gguf.GGMLQuantizationType.F32)}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_in_a_gguf_file_are_read_as_the_rule_that_made_them(tiny_hf, write_gguf, factor):
    rule = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 8192, **rule}
    theirs = tiny_hf(head_dim=64, rope_parameters=rope, max_position_embeddings=131072)
    path = write_gguf(theirs, extra=rope_tensor(llama3_factors(500000.0, 32, factor, 8192)))
    ours, _ = load_pretrained(path, device="cpu")
    assert ours.config.rope_scaling == RopeScaling(factor, 1.0, 4.0, 8192)
    ids = random_ids(1, 128)
    assert torch.equal(logits(ours, ids), logits(theirs, ids))
    plain, _ = load_pretrained(write_gguf(theirs), device="cpu")
    assert plain.config.rope_scaling is None
    assert not torch.equal(logits(plain, ids), logits(theirs, ids))
    for half, original in ((32, 4096), (16, 8192)):  # another context, too few
        other = write_gguf(theirs, extra=rope_tensor(llama3_factors(500000.0, half, factor, original)))
        with pytest.raises(ValueError, match=r"rope_freqs of .* do not follow Llama 3's rule"):
            load_pretrained(other)


def array(kind, values):
    return np.asarray(values), gguf.GGMLQuantizationType[kind]


REFUSED_HEADERS = [  # an entry, its value (None: it is left out), and what must be named
    ("tokenizer.ggml.model", "llama", "llama"),
    ("tokenizer.ggml.pre", "tekken", "tekken"),
    ("tokenizer.ggml.tokens", None, "tokens"),
    ("llama.block_count", None, "llama.block_count"),
    ("llama.block_count", 10**9, "num_hidden_layers is 1000000000"),
    ("llama.block_count", 3, "tensor model.layers.2.* is missing"),
    ("llama.embedding_length", "32", "hidden_size|str"),
    ("llama.attention.head_count", 0, "num_attention_heads is 0"),
    ("llama.attention.head_count", 5, "num_attention_heads is 5"),
    ("llama.attention.key_length", 6, "proj.weight is numbers of shape"),
    ("llama.rope.freq_base", -1.0, "rope_theta is -1.0"),
    ("llama.rope.freq_base", math.nan, "rope_theta is nan"),
    ("llama.rope.scaling.type", 5, "positions by 5"),
    ("llama.rope.scaling.type", "yarn", "yarn"),
    ("llama.feed_forward_length", 47, "of shape .*48.*requires .*47"),
    ("tokenizer.ggml.merges", ["zz q"], "zz"),
    ("tokenizer.ggml.merges", ["z" * 10_000 + " q"], "zz"),
    ("tokenizer.ggml.merges", ["t h e"], "tokenizer cannot be built"),
    ("tokenizer.ggml.token_type", [1] * 259, "tokenizer cannot be built"),
    ("tokenizer.ggml.token_type", "text", "tokenizer cannot be built"),
    ("tokenizer.ggml.bos_token_id", 260, "tokenizer cannot be built"),
]
REFUSED_TENSORS = [
    ("output_norm.weight", array("I32", np.zeros(32, np.int32)), "I32"),
    ("output_norm.weight", array("F64", np.zeros(32)), "F64"),
    ("output_norm.weight", array("F32", np.full(32, np.nan, np.float32)), "model.norm.weight"),
    ("blk.0.ffn_gate_inp.weight", array("F32", np.zeros((2, 32), np.float32)), "ffn_gate_inp"),
    ("blk.1.ffn_up.weight", None, "model.layers.1.mlp.up_proj.weight"),
]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"architecture": "qwen2"}, "qwen2"),
        *(({"header": {name: value}}, named) for name, value, named in REFUSED_HEADERS),
        *(({"extra": {name: value}}, named) for name, value, named in REFUSED_TENSORS),
    ],
    ids=lambda value: json.dumps(value, default=lambda _: "")[:80] if isinstance(value, dict) else "",
)
def test_gguf_files_that_are_not_built_here_are_refused(tiny_hf, write_gguf, options, named):
    with pytest.raises(ValueError, match=named) as caught:
        load_pretrained(write_gguf(tiny_hf(), **options))
    assert len(str(caught.value)) < 500


def test_norms_in_blocks_are_dequantised(tiny_hf, write_gguf):
    theirs = tiny_hf()
    kind = gguf.GGMLQuantizationType.Q8_0
    norm = gguf.quants.quantize(theirs.model.norm.weight.detach().numpy(), kind)
    ours, _ = load_pretrained(write_gguf(theirs, extra={"output_norm.weight": (norm, kind)}), device="cpu")
    assert np.array_equal(ours.model.norm.weight.detach().numpy(), gguf.quants.dequantize(norm, kind))


# What may be asked for


@pytest.mark.parametrize(
    ("source", "dtype", "error", "named"),
    [
        ("smollm3", torch.float32, FileNotFoundError, "smollm3"),
        ("nowhere/model.gguf", torch.float32, FileNotFoundError, "nowhere/model.gguf"),
        ("weights.bin", torch.float32, ValueError, "weights.bin"),
        ("text.gguf", torch.float32, ValueError, "text.gguf"),
        *((".", dtype, ValueError, str(dtype)) for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64)),
    ],
)
def test_what_cannot_be_loaded_is_refused(tmp_path, monkeypatch, source, dtype, error, named):
    monkeypatch.chdir(tmp_path)
    Path("weights.bin").write_bytes(b"1")
    Path("text.gguf").write_text("This is a text, and not a model. " * 100)
    for load in (load_pretrained, load_tokenizer) if source != "." else (partial(load_pretrained, dtype=dtype),):
        with pytest.raises(error, match=named):
            load(source)


# Hugging Face folders


def test_shards_load_as_one_file_does(tiny_hf, hf_folder):
    theirs = tiny_hf(num_hidden_layers=3)
    folder = hf_folder(theirs, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    ours, _ = load_pretrained(folder, device="cpu")
    assert same_weights(ours, theirs)
    assert same_logits(ours, theirs)
    assert not same_logits(ours, tiny_hf(seed=1, num_hidden_layers=3))


@pytest.mark.parametrize("lacking", ["config.json", "tokenizer.json", "shard"])
def test_a_folder_that_lacks_a_file_names_it(tiny_hf, hf_folder, lacking):
    folder = hf_folder(tiny_hf(), **({"max_shard_size": "20KB"} if lacking == "shard" else {}))
    if lacking == "shard":
        lacking = sorted(folder.glob("*.safetensors"))[1].name
    (folder / lacking).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder.name} lacks the file {lacking}"):
        load_pretrained(folder)


def change_json(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def change_weights(folder, metadata=None, **changes):
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()} | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path, metadata)


def index_of(folder, content, model_type="llama"):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    change_json(folder / "config.json", model_type=model_type)


NORM, KINDS = "model.norm.weight", "lora_lab.block_kinds"
REFUSED_WEIGHTS = [
    ({NORM: None}, NORM),
    ({"model.embed_tokens.weight": None}, "weight"),
    ({"model.norm.bias": torch.zeros(32)}, "model.norm.bias"),
    ({NORM: torch.zeros(31)}, r"\(31,\)"),
    ({NORM: torch.ones(32, dtype=torch.int32)}, "torch.int32"),
    ({NORM: torch.full((32,), math.nan)}, "NaN or infinite"),
    ({NORM: torch.full((32,), -math.inf)}, "NaN or infinite"),
    *(({"metadata": {KINDS: kinds}}, "model.safetensors") for kinds in ("{", "[" * 100_000, "[1]", f'{{"{NORM}": 5}}')),
    ({"metadata": {KINDS: f'{{"{NORM}": "Q4_1"}}'}}, NORM),
]
REFUSED_CONFIGS = [  # more of them: see test_shapes
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"num_hidden_layers": 900}, "tensor model.layers.* is missing"),
]
REFUSED_INDEXES = [
    ({"weight_map": {"x": "../elsewhere.safetensors"}}, "elsewhere.safetensors"),
    ({"weight_map": {"x": "/elsewhere.safetensors"}}, "elsewhere.safetensors"),
    ({"weight_map": {"x": r"..\elsewhere.safetensors"}}, "elsewhere.safetensors"),
    ({"weight_map": {"x": "weights.bin"}}, "weights.bin"),
    ({}, "weight_map"),
    ({"weight_map": {"x": 5}}, "weight_map.x is 5"),
    ({"weight_map": []}, "weight_map"),
]
UNKNOWN = {"type": "BertProcessing", "sep": ["</s>", 260], "cls": ["<s>", 258]}
REFUSED = [
    (lambda folder: change_json(folder / "tokenizer.json", post_processor=UNKNOWN), "adds token 260.*model has 260"),
    *((lambda folder, c=change: change_weights(folder, **c), named) for change, named in REFUSED_WEIGHTS),
    *((lambda folder, c=change: change_json(folder / "config.json", **c), named) for change, named in REFUSED_CONFIGS),
    *(
        (lambda folder, c=content, t=kind: index_of(folder, c, t), named)
        for content, named in REFUSED_INDEXES
        for kind in ("llama", "mistral")
    ),
    *(
        (lambda folder, n=length: os.truncate(folder / "model.safetensors", n), "model.safetensors")
        for length in (0, 5, 100, 5000)
    ),
    *(
        (lambda folder, n=name: (folder / n).write_text('{"half": '), name)
        for name in ("config.json", "tokenizer_config.json")
    ),
]


@pytest.mark.parametrize(("damage", "named"), REFUSED)
def test_a_folder_that_is_damaged_or_not_built_here_is_refused(tiny_hf, hf_folder, damage, named):
    folder = hf_folder(tiny_hf())
    damage(folder)
    with pytest.raises(ValueError, match=named):
        load_pretrained(folder)


def test_l11_numbers_that_are_infinite_in_half_precision_alone_are_refused_there(tiny_hf, hf_folder):
    path = hf_folder(tiny_hf()) / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    save_file(tensors | {"model.norm.weight": torch.full((32,), 1e6)}, path)
    assert load_pretrained(path.parent, device="cpu")[0].model.norm.weight[0] == 1e6
    with pytest.raises(
        ValueError, match=r"hf in torch.float16: model.norm.weight holds numbers that are NaN or infinite"
    ):
        load_pretrained(path.parent, torch.float16, device="cpu")


def test_tensors_that_older_folders_repeat_are_passed_over(tiny_hf, hf_folder):
    theirs = tiny_hf()
    path = hf_folder(theirs) / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    repeated = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(tensors | repeated, path)
    ours, _ = load_pretrained(path.parent, device="cpu")
    assert same_logits(ours, theirs)


def test_configs_of_older_transformers_are_read_alike(tiny_hf, hf_folder):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    theirs = tiny_hf(head_dim=64, rope_parameters={**rope, "rope_theta": 5000.0})
    folder = hf_folder(theirs)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    for scaling, equal in ((rope, True), (None, False)):
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0, "rope_scaling": scaling}))
        assert same_logits(load_pretrained(folder, device="cpu")[0], theirs) is equal


def test_a_loaded_model_does_not_change_when_its_file_is_written_over(tiny_hf, hf_folder):
    theirs = tiny_hf()
    path = hf_folder(theirs) / "model.safetensors"
    ours, _ = load_pretrained(path.parent, device="cpu")
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert same_weights(ours, theirs)
    assert not same_weights(load_pretrained(path.parent, device="cpu")[0], theirs)


# Saving


def variant_name(changes):
    return ", ".join(changes) or "plain"


@pytest.mark.parametrize("changes", VARIANTS, ids=variant_name)
def test_a_saved_model_is_read_with_equal_logits_by_transformers_and_here(tiny, chatter, tmp_path, changes):
    from transformers import AutoTokenizer

    model = tiny(**changes)
    assert save_model(model, tmp_path / "m", chatter) == tmp_path / "m"
    theirs = hf_load(tmp_path / "m")
    assert same_weights(model, theirs)
    assert same_logits(model, theirs)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] += 0.1
    assert not same_logits(model, theirs)
    loaded, tokenizer = load_pretrained(tmp_path / "m", device="cpu")
    assert loaded.config == model.config
    assert same_weights(loaded, theirs)
    assert tokenizer.encode("the <s>") == chatter.encode("the <s>")
    assert names(tmp_path / "m") == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (hf_tokenizer.eos_token_id, hf_tokenizer.bos_token_id) == (259, 258)
    assert theirs.config.eos_token_id == 259
    messages = [{"role": "user", "content": "Hi"}]
    assert hf_tokenizer.apply_chat_template(messages, tokenize=False) == chatter.chat(messages, False)
    for text in (*TEXTS, "the <s>"):
        assert hf_tokenizer(text)["input_ids"] == chatter.encode(text)


def test_a_model_saved_in_half_precision_stays_in_it(tiny, tiny_tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny().to(torch.bfloat16)
    save_model(model, tmp_path, tiny_tokenizer)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"), model)
    assert same_weights(load_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")[0], model)


def test_without_a_tokenizer_the_weights_alone_are_saved(tiny, tmp_path):
    model = tiny()
    (tmp_path / "chat_template.jinja").write_text("theirs")  # it stays with the tokenizer, if there is one
    save_model(model, tmp_path)
    assert names(tmp_path) == ["chat_template.jinja", "config.json", "model.safetensors"]
    assert same_logits(hf_load(tmp_path), model)
    with pytest.raises(FileNotFoundError, match=r"lacks the file tokenizer\.json"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_l11_a_weight_that_is_not_finite_is_not_saved(tiny, tiny_tokenizer, tmp_path, format, value):
    model = tiny()
    path = tmp_path / "model.gguf" if format == "gguf" else tmp_path
    save_model(model, path, tiny_tokenizer, format)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds numbers that are NaN or infinite"):
        save_model(model, path, tiny_tokenizer, format)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_saving_over_the_folder_that_it_came_from_keeps_the_new_weights(tiny, tiny_tokenizer, tmp_path):
    save_model(tiny(), tmp_path, tiny_tokenizer)
    model, tokenizer = load_pretrained(tmp_path, device="cpu")
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    save_model(model, tmp_path, tokenizer)
    assert same_weights(load_pretrained(tmp_path, device="cpu")[0], model)
    assert not same_weights(model, tiny())


def test_a_config_of_another_save_is_refused(tiny, tiny_tokenizer, tmp_path):
    for name, theta in (("one", 1e4), ("other", 5e5)):
        save_model(tiny(rope_theta=theta), tmp_path / name, tiny_tokenizer)
    path = tmp_path / "one" / "config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps(own | {"architectures": ["MineForCausalLM"]}))  # which changes no number
    assert same_weights(load_pretrained(tmp_path / "one", device="cpu")[0], tiny())
    path.write_text((tmp_path / "other" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"config\.json"):
        load_pretrained(tmp_path / "one", device="cpu")


def test_saving_over_shards_of_another_model_leaves_none_of_it(tiny, tiny_hf, hf_folder, tiny_tokenizer):
    folder = hf_folder(tiny_hf(seed=5), max_shard_size="20KB")
    model = tiny()
    save_model(model, folder, tiny_tokenizer)
    assert same_logits(hf_load(folder), model)
    assert same_weights(load_pretrained(folder, device="cpu")[0], model)


# Matrices that stay in their blocks


@pytest.fixture(scope="module")
def in_blocks(smollm2):
    """SmolLM2 in its blocks; for reading."""
    return load_pretrained(device="cpu", keep_blocks=True)[0]


def test_kept_blocks_stand_for_the_same_weights(in_blocks, smollm2):
    dense, _ = smollm2
    kept = {name: module for name, module in in_blocks.named_modules() if isinstance(module, BlockWeight)}
    assert len(kept) == 212
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        layer = name.removesuffix(".weight")
        found = kept[layer].weight if layer in kept else in_blocks.get_parameter(name)
        assert torch.equal(found, parameter), name
        assert found.requires_grad == (layer not in kept)
    assert {type(module) for module in kept.values()} == {BlockLinear, BlockEmbedding}
    assert {module.kind for name, module in kept.items() if "layers" in name} == {"Q4_1"}
    assert {module.kind for name, module in kept.items() if "layers" not in name} == {"Q8_0"}
    assert not in_blocks.training
    assert all(parameter.dtype == torch.uint8 for parameter in in_blocks.parameters() if parameter.ndim > 1)
    assert in_blocks.lm_head.packed is in_blocks.model.embed_tokens.packed
    ids = random_ids(2, 16, 49152)
    assert relative_error(logits(in_blocks, ids), logits(dense, ids)) < 1e-5


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 24, "num_key_value_heads": 1},
    ],
    ids=lambda changes: ", ".join(changes) or "plain",
)
def test_gguf_files_are_kept_in_blocks_in_every_shape(tiny_hf, write_gguf, kind, changes):
    theirs = tiny_hf(**NARROW, **changes)
    ours, _ = load_pretrained(write_gguf(theirs, kind), device="cpu", keep_blocks=True)
    tied = changes.get("tie_word_embeddings", True)
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, BlockWeight)}
    assert len(layers) == 16
    for name, layer in layers.items():
        twin = theirs.get_submodule(name)
        assert torch.equal(layer.weight, twin.weight)
        assert layer.kind == kind
        bias = getattr(twin, "bias", None)
        assert (bias is None) == (getattr(layer, "bias", None) is None)
        assert bias is None or (torch.equal(layer.bias, bias) and not layer.bias.requires_grad)
    assert (ours.lm_head.packed is ours.model.embed_tokens.packed) == tied
    ids = random_ids(2, 20)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-5, atol=1e-4)
    assert not logits(ours, ids).allclose(logits(tiny_hf(seed=1, **NARROW, **changes), ids), atol=0.1)


def test_a_matrix_outside_of_blocks_is_loaded_as_usual(tiny_hf, write_gguf):
    theirs = tiny_hf(**NARROW)
    dense = np.random.default_rng(0).normal(size=(96, 64)).astype(np.float32)
    path = write_gguf(theirs, "Q4_1", extra={"blk.1.ffn_up.weight": (dense, gguf.GGMLQuantizationType.F32)})
    ours, _ = load_pretrained(path, device="cpu", keep_blocks=True)
    found = [name for name, module in ours.named_modules() if isinstance(module, torch.nn.Linear)]
    assert found == ["model.layers.1.mlp.up_proj"]
    assert np.array_equal(ours.get_submodule(found[0]).weight.detach().numpy(), dense)
    assert len(inject(ours, LoRAConfig(rank=2))) == 14


def test_blocks_dequantise_to_the_dtype_that_was_asked_for(tiny_hf, write_gguf):
    path = write_gguf(tiny_hf(**NARROW), "Q8_0")
    half, _ = load_pretrained(path, dtype=torch.bfloat16, device="cpu", keep_blocks=True)
    dense, _ = load_pretrained(path, dtype=torch.bfloat16, device="cpu")
    assert half.lm_head.weight.dtype == half.model.embed_tokens.weight.dtype == torch.bfloat16
    assert half.model.norm.weight.dtype == torch.bfloat16
    assert same_logits(half, dense)
    assert logits(half, random_ids(1, 6)).dtype == torch.bfloat16


def test_a_source_without_blocks_has_none_to_keep(tiny_hf, write_gguf, hf_folder):
    theirs = tiny_hf(**NARROW)
    says = r"holds no blocks to keep; .*quantize_nf4\(model\)"
    for source in (write_gguf(theirs, "F32"), write_gguf(theirs, "Q4_0"), hf_folder(theirs)):
        with pytest.raises(ValueError, match=says):
            load_pretrained(source, device="cpu", keep_blocks=True)
        load_pretrained(source, device="cpu")


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_l11_scales_of_blocks_must_be_finite(tiny_hf, write_gguf, kind):
    blocks = np.zeros((260, 20 if kind == "Q4_1" else 34), np.uint8)  # one for each token
    extra = {"token_embd.weight": (blocks, gguf.GGMLQuantizationType[kind])}
    load_pretrained(write_gguf(tiny_hf(), extra=extra), device="cpu", keep_blocks=True)
    blocks[7, :2] = np.array([np.inf], np.float16).view(np.uint8)
    for keep in (True, False):
        with pytest.raises(ValueError, match=r"model.embed_tokens.weight holds numbers that are NaN or infinite"):
            load_pretrained(write_gguf(tiny_hf(), extra=extra), device="cpu", keep_blocks=keep)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_blocks_is_saved_as_the_dense_one_it_stands_for(tiny_hf, write_gguf, tmp_path, tied):
    theirs = tiny_hf(**NARROW, tie_word_embeddings=tied, attention_bias=True)
    ours, tokenizer = load_pretrained(write_gguf(theirs, "Q4_1"), device="cpu", keep_blocks=True)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    folder = save_model(ours, tmp_path / "m", tokenizer)
    assert same_logits(hf_load(folder), theirs)
    assert same_weights(load_pretrained(folder, device="cpu")[0], theirs)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
