"""Does the cost model for cards that are not here agree with what others measured on them? Predicted beside published.

    python benchmarks/published.py [--only peft torchtune litgpt] [--methods NAME ...] [--no-memory]

`records/published` holds the measurements, with their sources. Nothing is measured here: steps are rehearsed on fake
tensors, and `lora_lab.speed.cards` gives their times from datasheets.

    peft        the step of PEFT's own benchmark (transformers' Llama 3.2 3B, PEFT's layers, AdamW by foreach), and the
                same methods on our Llama. Two shares of the L40S's rates are fitted, to the first two rows; every other
                row is predicted, beside a null: that it takes as long as the second. Then the memory that is
                allocated after a step, which has nothing fitted.
    torchtune   with the same shares, on an A100
    litgpt      with the same shares, on an A100

The aims: ratios of step times within 25 %, memory after a step within 5 %. Of PEFT's table the methods that
lora_lab has are taken, in about two minutes, and those named, such as vera; "all" names all, in about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import common  # noqa: F401, sets the environment before torch is imported
import scipy.optimize
import torch
from torch import Tensor, nn

from lora_lab import DoRA, FullFineTuning, LoRA, LoRAFA, RsLoRA, lora_layers, memory, records, speed
from lora_lab.costs.bill import Part
from lora_lab.costs.setup import Setup
from lora_lab.costs.timing import StepWork
from lora_lab.methods import AsItIs
from lora_lab.models import shapes
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.models.shapes import config_to_hf

TIME_AIM, MEMORY_AIM = 0.25, 0.05
BF16 = torch.bfloat16
ALPACA = 128
LENGTH = 210  # tokens in a sequence of PEFT's benchmark, whose steps have 839.6 in 4
QV, MLP = ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
OURS = {  # an experiment of PEFT's -> the same method of lora_lab's
    "full-finetuning/llama-3.2-3B-lr_0.00001": FullFineTuning(),
    "lora/llama-3.2-3B-rank32": LoRA(32, 64, targets=QV),
    "lora/llama-3.2-3B-rank64": LoRA(64, 128, targets=QV),
    "lora/llama-3.2-3B-rank64-rslora": RsLoRA(64, 64, targets=QV),
    "lora/llama-3.2-3B-rank10-target-mlp": LoRA(10, 20, targets=MLP),
    "lora/llama-3.2-3B-rank32-dora": DoRA(32, 64, targets=QV),
    "lora/llama-3.2-3B-rank32-lorafa": LoRAFA(32, 64, targets=QV),
}
FITTED = tuple(OURS)[:2]
LLAMA2 = {  # Touvron et al. 2023, arXiv 2307.09288
    "Llama 2 7B": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128),
    "Llama 2 13B": LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128),
}


@dataclass(frozen=True)
class HalfLoRA(LoRA):
    """LoRA with factors in bfloat16 as well, as torchtune and LitGPT have them."""

    def _prepare(self, model: nn.Module, seed: int) -> None:
        super()._prepare(model, seed)
        for layer in lora_layers(model).values():
            layer.lora_A, layer.lora_B = nn.Parameter(layer.lora_A.to(BF16)), nn.Parameter(layer.lora_B.to(BF16))


class HeldOutput:
    """The loss that a model of transformers computes; its output, with logits, keys and values, stays in memory."""

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        self.output = model(input_ids=inputs, labels=targets)
        return self.output.loss


def peft_model(row: Mapping) -> nn.Module:
    """The model of an experiment, ready to train, as PEFT's benchmark makes it."""
    import peft
    import transformers

    config = transformers.LlamaConfig(**config_to_hf(shapes.config("llama-3.2-3b"), BF16))
    model = transformers.LlamaForCausalLM(config).to(BF16)
    if row["peft_type"] is None:
        return model
    model = peft.get_peft_model(
        model, peft.get_peft_config({"peft_type": row["peft_type"], **json.loads(row["config"])})
    )
    if row["optimizer"] == "lora-fa":  # which freezes A
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    return model


def peft_setup() -> Setup:
    """How PEFT's benchmark trains it."""
    return Setup(AsItIs(), optimizer="adamw-foreach", loss=HeldOutput())


def fit(works: Sequence[StepWork], seconds: Sequence[float], card: str) -> list[float]:
    """The two shares, of matrix products and of the bandwidth, with which two steps take as long as measured."""

    def errors(shares: Sequence[float]) -> list[float]:
        predicted = [step_seconds(work, card, *shares) for work in works]
        return [one / other - 1 for one, other in zip(predicted, seconds, strict=True)]

    return scipy.optimize.root(errors, [0.5, 0.5]).x.tolist()


def step_seconds(work: StepWork, card: str, *shares: float) -> float:
    """The predicted time of a step."""
    return sum(work.seconds(speed.cards.roofline(speed.cards.card(card), *shares)).values())


def after_step_bytes(model: Callable[[], nn.Module], setup: Setup) -> int:
    """What is predicted to be allocated after a step of PEFT's benchmark."""
    bill = memory.predict(model, setup, 4, LENGTH, device="cuda")
    return bill.timeline[-1].total_bytes + bill.parts[Part.WORKSPACE]


def error(predicted: float, measured: float, aim: float) -> str:
    """The relative error, marked where it misses the aim."""
    return f"{predicted / measured - 1:+7.1%}{' ' if abs(predicted / measured - 1) <= aim else '!'}"


def peft_table(methods: Sequence[str], with_memory: bool) -> None:
    """PEFT's benchmark on an L40S: fit two rows, predict the others."""
    table = records.published("peft-metamathqa")
    rows = {row["experiment"]: row for row in table.rows}
    tokens = table.settings["tokens_per_step"]
    chosen = [name for name in rows if "all" in methods or name.partition("/")[0] in methods]
    names = list(dict.fromkeys([*OURS, *chosen]))
    measured = {name: tokens / rows[name]["tokens_per_second"] for name in names}
    costs = speed.cards.cost_model("l40s")
    works, bytes_after, skipped = {}, {}, {}
    for name in names:
        model = partial(peft_model, rows[name])
        try:
            works[name] = costs.predict(model, {name: peft_setup()}, 4, LENGTH).works[name]
            if with_memory:
                bytes_after[name] = after_step_bytes(model, peft_setup())
        except Exception as reason:  # of whatever method, on fake tensors
            if name in OURS:
                raise
            skipped[name] = f"{type(reason).__name__}: {str(reason).splitlines()[0][:80]}"
        print(f"\r{len(works) + len(skipped)} of {len(names)} rehearsed", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    fitted = fit([works[name] for name in FITTED], [measured[name] for name in FITTED], "l40s")
    print(f"\n{table.what}: {table.source}, {table.date}, {table.licence}")
    print(f"Fitted to two rows: {fitted[0]:.3f} of the rate of matrix multiplications, {fitted[1]:.3f} of the")
    print(f"bandwidth; lora_lab states {speed.cards.MATMUL_SHARE} and {speed.cards.MEMORY_SHARE}")
    print(f"{'':52}{'measured':>10}{'predicted':>10}{'':>9}{'ratio to full':>16}{'after a step, GB':>21}")
    full = measured[FITTED[0]]
    for name in sorted(works, key=measured.__getitem__):
        seconds = step_seconds(works[name], "l40s", *fitted)
        line = (
            f"{name + (' (fitted)' if name in FITTED else ''):52}{measured[name] * 1e3:7.1f} ms{seconds * 1e3:7.1f} ms"
        )
        line += f" {error(seconds, measured[name], TIME_AIM)}{measured[name] / full:8.3f}{seconds / full:8.3f}"
        if name in bytes_after:
            stated = rows[name]["mean_allocated_bytes"]
            line += f"{stated / 1e9:8.3f}{bytes_after[name] / 1e9:8.3f}{error(bytes_after[name], stated, MEMORY_AIM)}"
        print(line)
    for name, reason in skipped.items():
        print(f"{name:52}{measured[name] * 1e3:7.1f} ms   not rehearsed: {reason}")

    own = [name for name in works if name not in FITTED]
    errors = {name: step_seconds(works[name], "l40s", *fitted) / measured[name] - 1 for name in own}
    report("step times", errors, TIME_AIM)
    null = {name: measured[FITTED[1]] / measured[name] - 1 for name in own}
    report(f"without a model, all as long as {FITTED[1]}", null, TIME_AIM)
    if with_memory:
        report(
            "memory after a step",
            {name: size / rows[name]["mean_allocated_bytes"] - 1 for name, size in bytes_after.items()},
            MEMORY_AIM,
        )
    print("\nThe same methods on lora_lab's Llama, with the stated shares")
    setups = {name: Setup(method, BF16, optimizer="adamw-foreach") for name, method in OURS.items()}
    setups["full, fused AdamW"] = Setup(FullFineTuning(), BF16)
    predicted = costs.predict(partial(Llama, shapes.config("llama-3.2-3b")), setups, 4, LENGTH)
    for name in setups:
        seconds = predicted.total_s(name)
        beside = f"{measured[name] * 1e3:7.1f} ms" if name in measured else f"{'':10}"
        line = f"{name:52}{beside}{seconds * 1e3:7.1f} ms"
        print(line + (f" {error(seconds, measured[name], TIME_AIM)}" if name in measured else ""))


def report(what: str, errors: Mapping[str, float], aim: float) -> None:
    """How many of the predictions reach the aim, and the worst."""
    worst = max(errors, key=lambda name: abs(errors[name]))
    within = sum(abs(value) <= aim for value in errors.values())
    mean = sum(map(abs, errors.values())) / len(errors)
    print(f"{what}: {within} of {len(errors)} predicted within {aim:.0%}, mean error {mean:.1%}, ", end="")
    print(f"worst {errors[worst]:+.1%} ({worst})")


def torchtune_table(with_memory: bool) -> None:
    """torchtune's Llama 3.2 3B on an A100: nothing is fitted."""
    table = records.published("torchtune")
    print(f"\n{table.what}: {table.source}, {table.date}, {table.licence}; nothing fitted")
    rows = {row["technique"]: row for row in table.rows if row["model"] == "llama-3.2-3b"}
    model, tokens = partial(Llama, shapes.config("llama-3.2-3b")), 2 * 4096
    full = Setup(FullFineTuning(), BF16, optimizer="adamw-foreach", clip=None)
    checkpointing = replace(full, gradient_checkpointing=True)
    lora = replace(checkpointing, method=HalfLoRA(64, 128, targets=[*QV, "o_proj", *MLP]))
    setups = {"packed": full, "checkpointing": checkpointing, "LoRA": lora}
    predicted = speed.cards.cost_model("a100-80gb").predict(model, setups, 2, 4096)
    measured = {name: tokens / rows[name]["tokens_per_second"] for name in rows}
    seconds = predicted.total_s("packed")
    print(
        f"full, packed, not compiled: measured {measured['packed'] * 1e3:,.0f} ms, predicted {seconds * 1e3:,.0f} ms",
        end="",
    )
    print(error(seconds, measured["packed"], TIME_AIM))
    print("Of compiled steps only ratios are compared, with those of steps that are not compiled:")
    for name, other, before in [
        ("checkpointing", "packed", "chunked cross-entropy"),
        ("LoRA", "checkpointing", "checkpointing"),
    ]:
        ratio, stated = predicted.total_s(name) / predicted.total_s(other), measured[name] / measured[before]
        print(f"{name} over {before}: measured {stated:.3f}, predicted {ratio:.3f}{error(ratio, stated, TIME_AIM)}")
    if with_memory:
        size, stated = memory.predict(model, full, 2, 4096, device="cuda").peak_bytes, rows["packed"]["peak_bytes"]
        print(f"peak, packed: measured {stated / memory.GIB:.1f} GiB, predicted {size / memory.GIB:.1f} GiB", end="")
        print(error(size, stated, MEMORY_AIM))


def litgpt_table() -> None:
    """LitGPT's LoRA on Llama 2 and an A100: nothing is fitted."""
    table = records.published("litgpt")
    print(f"\n{table.what}: {table.source}, {table.date}, {table.licence}; nothing fitted")
    print(f"{ALPACA} tokens a sequence are assumed: how many there were is not published")
    costs, baseline = speed.cards.cost_model("a100-40gb"), None
    setup = Setup(HalfLoRA(8, 16, dropout=0.05, targets=QV), BF16)
    for row in table.rows:
        if row["quantization"] is None and row["model"] in LLAMA2:
            batch, stated = row["micro_batch_size"], row["iteration_s"]
            predicted = costs.predict(partial(Llama, LLAMA2[row["model"]]), {"LoRA": setup}, batch, ALPACA)
            seconds, work = predicted.total_s("LoRA"), predicted.works["LoRA"]
            launches = work.launches()
            baseline = baseline or (seconds, stated)
            ratio, of_stated = seconds / baseline[0], stated / baseline[1]
            print(f"{row['model']}, micro-batch {batch}: measured {stated * 1e3:.0f} ms, predicted", end=" ")
            print(f"{seconds * 1e3:.0f} ms{error(seconds, stated, TIME_AIM)}; over the first {of_stated:.3f},", end=" ")
            print(
                f"{ratio:.3f}{error(ratio, of_stated, TIME_AIM)}; measured {stated / launches * 1e6:.0f} us for",
                end=" ",
            )
            print(f"each of {launches:,} operations")


def main() -> None:
    """Print the chosen tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["peft", "torchtune", "litgpt"],
                        default=["peft", "torchtune", "litgpt"])  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=[], help="more of PEFT's methods, such as vera, or all")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    options = parser.parse_args()
    if "peft" in options.only:
        peft_table(options.methods, not options.no_memory)
    if "torchtune" in options.only:
        torchtune_table(not options.no_memory)
    if "litgpt" in options.only:
        litgpt_table()


if __name__ == "__main__":
    main()
