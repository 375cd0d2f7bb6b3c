"""Put adapters on the layers of a model, merge them, and copy their tensors."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lab.layers import QuantizedLayer, is_linear, lora_class
from lora_lab.lora import LoRALayer
from lora_lab.system.schema import Dropout, Positive, Size, check_fields, check_finite
from lora_lab.system.wording import short_repr, shortened

MERGED_FORMS = ("dequantised", "blocks", "full-precision")
# A higher one is refused unless a weight has a side as long: a mistyped rank would fill the memory.
_ALWAYS_ALLOWED_RANK = 1024


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers to adapt, and the settings of their adapters.

    Args:
        rank: inner dimension r of the update B A, at least 1.
        alpha: the update is multiplied by ``alpha / rank``.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1).
        targets: "all-linear", or module names or endings of names, such as ``["q_proj", "v_proj"]``.
        exclude: names or endings of names of layers to leave out, whatever ``targets`` is.

    Raises:
        ValueError: a value is out of range, or a list of names is empty.
    """

    rank: Size = 8
    alpha: Positive = 16.0
    dropout: Dropout = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()
    layer: ClassVar[type[LoRALayer] | None] = None  # a subclass of LoRALayer, as for :func:`inject`

    def __post_init__(self) -> None:
        if not (isinstance(self.targets, str) and self.targets == "all-linear"):
            object.__setattr__(self, "targets", check_names("targets", self.targets))
        object.__setattr__(self, "exclude", check_names("exclude", self.exclude))
        check_fields(self)
        if not self.targets:
            raise ValueError("targets is empty, so nothing would be adapted; name at least one layer or 'all-linear'.")


def check_names(argument: str, names: Collection[str]) -> tuple[str, ...]:
    """Return names as a tuple, which a frozen config can hold and JSON stores as a list; those of a set are sorted.

    Raises:
        ValueError: the argument is no list of names, but for example one name.
    """
    is_list = isinstance(names, Collection) and not isinstance(names, str)
    if not is_list or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{argument} is {short_repr(names)}, but it must be a list of names, such as ['head'].")
    return tuple(map(str, sorted(names) if isinstance(names, Set) else names))  # numpy has texts of its own


def lora_layers(model: nn.Module, required: bool = False) -> dict[str, LoRALayer]:
    """Return the adapted layers of ``model`` by name, in the model's order.

    Args:
        required: raise an error for a model without adapters, in place of returning an empty dictionary.

    Raises:
        ValueError: ``required`` is true and the model has no adapters.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    if required and not layers:
        raise ValueError("The model has no adapters; call inject(model, LoRAConfig(...)) first.")
    return layers


def inject(model: nn.Module, config: LoRAConfig, seed: int = 0, layer: type[LoRALayer] | None = None) -> list[str]:
    """Freeze ``model`` and put an adapter on each layer that ``config`` names, in place.

    "all-linear" means every linear layer except the output head (see :func:`output_head`). What ``config.exclude``
    names is left out.

    Args:
        config: the settings; or a method, such as ``DoRA(rank=8)``, whose class of adapters is then the default.
        seed: of the generator that random factors are drawn from, in the model's order.
        layer: the class of the adapters (a class, not an instance), such as ``lora_lab.variants.DoRALinear``; by
            default the class that ``lora_lab.layers`` has registered for each kind of layer.

    Returns:
        The names of the adapted layers.

    Raises:
        ValueError: the model already has adapters, nothing matches, a target matches nothing or a module that cannot be
            adapted, a name in ``exclude`` matches no layer, a matched weight is shared by two modules, or the rank is
            above 1,024 and above every side of the matched weights. The model is then left unchanged.

    Warns of a rank that is above the shorter side of every matched weight.
    """
    require_no_adapters(model)
    generator = torch.Generator().manual_seed(int(seed))
    classes = match_layers(model, config.targets, config.exclude, config.layer if layer is None else layer)
    _check_rank(config.rank, [_shape(model.get_submodule(name)) for name in classes])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = {}
    try:
        for name, adapter_class in classes.items():
            base = model.get_submodule(name)
            adapter = adapter_class(base, config.rank, config.alpha, config.dropout, generator)
            adapters[name] = adapter.train(base.training)
    except BaseException:  # KeyboardInterrupt too
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    model.requires_grad_(False)  # the adapters are not in it yet
    for name, adapter in adapters.items():
        replace(model, name, adapter)
    return list(adapters)


def _check_rank(rank: int, shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse a rank above 1,024 and above every side of the weights; warn of one that no update of them can have."""
    longest = max(map(max, shapes))
    if rank > (most := max(longest, _ALWAYS_ALLOWED_RANK)):
        raise ValueError(f"rank is {rank}, but at most {most} here, where no weight has a side longer than {longest}.")
    useful = max(min(out, math.prod(rest)) for out, *rest in shapes)  # the highest rank that an update can have
    if rank > useful:
        warnings.warn(f"rank is {rank}, but a rank of {useful} can already express any update.", stacklevel=3)


def require_no_adapters(model: nn.Module) -> None:
    """Raise ValueError if the model has adapters, because a second set would be trained on top of the first."""
    if layers := lora_layers(model):
        raise ValueError(
            f"The model already has adapters on {len(layers)} layers; merge them with merge(model), train them further "
            "with ContinueLoRA(), or start from a freshly loaded model."
        )


def merge(model: nn.Module, into: str = "dequantised", base: nn.Module | None = None) -> list[str]:
    """Replace each adapted layer by a plain frozen one, in place, and return the names of the adapted layers.

    Over dense weights there is one result. Over a quantised base (QLoRA) there are three, which are different models
    (measured in docs/package.md):

        into="dequantised"                  W_quantised + update, dense: computes what the adapted model did.
        into="blocks"                       the same matrix, quantised again as the base was: small, but rounded twice.
        into="full-precision", base=full    W_full + update, dense: the update was trained on W_quantised, not on this.

    The layers are replaced when all are made, so an error changes nothing; memory holds both until then.

    Args:
        into: "dequantised", "blocks" (adapted layers that are not quantised are merged as usual), or "full-precision".
        base: with "full-precision", the model before it was quantised, without adapters; it does not change. Copies of
            its layers, in the model's precision, replace all adapted and all quantised layers.

    Raises:
        ValueError: the model has no adapters, ``into`` is unknown, ``base`` is missing or superfluous or does not have
            the model's layers in full precision, or a number of an adapter or of a merged weight is NaN or infinite.
            The model is then left unchanged.
    """
    layers = lora_layers(model, required=True)
    check_finite(adapter_state(model).items())
    if into not in MERGED_FORMS or (base is None) == (into == "full-precision"):
        raise ValueError(f"into is {into!r}, but it must be one of {MERGED_FORMS}; only the last takes a base.")
    merged: dict[str, Any]
    if base is not None:
        merged = _merge_into(base, model, layers)
    elif into == "blocks":
        merged = {name: _merge_in_blocks(layer) for name, layer in layers.items()}
    else:
        merged = {name: layer.merged() for name, layer in layers.items()}
    check_finite((f"{name}.weight", layer.weight) for name, layer in merged.items())
    for name, layer in merged.items():  # all are made by now, so that an error leaves the model whole
        replace(model, name, layer)
    return list(layers)


def _merge_in_blocks(layer: LoRALayer) -> Any:
    """Return the merged layer in the format of its base: quantised again if the base was, else dense."""
    if not isinstance(layer.base, QuantizedLayer):
        return layer.merged()
    # The update is added before the sum is rounded to the precision in which the model computes.
    return layer.base.requantize(layer.base.weight + layer.delta()).train(layer.training)  # (48, 64)


def _merge_into(base: nn.Module, model: nn.Module, layers: dict[str, LoRALayer]) -> dict[str, Any]:
    """Return what replaces each adapted and each quantised layer: a copy from ``base``, with its adapter merged.

    Adapters keep what they took from the quantised base, such as DoRA's lengths and PiSSA's start.
    """
    quantised = [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]
    unadapted = [name for name in quantised if name.removesuffix(".base") not in layers]
    full_layers = dict(base.named_modules(remove_duplicate=False))
    copies = {}  # deepcopy's memo: layers that share a matrix in base share its copy
    merged = {}
    for name in (*layers, *unadapted):
        layer: Any = model.get_submodule(name)
        full: Any = full_layers.get(name)
        if not _can_replace(full, layer):
            raise ValueError(f"base is not the model before it was quantised: its {name!r} is {full}.")
        full = copy.deepcopy(full, copies)
        dtype = layer.weight.dtype
        full.to(next(layer.parameters()).device, torch.promote_types(full.weight.dtype, dtype))
        if name in layers:
            full = copy.deepcopy(layer, {id(layer.base): full}).merged()  # the same adapter over the other base
        merged[name] = full.to(dtype).requires_grad_(False).train(layer.training)
    return merged


def _shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight, which is not dequantised for it."""
    return tuple(layer.shape if isinstance(layer, QuantizedLayer) else layer.weight.shape)


def _can_replace(full: nn.Module | None, layer: Any) -> bool:
    """Return whether a layer of the base given to ``merge`` fits in the place of an adapted or quantised one."""
    before = layer.base if isinstance(layer, LoRALayer) else layer
    if full is None or full._parameters.get("weight") is None or _shape(full) != _shape(before):
        return False
    if isinstance(layer, LoRALayer) and not lora_class(full, type(layer)):
        return False
    return (full._parameters.get("bias") is None) == (before._parameters.get("bias") is None)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile has wrapped, whose layers have their own names; any other model as it is."""
    return getattr(model, "_orig_mod", model)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the adapters' tensors: ``<layer>.lora_A`` (rank, in), ``<layer>.lora_B`` (out, rank), those of
    a variant, and the scalars ``<layer>.alpha`` and ``<layer>.scaling``.

    Raises:
        ValueError: the model has no adapters.
    """
    state = {}
    for name, layer in lora_layers(uncompiled(model), required=True).items():
        state |= {f"{name}.{part}": getattr(layer, part).detach().clone() for part in layer.parts}
        for scalar in ("alpha", "scaling"):  # both, because variants differ in the scaling of an alpha
            state[f"{name}.{scalar}"] = torch.tensor(getattr(layer, scalar), dtype=torch.float64)  # ()
    return state


def output_head(model: nn.Module) -> nn.Module | None:
    """Return ``model.get_output_embeddings()``, as transformers calls the head; None without such a method."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule called ``name`` by ``module``.

    Raises:
        ValueError: the name is empty, which means the model itself.
    """
    if not name:
        raise ValueError(f"The model is itself a {type(model).__name__}; only layers inside a model can be replaced.")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def match_layers(
    model: nn.Module, targets: str | Sequence[str], exclude: Sequence[str], layer: type[LoRALayer] | None = None
) -> dict[str, type[LoRALayer]]:
    """Return the names of the layers to adapt and the class that adapts each, in the model's order.

    Args:
        targets: "all-linear" (all layers registered as linear, except the output head), or names and endings of names.
        exclude: names or endings of names of layers to leave out.
        layer: a class of adapters, as in :func:`lora_class`.

    Raises:
        ValueError: nothing matches, a target matches nothing or a module that cannot be adapted, a name in ``exclude``
            matches no layer, or a matched weight is shared by two modules.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    left_out = find_excluded(modules, exclude)
    classes = {
        name: kind for name, module in modules.items() if name not in left_out and (kind := lora_class(module, layer))
    }
    if targets == "all-linear":
        head = output_head(model)
        names = [name for name in classes if is_linear(modules[name]) and modules[name] is not head]
        known = classes.keys() | left_out
        _warn_of_unadapted_weights({name: module for name, module in modules.items() if name not in known})
    else:
        for target in targets:
            _check_target(target, modules, classes, left_out)
        names = [name for name in classes if any(name_matches(name, target) for target in targets)]
    if not names:
        raise ValueError(f"targets={targets} and exclude={exclude} leave nothing of a {type(model).__name__} to adapt.")
    check_own_weights(model, {name: modules[name] for name in names})
    return {name: classes[name] for name in names}


def find_excluded(modules: Mapping[str, nn.Module], exclude: Sequence[str]) -> set[str]:
    """Return the names of the layers that are in ``exclude``, or end in a dot and an entry of it.

    Raises:
        ValueError: an entry matches no layer; one that matches only a block of layers would leave nothing out.
    """
    names = [name for name, module in modules.items() if module._parameters or module._buffers]
    for ending in exclude:
        if not any(name_matches(name, ending) for name in names):
            endings = shortened(", ".join(sorted({name.rpartition(".")[2] for name in names})))
            raise ValueError(f"exclude has {ending!r}, which matches no layer; names here end in {endings}.")
    return {name for name in names if any(name_matches(name, ending) for ending in exclude)}


def name_matches(name: str, ending: str) -> bool:
    """Return whether a module's full name is ``ending`` or ends in a dot and ``ending``."""
    return name == ending or name.endswith("." + ending)


def _check_target(
    target: str, modules: dict[str, nn.Module], classes: dict[str, type[LoRALayer]], left_out: set[str]
) -> None:
    matches = [name for name in modules if name_matches(name, target)]
    if not matches:
        endings = sorted({name.rpartition(".")[2] for name in classes})
        raise ValueError(f"Target {target!r} matches no module; the layers that can be adapted here end in {endings}.")
    if unsupported := [name for name in matches if name not in classes and name not in left_out]:
        kinds = sorted({type(modules[name]).__name__ for name in classes})
        raise ValueError(
            f"Target {target!r} matches {unsupported[0]!r}, a {type(modules[unsupported[0]]).__name__}, which cannot "
            f"be adapted here; the kinds of layer in this model that can be adapted are {kinds}."
        )


def check_own_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a weight of one of the layers belongs to another module too."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    owners = Counter(id(tensor) for _, tensor in tensors)
    for name, layer in layers.items():
        held = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        if any(owners[id(tensor)] > 1 for tensor in held):
            raise ValueError(f"The weight of {name!r} is shared with another module; leave it out, or exclude it.")


def _warn_of_unadapted_weights(modules: dict[str, nn.Module]) -> None:
    weights = []
    for name, module in modules.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            experts = parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d)
            joint_projection = parameter.ndim == 2 and isinstance(module, nn.MultiheadAttention)
            unknown_linear = parameter.ndim == 2 and is_linear(module)
            if experts or joint_projection or unknown_linear:
                weights.append(f"{name}.{parameter_name}")
    if weights:
        names = shortened(", ".join(weights))
        warnings.warn(f"'all-linear' does not reach these weights, so they stay frozen: {names}.", stacklevel=4)
