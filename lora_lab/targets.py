"""Which layers of a model a list of names means, which class adapts each, and which must be refused."""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn import functional as F

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Entry:
    lora_class: type[nn.Module]
    linear: bool


_REGISTERED: dict[str, _Entry] = {}


def register(base_class: type[nn.Module] | str, lora_class: type[nn.Module], linear: bool = False) -> None:
    """Let ``inject`` put ``lora_class`` on layers whose class is exactly ``base_class``.

    A class derived from ``nn.Linear`` counts as ``nn.Linear``, without being registered, if its layers keep one plain
    matrix W and compute x W^T + b, as Falcon's do. Others, such as routers and quantised layers, are refused.

    Args:
        base_class: a class, or its full name ("transformers.pytorch_utils.Conv1D"), so that its library
            need not be imported.
        lora_class: called with (base, rank, alpha, dropout, generator).
        linear: whether "all-linear" means such layers.
    """
    name = base_class if isinstance(base_class, str) else _full_name(base_class)
    _REGISTERED[name] = _Entry(lora_class, linear)


def lora_class(base: nn.Module, layer: type[nn.Module] | None = None) -> type[nn.Module] | None:
    """The class that adapts ``base``, or None.

    Args:
        layer: a variant, used where it derives from the class registered for the base; other bases then
            have none.
    """
    entry = _entry(base)
    if entry is None:
        return None
    if layer is None:
        return entry.lora_class
    return layer if issubclass(layer, entry.lora_class) else None


def _entry(module: nn.Module) -> _Entry | None:
    entry = _REGISTERED.get(_full_name(type(module)))
    if entry is None and isinstance(module, nn.Linear) and _multiplies(module):
        return _REGISTERED.get(_full_name(nn.Linear))
    return entry


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _multiplies(layer: nn.Linear) -> bool:
    """Whether a layer of a class derived from ``nn.Linear`` has one plain matrix W and computes x W^T + b with it.

    Quantised layers keep a matrix of a class or a dtype of their own, or scales beside it. What a class computes by a
    forward of its own is found by trying, with a small W, for a layer on the meta device has no numbers.
    """
    own = {name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]}
    weight = layer._parameters.get("weight")
    if not own <= {"weight", "bias"} or type(weight) not in (nn.Parameter, FakeTensor):
        return False
    if weight.dtype not in _DTYPES or weight.shape != (layer.out_features, layer.in_features):
        return False
    return type(layer).forward is nn.Linear.forward or _multiplies_small(layer)


@torch.no_grad()
def _multiplies_small(layer: nn.Linear) -> bool:
    with unset_fake_temporarily():
        # Numbers whose products and sums no order and no dtype rounds.
        weight = torch.tensor([[0.5, -2.0, 1.0], [1.5, 0.25, -1.0]], dtype=torch.float32, device="cpu")  # (2, 3)
        bias, x = None if layer.bias is None else weight[:, 0], weight.flip(0)[None]  # (2,), (1, 2, 3)
        small = object.__new__(type(layer))
        small.__dict__ |= vars(layer) | {"in_features": 3, "out_features": 2, "training": False}
        small.__dict__["_parameters"] = {"weight": weight, "bias": bias}
        try:
            found = type(layer).forward(small, x)  # (1, 2, 2)
        except Exception:  # it needs more than a W and a b
            return False
        return type(found) is Tensor and torch.equal(found, F.linear(x, weight, bias))


def find(
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
    # The one look at a module below: it registers its kinds of layer, whoever calls this, and whatever was
    # imported before. Else what "all-linear" means would depend on the caller's imports.
    importlib.import_module("lora_lab.layers")
    modules = {name: module for name, module in model.named_modules() if name}
    classes = {name: made for name, module in modules.items() if (made := lora_class(module, layer)) is not None}
    if targets == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        names = [
            name
            for name in classes
            if _is_linear(modules[name])
            and modules[name] is not head
            and not any(matches(name, ending) for ending in exclude)
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
                if name not in classes and not any(matches(name, ending) for ending in exclude)
            }
        )
    else:
        for target in targets:
            _check_target(target, modules, classes)
        names = [name for name in classes if any(matches(name, target) for target in targets)]
    _check_unshared(model, modules, names)
    return {name: classes[name] for name in names}


def matches(name: str, ending: str) -> bool:
    """Whether a module's full name is ``ending``, or ends in it after a dot."""
    return name == ending or name.endswith("." + ending)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a model is a stack of, lowest first: the entries of its longest ``nn.ModuleList``, by name."""
    lists = [(len(module), name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=lambda pair: pair[0], default=(0, ""))[1]
    return {name: m for name, m in model.named_modules() if longest and name.rpartition(".")[0] == longest}


def last_blocks(model: nn.Module, count: int) -> list[str]:
    """The linear layers of the last ``count`` blocks, as ``targets``: below them no gradient is computed.

    Raises:
        ValueError: the model is no stack of blocks, or has fewer.
    """
    names = list(blocks(model))
    if not 1 <= count <= len(names):
        raise ValueError(
            f"count is {count}, but {type(model).__name__} is a stack of {len(names)} blocks; use 1 to that."
        )
    return [
        layer
        for layer in find(model, "all-linear", ())
        if any(layer.startswith(f"{name}.") for name in names[len(names) - count :])
    ]


def _check_target(target: str, modules: dict[str, nn.Module], classes: dict[str, type[nn.Module]]) -> None:
    hits = [name for name in modules if matches(name, target)]
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


def _is_linear(module: nn.Module) -> bool:
    entry = _entry(module)
    return isinstance(module, nn.Linear) if entry is None else entry.linear


def _warn_of_the_unreached(modules: dict[str, nn.Module]) -> None:
    """Matrices in modules that get no adapter: experts' (3-D), attention's joint projection, unknown linear layers."""
    found = [
        f"{name}.{own}"
        for name, module in modules.items()
        for own, parameter in module.named_parameters(recurse=False)
        if (parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.Conv1d))
        or (parameter.ndim == 2 and (isinstance(module, nn.MultiheadAttention) or _is_linear(module)))
    ]
    if found:
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        warnings.warn(
            f"'all-linear' does not reach weights that stand in no layer it can adapt: {shown} stay as they are.",
            stacklevel=4,
        )
