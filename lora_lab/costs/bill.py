"""A bill: the bytes at the peak of a training step by part, from a recording of the step's operations.

A :class:`StorageLog` follows a step: which storages each of its operations allocates, and when they are released.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lora_lab.costs.fake import nested_tensors, output_width, storage_of
from lora_lab.costs.setup import Part, StepTracer
from lora_lab.inject import output_head
from lora_lab.train import Batch, TrainingStep

MIB, GIB = 2**20, 2**30
_POINTS = 400  # of a timeline
_NEAR_PEAK = 25  # operations before and after the peak that a timeline holds in full
_NAME = operator.attrgetter("phase", "name")
_BYTES = operator.attrgetter("name", "allocated", "released")


PARTS = tuple(Part)
STATIC = (Part.FROZEN, Part.TRAINED, Part.GRADIENTS, Part.OPTIMISER)
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

    ``one - other`` is a :class:`Difference`.

    Args:
        parts: part -> bytes, with the names of :class:`Part`. Batches themselves are not counted.
        moment: the operation at which the peak is reached, and its module: "layers.*.mlp" stands for that of any block.
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
        return replace(self, parts=_order({**self.parts, part: size}))

    def __sub__(self, other: Bill) -> Difference:
        either = [part for part in PARTS if part in self.parts or part in other.parts]
        parts: dict[str, int] = {part: self.parts.get(part, 0) - other.parts.get(part, 0) for part in either}
        return Difference(parts, "", "difference", f"{self.setting} minus {other.setting}")

    def __str__(self) -> str:
        rows = [f"{_row(part, size)}{size / self.peak_bytes:>6.0%}" for part, size in self.parts.items()]
        rows.append(f"{_row('peak', self.peak_bytes)}, in the {self.moment}")
        if self.reserved_bytes is not None:
            rows.append(_row("reserved by the allocator", self.reserved_bytes))
        return "\n".join([f"{self.setting}: {self.source}", *rows])


class Difference(Bill):
    """One bill minus another: negative where the first needs less. It has no moment, and shares would mean nothing."""

    def __str__(self) -> str:
        rows = [_row(name, size, "+") for name, size in [*self.parts.items(), ("peak", self.peak_bytes)]]
        return "\n".join([f"{self.setting}: {self.source}", *rows])


def _row(name: str, size: int, sign: str = "") -> str:
    return f"  {name:<26}{size / MIB:>{sign}12,.1f} MiB"


def _order(parts: Mapping[str, int]) -> dict[str, int]:
    """Return the parts that are not 0, in the order in which bills list them."""
    return {part: parts[part] for part in PARTS if parts.get(part)}


# Recordings


class RecordedOperation(NamedTuple):
    """One operation of a step.

    Args:
        phase: as of a :class:`StepTracer`.
        name: torch's name of the operator.
        module: which module calls it, or what it belongs to outside all modules; empty if that is not known.
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
        totals = [sum(parts.values()) for parts in self.moments(block)]
        peak, last = totals.index(max(totals)), len(totals) - 1
        spread = _POINTS - 2 * _NEAR_PEAK - 1
        chosen = {round(i * last / (spread - 1)) for i in range(spread)}
        chosen |= {*range(peak - _NEAR_PEAK, peak + _NEAR_PEAK + 1)}
        timeline = [
            Moment(self.operations[i].phase, _order(parts), i)
            for i, parts in enumerate(self.moments(block))
            if i in chosen
        ]
        at_peak = next(moment.parts for moment in timeline if moment.operation == peak)
        saved = Counter[str]()
        for part, size in self.saved:
            saved[part] += _round_up(size, block)
        return Bill(at_peak, self._describe(peak), source, self.setting, _order(saved), timeline)

    def moments(self, block: int) -> Iterator[Mapping[str, int]]:
        """Yield bytes by part after each operation, in whole blocks; it is the same mapping each time."""
        now = Counter[str]()
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
        # Of blocks that are alike only a few may be rehearsed.
        where = re.sub(r"\.\d+", ".*", operation.module)
        return f"{operation.phase}, {number}: {operation.name}{f' in {where}' if where else ''}"


def _round_up(size: int, block: int) -> int:
    return -(-size // block) * block


@dataclass
class _Life:
    """A storage from its allocation to its release.

    Args:
        size: bytes.
        born, died: numbers of operations.
        node: of autograd's graph, which was running.
        fixed_part: the part that it belongs to, unless that depends on who saves it.
        part_if_unsaved: the part that it belongs to if nobody does.
        savers: the kinds of the modules that do.
    """

    size: int
    born: int
    node: int | None
    fixed_part: Part | None
    part_if_unsaved: Part
    died: float = math.inf
    savers: set[Part] = field(default_factory=set)

    @property
    def part(self) -> Part:
        """The part of the bill that it belongs to, as far as is known by the end of the step."""
        if self.fixed_part is not None:
            return self.fixed_part
        if Part.LOGITS in self.savers:
            return Part.LOGITS
        if self.savers:
            return min(self.savers - {Part.SAVED_ADAPTERS}, default=Part.SAVED_ADAPTERS)
        return self.part_if_unsaved


class StorageLog(StepTracer):
    """Follows every storage of a step: when it is allocated and released, in which module, and who saves it."""

    def __init__(self, step: TrainingStep) -> None:
        super().__init__(step)
        self._width = output_width(step.model)
        head = output_head(step.model)
        self._head_shape = head.weight.shape if head is not None and head.weight.requires_grad else None
        self._operations: list[RecordedOperation] = []  # an index is a time
        self._lives: list[_Life] = []
        self._alive: dict[int, _Life] = {}
        self._references: dict[int, weakref.ref] = {}  # kept, so that they call back
        self._sums: list[tuple[_Life, _Life]] = []  # a gradient, and the sum of it and another
        self._of_batch: set[int] = set()
        self._paused = False
        self._calls: dict[Hashable, tuple[list[RecordedOperation], list[_Life], Callable[[], Tensor]]] = {}

    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Count the operation, and register the storages of its results."""
        if self._paused:
            return
        self._operations.append(RecordedOperation(self.phase, function._opname, self._where()))
        for tensor in nested_tensors(out):
            self._enter(tensor)
        if self.phase == "backward" and function._opname == "add" and not self.recomputing:
            self._note_sum(args[0], out)

    def once(self, key: Hashable, function: Callable[[], Tensor]) -> Tensor:
        """Return what ``function()`` returns on fake tensors; after the first call with a key, an empty tensor like it.

        The operations and storages of the first call are then written down again. Of these storages only the result's
        is still there when the function returns.

        Args:
            key: determines the operations, together with the phase.
            function: makes a new tensor, calls no module, and saves nothing for the backward pass.
        """
        key, start = (key, self.phase, self.recomputing, self._part_if_unsaved()), len(self._operations)
        if key not in self._calls:
            count = len(self._lives)
            result = function()
            like = partial(torch.empty_strided, result.shape, result.stride(), dtype=result.dtype, device=result.device)
            lives = [replace(life, born=life.born - start, died=life.died - start) for life in self._lives[count:]]
            self._calls[key] = self._operations[start:], lives, like
            return result
        operations, lives, like = self._calls[key]
        self._paused = True
        result = like()
        self._paused = False
        where = self._where()
        self._operations += [operation._replace(module=where) for operation in operations]
        for life in lives:
            copy = replace(life, born=start + life.born, died=start + life.died, node=self.running_node, savers=set())
            self._lives.append(copy)
            if copy.died == math.inf:
                self._follow(result, copy)
        return result

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and follow it; what an earlier step left behind is part of it."""
        self._name()
        self._start = len(self._operations)
        self._of_batch = {storage_of(tensor) for batch in batches for tensor in batch}
        with saved_tensors_hooks(self._save, lambda tensor: tensor):
            super().run(batches, weights)
        self._name()

    def recording(self, setting: str) -> Recording:
        """Return the recording of the last step, of the model, setup and batch that ``setting`` names."""
        self._merge_sums()
        lives = [life for life in self._lives if life.died >= self._start]
        allocated, released = defaultdict[float, list[_Life]](list), defaultdict[float, list[_Life]](list)
        for life in lives:
            allocated[max(life.born, self._start)].append(life)
            released[life.died].append(life)
        operations = [
            operation._replace(
                module=operation.module if time in allocated else "",
                allocated=_storages(allocated[time]),
                released=_storages(released[time]),
            )
            for time, operation in enumerate(self._operations[self._start :], start=self._start)
        ]
        forward = [time for time, operation in enumerate(self._operations) if operation.phase == "forward"]
        last = max(forward, default=self._start)
        saved = [life for life in lives if life.savers and life.part not in (*STATIC, Part.HEAD_GRADIENT)]
        return Recording(setting, operations, _storages(life for life in saved if life.born <= last < life.died))

    def _where(self) -> str:
        """Return the module that is running, or that the loss is computed; nothing is known in the backward pass."""
        return (self.module or self.kind.removeprefix("saved: ")) if self.phase == "forward" or self.recomputing else ""

    def _part_if_unsaved(self) -> Part:
        """Return the part to which a storage belongs that nobody saves."""
        return Part.LOGITS if self.kind == Part.LOGITS and self.phase == "forward" else Part.TEMPORARIES

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
                self._alive[storage_of(tensor)].fixed_part = part

    def _enter(self, tensor: Tensor) -> None:
        key = storage_of(tensor)
        if key in self._alive or key in self._of_batch:
            return
        fixed_part = None
        if self.phase == "backward" and tensor.shape == self._head_shape:
            fixed_part = Part.HEAD_GRADIENT
        elif self.recomputing:
            fixed_part = Part.RECOMPUTED
        elif tensor.ndim > 1 and tensor.shape[-1] == self._width:
            fixed_part = Part.LOGITS
        time = max(0, len(self._operations) - 1)
        life = _Life(tensor.untyped_storage().nbytes(), time, self.running_node, fixed_part, self._part_if_unsaved())
        self._lives.append(life)
        self._follow(tensor, life)

    def _follow(self, tensor: Tensor, life: _Life) -> None:
        """Note when the tensor's storage is released."""
        key = storage_of(tensor)

        def dead(_: weakref.ref) -> None:
            life.died = len(self._operations) - 1
            self._alive.pop(key, None)

        self._alive[key] = life
        self._references[key] = weakref.ref(tensor.untyped_storage(), dead)

    def _note_sum(self, first: Tensor, total: Tensor) -> None:
        """Remember a sum that autograd makes of two gradients of one tensor, and that may take the first one's storage.

        In that case the first gradient was made by another node of the graph than the one that is running. A view never
        gives its storage away.
        """
        before, after = (self._alive.get(storage_of(tensor)) for tensor in (first, total))
        if before is None or after is None or before.node == after.node or first._is_view():
            return
        if torch.ops.aten.is_non_overlapping_and_dense(first):
            self._sums.append((before, after))

    def _merge_sums(self) -> None:
        """Make one storage of a gradient and the sum that a real step would write over it.

        Where nothing else refers to a gradient, autograd adds the next one to it in place (input_buffer.cpp), but not
        while operations are being followed: then the sum is a new storage, and the gradient is released.
        """
        for first, total in reversed(self._sums):  # a sum may be the first gradient of the next one
            if first.died == total.born:
                first.died, first.fixed_part, total.size = total.died, total.fixed_part, 0
        self._sums.clear()

    def _save(self, tensor: Tensor) -> Tensor:
        """Note the kind of the module for which autograd saves a tensor for the backward pass."""
        if (life := self._alive.get(storage_of(tensor))) is not None:
            life.savers.add(self.kind)
        return tensor.detach()  # undetached, an output would keep its own graph alive


def _storages(lives: Iterable[_Life]) -> list[Storage]:
    return sorted((life.part, life.size) for life in lives)


# Of a stack of identical blocks, from the recordings of a few


def extend_recording(shorter: Recording, longer: Recording, blocks: int) -> Recording:
    """Return the recording of a model with ``blocks`` more blocks than in ``shorter``; ``longer`` has one more.

    One more block adds a stretch of operations to each forward and each backward pass, further entries to what is
    allocated at once for all weights, and nothing else. That stretch must be, byte for byte, the one before it.

    Raises:
        ValueError: the two differ in more than a regular block.
    """
    few, more = (
        [list(same) for _, same in itertools.groupby(recording.operations, key=operator.attrgetter("phase"))]
        for recording in (shorter, longer)
    )
    passes = [_extend_pass(*both, blocks) for both in zip(few, more, strict=True)]
    saved = _extrapolate(shorter.saved, longer.saved, blocks)
    return Recording(longer.setting, list(itertools.chain(*passes)), saved)


def _extend_pass(few: list[RecordedOperation], more: list[RecordedOperation], blocks: int) -> list[RecordedOperation]:
    """:func:`extend_recording` for one forward pass, one backward pass or one step of the optimiser."""
    length = len(more) - len(few)  # of the stretch that one block adds
    alike = itertools.takewhile(lambda pair: _NAME(pair[0]) == _NAME(pair[1]), zip(few, more, strict=False))
    # Where the stretch may begin: it can be moved forward by parts of a period.
    latest = sum(1 for _ in alike)
    for place in range(latest, length - 1, -1):
        before, stretch, after = more[place - length : place], more[place : place + length], more[place + length :]
        if length < 0 or [*map(_NAME, few[place:])] != [*map(_NAME, after)]:
            break
        if [*map(_BYTES, before)] == [*map(_BYTES, stretch)]:
            with suppress(ValueError):
                shared = [_interpolate(*pair, blocks) for pair in zip(few, [*more[:place], *after], strict=True)]
                return [*shared[:place], *(blocks * stretch), *shared[place:]]
    raise ValueError("No block is like the one before.")


def _interpolate(few: RecordedOperation, more: RecordedOperation, blocks: int) -> RecordedOperation:
    """Return an operation that both have: its sizes change by the same amount with each block."""
    allocated = _extrapolate(few.allocated, more.allocated, blocks)
    return more._replace(allocated=allocated, released=_extrapolate(few.released, more.released, blocks))


def _extrapolate(few: Sequence[Storage], more: Sequence[Storage], blocks: int) -> Sequence[Storage]:
    """Return storages that grow in size, or in number, by the same amount with each block."""
    if few == more:  # nearly always
        return few
    fewer, further = Counter(few), Counter(more)
    storages = list((fewer & further).elements())
    changed = [sorted(rest.elements(), reverse=True) for rest in (fewer - further, further - fewer)]
    for part in Part:
        old_sizes, new_sizes = ([size for of_part, size in rest if of_part == part] for rest in changed)
        for size, larger in itertools.zip_longest(old_sizes, new_sizes):
            if larger is None or (size or 0) > larger:
                raise ValueError("A storage becomes smaller.")
            storages += blocks * [(part, larger)] if size is None else [(part, size + blocks * (larger - size))]
    return storages
