"""Does the cost model predict whether LoRA is faster, before any training? Predicted beside measured ratios.

    python benchmarks/cost_model.py [--models digits small smollm2-135m] [--tokens 32 128 512 2048 4096]
                                    [--ranks 1 8 64 256] [--only grid rank blocks] [--threads 1 2] [--quick]

The grid: the time of a LoRA step over that of full fine-tuning, by `lora_lab.speed.cost_model().predict` (no step is
taken) and by `lora_lab.speed.step_time` (variants in turn in one process, medians of ratios round by round), and
beside the ratios the times themselves, which are harder to predict: what all variants share does not cancel. Then
two points, found by counting or by prediction and confirmed by another count or by measuring:

    rank      the highest at which LoRA has no more FLOPs than full fine-tuning; confirmed by torch's FlopCounterMode
    blocks    what it saves to adapt the top blocks only

A step is forward, backward, clipping to norm 1 and fused AdamW, in float32, with random weights and tokens. Waiting
threads sleep (OMP_WAIT_POLICY=passive) and the heap keeps what it has, as in `benchmarks/lora_step.py`. Each number of
threads has a process of its own. A whole run takes about 20 minutes for each of them on two cores, 20 GB of memory,
and a quiet machine: where others worked meanwhile, it says so. It can be run in parts, such as one model and one
number of threads at a time. On a CUDA GPU it runs in the same manner, which nobody has tried yet.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import common

BATCHES = {32: (1, 32), 128: (1, 128), 512: (4, 128), 2048: (4, 512), 4096: (8, 512)}  # tokens -> sequences, length
SMALL = dict(vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
             num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)  # fmt: skip
ACCURACY = 0.15
ALIKE = 0.03  # ratios as near to 1 as this have no sign


def factory(name: str) -> Callable:
    """A function that builds the model."""
    from lora_lab.models.digits import DigitsMLP
    from lora_lab.models.llama import Llama, LlamaConfig
    from lora_lab.models.shapes import config

    if name == "digits":
        return DigitsMLP
    return partial(Llama, LlamaConfig(**SMALL) if name == "small" else config(name))


def batch(name: str, tokens: int) -> dict:
    """The batch, as keywords of predict, flops and step_time."""
    import torch

    if name == "digits":
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(tokens, 64, generator=generator)
        return {"batch": (pixels, torch.randint(10, (tokens,), generator=generator))}
    sequences, length = BATCHES[tokens]
    return {"batch_size": sequences, "seq_len": length}


def variants(name: str, tokens: int, ranks: list[int]) -> dict:
    """Full fine-tuning first, then LoRA by rank, then on the last block alone."""
    from lora_lab import FullFineTuning, LoRA

    large = name == "smollm2-135m" and tokens > 512
    chosen = [rank for rank in ranks if rank in (8, 256)] if large else ranks
    methods = {"full": FullFineTuning(), **{f"r={rank}": LoRA(rank, 2.0 * rank) for rank in chosen}}
    if name != "digits":
        methods["r=8, last block"] = LoRA(8, targets=top(name, 1))
    return methods


def top(name: str, blocks: int) -> list[str]:
    """The linear layers of the last blocks."""
    import torch

    from lora_lab.costs.fake import last_blocks

    with torch.device("meta"):
        return last_blocks(factory(name)(), blocks)


def rounds(name: str, tokens: int, quick: bool) -> int:
    """How often each variant is timed."""
    if name != "smollm2-135m":
        return 6 if quick else 15
    return 3 if tokens > 512 else 6 if quick else 9


@dataclass(frozen=True)
class Result:
    """One variant on one model and batch: the ratios to full fine-tuning, and the seconds."""

    case: str
    predicted: float
    measured: float
    interval: tuple[float, float]
    predicted_s: float
    measured_s: float
    disturbed: bool

    @property
    def error(self) -> float:
        """The relative error of the prediction."""
        return self.predicted / self.measured - 1

    @property
    def error_s(self) -> float:
        """The relative error of the predicted seconds."""
        return self.predicted_s / self.measured_s - 1

    @property
    def signed(self) -> bool:
        """Whether the measurement shows which of the two is faster."""
        low, high = self.interval
        return (low > 1 or high < 1) and abs(self.measured - 1) > ALIKE

    @property
    def right(self) -> bool:
        """Whether the prediction says the same."""
        return (self.predicted > 1) == (self.measured > 1)


def grid(costs, models: list[str], tokens: list[int], ranks: list[int], quick: bool) -> Iterator[Result]:
    """Predict and measure case by case, and print each."""
    from lora_lab import speed

    for name in models:
        for size in tokens:
            chosen = variants(name, size, ranks)
            predicted = costs.predict(factory(name), chosen, **batch(name, size))
            times = speed.step_time(factory(name), chosen, **batch(name, size), rounds=rounds(name, size, quick))
            print(
                f"\n{name}, {size} tokens: full {milliseconds(predicted.total_s('full'), times.median_s('full'))}. "
                f"{times.disturbance}"
            )
            for doubt in predicted.doubts:
                print(f"  {doubt}")
            for variant in list(chosen)[1:]:
                ratios = sorted(times.ratios(variant))
                interval = times.interval(variant) or (ratios[0], ratios[-1])
                result = Result(
                    f"{name}, {size} tokens, {variant}",
                    predicted.ratio(variant),
                    times.ratio(variant),
                    interval,
                    predicted.total_s(variant),
                    times.median_s(variant),
                    bool(times.disturbance),
                )
                print(
                    f"  {variant:<18}predicted {result.predicted:6.3f}   measured {result.measured:6.3f} "
                    f"[{interval[0]:.3f}-{interval[1]:.3f}]   {result.error:+6.1%}   "
                    + milliseconds(result.predicted_s, result.measured_s)
                    + ("" if result.right or not result.signed else "   WRONG SIGN"),
                    flush=True,
                )
                yield result


def milliseconds(predicted_s: float, measured_s: float) -> str:
    """A predicted and a measured time, and the error."""
    error = predicted_s / measured_s - 1
    return f"predicted {predicted_s * 1e3:,.2f} ms, measured {measured_s * 1e3:,.2f} ms ({error:+.1%})"


def summary(results: list[Result]) -> None:
    """How good the predictions were."""
    print()
    for what, errors in {
        "ratios": {result.case: result.error for result in results},
        "times": {result.case: result.error_s for result in results},
    }.items():
        worst = max(errors, key=lambda case: abs(errors[case]))
        within = sum(abs(error) <= ACCURACY for error in errors.values())
        mean = sum(map(abs, errors.values())) / len(errors)
        print(f"{len(errors)} {what}: {within} within {ACCURACY:.0%} ({within / len(errors):.0%}), mean error", end=" ")
        print(f"{mean:.1%}, worst {errors[worst]:+.1%} ({worst})")
    signed = [result for result in results if result.signed]
    right = sum(result.right for result in signed)
    if signed:
        print(f"sign: {right} of {len(signed)} right, where the measurement tells ({right / len(signed):.0%})")
    if disturbed := sum(result.disturbed for result in results):
        print(f"{disturbed} of them were measured while other processes kept the machine busy")


def rank_point() -> None:
    """The rank above which LoRA has more FLOPs, by our count and by torch's own."""
    from lora_lab import FullFineTuning, LoRA, speed

    make = factory("smollm2-135m")
    rank = speed.break_even_rank(make, 1, 128)
    full = torch_count(make, FullFineTuning())
    beside = {r: torch_count(make, LoRA(r, 2.0 * r)) / full for r in (rank, rank + 1)}
    confirmed = beside[rank] <= 1 < beside[rank + 1]
    print(
        f"\nrank: LoRA on all linear layers of smollm2-135m has no more FLOPs up to r = {rank}; torch counts", end=" "
    )
    print(", ".join(f"{ratio:.4f} of full at {r}" for r, ratio in beside.items()), f"(confirmed: {confirmed})")


def torch_count(make: Callable, method) -> int:
    """FLOPs of a step by FlopCounterMode."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from lora_lab.costs.fake import batch_for, fake_copy
    from lora_lab.costs.setup import Setup

    setup = Setup(method)
    with fake_copy(make) as twin, sdpa_kernel(SDPBackend.MATH):
        parts, weights = setup.batches(batch_for(twin, 1, 128))
        step = setup.step(twin)
        with FlopCounterMode(display=False) as counter:
            step(parts, weights)
    return counter.get_total_flops()


def block_point(costs, name: str, tokens: int, quick: bool) -> None:
    """What adapting the top blocks saves, by FLOPs, by prediction and by the clock."""
    from lora_lab import LoRA, speed

    make, whole = factory(name), make_depth(name)
    depths = [whole, whole // 2, max(1, whole // 10), 1]
    chosen = {f"top {depth}": LoRA(8, targets=top(name, depth)) for depth in depths}
    predicted = costs.predict(make, chosen, **batch(name, tokens))
    times = speed.step_time(make, chosen, **batch(name, tokens), rounds=rounds(name, tokens, quick))
    counts = {label: speed.flops(make, method, **batch(name, tokens)).total for label, method in chosen.items()}
    print(f"\nblocks: {name}, {tokens} tokens, r=8 on the top n of {whole} blocks over all of them")
    for label in list(chosen)[1:]:
        print(
            f"  {label:<8} FLOPs {counts[label] / next(iter(counts.values())):.3f}   predicted "
            f"{predicted.ratio(label):.3f}   measured {times.ratio(label):.3f}   "
            f"{predicted.ratio(label) / times.ratio(label) - 1:+.1%}",
            flush=True,
        )


def make_depth(name: str) -> int:
    """How many blocks a model has."""
    import torch

    from lora_lab.costs.fake import transformer_blocks

    with torch.device("meta"):
        return len(transformer_blocks(factory(name)()))


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits", "small", "smollm2-135m"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 8, 64, 256])
    parts = ["grid", "rank", "blocks"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the environment is set
    options = parser.parse_args()
    if not options.here:
        command, failed = [sys.executable, __file__, "--here", *sys.argv[1:]], 0
        for threads in dict.fromkeys(options.threads):
            print(f"\n{'=' * 10} threads: {threads}", flush=True)
            environment = os.environ | common.KEEP_HEAP | {"OMP_NUM_THREADS": str(threads)}
            failed |= subprocess.run(command, env=environment, check=False).returncode
        sys.exit(failed)
    from lora_lab import speed

    common.print_machine()
    costs = speed.cost_model()
    print(f"\n{costs}", flush=True)
    if "grid" in options.only:
        summary(list(grid(costs, options.models, options.tokens, options.ranks, options.quick)))
    if "rank" in options.only:
        rank_point()
    if "blocks" in options.only:
        block_point(costs, "smollm2-135m", 512, options.quick)


if __name__ == "__main__":
    main()
