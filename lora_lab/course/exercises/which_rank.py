"""Exercises of lesson 06: which rank is enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import norm, t

from lora_lab.course.exercise import exercises_of

exercise = exercises_of("06_which_rank")


def paired_losses(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Test losses of two ranks over the same 5 to 8 seeds, which move both up and down together."""
    seeds = int(rng.integers(5, 9))
    shared = rng.normal(1, 0.3, seeds)
    return shared + rng.normal(0.05, 0.02, seeds), shared + rng.normal(0, 0.02, seeds)


def t_quantile(n: int) -> float:
    """Student's t with n - 1 degrees of freedom: 95 % lie below."""
    return float(t.ppf(0.95, n - 1))


def bound(mean: Any, sd: Any, n: int) -> float:
    """The upper bound from the mean difference and its standard deviation over n seeds."""
    return float(mean + t_quantile(n) * sd / math.sqrt(n))


@exercise(
    "upper_bound",
    inputs=paired_losses,
    mistakes={
        "The quantile is the normal distribution's. With few seeds take Student's t with n - 1 degrees of freedom.": (
            lambda a, b: float(np.mean(a - b) + 1.645 * np.std(a - b, ddof=1) / math.sqrt(len(a))),
            lambda a, b: float(np.mean(a - b) + norm.ppf(0.95) * np.std(a - b, ddof=1) / math.sqrt(len(a))),
        ),
        "The bound is two-sided. A one-sided bound of 95 % takes the quantile 0.95, not 0.975.": (
            lambda a, b: float(np.mean(a - b) + t.ppf(0.975, len(a) - 1) * np.std(a - b, ddof=1) / math.sqrt(len(a)))
        ),
        "The degrees of freedom are n - 1, one fewer than there are seeds.": (
            lambda a, b: float(np.mean(a - b) + t.ppf(0.95, len(a)) * np.std(a - b, ddof=1) / math.sqrt(len(a)))
        ),
        "This is the spread of one seed. The mean of n seeds scatters less: divide by the square root of n.": (
            lambda a, b: float(np.mean(a - b) + t_quantile(len(a)) * np.std(a - b, ddof=1))
        ),
        "The standard deviation divides by n. With an estimated mean it divides by n - 1: ddof=1.": (
            lambda a, b: bound(np.mean(a - b), np.std(a - b), len(a))
        ),
        "The spreads of a and b were taken separately. The seeds pair them: take the differences first.": (
            lambda a, b: bound(np.mean(a - b), math.sqrt(np.var(a, ddof=1) + np.var(b, ddof=1)), len(a)),
            lambda a, b: float(
                np.mean(a - b)
                + t.ppf(0.95, 2 * len(a) - 2) * math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / len(a))
            ),
        ),
        "This is the mean difference alone. The upper bound adds t times sd / sqrt(n).": (
            lambda a, b: float(np.mean(a - b))
        ),
        "This is the lower bound. The upper one adds to the mean difference.": (
            lambda a, b: float(2 * np.mean(a - b) - bound(np.mean(a - b), np.std(a - b, ddof=1), len(a)))
        ),
        "The difference has the wrong sign. It is positive where the first rank has the higher loss.": (
            lambda a, b: bound(np.mean(b - a), np.std(a - b, ddof=1), len(a))
        ),
    },
    hints=[
        "The losses come in pairs, one for each seed: work with d = a - b.",
        "d.std(ddof=1) is the standard deviation of one difference; that of their mean is smaller by sqrt(n).",
        "t.ppf(0.95, n - 1) from scipy.stats is the quantile that goes with n seeds.",
    ],
    minutes=8,
    difficulty=1,
    praise="With this bound a rank is enough because the data say so, and not because one seed was lucky.",
)
def upper_bound(a, b):
    """The result is the one-sided 95 % upper bound of the mean of a - b, for any number of paired seeds."""
    d = a - b
    return float(d.mean() + t.ppf(0.95, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)))


def ranks_and_bounds(rng: np.random.Generator) -> tuple[dict[int, tuple[float, float]], float]:
    """rank -> (mean, upper bound) of its loss above the largest rank's, ranks in any order; and the margin.

    The mean of one rank is below the margin and its bound above it. Sometimes no rank is enough, and sometimes a rank
    above the smallest that is enough is not shown to be. Among ranks that are enough, the losses come in any order.
    """
    margin = float(rng.choice([0.01, 0.02, 0.05]))
    lucky = float(rng.uniform(0.2, 0.8))
    table = {
        1: (4 * margin, 5 * margin),
        2: (lucky * margin, (1 + lucky) * margin),
        4: (0.3 * margin, 0.8 * margin),
        8: (0.25 * margin, 0.7 * margin),
        16: (0.1 * margin, 0.4 * margin),
    }
    case = rng.random()
    if case < 0.35:  # none is enough
        table |= {4: (0.9 * margin, 1.2 * margin), 8: (0.7 * margin, 1.3 * margin), 16: (0.6 * margin, 1.1 * margin)}
    elif case < 0.7:  # a rank between two that are enough is open
        table |= {8: (0.35 * margin, 1.2 * margin)}
    enough = [rank for rank, (_, upper) in table.items() if upper < margin]
    table |= {rank: table[int(other)] for rank, other in zip(enough, rng.permutation(enough), strict=True)}
    return {int(rank): table[int(rank)] for rank in rng.permutation(list(table))}, margin


def first_that_is_enough(table: Any, margin: float) -> int | None:
    """The first in the order of the table."""
    return next((rank for rank, (_, upper) in table.items() if upper < margin), None)


def down_from_the_largest(table: Any, margin: float) -> int | None:
    """The last before a rank that is not shown to be enough, from the largest down."""
    smallest = None
    for rank in sorted(table, reverse=True):
        if table[rank][1] >= margin:
            break
        smallest = rank
    return smallest


@exercise(
    "smallest_enough",
    inputs=ranks_and_bounds,
    mistakes={
        "A mean below the margin may be one lucky seed. The upper bound must be below it.": (
            lambda table, margin: min(rank for rank, (mean, _) in table.items() if mean < margin)
        ),
        "If no rank is shown to be enough, the answer is None: more seeds are needed, and not the largest rank.": (
            lambda table, margin: min(
                (rank for rank, (_, upper) in table.items() if upper < margin), default=max(table)
            )
        ),
        "This is the largest rank that is enough. You pay for each rank, so take the smallest.": (
            lambda table, margin: max((rank for rank, (_, upper) in table.items() if upper < margin), default=None)
        ),
        "This is the rank with the lowest loss. A rank need not win: its upper bound must be below the margin.": (
            lambda table, margin: min(table, key=lambda rank: table[rank][0])
        ),
        "This is the rank whose bound is nearest to the margin. Take the smallest rank, whatever its bound.": (
            lambda table, margin: max(
                (rank for rank, (_, upper) in table.items() if upper < margin),
                key=lambda rank: table[rank][1],
                default=None,
            )
        ),
        "This is the first in the table that is enough. The ranks come in any order: take the smallest.": (
            first_that_is_enough
        ),
        "From the largest rank down you stopped at one that is open. A smaller rank may still be enough.": (
            down_from_the_largest
        ),
        "The comparison has the other direction. A rank is enough if its bound is below the margin.": (
            lambda table, margin: min((rank for rank, (_, upper) in table.items() if upper > margin), default=None)
        ),
    },
    hints=[
        "Go through sorted(table), from the smallest rank to the largest, and stop at the first that is enough.",
        "A rank is enough if its upper bound, the second of the two numbers, is below the margin.",
        "min(..., default=None) answers None for an empty sequence.",
    ],
    minutes=10,
    difficulty=2,
    praise="Your rule can say that it does not know.",
    draws=60,
)
def smallest_enough(table, margin):
    """The result is the smallest rank whose upper bound is below the margin, or None if there is none."""
    return min((rank for rank, (_, upper) in table.items() if upper < margin), default=None)


def spread_and_margin(rng: np.random.Generator) -> tuple[float, float]:
    """The standard deviation of a paired difference, and a margin, that need between 2 and about 45 seeds."""
    margin = float(rng.uniform(0.01, 0.05))
    ratio = rng.uniform(0.05, 0.18) if rng.random() < 0.3 else rng.uniform(0.3, 2.5)  # below 0.18 two are enough
    return float(margin * ratio), margin


def both(n: int, power: float = 0.8) -> float:
    """The sum of the quantiles of Student's t that a bound of 95 % and a power need."""
    return t_quantile(n) + float(t.ppf(power, n - 1))


def seeds_until(margin: float, reach: Callable[[int], float]) -> int:
    """The smallest number of seeds at which ``reach`` is below the margin."""
    return next(n for n in range(2, 10_000) if reach(n) < margin)


@exercise(
    "seeds_needed",
    inputs=spread_and_margin,
    mistakes={
        "The power is ignored. At this number only about half of all sweeps decide: add the quantile 0.80.": (
            lambda sd, margin: seeds_until(margin, lambda n: t_quantile(n) * sd / math.sqrt(n))
        ),
        "The quantiles are the normal distribution's, which asks for too few seeds where they are few.": (
            lambda sd, margin: math.ceil(((norm.ppf(0.95) + norm.ppf(0.8)) * sd / margin) ** 2)
        ),
        "The spread of a mean falls with the square root of n, not with n itself.": (
            lambda sd, margin: seeds_until(margin, lambda n: both(n) * sd / n)
        ),
        "The quantiles change with the number of seeds: n - 1 degrees of freedom, also while n grows.": (
            lambda sd, margin: seeds_until(margin, lambda n: both(10) * sd / math.sqrt(n))
        ),
        "The bound of the lesson is one-sided: its quantile is 0.95, not 0.975.": (
            lambda sd, margin: seeds_until(
                margin, lambda n: float(t.ppf(0.975, n - 1) + t.ppf(0.8, n - 1)) * sd / math.sqrt(n)
            )
        ),
        "The quantile of the power is subtracted. A higher power takes more seeds.": (
            lambda sd, margin: seeds_until(margin, lambda n: both(n, 0.2) * sd / math.sqrt(n))
        ),
        "This number of seeds is one too few: at the result itself the sum must be below the margin.": (
            lambda sd, margin: seeds_until(margin, lambda n: both(n) * sd / math.sqrt(n)) - 1
        ),
        "This is one seed more than needed.": (
            lambda sd, margin: seeds_until(margin, lambda n: both(n) * sd / math.sqrt(n)) + 1
        ),
        "This starts too late: two seeds may be enough, so begin at n = 2.": (
            lambda sd, margin: max(3, seeds_until(margin, lambda n: both(n) * sd / math.sqrt(n))),
            lambda sd, margin: max(5, seeds_until(margin, lambda n: both(n) * sd / math.sqrt(n))),
            lambda sd, margin: max(8, seeds_until(margin, lambda n: both(n) * sd / math.sqrt(n))),
        ),
    },
    hints=[
        "The two quantiles are t.ppf(0.95, n - 1) and t.ppf(0.8, n - 1).",
        "The quantiles depend on n too, so try n = 2, 3, 4 and so on until the left side is below the margin.",
        "(t.ppf(0.95, n - 1) + t.ppf(0.8, n - 1)) * sd / math.sqrt(n) is the left side for n seeds.",
    ],
    minutes=6,
    difficulty=2,
    praise="Half the margin costs up to four times the seeds, so choose the margin before you pay.",
    draws=60,
)
def seeds_needed(sd, margin):
    """The result is the smallest number of seeds with which a sweep over two equal ranks has a power of about 80 %."""
    n = 2
    while (t.ppf(0.95, n - 1) + t.ppf(0.8, n - 1)) * sd / math.sqrt(n) >= margin:
        n += 1
    return n


def ranks_and_rule(rng: np.random.Generator) -> tuple[int, int, float, str]:
    """A new rank, the rank and alpha that were tuned, and the rule by which the update is scaled."""
    r0, r = rng.choice([2, 4, 8, 16, 64], size=2, replace=False)
    return int(r), int(r0), float(rng.choice([3, 12, 24])), str(rng.choice(["alpha / r", "alpha / sqrt(r)"]))


def by_rule(over_r, over_root):
    """An answer that takes one formula under each rule."""
    return lambda r, r0, alpha0, rule: float(alpha0 * (over_r(r / r0) if rule == "alpha / r" else over_root(r / r0)))


@exercise(
    "alpha_for",
    inputs=ranks_and_rule,
    mistakes={
        "Under alpha / r the rank drops out already, so alpha stays. Under alpha / sqrt(r) it must shrink.": (
            by_rule(math.sqrt, lambda ratio: 1 / math.sqrt(ratio)),
            by_rule(lambda ratio: ratio, lambda ratio: 1 / math.sqrt(ratio)),
        ),
        "The step now shrinks with the rank: under alpha / r the rank drops out, and alpha stays as it was.": (
            by_rule(lambda ratio: 1 / ratio, lambda ratio: 1 / math.sqrt(ratio)),
            by_rule(lambda ratio: 1 / math.sqrt(ratio), lambda ratio: 1 / math.sqrt(ratio)),
        ),
        "Under alpha / sqrt(r) the first step grows with sqrt(r) if alpha stays, so alpha must shrink.": (
            by_rule(lambda ratio: 1, lambda ratio: 1)
        ),
        "Under alpha / sqrt(r) alpha must shrink where you let it grow.": (
            by_rule(lambda ratio: 1, math.sqrt),
            by_rule(lambda ratio: 1, lambda ratio: ratio),
        ),
        "Under alpha / sqrt(r) this shrinks too fast: the step grows with sqrt(r), not with r.": (
            by_rule(lambda ratio: 1, lambda ratio: 1 / ratio)
        ),
        "You kept the factor. The first step is r times the factor, so keep that product.": (
            by_rule(lambda ratio: ratio, math.sqrt)
        ),
        "The two rules are mixed up.": by_rule(lambda ratio: 1 / math.sqrt(ratio), lambda ratio: 1),
    },
    hints=[
        "Adam moves each of the r columns of B by about the learning rate, so the first step is r times the scaling.",
        "Under the first rule r times the scaling is r * alpha / r: see what is left of r.",
        "Under the second it is alpha * sqrt(r), which must equal alpha0 * sqrt(r0).",
    ],
    minutes=6,
    difficulty=2,
    praise="A rule for alpha is first of all a rule for where the best learning rate lies.",
    draws=32,
)
def alpha_for(r, r0, alpha0, rule):
    """r times the scaling, and so the length of Adam's first step, is the same at rank r as at rank r0."""
    return float(alpha0 if rule == "alpha / r" else alpha0 * math.sqrt(r0 / r))
