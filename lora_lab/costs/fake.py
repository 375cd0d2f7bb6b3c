"""Models of fake tensors, which have shapes but no values, and copies of models that share their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
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

from lora_lab.models.pretrained import architecture
from lora_lab.models.quantize import BlockWeight
from lora_lab.system.device import pick_device
from lora_lab.system.schema import Size, check
from lora_lab.task import logits
from lora_lab.train import Batch

Factory = Callable[[], nn.Module]
# A model, what makes one, or a name for models.pretrained.architecture.
Source = nn.Module | Factory | str | Path
_GROUPED_MM = torch.ops.aten._grouped_mm.default
_MOST_REAL = 2**20  # elements of the largest tensor that a rehearsal computes with real values


# Batches


def token_batch(model: nn.Module, batch_size: int | None, seq_len: int | None) -> Batch:
    """Return inputs and targets (batch_size, seq_len) of token ids, all 0, on the model's device.

    Raises:
        ValueError: a size is missing or below 1.
    """
    sizes = [check(batch_size, Size, "batch_size"), check(seq_len, Size, "seq_len")]
    inputs = torch.zeros(sizes, dtype=torch.long, device=device_of(model))
    return inputs, torch.zeros_like(inputs)


def batch_for(model: nn.Module, batch_size: int | None, seq_len: int | None, batch: Batch | None) -> Batch:
    """Return zeros of the batch's shapes and dtypes, on the model's device; without a batch, what the model reads.

    Most models read token ids and have a target for each. A model of transformers may also read pictures, of the size
    in its config, and have one class for each row. Inside :func:`fake_copy` they are fake tensors.

    Raises:
        ValueError: as for :func:`token_batch`, the model reads images and ``seq_len`` is given, or it reads something
            else.
    """
    if batch is not None:
        inputs, targets = (torch.zeros(each.shape, dtype=each.dtype, device=device_of(model)) for each in batch)
        return inputs, targets
    reads = getattr(model, "main_input_name", "input_ids")
    if reads == "pixel_values":
        if seq_len is not None:
            raise ValueError(f"seq_len is {seq_len}, but a {type(model).__name__} reads images; leave seq_len out.")
        inputs = _pictures(model, check(batch_size, Size, "batch_size"))
    elif reads == "input_ids":
        inputs, targets = token_batch(model, batch_size, seq_len)
        if not hasattr(model, "can_generate") or model.can_generate():  # pyright: ignore[reportCallIssue]
            return inputs, targets
    else:
        raise ValueError(
            f"A {type(model).__name__} reads {reads}, whose shape does not follow from a batch size; pass inputs and "
            "targets as batch."
        )
    with torch.no_grad():
        shape = logits(model, inputs[:1]).shape[1:-1]  # one class for a row, or for each of its tokens
    return inputs, torch.zeros(len(inputs), *shape, dtype=torch.long, device=inputs.device)


def _pictures(model: nn.Module, count: int) -> Tensor:
    """Return black pictures of the size in the model's config: (count, channels, height, width)."""
    config: Any = model.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    parameter = next(model.parameters())
    shape = count, getattr(config, "num_channels", 3), height, width
    return torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)


def shape_of(batch: Batch) -> str:
    """Return the inputs' shape as text, such as "4 x 128"."""
    return " x ".join(str(size) for size in batch[0].shape)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are.

    Raises:
        ValueError: it has none.
    """
    for parameter in model.parameters():
        return parameter.device
    raise ValueError(f"The {type(model).__name__} has no parameters, so there is nothing to train.")


def device_to_run(model: Source, device: torch.device | str | None) -> torch.device:
    """Return where a step of a model really runs: where the model is; for a factory, the given or the best device.

    Raises:
        ValueError: the model is on the meta device.
    """
    device = device_of(model) if isinstance(model, nn.Module) else pick_device(device)[0]
    if device.type == "meta":
        raise ValueError("The model is on the meta device, where nothing is ever computed; use predict or flops.")
    return device


def storage_of(tensor: Tensor) -> int:
    """Return a number that identifies a tensor's memory for as long as that memory is in use."""
    return tensor.untyped_storage()._cdata


# Models to rehearse with, and to train


@contextmanager
def fake_copy(
    model: Source, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Iterator[nn.Module]:
    """A copy of a model with fake tensors, which have shapes, dtypes and sizes in bytes, but no values and no memory.

    What is computed inside the ``with`` block is fake too, except for positions (``torch.arange``) and what is
    computed from them alone. ``model`` itself is left unchanged.

    Args:
        model: a module; or a function that builds one (it is called on torch's meta device), or what names one, as for
            :func:`lora_lab.models.pretrained.architecture`.
        device: the device that the fake tensors report. It must exist: on a CPU build of torch, a fake CUDA tensor
            would abort Python itself.
        dtype: cast floating-point weights to it; None leaves them as they are.

    Raises:
        ValueError: the device does not exist.
    """
    device = torch.device(device)
    if device.type == "cpu":
        device = torch.device("cpu")  # for torch "cpu:0" is another device, and no tensor is ever on it
    if device.type not in ("cpu", "meta"):
        pick_device(device)  # raises if it does not exist
    model = build_on_meta(model)
    # A model may hold tensors that are no parameters or buffers.
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def pretend(tensor: Tensor) -> Tensor:
        fake = mode.from_tensor(tensor.detach())
        cast_to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if (fake.device, fake.dtype) == (device, cast_to):
            return fake
        with mode:
            return torch.empty_strided(fake.size(), fake.stride(), dtype=cast_to, device=device)

    twin = _copy_with(model, pretend)
    for module in twin.modules():
        if dtype is not None and isinstance(module, BlockWeight):
            module.dtype = dtype  # as module.to(dtype) would set it
    with mode, _RealPositions():
        yield twin


class _RealPositions(TorchDispatchMode):
    """Computes small results of ``torch.arange`` alone with real values.

    The models of transformers detect packed sequences by their positions. Where positions are fake, they take another
    branch, with a mask, whose bytes and FLOPs differ from those of a real step.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(argument, FakeTensor) for argument in args):  # nearly always, and quickly found
            return _grouped(func, args, kwargs) if func is _GROUPED_MM else func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        any_fake = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if any_fake or not (inputs or func._overloadpacket is torch.ops.aten.arange):
            return func(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            out = None  # the result or its shape depends on values, which are computed below
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(tensor.numel() > _MOST_REAL or tensor.device.type == "meta" for tensor in outputs):
            return out
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _grouped(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return a fake product of experts and their tokens. torch's rule for its shape refuses all dtypes but bfloat16."""
    dtype = args[0].dtype
    halves = [arg.to(torch.bfloat16) if isinstance(arg, Tensor) and arg.dtype == dtype else arg for arg in args]
    return func(*halves, **kwargs).to(dtype)


def copy_sharing_weights(model: nn.Module, left_out: Iterable[nn.Module] = ()) -> nn.Module:
    """Return a copy that shares the weights: replacing or freezing something later affects the copy only.

    Args:
        left_out: modules that the copy has an empty module in place of.
    """
    return _copy_with(model, Tensor.detach, left_out)


def meta_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy on the meta device, where tensors have shapes only; ``dtype`` as in :func:`fake_copy`."""
    twin = _copy_with(model, lambda tensor: tensor.detach().to("meta"))
    return twin if dtype is None else twin.to(dtype)


def _copy_with(model: nn.Module, change: Callable[[Tensor], Tensor], left_out: Iterable[nn.Module] = ()) -> nn.Module:
    """Return a copy of a model with other parameters and buffers: what ``change`` makes of each."""
    copies: dict[int, Any] = {id(module): nn.Module() for module in left_out}
    for tensor in [*model.parameters(), *model.buffers()]:
        changed = change(tensor)
        trains = tensor.requires_grad
        copies[id(tensor)] = nn.Parameter(changed, trains) if isinstance(tensor, nn.Parameter) else changed
    return copy.deepcopy(model, copies)


def build_model(model: Source, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a model to train for real; a module that is passed stays as it is.

    Args:
        model: a module, which is copied as by :func:`copy_sharing_weights`; or a function that builds one.
        device: where a factory's model is built.
        dtype: cast floating-point weights to it; None leaves them as they are.
    """
    model = copy_sharing_weights(model) if isinstance(model, nn.Module) else _call_factory(model, device)
    return model if dtype is None else model.to(dtype)


def build_on_meta(model: Source) -> nn.Module:
    """Return the module that is passed, or what a factory makes on torch's meta device, where nothing is allocated."""
    return model if isinstance(model, nn.Module) else _call_factory(model, "meta")


def _call_factory(factory: Factory | str | Path, device: torch.device | str) -> nn.Module:
    if isinstance(factory, str | Path):
        factory = architecture(factory)
    with torch.device(device), torch.random.fork_rng(devices=[]):
        return factory()


def unshare_trainable(twin: nn.Module, model: nn.Module) -> None:
    """Clone those tensors that training would write to and that a copy shares: trainable parameters and buffers.

    Args:
        twin: from :func:`copy_sharing_weights`, and ready to train since.
        model: what it is a copy of.
    """
    shared = {storage_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    for parameter in twin.parameters():
        if parameter.requires_grad and storage_of(parameter) in shared:
            parameter.data = parameter.data.clone()
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()
