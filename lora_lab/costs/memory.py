"""The memory bill of a training step: which bytes are allocated at its peak, and what for.

    bill = predict(model, LoRA(rank=8), batch_size=4, seq_len=128)     # nothing is allocated
    bill = measure(model, LoRA(rank=8), (inputs, targets))             # a real step, and an independent peak

A model in training holds its weights, a gradient for each trainable weight, the optimiser's state (for AdamW two
numbers for each trainable weight), the activations that autograd saves for the backward pass, and temporaries of
single operations. LoRA cuts the gradients and the optimiser's state; it leaves the weights and most activations.

Both calls follow every storage of the step that ``fit`` takes, from its allocation to its release. :func:`predict` does
so on fake tensors, so that it works for a model of any size. :func:`measure` takes its peak from the allocator itself,
so that the two can disagree, and what the parts do not explain is shown as a part of its own.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

from lora_lab.costs.bill import GIB, MIB, PARTS, SAVED, STATIC, Bill, Difference, Moment, Part
from lora_lab.costs.fake import (
    Source,
    batch_for,
    build_model,
    built_on_meta,
    device_of,
    fake_copy,
    on_each,
    storage_of,
    unshare_trainable,
)
from lora_lab.costs.recording import Recording, StorageLog, on_saved
from lora_lab.costs.repeated import longest_run, prepare_shapes, record_short
from lora_lab.costs.setup import Setup, as_setup, setting_of
from lora_lab.methods import Method
from lora_lab.models.quantize import BlockWeight
from lora_lab.system.device import own_randomness, pick_device
from lora_lab.system.schema import NotNegative, check
from lora_lab.system.wording import short_repr
from lora_lab.train import Batch, TrainingStep

__all__ = [
    "GIB",
    "MIB",
    "PARTS",
    "SAVED",
    "STATIC",
    "Bill",
    "Difference",
    "Moment",
    "Part",
    "device_to_predict",
    "largest",
    "measure",
    "predict",
    "saved_bytes",
]

_LARGEST_SIZE = 2**20  # the largest batch or context that is considered
_BLOCK = 512  # bytes: CUDA's allocator returns multiples of this


# Predicting and measuring


def predict(
    model: Source,
    method: Method | Setup,
    batch_size: int | None = None,
    seq_len: int | None = None,
    *,
    batch: Batch | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Bill:
    """Return the bill of a training step that is never taken: it is rehearsed on fake tensors.

    A second step is rehearsed, because a first one lacks the optimiser's state. Of a stack of identical blocks a few
    are rehearsed, and the others follow from them, byte for byte. The model and the random generators stay as they are.

    Args:
        model: a freshly loaded model; or a function that builds one, of any size; or a name such as "llama-3-8b", or a
            folder with a config.json or the path of one, as for :func:`lora_lab.models.pretrained.architecture`.
        method: how it is trained, or a complete :class:`lora_lab.costs.setup.Setup`.
        batch_size, seq_len: the batch; ``batch_size`` alone for a model of transformers that reads images.
        batch: inputs and targets, for other models; only their shapes and dtypes matter.
        device: where the step would run; default the model's device, or the best one for a factory. Where "cuda" is
            not available, the bill is an estimate, and its ``source`` says so: the CPU's bill with CUDA's block
            sizes, cuBLAS's workspace, CUDA's choice of attention kernel and its fused RMS norm.
        **options: ``dtype``, ``nf4``, ``optimizer``, ``gradient_checkpointing``, ``lean``, ``accumulate``, ``clip``,
            ``loss``, as in :class:`lora_lab.costs.setup.Setup`.

    Raises:
        ValueError: the batch is not described, a value is out of range, the model cannot be made ready, or ``lean``
            has several threads.
    """
    return _Rehearsal(model, as_setup(method, options), device).bill(batch_size, seq_len, batch)


class _Rehearsal:
    """Training steps of one model and setup on fake tensors, with batches of any size.

    Args: as for :func:`predict`.
    """

    def __init__(self, model: Source, setup: Setup, device: torch.device | str | None) -> None:
        setup.check_watchable()
        self.device, self.estimated = device_to_predict(model, device)
        self.model, self.setup = built_on_meta(model), setup
        self.run = longest_run(prepare_shapes(self.model, setup))

    def bill(self, batch_size: int | None, seq_len: int | None, batch: Batch | None = None) -> Bill:
        """Return the bill of a step on such a batch, as from :func:`predict`."""

        def record(model: nn.Module) -> tuple[nn.Module, Recording]:
            with self._prepared(model) as step:
                return step.model, self._record(step, batch_for(step.model, batch_size, seq_len, batch))

        recording = (self.run and record_short(self.model, self.run, record)) or record(self.model)[1]
        if not self.estimated and self.device.type != "cuda":
            return recording.bill("predicted")
        bill = recording.bill("estimated for CUDA, not measured" if self.estimated else "predicted", _BLOCK)
        return bill.plus(Part.WORKSPACE, _workspace_bytes(None if self.estimated else self.device))

    @contextmanager
    def _prepared(self, model: nn.Module) -> Iterator[TrainingStep]:
        """The step of a copy of the model. All tensors that are made meanwhile are fake."""
        with fake_copy(model, self.device, self.setup.dtype) as twin, own_randomness(torch.device("cpu"), 0):
            yield self.setup.step(twin)

    def _record(self, step: TrainingStep, batch: Batch) -> Recording:
        """Record the second step: the first lacks the optimiser's state."""
        parts, weights = self.setup.batches(batch)
        with ExitStack() as stack:
            if self.estimated:
                stack.enter_context(_cuda_attention())
                stack.enter_context(_fused_norms())
            plain = type(step) is TrainingStep
            if plain:
                update_once(step)
            log = StorageLog(step)
            stack.enter_context(_dequantised_once(log))
            if not plain:  # a lean step keeps more than its optimiser does
                log.run(parts, weights)
            log.run(parts, weights)
            return log.recording(setting_of(self.setup, step.model, batch))


def update_once(step: TrainingStep) -> None:
    """Leave behind what a first step does, gradients and the optimiser's state, without taking it."""
    for group in step.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()


@contextmanager
def _dequantised_once(log: StorageLog) -> Iterator[None]:
    """A context in which slices of matrices in blocks that differ in their values only are dequantised once."""

    def rows_once(layer: BlockWeight, rows: Callable[[int, int], Tensor], start: int, stop: int) -> Tensor:
        before = start * layer.shape[1] % layer.block  # weights of the first block that lie before the slice
        key = layer.kind, layer.block, layer.shape, layer.dtype, before, stop - start
        return log.once(key, lambda: rows(start, stop))

    layers: list[Any] = [layer for layer in log.step.model.modules() if isinstance(layer, BlockWeight)]
    for layer in layers:
        layer.rows = partial(rows_once, layer, layer.rows)
    try:
        yield
    finally:
        for layer in layers:
            del layer.rows


def measure(
    model: Source,
    method: Method | Setup,
    batch: Batch,
    *,
    device: torch.device | str | None = None,
    **options: Any,
) -> Bill:
    """Return the bill of a training step that is really taken, with a peak from the allocator itself.

    On the CPU the peak is the largest running sum of torch's allocation events during the second step, on CUDA
    it is ``max_memory_allocated`` of the second step. Both include the model's weights and exclude everything else in
    memory. A third step, which follows storages, finds the parts. The remainder of the peak (mostly buffers inside
    operations) is the part "the rest, unexplained".

    On CUDA two more parts belong to the allocator: cuBLAS's workspace, which stays allocated for the life of the
    process and is counted in every bill, and "unused ends of blocks", because the allocator hands out a free block
    whole if it is only a little larger than requested.

    The model and the random generators stay as they are, bit for bit: weights that will be trained are copied first.
    A factory avoids that copy.

    Args:
        model, method, **options: as for :func:`predict`.
        batch: inputs and targets.
        device: for a factory; default the best one.

    Raises:
        ValueError: as for :func:`predict`, or the model is on the meta device.
    """
    setup = as_setup(method, options)
    setup.check_watchable()
    device = device_of(model) if isinstance(model, nn.Module) else pick_device(device)[0]
    if device.type == "meta":
        raise ValueError("The model is on the meta device, where nothing is ever allocated; use predict.")
    with own_randomness(device, 0):
        twin = build_model(model, device, setup.dtype)
        # Held until the meter stops: otherwise the step's own tensors could reuse a freed address.
        held = [tensor.detach() for tensor in [*twin.parameters(), *twin.buffers()]]
        before = {storage_of(tensor) for tensor in held}
        batch = on_each(batch, lambda tensor: tensor.to(device))
        parts, weights = setup.batches(batch)
        gc.collect()  # garbage that is freed during the step would be subtracted from its memory
        with _meter(device) as meter:
            step = setup.step(twin)
            if isinstance(model, nn.Module):
                unshare_trainable(twin, before)
            step(parts, weights)
            with meter.second_step():
                step(parts, weights)
        after = {storage_of(t): t.untyped_storage().nbytes() for t in [*twin.parameters(), *twin.buffers()]}
        del held
        peak = meter.peak_bytes + sum(size for key, size in after.items() if key in before)
        log = StorageLog(step)
        log.run(parts, weights)
        bill = log.recording(setting_of(setup, twin, batch)).bill("measured")
        del log, step
    gc.collect()
    bill = bill.plus(Part.REST, peak - bill.peak_bytes - meter.ends_bytes)
    bill = bill.plus(Part.ENDS, meter.ends_bytes).plus(Part.WORKSPACE, meter.workspace_bytes)
    return replace(bill, reserved_bytes=meter.reserved_bytes)


class _Meter:
    """The most that the allocator handed out during the second step, counted from when the meter was started.

    The peak includes ``ends_bytes``, which were handed out but not requested. ``workspace_bytes`` come on top.
    """

    peak_bytes = ends_bytes = workspace_bytes = 0
    reserved_bytes: int | None = None

    @contextmanager
    def second_step(self) -> Iterator[None]:
        """Mark the step that counts."""
        yield


class _ProfilerMeter(_Meter):
    """On the CPU: the profiler's events, one for each allocation and each release."""

    @contextmanager
    def second_step(self) -> Iterator[None]:
        with torch.profiler.record_function("lora_lab: second step"):
            yield

    def read(self, profiler: torch.profiler.profile) -> None:
        """Add up the events."""
        autograd_profiler = profiler.profiler
        assert autograd_profiler is not None  # it has been started,
        assert autograd_profiler.kineto_results is not None  # and stopped
        events = autograd_profiler.kineto_results.events()
        (step,) = (event for event in events if event.name() == "lora_lab: second step")
        total = 0
        allocations: list[Any] = [event for event in events if event.name() == "[memory]"]  # the stub lacks nbytes
        for at, size in sorted((event.start_ns(), event.nbytes()) for event in allocations):
            total += size
            if step.start_ns() <= at <= step.end_ns():
                self.peak_bytes = max(self.peak_bytes, total)


class _CudaMeter(_Meter):
    """On CUDA: the caching allocator's own high-water mark."""

    def __init__(self, device: torch.device) -> None:
        _take_workspaces(device)  # otherwise they would count in the first step of a process, and in no other
        self.device, self.workspace_bytes = device, _workspace_bytes(device)
        self.before = torch.cuda.memory_allocated(device)
        self.requested_before = torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0)

    @contextmanager
    def second_step(self) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        self.reserved_bytes = torch.cuda.max_memory_reserved(self.device)
        requested = torch.cuda.memory_stats(self.device).get("requested_bytes.all.peak", 0)
        if requested:  # not every allocator counts it
            self.ends_bytes = self.peak_bytes - (requested - self.requested_before)


def _take_workspaces(device: torch.device) -> None:
    """Multiply matrices once forward and once backward, in the same two threads as a step."""
    square = torch.ones(16, 16, device=device, requires_grad=True)
    (square @ square).sum().backward()


@contextmanager
def _meter(device: torch.device) -> Iterator[_Meter]:
    if device.type == "cuda":
        yield _CudaMeter(device)
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler reports its start and stop on stderr
    meter = _ProfilerMeter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield meter
    meter.read(profiler)


def largest(
    model: Source,
    method: Method | Setup,
    budget_bytes: int,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[int, Bill]:
    """Return the largest batch, or the longest context, whose step fits into ``budget_bytes``, by :func:`predict`.

    Args:
        batch_size, seq_len: pass one of them; the other is searched, up to 2^20.
        model, method, device, **options: as for :func:`predict`.

    Returns:
        The size, and its bill; if not even a size of 1 fits, 0 and the bill of size 1.

    Raises:
        ValueError: both sizes or neither are passed, the budget is not a number of bytes, or as for :func:`predict`.
    """
    if (batch_size is None) == (seq_len is None):
        raise ValueError(f"batch_size is {batch_size} and seq_len {seq_len}; pass exactly one: the other is searched.")

    budget_bytes = check(budget_bytes, NotNegative, "budget_bytes")
    rehearsal = _Rehearsal(model, as_setup(method, options), device)

    def bill_of(size: int) -> Bill:
        return rehearsal.bill(size if batch_size is None else batch_size, size if seq_len is None else seq_len)

    return _secant_search(bill_of, budget_bytes)


def _secant_search(bill_of: Callable[[int], Bill], budget_bytes: int) -> tuple[int, Bill]:
    """Return the largest size that fits, and its bill, as :func:`largest` returns them.

    Memory grows nearly linearly with the size, so that a secant finds the size in about 4 bills. Bisection would need
    20, and a bill takes seconds.
    """
    low, low_bill, high = 1, bill_of(1), _LARGEST_SIZE + 1  # low fits, high does not
    if low_bill.peak_bytes > budget_bytes:
        return 0, low_bill
    size = 2
    while high - low > 1:
        bill = bill_of(size)
        slope = (bill.peak_bytes - low_bill.peak_bytes) / (size - low)
        guess = _LARGEST_SIZE if slope <= 0 else int(size + (budget_bytes - bill.peak_bytes) / slope)
        if bill.peak_bytes <= budget_bytes:
            low, low_bill = size, bill
        else:
            high = size
        size = min(max(guess, low + 1), high - 1)  # so that each bill narrows the range
    return low, low_bill


def saved_bytes(forward: Callable[[], Any], model: nn.Module) -> int:
    """Return the bytes that autograd saves while ``forward()`` runs, except parameters and buffers, each storage once.

    For a single layer or call; :attr:`Bill.saved` has the same for a whole step, by kind of module.

    Args:
        forward: runs the model and its loss; its result is ignored.
        model: the module whose parameters and buffers do not count.

    Raises:
        ValueError: a module of the model ran in another thread, where saved tensors cannot be observed.
    """
    excluded = {storage_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}
    threads: set[int] = set()

    def count(tensor: Tensor) -> None:
        if storage_of(tensor) not in excluded:
            sizes[storage_of(tensor)] = tensor.untyped_storage().nbytes()

    with ExitStack() as stack:
        enter = register_module_forward_pre_hook(lambda module, args: threads.add(threading.get_ident()))
        stack.callback(enter.remove)
        stack.enter_context(on_saved(count))
        result = forward()  # held until the end, so that no address is used twice
    if threads - {threading.get_ident()}:
        raise ValueError(
            "The model ran in several threads, but what autograd saves is seen by hooks that hold for one thread "
            "only; run it in this thread, with Lean(threads=1)."
        )
    del result
    return sum(sizes.values())


# CUDA's choices, on a machine without CUDA


@contextmanager
def _replaced(name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    """A context in which a function of torch.nn.functional is another one.

    A torch function mode would not see blocks that are recomputed in the backward pass.
    """
    plain = getattr(nn.functional, name)
    setattr(nn.functional, name, function)
    try:
        yield
    finally:
        setattr(nn.functional, name, plain)


def _cuda_attention() -> AbstractContextManager:
    """A context in which attention allocates what it would allocate on CUDA.

    CUDA has no fused kernel for heads in float32 that share keys and values, so it computes all scores.
    """
    plain = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shared = query.dtype == torch.float32 and query.shape[-3] != key.shape[-3]
        with sdpa_kernel(SDPBackend.MATH) if shared else nullcontext():
            return plain(query, key, *args, **kwargs)

    return _replaced("scaled_dot_product_attention", attention)


def _fused_norms() -> AbstractContextManager:
    """A context in which F.rms_norm allocates and saves what CUDA's fused kernel does, but computes nothing.

    torch before 2.9 has no such kernel, and none takes a weight of another dtype than the input's.
    """
    plain = nn.functional.rms_norm

    def fused(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None):
        if weight is not None and weight.dtype != input.dtype:
            return plain(input, normalized_shape, weight, eps)
        return _FusedNorm.apply(input, weight, len(normalized_shape))

    return _replaced("rms_norm", fused if hasattr(torch.ops.aten, "_fused_rms_norm_backward") else plain)


class _FusedNorm(torch.autograd.Function):
    """Allocates the input's shape, and saves the input, the weight and one number a row; its values mean nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, normalized: int) -> Tensor:
        rows = x.new_empty(x.shape[:-normalized], dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        return torch.empty_like(x) if needs_x else None, torch.empty_like(weight) if needs_weight else None, None


def device_to_predict(model: Source, device: torch.device | str | None) -> tuple[torch.device, bool]:
    """Return the device to rehearse on, and whether it only stands in for a CUDA device that is not available."""
    if device is None:
        device = device_of(model) if isinstance(model, nn.Module) else torch.device("meta")
        device = pick_device()[0] if device.type == "meta" else device
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"device is {short_repr(device)}, but it must be a device such as 'cpu' or 'cuda'.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        return torch.device("cpu"), True
    return device, False


def _workspace_bytes(device: torch.device | None) -> int:
    """Return the workspaces that cuBLAS allocates on a device: one for the forward pass's thread, one for autograd's.

    By torch's defaults (CublasHandlePool.cpp; CUBLAS_WORKSPACE_CONFIG overrides them) each has 32 MiB on compute
    capability 9.0, Hopper, and 8.1 MiB before. On 10.x and 12.x, Blackwell, it is 32 MiB by torch's newest sources,
    which count here, and 8.1 MiB by older ones. None stands for a card that is not available, and counts as one before
    Hopper.
    """
    generation = 0 if device is None else torch.cuda.get_device_capability(device)[0]
    return 2 * (32 * MIB if generation in (9, 10, 12) else 8_519_680)
