"""How long a training step will take, and why, before any training.

    cost_model().predict(model, {"full": FullFineTuning(), "LoRA": LoRA(8)}, 4, 128)

The operations of a step are rehearsed on fake tensors, and each kind of operation is timed on this machine.

LoRA skips the weight gradients of the frozen layers, so that it needs fewer FLOPs than full fine-tuning: with adapters
in all blocks of a deep model, at least about two thirds of them. It adds small matrix multiplications and passes over
memory, whose time does not show in FLOPs. Which of the two weighs more depends on the machine and on the tokens in a
step.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from lora_lab.costs.fake import Source, batch_for, build_model, fake_copy, shape_of
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
from lora_lab.costs.memory import MIB, update_once
from lora_lab.costs.microbench import DISTANCES, ROUNDS, VIEW, Operand, OperationTimer, OperatorCall, ReuseDistances
from lora_lab.costs.setup import Setup, as_setup
from lora_lab.costs.timing import disturbance, synchronize, thread_count
from lora_lab.costs.trace import PHASES, phases
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.models.digits import PIXELS, DigitsMLP
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.system.device import own_randomness, pick_device
from lora_lab.system.process import BusyCores
from lora_lab.system.wording import progress_bar
from lora_lab.train import Batch, TrainingStep, state_bytes

MEMORY, UPDATE, PYTHON = "passes over memory", "clipping and optimiser", "Python and autograd"
CAUSES = (FORWARD, INPUT, WEIGHT, AGAIN, HEAD, ATTENTION, ADAPTERS, MEMORY, UPDATE, PYTHON)
_ALIKE = 0.03  # times that differ by less count as equal
_LONG_S = 10.0  # from here on times are shown in seconds, and not in milliseconds
# What the operations of a cause are, in sentences; other causes are named as they are.
_OPERATIONS = {
    ADAPTERS: "small matrix multiplication(s) of the adapters",
    PYTHON: "operation(s) called by Python and autograd",
    FORWARD: "matrix multiplication(s) of the layers",
    INPUT: "gradient(s) of the layers' inputs",
    WEIGHT: "weight gradient(s)",
    AGAIN: "recomputed matrix multiplication(s)",
    HEAD: "matrix multiplication(s) of the head",
    ATTENTION: "operation(s) of attention",
    MEMORY: "pass(es) over memory",
}
# By the outcome, and whether the variant both saves and adds.
_CONCLUSIONS = {
    ("alike", True): "So the two take about as long: what {name} adds costs as much as what it saves.",
    ("alike", False): "So the two take about as long.",
    ("slower", True): "So {name} is slower {place}: {added} cost more than what they replace, {saved}.",
    ("slower", False): "So {name} is slower {place}: it adds {added}, and saves nothing.",
    ("faster", True): "So {name} is faster {place}: what it saves, {saved}, costs more than {added}.",
    ("faster", False): "So {name} is faster {place}: it saves {saved}, and adds nothing.",
}
_ATEN = torch.ops.aten


# The cost model


class StepTrace(FlopCounter):
    """Lists the operations of a step, in the form that :mod:`lora_lab.costs.microbench` times, and their causes."""

    def __init__(self, step: TrainingStep) -> None:
        super().__init__(step)
        self._traffic = ReuseDistances()

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and list it; the list of an earlier step is dropped."""
        self._entries: list[tuple[str, int | None, OperatorCall]] = []
        super().run(batches, weights)

    def run_second(self, batches: Sequence[Batch], weights: Sequence[float], distances: bool = True) -> None:
        """List the second step of two: the first lacks the optimiser's state, and finds no memory that was touched.

        Without ``distances`` a plain step is taken once: all but the distances of its operands is then the same.
        """
        plain = type(self.step) is TrainingStep  # a lean step keeps more than its optimiser does
        if plain:
            update_once(self.step)
        if distances or not plain:
            self.run(batches, weights)
        self.run(batches, weights)

    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Add the operation to the list."""
        before = len(self.products)
        super().on_operation(function, args, kwargs, out)
        if function.namespace == "aten":
            product = before if len(self.products) > before else None
            self._entries += [
                (self.phase, product, operation) for operation in self._traffic.operations(function, args, kwargs, out)
            ]

    def work(self) -> StepWork:
        """Return the operations of the last step."""
        operations: dict[tuple[str, str], Counter[OperatorCall]] = {}
        for phase, product, operation in self._entries:
            cause = self._cause(phase, product, operation)
            operations.setdefault((phase, cause), Counter())[operation] += 1
        model = self.step.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        tensors = [*model.parameters(), *model.buffers(), *trained]  # a gradient is as large as its parameter
        static_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        static_bytes += state_bytes(self.step.optimizer)
        return StepWork(operations, sum(parameter.numel() for parameter in trained), static_bytes)

    def _cause(self, phase: str, product: int | None, operation: OperatorCall) -> str:
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
class StepWork:
    """What a step does: the count of each operation, by phase and cause.

    Args:
        operations: (phase, cause) -> operation -> count.
        trained: the number of trained parameters.
        static_bytes: the size of weights, gradients and optimiser state.
    """

    operations: Mapping[tuple[str, str], Mapping[OperatorCall, int]]
    trained: int = 0
    static_bytes: int = 0

    def kinds(self) -> set[OperatorCall]:
        """Return the distinct operations."""
        return {operation for counted in self.operations.values() for operation in counted}

    def launches(self) -> int:
        """Return the number of operations that a GPU starts one by one: all but views, and lists of tensors."""
        return sum(
            count
            for operations in self.operations.values()
            for operation, count in operations.items()
            if operation is not VIEW and not operation.of_list
        )

    def count(self, *, cause: str | None = None, phase: str | None = None) -> int:
        """Return the number of operations, of a cause or in a phase."""
        return sum(
            sum(operations.values())
            for (in_phase, of_cause), operations in self.operations.items()
            if cause in (None, of_cause) and phase in (None, in_phase)
        )


@dataclass(frozen=True)
class Prediction:
    """How long a step of each of several variants will take, and why.

    Args:
        seconds: each variant's time by cause.
        works: each variant's operations.
        tokens: the batch's size, in tokens or examples.
        setting: the model, the batch and the device.
        overlaps: whether Python runs ahead of the device, as on a GPU, so that the longer of the two counts and not
            their sum.
        doubts: sentences about what may be wrong with the prediction.
        place: where the steps run, as a sentence ends: "here", "on the NVIDIA L40S".
    """

    seconds: Mapping[str, Mapping[str, float]]
    works: Mapping[str, StepWork]
    tokens: int
    setting: str = ""
    overlaps: bool = False
    doubts: Sequence[str] = ()
    place: str = "here"

    @property
    def first(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.seconds))

    def total_s(self, name: str) -> float:
        """Return the time of a step."""
        python = self.seconds[name].get(PYTHON, 0.0)
        computed = sum(self.seconds[name].values()) - python
        return max(computed, python) if self.overlaps else computed + python

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
        if self.overlaps:
            longer, longer_of_first = self._longer_side(name), self._longer_side(self.first)
            lines.append(
                f"Python runs ahead of the device, so only the longer of the two counts: {name} waits for {longer}, "
                f"{self.first} for {longer_of_first}."
            )
            if longer != longer_of_first:
                return "\n".join(lines)
            changes = {cause: change for cause, change in changes.items() if (cause == PYTHON) == (longer == "Python")}
        main = {}
        for verb, sign in (("saves", -1), ("adds", 1)):
            seconds = {cause: sign * change for cause, change in changes.items() if sign * change > 0}
            reasons = {cause: self._count_operations(cause, name, sign) for cause in seconds}
            largest = sorted(seconds, key=seconds.__getitem__, reverse=True)
            listed = "; ".join(f"{reasons[cause]}, {_time(seconds[cause])}" for cause in largest[:4])
            lines.append(f"It {verb} {_time(sum(seconds.values()))}" + (f": {listed}." if listed else "."))
            # Causes with no more operations are the main ones only if there are no others.
            changed = [cause for cause in largest if sign * self._difference(cause, name) > 0] or largest
            enough = 0.8 * sum(seconds[cause] for cause in changed)
            before = itertools.accumulate((seconds[cause] for cause in changed), initial=0.0)
            main[verb] = " and ".join(
                reasons[cause]
                for cause, covered in zip(changed, before, strict=False)
                if covered <= enough or cause == changed[0]
            )
        outcome = "alike" if abs(ratio - 1) < _ALIKE else "slower" if ratio > 1 else "faster"
        conclusion = _CONCLUSIONS[outcome, all(main.values())]
        lines.append(conclusion.format(name=name, place=self.place, saved=main["saves"], added=main["adds"]))
        return "\n".join(lines)

    def _longer_side(self, name: str) -> str:
        """Return which of the two takes longer, where Python and the device work at the same time."""
        python = self.seconds[name].get(PYTHON, 0.0)
        return "Python" if python > sum(self.seconds[name].values()) - python else "the device"

    def _difference(self, cause: str, name: str) -> int:
        """Return how many more operations of a cause than the first variant has; for the optimiser, trained parameters.

        Python's are the operations of all causes in the forward and backward pass.
        """
        work, reference = self.works[name], self.works[self.first]
        if cause == UPDATE:
            return work.trained - reference.trained
        if cause == PYTHON:
            return sum(work.count(phase=phase) - reference.count(phase=phase) for phase in ("forward", "backward"))
        return work.count(cause=cause) - reference.count(cause=cause)

    def _count_operations(self, cause: str, name: str, sign: int) -> str:
        """Return how many operations of a cause are added (``sign`` 1) or saved (-1), in words."""
        difference = sign * self._difference(cause, name)
        words = re.sub(r"\((\w+)\)", "" if difference == 1 else r"\1", _OPERATIONS.get(cause, cause))
        if difference <= 0:
            return f"the same {words}"
        if cause == UPDATE:
            trained, reference = self.works[name].trained, self.works[self.first].trained
            return f"clipping and updating {trained:,} parameters instead of {reference:,}"
        return f"{difference:,} {words}"

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


@dataclass
class CostModel:
    """What operations cost on one machine, and so how long a step of any model will take.

        seconds(step) = sum over operations of seconds(operation) + sum over phases of (fixed + calls * each)

    The first sum is the computation itself; the second is what Python, modules and autograd take to call it.

    Args:
        seconds: operation -> seconds. A :class:`lora_lab.costs.microbench.OperationTimer` also times new operations.
        overhead: (fixed, each) in seconds for each phase.
        device: where steps are to run.
        overlaps: whether the device computes while Python goes on, as on CUDA, so that the longer of the two sums
            counts.
        rates: some measured rates, as text.
        seconds_spent: how long calibration and all predictions have taken.
        disturbance: a sentence about other processes that kept the machine busy meanwhile, or an empty string.
        where: what the costs are those of, if nothing was measured on ``device``.
        place: as for :class:`Prediction`.
    """

    seconds: Callable[[OperatorCall], float]
    overhead: Mapping[str, tuple[float, float]]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    overlaps: bool = False
    rates: Mapping[str, str] = field(default_factory=dict)
    seconds_spent: float = 0.0
    disturbance: str = ""
    where: str = ""
    place: str = "here"

    def predict(
        self,
        model: Source,
        variants: Mapping[str, Method | Setup],
        batch_size: int | None = None,
        seq_len: int | None = None,
        *,
        batch: Batch | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> Prediction:
        """Predict how long a step will take, from its rehearsal on fake tensors and the costs of its operations.

        Operations that this cost model has not met before are timed first, which takes some seconds.

        Args:
            variants: name -> how it is trained. The others are compared with the first.
            model, batch_size, seq_len, batch, **options: as for :func:`flops`.
            progress: show a bar; default only in a terminal or a notebook (and if LORA_LAB_PROGRESS is not 0).

        Raises:
            ValueError: there is no variant, or as for :func:`flops`.
        """
        if not variants:
            raise ValueError("variants is empty, so there is nothing to predict; give one, as {'LoRA': LoRA(8)}.")
        started = time.perf_counter()
        works: dict[str, StepWork] = {}
        tokens, setting = 0, ""
        for name, method in variants.items():
            setup = as_setup(method, options)
            setup.check_watchable()
            with fake_copy(model, self.device, setup.dtype) as twin, own_randomness(self.device, 0):
                fake_batch = batch_for(twin, batch_size, seq_len, batch)
                parts, weights = setup.batches(fake_batch)
                trace = StepTrace(setup.step(twin))
                trace.run_second(parts, weights, distances=isinstance(self.seconds, OperationTimer))
                works[name] = trace.work()
                tokens = size_of(fake_batch)[0]
                setting = f"{type(twin).__name__}, batch {shape_of(fake_batch)}, {self.where or self.device}"
                del trace, parts, fake_batch
        kinds = {kind for work in works.values() for kind in work.kinds()}
        self._measure(kinds, progress)
        self.seconds_spent += time.perf_counter() - started
        prediction = Prediction(self._costs(works), works, tokens, setting, self.overlaps, place=self.place)
        return replace(prediction, doubts=self._doubts(prediction))

    def _measure(self, kinds: set[OperatorCall], progress: bool | None) -> None:
        """Time new kinds of operation, and note whether other processes kept the machine busy."""
        if not isinstance(self.seconds, OperationTimer) or not (new := self.seconds.unmeasured(kinds)):
            return
        bar = progress_bar(ROUNDS * len(new), "timing operations", progress, "operation")
        with bar as shown, BusyCores(thread_count(self.device)) as busy:
            self.seconds.measure(new, shown.update)
        self.disturbance = self.disturbance or disturbance(busy)

    def _costs(self, works: Mapping[str, StepWork]) -> dict[str, dict[str, float]]:
        """Return seconds by cause of each variant's work."""
        cost = {kind: self.seconds(kind) for work in works.values() for kind in work.kinds()}
        costs = {}
        for name, work in works.items():
            seconds: defaultdict[str, float] = defaultdict(float)
            for (_, cause), operations in work.operations.items():
                seconds[cause] += sum(count * cost[operation] for operation, count in operations.items())
            for phase, (fixed, each) in self.overhead.items():
                separate = self.overlaps or phase in ("forward", "backward")
                seconds[PYTHON if separate else UPDATE] += fixed + each * work.count(phase=phase)
            costs[name] = dict(seconds)
        return costs

    def _doubts(self, prediction: Prediction) -> list[str]:
        doubts = [f"While costs were measured: {self.disturbance}"] if self.disturbance else []
        if isinstance(self.seconds, OperationTimer):
            names = {kind.name for work in prediction.works.values() for kind in work.kinds()}
            failed = sorted(self.seconds.failed & names)
            if failed:
                doubts.append(f"Counted as copies, because they cannot run by themselves: {', '.join(failed)}.")
        return doubts

    def break_even_tokens(
        self,
        model: Source,
        first: Method | Setup,
        second: Method | Setup,
        *,
        batch_size: int | None = None,
        seq_len: int | None = None,
        between: tuple[int, int] = (32, 4096),
        **options: Any,
    ) -> int | None:
        """Return the number of tokens a step at which ``second`` stops or starts being slower than ``first``.

        It is for models that read token ids.

        Args:
            batch_size, seq_len: pass one of them, which stays; the other grows.
            between: the smallest and the largest number of tokens to consider; only whole sizes between them are.
            model, first, second, **options: as for :meth:`predict`.

        Returns:
            The first such number of tokens, interpolated between predicted sizes; None if there is none.

        Raises:
            ValueError: both sizes or neither are passed, no step lies between, or as for :meth:`predict`.
        """
        if (batch_size is None) == (seq_len is None):
            raise ValueError(
                f"batch_size is {batch_size} and seq_len {seq_len}; give one of them, and the other grows."
            )
        fixed = (batch_size if seq_len is None else seq_len) or 0
        if fixed < 1 or not 1 <= between[0] <= between[1] or between[1] < fixed:
            raise ValueError(
                f"between is {between}, but it must be two ascending numbers of tokens; the second must be at least "
                f"{fixed}, the tokens of the smallest step, which must have 1 or more."
            )

        def point(count: int) -> tuple[int, float]:
            """Return the tokens of ``count`` sequences, or of that length, and the ratio's logarithm."""
            sizes = (count, seq_len) if batch_size is None else (batch_size, count)
            ratio = self.predict(model, {"first": first, "second": second}, *sizes, **options).ratio("second")
            return count * fixed, math.log(ratio)

        count, most = max(1, math.ceil(between[0] / fixed)), between[1] // fixed
        low = point(count)
        while count < most:
            further = min(4 * count, most)
            high = point(further)
            if low[1] * high[1] < 0:
                middle = point(round(math.sqrt(count * further)))
                low, high = (middle, high) if low[1] * middle[1] > 0 else (low, middle)
                return round(low[0] * (high[0] / low[0]) ** (low[1] / (low[1] - high[1])))
            low, count = high, further
        return None

    def __str__(self) -> str:
        lines = [f"Costs on {self.where or f'{self.device}, measured in {self.seconds_spent:.1f} s'}"]
        lines += [f"  {name:<44}{value}" for name, value in self.rates.items()]
        for phase, (fixed, each) in self.overhead.items():
            lines.append(f"  {f'Python, {phase}':<44}{fixed * 1e6:,.0f} us, and {each * 1e6:,.2f} us an operation")
        return "\n".join(lines)


def cost_model(device: torch.device | str | None = None) -> CostModel:
    """Measure what the components of training steps cost on this machine, in some seconds.

    It measures the rate of matrix multiplications by dtype, the memory's bandwidth, the cost of a small operation, and,
    from tiny steps whose phases are timed, what Python and autograd take for each operation. Whatever else a model
    needs, such as matrix multiplications of its shapes, is measured when a prediction needs it.

    On CUDA the clock waits for the device; this path has never been run.

    Args:
        device: where steps are to run; default the best one.
    """
    started = time.perf_counter()
    device = pick_device(device)[0]
    timer, overlaps = OperationTimer(device), device.type == "cuda"
    with BusyCores(thread_count(device)) as busy:
        rates, overhead = _rates(timer), _overhead(timer, overlaps)
    return CostModel(timer, overhead, device, overlaps, rates, time.perf_counter() - started, disturbance(busy))


def _rates(timer: OperationTimer) -> dict[str, str]:
    """Return some rates that a reader may know from elsewhere."""
    operations = {}
    for rows, dtype in ((512, torch.float32), (512, torch.bfloat16), (32, torch.float32)):
        left = Operand((rows, 576), (576, 1), dtype)
        right = Operand((576, 1536), (1, 576), dtype, DISTANCES[-1])
        label = f"{rows} x 576 times 576 x 1536, {str(dtype).removeprefix('torch.')}"
        made_bytes = rows * 1536 * dtype.itemsize
        operations[label] = OperatorCall(_ATEN.mm.default, (left, right), (), made_bytes, DISTANCES[1])
    for where, distance in (("a cache", 0), ("memory", DISTANCES[-1])):
        whole = Operand((MIB // 4,), (1,), torch.float32, distance)
        operations[f"copy of 1 MiB in {where}"] = OperatorCall(_ATEN.clone.default, (whole,), (), MIB, distance)
    small = Operand((64,), (1,), torch.float32)
    operations["operation on 64 numbers"] = OperatorCall(_ATEN.mul.Tensor, (small, small), (), 256)
    timer.measure(operations.values())
    return {label: _rate(operation, timer(operation)) for label, operation in operations.items()}


def _rate(operation: OperatorCall, seconds: float) -> str:
    if operation.flops:
        return f"{operation.flops / seconds / GIGA:,.0f} GFLOP/s"
    if operation.moved_bytes > MIB:
        return f"{operation.moved_bytes / seconds / GIGA:,.1f} GB/s"
    return f"{seconds * 1e6:,.1f} us"


def _overhead(timer: OperationTimer, overlaps: bool) -> dict[str, tuple[float, float]]:
    """Return for each phase the fixed seconds and the seconds for each operation, by least squares over tiny steps.

    The time of the operations themselves is subtracted, except on a device that computes while Python goes on.
    """
    shape = LlamaConfig(64, 16, 32, 2, 2, 1, 8)
    digits = (torch.zeros(4, PIXELS), torch.zeros(4, dtype=torch.long))
    runs = []
    for factory, batch in ((partial(DigitsMLP, 16), digits), (partial(Llama, shape), None)):
        for method in (FullFineTuning(), LoRA(rank=2)):
            with fake_copy(factory, timer.device) as twin:
                trace = StepTrace(Setup(method).step(twin))
                trace.run_second([batch_for(twin, 1, 4, batch)], [1.0])
                work = trace.work()
            with own_randomness(timer.device, 0):
                model = build_model(factory, timer.device)
                runs.append((work, _phase_seconds(Setup(method).step(model), batch_for(model, 1, 4, batch))))
    if not overlaps:
        timer.measure({kind for work, _ in runs for kind in work.kinds()})
    overhead = {}
    for phase in PHASES:
        points = []
        for work, seconds in runs:
            counted = [counts for (of_phase, _), counts in work.operations.items() if of_phase == phase]
            computing = 0.0 if overlaps else sum(n * timer(kind) for counts in counted for kind, n in counts.items())
            points.append((work.count(phase=phase), seconds[phase] - computing))
        overhead[phase] = _line(points)
    return overhead


def _phase_seconds(step: TrainingStep, batch: Batch, steps: int = 60) -> dict[str, float]:
    """Return how long each phase of a step takes: the median of many steps, on CUDA of Python's time only."""
    marks: list[float] = []

    def mark(phase: str) -> None:
        if phase != "forward":  # which includes what comes before it
            marks.append(time.perf_counter())

    rows = []
    with phases(step, mark) as marked_step:
        for _ in range(steps):
            marks[:] = [time.perf_counter()]
            marked_step([batch], [1.0])
            marks.append(time.perf_counter())
            rows.append([stop - start for start, stop in itertools.pairwise(marks)])
            synchronize(batch[0].device)
    return {phase: statistics.median(column) for phase, column in zip(PHASES, zip(*rows, strict=True), strict=True)}


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return intercept and slope of the line through (count, seconds) by least squares; neither is negative."""
    counts, seconds = zip(*points, strict=True)
    slope = max(0.0, statistics.linear_regression(counts, seconds).slope) if len(set(counts)) > 1 else 0.0
    return max(0.0, statistics.fmean(seconds) - slope * statistics.fmean(counts)), slope
