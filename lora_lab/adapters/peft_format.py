"""Adapters as files: save, load, read.

The format is that of the ``peft`` library, which reads the files saved here and whose files are read here. A folder
holds ``adapter_config.json`` (rank, alpha, targets), ``adapter_model.safetensors`` (A and B of each layer, named
``base_model.model.<layer>.lora_A.weight``), and ``README.md``, the model card.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Required

import torch
from pydantic_core import SchemaError, SchemaValidator, core_schema
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from lora_lab.adapters.card import CARD, card, is_free
from lora_lab.adapters.edit import check_fit, set_factors
from lora_lab.history import History
from lora_lab.inject import LoRAConfig, inject, lora_layers, name_matches, require_no_adapters, uncompiled
from lora_lab.layers import LoRAConv1D, LoRAEmbedding, lora_class
from lora_lab.lora import LoRALayer
from lora_lab.models.pretrained import ADAPTER_CONFIG, check_separate
from lora_lab.system.files import (
    as_path,
    atomic_files,
    carried_json,
    check_folder,
    read_json,
    repair,
    write_json,
)
from lora_lab.system.schema import Count, Dropout, Number, Positive, Size, check, check_finite
from lora_lab.system.wording import counted, short_repr, shortened
from lora_lab.variants import LORA_METHODS, PiSSALinear

CONFIG, WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"  # the weights, as PEFT saved them before it had safetensors
_PREFIX = "base_model.model."
# PEFT's settings for the variants that it knows too.
_VARIANTS = {kind.peft: kind.layer for name, kind in sorted(LORA_METHODS.items()) if kind.peft and kind.layer}
# PEFT's settings that may differ by layer, and the settings that hold the exceptions.
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
# What the weights mean: here the config that was saved with them, in their header, decides.
_MEANING = ("r", "lora_alpha", "target_modules", *_PATTERNS.values(), *_VARIANTS)


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    history: History | None = None,
) -> Path:
    """Write the model's adapters to ``folder`` with a model card, and return the folder.

    An older adapter there stays intact until the new one is complete.
    Plain LoRA, rsLoRA and DoRA are saved as themselves, LoRA-FA as plain LoRA. PiSSA is saved as plain LoRA of twice
    the rank, the difference to the pre-trained weights, so that it fits the unchanged base; training cannot resume from
    it as PiSSA. Names are those in the model itself, also if it is compiled by torch.compile.

    Nothing else of the model is in the folder. Where a classifier of transformers was loaded with a new head, which it
    fills with random numbers, the adapter fits no model with another such head: save the model with its head, by
    ``model.save_pretrained``, before the training.

    Args:
        base: name or path of the model that the adapters belong to, stored in the config as a note.
        dtype: of the tensors in the file, such as ``torch.float16`` for half the bytes; None stores them as they are.
        history: of the run that trained them, for the card (README.md): task, settings, losses before and after. A
            README.md that lora_lab did not write stays as it is.

    Raises:
        ValueError: the model has no adapters; they are of several variants, or differ in dropout; the format has no
            name for their variant; the folder holds a model; ``dtype`` is no floating-point dtype; or a number is NaN,
            infinite or too large for ``dtype``.
        OSError: the folder cannot be written to, or the disk is full.
    """
    model = uncompiled(model)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(
            f"dtype is {short_repr(dtype)}, but it must be a floating-point dtype, such as torch.float16, or None."
        )
    folder = as_path(folder, "folder")
    check_separate(folder, "adapter")
    layers = {
        name: layer.difference() if isinstance(layer, PiSSALinear) else layer
        for name, layer in lora_layers(model, required=True).items()
    }
    settings = {(_variant(name, layer), getattr(layer.dropout, "p", 0.0)) for name, layer in layers.items()}
    if len(settings) > 1:
        raise ValueError(
            f"The adapters differ in (variant, dropout): {sorted(settings)}; one of each can be saved in one folder."
        )
    config = _make_config(model, layers, base, *settings.pop())
    tensors = _make_tensors(layers, dtype)
    with atomic_files(folder) as temporary:
        write_json(temporary / CONFIG, config)
        if is_free(folder):
            text = card(config, sum(tensor.numel() for tensor in tensors.values()), history)
            (temporary / CARD).write_text(text, encoding="utf-8", errors="backslashreplace")
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    return folder


def _make_config(
    model: nn.Module, layers: Mapping[str, LoRALayer], base: str | None, variant: str, dropout: float
) -> dict[str, Any]:
    """Return PEFT's settings: the most common rank and alpha, and the exceptions by layer."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "alpha_pattern": _exceptions_to(alphas, alpha),
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _exceptions_to(ranks, rank),
        "target_modules": _shortest_targets(model, list(layers)),
        "task_type": "CAUSAL_LM" if _is_causal(model) else None,
        **{setting: setting == variant for setting in _VARIANTS},
    }


def _make_tensors(layers: Mapping[str, LoRALayer], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the adapters' tensors by PEFT's names.

    Raises:
        ValueError: a number is NaN, infinite or too large for ``dtype``.
    """
    check_finite((f"{name}.{part}", getattr(layer, part)) for name, layer in layers.items() for part in layer.parts)
    tensors = {
        f"{_PREFIX}{name}.{_keys(layer)[part]}": getattr(layer, part).detach().to("cpu", dtype, copy=True).contiguous()
        for name, layer in layers.items()
        for part in layer.parts
    }
    for name, tensor in tensors.items():
        if tensor.isinf().any():
            raise ValueError(
                f"{name} holds a number that is infinite in {dtype}, whose largest is "
                f"{torch.finfo(tensor.dtype).max:g}; save the adapter without dtype."
            )
    return tensors


def load_adapter(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> list[str]:
    """Put an adapter on ``model``, which is frozen, and return the names of the adapted layers.

    Args:
        source: the folder of a saved adapter; or an adapter in memory, as :func:`read_adapter`,
            :func:`lora_lab.adapter_state` and :func:`lora_lab.adapters.combine` return it. rsLoRA and LoRA-FA become
            plain LoRA of the same function, and PiSSA plain LoRA of twice the rank, over the pre-trained weights.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file is damaged; the adapter uses a setting of PEFT that is not supported here; it does not fit
            this model; one of its numbers is NaN or infinite; or the model already has adapters. All this is
            checked before the model changes.

    Warns of layers that its targets match and for which it has nothing, as where the model has more layers.
    """
    model = uncompiled(model)
    require_no_adapters(model)
    if isinstance(source, Mapping):
        label, adapter = "The adapter", from_state(source)
    else:
        label, adapter = str(source), _read(as_path(source, "source"))
    config, tensors, ranks, alphas = adapter
    variant = next((layer_class for setting, layer_class in _VARIANTS.items() if config.get(setting)), None)
    names = _check_names(model, tensors, variant, label)
    for name in names:
        check_fit(name, _build_without_numbers(model.get_submodule(name), variant), tensors[name], ranks[name], label)
    left_out = _targeted(model, config, variant) - tensors.keys()
    inject(model, LoRAConfig(1, dropout=config.get("lora_dropout", 0.0), targets=names), layer=variant)
    for name, layer in lora_layers(model).items():
        set_factors(layer, tensors[name], alphas[name])
    if left_out:
        warnings.warn(
            f"{label} has nothing for {counted(len(left_out), 'layer')} that its target_modules match, such as "
            f"{min(left_out, key=_natural_key)!r}, so they stay as they are; is it the adapter's own base model?",
            stacklevel=2,
        )
    return names


def _build_without_numbers(module: nn.Module, variant: type[LoRALayer] | None) -> LoRALayer:
    """Return an adapted layer of rank 1 on torch's meta device, to be asked for shapes; the module does not change."""
    shapes = {
        id(tensor): nn.Parameter(tensor.to("meta"), False) if isinstance(tensor, nn.Parameter) else tensor.to("meta")
        for tensor in chain(module.parameters(), module.buffers())
    }
    adapted = lora_class(module, variant)
    assert adapted is not None  # see _check_names
    return adapted(copy.deepcopy(module, shapes), 1, 1.0)


class Adapter(NamedTuple):
    """An adapter without its model."""

    config: Mapping[str, Any]  # PEFT's settings
    tensors: dict[str, dict[str, Tensor]]  # layer -> part -> values
    ranks: Mapping[str, int]  # of each layer
    alphas: Mapping[str, float]


def from_state(state: Mapping[str, Tensor]) -> Adapter:
    """Return what an adapter in memory holds.

    Its scaling counts, so rsLoRA becomes plain LoRA, and PiSSA becomes plain LoRA of twice the rank.

    Raises:
        ValueError: a tensor is missing, unknown, no matrix of floating-point numbers, or not finite.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    scalings: dict[str, float] = {}
    for key, value in state.items():
        name, _, part = str(key).rpartition(".")
        if part == "scaling":
            scalings[name] = check(value, Positive, key)
        elif part in _KEYS or part in _STARTS:
            tensors.setdefault(name, {})[part] = value
        elif part != "alpha":
            raise ValueError(f"The adapter holds {key!r}, which is not part of any adapter known here.")
    complete = {name for name, parts in tensors.items() if {"lora_A", "lora_B"} <= parts.keys()}
    if not tensors or not tensors.keys() == scalings.keys() == complete:
        missing = sorted((tensors.keys() | scalings.keys()) - complete) or sorted(tensors.keys() - scalings.keys())
        raise ValueError(
            f"The adapter is incomplete at {missing[:1]}; each layer needs lora_A, lora_B, alpha and scaling, as "
            "adapter_state returns them."
        )
    for name, parts in tensors.items():
        _check_numbers_of(name, parts, "The adapter")
        if _STARTS & parts.keys():
            tensors[name] = _as_plain_lora(name, parts)
    ranks = {name: len(parts["lora_A"]) for name, parts in tensors.items()}
    alphas = {name: check(scalings[name] * rank, Positive, f"the alpha of {name!r}") for name, rank in ranks.items()}
    return Adapter({"use_dora": any("lora_magnitude_vector" in t for t in tensors.values())}, tensors, ranks, alphas)


def _as_plain_lora(name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer's PiSSA adapter as those of plain LoRA over the pre-trained weights."""
    for part, start in (("lora_A", "start_A"), ("lora_B", "start_B")):
        if start not in parts or parts[start].shape != parts[part].shape:
            held = tuple(parts[start].shape) if start in parts else "missing"
            raise ValueError(
                f"The adapter's {name}.{start} is {held}, but must have the shape {tuple(parts[part].shape)} of "
                f"{part}; pass all that adapter_state returned."
            )
    A, B = PiSSALinear.plain_factors(*(parts[part] for part in PiSSALinear.parts))
    return {"lora_A": A, "lora_B": B, **{part: parts[part] for part in parts.keys() - {*PiSSALinear.parts}}}


def read_adapter(folder: str | Path) -> dict[str, Tensor]:
    """A saved adapter without its model, in the form of :func:`lora_lab.adapter_state`.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file is damaged or from another save, or the adapter uses a setting that is not supported here.
    """
    config, tensors, ranks, alphas = _read(as_path(folder, "folder"))
    state: dict[str, Tensor] = {}
    for name in sorted(tensors, key=_natural_key):
        rank, alpha = ranks[name], alphas[name]
        A, B = (tensors[name].get(part) for part in ("lora_A", "lora_B"))
        if A is None or B is None or not (len(A) == rank == B.shape[1]):
            shapes = [tensor if tensor is None else tuple(tensor.shape) for tensor in (A, B)]
            raise ValueError(
                f"{folder}: lora_A and lora_B of {name!r} have the shapes {shapes[0]} and {shapes[1]}, but must be "
                f"(rank, in) and (out, rank) with rank {rank}; save the adapter again."
            )
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        state |= {f"{name}.{part}": tensor for part, tensor in tensors[name].items() if part != _BASE}
        state[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)  # ()
        state[f"{name}.scaling"] = torch.tensor(scaling, dtype=torch.float64)  # ()
    return state


# The config


class _Settings(TypedDict, total=False):
    """What is read here of PEFT's config."""

    peft_type: Required[Literal["LORA"]]
    r: Required[Size]
    lora_alpha: Required[Positive]
    lora_dropout: Dropout
    rank_pattern: dict[str, Count] | None
    alpha_pattern: dict[str, Number] | None
    target_modules: str | list[str] | None
    base_model_name_or_path: str | None
    use_dora: bool
    use_rslora: bool


# Entries of PEFT's config that do not change what a saved adapter computes, or that are read here.
_HARMLESS = {
    *_VARIANTS,
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")  # leave layers out that targets match
# Values of init_lora_weights that leave the base unchanged. Others (pissa, olora, ...) subtract from it.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The settings of a saved adapter, with PEFT's names.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: it is damaged, or uses a setting of PEFT that is not supported here.
    """
    folder = as_path(folder, "folder")
    check_folder(folder, "a saved adapter")
    repair(folder)
    config = read_json(folder / CONFIG)
    check(config, _Settings, str(folder / CONFIG))
    for name, value in config.items():
        if name == "init_lora_weights":
            supported = value in _PLAIN_STARTS
        else:
            supported = not value or name in _HARMLESS or (name, value) == ("bias", "none")
        if not supported:
            raise ValueError(
                f"{folder} sets {shortened(name)} to {short_repr(value)}, which changes the result and is not "
                "supported here; merge the adapter in peft and load the merged model."
            )
    if all(config.get(name) for name in _VARIANTS):
        raise ValueError(
            f"{folder} sets {' and '.join(_VARIANTS)}, which are not supported together; use the library peft."
        )
    return config


def _is_causal(model: nn.Module) -> bool:
    """Whether PEFT would load the model as a causal language model."""
    config = getattr(model, "config", None)
    return hasattr(model, "generate") and not getattr(config, "is_encoder_decoder", False)


def _variant(name: str, layer: LoRALayer) -> str:
    """PEFT's setting for the layer's variant, or "" for plain LoRA.

    Raises:
        ValueError: the format has no name for the variant, so it would be loaded as a different kind of layer.
    """
    for setting, layer_class in {**_VARIANTS, "": lora_class(layer.base)}.items():
        methods = ("forward", "_delta", "scaling")
        if layer_class and all(getattr(type(layer), method) is getattr(layer_class, method) for method in methods):
            return setting
    raise ValueError(
        f"{name!r} is a {type(layer).__name__}, for which the format has no name, so it would be loaded as a different "
        "kind of layer; store adapter_state(model), or register the class for its kind of layer."
    )


def _exceptions_to(values: Mapping[str, float], default: float) -> dict[str, float]:
    """The layers whose value is not the default, by regular expressions that match a layer's whole name."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def _ranks_and_alphas(config: dict[str, Any], names: Sequence[str], source: str) -> tuple[dict[str, Any], ...]:
    """The rank and the alpha of each layer, as the config has them.

    PEFT's rule: the first regular expression of the setting's pattern that matches the end of the name, after a dot.
    The regular expressions are those of pydantic, which no stranger's file can make slow.

    Raises:
        ValueError: a regular expression cannot be read, or a number is out of range.
    """
    result = []
    for setting, pattern_setting in _PATTERNS.items():
        values: dict[str, Any] = {}
        for pattern, value in (config.get(pattern_setting) or {}).items():
            try:
                expression = SchemaValidator(core_schema.str_schema(pattern=rf"^(?:(.*\.)?({pattern})$)"))
            except SchemaError:
                raise ValueError(
                    f"{source}: {pattern_setting} has the regular expression {short_repr(pattern)}, which cannot be "
                    "read here; write layers' names, such as 'q_proj'."
                ) from None
            unmatched = [name for name in names if name not in values]
            values |= {name: value for name in unmatched if expression.isinstance_python(name)}
        result.append({name: values.get(name, config[setting]) for name in names})
    ranks, alphas = result
    for name in names:
        check(ranks[name], Size, f"{source}: the rank of {name!r}")
        check(alphas[name], Positive, f"{source}: the alpha of {name!r}")
    return ranks, alphas


def _shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """The shortest list that matches exactly these layers: the last parts of names if possible, or whole names."""
    endings = {name.rpartition(".")[2] for name in names}
    inside_adapters = tuple(f"{name}." for name in names)
    modules = [name for name, _ in model.named_modules() if not name.startswith(inside_adapters)]
    matches = {name for name in modules if name.rpartition(".")[2] in endings}
    return sorted(endings) if matches == set(names) else names


def _targeted(model: nn.Module, config: Mapping[str, Any], variant: type[LoRALayer] | None) -> set[str]:
    """The layers that the config's target_modules match, where they are names or endings of names.

    Empty where PEFT would leave some of them out by another setting.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(setting) for setting in _NARROWING):
        return set()
    return {
        name
        for name, module in model.named_modules()
        if any(name_matches(name, target) for target in targets) and lora_class(module, variant) is not None
    }


# The weights


# The names of an adapter's tensors in a file.
_KEYS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
}
_EMBEDDING_KEYS = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
_MATRICES = ("lora_A", "lora_B")
_STARTS = {"start_A", "start_B"}  # of PiSSA, in memory alone
_BASE = "base"  # stands for an adapted layer's original weight among the tensors of a file


def _keys(layer: LoRALayer) -> dict[str, str]:
    return _EMBEDDING_KEYS if isinstance(layer, LoRAEmbedding) else _KEYS


def _parse(key: str) -> tuple[str, str | None]:
    """The layer and the part of its adapter that a name in a file stands for; None for an unknown part."""
    name = key.removeprefix(_PREFIX)
    for part, ending in [*_KEYS.items(), *_EMBEDDING_KEYS.items(), (_BASE, "base_layer.weight")]:
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), part
    return name, None


def _read(folder: Path) -> Adapter:
    """Return the adapter in a folder, if its weights were saved with its settings.

    PEFT's own files have no settings in their header. Of ours, entries that do not change the result may have been
    edited, such as the path of the base.
    """
    config = read_config(folder)
    saved = carried_json(folder / WEIGHTS, CONFIG) or config
    for name in _MEANING:
        if saved.get(name) != config.get(name):
            raise ValueError(
                f"{folder}: {CONFIG} has {name} {short_repr(config.get(name))}, but the weights were saved with "
                f"{short_repr(saved.get(name))}; save the adapter again."
            )
    tensors = _read_weights(folder / WEIGHTS)
    return Adapter(config, tensors, *_ranks_and_alphas(config, list(tensors), str(folder)))


def _natural_key(name: str) -> str:
    """Sorts layer 2 before layer 10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(6), name)


def _read_weights(path: Path) -> dict[str, dict[str, Tensor]]:
    if not path.is_file():
        if (path.parent / _PICKLE).is_file():
            raise FileNotFoundError(
                f"{path.parent} holds its weights in {_PICKLE}, a pickle, which can run code and is not opened here; "
                "where you trust it, load the adapter in peft and save it again: "
                "PeftModel.from_pretrained(base, folder).save_pretrained(folder)."
            )
        raise FileNotFoundError(f"{path.parent} lacks the file {path.name}; copy the adapter's folder again.")
    try:
        with safe_open(path, framework="pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({shortened(str(error))}); make or copy it again.") from None
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in stored.items():
        name, part = _parse(key)
        if part is None:
            raise ValueError(f"{path} holds a tensor {key!r} that is not part of any adapter known here.")
        tensors.setdefault(name, {})[part] = value
    if not tensors:
        raise ValueError(f"{path} holds no tensors, so it would adapt nothing.")
    for name, parts in tensors.items():
        _check_numbers_of(name, parts, str(path))
    return tensors


def _check_numbers_of(name: str, parts: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError if a tensor of a layer's adapter is no matrix of finite floating-point numbers."""
    for part, tensor in parts.items():
        if part != _BASE and not (
            tensor.is_floating_point() and tensor.numel() and tensor.ndim >= (2 if part in _MATRICES else 1)
        ):
            raise ValueError(
                f"{source}: {name}.{part} is {tuple(tensor.shape)} of {tensor.dtype}, but an adapter's matrices hold "
                "floating-point numbers; save the adapter again."
            )
    check_finite(((f"{name}.{part}", tensor) for part, tensor in parts.items()), source)


def _check_names(
    model: nn.Module, tensors: dict[str, dict[str, Tensor]], variant: type[LoRALayer] | None, source: str
) -> list[str]:
    """The names of the layers that the file adapts, in the model's order, if the model has all of them."""
    modules = dict(model.named_modules())
    names = [name for name in modules if name in tensors] + sorted(tensors.keys() - modules.keys())
    for name in names:
        if name not in modules:
            raise ValueError(
                f"{source} adapts {name!r}, but the model has no such layer; is it the adapter's own base model?"
            )
        if lora_class(modules[name], variant) is None:
            raise ValueError(
                f"{source} adapts {name!r}, but the model has a {type(modules[name]).__name__} there, which "
                f"{(variant or LoRALayer).__name__} does not adapt; is it the adapter's own base model?"
            )
        # PEFT also saves the frozen table of an adapted embedding; it may be that of a model with more tokens.
        table = tensors[name].pop(_BASE, None)
        if table is not None:
            weight = modules[name].weight
            if not (isinstance(weight, Tensor) and torch.equal(table, weight.detach().cpu().to(table.dtype))):
                raise ValueError(
                    f"{source} has its own weight for {name!r}, which is not the model's; load that first."
                )
    for name in modules.keys() - tensors.keys():
        if target := next((target for target in names if name_matches(name, target)), None):
            raise ValueError(f"{source} adapts {target!r}, but a target of that name would also adapt {name!r}.")
    return names
