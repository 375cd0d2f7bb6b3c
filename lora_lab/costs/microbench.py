"""One operation of a training step, run again by itself and timed.

How long an operation takes depends on the shapes, strides and dtypes of its tensors, and hardly on their values. It
also depends on where they are in memory: what a step touched a moment ago is still in a cache, what it touched a
gigabyte ago is not. So every tensor has a *reuse distance*: the bytes that the step has moved since it last touched
that memory. The microbenchmark uses as many tensors in turn as fill this distance, so that caches treat them as in the
step.

:class:`ReuseDistances` describes a step's operations with their distances, on fake tensors too; an
:class:`OperationTimer` runs one of them again.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from lora_lab.costs.fake import storage_of
from lora_lab.costs.memory import MIB
from lora_lab.costs.timing import synchronize
from lora_lab.system.device import own_randomness

_Leaf = TypeVar("_Leaf")
_ATEN = torch.ops.aten
# Distances are rounded, so that similar operations are timed once: no distance, within a core's cache, within the
# processor's, in memory.
DISTANCES = (0, MIB, 8 * MIB, 64 * MIB, 256 * MIB)
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")
_PART_BYTES, _PART_FLOPS = 16 * MIB, 2 * 10**9  # of a larger operation only a part is timed
_LEAST_WORK = 0.4  # the smallest such part, as a share of the above
_SHORTEST = 64  # no size is cut below this
_LIST = 8  # entries in a list, where an operation works on lists
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
        """Bytes in memory: an expanded dimension counts once."""
        stored = [size for size, stride in zip(self.shape, self.stride, strict=True) if stride or not size]
        return math.prod(stored) * self.dtype.itemsize

    @property
    def extent_bytes(self) -> int:
        """Bytes from the first element to the last, gaps included; at least one element."""
        pairs = zip(self.shape, self.stride, strict=True)
        return (1 + sum((size - 1) * stride for size, stride in pairs if size)) * self.dtype.itemsize

    def cut(self, size: int, to: int, first_only: bool = False) -> Operand:
        """Return the same with dimensions of ``size`` (all, or only the first one) cut to ``to``, without gaps."""
        dimensions = range(len(self.shape))
        shape = tuple(to if self.shape[i] == size and not (first_only and i) else self.shape[i] for i in dimensions)
        stride, dense = list(self.stride), 1
        for i in sorted(dimensions, key=lambda i: self.stride[i]):
            if self.stride[i]:
                stride[i], dense = dense, dense * shape[i]
        return replace(self, shape=shape, stride=tuple(stride))


@dataclass(frozen=True)
class OperatorCall:
    """An operator of torch, its arguments with tensors as :class:`Operand`, and the size of its new tensors.

    Args:
        function: such as ``torch.ops.aten.mm.default``.
        args, kwargs: as it was called, with lists as tuples.
        made_bytes: of new tensors.
        distance: the largest reuse distance of the memory that the new tensors take.
        of_list: whether it is the share of one entry in an operation on lists.
    """

    function: OpOverload
    args: tuple
    kwargs: tuple[tuple[str, Any], ...] = ()
    made_bytes: int = 0
    distance: int = 0
    of_list: bool = False

    @property
    def name(self) -> str:
        """The operator's name, such as "mm"."""
        return self.function._opname

    @property
    def operands(self) -> list[Operand]:
        """All tensors among the arguments, in order."""
        return list(_leaves((self.args, self.kwargs), Operand))

    @property
    def moved_bytes(self) -> int:
        """Bytes of all operands and new tensors."""
        return sum(operand.size_bytes for operand in self.operands) + self.made_bytes

    @property
    def flops(self) -> int:
        """Two for each multiply-add of a matrix multiplication; 0 for other operations."""
        if self.name not in _PRODUCTS:
            return 0
        left, right = self.operands[-2:]
        return 2 * math.prod(left.shape) * right.shape[-1]

    def part(self) -> OperatorCall:
        """Return a smaller operation of the same kind, in place of a large one.

        The largest size, such as the number of tokens or the vocabulary, is cut wherever it occurs. Attention is cut in
        the number of sequences only, because its work is not linear in their length.
        """
        size = max((size for operand in self.operands for size in operand.shape), default=0)
        if "attention" in self.name:
            sequences = self.operands[0].shape[0]
            return self._cut(sequences, 2, True) if sequences > 2 else self
        part, divisor = self, 1
        while self._work > divisor and size // (2 * divisor) >= _SHORTEST and "conv" not in self.name:
            divisor *= 2
            smaller = self._cut(size, size // divisor)
            if smaller._work < _LEAST_WORK:  # a square is cut on both sides, and small tensors take longer a byte
                break
            part = smaller
        return part

    @property
    def _work(self) -> float:
        """How large it is, as a multiple of the largest operation that is timed whole."""
        return max(self.moved_bytes / _PART_BYTES, self.flops / _PART_FLOPS)

    def _cut(self, size: int, to: int, first_only: bool = False) -> OperatorCall:
        def cut(value: Any) -> Any:
            if isinstance(value, Operand):
                return value.cut(size, to, first_only)
            return to if type(value) is int and value == size and not first_only else value

        smaller = replace(self, args=tree_map(cut, self.args), kwargs=tree_map(cut, self.kwargs))
        # New tensors most likely shrink as the operands do; their true size is known once the part has run.
        before, after = (sum(operand.size_bytes for operand in each.operands) for each in (self, smaller))
        return replace(smaller, made_bytes=self.made_bytes * after // max(1, before))


# Stands for all operations that move no bytes: views, and allocations.
VIEW = OperatorCall(_ATEN.t.default, (Operand((8, 8), (8, 1), torch.float32),))


class ReuseDistances:
    """Follows which memory a step touches, and describes its operations.

    A tensor's distance is counted from the last operation on its storage. For a new tensor it is counted from the last
    operation on the storage of that size that was released last, because the tensor most likely takes that memory.
    """

    def __init__(self) -> None:
        self.moved_bytes = 0
        self._touched: dict[int, int] = {}  # by storage_of: moved_bytes when it was touched
        self._released: defaultdict[int, list[int]] = defaultdict(list)  # by size: the same, last released at the end
        self._alive: dict[int, weakref.ref] = {}  # by storage_of

    def operations(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> list[OperatorCall]:
        """Return the call that has just run; one for each entry if it works on lists."""
        made = [tensor.untyped_storage().nbytes() for tensor in _made(args, kwargs, out)]
        left = [self._released[size].pop() if self._released[size] else None for size in made]
        distances = [self._distance(*pair) for pair in zip(left, made, strict=True)]
        touched = {self._watch(tensor) for tensor in _leaves((args, tuple(kwargs.values()), out), Tensor)}
        mutates = function._schema.is_mutable
        if not mutates and (not made or function._opname.startswith(("empty", "new_empty"))):
            return [VIEW]
        options = tuple((name, self._describe(value)) for name, value in kwargs.items())
        call = OperatorCall(function, self._describe(args), options, sum(made), max(distances, default=0))
        self.moved_bytes += call.moved_bytes
        self._touched |= dict.fromkeys(touched, self.moved_bytes)
        first = call.args[0] if call.args else None
        on_lists = mutates or function._opname.startswith("_foreach_")
        return _split_list(call, len(first)) if on_lists and isinstance(first, tuple) else [call]

    def _watch(self, tensor: Tensor) -> int:
        """Return the key of a tensor's storage, and note when the storage will be released."""
        key, size = storage_of(tensor), tensor.untyped_storage().nbytes()

        def release(_: weakref.ref) -> None:
            del self._alive[key]
            if key in self._touched:
                self._released[size].append(self._touched.pop(key))

        if key not in self._alive:
            self._alive[key] = weakref.ref(tensor.untyped_storage(), release)
        return key

    def _describe(self, value: Any) -> Any:
        """Return an argument with its tensors as :class:`Operand`, and its lists as tuples."""
        if isinstance(value, Tensor):
            distance = self._distance(self._touched.get(storage_of(value)), value.untyped_storage().nbytes())
            return Operand(tuple(value.shape), value.stride(), value.dtype, distance)
        return tuple(map(self._describe, value)) if isinstance(value, list | tuple) else value

    def _distance(self, touched: int | None, size_bytes: int) -> int:
        if size_bytes < _TINY_BYTES:
            return 0  # fetching it takes hardly any time, so that it need not be timed separately
        if touched is None:
            return DISTANCES[-1]
        # The largest that is at most twice the true distance.
        return max(distance for distance in DISTANCES if distance <= 2 * (self.moved_bytes - touched))


def _made(args: Any, kwargs: Any, out: Any) -> list[Tensor]:
    """Return the results that have a storage of none of the arguments."""
    inputs = {storage_of(leaf) for leaf in _leaves((args, tuple(kwargs.values())), Tensor)}
    return [leaf for leaf in _leaves(out, Tensor) if storage_of(leaf) not in inputs]


def _leaves(value: Any, kind: type[_Leaf]) -> Iterator[_Leaf]:
    """All that is of a kind in nested lists and tuples; torch's own ``tree_leaves`` takes several times as long."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry, kind)


def _split_list(operation: OperatorCall, count: int) -> list[OperatorCall]:
    """Return the share of each entry in an operation on lists."""

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
    """Times operations by running them again on tensors of its own, each kind once.

    The result is the median of several samples. They are taken in rounds over all kinds, so that a disturbance does
    not affect all samples of one kind.

    Args:
        device: where to run them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.failed: set[str] = set()
        self._known: dict[OperatorCall, float] = {}
        self._pool = torch.empty(0)

    def __call__(self, operation: OperatorCall) -> float:
        """Return seconds of one operation.

        An operation that cannot run by itself, such as one that depends on values, counts as a copy of as many bytes,
        and its name is added to ``failed``.
        """
        self.measure([operation])
        return self._known[operation]

    def unmeasured(self, operations: Iterable[OperatorCall]) -> list[OperatorCall]:
        """Return the operations that have not been timed yet, each once."""
        return list(dict.fromkeys(kind for kind in operations if kind not in self._known))

    def measure(self, operations: Iterable[OperatorCall], done: Callable[[], Any] = lambda: None) -> None:
        """Time the operations that have not been timed yet.

        Args:
            done: called ``ROUNDS`` times for each of them.
        """
        samples: dict[OperatorCall, list[float]] = {kind: [] for kind in self.unmeasured(operations)}
        # Ones, because repeated operations could otherwise reach denormal numbers, which are slow; freed at the end.
        self._pool = torch.ones((DISTANCES[-1] + 4 * _PART_BYTES) // 4 if samples else 0, device=self.device)
        with own_randomness(self.device, 0), torch.no_grad():
            parts = {kind: self._runnable_part(kind) for kind in samples}
            for _ in range(ROUNDS):
                for kind, (part, factor) in parts.items():
                    samples[kind] += [factor * second for second in self._samples(part)]
                    done()
        self._pool = torch.empty(0)
        for kind, seconds in samples.items():
            self._known[kind] = statistics.median(seconds)

    def _runnable_part(self, operation: OperatorCall) -> tuple[OperatorCall, float]:
        """Return the operation to time in place of another, and the factor to multiply its time by."""
        for candidate in (operation.part(), operation):
            try:
                args, kwargs = self._calls(candidate)[0]
                out = candidate.function(*args, **kwargs)
            except (RuntimeError, ValueError, TypeError, IndexError):
                continue
            if candidate is operation:
                return operation, 1.0
            # Its new tensors may have shrunk with the size that was cut, or not.
            new = [tensor.untyped_storage().nbytes() for tensor in _made(args, kwargs, out)]
            part = replace(candidate, made_bytes=sum(new))
            work = (operation.flops, part.flops) if part.flops else (operation.moved_bytes, part.moved_bytes)
            return part, work[0] / work[1]
        self.failed.add(operation.name)
        half = Operand((max(1, operation.moved_bytes // 8),), (1,), torch.float32, DISTANCES[-1])
        return self._runnable_part(OperatorCall(_ATEN.clone.default, (half,), (), half.size_bytes, half.distance))

    def _samples(self, operation: OperatorCall) -> list[float]:
        """Return two samples of the seconds of one call; for quick calls each is the mean over about a millisecond."""
        function, calls = operation.function, itertools.cycle(self._calls(operation))
        # Results are held until their memory is reused at the operation's distance.
        held: deque = deque(maxlen=1 + min(_MOST_SETS, operation.distance // max(1, operation.moved_bytes)))

        def sample(count: int) -> float:
            synchronize(self.device)
            started = time.perf_counter()
            for _ in range(count):
                args, kwargs = next(calls)
                held.append(function(*args, **kwargs))
            synchronize(self.device)
            return (time.perf_counter() - started) / count

        estimate = sample(1)
        if estimate < _SAMPLE_S:
            estimate = sample(8)
        count = max(1, min(1000, int(_SAMPLE_S / max(estimate, 1e-6))))
        first = sample(count) if count > 1 else estimate
        entries = _LIST if operation.of_list else 1
        return [first / entries, sample(count) / entries]

    def _calls(self, operation: OperatorCall) -> list[tuple[list, dict]]:
        """Return arguments for as many successive calls as it takes to move the operands' distances."""
        entries = _LIST if operation.of_list else 1
        slots = self._slots(operation, entries)

        def filled(number: int) -> tuple[list, dict]:
            remaining = iter(slots)

            def fill(value: Any) -> Any:
                if isinstance(value, Operand):
                    slot = next(remaining)
                    return slot[number % len(slot)]
                if not isinstance(value, tuple):
                    return value
                if operation.of_list and len(value) == 1 and isinstance(value[0], Operand):
                    slot = next(remaining)
                    start = number * entries % len(slot)
                    return slot[start : start + entries]
                return [fill(entry) for entry in value]

            return fill(operation.args), {name: fill(value) for name, value in operation.kwargs}

        return [filled(number) for number in range(max((len(slot) // entries for slot in slots), default=1))]

    def _slots(self, operation: OperatorCall, entries: int) -> list[list[Tensor]]:
        """Return the tensors to use in turn for each operand; no two operands share memory."""
        slots, start = [], 0
        for operand in operation.operands:
            # The bytes between two uses of a tensor are divided among the operands by their sizes.
            room = operand.distance * operand.size_bytes // max(1, operation.moved_bytes)
            extent = -(-operand.extent_bytes // _LINE) * _LINE
            count = entries * max(1, min(_MOST_SETS, room // (extent * entries)))
            step = max(extent, room // count // _LINE * _LINE)
            slots.append(self._tensors(operand, range(start, start + step * count, step)))
            start += step * count
        return slots

    def _tensors(self, operand: Operand, starts_bytes: Iterable[int]) -> list[Tensor]:
        """Return views of the pool of ones, one from each start; for integers, which are mostly indices, zeros."""
        shape, stride, dtype, extent_bytes = operand.shape, operand.stride, operand.dtype, operand.extent_bytes

        def constant(fill: Callable[..., Tensor]) -> Tensor:
            return fill(extent_bytes // dtype.itemsize, dtype=dtype, device=self.device).as_strided(shape, stride)

        if not dtype.is_floating_point:
            return [constant(torch.zeros) for _ in starts_bytes]
        pool, last = self._pool.view(dtype), self._pool.nbytes - extent_bytes
        return [
            # An operation that could not be cut may not fit into the pool.
            pool.as_strided(shape, stride, start // dtype.itemsize) if start <= last else constant(torch.ones)
            for start in starts_bytes
        ]
