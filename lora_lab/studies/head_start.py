"""``lora-lab record head_start``: is fine-tuning better than training from scratch, and what does that depend on?

Two small nets learn to read digits, and then a change of them: moved by a pixel, with black and white swapped, or other
digits. A net that was pre-trained is fine-tuned on few changed pictures or on many. A net of the same shape with random
weights learns the same from scratch, in as many steps, and in as many as pre-training and fine-tuning have together.
The seed draws everything that is left to chance: which pictures are in which part, the pre-training, the random
weights, the training pictures and their order. Some seeds choose each setup's learning rate, by the validation loss
after the last step, and others are judged.

The real model learns Python's manual in the same way, beside a model of its shape with random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_lab import tasks
from lora_lab.ablation import studies
from lora_lab.ablation.compare import last_rows, rates_around, tune_by_seed
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.run import ablate
from lora_lab.costs.fake import Factory
from lora_lab.methods import FullFineTuning
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.models.pretrained import SMOLLM2
from lora_lab.studies.claims.head_start import DOCS, FINE_TUNED, FROM_SCRATCH, LONGER, SIZES
from lora_lab.studies.overfitting import at_stage
from lora_lab.studies.planning import planned_hours
from lora_lab.studies.recorder import Row, read_rows, record_trials, tell_trial
from lora_lab.task import Task
from lora_lab.tasks.arrays import CHANGES
from lora_lab.train import fit

if TYPE_CHECKING:
    import pandas

NETS: dict[str, Callable[..., nn.Module]] = {"transformer": DigitsTransformer, "MLP": DigitsMLP}
PRETRAINING, TRAINING = 400, 150  # steps on digits
BATCH = 32  # pictures a step
SEQ_LEN = 64  # tokens an example of the language model
OFF_DOMAIN = 4  # examples: what is forgotten is not asked here
_BY = "last_loss"  # the lowest would be the loss before training, where training only harms
_COLUMNS = (
    *("data", "model", "n_train", "setup", "stage", "lr", "edge", "seed", "steps", "outcome", "reason", "step"),
    *("validation_loss", "test_loss", "score_accuracy", "commit"),
)


@dataclass(frozen=True)
class Case:
    """What is learned by which model from how many examples.

    Args:
        data: a change of the digits, or "docs".
        model: a name in :data:`NETS`, or that of the language model.
        n_train: examples to learn from.
        trials: how each setup trains; rates and seeds are to be filled in.
        lrs: the rates that each setup tries first.
        choosing, judging: seeds.
        widen: how many rates may be added to a grid.
    """

    data: str
    model: str
    n_train: int
    trials: Mapping[str, Trial]
    lrs: Mapping[str, Sequence[float]]
    choosing: Sequence[int]
    judging: Sequence[int]
    widen: int = 4

    @property
    def planned(self) -> list[Trial]:
        """The expected trials if no grid is widened; the first rate stands in for the rate still to be chosen."""
        return [
            replace(trial, lr=lr, seed=seed)
            for setup, trial in self.trials.items()
            for lr, seeds in (*((lr, self.choosing) for lr in self.lrs[setup]), (self.lrs[setup][0], self.judging))
            for seed in seeds
        ]

    def start(self, setup: str, seed: int, device: torch.device) -> nn.Module | Factory:
        """The model with which a setup begins, or what makes it."""
        if self.data == DOCS:
            if setup == FINE_TUNED:
                return partial(studies.language_model, device)
            return partial(studies.random_init, device, seed)
        return pretrained(self.model, self.data, seed) if setup == FINE_TUNED else _net(self.model, seed)

    def task(self, seed: int) -> Task:
        """What is learned."""
        if self.data == DOCS:
            task = studies.docs_task(SEQ_LEN, self.n_train, seed)
            return replace(task, off_domain=task.off_domain[:OFF_DOMAIN])
        return tasks.digits("adapt", seed, change=self.data).limited(self.n_train, seed)

    def train(
        self, device: torch.device, folder: str | Path, seed: int, lrs: Mapping[str, Sequence[float]]
    ) -> pandas.DataFrame:
        """The table of the trials of one seed, with a column ``setup``."""
        import pandas

        task, frames = self.task(seed), []
        judge = None if self.data == DOCS else accuracy
        options = {"n_jobs": studies.processes(device), "judge": judge, "progress": False}
        for setup, rates in lrs.items():
            trials = [replace(self.trials[setup], lr=lr, seed=seed) for lr in rates]
            frame = ablate(self.start(setup, seed, device), task, trials, folder, **options)
            frames.append(frame.assign(setup=setup))
        return pandas.concat(frames, ignore_index=True)

    def rows(self, device: torch.device, folder: Path) -> Iterator[Row]:
        """Yield the last row of each trial: first of those that choose, then of those that are judged."""
        run = partial(self.train, device, folder)
        choosing, best = tune_by_seed(run, self.lrs, self.choosing, self.widen, _BY)
        rates = {} if best is None else best.set_index("setup").to_dict()
        chosen = {setup: [lr] for setup, lr in rates.get("lr", {}).items()}
        at_edges = rates.get("edge", {})
        stages = {"choosing": choosing, "judging": (run(seed, chosen) for seed in self.judging if chosen)}
        about = {"data": self.data, "model": self.model, "n_train": self.n_train}
        for stage, frames in stages.items():
            for frame in map(last_rows, frames):
                yield from read_rows(frame.assign(**about, **at_stage(stage, frame, at_edges)), _COLUMNS)


@cache
def pretrained(net: str, change: str, seed: int) -> nn.Module:
    """A small net that has learned the digits as they are before that change."""
    task, learned = tasks.digits("pretrain", seed, change=change), _net(net, seed)
    fit(learned, task, FullFineTuning(), steps=PRETRAINING, lr=3e-3, batch_size=BATCH, seed=seed, progress=False)
    model = _net(net, seed)
    model.load_state_dict(learned.state_dict())  # without the mark of the method that trained it
    return model


def _net(name: str, seed: int) -> nn.Module:
    """A small net with random weights."""
    return NETS[name](seed=seed, dtype=torch.float64)


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> dict[str, float]:
    """The share of the test pictures that a net reads right."""
    return {"accuracy": float((model(task.test.inputs).argmax(-1) == task.test.targets).float().mean())}


def plan(device: torch.device) -> list[Case]:
    """What two cores can do in an hour."""
    choosing, judging = range(3), range(3, 13)
    cases = []
    for data in CHANGES:
        for net in NETS:
            for size in SIZES:
                short, long = (_template(steps, min(BATCH, size)) for steps in (TRAINING, PRETRAINING + TRAINING))
                trials = {FINE_TUNED: short, FROM_SCRATCH: short, LONGER: long}
                lrs = dict.fromkeys(trials, rates_around(3e-3, factor=3))
                cases.append(Case(data, net, size, trials, lrs, choosing, judging))
    gpu = device.type == "cuda"
    steps, size = (300, 8) if gpu else (60, 4)
    trial = _template(steps, size, eval_examples=128, autocast=torch.bfloat16)
    trials = {FINE_TUNED: trial, FROM_SCRATCH: trial}
    lrs = {FINE_TUNED: rates_around(1.25e-4, count=3), FROM_SCRATCH: rates_around(1e-3, count=3)}
    seeds = (range(2), range(2, 7 if gpu else 5))
    return [*cases, Case(DOCS, SMOLLM2, steps * size, trials, lrs, *seeds)]


def _template(steps: int, batch_size: int, **options: Any) -> Trial:
    """Full fine-tuning, evaluated before the first step and after the last; rate and seed are to be filled in."""
    return Trial(FullFineTuning(), 1e-3, steps=steps, batch_size=batch_size, eval_every=steps, **options)


def settings(device: torch.device) -> dict[str, Any]:
    """Return how the rows are made, as the record states it."""
    cases = [
        {
            **{name: getattr(case, name) for name in ("data", "model", "n_train", "widen")},
            **{name: list(getattr(case, name)) for name in ("choosing", "judging")},
            "setups": {setup: trial.to_dict() for setup, trial in case.trials.items()},
            "lrs": {setup: list(lrs) for setup, lrs in case.lrs.items()},
        }
        for case in plan(device)
    ]
    return {"cases": cases, "pretraining": {"steps": PRETRAINING, "lr": 3e-3, "batch_size": BATCH}}


def hours(device: torch.device) -> float:
    """Return how long the language model's part takes, by :mod:`lora_lab.studies.planning`; the digits take minutes."""
    (docs,) = (case for case in plan(device) if case.data == DOCS)
    return planned_hours(docs.planned, SEQ_LEN, device, off_domain=OFF_DOMAIN)


def rows(device: torch.device, folder: Path) -> Iterator[Row]:
    """Yield the last row of each trial; the small nets stay on the CPU."""
    for case in plan(device):
        yield from case.rows(device, folder)


_LOSSES = ("validation_loss", "test_loss", "score_accuracy")
line = partial(tell_trial, names=("data", "model", "n_train", "setup"), losses=_LOSSES)


RECORDER = record_trials("head_start", settings, rows, line, hours)
