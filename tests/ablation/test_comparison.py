"""Setups at their own best rates: planted differences, an oracle by loops, and one live study."""

import json

import numpy as np
import pandas
import pytest
import scipy.stats

from lora_lab import FullFineTuning, LoRA
from lora_lab.ablation import Trial
from lora_lab.ablation.blocks import BlockLosses, block_losses_of
from lora_lab.ablation.compare import Study, choose_rate, compare_tuned, differences, last_rows
from lora_lab.ablation.stats import interval, outer_bounds, outer_interval, resampled_means, t_bounds
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import digits

pytestmark = pytest.mark.usefixtures("one_thread")


def judged(losses, edges=(), outcome="done"):
    """Rows as compare_tuned yields them: setup -> losses (seeds, blocks)."""
    rows = [
        {
            "setup": setup,
            "stage": "judging",
            "lr": 1e-3,
            "edge": "largest" if setup in edges else "",
            "seed": seed,
            "outcome": outcome,
            "step": 4,
            "steps": 4,
            "score_test": json.dumps(list(blocks)),
        }
        for setup, by_seed in losses.items()
        for seed, blocks in enumerate(by_seed)
    ]
    return pandas.DataFrame(rows)


def planted(shift, noise, seeds=4, blocks=20, draw=0):
    random = np.random.default_rng(draw)
    hard = random.normal(size=(1, blocks))  # examples differ in difficulty, for all setups alike
    return {
        setup: 2 + more + hard + noise * random.normal(size=(seeds, blocks))
        for setup, more in {"full": 0.0, "LoRA": shift}.items()
    }


def of_lora(losses, margin=0.0, **options):
    return differences(judged(losses, **options), "full", margin=margin).set_index("setup").loc["LoRA"]


def test_a_planted_difference_is_found_though_examples_differ_far_more():
    row = of_lora(planted(0.1, 0.05))
    assert row["difference"] == pytest.approx(0.1, abs=0.02)
    assert 0 < row["lower"] < row["difference"] < row["upper"] < 0.15
    assert row["verdict"] == "higher"
    assert of_lora(planted(-0.1, 0.05))["verdict"] == "lower"
    assert of_lora(planted(0.0, 0.05))["verdict"] == "open"


def test_the_margin_decides_what_is_equal():
    assert of_lora(planted(0.01, 0.02), margin=0.05)["verdict"] == "equal"
    assert of_lora(planted(0.01, 0.02), margin=0.001)["verdict"] != "equal"
    assert of_lora(planted(0.05, 0.1), margin=0.05)["verdict"] == "open"


def test_the_interval_is_that_of_paired_draws():
    losses = planted(0.1, 0.3)
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
    assert outer_interval(by_seed)[1] > upper  # 97.5 % on either side
    assert np.isnan(outer_bounds(by_seed[:1])).all()


def test_a_difference_of_zero_is_rarely_called_one_though_seeds_are_few():
    """With noise of whole trials a bootstrap over three seeds alone calls a quarter of them a difference."""
    random, wrong, by_bootstrap = np.random.default_rng(3), 0, 0
    for _ in range(100):
        full, lora = (random.normal(2, 0.01, (3, 1)) + np.zeros((3, 5)) for _ in range(2))
        wrong += of_lora({"full": full, "LoRA": lora})["verdict"] in ("lower", "higher")
        lower, upper = interval(resampled_means(lora - full, 200))
        by_bootstrap += not lower <= 0 <= upper
    assert wrong <= 12
    assert by_bootstrap > 15


def test_one_seed_decides_nothing():
    row = of_lora({"full": np.full((1, 1), 2.0), "LoRA": np.full((1, 1), 2.001)})
    assert row["verdict"] == "open"
    assert np.isnan(row["lower"])


def test_a_setup_without_a_rate_is_in_the_table():
    frame = judged(planted(0.1, 0.05))
    chosen = frame[frame["setup"] == "LoRA"].assign(stage="choosing", setup="rsLoRA", outcome="failed")
    table = differences(pandas.concat([chosen, frame]), "full").set_index("setup")
    assert table.loc["rsLoRA", "verdict"] == "failed"
    assert np.isnan(table.loc["rsLoRA", "lr"])


def test_no_verdict_rests_on_a_rate_at_the_edge_of_its_grid():
    assert of_lora(planted(0.1, 0.05), edges=["LoRA"])["verdict"] == "edge"
    assert of_lora(planted(0.1, 0.05), edges=["full"])["verdict"] == "edge"


def test_a_setup_of_which_a_seed_failed_has_no_verdict():
    frame = judged(planted(0.1, 0.05))
    frame.loc[frame.index[-1], "outcome"] = "failed"
    table = differences(frame, "full").set_index("setup")
    assert table.loc["LoRA", "verdict"] == "failed"
    assert np.isnan(table.loc["LoRA", "difference"])
    assert table.loc["full", "verdict"] == "reference"
    with pytest.raises(ValueError, match="'LoRA' has no results for all seeds"):
        differences(frame, "LoRA")


# Studies


def template(method):
    return Trial(method, 1e-3, steps=8, batch_size=16, eval_every=8, eval_examples=8)


def study(**changes):
    options = {
        "setups": {"full": template(FullFineTuning()), "r=2": template(LoRA(2, 4))},
        "lrs": {"full": (1e-3, 3e-3), "r=2": (1e-2, 3e-2)},
        "choosing": [0, 1],
        "judging": [2, 3, 4],
        "chosen_on": 40,
        "judged_on": {"validation": 16, "test": 24},
        "widen": 3,
    }
    return Study(**options | changes)


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    parts = compare_tuned(DigitsMLP(), digits(), study(), tmp_path_factory.mktemp("study"), progress=False)
    return pandas.concat(parts, ignore_index=True)


def test_rates_are_chosen_on_some_seeds_and_judged_on_others(frame):
    assert set(frame.loc[frame["stage"] == "choosing", "seed"]) == {0, 1}
    judging = last_rows(frame[frame["stage"] == "judging"])
    assert set(judging["seed"]) == {2, 3, 4}
    for setup, rows in judging.groupby("setup"):
        chosen = frame[(frame["stage"] == "choosing") & (frame["setup"] == setup)]
        choice = choose_rate(last_rows(chosen), [0, 1])
        assert set(rows["lr"]) == {choice.lr}
        assert set(rows["edge"]) == {choice.edge}
        tried = sorted(chosen["lr"].unique())
        assert choice.edge == {tried[0]: "smallest", tried[-1]: "largest"}.get(choice.lr, "")


def test_each_stage_is_judged_on_its_own_examples(frame):
    chosen = last_rows(frame[frame["stage"] == "choosing"]).iloc[0]
    judging = last_rows(frame[frame["stage"] == "judging"]).iloc[0]
    assert len(block_losses_of(chosen, "validation")) == 10  # blocks of 4
    assert [len(block_losses_of(judging, part)) for part in ("validation", "test")] == [4, 6]
    assert len(differences(frame, "full")) == 2


def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch):
    list(compare_tuned(DigitsMLP(), digits(), study(), tmp_path, progress=False))
    monkeypatch.setattr(BlockLosses, "__call__", None)
    again = list(compare_tuned(DigitsMLP(), digits(), study(), tmp_path, progress=False))
    assert len(again) == 2
    monkeypatch.undo()
    (only,) = compare_tuned(DigitsMLP(), digits(), study(judging=()), tmp_path, progress=False)
    assert set(only["stage"]) == {"choosing"}


def test_trials_that_were_judged_otherwise_are_not_taken_for_these(tmp_path):
    counts = []
    for changes in ({}, {"chosen_on": 20}, {"block": 8}, {"judged_on": {"validation": 16, "test": 12}}):
        frames = [
            last_rows(each) for each in compare_tuned(DigitsMLP(), digits(), study(**changes), tmp_path, progress=False)
        ]
        counts.append(
            [
                len(block_losses_of(rows.iloc[0], part))
                for rows, part in zip(frames, ("validation", "test"), strict=True)
            ]
        )
    assert counts == [[10, 6], [5, 6], [5, 3], [10, 3]]


def test_a_setup_with_a_single_rate_is_judged_at_it_and_supports_a_verdict(tmp_path):
    fixed = study(lrs={"full": (1e-3, 3e-3), "r=2": (1e-2,)})
    assert sum(trial.seed in (0, 1) for trial in fixed.trials) == 2 * 2
    chosen, judged = compare_tuned(DigitsMLP(), digits(), fixed, tmp_path / "one", progress=False)
    assert set(chosen["setup"]) == {"full"}
    rows = judged[judged["setup"] == "r=2"]
    assert (set(rows["lr"]), set(rows["edge"])) == ({1e-2}, {""})
    untuned = study(lrs={"full": (1e-3,), "r=2": (1e-2,)})
    (only,) = compare_tuned(DigitsMLP(), digits(), untuned, tmp_path / "both", progress=False)
    assert set(differences(only, "full")["verdict"]) <= {"reference", "lower", "higher", "open"}


def test_planned_trials_are_all_rates_of_the_first_grids_and_one_of_each_judging_seed():
    trials = study().trials
    assert len(trials) == 2 * 2 * 2 + 2 * 3
    assert {trial.seed for trial in trials if trial.lr == 3e-3} == {0, 1}


def test_a_study_that_would_flatter_itself_is_refused():
    with pytest.raises(ValueError, match=r"The seeds \[1\] both choose and judge"):
        study(judging=[1, 2])
    with pytest.raises(ValueError, match=r"\['r=2'\] are only in one"):
        study(lrs={"full": (1e-3, 1e-2)})
