"""Handwritten digits, as they are or moved by a pixel: tasks for small nets, which train in seconds."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lora_lab.system.schema import Seed, check
from lora_lab.system.wording import short_repr
from lora_lab.task import Examples, Task


def digits(part: str = "adapt", seed: int = 0, n_train: int = 500) -> Task:
    """scikit-learn's handwritten digits: to be learned first as they are, then moved down by one pixel.

    The lowest row of each picture is lost; a net trained on the original digits misreads a third to a half of them.

    Args:
        part: "pretrain" (900 pictures as they are) or "adapt" (the other 897, moved; off-domain as they are).
        seed: of the split and of the order.
        n_train: moved pictures to train on, up to 1,200; above 500, fewer pictures stay as they are.

    Raises:
        ValueError: ``part`` is neither of the two, or ``n_train`` is out of range.
    """
    if not isinstance(part, str) or part not in ("pretrain", "adapt"):
        raise ValueError(
            f"part is {short_repr(part)}, but it must be 'pretrain' (digits as they are) or 'adapt' (moved down)."
        )
    seed = check(seed, Seed, "seed")
    if not 1 <= check(n_train, int, "n_train") <= 1200:
        raise ValueError(f"n_train is {n_train}, but it must be from 1 to 1,200; there are 1,797 pictures in all.")
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))  # (1797,)
    upright = torch.tensor(pictures, dtype=torch.float32)[order] / 16  # (1797, 64) in [0, 1]
    moved = F.pad(upright[:, :-8], (8, 0))  # (1797, 64): without the last row of 8 pixels, an empty one before
    labels = torch.tensor(labels)[order]  # (1797,)
    n = len(labels) - 397 - n_train  # pictures that stay as they are: 900 by default
    as_is, down = Examples(upright[:n], labels[:n]), Examples(moved[n:], labels[n:])
    few = min(100, n // 4)
    as_is_validation = as_is[n - 2 * few : n - few]
    down_validation = down[n_train : n_train + 200]
    about = "scikit-learn's 8 x 8 digits: as they are, or moved down by a pixel"
    if part == "pretrain":
        train, test = as_is[: n - 2 * few], as_is[n - few :]
        return Task("digits-pretrain", train, as_is_validation, test, off_domain=down_validation, about=about)
    train, test = down[:n_train], down[n_train + 200 :]
    return Task("digits-adapt", train, down_validation, test, off_domain=as_is_validation, about=about)
