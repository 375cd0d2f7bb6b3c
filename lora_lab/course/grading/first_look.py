"""Hidden tests of lesson 00: a first look."""

from __future__ import annotations

import torch

from lora_lab.course.grading.invariant import Reflection, close, invariant_of


@invariant_of("one_line")
def is_the_frozen_matrix_with_the_dial_at_zero(one_line, rng):
    """With s = 0 the result is W x."""
    W, A, B, x = (torch.from_numpy(rng.normal(size=shape)) for shape in ((6, 8), (3, 8), (6, 3), 8))
    return close(one_line(W, A, B, x, 0.0), W @ x)


@invariant_of("one_line")
def goes_through_A_and_then_B(one_line, rng):
    """What a positive s adds has the direction of B A x."""
    W, A, B, x = (torch.from_numpy(rng.normal(size=shape)) for shape in ((6, 8), (3, 8), (6, 3), 8))
    added, expected = one_line(W, A, B, x, 0.7) - W @ x, B @ A @ x
    return close(added / added.norm(), expected / expected.norm())


@invariant_of("one_line")
def follows_the_dial(one_line, rng):
    """It is B A x times s, for positive and for negative s."""
    W, A, B, x = (torch.from_numpy(rng.normal(size=shape)) for shape in ((7, 6), (4, 6), (7, 4), 6))
    return all(close(one_line(W, A, B, x, s) - W @ x, s * (B @ A @ x)) for s in (-0.6, 0.4, 1.3))


Reflection(
    "00_first_look",
    question="Explain to somebody who uses chat programs and has never seen a matrix what an adapter is, what "
    "happens to the model when it is switched off, and why its file is small. Five to eight sentences, "
    "without a formula.",
    rubric=(
        "The answer says that the model's own numbers stay as they are.",
        "It says that switching off brings the old model back exactly, and why.",
        "It says why the file is small without claiming that the model itself becomes smaller or faster.",
        "It would be understood by the person whom it is for.",
    ),
    expected="The model's numbers are frozen; two small tables stand beside each of the large ones, and what they "
    "compute is added. Switched off, nothing is added, so the model is the old one, bit for bit. The "
    "file holds the small tables alone. The model has to be there in any case, so it takes no less "
    "memory for its own numbers.",
)
