"""Which measure of runs orders them as another does: planted answers, and Spearman's correlation of scipy."""

import numpy as np
import pandas
import pytest
from scipy.stats import spearmanr

from lora_lab.ablation.prediction import rank_correlations


def runs(setups=12, seeds=3, noise=0.1, seed=0):
    """Runs whose target follows "cause" (by a curve), is opposed to "mirror", and is unrelated to "chance"."""
    random = np.random.default_rng(seed)
    causes, chances = random.normal(size=(2, setups))
    rows = []
    for setup in range(setups):
        for _ in range(seeds):
            cause = causes[setup] + noise * random.normal()
            row = {"setup": f"s{setup}", "lr": 1e-3, "cause": cause, "mirror": -(cause**3), "chance": chances[setup]}
            rows.append(row | {"target": np.exp(cause) + noise * random.normal()})
    return pandas.DataFrame(rows)


def table(frame, *predictors, **options):
    return rank_correlations(frame, "target", predictors, resamples=400, **options).set_index("predictor")


def test_correlations_are_spearmans():
    frame = runs(noise=0.5)
    result = table(frame, "cause", "mirror", "chance")
    for name in ("cause", "mirror", "chance"):
        assert result.loc[name, "correlation"] == pytest.approx(spearmanr(frame["target"], frame[name]).statistic)
    assert result.loc["cause", "correlation"] > 0.7
    tied = frame.assign(cause=frame["cause"].round())
    expected = spearmanr(tied["target"], tied["cause"]).statistic
    assert table(tied, "cause")["correlation"].iloc[0] == pytest.approx(expected)


def test_a_planted_cause_is_above_chance_and_ahead_of_what_has_none():
    result = table(runs(), "cause", "mirror", "chance")
    assert result.loc["cause", "lower"] > 0.8
    assert result.loc["mirror", "upper"] < -0.8
    assert result.loc["cause", "p"] < 0.01
    assert result.loc["chance", "p"] > 0.05
    assert result.loc["chance", "lower"] < 0 < result.loc["chance", "upper"]
    assert result.loc["chance", "difference_lower"] > 0
    assert result.loc["mirror", "difference_lower"] <= 0 <= result.loc["mirror", "difference_upper"]


def test_the_other_order_of_predictors_has_the_opposite_difference():
    forth, back = table(runs(), "cause", "chance"), table(runs(), "chance", "cause")
    assert forth.loc["chance", "difference"] == -back.loc["cause", "difference"] > 0.5
    assert forth.loc["chance", "difference_lower"] == pytest.approx(-back.loc["cause", "difference_upper"], abs=0.15)
    assert back.loc["cause", "difference_upper"] < 0


def test_more_seeds_of_the_same_setups_are_no_more_evidence():
    few, many = (table(runs(6, seeds, noise=0.5, seed=3), "cause").iloc[0] for seeds in (3, 60))
    assert many["upper"] - many["lower"] > 0.5 * (few["upper"] - few["lower"])
    more = table(runs(60, 3, noise=0.5, seed=3), "cause").iloc[0]
    assert more["upper"] - more["lower"] < 0.5 * (few["upper"] - few["lower"])


def test_each_setup_is_left_out_once():
    frame = runs(8, noise=0.5)
    result = table(frame, "cause").iloc[0]
    without = [
        spearmanr(rest["target"], rest["cause"]).statistic
        for setup in frame["setup"].unique()
        for rest in [frame[frame["setup"] != setup]]
    ]
    assert (result["least"], result["most"]) == pytest.approx((min(without), max(without)))
    assert result["least"] < result["correlation"] < result["most"]


def test_rows_without_a_value_are_left_out():
    frame = runs()
    frame.loc[0, "cause"] = np.nan
    assert table(frame, "cause").equals(table(frame.drop(0), "cause"))


def test_what_cannot_be_correlated_is_refused():
    with pytest.raises(ValueError, match="runs of 3 setups, but a correlation over setups needs at least four"):
        table(runs(3), "cause")
    with pytest.raises(ValueError, match="'chance' is the same in all runs"):
        table(runs().assign(chance=1.0), "cause", "chance")
