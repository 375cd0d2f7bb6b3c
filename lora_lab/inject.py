"""Put adapters on the layers of a model, merge them, and copy their tensors."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lab.layers import QuantizedLayer, is_linear, lora_class
from lora_lab.lora import LoRALayer, check_numbers
from lora_lab.system.numbers import check_finite, is_list, plain
from lora_lab.system.wording import short_repr, shortened

MERGED_FORMS = ("dequantised", "blocks", "full-precision")
_RANK_OF_ANY_LAYER = 1024  # up to here, and up to a weight's longer side, no rank fills a machine's memory


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

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()
    layer: ClassVar[type[LoRALayer] | None] = None  # the class of the adapters, as for :func:`inject`

    def __post_init__(self) -> None:
        numbers = check_numbers(self.rank, self.alpha, self.dropout)
        values: dict[str, Any] = dict(zip(("rank", "alpha", "dropout"), numbers, strict=True))
        if isinstance(self.targets, str) and self.targets != "all-linear":
            raise ValueError(
                f"targets is {self.targets!r}, but it must be 'all-linear' or a list of names; "
                f"write [{self.targets!r}] for one name."
            )
        if not isinstance(self.targets, str):
            values["targets"] = check_names("targets", self.targets)
        values["exclude"] = check_names("exclude", self.exclude)
        if len(self.targets) == 0:
            raise ValueError("targets is empty, so nothing would be adapted; name at least one layer or 'all-linear'.")
        for name, value in values.items():
            object.__setattr__(self, name, value)  # of Python, which JSON can hold


def check_names(argument: str, names: Any) -> tuple[str, ...]:
    """Return names as a tuple, which a frozen config can hold and JSON stores as a list; those of a set are sorted.

    Raises:
        ValueError: the argument is no list of names, but for example one name.
    """
    if isinstance(names, str):
        raise ValueError(f"{argument} is {names!r}, but it must be a list of names; write [{names!r}].")
    if not is_list(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{argument} is {short_repr(names)}, but it must be a list of names.")
    return tuple(map(str, sorted(names) if isinstance(names, Set) else names))  # numpy has texts of its own


def _check_type(argument: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise ValueError(f"{argument} is {short_repr(value)}, but it must be an instance of {expected.__name__}.")


def lora_layers(model: nn.Module, required: bool = False) -> dict[str, LoRALayer]:
    """The adapted layers of ``model`` by name, in the model's order.

    Args:
        required: raise an error for a model without adapters, in place of returning an empty dictionary.

    Raises:
        ValueError: ``required`` is true and the model has no adapters, or the model is something else, such as a path.
    """
    _check_type("model", model, nn.Module)
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
        seed: of the generator that every A is drawn from, in the model's order.
        layer: the class of the adapters, such as a variant of ``lora_lab.variants``; by default the class
            that ``lora_lab.layers`` has registered for each kind of layer.

    Returns:
        The names of the adapted layers.

    Raises:
        ValueError: the model already has adapters, nothing matches, a target matches nothing or a module that cannot be
            adapted, a name in ``exclude`` matches nothing, a matched weight is shared by two modules, or the rank is
            far above that of any matched weight. The model is then left unchanged.

    Warns of a rank that is above the shorter side of every matched weight.
    """
    require_no_adapters(model)
    _check_type("config", config, LoRAConfig)
    if layer is not None and not (isinstance(layer, type) and issubclass(layer, LoRALayer)):
        raise ValueError(f"layer is {short_repr(layer)}, but it must be a class of adapters, such as DoRALinear.")
    seed = plain(seed)
    if isinstance(seed, bool) or not (isinstance(seed, int) and -(2**63) <= seed < 2**63):
        raise ValueError(f"seed is {short_repr(seed)}, but it must be a whole number of 64 bits.")
    generator = torch.Generator().manual_seed(seed)
    classes = match_layers(model, config.targets, config.exclude, config.layer if layer is None else layer)
    shapes = [_shape(model.get_submodule(name)) for name in classes]
    largest, useful = max(map(max, shapes)), max(min(out, math.prod(rest)) for out, *rest in shapes)
    if config.rank > (most := max(largest, _RANK_OF_ANY_LAYER)):
        raise ValueError(
            f"rank is {config.rank}, but it must be at most {most} here, where no weight has a side longer than "
            f"{largest}; a rank as large as the shorter side already holds every change of a matrix."
        )
    if config.rank > useful:
        warnings.warn(
            f"rank is {config.rank}, but no weight adapted here has a shorter side above {useful}: rank {useful} holds "
            "every change of them already, and a higher one only costs memory and time.",
            stacklevel=2,
        )
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
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        replace(model, name, adapter)
    return list(adapters)


def require_no_adapters(model: nn.Module) -> None:
    """Raise ValueError if the model has adapters, because a second set would be trained on top of the first."""
    if layers := lora_layers(model):
        raise ValueError(
            f"The model already has adapters on {len(layers)} layers; merge them with merge(model), train them further "
            "with ContinueLoRA(), or start from a freshly loaded model."
        )


def merge(model: nn.Module, into: str = "dequantised", base: nn.Module | None = None) -> list[str]:
    """Replace each adapted layer by a plain frozen one, in place, and return the names of the adapted layers.

    Over dense weights there is one result. Over a quantised base (QLoRA) there are three, which are different models:

        into="dequantised"                  W_quantised + update, dense. Exact: the model computes what it did before.
        into="blocks"                       the same matrix, quantised again in the base's format: as small as the base
                                            was, but not exact, since it is rounded a second time.
        into="full-precision", base=full    W_full + update, dense. Not exact either, since the update was trained on
                                            another weight than W_full.

    Measured on SmolLM2-135M (NF4, LoRA of rank 8, 40 steps on Python's manual; medians of three seeds on 2 cores of an
    Intel Xeon, ``benchmarks/qlora_merge.py``): "dequantised" keeps the validation loss of 3.27; "blocks" raises it to
    3.93, nearly the 3.94 of the base in NF4, since a change smaller than half a gap between two levels is rounded away;
    and "full-precision" lowers it to 3.23. The largest changes of a logit are 0.0001 (float32's rounding), 19 and 15.
    Quantised to NF4 (:func:`lora_lab.quantize_nf4`), the last of these models has 3.31: better than "blocks".

    Every class brings its own forms: the first is what the adapter's :meth:`LoRALayer.merged` returns, the second what
    its base's :meth:`lora_lab.layers.QuantizedLayer.requantized` makes of that matrix, and the third is ``merged`` of
    the adapter over the layer of ``base`` (DoRA's lengths and PiSSA's start stay those of the quantised base).

    All new weights are made before the first old one goes, so that an error leaves the model whole: until then memory
    holds the adapted layers' weights twice.

    Args:
        into: "dequantised", "blocks" (adapted layers that are not quantised are merged as usual), or "full-precision".
        base: with "full-precision", the model before it was quantised, without adapters. Copies of its layers, in the
            precision in which the model computes, replace all adapted and all quantised ones, so that nothing stays
            quantised; ``base`` does not change.

    Raises:
        ValueError: the model has no adapters, ``into`` is unknown, ``base`` is missing or superfluous or does not have
            the model's layers in full precision, no adapted layer is in blocks, or a number of an adapter or of a
            merged weight is NaN or infinite. The model is then left unchanged.
    """
    layers = lora_layers(model, required=True)
    check_finite(adapter_state(model).items())
    if not isinstance(into, str) or into not in MERGED_FORMS:
        value = repr(into) if isinstance(into, str) else f"a {type(into).__name__}"
        raise ValueError(f"into is {value}, but it must be one of {', '.join(map(repr, MERGED_FORMS))}.")
    if (base is None) == (into == "full-precision"):
        problem = "is missing" if base is None else f"is a {type(base).__name__}"
        raise ValueError(
            f"into is {into!r} and base {problem}; pass the model before it was quantised as base with "
            "into='full-precision', and only then."
        )
    merged: dict[str, Any]
    if base is not None:
        _check_type("base", base, nn.Module)
        merged = _merged_in_full_precision(model, layers, base)
    elif into == "blocks":
        merged = _merged_in_blocks(layers)
    else:
        merged = {name: layer.merged() for name, layer in layers.items()}
    check_finite((f"{name}.weight", layer.weight) for name, layer in merged.items())
    for name, layer in merged.items():  # all are made by now, so that an error leaves the model whole
        replace(model, name, layer)
    return list(layers)


def _merged_in_blocks(layers: dict[str, LoRALayer]) -> dict[str, nn.Module]:
    if not any(isinstance(layer.base, QuantizedLayer) for layer in layers.values()):
        raise ValueError(
            f"into is 'blocks', but none of the model's {len(layers)} adapted layers is in blocks; call merge(model), "
            "and then quantize_nf4(model) if you want blocks."
        )
    # The update is added before the sum is rounded to the precision in which the model computes.
    return {
        name: layer.base.requantized(layer.base.weight + layer.delta()).train(layer.training)  # (48, 64)
        if isinstance(layer.base, QuantizedLayer)
        else layer.merged()
        for name, layer in layers.items()
    }


def _merged_in_full_precision(model: nn.Module, layers: dict[str, LoRALayer], base: nn.Module) -> dict[str, nn.Module]:
    replaced: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if name in layers or (isinstance(module, QuantizedLayer) and name.removesuffix(".base") not in layers)
    }
    full_layers = dict(base.named_modules(remove_duplicate=False))
    for name, layer in replaced.items():
        _check_full_layer(name, layer, full_layers.get(name))
    copies: dict[int, Any] = {}  # so that layers that share a matrix in base share its copy
    merged = {}
    for name, layer in replaced.items():
        full: Any = copy.deepcopy(full_layers[name], copies)
        dtype = layer.weight.dtype
        full.to(next(layer.parameters()).device, torch.promote_types(full.weight.dtype, dtype))
        if name in layers:
            full = copy.deepcopy(layer, {id(layer.base): full}).merged()  # the same adapter over the other base
        merged[name] = full.to(dtype).requires_grad_(False).train(layer.training)
    return merged


def _shape(layer: Any) -> tuple[int, ...]:
    """The shape of a layer's weight, which is not dequantised for it."""
    return tuple(layer.shape if isinstance(layer, QuantizedLayer) else layer.weight.shape)


def _check_full_layer(name: str, layer: Any, full: nn.Module | None) -> None:
    """Raise ValueError if ``full`` cannot take the place of an adapted or quantised layer."""
    adapted = isinstance(layer, LoRALayer)
    before = layer.base if adapted else layer
    shape = _shape(before)
    problem = None
    if full is None:
        problem = "is missing in it"
    elif isinstance(full, LoRALayer | QuantizedLayer):
        problem = f"is {'adapted' if isinstance(full, LoRALayer) else 'quantised'} there too"
    elif (adapted and lora_class(full, type(layer)) is None) or (weight := full._parameters.get("weight")) is None:
        problem = f"is a {type(full).__name__} there, which cannot take its place"
    elif tuple(weight.shape) != shape:
        problem = f"has shape {tuple(weight.shape)} there, but {shape} in the model"
    elif (full._parameters.get("bias") is None) != (before._parameters.get("bias") is None):
        problem = "has a bias in only one of the two"
    if problem is not None:
        raise ValueError(f"base does not fit the model: {name!r} {problem}; pass the model before it was quantised.")


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that torch.compile has wrapped, whose layers have their own names; any other model as it is."""
    return getattr(model, "_orig_mod", model)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the adapters' tensors: ``<layer>.lora_A`` (rank, in), ``<layer>.lora_B`` (out, rank), a variant's
    further ones, and the scalars ``<layer>.alpha`` and ``<layer>.scaling``.

    Raises:
        ValueError: the model has no adapters.
    """
    state: dict[str, Tensor] = {}
    for name, layer in lora_layers(uncompiled(model), required=True).items():
        state |= {f"{name}.{part}": getattr(layer, part).detach().clone() for part in layer.parts}
        for scalar in ("alpha", "scaling"):  # both, because variants differ in the scaling of an alpha
            state[f"{name}.{scalar}"] = torch.tensor(getattr(layer, scalar), dtype=torch.float64)  # ()
    return state


def output_head(model: nn.Module) -> nn.Module | None:
    """What ``model.get_output_embeddings()`` returns, as in transformers; None if the model has no such method."""
    method = getattr(model, "get_output_embeddings", None)
    return None if method is None else method()


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
    """Names of the layers to adapt and the class that adapts each, in the model's order.

    Args:
        targets: "all-linear" (all layers registered as linear, except the output head), or names and endings of names.
        exclude: names or endings of names of layers to leave out.
        layer: as in :func:`lora_class`.

    Raises:
        ValueError: nothing matches, a target matches nothing or a module that cannot be adapted, a name in ``exclude``
            matches nothing, or a matched weight is shared by two modules.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    left_out = excluded(modules, exclude)
    classes = {
        name: kind
        for name, module in modules.items()
        if name not in left_out and (kind := lora_class(module, layer)) is not None
    }
    if targets == "all-linear":
        head = output_head(model)
        names = [name for name in classes if is_linear(modules[name]) and modules[name] is not head]
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no linear layer inside it to adapt; "
                f"its output head and what exclude={list(exclude)} names are left out."
            )
        _warn_of_unadapted_weights(
            {name: module for name, module in modules.items() if name not in classes and name not in left_out}
        )
    else:
        for target in targets:
            _check_target(target, modules, classes, left_out)
        names = [name for name in classes if any(name_matches(name, target) for target in targets)]
        if not names:
            raise ValueError(
                f"exclude is {list(exclude)}, which leaves out every layer that targets={list(targets)} names, so "
                "nothing would be adapted; exclude fewer."
            )
    _check_unshared(model, modules, names)
    return {name: classes[name] for name in names}


def excluded(names: Collection[str], exclude: Sequence[str]) -> set[str]:
    """Those of the names that are in ``exclude``, or end in a dot and an entry of it.

    Raises:
        ValueError: an entry matches none of the names.
    """
    for ending in exclude:
        if not any(name_matches(name, ending) for name in names):
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ValueError(
                f"exclude has {ending!r}, which matches no module; names here end in {shortened(endings)}."
            )
    return {name for name in names if any(name_matches(name, ending) for ending in exclude)}


def name_matches(name: str, ending: str) -> bool:
    """Whether a module's full name is ``ending`` or ends in a dot and ``ending``."""
    return name == ending or name.endswith("." + ending)


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """A model's stack of blocks by name, lowest first: the entries of its longest ``nn.ModuleList``."""
    lists = [(len(module), name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=lambda pair: pair[0], default=(0, ""))[1]
    return {name: m for name, m in model.named_modules() if longest and name.rpartition(".")[0] == longest}


def last_blocks(model: nn.Module, count: int) -> list[str]:
    """The linear layers of the last ``count`` blocks, for use as ``targets``: no gradient is computed below them.

    Raises:
        ValueError: the model has fewer blocks, or none.
    """
    names = list(transformer_blocks(model))
    if not 1 <= count <= len(names):
        raise ValueError(
            f"count is {count}, but {type(model).__name__} is a stack of {len(names)} blocks; "
            "use at least 1 and at most as many as it has."
        )
    return [
        layer
        for layer in match_layers(model, "all-linear", ())
        if any(layer.startswith(f"{name}.") for name in names[len(names) - count :])
    ]


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


def _check_unshared(model: nn.Module, modules: dict[str, nn.Module], names: list[str]) -> None:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    owners = Counter(id(tensor) for _, tensor in tensors)
    for name in names:
        tensors_of_layer = [*modules[name].parameters(recurse=False), *modules[name].buffers(recurse=False)]
        if any(owners[id(tensor)] > 1 for tensor in tensors_of_layer):
            raise ValueError(
                f"The weight of {name!r} is shared with another module, so an adapter would change one of the two "
                "and not the other; leave it out of targets."
            )


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
        listed = ", ".join(weights[:3]) + (f" and {len(weights) - 3} more" if len(weights) > 3 else "")
        warnings.warn(
            f"'all-linear' does not reach weights outside the layers it can adapt, so they stay frozen: {listed}.",
            stacklevel=4,
        )
