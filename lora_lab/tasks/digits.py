"""Handwritten digits, as they are or changed: tasks for small nets, which train in seconds."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lora_lab.system.schema import Seed, check
from lora_lab.task import Examples, Task

CHANGES = {
    "moved": "moved down by a pixel",
    "inverted": "black and white swapped",
    "other digits": "5 to 9, after 0 to 4",
}
_VALIDATION = 200  # changed pictures to choose by


def digits(part: str = "adapt", seed: int = 0, n_train: int = 500, change: str = "moved") -> Task:
    """scikit-learn's handwritten digits: to be learned first as they are, then changed.

    Moved down by one pixel, each picture loses its lowest row; a net trained on the original digits misreads a quarter
    (the transformer) to more than half of them (the MLP).

    Args:
        part: "pretrain" (900 pictures as they are) or "adapt" (the other 897, changed; off-domain as they are).
        seed: of the split and of the order.
        n_train: changed pictures to train on, up to 1,200; above 500, fewer pictures stay as they are. Of the "other
            digits" there are 896, so up to 600.
        change: in :data:`CHANGES`. "other digits" are 5 to 9 as they are, and those to be learned first are 0 to 4.

    Raises:
        ValueError: ``part`` or ``change`` is another word, or ``n_train`` is out of range.
    """
    if part not in ("pretrain", "adapt"):
        raise ValueError(f"part is {part!r}, but it must be 'pretrain' (digits as they are) or 'adapt' (moved down).")
    if change not in CHANGES:
        raise ValueError(f"change is {change!r}, but it must be one of {', '.join(map(repr, CHANGES))}.")
    most = 600 if change == "other digits" else 1200
    if not 1 <= n_train <= most:
        raise ValueError(
            f"n_train is {n_train}, but with the change {change!r} it must be from 1 to {most:,}; there are 1,797 "
            "pictures in all."
        )
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(check(seed, Seed, "seed")))  # (1797,)
    upright = torch.tensor(pictures, dtype=torch.float32)[order] / 16  # (1797, 64) in [0, 1]
    labels = torch.tensor(labels)[order]  # (1797,)
    if change == "other digits":
        as_is, changed = (Examples(upright[chosen], labels[chosen]) for chosen in (labels < 5, labels >= 5))
    else:
        n = len(labels) - 397 - n_train  # pictures that stay as they are: 900 by default
        # Moved: without the last row of 8 pixels, an empty one before.
        new = F.pad(upright[n:, :-8], (8, 0)) if change == "moved" else 1 - upright[n:]  # (897, 64)
        as_is, changed = Examples(upright[:n], labels[:n]), Examples(new, labels[n:])
    n, few = len(as_is), min(100, len(as_is) // 4)
    as_is_validation = as_is[n - 2 * few : n - few]
    changed_validation = changed[n_train : n_train + _VALIDATION]
    about = f"scikit-learn's 8 x 8 digits: as they are, or {CHANGES[change]}"
    if part == "pretrain":
        train, test = as_is[: n - 2 * few], as_is[n - few :]
        return Task("digits-pretrain", train, as_is_validation, test, off_domain=changed_validation, about=about)
    train, test = changed[:n_train], changed[n_train + _VALIDATION :]
    return Task("digits-adapt", train, changed_validation, test, off_domain=as_is_validation, about=about)
