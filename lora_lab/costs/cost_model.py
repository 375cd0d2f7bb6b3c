"""How long a training step will take, and why, before any training.

    cost_model().predict(model, {"full": FullFineTuning(), "LoRA": LoRA(8)}, 4, 128)

The operations of a step are rehearsed on fake tensors. Each takes three times: computing its FLOPs, moving its bytes,
and the call. A CPU takes one after the other; on a GPU they overlap, and the longest counts. The rates are measured on
this machine: that of a matrix product at its own shape, the bandwidth of the memory, and what a small step takes
beyond both, for each call. (:mod:`lora_lab.costs.cards` takes them from a datasheet.)

LoRA skips the weight gradients of the frozen layers, so that it needs fewer FLOPs than full fine-tuning: with adapters
in all blocks of a deep model, at least about two thirds of them. It adds small matrix multiplications and passes over
memory, whose time does not show in FLOPs. Which of the two weighs more depends on the machine and on the tokens in a
step.

Reference: Williams, Waterman and Patterson 2009, "Roofline", Communications of the ACM 52(4).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from lora_lab.costs.fake import Source, batch_for, build_model, fake_copy, shape_of, storage_of
from lora_lab.costs.flops import ADAPTERS, AGAIN, ATTENTION, FORWARD, GIGA, HEAD, INPUT, WEIGHT, FlopCounter, size_of
from lora_lab.costs.setup import Setup, as_setup
from lora_lab.costs.timing import disturbance, median_seconds, thread_count
from lora_lab.methods import LoRA, Method
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.system.device import own_randomness, pick_device
from lora_lab.system.process import BusyCores
from lora_lab.train import Batch, state_bytes

MEMORY, UPDATE = "passes over memory", "clipping and optimiser"
CAUSES = (FORWARD, INPUT, WEIGHT, AGAIN, HEAD, ATTENTION, ADAPTERS, MEMORY, UPDATE)
_ALIKE = 0.03  # times that differ by less count as equal
_LONG_S = 10.0  # from here on times are shown in seconds, and not in milliseconds
_LOOKUPS = ("embedding", "nll_loss_forward")  # they read as many numbers of a table as they return
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_WEIGHTS = 2**24  # updated to measure the bandwidth: far more than a cache holds
Factor = tuple[tuple[int, ...], tuple[int, ...]]


# The operations of a step


@dataclass(frozen=True)
class OperatorCall:
    """A call of an operator of torch, as far as its time depends on it.

    Args:
        name: the operator's, such as "mm".
        moved_bytes: what it reads and writes, as if no cache kept any of it.
        flops: of the products in it.
        dtype: of its first tensor.
        factors: (shape, strides) of both factors of a matrix product.
        of_list: whether it works on lists of tensors, which share their launches.
    """

    name: str
    moved_bytes: int
    flops: int = 0
    dtype: torch.dtype = torch.float32
    factors: tuple[Factor, ...] = ()
    of_list: bool = False


def describe_call(
    function: OpOverload, args: tuple, kwargs: Mapping[str, Any], out: Any, flops: int = 0
) -> OperatorCall | None:
    """Return the call that has just run; None if it moved no bytes, as views and allocations."""
    name, schema = function._opname, function._schema
    read = list(_tensors((args, tuple(kwargs.values()))))
    held = {storage_of(tensor) for tensor in read}
    made_bytes = sum(tensor.untyped_storage().nbytes() for tensor in _tensors(out) if storage_of(tensor) not in held)
    if not schema.is_mutable and (not made_bytes or name.startswith(("empty", "new_empty"))):
        return None
    written = [
        value
        for argument, value in zip(schema.arguments, args, strict=False)
        if argument.alias_info is not None
        and argument.alias_info.is_write
        # Fused AdamW may change gradients, by its schema, but does so only where they are scaled.
        and argument.name != "grads"
    ]
    moved_bytes = sum(map(_size_of, [*read, *_tensors(written)])) + made_bytes
    if name in _LOOKUPS:
        moved_bytes = 2 * made_bytes
    if "dot_product" in name:
        flops = _attention_flops(name, args)
    factors = tuple((tuple(each.shape), each.stride()) for each in read[-2:] if name.removesuffix("_") in _PRODUCTS)
    of_list = (schema.is_mutable or name.startswith("_foreach_")) and isinstance(args[0], list | tuple)
    return OperatorCall(name, moved_bytes, flops, read[0].dtype if read else torch.float32, factors, of_list)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested lists and tuples; torch's own ``tree_leaves`` takes several times as long."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _size_of(tensor: Tensor) -> int:
    """Return bytes in memory: an expanded dimension counts once."""
    stored = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size]
    return math.prod(stored) * tensor.element_size()


def _attention_flops(name: str, args: tuple) -> int:
    """Return the FLOPs of fused attention, half of them if it is causal."""
    shapes = [tuple(tensor.shape) for tensor in _tensors(args)]
    backward = name.endswith("_backward")  # its first operand is a gradient
    count = sdpa_backward_flop_count(*shapes[:4]) if backward else sdpa_flop_count(*shapes[:3])
    return count // 2 if any(value is True for value in args) else count


class StepTrace(FlopCounter):
    """Lists the operations of a step and their causes."""

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and list it; the list of an earlier step is dropped."""
        self._entries: list[tuple[str, int | None, OperatorCall]] = []
        super().run(batches, weights)

    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Add the operation to the list."""
        before = len(self.products)
        super().on_operation(function, args, kwargs, out)
        flops = sum(count for _, _, count in self.products[before:])
        if function.namespace == "aten" and (call := describe_call(function, args, kwargs, out, flops)):
            self._entries.append((self.phase, before if flops else None, call))

    def work(self) -> StepWork:
        """Return the operations of the last step."""
        calls: defaultdict[str, Counter[OperatorCall]] = defaultdict(Counter)
        for phase, product, call in self._entries:
            calls[self._cause(phase, product, call.name)][call] += 1
        model = self.step.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        tensors = [*model.parameters(), *model.buffers(), *trained]  # a gradient is as large as its parameter
        static_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return StepWork(dict(calls), static_bytes + state_bytes(self.step.optimizer))

    def _cause(self, phase: str, product: int | None, name: str) -> str:
        if product is not None:
            part, pass_, _ = self.products[product]
            return part if part in (ATTENTION, ADAPTERS) or (part == HEAD and pass_ != WEIGHT) else pass_
        if "attention" in name:
            return ATTENTION
        return MEMORY if phase in ("forward", "backward") else UPDATE


@dataclass(frozen=True)
class StepWork:
    """What a step does.

    Args:
        calls: cause -> operation -> how often it is called. Views are not among them: they move no bytes.
        static_bytes: the size of weights, gradients and optimiser state.
    """

    calls: Mapping[str, Mapping[OperatorCall, int]]
    static_bytes: int = 0

    def launches(self) -> int:
        """Return the number of operations that are launched one by one: all but those on lists of tensors."""
        return sum(n for calls in self.calls.values() for call, n in calls.items() if not call.of_list)

    def seconds(self, price: Callable[[OperatorCall], float]) -> dict[str, float]:
        """Return the seconds of each cause, where an operation takes ``price(operation)``."""
        return {cause: sum(n * price(call) for call, n in calls.items()) for cause, calls in self.calls.items()}


# Predictions


@dataclass(frozen=True)
class Prediction:
    """How long a step of each of several variants will take, and why.

    Args:
        seconds: each variant's time by cause.
        works: each variant's operations.
        tokens: the batch's size, in tokens or examples.
        setting: the model, the batch and the device.
        doubts: sentences about what may be wrong with the prediction.
    """

    seconds: Mapping[str, Mapping[str, float]]
    works: Mapping[str, StepWork]
    tokens: int
    setting: str = ""
    doubts: Sequence[str] = ()

    @property
    def first(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.seconds))

    def total_s(self, name: str) -> float:
        """Return the time of a step."""
        return sum(self.seconds[name].values())

    def ratio(self, name: str) -> float:
        """Return the variant's time over the first variant's."""
        return self.total_s(name) / self.total_s(self.first)

    def changes(self, name: str) -> dict[str, float]:
        """Return a variant's seconds by cause minus the first variant's."""
        seconds, first = self.seconds[name], self.seconds[self.first]
        present = (cause for cause in CAUSES if cause in seconds or cause in first)
        return {cause: seconds.get(cause, 0.0) - first.get(cause, 0.0) for cause in present}

    def why(self, name: str) -> str:
        """Return the reason in words: what the variant saves and adds compared with the first, and which is more."""
        ratio, changes = self.ratio(name), self.changes(name)
        lines = [
            f"{name} takes {ratio:.2f} of the time of {self.first}: {_time(self.total_s(name))} a step, "
            f"not {_time(self.total_s(self.first))}."
        ]
        for verb, sign in (("saves", -1), ("adds", 1)):
            seconds = {cause: sign * change for cause, change in changes.items() if sign * change > 0}
            largest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:4]
            reasons = ", ".join(f"{cause} {_time(seconds[cause])}" for cause in largest)
            lines.append(f"It {verb} {_time(sum(seconds.values()))}{f': {reasons}' if reasons else ''}.")
        alike = abs(ratio - 1) < _ALIKE
        faster = f"{name} is {'faster' if ratio < 1 else 'slower'}"
        lines.append(f"So {'the two take about as long' if alike else faster}.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return one entry a variant and what holds for all of them, in values of JSON."""
        variants = [
            {
                "variant": name,
                "seconds": self.total_s(name),
                "seconds_by_cause": dict(parts),
                "tokens_per_second": self.tokens / self.total_s(name),
                "ratio": self.ratio(name),
                "why": None if name == self.first else self.why(name),
            }
            for name, parts in self.seconds.items()
        ]
        return {"setting": self.setting, "tokens": self.tokens, "variants": variants, "doubts": list(self.doubts)}

    def __str__(self) -> str:
        width = max(12, *(len(name) + 2 for name in self.seconds))
        unit, scale = ("s", 1) if max(map(self.total_s, self.seconds)) >= _LONG_S else ("ms", 1e3)
        causes = [cause for cause in CAUSES if any(parts.get(cause) for parts in self.seconds.values())]
        rows = {
            "": list(self.seconds),
            **{cause: [f"{parts.get(cause, 0) * scale:,.2f}" for parts in self.seconds.values()] for cause in causes},
            "all": [f"{self.total_s(name) * scale:,.2f}" for name in self.seconds],
            "ratio": [f"{self.ratio(name):.3f}" for name in self.seconds],
        }
        lines = [f"  {label:<26}" + "".join(f"{cell:>{width}}" for cell in cells) for label, cells in rows.items()]
        reasons = [self.why(name) for name in self.seconds if name != self.first]
        return "\n".join([f"{self.setting}: {unit} a step, predicted", *lines, *reasons, *self.doubts])


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= _LONG_S else f"{seconds * 1e3:,.2f} ms"


@dataclass(frozen=True)
class CostModel:
    """What operations cost on one machine, and so how long a step of any model will take.

    Args:
        seconds: operation -> seconds, such as a :class:`Roofline`.
        device: where the step is rehearsed.
        rates: what the seconds follow from, as text.
        where: the machine and how its rates are known, as a prediction's setting names them.
    """

    seconds: Callable[[OperatorCall], float]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rates: Mapping[str, str] = field(default_factory=dict)
    where: str = "cpu"

    def predict(
        self,
        model: Source,
        variants: Mapping[str, Method | Setup],
        batch_size: int | None = None,
        seq_len: int | None = None,
        *,
        batch: Batch | None = None,
        **options: Any,
    ) -> Prediction:
        """Predict how long a step will take, from its rehearsal on fake tensors and the costs of its operations.

        Matrix products of shapes that are new are timed, which takes a second or two.

        Args:
            variants: name -> how it is trained. The others are compared with the first.
            model, batch_size, seq_len, batch, **options: as for :func:`flops`.

        Raises:
            ValueError: there is no variant, or as for :func:`flops`.
        """
        if not variants:
            raise ValueError("variants is empty, so there is nothing to predict; give one, as {'LoRA': LoRA(8)}.")
        works: dict[str, StepWork] = {}
        tokens, setting = 0, ""
        for name, method in variants.items():
            setup = as_setup(method, options)
            with fake_copy(model, self.device, setup.dtype) as twin, own_randomness(self.device, 0):
                fake_batch = batch_for(twin, batch_size, seq_len, batch)
                works[name] = trace_work(setup, twin, fake_batch)
                tokens = size_of(fake_batch)
                setting = f"{type(twin).__name__}, batch {shape_of(fake_batch)}, {self.where}"
        with BusyCores(thread_count(self.device)) as busy:
            seconds = {name: work.seconds(self.seconds) for name, work in works.items()}
        prediction = Prediction(seconds, works, tokens, setting)
        return replace(prediction, doubts=self._doubts(prediction, disturbance(busy)))

    def _doubts(self, prediction: Prediction, disturbed: str) -> list[str]:
        """Return what may be wrong with a prediction, given what disturbed the timing of its products."""
        return [f"While costs were measured: {disturbed}"] if disturbed else []

    def __str__(self) -> str:
        return "\n".join([f"Costs on {self.where}", *(f"  {name:<44}{value}" for name, value in self.rates.items())])


def trace_work(setup: Setup, model: nn.Module, batch: Batch) -> StepWork:
    """Return what the second step of a fake model does on a batch."""
    trace = StepTrace(setup.step(model))
    trace.run_second(*setup.batches(batch))
    return trace.work()


# Costs


@dataclass(frozen=True)
class Roofline:
    """Seconds of an operation: of computing, of moving bytes, and of the call.

    Args:
        flops_per_second: operation -> the rate of its products.
        bytes_per_second: the memory's bandwidth.
        call_s: what it takes to call an operation.
        overlaps: whether the device does all three at once, as a GPU does, so that the longest counts and not the sum.
    """

    flops_per_second: Callable[[OperatorCall], float]
    bytes_per_second: float
    call_s: float
    overlaps: bool

    def __call__(self, operation: OperatorCall) -> float:
        """Return the seconds of one operation; those on lists of tensors share their calls."""
        computing = operation.flops / self.flops_per_second(operation) if operation.flops else 0.0
        moving = operation.moved_bytes / self.bytes_per_second
        calling = 0.0 if operation.of_list else self.call_s
        return max(computing, moving, calling) if self.overlaps else computing + moving + calling


class ProductRates:
    """FLOPs a second of matrix products on a device; each shape is timed once.

    Large products count at the rate of a square one, and so do convolutions and attention.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: dict[tuple[torch.dtype, tuple[Factor, ...]], float] = {}
        self._side = 1024 if device.type == "cpu" else 8192  # of the square

    def __call__(self, operation: OperatorCall) -> float:
        """Return the rate of an operation's products."""
        small = operation.factors and operation.flops <= 2 * self._side**3
        return self._rate(operation.dtype, operation.factors) if small else self.of_square(operation.dtype)

    def of_square(self, dtype: torch.dtype) -> float:
        """Return the rate of a large square product."""
        square = (self._side, self._side), (self._side, 1)
        return self._rate(dtype, (square, square))

    def _rate(self, dtype: torch.dtype, factors: tuple[Factor, ...]) -> float:
        if (dtype, factors) not in self._known:
            left, right = (_ones(*factor, dtype, self.device) for factor in factors)
            flops = 2 * left.numel() * right.shape[-1]
            with torch.no_grad():
                seconds = median_seconds(lambda: torch.matmul(left, right), self.device)
            self._known[dtype, factors] = flops / seconds
        return self._known[dtype, factors]


def _ones(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return torch.ones(extent, dtype=dtype, device=device).as_strided(shape, stride)


def cost_model(device: torch.device | str | None = None) -> CostModel:
    """Measure what the components of training steps cost on this machine, in a few seconds.

    It measures the memory's bandwidth, by an update of AdamW, and what Python, autograd and torch's threads take for a
    call, by a step of a small Llama. The rates of matrix products are measured when a prediction needs them.

    On CUDA the clock waits for the device; this path has never been run.

    Args:
        device: where steps are to run; default the best one.
    """
    device = pick_device(device)[0]
    rates, bandwidth = ProductRates(device), _measure_bandwidth(device)
    work = Roofline(rates, bandwidth, call_s=0.0, overlaps=device.type == "cuda")
    seconds = replace(work, call_s=_measure_call(work, device))
    shown = {
        "large matrix products, float32": f"{rates.of_square(torch.float32) / GIGA:,.0f} GFLOP/s",
        "memory": f"{bandwidth / GIGA:,.1f} GB/s",
        "a call": f"{seconds.call_s * 1e6:,.1f} us",
    }
    return CostModel(seconds, device, shown, str(device))


def _measure_bandwidth(device: torch.device) -> float:
    """Return bytes a second of AdamW's update, which reads four numbers a weight and writes three."""
    weight = nn.Parameter(torch.ones(_WEIGHTS, device=device))
    weight.grad = torch.ones_like(weight)
    return 7 * 4 * _WEIGHTS / median_seconds(torch.optim.AdamW([weight], fused=True).step, device)


def _measure_call(work: Roofline, device: torch.device) -> float:
    """Return the seconds of a call: what a small step of LoRA takes beyond the work that its calls do not hide."""
    setup, factory = Setup(LoRA(rank=8)), partial(Llama, LlamaConfig(4096, 512, 1536, 2, 8, 2, 64))
    with fake_copy(factory, device) as twin:
        traced = trace_work(setup, twin, batch_for(twin, 1, 32, None))
    with own_randomness(device, 0):
        model = build_model(factory, device)
        step, batch = setup.step(model), batch_for(model, 1, 32, None)
        taken = median_seconds(lambda: step([batch], [1.0]), device)
    working = 0.0 if work.overlaps else sum(traced.seconds(work).values())
    return max(0.0, taken - working) / traced.launches()
