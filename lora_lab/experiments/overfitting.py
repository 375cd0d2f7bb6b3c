"""``lora-lab record overfitting``: which method overfits the real model, from which step, and which forgets more?

Full fine-tuning, LoRA of several ranks and the last blocks alone train on small sets for ten epochs. Each setup's
learning rate is chosen on one seed, for each size of the training set, and then run with all seeds; the seed draws the
training examples, their order and the adapter. Losses are measured after every epoch, and the rate is constant after
the warm-up, so that the curves show early stopping (see :mod:`lora_lab.ablation.overfitting`).

On two cores it takes hours, and prints how many before it starts; a run that was stopped continues. On a GPU there are
more sizes, ranks, rates and seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lora_lab.ablation import studies
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.overfitting import by_size
from lora_lab.experiments.planning import planned_hours as hours_of
from lora_lab.experiments.recorder import Recorder
from lora_lab.methods import FullFineTuning, LoRA, Method, PartialFineTuning
from lora_lab.records import json_safe

FOLDER = Path("runs/record-overfitting")  # of finished trials, from which a run that was stopped continues
LAST = 4  # of the 30 blocks, for "last blocks"
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
    """How much is trained.

    Args:
        sizes: of the training set, in examples.
        lrs: the learning rates to try for each setup.
        seeds: how many seeds.
        epochs, batch_size, seq_len: of a trial.
        eval_examples: how many examples of each part the losses are of, from its first.
    """

    sizes: tuple[int, ...]
    lrs: Mapping[str, tuple[float, ...]]
    seeds: int
    epochs: int
    batch_size: int
    seq_len: int
    eval_examples: int

    def trial(self, setup: str, lr: float, seed: int, size: int) -> Trial:
        """One trial: evaluated after every epoch, the first of which is the warm-up."""
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
    """What two cores can do in a few hours, or a GPU in one."""
    if device.type == "cuda":
        lrs = {"full": (1e-5, 3e-5, 1e-4, 3e-4), "last blocks": (3e-5, 1e-4, 3e-4, 1e-3)}
        lrs |= {f"LoRA r={rank}": (2e-4, 6e-4, 2e-3, 6e-3, 2e-2) for rank in (1, 8, 64)}
        sizes = (16, 64, 256, 1024)
        return Plan(sizes, lrs, seeds=5, epochs=10, batch_size=8, seq_len=64, eval_examples=128)
    lrs = {"full": (3e-5, 1e-4, 3e-4), "LoRA r=1": (2e-3, 6e-3, 2e-2), "LoRA r=8": (6e-4, 2e-3, 6e-3)}
    lrs["last blocks"] = (1e-4, 3e-4, 1e-3)
    return Plan((16, 256), lrs, seeds=3, epochs=10, batch_size=8, seq_len=32, eval_examples=32)


def settings(device: torch.device) -> dict[str, Any]:
    """How the rows are made, as the record states it."""
    planned = plan(device)
    setups = {}
    for setup, lrs in planned.lrs.items():
        trial = planned.trial(setup, lrs[0], 0, planned.sizes[0])
        setups[setup] = {"lrs": list(lrs), **trial.to_dict()["method"]}
    shared = {name: value for name, value in asdict(planned).items() if name != "lrs"}
    return {
        "study": "docs",
        "setups": setups,
        **shared,
        "sizes": list(planned.sizes),
        "schedule": "constant, after a warm-up of one epoch",
        "planned_hours": planned_hours(device),
    }


@cache
def planned_hours(device: torch.device) -> float:
    """How long it takes, by :mod:`lora_lab.experiments.planning`."""
    planned = plan(device)
    trials = [
        planned.trial(setup, lr, seed, size)
        for size in planned.sizes
        for setup, lrs in planned.lrs.items()
        for lr, seed in [*((lr, 0) for lr in lrs), *((lrs[0], seed) for seed in range(1, planned.seeds))]
    ]
    return hours_of(trials, planned.seq_len, device)


def rows(device: torch.device, folder: str | Path = FOLDER) -> Iterator[dict[str, Any]]:
    """The rows of a record: one for each trial and evaluation, with the commit of the code that ran it.

    Args:
        device: where to train.
        folder: of finished trials, from which a run that was stopped continues.
    """
    planned = plan(device)
    count = sum(len(lrs) + planned.seeds - 1 for lrs in planned.lrs.values()) * len(planned.sizes)
    print(f"Planned: {count} trials, about {planned_hours(device)} hours.", flush=True)
    frames = by_size(
        partial(studies.language_model, device),
        lambda size, seed: partial(studies.docs_task, planned.seq_len, size, seed),
        planned.trial,
        planned.lrs,
        planned.sizes,
        range(planned.seeds),
        folder,
        n_jobs=studies.processes(device),
    )
    for frame in frames:
        yield from map(json_safe, frame[list(_COLUMNS)].to_dict("records"))


def line(row: dict[str, Any]) -> str | None:
    """A row as a line for people; None if it is not a trial's last."""
    trial = f"{row['n_train']:>5} examples  {row['setup']:<12} lr {row['lr']:<8g} seed {row['seed']}: "
    if row["outcome"] == "failed":
        return trial + row["reason"]
    if row["step"] != row["steps"]:
        return None
    return trial + "  ".join(f"{part} {row[f'{part}_loss']:.4f}" for part in ("train", "validation", "off_domain"))


RECORDER = Recorder(settings, rows, line)
