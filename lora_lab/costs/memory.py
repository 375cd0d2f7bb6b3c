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
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_lab.costs.bill import GIB, MIB, Bill, Part, Recording, StorageLog, extend_recording
from lora_lab.costs.fake import Source, build_model, device_of, device_to_run, storage_of, tensors_of, unshare_trainable
from lora_lab.costs.setup import Rehearsal, Setup, as_setup, setting_of
from lora_lab.lean.step import Lean
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.models.quantize import BlockWeight
from lora_lab.system.device import own_randomness, pick_device
from lora_lab.system.schema import NotNegative, check
from lora_lab.train import Batch, TrainingStep

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
    return _Bills(model, as_setup(method, options), device).predict(batch_size, seq_len, batch)


class _Bills:
    """Bills of one model and setup, for batches of any size. Args: as for :func:`predict`."""

    def __init__(self, model: Source, setup: Setup, device: torch.device | str | None) -> None:
        self.device, self.estimated = _device_to_predict(model, device)
        self.rehearsal = Rehearsal(model, setup, self.device)

    def predict(self, batch_size: int | None, seq_len: int | None, batch: Batch | None = None) -> Bill:
        """Return the bill of a step on such a batch."""
        setup = self.rehearsal.setup

        def record(step: TrainingStep, fake_batch: Batch) -> Recording:
            log = StorageLog(step)
            _dequantise_once(log)
            with _allocate_as_cuda() if self.estimated else nullcontext():
                log.run_second(*setup.batches(fake_batch))
            return log.recording(setting_of(setup, step.model, fake_batch))

        recording = self.rehearsal.follow(record, extend_recording, batch_size, seq_len, batch)
        if not self.estimated and self.device.type != "cuda":
            return recording.bill("predicted")
        bill = recording.bill("estimated for CUDA, not measured" if self.estimated else "predicted", _BLOCK)
        return bill.plus(Part.WORKSPACE, _workspace_bytes(None if self.estimated else self.device))


def _dequantise_once(log: StorageLog) -> None:
    """Let the model dequantise slices of matrices in blocks once that differ in their values only."""

    def rows_once(layer: BlockWeight, rows: Callable[[int, int], Tensor], start: int, stop: int) -> Tensor:
        # Weights of the first block that lie before the slice.
        before = start * layer.shape[1] % layer.format.weights
        key = layer.kind, layer.shape, layer.dtype, before, stop - start
        return log.once(key, lambda: rows(start, stop))

    for layer in log.step.model.modules():
        if isinstance(layer, BlockWeight):
            layer.rows = partial(rows_once, layer, layer.rows)


def measure(
    model: Source, method: Method | Setup, batch: Batch, *, device: torch.device | str | None = None, **options: Any
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
    device = device_to_run(model, device)
    with own_randomness(device, 0):
        twin = build_model(model, device, setup.dtype)
        # Held until the meter stops: otherwise the step's own tensors could reuse a freed address.
        held = [tensor.detach() for tensor in tensors_of(twin)]
        before = {storage_of(tensor) for tensor in held}
        batch = batch[0].to(device), batch[1].to(device)
        parts, weights = setup.batches(batch)
        gc.collect()  # garbage that is freed during the step would be subtracted from its memory
        start_meter = _cuda_meter if device.type == "cuda" else _cpu_meter
        with start_meter(device) as meter:
            step = setup.step(twin)
            log = StorageLog(step)  # refuses a step of several threads, before it is taken
            if isinstance(model, nn.Module):
                unshare_trainable(twin, model)
            step(parts, weights)
            with meter.second_step():
                step(parts, weights)
        after = {storage_of(t): t.untyped_storage().nbytes() for t in tensors_of(twin)}
        del held
        peak = meter.peak_bytes + sum(size for key, size in after.items() if key in before)
        log.run(parts, weights)
        bill = log.recording(setting_of(setup, twin, batch)).bill("measured")
        del log, step
    gc.collect()
    bill = bill.plus(Part.REST, peak - bill.peak_bytes - meter.ends_bytes)
    bill = bill.plus(Part.ENDS, meter.ends_bytes).plus(Part.WORKSPACE, meter.workspace_bytes)
    return replace(bill, reserved_bytes=meter.reserved_bytes)


@dataclass
class _Meter:
    """The most that the allocator handed out during the second step, counted from when the meter was started.

    The peak includes ``ends_bytes``, which were handed out but not requested. ``workspace_bytes`` come on top.
    """

    second_step: Callable[[], AbstractContextManager]
    workspace_bytes: int = 0
    peak_bytes: int = 0
    ends_bytes: int = 0
    reserved_bytes: int | None = None


@contextmanager
def _cpu_meter(device: torch.device) -> Iterator[_Meter]:
    """On the CPU: the profiler's events, one for each allocation and each release."""
    # Otherwise the profiler reports its start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    name = "lora_lab: second step"
    meter = _Meter(partial(torch.profiler.record_function, name))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield meter
    found: Any = profiler.profiler  # the stub lacks what is there once the profiler has been stopped
    events = found.kineto_results.events()
    (step,) = (event for event in events if event.name() == name)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    totals = zip(changes, itertools.accumulate(size for _, size in changes), strict=True)
    meter.peak_bytes = max(total for (at, _), total in totals if step.start_ns() <= at <= step.end_ns())


@contextmanager
def _cuda_meter(device: torch.device) -> Iterator[_Meter]:
    """On CUDA: the caching allocator's own high-water mark."""
    # Otherwise they would count in the first step of a process, and in no other.
    _take_workspaces(device)
    before = torch.cuda.memory_allocated(device)
    requested_before = torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0)

    @contextmanager
    def second_step() -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(device)
        yield
        meter.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        meter.reserved_bytes = torch.cuda.max_memory_reserved(device)
        requested = torch.cuda.memory_stats(device).get("requested_bytes.all.peak")
        meter.ends_bytes = 0 if requested is None else meter.peak_bytes - (requested - requested_before)

    meter = _Meter(second_step, _workspace_bytes(device))
    yield meter


def _take_workspaces(device: torch.device) -> None:
    """Multiply matrices once forward and once backward, in the same two threads as a step."""
    square = torch.ones(16, 16, device=device, requires_grad=True)
    (square @ square).sum().backward()


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

    Memory grows nearly linearly with the size, so that a secant finds the size in about 4 bills. Bisection would need
    20, and a bill takes seconds.

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
    bills = _Bills(model, as_setup(method, options), device)

    def bill_of(size: int) -> Bill:
        if batch_size is None:
            return bills.predict(size, seq_len)
        return bills.predict(batch_size, size)

    return _search_by_secants(bill_of, budget_bytes)


def _search_by_secants(bill_of: Callable[[int], Bill], budget_bytes: int) -> tuple[int, Bill]:
    """Return the largest size that fits, and its bill, as :func:`largest` does."""
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


# CUDA's choices, on a machine without CUDA


@contextmanager
def _allocate_as_cuda() -> Iterator[None]:
    """A context in which attention and RMS norms allocate and save what they would on CUDA; their values mean nothing.

    CUDA has no fused kernel for heads in float32 that share keys and values, so it computes all scores. It has one for
    norms, but not with a weight of another dtype than the input's. A torch function mode would not see blocks that are
    recomputed in the backward pass.
    """
    plain_attention, plain_norm = nn.functional.scaled_dot_product_attention, nn.functional.rms_norm

    def attention(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shared = query.dtype == torch.float32 and query.shape[-3] != key.shape[-3]
        with sdpa_kernel(SDPBackend.MATH) if shared else nullcontext():
            return plain_attention(query, key, *args, **kwargs)

    def norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None):
        if weight is not None and weight.dtype != input.dtype:
            return plain_norm(input, normalized_shape, weight, eps)
        return _FusedNorm.apply(input, weight, len(normalized_shape))

    with patch.multiple(nn.functional, scaled_dot_product_attention=attention, rms_norm=norm):
        yield


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


def _device_to_predict(model: Source, device: torch.device | str | None) -> tuple[torch.device, bool]:
    """Return the device to rehearse on, and whether it only stands in for a CUDA device that is not available."""
    if device is None:
        device = device_of(model) if isinstance(model, nn.Module) else torch.device("meta")
        device = pick_device()[0] if device.type == "meta" else device
    if re.fullmatch(r"cuda(:\d+)?", str(device)) and not torch.cuda.is_available():
        return torch.device("cpu"), True
    return pick_device(device)[0], False


def _workspace_bytes(device: torch.device | None) -> int:
    """Return the workspaces that cuBLAS allocates on a device: one for the forward pass's thread, one for autograd's.

    By torch's defaults (CublasHandlePool.cpp; CUBLAS_WORKSPACE_CONFIG overrides them) each has 32 MiB on compute
    capability 9.0, Hopper, and 8.1 MiB before. On 10.x and 12.x, Blackwell, it is 32 MiB by torch's newest sources,
    which count here, and 8.1 MiB by older ones. None stands for a card that is not available, and counts as one before
    Hopper.
    """
    generation = 0 if device is None else torch.cuda.get_device_capability(device)[0]
    return 2 * (32 * MIB if generation in (9, 10, 12) else 8_519_680)


# Which setups fit on a card


def training_setups(rank: int = 8, dtype: torch.dtype | None = None, lean: bool = True) -> dict[str, Setup]:
    """Setups for training a language model, from the most memory to the least.

    Args:
        rank: LoRA's rank; alpha is twice the rank.
        dtype: of the weights; None leaves them as they are. The lean step saves its activations in float32.
        lean: with the lean step, which is for our Llama only.
    """
    full, lora = Setup(FullFineTuning(), dtype), Setup(LoRA(rank, 2 * rank), dtype)
    half = torch.bfloat16 if dtype == torch.bfloat16 else None
    setups = {
        "full fine-tuning": full,
        "full, checkpointing": replace(full, gradient_checkpointing=True),
        f"LoRA r={rank}": lora,
        f"LoRA r={rank}, checkpointing": replace(lora, gradient_checkpointing=True),
        f"LoRA r={rank}, lean, checkpointing": Setup(lora.method, lean=Lean(base_dtype=half, checkpoint=True)),
        f"QLoRA r={rank}, checkpointing": replace(lora, nf4=True, gradient_checkpointing=True),
    }
    return {label: setup for label, setup in setups.items() if lean or setup.lean is None}


def report(
    model: Source,
    name: str,
    setups: Mapping[str, Setup],
    batch_size: int,
    seq_len: int | None,
    device: torch.device | str | None = None,
    budget_bytes: int | None = None,
    look_for: str | None = None,
    with_bills: bool = False,
) -> list[dict[str, Any]]:
    """Print which training setups fit on a card, each row as soon as it is computed, and return the rows.

    Args:
        model, batch_size, seq_len, device: as for :func:`predict`; ``seq_len`` is None for a model that reads images.
        name: the model's name, for the heading.
        setups: label -> setup, such as those of :func:`training_setups`.
        budget_bytes: the card's memory; None leaves out the comparison.
        look_for: "batch" or "seq": also find the largest that fits the budget, with the other unchanged.
        with_bills: print each bill, part by part, after the table.

    Returns:
        A row for each setup, in values of JSON: its bill, and what the card has left at the peak.

    Raises:
        ValueError: as for :func:`predict`.
    """
    bills = []
    rows = []
    for label, setup in setups.items():
        bills.append(bill := predict(model, setup, batch_size, seq_len, device=device))
        row = {"setup": label, "fits": None, "free_bytes": None, "largest_batch_size": None, "largest_seq_len": None}
        line = f"{label:<32}{bill.peak_bytes / GIB:>6.2f} GiB"
        if budget_bytes is not None:
            free = budget_bytes - bill.peak_bytes
            row |= {"fits": free >= 0, "free_bytes": free}
            line += f"  {'yes' if free >= 0 else 'no':<4}{f'({free / GIB:+.2f} GiB)':<14}"
            if look_for:
                fixed = {"seq_len": seq_len} if look_for == "batch" else {"batch_size": batch_size}
                most, _ = largest(model, setup, budget_bytes, device=device, **fixed)
                row["largest_batch_size" if look_for == "batch" else "largest_seq_len"] = most
                line += f"{most:>13,}"
        if not rows:
            size = f"{batch_size} pictures" if seq_len is None else f"{batch_size} x {seq_len} tokens"
            fits = "" if budget_bytes is None else f"  fits {budget_bytes / GIB:.4g} GiB?"
            print(f"{name}, batch {size}: peak of one step, {bill.source}")
            print(f"{'':<32}{'peak':>10}{fits:<20}{f'largest {look_for}' if look_for else ''}".rstrip())
        print(line.rstrip(), flush=True)
        rows.append(row | bill.to_dict())
    if any(Part.WORKSPACE in bill.parts for bill in bills):  # they are for CUDA
        print("In addition, CUDA's own context takes a few hundred MiB on the GPU, and the allocator leaves gaps.")
    for bill in bills if with_bills else ():
        print(f"\n{bill}")
    return rows


def parse_bytes(text: str) -> int:
    """Return a size such as "24GiB", "512 MiB" or "80GB" in bytes.

    Raises:
        ValueError: the text is not a positive number with such a unit.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT])(I?)B\s*", text.upper())
    if not match or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no size; write a number with its unit, such as 24GiB or 80GB.")
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    power = {"K": 1, "M": 2, "G": 3, "T": 4}[prefix]
    return int(float(number) * base**power)
