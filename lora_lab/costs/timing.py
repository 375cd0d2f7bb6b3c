"""Real training steps, timed in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_lab.costs.fake import (
    Batch,
    Factory,
    build_model,
    device_of,
    shape_of,
    storage_of,
    token_batch,
    unshare_trainable,
)
from lora_lab.costs.flops import (
    size_of,
)
from lora_lab.costs.setup import Setup, as_setup
from lora_lab.costs.trace import output_width
from lora_lab.methods import Method
from lora_lab.system.device import own_randomness, pick_device
from lora_lab.system.process import BusyCores
from lora_lab.system.progress import progress_bar

_TIMING_S = 0.05  # a timing lasts no less
_TOO_WIDE = 0.2  # an interval of ratios that says nothing


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
        **options: as in :class:`lora_lab.costs.setup.Setup`, for all variants.

    Raises:
        ValueError: there is no variant, rounds is below 1, the batch is not described, or a step cannot be made ready.
    """
    if not variants:
        raise ValueError("variants is empty, so there is nothing to time; give at least one, as {'LoRA': LoRA(8)}.")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, but it must be at least 1.")
    place = _device_of(model, device)
    with own_randomness(place, 0), BusyCores(thread_count(place)) as crowd:
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
    return Times(seconds, size_of(given)[0], setting, disturbance(crowd))


def disturbance(crowd: BusyCores) -> str:
    """A sentence about other processes that kept the cores busy, or an empty text."""
    if not crowd.disturbs:
        return ""
    threads = _counted(crowd.threads, "thread")
    return (
        f"Other processes kept {crowd.cores:.1f} cores busy meanwhile, so this one's {threads} had to wait; "
        "measure again when this machine is quiet."
    )


def thread_count(device: torch.device) -> int:
    """How many cores a step keeps busy: while a GPU computes, it is Python's alone."""
    return torch.get_num_threads() if device.type == "cpu" else 1


class _Run:
    """A variant made ready, and its batch."""

    def __init__(self, model: nn.Module | Factory, setup: Setup, device: torch.device) -> None:
        self.device, self.setup = device, setup
        twin = build_model(model, device, setup.dtype)
        held = [tensor.detach() for tensor in [*twin.parameters(), *twin.buffers()]]
        shared = {storage_of(tensor) for tensor in held}
        self.step = setup.step(twin)
        if isinstance(model, nn.Module):
            unshare_trainable(twin, shared)

    def warm_up(self, batch: Batch) -> None:
        """Take a first step, in which memory is found and code is loaded; a quick one again, to see how quick."""
        self.parts, self.weights = self.setup.batches(batch)
        self.step.read_targets([targets for _, targets in self.parts])
        self.count = 1
        if self.seconds() < _TIMING_S:
            self.count = math.ceil(_TIMING_S / self.seconds())

    def seconds(self) -> float:
        """The mean of some steps, by a clock that waits for the device before it starts and before it stops."""
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(self.count):
            self.step(self.parts, self.weights)
        synchronize(self.device)
        return (time.perf_counter() - started) / self.count


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
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
