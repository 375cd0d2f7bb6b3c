"""GGUF files: what llama.cpp and Ollama run. A Llama is read from one; it and its relatives are written.

    "GGUF", the version, the number of tensors, the number of entries
    entries: name, type, value
    tensors: name, shape, kind, offset
    from the next multiple of the alignment: the tensors' bytes, in the same order, each padded to the alignment

When a file is read, every count, length and offset is held against the file's size before it is used, so that a damaged
or hostile file is refused at once. What llama.cpp refuses is refused here too: an array in an array, a tensor that
overlaps another. Matrices in the formats of ``lora_lab.models.quantize`` stay in their blocks; the ``gguf`` library
dequantises all others to float32.

The same library writes files as llama.cpp's own converters do. Names are GGUF's, and of a Llama the rows of queries and
keys stand in llama.cpp's order; those of Qwen2 and Qwen3 stay in Hugging Face's.

Reference: the specification of GGUF in the repository of ggml, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_lab.models.llama import Llama, LlamaConfig, RopeScaling, rotary_frequencies
from lora_lab.models.quantize import BLOCK, BYTES_PER_BLOCK
from lora_lab.models.shapes import config_from_hf, read_positions
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.files import atomic_file

_TEXT, _ARRAY = 8, 9
# The types of numbers, as numpy names them.
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_MOST_DIMENSIONS = 4  # of a tensor in ggml
_LONGEST = 2**26  # bytes of a header; those of vocabularies of 200,000 tokens take some 10 MB

# The layers of a file, in GGUF and in Hugging Face; "#" is the number of a block.
_TO_HF = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.#.attn_norm": "model.layers.#.input_layernorm",
    "blk.#.attn_q": "model.layers.#.self_attn.q_proj",
    "blk.#.attn_k": "model.layers.#.self_attn.k_proj",
    "blk.#.attn_v": "model.layers.#.self_attn.v_proj",
    "blk.#.attn_output": "model.layers.#.self_attn.o_proj",
    "blk.#.ffn_norm": "model.layers.#.post_attention_layernorm",
    "blk.#.ffn_gate": "model.layers.#.mlp.gate_proj",
    "blk.#.ffn_up": "model.layers.#.mlp.up_proj",
    "blk.#.ffn_down": "model.layers.#.mlp.down_proj",
}
_TO_GGUF = {theirs: ours for ours, theirs in _TO_HF.items()} | {  # and the norms of Qwen3's queries and keys
    f"model.layers.#.self_attn.{name}_norm": f"blk.#.attn_{name}_norm" for name in "qk"
}
_SIZES = {  # GGUF's names, below that of the architecture, and Hugging Face's
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")
_ROPE_FACTORS = "rope_freqs.weight"
# The dtypes of a written file, and the largest number of each; q8_0 has a float16 and a code up to 127.
_FLOAT16_MAX = torch.finfo(torch.float16).max
_LARGEST = {"f32": float("inf"), "f16": _FLOAT16_MAX, "q8_0": 127 * _FLOAT16_MAX}
# llama.cpp's architecture of the models of transformers whose layers are a Llama's, but for biases and norms.
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# What can be done instead, with llama.cpp's own converter.
_REMEDY = "lora-lab export ADAPTER --merged --out FOLDER writes a folder that convert_hf_to_gguf.py reads"


# The header


# How a tensor's numbers are stored, such as "Q4_1", and its bytes, which are read when they are used: (rows, bytes of a
# row), or (bytes,).
StoredTensor = tuple[str, np.ndarray]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the entries of a file's header, and its tensors by GGUF's names, such as "blk.4.attn_q.weight".

    Raises:
        ValueError: it is not a GGUF file, is truncated, or contradicts itself.
    """
    try:
        with open(path, "rb") as file:
            reader = _HeaderFile(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if reader.take(4) != b"GGUF" or reader.count(4) not in (2, 3):
            raise ValueError("it does not begin as one of version 2 or 3")
        tensors, entries = reader.count(), reader.count()
        header = {}
        for _ in range(entries):
            name = reader.text()
            if name in header:
                raise ValueError(f"it has two entries {name!r:.80}")
            header[name] = reader.value()
        return header, _tensors(reader, tensors, header.get("general.alignment", 32))
    except ValueError as error:  # that of mmap, for an empty file, and of a text that is not UTF-8 too
        raise ValueError(f"{path} is not a GGUF file or is truncated ({error}); copy or download it again.") from None


class _HeaderFile:
    """Reads a file from its beginning."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.position = content, 0

    def take(self, size: int) -> bytes:
        start, self.position = self.position, self.position + size
        if self.position > min(len(self.content), _LONGEST):
            raise ValueError(f"its header ends neither within its {len(self.content):,} bytes nor within {_LONGEST:,}")
        return self.content[start : self.position]

    def count(self, size: int = 8) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        return self.take(self.count()).decode()

    def value(self) -> Any:
        kind = self.count(4)
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.numbers(kind, 1)[0]
        kind, length = self.count(4), self.count()
        return [self.text() for _ in range(length)] if kind == _TEXT else self.numbers(kind, length)

    def numbers(self, kind: int, length: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise ValueError(f"it has a value of type {kind}, which is not known here")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()


def _tensors(reader: _HeaderFile, number: int, alignment: Any) -> dict[str, StoredTensor]:
    # Here, because the import takes a tenth of a second, and a converted model does not need it.
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r:.80}, but it must be a power of two")
    places = {}  # by name: kind, shape and offset
    for _ in range(number):
        name, dimensions = reader.text(), reader.count(4)
        if name in places:
            raise ValueError(f"it has two tensors {name!r:.80}")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"its tensor {name!r:.80} has {dimensions} dimensions")
        shape = tuple(reader.count() for _ in range(dimensions))[::-1]  # (rows, columns)
        places[name] = GGMLQuantizationType(reader.count(4)), shape, reader.count()
    first = _pad_up(reader.position, alignment)
    expected, tensors = 0, {}
    for name, (kind, shape, offset) in places.items():
        weights, size = GGML_QUANT_SIZES[kind]  # in a block, and its bytes
        row, rest = divmod(shape[-1], weights)
        if rest or 0 in shape:
            raise ValueError(f"its tensor {name!r:.80} of shape {shape} is not whole blocks of {weights} weights")
        if offset != expected:
            raise ValueError(f"its tensor {name!r:.80} is at {offset:,}, but the one before it ends at {expected:,}")
        in_bytes = (*shape[:-1], row * size)
        length = math.prod(in_bytes)
        if first + offset + length > len(reader.content):
            raise ValueError(f"it ends after {len(reader.content):,} bytes, within its tensor {name!r:.80}")
        data = np.frombuffer(reader.content, np.uint8, length, first + offset).reshape(in_bytes)
        tensors[name] = kind.name, data
        expected = _pad_up(offset + length, alignment)
    return tensors


def _pad_up(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


# Both ways


def gguf_name(name: str) -> str:
    """Return GGUF's name of a tensor: "blk.0.attn_q.weight" for "model.layers.0.self_attn.q_proj.weight".

    Raises:
        ValueError: neither a Llama nor one of its relatives has such a tensor.
    """
    return _rename(name, _TO_GGUF)


def _rename(name: str, names: dict[str, str]) -> str:
    layer, _, part = name.rpartition(".")
    block = re.search(r"(?<=\.)\d+(?=\.)", layer)
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", layer, count=1)
    if pattern not in names:
        raise ValueError(f"{name!r:.80} is not a tensor of a Llama.")
    return f"{names[pattern].replace('#', block[0] if block else '')}.{part}"


def _rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """Return how many heads the rows of a tensor of GGUF's name belong to, if positions rotate them; else None."""
    if ".attn_q." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".attn_k." in name else None


def _rope_factors(config: LlamaConfig) -> Tensor:
    """Return what Llama 3's scaling of positions divides each frequency by: (head_dim / 2,)."""
    return rotary_frequencies(replace(config, rope_scaling=None)) / rotary_frequencies(config)  # (head_dim / 2,)


# Reading


@dataclass(frozen=True)
class StoredModel:
    """What a GGUF file or a folder holds.

    Args:
        config: the model's shape.
        tensors: by Hugging Face's names; matrices in blocks as uint8 (rows, bytes).
        kinds: the format of each tensor in blocks, such as "Q4_1", by the same names.
        tokenizer: the model's tokenizer.
    """

    config: LlamaConfig
    tensors: dict[str, Tensor]
    kinds: dict[str, str]
    tokenizer: Tokenizer


def read_gguf(path: Path) -> StoredModel:
    """Read a whole file (some seconds for a small model).

    Raises:
        ValueError: it is not a GGUF file, is truncated, or holds an adapter, another architecture, an unknown
            tensor, an unknown tokenizer or an unknown scaling of positions.
    """
    fields, stored = read_header(path)
    architecture = fields.get("general.architecture", "llama")
    if architecture != "llama":
        raise ValueError(f"{path.name} is a {architecture!r:.80}, not a 'llama'; load the model's Hugging Face folder.")
    content = fields.get("general.type", "model")
    if content != "model":
        raise ValueError(f"{path.name} is of type {content!r:.80}, not 'model'; load_adapter reads an adapter folder.")
    tokenizer, config = Tokenizer.from_gguf(fields), _config(fields, stored, path)
    tensors = {}
    kinds = {}
    for name, (kind, data) in stored.items():
        if name == _ROPE_FACTORS:
            continue
        new_name = _rename(name, _TO_HF)
        if kind in BYTES_PER_BLOCK and data.ndim == 2:
            value = torch.from_numpy(data.copy())  # (rows, bytes), uint8
            kinds[new_name] = kind
        else:
            value = _dense(name, kind, data)  # (rows, columns), or (n,)
        heads = _rotary_heads(name, config)
        if heads and len(value) == heads * config.head_dim:  # another shape is refused when the model is built
            # From llama.cpp's order (adjacent pairs) to Hugging Face's (two halves).
            in_pairs = value.reshape(heads, config.head_dim // 2, 2, -1)  # (9, 32, 2, columns)
            value = in_pairs.transpose(1, 2).reshape(value.shape)  # (576, columns)
        tensors[new_name] = value.contiguous()
    return StoredModel(config, tensors, kinds, tokenizer)


def _dense(name: str, kind: str, data: np.ndarray) -> Tensor:
    """Return a tensor dequantised to float32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        dense = dequantize(data, GGMLQuantizationType[kind])
    except NotImplementedError:
        raise ValueError(
            f"The gguf library cannot dequantise {name} of kind {kind}; use a file of another, such as Q8_0."
        ) from None
    return torch.from_numpy(dense.astype("float32", copy=True))


def _config(fields: dict[str, Any], stored: dict[str, StoredTensor], path: Path) -> LlamaConfig:
    entries = {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_up.bias" in stored,
        "tie_word_embeddings": "output.weight" not in stored,
    }
    for name, ours in _SIZES.items():
        if f"llama.{name}" in fields:
            entries[ours] = fields[f"llama.{name}"]
        elif name not in _OPTIONAL:
            raise ValueError(f"{path}: the header lacks the entry 'llama.{name}'; copy or download the file again.")
    config = config_from_hf(entries, path)
    if (scaled := fields.get("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(
            f"{path} scales positions by {scaled!r:.80}, which is not built here; load the model's Hugging Face folder."
        )
    if _ROPE_FACTORS not in stored:
        return config
    # GGUF stores Llama 3's scaling of positions as one divisor per frequency. Its models differ in the factor alone.
    factors = _dense(_ROPE_FACTORS, *stored[_ROPE_FACTORS])  # (head_dim / 2,)
    scaled = replace(config, rope_scaling=RopeScaling(float(factors.max()), 1.0, 4.0, 8192))
    expected = _rope_factors(scaled)  # (head_dim / 2,)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"The rope_freqs of {path} do not follow Llama 3's rule; load the model's Hugging Face folder."
        )
    return scaled


# Writing


def layout_of(model: nn.Module) -> tuple[str, LlamaConfig]:
    """Return what llama.cpp calls a model's architecture, and the sizes by which it reads the tensors.

    llama.cpp has no sliding-window attention in these architectures, so a model that uses it is limited to its window.

    Args:
        model: a :class:`lora_lab.Llama`, or of transformers: Llama, Mistral, Qwen2 or Qwen3; perhaps on torch's meta
            device.

    Raises:
        ValueError: it is another model, or has a setting that llama.cpp's architecture does not have.
    """
    if isinstance(model, Llama):
        return "llama", model.config
    kind = type(model).__name__
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"The model is a {kind}, but a GGUF file holds a lora_lab.Llama or {', '.join(_ARCHITECTURES)}; {_REMEDY}."
        )
    architecture, entries = _ARCHITECTURES[kind], model.config.to_dict()  # pyright: ignore
    entries["rope_type"] = read_positions(entries)[1]
    expected: dict[str, Any] = {"hidden_act": "silu", "rope_type": "default"}
    if architecture == "llama" and entries["rope_type"] == "llama3":
        del expected["rope_type"]
    if architecture == "qwen3":
        expected["attention_bias"] = False
    for name, value in expected.items():
        if entries.get(name, value) != value:
            raise ValueError(f"The {kind} has {name} {entries[name]!r}, but only {value!r} is written; {_REMEDY}.")
    config = config_from_hf(entries, kind)
    if window := entries.get("sliding_window"):
        config = replace(config, max_position_embeddings=min(window, config.max_position_embeddings))
    return architecture, config


def write_gguf(path: Path, model: nn.Module, tensors: dict[str, Tensor], tokenizer: Tokenizer, dtype: str) -> None:
    """Write a whole model, which llama.cpp, Ollama and :func:`read_gguf` read.

    Args:
        model: as for :func:`layout_of`.
        tensors: by Hugging Face's names, without a tied head.
        dtype: as in :func:`write_file`.

    Raises:
        ValueError: as for :func:`layout_of`, :meth:`Tokenizer.to_gguf` and :func:`write_file`.
        OSError: the file cannot be written, or the disk is full.
    """
    architecture, config = layout_of(model)
    entries = {name: getattr(config, ours) for name, ours in _SIZES.items()} | {
        "vocab_size": config.vocab_size,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    header = {"general.type": "model"} | {f"{architecture}.{name}": value for name, value in entries.items()}
    stored = {}
    if config.rope_scaling is not None:
        stored[_ROPE_FACTORS] = _rope_factors(config)  # (head_dim / 2,)
    for name, value in tensors.items():
        stored[gguf_name(name)] = reorder_for_gguf(gguf_name(name), value, architecture, config)  # (576, columns)
    write_file(path, architecture, header | tokenizer.to_gguf(config.vocab_size), stored, dtype)


def write_file(path: Path, architecture: str, header: dict[str, Any], tensors: dict[str, Tensor], dtype: str) -> None:
    """Write a GGUF file, whole or not at all.

    Args:
        path: must end in ".gguf".
        architecture: llama.cpp's name of it, such as "llama".
        header: whole numbers are stored as uint32, others as float32.
        tensors: by GGUF's names. Vectors are stored as float32, matrices as ``dtype``.
        dtype: "f32", "f16" or "q8_0" (8.5 bits per weight; a matrix whose rows are not whole blocks of 32 is float16).

    Raises:
        ValueError: the path ends otherwise, the dtype is unknown, or a number is too large for it.
        OSError: the file cannot be written, or the disk is full.
    """
    # Here, because the import takes a tenth of a second, and a converted model does not need it.
    import gguf

    check_target(path, dtype)
    kinds = {name: gguf.GGMLQuantizationType[_kind(name, value, dtype)] for name, value in tensors.items()}
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            writer.add_string("general.name", path.stem.encode(errors="backslashreplace").decode())
            writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == 'f32' else 'MOSTLY'}_{dtype.upper()}"])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for key, value in header.items():
                kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
                writer.add_key_value(key, value, kind)
            for name, value in tensors.items():
                weights, size = gguf.GGML_QUANT_SIZES[kinds[name]]  # in a block, and its bytes
                length = value.numel() // weights * size
                writer.add_tensor_info(name, value.shape, np.dtype("float32"), length, raw_dtype=kinds[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, value in tensors.items():  # one at a time, so that no second copy of a model is held
                dense = value.detach().to("cpu", torch.float32).contiguous().numpy()
                writer.write_tensor_data(gguf.quants.quantize(dense, kinds[name]))
        finally:
            writer.close()


def check_target(path: Path, dtype: str) -> None:
    """Raise ValueError if the name is not one of a GGUF file, or none is written in this dtype."""
    if path.suffix != ".gguf":
        raise ValueError(f"The path is {str(path)!r}, but the name of a GGUF file must end in .gguf.")
    if dtype not in _LARGEST:
        raise ValueError(f"dtype is {dtype!r}, but a GGUF file is written in one of {', '.join(_LARGEST)}.")


def reorder_for_gguf(name: str, rows: Tensor, architecture: str, config: LlamaConfig) -> Tensor:
    """Return the rows of a Llama's queries and keys, in two halves in Hugging Face, in llama.cpp's adjacent pairs.

    Args:
        name: in GGUF. The rows of all other tensors, and of other architectures, stay as they are.
        rows: a weight (heads * head_dim, columns), a bias (heads * head_dim,), or the B of an adapter.
        architecture, config: as from :func:`layout_of`.
    """
    heads = _rotary_heads(name, config)
    if architecture != "llama" or heads is None:
        return rows
    in_halves = rows.reshape(heads, 2, config.head_dim // 2, -1)  # (9, 2, 32, columns)
    return in_halves.transpose(1, 2).reshape(rows.shape)  # (576, columns)


def _kind(name: str, value: Tensor, dtype: str) -> str:
    """Return GGUF's kind, such as "Q8_0", for a tensor in a file of a dtype, such as "q8_0".

    Raises:
        ValueError: a number is too large for it.
    """
    if value.ndim == 1:
        dtype = "f32"
    elif dtype == "q8_0" and value.shape[-1] % BLOCK:
        dtype = "f16"
    kind, most = dtype.upper(), _LARGEST[dtype]
    largest = float(value.detach().abs().max())
    if largest > most:
        raise ValueError(f"{name} holds a magnitude of {largest:g}, but {kind} ends at {most:g}; choose dtype='f32'.")
    return kind
