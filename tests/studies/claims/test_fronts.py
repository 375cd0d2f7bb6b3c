"""Verdicts on forgetting, from records with planted fronts, and how they turn."""

import numpy as np
import pandas
import pytest

from lora_lab.studies.claims import fronts
from tests.studies.claims import decide, make

BASES = ("tiny-64-0", "tiny-128-0")
STEPS = range(0, 250, 10)
SETUPS = {"full": 1.0, "blocks": 1.0, "r=8": 1.0, "r=64": 1.0}  # forgotten per squared nat that is learned
KINDS = ("no replay", "replay of what it wrote", "replay of what it read")


def rows(price=None, replay=None, scaled=None, noise=0.003, lost_of=lambda learned: learned**2, kl=None):
    """Rows of curves: what is learned saturates, and what is forgotten is a price times its square.

    Args:
        price: setup -> the price, or (base, setup) -> it.
        replay: kind -> its factor on the price of r=8.
        scaled: (what is learned, forgotten) of an adapter at less than its strength, in units of both at its strength.
        lost_of: what is learned -> what is forgotten, at a price of 1.
        kl: (forgotten, size, random number) -> KL on the new task.
    """
    random, made = np.random.default_rng(0), []
    price = price or (lambda base, setup: SETUPS[setup])
    for base in BASES:
        for kind in KINDS:
            factor = (replay or dict.fromkeys(KINDS, 1.0))[kind]
            for setup in SETUPS if kind == "no replay" else ("full", "r=8"):
                for rate in (1, 2, 4):
                    for seed in range(2, 10):
                        most = 0.5 - 0.02 * abs(rate - 2) + random.normal(0, 0.001)
                        cost = price(base, setup) * factor * (1 + random.normal(0, noise))
                        for step in STEPS:
                            learned = most * (1 - np.exp(-step * rate / 60))
                            lost = lost_of(learned)
                            row = {"data": f"{base}, {kind}", "setup": setup, "lr": rate * 1e-3, "seed": seed}
                            row |= {"step": step, "outcome": "done", "validation_loss": 3 - learned}
                            made.append(row | {"off_domain_loss": 2 + cost * lost})
                        size = rate * (1 + 0.3 * random.random())
                        made[-1] |= {"score_size": size, "score_divergence": 1.0}
                        if kl:
                            made[-1]["score_divergence"] = kl(cost * lost, size, random.random())
                        for strength in (0.25, 0.5, 0.75, 1.25) if setup.startswith("r=") else ():
                            less = scaled or (strength, strength**2)
                            made[-1][f"score_new, {strength:g}"] = 3 - learned * less[0]
                            made[-1][f"score_old, {strength:g}"] = 2 + cost * lost * less[1]
    return made


def verdict(claim, **options):
    return decide(claim, "tiny_front", rows(**options))


def price_of(lora, base=BASES):
    return lambda name, setup: lora if setup.startswith("r=") and name in base else 1.0


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        (price_of(0.5), "stands"),
        (price_of(2.0), "falls"),
        (price_of(1.0), "open"),
        (lambda base, setup: {"r=8": 0.5, "r=64": 2.0}.get(setup, 1.0), "depends"),
    ],
)
def test_who_forgets_less_at_equal_learning(price, expected):
    assert verdict("small-lora-forgets-less", price=price).verdict == expected


def test_a_method_that_only_learns_less_does_not_forget_less():
    slow = rows()
    for row in slow:
        if row["setup"] == "r=8":
            learned = 0.6 * (3 - row["validation_loss"])
            row |= {"validation_loss": 3 - learned, "off_domain_loss": 2 + learned**2}
    cases = [case for case in fronts.forgets_less(make("tiny_front", slow)) if case[3] == "r=8"]
    assert [answer for answer, *_ in cases] == [None] * 4


def test_the_front_is_the_best_of_all_rates():
    ((_, curves), *_) = fronts.read_curves(make("tiny_front", rows()))
    first = curves["full"][2]
    assert len(first) == 3
    each = [fronts.forgotten_at([curve], 0.3) for curve in first]
    assert fronts.forgotten_at(first, 0.3) == min(each) < max(each)
    assert each == pytest.approx([0.09] * 3, rel=0.05)


def test_a_run_that_stopped_is_not_on_the_front():
    stopped = [row | {"lr": 8e-3, "outcome": "diverged", "off_domain_loss": 1.0} for row in rows() if row["lr"] == 1e-3]
    assert fronts.read_table(make("tiny_front", rows() + stopped)).equals(fronts.read_table(make("tiny_front", rows())))


def test_a_front_is_at_the_edge_if_the_lowest_rate_forgot_least():
    def front(*costs):  # of three rates, the lowest first
        rates = zip((1e-3, 2e-3, 4e-3), costs, strict=True)
        curves = [{"lr": lr, "learned": [0, 0.5, 1], "forgotten": [0, cost / 2, cost]} for lr, cost in rates]
        return {seed: [pandas.DataFrame(curve) for curve in curves] for seed in range(8)}

    inside, edge = front(2, 1, 3), front(1, 2, 3)
    assert not fronts.at_edge(inside, inside)
    assert fronts.at_edge(edge, inside)
    assert fronts.at_edge(inside, edge)


def test_what_is_read_at_the_lowest_rate_decides_nothing():
    lowest = [row for row in rows(price=price_of(0.5)) if row["lr"] == 2e-3]  # the only rate that learns so much
    assert decide("small-lora-forgets-less", "tiny_front", lowest).verdict == "open"


def test_fewer_than_eight_seeds_compare_nothing():
    few = [row for row in rows() if row["setup"] == "full" or row["seed"] < 6]
    with pytest.raises(ValueError, match="fewer than 8 seeds"):
        list(fronts.forgets_less(make("tiny_front", few)))


@pytest.mark.parametrize(
    ("wrote", "read", "expected"),
    [(0.2, 0.4, "stands"), (0.4, 0.2, "falls"), (1.5, 1.0, "falls"), (0.4, 0.4, "open")],
)
def test_replay_of_samples_is_compared_with_none_and_with_real_text(wrote, read, expected):
    replay = {"no replay": 1.0, "replay of what it wrote": wrote, "replay of what it read": read}
    result = verdict("replay-cuts-forgetting-by-80", replay=replay)
    assert result.verdict == expected
    assert f"by {100 * (1 - wrote):.0f} % at 95 %" in result.measured


@pytest.mark.parametrize(("scaled", "expected"), [((1.1, 0.5), "stands"), ((0.5, 0.5), "falls"), ((1.1, 1.5), "falls")])
def test_a_weaker_adapter_must_be_better_at_both(scaled, expected):
    assert verdict("final-checkpoint-overshoots", scaled=scaled).verdict == expected


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (lambda forgotten, size, chance: forgotten, "stands"),
        (lambda forgotten, size, chance: -forgotten, "falls"),
        (lambda forgotten, size, chance: chance, "open"),
    ],
)
def test_kl_predicts_what_is_forgotten_if_it_is_ahead_of_size_and_rate(kl, expected):
    price = lambda base, setup: {"full": 1.0, "blocks": 1.4, "r=8": 2.0, "r=64": 2.8}[setup]  # noqa: E731
    assert verdict("kl-predicts-forgetting", kl=kl, price=price).verdict == expected


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        (lambda learned: learned**2, "stands"),
        (lambda learned: max(0.0, learned - 0.4), "open"),  # nothing at first
        (lambda learned: learned * (learned - 0.4), "falls"),  # the old text gains at first
    ],
)
def test_stopping_early_does_not_help_if_half_of_what_is_learned_has_its_price(lost, expected):
    assert verdict("forgetting-linear-in-loss", lost_of=lost).verdict == expected


@pytest.mark.parametrize("lora", [0.5, 3.0])
def test_a_control_that_differs_leaves_all_open(lora):
    odd = rows(price_of(lora))
    for row in odd:
        if row["setup"] == "full" and row["seed"] >= 6:
            row["off_domain_loss"] += 0.3 * (3 - row["validation_loss"])
    result = decide("small-lora-forgets-less", "tiny_front", odd)
    assert (result.verdict, "the control differs" in result.measured) == ("open", True)
