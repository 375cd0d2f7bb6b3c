"""Adapters as files: save, load, read.

The format is that of the ``peft`` library, which reads the files saved here and whose files are read here. A folder
holds ``adapter_config.json`` (rank, alpha, targets), ``adapter_model.safetensors`` (A and B of each layer, named
``base_model.model.<layer>.lora_A.weight``), and ``README.md``, the model card.
"""

from __future__ import annotations

import copy
import math
import platform
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any, Literal, NamedTuple, Required

import torch
from pydantic_core import SchemaError, SchemaValidator, core_schema
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from lora_lab.adapters.edit import Factors, check_factors, check_fit, check_plain, join_state, put_on, split_state
from lora_lab.history import History
from lora_lab.inject import adapter_state, lora_layers, match_layers, name_matches, require_no_adapters, uncompiled
from lora_lab.layers import LoRAConv1D, LoRAEmbedding, lora_class
from lora_lab.lora import LoRALayer
from lora_lab.models.pretrained import ADAPTER_CONFIG, check_separate
from lora_lab.system.files import as_path, atomic_files, finish_save, read_carried_json, read_json, write_json
from lora_lab.system.provenance import version
from lora_lab.system.schema import Dropout, Number, Positive, Size, check, check_finite
from lora_lab.system.wording import count_noun, short_repr, shortened
from lora_lab.variants import LORA_METHODS, PiSSALinear

CONFIG, WEIGHTS, CARD = ADAPTER_CONFIG, "adapter_model.safetensors", "README.md"
_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"
_BASE = "base"  # stands for the frozen weight that PEFT saves beside an adapted embedding's factors
# How the name of a tensor in a file ends, and the part of a layer's adapter that it is.
_ENDINGS = {
    **{f"{part}.weight": part for part in LoRALayer.parts},
    **{part.replace("lora_", "lora_embedding_"): part for part in LoRALayer.parts},
    _MAGNITUDE: _MAGNITUDE,
    "base_layer.weight": _BASE,
}
# PEFT's settings for the variants that it knows too, and for what may differ by layer.
_VARIANTS = {kind.peft: kind.layer for name, kind in sorted(LORA_METHODS.items()) if kind.peft and kind.layer}
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
# What the weights mean: here the config that was saved with them, in their header, decides.
_MEANING = ("r", "lora_alpha", "target_modules", *_PATTERNS.values(), *_VARIANTS)


# Save


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
        raise ValueError(f"dtype is {dtype}, but it must be a floating-point dtype, such as torch.float16, or None.")
    folder = as_path(folder, "folder")
    check_separate(folder, "adapter")
    layers = lora_layers(model, required=True)
    settings = {(find_variant(name, layer), getattr(layer.dropout, "p", 0.0)) for name, layer in layers.items()}
    if len(settings) > 1:
        raise ValueError(
            f"The adapters differ in (variant, dropout): {sorted(settings)}; one of each can be saved in one folder."
        )
    factors = {name: drop_start(each) for name, each in split_state(adapter_state(model), "The model").items()}
    config = _make_config(model, factors, base, *settings.pop())
    tensors = {
        f"{_PREFIX}{name}.{_find_ending(layers[name], part)}": tensor.to("cpu", dtype).contiguous()
        for name, each in factors.items()
        for part, tensor in each.tensors.items()
    }
    check_finite(tensors.items(), f"In {dtype}" if dtype else "")
    with atomic_files(folder) as temporary:
        write_json(temporary / CONFIG, config)
        if is_free(folder):
            (temporary / CARD).write_text(make_card(config, history), encoding="utf-8", errors="backslashreplace")
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    return folder


def find_variant(name: str, layer: LoRALayer) -> str:
    """Return PEFT's setting for a layer's variant, or "" for what is saved as plain LoRA.

    Raises:
        ValueError: the format has no name for the variant, so it would be loaded as a different kind of layer.
    """
    for setting, known in [*_VARIANTS.items(), ("", PiSSALinear), ("", lora_class(layer.base))]:
        if known and all(getattr(type(layer), it) is getattr(known, it) for it in ("forward", "_delta", "scaling")):
            return setting
    raise ValueError(
        f"{name!r} is a {type(layer).__name__}, for which the format has no name; store adapter_state(model), or "
        "register the class for its kind of layer."
    )


def drop_start(factors: Factors) -> Factors:
    """Return PiSSA's factors as those of plain LoRA of twice the rank, of the same update; others as they are."""
    tensors = dict(factors.tensors)
    if not {*PiSSALinear.parts} <= tensors.keys():
        return factors
    A, B = PiSSALinear.plain_factors(*(tensors.pop(part) for part in PiSSALinear.parts))
    return Factors(tensors | {"lora_A": A, "lora_B": B}, 2 * factors.alpha, factors.scaling)


def _make_config(
    model: nn.Module, factors: Mapping[str, Factors], base: str | None, variant: str, dropout: float
) -> dict[str, Any]:
    """Return PEFT's settings: the most common rank and alpha, and the exceptions by layer."""
    config = {}
    values = {name: {"r": each.rank, "lora_alpha": each.alpha} for name, each in factors.items()}
    for setting, pattern in _PATTERNS.items():
        config[setting] = mode(value[setting] for value in values.values())
        config[pattern] = {
            f"^{re.escape(name)}": value[setting] for name, value in values.items() if value[setting] != config[setting]
        }
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {
        **config,
        "base_model_name_or_path": base,
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in lora_layers(model).values()),
        "inference_mode": True,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "target_modules": _shortest_targets(model, list(factors)),
        "task_type": "CAUSAL_LM" if hasattr(model, "generate") and not is_encoder_decoder else None,
        **{setting: setting == variant for setting in _VARIANTS},
    }


def _shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Return the shortest list that matches exactly these layers: the last parts of names if possible, or names."""
    endings = {name.rpartition(".")[2] for name in names}
    inside_adapters = tuple(f"{name}." for name in names)
    modules = [name for name, _ in model.named_modules() if not name.startswith(inside_adapters)]
    matches = {name for name in modules if name.rpartition(".")[2] in endings}
    return sorted(endings) if matches == set(names) else names


def _find_ending(layer: LoRALayer, part: str) -> str:
    """Return how the name of a part of a layer's adapter ends in a file."""
    if part == _MAGNITUDE:
        return part
    return part.replace("lora_", "lora_embedding_") if isinstance(layer, LoRAEmbedding) else f"{part}.weight"


# Load


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
    label = "The adapter" if isinstance(source, Mapping) else str(source)
    config, factors, tables = read(source)
    variant = next((layer for setting, layer in _VARIANTS.items() if config.get(setting)), None)
    dropout = config.get("lora_dropout", 0.0)
    modules = dict(model.named_modules())
    adaptable = {name for name, module in modules.items() if lora_class(module, variant)}
    if unknown := factors.keys() - adaptable:
        raise ValueError(
            f"{label} adapts {min(unknown)!r}, but the model has no such layer, or none that "
            f"{(variant or LoRALayer).__name__} adapts; is it the adapter's base model?"
        )
    match_layers(model, list(factors), (), variant)  # which refuses weights that two layers share
    for name, table in tables.items():
        weight: Any = modules[name].weight
        if not torch.equal(table, weight.detach().cpu().to(table.dtype)):
            raise ValueError(f"{label} has its own weight for {name!r}, which is not the model's; load that first.")
    for name, each in factors.items():
        check_fit(name, _try_on(modules[name], variant, dropout), each.tensors, label)
    left_out = _find_targets(config, adaptable) - factors.keys()
    put_on(model, factors, dropout, variant)
    if left_out:
        warnings.warn(
            f"{label} has nothing for {count_noun(len(left_out), 'layer')} that its target_modules match, such as "
            f"{min(left_out, key=_natural_key)!r}, so they stay as they are; is it the adapter's own base model?",
            stacklevel=2,
        )
    return list(lora_layers(model))


def _try_on(module: nn.Module, variant: type[LoRALayer] | None, dropout: float) -> Any:
    """Return an adapted layer of rank 1 on torch's meta device, to be asked for shapes; the module does not change."""
    shapes = {id(tensor): nn.Parameter(tensor.to("meta"), False) for tensor in module.parameters()}
    adapted: Any = lora_class(module, variant)
    return adapted(copy.deepcopy(module, shapes), 1, 1.0, dropout)


def _find_targets(config: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """Return those of the names that the config's target_modules match, where they are names or endings of names.

    Empty where PEFT would leave some of them out by another setting.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(setting) for setting in _NARROWING):
        return set()
    return {name for name in names if any(name_matches(name, target) for target in targets)}


# Read


class Adapter(NamedTuple):
    """An adapter without its model."""

    config: Mapping[str, Any]  # PEFT's settings
    factors: dict[str, Factors]  # by layer
    tables: dict[str, Tensor]  # frozen weights of adapted embeddings, as they were


def read_adapter(folder: str | Path) -> dict[str, Tensor]:
    """Return a saved adapter without its model, in the form of :func:`lora_lab.adapter_state`.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file is damaged or from another save, or the adapter uses a setting that is not supported here.
    """
    return join_state(read(folder).factors)


def read(source: str | Path | Mapping[str, Tensor]) -> Adapter:
    """Return an adapter from a folder or in memory.

    In memory its scaling counts: rsLoRA becomes plain LoRA, and PiSSA plain LoRA of twice the rank. Of a folder, the
    settings count that were saved with the weights, in their header; PEFT's own files have none there. Entries that do
    not change the result may have been edited, such as the path of the base.

    Raises:
        FileNotFoundError, ValueError: as for :func:`load_adapter`.
    """
    if isinstance(source, Mapping):
        factors = {name: drop_start(each) for name, each in split_state(source, "The adapter").items()}
        factors = {name: each._replace(alpha=each.scaling * each.rank) for name, each in factors.items()}
        return Adapter({"use_dora": any(_MAGNITUDE in each.tensors for each in factors.values())}, factors, {})
    folder = as_path(source, "source")
    config = read_config(folder)
    saved = read_carried_json(folder / WEIGHTS, CONFIG) or config
    for name in _MEANING:
        if saved.get(name) != config.get(name):
            raise ValueError(
                f"{folder}: {CONFIG} has {name} {short_repr(config.get(name))}, but the weights were saved with "
                f"{short_repr(saved.get(name))}; save the adapter again."
            )
    layers = _read_tensors(folder)
    tables = {name: parts.pop(_BASE) for name, parts in layers.items() if _BASE in parts}
    ranks, alphas = (find_values(config, setting, layers, str(folder)) for setting in _PATTERNS)
    factors = {}
    for name in sorted(layers, key=_natural_key):
        parts = layers[name]
        if not parts.keys() >= {*LoRALayer.parts}:
            raise ValueError(f"{folder} holds {sorted(parts)} of {name!r}, but A and B are needed; save it again.")
        check_factors(name, parts, ranks[name], str(folder))
        scaling = alphas[name] / (math.sqrt(ranks[name]) if config.get("use_rslora") else ranks[name])
        factors[name] = Factors(parts, alphas[name], scaling)
    return Adapter(config, factors, tables)


def _read_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a folder by layer and part."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} lacks the file {WEIGHTS}; an adapter_model.bin is a pickle, which can run code: if you "
            "trust it, load it in peft, and save it by save_pretrained(folder)."
        )
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({shortened(str(error))}); make or copy it again.") from None
    layers = {}
    for key, tensor in stored.items():
        ending = next((ending for ending in _ENDINGS if key.endswith(f".{ending}")), None)
        if ending is None:
            raise ValueError(f"{path} holds a tensor {key!r} that is not part of any adapter known here.")
        name = key.removeprefix(_PREFIX).removesuffix(f".{ending}")
        layers.setdefault(name, {})[_ENDINGS[ending]] = tensor
    return layers


def find_values(config: Mapping[str, Any], setting: str, names: Collection[str], source: str) -> dict[str, Any]:
    """Return the rank or the alpha of each layer, as the config has them.

    PEFT's rule: the first regular expression of the setting's pattern that matches the end of the name, after a dot.
    The regular expressions are those of pydantic, which no stranger's file can make slow.

    Raises:
        ValueError: a regular expression cannot be read.
    """
    values = dict.fromkeys(names, config[setting])
    for pattern, value in reversed((config.get(_PATTERNS[setting]) or {}).items()):
        try:
            expression = SchemaValidator(core_schema.str_schema(pattern=rf"^(?:(.*\.)?({pattern})$)"))
        except SchemaError:
            raise ValueError(
                f"{source}: {_PATTERNS[setting]} has the regular expression {short_repr(pattern)}, which cannot be "
                "read here; write layers' names, such as 'q_proj'."
            ) from None
        values |= {name: value for name in names if expression.isinstance_python(name)}
    return values


def _natural_key(name: str) -> str:
    """Sorts layer 2 before layer 10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(6), name)


# The config


class _Settings(TypedDict, total=False):
    """What is read here of PEFT's config."""

    peft_type: Required[Literal["LORA"]]
    r: Required[Size]
    lora_alpha: Required[Positive]
    lora_dropout: Dropout
    rank_pattern: dict[str, Size] | None
    alpha_pattern: dict[str, Positive] | None
    target_modules: str | list[str] | None
    base_model_name_or_path: str | None
    use_dora: bool
    use_rslora: bool


_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")  # leave layers out that targets match
# Entries of PEFT's config that do not change what a saved adapter computes, beside those that are read here.
_HARMLESS = {
    *_Settings.__annotations__, *_NARROWING,
    "auto_mapping", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Values of others that do not. Other starts (pissa, olora, ...) subtract from the base.
_HARMLESS_VALUES = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the settings of a saved adapter, with PEFT's names.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: it is damaged, or uses a setting of PEFT that is not supported here.
    """
    folder = as_path(folder, "folder")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {shortened(str(folder))}; give the path of a saved adapter (names of a hub are not "
            "downloaded)."
        )
    finish_save(folder)
    config = check(read_json(folder / CONFIG), _Settings, str(folder / CONFIG))
    for name, value in config.items():
        if value and not (name in _HARMLESS or value in _HARMLESS_VALUES.get(name, ())):
            raise ValueError(
                f"{folder} sets {shortened(name)} to {short_repr(value)}, which changes the result and is not "
                "supported here; merge it in peft, and load the merged model."
            )
    return config


# Several adapters as one


@torch.no_grad()
def combine(
    adapters: Sequence[str | Path | Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Return one adapter whose update is the weighted sum of those of several adapters of the same base.

        W0 + sum_i w_i s_i B_i A_i

    The factors stand side by side, so the update is the sum to rounding, and its rank is the sum of the ranks;
    :func:`lora_lab.adapters.resize` lowers it. PEFT's ``add_weighted_adapter`` calls this "cat", and with the
    resizing "svd". A layer that only some of them adapt gets the sum of theirs.

    Args:
        adapters: folders, or what :func:`read_adapter` or :func:`lora_lab.adapter_state` returned; of any kind but
            DoRA.
        weights: one finite number for each adapter; None counts each once. Below 0 subtracts an adapter.

    Returns:
        The adapter with scaling 1, for :func:`load_adapter` or :func:`lora_lab.adapters.switch`.

    Raises:
        ValueError: there are no adapters; the weights do not fit; an adapter is of DoRA, whose updates do not add up; a
            number of one is NaN or infinite; or the shapes in a layer differ.
    """
    weights = [1.0 for _ in adapters] if weights is None else [check(weight, Number, "weight") for weight in weights]
    if not adapters or len(weights) != len(adapters):
        raise ValueError(f"There are {len(adapters)} adapters and {len(weights)} weights; give each adapter one.")
    layers = defaultdict(list)
    for weight, adapter in zip(weights, adapters, strict=True):
        factors = read(adapter).factors
        check_plain(factors)
        for name, (tensors, _, scaling) in factors.items():
            A, B = (
                tensors[part].to(torch.promote_types(tensors[part].dtype, torch.float32)) for part in LoRALayer.parts
            )
            layers[name].append((weight * scaling * A, B))  # (r, in), (out, r)
    factors = {}
    for name, terms in layers.items():
        if len({(A.shape[1:], len(B), B.shape[2:]) for A, B in terms}) > 1:
            raise ValueError(f"The adapters of {name!r} are of layers of different shapes; combine those of one base.")
        A = torch.cat([A for A, _ in terms])  # (r1 + r2, in)
        B = torch.cat([B for _, B in terms], dim=1)  # (out, r1 + r2)
        factors[name] = Factors({"lora_A": A, "lora_B": B}, float(len(A)), 1.0)
    return join_state(factors)


# The model card, which the Hugging Face Hub reads, and people too

_MARK = (
    "<!-- This card is written by lora_lab, and again when the adapter is saved. Remove this line to keep yours. -->"
)


def is_free(folder: str | Path) -> bool:
    """Return whether a card may be written to a folder: it has none, or one by lora_lab that nobody has claimed."""
    path = Path(folder) / CARD
    return not path.exists() or (path.is_file() and _MARK in path.read_text(encoding="utf-8", errors="replace"))


def make_card(config: Mapping[str, Any], history: History | None = None) -> str:
    """Return the card's text.

    Args:
        config: the adapter's settings, with PEFT's names.
        history: of the training run; None leaves out how it was trained.
    """
    base = config["base_model_name_or_path"]
    on_hub = base and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) and not Path(base).exists()  # which takes names alone
    rows = dict(config)
    if history is not None:
        task, method = history.task, history.method
        rows |= {"task": task["name"], "fingerprint": task["fingerprint"], "method": method["name"]}
        rows |= {"continued from": method.get("start", "the base"), **history.settings}
        rows["trainable_parameters"] = history.trainable_parameters
        for column in ("validation_loss", "off_domain_loss"):
            if losses := history.curve(column)[1]:
                rows[f"{column}, before and after"] = f"{losses[0]:.3f}, {losses[-1]:.3f}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    front = f"base_model: {base}\n" if on_hub else ""
    return f"""---
{front}library_name: peft
tags:
- lora
- lora_lab
---
{_MARK}

# LoRA adapter

| | |
|---|---|
{table}

## Use

The folder is in PEFT's format. With lora_lab: `lora_lab.load_adapter(model, folder)`; with PEFT:
`peft.PeftModel.from_pretrained(model, folder)`.

Saved with lora_lab {version()}, torch {torch.__version__}, Python {platform.python_version()}.
"""


# Adapters that are installed with lora_lab

_DATA = Path(__file__).parent / "data"  # its README.md has their training and their scores


def shipped(name: str) -> Path:
    """Return the folder of an adapter that is installed: ``load_adapter(model, shipped("lighthouse-keeper"))``.

    All are adapters of SmolLM2-135M-Instruct, which :func:`lora_lab.load_pretrained` loads by default.

    Raises:
        ValueError: there is no adapter of that name.
    """
    names = sorted(path.parent.name for path in _DATA.glob(f"*/{CONFIG}"))
    if name not in names:
        raise ValueError(f"There is no shipped adapter {name!r}; choose one of {', '.join(names)}.")
    return _DATA / name
