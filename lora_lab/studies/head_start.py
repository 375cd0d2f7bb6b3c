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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from lora_lab import tasks
from lora_lab.ablation import studies
from lora_lab.ablation.compare import rates_around
from lora_lab.ablation.grid import Trial
from lora_lab.methods import FullFineTuning
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.models.pretrained import SMOLLM2
from lora_lab.studies.claims.compared import DOCS, FINE_TUNED, FROM_SCRATCH, LONGER, SIZES
from lora_lab.studies.recorder import CurveSweep, TrialAndRates, plan_judges, plan_size, record_sweeps
from lora_lab.task import Task
from lora_lab.tasks.arrays import CHANGES
from lora_lab.train import fit

NETS: dict[str, Callable[..., nn.Module]] = {"transformer": DigitsTransformer, "MLP": DigitsMLP}
PRETRAINING, TRAINING = 400, 150  # steps on digits
BATCH = 32  # pictures a step
RATE = 3e-3  # of the pre-training
SEQ_LEN = 64  # tokens an example of the language model
OFF_DOMAIN = 4  # examples: what is forgotten is not asked here
COLUMNS = (
    *("data", "model", "n_train", "setup", "stage", "lr", "edge", "seed", "steps", "outcome", "reason", "step"),
    *("validation_loss", "test_loss", "score_accuracy", "commit"),
)


def draw_text(n_train: int, seed: int) -> Task:
    """Return Python's manual, of which the seed draws so many examples."""
    task = studies.docs_task(SEQ_LEN, n_train, seed)
    return replace(task, off_domain=task.off_domain[:OFF_DOMAIN])


def draw_pictures(change: str, n_train: int, seed: int) -> Task:
    """Return changed digits, of which the seed draws so many."""
    return tasks.digits("adapt", seed, change=change).limited(n_train, seed)


def make_net(net: str, seed: int) -> nn.Module:
    """Return a small net with random weights; it stays on the CPU."""
    return NETS[net](seed=seed, dtype=torch.float64)


@cache
def pretrain(net: str, change: str, seed: int) -> nn.Module:
    """Return a small net that has learned the digits as they are before that change."""
    task, learned = tasks.digits("pretrain", seed, change=change), make_net(net, seed)
    fit(learned, task, FullFineTuning(), steps=PRETRAINING, lr=RATE, batch_size=BATCH, seed=seed, progress=False)
    model = make_net(net, seed)
    model.load_state_dict(learned.state_dict())  # without the mark of the method that trained it
    return model


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> dict[str, float]:
    """Return the share of the test pictures that a net reads right."""
    return {"accuracy": float((model(task.test.inputs).argmax(-1) == task.test.targets).float().mean())}


def plan(device: torch.device) -> Iterator[CurveSweep]:
    """Yield what two cores can do in an hour."""
    yield from (_sweep_digits(data, net, size) for data in CHANGES for net in NETS for size in SIZES)
    steps, size = plan_size(device)
    options: dict[str, Any] = {"eval_examples": 128, "autocast": torch.bfloat16}
    tuned, scratch = (_plan_setup(rates_around(lr, count=3), steps, size, **options) for lr in (1.25e-4, 1e-3))
    yield CurveSweep(
        {FINE_TUNED: tuned, FROM_SCRATCH: scratch},
        *(range(2), plan_judges(device)),
        about={"data": DOCS, "model": SMOLLM2, "n_train": steps * size},
        task=partial(draw_text, steps * size),
        starts={FROM_SCRATCH: lambda seed: partial(studies.random_init, device, seed)},
        columns=COLUMNS,
    )


def _sweep_digits(data: str, net: str, size: int) -> CurveSweep:
    random, rates = partial(make_net, net), rates_around(3e-3, factor=3)
    short, long = (_plan_setup(rates, steps, min(BATCH, size)) for steps in (TRAINING, PRETRAINING + TRAINING))
    return CurveSweep(
        {FINE_TUNED: short, FROM_SCRATCH: short, LONGER: long},
        *(range(3), range(3, 13)),
        about={"data": data, "model": net, "n_train": size},
        task=partial(draw_pictures, data, size),
        starts={FINE_TUNED: partial(pretrain, net, data), FROM_SCRATCH: random, LONGER: random},
        options={"judge": accuracy, "progress": False},
        columns=COLUMNS,
    )


def _plan_setup(lrs: Sequence[float], steps: int, batch_size: int, **options: Any) -> TrialAndRates:
    """Return full fine-tuning, evaluated before the first step and after the last, and the rates that it tries."""
    return Trial(FullFineTuning(), lrs[0], steps=steps, batch_size=batch_size, eval_every=steps, **options), lrs


_PRETRAINED = {"steps": PRETRAINING, "lr": RATE, "batch_size": BATCH}
HEAD_START = record_sweeps("head_start", plan, {"pretraining": _PRETRAINED})
