"""The best learning rate: vertices by hand and by numpy, intervals on planted noise, grids that widen."""

import itertools
import math

import numpy as np
import pandas
import pytest

from lora_lab import FullFineTuning, LoRA
from lora_lab.ablation import Trial
from lora_lab.ablation.compare import choose_rates, rates_around, tune
from lora_lab.ablation.stats import (
    best_rate,
    losses_by_rate,
    powers,
    ratio_interval,
    sample_vertices,
    slope,
)
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import digits

pytestmark = pytest.mark.usefixtures("one_thread")

RATES = rates_around(1e-3)


def parabola(best, seeds=3, blocks=4, rates=RATES, noise=0.0, random=None):
    """rate -> losses (seeds, blocks) of a parabola in log(lr), with noise that is each trial's own in part."""
    random = random or np.random.default_rng(0)
    shared = random.normal(size=(1, blocks))  # examples differ in difficulty, for all rates alike
    return {
        lr: 0.1 * (math.log(lr) - math.log(best)) ** 2 + 2 + shared + noise * random.normal(size=(seeds, blocks))
        for lr in rates
    }


def test_a_grid_has_the_centre_in_its_middle():
    assert rates_around(1e-3) == (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
    assert rates_around(1e-3, factor=1.7, count=3) == (5.88e-4, 1e-3, 1.7e-3)


@pytest.mark.parametrize(("name", "value"), [("centre", 0), ("factor", 1), ("count", 0)])
def test_a_grid_that_is_none_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}"):
        rates_around(**{"centre": 1e-3, name: value})


# The vertex


@pytest.mark.parametrize("best", [7.3e-4, 1e-3, 1.3e-3, 2.2e-3])
def test_the_vertex_of_a_parabola_is_exact(best):
    for rates in (RATES, (2e-4, 5e-4, 8e-4, 2e-3, 3e-3, 9e-3)):
        result = best_rate(parabola(best, rates=rates))
        assert result.vertex == pytest.approx(best, rel=1e-9)
        assert result.lower == pytest.approx(best) == result.upper  # without noise all samples agree
        assert result.tried == min(rates, key=lambda lr: abs(math.log(lr / best)))
        assert result.edge == ""
    assert best_rate(parabola(1.1 * best)).vertex != pytest.approx(best, rel=0.05)


def test_the_vertex_is_that_of_the_three_points_around_the_lowest():
    losses = {1e-4: 9.0, 2e-4: 5.0, 4e-4: 3.1, 8e-4: 3.0, 16e-4: 3.7, 32e-4: 50.0}
    x = np.log([4e-4, 8e-4, 16e-4])
    a, b, _ = np.polyfit(x, [3.1, 3.0, 3.7], 2)
    result = best_rate({lr: np.array([[loss]]) for lr, loss in losses.items()})
    assert math.log(result.vertex) == pytest.approx(-b / (2 * a))


@pytest.mark.parametrize(
    ("best", "edge", "words"), [(1e-5, "smallest", "lie beyond"), (1e-1, "largest", "largest rate")]
)
def test_a_best_rate_at_the_edge_has_no_vertex(best, edge, words):
    result = best_rate(parabola(best))
    assert (result.vertex, result.edge) == (None, edge)
    assert result.tried == (RATES[0] if edge == "smallest" else RATES[-1])
    assert f"the {edge} rate tried, so the best may lie beyond" in str(result)
    assert "lie beyond" not in str(best_rate(parabola(1e-3)))


def test_three_equal_losses_have_the_middle_rate_as_their_best():
    result = best_rate({lr: np.ones((1, 1)) for lr in (1e-3, 2e-3, 4e-3)})
    assert (result.tried, result.edge) == (1e-3, "smallest")  # of equal means the smallest
    flat = {lr: np.array([[loss]]) for lr, loss in {5e-4: 2.0, 1e-3: 1.0, 2e-3: 1.0}.items()}
    assert 1e-3 < best_rate(flat).vertex < 2e-3


# The interval


def test_the_interval_is_that_of_a_bootstrap_over_seeds_and_blocks():
    losses = parabola(1.2e-3, seeds=4, blocks=16, noise=0.1)
    random, vertices = np.random.default_rng(7), []
    for _ in range(3000):
        seeds, blocks = random.integers(4, size=4), random.integers(16, size=16)
        means = [losses[lr][np.ix_(seeds, blocks)].mean() for lr in RATES]
        i = int(np.argmin(means))
        if 0 < i < len(RATES) - 1:
            a, b, _ = np.polyfit(np.log(RATES[i - 1 : i + 2]), means[i - 1 : i + 2], 2)
            vertices.append(math.exp(-b / (2 * a)))
        else:
            vertices.append(math.inf if i else 0.0)
    result = best_rate(losses)
    assert result.lower == pytest.approx(np.quantile(vertices, 0.025), rel=0.04)
    assert result.upper == pytest.approx(np.quantile(vertices, 0.975), rel=0.04)
    assert result.lower < result.vertex < result.upper
    assert (result.seeds, result.blocks) == (4, 16)


def share_held(seeds, own, of_seed, of_block, repeats=150):
    """How often the interval holds a planted rate, where losses have three kinds of noise."""
    random, held = np.random.default_rng(0), 0
    for _ in range(repeats):
        best = math.exp(random.uniform(math.log(7e-4), math.log(1.5e-3)))
        losses = {
            lr: of_rate
            + own * random.normal(size=(seeds, 32))
            + of_seed * random.normal(size=(seeds, 1))
            + of_block * random.normal(size=(1, 32))
            for lr, of_rate in parabola(best, seeds, 32).items()
        }
        result = best_rate(losses)
        held += (result.lower or 0) <= best <= (result.upper or math.inf)
    return held / repeats


def test_the_interval_holds_the_planted_rate_about_as_often_as_it_says():
    assert 0.9 < share_held(5, own=0.05, of_seed=0.01, of_block=0.03) < 0.99
    assert share_held(5, own=0.1, of_seed=0, of_block=0) > 0.97  # longer than need be
    assert 0.7 < share_held(3, own=0, of_seed=0.02, of_block=0) < 0.88  # too short


def test_an_interval_that_reaches_the_edge_is_open_there():
    result = best_rate(parabola(2.4e-3, seeds=4, blocks=8, noise=0.15, random=np.random.default_rng(1)))
    assert result.upper is None
    assert "above all tried" in str(result)
    assert result.lower is not None


# How it falls with the rank


def test_a_planted_power_of_the_rank_is_recovered():
    random = np.random.default_rng(0)
    samples = {
        rank: sample_vertices(parabola(2e-3 * rank**-0.5, 4, 32, rates_around(1e-3, 2, 9), 0.05, random))
        for rank in (1, 4, 16, 64)
    }
    power, lower, upper = slope(samples)
    assert lower < -0.5 < upper
    assert power == pytest.approx(-0.5, abs=0.05)
    assert not lower < 0 < upper


def test_no_power_is_given_where_the_best_rates_are_at_edges():
    power, lower, _ = slope({1: np.array([-7.0, math.inf, math.inf]), 2: np.array([-7.0, -7.0, -7.1])})
    assert math.isnan(power)
    assert lower == -math.inf
    few = slope({1: np.array([-7.0, -7.0, math.inf]), 4: np.array([-7.0, -7.0, -7.1])})
    assert few == (pytest.approx(0), -math.inf, pytest.approx(0))


def test_a_power_holds_the_truth_though_best_rates_are_near_the_edges():
    """Samples at an edge are not dropped: what is left would be biased."""
    random, ranks, inside = np.random.default_rng(1), (1, 8, 64), 0
    for _ in range(40):
        samples = {
            rank: sample_vertices(parabola(2.7e-3 * rank**-0.5, 3, 8, rates_around(1e-3 * rank**-0.5), 0.1, random))
            for rank in ranks
        }
        _, lower, upper = slope(samples)
        inside += lower <= -0.5 <= upper
    assert inside >= 32


# On trials


def template(method, **options):
    return Trial(method, 1e-3, steps=12, batch_size=16, eval_every=12, eval_examples=40, **options)


def test_grids_are_widened_until_the_best_rate_is_inside(tmp_path):
    setups = {"full": template(FullFineTuning()), "r=2": template(LoRA(2, 4)), "the same": template(LoRA(2, 4))}
    lrs = {"full": (1e-5, 3e-5), "r=2": (0.5, 1.0), "the same": (0.5, 1.0)}
    model, task = DigitsMLP(), digits()
    frame = tune(model, task, setups, lrs, range(2), tmp_path, widen=12, progress=False)
    assert [*frame["setup"].unique()] == [*setups]
    for setup, of_setup in frame.groupby("setup"):
        rates = sorted(of_setup["lr"].unique())
        assert set(lrs[setup]) < set(rates)
        factor = lrs[setup][1] / lrs[setup][0]
        assert rates == pytest.approx([rates[0] * factor**i for i in range(len(rates))], rel=0.02)
        result = best_rate(losses_by_rate(of_setup))
        assert result.edge == ""
        assert rates[0] < result.tried < rates[-1]
        neighbour = rates[rates.index(result.tried) + (1 if setup == "full" else -1)]
        assert neighbour in (rates[0], rates[-1])  # no further than one beyond the best
    assert len([*tmp_path.glob("*.json")]) == frame["key"].nunique()
    assert set(frame[frame["setup"] == "r=2"]["key"]) == set(frame[frame["setup"] == "the same"]["key"])


def rows_of(outcomes):
    """(rate, seed) -> validation loss, or the reason of a failure, as rows of a table."""
    rows = []
    for (lr, seed), value in outcomes.items():
        failed = isinstance(value, str)
        how = {"outcome": "failed", "reason": value} if failed else {"outcome": "done", "reason": None}
        rows.append({"lr": lr, "seed": seed, **how, "validation_loss": math.nan if failed else value})
    return pandas.DataFrame(rows).assign(step=4, steps=4, test_loss=1.0)


def choose(rows, seeds):
    """The choice of the rate of one setup."""
    return choose_rates(rows.assign(setup="a"), seeds)["a"]


def test_what_is_missing_or_did_not_fit_says_nothing_of_what_lies_beyond():
    best = {(1e-3, 0): 2.0, (1e-3, 1): 2.0, (2e-3, 0): 1.0, (2e-3, 1): 1.0}
    for beyond in ({(4e-3, 0): 3.0}, {(4e-3, 0): 3.0, (4e-3, 1): "out of memory: 3 GB"}):
        choice = choose(rows_of(best | beyond), [0, 1])
        assert (choice.lr, choice.edge, choice.diverged) == (2e-3, "largest", None)
    choice = choose(rows_of(best | {(4e-3, 0): 3.0, (4e-3, 1): "The loss is nan in step 3."}), [0, 1])
    assert (choice.lr, choice.edge, choice.diverged) == (2e-3, "", 4e-3)
    choice = choose(rows_of(best | {(4e-3, 0): 3.0, (4e-3, 1): 3.0, (8e-3, 0): "nan", (8e-3, 1): "nan"}), [0, 1])
    assert (choice.lr, choice.edge, choice.diverged) == (2e-3, "", None)  # a rate that counts lies beyond


def test_between_the_best_rate_and_one_that_diverged_another_is_tried():
    lrs = {"a": (1e-3, 1e30)}
    frame = tune(DigitsMLP(), digits(), {"a": template(FullFineTuning())}, lrs, [0], widen=2, progress=False)
    assert sorted(frame["lr"].unique()) == pytest.approx([1e-3, 1.78e5, 3.16e13, 1e30], rel=1e-2)


@pytest.mark.slow
def test_as_many_rates_as_asked_for_lie_beyond_the_best():
    for beyond in (1, 2, 3):
        lrs, setups = {"a": (1e-5, 3e-5)}, {"a": template(FullFineTuning())}
        frame = tune(DigitsMLP(), digits(), setups, lrs, [0], widen=12, beyond=beyond, progress=False)
        rates, best = sorted(frame["lr"].unique()), best_rate(losses_by_rate(frame)).tried
        assert len(rates) - 1 - rates.index(best) == beyond
        assert rates.index(best) >= beyond


def test_the_blocks_of_a_judge_decide_where_there_are_some():
    row = {"lr": 1e-3, "seed": 0, "outcome": "done", "reason": "", "validation_loss": 1.0}
    row |= {"test_loss": 1.0, "step": 4, "steps": 4}
    rows = pandas.DataFrame([row, row | {"lr": 2e-3, "validation_loss": 2.0}])
    assert choose(rows, [0]).lr == 1e-3
    judged = rows.assign(score_validation=["[5.0, 7.0]", "[3.0, 4.0]"])
    choice = choose(judged, [0])
    assert (choice.lr, choice.loss, choice.edge) == (2e-3, 3.5, "largest")
    assert losses_by_rate(judged)[1e-3].tolist() == [[5.0, 7.0]]


def test_one_loss_a_rate_has_no_interval():
    result = best_rate({lr: losses[:1, :1] for lr, losses in parabola(1.1e-3).items()})
    assert (result.lower, result.upper) == (None, None)
    assert "one loss per rate, so no interval; best rate tried: 0.001" in str(result)
    assert "resampled, 3 seeds:" in str(best_rate(parabola(1.1e-3)))


def test_only_rates_with_every_seed_have_losses():
    setups = {"a": template(LoRA(2, 4))}
    frame = tune(DigitsMLP(), digits(), setups, {"a": (1e-2, 2e-2)}, [0, 1], widen=0, progress=False)
    whole = losses_by_rate(frame)
    assert {lr: values.shape for lr, values in whole.items()} == {1e-2: (2, 1), 2e-2: (2, 1)}
    partial = frame.drop(frame[(frame["lr"] == 1e-2) & (frame["seed"] == 1)].index)
    assert [*losses_by_rate(partial)] == [2e-2]


def test_a_ratio_of_best_rates_holds_the_planted_one_and_is_paired():
    random = np.random.default_rng(3)
    slow = sample_vertices(parabola(5e-4, seeds=5, noise=0.02, random=random))
    fast = sample_vertices(parabola(1.5e-3, seeds=5, noise=0.02, random=random))
    lower, upper = ratio_interval(fast, slow)
    assert 2.4 < lower < 3 < upper < 3.8
    assert ratio_interval(slow, fast) == pytest.approx((1 / upper, 1 / lower))
    assert ratio_interval(fast, fast) == (1, 1)


def test_a_ratio_is_not_bounded_where_a_grid_is_not():
    inside, edge = np.zeros(100), np.full(100, math.inf)
    assert ratio_interval(edge, inside) == (math.inf, math.inf)
    assert ratio_interval(inside, edge) == (0, 0)
    assert ratio_interval(edge, edge) == (0, math.inf)
    few = np.where(np.arange(100) < 10, math.inf, 0.0)  # in a tenth of the samples the best rate lies beyond
    assert ratio_interval(few, inside) == (1, math.inf)


def test_a_size_in_the_middle_of_three_says_nothing_of_the_power_even_if_its_best_rate_is_beyond_the_grid():
    """Its weight is zero but for rounding, whose sign differs between processors."""
    for sizes in itertools.product((2, 3, 8), (2, 4)):
        low, middle, high = (sizes[0] * sizes[1] ** (2 * k) for k in range(3))
        samples = {low: np.full(9, -5.0), middle: np.full(9, math.inf), high: np.full(9, -5 - math.log(high / low))}
        assert slope(samples) == pytest.approx((-1, -1, -1))


def test_two_powers_are_told_from_each_other():
    planted = {(alpha, rank): 0.01 * alpha**-0.5 * rank**0.2 for alpha in (4, 32, 128) for rank in (1, 8, 64)}
    samples = {
        sizes: sample_vertices(parabola(best, rates=rates_around(best, count=7))) for sizes, best in planted.items()
    }
    of_alpha, of_rank = powers(samples)
    assert of_alpha == pytest.approx((-0.5, -0.5, -0.5))
    assert of_rank == pytest.approx((0.2, 0.2, 0.2))
    one_alpha = {(rank,): of_size for (alpha, rank), of_size in samples.items() if alpha == 32}
    assert powers(one_alpha)[0] == pytest.approx(slope({rank: of_size for (rank,), of_size in one_alpha.items()}))


POWERS = {(size, size): np.full(3, size) for size in (2, 4, 8)}
FAILED = rows_of({(1e-3, 0): "The loss is nan in step 3."})
BOTH = pandas.concat([FAILED.assign(setup=setup) for setup in "ab"])
REFUSED = [  # the call, and what must be named
    (lambda: losses_by_rate(FAILED), "result for every seed"),
    (lambda: losses_by_rate(BOTH), r"\['a', 'b'\], but must have one"),
    (lambda: slope({}), r"sizes \[\]"),
    (lambda: slope({4: np.zeros(3)}), "sizes .*4"),
    (lambda: powers(POWERS), "sizes .*8, 8"),
]


@pytest.mark.parametrize(("call", "named"), REFUSED)
def test_what_gives_no_best_rate_is_refused_and_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
