"""What QLoRA costs in time: a lean step over 4-bit blocks against the same step over float32.

    python benchmarks/qlora_price.py [--rounds 5] [--widths 256 512 1024 2048] [--only step width]

    step    SmolLM2-135M, LoRA r=8, 4 sequences of 128 tokens, threads=2: over GGUF's blocks (Q4_1, head in Q8_0), and
            over NF4 with double quantisation, each without and with checkpoints
    width   two blocks of a random Llama of each width, 512 tokens, over NF4: dequantising takes a time for each weight,
            a matrix multiplication one for each weight and token, so that the price should not depend on the width

Aim: at most 1.3 times the time of float32. Steps are interleaved; printed are medians of ratios with the extremes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Callable

import common
import torch

import lora_lab as ll
from lora_lab.lean import Lean
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.models.quantize import quantize_nf4
from lora_lab.task import cross_entropy
from lora_lab.train import TrainConfig, make_step

SEQUENCES, TOKENS, THREADS = 4, 128, 2


def stepper(model: torch.nn.Module, checkpoint: bool) -> Callable[[], object]:
    """A lean step of a model on random tokens, half of the sequences in each thread."""
    config = TrainConfig(lr=1e-5, steps=1, lean=Lean(checkpoint=checkpoint, threads=THREADS))
    step = make_step(model.train(), cross_entropy, ll.LoRA(8, 16), config)
    vocabulary = model.get_submodule("model.embed_tokens").weight.shape[0]
    shape = SEQUENCES // THREADS, TOKENS + 1
    parts = [torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed)) for seed in range(THREADS)]
    batches = [(ids[:, :-1], ids[:, 1:]) for ids in parts]
    return functools.partial(step, batches, [1 / THREADS] * THREADS)


def compare(calls: dict[str, Callable[[], object]], baseline: str, rounds: int) -> None:
    """Time each in turn, and print ratios to the baseline."""
    seconds = common.interleaved(calls, rounds)
    for name, taken in seconds.items():
        ratios = sorted(own / base for own, base in zip(taken, seconds[baseline], strict=True))
        print(f"  {name:<28}{statistics.median(taken):7.3f} s   {statistics.median(ratios):.2f} of {baseline}"
              f"   [{ratios[0]:.2f}-{ratios[-1]:.2f}]", flush=True)  # fmt: skip


def whole_step(rounds: int) -> None:
    """The real model."""
    for checkpoint in (False, True):
        dense, _ = ll.load_pretrained(device="cpu")
        blocks, _ = ll.load_pretrained(device="cpu", keep_blocks=True)
        nf4 = copy.deepcopy(dense)
        quantize_nf4(nf4)
        print(f"\nSmolLM2-135M, {SEQUENCES} x {TOKENS} tokens{', with checkpoints' if checkpoint else ''}")
        models = {"float32": dense, "blocks (Q4_1, head Q8_0)": blocks, "NF4, double quantisation": nf4}
        compare({name: stepper(model, checkpoint) for name, model in models.items()}, "float32", rounds)


def by_width(widths: list[int], rounds: int) -> None:
    """Random models of two blocks and a small vocabulary."""
    for width in widths:
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 64 * 64,
            num_hidden_layers=2,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            head_dim=64,
        )
        dense = Llama(config)
        nf4 = copy.deepcopy(dense)
        quantize_nf4(nf4)
        print(f"\ntwo blocks of width {width}, {SEQUENCES * TOKENS} tokens")
        compare({"float32": stepper(dense, False), "NF4": stepper(nf4, False)}, "float32", rounds)


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--only", nargs="+", choices=["step", "width"], default=["step", "width"])
    options = parser.parse_args()
    common.print_machine(torch.device("cpu"))
    if "step" in options.only:
        whole_step(options.rounds)
    if "width" in options.only:
        by_width(options.widths, options.rounds)


if __name__ == "__main__":
    main()
