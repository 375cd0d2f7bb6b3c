"""What each merge does to a QLoRA model: its loss, and how far its logits move.

    python benchmarks/qlora_merge.py [--steps 40] [--lr 1e-3] [--seeds 0 1 2] [--limit 64]

SmolLM2-135M is put into NF4 with double quantisation and fine-tuned by LoRA r=8 on Python's manual (4 x 64 tokens a
step). Then copies of it are merged into the dequantised weights, into blocks again, and into the weights before they
were put into NF4. (These come from the 4-bit file in which the model ships; here they are the full precision that there
is.) The last of these models is also put into NF4, which is another model in blocks. Printed are the validation losses,
those of the two bases, and the largest difference of a logit from the model as trained, over 8 validation examples.
About 6 minutes on 2 cores; the model must be in the cache (`lora-lab fetch`).
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
AGAIN = "full-precision, then NF4"


def quantized(model: ll.Llama) -> ll.Llama:
    """A copy in NF4 with double quantisation."""
    twin = copy.deepcopy(model)
    ll.quantize_nf4(twin)
    return twin


@torch.no_grad()
def logits(model: ll.Llama, inputs: Tensor) -> Tensor:
    """Of the model without dropout: (8, 64) -> (8, 64, 49152)."""
    return ll.task.logits(model.eval(), inputs)


def merged_models(model: ll.Llama, full: ll.Llama) -> dict[str, ll.Llama]:
    """A copy of a model with adapters for each form of merging, and one that was put into NF4 after the last."""
    models = {}
    for form in FORMS:
        models[form] = copy.deepcopy(model)
        ll.merge(models[form], into=form, base=full if form == "full-precision" else None)
    return models | {AGAIN: quantized(models["full-precision"])}


def main() -> None:
    """Run all seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=64, help="validation examples")
    options = parser.parse_args()
    common.print_machine()
    full, tokenizer = ll.load_pretrained()
    task = ll.tasks.docs(tokenizer, seq_len=64)
    inputs = task.validation[slice(0, 8)].inputs.to(next(full.parameters()).device)  # (8, 64)
    bases = {"base": full, "base in NF4": quantized(full)}
    base_losses = {name: ll.evaluate(base, task, limit=options.limit) for name, base in bases.items()}
    all_losses, all_distances = [], []
    training = {"steps": options.steps, "lr": options.lr, "batch_size": 4, "eval_every": options.steps}
    for seed in options.seeds:
        model = quantized(full)
        ll.fit(model, task, ll.LoRA(rank=8, alpha=16), seed=seed, eval_examples=1, **training)
        models = {"as trained": model, **merged_models(model, full)}
        losses = base_losses | {name: ll.evaluate(each, task, limit=options.limit) for name, each in models.items()}
        trained = logits(model, inputs)  # (8, 64, 49152)
        all_losses.append(losses)
        all_distances.append({name: float((logits(e, inputs) - trained).abs().max()) for name, e in models.items()})
        print(f"seed {seed}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()), flush=True)
    print(
        f"\n{'':<26}{'validation loss, median':<26}{'minus as trained, each seed':<32}largest change of a logit, median"
    )
    for name in all_losses[0]:
        differences = " ".join(f"{losses[name] - losses['as trained']:+.4f}" for losses in all_losses)
        change = "" if name in bases else f"{statistics.median(each[name] for each in all_distances):.2g}"
        print(f"{name:<26}{statistics.median(each[name] for each in all_losses):<26.4f}{differences:<32}{change}")


if __name__ == "__main__":
    main()
