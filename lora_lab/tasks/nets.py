"""Tasks of small nets, which take seconds: handwritten digits, and a hidden update of known rank."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.lora import LoRAConfig, inject, lora_layers
from lora_lab.tasks.base import Examples, Task, mean_squared_error


def digits(part: str = "adapt", seed: int = 0, n_train: int = 500) -> Task:
    """scikit-learn's handwritten digits: learn them as they are first, then moved down by one pixel.

    To a person the moved digits are the same; a net that was trained on the others gets half of them wrong.

    Args:
        part: "pretrain" (900 pictures as they are) or "adapt" (the other 897, moved; off-domain is as they were).
        seed: seeds the split and the order.
        n_train: moved pictures to train on, up to 1,200; with more of them, fewer are left as they are.

    Raises:
        ValueError: another part, or n_train is out of range.
    """
    if part not in ("pretrain", "adapt"):
        raise ValueError(f"part is {part!r}, but it must be 'pretrain' (digits as they are) or 'adapt' (moved down).")
    if not 1 <= n_train <= 1200:
        raise ValueError(f"n_train is {n_train}, but it must be from 1 to 1,200; there are 1,797 pictures in all.")
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))  # (1797,)
    upright = torch.tensor(pictures, dtype=torch.float32)[order] / 16  # (1797, 64) in [0, 1]
    moved = F.pad(upright[:, :-8], (8, 0))  # (1797, 64): without the last row of 8 pixels, an empty one before
    labels = torch.tensor(labels)[order]  # (1797,)
    n = len(labels) - 397 - n_train  # 900 unless n_train says otherwise: so many are left as they are
    as_is, down = Examples(upright[:n], labels[:n]), Examples(moved[n:], labels[n:])
    few = min(100, n // 4)
    fit_on, held_out, last = as_is[: n - 2 * few], as_is[n - 2 * few : n - few], as_is[n - few :]
    new, unseen, judged_by = down[:n_train], down[n_train : n_train + 200], down[n_train + 200 :]
    if part == "pretrain":
        own = {"train": fit_on, "validation": held_out, "test": last, "off_domain": unseen}
    else:
        own = {"train": new, "validation": unseen, "test": judged_by, "off_domain": held_out}
    return Task(
        name=f"digits-{part}", **own, about="scikit-learn's 8 x 8 digits: as they are, or moved down by a pixel"
    )


def planted(
    model: nn.Module,
    rank: int = 4,
    noise: float = 0.1,
    n_train: int = 512,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> Task:
    """A task whose answer is known: imitate ``model`` plus a hidden update of the given rank.

    The teacher is a copy of the model with an update of exactly that rank, as large as the weight itself,
    in each target layer. Inputs are Gaussian. Noise is added to the teacher's training answers and to no
    others, so a student that finds the update reaches zero validation loss, however noisy its lessons.

    Args:
        model: a net that takes (n, features); it is left as it is.
        rank: rank of the hidden update.
        noise: standard deviation of the noise, relative to that of the teacher's answers.
        n_train: number of training examples.
        targets: layers that the update touches, as in :class:`lora_lab.LoRAConfig`.
        seed: seeds all of it.

    Raises:
        ValueError: noise is negative, or as for :func:`lora_lab.inject`.
    """
    if noise < 0:
        raise ValueError(f"noise is {noise}, but a standard deviation cannot be negative.")
    teacher = copy.deepcopy(model).eval()
    inject(teacher, LoRAConfig(rank=rank, alpha=rank, targets=targets), seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    features = next(module for module in model.modules() if isinstance(module, nn.Linear)).in_features
    with torch.no_grad():
        for layer in lora_layers(teacher).values():
            layer.lora_B.copy_(draw(*layer.lora_B.shape))  # (out, rank)
            layer.lora_B.mul_(layer.base.weight.norm() / layer.delta().norm())
        inputs = draw(n_train + 3 * 256, features)
        answers = teacher(inputs)  # (n, out)
        answers[:n_train] += noise * answers.std() * draw(n_train, answers.shape[1])
        off_inputs = 3 * draw(256, features)  # three times as far out
        off_domain = Examples(off_inputs, model(off_inputs))
    rows = Examples(inputs, answers)
    return Task(
        name=f"planted-rank{rank}",
        train=rows[:n_train],
        validation=rows[n_train : n_train + 256],
        test=rows[n_train + 256 : n_train + 512],
        off_domain=off_domain,
        loss=mean_squared_error,
        about=f"a hidden update of rank {rank}, training answers with noise {noise:g}; off-domain: the model as it was",
    )
