"""Halving: what it stops, by curves worked by hand; that a sweep does what the rule says; what must not fool it."""

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
from pandas.testing import assert_frame_equal

from lora_lab import FullFineTuning, LoRA, fit
from lora_lab.ablation import Grid, Halving, Trial, ablate, load, run, smallest_sufficient_rank
from lora_lab.ablation.compare import best_rates
from lora_lab.ablation.halving import next_round
from lora_lab.models.digits import DigitsMLP
from lora_lab.studies.records import load_all
from lora_lab.tasks import planted

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = functools.partial(DigitsMLP, width=16)
PLAN = Trial(LoRA(2, 4), 1.0, steps=40, eval_every=5, schedule="constant")
RUNGS = Halving(rungs=[0.25])  # of 40 steps: step 10, with the trend from step 5
CAUTIOUS = Halving(rungs=[0.2, 0.5])  # of a sweep's trials: steps 4 and 10, with the trend from steps 2 and 4
COLUMNS = ["method", "rank", "lr", "seed", "outcome", "reason", "step", "validation_loss", "test_loss"]


def curves(rates):
    """Curves from losses at the steps 5 and 10: rate -> a pair of them for each seed."""
    return {
        lr: {i: dict(zip((5, 10), pair, strict=True)) for i, pair in enumerate(pairs)} for lr, pairs in rates.items()
    }


def stopped(rates, halving=RUNGS, **options):
    """The rates that are stopped, in order of rate."""
    return sorted(halving.decide(curves(rates), PLAN, **options)[0])


def grid(ranks=(2,), lrs=(1e-3, 1e-2, 0.3), seeds=(0, 1, 2), **options):
    return Grid(ranks, lrs, seeds, **{"steps": 20, "batch_size": 4, "alpha_per_rank": 2, "eval_every": 2} | options)


@functools.cache
def task():
    whole = planted(MODEL(), n_train=64)
    few = {part: whole.parts[part][:32] for part in ("validation", "test", "off_domain")}  # evaluating takes the time
    return dataclasses.replace(whole, **few)


def sweep(trials, folder=None, halving=CAUTIOUS, **options):
    options = {"engine": "separate", "progress": False, **options}
    return ablate(MODEL, task(), trials, folder, halving=halving, **options)


@functools.cache
def uninterrupted(halving):
    """The table of the sweep without a folder."""
    return sweep(grid(), halving=halving)


def same(frame, other):
    frames = [each[COLUMNS].sort_values([*COLUMNS[:4], "step"], ignore_index=True) for each in (frame, other)]
    assert_frame_equal(*frames, check_dtype=False)


def ruled_out(whole, halving):
    """The rates that the rule stops by the curves of a whole sweep of one rank."""
    losses = {}
    for row in whole.itertuples():
        losses.setdefault(row.lr, {}).setdefault(row.seed, {})[row.step] = row.validation_loss
    return set(halving.decide(losses, grid()[0])[0])


def steps_of(frame):
    """How many steps the trials of a table took."""
    return frame.groupby("key").step.max().sum()


# The rule


def test_rungs_are_at_the_first_evaluation_from_their_share_on_and_need_one_at_half_their_step():
    halving = Halving(rungs=[0.1, 0.3, 0.9])

    def at(**options):
        return halving.rungs_at(dataclasses.replace(PLAN, steps=100, **options))

    assert at(eval_every=10, warmup=0) == [(30, 10), (90, 40)]
    assert at(eval_every=10, warmup=11) == [(90, 40)]  # step 10 is in the warm-up
    assert at(eval_every=33, warmup=0) == [(99, 33)]
    assert at(eval_every=100, warmup=0) == []


def test_a_rate_within_the_noise_of_the_seeds_goes_on():
    steady = [(2.0, 1.0), (2.2, 1.2), (2.1, 1.1)]
    # Differences of 0.1, 0.2, 0.3 have the mean 0.2 and the lower bound 0.2 - 2.92 * 0.1 / sqrt(3) = 0.03.
    assert stopped({1.0: steady, 2.0: [(2.1, 1.1), (2.4, 1.4), (2.4, 1.4)]}) == [2.0]
    # Of -0.1, 0.2, 0.5 the mean is the same, and the lower bound below 0.
    assert stopped({1.0: steady, 2.0: [(1.9, 0.9), (2.4, 1.4), (2.6, 1.6)]}) == []


@pytest.mark.parametrize(("before", "stops"), [(0.3, True), (0.39, True), (0.41, False), (1.0, False)])
def test_a_rate_that_catches_up_goes_on(before, stops):
    # From step 5 to 10, one doubling, the difference falls from ``before`` to 0.27, and two doublings are left:
    # it is 0.27 - 2 * (before - 0.27) in the end, which is 0 for 0.405.
    rates = {1.0: [(2.0, 1.0)], 2.0: [(2.0 + before, 1.27)]}
    assert stopped(rates) == [2.0] * stops


def test_at_early_stopping_the_lowest_losses_so_far_are_compared():
    rates = {1.0: [(1.0, 3.0)], 2.0: [(2.0, 1.9)]}  # the first rate had its best already
    assert stopped(rates) == [1.0]
    best = Halving(rungs=[0.25], best_so_far=True)
    assert stopped(rates, best) == [2.0]  # it ends at 1.9 - 2 * 0.1 by its own trend
    assert stopped({1.0: [(1.0, 3.0)], 2.0: [(2.4, 1.9)]}, best) == []  # and here at 1.9 - 2 * 0.5


def test_what_is_kept_whatever_the_losses():
    rates = {float(lr): [(lr + 1.0, float(lr))] for lr in range(1, 9)}
    assert stopped(rates) == [3, 4, 5, 6, 7, 8]
    assert stopped(rates, Halving(rungs=[0.25], slack=5.5)) == [7, 8]


def test_a_rate_with_a_failed_seed_neither_leads_nor_goes_on():
    rates = {1.0: [(1.0, 0.5)], 2.0: [(2.0, 1.5)], 3.0: [(3.0, 2.5)]}
    assert stopped(rates) == [2.0, 3.0]
    stops, _ = RUNGS.decide(curves(rates), PLAN, failed=[1.0])
    assert sorted(stops) == [1.0, 3.0]
    assert "seed failed" in stops[1.0]
    assert RUNGS.decide(curves(rates), PLAN, failed=[1.0, 2.0, 3.0]) == ({}, None)  # nothing to choose, nothing to save


def test_the_next_rung_is_asked_for_until_one_rate_is_left():
    halving = Halving(rungs=[0.25, 0.5])
    rates = curves({1.0: [(1.0, 0.5)], 2.0: [(1.1, 0.55)], 3.0: [(3.0, 2.5)]})
    assert halving.decide({lr: {0: {}} for lr in rates}, PLAN) == ({}, 10)
    stops, until = halving.decide(rates, PLAN)
    assert ([*stops], until) == ([3.0], 20)  # 2.0 ends at 0.05 - 2 * 0.05
    for lr, loss in ((1.0, 0.4), (2.0, 0.45)):
        rates[lr][0][20] = loss
    assert halving.decide(rates, PLAN)[1] is None
    rates[3.0][0][40] = 0.0  # what comes after the rung at which it was stopped changes nothing
    assert [*halving.decide(rates, PLAN)[0]] == [3.0, 2.0]


# The sweep


@pytest.mark.slow
def test_a_sweep_stops_what_the_rule_stops_by_the_curves_of_the_whole_one(tmp_path):
    whole, frame = uninterrupted(None), sweep(grid(), tmp_path)
    stops, losses = frame[frame.outcome == "stopped"], ["train_loss", "validation_loss", "off_domain_loss"]
    assert set(stops.lr) == ruled_out(whole, CAUTIOUS)
    assert 0 < len(set(stops.lr)) < 3
    assert set(frame.key) == set(whole.key)
    assert (stops.groupby("key").step.max().dropna() < 20).all()
    begun = frame[frame.step.notna()].set_index(["key", "step"])
    assert_frame_equal(begun[losses], whole.set_index(["key", "step"]).loc[begun.index, losses])
    same(frame[frame.outcome == "done"], whole[~whole.lr.isin(stops.lr)])
    assert stops.test_loss.isna().all()
    assert (stops.reason.str.len() > 20).all()
    assert not (tmp_path / "paused").exists()
    same(load(tmp_path), frame)


def test_seeds_of_a_rate_are_stopped_together_and_every_rank_keeps_a_rate():
    frame = sweep(grid([1, 3]))
    outcomes = frame.groupby(["rank", "lr"]).outcome.unique()
    assert outcomes.str.len().eq(1).all()
    assert {outcome for (outcome,) in outcomes} == {"done", "stopped"}
    assert (frame[frame.outcome == "done"].groupby("rank").seed.nunique() == 3).all()


def test_no_trial_that_is_stopped_is_tested(monkeypatch):
    tested = []

    def counted(model, task, part, *options):
        tested.append(part)
        return torch.rand(1).item()  # were they looked at, these losses would decide otherwise

    monkeypatch.setattr(run, "evaluate", counted)
    frame = sweep(grid())
    assert tested == ["test"] * frame[frame.outcome == "done"].key.nunique()
    monkeypatch.undo()
    expected = uninterrupted(CAUTIOUS)
    assert frame.outcome.tolist() == expected.outcome.tolist()


def interrupting(monkeypatch, calls):
    """Let ``fit`` be called so often, and then raise KeyboardInterrupt; the steps of each call."""
    steps = []

    def counted(model, task, method, on_row=None, **options):
        if len(steps) == calls:
            raise KeyboardInterrupt
        steps.append(0)

        def counting(row):
            steps[-1] += row["step"] > 0
            if on_row is not None:
                on_row(row)

        return fit(model, task, method, on_row=counting, **options)

    monkeypatch.setattr(run, "fit", counted)
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("calls", [4, 9, 12, 14])
def test_an_interrupted_sweep_goes_on_with_the_same_decisions_and_trains_no_step_twice(calls, tmp_path, monkeypatch):
    halving = CAUTIOUS
    expected = uninterrupted(halving)
    steps = interrupting(monkeypatch, calls)
    with pytest.raises(KeyboardInterrupt):
        sweep(grid(), tmp_path, halving)
    monkeypatch.undo()
    later = interrupting(monkeypatch, math.inf)
    same(sweep(grid(), tmp_path, halving), expected)
    assert sum(steps) + sum(later) == steps_of(expected)
    again = interrupting(monkeypatch, 0)
    same(sweep(grid(), tmp_path, halving), expected)
    assert not again


def test_without_halving_what_was_stopped_runs_to_the_end(tmp_path, monkeypatch):
    frame = sweep(grid(), tmp_path)
    stops = frame[frame.outcome == "stopped"].key.nunique()
    steps = interrupting(monkeypatch, math.inf)
    whole = sweep(grid(), tmp_path, None)
    assert steps == [20] * stops
    assert (whole.outcome == "done").all()
    same(whole, uninterrupted(None))
    same(sweep(grid(), tmp_path), whole)  # and stays done
    same(load(tmp_path), whole)


def test_a_weaker_rule_goes_on_with_what_a_stronger_one_has_stopped(tmp_path):
    weak = Halving(rungs=[0.5])
    before = sweep(grid(), tmp_path)
    same(sweep(grid(), tmp_path, weak), uninterrupted(weak))
    assert steps_of(before) < steps_of(load(tmp_path)) < 20 * len(grid())


def test_rates_go_on_when_the_one_that_led_fails_later():
    first, *others = [
        Trial(LoRA(1, 2), lr, seed, steps=40, eval_every=5, schedule="constant")
        for lr in (0.1, 0.2, 0.3)
        for seed in (0, 1)
    ]

    def result(curve, outcome="paused"):
        rows = [{"step": step, "validation_loss": loss} for step, loss in curve.items()]
        return {"outcome": outcome, "history": {"rows": rows}}

    results = {trial.key: result({5: 10 * trial.lr, 10: 20 * trial.lr}) for trial in (first, *others)}
    due, stops = next_round(RUNGS, [first, *others], results)
    assert {trial.lr for trial in due[None]} == {0.1}
    assert {trial.lr for trial in stops} == {0.2, 0.3}
    results[first.key] = {"outcome": "failed", "history": None}
    due, stops = next_round(RUNGS, [first, *others], results)
    assert {trial.lr for trial in due[None]} == {0.2}
    assert {trial.lr for trial in stops} == {0.1, 0.3}


@pytest.mark.slow
def test_processes_decide_the_same(tmp_path):
    same(sweep(grid(), tmp_path, n_jobs=2), uninterrupted(CAUTIOUS))


def test_a_method_without_rank_has_its_rates_compared_too():
    trials = [Trial(FullFineTuning(), lr, seed, steps=20, eval_every=1) for lr in (1e-6, 1e-2) for seed in (0, 1)]
    frame = sweep(trials)
    assert frame.groupby("lr").outcome.first().to_dict() == {1e-6: "stopped", 1e-2: "done"}


# What must not fool it, and what it must not change


def test_a_rate_that_leads_early_and_ends_worse_does_not_win():
    # At a constant rate on noisy targets a high rate falls fast, and then stays where the noise keeps it.
    model = DigitsMLP()
    options = {"steps": 200, "batch_size": 32, "schedule": "constant", "eval_every": 10, "alpha_per_rank": 2}
    trials = Grid([8], [3e-3, 3e-2], range(3), **options)
    whole = ablate(model, planted(model), trials, engine="packed", progress=False)
    means = whole.pivot_table("validation_loss", "step", "lr")
    assert (means[3e-2] < means[3e-3]).loc[20.0]
    assert (means[3e-2] > 1.2 * means[3e-3]).loc[200.0]

    assert Halving(rungs=[0.1]).rungs_at(trials[0]) == []  # where the lead at the rung would decide
    live = ablate(model, planted(model), trials, progress=False, halving=Halving())
    assert set(live[live.outcome == "done"].lr) == {3e-3}


def test_a_higher_rate_goes_on_while_its_schedule_will_bring_it_down():
    decaying = dataclasses.replace(PLAN, schedule="cosine")
    high, low = (curves({1.0: [(2.0, 1.0)] * 2, lr: [(3.0, 2.9)] * 2}) for lr in (2.0, 0.5))
    assert [*RUNGS.decide(high, PLAN)[0]] == [2.0]
    assert [*RUNGS.decide(high, decaying)[0]] == []
    assert [*RUNGS.decide(low, decaying)[0]] == [0.5]


def test_the_verdict_and_its_edges_are_those_of_the_whole_sweep():
    trials = grid([1, 3], schedule="constant")
    whole, less = sweep(trials, halving=None), sweep(trials)
    assert steps_of(less) < 0.7 * steps_of(whole)
    verdicts = [smallest_sufficient_rank(frame, 0.05) for frame in (whole, less)]
    assert verdicts[0] == dataclasses.replace(verdicts[1], notes=())
    assert "rank 3: lr 0.001, the smallest tried, was stopped early, lr 0.3, the largest tried, was stopped" in str(
        verdicts[1]
    )
    assert "does not count" not in str(verdicts[1])
    assert "may lie beyond" not in str(verdicts[1])


def test_the_best_rates_of_the_record_of_overfitting_are_never_stopped_and_many_others_are():
    (record,) = load_all("overfitting", Path(__file__).parents[1] / "data" / "records").values()
    frame, halving, left = record.frame(), Halving(best_so_far=True), []
    for row in best_rates(frame).itertuples():
        rows = frame[(frame.n_train == row.n_train) & (frame.setup == row.setup) & (frame.seed == 0)]
        losses = {lr: {0: dict(zip(own.step, own.validation_loss, strict=True))} for lr, own in rows.groupby("lr")}
        every = int(rows.step[rows.step > 0].min())
        trial = dataclasses.replace(PLAN, steps=int(rows.steps.iloc[0]), eval_every=every, warmup=0)
        stops, _ = halving.decide(losses, trial)
        assert row.lr not in stops
        left.append(1 - len(stops) / len(losses))
    assert sum(left) / len(left) < 0.6


NO_RUNGS = [
    ({"eval_every": 20}, {"eval_every": 2}),
    ({"steps": 30, "warmup": 20, "eval_every": 3}, {"warmup": 0}),
    ({"steps": 2, "eval_every": 1}, {"steps": 20}),
]
REFUSED = [  # the call, and what must be named
    (lambda: Halving(rungs=[0.5, 0]), "rungs.0 is 0"),
    (lambda: Halving(rungs=[1.1]), "rungs.0 is 1.1"),
    (lambda: Halving(slack=-1.0), "slack is"),
    (lambda: Halving(slack=math.nan), "slack is"),
    *(
        (lambda options=options: Halving().check(grid(**options)), "eval_every is .* no rung")
        for options, _ in NO_RUNGS
    ),
]


@pytest.mark.parametrize(("call", "named"), REFUSED)
def test_what_cannot_be_halved_is_refused_and_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize(("options", "changes"), NO_RUNGS)
def test_trials_have_rungs_as_the_refusal_advises_and_one_rate_needs_none(options, changes):
    Halving().check(grid(**options | changes))
    Halving().check(grid(lrs=[1e-2], **options))
