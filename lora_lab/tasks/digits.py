"""Handwritten digits, as they are and moved by a pixel: tasks of small nets, which take seconds."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lora_lab.task import Examples, Task


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
