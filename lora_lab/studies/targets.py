"""``lora-lab record targets``: which layers should have adapters, at an equal number of trained parameters?

Queries and values (the original paper's choice), attention, the MLP, and all linear layers of the real model, with
ranks that make each about three million parameters.
"""

from __future__ import annotations

import torch

from lora_lab.ablation.compare import Study, rates_around
from lora_lab.lean import Lean
from lora_lab.methods import LoRA
from lora_lab.studies.tuned import ON_TEST, Planned, recorder, template

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
METHODS = {
    "q, v": LoRA(53, 106, targets=("q_proj", "v_proj")),
    "attention": LoRA(26, 52, targets=ATTENTION),
    "MLP": LoRA(16, 32, targets=MLP),
    "all": LoRA(10, 20, targets=(*ATTENTION, *MLP)),
}
CENTRES = {"q, v": 2e-3, "attention": 2e-3, "MLP": 2e-3, "all": 2e-3}  # of the first grids


def plan(device: torch.device) -> dict[str, Planned]:
    """What two cores can do in an hour or two, or a GPU in less."""
    gpu = device.type == "cuda"
    steps, size = (300, 8) if gpu else (60, 4)
    setups = {name: template(method, steps, size, Lean(torch.bfloat16)) for name, method in METHODS.items()}
    lrs = {name: rates_around(lr) for name, lr in CENTRES.items()}
    judging = range(2, 7 if gpu else 5)
    return {"docs": Planned(Study(setups, lrs, range(2), judging, chosen_on=128, judged_on=ON_TEST))}


RECORDER = recorder("targets", plan)
