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
import math
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lora_lab.costs.fake import (
    Factory,
    batch_for,
    build_model,
    device_of,
    fake_copy,
    on_each,
    storage_of,
    unshare_trainable,
)
from lora_lab.costs.setup import Setup, as_setup, setting_of
from lora_lab.costs.trace import Kind, StepTracer, output_width
from lora_lab.inject import output_head
from lora_lab.methods import Method
from lora_lab.system.device import own_randomness, pick_device
from lora_lab.train import Batch, TrainingStep

MIB, GIB = 2**20, 2**30


class Part(StrEnum):
    """A part of a bill, in the order in which bills list them."""

    FROZEN = "frozen weights"
    TRAINED = "trained weights"
    GRADIENTS = "gradients"
    HEAD_GRADIENT = "gradient of the head"  # until it is added to the embedding's, if both are one weight
    OPTIMISER = "optimiser state"
    SAVED_ATTENTION = "saved: attention"
    SAVED_MLP = "saved: MLP"
    SAVED_NORMS = "saved: norms"
    SAVED_ADAPTERS = "saved: adapters"
    SAVED_OTHER = "saved: other layers"
    LOGITS = "logits and loss"
    RECOMPUTED = "recomputed activations"
    TEMPORARIES = "temporaries"
    WORKSPACE = "cuBLAS workspace"
    ENDS = "unused ends of blocks"
    REST = "the rest, unexplained"

    __repr__ = str.__repr__  # a bill's parts print as a dictionary of plain strings


PARTS = tuple(Part)
STATIC = (Part.FROZEN, Part.TRAINED, Part.GRADIENTS, Part.OPTIMISER)
SAVED = tuple(Part(f"saved: {kind}") for kind in Kind if kind != Kind.LOGITS)
_POINTS = 400  # of a timeline
_NEAR_PEAK = 25  # operations before and after the peak that a timeline holds in full
_LARGEST_SIZE = 2**20  # the largest batch or context that is considered
_BLOCK = 512  # bytes: CUDA's allocator returns multiples of this


@dataclass(frozen=True)
class Moment:
    """What is allocated after one operation: the phase of the step, bytes by part, and the operation's number."""

    phase: str
    parts: Mapping[str, int]
    operation: int

    @property
    def total_bytes(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Bill:
    """What a training step needs at its peak, in bytes by part; the parts add up to the peak.

    Args:
        parts: part -> bytes, with the names of :class:`Part`. Batches themselves are not counted.
        moment: the operation at which the peak is reached.
        source: "predicted", "measured", or "estimated for CUDA, not measured".
        setting: the model, the setup and the batch.
        saved: what autograd has saved at the end of the forward pass, by the kind of module that saved it. A storage
            that several modules save counts once, and for adapters only if no other kind of module saves it.
        timeline: up to 400 moments of the step in order; those within 25 operations of the peak are among them.
        reserved_bytes: the most that CUDA's allocator reserved on the device; None elsewhere.
    """

    parts: Mapping[str, int]
    moment: str
    source: str
    setting: str
    saved: Mapping[str, int] = field(default_factory=dict)
    timeline: Sequence[Moment] = field(default=(), repr=False)
    reserved_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """The most that is allocated at one moment."""
        return sum(self.parts.values())

    @property
    def saved_bytes(self) -> int:
        """What autograd has saved at the end of the forward pass."""
        return sum(self.saved.values())

    @property
    def static_bytes(self) -> int:
        """Weights, gradients and optimiser state at the peak. An early peak comes before the gradients."""
        return sum(self.parts.get(part, 0) for part in STATIC)

    def plus(self, part: str, size: int) -> Bill:
        """The same bill with one more part, of ``size`` bytes."""
        return replace(self, parts=_ordered({**self.parts, part: size}))

    def __sub__(self, other: Bill) -> Difference:
        names = [part for part in PARTS if part in self.parts or part in other.parts]
        return Difference(
            {part: self.parts.get(part, 0) - other.parts.get(part, 0) for part in names}, self.setting, other.setting
        )

    def __str__(self) -> str:
        lines = [f"{self.setting}: {self.source}"]
        lines += [
            f"  {part:<26}{_mib(size):>12} MiB {size / self.peak_bytes:>5.0%}" for part, size in self.parts.items()
        ]
        lines.append(f"  {'peak':<26}{_mib(self.peak_bytes):>12} MiB, in the {self.moment}")
        if self.reserved_bytes is not None:
            lines.append(f"  {'reserved by the allocator':<26}{_mib(self.reserved_bytes):>12} MiB")
        return "\n".join(lines)


@dataclass(frozen=True)
class Difference:
    """One bill minus another, in bytes by part: negative where the first needs less."""

    parts: Mapping[str, int]
    first: str
    second: str

    @property
    def peak_bytes(self) -> int:
        """The difference of the peaks."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        lines = [f"{self.first} minus {self.second}"]
        lines += [f"  {part:<26}{_mib(size, '+'):>12} MiB" for part, size in self.parts.items()]
        return "\n".join([*lines, f"  {'peak':<26}{_mib(self.peak_bytes, '+'):>12} MiB"])


def _mib(size: int, sign: str = "") -> str:
    return f"{size / MIB:{sign},.1f}"


# Following storages


@dataclass
class _Life:
    """A storage from its allocation to its release, and who used it."""

    size: int
    born: int
    phase: str
    kind: Kind
    module: str
    recomputing: bool
    wide: bool
    died: float = math.inf
    savers: set[Kind] = field(default_factory=set)
    named: Part | None = None

    @property
    def part(self) -> Part:
        """The part of the bill that it belongs to, as far as is known by the end of the step."""
        if self.named is not None:
            return self.named
        if self.recomputing:
            return Part.RECOMPUTED
        if self.wide or Kind.LOGITS in self.savers:
            return Part.LOGITS
        if self.savers:
            return Part(f"saved: {min(self.savers - {Kind.ADAPTERS}, default=Kind.ADAPTERS)}")
        return Part.LOGITS if self.kind == Kind.LOGITS and self.phase == "forward" else Part.TEMPORARIES


class StorageLog(StepTracer):
    """Follows every storage of a step: when it is allocated and released, in which module, and who saves it.

    Args:
        step: the step to run.
        block: sizes are rounded up to multiples of this many bytes, as the device's allocator does.
    """

    def __init__(self, step: TrainingStep, block: int = 1) -> None:
        super().__init__(step)
        self.block, self.width = block, output_width(step.model)
        head = output_head(step.model)
        self._head_shape = head.weight.shape if head is not None and head.weight.requires_grad else None
        self.lives: list[_Life] = []
        self.phases: list[str] = []  # of each operation; its index is the time
        self.names: list[str] = []
        self._alive: dict[int, tuple[_Life, weakref.ref]] = {}
        self._of_batch: set[int] = set()
        self._name()

    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Count the operation, and register the storages of its results."""
        if function.namespace == "prim":  # a query of a fake tensor, such as its device
            return
        self.phases.append(self.phase)
        self.names.append(function._opname)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor)

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and follow it; what an earlier step left behind is part of it."""
        self._start = len(self.phases)
        self._of_batch = {storage_of(tensor) for batch in batches for tensor in batch}
        with on_saved(self._save):
            super().run(batches, weights)
        self._name()

    def bill(self, source: str, setting: str) -> Bill:
        """The bill of the last step that was run."""
        totals = [sum(parts.values()) for _, parts in self._moments()]
        peak = max(range(len(totals)), key=totals.__getitem__)
        forward = [time for time in range(self._start, len(self.phases)) if self.phases[time] == "forward"]
        spread = _POINTS - 2 * _NEAR_PEAK - 1
        chosen = {round(i * (len(totals) - 1) / (spread - 1)) for i in range(spread)}
        chosen |= {*range(peak - _NEAR_PEAK, peak + _NEAR_PEAK + 1)}
        timeline: list[Moment] = []
        at_peak: dict[str, int] = {}
        for i, (time, parts) in enumerate(self._moments()):
            if i in chosen:
                timeline.append(Moment(self.phases[time], _ordered(parts), i))
            if i == peak:
                at_peak = _ordered(parts)
        saved: Counter[str] = Counter()
        for life in self.lives:
            if life.savers and life.named is None and life.born <= forward[-1] < life.died:
                saved[life.part] += life.size
        return Bill(at_peak, self._describe(self._start + peak), source, setting, _ordered(saved), timeline)

    def _moments(self) -> Iterator[tuple[int, Counter[str]]]:
        """(time, bytes by part) after each operation of the last step; it is the same counter each time."""
        births: dict[int, list[_Life]] = {}
        deaths: dict[float, list[_Life]] = {}
        for life in self.lives:
            if life.died >= self._start:
                births.setdefault(max(life.born, self._start), []).append(life)
                deaths.setdefault(life.died, []).append(life)
        now: Counter[str] = Counter()
        for time in range(self._start, len(self.phases)):
            for life in births.get(time, ()):
                now[life.part] += life.size
            yield time, now
            for life in deaths.get(time, ()):  # after this operation and before the next
                now[life.part] -= life.size

    def _describe(self, time: int) -> str:
        times = [t for t in range(self._start, len(self.phases)) if self.phases[t] == self.phases[time]]
        born = [life for life in self.lives if life.born == time]
        where = next((life.module or life.kind for life in born if life.phase == "forward" or life.recomputing), "")
        operation = f"{self.phases[time]}, operation {times.index(time) + 1:,} of {len(times):,}: {self.names[time]}"
        return f"{operation} in {where}" if where else operation

    def _name(self) -> None:
        """Record which storages are weights, gradients and optimiser state by now."""
        parameters, buffers = list(self.step.model.parameters()), list(self.step.model.buffers())
        state = [value for values in self.step.optimizer.state.values() for value in values.values()]
        named = {
            Part.FROZEN: [p for p in parameters if not p.requires_grad] + buffers,
            Part.TRAINED: [p for p in parameters if p.requires_grad],
            Part.GRADIENTS: [p.grad for p in parameters if p.grad is not None],
            Part.OPTIMISER: [value for value in state if isinstance(value, Tensor)],
        }
        for part, tensors in named.items():
            for tensor in tensors:
                self._enter(tensor)  # tensors from before the first step are registered here
                self._alive[storage_of(tensor)][0].named = part

    def _enter(self, tensor: Tensor) -> None:
        key = storage_of(tensor)
        if key in self._alive or key in self._of_batch:
            return
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // self.block) * self.block
        wide = self.width is not None and tensor.ndim > 1 and tensor.shape[-1] == self.width
        time = max(0, len(self.phases) - 1)
        life = _Life(size, time, self.phase, self.kind, self.module, self.recomputing, wide)
        if self.phase == "backward" and tensor.shape == self._head_shape:
            life.named = Part.HEAD_GRADIENT
        self.lives.append(life)

        def dead(_: weakref.ref) -> None:
            life.died = len(self.phases) - 1
            self._alive.pop(key, None)

        self._alive[key] = (life, weakref.ref(storage, dead))

    def _save(self, tensor: Tensor) -> None:
        if (entry := self._alive.get(storage_of(tensor))) is not None:
            entry[0].savers.add(self.kind)


def on_saved(function: Callable[[Tensor], None]) -> saved_tensors_hooks:
    """A context in which ``function`` is called with each tensor that autograd saves for the backward pass."""

    def pack(tensor: Tensor) -> Tensor:
        function(tensor)
        return tensor.detach()  # undetached, an output would keep its own graph alive

    return saved_tensors_hooks(pack, lambda tensor: tensor)


def _ordered(parts: Mapping[str, int]) -> dict[str, int]:
    return {part: parts[part] for part in PARTS if parts.get(part)}


# Predicting and measuring


def predict(
    model: nn.Module | Factory,
    method: Method | Setup,
    batch_size: int | None = None,
    seq_len: int | None = None,
    *,
    batch: Batch | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Bill:
    """The bill of a training step that is never taken: it is rehearsed on fake tensors.

    Two steps are rehearsed, and the second is reported, because the first lacks the optimiser's state. The model and
    the random generators stay as they are.

    Args:
        model: a freshly loaded model; or a function that builds one, of any size.
        method: how it is trained, or a complete :class:`lora_lab.costs.setup.Setup`.
        batch_size, seq_len: the batch, for models that read token ids.
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
    setup = as_setup(method, options)
    setup.check_watchable()
    device, estimated = device_to_predict(model, device)
    on_cuda = estimated or device.type == "cuda"
    with fake_copy(model, device, setup.dtype) as twin, own_randomness(torch.device("cpu"), 0), ExitStack() as stack:
        batch = batch_for(twin, batch_size, seq_len, batch)
        parts, weights = setup.batches(batch)
        step = setup.step(twin)
        if estimated:
            stack.enter_context(_cuda_attention(step, parts[0]))
            stack.enter_context(_fused_norms())
        log = StorageLog(step, _BLOCK if on_cuda else 1)
        log.run(parts, weights)
        log.run(parts, weights)
        source = "estimated for CUDA, not measured" if estimated else "predicted"
        bill = log.bill(source, setting_of(setup, twin, batch))
    return bill.plus(Part.WORKSPACE, _workspace_bytes(None if estimated else device)) if on_cuda else bill


def measure(
    model: nn.Module | Factory,
    method: Method | Setup,
    batch: Batch,
    *,
    device: torch.device | str | None = None,
    **options: Any,
) -> Bill:
    """The bill of a training step that is really taken, with a peak from the allocator itself.

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
        bill = log.bill("measured", setting_of(setup, twin, batch))
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
    model: nn.Module | Factory,
    method: Method | Setup,
    budget_bytes: int,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[int, Bill]:
    """The largest batch, or the longest context, whose step fits into ``budget_bytes``, by :func:`predict`.

    Args:
        batch_size, seq_len: pass one of them; the other is searched, up to 2^20.
        model, method, device, **options: as for :func:`predict`.

    Returns:
        The size, and its bill; if not even a size of 1 fits, 0 and the bill of size 1.

    Raises:
        ValueError: both sizes or neither are passed, or as for :func:`predict`.
    """
    if (batch_size is None) == (seq_len is None):
        raise ValueError(f"batch_size is {batch_size} and seq_len {seq_len}; pass exactly one: the other is searched.")

    def bill_of(size: int) -> Bill:
        sizes = (size if fixed is None else fixed for fixed in (batch_size, seq_len))
        return predict(model, method, *sizes, device=device, **options)

    return _secant_search(bill_of, budget_bytes)


def _secant_search(bill_of: Callable[[int], Bill], budget_bytes: int) -> tuple[int, Bill]:
    """The largest size that fits, and its bill, as :func:`largest` returns them.

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
    """Bytes that autograd saves while ``forward()`` runs, without parameters and buffers; each storage counts once.

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


class _DetectSharedKeys(TorchFunctionMode):
    """Detects attention in float32 whose heads share keys and values.

    CUDA has no fused kernel for that, so that it computes the complete matrix of scores.
    """

    detected = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
            self.detected |= query.dtype == torch.float32 and query.shape[-3] != key.shape[-3]
        return func(*args, **kwargs)


def _cuda_attention(step: TrainingStep, batch: Batch) -> AbstractContextManager:
    """A context in which attention allocates what it would allocate on CUDA."""
    with torch.no_grad(), _DetectSharedKeys() as mode:
        step.batch_loss(*batch)
    return sdpa_kernel(SDPBackend.MATH) if mode.detected else nullcontext()


@contextmanager
def _fused_norms() -> Iterator[None]:
    """A context in which F.rms_norm allocates and saves what CUDA's fused kernel does, but computes nothing.

    torch before 2.9 has no such kernel, and none takes a weight of another dtype than the input's. The function itself
    is replaced, because a torch function mode does not see blocks that are recomputed in the backward pass.
    """
    plain = nn.functional.rms_norm

    def fused(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None):
        if weight is not None and weight.dtype != input.dtype:
            return plain(input, normalized_shape, weight, eps)
        return _FusedNorm.apply(input, weight, len(normalized_shape))

    if hasattr(torch.ops.aten, "_fused_rms_norm_backward"):
        nn.functional.rms_norm = fused
    try:
        yield
    finally:
        nn.functional.rms_norm = plain


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


def device_to_predict(model: nn.Module | Factory, device: torch.device | str | None) -> tuple[torch.device, bool]:
    """The device to rehearse on, and whether it only stands in for a CUDA device that is not available."""
    if device is None:
        device = device_of(model) if isinstance(model, nn.Module) else torch.device("meta")
        device = pick_device()[0] if device.type == "meta" else device
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return torch.device("cpu"), True
    return device, False


def _workspace_bytes(device: torch.device | None) -> int:
    """The workspaces that cuBLAS allocates on a device: one for the forward pass's thread, one for autograd's.

    By torch's defaults (CublasHandlePool.cpp; CUBLAS_WORKSPACE_CONFIG overrides them) each has 32 MiB on compute
    capability 9.0, Hopper, and 8.1 MiB before. On 10.x and 12.x, Blackwell, it is 32 MiB by torch's newest sources,
    which count here, and 8.1 MiB by older ones. None stands for a card that is not available, and counts as one before
    Hopper.
    """
    generation = 0 if device is None else torch.cuda.get_device_capability(device)[0]
    return 2 * (32 * MIB if generation in (9, 10, 12) else 8_519_680)
