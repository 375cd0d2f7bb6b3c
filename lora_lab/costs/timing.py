"""How long a training step takes: measured by real steps, in turn; and predicted, with the reason, before any training.

    step_time(model, {"full": FullFineTuning(), "LoRA": LoRA(8)}, 4, 128)
    cost_model().predict(model, {"full": FullFineTuning(), "LoRA": LoRA(8)}, 4, 128)

To predict a step, its operations are rehearsed on fake tensors. Each takes three times: computing its FLOPs, moving its
bytes, and the call. A CPU takes one after the other; on a GPU they overlap, and the longest counts. The rates are
measured on this machine: that of a matrix product at its own shape, the bandwidth of the memory, and what a small step
takes beyond both, for each call. (:mod:`lora_lab.costs.cards` takes them from a datasheet.)

LoRA skips the weight gradients of the frozen layers, so that it needs fewer FLOPs than full fine-tuning: with adapters
in all blocks of a deep model, at least about two thirds of them. It adds small matrix multiplications and passes over
memory, whose time does not show in FLOPs. Which of the two weighs more depends on the machine and on the tokens in a
step.

Reference: Williams, Waterman and Patterson 2009, "Roofline", Communications of the ACM 52(4).
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from timeit import Timer
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from lora_lab.costs.fake import (
    Source,
    batch_for,
    build_model,
    device_to_run,
    nested_tensors,
    shape_of,
    storage_of,
    tensors_of,
    unshare_trainable,
)
from lora_lab.costs.flops import ADAPTERS, AGAIN, ATTENTION, FORWARD, GIGA, HEAD, INPUT, WEIGHT, FlopCounter, size_of
from lora_lab.costs.setup import Setup, as_setup, rehearse_step
from lora_lab.methods import LoRA, Method
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.system.device import BusyCores, own_randomness, pick_device
from lora_lab.system.schema import Size, check
from lora_lab.system.wording import count_noun, progress_bar
from lora_lab.train import Batch, TrainingStep, state_bytes

_TIMING_S = 0.05  # the shortest timing of steps
_SAMPLE_S = 1e-3  # the same of a single operation
_TOO_WIDE = 0.2  # an interval of ratios that shows nothing
MEMORY, UPDATE = "passes over memory", "clipping and optimiser"
CAUSES = (FORWARD, INPUT, WEIGHT, AGAIN, HEAD, ATTENTION, ADAPTERS, MEMORY, UPDATE)
_ALIKE = 0.03  # times that differ by less count as equal
_LOOKUPS = ("embedding", "nll_loss_forward")  # they read as many numbers of a table as they return
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_SIDE = {"cpu": 1024}  # of the square product that is timed
_WEIGHTS = 2**24  # updated to measure the bandwidth: far more than a cache holds
Factor = tuple[tuple[int, ...], tuple[int, ...]]


# Real steps


@dataclass(frozen=True)
class Times:
    """How long the steps of several variants took, measured in turn; each variant is compared with the first.

    Ratios to the first variant are taken round by round, so that a slow moment of the machine affects both.

    Args:
        seconds: for each variant one value a round: the mean over the round's steps.
        tokens: the batch's size, in tokens or examples.
        setting: the model, the batch and the device.
        disturbance: a sentence about other processes that kept the machine busy meanwhile, or an empty string.
    """

    seconds: Mapping[str, Sequence[float]]
    tokens: int
    setting: str = ""
    disturbance: str = ""

    @property
    def first(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.seconds))

    @property
    def rounds(self) -> int:
        """How often each variant was timed."""
        return len(self.seconds[self.first])

    def median_s(self, name: str) -> float:
        """Return median time of a step."""
        return statistics.median(self.seconds[name])

    def quartiles_s(self, name: str) -> tuple[float, float]:
        """Return the lower and the upper quartile of the rounds."""
        low, high = np.quantile(self.seconds[name], [0.25, 0.75])
        return float(low), float(high)

    def tokens_per_second(self, name: str) -> float:
        """Return median speed, in tokens (or examples)."""
        return self.tokens / self.median_s(name)

    def ratios(self, name: str) -> list[float]:
        """Return the variant's time over the first variant's, round by round."""
        first = self.seconds[self.first]
        return [seconds / reference for seconds, reference in zip(self.seconds[name], first, strict=True)]

    def ratio(self, name: str) -> float:
        """Return the median of :meth:`ratios`."""
        return statistics.median(self.ratios(name))

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the 95 % confidence interval of the median ratio; None for fewer than 6 rounds.

        It reaches from the k-th lowest ratio to the k-th highest, with k as large as the binomial distribution allows,
        and assumes nothing about the distribution of the times.
        """
        from scipy.stats import quantile_test

        low, high = quantile_test(self.ratios(name), p=0.5).confidence_interval(0.95)
        return None if math.isnan(low) or math.isnan(high) else (float(low), float(high))

    def verdict(self, name: str) -> str:
        """Return whether a variant is faster or slower than the first, or why this run does not show it."""
        interval = self.interval(name)
        if interval is None:
            return f"inconclusive after {count_noun(self.rounds, 'round')}; take 6 or more"
        low, high = interval
        if self.disturbance:
            verdict = "inconclusive on a busy machine"
        elif high < 1:
            verdict = "faster"
        elif low > 1:
            verdict = "slower"
        elif high - low > _TOO_WIDE:
            verdict = "inconclusive, because the times vary too much"
        else:
            verdict = "no significant difference"
        return f"{verdict}: {low:.2f} to {high:.2f} of {self.first}'s time"

    def to_dict(self) -> dict[str, Any]:
        """Return one entry a variant and what holds for all of them, in values of JSON."""
        variants = []
        for name in self.seconds:
            low, high = self.quartiles_s(name)
            ratio_low, ratio_high = self.interval(name) or (None, None)
            variants.append(
                {
                    "variant": name,
                    "seconds": self.median_s(name),
                    "lower_quartile_seconds": low,
                    "upper_quartile_seconds": high,
                    "tokens_per_second": self.tokens_per_second(name),
                    "ratio": self.ratio(name),
                    "ratio_low": ratio_low,
                    "ratio_high": ratio_high,
                    "verdict": None if name == self.first else self.verdict(name),
                }
            )
        return {
            "setting": self.setting,
            "tokens": self.tokens,
            "rounds": self.rounds,
            "variants": variants,
            "disturbance": self.disturbance or None,
        }

    def __str__(self) -> str:
        width = max(len(name) for name in self.seconds) + 2
        title = f"{self.setting}: ms a step, median [quartiles] of {count_noun(self.rounds, 'round')}"
        lines = [title, f"  {'':<{width}}{'ms':>11}{'':>24}{'tokens/s':>11}{'ratio':>8}"]
        for index, name in enumerate(self.seconds):
            low, high = self.quartiles_s(name)
            spread = f"[{low * 1e3:,.2f}-{high * 1e3:,.2f}]"
            numbers = f"{self.median_s(name) * 1e3:>11,.2f} {spread:<23}{self.tokens_per_second(name):>11,.0f}"
            verdict = f"  {self.verdict(name)}" if index else ""
            lines.append(f"  {name:<{width}}{numbers}{self.ratio(name):>8.3f}{verdict}")
        return "\n".join([*lines, f"  {self.disturbance}"] if self.disturbance else lines)


def step_time(
    model: Source | Mapping[str, Source],
    variants: Mapping[str, Method | Setup],
    batch_size: int | None = None,
    seq_len: int | None = None,
    *,
    batch: Batch | None = None,
    rounds: int = 9,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Times:
    """Measure how long a training step takes, for several variants in turn.

    Each variant has a model of its own and takes a step to warm up. Then every variant is timed once a round, and each
    round starts with another variant; quick steps are repeated until a timing lasts 50 ms. The model and the random
    generators stay as they are, bit for bit.

    Two things can matter more than the code: threads that spin while another process works (set
    OMP_WAIT_POLICY=passive before torch is imported), and two threads for small matrices
    (``torch.set_num_threads(1)``).

    Args:
        model: a freshly loaded model, whose weights all variants share unless they train them; or a function that
            builds one, which is called for each variant; or one of these for each variant, by its name, where the
            models differ.
        variants: name -> how it is trained. The others are compared with the first.
        batch_size, seq_len: the batch, of random tokens, for models that read token ids.
        batch: inputs and targets, for other models or real data.
        rounds: how often each is timed. With 9, one outlier on either side does not change a verdict.
        device: for a factory; default the best one.
        progress: show a bar; default only in a terminal or a notebook (and if LORA_LAB_PROGRESS is not 0).
        **options: as in :class:`lora_lab.costs.setup.Setup`, for all variants.

    Raises:
        ValueError: there is no variant, rounds is below 1, the batch is not described, or a model cannot be made
            ready.
    """
    if not variants:
        raise ValueError("variants is empty, so there is nothing to time; give at least one, as {'LoRA': LoRA(8)}.")
    rounds = check(rounds, Size, "rounds")
    models = model if isinstance(model, Mapping) else dict.fromkeys(variants, model)
    device = device_to_run(models[next(iter(variants))], device)
    with own_randomness(device, 0), BusyCores(thread_count(device)) as busy:
        runs = {name: _Run(models[name], as_setup(method, options), device) for name, method in variants.items()}
        twin = next(iter(runs.values())).step.model
        batch = batch_for(twin, batch_size, seq_len) if batch is None else batch
        batch = batch[0].to(device), batch[1].to(device)
        names, seconds = list(runs), {name: [] for name in runs}
        with progress_bar(len(names) * (rounds + 1), "timing", progress) as bar:
            for run in runs.values():
                run.warm_up(batch)
                bar.update()
            for first in range(rounds):
                for name in [*names[first % len(names) :], *names[: first % len(names)]]:
                    seconds[name].append(runs[name].seconds())
                    bar.update()
    setting = f"{type(twin).__name__}, batch {shape_of(batch)}, {device}"
    return Times(seconds, size_of(batch), setting, disturbance(busy))


def disturbance(busy: BusyCores) -> str:
    """Return a sentence about other processes that kept the cores busy, or an empty string."""
    if not busy.disturbs:
        return ""
    threads = count_noun(busy.threads, "thread")
    return (
        f"Other processes kept {busy.cores:.1f} cores busy meanwhile, so this one's {threads} had to wait; "
        "measure again when this machine is quiet."
    )


def thread_count(device: torch.device) -> int:
    """Return how many cores a step keeps busy: one, that of Python, while a GPU computes."""
    return torch.get_num_threads() if device.type == "cpu" else 1


class _Run:
    """A variant that is ready to train, and its batch."""

    def __init__(self, model: Source, setup: Setup, device: torch.device) -> None:
        self.device, self.setup = device, setup
        self.step = setup.step(build_model(model, device, setup.dtype))
        if isinstance(model, nn.Module):
            unshare_trainable(self.step.model, model)

    def warm_up(self, batch: Batch) -> None:
        """Take a first step, which allocates memory and loads code; time a quick step again to count repetitions."""
        self.parts, self.weights = self.setup.batches(batch)
        self.step.read_targets([targets for _, targets in self.parts])
        self.count = 1
        if self.seconds() < _TIMING_S:
            self.count = math.ceil(_TIMING_S / self.seconds())

    def seconds(self) -> float:
        """Return the mean over ``count`` steps."""
        return stopwatch(lambda: self.step(self.parts, self.weights), self.device).timeit(self.count) / self.count


def stopwatch(function: Callable[[], Any], device: torch.device) -> Timer:
    """Return a timer of calls, whose clock waits for a GPU to finish its work; Python's garbage waits meanwhile."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return Timer(function, timer=read)


def median_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return the median of five samples of a call; a quick call is repeated until a sample lasts a millisecond."""
    function()  # allocates memory and loads code
    timer = stopwatch(function, device)
    count = math.ceil(_SAMPLE_S / max(timer.timeit(1), 1e-6))
    return statistics.median(timer.repeat(5, count)) / count


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
    function: Any, args: tuple, kwargs: Mapping[str, Any], out: Any, flops: int = 0
) -> OperatorCall | None:
    """Return the call that has just run; None if it moved no bytes, as views and allocations."""
    name, schema = function._opname, function._schema
    read = list(nested_tensors((args, kwargs)))
    held = {storage_of(tensor) for tensor in read}
    made = [tensor for tensor in nested_tensors(out) if storage_of(tensor) not in held]
    made_bytes = sum(tensor.untyped_storage().nbytes() for tensor in made)
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
    moved_bytes = sum(map(_size_of, [*read, *nested_tensors(written)])) + made_bytes
    if name in _LOOKUPS:
        moved_bytes = 2 * made_bytes
    if "dot_product" in name:
        flops = _attention_flops(name, args)
    factors = tuple((tuple(each.shape), each.stride()) for each in read[-2:] if name.removesuffix("_") in _PRODUCTS)
    of_list = (schema.is_mutable or name.startswith("_foreach_")) and isinstance(args[0], list | tuple)
    return OperatorCall(name, moved_bytes, flops, read[0].dtype if read else torch.float32, factors, of_list)


def _size_of(tensor: Tensor) -> int:
    """Return bytes in memory: an expanded dimension counts once."""
    stored = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size]
    return math.prod(stored) * tensor.element_size()


def _attention_flops(name: str, args: tuple) -> int:
    """Return the FLOPs of fused attention, half of them if it is causal."""
    shapes = [tuple(tensor.shape) for tensor in nested_tensors(args)]
    backward = name.endswith("_backward")  # its first operand is a gradient
    count = sdpa_backward_flop_count(*shapes[:4]) if backward else sdpa_flop_count(*shapes[:3])
    return count // 2 if any(value is True for value in args) else count


class StepTrace(FlopCounter):
    """Counts the operations of a step by their causes."""

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and count its operations; those of an earlier step are dropped."""
        self.calls: defaultdict[str, Counter[OperatorCall]] = defaultdict(Counter)
        super().run(batches, weights)

    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Count the operation under its cause."""
        before = len(self.products)
        super().on_operation(function, args, kwargs, out)
        products = self.products[before:]
        flops = sum(count for _, _, count in products)
        if function.namespace == "aten":
            call = describe_call(function, args, kwargs, out, flops)
            if call is not None:
                self.calls[self._cause(call.name, products)][call] += 1

    def _cause(self, name: str, products: Sequence[tuple[str, str, int]]) -> str:
        if products:
            part, pass_, _ = products[0]
            return part if part in (ATTENTION, ADAPTERS) or (part == HEAD and pass_ != WEIGHT) else pass_
        if "attention" in name:
            return ATTENTION
        return MEMORY if self.phase in ("forward", "backward") else UPDATE


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
            f"{name} takes {ratio:.2f} of the time of {self.first}: {_in_ms(self.total_s(name))} a step, "
            f"not {_in_ms(self.total_s(self.first))}."
        ]
        for verb, sign in (("saves", -1), ("adds", 1)):
            seconds = {cause: sign * change for cause, change in changes.items() if sign * change > 0}
            largest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:4]
            reasons = ", ".join(f"{cause} {_in_ms(seconds[cause])}" for cause in largest)
            lines.append(f"It {verb} {_in_ms(sum(seconds.values()))}{f': {reasons}' if reasons else ''}.")
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
        import pandas

        table = 1e3 * pandas.DataFrame(self.seconds).reindex(CAUSES).dropna(how="all").fillna(0.0)
        table.loc["all"] = table.sum()
        table.loc["ratio"] = [self.ratio(name) for name in self.seconds]
        reasons = [self.why(name) for name in self.seconds if name != self.first]
        numbers = table.to_string(float_format="{:,.2f}".format)
        return "\n".join([f"{self.setting}: ms a step, predicted", numbers, *reasons, *self.doubts])


def _in_ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"


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
        works = {}
        tokens, setting = 0, ""
        for name, method in variants.items():
            setup = as_setup(method, options)
            with rehearse_step(model, setup, self.device, batch_size, seq_len, batch) as (step, fake_batch):
                works[name] = trace_work(setup, step, fake_batch)
                tokens = size_of(fake_batch)
                setting = f"{type(step.model).__name__}, batch {shape_of(fake_batch)}, {self.where}"
        with BusyCores(thread_count(self.device)) as busy:
            seconds = {name: work.seconds(self.seconds) for name, work in works.items()}
        prediction = Prediction(seconds, works, tokens, setting)
        return replace(prediction, doubts=self._doubts(prediction, disturbance(busy)))

    def _doubts(self, prediction: Prediction, disturbed: str) -> list[str]:
        """Return what may be wrong with a prediction, given what disturbed the timing of its products."""
        return [f"While costs were measured: {disturbed}"] if disturbed else []

    def __str__(self) -> str:
        return "\n".join([f"Costs on {self.where}", *(f"  {name:<44}{value}" for name, value in self.rates.items())])


def trace_work(setup: Setup, step: TrainingStep, batch: Batch) -> StepWork:
    """Return what the second step of a fake model does on a batch."""
    trace = StepTrace(step)
    trace.run_second(*setup.batches(batch))
    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    tensors = [*tensors_of(step.model), *trained]  # a gradient is as large as its parameter
    return StepWork(trace.calls, sum(tensor.nbytes for tensor in tensors) + state_bytes(step.optimizer))


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


def product_rates(device: torch.device) -> Callable[[OperatorCall], float]:
    """Return a function from an operation to the FLOPs a second of its matrix products on a device.

    Each shape is timed once. Large products count at the rate of a square one, and so do convolutions and attention.
    """
    side = _SIDE.get(device.type, 8192)
    square = ((side, side), (side, 1)), ((side, side), (side, 1))

    @cache
    def measure(dtype: torch.dtype, factors: tuple[Factor, ...]) -> float:
        left, right = (_ones(*factor, dtype, device) for factor in factors)
        with torch.no_grad():
            seconds = median_seconds(lambda: torch.matmul(left, right), device)
        return 2 * left.numel() * right.shape[-1] / seconds

    def rate(operation: OperatorCall) -> float:
        small = operation.factors and operation.flops <= 2 * side**3
        return measure(operation.dtype, operation.factors if small else square)

    return rate


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
    rates, bandwidth = product_rates(device), _measure_bandwidth(device)
    work = Roofline(rates, bandwidth, call_s=0.0, overlaps=device.type == "cuda")
    seconds = replace(work, call_s=_measure_call(work, device))
    shown = {
        "large matrix products, float32": f"{rates(OperatorCall('mm', 0)) / GIGA:,.0f} GFLOP/s",
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
    with rehearse_step(factory, setup, device, 1, 32, None) as (step, fake_batch):
        traced = trace_work(setup, step, fake_batch)
    with own_randomness(device, 0):
        model = build_model(factory, device)
        step, batch = setup.step(model), batch_for(model, 1, 32)
        taken = median_seconds(lambda: step([batch], [1.0]), device)
    working = 0.0 if work.overlaps else sum(traced.seconds(work).values())
    return max(0.0, taken - working) / traced.launches()
