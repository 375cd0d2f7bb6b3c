"""A bill: the bytes at the peak of a training step by part, from a recording of the step's operations.

A :class:`StorageLog` follows a step: which storages each of its operations allocates, and when they are released.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from lora_lab.costs.fake import storage_of
from lora_lab.costs.trace import Kind, StepTracer, output_width
from lora_lab.inject import output_head
from lora_lab.train import Batch, TrainingStep

MIB, GIB = 2**20, 2**30
_POINTS = 400  # of a timeline
_NEAR_PEAK = 25  # operations before and after the peak that a timeline holds in full


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
Storage = tuple[Part, int]  # the part of the bill that it belongs to, and its bytes


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

    def to_dict(self) -> dict[str, Any]:
        """Return the bill without its timeline, in values of JSON."""
        return {
            "peak_bytes": self.peak_bytes,
            "bytes_by_part": dict(self.parts),
            "saved_bytes": self.saved_bytes,
            "saved_bytes_by_kind": dict(self.saved),
            "reserved_bytes": self.reserved_bytes,
            "moment": self.moment,
            "source": self.source,
            "setting": self.setting,
        }

    def plus(self, part: str, size: int) -> Bill:
        """Return the same bill with one more part, of ``size`` bytes."""
        return replace(self, parts=ordered({**self.parts, part: size}))

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


def ordered(parts: Mapping[str, int]) -> dict[str, int]:
    """Return the parts that are not 0, in the order in which bills list them."""
    return {part: parts[part] for part in PARTS if parts.get(part)}


# Recordings


@dataclass(frozen=True)
class RecordedOperation:
    """One operation of a step.

    Args:
        phase: one of ``trace.PHASES``, or "before".
        name: torch's name of the operator.
        module: which module allocates, or what it belongs to outside all modules; empty if that is not known.
        allocated: storages that exist from this operation on. The first operation of a step has all from before it.
        released: storages that are released after this operation and before the next.
    """

    phase: str
    name: str
    module: str = ""
    allocated: Sequence[Storage] = ()
    released: Sequence[Storage] = ()


@dataclass(frozen=True)
class Recording:
    """A step: the model, the setup and the batch as text, its operations in order, and what autograd has saved.

    ``saved`` has the storages that are saved when the last forward pass ends.
    """

    setting: str
    operations: Sequence[RecordedOperation]
    saved: Sequence[Storage]

    def bill(self, source: str, block: int = 1) -> Bill:
        """Return the step's bill.

        Args:
            source: as in :class:`Bill`.
            block: every storage is rounded up to a multiple of this many bytes, as the device's allocator does.
        """
        totals = [sum(parts.values()) for parts in self._moments(block)]
        peak = max(range(len(totals)), key=totals.__getitem__)
        spread = _POINTS - 2 * _NEAR_PEAK - 1
        chosen = {round(i * (len(totals) - 1) / (spread - 1)) for i in range(spread)}
        chosen |= {*range(peak - _NEAR_PEAK, peak + _NEAR_PEAK + 1)}
        timeline: list[Moment] = []
        at_peak: dict[str, int] = {}
        for i, parts in enumerate(self._moments(block)):
            if i in chosen:
                timeline.append(Moment(self.operations[i].phase, ordered(parts), i))
            if i == peak:
                at_peak = ordered(parts)
        saved: Counter[str] = Counter()
        for part, size in self.saved:
            saved[part] += _round_up(size, block)
        return Bill(at_peak, self._describe(peak), source, self.setting, ordered(saved), timeline)

    def _moments(self, block: int) -> Iterator[Counter[str]]:
        """Bytes by part after each operation; it is the same counter each time."""
        now: Counter[str] = Counter()
        for operation in self.operations:
            for part, size in operation.allocated:
                now[part] += _round_up(size, block)
            yield now
            for part, size in operation.released:
                now[part] -= _round_up(size, block)

    def _describe(self, index: int) -> str:
        operation = self.operations[index]
        of_phase = [i for i, other in enumerate(self.operations) if other.phase == operation.phase]
        number = f"operation {of_phase.index(index) + 1:,} of {len(of_phase):,}"
        where = f" in {operation.module}" if operation.module else ""
        return f"{operation.phase}, {number}: {operation.name}{where}"


def _round_up(size: int, block: int) -> int:
    return -(-size // block) * block


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
    node: int | None
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


@dataclass(frozen=True)
class _Call:
    """A recorded function call: its operations, and its storages with times relative to its first operation.

    The one storage that is not released is that of the result. ``like`` makes an empty tensor of its form.
    """

    names: Sequence[str]
    lives: Sequence[_Life]
    like: Callable[[], Tensor]


class StorageLog(StepTracer):
    """Follows every storage of a step: when it is allocated and released, in which module, and who saves it."""

    def __init__(self, step: TrainingStep) -> None:
        super().__init__(step)
        self.width = output_width(step.model)
        head = output_head(step.model)
        self._head_shape = head.weight.shape if head is not None and head.weight.requires_grad else None
        self.lives: list[_Life] = []
        self.phases: list[str] = []  # of each operation; its index is the time
        self.names: list[str] = []
        self._alive: dict[int, tuple[_Life, weakref.ref]] = {}
        self._sums: list[tuple[_Life, _Life]] = []  # a gradient, and the sum of it and another
        self._of_batch: set[int] = set()
        self._calls: dict[Hashable, _Call] = {}
        self._paused = False

    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Count the operation, and register the storages of its results."""
        if self._paused:
            return
        self.phases.append(self.phase)
        self.names.append(function._opname)
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        if self.phase == "backward" and function._opname == "add" and not self.recomputing:
            self._note_sum(args[0], out)

    def once(self, key: Hashable, function: Callable[[], Tensor]) -> Tensor:
        """Return what ``function()`` returns on fake tensors; it is run for the first call with a key only.

        Args:
            key: determines the operations, together with the phase.
            function: makes a new tensor, calls no module, and saves nothing for the backward pass.
        """
        key, start = (key, self.phase), len(self.phases)
        if (call := self._calls.get(key)) is None:
            first = len(self.lives)
            result = function()
            lives = [replace(life, born=life.born - start, died=life.died - start) for life in self.lives[first:]]
            like = partial(torch.empty_strided, result.shape, result.stride(), dtype=result.dtype, device=result.device)
            self._calls[key] = _Call(self.names[start:], lives, like)
            return result
        self._paused = True
        result = call.like()
        self._paused = False
        self.phases += [self.phase] * len(call.names)
        self.names += call.names
        now = {"kind": self.kind, "module": self.module, "recomputing": self.recomputing, "node": _node()}
        for life in call.lives:
            copy = replace(life, born=start + life.born, died=start + life.died, savers=set(), **now)
            self.lives.append(copy)
            if copy.died == math.inf:
                self._follow(result, copy)
        return result

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and follow it; what an earlier step left behind is part of it."""
        self._name()
        self._start = len(self.phases)
        self._of_batch = {storage_of(tensor) for batch in batches for tensor in batch}
        with on_saved(self._save):
            super().run(batches, weights)
        self._name()

    def recording(self, setting: str) -> Recording:
        """Return the recording of the last step, of the model, setup and batch that ``setting`` names."""
        self._merge_sums()
        times = range(self._start, len(self.phases))
        last_forward = max((time for time in times if self.phases[time] == "forward"), default=self._start)
        allocated: dict[int, list[_Life]] = {time: [] for time in times}
        released: dict[float, list[_Life]] = {time: [] for time in times}
        for life in self.lives:
            if life.died >= self._start:
                allocated[max(life.born, self._start)].append(life)
                released.setdefault(life.died, []).append(life)
        operations = [
            RecordedOperation(
                self.phases[time],
                self.names[time],
                next(
                    (life.module or life.kind for life in allocated[time] if life.born == time and _has_module(life)),
                    "",
                ),
                _storages(allocated[time]),
                _storages(released[time]),
            )
            for time in times
        ]
        saved = [life for life in self.lives if life.savers and life.named is None]
        return Recording(
            setting, operations, _storages(life for life in saved if life.born <= last_forward < life.died)
        )

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
        wide = self.width is not None and tensor.ndim > 1 and tensor.shape[-1] == self.width
        time = max(0, len(self.phases) - 1)
        life = _Life(
            tensor.untyped_storage().nbytes(), time, self.phase, self.kind, self.module, self.recomputing, wide, _node()
        )
        if self.phase == "backward" and tensor.shape == self._head_shape:
            life.named = Part.HEAD_GRADIENT
        self.lives.append(life)
        self._follow(tensor, life)

    def _follow(self, tensor: Tensor, life: _Life) -> None:
        """Note when the tensor's storage is released."""
        key = storage_of(tensor)

        def dead(_: weakref.ref) -> None:
            life.died = len(self.phases) - 1
            self._alive.pop(key, None)

        self._alive[key] = (life, weakref.ref(tensor.untyped_storage(), dead))

    def _note_sum(self, first: Tensor, total: Tensor) -> None:
        """Remember a sum that autograd makes of two gradients of one tensor, and that may take the first one's storage.

        In that case the first gradient was made by another node of the graph than the one that is running. A view never
        gives its storage away.
        """
        before, after = (self._alive.get(storage_of(tensor)) for tensor in (first, total))
        if before is None or after is None or before[0].node == after[0].node or first._is_view():
            return
        if torch.ops.aten.is_non_overlapping_and_dense(first):
            self._sums.append((before[0], after[0]))

    def _merge_sums(self) -> None:
        """Make one storage of a gradient and a sum that a real step adds to it in place.

        Autograd does so where nothing else refers to the gradient (input_buffer.cpp), but not while operations are
        being followed: then the sum is a new storage, and the gradient is released.
        """
        for first, total in reversed(self._sums):  # a sum may be the first gradient of the next one
            if first.died == total.born:
                first.died, first.named, total.size = total.died, total.named, 0
        self._sums.clear()

    def _save(self, tensor: Tensor) -> None:
        if (entry := self._alive.get(storage_of(tensor))) is not None:
            entry[0].savers.add(self.kind)


def _node() -> int | None:
    """Return the number of the node of autograd's graph that is running in the backward pass."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def _has_module(life: _Life) -> bool:
    """Return whether a module was running when the storage was allocated, or the loss was computed."""
    return life.phase == "forward" or life.recomputing


def _storages(lives: Iterable[_Life]) -> list[Storage]:
    return sorted((life.part, life.size) for life in lives)


def on_saved(function: Callable[[Tensor], None]) -> saved_tensors_hooks:
    """A context in which ``function`` is called with each tensor that autograd saves for the backward pass."""

    def pack(tensor: Tensor) -> Tensor:
        function(tensor)
        return tensor.detach()  # undetached, an output would keep its own graph alive

    return saved_tensors_hooks(pack, lambda tensor: tensor)
