"""``lora-lab record overfitting`` and ``head_start``: which method overfits or forgets, and does pre-training help?

Forgetting is measured on text that the base itself wrote, the off-domain part: the rise of the loss on it is
KL(base || tuned) (:mod:`lora_lab.analysis.divergence`). Rates are constant after the warm-up, so that the curve up to
any step is that of a run that stopped there.

overfitting  Full fine-tuning and LoRA train on small sets, at a constant rate and under a cosine for fewer epochs. For
             each size of the training set and each schedule two seeds choose a setup's learning rate by the lowest
             validation loss of its curve, and three others are judged (:mod:`lora_lab.ablation.overfitting`). The seed
             draws the training examples, their order and the adapter. A GPU is given more of everything.
head_start   Is fine-tuning better than training from scratch, and what does that depend on? Two small nets learn to
             read digits, and then a change of them: moved by a pixel, with black and white swapped, or other digits. A
             net that was pre-trained is fine-tuned on few changed pictures or on many. A net of the same shape with
             random weights learns the same from scratch, in as many steps, and in as many as pre-training and
             fine-tuning have together. The seed draws everything that is left to chance: which pictures are in which
             part, the pre-training, the random weights, the training pictures and their order. Some seeds choose each
             setup's learning rate, by the validation loss after the last step, and others are judged. The real model
             learns Python's manual in the same way, beside a model of its shape with random weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

import pandas
import torch
from torch import nn

from lora_lab import tasks
from lora_lab.ablation import materials
from lora_lab.ablation.compare import rates_around
from lora_lab.ablation.halving import Halving
from lora_lab.analysis.divergence import on_base_text
from lora_lab.methods import FullFineTuning, LoRA, PartialFineTuning
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.models.pretrained import SMOLLM2
from lora_lab.studies.claims.compared import DOCS, FINE_TUNED, FROM_SCRATCH, LONGER, SIZES
from lora_lab.studies.recorder import (
    BF16_BASE,
    CurveSweep,
    Setups,
    plan_seeds,
    plan_setups,
    plan_size,
    record_sweeps,
)
from lora_lab.task import Task
from lora_lab.tasks.arrays import CHANGES
from lora_lab.train import fit

# Overfitting

COSINE = ", cosine"  # the end of a setup's name; without it the rate is constant
LAST_BLOCKS = [f"model.layers.{i}" for i in range(26, 30)]
METHODS = {  # and the middle of the first rates
    "full": (FullFineTuning(), 1.25e-4),
    "LoRA r=1": (LoRA(1, 2), 2e-3),
    "LoRA r=8": (LoRA(8, 16), 1e-3),
    "LoRA r=64": (LoRA(64, 128), 5e-4),
    "last blocks": (PartialFineTuning(LAST_BLOCKS), 2.5e-4),
}
# Rates compare by their lowest losses so far, and one is stopped if it is behind by more than seeds differ.
HALVING = Halving(best_so_far=True, slack=0.01)
# Examples a step, tokens an example, and rates that may be added to a grid.
SIZE, SEQ_LEN, WIDEN = 8, 32, 2
CHOSEN_ON, JUDGED_ON = 64, 256  # validation examples, from the first
ON_TWO_CORES = ("full", "LoRA r=1", "LoRA r=8")  # a GPU trains all
EVALUATED = 64  # steps between evaluations, at most; small sets are evaluated after every epoch


def epochs(device: torch.device) -> tuple[dict[int, int], dict[int, int]]:
    """Return the epochs by size of the training set, at a constant rate and under a cosine, which not all have.

    That is what two cores can do in six hours, or a GPU in two.
    """
    if device.type == "cuda":
        return {64: 20, 256: 10, 1024: 10}, {64: 3, 256: 3, 1024: 3}
    return {64: 8, 256: 6, 1024: 2}, {64: 3}


def plan_overfitting(device: torch.device) -> Iterator[CurveSweep]:
    """Yield a sweep for each size of the training set."""
    judging = plan_seeds(device, 2)
    for size in epochs(device)[0]:
        yield CurveSweep(
            *(_set_up(size, device), range(2), judging),
            about={"n_train": size},
            task=partial(draw_examples, size, judging),
            best=True,
            widen=WIDEN,
            judged={"eval_examples": JUDGED_ON},
            options={"halving": HALVING},
            show=hide_few_replies,
        )


def _set_up(size: int, device: torch.device) -> Setups:
    """Return all methods at a constant rate, warmed up for as many steps whatever the size, and under a cosine."""
    setups, epoch = {}, size // SIZE
    options = {"eval_every": min(epoch, EVALUATED), "eval_examples": CHOSEN_ON}
    schedules = {"": {"schedule": "constant", "warmup": min(8, epoch)}, COSINE: {"schedule": "cosine"}}
    for (end, schedule), of_size in zip(schedules.items(), epochs(device), strict=True):
        if size in of_size:
            methods = {name + end: METHODS[name] for name in (METHODS if device.type == "cuda" else ON_TWO_CORES)}
            setups |= plan_setups(methods, epoch * of_size[size], SIZE, lean=BF16_BASE, **options, **schedule)
    return setups


def draw_examples(size: int, judging: Sequence[int], seed: int) -> Task:
    """Return the task of a seed. Those that choose are evaluated on few replies of the base, which choose nothing."""
    task = on_base_text(materials.docs_task(SEQ_LEN, size, seed))
    return replace(task, off_domain=task.off_domain[slice(0, None, 2) if seed in judging else slice(4)])


def hide_few_replies(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Return the rows without the off-domain losses of the seeds that choose, which are of too few replies."""
    return frame.assign(off_domain_loss=frame["off_domain_loss"].where(frame["stage"] == "judging"))


_STATED = {"study": "docs", "batch_size": SIZE, "seq_len": SEQ_LEN, "halving": HALVING}
OVERFITTING = record_sweeps("overfitting", plan_overfitting, _STATED)


# Head start

NETS = {"transformer": DigitsTransformer, "MLP": DigitsMLP}
BATCH = 32  # pictures a step
PRETRAINING = {"steps": 400, "lr": 3e-3, "batch_size": BATCH}
TRAINING = 150  # steps on changed digits
TEXT_LENGTH = 64  # tokens an example of the language model
OFF_DOMAIN = 4  # examples: what is forgotten is not asked here


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
    fit(learned, task, FullFineTuning(), seed=seed, progress=False, **PRETRAINING)
    model = make_net(net, seed)
    model.load_state_dict(learned.state_dict())  # without the mark of the method that trained it
    return model


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> dict[str, float]:
    """Return the share of the test pictures that a net reads right."""
    return {"accuracy": float((model(task.test.inputs).argmax(-1) == task.test.targets).float().mean())}


def plan_head_start(device: torch.device) -> Iterator[CurveSweep]:
    """Yield what two cores can do in an hour; trials are evaluated before the first step and after the last."""
    yield from (_sweep_digits(data, net, size) for data in CHANGES for net in NETS for size in SIZES)
    steps, size = plan_size(device)
    methods = {FINE_TUNED: (FullFineTuning(), 1.25e-4), FROM_SCRATCH: (FullFineTuning(), 1e-3)}
    yield CurveSweep(
        plan_setups(methods, steps, size, count=3, autocast=torch.bfloat16, eval_examples=128),
        *(range(2), plan_seeds(device, 2)),
        about={"data": DOCS, "model": SMOLLM2, "n_train": steps * size},
        task=partial(_draw_text, steps * size),
        starts={FROM_SCRATCH: lambda seed: partial(materials.random_init, device, seed)},
    )


def _draw_text(n_train: int, seed: int) -> Task:
    task = materials.docs_task(TEXT_LENGTH, n_train, seed)
    return replace(task, off_domain=task.off_domain[:OFF_DOMAIN])


def _sweep_digits(data: str, net: str, size: int) -> CurveSweep:
    random, full = partial(make_net, net), (FullFineTuning(), rates_around(3e-3, factor=3))
    plan = partial(plan_setups, batch_size=min(BATCH, size), eval_examples=None)
    longer = plan({LONGER: full}, PRETRAINING["steps"] + TRAINING)
    return CurveSweep(
        plan({FINE_TUNED: full, FROM_SCRATCH: full}, TRAINING) | longer,
        *(range(3), range(3, 13)),
        about={"data": data, "model": net, "n_train": size},
        task=partial(draw_pictures, data, size),
        starts={FINE_TUNED: partial(pretrain, net, data), FROM_SCRATCH: random, LONGER: random},
        options={"judge": accuracy, "progress": False},
    )


HEAD_START = record_sweeps("head_start", plan_head_start, {"pretraining": PRETRAINING})
