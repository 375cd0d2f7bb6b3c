"""Hidden tests of lesson 12: which learning rate."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.course.grading.invariant import Reflection, close, invariant_of


@invariant_of("vertex")
def goes_with_the_rates(vertex, rng):
    """If all rates are three times as large, so is the result, which lies between the outer rates."""
    rates, losses = 0.01 * np.array([0.4, 1, 3]), 0.5 + rng.uniform(0.02, 0.08, 3) * [1, 0, 1]
    one, three = vertex(rates, losses), vertex(3 * rates, losses)
    return np.ndim(one) == 0 and rates[0] < one < rates[2] and close(three, 3 * one)


@invariant_of("vertex")
def is_where_the_parabola_is_lowest(vertex, rng):
    """Of losses on a parabola in the logarithm of the rate the result is where that is lowest."""
    best, rates = rng.uniform(0.005, 0.02, 6), 0.01 * np.array([0.25, 1, 3])
    results = [vertex(rates, 0.4 + 0.1 * np.log(rates / lowest) ** 2) for lowest in best]
    return close(results, best)


@invariant_of("next_rate")
def goes_on_above(next_rate, rng):
    """If the largest rate is best, the result is larger by the factor between the two largest rates."""
    for factor in (2.0, 3.0, 10.0):
        rates = [0.001, 0.0015, *(0.0015 * factor**i for i in (1, 2))]
        losses = {rates[i]: (1 - 0.1 * i + rng.normal(0, 0.001, 3)).tolist() for i in rng.permutation(4)}
        if not close(next_rate(losses), rates[-1] * factor):
            return False
    return True


@invariant_of("next_rate")
def goes_on_below(next_rate, rng):
    """If the smallest rate is best, the result is smaller by the factor between the two smallest rates."""
    for factor in (2.0, 3.0, 10.0):
        rates = [0.001, 0.001 * factor, 0.0015 * factor, 0.002 * factor]
        losses = {rates[i]: (1 + 0.1 * i + rng.normal(0, 0.001, 3)).tolist() for i in rng.permutation(4)}
        if not close(next_rate(losses), 0.001 / factor):
            return False
    return True


@invariant_of("next_rate")
def is_none_inside(next_rate, rng):
    """If a rate inside the grid is best it is None, and at an edge it is not."""
    rates = [0.001, 0.002, 0.004, 0.008, 0.016]
    tables = [{rates[i]: [1 + 0.1 * abs(i - best)] * 2 for i in rng.permutation(5)} for best in (1, 2, 3, 0, 4)]
    return [next_rate(table) is None for table in tables] == [True, True, True, False, False]


@invariant_of("next_rate")
def averages_over_the_seeds(next_rate, rng):
    """The mean over all seeds decides, and it is infinite for a rate at which one of them diverged."""
    lucky = {0.001: [0.5, 0.5], 0.002: [0.1, 1.2], 0.004: [0.8, 0.9]}
    diverged = {0.004: [0.1, math.inf], 0.002: [0.5, 0.6], 0.001: [0.4, 0.5]}
    return close(next_rate(lucky), 0.0005) and close(next_rate(diverged), 0.0005)


@invariant_of("power")
def of_an_exact_law(power, rng):
    """Where the rate is exactly a power of the rank, the result is that power."""
    ranks, powers = np.array([1.0, 2.0, 8.0, 64.0]), rng.uniform(-1, 0.5, 6)
    return close([power(ranks, 0.008 * ranks**p) for p in powers], powers)


@invariant_of("power")
def of_scattered_points(power, rng):
    """Where the points scatter, it is the slope of least squares, for which all of them count."""
    ranks = np.array([1.0, 4.0, 8.0, 32.0, 128.0])
    rates = 0.008 * ranks**-0.5 * np.exp(rng.normal(0, 0.3, 5))
    x, y = np.log(ranks) - np.log(ranks).mean(), np.log(rates)
    return close(power(ranks, rates), (x @ y) / (x @ x))


@invariant_of("rate_for_alpha")
def if_B_moves(rate_for_alpha, rng):
    """If only B moves, the rate times alpha stays."""
    cases = [(rate, *map(int, rng.choice([2, 5, 12, 32, 70], 2, replace=False))) for rate in (5e-4, 1e-3, 2e-3)]
    return all(close(rate_for_alpha(rate, old, new, "B") * new / 1e-3, rate * old / 1e-3) for rate, old, new in cases)


@invariant_of("rate_for_alpha")
def if_both_move(rate_for_alpha, rng):
    """If both matrices move, the square of the rate times alpha stays, and the rate is positive."""
    cases = [(rate, *map(int, rng.choice([2, 5, 12, 32, 70], 2, replace=False))) for rate in (5e-4, 1e-3, 2e-3)]
    results = [(rate_for_alpha(*case, "both"), *case) for case in cases]
    return all(r > 0 and close(r**2 * new / 1e-6, rate**2 * old / 1e-6) for r, rate, old, new in results)


Reflection(
    "12_which_rate",
    question="Choose a claim from a paper or a blog that says at which learning rate LoRA should be trained. In "
    "five to eight sentences: what does it depend on, how was it measured, and which sweep would you run "
    "to see whether it holds for your model?",
    rubric=(
        "The claim is quoted with its source.",
        "The answer names at least two of: alpha, rank, model, length of training, batch.",
        "The sweep has rates that differ by a factor, and the answer says what happens if the best is at an edge.",
        "It says how many seeds there are, and when the answer would be undecided.",
    ),
    expected="A good sweep has five or more rates that differ by a factor of two to three, goes on if the best is "
    "at the edge, uses several seeds, chooses on validation data, and gives an interval. A rate belongs "
    "to an alpha, a model and a number of steps. If the interval is wider than the difference that the "
    "claim is about, nothing is decided.",
)
