"""Models of fake tensors, which have shapes and no numbers, and copies of models that share their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_lab.models.quantize import BlockWeight
from lora_lab.system.device import pick_device

Factory = Callable[[], nn.Module]
Batch = tuple[Tensor, Tensor]
_FEW = 2**20  # numbers that a rehearsal may hold for real


# A model to rehearse with


def token_batch(model: nn.Module, batch_size: int, seq_len: int) -> Batch:
    """Inputs and targets (batch_size, seq_len) of token ids, all 0, on the model's device.

    Raises:
        ValueError: a size is below 1.
    """
    for name, size in {"batch_size": batch_size, "seq_len": seq_len}.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}, but it must be a whole number of at least 1.")
    return tuple(torch.zeros(batch_size, seq_len, dtype=torch.long, device=device_of(model)) for _ in range(2))


def batch_for(model: nn.Module, batch_size: int | None, seq_len: int | None, batch: Batch | None) -> Batch:
    """Zeros of the batch's shapes and dtypes, or token ids if there is none, on the model's device.

    Inside :func:`fake_copy` they are fake.

    Raises:
        ValueError: as for :func:`token_batch`.
    """
    if batch is None:
        return token_batch(model, batch_size, seq_len)
    return tuple(torch.zeros(tensor.shape, dtype=tensor.dtype, device=device_of(model)) for tensor in batch)


def shape_of(batch: Batch) -> str:
    """Such as "4 x 128"."""
    return " x ".join(str(size) for size in batch[0].shape)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are.

    Raises:
        ValueError: it has none.
    """
    for parameter in model.parameters():
        return parameter.device
    raise ValueError(f"The {type(model).__name__} has no parameters, so there is nothing to train.")


def storage_of(tensor: Tensor) -> int:
    """What tells a tensor's memory from any other's, as long as it lives."""
    return tensor.untyped_storage()._cdata


@contextmanager
def fake_copy(
    model: nn.Module | Factory, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Iterator[nn.Module]:
    """A model of fake tensors, which have shapes, dtypes and storages' sizes, but no numbers and no memory.

    In the block, what is computed is fake too, but for positions (``torch.arange``) and what is made of them alone. The
    model given is not touched.

    Args:
        model: a module; or a function that makes one from its shape (it is called on torch's meta device).
        device: where the fake tensors say they are. It must be there: on a CPU build a fake CUDA tensor would
            abort Python itself.
        dtype: cast floating-point weights to it; None leaves them as they are.

    Raises:
        ValueError: the device is not there, or ``model`` is neither module nor factory.
    """
    device = torch.device(device)
    if device.type == "cpu":
        device = torch.device("cpu")  # "cpu:0" is another device to torch, on which no tensor ever is
    if device.type not in ("cpu", "meta"):
        pick_device(device)  # raises if it is not there
    if not isinstance(model, nn.Module):
        model = _call_factory(model, "meta")
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a model may hold tensors that are no parameters and no buffers
    converter = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        fake = mode.from_tensor(tensor.detach())
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if (fake.device, fake.dtype) != (device, wanted):
            with mode:
                fake = torch.empty_strided(fake.size(), fake.stride(), dtype=wanted, device=device)
        converter[id(tensor)] = _same_kind(tensor, fake)
    twin = copy.deepcopy(model, converter)
    for module in twin.modules():
        if dtype is not None and isinstance(module, BlockWeight):
            module.dtype = dtype  # what to(dtype) would make of it
    with mode, _RealPositions():
        yield twin


class _RealPositions(TorchDispatchMode):
    """Gives numbers to what comes from neither the model nor the batch but from ``torch.arange``, where it is small.

    The models of transformers look for several texts in a row by their positions, and where those are fake they go
    another way, by a mask, with other bytes and products than a step has.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = not any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if not known or not (inputs or func._overloadpacket is torch.ops.aten.arange):
            return func(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            out = None  # a number is asked for, or as many as numbers say: of what is small, as follows
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(tensor.numel() > _FEW or tensor.device.type == "meta" for tensor in made):
            return out
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """The model's modules copied, its weights shared: what is later replaced, frozen or marked is the copy's."""
    shared = {id(tensor): _same_kind(tensor, tensor.detach()) for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def build_model(model: nn.Module | Factory, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """A model to train for real, without harm to the one given.

    Args:
        model: a module, which is copied as by :func:`copy_sharing_weights`; or a function that makes one.
        device: where a factory's model is made.
        dtype: cast floating-point weights to it; None leaves them as they are.
    """
    model = copy_sharing_weights(model) if isinstance(model, nn.Module) else _call_factory(model, device)
    return model if dtype is None else model.to(dtype)


def _call_factory(factory: Factory, device: torch.device | str) -> nn.Module:
    if not callable(factory):
        raise ValueError(f"model is a {type(factory).__name__}, but it must be a torch.nn.Module or make one.")
    with torch.device(device), torch.random.fork_rng(devices=[]):
        model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"The factory made a {type(model).__name__}, but it must make a torch.nn.Module.")
    return model


def _same_kind(like: Tensor, tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else tensor


def unshare_trainable(model: nn.Module, shared: set[int]) -> None:
    """Give a :func:`copy_sharing_weights` model, made ready to train, tensors of its own where training would write.

    Args:
        shared: the storages (:func:`storage_of`) that it shares.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and storage_of(parameter) in shared:
            parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()
