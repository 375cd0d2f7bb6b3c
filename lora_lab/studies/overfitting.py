"""``lora-lab record overfitting``: which method overfits the real model, from which step, and which forgets more?

Full fine-tuning and LoRA train on small sets: at a constant rate, so that the curve up to any step is that of a run
that stopped there, and under a cosine for fewer epochs. For each size of the training set and each schedule two seeds
choose a setup's learning rate by the lowest validation loss of its curve, and three others are judged
(:mod:`lora_lab.ablation.overfitting`). The seed draws the training examples, their order and the adapter.

The off-domain part is what the base itself wrote, so the rise of the loss on it is KL(base || tuned): forgetting
(:mod:`lora_lab.tasks.base_text`).

A GPU is given more of everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_lab.ablation import studies
from lora_lab.ablation.compare import best_rates, by_size, rates_around
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.halving import Halving
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA, Method, PartialFineTuning
from lora_lab.studies.planning import planned_hours
from lora_lab.studies.recorder import Row, read_rows, record_trials, tell_trial
from lora_lab.task import Task
from lora_lab.tasks.base_text import on_base_text

if TYPE_CHECKING:
    import pandas

LAST = 4  # of the 30 blocks, for "last blocks"
COSINE = ", cosine"  # the end of a setup's name; without it the rate is constant
SETUPS: dict[str, Method] = {
    "full": FullFineTuning(),
    "LoRA r=1": LoRA(1, 2),
    "LoRA r=8": LoRA(8, 16),
    "LoRA r=64": LoRA(64, 128),
    "last blocks": PartialFineTuning([f"model.layers.{i}" for i in range(30 - LAST, 30)]),
}
CENTRES = {"full": 1.25e-4, "LoRA r=1": 2e-3, "LoRA r=8": 1e-3, "LoRA r=64": 5e-4, "last blocks": 2.5e-4}
# Rates compare by their lowest losses so far, and one is stopped if it is behind by more than seeds differ.
HALVING = Halving(best_so_far=True, slack=0.01)
REPLIES = 100  # windows of 32 tokens, about as long as 32 replies with their prompts
COUNTED = 3  # of five rates: with halving, five constant rates take about as many steps as three full ones
_COLUMNS = (
    *("n_train", "setup", "schedule", "stage", "edge", "lr", "seed", "steps", "outcome", "reason", "step"),
    *("train_loss", "validation_loss", "off_domain_loss", "gap", "test_loss", "trainable_parameters", "commit"),
)


@dataclass(frozen=True)
class Plan:
    """How much is trained.

    Args:
        setups: names in :data:`SETUPS`.
        epochs: at a constant rate, by size of the training set in examples.
        cosine_epochs: under a cosine; sizes that are missing have no such trials.
        choosing, judging: seeds.
        seq_len: tokens an example.
        chosen_on, judged_on: how many validation examples the losses of either stage are of, from the first.
        batch_size: examples a step.
        evaluated: steps between evaluations, at most; small sets are evaluated after every epoch.
        widen: how many rates may be added to a grid.
    """

    setups: Sequence[str]
    epochs: Mapping[int, int]
    cosine_epochs: Mapping[int, int]
    choosing: Sequence[int] = (0, 1)
    judging: Sequence[int] = (2, 3, 4)
    seq_len: int = 32
    chosen_on: int = 64
    judged_on: int = 256
    batch_size: int = 8
    evaluated: int = 64
    widen: int = 2

    def lrs(self, size: int) -> dict[str, tuple[float, ...]]:
        """The rates with which each setup begins, for one size."""
        endings = ("", COSINE) if size in self.cosine_epochs else ("",)
        return {setup + ending: rates_around(CENTRES[setup]) for ending in endings for setup in self.setups}

    def trial(self, setup: str, lr: float, seed: int, size: int) -> Trial:
        """One trial; a constant rate is warmed up for as many steps whatever the size."""
        name = setup.removesuffix(COSINE)
        cosine, epoch = name != setup, size // self.batch_size
        return Trial(
            SETUPS[name],
            lr,
            seed,
            steps=epoch * (self.cosine_epochs if cosine else self.epochs)[size],
            batch_size=self.batch_size,
            schedule="cosine" if cosine else "constant",
            warmup=None if cosine else min(8, epoch),
            eval_every=min(epoch, self.evaluated),
            eval_examples=self.judged_on if seed in self.judging else self.chosen_on,
            lean=Lean(torch.bfloat16) if isinstance(SETUPS[name], LoRA) else None,
        )

    def task(self, size: int, seed: int) -> Task:
        """The task of a seed. Those that choose are evaluated on few replies of the base, which choose nothing."""
        task = on_base_text(studies.docs_task(self.seq_len, size, seed))
        return replace(task, off_domain=task.off_domain[slice(0, None, 2) if seed in self.judging else slice(4)])

    @property
    def planned(self) -> list[Trial]:
        """The expected trials if no grid is widened; the first rate stands in for the rate still to be chosen."""
        trials = []
        for size in self.epochs:
            for setup, lrs in self.lrs(size).items():
                counted = lrs if setup.endswith(COSINE) else lrs[:COUNTED]
                trials += [self.trial(setup, lr, seed, size) for lr in counted for seed in self.choosing]
                trials += [self.trial(setup, lrs[0], seed, size) for seed in self.judging]
        return trials


def plan(device: torch.device) -> Plan:
    """What two cores can do in six hours, or a GPU in two."""
    if device.type == "cuda":
        epochs = {64: 20, 256: 10, 1024: 10}
        return Plan([*SETUPS], epochs, dict.fromkeys(epochs, 3), judging=range(2, 7))
    return Plan(("full", "LoRA r=1", "LoRA r=8"), {64: 8, 256: 6, 1024: 2}, {64: 3})


def settings(device: torch.device) -> dict[str, Any]:
    """Return how the rows are made, as the record states it."""
    planned, setups = plan(device), {}
    for setup in planned.setups:
        lrs = rates_around(CENTRES[setup])
        setups[setup] = {"lrs": list(lrs), **planned.trial(setup, lrs[0], 0, min(planned.epochs)).to_dict()["method"]}
    return {
        "study": "docs",
        "setups": setups,
        "sizes": list(planned.epochs),
        **{name: list(getattr(planned, name)) for name in ("choosing", "judging")},
        **{name: getattr(planned, name) for name in ("batch_size", "seq_len", "chosen_on", "judged_on", "widen")},
        "epochs": {str(size): count for size, count in planned.epochs.items()},
        "cosine_epochs": {str(size): count for size, count in planned.cosine_epochs.items()},
        "halving": asdict(HALVING) | {"rungs": list(HALVING.rungs)},
    }


def rows(device: torch.device, folder: Path) -> Iterator[Row]:
    """Yield a row for each trial and evaluation, with the commit of the code that ran it."""
    planned, options = plan(device), {"halving": HALVING, "n_jobs": studies.processes(device)}
    for size in planned.epochs:
        frames = by_size(
            partial(studies.language_model, device),
            lambda size, seed: partial(planned.task, size, seed),
            planned.trial,
            planned.lrs(size),
            [size],
            [*planned.choosing, *planned.judging],
            folder,
            choose=len(planned.choosing),
            widen=planned.widen,
            **options,
        )
        choosing = [*islice(frames, len(planned.choosing))]
        at_edges = edges(choosing)
        for frame in choosing:  # off-domain, too few replies are looked at
            yield from read_rows(frame.assign(**at_stage("choosing", frame, at_edges), off_domain_loss=None), _COLUMNS)
        for frame in frames:
            yield from read_rows(frame.assign(**at_stage("judging", frame, at_edges)), _COLUMNS)


def edges(choosing: Sequence[pandas.DataFrame]) -> dict[str, str]:
    """Return setup -> the edge of its grid at which the rate that was chosen lies, if it lies at one."""
    import pandas

    frame = pandas.concat(choosing, ignore_index=True)
    if not (frame["outcome"] == "done").any():
        return {}
    best = best_rates(frame)
    return dict(zip(best["setup"], best["edge"], strict=True))


def at_stage(stage: str, frame: pandas.DataFrame, at_edges: Mapping[str, str]) -> dict[str, Any]:
    """Return the columns ``stage`` and ``edge`` of a table."""
    return {"stage": stage, "edge": frame["setup"].map(at_edges)}


line = partial(
    tell_trial,
    names=("n_train", "setup"),
    losses=("train_loss", "validation_loss", "off_domain_loss"),
)


def hours(device: torch.device) -> float:
    """Return how long it takes, by :mod:`lora_lab.studies.planning`."""
    planned = plan(device)
    return planned_hours(planned.planned, planned.seq_len, device, off_domain=REPLIES)


RECORDER = record_trials("overfitting", settings, rows, line, hours)
