"""Change a model's adapters: switch them, turn them off or down, extract them from a full fine-tune, lower the rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lab.inject import adapter_state, lora_layers, match_layers, replace, require_no_adapters, uncompiled
from lora_lab.layers import LoRAConv1D, lora_class
from lora_lab.lora import LoRALayer
from lora_lab.rank import product_svd, svd, truncate
from lora_lab.system.schema import Number, Positive, Size, check, check_finite
from lora_lab.variants import DoRALinear

# Adapters without their model


class Factors(NamedTuple):
    """What an adapter holds for one layer."""

    tensors: dict[str, Tensor]  # by the names in :attr:`lora_lab.lora.LoRALayer.parts`
    alpha: float
    scaling: float

    @property
    def rank(self) -> int:
        """The inner dimension of the update."""
        return len(self.tensors["lora_A"])


def split_state(state: Mapping[str, Tensor], source: str) -> dict[str, Factors]:
    """Return what an adapter in memory, as :func:`lora_lab.adapter_state` returns it, holds for each layer.

    Raises:
        ValueError: a layer lacks A, B, alpha or scaling, or as for :func:`check_factors`. The message names ``source``.
    """
    layers = {}
    for key, value in state.items():
        name, _, part = str(key).rpartition(".")
        layers.setdefault(name, {})[part] = value
    factors = {}
    for name, parts in layers.items():
        if missing := {*LoRALayer.parts, "alpha", "scaling"} - parts.keys():
            raise ValueError(f"{source} lacks {name}.{min(missing)}; pass all that adapter_state returned.")
        scalars = [float(check(parts.pop(part), Positive, f"{name}.{part}")) for part in ("alpha", "scaling")]
        check_factors(name, parts, len(parts["lora_A"]), source)
        factors[name] = Factors(parts, *scalars)
    return factors


def join_state(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return the adapter that :func:`split_state` splits."""
    state = {}
    for name, (tensors, *scalars) in factors.items():
        alpha, scaling = (torch.tensor(scalar, dtype=torch.float64) for scalar in scalars)  # (), ()
        parts = {**tensors, "alpha": alpha, "scaling": scaling}
        state |= {f"{name}.{part}": value for part, value in parts.items()}
    return state


def check_factors(name: str, tensors: Mapping[str, Tensor], rank: int, source: str) -> None:
    """Raise ValueError if a layer's tensors do not hold finite floating-point numbers, or are of another rank."""
    A, B = tensors["lora_A"], tensors["lora_B"]
    is_floating = all(tensor.is_floating_point() for tensor in tensors.values())
    if not (is_floating and rank and A.ndim > 1 and A.shape[:1] == B.shape[1:2] == (rank,)):
        raise ValueError(
            f"{source}: {name}.lora_A is {A.dtype} of {tuple(A.shape)} and {name}.lora_B is {B.dtype} of "
            f"{tuple(B.shape)}, which are no factors of rank {rank}; save the adapter again."
        )
    check_finite(((f"{name}.{part}", tensor) for part, tensor in tensors.items()), source)


def check_plain(factors: Mapping[str, Factors]) -> None:
    """Raise ValueError for an adapter of DoRA, or another kind whose update is more than scaling * B A."""
    for name, each in factors.items():
        if each.tensors.keys() != {*LoRALayer.parts}:
            raise ValueError(
                f"The adapter of {name!r} is of DoRA, or another kind whose update is more than scaling * B A; merge "
                "it, and extract a plain adapter, or save the whole model."
            )


def check_fit(name: str, layer: LoRALayer, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError if the tensors are not, by names and shapes, an adapter of this layer, of whatever rank."""
    if tensors.keys() != set(layer.parts):
        raise ValueError(
            f"{source} holds {sorted(tensors)} of {name!r}, but {type(layer).__name__} has {sorted(layer.parts)}; is "
            "it the same kind of adapter?"
        )
    for part, tensor in tensors.items():
        shape = list(getattr(layer, part).shape)
        if part in LoRALayer.parts:
            shape[LoRALayer.parts.index(part)] = len(tensors["lora_A"])  # A (rank, in), B (out, rank)
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{source}: {part} of {name!r} has shape {tuple(tensor.shape)}, but this model needs {tuple(shape)}; "
                "is it the adapter's own base model?"
            )


@torch.no_grad()
def set_factors(layer: LoRALayer, factors: Factors) -> None:
    """Replace a layer's factors, which may be of another rank, and its alpha, in place.

    The scaling becomes that of ``factors``: where the layer derives another one from the same alpha, as rsLoRA does,
    alpha is adjusted.
    """
    for part, value in factors.tensors.items():
        current = getattr(layer, part)
        if current.shape == value.shape:
            current.copy_(value)
        else:
            new = value.to(current.device, current.dtype, copy=True, memory_format=torch.contiguous_format)
            setattr(layer, part, nn.Parameter(new, requires_grad=current.requires_grad))
    layer.alpha = factors.alpha
    if not math.isclose(layer.scaling, factors.scaling):  # rounding alone does not change alpha
        layer.alpha *= factors.scaling / layer.scaling


def put_on(
    model: nn.Module, factors: Mapping[str, Factors], dropout: float = 0.0, layer: type[LoRALayer] | None = None
) -> None:
    """Freeze a model and put adapters that fit it on the layers of these names, in place.

    Args:
        layer: as for :func:`lora_lab.inject`.
    """
    model.requires_grad_(False)
    for name, each in factors.items():
        base = model.get_submodule(name)
        adapted: Any = lora_class(base, layer)
        adapted = adapted(base, 1, 1.0, dropout, torch.Generator())
        set_factors(adapted, each)
        replace(model, name, adapted.train(base.training))


# Adapters on a model


def switch(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put another adapter, as :func:`lora_lab.adapter_state` returned it, into the model's adapted layers.

    A, B and scaling become the state's; the base does not change. The rank may differ: the parameters are then new
    ones, which an existing optimizer does not hold.

    Raises:
        ValueError: the model has no adapters; the state belongs to other layers or has other shapes (for PiSSA also
            another rank, because of its start); or one of its numbers is NaN or infinite. The model is then left
            unchanged.
    """
    layers = lora_layers(uncompiled(model), required=True)
    factors = split_state(state, "The state")
    if wrong := sorted(layers.keys() ^ factors.keys()):
        raise ValueError(f"The state and the model's adapters differ in {wrong[0]!r}; they must be of the same layers.")
    for name, layer in layers.items():
        check_fit(name, layer, factors[name].tensors, "The state")
    for name, layer in layers.items():
        set_factors(layer, factors[name])


def take_off(model: nn.Module) -> None:
    """Put the base layers of a model, which stay frozen, in the places of the adapted ones."""
    for name, layer in lora_layers(model).items():
        replace(model, name, layer.base)


@contextmanager
def off(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, the model is the base: ``with off(model): model(x)``.

    The base layers take the places of the adapted ones, which are put back when the block ends. Do not move, save or
    inject within the block.

    Raises:
        ValueError: the model has no adapters, or they are already off.
    """
    layers = lora_layers(model, required=True)
    try:
        take_off(model)
        yield model
    finally:
        for name, layer in layers.items():  # train or eval may have been called within the block
            replace(model, name, layer.train(layer.base.training))


@contextmanager
def strength(model: nn.Module, factor: float) -> Iterator[nn.Module]:
    """Within the block, the adapters' update counts ``factor`` times: ``with strength(model, 0.5): model(x)``.

        h = W0 x + factor * scaling * B A x

    A factor of 1 changes nothing. With 0 the model computes what its base does. Between 0 and 1 the adapter acts
    less than it was trained to, above 1 more, and below 0 in the opposite direction (Ilharco et al. 2023, "Editing
    Models with Task Arithmetic", arXiv 2212.04089). Blocks within blocks multiply their factors. When the block ends,
    also by an error, every layer has its alpha back. Do not save, switch or inject within the block.

    Raises:
        ValueError: the factor is infinite or not a number, the model has no adapters, or they are of DoRA, whose update
            is not proportional to its scaling, and the factor is not 1.
    """
    factor = check(factor, Number, "factor")
    layers = lora_layers(model, required=True)
    if factor != 1:
        _refuse(layers, DoRALinear, "whose update is not proportional to its scaling; use off, or plain LoRA.")
    alphas = {name: layer.alpha for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.alpha *= float(factor)
        yield model
    finally:
        for name, layer in layers.items():
            layer.alpha = alphas[name]


def _refuse(layers: Mapping[str, LoRALayer], kinds: Any, why: str) -> None:
    """Raise ValueError if one of the layers is of these kinds."""
    for name, layer in layers.items():
        if isinstance(layer, kinds):
            raise ValueError(f"{name!r} has an adapter of type {type(layer).__name__}, {why}")


@torch.no_grad()
def extract(base: nn.Module, tuned: nn.Module | dict[str, Tensor], rank: int) -> dict[str, float]:
    """Turn a full fine-tune into adapters on ``base``, in place: the change of each linear layer, cut to a low rank.

    Each layer's W_tuned - W_base is replaced by the nearest matrix of that rank (:func:`lora_lab.rank.truncate`), as
    B A with scaling 1. Layers that did not change get no adapter. Changes elsewhere (embeddings, norms, biases, the
    output head) are not in the adapters.

    Args:
        base: the model before fine-tuning.
        tuned: the model after it, or its state dict.
        rank: of all adapters, or as much of it as a layer's shape allows.

    Returns:
        The relative error ||change - B A|| / ||change|| (Frobenius) of each adapted layer.

    Raises:
        ValueError: the rank is below 1, the models differ in shape, nothing changed, a change holds NaN or infinity, or
            ``base`` has adapters. ``base`` is then left unchanged.
    """
    rank = check(rank, Size, "rank")
    if isinstance(tuned, nn.Module):
        tuned = uncompiled(tuned).state_dict()
    base = uncompiled(base)
    require_no_adapters(base)
    factors, errors = {}, {}
    for name, kind in match_layers(base, "all-linear", ()).items():
        before: Any = base.get_submodule(name).weight  # (48, 64)
        after = tuned.get(f"{name}.weight")
        if after is None or after.shape != before.shape:
            raise ValueError(f"The tuned model has no {name}.weight of {tuple(before.shape)}; is it of this base?")
        exact = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
        difference = after.to(before.device, exact) - before.to(exact)  # (48, 64)
        check_finite([(f"{name}.weight", difference)], "The change")
        change = svd(difference.T if issubclass(kind, LoRAConv1D) else difference)  # (48, 48), (48,), (48, 64)
        if not change.S.any():
            continue
        B, A, error = truncate(change, min(rank, len(change.S)))  # (48, 4), (4, 64), ()
        factors[name] = Factors({"lora_A": A, "lora_B": B}, len(A), 1.0)
        errors[name] = float(error)
    if not factors:
        raise ValueError("No linear layer of the tuned model differs from the base, so there is nothing to extract.")
    put_on(base, factors)
    return errors


@torch.no_grad()
def resize(model: nn.Module, rank: int) -> dict[str, float]:
    """Reduce the model's adapters to a lower rank, in place: the nearest update of that rank in every layer.

    Adapters that have this rank or a lower one do not change. The scaling does not change either.

    Returns:
        The relative error (Frobenius) of each layer's update.

    Raises:
        ValueError: the rank is below 1, the model has no adapters, they are of a kind whose update is more than
            scaling * B A (PiSSA, DoRA), or a number of theirs is NaN or infinite. The model is then left unchanged.
    """
    rank = check(rank, Size, "rank")
    layers = lora_layers(model, required=True)
    check_finite(adapter_state(model).items())
    why = "whose update is more than scaling * B A; merge it, and extract(base, merged, rank)."
    _refuse(layers, tuple(type(layer) for layer in layers.values() if layer.parts != LoRALayer.parts), why)
    errors = dict.fromkeys(layers, 0.0)
    for name, layer in layers.items():
        if layer.rank > rank:
            A, B = layer.lora_A, layer.lora_B
            exact = product_svd(B.flatten(1), A.flatten(1))
            nearest = truncate(exact, min(rank, len(exact.S)))  # a small layer may hold fewer directions
            new_A, new_B = nearest.A.view(-1, *A.shape[1:]), nearest.B.view(len(B), -1, *B.shape[2:])
            set_factors(layer, Factors({"lora_A": new_A, "lora_B": new_B}, layer.alpha, layer.scaling))
            errors[name] = float(nearest.error)
    return errors
