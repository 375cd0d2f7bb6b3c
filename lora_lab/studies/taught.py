"""``lora-lab record taught``: do the results on LoRA and full fine-tuning that courses print survive tuned rates?

One course trains a sentiment classifier with LoRA of rank 4 and with full fine-tuning, both at full fine-tuning's rate,
and LoRA with alpha = 1. There LoRA is much worse. A public repository reports that LoRA of rank 4 has a far lower
perplexity, and takes minutes where full fine-tuning takes hours. Both comparisons are repeated here as they are taught,
on SmolLM2-135M and this project's data. Then only the learning rates change: each method gets its best one. Steps of
both methods are timed in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lora_lab.ablation.compare import Study, rates_around
from lora_lab.ablation.grid import Trial
from lora_lab.costs.cost_model import cost_model
from lora_lab.costs.setup import Setup
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.studies.recorder import ON_TEST, Planned, Row, plan_trial, record_tuned, tell_tuned
from lora_lab.studies.steps import SMOLLM2, Case, compare_times, measure_cases, tell_speed

# LoRA as it is taught, and the rate at which it is compared with full fine-tuning.
LORA = {
    "sentiment": LoRA(4, 1, targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    "docs": LoRA(4, 8, dropout=0.3, targets=("q_proj", "k_proj", "v_proj")),
}
LRS = {"sentiment": 2e-5, "docs": 1e-4}
CENTRES = {  # of the first grids, of full fine-tuning and of LoRA
    "sentiment": (1.25e-4, 8e-3),
    "docs": (1.25e-4, 4e-3),
}
SOURCES = {
    "sentiment": "CMU CS11-711, Advanced NLP, Fall 2025, homework 1: README, run_llama.py, lora.py (read in copies)",
    "docs": "README and notebook of a public SmolLM-135M LoRA repository",
}
CHANGED = {
    "sentiment": "SmolLM2-135M-Instruct in place of a 42M Llama; 552 texts of this project in place of SST-5 and "
    "CFIMDB; the language model's head in place of a new one of classes with dropout before it; the last step in place "
    "of the best epoch; LoRA over a base in bfloat16; steps and batch as in the setups, where theirs are 5 epochs in "
    "batches of 80 and 10",
    "docs": "SmolLM2-135M-Instruct in place of SmolLM-135M; Python's manual in place of Dolly's instructions; steps "
    "and batch as in the setups, where theirs are 300 of 8; a constant rate, as theirs is for 200 steps; the test part "
    "in place of five openings of a few words; LoRA over a base in bfloat16; full fine-tuning at LoRA's rate, since "
    "the repository has no run of it",
}


def plan(device: torch.device) -> dict[str, Planned]:
    """What two cores can do in an evening, or a GPU at the sources' own numbers of steps."""
    gpu = device.type == "cuda"
    sentiment = setups("sentiment", *((276, 10) if gpu else (100, 4)))
    docs = setups("docs", *((300, 8) if gpu else (60, 4)), weight_decay=0.01)
    choosing = range(3 if gpu else 2)
    judging = range(len(choosing), len(choosing) + (5 if gpu else 3))
    everything = {"validation": 69, "test": 69}
    return {
        "sentiment": Planned(
            Study(sentiment, grids("sentiment"), choosing, judging, 69, everything, answered=True), seq_len=76
        ),
        "docs": Planned(Study(docs, grids("docs"), choosing, judging, chosen_on=64, judged_on=ON_TEST)),
    }


def setups(data: str, steps: int, batch_size: int, **options: Any) -> dict[str, Trial]:
    """Both methods, as taught and tuned: constant rates without warm-up, and no clipping."""
    methods: dict[str, tuple[Method, dict[str, Any]]] = {
        "full": (FullFineTuning(), {"autocast": torch.bfloat16}),
        "LoRA": (LORA[data], {"lean": Lean(torch.bfloat16)}),
    }
    return {
        f"{name}, {rates}": replace(
            plan_trial(method, steps, batch_size, **step), schedule="constant", warmup=0, clip=None, **options
        )
        for rates in ("as taught", "tuned")
        for name, (method, step) in methods.items()
    }


def grids(data: str) -> dict[str, tuple[float, ...]]:
    """The rate of each setup as taught, and the first rates of each that is tuned."""
    full, lora = (rates_around(centre, count=3) for centre in CENTRES[data])
    taught = (LRS[data],)
    return {"full, as taught": taught, "LoRA, as taught": taught, "full, tuned": full, "LoRA, tuned": lora}


def time_methods(device: torch.device) -> Iterator[Row]:
    """Yield rows of the record of speed, of both methods on a batch of each size."""
    costs = cost_model(device)
    for data, planned in plan(device).items():
        batch_size = planned.study.setups["full, as taught"].batch_size
        timed = {"full": Setup(FullFineTuning(), clip=None), "LoRA r=4": Setup(LORA[data], clip=None)}
        cases = [Case(SMOLLM2, batch_size, planned.seq_len, timed, rounds=9)]
        for row in measure_cases("taught", cases, None, lambda case: compare_times(case, costs, device)):
            yield row | {"data": data, "stage": "time"}


TAUGHT = record_tuned(
    "taught",
    plan,
    after=time_methods,
    line=lambda row: tell_speed(row) if row["stage"] == "time" else tell_tuned(row),
    sources=SOURCES,
    changed=CHANGED,
)
