"""``lora-lab record quality``, ``targets`` and ``variants``: which method learns most on the real model?

quality    Is LoRA as good as full fine-tuning, and up to how many steps does each rank keep up? Full fine-tuning and
           LoRA of three ranks, after several numbers of steps, each with the rate that is best for that number. All of
           them multiply by the model's weights in bfloat16; what they train is in float32.
targets    Which layers should have adapters, at an equal number of trained parameters? Queries and values (the original
           paper's choice), attention, the MLP, and all linear layers, with ranks that make each about three million.
variants   Do LoRA's variants learn more? LoRA, rsLoRA, LoRA+ (ratio 16), PiSSA and DoRA of two ranks. Alpha is twice
           the rank, so rsLoRA differs from LoRA by a factor sqrt(rank) of the scaling alone. The base is in float32,
           because DoRA and PiSSA have no lean step.

The numbers beside the methods are the middles of the first grids of rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lora_lab.ablation import studies
from lora_lab.ablation.compare import Study, rates_around
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.studies.recorder import ON_TEST, Planned, plan_trial, record_tuned
from lora_lab.variants import DoRA, LoRAPlus, PiSSA, RsLoRA

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS_OF = {
    "q, v": LoRA(53, 106, targets=("q_proj", "v_proj")),
    "attention": LoRA(26, 52, targets=ATTENTION),
    "MLP": LoRA(16, 32, targets=MLP),
    "all": LoRA(10, 20, targets=(*ATTENTION, *MLP)),
}


def plan_targets(device: torch.device) -> dict[str, Planned]:
    """Return what two cores can do in an hour or two, or a GPU in less."""
    lean = {"lean": Lean(torch.bfloat16)}
    return _compare_on_docs(device, {name: (method, 2e-3, lean) for name, method in TARGETS_OF.items()})


def plan_variants(device: torch.device) -> dict[str, Planned]:
    """Return what two cores can do in an evening, or a GPU in an hour."""
    curves = {"eval_every": 10}
    lean = {"lean": Lean(), **curves}
    setups = {}
    for rank, factor in ((16, 1), (128, 0.25)):
        methods = {
            "LoRA": (LoRA(rank, 2 * rank), 2e-3, lean),
            "rsLoRA": (RsLoRA(rank, 2 * rank), 5e-4, lean),
            "LoRA+": (LoRAPlus(rank, 2 * rank, ratio=16), 2.5e-4, lean),
            "PiSSA": (PiSSA(rank, 2 * rank), 5e-4 if rank == 16 else 1e-3, curves),
            "DoRA": (DoRA(rank, 2 * rank), 2e-3, curves),
        }
        setups |= {f"{name}, r={rank}": (method, factor * lr, step) for name, (method, lr, step) in methods.items()}
    return _compare_on_docs(device, setups)


def _compare_on_docs(
    device: torch.device, setups: Mapping[str, tuple[Method, float, dict[str, Any]]]
) -> dict[str, Planned]:
    """Return the comparison of methods, by name, with the middle of each one's first rates and options of its trial."""
    gpu = device.type == "cuda"
    size = (300, 8) if gpu else (60, 4)
    trials = {name: plan_trial(method, *size, **options) for name, (method, _, options) in setups.items()}
    lrs = {name: rates_around(centre) for name, (_, centre, _) in setups.items()}
    judging = range(2, 7 if gpu else 5)
    return {"docs": Planned(Study(trials, lrs, range(2), judging, chosen_on=128, judged_on=ON_TEST))}


CENTRES = {  # by steps: the more steps, the lower the best rate
    "full": {60: 1.25e-4, 240: 6.25e-5, 960: 3.125e-5},
    "r=1": {60: 8e-3, 240: 4e-3, 960: 1e-3},
    "r=8": {60: 2e-3, 240: 2e-3, 960: 5e-4},
    "r=64": {60: 1e-3, 240: 1e-3, 960: 1.25e-4},
}


def plan_quality(device: torch.device) -> dict[str, Planned]:
    """Return what two cores can do in a night, or a GPU in an hour.

    The longest runs are a part of their own, with fewer seeds, which would otherwise take a day. On two cores a single
    seed chooses their rates: where two rates are nearly alike, another seed might choose the other.
    """
    gpu = device.type == "cuda"
    return {
        "docs": _compare_after((60, 240), device, choosing=3 if gpu else 2, judging=6),
        "docs, 960 steps": _compare_after((960,), device, choosing=3 if gpu else 1, judging=5 if gpu else 3),
    }


def _compare_after(budgets: Sequence[int], device: torch.device, choosing: int, judging: int) -> Planned:
    """Return the comparison after these numbers of steps, with so many seeds that choose, and others that judge."""
    gpu = device.type == "cuda"
    size, count, first = (8, 5, 3) if gpu else (4, 3, 2)  # the last: of the seeds that judge, in all parts
    setups, lrs = {}, {}
    for steps in budgets:
        setups[f"full, {steps} steps"] = plan_trial(FullFineTuning(), steps, size, autocast=torch.bfloat16)
        for rank in (1, 8, 64):
            lora = plan_trial(LoRA(rank, 2 * rank), steps, size, Lean(torch.bfloat16))
            setups[f"r={rank}, {steps} steps"] = lora
        lrs |= {f"{name}, {steps} steps": rates_around(centres[steps], 2, count) for name, centres in CENTRES.items()}
    judges = range(first, first + judging)
    study = Study(setups, lrs, range(choosing), judges, chosen_on=64, judged_on=ON_TEST)
    return Planned(study, source=partial(studies.study, "docs", 64))


QUALITY = record_tuned("quality", plan_quality)
TARGETS = record_tuned("targets", plan_targets)
VARIANTS = record_tuned("variants", plan_variants)
