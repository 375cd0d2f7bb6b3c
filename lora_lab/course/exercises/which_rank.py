"""Exercises of lesson 06: which rank is enough."""

import math

from scipy import stats
from scipy.stats import norm, t  # noqa: F401  # for the solutions

from lora_lab.course.exercise import Exercise, Reflection, close


def paired_losses(rng):
    """Test losses of two ranks over the same 5 to 8 seeds, which move both up and down together."""
    seeds = int(rng.integers(5, 9))
    shared = rng.normal(1, 0.3, seeds)
    return shared + rng.normal(0.05, 0.02, seeds), shared + rng.normal(0, 0.02, seeds)


QUANTILE, SPREAD = "t.ppf(0.95, len(d) - 1)", "d.std(ddof=1)"
BOTH_SPREADS = "math.sqrt(a.var(ddof=1) + b.var(ddof=1))"
upper_bound = Exercise(
    "upper_bound",
    inputs=paired_losses,
    wrong={
        "The quantile is the normal distribution's. With few seeds take Student's t with n - 1 degrees of freedom.": [
            (QUANTILE, "1.645"),
            (QUANTILE, "norm.ppf(0.95)"),
        ],
        "The bound is two-sided. A one-sided bound of 95 % takes the quantile 0.95, not 0.975.": ("0.95", "0.975"),
        "The degrees of freedom are n - 1, one fewer than there are seeds.": ("len(d) - 1", "len(d)"),
        "This is the spread of one seed. The mean of n seeds scatters less: divide by the square root of n.": (
            (" / math.sqrt(len(d))", "")
        ),
        "The standard deviation divides by n. With an estimated mean it divides by n - 1: ddof=1.": (
            ("ddof=1", "ddof=0")
        ),
        "The spreads of a and b were taken separately. The seeds pair them: take the differences first.": [
            (SPREAD, BOTH_SPREADS),
            (SPREAD, BOTH_SPREADS, "len(d) - 1", "2 * len(d) - 2"),
        ],
        "This is the mean difference alone. The upper bound adds t times sd / sqrt(n).": "return (a - b).mean()",
        "This is the lower bound. The upper one adds to the mean difference.": ("d.mean() +", "d.mean() -"),
        "The difference has the wrong sign. It is positive where the first rank has the higher loss.": (
            ("a - b", "b - a")
        ),
    },
    hints=[
        "The losses come in pairs, one for each seed: work with d = a - b.",
        "d.std(ddof=1) is the standard deviation of one difference; that of their mean is smaller by sqrt(n).",
        "t.ppf(0.95, n - 1) from scipy.stats is the quantile that goes with n seeds.",
    ],
    praise="With this bound a rank is enough because the data say so, and not because one seed was lucky.",
)


@upper_bound.must()
def uses_the_pairs(upper_bound, rng):
    """A number added to both losses of a seed changes nothing; one added to all first losses is added to the bound."""
    a, b, shared = rng.normal(size=(3, 6))
    bound = upper_bound(a, b)
    return close(upper_bound(a + shared, b + shared), bound) and close(upper_bound(a + 0.7, b), bound + 0.7)


@upper_bound.must()
def is_that_of_a_table(upper_bound, rng):
    """It is the mean plus t * sd / sqrt(n), with t of 95 % from a printed table for n - 1 degrees of freedom."""
    n, quantile = ((3, 2.9200), (5, 2.1318), (8, 1.8946), (10, 1.8331))[rng.integers(4)]
    d, b = rng.normal(0.2, 1, n), rng.normal(size=n)
    sd = math.sqrt(sum((each - d.mean()) ** 2 for each in d) / (n - 1))
    return abs(upper_bound(b + d, b) - d.mean() - quantile * sd / math.sqrt(n)) < 1e-3 * sd


def ranks_and_bounds(rng):
    """rank -> (mean, upper bound) of its loss above the largest rank's, ranks in any order; and the margin.

    Some bounds are exactly the margin, and some ranks are better than the largest by more than the margin. In three of
    ten cases none is enough.
    """
    ranks, margin = rng.permutation([1, 2, 4, 8, 16]).tolist(), float(rng.choice([0.01, 0.02, 0.05]))
    uppers = margin * rng.choice([1, 1.3] if rng.random() < 0.3 else [-1.2, 0.5, 0.8, 1, 1.3], 5)
    means = uppers - margin * rng.uniform(0.2, 0.6, 5)
    return dict(zip(ranks, zip(means.tolist(), uppers.tolist(), strict=True), strict=True)), margin


smallest_enough = Exercise(
    "smallest_enough",
    inputs=ranks_and_bounds,
    wrong={
        "A mean below the margin may be one lucky seed. The upper bound must be below it.": (
            ("(_, upper)", "(upper, _)")
        ),
        "If no rank is shown to be enough, the answer is None: more seeds are needed, and not the largest rank.": (
            ("default=None", "default=max(table)")
        ),
        "This is the largest rank that is enough. You pay for each rank, so take the smallest.": ("min(", "max("),
        "This is the rank with the lowest loss. A rank need not win: its upper bound must be below the margin.": (
            "return min(table, key=lambda rank: table[rank][0])"
        ),
        "This is the rank whose bound is nearest to the margin. Take the smallest rank, whatever its bound.": (
            ("min(", "max(", "default", "key=lambda rank: table[rank][1], default")
        ),
        "This is the first in the table that is enough. The ranks come in any order: take the smallest.": (
            ("min(", "next(", "default=", "")
        ),
        "From the largest rank down you stopped at one that is open. A smaller rank may still be enough.": (
            ("upper < margin", "all(table[other][1] < margin for other in table if other >= rank)")
        ),
        "The comparison has the other direction. A rank is enough if its bound is below the margin.": (
            ("upper < margin", "upper > margin")
        ),
        "A bound of exactly the margin is not below it: write < in place of <=.": ("upper < margin", "upper <= margin"),
        "A rank that is better than the largest by more than the margin is enough as well. Take no absolute values.": (
            ("upper < margin", "abs(upper) < margin")
        ),
    },
    hints=[
        "Go through sorted(table), from the smallest rank to the largest, and stop at the first that is enough.",
        "A rank is enough if its upper bound, the second of the two numbers, is below the margin.",
        "min(..., default=None) answers None for an empty sequence.",
    ],
    praise="Your rule can say that it does not know.",
)


@smallest_enough.must()
def is_the_smallest(smallest_enough, rng):
    """Of the ranks whose bound is below the margin it is the smallest, in whatever order they come."""
    margin, smallest = rng.uniform(0.01, 0.1), int(rng.choice([2, 4, 8, 16]))
    table = {int(rank): (0.0, margin * rng.uniform(0.2, 0.9)) for rank in rng.permutation([1, 2, 4, 8, 16, 32])}
    table |= {rank: (0.0, margin * 1.2) for rank in table if rank < smallest}
    return smallest_enough(table, margin) == smallest


@smallest_enough.must()
def can_say_none(smallest_enough, rng):
    """If no bound is below the margin the result is None, even if means are below it; otherwise it is a rank."""
    tables = [{1: (0.5, 1.4), 4: (0.2, 1.1), 8: (-0.1, 1.0)}, {2: (1.3, 1.6), 16: (1.2, 1.5)}]
    tables += [{4: (0.1, 0.9)}, {1: (3.0, 4.0), 4: (-5.0, -4.0)}]
    return [smallest_enough(table, 1.0) for table in tables] == [None, None, 4, 4]


@smallest_enough.must()
def may_lie_below_an_open_rank(smallest_enough, rng):
    """A rank may be enough although the next larger one is open."""
    one = {8: (0.1, 0.8), 1: (0.4, 1.3), 2: (0.3, 0.9), 4: (0.2, 1.2)}
    other = {16: (0, 0.5), 4: (0.6, 0.9), 8: (0.7, 1.3)}
    return smallest_enough(one, 1.0) == 2 and smallest_enough(other, 1.0) == 4


def spread_and_margin(rng):
    """The standard deviation of a paired difference, and a margin, that need 2, up to about 45, or over 500 seeds."""
    margin = float(rng.uniform(0.01, 0.05))
    low, high = rng.choice([(0.05, 0.18), (0.3, 2.5), (9.5, 10)], p=[0.3, 0.6, 0.1])  # below 0.18 two are enough
    return float(margin * rng.uniform(low, high)), margin


SUM, NORMAL = "t.ppf(0.95, n - 1) + t.ppf(0.8, n - 1)", "norm.ppf(0.95) + norm.ppf(0.8)"
seeds_needed = Exercise(
    "seeds_needed",
    inputs=spread_and_margin,
    wrong={
        "The power is ignored. At this number only about half of all sweeps decide: add the quantile 0.80.": (
            (" + t.ppf(0.8, n - 1)", "")
        ),
        "The quantiles are the normal distribution's, which asks for too few seeds where they are few.": [
            (SUM, NORMAL),
            f"return math.ceil((({NORMAL}) * sd / margin) ** 2)",
            "return math.ceil(((1.96 + 0.84) * sd / margin) ** 2)",
            "return math.ceil(((1.645 + 0.842) * sd / margin) ** 2)",
        ],
        "The spread of a mean falls with the square root of n, not with n itself.": ("math.sqrt(n)", "n"),
        "The quantiles change with the number of seeds: n - 1 degrees of freedom, also while n grows.": (
            (", n - 1)", ", 9)")
        ),
        "The bound of the lesson is one-sided: its quantile is 0.95, not 0.975.": ("0.95", "0.975"),
        "The power lowers your sum: t.ppf(0.8, n - 1) is added (t.ppf(0.2, n - 1) is negative).": (
            "+ t.ppf",
            "- t.ppf",
        ),
        "This number of seeds is one too few: at the result itself the sum must be below the margin.": (
            ("return n", "return n - 1")
        ),
        "This is one seed more than needed.": ("return n", "return n + 1"),
        "This starts too late: two seeds may be enough, so begin at n = 2.": [
            ("n = 2", f"n = {late}") for late in (3, 5, 8)
        ],
    },
    hints=[
        "The two quantiles are t.ppf(0.95, n - 1) and t.ppf(0.8, n - 1).",
        "The quantiles depend on n too, so try n = 2, 3, 4 and so on until the left side is below the margin.",
        "(t.ppf(0.95, n - 1) + t.ppf(0.8, n - 1)) * sd / math.sqrt(n) is the left side for n seeds.",
    ],
    praise="Half the margin costs up to four times the seeds, so choose the margin before you pay.",
)


@seeds_needed.must()
def so_many_and_no_fewer(seeds_needed, rng):
    """With so many seeds the sum of both quantiles times sd / sqrt(n) is below the margin; with one less it is not."""
    ratio = float(rng.choice([0.4, 0.6, 1.0, 1.5, 2.2, 3.1, 9.5]))
    n = seeds_needed(0.02 * ratio, 0.02)
    sums = [(stats.t.ppf(0.95, k - 1) + stats.t.ppf(0.8, k - 1)) * ratio / math.sqrt(k) for k in (n, n - 1)]
    return sums[0] < 1 <= sums[1]


@seeds_needed.must()
def two_can_be_enough(seeds_needed, rng):
    """Where the seeds hardly scatter two are enough, and where they scatter twice the margin it is more than 20."""
    return [seeds_needed(0.05 * margin, margin) for margin in (0.01, 0.3)] == [2, 2] and seeds_needed(2.0, 1.0) > 20


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
