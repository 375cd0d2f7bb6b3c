"""``lora-lab record ablation``: which rank is enough on the real model; ranks x learning rates x seeds on "docs".

It takes most of an hour on two cores and can be stopped and continued. On a GPU it does more, in less time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_lab.ablation import studies
from lora_lab.ablation.results import PROVENANCE
from lora_lab.ablation.run import ablate
from lora_lab.experiments.recorder import Recorder
from lora_lab.records import json_safe

FOLDER = Path("runs/record-ablation")  # where a stopped ablation goes on


@dataclass(frozen=True)
class Plan:
    """How much is trained: the ablation's grid, and what both have in common.

    ``lrs`` holds the learning rates that each rank tries: with alpha twice the rank, as it is throughout, a higher rank
    moves further at the same rate, so its best one is lower. Losses are taken on the first ``eval_examples`` of a part.
    """

    lrs: dict[int, tuple[float, ...]]
    seeds: int
    steps: int
    batch_size: int
    seq_len: int
    eval_examples: int


def plan(device: torch.device) -> Plan:
    """What fits into an hour: of two cores, or of a GPU."""
    if device.type == "cuda":
        rates = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
        return Plan(dict.fromkeys((1, 2, 4, 8, 16, 32, 64, 128), rates), 5, 300, 8, 128, 256)
    rates = {1: (2e-3, 4e-3, 8e-3), 4: (1e-3, 2e-3, 4e-3), 16: (1e-3, 2e-3, 4e-3), 64: (5e-4, 1e-3, 2e-3)}
    return Plan(rates, 3, 60, 4, 64, 64)


def settings(device: torch.device) -> dict[str, Any]:
    """What a record says of how its rows were made."""
    own = asdict(plan(device))
    own["lrs"] = {str(rank): list(rates) for rank, rates in own["lrs"].items()}
    return {"study": "docs", "alpha": "twice the rank", **own}


def ablation(device: torch.device, folder: str | Path = FOLDER) -> Iterator[dict[str, Any]]:
    """The rows of an ablation's record: as :func:`lora_lab.ablation.ablate` returns them, seconds left out.

    Args:
        folder: keeps the trials, from where a stopped run goes on.
    """
    own = plan(device)
    options = {
        "alpha_per_rank": 2,
        "steps": own.steps,
        "batch_size": own.batch_size,
        "eval_every": own.steps,
        "eval_examples": own.eval_examples,
    }
    grids = [studies.grid("docs", "lora", [rank], lrs, range(own.seeds), **options) for rank, lrs in own.lrs.items()]
    trials = list(itertools.chain.from_iterable(grids))
    model, task = studies.study("docs", own.seq_len, device)
    frame = ablate(model, task, trials, folder, n_jobs=studies.processes(device))
    kept = frame.drop(columns=["key", "seconds", *PROVENANCE])
    yield from map(json_safe, kept.to_dict("records"))


def line(row: dict[str, Any]) -> str | None:
    """A row for a person to read; None for what is one of hundreds."""
    trial = f"rank {row['rank']:<4g} lr {row['lr']:<8g} seed {row['seed']}"
    if row["outcome"] == "failed":
        return f"{trial}: {row['reason']}"
    if row["test_loss"] is None:
        return None
    return f"{trial}: validation {row['validation_loss']:.4f}  test {row['test_loss']:.4f}"


RECORDER = Recorder("ablation", settings, ablation, line)
