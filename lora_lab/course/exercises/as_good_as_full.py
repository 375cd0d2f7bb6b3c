"""Exercises of lesson 13: is LoRA as good as full fine-tuning, and what a sweep of an hour can say."""

import math

import numpy as np
from scipy.stats import norm, t  # noqa: F401  # norm for the wrong answers

from lora_lab.course.exercise import Exercise, Reflection, close

# Two runs


def reach_of(d):
    """How far the bounds of a mean difference reach, (seeds, pages): the wider of those over seeds and over pages."""
    axes = ((len(each), each.std(ddof=1)) for each in (d.mean(axis=1), d.mean(axis=0)))
    return max(float(t.ppf(0.95, n - 1) * sd / math.sqrt(n)) for n, sd in axes)


def two_runs(rng):
    """Losses of two runs (seeds, pages), two decimals, and a margin; one bound is near to 0 or to a margin.

    The seeds scatter more than the pages, or less.
    """
    shape = tuple(rng.choice([3, 4, 5], 2, replace=False).tolist())
    margin = float(rng.choice([0.05, 0.1]))
    of_seed, of_page = rng.permutation([0.4, 1.6])
    d = of_seed * rng.normal(size=(shape[0], 1)) + of_page * rng.normal(size=shape[1]) + 0.3 * rng.normal(size=shape)
    d = margin * (d - d.mean())
    reach = rng.uniform(0.4, 1.6) * reach_of(d)
    d += rng.choice([-reach, -margin - reach, margin - reach, margin + reach])
    old = rng.uniform(2, 3, shape)
    return (old + d).round(2), old.round(2), margin


OVER, QUANTILE, WORSE, GOOD = (
    "(d.mean(axis=1), d.mean(axis=0))",
    "t.ppf(0.95, len(means) - 1)",
    "'worse': lower > margin",
    "'as good': upper < margin",
)
LOOP = f"""for means in {OVER}:
        error = means.std(ddof=1) / math.sqrt(len(means))
        reaches.append({QUANTILE} * error)"""
decide = Exercise(
    "decide",
    inputs=two_runs,
    draws=120,
    wrong={
        "These bounds are over the seeds alone. Other pages may say something else: take the wider of the two.": (
            (OVER, "(d.mean(axis=1),)")
        ),
        "These bounds are over the pages alone. Other seeds may say something else: take the wider of the two.": (
            (OVER, "(d.mean(axis=0),)")
        ),
        "You counted each page of each seed as a value of its own. Losses of one page, or one seed, resemble each "
        "other.": ((OVER, "(d.ravel(),)")),
        "You took the narrower bounds. The wider ones count.": ("max(reaches)", "min(reaches)"),
        "You added the squares of both reaches. Take the wider pair of bounds alone.": (
            "max(reaches)",
            "math.hypot(*reaches)",
        ),
        "The quantile is the normal distribution's. With few values take Student's t with n - 1 degrees of freedom.": [
            (QUANTILE, "1.645"),
            (QUANTILE, "norm.ppf(0.95)"),
        ],
        "For the bounds over pages n is the number of pages, in the quantile as well: len(means) - 1.": (
            ("len(means) - 1)", "len(d) - 1)")
        ),
        "Each bound is one-sided: the quantile of 95 % is 0.95, not 0.975.": ("0.95", "0.975"),
        "This is the spread of a single value. A mean of n scatters less: divide by the square root of n.": (
            (" / math.sqrt(len(means))", "")
        ),
        "The standard deviation divides by n. With an estimated mean it divides by n - 1: ddof=1.": (
            ("ddof=1", "ddof=0")
        ),
        "The two runs were taken separately. Seeds and pages are the same for both: take the differences first.": (
            (
                LOOP,
                "for axis in (1, 0):\n        a, b = new.mean(axis=axis), old.mean(axis=axis)\n"
                "        error = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))\n"
                "        reaches.append(t.ppf(0.95, len(a) - 1) * error)",
            )
        ),
        "The difference has the wrong sign. A new run that is better has the lower loss: new - old is negative.": (
            ("new - old", "old - new")
        ),
        "'worse' needs a lower bound above the margin. A loss that is surely higher may still be as good.": (
            (WORSE, "'worse': lower > 0")
        ),
        "The word follows from the mean. A mean of few seeds can be luck: ask the bounds.": (
            (
                "'better': upper < 0",
                "'better': d.mean() < 0",
                GOOD,
                "'as good': d.mean() < margin",
                WORSE,
                "'worse': d.mean() >= margin",
            )
        ),
        "A run is better if its upper bound is below 0; by how much does not matter.": (
            ("upper < 0", "upper < -margin")
        ),
        "'better' comes before 'as good': return the first word that is true.": (("'better': upper < 0, ", "")),
        "Where the bounds hold the margin nothing is decided. Then the word is 'undecided'.": (
            ("'undecided')", "'worse')")
        ),
    },
    hints=[
        "Begin with the differences d, new less old. d.mean(axis=1) has a value for each seed; axis=0 for each page.",
        "For each of the two: t.ppf(0.95, n - 1), times the standard deviation, divided by the root of n.",
        "The larger of the two results is how far both bounds are from d.mean(). Then ask in the order of the table.",
    ],
    praise="A rule that was written down before the runs cannot be bent by what they say.",
)


@decide.must()
def takes_the_differences(decide, rng):
    """A number added to both losses of a page changes no bound, and one added to all new losses is added to both."""
    new, old, margin = two_runs(rng)
    of_page = rng.normal(size=new.shape[1])
    lower, upper, _ = decide(new, old, margin)
    same, higher = (decide(*runs, margin)[:2] for runs in ((new + of_page, old + of_page), (new + 0.7, old)))
    return close(same, (lower, upper)) and close(higher, (lower + 0.7, upper + 0.7)) and lower < (new - old).mean()


@decide.must()
def counts_seeds_and_pages(decide, rng):
    """Where only the seeds scatter, or only the pages, the bounds are those of a table of t; else the wider pair."""
    for axis, n, quantile in ((1, 3, 2.9200), (0, 5, 2.1318)):
        values = rng.normal(size=n)
        old = rng.normal(size=(3, 5))
        new = old + np.expand_dims(values, axis)
        lower, upper, _ = decide(new, old, 1.0)
        reach = quantile * math.sqrt(sum((values - values.mean()) ** 2) / (n - 1) / n)
        if not close((lower, upper), (values.mean() - reach, values.mean() + reach)):
            return False
    d = rng.normal(size=(3, 5))
    return close(decide(old + d, old, 1.0)[:2], (d.mean() - reach_of(d), d.mean() + reach_of(d)))


@decide.must()
def says_the_first_word_that_is_true(decide, rng):
    """The word is the first that the bounds allow, and each of the four comes up."""
    old, scatter = rng.normal(size=(3, 4)), 0.1 * np.array([[-1.0], [0.0], [1.0]])
    reach = reach_of(scatter + np.zeros((3, 4)))  # 0.17
    means = {"better": -1.01 * reach, "as good": 0.4 - 1.01 * reach, "worse": 0.4 + 1.01 * reach}
    means["undecided"] = 0.4 + rng.choice([-0.9, 0.9]) * reach
    return all(decide(old + scatter + mean, old, 0.4)[2] == word for word, mean in means.items())


# A sweep


def steps_of_ranks(rng):
    """Rank -> seconds of a step, ranks in any order, and steps; an hour is enough for 2 to 24 runs of each rank."""
    ranks = np.sort(rng.choice([1, 2, 4, 8, 16, 32, 64], int(rng.integers(2, 6)), replace=False))
    steps, growth = int(rng.choice([20, 50, 100])), 1 + 0.4 * np.arange(len(ranks))
    seconds = 3600 / rng.uniform(2, 24) / steps * growth / growth.sum()
    order = rng.permutation(len(ranks))
    # 7 divides no hour, so no plan ends exactly with it, where rounding would decide.
    return {int(ranks[i]): round(0.07 * max(1, round(float(seconds[i]) / 0.07)), 2) for i in order}, steps


CHOOSE, LEAST, SUM = "3 * 2", "seeds >= 3", "sum((seconds[rank] for rank in ranks))"
plan_sweep = Exercise(
    "plan_sweep",
    inputs=steps_of_ranks,
    draws=240,
    wrong={
        "The runs that choose the rates are missing: three rates with two seeds each, for every rank.": (CHOOSE, "0"),
        "Each rate is tried once here. Two seeds choose, so a rank takes six runs before it is judged.": (CHOOSE, "3"),
        "Two seeds choose, and at three rates each: six runs a rank, not two.": (CHOOSE, "2"),
        "This sweep takes longer than an hour. Round the number of seeds down.": [
            ("int(", "math.ceil("),
            ("int(", "round("),
        ],
        "Every rank is planned as if its step took as long as the largest one's. Each rank has its own seconds.": (
            (SUM, "len(ranks) * seconds[ranks[-1]]")
        ),
        "The hour is planned for a single rank. The seconds of all ranks add up.": (SUM, "seconds[ranks[-1]]"),
        "sum(seconds) adds up the ranks, the keys of the dictionary. Add up their seconds.": (
            ("seconds[rank] for rank in ranks", "rank for rank in ranks")
        ),
        "You left out the largest rank. It stays: the others are compared with it.": ("ranks[1:]", "ranks[:-1]"),
        "Fewer than three seeds judge. Leave the lowest rank out first.": (LEAST, "seeds >= 1"),
        "Three seeds are enough: keep a rank as long as three can judge.": (LEAST, "seeds > 3"),
        "More than ten seeds judge. Ten are enough here; the rest of the hour is free.": ("min(seeds, 10)", "seeds"),
        "A single rank has nothing to be compared with. Where not even two fit, return None.": (
            ("len(ranks) > 1", "ranks")
        ),
        "The ranks come in any order. Sort them, or the lowest is not the one that goes.": ("sorted(", "list("),
        "A rank was left out although it fits. Leave out one at a time, and look again.": (
            ("ranks = ranks[1:]", "ranks = ranks[-2:] if len(ranks) > 2 else []")
        ),
        "A rank is left out, and its seconds still count. Add up those of the ranks that are left.": (
            ("seconds[rank] for rank in ranks", "seconds.values()")
        ),
        "The seconds are those of one step. A run takes steps * sum(...), in brackets where you divide by it.": (
            "steps * ",
            "",
        ),
    },
    hints=[
        "Sort the ranks. One run of each takes steps times the sum of their seconds.",
        "An hour has 3600 seconds. So many times fits one run of each; six of these times go into choosing the rates.",
        "While three seeds do not fit, go on with ranks[1:]; with fewer than two ranks the answer is None.",
    ],
    praise="You know before the first step what the hour can say, and what it cannot.",
)


def runs_of(plan, seconds, steps):
    """Return the seconds of the whole sweep, and of one more seed."""
    ranks, seeds = plan
    of_each = steps * sum(seconds[rank] for rank in ranks)
    return (3 * 2 + seeds) * of_each, (3 * 2 + seeds + 1) * of_each


@plan_sweep.must()
def fills_the_hour(plan_sweep, rng):
    """The runs take at most an hour, and with one seed more they would take longer."""
    for seeds in (3, int(rng.integers(4, 10))):
        seconds = {64: 2.0, 8: 1.0}
        steps = int(3600 / (6.5 + seeds) / 3)
        plan = plan_sweep(seconds, steps)
        total, more = runs_of(plan, seconds, steps)
        if not total <= 3600 < more:
            return False
    return True


@plan_sweep.must()
def leaves_out_the_lowest_ranks(plan_sweep, rng):
    """The lowest ranks are left out until three seeds can judge, and no more of them than that takes."""
    ranks = [1, 4, 16, 64]
    for kept in (2, 3, 4):
        seconds = {rank: 1.0 for rank in rng.permutation(ranks).tolist()}
        if list(plan_sweep(seconds, int(3600 / 9.5 / kept))[0]) != ranks[-kept:]:
            return False
    return True


@plan_sweep.must()
def stops_at_ten_seeds(plan_sweep, rng):
    """However short a step is, at most ten seeds judge."""
    long, short = (plan_sweep({2: seconds, 32: seconds}, 10)[1] for seconds in (3600 / 20 / 11.5, 0.01))
    return (long, short) == (5, 10)


@plan_sweep.must()
def says_none(plan_sweep, rng):
    """Where not even two ranks fit the result is None, and otherwise it is not."""
    plans = [plan_sweep({4: 1.0, 1: 1.0}, int(3600 / 2 / runs)) for runs in (8.5, 9.5, 4.5)]
    return [plan is None for plan in plans] == [True, False, True]


Reflection(
    "13_as_good_as_full",
    question="Choose a sentence from a paper, a blog or a forum: *LoRA is (not) as good as full fine-tuning*, or "
    "*adapters belong on these layers*. In five to eight sentences: on which model and how much data was it seen, "
    "which rate did each side have, how sure is it, and what would you run in an hour to see whether it holds for you?",
    rubric=(
        "The sentence is quoted with its source.",
        "The answer says whether each side had a learning rate of its own, and how many numbers each trains.",
        "It names a margin, and says what the seeds and pages, or other test texts, would have to show.",
        "The plan fits into an hour, and says when the answer would be undecided.",
    ),
    expected="A good answer finds the model, the number of examples and steps, and whether the rates were tuned for "
    "each side. It compares at equal numbers of trained parameters where layers are compared. It names a margin before "
    "the runs, chooses rates on some seeds and judges on others, and counts seeds as well as test texts. Where the "
    "bounds hold the margin it says that nothing is decided.",
)
