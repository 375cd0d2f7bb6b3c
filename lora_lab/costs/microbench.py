"""One operation of a training step, done again by itself and timed.

How long an operation takes depends on the shapes, strides and dtypes of its tensors, and hardly on their numbers. It
also depends on where these lie: what a step touched a moment ago is still in a cache, what it touched a gigabyte ago
is not. So every tensor has a *distance*: how many bytes the step has moved since it last touched that memory. In the
replay it is one of as many tensors as fill this distance, used in turn, and caches treat it as they do in the step.

:class:`ReuseDistances` describes a step's operations with their distances, on fake tensors too; an
:class:`OperationTimer` runs one of them again.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lora_lab.costs.fake import storage_of
from lora_lab.system.device import own_randomness

MIB = 2**20
_ATEN = torch.ops.aten
# Distances are rounded, so that alike operations are timed once: beside each other, in a core's cache, in the
# processor's, in memory.
DISTANCES = (0, MIB, 8 * MIB, 64 * MIB, 256 * MIB)
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")
_PART_BYTES, _PART_FLOPS = 16 * MIB, 2 * 10**9  # of a larger operation a part is timed
_LEAST_WORK = 0.4  # of such a part
_SHORTEST = 64  # no size is cut below this
_LIST = 8  # entries of a list that is worked through at once
_MOST_SETS = 256  # of operands
_LINE = 64  # bytes of a cache line
_SAMPLE_S, ROUNDS = 1e-3, 3
_TINY_BYTES = 4096


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation reads or writes, and its distance in bytes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    distance: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes that are really there: what is expanded counts once."""
        there = [size for size, stride in zip(self.shape, self.stride, strict=True) if stride or not size]
        return math.prod(there) * self.dtype.itemsize

    @property
    def extent_bytes(self) -> int:
        """Bytes from the first number to the last, gaps included; at least one number's."""
        pairs = zip(self.shape, self.stride, strict=True)
        return (1 + sum((size - 1) * stride for size, stride in pairs if size)) * self.dtype.itemsize

    def cut(self, size: int, to: int, first_only: bool = False) -> Operand:
        """The same with every dimension (or the first alone, if it is) of ``size`` cut ``to`` fewer, without gaps."""
        places = range(len(self.shape))
        shape = tuple(to if self.shape[i] == size and not (first_only and i) else self.shape[i] for i in places)
        stride, dense = list(self.stride), 1
        for place in sorted(places, key=lambda i: self.stride[i]):
            if self.stride[place]:
                stride[place], dense = dense, dense * shape[place]
        return replace(self, shape=shape, stride=tuple(stride))


@dataclass(frozen=True)
class Operation:
    """What is done, to what: an operator of torch, its arguments with tensors as :class:`Operand`, and what it makes.

    Args:
        function: such as ``torch.ops.aten.mm.default``.
        args, kwargs: as it was called; lists are tuples here.
        made_bytes: of new tensors.
        distance: of the memory that these take.
        of_list: it is one entry's share of an operation on lists.
    """

    function: Callable[..., Any]
    args: tuple
    kwargs: tuple[tuple[str, Any], ...] = ()
    made_bytes: int = 0
    distance: int = 0
    of_list: bool = False

    @property
    def name(self) -> str:
        """Such as "mm"."""
        return self.function._opname

    @property
    def operands(self) -> list[Operand]:
        """All that goes in, in order."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Operand)]

    @property
    def moved_bytes(self) -> int:
        """Bytes of all that goes in and comes out."""
        return sum(operand.size_bytes for operand in self.operands) + self.made_bytes

    @property
    def flops(self) -> int:
        """Two for each multiplication and addition of a matrix product; 0 for all else."""
        if self.name not in _PRODUCTS:
            return 0
        left, right = self.operands[-2:]
        return 2 * math.prod(left.shape) * right.shape[-1]

    def part(self) -> Operation:
        """A smaller operation of the same kind, in place of a large one.

        The largest size of all, such as the tokens or the vocabulary, is cut wherever it stands. Attention is cut by
        sequences alone, for its work does not grow in a line with their length.
        """
        size = max((size for operand in self.operands for size in operand.shape), default=0)
        if "attention" in self.name:
            sequences = self.operands[0].shape[0]
            return self._cut(sequences, 2, True) if sequences > 2 else self
        part, pieces = self, 1
        while self._work > pieces and size // (2 * pieces) >= _SHORTEST and "conv" not in self.name:
            pieces *= 2
            smaller = self._cut(size, size // pieces)
            if smaller._work < _LEAST_WORK:  # a square is cut on both sides, and small tensors cost more a byte
                break
            part = smaller
        return part

    @property
    def _work(self) -> float:
        """How large it is, in parts of the size that is timed."""
        return max(self.moved_bytes / _PART_BYTES, self.flops / _PART_FLOPS)

    def _cut(self, size: int, to: int, first_only: bool = False) -> Operation:
        def cut(value: Any) -> Any:
            if isinstance(value, Operand):
                return value.cut(size, to, first_only)
            if isinstance(value, tuple):
                return tuple(cut(entry) for entry in value)
            return to if type(value) is int and value == size and not first_only else value

        smaller = replace(self, args=cut(self.args), kwargs=cut(self.kwargs))
        # What is made most likely shrinks as what goes in does; it is looked at once the part has been done.
        before, after = (sum(operand.size_bytes for operand in each.operands) for each in (self, smaller))
        return replace(smaller, made_bytes=self.made_bytes * after // max(1, before))


# Stands for all that move nothing, and only see a tensor in another shape, or set memory aside.
VIEW = Operation(_ATEN.t.default, (Operand((8, 8), (8, 1), torch.float32),))


class ReuseDistances:
    """Follows what a step touches, and describes its operations.

    A tensor's distance is counted from the last operation that had its storage. For a new tensor it is counted from
    the death of the last storage of that size, whose place in memory it most likely takes.
    """

    def __init__(self) -> None:
        self.moved_bytes = 0
        self._touched: dict[int, int] = {}  # storage -> moved_bytes when it was touched
        self._left: dict[int, list[int]] = {}  # size of dead storages -> the same, the last to die at the end
        self._alive: dict[int, weakref.ref] = {}

    def operations(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> list[Operation]:
        """The operation just done; one for each entry if it works through a list."""
        given = {storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and storage_of(leaf) not in given]
        distances = [self._distance(self._born(tensor), tensor) for tensor in made]
        changes = function._schema.is_mutable
        if not changes and (not made or function._opname.startswith(("empty", "new_empty"))):
            return [VIEW]

        def describe(value: Any) -> Any:
            if isinstance(value, Tensor):
                distance = self._distance(self._touched.get(storage_of(value)), value)
                return Operand(tuple(value.shape), value.stride(), value.dtype, distance)
            return tuple(describe(entry) for entry in value) if isinstance(value, list | tuple) else value

        found = Operation(
            function,
            describe(args),
            tuple((name, describe(value)) for name, value in kwargs.items()),
            sum(tensor.untyped_storage().nbytes() for tensor in made),
            max(distances, default=0),
        )
        self.moved_bytes += found.moved_bytes
        self._touched |= dict.fromkeys([*given, *(storage_of(tensor) for tensor in made)], self.moved_bytes)
        first = found.args[0] if found.args else None
        on_lists = changes or function._opname.startswith("_foreach_")
        return _entries(found, len(first)) if on_lists and isinstance(first, tuple) else [found]

    def _distance(self, touched: int | None, tensor: Tensor) -> int:
        if tensor.untyped_storage().nbytes() < _TINY_BYTES:
            return 0  # it takes no time to fetch, and so makes no other kind of operation
        if touched is None:
            return DISTANCES[-1]
        # The nearest, in ratios, or lower.
        return max(distance for distance in DISTANCES if distance <= 2 * (self.moved_bytes - touched))

    def _born(self, tensor: Tensor) -> int | None:
        """Enter a new storage, and say when its place was last touched."""
        key, size = storage_of(tensor), tensor.untyped_storage().nbytes()

        def dead(_: weakref.ref) -> None:
            del self._alive[key]
            if key in self._touched:
                self._left.setdefault(size, []).append(self._touched.pop(key))

        self._alive[key] = weakref.ref(tensor.untyped_storage(), dead)
        return self._left[size].pop() if self._left.get(size) else None


def _entries(operation: Operation, count: int) -> list[Operation]:
    """Each entry's share of an operation on lists."""

    def share(value: Any, index: int) -> Any:
        return value[index : index + 1] if isinstance(value, tuple) and len(value) == count else value

    return [
        replace(
            operation,
            args=tuple(share(value, index) for value in operation.args),
            kwargs=tuple((name, share(value, index)) for name, value in operation.kwargs),
            made_bytes=operation.made_bytes // count,
            of_list=True,
        )
        for index in range(count)
    ]


class OperationTimer:
    """Times operations by doing them again on tensors of its own, each kind once.

    The median of several samples counts. They are taken in rounds over all kinds, so that a disturbance meets no kind
    in all of its samples.

    Args:
        device: where to do them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.failed: set[str] = set()
        self._known: dict[Operation, float] = {}
        self._pool = torch.empty(0)

    def __call__(self, operation: Operation) -> float:
        """Seconds of one operation.

        One that cannot be done alone, such as one that looks at its numbers, is taken to last as long as a copy of
        as many bytes, and its name is entered in ``failed``.
        """
        self.measure([operation])
        return self._known[operation]

    def unmeasured(self, operations: Iterable[Operation]) -> list[Operation]:
        """Those that are not known yet, each once."""
        return list(dict.fromkeys(kind for kind in operations if kind not in self._known))

    def measure(self, operations: Iterable[Operation], done: Callable[[], Any] = lambda: None) -> None:
        """Time those that are not known yet.

        Args:
            done: called ``ROUNDS`` times for each of them.
        """
        samples: dict[Operation, list[float]] = {kind: [] for kind in self.unmeasured(operations)}
        # Ones, so that no number grows small enough to be slow; freed when all are timed.
        self._pool = torch.ones((DISTANCES[-1] + 4 * _PART_BYTES) // 4 if samples else 0, device=self.device)
        with own_randomness(self.device, 0), torch.no_grad():
            parts = {kind: self._runnable_part(kind) for kind in samples}
            for _ in range(ROUNDS):
                for kind, (part, factor) in parts.items():
                    samples[kind] += [factor * second for second in self._samples(part)]
                    done()
        self._pool = torch.empty(0)
        for kind, found in samples.items():
            self._known[kind] = statistics.median(found)

    def _runnable_part(self, operation: Operation) -> tuple[Operation, float]:
        """What to time in place of an operation, and what to multiply its time by."""
        for candidate in (operation.part(), operation):
            try:
                args, kwargs = self._calls(candidate)[0]
                out = candidate.function(*args, **kwargs)
            except (RuntimeError, ValueError, TypeError, IndexError):
                continue
            if candidate is operation:
                return operation, 1.0
            # What it makes may have shrunk with the size that was cut, or not.
            given = {storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and storage_of(leaf) not in given]
            part = replace(candidate, made_bytes=sum(tensor.untyped_storage().nbytes() for tensor in made))
            work = (operation.flops, part.flops) if part.flops else (operation.moved_bytes, part.moved_bytes)
            return part, work[0] / work[1]
        self.failed.add(operation.name)
        half = Operand((max(1, operation.moved_bytes // 8),), (1,), torch.float32, DISTANCES[-1])
        return self._runnable_part(Operation(_ATEN.clone.default, (half,), (), half.size_bytes, half.distance))

    def _samples(self, operation: Operation) -> list[float]:
        """Seconds of one call, twice; of quick ones as the mean over about a millisecond of calls."""
        function, calls = operation.function, itertools.cycle(self._calls(operation))
        # New tensors are kept until as many bytes have been made as lie between two uses of a place in memory.
        kept: deque = deque(maxlen=1 + min(_MOST_SETS, operation.distance // max(1, operation.moved_bytes)))

        def sample(count: int) -> float:
            self._wait()
            started = time.perf_counter()
            for _ in range(count):
                args, kwargs = next(calls)
                kept.append(function(*args, **kwargs))
            self._wait()
            return (time.perf_counter() - started) / count

        once = sample(1)
        if once < _SAMPLE_S:
            once = sample(8)
        count = max(1, min(1000, int(_SAMPLE_S / max(once, 1e-6))))
        once = sample(count) if count > 1 else once
        entries = _LIST if operation.of_list else 1
        return [once / entries, sample(count) / entries]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _calls(self, operation: Operation) -> list[tuple[list, dict]]:
        """Arguments for as many calls, one after another, as it takes to move the operands' distances."""
        entries = _LIST if operation.of_list else 1
        slots = self._slots(operation, entries)

        def filled(number: int) -> tuple[list, dict]:
            places = iter(slots)

            def fill(value: Any) -> Any:
                if isinstance(value, Operand):
                    slot = next(places)
                    return slot[number % len(slot)]
                if not isinstance(value, tuple):
                    return value
                if operation.of_list and len(value) == 1 and isinstance(value[0], Operand):
                    slot = next(places)
                    start = number * entries % len(slot)
                    return slot[start : start + entries]
                return [fill(entry) for entry in value]

            return fill(operation.args), {name: fill(value) for name, value in operation.kwargs}

        return [filled(number) for number in range(max((len(slot) // entries for slot in slots), default=1))]

    def _slots(self, operation: Operation, entries: int) -> list[list[Tensor]]:
        """For each operand the tensors to use in turn; no two operands share memory."""
        slots, start = [], 0
        for operand in operation.operands:
            # Of all that is moved between two uses of a tensor, this operand's others are its share.
            room = operand.distance * operand.size_bytes // max(1, operation.moved_bytes)
            extent = -(-operand.extent_bytes // _LINE) * _LINE
            count = entries * max(1, min(_MOST_SETS, room // (extent * entries)))
            step = max(extent, room // count // _LINE * _LINE)
            slots.append([self._tensor(operand, start + step * index) for index in range(count)])
            start += step * count
        return slots

    def _tensor(self, operand: Operand, start_bytes: int) -> Tensor:
        """Ones in the pool, so that no number grows small enough to be slow; indices are zeros."""
        count = operand.extent_bytes // operand.dtype.itemsize
        start = start_bytes // operand.dtype.itemsize
        if not operand.dtype.is_floating_point:
            start, numbers = 0, torch.zeros(count, dtype=operand.dtype, device=self.device)
        elif start_bytes + operand.extent_bytes > self._pool.nbytes:  # a part that could not be made small
            start, numbers = 0, torch.ones(count, dtype=operand.dtype, device=self.device)
        else:
            numbers = self._pool.view(operand.dtype)
        return numbers.as_strided(operand.shape, operand.stride, start)
