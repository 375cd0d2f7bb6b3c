"""How long a training step will take, and why, before any training.

    cost_model().predict(model, {"full": FullFineTuning(), "LoRA": LoRA(8)}, 4, 128)

The operations of a step are rehearsed on fake tensors, and each kind of operation is timed on this machine.

LoRA saves the weight gradients, so it multiplies less than full fine-tuning: never under two thirds of it, unless
its adapters stand in the last blocks only. It adds small products and passes over results, which cost time that no
count of FLOPs shows. Which of the two weighs more depends on the machine and on how many tokens a step has.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.costs.fake import (
    Batch,
    Factory,
    batch_for,
    build_model,
    fake_copy,
    shape_of,
)
from lora_lab.costs.flops import (
    ADAPTERS,
    AGAIN,
    ATTENTION,
    FORWARD,
    GIGA,
    HEAD,
    INPUT,
    WEIGHT,
    FlopCounter,
    size_of,
)
from lora_lab.costs.microbench import DISTANCES, ROUNDS, VIEW, Operand, Operation, OperationTimer, ReuseDistances
from lora_lab.costs.setup import Setup, as_setup
from lora_lab.costs.timing import disturbance, synchronize, thread_count
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.models.digits import PIXELS, DigitsMLP
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.system.device import own_randomness, pick_device
from lora_lab.system.process import BusyCores
from lora_lab.system.progress import progress_bar
from lora_lab.train import TrainingStep

MEMORY, UPDATE, PYTHON = "passes over memory", "clipping and optimiser", "Python and autograd"
CAUSES = (FORWARD, INPUT, WEIGHT, AGAIN, HEAD, ATTENTION, ADAPTERS, MEMORY, UPDATE, PYTHON)
PHASES = ("forward", "backward", "clipping", "optimiser step")
_ALIKE = 0.03  # times that differ by less are called alike
_ATEN = torch.ops.aten


# The cost model


class StepTrace(FlopCounter):
    """Lists the operations of a step as :mod:`lora_lab.costs.microbench` times them, with the cause of each."""

    def __init__(self, step: TrainingStep) -> None:
        super().__init__(step)
        self._traffic = ReuseDistances()

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and list it, anew."""
        self._entries: list[tuple[str, int | None, Operation]] = []
        super().run(batches, weights)

    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Enter the operation."""
        before = len(self.products)
        super().on_operation(function, args, kwargs, out)
        if function.namespace == "aten":
            product = before if len(self.products) > before else None
            self._entries += [
                (self.phase, product, operation) for operation in self._traffic.operations(function, args, kwargs, out)
            ]

    def work(self) -> Work:
        """What the last step did."""
        operations: dict[tuple[str, str], Counter[Operation]] = {}
        for phase, product, operation in self._entries:
            cause = self._cause(phase, product, operation)
            operations.setdefault((phase, cause), Counter())[operation] += 1
        trained = sum(parameter.numel() for parameter in self.step.model.parameters() if parameter.requires_grad)
        return Work(operations, trained)

    def _cause(self, phase: str, product: int | None, operation: Operation) -> str:
        if product is not None:
            part, pass_, _ = self.products[product]
            if part in (ATTENTION, ADAPTERS) or (part == HEAD and pass_ != WEIGHT):
                return part
            return pass_
        if "attention" in operation.name:
            return ATTENTION
        if phase not in ("forward", "backward"):
            return UPDATE
        return PYTHON if operation is VIEW else MEMORY


@dataclass(frozen=True)
class Work:
    """What a step does: how often it does which operation, by phase and cause, and how many numbers it trains."""

    operations: Mapping[tuple[str, str], Mapping[Operation, int]]
    trained: int = 0

    def kinds(self) -> set[Operation]:
        """The different operations that there are."""
        return {operation for counted in self.operations.values() for operation in counted}

    def count(self, *, cause: str | None = None, phase: str | None = None) -> int:
        """How many operations it has, of a cause or in a phase."""
        return sum(
            sum(operations.values())
            for (in_phase, of_cause), operations in self.operations.items()
            if cause in (None, of_cause) and phase in (None, in_phase)
        )


@dataclass(frozen=True)
class Prediction:
    """How long a step will take, for several ways to train, and why.

    ``seconds`` has each variant's time by cause; ``works`` what it does. On a GPU Python runs ahead of the device, so
    that (``overlaps``) the longer of the two counts, and not their sum. ``doubts`` says what may be wrong with it.
    """

    seconds: Mapping[str, Mapping[str, float]]
    works: Mapping[str, Work]
    tokens: int
    setting: str = ""
    overlaps: bool = False
    doubts: Sequence[str] = ()

    def total_s(self, name: str) -> float:
        """Time of a step."""
        parts = self.seconds[name]
        python = parts.get(PYTHON, 0.0)
        computed = sum(parts.values()) - python
        return max(computed, python) if self.overlaps else computed + python

    def ratio(self, name: str) -> float:
        """The variant's time over the first variant's."""
        return self.total_s(name) / self.total_s(next(iter(self.seconds)))

    def tokens_per_second(self, name: str) -> float:
        """Speed, in tokens (or examples)."""
        return self.tokens / self.total_s(name)

    def changes(self, name: str) -> dict[str, float]:
        """Seconds by cause that a variant takes more than the first one; negative where it takes less."""
        own, first = self.seconds[name], self.seconds[next(iter(self.seconds))]
        return {cause: own.get(cause, 0.0) - first.get(cause, 0.0) for cause in CAUSES if cause in {*own, *first}}

    def why(self, name: str) -> str:
        """The reason in words: what the variant spares, what it adds, with its own counts, and which is more."""
        first, changes, ratio = next(iter(self.seconds)), self.changes(name), self.ratio(name)
        lines = [
            f"{name} takes {ratio:.2f} of the time of {first}: {_ms(self.total_s(name))} a step, "
            f"not {_ms(self.total_s(first))}."
        ]
        if self.overlaps:
            waits = {variant: self._waits_for(variant) for variant in (name, first)}
            lines.append(
                f"Python runs ahead of the device, so only the longer of the two counts: {name} waits for "
                f"{waits[name]}, {first} for {waits[first]}."
            )
            if waits[name] != waits[first]:
                return "\n".join(lines)
            changes = {cause: c for cause, c in changes.items() if (cause == PYTHON) == (waits[name] == "Python")}
        spared = {cause: -change for cause, change in changes.items() if change < 0}
        added = {cause: change for cause, change in changes.items() if change > 0}
        for verb, part, sign in (("spares", spared, -1), ("adds", added, 1)):
            largest = sorted(part, key=part.__getitem__, reverse=True)[:4]
            reasons = "; ".join(f"{self._words(cause, name, sign)}, {_ms(part[cause])}" for cause in largest)
            lines.append(f"It {verb} {_ms(sum(part.values()))}" + (f": {reasons}." if reasons else "."))
        more, less = self._main(added, name, 1), self._main(spared, name, -1)
        if abs(ratio - 1) < _ALIKE:
            balance = f": what {name} adds costs as much as what it spares" if more and less else ""
            lines.append(f"So the two take about as long{balance}.")
        elif ratio > 1:
            lines.append(
                f"So {name} is slower here: {more}"
                + (f" cost more than what they replace, {less}." if less else ", and nothing is spared.")
            )
        else:
            lines.append(
                f"So {name} is faster here: "
                + (
                    f"what it spares, {less}, costs more than {more}."
                    if more
                    else f"it spares {less}, and adds nothing."
                )
            )
        return "\n".join(lines)

    def _waits_for(self, name: str) -> str:
        """What a step takes as long as, where Python and the device work side by side."""
        python = self.seconds[name].get(PYTHON, 0.0)
        return "Python" if python > sum(self.seconds[name].values()) - python else "the device"

    def _main(self, part: Mapping[str, float], name: str, sign: int) -> str:
        """The causes that make up most of a sum, joined by "and"; what is only elsewhere in the caches is none."""
        told = {cause: seconds for cause, seconds in part.items() if sign * self._difference(cause, name) > 0} or part
        chosen, covered = [], 0.0
        for cause in sorted(told, key=told.__getitem__, reverse=True):
            if chosen and covered > 0.8 * sum(told.values()):
                break
            chosen.append(self._words(cause, name, sign))
            covered += told[cause]
        return " and ".join(chosen)

    def _difference(self, cause: str, name: str) -> int:
        """How many operations more than the first variant's; of all causes where each is called by Python.

        Of the optimiser it is the numbers that count.
        """
        own, first = self.works[name], self.works[next(iter(self.works))]
        if cause == UPDATE:
            return own.trained - first.trained
        if cause == PYTHON:
            return sum(own.count(phase=phase) - first.count(phase=phase) for phase in ("forward", "backward"))
        return own.count(cause=cause) - first.count(cause=cause)

    def _words(self, cause: str, name: str, sign: int) -> str:
        words = {
            ADAPTERS: "small products with the adapters",
            PYTHON: "operations to be called by Python and autograd",
            FORWARD: "products of the layers",
            INPUT: "gradients of the layers' inputs",
            HEAD: "products of the head",
            ATTENTION: "operations of attention",
        }.get(cause, cause)
        if (difference := sign * self._difference(cause, name)) <= 0:
            return f"the same {words}"
        if cause == UPDATE:
            own, first = self.works[name].trained, self.works[next(iter(self.works))].trained
            return f"clipping and updating {own:,} numbers and not {first:,}"
        return f"{difference:,} {words}"

    def frame(self):
        """A pandas DataFrame: seconds, one row a variant, one column a cause, then the whole step and the ratio."""
        import pandas

        rows = [
            {
                "variant": name,
                **{cause: parts.get(cause, 0.0) for cause in CAUSES},
                "all": self.total_s(name),
                "ratio": self.ratio(name),
            }
            for name, parts in self.seconds.items()
        ]
        return pandas.DataFrame(rows)

    def __str__(self) -> str:
        width = max(12, *(len(name) + 2 for name in self.seconds))
        lines = [
            f"{self.setting}: ms a step, predicted",
            f"  {'':<26}" + "".join(f"{n:>{width}}" for n in self.seconds),
        ]
        for cause in CAUSES:
            if any(parts.get(cause) for parts in self.seconds.values()):
                numbers = (f"{parts.get(cause, 0.0) * 1e3:>{width},.2f}" for parts in self.seconds.values())
                lines.append(f"  {cause:<26}" + "".join(numbers))
        lines.append(f"  {'all':<26}" + "".join(f"{self.total_s(name) * 1e3:>{width},.2f}" for name in self.seconds))
        lines.append(f"  {'ratio':<26}" + "".join(f"{self.ratio(name):>{width}.3f}" for name in self.seconds))
        return "\n".join([*lines, *(self.why(name) for name in list(self.seconds)[1:]), *self.doubts])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"


@dataclass
class CostModel:
    """What operations cost on one machine, and hence how long a step of any model will take.

        seconds(step) = sum over operations of seconds(operation) + for each phase (fixed + calls * each)

    The first sum is what is computed; the second is what Python, modules and autograd take to call it.

    Args:
        seconds: of an operation. A :class:`lora_lab.costs.microbench.OperationTimer` times what it has not met before.
        overhead: (fixed, each) in seconds for each phase.
        device: where steps are to run.
        overlaps: the device computes while Python goes on, as CUDA does, and the longer of the two sums counts.
        rates: what was measured, for a person to read.
        seconds_spent: how long calibration took; :meth:`predict` adds what it needs.
        disturbance: what others did meanwhile, if they disturbed.
    """

    seconds: Callable[[Operation], float]
    overhead: Mapping[str, tuple[float, float]]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    overlaps: bool = False
    rates: Mapping[str, str] = field(default_factory=dict)
    seconds_spent: float = 0.0
    disturbance: str = ""

    def predict(
        self,
        model: nn.Module | Factory,
        variants: Mapping[str, Method | Setup],
        batch_size: int | None = None,
        seq_len: int | None = None,
        *,
        batch: Batch | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> Prediction:
        """How long a step will take, before any is taken: it is rehearsed on fake tensors, and its operations priced.

        Kinds of operation that are new to the model are timed one by one, which takes some seconds.

        Args:
            variants: name -> how it is trained. The first is what the others are compared with.
            model, batch_size, seq_len, batch, **options: as for :func:`flops`.
            progress: show a bar; default only where a person is looking (and LORA_LAB_PROGRESS is not 0).

        Raises:
            ValueError: there is no variant, or as for :func:`flops`.
        """
        if not variants:
            raise ValueError("variants is empty, so there is nothing to predict; give one, as {'LoRA': LoRA(8)}.")
        started = time.perf_counter()
        works = {}
        for name, method in variants.items():
            setup = as_setup(method, options)
            setup.check_watchable()
            with fake_copy(model, self.device, setup.dtype) as twin, own_randomness(self.device, 0):
                given = batch_for(twin, batch_size, seq_len, batch)
                parts, weights = setup.batches(given)
                trace = StepTrace(setup.step(twin))
                trace.run(parts, weights)  # the first step lacks the optimiser's state
                trace.run(parts, weights)
                works[name] = trace.work()
                tokens, setting = size_of(given)[0], f"{type(twin).__name__}, batch {shape_of(given)}, {self.device}"
                del trace, parts, given
        kinds = {kind for work in works.values() for kind in work.kinds()}
        self._learn(kinds, progress)
        self.seconds_spent += time.perf_counter() - started
        return Prediction(self._priced(works), works, tokens, setting, self.overlaps, self._doubts(kinds))

    def _learn(self, kinds: set[Operation], progress: bool | None) -> None:
        """Time the kinds of operation that are not known yet, and note whether others disturbed."""
        if not isinstance(self.seconds, OperationTimer) or not (new := self.seconds.unmeasured(kinds)):
            return
        bar = progress_bar(ROUNDS * len(new), "timing operations", progress, "operation")
        with bar as shown, BusyCores(thread_count(self.device)) as crowd:
            self.seconds.measure(new, shown.update)
        self.disturbance = self.disturbance or disturbance(crowd)

    def _priced(self, works: Mapping[str, Work]) -> dict[str, dict[str, float]]:
        """Seconds by cause of each variant's work."""
        price = {kind: self.seconds(kind) for work in works.values() for kind in work.kinds()}
        found = {}
        for name, work in works.items():
            seconds: Counter[str] = Counter()
            for (_, cause), operations in work.operations.items():
                seconds[cause] += sum(count * price[operation] for operation, count in operations.items())
            for phase, (fixed, each) in self.overhead.items():
                beside = self.overlaps or phase in ("forward", "backward")
                seconds[PYTHON if beside else UPDATE] += fixed + each * work.count(phase=phase)
            found[name] = dict(seconds)
        return found

    def _doubts(self, kinds: set[Operation]) -> list[str]:
        doubts = [f"While costs were measured: {self.disturbance}"] if self.disturbance else []
        failed = sorted(getattr(self.seconds, "failed", set()) & {kind.name for kind in kinds})
        return doubts + [f"Taken for copies, because they cannot be done alone: {', '.join(failed)}."] * bool(failed)

    def break_even_tokens(
        self,
        model: nn.Module | Factory,
        first: Method | Setup,
        second: Method | Setup,
        *,
        batch_size: int | None = None,
        seq_len: int | None = None,
        between: tuple[int, int] = (32, 4096),
        **options: Any,
    ) -> int | None:
        """The tokens a step at which ``second`` stops being slower than ``first``, or starts to be.

        For models that read token ids, whose batches can grow by themselves.

        Args:
            batch_size, seq_len: one of them stays, and the other grows.
            between: tokens to look at, from the least to the most; only whole sizes between them are.
            model, first, second, **options: as for :meth:`predict`.

        Returns:
            The first such number of tokens, between sizes that were predicted in a line; None if there is none.

        Raises:
            ValueError: both sizes or neither are given, no step lies between, or as for :meth:`predict`.
        """
        if (batch_size is None) == (seq_len is None):
            raise ValueError(
                f"batch_size is {batch_size} and seq_len {seq_len}; give one of them, and the other grows."
            )
        fixed = batch_size if seq_len is None else seq_len
        if fixed < 1 or not 1 <= between[0] <= between[1] or between[1] < fixed:
            raise ValueError(
                f"between is {between}, but it must be two rising numbers of tokens, the second at least the "
                f"{fixed} of one step, which must be 1 or more."
            )

        def look(count: int) -> tuple[int, float]:
            """The tokens of so many sequences (or so long ones), and the logarithm of the ratio there."""
            sizes = (count, seq_len) if batch_size is None else (batch_size, count)
            ratio = self.predict(model, {"first": first, "second": second}, *sizes, **options).ratio("second")
            return count * fixed, math.log(ratio)

        count, most = max(1, math.ceil(between[0] / fixed)), between[1] // fixed
        low = look(count)
        while count < most:
            further = min(4 * count, most)
            high = look(further)
            if low[1] * high[1] < 0:
                middle = look(round(math.sqrt(count * further)))
                low, high = (middle, high) if low[1] * middle[1] > 0 else (low, middle)
                return round(low[0] * (high[0] / low[0]) ** (low[1] / (low[1] - high[1])))
            low, count = high, further
        return None

    def __str__(self) -> str:
        lines = [f"Costs on {self.device}, measured in {self.seconds_spent:.1f} s"]
        lines += [f"  {name:<44}{value}" for name, value in self.rates.items()]
        for phase, (fixed, each) in self.overhead.items():
            lines.append(f"  {f'Python, {phase}':<44}{fixed * 1e6:,.0f} us, and {each * 1e6:,.2f} us an operation")
        return "\n".join(lines)


def cost_model(device: torch.device | str | None = None) -> CostModel:
    """Measure what this machine needs for the parts that steps are made of; takes some seconds.

    It measures the rate of matrix products by dtype, memory's bandwidth, the cost of a small operation, and, from
    tiny steps whose phases are timed, what Python and autograd take for each operation. What a model needs beyond
    that, such as products of its shapes, is measured when it is asked about.

    On CUDA the same is done with a clock that waits for the device; this path has never been run.

    Args:
        device: where steps are to run; default the best there is.
    """
    started = time.perf_counter()
    place = pick_device(device)[0]
    watch = OperationTimer(place)
    overlaps = place.type == "cuda"
    with BusyCores(thread_count(place)) as crowd:
        rates, overhead = _rates(watch), _overhead(watch, overlaps)
    return CostModel(watch, overhead, place, overlaps, rates, time.perf_counter() - started, disturbance(crowd))


def _rates(watch: OperationTimer) -> dict[str, str]:
    """Some costs that a reader may know from elsewhere."""
    operations = {}
    for rows, dtype in ((512, torch.float32), (512, torch.bfloat16), (32, torch.float32)):
        left = Operand((rows, 576), (576, 1), dtype)
        right = Operand((576, 1536), (1, 576), dtype, DISTANCES[-1])
        label = f"{rows} x 576 times 576 x 1536, {str(dtype).removeprefix('torch.')}"
        made_bytes = rows * 1536 * dtype.itemsize
        operations[label] = Operation(_ATEN.mm.default, (left, right), (), made_bytes, DISTANCES[1])
    for place, distance in (("a cache", 0), ("memory", DISTANCES[-1])):
        whole = Operand((2**18,), (1,), torch.float32, distance)
        operations[f"copy of 1 MiB in {place}"] = Operation(_ATEN.clone.default, (whole,), (), 2**20, distance)
    small = Operand((64,), (1,), torch.float32)
    operations["operation on 64 numbers"] = Operation(_ATEN.mul.Tensor, (small, small), (), 256)
    watch.measure(operations.values())
    return {label: _rate(operation, watch(operation)) for label, operation in operations.items()}


def _rate(operation: Operation, seconds: float) -> str:
    if operation.flops:
        return f"{operation.flops / seconds / GIGA:,.0f} GFLOP/s"
    if operation.moved_bytes > 2**20:
        return f"{operation.moved_bytes / seconds / GIGA:,.1f} GB/s"
    return f"{seconds * 1e6:,.1f} us"


def _overhead(watch: OperationTimer, overlaps: bool) -> dict[str, tuple[float, float]]:
    """For each phase seconds once and for each operation, by least squares over tiny steps.

    What the operations themselves take is subtracted, but for a device that computes while Python goes on.
    """
    shape = LlamaConfig(64, 16, 32, 2, 2, 1, 8)
    digits = (torch.zeros(4, PIXELS), torch.zeros(4, dtype=torch.long))
    runs = []
    for factory, given in ((partial(DigitsMLP, 16), digits), (partial(Llama, shape), None)):
        for method in (FullFineTuning(), LoRA(rank=2)):
            with fake_copy(factory, watch.device) as twin:
                trace = StepTrace(Setup(method).step(twin))
                for _ in range(2):
                    trace.run([batch_for(twin, 1, 4, given)], [1.0])
                work = trace.work()
            with own_randomness(watch.device, 0):
                model = build_model(factory, watch.device)
                runs.append((work, _phase_seconds(Setup(method).step(model), batch_for(model, 1, 4, given))))
    if not overlaps:
        watch.measure({kind for work, _ in runs for kind in work.kinds()})
    found = {}
    for phase in PHASES:
        points = []
        for work, seconds in runs:
            counted = [counts for (of_phase, _), counts in work.operations.items() if of_phase == phase]
            alone = 0.0 if overlaps else sum(n * watch(kind) for counts in counted for kind, n in counts.items())
            points.append((work.count(phase=phase), seconds[phase] - alone))
        found[phase] = _line(points)
    return found


def _phase_seconds(step: TrainingStep, batch: Batch, steps: int = 60) -> dict[str, float]:
    """How long each phase of a step takes: the median of many steps, on CUDA of Python's time alone."""
    marks: list[float] = []
    timed = copy.copy(step)
    plain_loss, plain_backward = timed.batch_loss, timed.backward

    def batch_loss(*args: Any) -> Tensor:
        result = plain_loss(*args)
        marks.append(time.perf_counter())
        return result

    def backward(*args: Any) -> list[Tensor]:
        result = plain_backward(*args)
        marks.append(time.perf_counter())
        return result

    hook = step.optimizer.register_step_pre_hook(lambda *_: marks.append(time.perf_counter()))
    timed.batch_loss, timed.backward = batch_loss, backward
    rows = []
    for _ in range(steps):
        marks[:] = [time.perf_counter()]
        timed([batch], [1.0])
        marks.append(time.perf_counter())
        rows.append([stop - start for start, stop in itertools.pairwise(marks)])
        synchronize(batch[0].device)
    hook.remove()
    return {phase: statistics.median(column) for phase, column in zip(PHASES, zip(*rows, strict=True), strict=True)}


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Intercept and slope of the line through (count, seconds) by least squares."""
    counts, seconds = zip(*points, strict=True)
    mean, centre = statistics.fmean(seconds), statistics.fmean(counts)
    spread = sum((count - centre) ** 2 for count in counts)
    slope = sum((count - centre) * (second - mean) for count, second in points) / spread if spread else 0.0
    slope = max(0.0, slope)  # noise may tilt the line, but nothing takes less than no time
    return max(0.0, mean - slope * centre), slope
