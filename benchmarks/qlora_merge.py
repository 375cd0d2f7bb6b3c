"""What each of the three merges does to a QLoRA model: its loss, and how far its logits move.

    python benchmarks/qlora_merge.py [--steps 40] [--seeds 0 1 2] [--lr 1e-3]

SmolLM2-135M is put into NF4 with double quantisation and fine-tuned by LoRA r=8 on Python's manual (4 x 64 tokens a
step). Then copies of it are merged into the dequantised weights, into blocks again, and into the weights before they
were put into NF4. (These come from the 4-bit file in which the model ships; here they are the full precision that there
is.) Printed are the validation losses, those of the two bases, and the largest difference of a logit from the model as
trained, over 8 validation examples. About 6 minutes on 2 cores; the model must be in the cache (`lora-lab fetch`).
"""

from __future__ import annotations

import argparse
import copy
import statistics

import common
import torch
from torch import Tensor

import lora_lab as ll

FORMS = ("dequantised", "blocks", "full-precision")


def losses_and_distances(seed: int, steps: int, lr: float) -> tuple[dict[str, float], dict[str, float]]:
    """Validation losses of bases, trained model and merged ones; and the largest change of a logit by each merge."""
    full, tokenizer = ll.load_pretrained()
    task = ll.tasks.docs(tokenizer, seq_len=64)
    inputs = task.validation[slice(0, 8)].inputs.to(next(full.parameters()).device)  # (8, 64)
    model = copy.deepcopy(full)
    ll.quantize_nf4(model)
    losses = {"base": ll.evaluate(full, task), "base in NF4": ll.evaluate(model, task)}
    options = {"eval_every": steps, "eval_examples": 1}  # the whole part is evaluated below
    ll.fit(model, task, ll.LoRA(rank=8, alpha=16), steps=steps, lr=lr, batch_size=4, seed=seed, **options)
    losses["as trained"] = ll.evaluate(model, task)
    trained, distances = _logits(model, inputs), {}  # (8, 64, 49152)
    for form in FORMS:
        merged = copy.deepcopy(model)
        ll.merge(merged, into=form, base=full if form == "full-precision" else None)
        losses[form] = ll.evaluate(merged, task)
        distances[form] = float((_logits(merged, inputs) - trained).abs().max())
    return losses, distances


@torch.no_grad()
def _logits(model: ll.Llama, inputs: Tensor) -> Tensor:
    return ll.task.logits(model.eval(), inputs)  # (8, 64) -> (8, 64, 49152)


def main() -> None:
    """Run all seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    common.print_machine()
    all_losses, all_distances = [], []
    for seed in options.seeds:
        losses, distances = losses_and_distances(seed, options.steps, options.lr)
        all_losses.append(losses)
        all_distances.append(distances)
        shown = [f"{name} {loss:.4f}" for name, loss in losses.items()]
        shown += [f"logits {name} {distance:.3g}" for name, distance in distances.items()]
        print(f"seed {seed}: " + ", ".join(shown), flush=True)
    print(f"\n{'':<16} validation loss, median    minus as trained, each seed    largest change of a logit, median")
    for name in all_losses[0]:
        differences = " ".join(f"{losses[name] - losses['as trained']:+.4f}" for losses in all_losses)
        change = "" if name not in FORMS else f"{statistics.median(each[name] for each in all_distances):.3g}"
        print(f"{name:<16} {statistics.median(each[name] for each in all_losses):<26.4f} {differences:<30} {change}")


if __name__ == "__main__":
    main()
