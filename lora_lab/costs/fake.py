"""Models of fake tensors, which have shapes but no values, and copies of models that share their weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

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

from lora_lab.inject import match_layers, output_head
from lora_lab.lean.step import copy_with
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
_FEWEST = 6  # blocks; below, two rehearsals of a shorter model would save little
_LIBRARIES = {"torch", "transformers", "peft", "lora_lab"}  # whose models treat blocks alike that look alike
# What our Llama and transformers call a block's number.
_INDICES = {"layer", "layer_idx", "layer_id", "layer_index"}
_MOST_REAL = 2**20  # elements of the largest tensor that a rehearsal computes with real values


# Batches


def batch_for(
    model: nn.Module, batch_size: int | None = None, seq_len: int | None = None, batch: Batch | None = None
) -> Batch:
    """Return a batch on the model's device: zeros like a given one, or else random numbers that the model can read.

    Most models read token ids and have a target for each. A model of transformers may also read pictures, of the size
    in its config, and have one class for each row. Inside :func:`fake_copy` they are fake tensors. Tokens are random
    because the gradient of an embedding would be summed in a single row if all were equal.

    Raises:
        ValueError: a size is missing or below 1, the model reads images and ``seq_len`` is given, or it reads
            something else.
    """
    device = device_of(model)
    if batch is not None:
        inputs, targets = (torch.zeros(each.shape, dtype=each.dtype, device=device) for each in batch)
        return inputs, targets
    rows = check(batch_size, Size, "batch_size")
    classes = output_width(model) or 1
    reads = getattr(model, "main_input_name", "input_ids")
    if reads == "pixel_values":
        if seq_len is not None:
            raise ValueError(f"seq_len is {seq_len}, but a {type(model).__name__} reads images; leave seq_len out.")
        inputs = _pictures(model, rows)
    elif reads == "input_ids":
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", classes)
        inputs = torch.randint(vocabulary, (rows, check(seq_len, Size, "seq_len")), device=device)
        if not hasattr(model, "can_generate") or model.can_generate():  # pyright: ignore[reportCallIssue]
            return inputs, torch.randint(classes, inputs.shape, device=device)  # a target for each token
    else:
        raise ValueError(
            f"A {type(model).__name__} reads {reads}, whose shape does not follow from a batch size; pass inputs and "
            "targets as batch."
        )
    with torch.no_grad():
        shape = logits(model, inputs[:1]).shape[1:-1]  # one class for a row, or for each of its tokens
    return inputs, torch.randint(classes, (rows, *shape), device=device)


def _pictures(model: nn.Module, count: int) -> Tensor:
    """Return random pictures of the size in the model's config: (count, channels, height, width)."""
    config: Any = model.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    parameter = next(model.parameters())
    shape = count, getattr(config, "num_channels", 3), height, width
    return torch.rand(shape, dtype=parameter.dtype, device=parameter.device)


def shape_of(batch: Batch) -> str:
    """Return the inputs' shape as text, such as "4 x 128"."""
    return " x ".join(str(size) for size in batch[0].shape)


def output_width(model: nn.Module) -> int | None:
    """Return the number of classes or tokens that the output head scores; None if the model does not name its head."""
    head = output_head(model)
    if head is None:
        return None
    return getattr(head, "out_features", None) or len(cast("Tensor", head.weight))


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


def tensors_of(module: nn.Module, recurse: bool = True) -> list[Tensor]:
    """Return a module's parameters and buffers, with those of the modules inside it unless ``recurse`` is false."""
    return [*module.parameters(recurse), *module.buffers(recurse)]


def storage_of(tensor: Tensor) -> int:
    """Return a number that identifies a tensor's memory for as long as that memory is in use."""
    return tensor.untyped_storage()._cdata


def nested_tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested lists, tuples and dicts; torch's ``tree_leaves`` takes several times as long."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from nested_tensors(entry)


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
    elif device.type != "meta":
        pick_device(device)  # raises if it does not exist
    model = build_on_meta(model)
    # A model may hold tensors that are neither parameters nor buffers.
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def pretend(tensor: Tensor) -> Tensor:
        fake = mode.from_tensor(tensor.detach())
        cast_to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if (fake.device, fake.dtype) == (device, cast_to):
            return fake
        with mode:
            return torch.empty_strided(fake.size(), fake.stride(), dtype=cast_to, device=device)

    twin = copy_with(model, pretend)
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
        inputs = list(nested_tensors((args, kwargs)))
        any_fake = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if any_fake or not (inputs or func._overloadpacket is torch.ops.aten.arange):
            return func(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            out = None  # the result or its shape depends on values, which are computed below
        if any(tensor.numel() > _MOST_REAL or tensor.device.type == "meta" for tensor in nested_tensors(out)):
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
    return copy_with(model, Tensor.detach, left_out)


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
    shared = {storage_of(tensor) for tensor in tensors_of(model)}
    for tensor in [*(each for each in twin.parameters() if each.requires_grad), *twin.buffers()]:
        if storage_of(tensor) in shared:
            tensor.data = tensor.data.clone()


# Models of many identical blocks, and the same with a few


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's stack of blocks by name, lowest first: the entries of its longest ``nn.ModuleList``."""
    lists = [(len(module), name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=lambda pair: pair[0], default=(0, ""))[1]
    return {name: m for name, m in model.named_modules() if longest and name.rpartition(".")[0] == longest}


def last_blocks(model: nn.Module, count: int) -> list[str]:
    """Return the linear layers of the last ``count`` blocks, as ``targets``: no gradient is computed below them.

    Raises:
        ValueError: the model has fewer blocks, or none.
    """
    names = list(transformer_blocks(model))
    if not 1 <= count <= len(names):
        raise ValueError(f"count is {count}, but {type(model).__name__} is a stack of {len(names)} blocks.")
    prefixes = tuple(f"{name}." for name in names[len(names) - count :])
    return [layer for layer in match_layers(model, "all-linear", ()) if layer.startswith(prefixes)]


def blocks_are_alike(model: nn.Module) -> bool:
    """Return whether the blocks of a model's stack look alike, and are so many that a few of them save time.

    Blocks look alike if their modules have the same classes, the same settings (numbers, texts and truth values), and
    parameters and buffers of the same shapes, dtypes and need of a gradient. That decides only for models whose code is
    known: all modules must come from torch, transformers, peft or this package, and a list in the model's config with
    an entry for each block must have the same entry throughout.

    Args:
        model: ready to train.
    """
    blocks = transformer_blocks(model)
    if len(blocks) < _FEWEST or len(set(map(_look, blocks.values()))) > 1:
        return False
    if any(type(module).__module__.partition(".")[0] not in _LIBRARIES for module in model.modules()):
        return False
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for value in vars(part).values() if hasattr(part, "__dict__") else ():
            of_blocks = isinstance(value, list | tuple) and len(value) == len(blocks)
            if of_blocks and any(entry != value[0] for entry in value):
                return False
    return not any(part.isdigit() for part in next(iter(blocks)).split(".")[:-1])  # parts of one block, such as experts


def _look(block: nn.Module) -> Hashable:
    """Return all of a block that may decide which operations it takes."""
    modules = []
    for name, module in block.named_modules():
        settings = [
            (key, len(value) if isinstance(value, dict) else value)  # hooks are held in dictionaries
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | torch.dtype | dict | None) and key not in _INDICES
        ]
        tensors = [
            (key, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        ]
        modules.append((name, type(module), tuple(settings), tuple(tensors)))
    return tuple(modules)


def keep_blocks(model: nn.Module, count: int) -> nn.Module:
    """Return a copy of a model that shares its weights, with only the first ``count`` blocks."""
    blocks = transformer_blocks(model)
    short = copy_sharing_weights(model, list(blocks.values())[count:])
    del cast(nn.ModuleList, short.get_submodule(next(iter(blocks)).rpartition(".")[0]))[count:]
    return short
