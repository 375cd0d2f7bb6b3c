"""The memory bill of a training step: which bytes are there at its peak, and for what.

    bill = predict(model, LoRA(rank=8), batch_size=4, seq_len=128)     # nothing is allocated
    bill = measure(model, LoRA(rank=8), (inputs, targets))             # a real step, and an independent peak

A model being trained holds its weights, a gradient for each trainable one, the optimiser's state (AdamW: two
numbers for each), what autograd keeps from forward to backward, and what operations need for a moment. LoRA cuts
the second and the third; it leaves the first and most of the fourth.

Both calls follow the birth and death of every storage through the code that ``fit`` runs. :func:`predict` does so
on fake tensors, so a model of any size can be asked about. :func:`measure` takes its peak from the allocator
itself, so the two can disagree, and what the parts do not explain is shown as a part of its own.
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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lora_lab.costs.fake import (
    Batch,
    Factory,
    batch_for,
    build_model,
    device_of,
    fake_copy,
    storage_of,
    unshare_trainable,
)
from lora_lab.costs.setup import Setup, as_setup, setting_of
from lora_lab.costs.trace import ADAPTERS, LOGITS, StepTracer, output_width
from lora_lab.methods import Method
from lora_lab.system.device import own_randomness, pick_device
from lora_lab.train import TrainingStep

MIB, GIB = 2**20, 2**30
SAVED = tuple(f"saved: {kind}" for kind in ("attention", "MLP", "norms", ADAPTERS, "other layers"))
WORKSPACE, ENDS, REST = "cuBLAS workspace", "unused ends of blocks", "the rest, unexplained"
PARTS = (
    "frozen weights",
    "trained weights",
    "gradients",
    "optimiser state",
    *SAVED,
    LOGITS,
    "recomputed activations",
    "temporaries",
    WORKSPACE,
    ENDS,
    REST,
)
_POINTS = 400  # of a timeline
_MOST = 2**20  # the largest batch or context looked for
_BLOCK = 512  # bytes: CUDA's allocator gives no less, and multiples of it


@dataclass(frozen=True)
class Moment:
    """What is there after one operation: bytes by part, and the phase of the step."""

    phase: str
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Bill:
    """What a training step needs at its peak, in bytes by part; the parts add up to the peak.

    ``source`` says how it was found: "predicted", "measured", or "estimated for CUDA, not measured". ``moment``
    says when the peak is. ``saved`` is what autograd keeps when the forward pass is over, by the kind of module
    that keeps it: a storage that several keep counts once, and as the adapters' only if nobody else keeps it.
    ``timeline`` holds up to 400 moments of the step in order, with the peak among them. Batches themselves
    are not counted. ``reserved_bytes`` is what CUDA's allocator took from the device at most, None elsewhere.
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
        """The most that is there at one moment."""
        return sum(self.parts.values())

    @property
    def saved_bytes(self) -> int:
        """What autograd keeps when the forward pass is over."""
        return sum(self.saved.values())

    @property
    def static_bytes(self) -> int:
        """Weights, gradients and optimiser's state at the peak; if it comes early, gradients are not there yet."""
        return sum(self.parts.get(part, 0) for part in PARTS[:4])

    def plus(self, part: str, size: int) -> Bill:
        """The same bill with one part more, of ``size`` bytes."""
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
    """One bill less another, in bytes by part: what saved what. Negative where the first needs less."""

    parts: Mapping[str, int]
    first: str
    second: str

    @property
    def peak_bytes(self) -> int:
        """The difference of the peaks."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        lines = [f"{self.first}, less {self.second}"]
        lines += [f"  {part:<26}{_mib(size, '+'):>12} MiB" for part, size in self.parts.items()]
        return "\n".join([*lines, f"  {'peak':<26}{_mib(self.peak_bytes, '+'):>12} MiB"])


def _mib(size: int, sign: str = "") -> str:
    return f"{size / MIB:{sign},.1f}"


# Following storages


@dataclass
class _Life:
    """A storage from birth to death, and what was seen of it."""

    size: int
    born: int
    phase: str
    kind: str
    module: str
    recomputing: bool
    wide: bool
    died: float = math.inf
    keepers: set[str] = field(default_factory=set)
    named: str | None = None

    @property
    def part(self) -> str:
        """The part of the bill that it belongs to, as far as is known by the end of the step."""
        if self.named is not None:
            return self.named
        if self.recomputing:
            return "recomputed activations"
        if self.wide or LOGITS in self.keepers:
            return LOGITS
        if self.keepers:
            others = [kind for kind in self.keepers if kind != ADAPTERS]
            return f"saved: {min(others) if others else ADAPTERS}"
        return LOGITS if self.kind == LOGITS and self.phase == "forward" else "temporaries"


class StorageLog(StepTracer):
    """Follows every storage of a step: when it is born and dies, for whom, and who keeps it for the backward pass.

    Args:
        step: what is to be run.
        block: sizes are rounded up to multiples of this many bytes, as the device's allocator does.
    """

    def __init__(self, step: TrainingStep, block: int = 1) -> None:
        super().__init__(step)
        self.block, self.width = block, output_width(step.model)
        self.lives: list[_Life] = []
        self.phases: list[str] = []  # of each operation; its index is the time
        self.names: list[str] = []
        self._alive: dict[int, tuple[_Life, weakref.ref]] = {}
        self._given: set[int] = set()
        self._name()

    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Count the operation, and enter the storages that it made."""
        if function.namespace == "prim":  # a question to a fake tensor, such as on which device it is
            return
        self.phases.append(self.phase)
        self.names.append(function._opname)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor)

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and follow it; what a step before it left is part of it."""
        self._start = len(self.phases)
        self._given = {storage_of(tensor) for batch in batches for tensor in batch}
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            super().run(batches, weights)
        self._name()

    def bill(self, source: str, setting: str) -> Bill:
        """The bill of the last step that was run."""
        totals = [sum(parts.values()) for _, parts in self._moments()]
        peak = max(range(len(totals)), key=totals.__getitem__)
        forward = [time for time in range(self._start, len(self.phases)) if self.phases[time] == "forward"]
        wanted = {peak, *(round(i * (len(totals) - 1) / (_POINTS - 2)) for i in range(_POINTS - 1))}
        timeline = []
        for i, (time, parts) in enumerate(self._moments()):
            if i in wanted:
                timeline.append(Moment(self.phases[time], _ordered(parts)))
            if i == peak:
                at_peak = _ordered(parts)
        saved: Counter[str] = Counter()
        for life in self.lives:
            if life.keepers and life.named is None and life.born <= forward[-1] < life.died:
                saved[life.part] += life.size
        return Bill(at_peak, self._describe(self._start + peak), source, setting, _ordered(saved), timeline)

    def _moments(self) -> Iterator[tuple[int, Counter[str]]]:
        """(time, bytes by part) after each operation of the last step; the counter is one and the same."""
        births: dict[int, list[_Life]] = {}
        deaths: dict[int, list[_Life]] = {}
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
        place = f"{self.phases[time]}, operation {times.index(time) + 1:,} of {len(times):,}: {self.names[time]}"
        return f"{place} in {where}" if where else place

    def _name(self) -> None:
        """Remember which storages are weights, gradients and the optimiser's state by now."""
        parameters, buffers = list(self.step.model.parameters()), list(self.step.model.buffers())
        state = [value for values in self.step.optimizer.state.values() for value in values.values()]
        named = {
            "frozen weights": [p for p in parameters if not p.requires_grad] + buffers,
            "trained weights": [p for p in parameters if p.requires_grad],
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "optimiser state": [value for value in state if isinstance(value, Tensor)],
        }
        for part, tensors in named.items():
            for tensor in tensors:
                self._enter(tensor)  # nobody saw those born that were there before the first step
                self._alive[storage_of(tensor)][0].named = part

    def _enter(self, tensor: Tensor) -> None:
        key = storage_of(tensor)
        if key in self._alive or key in self._given:
            return
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // self.block) * self.block
        wide = self.width is not None and tensor.ndim > 1 and tensor.shape[-1] == self.width
        time = max(0, len(self.phases) - 1)
        life = _Life(size, time, self.phase, self.kind, self.module, self.recomputing, wide)
        self.lives.append(life)

        def dead(_: weakref.ref) -> None:
            life.died = len(self.phases) - 1
            self._alive.pop(key, None)

        self._alive[key] = (life, weakref.ref(storage, dead))

    def _keep(self, tensor: Tensor) -> Tensor:
        if (known := self._alive.get(storage_of(tensor))) is not None:
            known[0].keepers.add(self.kind)
        return tensor.detach()  # an output itself would hold its own node, and a graph never run would never be freed


def _ordered(parts: Mapping[str, int]) -> dict[str, int]:
    return {part: parts[part] for part in PARTS if parts.get(part)}


# Asking


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

    Two steps are rehearsed, and the second is reported, for the first lacks the optimiser's state. The model is
    left as it is, and so are the random generators.

    Args:
        model: a freshly loaded model; or a function that makes one from its shape, of any size.
        method: how it is trained, or a whole :class:`lora_lab.costs.setup.Setup`.
        batch_size, seq_len: the batch, for models that read token ids.
        batch: inputs and targets, for others; only their shapes and dtypes matter.
        device: where the step would run; default the model's device, or for a factory the best there is. If it
            is "cuda" and there is none, the bill is the CPU's with CUDA's sizes of blocks, cuBLAS's workspace,
            CUDA's choice of attention kernel and its fused RMS norm: an estimate, and it says so.
        **options: ``dtype``, ``nf4``, ``optimizer``, ``gradient_checkpointing``, ``lean``, ``accumulate``, ``clip``,
            ``loss``, as in :class:`lora_lab.costs.setup.Setup`.

    Raises:
        ValueError: the batch is not described, a value is out of range, the step cannot be made ready, or
            ``lean`` has several threads.
    """
    setup = as_setup(method, options)
    setup.check_watchable()
    place, estimated = place_of(model, device)
    on_cuda = estimated or place.type == "cuda"
    with fake_copy(model, place, setup.dtype) as twin, own_randomness(torch.device("cpu"), 0), ExitStack() as stack:
        given = batch_for(twin, batch_size, seq_len, batch)
        parts, weights = setup.batches(given)
        step = setup.step(twin)
        if estimated:
            stack.enter_context(_cuda_attention(step, parts[0]))
            stack.enter_context(_fused_norms())
        log = StorageLog(step, _BLOCK if on_cuda else 1)
        log.run(parts, weights)
        log.run(parts, weights)
        bill = log.bill(
            "estimated for CUDA, not measured" if estimated else "predicted", setting_of(setup, twin, given)
        )
    return bill.plus(WORKSPACE, _workspace_bytes(None if estimated else place)) if on_cuda else bill


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
    it is ``max_memory_allocated`` of the second step; each with the model's weights and without whatever else
    is in memory. The parts are found in a third step, by following storages. What they leave of the peak
    (operations' own buffers, mostly) is the part "the rest, unexplained".

    On CUDA two parts are the allocator's own: cuBLAS's workspace, which stays for the life of the process and is
    counted in every bill, and "unused ends of blocks", for a block is given whole where it is little larger than what
    was asked for.

    The model is left as it is, bit for bit, and so are the random generators: weights that are to be trained
    are copied first. A function that makes a model saves that copy.

    Args:
        model, method, **options: as for :func:`predict`.
        batch: inputs and targets.
        device: for a factory; default the best there is.

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
        # Held until the meter is off: a freed address could be given to a tensor of the step's own.
        held = [tensor.detach() for tensor in [*twin.parameters(), *twin.buffers()]]
        there = {storage_of(tensor) for tensor in held}
        given = tuple(tensor.to(device) for tensor in batch)
        parts, weights = setup.batches(given)
        gc.collect()  # or garbage that is freed below would be taken for the step's
        with _meter(device) as meter:
            step = setup.step(twin)
            if isinstance(model, nn.Module):
                unshare_trainable(twin, there)
            step(parts, weights)
            with meter.second_step():
                step(parts, weights)
        stayed = {storage_of(t): t.untyped_storage().nbytes() for t in [*twin.parameters(), *twin.buffers()]}
        del held
        peak = meter.peak_bytes + sum(size for key, size in stayed.items() if key in there)
        log = StorageLog(step)
        log.run(parts, weights)
        bill = log.bill("measured", setting_of(setup, twin, given))
        del log, step
    gc.collect()
    bill = bill.plus(REST, peak - bill.peak_bytes - meter.ends_bytes)
    bill = bill.plus(ENDS, meter.ends_bytes).plus(WORKSPACE, meter.workspace_bytes)
    return replace(bill, reserved_bytes=meter.reserved_bytes)


class _Meter:
    """The most that the allocator gave during the second step, counted from where the meter was switched on.

    Of the peak, ``ends_bytes`` were given and not asked for. ``workspace_bytes`` are beside it.
    """

    peak_bytes = ends_bytes = workspace_bytes = 0
    reserved_bytes: int | None = None

    @contextmanager
    def second_step(self) -> Iterator[None]:
        """Mark the step that counts."""
        yield


class _ProfilerMeter(_Meter):
    """On the CPU: the profiler's allocation events, which torch's allocator reports one by one."""

    @contextmanager
    def second_step(self) -> Iterator[None]:
        with torch.profiler.record_function("lora_lab: second step"):
            yield

    def read(self, profiler: torch.profiler.profile) -> None:
        """Add up the events."""
        events = profiler.profiler.kineto_results.events()
        (step,) = (event for event in events if event.name() == "lora_lab: second step")
        total = 0
        for at, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
            total += size
            if step.start_ns() <= at <= step.end_ns():
                self.peak_bytes = max(self.peak_bytes, total)


class _CudaMeter(_Meter):
    """On CUDA: the caching allocator's own high-water mark."""

    def __init__(self, device: torch.device) -> None:
        _take_workspaces(device)  # or they would be in the peak of a process's first step, and of no other
        self.device, self.workspace_bytes = device, _workspace_bytes(device)
        self.before = torch.cuda.memory_allocated(device)
        self.asked_before = torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0)

    @contextmanager
    def second_step(self) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        self.reserved_bytes = torch.cuda.max_memory_reserved(self.device)
        asked = torch.cuda.memory_stats(self.device).get("requested_bytes.all.peak", 0)
        if asked:  # not every allocator counts it
            self.ends_bytes = self.peak_bytes - (asked - self.asked_before)


def _take_workspaces(device: torch.device) -> None:
    """Multiply once forward and once backward, as a step does, in the same two threads."""
    square = torch.ones(16, 16, device=device, requires_grad=True)
    (square @ square).sum().backward()


@contextmanager
def _meter(device: torch.device) -> Iterator[_Meter]:
    if device.type == "cuda":
        yield _CudaMeter(device)
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes to stderr when it starts and stops
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
        batch_size, seq_len: the one that is given stays; the other is looked for, up to 2^20.
        model, method, device, **options: as for :func:`predict`.

    Returns:
        The size, 0 if not even 1 fits, and the bill of the size (of 1 if it is 0).

    Raises:
        ValueError: both sizes or neither are given, or as for :func:`predict`.
    """
    if (batch_size is None) == (seq_len is None):
        raise ValueError(f"batch_size is {batch_size} and seq_len {seq_len}; give one of them, to look for the other.")

    def ask(size: int) -> Bill:
        sizes = (size if given is None else given for given in (batch_size, seq_len))
        return predict(model, method, *sizes, device=device, **options)

    low, high = (1, ask(1)), (_MOST + 1, None)
    if low[1].peak_bytes > budget_bytes:
        return 0, low[1]
    size = 2
    while high[0] - low[0] > 1:
        bill = ask(size)
        slope = (bill.peak_bytes - low[1].peak_bytes) / (size - low[0])
        guess = _MOST if slope <= 0 else int(size + (budget_bytes - bill.peak_bytes) / slope)
        if bill.peak_bytes <= budget_bytes:
            low, guess = (size, bill), max(guess, size + 1)
        else:
            high = (size, bill)
        # Memory grows nearly in a line, so the guess is close; a step beside it closes the gap.
        size = min(max(guess, low[0] + 1), high[0] - 1)
    return low


def saved_bytes(forward: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps when ``forward()`` is run, parameters and buffers left out; storages count once.

    For one layer or call; :attr:`Bill.saved` has it for a whole step, by kind of module.

    Args:
        forward: runs the model and its loss, and returns what it likes.
        model: whose parameters do not count.

    Raises:
        ValueError: a module of the model ran in another thread, where nobody sees what is kept.
    """
    own = {storage_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    threads: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in own:
            kept[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output itself would hold its own node, so that neither would ever be freed

    with ExitStack() as stack:
        enter = register_module_forward_pre_hook(lambda module, args: threads.add(threading.get_ident()))
        stack.callback(enter.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        result = forward()  # held until the count is done, so that no address is used twice
    if threads - {threading.get_ident()}:
        raise ValueError(
            "The model ran in several threads, but what autograd saves is seen by hooks that hold for one thread "
            "only; run it in this thread, with Lean(threads=1)."
        )
    total = sum(kept.values())
    del result
    return total


# CUDA, where there is none


class _LooksForSharedKeys(TorchFunctionMode):
    """Notes whether attention in float32 shares keys and values among heads.

    No fused kernel of CUDA's does that in float32, so there the scores are made whole.
    """

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
            self.seen |= query.dtype == torch.float32 and query.shape[-3] != key.shape[-3]
        return func(*args, **kwargs)


def _cuda_attention(step: TrainingStep, batch: Batch) -> AbstractContextManager:
    """A context in which attention is computed as CUDA would, as far as memory goes."""
    with torch.no_grad(), _LooksForSharedKeys() as mode:
        step.batch_loss(*batch)
    return sdpa_kernel(SDPBackend.MATH) if mode.seen else nullcontext()


@contextmanager
def _fused_norms() -> Iterator[None]:
    """A block in which F.rms_norm makes and keeps what CUDA's fused kernel does, but no numbers: for a rehearsal.

    torch before 2.9 has no such kernel, and a weight of another dtype than the input's is not given to it. The function
    itself is replaced, for blocks that are computed again in the backward pass are out of a mode's sight.
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
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, normalized: int) -> Tensor:
        rows = x.new_empty(x.shape[:-normalized], dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=False)
        return (*(torch.empty_like(tensor) if wanted else None for tensor, wanted in needed), None)


def place_of(model: nn.Module | Factory, device: torch.device | str | None) -> tuple[torch.device, bool]:
    """Where to pretend, and whether that only stands for CUDA."""
    if device is None:
        own = device_of(model) if isinstance(model, nn.Module) else torch.device("meta")
        device = pick_device()[0] if own.type == "meta" else own
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return torch.device("cpu"), True
    return device, False


def _workspace_bytes(device: torch.device | None) -> int:
    """What cuBLAS keeps for itself on a device, twice: for the thread that goes forward, and autograd's own, backward.

    By torch's defaults (CublasHandlePool.cpp; CUBLAS_WORKSPACE_CONFIG overrides them) it is 32 MiB a thread on compute
    capability 9.0, Hopper, and 8.1 MiB before. On 10.x and 12.x, Blackwell, torch's newest sources say 32 MiB and older
    ones 8.1; the newest are believed. None stands for a card that is not there, and counts as one before Hopper.
    """
    generation = 0 if device is None else torch.cuda.get_device_capability(device)[0]
    return 2 * (32 * MIB if generation in (9, 10, 12) else 8_519_680)
