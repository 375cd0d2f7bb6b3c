"""Exercises of lesson 05: the time of a training step."""

from dataclasses import dataclass

import numpy as np

from lora_lab.course.exercise import Exercise, Reflection

# FLOPs


def sizes_and_method(rng):
    """Weights of the layers and of the head, multiply-adds of attention and of adapters a token, and a method.

    They are small, so that an example can be computed by hand.
    """
    M, E, T, P = sorted(rng.choice(np.arange(2, 40), 4, replace=False).tolist(), reverse=True)
    return M, E, T, P, str(rng.choice(["full", "LoRA"]))


LORA, BACKWARD = "forward + P + inputs + P + P", "+ P + P"
multiply_adds = Exercise(
    "multiply_adds",
    inputs=sizes_and_method,
    wrong={
        "This is the forward pass alone. The backward pass multiplies as well, for inputs and for weights.": (
            (LORA, "forward + P", "forward + inputs + M + E", "forward")
        ),
        "The gradients of the inputs are missing. The layers below wait for them, with both methods.": (
            (LORA, "forward + P + P", "forward + inputs", "forward")
        ),
        "With LoRA you count one weight gradient too many. Nothing needs the gradient of a frozen weight.": (
            (BACKWARD, "+ P + P + M + E")
        ),
        "T is counted twice. Attention has two inputs, so its backward pass multiplies 2 T and its forward pass T.": (
            ("2 * T", "T")
        ),
        "With LoRA T is counted once too little: attention has no weights to freeze, and backward multiplies 2 T.": (
            "return 2 * (M + E + T) + 3 * P if method == 'LoRA' else 3 * (M + E + T)"
        ),
        "The adapters are missing. With LoRA they multiply P forward and 2 P backward.": (LORA, "forward + inputs"),
        "The adapters are counted in the forward pass alone. Backward they multiply 2 P.": (" + P + P", ""),
        "The adapters are counted twice, but they multiply P three times. Backward it is for inputs and for weights.": (
            (BACKWARD, "+ P")
        ),
        "The adapters are counted four times, but they multiply P three times. Forward it is once, backward twice.": (
            (BACKWARD, "+ P + P + P")
        ),
        "With LoRA the head's weight gradient is too much. The head is frozen like the layers.": (
            (BACKWARD, "+ P + P + E")
        ),
        'Nothing is returned for the method "LoRA", which is spelled so.': (f"return {LORA}", "return None"),
        "The head is missing. Its E weights multiply as those of the layers do.": (" + E", ""),
        "The method makes no difference in your count. LoRA skips the weight gradients of M and E.": (
            "return 3 * (M + E + T)"
        ),
        "Full fine-tuning has no adapters. P counts with LoRA alone.": (
            ("return forward + inputs + M + E", "return forward + inputs + M + E + 3 * P")
        ),
        "For full fine-tuning you return LoRA's count. The method is 'full', in small letters.": ("'full'", "'Full'"),
        "These are FLOPs, two for each multiply-add. Count the multiply-adds.": (
            "return 2 * (2 * M + 2 * E + 3 * T + (3 * P if method == 'LoRA' else M + E))"
        ),
    },
    hints=[
        "Forward: every weight is multiplied once, and so are T and P.",
        "Backward there are gradients of inputs (M, E, 2 T, P) and gradients of trained weights.",
        "Full fine-tuning has weight gradients of M and E. LoRA has those of its adapters alone, P.",
    ],
    praise="One of three terms of about equal size is gone, so two thirds stay, and the adapters come on top.",
)


@multiply_adds.must()
def of_full_fine_tuning(multiply_adds, rng):
    """Full fine-tuning multiplies M, E and T three times: once forward and twice backward."""
    M, E, T, P, _ = sizes_and_method(rng)
    return multiply_adds(M, E, T, P, "full") == 3 * (M + E + T)


@multiply_adds.must()
def of_frozen_weights(multiply_adds, rng):
    """With LoRA and adapters of no size, only the weight gradients of M and E are missing."""
    M, E, T, _, _ = sizes_and_method(rng)
    return multiply_adds(M, E, T, 0, "LoRA") == 2 * M + 2 * E + 3 * T


@multiply_adds.must()
def of_the_adapters(multiply_adds, rng):
    """With LoRA the adapters add 3 P, and with full fine-tuning nothing."""
    M, E, T, P, _ = sizes_and_method(rng)
    added = [multiply_adds(M, E, T, P, each) - multiply_adds(M, E, T, 0, each) for each in ("LoRA", "full")]
    return added == [3 * P, 0]


# A fair stopwatch


@dataclass(eq=False, repr=False)
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

    seconds: dict[str, float]
    rng: np.random.Generator
    first: float = 0.0
    drift: float = 0.0
    interruption: float = 1.0

    def __post_init__(self) -> None:
        self.launched: list[str] = []
        self._now = self._free = float(self.rng.uniform(10, 1000))
        self._interrupted = int(self.rng.integers(2, 6))

    def clock(self) -> float:
        """The time in seconds; only differences mean something."""
        return self._now

    def launch(self, step: str) -> None:
        """Hand a step to the device, and return before it is done.

        Raises:
            ValueError: there is no such step.
        """
        if step not in self.seconds:
            raise ValueError(f"There is no step {step!r}; this device runs {' and '.join(map(repr, self.seconds))}.")
        duration = self.seconds[step] * (1 + self.drift * len(self.launched)) * self.rng.normal(1, 0.001)
        if len(self.launched) % 12 == self._interrupted:
            duration *= self.interruption
        if step not in self.launched:
            duration += self.first
        self.launched.append(step)
        self._now += 1e-5  # to launch takes 10 microseconds
        self._free = max(self._free, self._now) + duration

    def synchronize(self) -> None:
        """Wait until every step that was launched is done."""
        self._now = max(self._now, self._free)


WAIT, LAUNCH = "device.synchronize()", "device.launch(step)"
ROUNDS = "for _ in range(10):\n        seconds = {}\n        for step in ('full', 'LoRA'):"
RATIO, MEDIAN = "seconds['LoRA'] / seconds['full']", "median(rounds[1:])"
OF_THE_MEDIANS = "median(s['LoRA'] for s in rounds[1:]) / median(s['full'] for s in rounds[1:])"
ONE_AFTER_THE_OTHER = (
    *(ROUNDS, "times = {'full': [], 'LoRA': []}\n    for step in times:\n        for _ in range(10):"),
    *("seconds[step] = device.clock() - started", "times[step].append(device.clock() - started)"),
    *(f"rounds.append({RATIO})", "pass"),
    *(MEDIAN, "median(times['LoRA'][1:]) / median(times['full'][1:])"),
)
fair_ratio = Exercise(
    "fair_ratio",
    hints=[
        "launch returns before the work is done: read the clock, launch, synchronize, read the clock again.",
        "Run each step once first. Then time full, LoRA, full, LoRA and so on, for nine rounds.",
        "Divide LoRA's time by full's in each round. statistics.median of the nine ratios ignores a few interruptions.",
    ],
    praise="Asynchronous launches, slow first steps, drift and interruptions: your stopwatch survives all four.",
)


@fair_ratio.must(
    "The result is no positive number. Return the time of LoRA divided by the time of full.",
    (MEDIAN, "(seconds['LoRA'], seconds['full'])"),
    (f"return {MEDIAN}", "return None"),
)
def is_a_number(fair_ratio, rng):
    measured = fair_ratio(Device({"full": 0.2, "LoRA": 0.14}, rng))
    return isinstance(measured, float | np.floating) and measured > 0


@fair_ratio.must(
    "One of the steps was never launched. Time both on this device.",
    ("('full', 'LoRA')", "('full',)", "seconds['LoRA']", "0.14"),
    ("rounds = []", "return 0.7"),
)
def runs_both(fair_ratio, rng):
    device = Device({"full": 0.2, "LoRA": 0.14}, rng)
    fair_ratio(device)
    return {*device.launched} == {"full", "LoRA"}


@fair_ratio.must(
    "One of the times holds the other's as well. Read the clock again before each launch.",
    ("started = device.clock()", "started = started if seconds else device.clock()"),
)
def times_each_alone(fair_ratio, rng):
    full, true = rng.uniform(0.05, 0.5), rng.uniform(0.7, 0.8)
    measured = fair_ratio(Device({"full": full, "LoRA": true * full}, rng))
    return min(abs(measured / (1 + true) - 1), abs(measured / (1 + 1 / true) - 1)) > 0.02


@fair_ratio.must(
    "The ratio is upside down. Divide LoRA's time by full's. If you do, you timed the step before: "
    "synchronize before you read the clock.",
    (RATIO, "seconds['full'] / seconds['LoRA']"),
    (WAIT, "pass", LAUNCH, f"{WAIT}\n            {LAUNCH}"),
)
def is_not_upside_down(fair_ratio, rng):
    full, true = rng.uniform(0.05, 0.5), rng.uniform(0.4, 0.8)
    return abs(fair_ratio(Device({"full": full, "LoRA": true * full}, rng)) * true - 1) > 0.02


def is_right(fair_ratio, rng, **troubles):
    """Whether the ratio is within 2 % of the true one on a device with these troubles."""
    full, true = rng.uniform(0.05, 0.5), float(rng.choice([0.5, 0.8, 1.4, 2.2]))
    return abs(fair_ratio(Device({"full": full, "LoRA": true * full}, rng, **troubles)) / true - 1) < 0.02


@fair_ratio.must(
    "You read your computer's clock. The time on the device is device.clock().",
    ("device.clock()", "__import__('time').perf_counter()"),
)
def reads_the_clock_of_the_device(fair_ratio, rng):
    device, read = Device({"full": 0.2, "LoRA": 0.14}, rng), []
    device.clock = lambda: read.append(Device.clock(device)) or read[-1]
    fair_ratio(device)
    return read


@fair_ratio.must(
    "You timed the launch, not the work. Synchronize before you read the clock, at the start and at the end.",
    (WAIT, "pass"),
)
def waits_for_the_work(fair_ratio, rng):
    """On a steady device the ratio is right, so the work was timed and not its launch."""
    return is_right(fair_ratio, rng)


@fair_ratio.must(
    "The first steps count, and they are slow. Run each step once before you start the clock.",
    ("rounds[1:]", "rounds", "median", "mean"),
    ("rounds[1:]", "rounds", "range(10)", "range(1)"),
)
def warms_up(fair_ratio, rng):
    """It is right where the first step of each kind takes long."""
    return is_right(fair_ratio, rng, first=4.0)


@fair_ratio.must(
    "The device became slower in between. Take turns step by step: one of full, one of LoRA, and again.",
    ONE_AFTER_THE_OTHER,
    (*ONE_AFTER_THE_OTHER, "'full': [], 'LoRA': []", "'LoRA': [], 'full': []", "range(10)", "range(6)"),
    (*ONE_AFTER_THE_OTHER, "median", "mean"),
)
def takes_turns(fair_ratio, rng):
    return is_right(fair_ratio, rng, drift=0.01)


@fair_ratio.must(
    "Interruptions and drift moved your result. Divide within each round, and take the median of these ratios.",
    ("median", "mean"),
    ("range(10)", "range(2)"),
    (f"append({RATIO})", "append(seconds)", MEDIAN, OF_THE_MEDIANS),
)
def takes_turns_and_the_median(fair_ratio, rng):
    """It is right where the device becomes slower, and another program interrupts it now and then."""
    troubles = {"first": 4.0, "drift": 0.01, "interruption": 8.0}
    return all(is_right(fair_ratio, rng, **troubles) for _ in range(4))  # where nothing interrupts, luck would do


Reflection(
    "05_speed",
    question="A blog says: *LoRA trains three times as fast as full fine-tuning.* In five to eight sentences: "
    "which conditions must be stated before this can be checked, how would you time the two, and which "
    "result would surprise you after this lesson?",
    rubric=(
        "The answer names at least three of: model, rank, tokens per step, device, threads, optimiser.",
        "The timing waits for the device and warms up.",
        "The timing takes turns, and the answer says why.",
        "The surprising result is compared with the share of multiplications that LoRA skips.",
    ),
    expected="A ratio belongs to a model, a rank, tokens per step, a device and its threads. One runs each step "
    "once, synchronises before reading the clock, takes turns so that drift meets both, and takes the "
    "median of the ratios. By multiplications alone LoRA skips a third, so a factor above 1.5 needs "
    "another reason, such as the optimiser's work, a baseline that swaps memory, or another batch.",
)
