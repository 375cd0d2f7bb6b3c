"""How much a training step computes, how long it takes, and why, before and after it is done.

    flops(model, LoRA(rank=8), 4, 128)                                     # counted, by layer and pass
    step_time(model, {"full": FullFineTuning(), "LoRA": LoRA(8)}, 4, 128)  # measured, in turn
    cost_model().predict(model, {...}, 4, 128)                             # predicted, with reasons

LoRA spares the weight gradients, so it multiplies less than full fine-tuning: never under two thirds of it, unless
its adapters stand in the last blocks only. It adds small products and passes over results, which cost time that no
count of FLOPs shows. Which of the two weighs more depends on the machine and on how many tokens a step has.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.device import pick_device
from lora_lab.flops import (  # noqa: F401 - what is counted is found here too, beside what is timed
    ADAPTERS,
    AGAIN,
    ATTENTION,
    FORWARD,
    GIGA,
    HEAD,
    INPUT,
    LAYERS,
    PARTS,
    PASSES,
    WEIGHT,
    FlopCounter,
    Flops,
    break_even_rank,
    closed_form,
    flops,
    size_of,
)
from lora_lab.lean import with_every_target
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.models.digits import PIXELS, DigitsMLP
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.rehearse import (
    Batch,
    Factory,
    Setup,
    as_setup,
    batch_for,
    device_of,
    keep_originals,
    made,
    output_width,
    pretend,
    shape_of,
    storage_of,
    token_batch,
)
from lora_lab.replay import DISTANCES, ROUNDS, VIEW, Crowd, Operand, Operation, Stopwatch, Traffic
from lora_lab.train import Step, own_randomness, progress_bar

MEMORY, UPDATE, PYTHON = "passes over memory", "clipping and optimiser", "Python and autograd"
CAUSES = (FORWARD, INPUT, WEIGHT, AGAIN, HEAD, ATTENTION, ADAPTERS, MEMORY, UPDATE, PYTHON)
PHASES = ("forward", "backward", "clipping", "optimiser step")
_TIMING_S = 0.05  # a timing lasts no less
_TOO_WIDE = 0.2  # an interval of ratios that says nothing
_ALIKE = 0.03  # times that differ by less are called alike
_ATEN = torch.ops.aten


# Step time


@dataclass(frozen=True)
class Times:
    """How long the steps of several variants took, in seconds, measured in turn; variants are compared in pairs.

    ``seconds`` has for each variant one value a round: the mean of the round's steps. ``tokens`` is the batch's size,
    in tokens or examples. Each variant's ratio to the first is taken round by round, so that a slow moment of the
    machine meets both. ``disturbance`` says, if others used this machine meanwhile, how much.
    """

    seconds: Mapping[str, Sequence[float]]
    tokens: int
    setting: str = ""
    disturbance: str = ""

    def median_s(self, name: str) -> float:
        """Median time of a step."""
        return statistics.median(self.seconds[name])

    def quartiles_s(self, name: str) -> tuple[float, float]:
        """Between these lie the middle half of the rounds."""
        return _quantile(self.seconds[name], 0.25), _quantile(self.seconds[name], 0.75)

    def tokens_per_second(self, name: str) -> float:
        """Median speed, in tokens (or examples)."""
        return self.tokens / self.median_s(name)

    def ratios(self, name: str) -> list[float]:
        """The variant's time over the first variant's, round by round."""
        first = next(iter(self.seconds.values()))
        return [own / other for own, other in zip(self.seconds[name], first, strict=True)]

    def ratio(self, name: str) -> float:
        """The median of :meth:`ratios`."""
        return statistics.median(self.ratios(name))

    def interval(self, name: str) -> tuple[float, float] | None:
        """Where the true median of the ratios lies with a probability of 95 % or more; None for under 6 rounds.

        From the k-th lowest ratio to the k-th highest, with k as large as the binomial distribution allows: it
        assumes nothing of how the machine's disturbances are distributed.
        """
        ordered, rounds = sorted(self.ratios(name)), len(self.ratios(name))
        outside, k = 0.0, 0
        while (outside := outside + 2 * math.comb(rounds, k) / 2**rounds) <= 0.05:
            k += 1
        return (ordered[k - 1], ordered[-k]) if k else None

    def verdict(self, name: str) -> str:
        """Whether a variant is faster or slower than the first, or what keeps this run from telling."""
        first, interval = next(iter(self.seconds)), self.interval(name)
        if interval is None:
            return f"{_counted(len(self.ratios(name)), 'round')} will not tell; take 6 or more"
        low, high = interval
        between = f"{low:.2f} to {high:.2f} of {first}'s time"
        if self.disturbance:
            return f"cannot be told on a busy machine: {between}"
        if high < 1:
            return f"faster: {between}"
        if low > 1:
            return f"slower: {between}"
        if high - low > _TOO_WIDE:
            return f"cannot be told, because the times jump: {between}"
        return f"no difference that this run can show: {between}"

    def frame(self):
        """A pandas DataFrame, one row a variant."""
        import pandas

        rows = []
        for name in self.seconds:
            low, high = self.quartiles_s(name)
            rows.append(
                {
                    "variant": name,
                    "seconds": self.median_s(name),
                    "lower_quartile": low,
                    "upper_quartile": high,
                    "tokens_per_second": self.tokens_per_second(name),
                    "ratio": self.ratio(name),
                    "verdict": "" if name == next(iter(self.seconds)) else self.verdict(name),
                }
            )
        return pandas.DataFrame(rows)

    def __str__(self) -> str:
        width = max(len(name) for name in self.seconds) + 2
        rounds = len(next(iter(self.seconds.values())))
        title = f"{self.setting}: ms a step, median [quartiles] of {_counted(rounds, 'round')}"
        lines = [title, f"  {'':<{width}}{'ms':>11}{'':>24}{'tokens/s':>11}{'ratio':>8}"]
        for place, name in enumerate(self.seconds):
            low, high = self.quartiles_s(name)
            spread = f"[{low * 1e3:,.2f}-{high * 1e3:,.2f}]"
            numbers = f"{self.median_s(name) * 1e3:>11,.2f} {spread:<23}{self.tokens_per_second(name):>11,.0f}"
            verdict = f"  {self.verdict(name)}" if place else ""
            lines.append(f"  {name:<{width}}{numbers}{self.ratio(name):>8.3f}{verdict}")
        return "\n".join([*lines, f"  {self.disturbance}"] if self.disturbance else lines)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _quantile(values: Sequence[float], part: float) -> float:
    """The value below which that part of them lies, in a line between neighbours."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def step_time(
    model: nn.Module | Factory,
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
    """Measure how long a training step takes, for several ways to train, in turn.

    Each variant has a model of its own and takes a step to warm up. Then, round after round, each is timed, beginning
    with another one every time; quick steps are repeated until a timing lasts 50 ms. The model given is left as it
    is, bit for bit, and so are the random generators.

    Two things decide more than the code: threads that spin while another process works (set OMP_WAIT_POLICY=passive
    before torch is imported), and two threads for small matrices (``torch.set_num_threads(1)``).

    Args:
        model: a freshly loaded model, whose weights all variants share unless they train them; or a function that
            makes one, for each variant anew.
        variants: name -> how it is trained. The first is what the others are compared with.
        batch_size, seq_len: the batch, of random tokens, for models that read token ids.
        batch: inputs and targets, for others, or real ones.
        rounds: how often each is timed. With 9, one outlier on either side does no harm to a verdict.
        device: for a factory; default the best there is.
        progress: show a bar; default only where a person is looking (and LORA_LAB_PROGRESS is not 0).
        **options: as in :class:`lora_lab.rehearse.Setup`, for all variants.

    Raises:
        ValueError: there is no variant, rounds is below 1, the batch is not described, or a step cannot be made ready.
    """
    if not variants:
        raise ValueError("variants is empty, so there is nothing to time; give at least one, as {'LoRA': LoRA(8)}.")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, but it must be at least 1.")
    place = _device_of(model, device)
    with own_randomness(place, 0), Crowd(_threads(place)) as crowd:
        runs = {name: _Run(model, as_setup(method, options), place) for name, method in variants.items()}
        twin = next(iter(runs.values())).step.model
        given = _random_batch(twin, batch_size, seq_len) if batch is None else batch
        given = tuple(tensor.to(place) for tensor in given)
        names, seconds = list(runs), {name: [] for name in runs}
        with progress_bar(len(names) * (rounds + 1), "timing", progress) as bar:
            for run in runs.values():
                run.warm_up(given)
                bar.update()
            for first in range(rounds):
                for place_in_round in range(len(names)):
                    name = names[(first + place_in_round) % len(names)]
                    seconds[name].append(runs[name].seconds())
                    bar.update()
    setting = f"{type(twin).__name__}, batch {shape_of(given)}, {place}"
    return Times(seconds, size_of(given)[0], setting, _disturbance(crowd))


def _disturbance(crowd: Crowd) -> str:
    if not crowd.disturbs:
        return ""
    threads = _counted(crowd.threads, "thread")
    return (
        f"Other processes kept {crowd.cores:.1f} cores busy meanwhile, so this one's {threads} had to wait; "
        "measure again when this machine is quiet."
    )


def _threads(device: torch.device) -> int:
    """How many cores a step keeps busy: while a GPU computes, it is Python's alone."""
    return torch.get_num_threads() if device.type == "cpu" else 1


class _Run:
    """A variant made ready, and its batch."""

    def __init__(self, model: nn.Module | Factory, setup: Setup, device: torch.device) -> None:
        self.device, self.setup = device, setup
        twin = made(model, device, setup.dtype)
        held = [tensor.detach() for tensor in [*twin.parameters(), *twin.buffers()]]
        shared = {storage_of(tensor) for tensor in held}
        self.step = setup.step(twin)
        if isinstance(model, nn.Module):
            keep_originals(twin, shared)

    def warm_up(self, batch: Batch) -> None:
        """Take a first step, in which memory is found and code is loaded; a quick one again, to see how quick."""
        self.parts, self.weights = self.setup.batches(batch)
        self.step.loss = with_every_target(self.step.loss, [targets for _, targets in self.parts])
        self.count = 1
        if self.seconds() < _TIMING_S:
            self.count = math.ceil(_TIMING_S / self.seconds())

    def seconds(self) -> float:
        """The mean of some steps, by a clock that waits for the device before it starts and before it stops."""
        _wait(self.device)
        started = time.perf_counter()
        for _ in range(self.count):
            self.step(self.parts, self.weights)
        _wait(self.device)
        return (time.perf_counter() - started) / self.count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_of(model: nn.Module | Factory, device: torch.device | str | None) -> torch.device:
    found = device_of(model) if isinstance(model, nn.Module) else pick_device(device)[0]
    if found.type == "meta":
        raise ValueError("The model is on the meta device, where nothing is ever computed; use flops, or a factory.")
    return found


def _random_batch(model: nn.Module, batch_size: int | None, seq_len: int | None) -> Batch:
    """Random tokens: with one and the same everywhere, the embedding's gradient would be summed in one row."""
    inputs, targets = token_batch(model, batch_size, seq_len)
    width = output_width(model) or 1
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(width, t.shape, generator=generator) for t in (inputs, targets))


# The cost model


class StepTrace(FlopCounter):
    """Lists the operations of a step as a :class:`lora_lab.replay.Stopwatch` times them, with the cause of each."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self._traffic = Traffic()

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and list it, anew."""
        self._entries: list[tuple[str, int | None, Operation]] = []
        super().run(batches, weights)

    def saw(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Enter the operation."""
        before = len(self.products)
        super().saw(function, args, kwargs, out)
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
        seconds: of an operation. A :class:`lora_lab.replay.Stopwatch` times what it has not met before.
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
            with pretend(model, self.device, setup.dtype) as twin, own_randomness(self.device, 0):
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
        if not isinstance(self.seconds, Stopwatch) or not (new := self.seconds.unknown(kinds)):
            return
        bar = progress_bar(ROUNDS * len(new), "timing operations", progress, "operation")
        with bar as shown, Crowd(_threads(self.device)) as crowd:
            self.seconds.learn(new, shown.update)
        self.disturbance = self.disturbance or _disturbance(crowd)

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
    watch = Stopwatch(place)
    overlaps = place.type == "cuda"
    with Crowd(_threads(place)) as crowd:
        rates, overhead = _rates(watch), _overhead(watch, overlaps)
    return CostModel(watch, overhead, place, overlaps, rates, time.perf_counter() - started, _disturbance(crowd))


def _rates(watch: Stopwatch) -> dict[str, str]:
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
    watch.learn(operations.values())
    return {label: _rate(operation, watch(operation)) for label, operation in operations.items()}


def _rate(operation: Operation, seconds: float) -> str:
    if operation.flops:
        return f"{operation.flops / seconds / GIGA:,.0f} GFLOP/s"
    if operation.moved_bytes > 2**20:
        return f"{operation.moved_bytes / seconds / GIGA:,.1f} GB/s"
    return f"{seconds * 1e6:,.1f} us"


def _overhead(watch: Stopwatch, overlaps: bool) -> dict[str, tuple[float, float]]:
    """For each phase seconds once and for each operation, by least squares over tiny steps.

    What the operations themselves take is subtracted, but for a device that computes while Python goes on.
    """
    shape = LlamaConfig(64, 16, 32, 2, 2, 1, 8)
    digits = (torch.zeros(4, PIXELS), torch.zeros(4, dtype=torch.long))
    runs = []
    for factory, given in ((partial(DigitsMLP, 16), digits), (partial(Llama, shape), None)):
        for method in (FullFineTuning(), LoRA(rank=2)):
            with pretend(factory, watch.device) as twin:
                trace = StepTrace(Setup(method).step(twin))
                for _ in range(2):
                    trace.run([batch_for(twin, 1, 4, given)], [1.0])
                work = trace.work()
            with own_randomness(watch.device, 0):
                model = made(factory, watch.device)
                runs.append((work, _phase_seconds(Setup(method).step(model), batch_for(model, 1, 4, given))))
    if not overlaps:
        watch.learn({kind for work, _ in runs for kind in work.kinds()})
    found = {}
    for phase in PHASES:
        points = []
        for work, seconds in runs:
            counted = [counts for (of_phase, _), counts in work.operations.items() if of_phase == phase]
            alone = 0.0 if overlaps else sum(n * watch(kind) for counts in counted for kind, n in counts.items())
            points.append((work.count(phase=phase), seconds[phase] - alone))
        found[phase] = _line(points)
    return found


def _phase_seconds(step: Step, batch: Batch, steps: int = 60) -> dict[str, float]:
    """How long each phase of a step takes: the median of many steps, on CUDA of Python's time alone."""
    marks: list[float] = []

    def loss(*args: Any) -> Tensor:
        result = step.loss(*args)
        marks.append(time.perf_counter())
        return result

    def backward(*args: Any) -> list[Tensor]:
        result = step.backward(*args)
        marks.append(time.perf_counter())
        return result

    hook = step.optimizer.register_step_pre_hook(lambda *_: marks.append(time.perf_counter()))
    timed, rows = replace(step, loss=loss, backward=backward), []
    for _ in range(steps):
        marks[:] = [time.perf_counter()]
        timed([batch], [1.0])
        marks.append(time.perf_counter())
        rows.append([stop - start for start, stop in itertools.pairwise(marks)])
        _wait(batch[0].device)
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
