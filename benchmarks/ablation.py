"""What packing a rank ablation saves, on the digits net and on a model of SmolLM2-135M's shape.

    python benchmarks/ablation.py [--only digits smollm2] [--rounds 3]

    digits     20 trials (ranks 1, 2, 4, 8, 16 x 4 seeds), 200 steps of 32 pictures, evaluations at both ends included:
               one after another on one thread (the baseline), packed in one process, packed in two processes
    smollm2    8 adapters of rank 8, one sequence of 64 tokens each: seconds for one step of all of them, one after
               another on two threads (the first baseline), two at a time on a thread each (the fair one), packed, and
               in two packs in a process each

Rounds are interleaved, and medians of ratios are printed, with the extremes. Weights of the language model are random.
On a CUDA GPU the language model is packed there (never tried).
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import common
import joblib
import torch

import lora_lab as ll
from lora_lab.ablation import fit_packed, studies
from lora_lab.ablation.packed import Run
from lora_lab.ablation.packing import shares
from lora_lab.costs.fake import copy_sharing_weights
from lora_lab.costs.setup import Setup
from lora_lab.models import shapes
from lora_lab.tasks import Examples, Task

RANKS, SEEDS, STEPS, PICTURES = (1, 2, 4, 8, 16), 4, 200, 32
ADAPTERS, TOKENS, LLM_STEPS = 8, 64, 3
METHOD = ll.LoRA(8, 16)


def compare(calls: dict[str, Callable[[], object]], rounds: int, unit: str) -> None:
    """Time each in turn; print seconds, and the speed-up over each baseline (the calls with a star)."""
    seconds = common.interleaved(calls, rounds)
    baselines = [name for name in calls if name.endswith("*")]
    for name, times in seconds.items():
        speedups = []
        for baseline in baselines:
            ratios = sorted(base / time for base, time in zip(seconds[baseline], times, strict=True))
            speedups.append(f"{statistics.median(ratios):5.2f}x [{ratios[0]:.2f}-{ratios[-1]:.2f}]")
        print(f"  {name:<44}{statistics.median(times):8.3f} s {unit}   {'   '.join(speedups)}", flush=True)


def half(base: torch.nn.Module, task: Task, runs: list[Run], options: dict) -> None:
    """Train a worker's half of the trials."""
    torch.set_num_threads(1)
    fit_packed(base, task, runs, **options)


def digits(rounds: int) -> None:
    """Twenty adapters of a small net."""
    base, task = studies.study("digits")
    runs = [Run(ll.LoRA(rank, 2 * rank), 1e-2, seed) for rank in RANKS for seed in range(SEEDS)]
    options = {"steps": STEPS, "batch_size": PICTURES, "eval_every": STEPS, "progress": False}

    def sequential() -> None:
        for run in runs:
            ll.fit(copy.deepcopy(base), task, run.method, lr=run.lr, seed=run.seed, **options)

    torch.set_num_threads(1)
    print(f"\ndigits: {len(runs)} trials, {STEPS} steps of {PICTURES}")
    with joblib.Parallel(2) as workers:  # started once, so that their start does not count
        calls = {
            "one after another, 1 thread*": sequential,
            "packed, 1 thread": lambda: fit_packed(base, task, runs, **options),
            "packed, two halves in 2 processes": lambda: workers(
                joblib.delayed(half)(base, task, part, options) for part in shares(base, runs, 2, len(runs))
            ),
        }
        compare(calls, rounds, "a sweep")


class Packs:
    """A language model and a task that stay in this process, and packs of adapters on it."""

    in_this_process: Packs

    def __init__(self, device: torch.device, threads: int) -> None:
        torch.set_num_threads(threads)
        with device:
            self.base = ll.Llama(shapes.config("smollm2-135m"))
        ids = torch.randint(49152, (64, TOKENS + 1), generator=torch.Generator().manual_seed(0))
        self.examples = Examples(ids[:, :-1], ids[:, 1:])
        few = self.examples[:1]
        self.task = Task("tokens", self.examples, few, few, few, unit="tokens")

    def step_s(self, count: int) -> float:
        """Seconds of one step of ``count`` adapters."""
        runs = [Run(METHOD, 1e-4, seed) for seed in range(count)]
        options = {"steps": LLM_STEPS, "batch_size": 1, "eval_every": LLM_STEPS, "progress": False}
        history = fit_packed(self.base, self.task, runs, **options)[0].history
        return count * statistics.median(row["seconds"] for row in history.rows[1:])


def prepare_worker() -> None:
    """Load the model in a worker."""
    Packs.in_this_process = Packs(torch.device("cpu"), 1)


def worker_step_s(count: int) -> float:
    """Seconds of one step of ``count`` adapters, in a worker."""
    return Packs.in_this_process.step_s(count)


def smollm2(rounds: int) -> None:
    """Eight adapters of a language model."""
    device, threads = ll.pick_device()[0], torch.get_num_threads()
    packs = Packs(device, threads)
    base, examples = packs.base, packs.examples
    batch = tuple(part[:1].to(device) for part in (examples.inputs, examples.targets))
    steps = []
    for _ in range(ADAPTERS):
        model = copy_sharing_weights(base)  # shares the frozen weights
        steps.append(Setup(METHOD).step(model))
    pool = ThreadPoolExecutor(2)

    def all_in_turn() -> None:
        torch.set_num_threads(threads)
        for step in steps:
            step([batch], [1.0])

    def on_one_thread(step) -> None:
        torch.set_num_threads(1)
        step([batch], [1.0])

    def two_at_a_time() -> None:
        list(pool.map(on_one_thread, steps))
        torch.set_num_threads(threads)

    def packed_in_processes() -> float:
        return max(workers.map(worker_step_s, [ADAPTERS // 2] * 2))

    print(f"\nsmollm2 on {device}: {ADAPTERS} adapters of rank 8, 1 x {TOKENS} tokens each, {threads} threads")
    calls = {
        "one after another*": all_in_turn,
        "two at a time, 1 thread each*": two_at_a_time,
        "packed": lambda: packs.step_s(ADAPTERS),
    }
    if device.type == "cuda":
        compare(calls, rounds, "a step of all")
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=prepare_worker) as workers:
        compare({**calls, "two packs in 2 processes": packed_in_processes}, rounds, "a step of all")


def main() -> None:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["digits", "smollm2"], default=["digits", "smollm2"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    common.print_machine()
    threads = torch.get_num_threads()
    if "digits" in options.only:
        digits(options.rounds)
    torch.set_num_threads(threads)
    if "smollm2" in options.only:
        smollm2(options.rounds)


if __name__ == "__main__":
    main()
