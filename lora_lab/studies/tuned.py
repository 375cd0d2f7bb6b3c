"""Records of setups each of which has the rate that is best for it (:class:`lora_lab.studies.recorder.BlockSweep`).

quality  Is LoRA as good as full fine-tuning, and up to how many steps does each rank keep up? Full fine-tuning and
         LoRA of three ranks, after several numbers of steps, each with the rate that is best for that number. All
         of them multiply by the model's weights in bfloat16; what they train is in float32.
rates    How does the best learning rate depend on the rank, and how far is it from full's? Full fine-tuning and
         LoRA of seven ranks, each under two rules for alpha (twice the rank: the scaling alpha / r is the same for
         all ranks; and 32: it falls as 1 / r), on the digits net and on the real model.

Rates beside setups are the middles of the first grids, which are widened where the best rate is not inside.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.studies.recorder import (
    BF16_BASE,
    BFLOAT16,
    BlockSweep,
    Methods,
    plan_seeds,
    plan_setups,
    plan_size,
    record_sweeps,
)

# Quality

AFTER = {  # the more steps, the lower the best rate
    "full": (FullFineTuning(), {60: 1.25e-4, 240: 6.25e-5, 960: 3.125e-5}),
    "r=1": (LoRA(1, 2), {60: 8e-3, 240: 4e-3, 960: 1e-3}),
    "r=8": (LoRA(8, 16), {60: 2e-3, 240: 2e-3, 960: 5e-4}),
    "r=64": (LoRA(64, 128), {60: 1e-3, 240: 1e-3, 960: 1.25e-4}),
}


def plan_quality(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in a night, or a GPU in an hour.

    The longest runs are a part of their own, with fewer seeds, which would otherwise take a day. On two cores a single
    seed chooses their rates: where two rates are nearly alike, another seed might choose the other.
    """
    gpu = device.type == "cuda"
    size, count, first = (8, 5, 3) if gpu else (4, 3, 2)  # the last: of the seeds that judge, in all parts
    long = (3, 5) if gpu else (1, 3)
    parts = {"docs": ((60, 240), first, 6), "docs, 960 steps": ((960,), *long)}
    for data, (budgets, choosing, judging) in parts.items():
        setups = {}
        for steps in budgets:
            methods = {f"{name}, {steps} steps": (each, lrs[steps]) for name, (each, lrs) in AFTER.items()}
            setups |= plan_setups(methods, steps, size, count, **BFLOAT16)
        yield BlockSweep(setups, range(choosing), range(first, first + judging), data=data)


QUALITY = record_sweeps("quality", plan_quality)


# Rates

RANKS = (1, 2, 4, 8, 16, 32, 64)
RULES = {"alpha = 2r": lambda rank: 2 * rank, "alpha = 32": lambda rank: 32}
CENTRES = {  # by rank
    "digits": {
        "full": 8e-3,
        "alpha = 2r": (6.4e-2, 3.2e-2, 3.2e-2, 1.6e-2, 1.6e-2, 8e-3, 8e-3),
        "alpha = 32": (8e-3, 8e-3, 8e-3, 1.6e-2, 1.6e-2, 1.6e-2, 1.6e-2),
    },
    "docs": {
        "full": 1.25e-4,
        "alpha = 2r": (8e-3, 4e-3, 4e-3, 2e-3, 2e-3, 1e-3, 1e-3),
        "alpha = 32": (1e-3, 1e-3, 1e-3, 1e-3, 2e-3, 2e-3, 2e-3),
    },
}


def plan_rates(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in a few hours, or a GPU in one; the rates and their intervals are all it asks."""
    on = {"judged_on": {}, "beyond": 2}
    digits = plan_setups(_list_rules("digits"), 200, 32)
    yield BlockSweep(digits, range(5), data="digits", chosen_on=200, seq_len=None, **on)
    docs = plan_setups(_list_rules("docs"), *plan_size(device), lean=BF16_BASE)
    yield BlockSweep(docs, plan_seeds(device), data="docs", chosen_on=128, **on)


def _list_rules(data: str) -> Methods:
    """Return full fine-tuning, and LoRA of each rank under each rule, with the middles of their rates."""
    full = {"full": (FullFineTuning(), CENTRES[data]["full"])}
    return full | {
        f"r={rank}, {rule}": (LoRA(rank, alpha(rank)), lr)
        for rule, alpha in RULES.items()
        for rank, lr in zip(RANKS, CENTRES[data][rule], strict=True)
    }


RATES = record_sweeps("rates", plan_rates)
