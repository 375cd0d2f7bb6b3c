"""``lora-lab record rates``: how does the best learning rate depend on the rank, and how far is it from full's?

Full fine-tuning and LoRA of seven ranks, each under two rules for alpha (twice the rank: the scaling alpha / r is the
same for all ranks; and 32: it falls as 1 / r), on the digits net and on the real model.
"""

from __future__ import annotations

import torch

from lora_lab.ablation.comparison import Study
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.learning_rate import rates_around
from lora_lab.experiments.tuned import Planned, recorder
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA

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
    small = {"steps": 200, "batch_size": 32, "eval_every": 200, "eval_examples": 16}
    gpu = device.type == "cuda"
    large = {"steps": 300, "batch_size": 8} if gpu else {"steps": 60, "batch_size": 4}
    large |= {"eval_every": large["steps"], "eval_examples": 16}  # few, because the losses that decide are the judge's
    return {
        "digits": Planned(
            Study(
                setups(None, **small),
                grids("digits"),
                choosing=range(5),
                judging=(),
                chosen_on=200,
                judged_on={},
            )
        ),
        "docs": Planned(
            Study(
                setups(Lean(torch.bfloat16), **large),
                grids("docs"),
                choosing=range(5 if gpu else 3),
                judging=(),
                chosen_on=128,
                judged_on={},
            )
        ),
    }


def setups(lean: Lean | None, **options: int) -> dict[str, Trial]:
    """Full fine-tuning, and LoRA of each rank under each rule; the rates are to be filled in."""
    trials = {"full": Trial(FullFineTuning(), 1e-3, **options)}
    for rule, alpha in RULES.items():
        trials |= {f"r={r}, {rule}": Trial(LoRA(r, alpha(r)), 1e-3, lean=lean, **options) for r in RANKS}
    return trials


def grids(data: str) -> dict[str, tuple[float, ...]]:
    """The first rates of each setup."""
    centres = {"full": CENTRES[data]["full"][0]}
    for rule in RULES:
        centres |= {f"r={rank}, {rule}": lr for rank, lr in zip(RANKS, CENTRES[data][rule], strict=True)}
    return {setup: rates_around(lr) for setup, lr in centres.items()}


RECORDER = recorder("rates", plan)
