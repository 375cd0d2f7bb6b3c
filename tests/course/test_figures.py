"""Figures of the lessons: the numbers that were given, labels, and what each is drawn to show."""

import matplotlib as mpl
import numpy as np
import pandas
import pytest
import torch

mpl.use("Agg")

from lora_lab import plots
from lora_lab.ablation.overfitting import summarise_trials
from lora_lab.costs.bill import MIB, PARTS
from lora_lab.costs.flops import Flops
from lora_lab.costs.timing import MEMORY, UPDATE
from lora_lab.course.figures import (
    as_good_as_full,
    did_it_learn,
    files_and_rounding,
    fine_tuning,
    forgetting,
    lora_from_scratch,
    low_rank,
    memory,
    overfitting,
    speed,
    training_wrote,
    variants,
    which_rank,
    which_rate,
)
from tests.helpers import LOSSES, PEAKED, STEP, bill, bounds, by_label, points, said, sweep


def test_a_circle_becomes_an_ellipse_and_without_its_second_direction_a_line():
    M = [[2, 3], [0, 2]]  # turns (1, 2) into 4 times (2, 1), and (2, -1) into (1, -2)
    for to_the_ellipse, second, lengths in ((1, 0, [4, 1, 4, 0]), (0, 0.5, [1, 1, 4, 0.5])):
        figure = low_rank.ellipse(M, to_the_ellipse, second)
        drawn = [line.get_xydata() for ax in figure.axes[1:] for line in ax.get_lines()[2:]]
        assert [np.hypot(*points[1]) for points in drawn] == pytest.approx(lengths, abs=1e-9)
        line = figure.axes[2].get_lines()[1].get_xydata()
        assert np.linalg.matrix_rank(line, tol=1e-6) == (2 if second else 1)
        assert abs(line @ [2, 1]).max() == pytest.approx(4 * 5**0.5, rel=1e-3)


def test_a_picture_of_a_rank_is_drawn_with_its_price_its_error_and_what_is_missing():
    figure = low_rank.approximation(torch.diag(torch.tensor([8.0, 6.0, 0.0, 0.0])), 1)
    kept, missing = (ax.images[0].get_array() for ax in figure.axes)
    assert (kept + missing - 128).diagonal().tolist() == pytest.approx([8, 6, 0, 0])
    assert figure.get_suptitle() == "50 % of the numbers leave an error of 60 %"


def test_small_matrices_are_drawn_on_one_scale_with_their_entries():
    figure = low_rank.numbers({"M": [[3, -1, 0], [2, 6, 1]], "term": np.full((2, 3), -6.0)})
    first, _ = figure.axes
    assert {text.get_text(): text.get_position() for text in first.texts}["2"] == (0, 1)  # x is the column
    assert {ax.images[0].get_clim() for ax in figure.axes} == {(-6, 6)}


def test_shares_by_rank_are_means_in_per_cent_with_a_band_from_min_to_max():
    shares = {"gain": {1: [0.5, 0.7], 8: [0.8, 1.0]}, "random directions": {1: [0.0, 0.1], 8: [0.1, 0.3]}}
    ax = low_rank.shares_by_rank(shares, "share of the gain (%)")
    gain, _ = ax.get_lines()
    assert points(gain) == [pytest.approx((1, 60)), pytest.approx((8, 90))]
    band = ax.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in band.round(6)} == {(1, 50), (1, 70), (8, 80), (8, 100)}


def test_setups_stand_side_by_side_above_and_below_full_fine_tuning():
    of_rank_1 = {60: (0.02, 0.01, 0.04), 240: (0.0, -0.03, 0.05)}
    of_rank_8 = {60: (-0.02, -0.03, -0.01), 240: (0.03, 0.01, 0.04)}
    ax = which_rank.behind_full({"LoRA r=1": of_rank_1, "LoRA r=8": of_rank_8}, 0.01, "nats")
    first, second = (np.array(bounds(container)) for container in ax.containers)
    assert second[:, 1:] == pytest.approx(np.array([of_rank_8[60], of_rank_8[240]]))
    assert (first[:, 0] < second[:, 0]).all()
    assert first[:, 0] * second[:, 0] == pytest.approx([60**2, 240**2])
    assert [by_label(ax)[level].get_ydata()[0] for level in ("full", "margin")] == [0, 0.01]


def test_the_schematic_states_shapes_scaling_and_the_count():
    ax = lora_from_scratch.schematic(rank=2, alpha=8)
    assert ax.get_title().startswith("LoRA trains 224 parameters beside 3,072 frozen ones (7%)")
    assert "$s$ = 8 / 2 = 4" in ax.get_title()
    assert [(box.get_height(), box.get_width()) for box in ax.patches] == [(48, 64), (48, 2), (2, 64)]  # W0, B, A


def test_the_scaling_of_the_schematic_is_written_the_larger_the_greater_it_is():
    drawn = {s: lora_from_scratch.schematic(rank=2, alpha=2 * s).texts for s in (2, 8)}
    small, large = (next(text for text in texts if text.get_text() == f"+ {s} ×") for s, texts in drawn.items())  # noqa: RUF001
    assert large.get_fontsize() > small.get_fontsize()


def test_a_filling_update_is_drawn_on_one_scale_below_the_losses_of_its_steps():
    products = {0: torch.zeros(2, 3), 2: torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.5, 0.0]])}
    loss, first, last, _ = lora_from_scratch.filling([3.0, 2.0, 1.0], products).axes
    assert [points(line) for line in loss.get_lines()[1:]] == [[(0, 3.0)], [(2, 1.0)]]
    assert first.images[0].get_clim() == last.images[0].get_clim()
    assert last.images[0].get_array().tolist() == products[2].tolist()


def test_a_postcard_shows_the_product_beside_its_factors_the_sentence_and_what_it_took():
    A, B = torch.eye(2, 3), torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    figure = lora_from_scratch.postcard("So it goes.", A, B, 1234, [3.25, 2, 0.5])
    drawn = {ax.get_xlabel() or ax.get_ylabel(): ax.images[0].get_array().tolist() for ax in figure.axes}
    assert drawn == {"$A$": A.tolist(), "$B$": B.tolist(), "$BA$": [[1, 0, 0], [2, 0, 0], [0, 3, 0], [0, 0, 0]]}
    assert figure.get_suptitle() == "“So it goes.”"
    assert figure.get_supxlabel() == "1,234 numbers, 3 steps, from 3.2 to 0.5 nats"


def test_what_a_merge_loses_has_a_point_for_each_layer_and_format():
    rows = [("float32", 0.02, 1e-6), ("float32", 0.04, 5e-7), ("bfloat16", 0.02, 0.1), ("bfloat16", 0.04, 0.05)]
    ax = files_and_rounding.lost_by_merging(pandas.DataFrame(rows, columns=["format", "size", "missing"]))
    assert [points(line) for line in ax.get_lines()] == [[row[1:] for row in rows[:2]], [row[1:] for row in rows[2:]]]
    assert said(ax.texts) == ["float32", "bfloat16"]


def test_every_part_of_a_bill_is_of_one_of_five_kinds():
    kinds = memory.by_kind({part: 2**i for i, part in enumerate(PARTS)})
    assert sum(kinds.values()) == 2 ** len(PARTS) - 1
    assert kinds[memory.WEIGHTS] == 0b11
    assert kinds[memory.STORED] == sum(2**i for i, part in enumerate(PARTS) if "saved" in part or "recomputed" in part)


def test_steps_are_drawn_on_one_scale_under_a_budget_that_they_fit_or_not():
    figure = memory.memory_of_steps({"large": PEAKED, "small": bill(STEP, frozen=10, mlp=4, loss=2)}, 16 * MIB)
    large, small = figure.axes
    assert {ax.get_ylim() for ax in figure.axes} == {(0, 1.12 * 17)}
    assert said(large.texts) == ["peak 17"]
    assert figure.get_suptitle() == "16 MiB: large does not fit, small fits"
    assert [level.get_label() for level in large.get_lines() if not level.get_label().startswith("_")] == ["budget"]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in small.collections]
    assert tops == [10, 10, 10, 14, 17]  # weights, state, gradients, activations, logits
    assert said(small.get_xticklabels()) == ["forward →", "backward →"]


def test_a_block_is_drawn_with_a_bar_for_what_each_method_stores():
    figure = memory.saved_in_a_block(
        {"norm": ("scales", 10, 5, 0), "add": ("adds", 0, 0, 0), "down": ("a layer", 20, 0, 2)}
    )
    left, right = figure.axes
    bars = [bar.get_width() for container in right.containers for bar in container]
    assert bars == [10, 0, 20, 5, 0, 0, 0, 0, 2]  # with both, with full alone, with LoRA alone
    assert [text.strip() for text in said(right.texts)] == ["10 + 5", "", "20 + 2"]
    boxes = {text.get_text(): text.get_bbox_patch() for text in left.texts}
    edges = {name: mpl.colors.to_hex(box.get_edgecolor()) for name, box in boxes.items() if box}
    assert [name for name in edges if edges[name] == plots.METHOD_COLOURS["lora"]] == ["down"]


def test_peaks_are_bars_of_the_five_kinds():
    ax = memory.peaks({"a": bill(frozen=10, mlp=4), "b": bill(frozen=10, state=3)})
    assert said(ax.texts) == ["14", "13"]
    assert [container.get_label() for container in ax.containers] == list(memory.LOOKS)


def test_the_passes_of_a_step_are_as_long_as_their_flops_and_what_is_gone_is_an_empty_box():
    def step(**counts):
        return Flops({tuple(name.split("_")): int(size * 1e9) for name, size in counts.items()}, 4, "")

    both = {"layers_forward": 60, "head_input gradients": 70}
    adapters = {"adapters_forward": 4, "adapters_input gradients": 3, "adapters_weight gradients": 3}
    ax = speed.passes({"full": step(**both, **{"layers_weight gradients": 50}), "LoRA": step(**both, **adapters)})
    bars = [(round(bar.get_x(), 3), round(bar.get_width(), 3)) for container in ax.containers for bar in container]
    assert bars == [(0, 60), (60, 70), (130, 0), (130, 50), (0, 60), (60, 70), (130, 10), (140, 50)]
    filled = [bar.get_facecolor()[3] > 0 for container in ax.containers for bar in container]
    assert filled == [True] * 7 + [False]
    texts = [text.get_text().strip() for text in ax.texts]
    assert texts == ["60", "70", "50", "180", "60", "70", "10", "gone: 50", "140 (0.78)"]


def test_published_ratios_are_drawn_beside_what_flops_allow():
    ax = speed.published({"a": 0.5, "b": 1.2}, 2 / 3)
    (points,) = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert list(points.get_xdata()) == [0.5, 1.2]
    assert [line.get_xdata()[0] for line in ax.get_lines() if line is not points] == [2 / 3, 1]


def test_starts_are_arrows_from_the_loss_before_training_to_the_loss_after():
    ax = fine_tuning.from_start_to_end({"from scratch": (10.0, 7.0), "fine-tuned": (3.0, 2.5)}, vocabulary=20_000)
    arrows = [(text.arrow_patch is not None, text.xyann, text.xy) for text in ax.texts if text.get_text() == ""]
    assert arrows == [(True, (10.0, 0), (7.0, 0)), (True, (3.0, 1), (2.5, 1))]
    assert [text.strip() for text in said(ax.texts) if text][:2] == ["begins at 10.0", "ends at 7.00"]
    (above,) = [other for other in ax.figure.axes if other is not ax]
    assert above.get_xlim() == ax.get_xlim()
    assert above.get_xticks() == pytest.approx(np.log([1, 10, 100, 1000, 10000]))


def test_right_answers_have_a_line_at_the_baseline_and_their_range():
    ax = fine_tuning.right_answers(
        {"zero-shot": [28], "bag of words": [38], "fine-tuned": [54, 55, 54]}, "bag of words", 69
    )
    assert said(ax.texts) == ["28", "38", "54 to 55"]
    assert said(ax.get_yticklabels()) == ["zero-shot", "bag of words", "fine-tuned"]
    assert [list(line.get_xdata()) for line in ax.get_lines()] == [[28], [38], [54, 55, 54], [38, 38]]


def test_a_head_start_is_filled_in_the_winners_colour_where_the_bounds_exclude_zero():
    rows = [("moved", "MLP", 9, 5, 14), ("moved", "small", -8, -13, -3), ("inverted", "MLP", 1, -2, 4)]
    ax = fine_tuning.head_starts(
        pandas.DataFrame(rows, columns=["data", "model", "points", "points_lower", "points_upper"])
    )
    marks = [container.lines[0] for container in ax.containers]
    assert [mark.get_fillstyle() for mark in marks] == ["full", "full", "none"]
    assert [mark.get_color() for mark in marks] == [
        plots.METHOD_COLOURS[name] for name in ("full", "scratch", "chance")
    ]
    spans = [container.lines[2][0].get_segments()[0][:, 0].tolist() for container in ax.containers]
    assert spans == [[5, 14], [-13, -3], [-2, 4]]


def test_a_ring_is_around_the_rate_that_was_chosen():
    right = {"from scratch": {1e-3: [0.1, 0.3], 3e-3: [0.5, 0.7]}, "fine-tuned": {1e-3: [0.6, 0.6], 3e-3: [0.4, 0.6]}}
    ax = fine_tuning.by_rate(right, {"from scratch": 3e-3, "fine-tuned": 1e-3})
    rings = [points(line)[0] for line in ax.get_lines() if line.get_markersize() == 16]
    assert rings == [pytest.approx((3e-3, 60)), pytest.approx((1e-3, 60))]


def test_time_stands_beside_flops_with_the_larger_number_on_top():
    ax = speed.time_and_flops({"1": (0.7, 0.6, 0.5, 0.65), "8": (0.7, 0.9, 0.8, 1.1)}, "rank")
    assert by_label(ax)["LoRA: arithmetic (FLOPs)"].get_ydata().tolist() == [0.7, 0.7]
    assert [(text.get_text(), text.xy[1]) for text in ax.texts] == [
        ("0.60", 0.5),
        ("0.70", 0.7),
        ("0.90", 1.1),
        ("0.70", 0.7),
    ]
    assert [text.get_va() for text in ax.texts] == ["top", "bottom", "bottom", "top"]


def test_a_predicted_step_is_split_into_products_memory_and_optimiser_beside_its_measurement():
    ax = speed.causes({"full": {"forward": 0.1, "head": 0.1, MEMORY: 0.05, UPDATE: 0.2}, "LoRA": {}}, {"full": 0.4})
    bars = [(bar.get_x(), bar.get_width()) for container in ax.containers for bar in container]
    assert bars[:3] == [pytest.approx((0, 200)), pytest.approx((200, 50)), pytest.approx((250, 200))]
    assert [line.get_xdata().tolist() for line in ax.get_lines()] == [[400], []]


def test_the_winner_at_one_rate_for_all_is_starred_beside_each_rank_at_its_own_best():
    losses = {1: {0.001: 3.0, 0.002: 2.0}, 8: {0.001: 1.5, 0.002: 2.5}, 64: {0.001: 1.0}}
    ax = which_rank.at_one_rate(losses, 0.002, "nats")
    at_rate, star, own = map(points, ax.get_lines())
    assert at_rate == [(1, 2.0), (8, 2.5)]
    assert star == [(1, 2.0)]
    assert own == [(1, 2.0), (8, 1.5), (64, 1.0)]
    assert '"rank 1 is the best!"' in ax.get_title()


def test_a_valley_has_the_mean_of_the_seeds_with_bars_to_the_lowest_and_the_highest():
    losses = {0.001: np.array([[1.0, 3.0], [4.0, 4.0]]), 0.002: np.array([[1.0, 1.0], [1.0, 1.0]])}
    (container,) = which_rate.valleys({"full": losses}, "nats").containers
    assert np.array(bounds(container)) == pytest.approx(np.array([[0.001, 3, 2, 4], [0.002, 1, 1, 1]]))


def test_several_best_rates_may_share_a_setting():
    pairs = {"full": [(60, 0.001), (240, 0.003)], "at 60": [(60, 0.001), (60, 0.003)]}
    ax = which_rate.best_rates(pairs, "steps", "rate")
    assert [points(line) for line in ax.get_lines()] == [[(60, 0.001), (240, 0.003)], [(60, 0.001), (60, 0.003)]]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def run(setup, lr, seed, validation, training):
    """The rows of one trial, evaluated every ten steps; before training there is no training loss."""
    gaps = [np.nan, *np.subtract(validation[1:], training)]
    rows = {"step": [10 * i for i in range(len(validation))], "validation_loss": validation, "gap": gaps}
    return pandas.DataFrame({"setup": setup, "lr": lr, "seed": seed, "outcome": "done"} | rows)


def test_a_training_curve_is_marked_with_its_lowest_loss_its_rise_and_its_gap():
    rows = pandas.concat(
        [
            run("full", 1e-3, 0, [3.0, 1.0, 1.5, 2.0], [1.5, 0.5, 0.25]),
            run("full", 1e-3, 1, [4.0, 2.0, 1.5, 3.0], [2.5, 1.5, 0.25]),
        ]
    )
    ax = overfitting.training_curve(rows, 5, "bits")
    lines = by_label(ax)
    assert points(lines["validation loss"]) == [(0, 3.5), (2, 1.5), (4, 1.5), (6, 2.5)]
    assert points(lines["training loss"]) == [(2, 2.0), (4, 1.0), (6, 0.25)]
    assert points(lines["validation loss before training"]) == [(0, 3.5), (6, 3.5)]
    (dot,) = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]
    assert points(dot) == [(2, 1.5)]
    assert {text.get_text() for text in ax.texts} >= {"lowest: 1.50\nepoch 2", "rise 1.00", "gap 2.25"}


TWO_METHODS = pandas.concat(
    [
        run("full", 1e-3, 0, [3.0, 1.0, 1.5], [1.0, 0.5]),
        run("full", 1e-3, 1, [3.0, 1.0, 2.5], [1.0, 0.5]),
        run("full", 1e-2, 0, [3.0, 0.5, 4.5], [1.0, 0.5]),
        run("LoRA r=8", 1e-3, 0, [3.0, 2.0, 1.0], [2.0, 1.0]),
        run("LoRA r=8", 1e-2, 0, [3.0, 1.0, 3.5], [1.0, 0.25]),
        run("LoRA r=1", 1e-2, 0, [3.0, 1.0, 2.0], [1.0, 0.25]),
    ],
    ignore_index=True,
)


def test_a_headline_follows_the_rates_that_were_picked():
    titles = {}
    for rates in ((1e-3, 1e-3), (1e-2, 1e-2), (1e-3, 1e-2)):
        ax = overfitting.rigged(TWO_METHODS, dict(zip(("full", "LoRA r=8"), rates, strict=True)))
        titles[rates] = ax.get_title()
    assert titles == {
        (1e-3, 1e-3): '"LoRA r=8 overfits LESS than full!"',
        (1e-2, 1e-2): '"LoRA r=8 overfits LESS than full!"',
        (1e-3, 1e-2): '"LoRA r=8 overfits MORE than full!"',
    }


def test_the_lowest_loss_and_the_rise_are_drawn_by_rate():
    lines = by_label(overfitting.lowest_and_rise(summarise_trials(TWO_METHODS.assign(off_domain_loss=1.0))))
    assert points(lines["full: lowest loss"]) == [(1e-3, 1.0), (1e-2, 0.5)]
    assert points(lines["full: rise after it"]) == [(1e-3, 1.0), (1e-2, 4.0)]
    assert points(lines["LoRA r=8: rise after it"]) == [(1e-3, 0.0), (1e-2, 2.5)]


def test_validation_losses_are_drawn_by_epoch_and_by_training_loss():
    left, right = overfitting.two_views(TWO_METHODS[TWO_METHODS.lr == 1e-2], 10, "bits", 0.7).axes
    assert points(by_label(left)["full"]) == [(0, 3.0), (1, 0.5), (2, 4.5)]
    full, lora, _, marked = right.get_lines()
    assert points(full)[1] == (0.75, 0.5)  # between the means 1 and 0.5; at the last there is none
    assert points(lora)[1] == (0.625, 1.0)
    assert np.isnan([line.get_xdata()[[0, 2]] for line in (full, lora)]).all()
    assert marked.get_xdata() == [0.7, 0.7]
    assert right.xaxis_inverted()


def test_a_weaker_adapter_is_drawn_in_shares_of_what_it_is_at_full_strength():
    ax = forgetting.by_strength({0.0: 0.0, 0.5: 0.9, 1.0: 1.2}, {0.0: 0.0, 0.5: 0.1, 1.0: 0.4})
    lines = by_label(ax)
    assert lines["learned"].get_ydata() == pytest.approx([0, 75, 100])
    assert lines["forgotten"].get_ydata() == pytest.approx([0, 25, 100])
    assert lines["forgotten"].get_xdata().tolist() == [0, 0.5, 1]


def test_fronts_show_what_is_forgotten_over_what_is_learned_in_the_colours_of_the_methods():
    lines = by_label(forgetting.fronts({"full": ([0.1, 0.2], [0.3, 0.5]), "blocks": ([0.1], [0.2])}))
    assert lines["full"].get_xydata().tolist() == [[0.1, 0.3], [0.2, 0.5]]
    assert lines["full"].get_color() == plots.METHOD_COLOURS["full"]
    assert lines["blocks"].get_color() == plots.METHOD_COLOURS["partial"]


def test_remedies_are_drawn_around_a_star_with_a_mark_for_each_model_and_the_mean():
    ax = forgetting.remedies({"half its strength": [(0.0, -0.1), (0.2, -0.3)], "replay": [(0.0, 0.1)]})
    star, each, mean, *_ = ax.get_lines()
    assert star.get_xydata().tolist() == [[0, 0]]
    assert each.get_xydata().tolist() == [[0.0, -0.1], [0.2, -0.3]]
    assert mean.get_xydata()[0] == pytest.approx([0.1, -0.2])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["as trained", "half its strength", "replay"]


def test_runs_are_drawn_by_their_distance_from_the_base_and_what_they_have_forgotten():
    marks = by_label(forgetting.predicts({"LoRA r=8": ([0.1, 0.3], [0.2, 0.4])}))["LoRA r=8"]
    assert marks.get_xydata().tolist() == [[0.1, 0.2], [0.3, 0.4]]
    assert marks.get_linestyle() == "None"


def test_right_answers_are_drawn_against_the_loss_beside_a_line_at_that_of_guessing():
    seeds = {"base": [(2.0, 0.4)], "scratch": [(0.5, 0.3), (0.7, 0.5)], "LoRA r=8": [(0.4, 0.8)]}
    ax = did_it_learn.loss_and_accuracy(seeds, guessing=0.55)
    guess, *setups = ax.get_lines()
    assert list(guess.get_xdata()) == [0.55, 0.55]
    assert [points(line) for line in setups] == [[(2, 40)], [(0.5, 30), (0.7, 50)], [(0.4, 80)]]
    assert said(ax.texts)[1:] == ["base", "scratch", "LoRA r=8"]


def test_ways_to_answer_have_a_mark_for_each_seed_and_a_bar_for_few_texts():
    ax = did_it_learn.contenders({"commonest answer": ("chance", [0.5]), "LoRA r=8": ("lora", [0.7, 0.9])}, 100)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["commonest answer", "LoRA r=8"]
    seeds = [list(line.get_xdata()) for line in ax.get_lines() if line.get_marker() == "o"]
    assert seeds == [[50], pytest.approx([70, 90])]
    bars = [container.lines[2][0].get_segments()[0][:, 0].tolist() for container in ax.containers]
    assert bars == [pytest.approx([50 - 9.8, 50 + 9.8]), pytest.approx([80 - 7.84, 80 + 7.84])]


@pytest.mark.parametrize(
    ("rate", "absent", "order", "texts"),
    [
        (0.01, ["LoRA+"], ["LoRA", "DoRA"], [" no run at this rate", " 0.85", " 0.45 (-47%)"]),
        (0.02, [], ["DoRA", "LoRA", "LoRA+"], [" 0.80 (+60%)", " 0.50", " 0.32 (-35%)"]),
    ],
)
def test_methods_are_ranked_at_the_common_rate_from_the_worst_below_to_the_best_on_top(rate, absent, order, texts):
    figure = variants.at_common_rate(sweep(LOSSES), rate, "rate")
    left, right = figure.axes
    assert said(right.get_yticklabels()) == [*absent, *order]
    assert said(right.texts) == texts
    widths = [bar.get_width() for bar in right.patches[len(absent) :]]
    assert widths == sorted(widths, reverse=True)
    assert f"At {rate:g}, {order[-1]} is ahead" in right.get_title()
    assert rate in [line.get_xdata()[0] for line in left.get_lines()]


def test_differences_have_a_row_for_each_method_and_a_mark_for_each_case():
    rows = [("PiSSA", "low", -40, -65, -20), ("DoRA", "low", -4, -7, -2), ("PiSSA", "tuned", 3, 1, 5)]
    table = pandas.DataFrame(rows, columns=["setup", "case", "difference", "lower", "upper"])
    ax = variants.differences(table, "difference (%)", margin=2)
    assert said(ax.get_yticklabels()) == ["PiSSA", "DoRA"]
    low, tuned = ax.containers
    assert low.lines[0].get_xdata().tolist() == [-40, -4]
    assert [bar[:, 0].tolist() for bar in low.lines[2][0].get_segments()] == [[-65, -20], [-7, -2]]
    assert tuned.lines[0].get_xdata().tolist() == [3]


def test_energy_ranks_are_medians_with_a_bar_for_each_kind_of_labels_and_one_for_noise():
    counts = {"full fine-tuning": [[9, 11, 10], [5, 5, 4]], "LoRA rank 8": [[3, 4, 4], [1, 1, 2]]}
    full, lora = training_wrote.energy_ranks(counts, ["true labels", "random labels"], [65.0, 7.0]).axes
    assert [bar.get_width() for bar in full.patches] == [10, 5, 65]
    assert [bar.get_width() for bar in lora.patches] == [4, 1, 7]
    colours = [mpl.colors.to_hex(ax.patches[0].get_facecolor()) for ax in (full, lora)]
    assert colours == [plots.METHOD_COLOURS["full"], plots.METHOD_COLOURS["lora"]]


def test_two_cuts_are_drawn_between_the_base_and_the_uncut_net():
    right = pandas.DataFrame({"only these": [58.0, 94.0], "all but these": [84.0, 46.0]}, index=[1, 8])
    only, rest, base, uncut = training_wrote.two_cuts(right, {"base": 43.0, "true labels": 96.0}).get_lines()
    assert [points(line) for line in (only, rest)] == [[(1, 58), (8, 94)], [(1, 84), (8, 46)]]
    assert (base.get_ydata()[0], uncut.get_ydata()[0]) == (43, 96)


def test_agreement_is_drawn_against_the_number_of_directions_beside_chance():
    lines = {"true labels": torch.linspace(1, 0.5, 6), "random labels": torch.linspace(0.2, 0.4, 6)}
    figure = training_wrote.agreement({"first": lines, "second": lines}, {"first": 12, "second": 24})
    for ax, width in zip(figure.axes, (12, 24), strict=True):
        true, random, chance = ax.get_lines()
        assert true.get_ydata().tolist() == lines["true labels"].tolist()
        assert random.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
        assert chance.get_ydata().tolist() == pytest.approx([k / width for k in range(1, 7)])


def test_differences_are_means_with_bounds_and_a_mark_for_each_seed_around_zero_and_the_margin():
    rows = {"LoRA r=64": {"60 steps": (np.array([-0.04, 0.0]), (-0.05, 0.01)), "240 steps": (np.zeros(2), (-0.1, 0.1))}}
    rows |= {"LoRA r=1": {"60 steps": (np.full(2, 0.2), (0.1, 0.3))}}
    ax = as_good_as_full.differences(rows, 0.01, "nats")
    assert said(ax.get_yticklabels()) == ["60 steps", "240 steps", "60 steps"]
    assert [container.lines[0].get_xdata()[0] for container in ax.containers] == pytest.approx([-0.02, 0, 0.2])
    ends = [container.lines[2][0].get_segments()[0][:, 0].tolist() for container in ax.containers]
    assert ends == [pytest.approx(each) for each in ((-0.05, 0.01), (-0.1, 0.1), (0.1, 0.3))]
    marks = [line.get_xdata().tolist() for line in ax.get_lines() if line.get_fillstyle() == "none"]
    assert marks == [[-0.04, 0.0], [0.0, 0.0], [0.2, 0.2]]
    assert sorted(ax.get_legend_handles_labels()[1]) == ["LoRA r=1", "LoRA r=64", "margin"]
    (band,) = ax.patches
    assert (band.get_x(), band.get_width()) == pytest.approx((-0.01, 0.02))


def test_lowest_losses_by_examples_are_means_beside_the_runs():
    rows = [(size, "full", loss) for size, loss in ((64, 3.0), (64, 3.2), (256, 2.5), (256, 2.7))]
    ax = as_good_as_full.by_examples(pandas.DataFrame(rows, columns=["n_train", "setup", "best_loss"]))
    assert points(by_label(ax)["full"]) == [pytest.approx((64, 3.1)), pytest.approx((256, 2.6))]
    assert sorted(ax.get_lines()[1].get_ydata()) == [2.5, 2.7, 3.0, 3.2]
