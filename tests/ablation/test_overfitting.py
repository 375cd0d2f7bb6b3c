"""What curves tell of learning, overfitting and forgetting: against numbers found by hand, by numpy and by ``fit``."""

import math
import random
from functools import partial

import numpy as np
import pandas
import pytest
import torch

from lora_lab import FullFineTuning, LoRA, fit
from lora_lab.ablation import run
from lora_lab.ablation.compare import at_rates, best_rates, by_size, choose_rates, compare_by_seed, tune_by_seed
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.halving import Halving
from lora_lab.ablation.overfitting import (
    at_equal_learning,
    at_training_loss,
    by_stopping_point,
    by_training_loss,
    compare_over_rates,
    interpolate_at,
    summarise_trials,
    training_losses,
)
from lora_lab.ablation.results import load
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import Examples, Task

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = partial(DigitsMLP, width=16)


def curve(setup, lr, seed, validation, off_domain=None, gap=None, **columns):
    """The rows of one trial, evaluated every ten steps."""
    count = len(validation)
    own = {"off_domain_loss": off_domain or [1.0] * count, "gap": gap or [math.nan] + [0.0] * (count - 1), **columns}
    trial = {"setup": setup, "lr": lr, "seed": seed, "outcome": "done", "step": [10.0 * i for i in range(count)]}
    return pandas.DataFrame({**trial, "validation_loss": validation, **own})


def failed(setup, lr, seed, **columns):
    """The one row of a trial that failed."""
    lost = dict.fromkeys(["step", "validation_loss", "off_domain_loss", "gap"], math.nan)
    return pandas.DataFrame([{"setup": setup, "lr": lr, "seed": seed, "outcome": "failed", **lost, **columns}])


def together(*curves):
    return pandas.concat(curves, ignore_index=True)


def largest_of_three(n_train=24):
    """Which of its first three numbers is the largest: something that can be learned in a few steps."""

    def part(n, seed):
        inputs = torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))
        return Examples(inputs, inputs[:, :3].argmax(1))

    return Task("largest", part(n_train, 0), part(20, 1), part(5, 2), part(6, 3))


OVERFITS = {
    "validation": [3.0, 2.0, 1.5, 1.75, 2.25],
    "off_domain": [1.0, 1.125, 1.25, 1.5, 2.0],
    "gap": [math.nan, 0.125, 0.25, 0.5, 0.875],
}
STILL_LEARNS = {
    "validation": [3.0, 2.75, 2.5],
    "off_domain": [1.0, 0.75, 0.5],
    "gap": [math.nan, -0.25, 0.125],
}


# What one trial learned, lost and forgot

MEASURES = ["best_step", "best_loss", "learned", "last_loss", "overfit", "gap", "forgotten", "forgotten_at_last"]
TIES = {"validation": [3.0, 2.0, 2.5, 2.0], "off_domain": [1.0, 1.5, 2.0, 4.0]}  # of two as good the earlier counts
HARMED = {"validation": [2.0, 2.5, 4.0], "off_domain": [1.0, 1.5, 3.0]}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (OVERFITS, (20, 1.5, 1.5, 2.25, 0.75, 0.875, 0.25, 1.0)),
        (STILL_LEARNS, (20, 2.5, 0.5, 2.5, 0.0, 0.125, -0.5, -0.5)),
        (TIES, (10, 2.0, 1.0, 2.0, 0.0, 0.0, 0.5, 3.0)),
        (HARMED, (0, 2.0, 0.0, 4.0, 2.0, 0.0, 0.0, 2.0)),
    ],
)
def test_a_trial_is_measured_at_its_best_step_and_at_its_last(own, expected):
    judged = [math.nan] * (len(own["validation"]) - 1) + [2.5]
    frame = together(failed("full", 1.0, 0), curve("full", 1e-3, 4, **own, test_loss=judged))
    (row,) = summarise_trials(frame.sample(frac=1, random_state=3)).to_dict("records")  # in any order of rows
    assert tuple(row[name] for name in MEASURES) == expected
    assert (row["setup"], row["lr"], row["seed"], row["test_loss"]) == ("full", 1e-3, 4, 2.5)
    assert "test_loss" not in summarise_trials(frame.drop(columns="test_loss"))


# Each method at its own best rate


def losses(*rows):
    """Curves of (method, rate, seed, lowest loss)."""
    return together(*(curve(setup, lr, seed, [loss + 1.0, loss]) for setup, lr, seed, loss in rows))


def at_best_rate(frame):
    """The summaries of the trials at each setup's best rate."""
    return summarise_trials(frame).merge(best_rates(frame))


def by_loops(rows, slack):
    """[setup, rate, edge] of what is within the slack of the best mean over the seeds that a setup's rates share."""
    found = []
    for setup in dict.fromkeys(row[0] for row in rows):
        losses_at = {}
        for _, lr, seed, loss in sorted(row for row in rows if row[0] == setup):
            losses_at.setdefault(lr, {})[seed] = loss
        seeds = set.intersection(*map(set, losses_at.values()))
        means = {lr: sum(own[seed] for seed in seeds) / len(seeds) for lr, own in losses_at.items()}
        best, rates = min(means, key=means.get), list(means)
        for lr in rates:
            if lr == best or (slack and means[lr] <= means[best] + slack):
                edge = {rates[0]: "smallest", rates[-1]: "largest"}.get(lr, "")
                found.append([setup, lr, edge if len(rates) > 1 else "only"])
    return found


@pytest.mark.parametrize("slack", [0.0, 0.25, 1.0])
def test_the_best_rates_are_those_of_a_plain_loop(slack):
    draw, several = random.Random(0), 0
    for _ in range(60):
        rates = {setup: draw.sample((1e-4, 3e-4, 1e-3, 3e-3), draw.randint(1, 4)) for setup in ("full", "b", "a")}
        rows = [
            (setup, lr, seed, draw.randint(1, 12) / 8)
            for setup, own in rates.items()
            for lr in own
            for seed in range(4)
            if seed == 0 or draw.random() < 0.8
        ]
        found = best_rates(losses(*rows).assign(n_train=16), slack)
        several += len(found) > 3
        assert found[["setup", "lr", "edge"]].values.tolist() == by_loops(rows, slack)
    assert (several > 20) == (slack > 0)


def test_the_last_loss_may_choose_another_rate_than_the_lowest():
    harmed = curve("full", 1e-2, 0, [1.0, 1.0, 3.0])  # lowest before training
    slow = curve("full", 1e-4, 0, [1.0, 1.2, 1.3])
    trials = together(harmed, slow, curve("full", 1e-3, 0, [1.0, 0.9, 2.0]))
    assert at_best_rate(trials)[["lr", "edge"]].values.tolist() == [[1e-3, ""]]
    choice = choose_rates(trials.assign(steps=20.0, test_loss=1.0, reason=""))["full"]
    assert (choice.lr, choice.edge) == (1e-4, "smallest")


@pytest.mark.parametrize(("best", "chosen", "tried"), [(True, 1e-3, 3), (False, 2.5e-4, 5)])
def test_the_loss_that_counts_widens_the_grid(best, chosen, tried):
    def run(seed, lrs):  # training does harm, the more so the higher the rate, but for one rate below the grid
        rates = {lr: [2.0, 1.5 if lr == 1e-3 else 1.8, 2.0 + abs(lr - 2.5e-4) * 1e3] for lr in lrs["full"]}
        curves = [curve("full", lr, seed, losses, steps=20.0, test_loss=1.0, reason="") for lr, losses in rates.items()]
        return together(*curves)

    frames, choices = tune_by_seed(run, {"full": (5e-4, 1e-3, 2e-3)}, seeds=(0, 1), widen=2, best=best)
    assert {setup: choice.lr for setup, choice in choices.items()} == {"full": chosen}
    assert [frame.lr.nunique() for frame in frames] == [tried, tried]


def test_what_is_chosen_lacks_no_number_though_other_rates_lack_seeds_or_failed():
    frame = together(
        *(curve("full", 1e-3, seed, **OVERFITS) for seed in range(3)),
        curve("full", 1e-4, 0, [3.0, 2.0, 2.5]),
        failed("full", 1.0, 0),
        curve("LoRA", 1e-2, 0, **STILL_LEARNS),
        failed("LoRA", 1e-2, 1),
    )
    best = at_best_rate(frame)
    assert best[["setup", "seed"]].values.tolist() == [["full", 0], ["full", 1], ["full", 2], ["LoRA", 0]]
    assert set(best.lr[best.setup == "full"]) == {1e-3}
    assert best.notna().all(axis=None)


# Ways against one of them


def numbers(values, **columns):
    """A table of what each method has for the seeds 0, 1, ..."""
    return pandas.DataFrame(
        {"setup": setup, "seed": seed, "overfit": value, **columns}
        for setup, own in values.items()
        for seed, value in enumerate(own)
    )


FULL = (1.0, 5.0, 3.0)
T_OF_TWO = 2.919986  # Student's t, 0.95, two degrees of freedom: from a printed table


def test_ways_are_compared_seed_by_seed_with_students_bounds():
    # Differences 0.1, 0.3, 0.2: mean 0.2, standard deviation 0.1.
    best = numbers({"full": FULL, "LoRA": (1.1, 5.3, 3.2)}).sample(frac=1, random_state=1)
    table = compare_by_seed(best, "overfit").set_index("setup")
    half = T_OF_TWO * 0.1 / math.sqrt(3)
    row = table.loc["LoRA"]
    assert (row.difference, row.lower, row.upper) == pytest.approx((0.2, 0.2 - half, 0.2 + half), rel=1e-6)
    assert (row["mean"], row.least, row.most, row.seeds) == (pytest.approx(3.2), 1.1, 5.3, 3)
    reference = table.loc["full"]
    assert (reference["mean"], reference.least, reference.most, reference.seeds) == (3.0, 1.0, 5.0, 3)
    assert reference[["difference", "lower", "upper"]].isna().all()
    unpaired = numbers({"full": FULL, "LoRA": (3.2, 1.1, 5.3)})  # the same values, of other seeds
    other = compare_by_seed(unpaired, "overfit").set_index("setup").loc["LoRA"]
    assert other.difference == pytest.approx(0.2)
    assert other.upper - other.lower > 10 * (row.upper - row.lower)


def test_only_seeds_that_both_ways_have_are_paired():
    best = numbers({"full": FULL, "LoRA": (1.5, 5.75, 99.0)})
    best = best[~((best.setup == "full") & (best.seed == 2))]
    row = compare_by_seed(best, "overfit").set_index("setup").loc["LoRA"]
    assert row.difference == 0.625  # of 0.5 and 0.75
    assert (row.seeds, row.most) == (3, 99.0)


def test_one_seed_gives_a_difference_and_no_bounds():
    one = compare_by_seed(numbers({"full": (1.0,), "LoRA": (1.5,)}), "overfit").set_index("setup").loc["LoRA"]
    assert one.difference == 0.5
    assert one[["lower", "upper"]].isna().all()
    two = compare_by_seed(numbers({"full": (1.0, 1.0), "LoRA": (1.5, 1.75)}), "overfit").set_index("setup").loc["LoRA"]
    assert two.lower < two.difference < two.upper


# The price of the same good

FAST = {"validation": [3.0, 2.0, 1.0], "off_domain": [1.0, 1.5, 2.5]}  # learned 0, 1, 2; forgot 0, 0.5, 1.5
SLOW = {"validation": [3.0, 2.5, 2.25, 2.75], "off_domain": [1.0, 1.2, 1.4, 1.9]}  # at its best 0.75, for 0.4
DIPS = {"validation": [3.0, 3.5, 2.0, 2.5, 1.0], "off_domain": [1.0, 2.0, 3.0, 9.0, 9.0]}  # -0.5, then 1 for 2


def at_equal(*curves):
    frame = together(*curves)
    return at_equal_learning(frame, at_best_rate(frame))


def test_forgetting_is_read_where_all_had_learned_as_much():
    found = at_equal(curve("full", 1e-3, 0, **FAST), curve("LoRA", 1e-2, 0, **SLOW)).set_index("setup")
    assert found.learned.tolist() == [0.75, 0.75]
    assert found.forgotten["full"] == pytest.approx(0.375)  # three quarters of the method to the first evaluation
    assert found.forgotten["LoRA"] == pytest.approx(0.4)  # at its best, though it forgot 0.9 by the end


def test_a_curve_is_followed_to_where_it_first_gets_there():
    found = at_equal(curve("dips", 1e-3, 0, **DIPS), curve("LoRA", 1e-2, 0, **SLOW)).set_index("setup")
    # From -0.5 for 1 to 1 for 2: at 0.75 five sixths of the method.
    assert found.forgotten["dips"] == pytest.approx(1 + 5 / 6)


def test_a_seed_in_which_a_way_learned_nothing_is_left_out():
    curves = [curve(setup, lr, 0, **own) for setup, lr, own in (("full", 1e-3, FAST), ("LoRA", 1e-2, SLOW))]
    curves += [curve("full", 1e-3, 1, **FAST), curve("LoRA", 1e-2, 1, [3.0, 3.25, 3.5])]
    assert set(at_equal(*curves).seed) == {0}
    curves[-1] = curve("LoRA", 1e-2, 1, [3.0, 2.875, 3.5])
    found = at_equal(*curves)
    assert found[["seed", "setup"]].values.tolist() == [[0, "full"], [0, "LoRA"], [1, "full"], [1, "LoRA"]]
    assert found.learned.tolist() == [0.75, 0.75, 0.125, 0.125]


def test_curves_of_rates_that_were_not_chosen_play_no_part():
    # Better nowhere, and with another price: what was chosen must be looked up by its rate.
    others = [curve("full", 1e-4, 0, [3.0, 2.9], [1.0, 9.0]), curve("LoRA", 1e-3, 0, [3.0, 2.9], [1.0, 9.0])]
    chosen = [curve("full", 1e-3, 0, **FAST), curve("LoRA", 1e-2, 0, **SLOW)]
    expected = at_equal(*chosen)
    pandas.testing.assert_frame_equal(at_equal(*others, *chosen), expected)
    assert not at_equal(*chosen[:1], *others[1:]).equals(expected)


# All rates on all seeds, for each size

METHODS = {"full": FullFineTuning(), "LoRA": LoRA(2, 4)}
RATES = {"full": (1e-4, 1e-2), "LoRA": (0.1, 1e-3, 3e-2)}
OPTIONS = {"steps": 6, "batch_size": 4, "eval_every": 2, "schedule": "constant", "warmup": 0}


def task_of(size, seed):
    """Other examples for each seed, and as many as the size says."""
    return largest_of_three().limited(size, seed)


def trial_of(setup, lr, seed, size):
    return Trial(METHODS[setup], lr, seed, **OPTIONS)


def sweep(lrs=RATES, sizes=(8, 12), seeds=(5, 0), **more):
    options = {"engine": "separate", "progress": False, **more}
    return by_size(MODEL, task_of, trial_of, lrs, sizes, seeds, **options)


def tried(frame):
    """(method, rate) of a frame's trials."""
    return sorted({(row.setup, row.lr) for row in frame.itertuples()})


def seeds_run(monkeypatch):
    """The seed of each call of ``fit`` from now on."""
    called = []

    def counted(*arguments, **options):
        called.append(options["config"].seed)
        return fit(*arguments, **options)

    monkeypatch.setattr(run, "fit", counted)
    return called


def best_by_fit(setup, size, seed):
    """The rate of the lowest loss at any evaluation."""
    lowest = {}
    for lr in RATES[setup]:
        history = fit(MODEL(), task_of(size, seed), METHODS[setup], lr=lr, seed=seed, **OPTIONS)
        lowest[lr] = min(loss for loss in history.frame()["validation_loss"].dropna())
    return min(lowest, key=lowest.get)


def test_all_rates_are_run_on_each_seed_and_the_best_one_is_that_of_fit():
    frames = list(sweep(seeds=(5,)))
    for frame, size in zip(frames, (8, 12), strict=True):
        assert (set(frame.n_train), set(frame.task)) == ({size}, {task_of(size, 5).fingerprint})
        assert tried(frame) == sorted((setup, lr) for setup, lrs in RATES.items() for lr in lrs)
        assert frame.setup.unique().tolist() == ["full", "LoRA"]
        best = best_rates(frame).set_index("setup").lr.to_dict()
        assert best == {setup: best_by_fit(setup, size, 5) for setup in METHODS}
    backwards = next(sweep(lrs=dict(reversed(RATES.items()))))
    assert backwards.setup.unique().tolist() == ["LoRA", "full"]


def test_what_was_stopped_goes_on_from_its_folder(tmp_path, monkeypatch):
    whole = list(sweep(folder=tmp_path / "whole", sizes=(8,)))
    stopped = sweep(folder=tmp_path / "part", sizes=(8,))
    next(stopped)  # a frame is there before the next one is run
    stopped.close()
    assert load(tmp_path / "part").key.nunique() == 5
    seeds = seeds_run(monkeypatch)
    again = list(sweep(folder=tmp_path / "part", sizes=(8,)))
    assert seeds == [0] * 5
    varying = ["seconds", "date", "commit"]
    for one, other in zip(again, whole, strict=True):
        pandas.testing.assert_frame_equal(one.drop(columns=varying), other.drop(columns=varying))


def test_a_rate_that_was_stopped_on_one_seed_is_not_tried_on_the_next_and_cannot_be_the_best():
    rates = {"full": (1e-6, 1e-2), "LoRA": (1e-3, 3e-2)}
    halving = Halving(rungs=[0.5], best_so_far=True)

    def run_seed(seed, lrs):
        return next(sweep(lrs=lrs, sizes=(8,), seeds=(seed,), halving=halving))

    (first, second), choices = tune_by_seed(run_seed, rates, (5, 0), 0, True)
    stopped = tried(first[first.outcome == "stopped"])
    assert len(stopped) == 2
    assert tried(second) == sorted({*tried(first)} - {*stopped}) == sorted((k, one.lr) for k, one in choices.items())


def test_a_rate_that_went_on_with_one_seed_and_was_stopped_with_another_is_not_the_best():
    trials = [curve("full", 0.1, 0, [2.0, 1.0]), curve("full", 0.2, 0, [2.0, 1.5]), curve("full", 0.2, 1, [2.0, 1.4])]
    stopped = curve("full", 0.1, 1, [2.0, 1.9]).assign(outcome="stopped")
    frame = together(*trials, stopped)
    best = at_best_rate(frame)
    assert best.lr.tolist() == [0.2, 0.2]
    assert best.edge.tolist() == ["largest"] * 2  # the other one was tried too
    assert at_best_rate(together(*trials)).lr.tolist() == [0.1]  # by the seed that both have


def test_all_rates_that_tie_are_run_on_all_seeds_at_each_size():
    ties = pandas.DataFrame(
        [(8, "full", 1e-2), (12, "full", 1e-4), (12, "full", 1e-2), (12, "LoRA", 3e-2)],
        columns=["n_train", "setup", "lr"],
    )
    how = {"model_factory": MODEL, "task_of": task_of, "trial_of": trial_of, "engine": "separate", "progress": False}
    frame = at_rates(ties, seeds=(3, 4), **how)
    for size, trials in ((8, [("full", 1e-2)]), (12, [("LoRA", 3e-2), ("full", 1e-4), ("full", 1e-2)])):
        for seed in (3, 4):
            assert tried(frame[(frame.n_train == size) & (frame.seed == seed)]) == trials
    assert len(summarise_trials(frame)) == 2 * len(ties)
    row = frame[(frame.n_train == 8) & (frame.seed == 4)]
    history = fit(MODEL(), task_of(8, 4), METHODS["full"], lr=1e-2, seed=4, **OPTIONS)
    assert row.validation_loss.tolist() == history.frame()["validation_loss"].dropna().tolist()


# Over all pairs of rates


def rising(setup, lr, rises, **columns):
    """Trials of several seeds whose validation loss falls to 1 and rises again by so much."""
    curves = [curve(setup, lr, seed, [2.0, 1.0, 1.0 + rise], **columns) for seed, rise in enumerate(rises)]
    return together(*curves)


GENTLE = rising("full", 1e-3, [0.5, 0.625, 0.5])
STEEP = rising("full", 3e-3, [1.0, 1.125, 1.0])


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [
        ({1e-3: [0.25, 0.375, 0.125]}, "less"),
        ({1e-3: [0.25, 0.375, 0.125], 1e-2: [0.125, 0.125, 0.25]}, "less"),
        ({1e-3: [0.25, 0.375, 0.125], 1e-2: [0.5, 0.5, 0.625]}, "open"),
        ({1e-3: [0.75, 0.875, 0.875]}, "more"),
        ({1e-3: [0.75, 0.875, 0.875], 1e-2: [0.5, 0.5, 0.625]}, "open"),
        ({1e-3: [0.75, 0.875, 0.875], 1e-2: [0.25, 0.375, 0.125]}, "flips"),
        ({1e-3: [0.75, 0.875, 0.875], 3e-3: [0.5, 0.5, 0.625], 1e-2: [0.25, 0.375, 0.125]}, "flips"),
    ],
)
def test_a_verdict_has_to_hold_for_each_pair_of_rates(rates, verdict):
    told = compare_over_rates(together(GENTLE, *(rising("LoRA", lr, rises) for lr, rises in rates.items())), "overfit")
    assert told[["setup", "pairs", "verdict"]].values.tolist() == [["LoRA", len(rates), verdict]]


def test_the_bounds_are_the_outermost_of_all_pairs():
    lora = [rising("LoRA", lr, rises) for lr, rises in ((1e-3, [0.25, 0.375, 0.125]), (1e-2, [0.75, 0.875, 0.875]))]
    told = compare_over_rates(together(GENTLE, STEEP, *lora), "overfit").squeeze()
    alone = [
        compare_by_seed(summarise_trials(together(full, other)), "overfit").set_index("setup").loc["LoRA"]
        for full in (GENTLE, STEEP)
        for other in lora
    ]
    assert told.pairs == 4
    assert told.lower == min(one.lower for one in alone)
    assert told.upper == max(one.upper for one in alone)


def test_a_share_compares_at_equal_learning():
    curves = [curve("full", 1e-3, seed, **FAST) for seed in (0, 1)] + [
        curve("LoRA", 1e-2, seed, **SLOW) for seed in (0, 1)
    ]
    frame = together(*curves)
    at_best, equal, early = (
        compare_over_rates(frame, "forgotten", share=share).squeeze() for share in (None, 1, 2 / 3)
    )
    assert at_best.lower == at_best.upper == pytest.approx(0.4 - 1.5)
    assert equal.lower == pytest.approx(0.4 - 0.375)
    assert early.lower == pytest.approx(0.2 - 0.25)
    assert (equal.verdict, early.verdict) == ("more", "less")


def test_another_method_may_be_the_reference_and_where_it_is_missing_nothing_is_compared():
    both = together(GENTLE, rising("LoRA", 1e-3, [0.25, 0.375, 0.125]))
    assert compare_over_rates(both, "overfit", "LoRA")[["setup", "verdict"]].values.tolist() == [["full", "more"]]
    lone = together(both.assign(n_train=16), rising("LoRA", 1e-3, [0.75, 0.875, 0.875]).assign(n_train=64))
    assert compare_over_rates(lone, "overfit").n_train.tolist() == [16]


# At each stopping point


STOPS = together(
    *(curve("full", 1e-3, seed, [3.0, 1.0, 2.0, 3.0 + seed / 8], n_train=16) for seed in (0, 1)),
    *(curve("LoRA", 1e-2, seed, [3.0, 2.0, 1.0 + seed / 8, 3.5 + seed / 8], n_train=16) for seed in (0, 1)),
)


def test_a_rise_is_compared_as_if_training_had_stopped_at_each_evaluation():
    stops = by_stopping_point(STOPS)
    assert stops[["n_train", "setup", "step", "verdict"]].values.tolist() == [
        [16, "LoRA", 20, "less"],
        [16, "LoRA", 30, "more"],
    ]
    # Full has risen from 1.0 by 1.0, then by 2.0 and 2.125; LoRA by nothing, then by 2.5 twice.
    assert stops.difference.tolist() == [-1.0, (0.5 + 0.375) / 2]
    last = compare_by_seed(summarise_trials(STOPS), "overfit").query("setup == 'LoRA'").iloc[0]
    assert stops.iloc[-1][["mean", "lower", "upper"]].tolist() == last[["mean", "lower", "upper"]].tolist()
    assert stops.seeds.tolist() == [2, 2]


def test_a_stopping_point_of_which_seeds_disagree_is_open():
    mixed = together(STOPS, curve("LoRA", 1e-2, 2, [3.0, 1.0, 2.5, 3.0], n_train=16))
    mixed = together(mixed, curve("full", 1e-3, 2, [3.0, 1.0, 1.5, 2.0], n_train=16))
    assert by_stopping_point(mixed).verdict.tolist() == ["open", "more"]


# At equal training loss


def test_the_validation_loss_is_read_where_the_training_loss_first_comes_down_to_a_value():
    # Means of the training loss 2, 1, 0.5, 1.5, 0.25, so that it is 1.5, 0.75, 1 and 0.875 at the evaluations.
    gaps = [math.nan, 0.5, 1.0, 2.0, 1.25, 3.0]
    frame = curve("full", 1e-3, 4, [3.0, 2.5, 2.0, 2.5, 2.75, 3.25], gap=gaps)
    rows = at_training_loss(frame.sample(frac=1, random_state=1), [1.125, 0.9375, 0.75, 0.5])
    assert rows.to_dict("records") == [
        {"setup": "full", "lr": 1e-3, "seed": 4, "train_loss": loss, "validation_loss": there}
        for loss, there in ((1.125, 2.25), (0.9375, 2.125), (0.75, 2.0))
    ]


def test_a_mean_over_steps_is_the_training_loss_in_their_middle():
    frame = curve("full", 1e-3, 0, [3.0] * 4, gap=[math.nan, -1.0, 1.0, 2.0]).assign(step=[0, 10, 30, 40])
    losses = training_losses(frame)  # 4 at step 5, 2 at step 20, 1 at step 35
    assert losses[1:3].tolist() == pytest.approx([4 - 2 * 5 / 15, 2 - 10 / 15])
    assert np.isnan(losses[[0, 3]]).all()
    assert np.isnan(training_losses(frame.assign(gap=math.nan))).all()


def test_a_training_loss_that_is_not_passed_has_no_row():
    frame = trained_to("full", 0, [3.0, 2.5, 2.0], [2.0, 1.0])
    rows = at_training_loss(frame, [3.0, 2.0, 1.0, 0.5])
    assert rows.train_loss.tolist() == [1.0]  # 2.0 is where the first evaluation is already
    empty = at_training_loss(frame, [0.5])
    assert empty.columns.tolist() == ["setup", "lr", "seed", "train_loss", "validation_loss"]
    assert empty.empty


def trained_to(setup, seed, validation, training, lr=1e-3):
    """A curve that has these validation losses when it comes down to these training losses, wherever means are placed.

    For that each training loss is the mean before four evaluations; the last two have the next validation loss.
    """
    here, after = validation[1:], [*validation[2:], validation[-1]]
    losses = [loss for pair in zip(here, after, strict=True) for loss in pair for _ in range(2)]
    gaps = np.subtract(losses, np.repeat(training, 4)).tolist()
    return curve(setup, lr, seed, [validation[0], *losses], gap=[math.nan, *gaps])


def test_at_equal_training_loss_a_difference_has_bounds_and_a_verdict():
    curves = [trained_to("full", seed, [3.0, 2.0, 2.5, 3.0], [2.0, 1.0, 0.5]) for seed in (0, 1)]
    curves += [trained_to("LoRA", seed, [3.0, 2.0, 3.0, 4.0 + seed / 64], [2.0, 1.0, 0.5]) for seed in (0, 1)]
    curves += [trained_to("head", seed, [3.0, 2.0, 2.0, 1.5], [2.0, 1.5, 1.0]) for seed in (0, 1)]
    table = by_training_loss(together(*curves), [1.0, 0.5])
    assert table[["setup", "train_loss", "difference", "verdict"]].values.tolist() == [
        ["LoRA", 1.0, 0.5, "more"],
        ["head", 1.0, -1.0, "less"],  # and at 0.5 it has no row: it never comes down to it
        ["LoRA", 0.5, 1 + 1 / 128, "more"],
    ]
    assert table.lower.tolist()[:2] == table.upper.tolist()[:2] == [0.5, -1.0]
    assert table.lower[2] < table.difference[2] < table.upper[2]


def test_a_difference_that_turns_with_the_place_of_a_mean_is_undecided():
    full = [curve("full", 1e-3, s, [3.0, 2.0, 3.0], gap=[math.nan, 0.0, 2.0]) for s in (0, 1)]  # means 2 and 1
    lora = [trained_to("LoRA", s, [3.0, 2.0, 2.25], [2.0, 1.0]) for s in (0, 1)]
    frame = together(*full, *lora)
    assert at_training_loss(frame, [1.5], place=1.0).query("setup == 'full'").validation_loss.tolist() == [2.5, 2.5]
    with pytest.raises(ValueError, match="two seeds in common with 'full'"):
        by_training_loss(frame, [1.5])  # placed before its steps, the second mean is that of the first evaluation
    rising = [curve("full", 1e-3, s, [3.0] * 5, gap=[math.nan, 2.0, 0.0, 2.5, 2.5]) for s in (0, 1)]  # 1, 3, 0.5, 0.5
    assert len(at_training_loss(together(*rising), [1.5])) == 2
    with pytest.raises(ValueError, match="two seeds in common with 'full'"):
        by_training_loss(together(*rising, *lora), [1.5])  # in the middle alone it begins above
    full = [
        curve("full", 1e-3, s, [3.0, 2.0, 2.0, 3.0, 3.0], gap=[math.nan, 0.0, 0.0, 2.0, 2.0]) for s in (0, 1)
    ]  # means 2, 2, 1 and 1
    (row,) = by_training_loss(together(*full, *lora), [1.5]).to_dict("records")
    assert (row["difference"], row["lower"], row["upper"], row["verdict"]) == (0.25, -0.25, 0.25, "open")
    (row,) = compare_over_rates(together(*full, *lora), "validation_loss", train_loss=1.5).to_dict("records")
    assert (row["pairs"], row["lower"], row["upper"], row["verdict"]) == (1, -0.25, 0.25, "flips")


def test_all_pairs_of_rates_can_be_compared_at_equal_training_loss():
    full = [trained_to("full", s, [3.0, 2.0, 2.0, 3.0], [2.0, 1.0, 0.5]) for s in (0, 1)]
    faster = [trained_to("full", s, [3.0, 2.25, 2.5, 3.0], [1.5, 0.5, 0.25], lr=1e-2) for s in (0, 1)]
    lora = [trained_to("LoRA", s, [3.0, 2.0, 3.0, 4.0], [2.0, 1.0, 0.5]) for s in (0, 1)]
    frame = together(*full, *faster, *lora).assign(n_train=16)
    (row,) = compare_over_rates(frame, "validation_loss", train_loss=1.0).to_dict("records")
    assert (row["pairs"], row["lower"], row["upper"], row["verdict"]) == (2, 0.5, 1.0, "more")
    (row,) = compare_over_rates(frame, "validation_loss", train_loss=0.5).to_dict("records")
    assert (row["lower"], row["upper"]) == (1.0, 1.5)
    with pytest.raises(ValueError, match="two seeds in common"):
        compare_over_rates(frame, "validation_loss", train_loss=0.25)


BY_SIZE = [
    summarise_trials,
    best_rates,
    lambda frame: compare_by_seed(summarise_trials(frame), "overfit"),
    lambda frame: at_equal_learning(frame, summarise_trials(frame)),
    lambda frame: at_training_loss(frame, [1.0]),
    lambda frame: compare_over_rates(frame, "overfit"),
    lambda frame: by_stopping_point(frame),
    lambda frame: by_training_loss(frame, [1.0]),
]


@pytest.mark.parametrize("call", BY_SIZE)
def test_each_size_is_treated_as_if_it_were_alone_and_setups_keep_their_places(call):
    few = [trained_to("full", s, [3.0, 2.0, 2.5, 3.0], [2.0, 1.0, 0.5]) for s in (0, 1)]
    few += [trained_to(name, s, [3.0, 1.5, 3.0 + s, 4.0], [2.0, 1.0, 0.5]) for name in ("b", "a") for s in (0, 1)]
    many = [trained_to(name, s, [3.0, 2.5 - s, 3.5], [2.0, 0.5], lr=1e-2) for name in ("full", "b") for s in (0, 1)]
    few, many = together(*few), together(*many)
    found = call(together(many.assign(n_train=64), few.assign(n_train=16)))
    assert found.setup.drop_duplicates().tolist() in (["full", "b", "a"], ["b", "a"])
    for size, alone in ((16, few), (64, many)):
        own = found[found.n_train == size].drop(columns="n_train").reset_index(drop=True)
        pandas.testing.assert_frame_equal(own, call(alone), check_like=True)


def refusals():
    """What is called, and the value or the argument that must be named."""
    whole = together(curve("full", 1e-3, 0, **OVERFITS), curve("LoRA", 1e-2, 0, **OVERFITS))
    shared = [losses(("LoRA", 1e-4, 0, 1.0), ("LoRA", 1e-3, 1, 1.0)), failed("full", 1e-3, 0)]
    lora = [rising("LoRA", 1e-3, [0.25]), rising("LoRA", 1e-3, [0.25, 0.5])]
    full, equal = ([trained_to(setup, s, [3.0, 2.0, 2.5], [2.0, 1.0]) for s in (0, 1)] for setup in ("full", "LoRA"))
    other_rate = trained_to("LoRA", 0, [3.0, 2.0, 2.5], [2.0, 1.0], lr=1e-2)
    return [
        (lambda: summarise_trials(whole.query("step > 0 or setup == 'full'")), "'setup': 'LoRA'"),
        (lambda: summarise_trials(together(whole, whole.iloc[2:3])), "'setup': 'full'"),
        (lambda: best_rates(whole, -0.1), "slack is -0.1"),
        (lambda: best_rates(whole, math.nan), "slack is nan"),
        (lambda: best_rates(shared[0]), "'LoRA'.* no seed in common"),
        (lambda: best_rates(shared[1]), "no trial that ended well"),
        (lambda: at_equal_learning(whole, summarise_trials(whole), 1.01), "share is 1.01"),
        (lambda: interpolate_at([0.0, 1.0], [0.0, 2.0], 1.5), "never learned that much"),
        (lambda: compare_by_seed(summarise_trials(whole), "overfit", "dora"), "'dora'"),
        (lambda: compare_over_rates(whole, "overfit", "dora"), "'dora'"),
        (lambda: compare_over_rates(together(GENTLE, lora[0]), "overfit"), "two seeds in common"),
        (lambda: compare_over_rates(together(GENTLE, lora[1].assign(seed=7)), "overfit"), "one row for each step"),
        (lambda: by_stopping_point(STOPS[STOPS.seed == 0]), "two seeds in common with 'full'"),
        (
            lambda: by_stopping_point(together(STOPS, curve("LoRA", 0.1, 0, [3.0] * 4, n_train=16))),
            "'LoRA' has several rows",
        ),
        (lambda: by_training_loss(together(*full, *equal), [0.5]), "two seeds in common with 'full'"),
        (lambda: by_training_loss(together(*full, equal[0]), [1.0]), "two seeds in common with 'full'"),
        (lambda: by_training_loss(together(*full, *equal, other_rate), [1.0]), "has several rows"),
    ]


def test_what_cannot_be_compared_is_named():
    for call, named in refusals():
        with pytest.raises(ValueError, match=named):
            call()
