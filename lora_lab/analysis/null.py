"""The control of a training run: the same with nothing to learn.

    tuned, control = copy.deepcopy(base), copy.deepcopy(base)
    settings = {"steps": 60, "lr": 1e-3, "seed": 0}    # the same for both
    fit(tuned, task, LoRA(rank=8), **settings)
    fit(control, spectra.null(task, base), LoRA(rank=8), **settings)
    print(spectra.table(spectra.report(base, tuned)), spectra.table(spectra.report(base, control)))

A statistic's value for noise shows what chance alone gives, but noise has passed neither through the net nor through
the optimiser. Here only the labels differ: they are drawn for every batch from the base's own predictions. No model
predicts them better than the base, so on average the loss cannot fall.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_lab.task import IGNORE, Task, logits, mean_cross_entropy


@dataclass(frozen=True)
class DrawnLabels:
    """A loss on labels that are drawn anew for every batch from the predictions of a frozen model.

    In training they are drawn by torch's global generator, which ``fit`` seeds; without gradients by one that begins
    anew at every batch, so that an evaluation repeats, and does not change what training draws. Each loss costs a
    forward pass of the base too, which is a second model in memory.

    Args:
        base: the model that predicts; in evaluation mode.
        temperature: its logits are divided by it. At 1 there is nothing to learn; at infinity all labels are equally
            likely, so a confident base has one thing to learn: to be less confident.
    """

    base: nn.Module
    temperature: float = 1.0

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        generator = None if torch.is_grad_enabled() else torch.Generator(inputs.device).manual_seed(0)
        with torch.no_grad():
            scores = logits(self.base, inputs, targets).float() / self.temperature  # (32, 10) or (4, 128, 49152)
            chances = scores.flatten(0, -2).softmax(-1)  # (32, 10) or (4 * 128, 49152)
            labels = torch.multinomial(chances, 1, generator=generator).view(targets.shape)  # (32,) or (4, 128)
        labels = labels.where(targets != IGNORE, IGNORE)
        return mean_cross_entropy(logits(model, inputs, targets), labels)  # ()


def null(task: Task, base: nn.Module, temperature: float = 1.0) -> Task:
    """Return the task with labels from the base's own predictions: with it, training has nothing to learn.

    Args:
        task: whose targets are classes or next tokens.
        base: the model from which training starts; it is copied.
        temperature: as for :class:`DrawnLabels`.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}, but it must be positive: 1, or math.inf for equal chances.")
    frozen = copy.deepcopy(base).eval().requires_grad_(False)
    return replace(task, name=f"{task.name}, nothing to learn", loss=DrawnLabels(frozen, temperature))
