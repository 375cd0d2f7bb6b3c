"""What packing an ablation saves, as a user calls it, on the digits net and on a model of SmolLM2-135M's shape.

    python benchmarks/ablation.py [--only digits smollm2 study verdicts] [--rounds 3] [--steps 300]

    digits     `ablate` on 20 trials (ranks 1, 2, 4, 8, 16 x 4 seeds), 32 pictures a step, everything included (fresh
               folder, fingerprints, memory, evaluations, files): separate on one thread (the baseline), packed on one
               thread, packed in two processes, which are started before
    smollm2    8 adapters of rank 8, one sequence of 64 tokens each: seconds for one step of all of them, one after
               another on two threads (the first baseline), two at a time on a thread each (the fair one), packed, and
               packed with the lean step, in float32 and over a base in bfloat16
    study      a third of the trials of the recorded study of ranks (`lora-lab record ablation`: one seed of three), on
               the real model, with a tenth of their steps and evaluations: without the lean step (the baseline), with
               it, and over a base in bfloat16; minutes a sweep, and without a first round
    verdicts   not a timing, and only if named: all of the recorded study over a base in bfloat16, half an hour on two
               cores, and which rank is enough by it and by the record, whose base is in float32

Rounds are interleaved, and medians of ratios are printed, with the extremes. Weights of smollm2 are random.
On a CUDA GPU the language model is packed there (never tried).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import common
import torch

import lora_lab as ll
from lora_lab import records
from lora_lab.ablation import Trial, ablate, fit_packed, materials, smallest_sufficient_rank
from lora_lab.costs.fake import copy_sharing_weights
from lora_lab.costs.setup import Setup
from lora_lab.models import shapes
from lora_lab.studies import spectra as recorded
from lora_lab.tasks import Examples, Task

PARTS = ("digits", "smollm2", "study")  # those run if none is named
MARGINS = (0.005, 0.01, 0.02, 0.05)  # nats
RANKS, SEEDS = (1, 2, 4, 8, 16), 4
ADAPTERS, TOKENS, LLM_STEPS = 8, 64, 3
METHOD = ll.LoRA(8, 16)


def compare(calls: dict[str, Callable[[], object]], rounds: int, unit: str, warm_up: bool = True) -> None:
    """Time each in turn; print seconds, and the speed-up over each baseline (the calls with a star)."""
    seconds = common.interleaved(calls, rounds, warm_up)
    baselines = [name for name in calls if name.endswith("*")]
    for name, times in seconds.items():
        speedups = []
        for baseline in baselines:
            ratios = sorted(base / time for base, time in zip(seconds[baseline], times, strict=True))
            speedups.append(f"{statistics.median(ratios):5.2f}x [{ratios[0]:.2f}-{ratios[-1]:.2f}]")
        print(f"  {name:<44}{statistics.median(times):8.3f} s {unit}   {'   '.join(speedups)}", flush=True)


def sweep(*arguments: object, **options: object) -> None:
    """Call ``ablate`` with a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        ablate(*arguments, folder, progress=False, **options)


def digits(rounds: int, steps: int) -> None:
    """Twenty adapters of a small net."""
    model, task = materials.get("digits")
    trials = materials.grid("digits", "lora", RANKS, [1e-2], range(SEEDS), steps=steps, alpha_per_rank=2)
    torch.set_num_threads(1)
    print(f"\ndigits: {len(trials)} trials, {steps} steps of {trials[0].batch_size}")
    calls = {
        "separate, 1 thread*": lambda: sweep(model, task, trials, engine="separate"),
        "packed, 1 thread": lambda: sweep(model, task, trials),
        "packed, 2 processes": lambda: sweep(model, task, trials, n_jobs=2),
    }
    compare(calls, rounds, "a sweep")


def list_trials(planned: dict, lean: ll.Lean | None) -> list[Trial]:
    """The trials of a study of ranks by that step."""
    sweep = recorded.plan_ablation(planned, lean)
    return [sweep.trial(setup, lr, seed) for setup, lrs in sweep.lrs.items() for lr in lrs for seed in sweep.judging]


def study(rounds: int) -> None:
    """A third of the recorded study."""
    device = ll.device.pick_device()[0]
    planned = recorded.plan(device)
    fewer = {"seeds": 1, "steps": planned["steps"] // 10, "eval_examples": planned["eval_examples"] // 10}
    trials = partial(list_trials, planned | fewer)
    model, task = materials.get("docs", planned["seq_len"], device)
    jobs = materials.processes(device)
    print(f"\nstudy on {device}: {len(trials(None))} trials, {fewer['steps']} steps, {jobs} processes")
    calls = {
        "not lean*": lambda: sweep(model, task, trials(None), n_jobs=jobs),
        "lean": lambda: sweep(model, task, trials(ll.Lean()), n_jobs=jobs),
        "lean, base in bfloat16": lambda: sweep(model, task, trials(ll.Lean(torch.bfloat16)), n_jobs=jobs),
    }
    compare(calls, rounds, "a sweep", warm_up=False)


def verdicts(folder: str = "runs/ablation-bf16") -> None:
    """The whole recorded study over a base in bfloat16, beside the record."""
    device = torch.device("cpu")
    planned = recorded.plan(device)
    model, task = materials.get("docs", planned["seq_len"], device)
    jobs = materials.processes(device)
    trials = list_trials(planned, ll.Lean(torch.bfloat16))
    print(f"\nverdicts: {len(trials)} trials over a base in bfloat16 (about half an hour on two cores)", flush=True)
    over_bf16 = ablate(model, task, trials, folder, n_jobs=jobs)
    shipped = next(record for record in records.load_all("ablation").values() if record.facts["device"] == "cpu")
    for margin in MARGINS:
        for base, frame in (("float32", shipped.frame()), ("bfloat16", over_bf16)):
            verdict = smallest_sufficient_rank(frame, margin)
            print(f"\nbase in {base}: {verdict}")


class Packs:
    """A language model and a task that stay in this process, and packs of adapters on it."""

    def __init__(self, device: torch.device, threads: int) -> None:
        torch.set_num_threads(threads)
        with device:
            self.base = ll.Llama(shapes.config("smollm2-135m"))
        ids = torch.randint(49152, (64, TOKENS + 1), generator=torch.Generator().manual_seed(0))
        self.examples = Examples(ids[:, :-1], ids[:, 1:])
        few = self.examples[:1]
        self.task = Task("tokens", self.examples, few, few, few, unit="tokens")

    def step_s(self, lean: ll.Lean | None = None) -> float:
        """Seconds of one step of all adapters."""
        options = {"steps": LLM_STEPS, "batch_size": 1, "eval_every": LLM_STEPS, "lean": lean}
        trials = [Trial(METHOD, 1e-4, seed, **options) for seed in range(ADAPTERS)]
        history = fit_packed(self.base, self.task, trials)[0].history
        return ADAPTERS * statistics.median(row["seconds"] for row in history.rows[1:])


def smollm2(rounds: int) -> None:
    """Eight adapters of a language model."""
    device, threads = ll.device.pick_device()[0], torch.get_num_threads()
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

    print(f"\nsmollm2 on {device}: {ADAPTERS} adapters of rank 8, 1 x {TOKENS} tokens each, {threads} threads")
    calls = {
        "one after another*": all_in_turn,
        "two at a time, 1 thread each*": two_at_a_time,
        "packed": packs.step_s,
    }
    if device.type != "cuda":
        calls |= {
            "packed, lean": lambda: packs.step_s(ll.Lean()),
            "packed, lean, base in bfloat16": lambda: packs.step_s(ll.Lean(torch.bfloat16)),
        }
    compare(calls, rounds, "a step of all")


def main() -> None:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*PARTS, "verdicts"), default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of each trial of digits")
    options = parser.parse_args()
    common.print_machine()
    threads = torch.get_num_threads()
    if "digits" in options.only:
        digits(options.rounds, options.steps)
    torch.set_num_threads(threads)
    if "smollm2" in options.only:
        smollm2(options.rounds)
    if "study" in options.only:
        study(options.rounds)
    if "verdicts" in options.only:
        verdicts()


if __name__ == "__main__":
    main()
