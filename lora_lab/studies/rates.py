"""``lora-lab record rates``: how does the best learning rate depend on the rank, and how far is it from full's?

Full fine-tuning and LoRA of seven ranks, each under two rules for alpha (twice the rank: the scaling alpha / r is the
same for all ranks; and 32: it falls as 1 / r), on the digits net and on the real model.
"""

from __future__ import annotations

import torch

from lora_lab.ablation.compare import Study, rates_around
from lora_lab.ablation.grid import Trial
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.studies.tuned import Planned, recorder, template

RANKS = (1, 2, 4, 8, 16, 32, 64)
RULES = {"alpha = 2r": lambda rank: 2 * rank, "alpha = 32": lambda rank: 32}
# The middles of the first grids, by rank; they are widened where the best rate is not inside.
CENTRES = {
    "digits": {
        "full": (8e-3,),
        "alpha = 2r": (6.4e-2, 3.2e-2, 3.2e-2, 1.6e-2, 1.6e-2, 8e-3, 8e-3),
        "alpha = 32": (8e-3, 8e-3, 8e-3, 1.6e-2, 1.6e-2, 1.6e-2, 1.6e-2),
    },
    "docs": {
        "full": (1.25e-4,),
        "alpha = 2r": (8e-3, 4e-3, 4e-3, 2e-3, 2e-3, 1e-3, 1e-3),
        "alpha = 32": (1e-3, 1e-3, 1e-3, 1e-3, 2e-3, 2e-3, 2e-3),
    },
}


def plan(device: torch.device) -> dict[str, Planned]:
    """What two cores can do in a few hours, or a GPU in one."""
    gpu = device.type == "cuda"
    digits = setups(200, 32)
    docs = setups(300, 8, Lean(torch.bfloat16)) if gpu else setups(60, 4, Lean(torch.bfloat16))
    none = {"judging": (), "judged_on": {}, "beyond": 2}  # the rates and their intervals are all that is asked for
    return {
        "digits": Planned(Study(digits, grids("digits"), range(5), chosen_on=200, **none)),
        "docs": Planned(Study(docs, grids("docs"), docs_seeds(device), chosen_on=128, **none)),
    }


def docs_seeds(device: torch.device) -> range:
    """The seeds that choose the rates of the real model."""
    return range(5 if device.type == "cuda" else 3)


def setups(steps: int, batch_size: int, lean: Lean | None = None) -> dict[str, Trial]:
    """Full fine-tuning, and LoRA of each rank under each rule; the rates are to be filled in."""
    trials = {"full": template(FullFineTuning(), steps, batch_size)}
    for rule, alpha in RULES.items():
        trials |= {f"r={r}, {rule}": template(LoRA(r, alpha(r)), steps, batch_size, lean) for r in RANKS}
    return trials


def grids(data: str) -> dict[str, tuple[float, ...]]:
    """The first rates of each setup."""
    centres = {"full": CENTRES[data]["full"][0]}
    for rule in RULES:
        centres |= {f"r={rank}, {rule}": lr for rank, lr in zip(RANKS, CENTRES[data][rule], strict=True)}
    return {setup: rates_around(lr) for setup, lr in centres.items()}


RECORDER = recorder("rates", plan)
