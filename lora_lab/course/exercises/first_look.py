"""Exercises of lesson 00: a first look."""

from __future__ import annotations

import numpy as np
import torch

from lora_lab.course.exercise import exercises_of, normal

exercise = exercises_of("00_first_look")


def layer_and_dial(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """W (out, in), A (r, in), B (out, r) and x (in), whose sizes all differ, and a scaling s of either sign."""
    inp, out = (int(size) for size in rng.permutation([6, 7, 8])[:2])
    rank = int(rng.integers(2, 5))
    return (
        normal(rng, out, inp),
        normal(rng, rank, inp),
        normal(rng, out, rank),
        normal(rng, inp),
        float(rng.choice([-1, 1])) * rng.uniform(0.3, 0.8),
    )


@exercise(
    "one_line",
    inputs=layer_and_dial,
    mistakes={
        "The shapes do not fit. x meets A first, and then B: B @ (A @ x).": (
            lambda W, A, B, x, s: W @ x + s * (A @ B @ x)
        ),
        "x meets B first, or A is left out. x has as many numbers as A has columns, so it goes through A first.": (
            lambda W, A, B, x, s: W @ x + s * (A @ (B @ x))
        ),
        "B is skipped. A leaves r numbers, and B turns them into as many as W @ x has.": (
            lambda W, A, B, x, s: W @ x + s * (A @ x)
        ),
        "The update is a matrix, not a vector. Multiply A by x with @, and B by the result with @.": (
            lambda W, A, B, x, s: W @ x + s * (B @ A)
        ),
        "* multiplies entry by entry. A matrix times a vector is written with @.": (
            lambda W, A, B, x, s: W @ x + s * (B * (A @ x)),
            lambda W, A, B, x, s: W @ x + s * (B * (A * x)),
        ),
        "The dial does nothing. Multiply the update by s.": lambda W, A, B, x, s: W @ x + B @ (A @ x),
        "The update is added twice or more. Only one path goes through A and B, and s multiplies it once.": (
            lambda W, A, B, x, s: W @ x + s * s * (B @ (A @ x)),
            lambda W, A, B, x, s: W @ x + 2 * s * (B @ (A @ x)),
        ),
        "The frozen path is missing. The update is added to W @ x.": lambda W, A, B, x, s: s * (B @ (A @ x)),
        "W @ x is scaled as well. s multiplies the update alone.": lambda W, A, B, x, s: s * (W @ x + B @ (A @ x)),
        "The update is subtracted. It is added to W @ x.": lambda W, A, B, x, s: W @ x - s * (B @ (A @ x)),
    },
    hints=[
        "x has two paths: one through W, and one through the two small matrices.",
        "A reads x and leaves r numbers. B turns those r numbers into as many as W @ x has.",
        "What is missing is B times (A times x).",
    ],
    minutes=3,
    difficulty=1,
    praise="This one line is LoRA: a frozen matrix, two small ones beside it, and a scaling that a dial can turn.",
)
def one_line(W, A, B, x, s):
    """The result is W x + s B A x, for several sizes, ranks and scalings."""
    return W @ x + s * (B @ (A @ x))
