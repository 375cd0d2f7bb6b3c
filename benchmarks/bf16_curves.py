"""Does a frozen base in bfloat16 learn as one in float32 does?

    python benchmarks/bf16_curves.py [--steps 100] [--seeds 0 1 2] [--picture FILE.png]

For each seed (adapter's start and order of data) SmolLM2-135M is fine-tuned by LoRA r=8 twice, with
``Lean(threads=2)`` and with ``Lean(base_dtype=torch.bfloat16, threads=2)``; all else is the same. Quoted
are the distances of the two curves beside the distance between seeds, which is what a difference has to be
measured against. About 15 minutes on 2 cores; the model must be in the cache (`lora-lab fetch`).
"""

from __future__ import annotations

import argparse
import statistics

import torch

import lora_lab as ll

BASES = {"float32": None, "bfloat16": torch.bfloat16}


def run(dtype: torch.dtype | None, seed: int, steps: int) -> ll.history.History:
    """One fine-tuning on Python's manual, 4 x 64 tokens a step."""
    model, tokenizer = ll.load_pretrained()
    threads = 2 if next(model.parameters()).device.type == "cpu" else 1
    return ll.fit(
        model,
        ll.tasks.docs(tokenizer, seq_len=64),
        ll.LoRA(rank=8, alpha=16),
        steps=steps,
        lr=1e-3,
        batch_size=4,
        seed=seed,
        eval_every=max(1, steps // 5),
        eval_examples=32,
        lean=ll.Lean(base_dtype=dtype, threads=threads),
    )


def picture(histories: dict[str, dict[int, ll.history.History]], path: str) -> None:
    """Both curves of each seed."""
    figure = ll.plots.curves(
        {f"{base}, seed {seed}": history for base, runs in histories.items() for seed, history in runs.items()},
    ).figure
    ll.plots.save(figure, path)


def main() -> None:
    """Run all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--picture")
    options = parser.parse_args()
    histories: dict[str, dict[int, ll.history.History]] = {base: {} for base in BASES}
    for seed in options.seeds:
        for base, dtype in BASES.items():
            histories[base][seed] = run(dtype, seed, options.steps)
            losses = histories[base][seed].curve("validation_loss")[1]
            print(f"seed {seed}, {base:<9} validation loss " + " ".join(f"{loss:.4f}" for loss in losses), flush=True)
    for column in ("train_loss", "validation_loss"):
        curves = {base: [runs[seed].curve(column)[1] for seed in options.seeds] for base, runs in histories.items()}
        gaps = [
            abs(one - other)
            for first, second in zip(curves["float32"], curves["bfloat16"], strict=True)
            for one, other in zip(first, second, strict=True)
        ]
        spread = [max(values) - min(values) for values in zip(*curves["float32"], strict=True)]
        print(
            f"{column:<16} |bfloat16 - float32|: median {statistics.median(gaps):.4f}, largest {max(gaps):.4f}; "
            f"between seeds (highest - lowest): median {statistics.median(spread):.4f}"
        )
    if options.picture:
        picture(histories, options.picture)


if __name__ == "__main__":
    main()
