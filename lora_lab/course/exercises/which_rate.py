"""Exercises of lesson 12: which learning rate."""

import math

import numpy as np

from lora_lab.course.exercise import Exercise, Reflection, close

# The vertex of a parabola


def three_rates(rng):
    """Three ascending rates, unequally spaced, and their losses, the middle one lowest."""
    near, far = rng.permutation([2.0, 3.0])
    rates = float(rng.choice([0.001, 0.004, 0.02])) * np.array([1 / near, 1, far])
    losses = rng.uniform(0.4, 0.6) + np.array([rng.uniform(0.02, 0.05), 0, rng.uniform(0.06, 0.1)])
    return rates, losses if rng.random() < 0.5 else losses[::-1].copy()


LOWEST = "-linear / (2 * square)"

vertex = Exercise(
    "vertex",
    inputs=three_rates,
    wrong={
        "The parabola is in the rate itself. Rates differ by factors: fit it in the logarithm of the rate.": (
            ("np.log(rates)", "rates", f"np.exp({LOWEST})", LOWEST)
        ),
        "This is the logarithm of the best rate. Take exp of it.": [
            (f"np.exp({LOWEST})", LOWEST),
            (f"np.exp({LOWEST})", LOWEST, "np.log", "np.log10"),
        ],
        "The logarithm and the power have different bases: exp undoes log, and 10 ** undoes log10.": [
            ("np.log", "np.log10"),
            ("np.exp", "10 ** "),
        ],
        "This is the best rate that was tried. The lowest point of the parabola lies between the rates.": (
            "return float(rates[np.argmin(losses)])"
        ),
        "A slope between two points belongs to the middle between them, not to one of the points.": """
            x = np.log(rates)
            left, right = np.diff(losses) / np.diff(x)
            return float(np.exp(x[0] - left * (x[2] - x[0]) / (right - left)))
        """,
        "Polynomial.fit rescales x, so its coefficients belong to another variable. Take np.polyfit.": """
            c, b, a = np.polynomial.Polynomial.fit(np.log(rates), losses, 2).coef
            return float(np.exp(-b / (2 * a)))
        """,
        "The vertex of a x^2 + b x + c is at -b / (2 a); the 2 is missing.": ("(2 * square)", "square"),
        "The sign is wrong: the vertex of a x^2 + b x + c is at -b / (2 a).": ("-linear", "linear"),
    },
    hints=[
        "Rates are compared by their ratios, so work with x = log(rate), where ratios become differences.",
        "np.polyfit(x, losses, 2) returns a, b and c of the parabola a x^2 + b x + c through three points.",
        "Its slope 2 a x + b is zero at the lowest point. Solve for x, and take exp to have a rate again.",
    ],
    praise="Three losses now locate the best rate more precisely than the grid does.",
)


@vertex.must()
def goes_with_the_rates(vertex, rng):
    """If all rates are three times as large, so is the result, which lies between the outer rates."""
    rates, losses = 0.01 * np.array([0.4, 1, 3]), 0.5 + rng.uniform(0.02, 0.08, 3) * [1, 0, 1]
    one, three = vertex(rates, losses), vertex(3 * rates, losses)
    return np.ndim(one) == 0 and rates[0] < one < rates[2] and close(three, 3 * one)


@vertex.must()
def is_where_the_parabola_is_lowest(vertex, rng):
    """Of losses on a parabola in the logarithm of the rate the result is where that is lowest."""
    best, rates = rng.uniform(0.005, 0.02), 0.01 * np.array([0.25, 1, 3])
    return close(vertex(rates, 0.4 + 0.1 * np.log(rates / best) ** 2), best)


# A grid that holds its best rate


def swept_losses(rng):
    """rate -> losses over three seeds, rates in any order; at one of them a seed diverged: its loss is infinite."""
    factor, start = float(rng.choice([2.0, 3.0])), float(rng.choice([0.001, 0.002]))
    losses = rng.uniform(0.4, 0.9, (5, 3))
    losses[rng.integers(5), rng.integers(3)] = math.inf
    return ({start * factor**i: losses[i].tolist() for i in rng.permutation(5).tolist()},)


MEAN, BELOW, ABOVE = "np.mean(losses[rate])", "rates[0] ** 2 / rates[1]", "rates[-1] ** 2 / rates[-2]"

next_rate = Exercise(
    "next_rate",
    inputs=swept_losses,
    wrong={
        "The best rate was taken from one seed. Average the losses over the seeds first.": [
            (MEAN, "losses[rate][0]"),
            (MEAN, "min(losses[rate])"),
        ],
        "A rate at which a seed diverged is not the best: the mean with an infinite loss is infinite.": (
            (MEAN, "np.mean([loss for loss in losses[rate] if loss < math.inf])")
        ),
        "The grid goes on by a factor, as it began: divide or multiply by the ratio of the two rates at its edge.": [
            (BELOW, "2 * rates[0] - rates[1]", ABOVE, "2 * rates[-1] - rates[-2]"),
            (BELOW, "rates[0] / 10", ABOVE, "rates[-1] * 10"),
        ],
        "The grid goes on by the ratio of the two rates at its edge, not of the largest and the smallest of all.": (
            (BELOW, "rates[0] ** 2 / rates[-1]", ABOVE, "rates[-1] ** 2 / rates[0]")
        ),
        "The grid grew at the wrong side. If the smallest rate is best, try a smaller one.": (
            (BELOW, "rates[-1] * rates[1] / rates[0]", ABOVE, "rates[0] * rates[-2] / rates[-1]")
        ),
        "If the best rate is inside the grid, there is nothing to add: return None.": ("None", "rates[best]"),
        "The result is a rate that was tried already. If the best is at an edge, the next lies beyond it.": (
            (BELOW, "rates[0]", ABOVE, "rates[-1]")
        ),
        "The largest rate can be the best too. Then a larger one must be tried.": (ABOVE, "None"),
        "The smallest rate can be the best too. Then a smaller one must be tried.": (BELOW, "None"),
        "The rates are in any order. Sort them before you look at the edges.": ("sorted(", "list("),
    },
    hints=[
        "Sort the rates, and average each one's losses over the seeds. With an infinite loss in it a mean is infinite.",
        "If the lowest mean is at the first or the last rate, the minimum may lie beyond; otherwise return None.",
        "Neighbours differ by a factor: rates[1] / rates[0] at the lower edge, rates[-1] / rates[-2] at the upper.",
    ],
    praise="No verdict can rest on a rate at the edge. By this rule tune widens a sweep.",
    draws=80,
)


def steadily(rng, rates, slope):
    """Rates in any order, with three losses each, which change by a slope from one rate to the next."""
    return {rates[i]: (1 + slope * i + rng.normal(0, 0.001, 3)).tolist() for i in rng.permutation(4)}


@next_rate.must()
def goes_on_above(next_rate, rng):
    """If the largest rate is best, the result is larger by the factor between the two largest rates."""
    grids = {factor: [0.001, 0.0015, 0.0015 * factor, 0.0015 * factor**2] for factor in (2.0, 3.0, 10.0)}
    return all(close(next_rate(steadily(rng, rates, -0.1)), rates[-1] * factor) for factor, rates in grids.items())


@next_rate.must()
def goes_on_below(next_rate, rng):
    """If the smallest rate is best, the result is smaller by the factor between the two smallest rates."""
    grids = {factor: [0.001, 0.001 * factor, 0.0015 * factor, 0.002 * factor] for factor in (2.0, 3.0, 10.0)}
    return all(close(next_rate(steadily(rng, rates, 0.1)), 0.001 / factor) for factor, rates in grids.items())


@next_rate.must()
def is_none_inside(next_rate, rng):
    """If a rate inside the grid is best it is None, and at an edge it is not."""
    rates = [0.001, 0.002, 0.004, 0.008, 0.016]
    tables = [{rates[i]: [1 + 0.1 * abs(i - best)] * 2 for i in rng.permutation(5)} for best in (1, 2, 3, 0, 4)]
    return [next_rate(table) is None for table in tables] == [True, True, True, False, False]


@next_rate.must()
def averages_over_the_seeds(next_rate, rng):
    """The mean over all seeds decides, and it is infinite for a rate at which one of them diverged."""
    lucky = {0.001: [0.5, 0.5], 0.002: [0.1, 1.2], 0.004: [0.8, 0.9]}
    diverged = {0.004: [0.1, math.inf], 0.002: [0.5, 0.6], 0.001: [0.4, 0.5]}
    return close(next_rate(lucky), 0.0005) and close(next_rate(diverged), 0.0005)


# How the best rate depends on the rank


def ranks_and_rates(rng):
    """Ranks, unequally spaced, and best rates that fall about as a power of them."""
    ranks = np.sort(rng.choice([1, 2, 4, 8, 16, 32, 64, 128], 5, replace=False)).astype(float)
    power = -float(rng.uniform(0.3, 0.8))
    return ranks, 0.008 * ranks**power * np.exp(rng.normal(0, 0.15, 5))


power = Exercise(
    "power",
    inputs=ranks_and_rates,
    wrong={
        "The line is through the numbers themselves. A power is a straight line in the logarithms of both.": (
            ("np.log", "")
        ),
        "Only one of the two is in logarithms. A power is a straight line if both are.": [
            ("np.log(rates)", "rates"),
            ("np.log(ranks)", "ranks"),
        ],
        "The axes are exchanged: the rate depends on the rank.": [
            "return float(np.polyfit(np.log(rates), np.log(ranks), 1)[0])",
            "return float(1 / np.polyfit(np.log(rates), np.log(ranks), 1)[0])",
        ],
        "Only the first and the last rank count here. Use all points: the line of least squares.": (
            "return float(np.log(rates[-1] / rates[0]) / np.log(ranks[-1] / ranks[0]))"
        ),
        "The curve is fitted to the rates themselves, so large ones count most. Fit a line to both logarithms.": """
            from scipy.optimize import curve_fit
            return float(curve_fit(lambda x, c, p: c * x**p, ranks, rates)[0][1])
        """,
        "You averaged the slopes between neighbours. Fit one line to all points: the line of least squares.": (
            "return float((np.diff(np.log(rates)) / np.diff(np.log(ranks))).mean())"
        ),
        "The sign is wrong: a rate that falls as the rank grows has a negative power.": ("float(", "-float("),
        "This is the line's height at rank 1. The power is its slope.": ("[0]", "[1]"),
    },
    hints=[
        "If rate = c * rank ** p, then log(rate) = log(c) + p * log(rank).",
        "So p is the slope of a straight line. np.polyfit(x, y, 1) fits one.",
        "The first number that np.polyfit returns is the slope.",
    ],
    praise="One number now says how the rate follows the rank.",
)


@power.must()
def of_an_exact_law(power, rng):
    """Where the rate is exactly a power of the rank, the result is that power."""
    ranks, exact = np.array([1.0, 2.0, 8.0, 64.0]), rng.uniform(-1, 0.5)
    return close(power(ranks, 0.008 * ranks**exact), exact)


@power.must()
def of_scattered_points(power, rng):
    """Where the points scatter, it is the slope of least squares, for which all of them count."""
    ranks = np.array([1.0, 4.0, 8.0, 32.0, 128.0])
    rates = 0.008 * ranks**-0.5 * np.exp(rng.normal(0, 0.3, 5))
    x, y = np.log(ranks) - np.log(ranks).mean(), np.log(rates)
    return close(power(ranks, rates), (x @ y) / (x @ x))


# What another alpha does to the best rate


def tuned_rate(rng):
    """A rate, the alpha that it was tuned at, another alpha, and what moves."""
    old, new = rng.choice([2, 5, 12, 32, 70], 2, replace=False).tolist()
    return float(rng.choice([5e-4, 1e-3, 2e-3])), old, new, str(rng.choice(["B", "both"]))


ROOT = "(1 if moves == 'B' else 0.5)"

rate_for_alpha = Exercise(
    "rate_for_alpha",
    inputs=tuned_rate,
    wrong={
        "It is the wrong way round: a larger alpha makes the update larger, so the rate must fall.": (
            ("old / new", "new / old")
        ),
        "If both matrices move, the rate counts twice in the update, so take a square root.": (ROOT, "1"),
        "If only B moves, the update is proportional to the rate itself, without a square root.": (ROOT, "0.5"),
        "The two cases are exchanged: the root belongs to the one in which both matrices move.": ("==", "!="),
        "The root is taken of all, the rate included. Only the ratio of the two alphas is under it.": (
            "return rate * old / new if moves == 'B' else math.sqrt(rate * old / new)"
        ),
        "If both matrices move, the update has the rate squared, so it goes with the root of alpha, not its square.": (
            ("0.5", "2")
        ),
        "The rate cannot stay: alpha multiplies the update.": "return rate",
    },
    hints=[
        "Set the update's length at the old alpha equal to that at the new one, and solve for the new rate.",
        "If only B moves: rate * old = new_rate * new. If both move: rate ** 2 * old = new_rate ** 2 * new.",
        "So the ratio old / new multiplies the rate, or its square root does.",
    ],
    praise="Two hypotheses, two powers: now the measurement can refute one of them.",
)


@rate_for_alpha.must()
def if_B_moves(rate_for_alpha, rng):
    """If only B moves, the rate times alpha stays."""
    rate, old, new, _ = tuned_rate(rng)
    return close(rate_for_alpha(rate, old, new, "B") / rate * new, old)


@rate_for_alpha.must()
def if_both_move(rate_for_alpha, rng):
    """If both matrices move, the square of the rate times alpha stays, and the rate is positive."""
    rate, old, new, _ = tuned_rate(rng)
    factor = rate_for_alpha(rate, old, new, "both") / rate
    return factor > 0 and close(factor**2 * new, old)


# Another rank's alpha


def ranks_and_rule(rng):
    """A new rank, the rank and alpha that were tuned, and the rule by which the update is scaled."""
    r0, r = rng.choice([2, 4, 8, 16, 64], size=2, replace=False).tolist()
    return r, r0, float(rng.choice([3, 12, 24])), str(rng.choice(["alpha / r", "alpha / sqrt(r)"]))


FIRST, SECOND = "alpha0 if", "math.sqrt(r0 / r)"  # what is right under each rule
alpha_for = Exercise(
    "alpha_for",
    inputs=ranks_and_rule,
    wrong={
        "Under alpha / r the rank drops out already, so alpha stays. Under alpha / sqrt(r) it must shrink.": [
            (FIRST, "alpha0 * math.sqrt(r / r0) if"),
            (FIRST, "alpha0 * r / r0 if"),
        ],
        'Under "alpha / r", spelled so, the rank drops out and alpha stays as it was. Yours shrinks with the rank.': [
            (FIRST, "alpha0 * r0 / r if"),
            (FIRST, "alpha0 * math.sqrt(r0 / r) if"),
        ],
        "Under alpha / sqrt(r) the first step grows with sqrt(r) if alpha stays, so alpha must shrink.": (SECOND, "1"),
        "Under alpha / sqrt(r) alpha must shrink where you let it grow.": [
            (SECOND, "math.sqrt(r / r0)"),
            (SECOND, "r / r0"),
        ],
        "Under alpha / sqrt(r) this shrinks too fast: the step grows with sqrt(r), not with r.": (SECOND, "r0 / r"),
        "You kept the factor. The first step is r times the factor, so keep that product.": (
            (SECOND, "math.sqrt(r / r0)", FIRST, "alpha0 * r / r0 if")
        ),
        "The two rules are mixed up.": (SECOND, "1", FIRST, "alpha0 * math.sqrt(r0 / r) if"),
        "Alpha grows with the rank under both rules, as in the habit alpha = 2r. Then the first step grows with it.": [
            "return alpha0 * r / r0",
            "return 2.0 * r",
        ],
    },
    hints=[
        "Adam moves each of the r columns of B by about the learning rate, so the first step is r times the scaling.",
        "Under the first rule r times the scaling is r * alpha / r: see what is left of r.",
        "Under the second it is alpha * sqrt(r), which must equal alpha0 * sqrt(r0).",
    ],
    praise="A rule for alpha is first of all a rule for where the best learning rate lies.",
)


@alpha_for.must()
def stays_under_the_first_rule(alpha_for, rng):
    """Under alpha / r it stays as it was, and under alpha / sqrt(r) it does not."""
    r, r0, alpha, _ = ranks_and_rule(rng)
    first, second = (alpha_for(r, r0, alpha, rule) for rule in ("alpha / r", "alpha / sqrt(r)"))
    return close(first, alpha) and not close(second, alpha)


@alpha_for.must()
def keeps_the_first_step_under_the_second(alpha_for, rng):
    """Under alpha / sqrt(r), alpha times sqrt(r) stays."""
    r, r0, alpha, _ = ranks_and_rule(rng)
    return close(alpha_for(r, r0, alpha, "alpha / sqrt(r)") ** 2 * r, alpha**2 * r0)


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
