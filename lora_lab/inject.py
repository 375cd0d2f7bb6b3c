"""Put adapters onto a model and take them off again: which layers, with which settings."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lab.layers import is_linear, lora_class
from lora_lab.lora import LoRALayer, check_numbers


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt, and how strongly.

    Args:
        rank: inner dimension r of the update B A, at least 1.
        alpha: strength; the update is multiplied by ``alpha / rank``.
        dropout: probability of dropping an entry of the adapter's input, in [0, 1).
        targets: "all-linear", or module names or endings of names, such as ``["q_proj", "v_proj"]``.
        exclude: names or endings of names that "all-linear" leaves alone.

    Raises:
        ValueError: a value is out of range, or a list of names is empty.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_numbers(self.rank, self.alpha, self.dropout)
        if isinstance(self.targets, str) and self.targets != "all-linear":
            raise ValueError(
                f"targets is {self.targets!r}, but it must be 'all-linear' or a list of names; "
                f"write [{self.targets!r}] for one name."
            )
        if isinstance(self.exclude, str):
            raise ValueError(f"exclude is {self.exclude!r}, but it must be a list of names; write [{self.exclude!r}].")
        if not self.targets:
            raise ValueError("targets is empty, so nothing would be adapted; name at least one layer or 'all-linear'.")


def lora_layers(model: nn.Module, required: bool = False) -> dict[str, LoRALayer]:
    """The adapted layers of ``model`` by name, in the model's own order.

    Args:
        required: a model without adapters is an error, in place of an empty dictionary.

    Raises:
        ValueError: there are none, and they are required.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    if required and not layers:
        raise ValueError("The model has no adapters; call inject(model, LoRAConfig(...)) first.")
    return layers


def inject(model: nn.Module, config: LoRAConfig, seed: int = 0, layer: type[LoRALayer] | None = None) -> list[str]:
    """Freeze ``model`` and put an adapter on each layer that ``config`` names, in place.

    "all-linear" means every linear layer but the output head (what ``model.get_output_embeddings()``
    returns, if the model has that method) and the names in ``config.exclude``.

    Args:
        seed: seeds a generator of its own, from which every A is drawn in the model's order.
        layer: the class of the adapters, such as a variant of ``lora_lab.variants``; None takes the
            one that ``lora_lab.layers`` has registered for each kind of layer.

    Returns:
        The names of the layers now adapted.

    Raises:
        ValueError: the model has adapters already, nothing matches, a target matches nothing or
            something that cannot be adapted, or a matched weight belongs to two modules. The
            model is then left as it was.
    """
    require_no_adapters(model)
    classes = match_layers(model, config.targets, config.exclude, layer)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    adapted = {}
    try:
        for name, made in classes.items():
            base = model.get_submodule(name)
            adapter = made(base, config.rank, config.alpha, config.dropout, generator)
            adapted[name] = adapter.train(base.training)
    except BaseException:  # an interrupt by the keyboard too
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    model.requires_grad_(False)
    for name, adapter in adapted.items():
        replace(model, name, adapter)
    return list(adapted)


def require_no_adapters(model: nn.Module) -> None:
    """Raise ValueError if the model has adapters, because a second set would train on top of the first."""
    if present := lora_layers(model):
        raise ValueError(
            f"The model already has adapters on {len(present)} layers; merge them with merge(model) "
            "or start from a freshly loaded model."
        )


def merge(model: nn.Module) -> list[str]:
    """Replace each adapted layer by its :meth:`LoRALinear.merged` twin, in place, and return their names.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = lora_layers(model, required=True)
    for name, layer in layers.items():
        replace(model, name, layer.merged())
    return list(layers)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that makes up the adapters: ``<layer>.lora_A`` (rank, in), ``.lora_B`` (out, rank), and
    ``.alpha`` and ``.scaling`` ().

    Raises:
        ValueError: the model has no adapters.
    """
    state = {}
    for name, layer in lora_layers(model, required=True).items():
        state |= {f"{name}.{part}": getattr(layer, part).detach().clone() for part in layer.parts}
        for number in ("alpha", "scaling"):  # a variant may make another scaling of the same alpha
            state[f"{name}.{number}"] = torch.tensor(getattr(layer, number), dtype=torch.float64)  # ()
    return state


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where the model has the one of that name."""
    if not name:
        raise ValueError(f"The model is itself a {type(model).__name__}; only layers inside a model can be replaced.")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def match_layers(
    model: nn.Module, targets: str | Sequence[str], exclude: Sequence[str], layer: type[nn.Module] | None = None
) -> dict[str, type[nn.Module]]:
    """Names of the layers to adapt and the class that adapts each, in the model's own order.

    Args:
        targets: "all-linear" (all layers registered as linear but the output head, which
            ``model.get_output_embeddings()`` returns), or names and endings of names.
        exclude: names or endings of names that "all-linear" leaves alone.
        layer: as in :func:`lora_class`.

    Raises:
        ValueError: nothing matches, a target matches nothing or something that cannot be adapted, or a
            matched weight belongs to two modules.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    classes = {name: made for name, module in modules.items() if (made := lora_class(module, layer)) is not None}
    if targets == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        names = [
            name
            for name in classes
            if is_linear(modules[name])
            and modules[name] is not head
            and not any(name_matches(name, ending) for ending in exclude)
        ]
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no linear layer inside it to adapt, "
                f"besides its output head and what exclude={list(exclude)} leaves out."
            )
        _warn_of_the_unreached(
            {
                name: module
                for name, module in modules.items()
                if name not in classes and not any(name_matches(name, ending) for ending in exclude)
            }
        )
    else:
        for target in targets:
            _check_target(target, modules, classes)
        names = [name for name in classes if any(name_matches(name, target) for target in targets)]
    _check_unshared(model, modules, names)
    return {name: classes[name] for name in names}


def name_matches(name: str, ending: str) -> bool:
    """Whether a module's full name is ``ending``, or ends in it after a dot."""
    return name == ending or name.endswith("." + ending)


def output_head(model: nn.Module) -> nn.Module | None:
    """The output layer, which our Llama and the models of transformers name by ``get_output_embeddings``; or None."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    return None if get_output_embeddings is None else get_output_embeddings()


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a model is a stack of, lowest first: the entries of its longest ``nn.ModuleList``, by name."""
    lists = [(len(module), name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=lambda pair: pair[0], default=(0, ""))[1]
    return {name: m for name, m in model.named_modules() if longest and name.rpartition(".")[0] == longest}


def last_blocks(model: nn.Module, count: int) -> list[str]:
    """The linear layers of the last ``count`` blocks, as ``targets``: below them no gradient is computed.

    Raises:
        ValueError: the model is no stack of blocks, or has fewer.
    """
    names = list(transformer_blocks(model))
    if not 1 <= count <= len(names):
        raise ValueError(
            f"count is {count}, but {type(model).__name__} is a stack of {len(names)} blocks; use 1 to that."
        )
    return [
        layer
        for layer in match_layers(model, "all-linear", ())
        if any(layer.startswith(f"{name}.") for name in names[len(names) - count :])
    ]


def _check_target(target: str, modules: dict[str, nn.Module], classes: dict[str, type[nn.Module]]) -> None:
    hits = [name for name in modules if name_matches(name, target)]
    if not hits:
        endings = sorted({name.rpartition(".")[2] for name in classes})
        raise ValueError(f"Target {target!r} matches no module; the layers that can be adapted here end in {endings}.")
    if other := [name for name in hits if name not in classes]:
        kinds = sorted({type(modules[name]).__name__ for name in classes})
        raise ValueError(
            f"Target {target!r} matches {other[0]!r}, a {type(modules[other[0]]).__name__}, which cannot be "
            f"adapted here; the kinds of layer of this model that can be are {kinds}."
        )


def _check_unshared(model: nn.Module, modules: dict[str, nn.Module], names: list[str]) -> None:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    owners = Counter(id(tensor) for _, tensor in tensors)
    for name in names:
        own = [*modules[name].parameters(recurse=False), *modules[name].buffers(recurse=False)]
        if any(owners[id(tensor)] > 1 for tensor in own):
            raise ValueError(
                f"The weight of {name!r} is shared with another module, so an adapter on one side would "
                "silently leave the other as it was; leave it out of targets."
            )


def _warn_of_the_unreached(modules: dict[str, nn.Module]) -> None:
    """Matrices in modules that get no adapter: experts' (3-D), attention's joint projection, unknown linear layers."""
    found = [
        f"{name}.{own}"
        for name, module in modules.items()
        for own, parameter in module.named_parameters(recurse=False)
        if (parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d))
        or (parameter.ndim == 2 and (isinstance(module, nn.MultiheadAttention) or is_linear(module)))
    ]
    if found:
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        warnings.warn(
            f"'all-linear' does not reach weights that stand in no layer it can adapt: {shown} stay as they are.",
            stacklevel=4,
        )
