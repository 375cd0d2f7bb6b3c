"""``lora-lab record quality``: is LoRA as good as full fine-tuning, and up to how many steps does each rank keep up?

Full fine-tuning and LoRA of three ranks on the real model, after several numbers of steps, each with the learning rate
that is best for that number. All of them multiply by the model's weights in bfloat16; what they train is in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from lora_lab.ablation import studies
from lora_lab.ablation.compare import Study, rates_around
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.studies.tuned import ON_TEST, Planned, recorder, template

RANKS = (1, 8, 64)
# The middles of the first grids, by steps: the more steps, the lower the best rate.
CENTRES = {
    "full": {60: 1.25e-4, 240: 6.25e-5, 960: 3.125e-5},
    "r=1": {60: 8e-3, 240: 4e-3, 960: 1e-3},
    "r=8": {60: 2e-3, 240: 2e-3, 960: 5e-4},
    "r=64": {60: 1e-3, 240: 1e-3, 960: 1.25e-4},
}


def plan(device: torch.device) -> dict[str, Planned]:
    """What two cores can do in a night, or a GPU in an hour.

    The longest runs are a part of their own, with fewer seeds, which would otherwise take a day. On two cores a single
    seed chooses their rates: where two rates are nearly alike, another seed might choose the other.
    """
    gpu = device.type == "cuda"
    return {
        "docs": _planned((60, 240), device, choosing=3 if gpu else 2, judging=6),
        "docs, 960 steps": _planned((960,), device, choosing=3 if gpu else 1, judging=5 if gpu else 3),
    }


def _planned(budgets: Sequence[int], device: torch.device, choosing: int, judging: int) -> Planned:
    """The comparison after these numbers of steps, with so many seeds that choose the rates, and others that judge."""
    gpu = device.type == "cuda"
    setups, lrs = {}, {}
    for steps in budgets:
        size = 8 if gpu else 4
        setups[f"full, {steps} steps"] = template(FullFineTuning(), steps, size, autocast=torch.bfloat16)
        for rank in RANKS:
            setups[f"r={rank}, {steps} steps"] = template(LoRA(rank, 2 * rank), steps, size, Lean(torch.bfloat16))
        for name, centres in CENTRES.items():
            lrs[f"{name}, {steps} steps"] = rates_around(centres[steps], count=5 if gpu else 3)
    first = 3 if gpu else 2  # of the seeds that judge, in all parts
    judges = range(first, first + judging)
    study = Study(setups, lrs, range(choosing), judges, chosen_on=64, judged_on=ON_TEST)
    return Planned(study, source=partial(studies.study, "docs", 64))


RECORDER = recorder("quality", plan)
