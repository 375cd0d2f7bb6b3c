"""A GPU for tests on a machine that has none: it says "cuda:0", and refuses what CUDA refuses.

    with simulated_cuda() as gpu:
        model = Model().to("cuda")         # any code that names a CUDA device, as it is
        step(model, batch)
        gpu.waits.clear()
        step(model, batch)
        assert not gpu.waits               # the host never waited for the device

Tensors "on" the device keep their numbers in the CPU's memory, and the CPU's kernels compute them. So what comes out is
what the CPU gives, to the bit, but for random draws on the device, whose stream is another one.

It refuses, in CUDA's words:

- an operation on tensors of both devices (a single number, of no dimension, may be on the CPU, as on CUDA);
- a generator of the other device, whether a draw or a ``with torch.device("cuda")`` around it asks for the GPU;
- ``.numpy()`` and ``numpy.asarray``; indices on the GPU into a tensor on the CPU; "cuda:1".

It counts in ``gpu.waits``, by name, what makes the host wait for the device:

- "upload": a copy to the device. From pageable memory it ends in a wait, and lists and numbers given to
  ``torch.tensor(..., device="cuda")`` or ``new_tensor`` are in such memory;
- "download": a copy from the device; "read": a number that Python looks at, as ``item``, ``float``, ``bool``, ``if``;
- "synchronize": ``torch.cuda.synchronize``;
- operations that ask how many there are, or whether all went well, by the name of the operation: ``nonzero``, indexing
  by a mask, ``equal``, ``unique``, singular values.

It keeps an account of memory, which ``torch.cuda.memory_allocated`` and its like report: tensors' storages in blocks of
512 bytes, and a cuBLAS workspace of 32 MiB for the first product in a forward pass and another for the first in a
backward pass, which runs in a thread of its own on CUDA.

It cannot see:

- what CUDA's kernels do otherwise than the CPU's: their numbers, dtypes that they lack, what they allocate for
  themselves, how long they take, which of them torch would choose (a fused RMS norm is the CPU's here);
- threads other than the test's, where only the refusals of ``.numpy()`` and of mixed devices work;
- fake tensors: torch itself aborts where one is to be on a device that is not there. Rehearse on the CPU;
- in-place changes of shape, pickling, gradients across a copy to the device: refused, so that nobody trusts them;
- more than one GPU.

How it works. A tensor of the device is a wrapper that tells Python "cuda:0" and torch's C++ "meta". With "cuda"
autograd would look for a thread of the device, and with "cpu" kernels would read memory that is not there. "meta" has
neither, and every operation comes to ``__torch_dispatch__``, which calls it on the tensors within. What has no tensor
of the device among its arguments, such as ``torch.zeros(3, device="cuda")`` or ``tensor.to("cuda")``, is caught before
it is dispatched, by a TorchFunctionMode. Where C++ makes a tensor for a Python number on its own (``where``), that is
done beforehand by name, and another such operation would need a line in ``_Calls``.

It leans on private names of torch, which :func:`missing` looks for.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
MIB = 2**20
WORKSPACE, BLOCK, CARD = 32 * MIB, 512, 64 * 2**30  # bytes
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
_COPIES = ("copy_", "_foreach_copy_", "_to_copy")
_ASK = ("nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount", "_linalg_svd", "_linalg_eigh")
_READS = {"_local_scalar_dense": "read"} | {name: name for name in _ASK}
_DRAWS = ("rand", "randn", "randint", "randperm", "normal", "rand_like", "randn_like")
_FROM_NUMBERS = ("tensor", "as_tensor", "asarray")
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")
_PRIVATE = {
    "torch.Tensor._make_wrapper_subclass": Tensor,
    "torch._C._disabled_torch_function_impl": torch._C,
    "torch._C._nn._parse_to": torch._C._nn,
    "torch.autograd._engine_run_backward": torch.autograd,
    "torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype": torch.nn.utils.clip_grad,
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": torch.ops.aten,
}


def missing() -> list[str]:
    """The private names of torch that this leans on, and that the torch which is installed does not have."""
    return [name for name, owner in _PRIVATE.items() if not hasattr(owner, name.rpartition(".")[2])]


class SimulatedGPU:
    """The state of the device: its generator, what the host waited for, and the account of its memory, in bytes."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability, self.generator = capability, _Generator("cuda")
        self.waits: Counter[str] = Counter()
        self.passes = ["forward"]
        self.workspaces: set[str] = set()
        self._storages: dict[int, weakref.ref] = {}
        self.allocated = self.requested = self.most_allocated = self.most_requested = 0

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from now until its death, if it is new."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or not size:
            return

        def dead(_: weakref.ref) -> None:
            del self._storages[key]
            self._grow(-size)

        self._storages[key] = weakref.ref(storage, dead)
        self._grow(size)

    def multiply(self) -> None:
        """Count cuBLAS's workspace at the first product of a pass."""
        if self.passes[-1] not in self.workspaces:
            self.workspaces.add(self.passes[-1])
            self._grow(WORKSPACE)

    def _grow(self, size: int) -> None:
        self.requested += size
        self.allocated += -(-abs(size) // BLOCK) * BLOCK * (1 if size > 0 else -1)
        self.most_requested = max(self.most_requested, self.requested)
        self.most_allocated = max(self.most_allocated, self.allocated)

    def forget_peak(self, *_: Any) -> None:
        """What torch.cuda.reset_peak_memory_stats does."""
        self.most_requested, self.most_allocated = self.requested, self.allocated

    def stats(self, *_: Any) -> dict[str, int]:
        """The entries of torch.cuda.memory_stats that are kept."""
        return {
            "allocated_bytes.all.current": self.allocated,
            "allocated_bytes.all.peak": self.most_allocated,
            "requested_bytes.all.current": self.requested,
            "requested_bytes.all.peak": self.most_requested,
        }


class _Generator(torch._C.Generator):
    """torch.Generator, which remembers for which device it was made; its numbers are the CPU's."""

    def __new__(cls, device: torch.device | str = "cpu") -> _Generator:
        self = super().__new__(cls)
        self.on_gpu = torch.device(device).type == "cuda"
        return self


_now: SimulatedGPU | None = None  # the device, while there is one


class _OnGPU(Tensor):
    """A tensor of the device; ``numbers`` is the tensor that holds them."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> _OnGPU:
        place = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype, device=META, **place)

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        if _now is not None:
            _now.hold(numbers.untyped_storage())

    device = property(lambda self: CUDA)
    is_cuda, is_cpu, is_meta = (property(lambda self, value=value: value) for value in (True, False, False))

    @property
    def data(self) -> _OnGPU:
        return _OnGPU(self.numbers)

    @data.setter
    def data(self, new: _OnGPU) -> None:
        Tensor.data.__set__(self, new)
        self.numbers = new.numbers

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return _moved(self, *args, **kwargs)

    def cpu(self) -> Tensor:
        return _moved(self, CPU)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = _OnGPU(self.numbers.clone())
        as_it_was = nn.Parameter if isinstance(self, nn.Parameter) else Tensor.requires_grad_
        return memo.setdefault(id(self), as_it_was(copied, self.requires_grad))

    def __reduce_ex__(self, protocol: int) -> None:
        raise TypeError("A tensor of the simulated GPU cannot be pickled; use Tensor.cpu() first.")

    def __repr__(self, **_: Any) -> str:
        return f"{self.numbers!r} on the simulated GPU"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = func._opname, dict(kwargs or {})
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} changes a tensor's shape in place, which the simulated GPU does not do.")
        leaves = tree_leaves((args, kwargs))
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, _OnGPU)]
        _refuse_mixture(func, name, args, others)
        fetched = name == "_to_copy" and kwargs.get("device") == CPU
        if _now is not None:
            _now.waits.update(_waits(name, args, fetched))
            if name in _PRODUCTS:
                _now.multiply()
        if any(argument.name == "generator" for argument in func._schema.arguments):
            kwargs["generator"] = _checked(kwargs.get("generator"), True)
        same = {id(leaf): leaf for leaf in others}
        same |= {id(leaf.numbers): leaf for leaf in leaves if isinstance(leaf, _OnGPU)}

        def lowered(value: Any) -> Any:
            if isinstance(value, _OnGPU):
                return value.numbers
            if isinstance(value, Tensor) and value.is_meta and not value.ndim:  # the 0 of where's gradient, made in C++
                return torch.zeros((), dtype=value.dtype)
            return CPU if isinstance(value, torch.device) else value

        def raised(value: Any) -> Any:
            if not isinstance(value, Tensor) or fetched:
                return value
            return same[id(value)] if id(value) in same else _OnGPU(value)

        return tree_map(raised, func(*tree_map(lowered, args), **tree_map(lowered, kwargs)))


def _refuse_mixture(func: Any, name: str, args: tuple, others: list[Tensor]) -> None:
    if name in _INDEXING and isinstance(args[0], _OnGPU):  # indices may be on the CPU
        others = [value for value in args[2:3] if isinstance(value, Tensor) and not isinstance(value, _OnGPU)]
    if name not in _COPIES and any(other.ndim for other in others):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} found at least two devices, cuda:0 and cpu!"
        )


def _waits(name: str, args: tuple, fetched: bool) -> list[str]:
    """Why the host waits for an operation, as often as it does."""
    if fetched:
        return ["download"]
    if name in ("copy_", "_foreach_copy_"):
        pairs = zip(*args[:2], strict=True) if name == "_foreach_copy_" else [args[:2]]
        ways = {(True, False): "upload", (False, True): "download"}
        kinds = [(isinstance(to, _OnGPU), isinstance(source, _OnGPU)) for to, source in pairs]
        return [ways[kind] for kind in kinds if kind in ways]
    if name in _INDEXING:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        uploads = ["upload" for index in indices if not isinstance(index, _OnGPU)]
        value = args[2] if len(args) > 2 else None
        filled = isinstance(value, Tensor) and value.numel() == 1  # then a mask is filled, and nobody counts
        return uploads + ["nonzero" for index in indices if index.dtype in (torch.bool, torch.uint8) and not filled]
    return [_READS[name]] if name in _READS else []


def _checked(generator: Any, on_gpu: bool) -> Any:
    """The generator to draw from, if it is one of the device where the draw is to be."""
    if generator is None:
        return _now.generator if on_gpu and _now is not None else None
    if getattr(generator, "on_gpu", False) != on_gpu:
        wanted, found = ("cuda", "cpu") if on_gpu else ("cpu", "cuda")
        raise RuntimeError(f"Expected a {wanted!r} device type for generator but found {found!r}")
    return generator


def _is_gpu(device: Any) -> bool:
    if device is None or isinstance(device, int) or torch.device(device).type != "cuda":
        return False
    if torch.device(device).index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return True


def _moved(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """What ``tensor.to(...)`` is."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype)
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    dtype, here = dtype or tensor.dtype, isinstance(tensor, _OnGPU)
    to_gpu = here if device is None else _is_gpu(device)
    if to_gpu and not here:
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "The simulated GPU has no gradient for a copy to it; copy first, then require it."
            )
        _now.waits["upload"] += 1
        return _OnGPU(tensor.detach().to(dtype, copy=True))
    if to_gpu == here and dtype == tensor.dtype and not copy and device != META:
        return tensor
    return torch.ops.aten._to_copy(tensor, dtype=dtype, **({} if to_gpu else {"device": device or CPU}))


class _Calls(TorchFunctionMode):
    """Sees torch's functions before they are dispatched: those that ask for the device, and a few by name."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        some_there = any(isinstance(leaf, _OnGPU) for leaf in args)
        if func is Tensor.to:
            return _moved(*args, **kwargs)
        if func is Tensor.cuda:
            return _moved(args[0], CUDA)
        if some_there and name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        if some_there and name == "where":  # C++ would make the numbers' tensors on "meta"
            args = [_OnGPU(torch.tensor(leaf)) if isinstance(leaf, int | float) else leaf for leaf in args]
        if some_there and name == "new_tensor":
            _now.waits["upload"] += 1
            return _OnGPU(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs, "device": CPU}))
        to_gpu = _is_gpu(kwargs.get("device"))
        if "generator" in kwargs or (to_gpu and name in _DRAWS):
            kwargs["generator"] = _checked(kwargs.get("generator"), to_gpu or some_there)
        if not to_gpu:
            return func(*args, **kwargs)
        if name in _FROM_NUMBERS and not some_there:
            _now.waits["upload"] += 1
        trained = kwargs.pop("requires_grad", False)
        out = func(*args, **{**kwargs, "device": None if some_there else CPU})
        out = _OnGPU(out) if isinstance(out, Tensor) and not isinstance(out, _OnGPU) else out
        return out.requires_grad_() if trained else out


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By the CPU's fused kernel, which shares keys by itself; C++ would choose by what it takes for the device."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _moves_tied(apply: Any) -> Any:
    """nn.Module._apply, after which parameters that were one are one: a moved parameter is another object here."""

    def moved(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        slots = [
            (module, name, p) for module in self.modules() for name, p in module._parameters.items() if p is not None
        ]
        apply(self, fn, recurse)
        first: dict[int, Any] = {}
        for module, name, old in slots:
            module._parameters[name] = first.setdefault(id(old), module._parameters[name])
        return self

    return moved


@contextlib.contextmanager
def simulated_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[SimulatedGPU]:
    """The device is there in the block, for this thread.

    Args:
        capability: what torch.cuda.get_device_capability says.

    Raises:
        RuntimeError: this torch lacks a private name that the simulation leans on.
    """
    global _now
    if gone := missing():
        raise RuntimeError(f"torch {torch.__version__} has no {', '.join(gone)}, which the simulated GPU is built on.")
    gpu, mode = SimulatedGPU(capability), _Calls()
    run_backward, clip = torch.autograd._engine_run_backward, torch.nn.utils.clip_grad
    group, draw = clip._group_tensors_by_device_and_dtype, gpu.generator

    def backward(*args: Any, **kwargs: Any) -> Any:
        gpu.passes.append("backward")
        try:
            with mode:  # what a checkpointed block calls again are calls too
                return run_backward(*args, **kwargs)
        finally:
            gpu.passes.pop()

    def grouped(tensors: Any, with_indices: bool = False) -> Any:
        found = group(tensors, with_indices)
        return {(CUDA if device == META else device, dtype): rest for (device, dtype), rest in found.items()}

    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": type("device", (contextlib.nullcontext,), {}),
        "synchronize": lambda *_: operator.setitem(gpu.waits, "synchronize", gpu.waits["synchronize"] + 1),
        "get_device_name": lambda *_: "Simulated",
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: SimpleNamespace(name="Simulated", total_memory=CARD),
        "manual_seed": draw.manual_seed,
        "manual_seed_all": draw.manual_seed,
        "get_rng_state": lambda *_: draw.get_state(),
        "set_rng_state": lambda state, *_: draw.set_state(state),
        "mem_get_info": lambda *_: (CARD - gpu.allocated, CARD),
        "memory_allocated": lambda *_: gpu.allocated,
        "max_memory_allocated": lambda *_: gpu.most_allocated,
        "max_memory_reserved": lambda *_: gpu.most_allocated,
        "reset_peak_memory_stats": gpu.forget_peak,
        "memory_stats": gpu.stats,
        "empty_cache": lambda: None,
    }
    patches = [(torch.cuda, name, value) for name, value in cuda.items()]
    patches += [
        (torch, "Generator", _Generator),
        (nn.Module, "_apply", _moves_tied(nn.Module._apply)),
        (torch.autograd, "_engine_run_backward", backward),
        (clip, "_group_tensors_by_device_and_dtype", grouped),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        stack.enter_context(mode)
        _now, before = gpu, _now
        stack.callback(globals().__setitem__, "_now", before)
        yield gpu
