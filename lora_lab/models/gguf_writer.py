"""A GGUF file of a Llama, or of a relative with the same layers, written by the ``gguf`` library as llama.cpp's own
converters write it.

What ``lora_lab.models.gguf_reader`` undoes when it reads a Llama's file is done here: names are GGUF's, and the rows of
queries and keys stand in llama.cpp's order. In files of Qwen2 and Qwen3 they stay in Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_lab.models.configs import config_from_hf, positions
from lora_lab.models.gguf_reader import IN_BLOCK, ROPE_FACTORS, ROPE_RULE, SIZES, TOP, rope_factors, rotary_heads
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.models.quantize import BLOCK
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.files import atomic_file

# GGUF's kind for the matrices of a file, and the largest number that it holds; Q8_0 has a float16 and a code up to 127.
DTYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}
_FLOAT16_MAX = torch.finfo(torch.float16).max
_LARGEST = {"F32": float("inf"), "F16": _FLOAT16_MAX, "Q8_0": 127 * _FLOAT16_MAX}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}  # names in gguf.LlamaFileType
# llama.cpp's architecture of the models of transformers whose layers are a Llama's, but for biases and norms.
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}  # of Qwen3's queries and keys
_REMEDY = (
    "write the merged model to a folder (lora-lab export ADAPTER --merged --out FOLDER), which llama.cpp's "
    "convert_hf_to_gguf.py reads"
)


@dataclass(frozen=True)
class Layout:
    """What llama.cpp calls a model's architecture, and the sizes by which it reads the tensors."""

    architecture: str
    config: LlamaConfig


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model in a GGUF file; the model may be on torch's meta device.

    llama.cpp has no sliding-window attention in these architectures, so a model that uses it is limited to its window.

    Args:
        model: a :class:`lora_lab.Llama`, or of transformers: Llama, Mistral, Qwen2 or Qwen3.

    Raises:
        ValueError: it is another model, or has a setting that llama.cpp's architecture does not have.
    """
    if isinstance(model, Llama):
        return Layout("llama", model.config)
    kind = type(model).__name__
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"The model is a {kind}, but lora_lab writes GGUF files only for a lora_lab.Llama and for transformers' "
            f"{', '.join(_ARCHITECTURES)}; {_REMEDY}."
        )
    architecture, entries = _ARCHITECTURES[kind], model.config.to_dict()  # pyright: ignore
    entries["rope_type"] = positions(entries)[1]
    expected: dict[str, Any] = {"hidden_act": "silu", "rope_type": "default"}
    if architecture == "llama" and entries["rope_type"] == "llama3":
        del expected["rope_type"]
    if architecture == "qwen3":
        expected["attention_bias"] = False
    for name, value in expected.items():
        if entries.get(name, value) != value:
            raise ValueError(
                f"The {kind} has {name} {entries[name]!r}, but a GGUF file is written here only of one with {value!r}; "
                f"{_REMEDY}."
            )
    config = config_from_hf(entries, kind)
    if window := entries.get("sliding_window"):
        config = replace(config, max_position_embeddings=min(window, config.max_position_embeddings))
    return Layout(architecture, config)


def write_gguf(
    path: str | Path, layout: Layout, tensors: Mapping[str, Tensor], tokenizer: Tokenizer, dtype: str = "f16"
) -> None:
    """Write a whole model, which llama.cpp, Ollama and :func:`lora_lab.models.gguf_reader.read_gguf` read.

    Args:
        tensors: by Hugging Face's names, without a tied head.
        dtype: as in :func:`write_file`.

    Raises:
        ValueError: the tokenizer does what a GGUF file cannot hold, or as for :func:`write_file`.
        OSError: the file cannot be written, or the disk is full.
    """
    config = layout.config
    entries: dict[str, Any] = {name: getattr(config, ours) for name, ours in SIZES.items()} | {
        "vocab_size": config.vocab_size,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    header = {"general.type": "model"} | {f"{layout.architecture}.{name}": value for name, value in entries.items()}
    stored: dict[str, Tensor] = {}
    if (scaling := config.rope_scaling) is not None:
        rule = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context)
        header[ROPE_RULE] = [float(number) for number in rule]
        stored[ROPE_FACTORS] = rope_factors(config)  # (head_dim / 2,)
    for name, value in tensors.items():
        stored[gguf_name(name)] = in_gguf_order(gguf_name(name), value, layout)  # (576, columns), or (n,)
    write_file(path, layout.architecture, header | tokenizer.to_gguf(config.vocab_size), stored, dtype)


def write_file(
    path: str | Path, architecture: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: str = "f16"
) -> None:
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
    import gguf  # here, because the import takes a tenth of a second, and a converted model does not need it

    path = Path(path)
    check_target(path, dtype)
    kinds = {name: _kind(name, value, DTYPES[dtype]) for name, value in tensors.items()}
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            writer.add_string("general.name", path.stem.encode(errors="backslashreplace").decode())
            writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[DTYPES[dtype]]])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            add = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }
            for key, value in header.items():
                add[type(value)](key, value)
            for name, value in tensors.items():
                kind = gguf.GGMLQuantizationType[kinds[name]]
                weights, size = gguf.GGML_QUANT_SIZES[kind]  # in a block, and its bytes
                writer.add_tensor_info(
                    name, value.shape, np.dtype("float32"), value.numel() // weights * size, raw_dtype=kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, value in tensors.items():  # one at a time, so that no second copy of a model is held
                dense = value.detach().to("cpu", torch.float32).contiguous().numpy()
                writer.write_tensor_data(gguf.quants.quantize(dense, gguf.GGMLQuantizationType[kinds[name]]))
        finally:
            writer.close()


def check_target(path: Path, dtype: str) -> None:
    """Raise ValueError or IsADirectoryError if no GGUF file can be written there, or in this dtype."""
    if path.suffix != ".gguf":
        raise ValueError(f"The path is {str(path)!r}, but the name of a GGUF file must end in .gguf.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, but a file is to be written there; choose another name.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, but a GGUF file is written in one of {', '.join(DTYPES)}.")


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor, such as "blk.0.attn_q.weight" for "model.layers.0.self_attn.q_proj.weight".

    Raises:
        ValueError: neither a Llama nor one of its relatives has such a tensor.
    """
    stem, _, part = name.rpartition(".")
    for ours, theirs in TOP.items():
        if stem == theirs:
            return f"{ours}.{part}"
    match stem.split(".", 3):
        case ["model", "layers", block, layer]:
            for ours, theirs in (IN_BLOCK | _NORMS).items():
                if layer == theirs:
                    return f"blk.{block}.{ours}.{part}"
    raise ValueError(f"{name!r} is not a tensor of a Llama, so a GGUF file has no name for it.")


def in_gguf_order(name: str, rows: Tensor, layout: Layout) -> Tensor:
    """The rows of a Llama's queries and keys from Hugging Face's order (two halves) to llama.cpp's (adjacent pairs).

    Args:
        name: in GGUF. The rows of all other tensors, and of other architectures, stay as they are.
        rows: a weight (heads * head_dim, columns), a bias (heads * head_dim,), or the B of an adapter.
    """
    heads = rotary_heads(name, layout.config)
    if heads is None or layout.architecture != "llama":
        return rows  # (576, columns)
    by_half = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)  # (9, 2, 32, columns)
    return by_half.transpose(1, 2).reshape(rows.shape)  # (576, columns)


def _kind(name: str, value: Tensor, kind: str) -> str:
    """GGUF's kind for a tensor in a file of a kind, if all its numbers fit."""
    if value.ndim == 1:
        return "F32"
    if kind == "Q8_0" and value.shape[-1] % BLOCK:
        kind = "F16"
    if (largest := float(value.detach().abs().max())) > _LARGEST[kind]:
        raise ValueError(
            f"{name} holds a number of magnitude {largest:g}, but the largest of {kind} is {_LARGEST[kind]:g}; "
            "choose dtype='f32'."
        )
    return kind
