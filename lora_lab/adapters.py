"""Adapters as files, in the format of the ``peft`` library: it reads ours, and we read its.

A folder holds ``adapter_config.json`` (rank, alpha, targets) and ``adapter_model.safetensors`` (A and B
of each layer, named ``base_model.model.<layer>.lora_A.weight``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lab.files import atomic_file, read_json, write_json
from lora_lab.lora import LoRAConfig, adapter_state, check_unadapted, inject, lora_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NOTE = "lora_lab.config"  # in the weights' header: rank, alpha and targets of the config they were saved with

# Entries of PEFT's config that change nothing in what a saved adapter computes, or are read here.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Ways of starting A and B that leave the base as it was. Others (pissa, olora, ...) subtract from it.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Settings that this package writes for PEFT's sake, all of them neutral.
_NEUTRAL = {
    "alpha_pattern": {},
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "use_dora": False,
    "use_rslora": False,
}


def save_adapter(model: nn.Module, folder: str | Path, base: str | None = None) -> Path:
    """Write the model's adapters to ``folder``, and return it.

    Args:
        base: name or path of the model they belong to, kept in the config as a note.

    Raises:
        ValueError: the model has no adapters, or they differ in rank, alpha or dropout.
    """
    folder = Path(folder)
    state = adapter_state(model)
    layers = lora_layers(model)
    settings = {(layer.rank, layer.alpha, getattr(layer.dropout, "p", 0.0)) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(
            f"The adapters differ in (rank, alpha, dropout): {sorted(settings)}; one of each can be saved."
        )
    rank, alpha, dropout = settings.pop()
    config = _NEUTRAL | {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": _endings(model, list(layers)),
        "task_type": "CAUSAL_LM" if hasattr(model, "get_output_embeddings") else None,
    }
    tensors = {f"{_PREFIX}{name}.weight": value.cpu().contiguous() for name, value in state.items()}
    with atomic_file(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", _NOTE: _note(config)})
        (folder / CONFIG).unlink(missing_ok=True)  # so that new weights never stand beside an old config
    write_json(folder / CONFIG, config)
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Put a saved adapter on ``model`` (which is frozen by it), and return the names of the adapted layers.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file is damaged; the adapter uses a setting of PEFT that is not built here; it does not
            fit this model; or the model has adapters already. The model is then left as it was.
    """
    folder = Path(folder)
    check_unadapted(model)
    config = read_config(folder)
    tensors, note = _read_weights(folder / WEIGHTS)
    if note is not None and note != _note(config):
        raise ValueError(
            f"{folder}: weights and config are of two different saves (rank, alpha and targets {note} against "
            f"{_note(config)}); save the adapter anew."
        )
    names = _check_fit(model, tensors, config["r"], folder)
    inject(model, LoRAConfig(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), targets=names))
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_A.copy_(tensors[f"{name}.lora_A"])  # (rank, in)
            layer.lora_B.copy_(tensors[f"{name}.lora_B"])  # (out, rank)
    return names


def read_config(folder: str | Path) -> dict[str, Any]:
    """The settings of a saved adapter, with PEFT's names.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or uses a setting of PEFT that is not built here.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} holds no adapter's settings; make or copy it anew.")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder} holds an adapter of type {config.get('peft_type')!r}, but only 'LORA' is read here."
        )
    for name in ("r", "lora_alpha"):
        if name not in config:
            raise ValueError(f"{folder / CONFIG} lacks the entry {name!r}.")
    for name, value in config.items():
        neutral = not value or value == _NEUTRAL.get(name)
        if name == "init_lora_weights":
            neutral = value in _PLAIN_STARTS
        if not neutral and name not in _HARMLESS:
            raise ValueError(f"{folder} sets {name} to {value!r}, which changes the result and is not built here.")
    return config


def _note(config: dict[str, Any]) -> str:
    return json.dumps([config["r"], config["lora_alpha"], config.get("target_modules")])


def _endings(model: nn.Module, names: list[str]) -> list[str]:
    """The shortest list that names exactly these layers: last parts of names if they do, else whole names."""
    endings = {name.rpartition(".")[2] for name in names}
    inner = tuple(f"{name}." for name in names)  # what LoRALinear itself holds
    modules = [name for name, _ in model.named_modules() if not name.startswith(inner)]
    named = {name for name in modules if name.rpartition(".")[2] in endings}
    return sorted(endings) if named == set(names) else names


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} lacks the file {path.name}.")
    try:
        with safe_open(path, framework="pt") as file:
            note = (file.metadata() or {}).get(_NOTE)
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); make or copy it anew.") from None
    tensors = {}
    for key, value in stored.items():
        name = key.removeprefix(_PREFIX).removesuffix(".weight")
        if not name.endswith((".lora_A", ".lora_B")):
            raise ValueError(f"{path} holds a tensor {key!r} that is no lora_A or lora_B of a linear layer.")
        tensors[name] = value
    if not tensors:
        raise ValueError(f"{path} holds no tensors, so it would adapt nothing.")
    return tensors, note


def _check_fit(model: nn.Module, tensors: dict[str, Tensor], rank: int, folder: Path) -> list[str]:
    modules = dict(model.named_modules())
    adapted = {name.rpartition(".")[0] for name in tensors}
    names = [name for name in modules if name in adapted] + sorted(adapted - modules.keys())  # in the model's order
    for name in names:
        if type(modules.get(name)) is not nn.Linear:
            found = "has no such layer" if name not in modules else f"has a {type(modules[name]).__name__} there"
            raise ValueError(f"{folder} adapts {name!r}, but the model {found}; is it the adapter's own base model?")
        wanted = {"lora_A": (rank, modules[name].in_features), "lora_B": (modules[name].out_features, rank)}
        for part, shape in wanted.items():
            value = tensors.get(f"{name}.{part}")
            if value is None:
                raise ValueError(f"{folder} lacks {part} of {name!r}, so it is incomplete; save it anew.")
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{folder}: {part} of {name!r} has shape {tuple(value.shape)}, but this model and rank {rank} "
                    f"ask for {shape}; is it the adapter's own base model?"
                )
    for other in modules.keys() - adapted:
        if ending := next((name for name in names if other.endswith("." + name)), None):
            raise ValueError(f"{folder} adapts {ending!r}, but a target of that name would also adapt {other!r}.")
    return names
