"""Adapters as files: save, load, read.

Files are in the format of the ``peft`` library: it reads ours, and we read its. A folder holds
``adapter_config.json`` (rank, alpha, targets) and ``adapter_model.safetensors`` (A and B of each
layer, named ``base_model.model.<layer>.lora_A.weight``).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lab.adapters.edit import factor_shape, set_factors
from lora_lab.inject import LoRAConfig, inject, lora_layers, name_matches, replace, require_no_adapters
from lora_lab.layers import LoRAConv1D, LoRAEmbedding, lora_class
from lora_lab.lora import LoRALayer, check_numbers
from lora_lab.system.files import atomic_files, read_json, settle, write_json
from lora_lab.variants import DoRALinear, PiSSALinear, RsLoRALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NOTE = "lora_lab.config"  # in the weights' header: rank, alpha and targets of the config they were saved with
# Entries of PEFT's config that change nothing in what a saved adapter computes, or are read here.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Ways of starting A and B that leave the base as it was. Others (pissa, olora, ...) subtract from it.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Settings that this package writes for PEFT's sake, with the value by which they change nothing.
_NEUTRAL = {
    "alpha_pattern": {},
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "use_dora": False,
    "use_rslora": False,
}
# The variants that PEFT has a name for, and the layers whose tensors have other names there.
_VARIANTS: dict[str, type[LoRALayer]] = {"use_dora": DoRALinear, "use_rslora": RsLoRALinear}
_KEYS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
}
_EMBEDDING_KEYS = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}  # settings that may differ by layer, and where
_BASE = "base"  # what stands for an adapted layer's own weight among the parts of a file


def save_adapter(model: nn.Module, folder: str | Path, base: str | None = None) -> Path:
    """Write the model's adapters to ``folder``, and return it.

    An older adapter there stays whole until the new one is: see :func:`lora_lab.system.files.atomic_files`.
    Plain LoRA, rsLoRA and DoRA are saved as what they are, LoRA-FA as LoRA. PiSSA is saved as plain LoRA of
    twice the rank, the difference to the pre-trained weights, so that it needs no changed base; training
    cannot go on from it as PiSSA.

    Args:
        base: name or path of the model they belong to, kept in the config as a note.

    Raises:
        ValueError: the model has no adapters, or they are of several variants or differ in dropout, or of a variant
            that the format has no name for.
        OSError: the folder cannot be written to, or the disk is full.
    """
    folder = Path(folder)
    layers = {
        name: layer.difference() if isinstance(layer, PiSSALinear) else layer
        for name, layer in lora_layers(model, required=True).items()
    }
    for name, layer in layers.items():
        _check_kind(name, layer)
    settings = {(_variant(layer), getattr(layer.dropout, "p", 0.0)) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(
            f"The adapters differ in (variant, dropout): {sorted(settings)}; one of each can be saved in one folder."
        )
    variant, dropout = settings.pop()
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = _NEUTRAL | {
        "alpha_pattern": _exceptions_to(alphas, alpha),
        "base_model_name_or_path": base,
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _exceptions_to(ranks, rank),
        "target_modules": _shortest_targets(model, list(layers)),
        "task_type": "CAUSAL_LM" if _is_causal(model) else None,
    }
    if variant:
        config[variant] = True
    tensors = {
        f"{_PREFIX}{name}.{_keys(layer)[part]}": getattr(layer, part).detach().clone().cpu().contiguous()
        for name, layer in layers.items()
        for part in layer.parts
    }
    with atomic_files(folder) as temporary:
        write_json(temporary / CONFIG, config)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt", _NOTE: _config_digest(config)})
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Put a saved adapter on ``model`` (which is frozen by it), and return the names of the adapted layers.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file is damaged; the adapter uses a setting of PEFT that is not built here; it does not
            fit this model; or the model has adapters already. The model is then left as it was.
    """
    folder = Path(folder)
    require_no_adapters(model)
    config, tensors = _read(folder)
    variant = next((layer for name, layer in _VARIANTS.items() if config.get(name)), None)
    names = _check_names(model, tensors, variant, folder)
    numbers = {name: (_value_for(config, "r", name), _value_for(config, "lora_alpha", name)) for name in names}
    for rank, alpha in numbers.values():
        check_numbers(rank, alpha)
    start = LoRAConfig(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), targets=names)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject(model, start, layer=variant)
    layers = lora_layers(model)
    try:
        for name, layer in layers.items():
            _check_fit(name, layer, tensors[name], numbers[name][0], folder)
    except ValueError:
        for name, layer in layers.items():
            replace(model, name, layer.base)
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    for name, layer in layers.items():
        set_factors(layer, tensors[name], numbers[name][1])
    return names


def read_adapter(folder: str | Path) -> dict[str, Tensor]:
    """A saved adapter without its model, in the form of :func:`lora_lab.adapter_state`.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file is damaged or of another save, or the adapter uses a setting that is not built here.
    """
    config, tensors = _read(Path(folder))
    state: dict[str, Tensor] = {}
    for name in sorted(tensors, key=_natural_key):
        parts = tensors[name]
        rank, alpha = _value_for(config, "r", name), _value_for(config, "lora_alpha", name)
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items() if part != _BASE}
        numbers = {"alpha": alpha, "scaling": alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)}
        state |= {f"{name}.{key}": torch.tensor(number, dtype=torch.float64) for key, number in numbers.items()}  # ()
    return state


def read_config(folder: str | Path) -> dict[str, Any]:
    """The settings of a saved adapter, with PEFT's names.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or uses a setting of PEFT that is not built here.
    """
    folder = Path(folder)
    settle(folder)
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
        if name in _VARIANTS:
            neutral = isinstance(value, bool)
        if not neutral and name not in _HARMLESS:
            raise ValueError(f"{folder} sets {name} to {value!r}, which changes the result and is not built here.")
    for name in _PATTERNS.values():
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"{folder} sets {name} to {config[name]!r}, but it must map names to numbers.")
    if len(both := [name for name in _VARIANTS if config.get(name)]) > 1:
        raise ValueError(f"{folder} sets {' and '.join(both)}, which are not built here together.")
    return config


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The settings, and the parts of each layer, if both are of one save."""
    config = read_config(folder)
    tensors, note = _read_weights(folder / WEIGHTS)
    if note is not None and note != _config_digest(config):
        raise ValueError(
            f"{folder}: weights and config are of two different saves (rank, alpha and targets {note} against "
            f"{_config_digest(config)}); save the adapter anew."
        )
    return config, tensors


def _config_digest(config: dict[str, Any]) -> str:
    more = {name: config[name] for name in (*_PATTERNS.values(), *_VARIANTS) if config.get(name)}
    numbers = [config["r"], config["lora_alpha"], config.get("target_modules")]
    return json.dumps([*numbers, more] if more else numbers, sort_keys=True)


def _is_causal(model: nn.Module) -> bool:
    """Whether it is a language model of the kind for which PEFT has a class that generates."""
    config = getattr(model, "config", None)
    return hasattr(model, "generate") and not getattr(config, "is_encoder_decoder", False)


def _check_kind(name: str, layer: LoRALayer) -> None:
    """Refuse a variant that a file has no name for: it would be loaded as another kind of layer."""
    own = type(layer)
    for kind in (lora_class(layer.base), *_VARIANTS.values()):
        if kind and all(getattr(own, part) is getattr(kind, part) for part in ("forward", "_delta", "scaling")):
            return
    raise ValueError(
        f"{name!r} is a {own.__name__}, which no file can name, so it would be loaded as another kind; keep "
        "adapter_state(model), or register the class for its kind of layer."
    )


def _variant(layer: LoRALayer) -> str:
    """PEFT's setting for the layer's variant, "" for plain LoRA."""
    return next((name for name, kind in _VARIANTS.items() if isinstance(layer, kind)), "")


def _keys(layer: LoRALayer) -> dict[str, str]:
    return _EMBEDDING_KEYS if isinstance(layer, LoRAEmbedding) else _KEYS


def _natural_key(name: str) -> str:
    """Sorts layer 2 before layer 10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(6), name)


def _exceptions_to(values: dict[str, float], default: float) -> dict[str, float]:
    """The layers of another value than the default, by regular expressions that match each one's whole name."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def _value_for(config: dict[str, Any], setting: str, name: str) -> float:
    """PEFT's rule: the first key that the name ends in, as a regular expression, gives the layer's own value."""
    pattern = config.get(_PATTERNS[setting]) or {}
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), config[setting])


def _shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """The shortest list that names exactly these layers: last parts of names if they do, else whole names."""
    endings = {name.rpartition(".")[2] for name in names}
    inner = tuple(f"{name}." for name in names)  # what LoRALinear itself holds
    modules = [name for name, _ in model.named_modules() if not name.startswith(inner)]
    named = {name for name in modules if name.rpartition(".")[2] in endings}
    return sorted(endings) if named == set(names) else names


def _read_weights(path: Path) -> tuple[dict[str, dict[str, Tensor]], str | None]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} lacks the file {path.name}.")
    try:
        with safe_open(path, framework="pt") as file:
            note = (file.metadata() or {}).get(_NOTE)
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); make or copy it anew.") from None
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in stored.items():
        name, part = _parse(key)
        if part is None:
            raise ValueError(f"{path} holds a tensor {key!r} that belongs to no adapter known here.")
        tensors.setdefault(name, {})[part] = value
    if not tensors:
        raise ValueError(f"{path} holds no tensors, so it would adapt nothing.")
    return tensors, note


def _parse(key: str) -> tuple[str, str | None]:
    """The layer's name and the part that a key of the file stands for; None for a part that is not known."""
    name = key.removeprefix(_PREFIX)
    for part, ending in [*_KEYS.items(), *_EMBEDDING_KEYS.items(), (_BASE, "base_layer.weight")]:
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), part
    return name, None


def _check_names(
    model: nn.Module, tensors: dict[str, dict[str, Tensor]], variant: type[LoRALayer] | None, folder: Path
) -> list[str]:
    """The names of the layers that the file adapts, in the model's order, if the model has them all."""
    modules = dict(model.named_modules())
    names = [name for name in modules if name in tensors] + sorted(tensors.keys() - modules.keys())
    for name in names:
        if name not in modules or lora_class(modules[name], variant) is None:
            found = "has no such layer"
            if name in modules:
                kind = (variant or LoRALayer).__name__
                found = f"has a {type(modules[name]).__name__} there, which {kind} does not adapt"
            raise ValueError(f"{folder} adapts {name!r}, but the model {found}; is it the adapter's own base model?")
        # PEFT saves an adapted embedding's frozen table too; it may be that of a model with more tokens.
        table = tensors[name].pop(_BASE, None)
        if table is not None and not torch.equal(table, modules[name].weight.detach().cpu().to(table.dtype)):
            raise ValueError(f"{folder} brings its own weight of {name!r}, which is not the model's; load that first.")
    for other in modules.keys() - tensors.keys():
        if ending := next((name for name in names if name_matches(other, name)), None):
            raise ValueError(f"{folder} adapts {ending!r}, but a target of that name would also adapt {other!r}.")
    return names


def _check_fit(name: str, layer: LoRALayer, tensors: dict[str, Tensor], rank: int, folder: Path) -> None:
    if extra := tensors.keys() - set(layer.parts):
        raise ValueError(f"{folder} holds {sorted(extra)[0]} of {name!r}, which its config does not ask for.")
    for part in layer.parts:
        if part not in tensors:
            raise ValueError(f"{folder} lacks {part} of {name!r}, so it is incomplete; save it anew.")
        expected = factor_shape(layer, part, rank)
        if (found := tuple(tensors[part].shape)) != expected:
            raise ValueError(
                f"{folder}: {part} of {name!r} has shape {found}, but this model and rank {rank} "
                f"ask for {expected}; is it the adapter's own base model?"
            )
