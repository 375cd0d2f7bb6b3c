"""Hidden tests of lesson 06: which rank is enough."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.course.grading.invariant import Reflection, close, invariant_of


@invariant_of("upper_bound")
def uses_the_pairs(upper_bound, rng):
    """A number added to both losses of a seed changes nothing; one added to all first losses is added to the bound."""
    a, b, shared = rng.normal(size=(3, 6))
    bound = upper_bound(a, b)
    return close(upper_bound(a + shared, b + shared), bound) and close(upper_bound(a + 0.7, b), bound + 0.7)


@invariant_of("upper_bound")
def is_that_of_a_table(upper_bound, rng):
    """It is the mean plus t * sd / sqrt(n), with t of 95 % from a printed table for n - 1 degrees of freedom."""
    for n, t in ((3, 2.9200), (5, 2.1318), (8, 1.8946), (10, 1.8331)):
        d, b = rng.normal(0.2, 1, n), rng.normal(size=n)
        sd = math.sqrt(sum((each - d.mean()) ** 2 for each in d) / (n - 1))
        if not abs(upper_bound(b + d, b) - d.mean() - t * sd / math.sqrt(n)) < 1e-3 * sd:
            return False
    return True


@invariant_of("smallest_enough")
def is_the_smallest(smallest_enough, rng):
    """Of the ranks whose bound is below the margin it is the smallest, in whatever order they come."""
    ranks, results = [1, 2, 4, 8, 16, 32], []
    for first in (1, 2, 3, 4):
        margin = rng.uniform(0.01, 0.1)
        bounds = [(0.0, margin * (rng.uniform(0.2, 0.9) if place >= first else 1.2)) for place in range(6)]
        tables = [{ranks[i]: bounds[i] for i in rng.permutation(6)} for _ in range(3)]
        results += [smallest_enough(table, margin) == ranks[first] for table in tables]
    return all(results)


@invariant_of("smallest_enough")
def can_say_none(smallest_enough, rng):
    """If no bound is below the margin the result is None, even if means are below it; otherwise it is a rank."""
    none = [{1: (0.5, 1.4), 4: (0.2, 1.1), 8: (-0.1, 1.0)}, {2: (1.3, 1.6), 16: (1.2, 1.5)}]
    return [smallest_enough(table, 1.0) for table in none] == [None, None] and smallest_enough(
        {4: (0.1, 0.9)}, 1.0
    ) == 4


@invariant_of("smallest_enough")
def may_lie_below_an_open_rank(smallest_enough, rng):
    """A rank may be enough although the next larger one is open."""
    tables = [
        {8: (0.1, 0.8), 1: (0.4, 1.3), 2: (0.3, 0.9), 4: (0.2, 1.2)},
        {16: (0, 0.5), 4: (0.6, 0.9), 8: (0.7, 1.3)},
    ]
    return [smallest_enough(table, 1.0) for table in tables] == [2, 4]


@invariant_of("seeds_needed")
def so_many_and_no_fewer(seeds_needed, rng):
    """With so many seeds the sum of both quantiles times sd / sqrt(n) is below the margin; with one less it is not."""
    from scipy.stats import t

    needed = [(seeds_needed(0.02 * ratio, 0.02), ratio) for ratio in (0.4, 0.6, 1.0, 1.5, 2.2, 3.1)]
    sums = [
        [(t.ppf(0.95, k - 1) + t.ppf(0.8, k - 1)) * ratio / math.sqrt(k) for k in (n, n - 1)] for n, ratio in needed
    ]
    return all(enough < 1 <= fewer for enough, fewer in sums)


@invariant_of("seeds_needed")
def two_can_be_enough(seeds_needed, rng):
    """Where the seeds hardly scatter two are enough, and where they scatter twice the margin it is more than 20."""
    return [seeds_needed(0.05 * margin, margin) for margin in (0.01, 0.3)] == [2, 2] and seeds_needed(2.0, 1.0) > 20


@invariant_of("alpha_for")
def stays_under_the_first_rule(alpha_for, rng):
    """Under alpha / r it stays as it was, and under alpha / sqrt(r) it does not."""
    cases = [
        (int(r), int(r0), float(a)) for r, r0, a in zip((2, 8, 64), (16, 4, 8), rng.integers(3, 40, 3), strict=True)
    ]
    stays = all(close(alpha_for(r, r0, a, "alpha / r"), a) for r, r0, a in cases)
    return stays and not any(close(alpha_for(r, r0, a, "alpha / sqrt(r)"), a) for r, r0, a in cases)


@invariant_of("alpha_for")
def keeps_the_first_step_under_the_second(alpha_for, rng):
    """Under alpha / sqrt(r), alpha times sqrt(r) stays."""
    cases = [
        (int(r), int(r0), float(a)) for r, r0, a in zip((2, 8, 64), (16, 4, 8), rng.integers(3, 40, 3), strict=True)
    ]
    alphas = np.array([alpha_for(r, r0, a, "alpha / sqrt(r)") for r, r0, a in cases])
    return close(
        [alpha**2 * r for alpha, (r, _, _) in zip(alphas, cases, strict=True)], [a**2 * r0 for _, r0, a in cases]
    )


Reflection(
    "06_which_rank",
    question="Somebody has trained ranks 4, 16 and 64 at one learning rate, with one seed each, and reports that "
    "rank 64 has the lowest loss, so that *high ranks are needed for this task*. In five to eight "
    "sentences: what else could explain the result, and what would you run to find out which rank is "
    "enough?",
    rubric=(
        "The answer names the common learning rate as another explanation, and says how it would favour a rank.",
        "It names chance, and says what several seeds, the same for each rank, make of it.",
        "It states what enough means: a margin, which is chosen before the runs.",
        "It says when the answer would be that nothing is decided.",
    ),
    expected="At one low rate the higher rank gets further in the same steps. One seed names a winner by chance; "
    "with the same seeds for all ranks the differences pair up, and an upper bound of their mean can be "
    "compared with a margin. If the bound of no smaller rank is below it, nothing is decided, and more "
    "seeds are needed. If the largest rank is best, larger ones have to be tried.",
)
