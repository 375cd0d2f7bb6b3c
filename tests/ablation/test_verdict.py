"""The verdict on ranks: synthetic losses with a planted answer, scipy as the oracle, and one live run."""

from dataclasses import FrozenInstanceError

import numpy as np
import pandas
import pytest
import torch
from scipy import stats
from torch import nn

from lora_lab import LoRA, fit
from lora_lab.ablation.compare import Choice, RankResult, Verdict, smallest_sufficient_rank
from lora_lab.ablation.grid import Grid
from lora_lab.ablation.learning_rate import _listed
from lora_lab.ablation.run import ablate
from lora_lab.ablation.stats import t_bounds
from lora_lab.tasks import planted
from lora_lab.train import evaluate

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


def statuses(verdict):
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
    assert statuses(smallest_sufficient_rank(lost))[4] == "open"


def test_one_seed_is_always_undecided():
    for draw in range(5):
        verdict = smallest_sufficient_rank(frame_of(PLANTED, seeds=1, draw=draw, shared=0, own=0))
        assert verdict.rank is None
        assert not verdict.decided
        assert "more seeds needed: one seed" in verdict.reason
        assert set(statuses(verdict).values()) == {"open", "reference"}
    assert smallest_sufficient_rank(frame_of(PLANTED, seeds=2, shared=0, own=0)).rank == 4


def test_one_seed_still_tells_the_difference():
    ranks = smallest_sufficient_rank(frame_of(PLANTED, seeds=1, shared=0, own=0)).ranks
    assert [one.difference for one in ranks[:-1]] == pytest.approx([0.25, 0.06, 0, 0], abs=1e-12)
    assert ranks[-1].difference is None
    assert {(one.lower, one.upper) for one in ranks} == {(None, None)}


def test_two_ranks_are_enough_to_compare():
    assert smallest_sufficient_rank(frame_of({4: 0.0, 16: 0.0})).rank == 4


def test_much_noise_is_undecided_and_says_so():
    verdict = smallest_sufficient_rank(frame_of(PLANTED, own=0.05))
    assert verdict.rank is None
    assert "more seeds needed: no smaller rank is shown to be enough, and rank" in verdict.reason
    assert statuses(verdict)[1] == "too small"


def test_a_smaller_rank_that_is_still_open_is_named():
    frame = frame_of({1: 0.25, 2: 0.011, 4: 0.0, 16: 0.0}, own=0.003, seeds=4)
    verdict = smallest_sufficient_rank(frame)
    assert statuses(verdict) == {1: "too small", 2: "open", 4: "enough", 16: "reference"}
    assert verdict.rank == 4
    assert verdict.reason.endswith("above that of rank 16; rank 2 is not settled by these seeds.")


def test_the_margin_is_the_callers():
    frame = frame_of(PLANTED, own=0.001)
    assert [smallest_sufficient_rank(frame, margin).rank for margin in (0.01, 0.1, 0.4)] == [4, 2, 1]
    for margin in (0, -0.01, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"margin is .*, but it must be (greater than 0|a finite number)"):
            smallest_sufficient_rank(frame, margin)


def test_when_all_ranks_lose_the_largest_is_the_answer():
    verdict = smallest_sufficient_rank(frame_of(FULL))
    assert verdict.rank == 16
    assert verdict.reason == "every smaller rank loses more than 0.01 against it; a larger one may be better still."


def test_a_verdict_cannot_be_changed():
    verdict = smallest_sufficient_rank(frame_of(PLANTED))
    for record, name in ((verdict, "rank"), (verdict.ranks[0], "status"), (Choice(None, None, verdict), "lr")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, 1)
    assert verdict.rank == 4


# The numbers


def test_bounds_are_those_of_scipys_one_sided_test():
    for n in (2, 3, 5, 30):
        values = np.random.default_rng(n).normal(0.3, 2.0, n)
        mean, lower, upper = t_bounds(list(values))
        below = stats.ttest_1samp(values, 0, alternative="less").confidence_interval(0.95)
        above = stats.ttest_1samp(values, 0, alternative="greater").confidence_interval(0.95)
        assert (mean, lower, upper) == pytest.approx((values.mean(), above.low, below.high), rel=1e-12)
        assert lower < mean < upper
    assert t_bounds([0.3]) == (0.3, None, None)


def test_the_upper_bound_holds_in_95_of_100_cases_with_three_seeds_and_a_percentile_bootstrap_does_not():
    generator = np.random.default_rng(0)
    draws = generator.normal(0.0, 1.0, (2000, 3))
    held = np.mean([t_bounds(list(draw))[2] >= 0 for draw in draws])
    assert 0.935 < held < 0.965
    resampled = draws[:, generator.integers(0, 3, (500, 3))].mean(axis=2)
    assert np.mean(np.quantile(resampled, 0.95, axis=1) >= 0) < 0.9


def test_the_table_holds_the_paired_differences_at_the_chosen_rates():
    frame = frame_of(PLANTED, seeds=4, draw=3)
    last = frame[(frame.step == 20) & (frame.lr == 0.01)].set_index(["rank", "seed"])
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
    assert statuses(smallest_sufficient_rank(frame))[4] == "too small"
    assert smallest_sufficient_rank(frame).rank == 8


def test_of_rates_that_tie_the_smaller_is_taken():
    frame = frame_of(PLANTED, own=0.0, lrs=(0.01, 0.02))
    frame.loc[:, "validation_loss"] = 1.0
    assert {one.lr for one in smallest_sufficient_rank(frame).ranks} == {0.01}
    assert {one.lr for one in smallest_sufficient_rank(frame.iloc[::-1]).ranks} == {0.01}


def test_the_order_of_the_rows_does_not_matter():
    frame = frame_of(PLANTED)
    assert smallest_sufficient_rank(frame.sample(frac=1, random_state=0)) == smallest_sufficient_rank(frame)


# Failed and missing trials


def test_a_rate_with_a_failed_seed_does_not_count_and_another_takes_its_place():
    frame = fail(frame_of(PLANTED, own=0.001), 1, 0.01, 2)
    frame.loc[(frame["rank"] == 1) & (frame.lr == 0.01), "test_loss"] -= 9  # so good that it would win
    verdict = smallest_sufficient_rank(frame)
    assert verdict.ranks[0].lr in (0.003, 0.03)
    assert verdict.ranks[0].status == "too small"
    assert verdict.rank == 4
    assert "rank 1: lr 0.01 does not count (seed 2 failed)." in verdict.notes


@pytest.mark.parametrize("lost", ["test_loss", "validation_loss"])
def test_a_trial_that_is_done_but_lacks_a_loss_does_not_count(lost):
    frame = frame_of(PLANTED, own=0.001)
    frame.loc[(frame["rank"] == 2) & (frame.lr == 0.01) & (frame.seed == 1), lost] = np.nan
    verdict = smallest_sufficient_rank(frame)
    assert verdict.ranks[1].lr in (0.003, 0.03)
    assert "rank 2: lr 0.01 does not count (seed 1 failed)." in verdict.notes


@pytest.mark.parametrize(("spoil", "word"), [(fail, "failed"), (without, "missing")])
def test_a_rank_with_gaps_at_every_rate_cannot_win(spoil, word):
    frame = frame_of(PLANTED, own=0.001)
    for lr, seed in ((0.003, 0), (0.01, 1), (0.03, 4)):
        frame = spoil(frame, 4, lr, seed)
    verdict = smallest_sufficient_rank(frame)
    assert statuses(verdict)[4] == "not judged"
    assert verdict.rank == 8
    assert verdict.reason.endswith("rank 4 is not settled by these seeds.")
    told = f"no learning rate has a result for every seed: lr 0.003 does not count (seed 0 {word}), lr 0.01"
    assert told in verdict.ranks[2].note
    assert told in str(verdict)


def test_without_the_largest_rank_there_is_nothing_to_compare_with():
    frame = frame_of(PLANTED)
    for lr in (0.003, 0.01, 0.03):
        frame = fail(frame, 16, lr, 3)
    verdict = smallest_sufficient_rank(frame)
    assert verdict.rank is None
    assert verdict.reason == "the largest rank, 16, has no learning rate with a result for every seed: run those first."
    assert set(statuses(verdict).values()) == {"not judged"}
    assert verdict.ranks[2].note == "the largest rank has no result to compare it with"


def test_if_only_a_failed_rank_is_below_the_largest_it_is_undecided():
    frame = frame_of({1: 0.3, 4: 0.0, 16: 0.0})
    for lr in (0.003, 0.01, 0.03):
        frame = fail(frame, 4, lr, 0)
    verdict = smallest_sufficient_rank(frame)
    assert verdict.rank is None
    assert "rank 4 may be" in verdict.reason


def test_a_failed_seed_is_not_forgotten_where_it_failed_for_all():
    frame = frame_of(PLANTED)
    for rank in RANKS:
        for lr in (0.003, 0.01, 0.03):
            frame = fail(frame, rank, lr, 4)
    assert smallest_sufficient_rank(frame).rank is None  # four good seeds, but the fifth was asked for


# Notes and text


def test_notes_tell_of_rates_at_the_edge_and_untuned_ones():
    assert smallest_sufficient_rank(frame_of(PLANTED)).notes == ()
    edge = smallest_sufficient_rank(frame_of(PLANTED, lrs=(0.01, 0.03)))
    assert edge.notes == (
        "the best learning rate of ranks 1, 2, 4, 8 and 16 is the smallest tried, so a better one may lie beyond.",
    )
    assert "is the largest tried" in smallest_sufficient_rank(frame_of(PLANTED, lrs=(0.003, 0.01))).notes[0]
    assert (
        "only one learning rate was tried for ranks 1, 2"
        in smallest_sufficient_rank(frame_of(PLANTED, lrs=(0.01,))).notes[0]
    )


def test_it_prints_as_a_table():
    ranks = (
        RankResult(1, "too small", 0.03, 0.6, 0.61234, 0.1, 0.08, 0.12),
        RankResult(4, "not judged", note="all failed"),
        RankResult(16, "reference", 0.01, 0.5, 0.51234),
    )
    verdict = Verdict(None, "more seeds needed.", "lora", 0.01, (0, 1), ranks, ("a note.",))
    assert str(verdict).splitlines() == [
        "lora: undecided: more seeds needed.",
        "2 seeds, margin 0.01; losses on the test part; differences from the largest rank, with one-sided 95% bounds",
        "  rank      rate      loss  difference     lower     upper  status",
        "     1      0.03    0.6123     +0.1000   +0.0800   +0.1200  too small",
        "     4         -         -           -         -         -  not judged: all failed",
        "    16      0.01    0.5123           -         -         -  reference",
        "Note: a note.",
    ]
    assert str(smallest_sufficient_rank(frame_of(PLANTED))).startswith(
        "lora: rank 4: with 95% confidence its loss is less than 0.01"
    )


# Frames that cannot be judged


@pytest.mark.parametrize("column", ["steps", "task", "model", "dropout", "targets", "alpha"])
def test_a_mixture_of_settings_is_refused(column):
    one, other = (frame_of(PLANTED, draw=draw, **{column: value}) for draw, value in ((0, 1), (1, 2)))
    if column == "steps":
        one, other = (frame.assign(step=frame.step * frame.steps / 20) for frame in (one, other))
    smallest_sufficient_rank(other)
    other["seed"] += 5
    with pytest.raises(ValueError, match=f"mixes {column} 1 and 2.*, which cannot be compared; select one"):
        smallest_sufficient_rank(pandas.concat([one, other]))


def test_results_of_several_machines_are_no_mixture():
    frame = frame_of(PLANTED)
    assert frame["device"].nunique() == 5
    assert smallest_sufficient_rank(frame).rank == 4


def test_methods_are_judged_one_at_a_time():
    plain, other = frame_of(PLANTED), frame_of(FULL).assign(method="dora")
    full = frame_of({1: 0.0}).assign(method="full", rank=np.nan)
    both = pandas.concat([plain, other, full])
    assert smallest_sufficient_rank(pandas.concat([plain, full])).rank == 4
    assert smallest_sufficient_rank(both, method="lora") == smallest_sufficient_rank(plain)
    assert smallest_sufficient_rank(both, method="dora").rank == 16
    with pytest.raises(ValueError, match=r"method is None, but the methods with ranks .* \['dora', 'lora'\]; name one"):
        smallest_sufficient_rank(both)
    with pytest.raises(ValueError, match="method is 'full'"):
        smallest_sufficient_rank(both, method="full")


def test_a_trial_twice_is_refused():
    frame = frame_of(PLANTED)
    with pytest.raises(ValueError, match=r"holds rank 1, lr 0\.003, seed 0 twice; drop_duplicates"):
        smallest_sufficient_rank(pandas.concat([frame, frame]))


def test_one_rank_is_too_few_and_columns_are_needed():
    with pytest.raises(ValueError, match="only rank 4; ranks are compared"):
        smallest_sufficient_rank(frame_of({4: 0.0}))
    with pytest.raises(ValueError, match=r"lacks the columns \['test_loss'\]"):
        smallest_sufficient_rank(frame_of(PLANTED).drop(columns="test_loss"))


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
    assert statuses(verdict)[1] == statuses(verdict)[2] == "too small"
    # The numbers are those of fit: one trial once more, by hand.
    model = linear()
    fit(model, task, LoRA(rank=4, alpha=4), steps=150, lr=0.03, batch_size=32, seed=1)
    own = frame[(frame["rank"] == 4) & (frame.lr == 0.03) & (frame.seed == 1)]
    assert own["test_loss"].dropna().tolist() == [evaluate(model, task, "test", batch_size=32)]
    assert smallest_sufficient_rank(frame[frame.seed == 1]).rank is None


def test_seeds_are_listed_in_the_singular_and_in_the_plural():
    assert _listed([3]) == "seed 3"
    assert _listed([0, 1, 4]) == "seeds 0, 1, 4"


def test_what_is_no_frame_or_no_margin_is_told():
    for frame in (None, "runs", [1], torch.zeros(3)):
        with pytest.raises(ValueError, match=r"frame is .*, but it must be the table that ablate or load returns"):
            smallest_sufficient_rank(frame)
    for margin in ("0.1", None, 10**400, torch.zeros(3)):
        with pytest.raises(ValueError, match=r"margin is .*, but it must be a number"):
            smallest_sufficient_rank(frame_of(PLANTED), margin)
    with pytest.raises(ValueError, match=r"method is \['lora'\], but the methods with ranks"):
        smallest_sufficient_rank(frame_of(PLANTED), method=["lora"])
