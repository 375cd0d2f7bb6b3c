"""Exercises of lesson 08: forgetting."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from lora_lab.ablation.overfitting import interpolate_at
from lora_lab.course.exercise import exercises_of

exercise = exercises_of("08_forgetting")


def overconfident(rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """Logits (pictures, classes) and labels to fit a temperature on, others to judge it on, and temperatures."""
    classes = 5

    def part(count: int, confidence: float) -> tuple[torch.Tensor, torch.Tensor]:
        labels = rng.integers(0, classes, count)
        logits = rng.normal(size=(count, classes))
        logits[np.arange(count), labels] += 1.0
        return torch.tensor(confidence * logits), torch.tensor(labels)

    logits, labels = part(30, rng.uniform(4, 6))
    judged, judged_labels = part(20, rng.uniform(9, 14))
    temperatures = torch.tensor(rng.permutation([0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0]))
    return logits, labels, judged, judged_labels, temperatures


def _best(logits, labels, temperatures):
    return min(temperatures, key=lambda T: F.cross_entropy(logits / T, labels))


def _multiplied(logits, labels, judged, judged_labels, temperatures):
    return F.cross_entropy(judged * _best(logits, labels, temperatures), judged_labels)


def _probabilities(logits, labels, judged, judged_labels, temperatures):
    best = min(temperatures, key=lambda T: F.cross_entropy(logits.softmax(1) / T, labels))
    return F.cross_entropy(judged.softmax(1) / best, judged_labels)


def _by_accuracy(logits, labels, judged, judged_labels, temperatures):
    best = max(temperatures, key=lambda T: ((logits / T).argmax(1) == labels).sum())
    return F.cross_entropy(judged / best, judged_labels)


@exercise(
    "temperature",
    inputs=overconfident,
    mistakes={
        "You multiply by T. A temperature above 1 must make the model less sure, so divide.": (
            _multiplied,
            lambda logits, labels, judged, judged_labels, temperatures: F.cross_entropy(
                judged * min(temperatures, key=lambda T: F.cross_entropy(logits * T, labels)), judged_labels
            ),
        ),
        "You divide probabilities. Divide the logits; cross_entropy does the rest.": (
            _probabilities,
            lambda logits, labels, judged, judged_labels, temperatures: F.cross_entropy(
                judged.softmax(1) / _best(logits, labels, temperatures), judged_labels
            ),
        ),
        "You chose T by accuracy, which is the same at every T. Choose the lowest loss.": _by_accuracy,
        "You fitted T on what judges it. Fit it on logits and labels, then judge on the others.": (
            lambda logits, labels, judged, judged_labels, temperatures: F.cross_entropy(
                judged / _best(judged, judged_labels, temperatures), judged_labels
            )
        ),
        "This is the loss of the examples that T was fitted on. Judge it on the others.": (
            lambda logits, labels, judged, judged_labels, temperatures: F.cross_entropy(
                logits / _best(logits, labels, temperatures), labels
            )
        ),
        "Nothing is scaled yet. Divide the judged logits by the temperature that you chose.": (
            lambda logits, labels, judged, judged_labels, temperatures: F.cross_entropy(judged, judged_labels)
        ),
        "This is the temperature itself. Return the loss of the judged logits after dividing by it.": (
            lambda logits, labels, judged, judged_labels, temperatures: _best(logits, labels, temperatures)
        ),
    },
    hints=[
        "F.cross_entropy(logits / T, labels) is the loss at a temperature T.",
        "min(temperatures, key=...) returns the temperature for which the function after key is smallest.",
        "Choose T with logits and labels; then return F.cross_entropy(judged / T, judged_labels).",
    ],
    minutes=10,
    difficulty=2,
    praise="Dividing changes no answer. What is left cannot be mended by making all answers less sure by one factor.",
    draws=10,
)
def temperature(logits, labels, judged, judged_labels, temperatures):
    """The result is the loss of the judged logits divided by the temperature that suits the other examples best."""
    best = min(temperatures, key=lambda T: F.cross_entropy(logits / T, labels))
    return F.cross_entropy(judged / best, judged_labels)


def two_runs(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
    """For two methods the validation and the off-domain loss at each evaluation, from before training; and a share."""
    start, off_domain, count = rng.uniform(3, 4), rng.uniform(0.1, 0.5), 14

    def run(learned: float, turn: int) -> dict[str, np.ndarray]:
        places = np.arange(count)
        fallen = np.where(places < turn, 1 - (1 - places / turn) ** 2, 1 - 0.06 * (places - turn))
        rise = np.cumsum(np.r_[0, rng.uniform(0.1, 0.4, count - 1)])
        return {"validation": start - learned * fallen, "off_domain": off_domain + rise}

    runs = [run(rng.uniform(2.5, 2.8), int(rng.integers(4, 6))), run(rng.uniform(1.8, 2.2), int(rng.integers(8, 11)))]
    order = rng.permutation(2)  # either may be the one that learns less
    return runs[order[0]], runs[order[1]], float(rng.choice([0.8, 0.9]))


def _learned(run):
    return run["validation"][0] - run["validation"]


def _lost(run):
    return run["off_domain"] - run["off_domain"][0]


def _at(run, amount):
    return interpolate_at(_learned(run), _lost(run), amount)


def _first(run, amount):
    return (_learned(run) >= amount).argmax()


def _amount(full, lora, share):
    return share * min(_learned(full).max(), _learned(lora).max())


def _same_step(full, lora, share):
    place = max(_first(run, _amount(full, lora, share)) for run in (full, lora))
    return _lost(full)[place], _lost(lora)[place]


def _first_evaluation(full, lora, share):
    return tuple(_lost(run)[_first(run, _amount(full, lora, share))] for run in (full, lora))


def _evaluation_before(full, lora, share):
    return tuple(_lost(run)[_first(run, _amount(full, lora, share)) - 1] for run in (full, lora))


def _nearest_evaluation(full, lora, share):
    amount = _amount(full, lora, share)
    return tuple(_lost(run)[np.abs(_learned(run) - amount).argmin()] for run in (full, lora))


def _larger_amount(full, lora, share):
    amount = share * max(_learned(full).max(), _learned(lora).max())
    return _at(full, amount), _at(lora, amount)


def _more_than_one_learned(full, lora, share):
    amount = max(_learned(full).max(), _learned(lora).max())
    return tuple(_lost(run)[_first(run, amount)] for run in (full, lora))


def _after_the_minimum(full, lora, share):
    amount = _amount(full, lora, share)
    return tuple(_lost(run)[np.flatnonzero(_learned(run) >= amount)[-1]] for run in (full, lora))


def _learned_at_last(full, lora, share):
    amount = share * min(_learned(full)[-1], _learned(lora)[-1])
    return _at(full, amount), _at(lora, amount)


@exercise(
    "equal_learning",
    inputs=two_runs,
    mistakes={
        "Each is read at its own best. The one that learned less has forgotten less, which proves nothing.": (
            lambda full, lora, share: tuple(_lost(run)[_learned(run).argmax()] for run in (full, lora))
        ),
        "Each is read at its last step. They have not learned the same amount there.": (
            lambda full, lora, share: (_lost(full)[-1], _lost(lora)[-1])
        ),
        "Both are read at the same step. Equal steps are not equal learning.": (
            _same_step,
            lambda full, lora, share: tuple(
                _lost(run)[_first(full, _amount(full, lora, share))] for run in (full, lora)
            ),
        ),
        "This is read at an evaluation, where more or less is learned. Follow the straight line to the amount.": (
            _first_evaluation,
            _evaluation_before,
            _nearest_evaluation,
        ),
        "The amount is what a run has learned at the last step. Take what it has learned at its best.": (
            _learned_at_last
        ),
        "Each has its own amount. Take a share of the smaller of the two amounts for both.": (
            lambda full, lora, share: tuple(_at(run, share * _learned(run).max()) for run in (full, lora))
        ),
        "One of them never learned that much. Take the smaller of the two amounts.": (
            _larger_amount,
            _more_than_one_learned,
            lambda full, lora, share: tuple(
                _lost(run)[_first(run, share * max(_learned(full).max(), _learned(lora).max()))] for run in (full, lora)
            ),
        ),
        "The whole amount is used. Multiply it by the share.": (
            lambda full, lora, share: tuple(_at(run, _amount(full, lora, 1)) for run in (full, lora))
        ),
        "This is read after the minimum. Take the place at which the amount is first learned.": _after_the_minimum,
        "These are losses. Forgetting is how far the off-domain loss has risen since the start.": (
            lambda full, lora, share: tuple(
                interpolate_at(_learned(run), run["off_domain"], _amount(full, lora, share)) for run in (full, lora)
            )
        ),
        "The two numbers are in the other order. Return that of full first.": (
            lambda full, lora, share: (_at(lora, _amount(full, lora, share)), _at(full, _amount(full, lora, share)))
        ),
    },
    hints=[
        'What a run has learned at each evaluation is run["validation"][0] - run["validation"].',
        "The amount is share times the smaller of the two largest values of that, for both runs.",
        'What a run has lost at each evaluation is run["off_domain"] - run["off_domain"][0]; read it at the amount.',
    ],
    minutes=12,
    difficulty=2,
    praise="Now a method that learns nothing can no longer win by forgetting nothing.",
    draws=12,
)
def equal_learning(full, lora, share):
    """The results are how much each has forgotten where it first learned a share of what the weaker one learned."""
    learned = [run["validation"][0] - run["validation"] for run in (full, lora)]
    lost = [run["off_domain"] - run["off_domain"][0] for run in (full, lora)]
    amount = share * min(each.max() for each in learned)
    return interpolate_at(learned[0], lost[0], amount), interpolate_at(learned[1], lost[1], amount)
