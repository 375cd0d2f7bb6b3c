"""A regression task whose true update has a known rank."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lora_lab.inject import LoRAConfig, inject, lora_layers
from lora_lab.system.schema import NotNegative, Seed, Size, check
from lora_lab.task import Examples, Task, mean_squared_error


def planted(
    model: nn.Module,
    rank: int = 4,
    noise: float = 0.1,
    n_train: int = 512,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> Task:
    """A task with a known solution: imitate ``model`` plus a hidden update of the given rank.

    The teacher is a copy of the model with an update of exactly that rank, as large as the weight itself, in each
    target layer. Inputs are Gaussian, of the type of the model's weights. Noise is added to the teacher's outputs for
    training only, so a student that finds the update reaches zero validation loss, however noisy its training targets.

    Args:
        model: a net that takes (n, features); it is not changed.
        rank: of the hidden update.
        noise: standard deviation of the noise, relative to that of the teacher's outputs.
        n_train: number of training examples.
        targets: layers with a hidden update, as in :class:`lora_lab.LoRAConfig`.
        seed: of everything random.

    Raises:
        ValueError: ``noise`` is negative, the model has no linear layer, or as for
            :func:`lora_lab.inject`.
    """
    noise, n_train = check(noise, NotNegative, "noise"), check(n_train, Size, "n_train")
    if (first := next((module for module in model.modules() if isinstance(module, nn.Linear)), None)) is None:
        raise ValueError(f"A {type(model).__name__} has no linear layer, but planted needs a net of features.")
    student = copy.deepcopy(model).cpu().eval()  # a model on a GPU stays there
    teacher = copy.deepcopy(student)
    inject(teacher, LoRAConfig(rank=rank, alpha=rank, targets=targets), seed=seed)
    generator = torch.Generator().manual_seed(check(seed, Seed, "seed"))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=first.weight.dtype)

    with torch.no_grad():
        for layer in lora_layers(teacher).values():
            layer.lora_B.copy_(draw(*layer.lora_B.shape))  # (out, rank)
            layer.lora_B.mul_(cast(Tensor, layer.base.weight).norm() / layer.delta().norm())
        inputs = draw(n_train + 3 * 256, first.in_features)
        outputs = teacher(inputs)  # (n, out)
        outputs[:n_train] += noise * outputs.std() * draw(n_train, outputs.shape[1])
        off_inputs = 3 * draw(256, first.in_features)  # three times as far out
        off_domain = Examples(off_inputs, student(off_inputs))
    rows = Examples(inputs, outputs)
    return Task(
        name=f"planted-rank{rank}",
        train=rows[:n_train],
        validation=rows[n_train : n_train + 256],
        test=rows[n_train + 256 : n_train + 512],
        off_domain=off_domain,
        loss=mean_squared_error,
        about=f"a hidden update of rank {rank}, training answers with noise {noise:g}; off-domain: the model as it was",
    )
