"""Exercises of lesson 12: which learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_lab.course.exercise import exercises_of

exercise = exercises_of("12_which_rate")


# The vertex of a parabola


def three_rates(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Three ascending rates, unequally spaced, and their losses, the middle one lowest."""
    near, far = rng.permutation([2.0, 3.0])
    rates = float(rng.choice([0.001, 0.004, 0.02])) * np.array([1 / near, 1, far])
    losses = rng.uniform(0.4, 0.6) + np.array([rng.uniform(0.02, 0.05), 0, rng.uniform(0.06, 0.1)])
    return rates, losses if rng.random() < 0.5 else losses[::-1].copy()


def parabola_vertex(x: Any, losses: Any) -> float:
    """The x at which the parabola through three points is lowest."""
    square, linear, _ = np.polyfit(x, losses, 2)
    return float(-linear / (2 * square))


def slopes_at_the_points(rates: Any, losses: Any) -> float:
    """The slopes belong to the middles of the two intervals; here they are put at the outer rates."""
    x = np.log(rates)
    left, right = np.diff(losses) / np.diff(x)
    return float(np.exp(x[0] - left * (x[2] - x[0]) / (right - left)))


@exercise(
    "vertex",
    inputs=three_rates,
    mistakes={
        "The parabola is in the rate itself. Rates differ by factors: fit it in the logarithm of the rate.": (
            lambda rates, losses: parabola_vertex(rates, losses)
        ),
        "This is the logarithm of the best rate. Take exp of it.": (
            lambda rates, losses: parabola_vertex(np.log(rates), losses),
            lambda rates, losses: parabola_vertex(np.log10(rates), losses),
        ),
        "The logarithm and the power have different bases: exp undoes log, and 10 ** undoes log10.": (
            lambda rates, losses: float(np.exp(parabola_vertex(np.log10(rates), losses))),
            lambda rates, losses: float(10 ** parabola_vertex(np.log(rates), losses)),
        ),
        "This is the best rate that was tried. The lowest point of the parabola lies between the rates.": (
            lambda rates, losses: float(rates[np.argmin(losses)])
        ),
        "A slope between two points belongs to the middle between them, not to one of the points.": (
            slopes_at_the_points
        ),
        "The vertex of a x^2 + b x + c is at -b / (2 a); the 2 is missing.": (
            lambda rates, losses: float(np.exp(2 * parabola_vertex(np.log(rates), losses)))
        ),
        "The sign is wrong: the vertex of a x^2 + b x + c is at -b / (2 a).": (
            lambda rates, losses: float(np.exp(-parabola_vertex(np.log(rates), losses)))
        ),
    },
    hints=[
        "Rates are compared by their ratios, so work with x = log(rate), where ratios become differences.",
        "np.polyfit(x, losses, 2) returns a, b and c of the parabola a x^2 + b x + c through three points.",
        "Its slope 2 a x + b is zero at the lowest point. Solve for x, and take exp to have a rate again.",
    ],
    minutes=8,
    difficulty=1,
    praise="Three losses now locate the best rate more precisely than the grid does.",
)
def vertex(rates, losses):
    """The result is where the parabola through three losses, in the logarithm of the rate, is lowest."""
    square, linear, _ = np.polyfit(np.log(rates), losses, 2)
    return float(np.exp(-linear / (2 * square)))


# A grid that holds its best rate


def swept_losses(rng: np.random.Generator) -> tuple[dict[float, list[float]]]:
    """rate -> losses over three seeds, rates ascending or not; the best is inside, or at either edge.

    Some of the largest rates diverged on a seed, whose loss is infinite. One seed alone names another rate than the
    mean does.
    """
    factor, start = float(rng.choice([2.0, 3.0])), float(rng.choice([0.001, 0.002]))
    rates = [start * factor**i for i in range(5)]
    best = int(rng.choice([0, 0, 2, 4, 4]))
    means = np.array([0.5 + 0.05 * (i - best) ** 2 for i in range(5)])
    losses = means[:, None] + rng.normal(0, 0.002, (5, 3))
    other = (best + 2) % 5
    losses[other] += [0.12, 0.12, 0.12]
    losses[other, 0] = losses[best, 0] - 0.01  # the first seed prefers this rate
    if best < 3:
        losses[4, 2] = math.inf
        if rng.random() < 0.5:  # of the seeds that did not diverge this rate is the best
            losses[4, :2] = losses[best].min() + np.array([0.02, -0.08])
    return ({rates[i]: [float(loss) for loss in losses[i]] for i in rng.permutation(5)},)


def next_after(
    losses: Mapping[float, Any],
    mean: Callable[[Any], float] = lambda of_seeds: float(np.mean(of_seeds)),
    below: Callable[[float, float], float | None] = lambda edge, inner: edge**2 / inner,
    above: Callable[[float, float], float | None] = lambda edge, inner: edge**2 / inner,
    in_order: bool = True,
) -> float | None:
    """The rate beyond the edge of a grid where its best rate is, or None."""
    rates = sorted(losses) if in_order else list(losses)
    best = min(rates, key=lambda rate: mean(losses[rate]))
    if best == rates[0]:
        return below(rates[0], rates[1])
    return above(rates[-1], rates[-2]) if best == rates[-1] else None


def finite_mean(of_seeds: Any) -> float:
    """The mean of the seeds that did not diverge."""
    return float(np.mean([loss for loss in of_seeds if math.isfinite(loss)]))


@exercise(
    "next_rate",
    inputs=swept_losses,
    mistakes={
        "The best rate was taken from one seed. Average the losses over the seeds first.": (
            lambda losses: next_after(losses, mean=lambda of_seeds: of_seeds[0]),
            lambda losses: next_after(losses, mean=min),
        ),
        "A rate at which a seed diverged is not the best: the mean with an infinite loss is infinite.": (
            lambda losses: next_after(losses, mean=finite_mean)
        ),
        "The grid goes on by a factor, as it began: divide or multiply by the ratio of the two rates at its edge.": (
            lambda losses: next_after(losses, below=lambda a, b: 2 * a - b, above=lambda a, b: 2 * a - b),
            lambda losses: next_after(losses, below=lambda a, b: a / 10, above=lambda a, b: a * 10),
        ),
        "The grid grew at the wrong side. If the smallest rate is best, try a smaller one.": (
            lambda losses: next_after(
                losses, below=lambda a, b: max(losses) * b / a, above=lambda a, b: min(losses) * b / a
            )
        ),
        "If the best rate is inside the grid, there is nothing to add: return None.": (
            lambda losses: next_after(losses) or min(losses, key=lambda rate: float(np.mean(losses[rate])))
        ),
        "The result is a rate that was tried already. If the best is at an edge, the next lies beyond it.": (
            lambda losses: next_after(losses, below=lambda a, b: a, above=lambda a, b: a)
        ),
        "The largest rate can be the best too. Then a larger one must be tried.": (
            lambda losses: next_after(losses, above=lambda a, b: None)
        ),
        "The smallest rate can be the best too. Then a smaller one must be tried.": (
            lambda losses: next_after(losses, below=lambda a, b: None)
        ),
        "The rates are in any order. Sort them before you look at the edges.": (
            lambda losses: next_after(losses, in_order=False)
        ),
    },
    hints=[
        "Sort the rates, and average each one's losses over the seeds. With an infinite loss in it a mean is infinite.",
        "If the lowest mean is at the first or the last rate, the minimum may lie beyond; otherwise return None.",
        "Neighbours differ by a factor: rates[1] / rates[0] at the lower edge, rates[-1] / rates[-2] at the upper.",
    ],
    minutes=8,
    difficulty=1,
    praise="No verdict can rest on a rate at the edge. By this rule tune widens a sweep.",
    draws=60,
)
def next_rate(losses):
    """The result is the rate beyond the edge at which the lowest mean is, by the grid's factor there, or None."""
    rates = sorted(losses)
    means = [np.mean(losses[rate]) for rate in rates]
    best = int(np.argmin(means))
    if best == 0:
        return float(rates[0] ** 2 / rates[1])
    if best == len(rates) - 1:
        return float(rates[-1] ** 2 / rates[-2])
    return None


# How the best rate depends on the rank


def ranks_and_rates(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ranks, unequally spaced, and best rates that fall about as a power of them."""
    ranks = np.sort(rng.choice([1, 2, 4, 8, 16, 32, 64, 128], 5, replace=False)).astype(float)
    power = -float(rng.uniform(0.3, 0.8))
    return ranks, 0.008 * ranks**power * np.exp(rng.normal(0, 0.15, 5))


def fitted(x: Any, y: Any) -> float:
    """The slope of the straight line of least squares."""
    return float(np.polyfit(x, y, 1)[0])


@exercise(
    "power",
    inputs=ranks_and_rates,
    mistakes={
        "The line is through the numbers themselves. A power is a straight line in the logarithms of both.": (
            lambda ranks, rates: fitted(ranks, rates)
        ),
        "Only one of the two is in logarithms. A power is a straight line if both are.": (
            lambda ranks, rates: fitted(np.log(ranks), rates),
            lambda ranks, rates: fitted(ranks, np.log(rates)),
        ),
        "The axes are exchanged: the rate depends on the rank.": (
            lambda ranks, rates: fitted(np.log(rates), np.log(ranks)),
            lambda ranks, rates: 1 / fitted(np.log(rates), np.log(ranks)),
        ),
        "Only the first and the last rank count here. Use all points: the line of least squares.": (
            lambda ranks, rates: float(np.log(rates[-1] / rates[0]) / np.log(ranks[-1] / ranks[0]))
        ),
        "The sign is wrong: a rate that falls as the rank grows has a negative power.": (
            lambda ranks, rates: -fitted(np.log(ranks), np.log(rates))
        ),
        "This is the line's height at rank 1. The power is its slope.": (
            lambda ranks, rates: float(np.polyfit(np.log(ranks), np.log(rates), 1)[1])
        ),
    },
    hints=[
        "If rate = c * rank ** p, then log(rate) = log(c) + p * log(rank).",
        "So p is the slope of a straight line. np.polyfit(x, y, 1) fits one.",
        "The first number that np.polyfit returns is the slope.",
    ],
    minutes=6,
    difficulty=2,
    praise="One number now says how the rate follows the rank.",
)
def power(ranks, rates):
    """The result is p in rate = c * rank ** p, by least squares in the logarithms of all points."""
    return float(np.polyfit(np.log(ranks), np.log(rates), 1)[0])


# What another alpha does to the best rate


def tuned_rate(rng: np.random.Generator) -> tuple[float, int, int, str]:
    """A rate, the alpha that it was tuned at, another alpha, and what moves."""
    old, new = (int(alpha) for alpha in rng.choice([2, 5, 12, 32, 70], 2, replace=False))
    return float(rng.choice([5e-4, 1e-3, 2e-3])), old, new, str(rng.choice(["B", "both"]))


def rate_by_power(rate: float, old: float, new: float, power: float) -> float:
    """The rate at the new alpha, if it goes with a power of alpha."""
    return rate * (new / old) ** power


@exercise(
    "rate_for_alpha",
    inputs=tuned_rate,
    mistakes={
        "It is the wrong way round: a larger alpha makes the update larger, so the rate must fall.": (
            lambda rate, old, new, moves: rate_by_power(rate, old, new, 1 if moves == "B" else 0.5)
        ),
        "If both matrices move, the rate counts twice in the update, so take a square root.": (
            lambda rate, old, new, moves: rate_by_power(rate, old, new, -1)
        ),
        "If only B moves, the update is proportional to the rate itself, without a square root.": (
            lambda rate, old, new, moves: rate_by_power(rate, old, new, -0.5)
        ),
        "The two cases are exchanged: the root belongs to the one in which both matrices move.": (
            lambda rate, old, new, moves: rate_by_power(rate, old, new, -0.5 if moves == "B" else -1)
        ),
        "The root is taken of all, the rate included. Only the ratio of the two alphas is under it.": (
            lambda rate, old, new, moves: rate * old / new if moves == "B" else math.sqrt(rate * old / new)
        ),
        "If both matrices move, the update has the rate squared, so it goes with the root of alpha, not its square.": (
            lambda rate, old, new, moves: rate_by_power(rate, old, new, -1 if moves == "B" else -2)
        ),
        "The rate cannot stay: alpha multiplies the update.": lambda rate, old, new, moves: rate,
    },
    hints=[
        "Set the update's length at the old alpha equal to that at the new one, and solve for the new rate.",
        "If only B moves: rate * old = new_rate * new. If both move: rate ** 2 * old = new_rate ** 2 * new.",
        "So the ratio old / new multiplies the rate, or its square root does.",
    ],
    minutes=6,
    difficulty=1,
    praise="Two hypotheses, two powers: now the measurement can refute one of them.",
    draws=30,
)
def rate_for_alpha(rate, old, new, moves):
    """The result is the rate at which the update is as long with the new alpha as with the old, if ``moves`` moves."""
    return rate * (old / new) ** (1 if moves == "B" else 0.5)
