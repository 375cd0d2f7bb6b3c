"""``lora-lab record overfitting``, ``remedies`` and ``head_start``: which method overfits or forgets, and what helps?

Forgetting is measured on text that the base itself wrote, the off-domain part: the rise of the loss on it is
KL(base || tuned) (:mod:`lora_lab.analysis.divergence`). Rates are constant after the warm-up, so that the curve up to
any step is that of a run that stopped there.

overfitting  Full fine-tuning and LoRA train on small sets, at a constant rate and under a cosine for fewer epochs. For
             each size of the training set and each schedule two seeds choose a setup's learning rate by the lowest
             validation loss of its curve, and three others are judged (:mod:`lora_lab.ablation.overfitting`). The seed
             draws the training examples, their order and the adapter. A GPU is given more of everything.
remedies     LoRA of rank 8 learns Python's manual: as it is, at three rates; with a share of the base's own replies, or
             of other text, among its training examples; with a penalty on the divergence from the base; with weight
             decay; and its adapter scaled down or up afterwards. Beside them are other ranks, full fine-tuning, and
             both at the rates of PEFT's benchmark. Forgetting is measured on replies to prompts that no replayed reply
             belongs to. Remedies are compared where they have learned as much:

    compare_over_rates(frame, "forgotten", "LoRA r=8", share=0.9)           # lora_lab.ablation.overfitting
    rank_correlations(runs, "forgotten_at_last", ["score_divergence", ...])  # lora_lab.ablation.stats

             The rows of a setup that ends in "scaled" are the same trials with their adapters at several strengths:
             ``step`` is the strength in per cent.
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
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, cast

import pandas
import torch
from torch import nn

from lora_lab import tasks
from lora_lab.ablation import materials
from lora_lab.ablation.compare import rates_around
from lora_lab.ablation.halving import Halving
from lora_lab.ablation.results import SCORE
from lora_lab.adapters.edit import strength
from lora_lab.analysis.divergence import NearBase, base_replies, mean_divergence, on_base_text, with_replay
from lora_lab.inject import lora_layers
from lora_lab.methods import FullFineTuning, LoRA, PartialFineTuning
from lora_lab.models.digits import DigitsMLP, DigitsTransformer
from lora_lab.models.pretrained import SMOLLM2
from lora_lab.studies.claims.compared import DOCS, FINE_TUNED, FROM_SCRATCH, LONGER, PARTS, SIZES
from lora_lab.studies.recorder import (
    BF16_BASE,
    BFLOAT16,
    CurveSweep,
    Setups,
    plan_seeds,
    plan_setups,
    plan_size,
    record_sweeps,
)
from lora_lab.task import Task
from lora_lab.tasks.arrays import CHANGES
from lora_lab.train import evaluate, fit

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


# Remedies

# Of the prompts: replies to train on, and to measure forgetting on.
REHEARSED, JUDGED = slice(16, None), slice(16)
LENGTH, EXAMPLES = 64, 48  # tokens of an example, and how many validation examples
FULL_RANK = 576  # the least side of the widest matrices
STRENGTHS = (0.25, 0.5, 0.75, 1.2)
R8 = LoRA(8, 16)
RATE = 2e-3  # of a remedy
PLAIN = {  # rates, of which none is chosen
    "LoRA r=8": (R8, (1e-3, 2e-3, 4e-3)),
    "LoRA r=1": (LoRA(1, 2), (4e-3,)),
    "LoRA r=64": (LoRA(64, 128), (1e-3,)),
    "full": (FullFineTuning(), (6e-5, 1.2e-4)),
    "LoRA r=32, PEFT's rate": (LoRA(32, 64), (1e-4,)),
    "full, PEFT's rate": (FullFineTuning(), (1e-5,)),
}
DECAYS = {"weight decay 3": 3.0, "weight decay 10": 10.0}
# Of the task, for LoRA of rank 8. Other text is as much prose that the base did not write, the control of its replies.
CHANGED = {
    "own replies, a quarter": lambda task: with_replay(task, base_replies(prompts=REHEARSED), 0.25),
    "own replies, half": lambda task: with_replay(task, base_replies(prompts=REHEARSED), 0.5),
    "other text, a quarter": lambda task: with_replay(
        task, task.off_domain[: len(base_replies(prompts=REHEARSED))], 0.25
    ),
    "KL penalty 0.3": lambda task: replace(task, loss=NearBase(0.3)),
    "KL penalty 1": lambda task: replace(task, loss=NearBase(1.0)),
}


def plan_remedies(device: torch.device) -> Iterator[CurveSweep]:
    """Yield what two cores can do in an hour and a half: a sweep of the task as it is, and one for each change."""
    seeds, (steps, batch_size) = plan_seeds(device), plan_size(device)
    constant = {"schedule": "constant", "eval_every": max(1, steps // 6), "eval_examples": EXAMPLES}
    plan = partial(plan_setups, steps=steps, batch_size=batch_size, **constant, **BFLOAT16)
    as_it_is = plan(PLAIN)
    for name, decay in DECAYS.items():
        as_it_is |= plan({name: (R8, (RATE,))}, weight_decay=decay)
    changed = {change: plan({change: (R8, (RATE,))}) for change in CHANGED}
    for change, setups in {None: as_it_is, **changed}.items():
        options = {"judge": DistanceFromBase(EXAMPLES, () if change else STRENGTHS)}
        task = partial(make_task, change)
        yield CurveSweep(setups, (), seeds, task=task, shared=True, options=options, show=add_strengths)


def make_task(change: str | None) -> Task:
    """Return the manual, changed or not, and the base's replies to measure forgetting on."""
    task = materials.docs_task(LENGTH)
    return on_base_text(CHANGED[change](task) if change else task, prompts=JUDGED)


@dataclass(frozen=True)
class DistanceFromBase:
    """A judge: how far a trained model has moved from its base, and its losses with the adapter at other strengths.

    Its scores are ``divergence``, KL(base || tuned) on validation examples of the new task in nats a token; ``size``,
    the Frobenius norm of the change of all weights; and, for an adapter, ``validation_0.25``, ``off_domain_0.25`` and
    so on.

    Args:
        limit: how many examples.
        strengths: of the adapter.
    """

    limit: int
    strengths: Sequence[float] = ()

    def __call__(self, model: nn.Module, task: Task) -> dict[str, float]:
        base = materials.language_model(next(model.parameters()).device)
        divergence = mean_divergence(base, model, task, "validation", limit=self.limit // 2)
        scores = {"divergence": divergence, "size": update_norm(base, model)}
        for factor in self.strengths if lora_layers(model) else ():
            with strength(model, factor):
                for part in PARTS:
                    scores[f"{part}_{factor:g}"] = evaluate(model, task, part, limit=self.limit)
        return scores


@torch.no_grad()
def update_norm(base: nn.Module, tuned: nn.Module) -> float:
    """Return the Frobenius norm of the change of all weights together, ||dW||_F."""
    if layers := lora_layers(tuned):
        changes = [layer.delta() for layer in layers.values()]
    else:
        before = dict(base.named_parameters())
        changes = [parameter - before[name] for name, parameter in tuned.named_parameters()]
    return float(sum(change.double().square().sum() for change in changes)) ** 0.5


def add_strengths(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Return the rows, and for adapters of rank 8 that were scaled a curve over their strengths, from the base on."""
    frame = frame.assign(rank=frame["rank"].fillna(FULL_RANK))
    frames = [frame]
    adapters = frame[(frame["setup"] == "LoRA r=8") & (frame["outcome"] == "done")]
    for _, curve in adapters.groupby("key", sort=False):
        first, last = cast(list[dict[str, Any]], curve.iloc[[0, -1]].to_dict("records"))
        losses = {0: first, 100: last}
        for factor in STRENGTHS:
            losses[round(100 * factor)] = {f"{part}_loss": last[f"{SCORE}{part}_{factor:g}"] for part in PARTS}
        scaled = pandas.DataFrame.from_dict(losses, "index")[[f"{part}_loss" for part in PARTS]].sort_index()
        same = {name: last[name] for name in last if not name.startswith(SCORE) and not name.endswith(("loss", "gap"))}
        frames.append(scaled.assign(**same | {"setup": "LoRA r=8, scaled", "step": scaled.index}))
    return pandas.concat(frames, ignore_index=True)


REMEDIES = record_sweeps("remedies", plan_remedies, {"study": "docs", "seq_len": LENGTH, "strengths": STRENGTHS})


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
