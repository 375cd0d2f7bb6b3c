"""A GGUF file of the Llama family, with Hugging Face's names.

Matrices in the two GGUF formats of ``lora_lab.models.quantize`` stay in their blocks; the ``gguf`` library dequantises
all others to float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from lora_lab.models.configs import config_from_hf
from lora_lab.models.gguf_header import StoredTensor, read_header
from lora_lab.models.llama import LlamaConfig, RopeScaling, rotary_frequencies
from lora_lab.models.quantize import BYTES_PER_BLOCK
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.schema import Number, check

# The names of a file's layers, in GGUF and in Hugging Face: at the top, and below "blk.0" or "model.layers.0".
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
# Our own entry, the rule of rope_freqs: factor, low_freq_factor, high_freq_factor, original_context.
ROPE_RULE = "lora_lab.rope_scaling"
SIZES = {  # GGUF's names, below that of the architecture, and Hugging Face's
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
_Rule = Annotated[list[Number], Field(min_length=4, max_length=4)]
_OPTIONAL = list(SIZES)[6:]


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


def read_gguf(path: str | Path) -> StoredModel:
    """Read a whole file (some seconds for a small model).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a GGUF file, is truncated, or holds an adapter, another architecture, an unknown
            tensor, an unknown tokenizer or an unknown scaling of positions.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    fields, stored = read_header(path)
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path.name} holds a model of architecture {architecture!r:.80}, but only 'llama' can be built here; "
            "load the model's Hugging Face folder instead."
        )
    if fields.get("general.type", "model") != "model":
        raise ValueError(
            f"{path.name} is a GGUF file of type {fields['general.type']!s:.80}, not a model; name the model's file, "
            "and load an adapter from its folder with load_adapter."
        )
    raw = {tensor.name: tensor for tensor in stored}
    tokenizer, config = Tokenizer.from_gguf(fields), _config(fields, raw, path)
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    for name, tensor in raw.items():
        if name == ROPE_FACTORS:
            continue
        new_name = _hf_name(name)
        if tensor.kind in BYTES_PER_BLOCK and tensor.data.ndim == 2:
            value = torch.from_numpy(tensor.data.copy())  # (rows, bytes), uint8
            kinds[new_name] = tensor.kind
        else:
            value = _dense(tensor)  # (rows, columns), or (n,)
        heads = rotary_heads(name, config)
        if heads and len(value) == heads * config.head_dim:  # another shape is refused when the model is built
            value = _half_split(value, heads)
        tensors[new_name] = value.contiguous()
    return StoredModel(config, tensors, kinds, tokenizer)


def _dense(tensor: StoredTensor) -> Tensor:
    """A tensor dequantised to float32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        dense = dequantize(tensor.data, GGMLQuantizationType[tensor.kind])
    except NotImplementedError:
        raise ValueError(
            f"The tensor {tensor.name} is of kind {tensor.kind}, which the gguf library cannot dequantise; "
            "use a file with another quantisation, such as Q8_0."
        ) from None
    return torch.from_numpy(dense.astype("float32", copy=True))


def _config(fields: dict[str, Any], raw: dict[str, StoredTensor], path: Path) -> LlamaConfig:
    entries: dict[str, Any] = {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "attention_bias": "blk.0.attn_q.bias" in raw,
        "mlp_bias": "blk.0.ffn_up.bias" in raw,
        "tie_word_embeddings": "output.weight" not in raw,
    }
    for name, ours in SIZES.items():
        if f"llama.{name}" in fields:
            entries[ours] = fields[f"llama.{name}"]
        elif name not in _OPTIONAL:
            raise ValueError(f"{path}: the header lacks the entry 'llama.{name}'; copy or download the file again.")
    config = config_from_hf(entries, path)
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise ValueError(
            f"The GGUF file scales positions by {fields['llama.rope.scaling.type']!r:.80}, which is not built here; "
            "load the model's Hugging Face folder if its rope_type is 'llama3' or 'default'."
        )
    if ROPE_FACTORS in raw:
        config = _with_rope_factors(config, _dense(raw[ROPE_FACTORS]), fields.get(ROPE_RULE))
    return config


def _with_rope_factors(config: LlamaConfig, factors: Tensor, rule: list[float] | None) -> LlamaConfig:
    """GGUF stores Llama 3's scaling of positions as one divisor per frequency; find the rule that they follow."""
    factor, low, high, original = check(rule, _Rule | None, ROPE_RULE) or (float(factors.max()), 1.0, 4.0, 8192)
    scaled = replace(config, rope_scaling=RopeScaling(factor, low, high, int(original)))
    expected = rope_factors(scaled)  # (head_dim / 2,)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            "The GGUF file's rope_freqs do not follow Llama 3's rule with 8192 original positions; "
            "load the model's Hugging Face folder, which states the rule."
        )
    return scaled


def rope_factors(config: LlamaConfig) -> Tensor:
    """What Llama 3's scaling of positions divides each frequency by: (head_dim / 2,)."""
    return rotary_frequencies(replace(config, rope_scaling=None)) / rotary_frequencies(config)  # (head_dim / 2,)


def rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """How many heads the rows of a tensor belong to, by its name in GGUF, if positions rotate them; None otherwise."""
    if ".attn_q." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".attn_k." in name else None


def _hf_name(name: str) -> str:
    stem, _, part = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{part}"
    match stem.split("."):
        case ["blk", block, layer] if layer in IN_BLOCK:
            return f"model.layers.{block}.{IN_BLOCK[layer]}.{part}"
    raise ValueError(f"The GGUF file holds a tensor {name!r:.80} that a Llama does not have.")


def _half_split(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from llama.cpp's order (adjacent pairs) to Hugging Face's (two halves)."""
    by_pair = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)  # (9, 32, 2, columns)
    return by_pair.transpose(1, 2).reshape(rows.shape)  # (576, columns)
