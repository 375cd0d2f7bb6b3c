"""A model's config.json: which model is a Llama of ours, and its shape from Hugging Face's entries and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from lora_lab.models.llama import MOST_LAYERS, LlamaConfig, RopeScaling
from lora_lab.system.files import read_json
from lora_lab.system.schema import check

# Upper limits, above any real model, for config entries whose names end in these words, such as num_hidden_layers.
_MOST = {"layer": MOST_LAYERS, "layers": MOST_LAYERS, "experts": MOST_LAYERS, "labels": 10**6}
# The fields of RopeScaling, in order, and their entries.
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}


class _Entries(TypedDict, total=False):
    """What decides how a config.json is read; LlamaConfig checks the sizes."""

    architectures: list[str] | None
    rope_parameters: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None


def read_entries(path: Path) -> dict[str, Any]:
    """The entries of a config.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or counts more layers than any model has, which would take hours to build.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path.parent} lacks the file {path.name}, so it is no model's folder; name one, or a .gguf file."
        )
    entries = read_json(path)
    check(entries, _Entries, str(path))
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
    """The entries of a config.json that describe a Llama, and the dtype of its weights."""
    scaling = config.rope_scaling
    rope = scaling and {theirs: getattr(scaling, ours) for ours, theirs in _SCALING.items()} | {"rope_type": "llama3"}
    return vars(config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "rope_scaling": rope,
    }


def misfit(entries: dict[str, Any]) -> str | None:
    """Why a config's model is not a :class:`lora_lab.Llama`, or None if it is one."""
    if (kind := entries.get("model_type")) != "llama":
        return f"it is of type {kind!r:.80}, and lora_lab builds only 'llama'"
    if (activation := entries.get("hidden_act", "silu")) != "silu":
        return f"its activation is {activation!r:.80}, and lora_lab builds only 'silu'"
    if (scaled := positions(entries)[1]) not in ("default", "llama3"):
        return f"its positions are scaled by {scaled!r:.80}, and lora_lab builds only 'default' and 'llama3'"
    if "quantization_config" in entries:
        return "its weights are quantised in a format that lora_lab does not read"
    heads = [name for name in entries.get("architectures") or () if not name.endswith(("ForCausalLM", "LlamaModel"))]
    return f"it is a {heads[0]:.80}, and lora_lab builds only causal language models" if heads else None


def positions(entries: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The settings of rotary positions, and how they are scaled."""
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
    rope, kind = positions(hf)
    heads = hf.get("num_attention_heads")
    entries = {name: hf[name] for name in LlamaConfig.__dataclass_fields__ if name in hf}
    try:
        entries |= {
            "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
            "num_key_value_heads": hf.get("num_key_value_heads") or heads,
            "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
            "rope_theta": rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
            "rope_scaling": None if kind != "llama3" else RopeScaling(*(rope[name] for name in _SCALING.values())),
        }
        return LlamaConfig(**entries)
    except KeyError as error:
        raise ValueError(f"{where} lacks the entry {error}; copy it anew, or name another model.") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {str(error).removesuffix('.')}; copy it anew.") from None
