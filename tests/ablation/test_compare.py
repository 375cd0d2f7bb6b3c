"""Rates that are chosen, setups that are compared, and verdicts: planted answers, scipy and loops as oracles."""

import json
from functools import partial

import numpy as np
import pandas
import pytest
import scipy.stats
import torch
from scipy import stats
from torch import nn

from lora_lab import FullFineTuning, LoRA, fit
from lora_lab.ablation import Trial
from lora_lab.ablation.compare import (
    choose_rates,
    compare_losses,
    compare_tuned,
    judge,
    last_rows,
    smallest_sufficient_rank,
)
from lora_lab.ablation.grid import Grid
from lora_lab.ablation.run import ablate
from lora_lab.ablation.stats import (
    BlockLosses,
    block_losses_of,
    interval,
    outer_bounds,
    resampled_means,
    t_bounds,
)
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import digits, planted
from lora_lab.train import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


BOUNDS = {  # beside a margin of 0.1
    "higher": [(0.2, 0.3)],
    "lower": [(-0.3, -0.2)],
    "equal": [(-0.1, 0.1)],
    "open": [(-0.1, 0.2), (-0.2, 0.1), (0.1, 0.2), (np.nan, np.nan)],
}


@pytest.mark.parametrize("verdict", BOUNDS)
def test_a_verdict_is_where_the_bounds_lie_beside_the_margin(verdict):
    for bounds in BOUNDS[verdict]:
        assert judge(*bounds, margin=0.1) == verdict


# Which rank is enough

RANKS = (1, 2, 4, 8, 16)
PLANTED = {1: 0.25, 2: 0.06, 4: 0.0, 8: 0.0, 16: 0.0}  # what a rank loses for want of size, in nats
FULL = {1: 0.5, 2: 0.35, 4: 0.2, 8: 0.08, 16: 0.0}
SHARED, OWN = 0.05, 0.004  # noise of a seed (order of data), common to all ranks; noise of a trial


def frame_of(excess, seeds=5, draw=0, shared=SHARED, own=OWN, lrs=(0.003, 0.01, 0.03), **columns):
    """What ``ablate`` would return, with losses that are made up: the middle rate is the best one."""
    generator = np.random.default_rng(draw)
    of_seed = generator.normal(0, shared, seeds)
    rows = []
    for rank, extra in excess.items():
        for lr in lrs:
            detour = 0.1 * abs(np.log(lr / 0.01))
            for seed in range(seeds):
                validation, test = 0.5 + extra + detour + of_seed[seed] + generator.normal(0, own, 2)
                trial = {"method": "lora", "rank": float(rank), "alpha": 2.0 * rank, "lr": lr, "seed": seed}
                trial |= {"key": f"{rank} {lr} {seed}", "steps": 20, "outcome": "done", "reason": None}
                for step in (0, 10, 20):
                    left = 20 - step
                    losses = {"validation_loss": validation + left, "test_loss": test if step == 20 else np.nan}
                    rows.append({**trial, "step": float(step), **losses, "device": f"machine {seed}", **columns})
    return pandas.DataFrame(rows)


def fail(frame, rank, lr, seed):
    """The frame with one trial failed: one row in place of three."""
    chosen = (frame["rank"] == rank) & (frame["lr"] == lr) & (frame["seed"] == seed)
    row = frame[chosen].iloc[:1].assign(outcome="failed", reason="it diverged", step=np.nan, validation_loss=np.nan)
    return pandas.concat([frame[~chosen], row], ignore_index=True)


def without(frame, rank, lr, seed):
    return frame[~((frame["rank"] == rank) & (frame["lr"] == lr) & (frame["seed"] == seed))]


def statuses_of(verdict):
    return {one.rank: one.status for one in verdict.ranks}


# The answer


def test_a_reference_that_was_trained_badly_is_noted():
    broken = smallest_sufficient_rank(frame_of(PLANTED | {16: 0.2}))
    assert "rank 2, 4, 8: better than the largest by more than the margin" in str(broken)
    assert "not a fair reference" in str(broken)
    assert "not a fair reference" not in str(smallest_sufficient_rank(frame_of(PLANTED)))


def test_a_planted_rank_is_found():
    answers = [smallest_sufficient_rank(frame_of(PLANTED, draw=draw)).rank for draw in range(60)]
    assert sum(answer == 4 for answer in answers) >= 54
    for first in range(0, 60, 10):
        assert sum(answer == 4 for answer in answers[first : first + 10]) >= 9


def test_a_planted_full_rank_never_yields_a_small_one():
    answers = {
        smallest_sufficient_rank(frame_of(FULL, draw=draw, own=own)).rank
        for draw in range(20)
        for own in (OWN, 0.03, 0.1)
    }
    assert answers <= {16, None}
    assert 16 in answers


def test_five_seeds_are_enough_when_trials_are_paired_and_twenty_are_not_when_the_pairing_is_lost():
    assert smallest_sufficient_rank(frame_of(PLANTED, seeds=5)).rank == 4
    lost = frame_of(PLANTED, seeds=20)
    generator = np.random.default_rng(0)
    for rank in RANKS[:-1]:  # each rank's seeds under other names: the same losses, in another order
        names = generator.permutation(20)
        own = lost["rank"] == rank
        lost.loc[own, "seed"] = names[lost.loc[own, "seed"]]
    assert smallest_sufficient_rank(lost).rank is None
    assert statuses_of(smallest_sufficient_rank(lost))[4] == "open"


def test_one_seed_is_always_undecided():
    for draw in range(5):
        verdict = smallest_sufficient_rank(frame_of(PLANTED, seeds=1, draw=draw, shared=0, own=0))
        assert verdict.rank is None
        assert verdict.answer == "undecided"
        assert "more seeds needed: one seed" in verdict.reason
        assert set(statuses_of(verdict).values()) == {"open", "reference"}
    assert smallest_sufficient_rank(frame_of(PLANTED, seeds=2, shared=0, own=0)).rank == 4


@pytest.mark.parametrize(
    ("frame", "rank", "statuses", "reason"),
    [
        (frame_of(PLANTED, own=0.05), None, {1: "too small"}, "no smaller rank is shown to be enough, and rank 2"),
        (
            frame_of({1: 0.25, 2: 0.011, 4: 0.0, 16: 0.0}, own=0.003, seeds=4),
            4,
            {1: "too small", 2: "open", 4: "enough", 16: "reference"},
            "its loss is less than 0.01 above that of rank 16",
        ),
        (frame_of(FULL), 16, {8: "too small", 16: "reference"}, "a larger one may be better still"),
    ],
)
def test_the_answer_says_what_is_open(frame, rank, statuses, reason):
    verdict = smallest_sufficient_rank(frame)
    assert verdict.rank == rank
    assert statuses.items() <= statuses_of(verdict).items()
    assert reason in verdict.reason


def test_the_margin_is_the_callers():
    frame = frame_of(PLANTED, own=0.001)
    assert [smallest_sufficient_rank(frame, margin).rank for margin in (0.01, 0.1, 0.4)] == [4, 2, 1]


# The numbers


def test_bounds_are_those_of_scipys_one_sided_test():
    for n in (2, 3, 5, 30):
        values = np.random.default_rng(n).normal(0.3, 2.0, n)
        mean, lower, upper = t_bounds(list(values))
        below = stats.ttest_1samp(values, 0, alternative="less").confidence_interval(0.95)
        above = stats.ttest_1samp(values, 0, alternative="greater").confidence_interval(0.95)
        assert (mean, lower, upper) == pytest.approx((values.mean(), above.low, below.high), rel=1e-12)
        assert lower < mean < upper
    assert t_bounds([0.3]) == pytest.approx((0.3, np.nan, np.nan), nan_ok=True)


def test_the_upper_bound_holds_in_95_of_100_cases_with_three_seeds_and_a_percentile_bootstrap_does_not():
    generator = np.random.default_rng(0)
    draws = generator.normal(0.0, 1.0, (2000, 3))
    held = np.mean([t_bounds(list(draw))[2] >= 0 for draw in draws])
    assert 0.935 < held < 0.965
    resampled = draws[:, generator.integers(0, 3, (500, 3))].mean(axis=2)
    assert np.mean(np.quantile(resampled, 0.95, axis=1) >= 0) < 0.9


def test_the_table_holds_the_paired_differences_at_the_chosen_rates():
    frame = frame_of(PLANTED, seeds=4, draw=3).sample(frac=1, random_state=0)  # in any order of rows
    last = frame[(frame.step == 20) & (frame.lr == 0.01)].set_index(["rank", "seed"]).sort_index()
    verdict = smallest_sufficient_rank(frame)
    assert verdict.seeds == (0, 1, 2, 3)
    assert [one.rank for one in verdict.ranks] == list(RANKS)
    for one in verdict.ranks:
        own = last.loc[one.rank]
        assert one.lr == 0.01
        assert one.validation_loss == pytest.approx(own.validation_loss.mean(), rel=1e-12)
        assert one.test_loss == pytest.approx(own.test_loss.mean(), rel=1e-12)
        if one.rank < 16:
            pairs = stats.ttest_rel(own.test_loss, last.loc[16].test_loss, alternative="less")
            assert one.difference == pytest.approx((own.test_loss - last.loc[16].test_loss).mean(), rel=1e-9)
            assert one.upper == pytest.approx(pairs.confidence_interval(0.95).high, rel=1e-9)
        else:
            assert (one.difference, one.lower, one.upper) == (None, None, None)


def test_the_rate_is_chosen_on_validation_and_the_rank_judged_on_test():
    frame = frame_of(PLANTED, own=0.0)
    # At another rate rank 1 has the best test loss of all: a choice by test loss would fall for it.
    frame.loc[(frame["rank"] == 1) & (frame.lr == 0.03) & (frame.step == 20), "test_loss"] = 0.0
    verdict = smallest_sufficient_rank(frame)
    assert verdict.ranks[0].lr == 0.01
    assert verdict.rank == 4
    # And the other way round: at the chosen rate only the test loss counts.
    frame.loc[(frame["rank"] == 4) & (frame.lr == 0.01) & (frame.step == 20), "test_loss"] += 0.3
    assert statuses_of(smallest_sufficient_rank(frame))[4] == "too small"
    assert smallest_sufficient_rank(frame).rank == 8


# Failed and missing trials


def without_loss(frame, rank, lr, seed, name="test_loss"):
    lost = (frame["rank"] == rank) & (frame["lr"] == lr) & (frame["seed"] == seed)
    return frame.assign(**{name: frame[name].mask(lost)})


@pytest.mark.parametrize("spoil", [fail, without, without_loss, partial(without_loss, name="validation_loss")])
def test_a_rate_that_lacks_a_seed_does_not_count_and_another_takes_its_place(spoil):
    frame = frame_of(PLANTED, own=0.001)
    frame.loc[(frame["rank"] == 1) & (frame.lr == 0.01), "test_loss"] -= 9  # so good that it would win
    verdict = smallest_sufficient_rank(spoil(frame, 1, 0.01, 2))
    assert verdict.ranks[0].lr in (0.003, 0.03)
    assert verdict.ranks[0].status == "too small"
    assert verdict.rank == 4
    assert "rank 1: lr 0.01 does not count (no result for seed 2)." in verdict.notes


@pytest.mark.parametrize("spoil", [fail, without])
def test_a_rank_with_gaps_at_every_rate_cannot_win(spoil):
    frame = frame_of(PLANTED, own=0.001)
    for lr, seed in ((0.003, 0), (0.01, 1), (0.03, 4)):
        frame = spoil(frame, 4, lr, seed)
    verdict = smallest_sufficient_rank(frame)
    assert statuses_of(verdict)[4] == "not judged"
    assert verdict.rank == 8
    told = "no learning rate has a result for every seed: lr 0.003 does not count (no result for seed 0), lr 0.01"
    assert told in verdict.ranks[2].note
    assert told in str(verdict)


def test_without_the_largest_rank_there_is_nothing_to_compare_with():
    frame = frame_of(PLANTED)
    for lr in (0.003, 0.01, 0.03):
        frame = fail(frame, 16, lr, 3)
    verdict = smallest_sufficient_rank(frame)
    assert verdict.rank is None
    assert verdict.reason == "the largest rank, 16, has no learning rate with a result for every seed: run those first."
    assert set(statuses_of(verdict).values()) == {"not judged"}
    assert verdict.ranks[2].note == "the largest rank has no result to compare it with"


def test_a_failed_seed_is_not_forgotten_where_it_failed_for_all():
    frame = frame_of(PLANTED)
    for rank in RANKS:
        for lr in (0.003, 0.01, 0.03):
            frame = fail(frame, rank, lr, 4)
    assert smallest_sufficient_rank(frame).rank is None  # four good seeds, but the fifth was asked for


# Notes and text


@pytest.mark.parametrize(
    ("lrs", "note"),
    [
        ((0.01, 0.03), "ranks 1, 2, 4, 8 and 16 is the smallest tried"),
        ((0.003, 0.01), "ranks 1, 2, 4, 8 and 16 is the largest tried"),
        ((0.01,), "ranks 1, 2, 4, 8 and 16 is the only one tried"),
    ],
)
def test_notes_tell_of_rates_at_the_edge_and_untuned_ones(lrs, note):
    (found,) = smallest_sufficient_rank(frame_of(PLANTED, lrs=lrs)).notes
    assert note in found
    assert smallest_sufficient_rank(frame_of(PLANTED)).notes == ()


def test_trials_without_a_rank_are_left_out():
    plain, full = frame_of(PLANTED), frame_of({1: 0.0}).assign(method="full", rank=np.nan)
    assert smallest_sufficient_rank(pandas.concat([plain, full])) == smallest_sufficient_rank(plain)


# Live: W0 + an update of rank 4 is taught to W0


def linear():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 16))


@pytest.mark.slow
@pytest.mark.parametrize(("planted_rank", "answer"), [(4, 4), (16, 16)])
def test_a_linear_teachers_rank_is_found_live(planted_rank, answer):
    task = planted(linear(), rank=planted_rank)
    grid = Grid(RANKS, [0.03, 0.1], range(3), steps=150, batch_size=32, alpha_per_rank=1, eval_every=150)
    frame = ablate(linear, task, grid, engine="separate")
    verdict = smallest_sufficient_rank(frame)
    assert verdict.rank == answer, str(verdict)
    assert statuses_of(verdict)[1] == statuses_of(verdict)[2] == "too small"
    # The numbers are those of fit: one trial once more, by hand.
    model = linear()
    fit(model, task, LoRA(rank=4, alpha=4), steps=150, lr=0.03, batch_size=32, seed=1)
    own = frame[(frame["rank"] == 4) & (frame.lr == 0.03) & (frame.seed == 1)]
    assert own["test_loss"].dropna().tolist() == [evaluate(model, task, "test", batch_size=32)]
    assert smallest_sufficient_rank(frame[frame.seed == 1]).rank is None


# Setups in pairs


def judged(losses, edges=(), outcome="done"):
    """Rows as compare_tuned yields them: setup -> losses (seeds, blocks)."""
    rows = [
        {"setup": setup, "seed": seed, "score_test": json.dumps(list(blocks)), "edge": "largest" * (setup in edges)}
        for setup, by_seed in losses.items()
        for seed, blocks in enumerate(by_seed)
    ]
    return pandas.DataFrame(rows).assign(stage="judging", lr=1e-3, outcome=outcome, step=4, steps=4)


def planted_losses(shift, noise, seeds=4, blocks=20, draw=0):
    random = np.random.default_rng(draw)
    hard = random.normal(size=(1, blocks))  # examples differ in difficulty, for all setups alike
    return {
        setup: 2 + more + hard + noise * random.normal(size=(seeds, blocks))
        for setup, more in {"full": 0.0, "LoRA": shift}.items()
    }


def of_lora(losses, margin=0.0, **options):
    return compare_losses(judged(losses, **options), "full", margin=margin).set_index("setup").loc["LoRA"]


def test_a_planted_difference_is_found_though_examples_differ_far_more():
    row = of_lora(planted_losses(0.1, 0.05))
    assert row["difference"] == pytest.approx(0.1, abs=0.02)
    assert 0 < row["lower"] < row["difference"] < row["upper"] < 0.15
    assert row["verdict"] == "higher"
    assert of_lora(planted_losses(-0.1, 0.05))["verdict"] == "lower"
    assert of_lora(planted_losses(0.0, 0.05))["verdict"] == "open"


def test_the_margin_decides_what_is_equal():
    assert of_lora(planted_losses(0.01, 0.02), margin=0.05)["verdict"] == "equal"
    assert of_lora(planted_losses(0.01, 0.02), margin=0.001)["verdict"] != "equal"
    assert of_lora(planted_losses(0.05, 0.1), margin=0.05)["verdict"] == "open"


def test_the_interval_is_that_of_paired_draws():
    losses = planted_losses(0.1, 0.3)
    random, means = np.random.default_rng(5), []
    for _ in range(4000):
        drawn = np.ix_(random.integers(4, size=4), random.integers(20, size=20))
        means.append((losses["LoRA"][drawn] - losses["full"][drawn]).mean())
    row = of_lora(losses)
    width = row["upper"] - row["lower"]
    of_seeds = (losses["LoRA"] - losses["full"]).mean(axis=1)
    by_t = scipy.stats.t.interval(0.95, 3, of_seeds.mean(), scipy.stats.sem(of_seeds))
    lower, upper = min(np.quantile(means, 0.025), by_t[0]), max(np.quantile(means, 0.975), by_t[1])
    assert row["lower"] == pytest.approx(lower, abs=0.06 * width)
    assert row["upper"] == pytest.approx(upper, abs=0.06 * width)
    unpaired = losses["LoRA"].std() / np.sqrt(20)
    assert width < 2 * 1.96 * unpaired  # without pairs it would be wider


def test_each_bound_is_the_outer_one_of_two():
    by_seed = np.array([[0.0], [0.1], [0.2]]) + np.zeros((3, 5))  # seeds differ, examples do not
    _, lower, upper = t_bounds([0.0, 0.1, 0.2])
    assert outer_bounds(by_seed) == pytest.approx((lower, upper))
    by_block = by_seed.T + np.zeros((5, 3))  # examples differ, so that Student's t over the seeds sees nothing
    low, high = outer_bounds(by_block)
    assert low < 0.05 < 0.15 < high
    assert outer_bounds(by_block, 0.6)[1] < high
    assert outer_bounds(by_seed, 0.975)[1] > upper  # 97.5 % on either side
    assert np.isnan(outer_bounds(by_seed[:1])).all()


def test_a_difference_of_zero_is_rarely_called_one_though_seeds_are_few():
    """With noise of whole trials a bootstrap over three seeds alone calls a quarter of them a difference."""
    random, wrong, by_bootstrap = np.random.default_rng(3), 0, 0
    for _ in range(100):
        full, lora = (random.normal(2, 0.01, (3, 1)) + np.zeros((3, 5)) for _ in range(2))
        wrong += of_lora({"full": full, "LoRA": lora})["verdict"] in ("lower", "higher")
        lower, upper = interval(resampled_means(lora - full))
        by_bootstrap += not lower <= 0 <= upper
    assert wrong <= 12
    assert by_bootstrap > 15


def test_one_seed_decides_nothing():
    row = of_lora({"full": np.full((1, 1), 2.0), "LoRA": np.full((1, 1), 2.001)})
    assert row["verdict"] == "open"
    assert np.isnan(row["lower"])


def test_no_verdict_rests_on_a_rate_at_the_edge_of_its_grid():
    assert of_lora(planted_losses(0.1, 0.05), edges=["LoRA"])["why"] == "edge"
    assert of_lora(planted_losses(0.1, 0.05), edges=["full"])["why"] == "edge"


def test_a_setup_of_which_a_seed_failed_has_no_verdict():
    frame = judged(planted_losses(0.1, 0.05))
    unchosen = frame[frame["setup"] == "LoRA"].assign(stage="choosing", setup="rsLoRA", outcome="failed")
    frame.loc[frame.index[-1], "outcome"] = "failed"
    table = compare_losses(pandas.concat([unchosen, frame]), "full").set_index("setup")
    assert table.loc["rsLoRA", "why"] == "failed"  # no rate could be chosen
    assert np.isnan(table.loc["rsLoRA", "lr"])
    assert table.loc["LoRA", "why"] == "failed"
    assert np.isnan(table.loc["LoRA", "difference"])
    assert table.loc["full", "why"] == "reference"


# Studies


def template(method):
    return Trial(method, 1e-3, steps=8, batch_size=16, eval_every=8, eval_examples=8)


def study(folder, **changes):
    options = {
        "setups": {"full": template(FullFineTuning()), "r=2": template(LoRA(2, 4))},
        "lrs": {"full": (1e-3, 3e-3), "r=2": (1e-2, 3e-2)},
        "choosing": [0, 1],
        "judging": [2, 3, 4],
        "chosen_on": 40,
        "judged_on": {"validation": 16, "test": 24},
        "widen": 3,
    }
    return compare_tuned(DigitsMLP(), digits(), folder=folder, progress=False, **options | changes)


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    parts = study(tmp_path_factory.mktemp("study"))
    return pandas.concat(parts, ignore_index=True)


def test_rates_are_chosen_on_some_seeds_and_judged_on_others(frame):
    assert set(frame.loc[frame["stage"] == "choosing", "seed"]) == {0, 1}
    judging = last_rows(frame[frame["stage"] == "judging"])
    assert set(judging["seed"]) == {2, 3, 4}
    for setup, rows in judging.groupby("setup"):
        chosen = frame[(frame["stage"] == "choosing") & (frame["setup"] == setup)]
        choice = choose_rates(chosen, [0, 1])[setup]
        assert set(rows["lr"]) == {choice.lr}
        assert set(rows["edge"]) == {choice.edge}
        tried = sorted(chosen["lr"].unique())
        assert choice.edge == {tried[0]: "smallest", tried[-1]: "largest"}.get(choice.lr, "")


def test_each_stage_is_judged_on_its_own_examples(frame):
    chosen = last_rows(frame[frame["stage"] == "choosing"]).iloc[0]
    judging = last_rows(frame[frame["stage"] == "judging"]).iloc[0]
    assert len(block_losses_of(chosen, "validation")) == 10  # blocks of 4
    assert [len(block_losses_of(judging, part)) for part in ("validation", "test")] == [4, 6]
    assert len(compare_losses(frame, "full")) == 2


def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch):
    list(study(tmp_path))
    monkeypatch.setattr(BlockLosses, "__call__", None)
    again = list(study(tmp_path))
    assert len(again) == 2
    monkeypatch.undo()
    (only,) = study(tmp_path, judging=())
    assert set(only["stage"]) == {"choosing"}


def test_trials_that_were_judged_otherwise_are_not_taken_for_these(tmp_path):
    counts = []
    for changes in ({}, {"chosen_on": 20}, {"block": 8}, {"judged_on": {"validation": 16, "test": 12}}):
        frames = [last_rows(each) for each in study(tmp_path, **changes)]
        counts.append(
            [
                len(block_losses_of(rows.iloc[0], part))
                for rows, part in zip(frames, ("validation", "test"), strict=True)
            ]
        )
    assert counts == [[10, 6], [5, 6], [5, 3], [10, 3]]


def test_a_setup_with_a_single_rate_is_judged_at_it_and_supports_a_verdict(tmp_path):
    chosen, judged = study(tmp_path / "one", lrs={"full": (1e-3, 3e-3), "r=2": (1e-2,)})
    assert set(chosen["setup"]) == {"full"}
    rows = judged[judged["setup"] == "r=2"]
    assert (set(rows["lr"]), set(rows["edge"])) == ({1e-2}, {""})
    (only,) = study(tmp_path / "both", lrs={"full": (1e-3,), "r=2": (1e-2,)})
    assert set(compare_losses(only, "full")["verdict"]) <= {"lower", "higher", "open"}


# What is refused


@pytest.mark.parametrize("column", ["steps", "task", "model", "dropout", "targets", "alpha"])
def test_a_mixture_of_settings_is_refused(column):
    one, other = (frame_of(PLANTED, draw=draw, **{column: value}) for draw, value in ((0, 1), (1, 2)))
    if column == "steps":
        one, other = (frame.assign(step=frame.step * frame.steps / 20) for frame in (one, other))
    smallest_sufficient_rank(other)
    other["seed"] += 5
    with pytest.raises(ValueError, match=f"mixes {column} 1 and 2.*, which cannot be compared; select one"):
        smallest_sufficient_rank(pandas.concat([one, other]))


SMALL = frame_of(PLANTED, seeds=2)
METHODS = pandas.concat([SMALL, SMALL.assign(method="dora")])
REFUSED = [  # the call, and what must be named
    *((lambda margin=margin: smallest_sufficient_rank(SMALL, margin), "margin is") for margin in (0, np.nan, np.inf)),
    (lambda: smallest_sufficient_rank(METHODS), "mixes method 'lora' and 'dora'"),
    (lambda: smallest_sufficient_rank(pandas.concat([SMALL, SMALL])), r"'rank': 1.0, 'lr': 0.003, 'seed': 0.* twice"),
    (lambda: smallest_sufficient_rank(frame_of({4: 0.0})), "has the ranks"),
    (lambda: compare_losses(judged({"full": [[1.0]]}), "LoRA"), "'LoRA' has no results for all seeds"),
    (lambda: next(study(None, judging=[1, 2])), r"The seeds \[1\] both choose and judge"),
]


@pytest.mark.parametrize(("call", "named"), REFUSED)
def test_what_cannot_be_judged_is_refused_and_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
