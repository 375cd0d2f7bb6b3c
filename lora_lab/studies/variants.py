"""``lora-lab record variants``: do LoRA's variants learn more on the real model, each at its own learning rate?

LoRA, rsLoRA, LoRA+ (ratio 16), PiSSA and DoRA of two ranks. Alpha is twice the rank, so rsLoRA differs from LoRA by a
factor sqrt(rank) of the scaling alone. The base is in float32, because DoRA and PiSSA have no lean step.
"""

from __future__ import annotations

import torch

from lora_lab.ablation.compare import Study, rates_around
from lora_lab.lean import Lean
from lora_lab.methods import DoRA, LoRA, LoRAPlus, PiSSA, RsLoRA
from lora_lab.studies.tuned import ON_TEST, Planned, recorder, template

RANKS = (16, 128)
CENTRES = {  # of the first grids, by rank
    "LoRA": (2e-3, 5e-4),
    "rsLoRA": (5e-4, 1.25e-4),
    "LoRA+": (2.5e-4, 6.25e-5),
    "PiSSA": (5e-4, 2.5e-4),
    "DoRA": (2e-3, 5e-4),
}


def plan(device: torch.device) -> dict[str, Planned]:
    """What two cores can do in an evening, or a GPU in an hour."""
    gpu = device.type == "cuda"
    steps, size = (300, 8) if gpu else (60, 4)
    setups, lrs = {}, {}
    for i, rank in enumerate(RANKS):
        methods = {
            "LoRA": LoRA(rank, 2 * rank),
            "rsLoRA": RsLoRA(rank, 2 * rank),
            "LoRA+": LoRAPlus(rank, 2 * rank, ratio=16),
            "PiSSA": PiSSA(rank, 2 * rank),
            "DoRA": DoRA(rank, 2 * rank),
        }
        for name, method in methods.items():
            lean = None if name in ("PiSSA", "DoRA") else Lean()
            setups[f"{name}, r={rank}"] = template(method, steps, size, lean, eval_every=10)
            lrs[f"{name}, r={rank}"] = rates_around(CENTRES[name][i])
    judging = range(2, 7 if gpu else 5)
    return {"docs": Planned(Study(setups, lrs, range(2), judging, chosen_on=128, judged_on=ON_TEST))}


RECORDER = recorder("variants", plan)
