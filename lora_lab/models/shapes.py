"""A model's shape: from its config.json and back, and those of well-known models.

The latter are for questions that need no weights: size, memory, FLOPs. A :class:`lora_lab.Llama` of any of them is
built in no memory on torch's device "meta". Each row is the config.json of the model's card.

References: SmolLM2: Ben Allal et al. 2025, arXiv 2502.02737; Llama 3: Grattafiori et al. 2024, 2407.21783;
Qwen2.5: Yang et al. 2024, 2412.15115.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from lora_lab.models.llama import MOST_LAYERS, LlamaConfig, RopeScaling
from lora_lab.system.files import finish_save, read_json
from lora_lab.system.schema import check

# Upper limits, above any real model, for config entries whose names end in these words, such as num_hidden_layers.
_MOST = {"layer": MOST_LAYERS, "layers": MOST_LAYERS, "experts": MOST_LAYERS, "labels": 10**6}
# LlamaConfig's fields in order, vocab_size to max_position_embeddings; then rope_theta and tie_word_embeddings.
_ROWS = {
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 64, 8192, 1e5, True),
    "smollm2-360m": (49152, 960, 2560, 32, 15, 5, 64, 8192, 1e5, True),
    "smollm2-1.7b": (49152, 2048, 8192, 24, 32, 32, 64, 8192, 1.3e5, True),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, 64, 131072, 5e5, True),
    "llama-3.2-3b": (128256, 3072, 8192, 28, 24, 8, 128, 131072, 5e5, True),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 128, 8192, 5e5, False),
    "llama-3-70b": (128256, 8192, 28672, 80, 64, 8, 128, 8192, 5e5, False),
    "qwen2.5-0.5b": (151936, 896, 4864, 24, 14, 2, 64, 32768, 1e6, True),
    "qwen2.5-1.5b": (151936, 1536, 8960, 28, 12, 2, 128, 131072, 1e6, True),
    "qwen2.5-7b": (152064, 3584, 18944, 28, 28, 4, 128, 131072, 1e6, False),
}
_OF_FAMILY = {
    "llama-3.2": {"rope_scaling": RopeScaling(32.0, 1.0, 4.0, original_max_position_embeddings=8192)},
    "qwen2.5": {"rms_norm_eps": 1e-6, "attention_bias": True},  # on q, k and v; our Llama has one on o too
}
# Llama 3.1 8B and 70B differ from Llama 3 only in their positions: 131072, scaled by a factor of 8.
TABLE = {
    name: LlamaConfig(*sizes, rope_theta=theta, tie_word_embeddings=tied, **_OF_FAMILY.get(name.rpartition("-")[0], {}))
    for name, (*sizes, theta, tied) in _ROWS.items()
}


def config(name: str) -> LlamaConfig:
    """Return the shape of a well-known model in :data:`TABLE`, such as "llama-3-8b".

    Raises:
        ValueError: the table has no such model.
    """
    if name not in TABLE:
        raise ValueError(f"There is no model {name!r}; use a folder with a config.json, or one of: {', '.join(TABLE)}.")
    return TABLE[name]


class _Entries(TypedDict, total=False):
    """What decides how a config.json is read; LlamaConfig checks the sizes."""

    architectures: list[str] | None
    rope_parameters: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None


def read_entries(path: Path) -> dict[str, Any]:
    """Return the entries of a model's config.json.

    Args:
        path: of the file, which may have another name; or of its folder, where a killed save is finished first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or counts more layers than any model has, which would take hours to build.
    """
    if path.is_dir():
        finish_save(path)
        path = path / "config.json"
    entries = check(read_json(path), _Entries, str(path))
    parts = [entries]
    while parts:  # those of parts such as "text_config" too
        for name, value in parts.pop().items():
            most = _MOST.get(name.rpartition("_")[2], math.inf)
            if isinstance(value, dict):
                parts.append(value)
            elif isinstance(value, int | float) and value > most:
                raise ValueError(f"{path}: {name} is {value!r:.20}, but it must be at most {most}; copy it anew.")
    return entries


def config_to_hf(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the entries of a config.json that describe a Llama, and the dtype of its weights.

    The fields of :class:`LlamaConfig` and :class:`RopeScaling` have Hugging Face's names.
    """
    scaling = config.rope_scaling
    return vars(config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "rope_scaling": None if scaling is None else vars(scaling) | {"rope_type": "llama3"},
    }


def find_misfit(entries: dict[str, Any]) -> str | None:
    """Return why a config's model is not a :class:`lora_lab.Llama`, or None if it is one."""
    if (kind := entries.get("model_type")) != "llama":
        return f"it is of type {kind!r:.80}, and lora_lab builds only 'llama'"
    if (activation := entries.get("hidden_act", "silu")) != "silu":
        return f"its activation is {activation!r:.80}, and lora_lab builds only 'silu'"
    if (scaled := read_positions(entries)[1]) not in ("default", "llama3"):
        return f"its positions are scaled by {scaled!r:.80}, and lora_lab builds only 'default' and 'llama3'"
    if "quantization_config" in entries:
        return "its weights are quantised in a format that lora_lab does not read"
    heads = [name for name in entries.get("architectures") or () if not name.endswith(("ForCausalLM", "LlamaModel"))]
    return f"it is a {heads[0]:.80}, and lora_lab builds only causal language models" if heads else None


def read_positions(entries: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the settings of rotary positions, and how they are scaled."""
    # transformers 5 has one entry for all of them, older versions have two.
    rope = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    return rope, rope.get("rope_type", rope.get("type", "default"))


def config_from_hf(hf: dict[str, Any], where: str | Path) -> LlamaConfig:
    """Return the shape that the entries of a config.json describe.

    Args:
        hf: the entries.
        where: they stand, for an error's message.

    Raises:
        ValueError: an entry is missing, is not a number, or is out of its range.
    """
    rope, kind = read_positions(hf)
    scaling = None
    try:
        if kind == "llama3":
            scaling = RopeScaling(
                factor=rope["factor"],
                low_freq_factor=rope["low_freq_factor"],
                high_freq_factor=rope["high_freq_factor"],
                original_max_position_embeddings=rope["original_max_position_embeddings"],
            )
        heads = hf["num_attention_heads"]
        return LlamaConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_hidden_layers=hf["num_hidden_layers"],
            num_attention_heads=heads,
            # What follows may be left out, and then is what Hugging Face takes.
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            max_position_embeddings=hf.get("max_position_embeddings", 2048),
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
            rope_scaling=scaling,
            attention_bias=hf.get("attention_bias", False),
            mlp_bias=hf.get("mlp_bias", False),
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"{where} lacks the entry {error}; copy it anew, or name another model.") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {str(error).removesuffix('.')}; copy it anew.") from None
