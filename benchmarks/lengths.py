"""Short and long examples together: answer tokens a second in random batches and in batches by length.

    python benchmarks/lengths.py [--rounds 5] [--lean] [--threads 1] [--cpu-time]

The data are the pairs of `sentiment` and `summarise` as they are, mixed, the model SmolLM2-135M with LoRA r=8:

    random       batches of 8 examples in random order, each padded to its longest
    by length    fit(..., batches="by_length"), batches of 8 too

`--lean` takes the lean step, which leaves out the logits of tokens that do not count.

A measurement is five steps, on batches at the 10th, 30th, ... 90th percentile of an epoch's by size, and is scaled to
the epoch by the number of tokens, padding included. Setups take turns; medians are printed, and medians of ratios in
pairs. `--cpu-time` counts the seconds of the process on its cores, for a machine that does other work too. The model
must be in the cache (`lora-lab fetch`).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import common
import torch

import lora_lab as ll
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.tasks import TASKS, PairTask, from_pairs
from lora_lab.tasks.instruction import PARTS
from lora_lab.train import TrainConfig, data_order, make_step

SAMPLED = 5  # steps of a measurement


def mixture(tokenizer: Tokenizer) -> PairTask:
    """The pairs of both tasks, part by part."""
    tasks = [TASKS[name](tokenizer) for name in ("sentiment", "summarise")]
    pairs = {part: [pair for task in tasks for pair in task.pairs[part]] for part in PARTS}
    return from_pairs(tokenizer, pairs, name="sentiment and summarise")


class Epoch:
    """The batches of a run's first epoch, and a sample of them.

    Args:
        task, config: of the run.
    """

    def __init__(self, task: PairTask, config: TrainConfig) -> None:
        rows, count = data_order(task, config).rows(0, len(task.train)), config.batch_size
        batches = sorted((task.train[part] for part in rows.split(count)), key=lambda part: part.targets.numel())
        self.answer_tokens = task.count_targets(task.train)
        self.tokens = sum(batch.targets.numel() for batch in batches)
        self.sample = [batches[math.floor((i + 0.5) / SAMPLED * len(batches))] for i in range(SAMPLED)]

    def rate(self, seconds: float) -> float:
        """Answer tokens a second, from the seconds of the sample."""
        sampled = sum(batch.targets.numel() for batch in self.sample)
        return self.answer_tokens / (seconds * self.tokens / sampled)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lean", action="store_true", help="take the lean step")
    parser.add_argument("--cpu-time", action="store_true", help="count seconds on the cores, not of the clock")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    common.print_machine(torch.device("cpu"))
    model, tokenizer = ll.load_pretrained(device="cpu")
    task, config = mixture(tokenizer), TrainConfig(steps=1, lr=1e-4, lean=ll.Lean() if options.lean else None)
    print(f"\n{task.describe()}\n")
    epochs = {
        "random": Epoch(task, config),
        "by length": Epoch(task, dataclasses.replace(config, batches="by_length")),
    }
    step = make_step(model.train(), task.loss, ll.LoRA(rank=8), config)

    def steps(epoch: Epoch) -> Callable[[], float]:
        def take() -> float:
            started = clock()
            for batch in epoch.sample:
                step.read_targets([batch.targets])
                step([(batch.inputs, batch.targets)], [1.0])
            return clock() - started

        return take

    times = common.interleaved({name: steps(epoch) for name, epoch in epochs.items()}, options.rounds)
    rates = {name: [epochs[name].rate(seconds) for seconds in each] for name, each in times.items()}
    print(f"{'':<12}{'tokens an epoch':>16}{'answer tokens/s':>17}{'min':>8}{'max':>8}{'ratio':>8}")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates["random"], strict=True))
        line = f"{statistics.median(values):>17.1f}{min(values):>8.1f}{max(values):>8.1f}{ratio:>8.2f}"
        print(f"{name:<12}{epochs[name].tokens:>16,}{line}")


if __name__ == "__main__":
    main()
