"""Real training steps, timed in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_lab.costs.fake import (
    Source,
    batch_for,
    build_model,
    device_to_run,
    on_each,
    shape_of,
    unshare_trainable,
)
from lora_lab.costs.flops import size_of
from lora_lab.costs.setup import Setup, as_setup, output_width
from lora_lab.methods import Method
from lora_lab.system.device import own_randomness
from lora_lab.system.process import BusyCores
from lora_lab.system.schema import Size, check
from lora_lab.system.wording import count_noun, progress_bar
from lora_lab.task import padding_id
from lora_lab.train import Batch

_TIMING_S = 0.05  # the shortest timing of steps
_SAMPLE_S = 1e-3  # the same of a single operation
_TOO_WIDE = 0.2  # an interval of ratios that shows nothing


# Step time


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
        first = next(iter(self.seconds.values()))
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
        first, interval = next(iter(self.seconds)), self.interval(name)
        if interval is None:
            return f"inconclusive after {count_noun(len(self.ratios(name)), 'round')}; take 6 or more"
        low, high = interval
        reasons = {
            "inconclusive on a busy machine": bool(self.disturbance),
            "faster": high < 1,
            "slower": low > 1,
            "inconclusive, because the times vary too much": high - low > _TOO_WIDE,
        }
        found = next((words for words, holds in reasons.items() if holds), "no significant difference")
        return f"{found}: {low:.2f} to {high:.2f} of {first}'s time"

    def to_dict(self) -> dict[str, Any]:
        """Return one entry a variant and what holds for all of them, in values of JSON."""
        first, *_ = self.seconds
        variants = [
            {"variant": name, "seconds": self.median_s(name)}
            | dict(zip(("lower_quartile_seconds", "upper_quartile_seconds"), self.quartiles_s(name), strict=True))
            | {"tokens_per_second": self.tokens_per_second(name), "ratio": self.ratio(name)}
            | dict(zip(("ratio_low", "ratio_high"), self.interval(name) or (None, None), strict=True))
            | {"verdict": None if name == first else self.verdict(name)}
            for name in self.seconds
        ]
        facts = {"setting": self.setting, "tokens": self.tokens, "rounds": len(self.seconds[first])}
        return {**facts, "variants": variants, "disturbance": self.disturbance or None}

    def __str__(self) -> str:
        width = max(len(name) for name in self.seconds) + 2
        rounds = len(next(iter(self.seconds.values())))
        title = f"{self.setting}: ms a step, median [quartiles] of {count_noun(rounds, 'round')}"
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
        batch = _random_batch(twin, batch_size, seq_len) if batch is None else batch
        batch = on_each(batch, lambda tensor: tensor.to(device))
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
        return mean_seconds(lambda: self.step(self.parts, self.weights), self.count, self.device)


def mean_seconds(function: Callable[[], Any], count: int, device: torch.device) -> float:
    """Return the mean of ``count`` calls; the clock waits for the device before it starts and before it stops."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        function()
    synchronize(device)
    return (time.perf_counter() - started) / count


def median_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return the median of five samples of a call; a quick call is repeated until a sample lasts a millisecond."""
    function()  # allocates memory and loads code
    count = math.ceil(_SAMPLE_S / max(mean_seconds(function, 1, device), 1e-6))
    return statistics.median(mean_seconds(function, count, device) for _ in range(5))


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random_batch(model: nn.Module, batch_size: int | None, seq_len: int | None) -> Batch:
    """Return random numbers: if all tokens were equal, the embedding's gradient would be summed in a single row."""
    generator, classes = torch.Generator().manual_seed(0), output_width(model) or 1
    inputs, targets = batch_for(model, batch_size, seq_len, None)
    if inputs.is_floating_point():
        inputs = torch.rand(inputs.shape, generator=generator).to(inputs.dtype)
    else:
        tokens = getattr(getattr(model, "config", None), "vocab_size", classes)
        inputs = torch.randint(tokens, inputs.shape, generator=generator)
        if (pad := padding_id(model)) is not None:  # a row of padding alone would have no loss
            inputs = inputs.where(inputs != pad, pad + 1)
    return inputs, torch.randint(classes, targets.shape, generator=generator)
