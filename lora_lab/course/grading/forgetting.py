"""Hidden tests of lesson 08: forgetting."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from lora_lab.course.grading.invariant import Reflection, close, invariant_of


@invariant_of("temperature")
def divides_the_judged_logits(temperature, rng):
    """With a single temperature to choose from, the result is the loss of the judged logits divided by it."""
    logits, judged = torch.from_numpy(rng.normal(0, 3, (2, 12, 5)))
    labels, judged_labels = torch.from_numpy(rng.integers(0, 5, (2, 12)))
    losses = [temperature(logits, labels, judged, judged_labels, [T]) for T in (0.5, 2.0, 4.0)]
    expected = [-(judged / T).log_softmax(1)[range(12), judged_labels].mean() for T in (0.5, 2.0, 4.0)]
    return close([float(loss) for loss in losses], [float(loss) for loss in expected])


@invariant_of("temperature")
def is_chosen_on_the_others(temperature, rng):
    """Of several temperatures it takes the one with the lowest loss on the other examples."""
    for confidence in (1.5, 4.0, 8.0):
        labels, judged_labels = torch.from_numpy(rng.integers(0, 5, (2, 60)))
        logits = confidence * (F.one_hot(labels, 5) + torch.from_numpy(rng.normal(0, 0.8, (60, 5))))
        judged = confidence / 3 * (F.one_hot(judged_labels, 5) + torch.from_numpy(rng.normal(0, 0.4, (60, 5))))
        temperatures = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
        losses = [float(-(logits / T).log_softmax(1)[range(60), labels].mean()) for T in temperatures]
        best = temperatures[losses.index(min(losses))]
        expected = float(-(judged / best).log_softmax(1)[range(60), judged_labels].mean())
        if not close(float(temperature(logits, labels, judged, judged_labels, temperatures)), expected):
            return False
    return True


@invariant_of("equal_learning")
def reads_at_equal_learning(equal_learning, rng):
    """The two numbers are the rise of the off-domain loss where each run has learned the amount, full first."""
    for amount in (4.0, 2.0):  # of the 4 that the run which learned less has learned
        one = {"validation": 9 - np.array([0.0, 1, 2, 4]), "off_domain": 0.3 + np.cumsum([0, *rng.uniform(0.1, 1, 3)])}
        other = {
            "validation": 9 - np.array([0.0, 2, 4, 8]),
            "off_domain": 0.7 + np.cumsum([0, *rng.uniform(0.1, 1, 3)]),
        }
        places = [list(9 - run["validation"]).index(amount) for run in (one, other)]
        expected = [
            run["off_domain"][place] - run["off_domain"][0] for run, place in zip((one, other), places, strict=True)
        ]
        if not (
            close(equal_learning(one, other, amount / 4), expected)
            and close(equal_learning(other, one, amount / 4), expected[::-1])
        ):
            return False
    return True


@invariant_of("equal_learning")
def follows_the_line_between(equal_learning, rng):
    """Between two evaluations it follows the straight line."""
    slow, fast = np.array([0.0, 1, 2, 3, 4]), np.array([0.0, 2, 4, 6, 8])
    lost = np.cumsum(rng.uniform(0.1, 1, (2, 5)), axis=1)
    runs = [{"validation": 9 - learned, "off_domain": each} for learned, each in zip((slow, fast), lost, strict=True)]
    expected = [np.interp(0.85 * 4, each, of - of[0]) for each, of in zip((slow, fast), lost, strict=True)]
    return close(equal_learning(*runs, 0.85), expected)


@invariant_of("equal_learning")
def reads_where_it_was_first_learned(equal_learning, rng):
    """The amount is a share of what the weaker run learned at its best, and counts where it was first learned."""
    turning, lasting = np.array([0.0, 2, 4, 3.6, 2]), np.array([0.0, 3, 5, 7, 8])
    lost = np.cumsum(rng.uniform(0.1, 1, (2, 5)), axis=1)
    runs = [
        {"validation": 9 - learned, "off_domain": each} for learned, each in zip((turning, lasting), lost, strict=True)
    ]
    expected = [np.interp(3.0, each[:3], (of - of[0])[:3]) for each, of in zip((turning, lasting), lost, strict=True)]
    return close(equal_learning(*runs, 0.75), expected)


Reflection(
    "08_forgetting",
    question="*LoRA learns less and forgets less.* In five to eight sentences: how can both halves be true "
    "without one method being better than the other, at which point of two runs would you compare what "
    "was forgotten, and what would you measure to find out whether something was lost or only covered?",
    rubric=(
        "The answer says that forgetting goes along with learning, so that less of both can come from a lower rate.",
        "The runs are compared where they have learned equally much, or at equal validation loss.",
        "It says how the rates were chosen, or that the choice must not decide the result.",
        "It names a measurement that separates lost from covered, such as a temperature, or a few old examples.",
    ),
    expected="With a lower rate any method learns less and forgets less, so the two must be read where they have "
    "learned the same amount. A rate is chosen for each method by what it learns, and full fine-tuning "
    "compared with itself at rates that tie shows how much the choice alone makes. Old answers that come "
    "back after dividing the logits, or after a few old examples, were covered and not lost.",
)
