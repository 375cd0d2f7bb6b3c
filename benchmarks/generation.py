"""Tokens a second that SmolLM2-135M generates greedily, with a cache of keys and values.

    python benchmarks/generation.py [--tokens 48] [--rounds 5] [--threads 2]

    transformers     the same weights, ``generate``
    dense            our Llama in float32
    4-bit blocks     load_pretrained(keep_blocks=True)
    adapters on      LoRA r=8 on all linear layers of the dense model
    adapters off     the same, inside ``adapters.off``
    merged           the same, merged: what "no additional inference latency" (Hu et al. 2021, section 4.1) is said of

Aims: dense at least as fast as transformers; blocks at most 1.5 times slower than dense. Calls are interleaved, and
medians of ratios to dense are printed with the extremes. The model must be in the cache (`lora-lab fetch`).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable

import common
import torch

import lora_lab as ll
from lora_lab.adapters import off

PROMPT = "Write one sentence about the sea, and one about the mountains."


def transformers_model(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights in transformers' Llama."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        ll.save_model(model, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for parameter in theirs.parameters():  # else they would be read from the file at each use
            parameter.data = parameter.data.clone()
    return theirs.eval()


def calls(tokens: int) -> dict[str, Callable[[], list[int]]]:
    """What to time: each returns the new tokens."""
    model, tokenizer = ll.load_pretrained(device="cpu")
    blocks, _ = ll.load_pretrained(device="cpu", keep_blocks=True)
    ids = torch.tensor(tokenizer.encode(tokenizer.chat([{"role": "user", "content": PROMPT}])))
    theirs, adapted = transformers_model(model), copy.deepcopy(model)
    ll.inject(adapted, ll.LoRAConfig(rank=8))
    with torch.no_grad():
        for layer in ll.lora_layers(adapted).values():
            layer.lora_B.normal_(std=1e-3, generator=torch.Generator().manual_seed(0))
    merged = copy.deepcopy(adapted)
    ll.merge(merged)

    def by_transformers() -> list[int]:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        return theirs.generate(ids[None], **options)[0, len(ids) :].tolist()

    def without_adapters() -> list[int]:
        with off(adapted):
            return adapted.generate(ids, tokens).tolist()

    return {
        "transformers": by_transformers,
        "dense": lambda: model.generate(ids, tokens).tolist(),
        "4-bit blocks": lambda: blocks.generate(ids, tokens).tolist(),
        "adapters on": lambda: adapted.generate(ids, tokens).tolist(),
        "adapters off": without_adapters,
        "merged": lambda: merged.generate(ids, tokens).tolist(),
    }


def main() -> None:
    """Time each in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    common.print_machine(torch.device("cpu"))
    timed = calls(options.tokens)
    same = timed["transformers"]() == timed["dense"]() == timed["4-bit blocks"]() == timed["adapters off"]()
    print(f"the same {options.tokens} tokens from transformers, dense, in blocks, and with adapters off: {same}\n")
    seconds = common.interleaved(timed, options.rounds)
    print(f"{'':<16}{'tokens a second':>16}{'time, of dense':>16}")
    for name, taken in seconds.items():
        ratios = sorted(own / dense for own, dense in zip(taken, seconds["dense"], strict=True))
        print(
            f"{name:<16}{options.tokens / statistics.median(taken):>16.1f}{statistics.median(ratios):>16.2f}"
            f"   [{ratios[0]:.2f}-{ratios[-1]:.2f}]"
        )


if __name__ == "__main__":
    main()
