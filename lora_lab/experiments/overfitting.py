"""What ``lora-lab record overfitting`` runs on the real model: who overfits, from which step, and who forgets more.

Small training sets are read ten times over, by full fine-tuning, LoRA of several ranks and the last blocks alone. Each
setup's learning rate is chosen on one seed, for each size of the training set, and all seeds are run at it; a seed
draws the training examples, their order and the adapter. Losses are taken after every epoch, and the rate is constant
after the warm-up, so that early stopping can be read off the curves (see :mod:`lora_lab.ablation.overfitting`).

On two cores it takes hours, which are said before it begins; a stopped run goes on where it was. On a GPU the sizes,
ranks, rates and seeds are more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lora_lab.ablation import studies
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.overfitting import by_size
from lora_lab.costs.cost_model import cost_model
from lora_lab.costs.setup import Setup
from lora_lab.experiments.recorder import Recorder
from lora_lab.experiments.step_memory import random_model
from lora_lab.methods import FullFineTuning, LoRA, Method, PartialFineTuning
from lora_lab.records import json_safe

FOLDER = Path("runs/record-overfitting")  # where a stopped run goes on
LAST = 4  # blocks of "last blocks"; of 30
SETUPS: dict[str, Method] = {
    "full": FullFineTuning(),
    "LoRA r=1": LoRA(1, 2),
    "LoRA r=8": LoRA(8, 16),
    "LoRA r=64": LoRA(64, 128),
    "last blocks": PartialFineTuning([f"model.layers.{i}" for i in range(30 - LAST, 30)]),
}
_COLUMNS = (
    *("n_train", "setup", "lr", "seed", "steps", "outcome", "reason", "step"),
    *("train_loss", "validation_loss", "off_domain_loss", "gap", "test_loss", "trainable_parameters", "commit"),
)


@dataclass(frozen=True)
class Plan:
    """How much is trained. ``lrs``: the rates that each setup tries. Losses are of ``eval_examples`` of a part."""

    sizes: tuple[int, ...]
    lrs: Mapping[str, tuple[float, ...]]
    seeds: int
    epochs: int
    batch_size: int
    seq_len: int
    eval_examples: int

    def trial(self, setup: str, lr: float, seed: int, size: int) -> Trial:
        """One run: evaluated after every epoch, with the first one for the warm-up."""
        epoch = size // self.batch_size
        return Trial(
            SETUPS[setup],
            lr,
            seed,
            steps=self.epochs * epoch,
            batch_size=self.batch_size,
            schedule="constant",
            warmup=epoch,
            eval_every=epoch,
            eval_examples=self.eval_examples,
        )


def plan(device: torch.device) -> Plan:
    """What two cores do in a few hours, or a GPU in one."""
    if device.type == "cuda":
        rates = {"full": (1e-5, 3e-5, 1e-4, 3e-4), "last blocks": (3e-5, 1e-4, 3e-4, 1e-3)}
        rates |= {f"LoRA r={rank}": (2e-4, 6e-4, 2e-3, 6e-3, 2e-2) for rank in (1, 8, 64)}
        return Plan((16, 64, 256, 1024), rates, 5, 10, 8, 64, 128)
    rates = {"full": (3e-5, 1e-4, 3e-4), "LoRA r=1": (2e-3, 6e-3, 2e-2), "LoRA r=8": (6e-4, 2e-3, 6e-3)}
    return Plan((16, 256), {**rates, "last blocks": (1e-4, 3e-4, 1e-3)}, 3, 10, 8, 32, 32)


def settings(device: torch.device) -> dict[str, Any]:
    """What a record says of how its rows were made."""
    own = plan(device)
    return {
        "study": "docs",
        "sizes": list(own.sizes),
        "setups": {setup: {"lrs": list(lrs), **_plain_method(own, setup)} for setup, lrs in own.lrs.items()},
        "seeds": own.seeds,
        "epochs": own.epochs,
        "batch_size": own.batch_size,
        "seq_len": own.seq_len,
        "eval_examples": own.eval_examples,
        "schedule": "constant, after a warm-up of one epoch",
        "planned_hours": planned_hours(device),
    }


def _plain_method(own: Plan, setup: str) -> dict[str, Any]:
    return own.trial(setup, own.lrs[setup][0], 0, own.sizes[0]).to_dict()["method"]


@cache
def planned_hours(device: torch.device) -> float:
    """How long it takes by :mod:`lora_lab.costs.cost_model`, with a forward pass as a third of a full step."""
    own = plan(device)
    steps = cost_model(device).predict(
        partial(random_model, "smollm2-135m"),
        {setup: Setup(SETUPS[setup]) for setup in own.lrs},
        own.batch_size,
        own.seq_len,
    )
    look = 2 * own.eval_examples / own.batch_size * steps.total_s("full") / 3  # two parts
    seconds = 0.0
    for size in own.sizes:
        for setup, lrs in own.lrs.items():
            trial = own.trial(setup, lrs[0], 0, size)
            one = trial.steps * steps.total_s(setup) + (own.epochs + 1.5) * look  # and the test part
            seconds += (len(lrs) + own.seeds - 1) * one
    return round(seconds / 3600, 1)


def overfitting(device: torch.device, folder: str | Path = FOLDER) -> Iterator[dict[str, Any]]:
    """The rows of a record: one for each trial and evaluation, with the commit of the code that ran it.

    Args:
        folder: keeps the trials, from where a stopped run goes on.
    """
    own = plan(device)
    count = sum(len(lrs) + own.seeds - 1 for lrs in own.lrs.values()) * len(own.sizes)
    print(f"Planned: {count} trials, about {planned_hours(device)} hours.", flush=True)
    frames = by_size(
        partial(studies.language_model, device),
        lambda size, seed: partial(studies.docs_task, own.seq_len, size, seed),
        own.trial,
        own.lrs,
        own.sizes,
        range(own.seeds),
        folder,
        n_jobs=studies.processes(device),
    )
    for frame in frames:
        yield from map(json_safe, frame[list(_COLUMNS)].to_dict("records"))


def line(row: dict[str, Any]) -> str | None:
    """A row for a person to read; None for what is before the last evaluation."""
    what = f"{row['n_train']:>5} examples  {row['setup']:<12} lr {row['lr']:<8g} seed {row['seed']}: "
    if row["outcome"] == "failed":
        return what + row["reason"]
    if row["step"] != row["steps"]:
        return None
    losses = (f"{part} {row[f'{part}_loss']:.4f}" for part in ("train", "validation", "off_domain"))
    return what + "  ".join(losses)


RECORDER = Recorder("overfitting", settings, overfitting, line)
