"""Exercises of lesson 05: the time of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean, median
from typing import Any

import numpy as np

from lora_lab.course.exercise import Probe, exercises_of

exercise = exercises_of("05_speed")


# FLOPs


def sizes_and_method(rng: np.random.Generator) -> tuple[int, int, int, int, str]:
    """Weights of the layers and of the head, multiply-adds of attention and of adapters a token, and a method."""
    M, E, T, P = (int(rng.integers(low, 2 * low)) for low in (10**8, 3 * 10**7, 4 * 10**6, 2 * 10**6))
    return M, E, T, P, str(rng.choice(["full", "LoRA"]))


def _in_steps(
    forward: int = 1, inputs: int = 1, weights: int = 1, attention: int = 2, adapters: int = 3, head: int = 1
) -> Callable[[int, int, int, int, str], int]:
    """The count in which each argument changes one term: how often the frozen or trained weights are multiplied."""

    def count(M: int, E: int, T: int, P: int, method: str) -> int:
        lora = method == "LoRA"
        matrices = M + E * head
        passes = (forward + inputs) * matrices + (0 if lora and weights == 1 else weights > 0) * matrices
        return passes + T * (forward + attention * inputs) + adapters * P * lora

    return count


@exercise(
    "multiply_adds",
    inputs=sizes_and_method,
    mistakes={
        "This is the forward pass alone. The backward pass multiplies as well, for inputs and for weights.": (
            _in_steps(inputs=0, weights=0, adapters=1)
        ),
        "The gradients of the inputs are missing. The layers below wait for them, with both methods.": (
            lambda M, E, T, P, method: M + E + T + (2 * P if method == "LoRA" else M + E)
        ),
        "With LoRA you count one weight gradient too many. Nothing needs the gradient of a frozen weight.": (
            _in_steps(weights=2)
        ),
        "T is counted twice. Attention has two inputs, so its backward pass multiplies 2 T and its forward pass T.": (
            _in_steps(attention=1)
        ),
        "The adapters are missing. With LoRA they multiply P forward and 2 P backward.": _in_steps(adapters=0),
        "The adapters are counted in the forward pass alone. Backward they multiply 2 P.": _in_steps(adapters=1),
        "The adapters are counted twice, but they multiply P three times. Backward it is for inputs and for weights.": (
            _in_steps(adapters=2)
        ),
        "The adapters are counted four times, but they multiply P three times. Forward it is once, backward twice.": (
            _in_steps(adapters=4)
        ),
        "With LoRA the head's weight gradient is too much. The head is frozen like the layers.": (
            lambda M, E, T, P, method: 3 * (M + E + T) - (M - 3 * P) * (method == "LoRA")
        ),
        "The head is missing. Its E weights multiply as those of the layers do.": _in_steps(head=0),
        "The method makes no difference in your count. LoRA skips the weight gradients of M and E.": (
            lambda M, E, T, P, method: 3 * (M + E + T)
        ),
    },
    hints=[
        "Forward: every weight is multiplied once, and so are T and P.",
        "Backward there are gradients of inputs (M, E, 2 T, P) and gradients of trained weights.",
        "Full fine-tuning has weight gradients of M and E. LoRA has those of its adapters alone, P.",
    ],
    minutes=10,
    difficulty=2,
    praise="One of three terms of about equal size is gone, so two thirds stay: the bound of the next section.",
    draws=28,
)
def multiply_adds(M, E, T, P, method):
    """The result is the number of multiply-adds for each token in a training step, for both methods."""
    if method == "full":
        return 3 * M + 3 * E + 3 * T
    return 2 * M + 2 * E + 3 * T + 3 * P


def sizes_for_a_rank(rng: np.random.Generator) -> tuple[int, int, int]:
    """Weights of the layers, of the head, and adapters' multiply-adds per unit of rank; half of the cases are ties."""
    M, E, per_rank = (int(rng.integers(*span)) for span in ((10**8, 10**9), (2 * 10**7, 10**8), (2 * 10**5, 10**6)))
    if rng.random() < 0.5:
        M -= (M + E) % (3 * per_rank)
    return M, E, per_rank


@exercise(
    "break_even",
    inputs=sizes_for_a_rank,
    mistakes={
        "E is missing. LoRA skips the weight gradient of the head as well.": (
            lambda M, E, per_rank: M // (3 * per_rank)
        ),
        "The adapters cost too little. They multiply in the forward pass and twice in the backward pass.": (
            lambda M, E, per_rank: (M + E) // per_rank
        ),
        "The adapters' forward pass is missing. They multiply three times in a step, not twice.": (
            lambda M, E, per_rank: (M + E) // (2 * per_rank)
        ),
        "At this rank LoRA already needs more multiplications. Round down.": (
            lambda M, E, per_rank: -(-(M + E) // (3 * per_rank)),
            lambda M, E, per_rank: (M + E) // (3 * per_rank) + 1,
        ),
        "At the break-even rank itself LoRA needs no more. Count it.": (
            lambda M, E, per_rank: (M + E - 1) // (3 * per_rank)
        ),
        "A rank is a whole number. Round down.": lambda M, E, per_rank: (M + E) / (3 * per_rank),
    },
    hints=[
        "Write down both counts and subtract what they share. T drops out too.",
        "Full fine-tuning is left with M + E, LoRA with 3 P, and P is the rank times per_rank.",
        "You want the largest whole rank for which the adapters cost no more than what is skipped; // rounds down.",
    ],
    minutes=6,
    difficulty=2,
    praise="Far below this rank LoRA needs up to a third fewer FLOPs, and above it more than full fine-tuning.",
    draws=28,
)
def break_even(M, E, per_rank):
    """At the result LoRA needs no more multiplications than full fine-tuning, and at the next rank it does."""
    return (M + E) // (3 * per_rank)


# A fair stopwatch


class Device:
    """An accelerator with a clock of its own: deterministic, and as fast to simulate as to read.

    ``launch`` hands a training step to the device and returns at once, as on a GPU. ``synchronize`` waits until
    everything that was launched is done. ``clock`` is the time in seconds.

    Args:
        seconds: of one step, by its name, such as {"full": 0.2, "LoRA": 0.14}.
        rng: draws the jitter of 0.1 %, and where interruptions fall.
        first: seconds that the first step of each name takes in addition, because its kernels are chosen then.
        drift: by how much each step is slower than the one before, as the device heats up; a share of ``seconds``.
        interruption: how many times as long one step in twelve takes, because another program runs.
    """

    def __init__(
        self,
        seconds: dict[str, float],
        rng: np.random.Generator,
        first: float = 0.0,
        drift: float = 0.0,
        interruption: float = 1.0,
    ) -> None:
        self._seconds, self._rng, self._drift, self._interruption = seconds, rng, drift, interruption
        self._preparation = dict.fromkeys(seconds, first)
        self._now = self._free = float(rng.uniform(10, 1000))
        self._launches, self._interrupted = 0, int(rng.integers(2, 6))

    def clock(self) -> float:
        """The time in seconds; only differences mean something."""
        return self._now

    def launch(self, step: str) -> None:
        """Hand a step to the device, and return before it is done.

        Raises:
            ValueError: there is no such step.
        """
        if step not in self._seconds:
            raise ValueError(f"There is no step {step!r}; this device runs {' and '.join(map(repr, self._seconds))}.")
        duration = self._seconds[step] * (1 + self._drift * self._launches)
        if self._launches % 12 == self._interrupted:
            duration *= self._interruption
        duration = duration * self._rng.normal(1, 0.001) + self._preparation[step]
        self._preparation[step] = 0.0
        self._now += 1e-5  # to launch takes 10 microseconds
        self._free = max(self._free, self._now) + duration
        self._launches += 1

    def synchronize(self) -> None:
        """Wait until every step that was launched is done."""
        self._now = max(self._now, self._free)


def _ratio_of_medians(device: Device) -> float:
    """Each median is taken at a moment of its own, and one interruption shifts one of them."""
    times: dict[str, list[float]] = {"full": [], "LoRA": []}
    for step in ("full", "LoRA") * 10:
        times[step].append(_timed(device, step))
    return median(times["LoRA"][1:]) / median(times["full"][1:])


def _timed(device: Device, step: str, wait: bool = True) -> float:
    started = device.clock()
    device.launch(step)
    if wait:
        device.synchronize()
    return device.clock() - started


def _ratio_of_the_steps_before(device: Device) -> float:
    """It waits for the step before after the clock is read, so that each time is that of the other step."""
    times: dict[str, list[float]] = {"full": [], "LoRA": []}
    for step in ("full", "LoRA") * 10:
        started = device.clock()
        device.synchronize()
        device.launch(step)
        times[step].append(device.clock() - started)
    return median(lora / full for full, lora in zip(times["full"], times["LoRA"], strict=True))


def _ratio(
    order: Iterable[str] = ("full", "LoRA") * 9,
    middle: Callable[[list[float]], float] = median,
    warm: bool = True,
    wait: bool = True,
    upside_down: bool = False,
) -> Callable[[Device], float]:
    """A stopwatch that is fair unless an argument says otherwise."""

    def measure(device: Device) -> float:
        times: dict[str, list[float]] = {"full": [], "LoRA": []}
        for step in ("full", "LoRA") if warm else ():
            _timed(device, step)
        for step in order:
            times[step].append(_timed(device, step, wait))
        rounds = [lora / full for full, lora in zip(times["full"], times["LoRA"], strict=True)]
        return 1 / middle(rounds) if upside_down else middle(rounds)

    return measure


def _on(**troubles: float) -> Callable[[Callable[[Device], Any], np.random.Generator], bool]:
    """A probe: the ratio is within 2 % of the true one on a device with these troubles."""

    def within_2_percent(answer: Callable[[Device], Any], rng: np.random.Generator) -> bool:
        full, true = rng.uniform(0.05, 0.5), rng.choice([rng.uniform(0.4, 0.8), rng.uniform(1.25, 2.5)])
        measured = answer(Device({"full": full, "LoRA": true * full}, rng, **troubles))
        return bool(abs(measured / true - 1) < 0.02)

    return within_2_percent


def _is_a_number(answer: Callable[[Device], Any], rng: np.random.Generator) -> bool:
    measured = answer(Device({"full": 0.2, "LoRA": 0.14}, rng))
    return isinstance(measured, float | np.floating) and bool(measured > 0)


def _runs_both(answer: Callable[[Device], Any], rng: np.random.Generator) -> bool:
    device = Device({"full": 0.2, "LoRA": 0.14}, rng, first=3.0)
    answer(device)
    return not any(device._preparation.values())


def _is_not_upside_down(answer: Callable[[Device], Any], rng: np.random.Generator) -> bool:
    full, true = rng.uniform(0.05, 0.5), rng.uniform(0.4, 0.8)
    measured = answer(Device({"full": full, "LoRA": true * full}, rng))
    return bool(abs(measured * true - 1) > 0.02)


@exercise(
    "fair_ratio",
    probes=[
        Probe(
            _is_a_number,
            "The result is no positive number. Return the time of LoRA divided by the time of full.",
            (lambda device: (_timed(device, "full"), _timed(device, "LoRA")), lambda device: None),
        ),
        Probe(
            _runs_both,
            "One of the steps was never launched. Time both on this device.",
            (lambda device: _timed(device, "full") / 0.2, lambda device: 0.7),
        ),
        Probe(
            _is_not_upside_down,
            "The ratio is upside down. Divide LoRA's time by full's. If you do, you timed the step before: "
            "synchronize before you read the clock.",
            (_ratio(upside_down=True), _ratio_of_the_steps_before),
        ),
        Probe(
            _on(),
            "You timed the launch, not the work. Synchronize before you read the clock, at the start and at the end.",
            (_ratio(wait=False),),
        ),
        Probe(
            _on(first=4.0),
            "The first steps count, and they are slow. Run each step once before you start the clock.",
            (_ratio(warm=False, middle=mean), _ratio(("full", "LoRA"), warm=False)),
        ),
        Probe(
            _on(drift=0.01),
            "The device became slower in between. Take turns instead of timing all of one and then all of the other.",
            (
                _ratio(["full"] * 9 + ["LoRA"] * 9),
                _ratio(["LoRA"] * 5 + ["full"] * 5),
                _ratio(["full"] * 9 + ["LoRA"] * 9, middle=mean),
            ),
        ),
        Probe(
            _on(first=4.0, drift=0.01, interruption=8.0),
            "Interruptions and drift moved your result. Divide within each round, and take the median of these ratios.",
            (_ratio(middle=mean), _ratio(("full", "LoRA")), _ratio_of_medians),
        ),
    ],
    hints=[
        "launch returns before the work is done: read the clock, launch, synchronize, read the clock again.",
        "Run each step once first. Then time full, LoRA, full, LoRA and so on, for nine rounds.",
        "Divide LoRA's time by full's in each round. statistics.median of the nine ratios ignores a few interruptions.",
    ],
    minutes=15,
    difficulty=3,
    draws=20,
    praise="Asynchronous launches, slow first steps, drift and interruptions: your stopwatch survives all four.",
)
def fair_ratio(device):
    """The result is within 2 % of the true ratio on a device that starts slowly, drifts and is interrupted."""
    rounds = []
    for _ in range(10):
        seconds = {}
        for step in ("full", "LoRA"):
            device.synchronize()
            started = device.clock()
            device.launch(step)
            device.synchronize()
            seconds[step] = device.clock() - started
        rounds.append(seconds["LoRA"] / seconds["full"])
    return median(rounds[1:])  # the first round warms up
