"""GGUF files: what the gguf library and transformers read in ours, what loads again, and what is no such file."""

import dataclasses
import json
import struct

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from lora_lab import Llama, LoRAConfig, inject, load_pretrained, quantize_nf4, save_model
from lora_lab.models.gguf import gguf_name, read_header
from lora_lab.models.llama import RopeScaling
from lora_lab.models.quantize import BlockLinear
from lora_lab.models.tokenizer import PRE_TOKENIZERS, Tokenizer
from tests.helpers import logits, names, random_ids
from tests.models.test_tokenizer import hard_texts
from tests.tiny_models import RELATIVES, fresh, gemma3, gpt2, relative, trained_tokenizer

TEXTS = ["the other day", "in  2024, 3.14 and 1 000 000", "<s>user\nGrüße 😀</s>", "  a\n\n b\t", "that's the THE"]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "model.gguf"


def rounded(matrix, kind):
    """A matrix as the gguf library rounds it."""
    kind = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(matrix.numpy(), kind), kind))


def header_of(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


# The weights


VARIANTS = [
    {},
    {"tie_word_embeddings": False},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 20, "num_key_value_heads": 1, "rms_norm_eps": 0.125, "rope_theta": 5000.0},
    {"head_dim": 64, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192), "rope_theta": 500000.0},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ", ".join(changes) or "plain")
def test_a_file_in_float32_loads_as_it_was_saved(tiny, chatter, path, changes):
    model = tiny(**changes)
    assert save_model(model, path, chatter, format="gguf", dtype="f32") == path
    loaded, tokenizer = load_pretrained(path, device="cpu")
    assert names(path.parent) == ["model.gguf"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # The header holds float32.
    assert loaded.config == dataclasses.replace(model.config, rms_norm_eps=float(np.float32(model.config.rms_norm_eps)))
    ids = random_ids(2, 40)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    with torch.no_grad():
        loaded.model.layers[1].self_attn.k_proj.weight[0, 0] += 0.1
    assert not torch.equal(logits(loaded, ids), logits(model, ids))
    assert tokenizer.chat(MESSAGES) == chatter.chat(MESSAGES)


@pytest.mark.parametrize(("dtype", "kind"), [("f16", "F16"), ("q8_0", "Q8_0"), (None, "F16")])
def test_shorter_files_hold_the_matrices_as_the_gguf_library_rounds_them(tiny, tiny_tokenizer, path, dtype, kind):
    model = tiny()
    save_model(model, path, tiny_tokenizer, "gguf", dtype)
    loaded, _ = load_pretrained(path, device="cpu")
    changed = 0
    for name, value in model.state_dict().items():
        whole_blocks = value.shape[-1] % 32 == 0  # the inner width is 48
        expected = value if value.ndim == 1 else rounded(value, kind if whole_blocks else "F16")
        assert torch.equal(loaded.state_dict()[name], expected), name
        changed += not torch.equal(expected, value)
    assert changed == 16  # 7 matrices in each of 2 blocks, the embedding, and the head that shares it
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert stored["blk.0.attn_q.weight"] == kind
    assert stored["blk.0.ffn_down.weight"] == "F16"
    assert stored["blk.0.attn_norm.weight"] == "F32"


def test_q8_0_loads_in_its_blocks_too_and_is_written_again_alike(tiny, tiny_tokenizer, path, tmp_path):
    save_model(tiny(), path, tiny_tokenizer, "gguf", "q8_0")
    blocks, tokenizer = load_pretrained(path, device="cpu", keep_blocks=True)
    assert any(isinstance(module, BlockLinear) for module in blocks.modules())
    save_model(blocks, tmp_path / "model.gguf", tokenizer, "gguf", "q8_0")
    first, second = (
        {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(each).tensors}
        for each in (path, tmp_path / "model.gguf")
    )
    assert first == second
    assert first["blk.0.attn_v.weight"] != second["blk.1.attn_v.weight"]


def test_a_base_in_blocks_and_half_precision_are_written(tiny, tiny_tokenizer, path):
    model = tiny(tie_word_embeddings=False)
    quantize_nf4(model)
    save_model(model, path, tiny_tokenizer, "gguf", "f32")
    ids = random_ids(1, 20)
    torch.testing.assert_close(logits(load_pretrained(path, device="cpu")[0], ids), logits(model, ids))
    half = tiny().bfloat16()
    save_model(half, path, tiny_tokenizer, "gguf", "f32")
    loaded = load_pretrained(path, device="cpu", dtype=torch.bfloat16)[0]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in half.state_dict().items())


def test_the_header_is_that_of_llama_cpps_converter(tiny, tiny_tokenizer, path):
    save_model(tiny(rope_theta=5000.0), path, tiny_tokenizer, "gguf", "q8_0")
    header = header_of(path)
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "model",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "general.quantization_version": 2,
        "llama.vocab_size": 260,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 5000.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 259,
        "tokenizer.ggml.padding_token_id": 259,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.merges": ["t h", "th e"],
    }
    assert {key: header[key] for key in expected} == expected
    assert header["tokenizer.ggml.token_type"] == [1] * 258 + [3, 3]
    assert header["tokenizer.ggml.tokens"][256:] == ["th", "the", "<s>", "</s>"]


# Relatives, which are models of transformers


EACH_RELATIVE = pytest.mark.parametrize("kind", RELATIVES)


def save_relative(kind, model, path, dtype="f32"):
    return save_model(model, path, trained_tokenizer(RELATIVES[kind][3]), "gguf", dtype)


@pytest.mark.slow
@EACH_RELATIVE
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_a_relatives_file_with_equal_logits(path, kind, tied):
    from transformers import AutoModelForCausalLM

    # transformers reads neither a Llama's biases nor the size of Qwen3's heads from the file.
    defaults = {"Llama": {"attention_bias": False}, "Qwen3": {"head_dim": 128}}
    model = relative(kind, tie_word_embeddings=tied, **defaults.get(kind, {}))
    save_relative(kind, model, path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    assert theirs.config.model_type == RELATIVES[kind][2]
    ids = random_ids(2, 40, 600)
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), rtol=0, atol=1e-4)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] += 1
    assert (logits(theirs, ids) - logits(model, ids)).abs().max() > 1e-3


@EACH_RELATIVE
def test_a_relatives_file_has_the_gguf_librarys_names_llama_cpps_order_and_the_sizes_of_the_model(path, kind):
    model, (_, _, architecture, words, _) = relative(kind), RELATIVES[kind]
    save_relative(kind, model, path)
    header = header_of(path)
    sizes = {
        "context_length": 96 if kind == "Mistral" else 128,  # llama.cpp's attention has no window
        "attention.head_count_kv": 2,
        "attention.key_length": 32 if kind == "Qwen3" else 16,
        "rope.freq_base": 5000.0,
    }
    assert (header["general.architecture"], header["tokenizer.ggml.pre"]) == (architecture, words)
    assert {name: header[f"{architecture}.{name}"] for name in sizes} == sizes
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    in_file = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
    expected = {
        in_file.get_name(name, try_suffixes=(".weight", ".bias")): value.detach().numpy()
        for name, value in model.named_parameters()
    }
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            rows = np.arange(len(value))
            head, place = np.divmod(rows, 16)
            value = value[16 * head + place // 2 + 8 * (place % 2)]  # 0 8 1 9 and so on, of the 16 rows of a head
            assert not np.array_equal(expected[name], value)
        assert np.array_equal(tensors[name], value), name
    assert ("blk.0.attn_q_norm.weight" in tensors) == (kind == "Qwen3")
    assert ("blk.1.attn_k.bias" in tensors) == (kind in ("Qwen2", "Llama"))


def test_a_mistrals_file_is_loaded_as_our_llama_with_equal_logits(path):
    model, ids = relative("Mistral"), random_ids(2, 40, 600)
    save_relative("Mistral", model, path)
    ours, _ = load_pretrained(path, device="cpu")
    assert isinstance(ours, Llama)
    torch.testing.assert_close(logits(ours, ids), logits(model, ids), rtol=0, atol=1e-4)
    ids = random_ids(1, 120, 600)  # behind the window of 96 tokens they are two models
    assert (logits(ours, ids) - logits(model, ids))[:, :96].abs().max() < 1e-4
    assert (logits(ours, ids) - logits(model, ids))[:, 96:].abs().max() > 1e-2


def test_a_relative_in_nf4_is_written_dequantised(path, tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = relative("Qwen2"), random_ids(1, 20, 600)
    exact = logits(model, ids)
    quantize_nf4(model)
    save_relative("Qwen2", model, path)
    for folder, options in ((path.parent, {"gguf_file": path.name}), (save_model(model, tmp_path / "folder"), {})):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        torch.testing.assert_close(logits(theirs, ids), logits(model, ids), rtol=0, atol=1e-3)
    assert (exact - logits(model, ids)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: fresh(gpt2), "GPT2LMHeadModel"),
        (lambda: fresh(gemma3), "Gemma3ForCausalLM"),
        (lambda: relative("Qwen2", hidden_act="gelu"), "hidden_act 'gelu'"),
        (lambda: relative("Mistral", hidden_act="gelu"), "hidden_act 'gelu'"),
        (lambda: relative("Qwen3", attention_bias=True), "attention_bias True"),
        (lambda: relative("Qwen2", rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_type 'yarn'"),
    ],
)
def test_other_families_and_settings_are_refused(path, make, named):
    with pytest.raises(ValueError, match=named):
        save_model(make(), path, trained_tokenizer("qwen2"), "gguf")
    assert not path.parent.exists()


@pytest.mark.parametrize("words", PRE_TOKENIZERS)
def test_a_trained_tokenizer_comes_back_from_the_gguf_library(path, tiny, words):
    tokenizer = trained_tokenizer(words)
    save_model(tiny(vocab_size=610), path, tokenizer, "gguf")
    back, other = Tokenizer.from_gguf(header_of(path)), trained_tokenizer("gpt-2" if words != "gpt-2" else "qwen2")
    texts = hard_texts()
    assert [back.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert [other.encode(text) for text in texts] != [tokenizer.encode(text) for text in texts]
    for text in ("e\u0301", "\u212b"):  # in two characters, or in one that NFC replaces
        assert back.encode(text) == tokenizer.encode(text)
        assert (back.decode(back.encode(text)) == text) == (words != "qwen2")


# The tokenizer


def bytes_tokenizer(words="gpt-2", first=False, **options):
    """A tokenizer of all bytes and six merges, with two special tokens and one more, as a GGUF file may hold it."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", ".th", "at", "that", "12", "Ġ12"]
    merges = [("t", "h"), (".", "th"), ("a", "t"), ("th", "at"), ("1", "2"), ("Ġ", "12")]
    backend = Backend(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=words == "llama-bpe")
    )
    backend.pre_tokenizer, backend.decoder = PRE_TOKENIZERS[words], decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    backend.add_tokens([AddedToken("<note>", normalized=False)])
    if words == "qwen2":
        backend.normalizer = normalizers.NFC()
    if first:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 262)])
    return Tokenizer(backend, **({"bos_id": 262, "eos_id": 263} | options))


def through(tokenizer, vocab_size=265):
    """The tokenizer after a file."""
    return Tokenizer.from_gguf(json.loads(json.dumps(tokenizer.to_gguf(vocab_size))))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("words", PRE_TOKENIZERS)
def test_a_tokenizer_comes_back_as_it_was(words, first):
    tokenizer = bytes_tokenizer(words, first, pad_id=3, chat_template="{{ messages[0].content }}</s>")
    back = through(tokenizer)
    for text in (*TEXTS, "a <note> and <s>", "in 12"):
        assert back.encode(text) == tokenizer.encode(text)
        assert back.encode(text, add_special_tokens=True) == [262] * first + tokenizer.encode(text)
        assert back.decode(back.encode(text)) == text
    assert (back.bos_id, back.eos_id, back.pad_id, back.chat_template) == (262, 263, 3, tokenizer.chat_template)
    assert back.control_tokens == tokenizer.control_tokens == ["</s>", "<s>"]
    assert back.backend.get_vocab_size() == 265
    for other in [bytes_tokenizer(other) for other in PRE_TOKENIZERS if other != words]:
        assert any(other.encode(text) != tokenizer.encode(text) for text in ("in 12", ".that"))


def test_the_real_tokenizer_comes_back_as_it_was(smollm2, tmp_path):
    _, tokenizer = smollm2
    tokenizer.save(tmp_path)
    for each in (tokenizer, Tokenizer.load(tmp_path)):
        back = through(each, 49152)
        assert back.backend.to_str() == tokenizer.backend.to_str()
        assert (back.bos_id, back.eos_id, back.pad_id) == (1, 2, 2)
        assert back.chat(MESSAGES) == tokenizer.chat(MESSAGES)


def test_rows_of_the_embedding_without_a_token_get_unused_ones(tiny, tiny_tokenizer, path):
    model = tiny(vocab_size=270)
    save_model(model, path, tiny_tokenizer, "gguf", "f32")
    header = header_of(path)
    assert header["tokenizer.ggml.tokens"][260:] == [f"[PAD{i}]" for i in range(260, 270)]
    assert header["tokenizer.ggml.token_type"][256:] == [1, 1, 3, 3, *[5] * 10]
    loaded, tokenizer = load_pretrained(path, device="cpu")
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    for text in (*TEXTS, "[PAD261]"):
        assert tokenizer.encode(text) == tiny_tokenizer.encode(text)


def with_parts(**parts):
    tokenizer = bytes_tokenizer()
    for name, value in parts.items():
        setattr(tokenizer.backend, name, value)
    return tokenizer


def with_token(**options):
    tokenizer = bytes_tokenizer()
    tokenizer.backend.add_tokens([AddedToken("<x>", **options)])
    return tokenizer


def of_model(model, words="gpt-2"):
    return with_parts(model=model, pre_tokenizer=PRE_TOKENIZERS[words])


ALPHABET = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
END = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 263)])


NOT_IN_A_HEADER = [
    lambda: with_parts(normalizer=normalizers.Lowercase()),
    lambda: with_parts(pre_tokenizer=pre_tokenizers.Whitespace()),
    lambda: with_parts(pre_tokenizer=pre_tokenizers.Split(Regex(" "), behavior="isolated")),
    lambda: with_parts(pre_tokenizer=PRE_TOKENIZERS["llama-bpe"]),  # which ignores merges
    lambda: with_parts(decoder=None),
    lambda: with_parts(post_processor=END),
    lambda: bytes_tokenizer(first=True, bos_id=None),
    lambda: with_token(lstrip=True),
    lambda: with_token(single_word=True),
    lambda: of_model(models.WordLevel({"a": 0}, unk_token="a")),
    lambda: of_model(models.BPE(ALPHABET, [])),
    lambda: of_model(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], unk_token="a")),
    lambda: of_model(models.BPE({"a": 0, "-b": 1, "ab": 2}, [("a", "-b")], continuing_subword_prefix="-")),
]


@pytest.mark.parametrize("make", NOT_IN_A_HEADER)
def test_a_tokenizer_that_does_not_come_back_from_a_header_is_refused(tiny, path, make):
    with pytest.raises(ValueError, match="cannot hold this tokenizer"):
        save_model(tiny(vocab_size=300), path, make(), "gguf")
    assert not path.parent.exists()


def test_a_token_for_unknown_characters_is_no_obstacle_where_every_byte_has_a_token():
    tokenizer = bytes_tokenizer()
    tokenizer.backend.model = models.BPE(ALPHABET | {"th": 256}, [("t", "h")], unk_token="!")
    assert through(tokenizer).encode("the Ü") == tokenizer.encode("the Ü")


REFUSED = [  # the file, what differs, and what must be named
    ("model.bin", {}, "model.bin"),
    ("m.gguf", {"dtype": "bf16"}, "bf16"),
    ("m.gguf", {"format": "pickle"}, "pickle"),
    ("m", {"format": "safetensors", "dtype": "f16"}, "f16"),
    ("m.gguf", {"tokenizer": None}, "tokenizer"),
    ("m.gguf", {"vocab_size": 200}, "200"),
    ("m.gguf", {"eos_id": None}, "eos_id"),
    ("m.gguf", {"adapters": True}, "adapters"),
]


@pytest.mark.parametrize(("name", "change", "named"), REFUSED)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tiny, tmp_path, name, change, named):
    model = tiny(vocab_size=change.pop("vocab_size", 300))
    if change.pop("adapters", False):
        inject(model, LoRAConfig(rank=2))
    tokenizer = bytes_tokenizer(**({"eos_id": change.pop("eos_id")} if "eos_id" in change else {}))
    with pytest.raises(ValueError, match=named):
        save_model(model, tmp_path / "out" / name, **({"tokenizer": tokenizer, "format": "gguf"} | change))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.router.weight", "score.weight", "model.layers.0.weight", "weight"]
)
def test_a_tensor_that_no_llama_has_is_refused(name):
    with pytest.raises(ValueError, match=name):
        gguf_name(name)


def test_a_folder_of_that_name_stays(tiny, tiny_tokenizer, tmp_path):
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(IsADirectoryError, match=r"m\.gguf is a folder"):
        save_model(tiny(), tmp_path / "m.gguf", tiny_tokenizer, "gguf")
    assert names(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize(("number", "dtype"), [(1e5, "f16"), (1e7, "q8_0")])
def test_a_number_that_is_too_large_is_refused_and_the_older_file_stays(tiny, tiny_tokenizer, path, number, dtype):
    model = tiny()
    save_model(model, path, tiny_tokenizer, "gguf", dtype)
    before = path.read_bytes()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 4] = -number
    with pytest.raises(ValueError, match=rf"blk\.1\.attn_v\.weight .*{dtype.upper()}"):
        save_model(model, path, tiny_tokenizer, "gguf", dtype)
    assert path.read_bytes() == before
    save_model(model, path, tiny_tokenizer, "gguf", "f32")
    assert load_pretrained(path, device="cpu")[0].model.layers[1].self_attn.v_proj.weight[3, 4] == -number


# The header of a strange file


UINT32, BOOL, TEXT, ARRAY = 4, 7, 8, 9
F32, Q8_0 = 0, 8


def text(words):
    words = words if isinstance(words, bytes) else words.encode()
    return struct.pack("<Q", len(words)) + words


def entry(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def array(kind, length, values=b""):
    return struct.pack("<IQ", kind, length) + values


def tensor(name="a", shape=(4, 2), kind=F32, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def content(entries=(), tensors=(), size=32, counts=None):
    """The bytes of a file whose tensors begin at the next multiple of 32."""
    head = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(entries))))
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + size)


@pytest.fixture
def read(tmp_path):
    """Reads a file with the given bytes."""

    def read(content):
        (tmp_path / "model.gguf").write_bytes(content)
        return read_header(tmp_path / "model.gguf")

    return read


def test_every_type_is_read_as_by_the_gguf_library(tmp_path):
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in gguf.GGUFValueType:
        if kind not in (gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY):
            writer.add_key_value(kind.name, 1 if "INT" in kind.name else True if kind.name == "BOOL" else 0.1, kind)
    writer.add_string("text", "Grüße 😀")
    for values in ([1, -2, 3], [0.5, 1e-30], ["a", "", "ö"], [True, False]):
        writer.add_array(f"list of {type(values[0]).__name__}", values)
    draw = np.random.default_rng(0)
    numbers = {"a": draw.normal(size=(3, 7)), "b": draw.normal(size=5), "c": draw.normal(size=(2, 3, 4))}
    for name, value in numbers.items():
        writer.add_tensor(name, value.astype(np.float32))
    matrix = draw.normal(size=(4, 64)).astype(np.float32)
    for kind in ("F16", "BF16", "Q8_0", "Q4_0"):
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind.name, gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.GGUFReader(path)
    header, tensors = read_header(path)
    expected = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert header == expected
    assert len(header) == 17
    assert [(name, kind) for name, (kind, _) in tensors.items()] == [
        (t.name, t.tensor_type.name) for t in theirs.tensors
    ]
    for (_, data), other in zip(tensors.values(), theirs.tensors, strict=True):
        assert np.array_equal(data, other.data.view(np.uint8))


def test_the_smallest_files_are_read(read):
    assert read(content(size=0)) == ({}, {})
    header, tensors = read(content([entry("a", BOOL, b"\1"), entry("b", TEXT, text("c"))], [tensor()]))
    assert header == {"a": True, "b": "c"}
    assert [(name, kind, data.shape) for name, (kind, data) in tensors.items()] == [("a", "F32", (2, 16))]


def test_alignment_moves_the_tensors(read):
    aligned = [entry("general.alignment", UINT32, struct.pack("<I", 8))]
    _, tensors = read(content(aligned, [tensor("a", (3,)), tensor("b", (2,), offset=16)], size=32))
    assert [data.shape for _, data in tensors.values()] == [(12,), (8,)]


def test_a_file_cut_at_any_length_is_refused(read):
    entries = [
        entry("a", ARRAY, array(TEXT, 2, text("b") + text("c"))),
        entry("general.alignment", UINT32, b"\x20\0\0\0"),
    ]
    whole = content(entries, [tensor("d"), tensor("e", (64,), Q8_0, offset=32)], size=32 + 2 * 34)
    assert [data.size for _, data in read(whole)[1].values()] == [32, 68]
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"model.gguf is not a GGUF file or is truncated .*copy or download it"):
            read(whole[:length])


HOSTILE = {
    "empty": (b"", "empty"),
    "another file": (b"PK" + bytes(100), "does not begin"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "does not begin"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "does not begin"),
    "numbers without end": (content([entry("a", ARRAY, array(10, 2**61))]), "ends neither"),
    "texts without end": (content([entry("a", ARRAY, array(TEXT, 2**60))]), "ends neither"),
    "a text without end": (content([entry("a", TEXT, struct.pack("<Q", 2**63))]), "ends neither"),
    "a name without end": (content([struct.pack("<Q", 2**63)]), "ends neither"),
    "entries without end": (content(counts=(0, 2**60)), "two entries"),
    "tensors without end": (content(counts=(2**60, 0)), "ends neither|dimensions"),
    "an array in an array": (content([entry("a", ARRAY, array(ARRAY, 1, array(0, 1, b"\0")))]), "of type 9"),
    "an unknown type": (content([entry("a", 13, bytes(8))]), "of type 13"),
    "an array of an unknown type": (content([entry("a", ARRAY, array(99, 2**60))]), "of type 99"),
    "L5: a text that is not UTF-8": (content([entry("a", TEXT, text(b"\xff\xfe"))]), "utf-8"),
    "L5: a name that is not UTF-8": (content([entry(b"\xff", BOOL, b"\1")]), "utf-8"),
    "two entries of a name": (content([entry("a", BOOL, b"\1"), entry("a", BOOL, b"\0")]), "two entries 'a'"),
    "alignment 0": (content([entry("general.alignment", UINT32, bytes(4))]), "alignment is 0"),
    "alignment 3": (content([entry("general.alignment", UINT32, b"\3\0\0\0")]), "alignment is 3"),
    "alignment in words": (content([entry("general.alignment", TEXT, text("32"))]), "alignment is '32'"),
    "no dimensions": (content(tensors=[tensor(shape=())]), "'a' has 0 dimensions"),
    "five dimensions": (content(tensors=[tensor(shape=(1,) * 5)]), "'a' has 5 dimensions"),
    "2^32 dimensions": (content(tensors=[text("a") + struct.pack("<I", 2**32 - 1)]), "dimensions"),
    "no rows": (content(tensors=[tensor(shape=(4, 0))]), "whole blocks"),
    "2^40 rows": (content(tensors=[tensor(shape=(4, 2**40))]), "within its tensor 'a'"),
    "a product beyond 64 bits": (content(tensors=[tensor(shape=(2**32, 2**32))]), "within its tensor 'a'"),
    "half a block": (content(tensors=[tensor(shape=(48, 2), kind=Q8_0)], size=200), "whole blocks of 32"),
    "an unknown kind": (content(tensors=[tensor(kind=4711)]), "4711"),
    "an offset beyond the end": (content(tensors=[tensor(offset=2**50)]), "is at 1,125,899,906,842,624"),
    "an offset between": (content(tensors=[tensor(offset=1)], size=100), "is at 1, but"),
    "overlap": (content(tensors=[tensor("a"), tensor("b")], size=100), "'b' is at 0, but the one before .* 32"),
    "two tensors of a name": (content(tensors=[tensor(), tensor(offset=32)], size=64), "two tensors 'a'"),
    "two tensors at a place": (content(tensors=[tensor(), tensor()], size=32), "two tensors 'a'"),
    "one byte short": (content(tensors=[tensor()], size=31), "ends after .* within its tensor 'a'"),
}


@pytest.mark.parametrize(("hostile", "says"), HOSTILE.values(), ids=HOSTILE)
def test_what_a_file_cannot_hold_is_refused_in_one_sentence(read, hostile, says):
    with pytest.raises(ValueError, match=rf"model.gguf is not a GGUF file or is truncated \(.*(?:{says}).*\); copy or"):
        read(hostile)
