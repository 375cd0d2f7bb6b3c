"""``lora-lab record ablation``: which rank is enough for the real model? Ranks x learning rates x seeds on "docs".

It takes most of an hour on two cores; a run that was stopped continues. On a GPU it does more, in less time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_lab.ablation import studies
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.results import PROVENANCE
from lora_lab.ablation.run import ablate
from lora_lab.lean import Lean
from lora_lab.studies.recorder import read_rows, record_trials, tell_trial


@dataclass(frozen=True)
class Plan:
    """How much is trained, here and for the record of spectra.

    Args:
        lrs: the learning rates to try for each rank. Alpha is always twice the rank, so a higher rank moves further at
            the same rate, and its best rate is lower.
        seeds: how many seeds.
        steps, batch_size, seq_len: of a trial.
        eval_examples: how many examples of each part the losses are of, from its first.
    """

    lrs: Mapping[int, tuple[float, ...]]
    seeds: int
    steps: int
    batch_size: int
    seq_len: int
    eval_examples: int


def plan(device: torch.device) -> Plan:
    """What two cores, or a GPU, can do in an hour."""
    if device.type == "cuda":
        rates = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
        lrs = {rank: rates for rank in (1, 2, 4, 8, 16, 32, 64, 128)}
        return Plan(lrs, seeds=5, steps=300, batch_size=8, seq_len=128, eval_examples=256)
    lrs = {1: (2e-3, 4e-3, 8e-3), 4: (1e-3, 2e-3, 4e-3), 16: (1e-3, 2e-3, 4e-3), 64: (5e-4, 1e-3, 2e-3)}
    return Plan(lrs, seeds=3, steps=60, batch_size=4, seq_len=64, eval_examples=64)


def trials(planned: Plan, lean: Lean | None) -> list[Trial]:
    """Return all ranks at all their rates with all seeds.

    Args:
        planned: how much is trained.
        lean: the step; :class:`lora_lab.lean.Lean` in float32 gives the results of None, in less time.
    """
    options = {name: getattr(planned, name) for name in ("steps", "batch_size", "eval_examples")}
    options |= {"alpha_per_rank": 2, "eval_every": planned.steps, "lean": lean}
    seeds = range(planned.seeds)
    return [
        trial
        for rank, lrs in planned.lrs.items()
        for trial in studies.grid("docs", "lora", [rank], lrs, seeds, **options)
    ]


def settings(device: torch.device) -> dict[str, Any]:
    """Return how the rows are made, as the record states it."""
    planned = asdict(plan(device))
    lrs = {str(rank): list(rates) for rank, rates in planned["lrs"].items()}
    return {"study": "docs", "alpha": "twice the rank", **planned, "lrs": lrs}


def rows(device: torch.device, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table of :func:`lora_lab.ablation.ablate`, without seconds."""
    planned = plan(device)
    model, task = studies.study("docs", planned.seq_len, device)
    frame = ablate(model, task, trials(planned, Lean()), folder, n_jobs=studies.processes(device))
    yield from read_rows(frame, [*frame.columns.drop(["key", "seconds", *PROVENANCE])])


line = partial(tell_trial, names=("rank",))


RECORDER = record_trials("ablation", settings, rows, line)
