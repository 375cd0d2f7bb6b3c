"""Change the adapters of a model: switch, take off, extract from a full fine-tune, lower the rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lab.inject import LoRAConfig, inject, lora_layers, match_layers, replace, require_no_adapters
from lora_lab.layers import LoRAConv1D
from lora_lab.lora import LoRALayer, check_numbers
from lora_lab.rank import energy_rank, product_svd, svd, truncate
from lora_lab.variants import DoRALinear, PiSSALinear


def switch(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put another adapter, as :func:`lora_lab.adapter_state` returned it, into the model's adapted layers.

    A, B and scaling become the state's; the base is not touched. The rank may be another one: then the
    parameters are new ones, which an optimiser made before does not know. Where the state's layers make
    another scaling of an alpha than the model's (rsLoRA does), alpha is set so that the scaling is the state's.

    Raises:
        ValueError: the model has no adapters; or the state is of other layers or shapes (for PiSSA also of
            another rank, because of its start). The model is then left as it was.
    """
    layers = lora_layers(model, required=True)
    wanted = {f"{name}.{part}" for name, layer in layers.items() for part in (*layer.parts, "alpha", "scaling")}
    if wrong := sorted(wanted ^ state.keys()):
        raise ValueError(
            f"The state and the model's adapters differ in {wrong[0]!r}"
            + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            + "; switch takes what adapter_state returned for the same layers and the same kind of adapter."
        )
    numbers = {}
    for name, layer in layers.items():
        A = state[f"{name}.lora_A"]
        rank = A.shape[0] if A.ndim else layer.rank
        for part in layer.parts:
            expected = factor_shape(layer, part, rank)
            if (found := tuple(state[f"{name}.{part}"].shape)) != expected:
                raise ValueError(f"The state's {name}.{part} has shape {found}, but the model asks for {expected}.")
        numbers[name] = [float(state[f"{name}.{number}"]) for number in ("alpha", "scaling")]
        for number in numbers[name]:
            check_numbers(rank, number)  # checks that both are positive
    for name, layer in layers.items():
        alpha, scaling = numbers[name]
        set_factors(layer, {part: state[f"{name}.{part}"] for part in layer.parts}, alpha)
        if layer.scaling != scaling:
            layer.alpha *= scaling / layer.scaling


@contextmanager
def off(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, the model is the base: ``with off(model): model(x)``.

    The adapted layers are taken out and put back, so nothing of them acts, whoever reads what. Do not
    move, save or inject within the block.

    Raises:
        ValueError: the model has no adapters, or they are off already.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("The model has no adapters to take off; call inject first, and do not put off within off.")
    try:
        for name, layer in layers.items():
            replace(model, name, layer.base)
        yield model
    finally:
        for name, layer in layers.items():
            replace(model, name, layer.train(layer.base.training))  # the mode may have been changed meanwhile


@torch.no_grad()
def extract(
    base: nn.Module, tuned: nn.Module | dict[str, Tensor], rank: int | None = None, *, energy: float | None = None
) -> dict[str, float]:
    """Turn a full fine-tune into adapters on ``base``, in place: each linear layer's change, cut to its largest part.

    For every layer W_tuned - W_base is replaced by the nearest matrix of low rank (:func:`lora_lab.rank.truncate`), as
    B A with scaling 1. Layers that did not change get no adapter. What changed elsewhere (embeddings, norms, biases,
    the output head) is not in the adapters.

    Args:
        base: the model before fine-tuning.
        tuned: the same after it, or its state dict.
        rank: the same for all layers (or all that a layer has), or
        energy: each layer's own: as few directions as hold this share of the change's squared norm.

    Returns:
        The relative error ||change - B A|| / ||change|| (Frobenius) of each adapted layer.

    Raises:
        ValueError: not one of rank and energy is given, a number is out of range, the models differ in shape, nothing
            changed, or ``base`` has adapters. ``base`` is then left as it was.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"rank is {rank} and energy {energy}; give one of them.")
    state = tuned.state_dict() if isinstance(tuned, nn.Module) else tuned
    require_no_adapters(base)
    parts, errors = {}, {}
    for name, made in match_layers(base, "all-linear", ()).items():
        weight = base.get_submodule(name).weight  # (48, 64)
        after = state.get(f"{name}.weight")
        if after is None or after.shape != weight.shape:
            found = "missing" if after is None else f"of shape {tuple(after.shape)}"
            raise ValueError(
                f"{name}.weight is {found} in the tuned model, but must be {tuple(weight.shape)}; is it of this base?"
            )
        difference = after.to(weight).float() - weight.float()  # (48, 64)
        change = svd(difference.T if issubclass(made, LoRAConv1D) else difference)  # (48, 48), (48,), (48, 64)
        if not change.S.any():
            continue
        own = min(rank, len(change.S)) if energy is None else int(energy_rank(change.S, energy))
        kept = truncate(change, own)
        parts[name], errors[name] = {"lora_A": kept.A, "lora_B": kept.B}, float(kept.error)
    if not parts:
        raise ValueError("No linear layer of the tuned model differs from the base, so there is nothing to extract.")
    inject(base, LoRAConfig(1, 1, targets=list(parts)))
    for name, layer in lora_layers(base).items():
        set_factors(layer, parts[name], parts[name]["lora_A"].shape[0])
    return errors


@torch.no_grad()
def resize(model: nn.Module, rank: int) -> dict[str, float]:
    """Shrink the model's adapters to a lower rank, in place: the nearest update of that rank in every layer.

    Layers of that rank or lower stay as they are. The scaling stays too, and the factors take up the rest.

    Returns:
        The relative error (Frobenius) of each layer's update.

    Raises:
        ValueError: the rank is below 1, the model has no adapters, or they are of a kind whose update is more than
            scaling * B A (PiSSA, DoRA). The model is then left as it was.
    """
    check_numbers(rank)  # checks it
    layers = lora_layers(model, required=True)
    for name, layer in layers.items():
        if isinstance(layer, PiSSALinear | DoRALinear):
            raise ValueError(
                f"{name!r} has an adapter of type {type(layer).__name__}, whose update is more than scaling * B A; "
                "merge it, and extract(base, merged, rank)."
            )
    errors = dict.fromkeys(layers, 0.0)
    for name, layer in layers.items():
        change = product_svd(layer.lora_B.flatten(1), layer.lora_A.flatten(1))
        if layer.rank <= rank:
            continue
        kept = truncate(change, min(rank, len(change.S)))  # a small layer's update has no more directions than its size
        shapes = {part: factor_shape(layer, part, len(kept.A)) for part in layer.parts}
        parts = {"lora_A": kept.A.view(shapes["lora_A"]), "lora_B": kept.B.view(shapes["lora_B"])}
        scaling = layer.scaling
        set_factors(layer, parts, layer.alpha)
        layer.alpha *= scaling / layer.scaling
        errors[name] = float(kept.error)
    return errors


@torch.no_grad()
def set_factors(layer: LoRALayer, tensors: dict[str, Tensor], alpha: float) -> None:
    """Give a layer other factors, of another rank too, and another alpha, in place."""
    for part, value in tensors.items():
        current = getattr(layer, part)
        if current.shape == value.shape:
            current.copy_(value)
        else:
            fresh = value.to(current.device, current.dtype, copy=True)
            setattr(layer, part, nn.Parameter(fresh, requires_grad=current.requires_grad))
    layer.alpha = alpha


def factor_shape(layer: LoRALayer, part: str, rank: int) -> tuple[int, ...]:
    """The shape that a part of this layer has at another rank."""
    shape = list(getattr(layer, part).shape)
    if part in ("lora_A", "lora_B"):
        shape[0 if part == "lora_A" else 1] = rank
    return tuple(shape)
