"""Recorders of studies that compare setups, each at its own best learning rate (:mod:`lora_lab.ablation.comparison`).

``lora-lab record NAME`` prints how many hours a study takes before it starts, and goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lora_lab.ablation import studies
from lora_lab.ablation.blocks import block_losses_of
from lora_lab.ablation.comparison import Study, compare_tuned
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.learning_rate import last_rows
from lora_lab.ablation.results import SCORE
from lora_lab.experiments.planning import planned_hours
from lora_lab.experiments.recorder import Recorder
from lora_lab.lean import Lean
from lora_lab.methods import Method
from lora_lab.records import json_safe

ON_TEST = {"validation": 130, "test": 140}  # all examples of 64 tokens in those parts of "docs"
_COLUMNS = (
    *("data", "stage", "setup", "method", "rank", "alpha", "lr", "edge", "seed", "steps", "outcome", "reason", "step"),
    *("validation_loss", "test_loss", "score_validation", "score_test", "trainable_parameters", "commit"),
)


@dataclass(frozen=True)
class Planned:
    """A study, and what it needs to know of the data.

    Args:
        study: what is compared.
        seq_len: tokens an example, of a language model.
    """

    study: Study
    seq_len: int = 64


Plan = Callable[[torch.device], Mapping[str, Planned]]  # a study for each of :data:`studies.STUDIES` that is in it


def template(
    method: Method, steps: int, batch_size: int, lean: Lean | None = None, eval_every: int | None = None
) -> Trial:
    """A setup's trial, whose rate and seed are to be filled in.

    It is evaluated on few examples, because the losses that decide are those of
    :class:`lora_lab.ablation.blocks.BlockLosses`.
    """
    every = steps if eval_every is None else eval_every
    return Trial(method, 1e-3, steps=steps, batch_size=batch_size, eval_every=every, eval_examples=16, lean=lean)


def recorder(name: str, plan: Plan) -> Recorder:
    """What ``lora-lab record <name>`` runs.

    Args:
        name: of the record.
        plan: what is compared on a device, by the name of the data, such as "docs".
    """
    hours = cache(lambda device: _hours(plan(device), device))

    def settings(device: torch.device) -> dict[str, Any]:
        described = {data: _described(planned) for data, planned in plan(device).items()}
        return {**described, "planned_hours": hours(device)}

    def rows(device: torch.device, folder: str | Path = Path("runs") / f"record-{name}") -> Iterator[dict[str, Any]]:
        print(f"Planned: about {hours(device)} hours, more where grids of rates are widened.", flush=True)
        for data, planned in plan(device).items():
            yield from _rows(data, planned, device, Path(folder) / data)

    return Recorder(settings, rows, line)


def _rows(data: str, planned: Planned, device: torch.device, folder: Path) -> Iterator[dict[str, Any]]:
    """The last row of each trial."""
    model, task = studies.study(data, planned.seq_len, device)
    n_jobs = studies.processes(device) if data not in ("digits", "planted") else 1
    for frame in compare_tuned(model, task, planned.study, folder, n_jobs=n_jobs):
        accuracy = [f"{SCORE}accuracy"] * planned.study.answered
        table = last_rows(frame).assign(data=data).reindex(columns=[*_COLUMNS, *accuracy])
        for row in table.to_dict("records"):
            means = {
                f"{part}_loss": fmean(block_losses_of(row, part))
                for part in ("validation", "test")
                if isinstance(row[SCORE + part], str)
            }
            yield json_safe(row | {"validation_loss": None, "test_loss": None} | means)


def _described(planned: Planned) -> dict[str, Any]:
    study = planned.study
    return {
        "setups": {setup: trial.to_dict() for setup, trial in study.setups.items()},
        "lrs": {setup: list(lrs) for setup, lrs in study.lrs.items()},
        **{name: list(getattr(study, name)) for name in ("choosing", "judging")},
        **{name: getattr(study, name) for name in ("chosen_on", "block", "widen", "answered")},
        "judged_on": dict(study.judged_on),
        "seq_len": planned.seq_len,
    }


def _hours(plan: Mapping[str, Planned], device: torch.device) -> float:
    """Of the language model's part, for the small nets take minutes."""
    hours = 0.0
    for data, planned in plan.items():
        if data not in ("digits", "planted"):
            study = planned.study
            judged = [trial for trial in study.trials if trial.seed in study.judging]
            chosen = [trial for trial in study.trials if trial.seed in study.choosing]
            hours += planned_hours(chosen, planned.seq_len, device, study.chosen_on)
            if judged:
                hours += planned_hours(judged, planned.seq_len, device, sum(study.judged_on.values()))
    return round(hours, 1)


def line(row: Mapping[str, Any]) -> str:
    """A row as a line for people."""
    trial = f"{row['data']:<7}{row['stage']:<9} {row['setup']:<22} lr {row['lr']:<9.4g} seed {row['seed']}: "
    if row["outcome"] == "failed":
        return trial + row["reason"]
    return trial + "  ".join(
        f"{part} {row[f'{part}_loss']:.4f}" for part in ("validation", "test") if row[f"{part}_loss"] is not None
    )
