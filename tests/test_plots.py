"""Pictures: labels with units, the numbers that were given, and files that are whole."""

import matplotlib as mpl
import numpy as np
import pandas
import pytest
import torch

mpl.use("Agg")

from lora_lab import LoRA, LoRALinear, plots
from lora_lab.ablation.stats import BestRate
from lora_lab.costs.bill import MIB, PARTS, Bill
from lora_lab.history import COLUMNS, History
from lora_lab.methods import Method
from tests.helpers import LOSSES, PNG, bill, bounds, by_label, legend, points, said, sweep


def history(validation, method="full"):
    rows = [
        {**dict.fromkeys(COLUMNS), "step": step, "train_loss": step, "validation_loss": v}
        for step, v in enumerate(validation)
    ]
    return History({"name": "t"}, {"name": method}, {}, 1, 1, rows=rows)


RUNS = {"LoRA r=8": history([3.0, None, 2.0, 1.5]), "full": history([3.0, None, 1.0, 1.25])}


def test_curves_draw_each_run_where_it_has_values():
    ax = plots.curves(RUNS)
    assert (ax.get_ylabel(), legend(ax)) == ("validation loss (nats per token)", ["LoRA r=8", "full"])
    first, second = ax.get_lines()
    assert points(first) == [(0, 3.0), (2, 2.0), (3, 1.5)]
    assert points(second) == [(0, 3.0), (2, 1.0), (3, 1.25)]
    assert (first.get_color(), first.get_marker()) != (second.get_color(), second.get_marker())


FULL, LORA, SCRATCH = (plots.METHOD_COLOURS[name] for name in ("full", "lora", "scratch"))


@pytest.mark.parametrize(
    ("methods", "colours"),
    [
        ({"b": "lora", "a": "full"}, [LORA, FULL]),
        ({"from scratch": "full", "fine-tuned": "full"}, [SCRATCH, FULL]),
        *(({"b": "lora", "a": "full", "c": third}, [*plots.COLOURS[:3]]) for third in ("lora", "unknown")),
    ],
)
def test_curves_have_the_colours_of_different_methods_or_of_their_labels_or_others_in_turn(methods, colours):
    ax = plots.curves({label: history([1.0], method) for label, method in methods.items()})
    assert [line.get_color() for line in ax.get_lines()] == colours


def test_every_method_has_a_colour_of_its_own():
    def names(kind):
        return {vars(kind).get("name")}.union(*map(names, kind.__subclasses__())) - {None}

    drawn = plots.METHOD_COLOURS.keys() - {"scratch", "chance"}  # a model without pre-training, and noise
    ours = {name for name, kind in LoRA.by_name.items() if kind.__module__.startswith("lora_lab")}
    assert {name for name in names(Method) if "test" not in name} >= drawn >= {"full", *ours}
    assert len(set(plots.METHOD_COLOURS.values())) == len(plots.METHOD_COLOURS)


def test_labels_of_one_method_share_its_colour_and_ranks_are_a_ramp_from_light_to_dark():
    styles = plots.line_styles(
        ["full", "LoRA r=1", "LoRA r=8", "LoRA r=64", "rank 256", "head", "linear probe", "zero-shot", "few-shot"]
    )
    colour = {label: style["color"] for label, style in styles.items()}
    assert colour["full"] == FULL
    assert colour["head"] == colour["linear probe"] == plots.METHOD_COLOURS["partial"]
    assert colour["zero-shot"] == colour["few-shot"] == plots.METHOD_COLOURS["as it is"]
    for one, other in (("head", "linear probe"), ("zero-shot", "few-shot")):
        assert styles[one]["marker"] != styles[other]["marker"]
    light = [sum(mpl.colors.to_rgb(colour[label])) for label in ("LoRA r=1", "LoRA r=8", "LoRA r=64", "rank 256")]
    assert light == sorted(set(light), reverse=True)
    # A rank looks the same whatever others are drawn, and LoRA's own colour is that of rank 8.
    alone = plots.line_styles(["rank 64", "LoRA", "rank 1"])
    assert [style["color"] for style in alone.values()] == [colour[f"LoRA r={rank}"] for rank in (64, 8, 1)]


def test_answers_are_bubbles_in_the_colours_of_their_methods_and_no_word_is_lost():
    long = " ".join(f"word{i}" for i in range(40))
    figure = plots.answers("Why?", {"base": "Because.", "with the adapter": long})
    (ax,) = figure.axes
    assert " ".join(text.get_text() for text in ax.texts).split() == [
        *("you", "Why?", "base", "Because.", "with", "the", "adapter", *long.split())
    ]
    edges = [mpl.colors.to_hex(box.get_edgecolor()) for box in ax.patches]
    assert edges[1:] == [plots.METHOD_COLOURS["as it is"], LORA]
    bottoms = [box.get_y() + box.get_height() for box in ax.patches]
    assert all(bottom < box.get_y() for bottom, box in zip(bottoms, ax.patches[1:], strict=False))


def test_the_matrices_of_a_layer_are_drawn_with_their_numbers():
    layer = LoRALinear(torch.nn.Linear(6, 5), 2, 4.0)
    torch.nn.init.ones_(layer.lora_B)
    axes = {ax.get_title(): ax for ax in plots.matrices(layer).axes if ax.get_title()}
    assert list(axes) == ["$A$ (2 x 6)", "$W_0$, frozen (5 x 6)", "$B$ (5 x 2)", "update: 2 $B A$ (5 x 6)"]
    shown = axes["update: 2 $B A$ (5 x 6)"].images[0].get_array()
    np.testing.assert_allclose(shown, layer.delta().detach().numpy())


def test_a_spectrum_is_divided_by_its_largest_value():
    ax = plots.spectrum({"weight": [8.0, 4.0, 1.0], "noise": np.array([2.0, 1.0])})
    assert (ax.get_yscale(), legend(ax)) == ("log", ["weight", "noise"])
    assert [points(line) for line in ax.get_lines()] == [[(1, 1.0), (2, 0.5), (3, 0.125)], [(1, 1.0), (2, 0.5)]]


def test_bills_are_stacked_in_mebibytes_in_the_order_of_the_parts_with_the_peak_above():
    found = {"LoRA": bill(frozen=512, mlp=64, norms=16), "full": bill(state=2048, mlp=64.5)}
    ax = plots.bills(found)
    assert said(ax.get_xticklabels()) == ["LoRA", "full"]
    assert legend(ax) == ["saved: norms", "saved: MLP", "optimiser state", "frozen weights"]  # from the top
    drawn = {c.get_label(): [(bar.get_y(), bar.get_height()) for bar in c] for c in ax.containers}
    assert drawn == {
        "frozen weights": [(0.0, 512.0), (0.0, 0.0)],
        "optimiser state": [(512.0, 0.0), (0.0, 2048.0)],
        "saved: MLP": [(512.0, 64.0), (2048.0, 64.5)],
        "saved: norms": [(576.0, 16.0), (2112.5, 0.0)],
    }


def test_every_part_of_a_bill_has_a_look_of_its_own_the_same_in_every_figure():
    ax = plots.bills({"all": Bill(dict.fromkeys(PARTS, MIB), "backward", "predicted", "a")})
    assert legend(ax) == list(reversed(PARTS))
    looks = {c.get_label(): (c[0].get_facecolor(), c[0].get_hatch()) for c in ax.containers}
    assert len(set(looks.values())) == len(PARTS) == len(looks)
    saved = [part for part in PARTS if part.startswith("saved: ")]
    assert len({looks[part][0] for part in saved}) == 1  # one colour, five hatches
    assert len({looks[part][1] for part in saved}) == len(saved)


def test_bills_beside_a_card_state_which_of_them_fit():
    ax = plots.bills({"full": bill(frozen=3000), "LoRA": bill(frozen=1000)}, card_bytes=2048 * MIB)
    assert ax.get_title() == "A card of 2 GiB: full does not fit, LoRA fits"
    assert [line.get_ydata()[0] for line in ax.get_lines()] == [2048]
    assert "card of 2 GiB" in legend(ax)
    exact = plots.bills({"LoRA": bill(frozen=2048)}, card_bytes=2048 * MIB)
    assert exact.get_title() == "A card of 2 GiB: LoRA fits"


def test_ratios_have_intervals_lines_to_compare_with_and_markers_alone_beside_a_curve():
    ax = plots.ratios({"here": {32: (0.5, 0.4, 0.7), 128: (0.8, 0.8, 0.8)}, "record": {32: 0.6}}, "ratio", {"equal": 1})
    assert set(legend(ax)) == {"here", "record", "equal"}
    assert said(ax.get_xticklabels()) == ["32", "128"]
    assert bounds(ax.containers[0]) == [(32, 0.5, 0.4, 0.7), (128, 0.8, 0.8, 0.8)]
    assert ax.containers[0][0].get_linestyle() == "-"


# Layers of two shapes: noise has a stable rank of about 100 in one and of about 10 in the other.
REPORT = pandas.DataFrame(
    [
        *((depth, "q_proj", 50.0 + depth, 95.0, 105.0) for depth in range(3)),
        *((depth, "v_proj", 2.0 + depth, 9.0, 11.0) for depth in range(3)),
        (None, "lm_head", 1.0, 0.1, 900.0),
    ],
    columns=["depth", "kind", "stable_rank", "stable_rank_low", "stable_rank_high"],
).astype({"depth": "Int64"})


@pytest.mark.slow
def test_a_statistic_over_depth_is_divided_by_the_null_of_its_own_layer():
    """One band around 1 for all shapes. The union of their bands would hold layers that are far below their own."""
    ax = plots.by_depth(REPORT)
    assert legend(ax) == ["v_proj", "q_proj", "noise, 95 %"]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in ax.get_lines()}
    assert drawn["q_proj"] == pytest.approx([0.50, 0.51, 0.52])
    assert drawn["v_proj"] == pytest.approx([0.2, 0.3, 0.4])
    (band,) = ax.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((0.9, 1.1))  # of the widest, v_proj's
    assert "noise" in ax.get_ylabel()


def test_medians_over_depth_have_a_band_from_the_least_layer_of_a_block_to_the_most():
    other = REPORT.assign(stable_rank=REPORT.stable_rank / 2)
    ax = plots.medians_by_depth({"LoRA r=8": REPORT, "random targets": other})
    assert len(ax.patches) == 1  # noise is drawn once
    first, second = ax.get_lines()
    assert first.get_ydata().tolist() == pytest.approx([0.35, 0.405, 0.46])
    assert second.get_ydata().tolist() == pytest.approx([0.175, 0.2025, 0.23])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.2, 0.52))
    assert second.get_color() == plots.METHOD_COLOURS["as it is"]


def test_what_cuts_leave_has_a_line_for_each_setup_and_column_and_bars_where_there_are_seeds():
    rows = [
        ("full", 4, 80.0, 50.0, 70.0, 85.0),
        ("full", 1, 30.0, 20.0, 10.0, 40.0),
        ("LoRA r=8", 1, 60.0, 50.0, 55, 65),
    ]
    table = pandas.DataFrame(rows, columns=["setup", "rank", "gain", "energy", "least", "most"])
    ax = plots.after_truncation(table, "left (%)")
    assert set(legend(ax)) == {f"{setup}: {column}" for setup in ("full", "LoRA r=8") for column in ("gain", "energy")}
    assert bounds(ax.containers[0]) == [(1, 30.0, 10.0, 40.0), (4, 80.0, 70.0, 85.0)]
    gain, energy = ax.containers[0].lines[0], by_label(ax)["full: energy"]
    assert energy.get_ydata().tolist() == [20.0, 50.0]
    assert energy.get_color() == gain.get_color()
    assert energy.get_linestyle() != gain.get_linestyle()
    assert not plots.after_truncation(table.drop(columns=["least", "most"]), "left (%)", ["gain"]).containers


def walk(setup, lr, seed, validation, off_domain):
    """The rows of one trial, evaluated every ten steps."""
    steps = [10.0 * i for i in range(len(validation))]
    columns = {"step": steps, "validation_loss": validation, "off_domain_loss": off_domain}
    return pandas.DataFrame({"setup": setup, "lr": lr, "seed": seed, "outcome": "done", **columns})


WALKS = pandas.concat(
    [
        walk("LoRA", 1e-2, 0, [4.0, 2.0, 1.0, 2.0], [1.0, 1.5, 2.0, 4.0]),
        walk("LoRA", 1e-2, 1, [6.0, 4.0, 3.0, 1.0], [3.0, 3.5, 4.0, 5.0]),
        walk("LoRA", 1e-2, 2, [99.0, 99.0, 99.0, 99.0], [99.0, 0.0, 0.0, 0.0]),  # not among the best
        walk("LoRA", 1e-3, 0, [9.0, 9.0, 9.0, 9.0], [9.0, 8.0, 7.0, 6.0]),  # another rate
        walk("full", 1e-3, 0, [4.0, 1.0, 3.0, 5.0], [1.0, 2.0, 4.0, 8.0]),
        walk("full", 1e-3, 1, [6.0, 3.0, 1.0, 3.0], [1.0, 4.0, 6.0, 8.0]),
    ],
    ignore_index=True,
)
BEST = pandas.DataFrame(
    {"setup": ["LoRA", "LoRA", "full", "full"], "lr": [1e-2, 1e-2, 1e-3, 1e-3], "seed": [0, 1] * 2}
    | {"best_loss": [1.0, 1.0, 1.0, 2.0], "forgotten": [1.0, 2.0, 1.0, 4.0]}
)


def test_a_path_leads_from_the_start_to_the_hollow_end_past_a_filled_mark_where_early_stopping_stops():
    lines = plots.paths(WALKS, BEST).get_lines()
    drawn = [points(line) for line in lines]  # of each method: star, path, filled mark, hollow mark
    # The filled mark is the mean of the trials at their own best steps, which is no point of the path.
    assert drawn[:4] == [[(0, 5.0)], [(0.0, 5.0), (0.5, 3.0), (1.0, 2.0), (2.5, 1.5)], [(1.5, 1.0)], [(2.5, 1.5)]]
    assert drawn[4:] == [[(0, 5.0)], [(0.0, 5.0), (2.0, 2.0), (4.0, 2.0), (7.0, 4.0)], [(2.5, 1.5)], [(7.0, 4.0)]]


def test_paths_of_each_size_have_a_panel_and_one_legend():
    both = pandas.concat([WALKS.assign(n_train=64), WALKS.assign(n_train=1024, validation_loss=1.0)])
    best = pandas.concat([BEST.assign(n_train=1024), BEST.assign(n_train=64)])
    left, right = plots.paths_by_size(both, best, "bits", level=2.5).axes
    assert [ax.get_title() for ax in (left, right)] == ["64 examples", "1,024 examples"]
    assert (left.get_ylabel(), right.get_ylabel(), left.get_legend()) == ("validation loss (bits)", "", None)
    for ax, losses in ((left, {5.0, 3.0, 2.0, 1.5}), (right, {1.0})):
        assert set(ax.get_lines()[1].get_ydata()) == losses
        assert list(ax.get_lines()[-1].get_xdata()) == [2.5, 2.5]
    assert not [line for line in plots.paths_by_size(both, best).axes[0].get_lines() if len(line.get_xdata()) == 2]


SIZES = pandas.DataFrame(
    [
        {"n_train": 16, "setup": "full", "mean": 2.0, "least": 1.5, "most": 2.25},
        {"n_train": 16, "setup": "LoRA", "mean": 1.0, "least": 0.5, "most": 3.0},
        {"n_train": 1024, "setup": "full", "mean": 0.5, "least": 0.25, "most": 0.75},
        {"n_train": 1024, "setup": "LoRA", "mean": 0.75, "least": 0.75, "most": 1.0},
    ]
)


def test_a_number_over_the_size_of_the_training_set_has_a_line_a_way_and_reaches_from_least_to_most():
    ax = plots.by_size(SIZES, "overfitting (nats per token)")
    assert list(zip(said(ax.get_xticklabels()), ax.get_xticks(), strict=True)) == [("16", 16), ("1,024", 1024)]
    assert (ax.get_xscale(), legend(ax)) == ("log", ["LoRA", "full"])
    for i, (container, setup) in enumerate(zip(ax.containers, ("full", "LoRA"), strict=True)):
        own = SIZES[SIZES.setup == setup]
        expected = zip(own.n_train * 1.06**i, own["mean"], own.least, own.most, strict=True)
        assert [*map(pytest.approx, expected)] == bounds(container)


def test_gains_have_a_panel_for_each_model_and_a_line_for_each_kind_of_data():
    rows = [("A", "x", 10, 1.0, 0.5, 2.0), ("A", "y", 10, -1.0, -2.0, 0.0), ("B", "x", 100, 3.0, 2.0, 4.0)]
    columns = ["model", "data", "n_train", "points", "points_lower", "points_upper"]
    first, second = plots.gains(pandas.DataFrame(rows, columns=columns)).axes
    assert [ax.get_title() for ax in (first, second)] == ["A", "B"]
    assert [bounds(container) for container in first.containers] == [
        [(10, 1.0, 0.5, 2.0)],
        [pytest.approx((10.6, -1.0, -2.0, 0.0))],
    ]
    assert bounds(second.containers[0]) == [(100, 3.0, 2.0, 4.0)]


def test_lines_by_rank_and_what_they_are_compared_with():
    lines = {"all at 0.01": {1: 3.0, 4: 2.0}, "each at its own": {1: 2.5, 4: 1.0, 16: 0.5}}
    ax = plots.by_rank(lines, "test loss (MSE)")
    first, second = ax.get_lines()
    assert points(first) == [(1, 3.0), (4, 2.0)]
    assert (list(second.get_xdata()), second.get_color()) == ([1, 4, 16], "#000000")
    assert first.get_color() != second.get_color()
    assert said(ax.get_xticklabels()) == ["1", "4", "16"]


def test_losses_by_rate_have_a_line_for_each_method_in_the_frames_order():
    ax = plots.loss_by_rate(sweep(LOSSES), by="method")
    assert legend(ax) == ["LoRA", "DoRA", "LoRA+"]
    drawn = {lines.get_label(): lines.lines[0] for lines in ax.containers}
    assert drawn["LoRA"].get_xdata().tolist() == pytest.approx([0.01 / 1.04, 0.02 / 1.04])
    assert drawn["LoRA"].get_ydata().tolist() == pytest.approx([0.85, 0.5])  # means of the last step
    assert drawn["DoRA"].get_color() == plots.METHOD_COLOURS["dora"]


def test_pictures_share_a_scale_and_stand_in_rows():
    images = {f"rank {r}": np.full((4, 6), 10.0 * r) for r in range(1, 5)}
    figure = plots.pictures(images, columns=3)
    drawn = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in drawn] == list(images)
    assert [ax.images[0].get_array().mean() for ax in drawn] == [10, 20, 30, 40]


def test_energy_is_marked_where_it_reaches_the_share():
    ax = plots.energy({"weight": [4, 1, 1, 1, 1], "noise": torch.ones(5)})
    weight, noise, share = ax.get_lines()
    assert points(weight) == [(1, 80), (2, 85), (3, 90), (4, 95), (5, 100)]
    assert (weight.get_markevery(), noise.get_markevery()) == ([2], [4])
    assert share.get_ydata()[0] == 90
    assert legend(ax) == ["weight: 3 of 5 terms", "noise: 5 of 5 terms"]
    assert noise.get_color() == plots.METHOD_COLOURS["chance"] != weight.get_color()


def test_scores_have_a_mark_for_each_seed_their_mean_and_the_best_baseline():
    rows = [("style", "zero-shot", 0.0), *(("style", "full", score) for score in (0.5, 1.0))]
    rows += [("names", "LoRA r=8", 40.0), ("names", "full", 30.0), ("names", "full", 36.0)]
    table = pandas.DataFrame(rows, columns=["task", "setup", "score"])
    figure = plots.scores(table, {"names": 41.0, "style": 0.75}, {"names": "chrF (0 to 100)", "style": "share"})
    left, right = figure.axes
    assert [ax.get_title() for ax in (left, right)] == ["names", "style"]
    assert [list(line.get_ydata()) for line in right.get_lines()] == [[0.0], [0.5, 1.0], [0.75, 0.75]]
    assert [line.get_ydata()[0] for line in left.get_lines()] == [40.0, 30.0, 41.0]
    means = [bar.get_segments()[0][0][1] for bar in left.collections]
    assert means == [40.0, 33.0]


def best(vertex, lower=None, upper=None, edge=""):
    return BestRate(vertex or 1e-3, vertex, lower, upper, edge, 3, 8)


def test_best_rates_have_bars_without_caps_where_the_grid_ends_and_no_mark_at_an_edge():
    lines = {"alpha = 2r": {1: best(4e-3, 3e-3, 5e-3), 4: best(2e-3, None, 3e-3), 16: best(None, edge="largest")}}
    ax = plots.best_rates(lines, full=best(1e-4, 8e-5, 1.2e-4), power=-0.5)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    lines = by_label(ax)
    assert lines["full fine-tuning"].get_color() == FULL
    assert lines["alpha = 2r"].get_ydata().tolist() == [4e-3, 2e-3, 1e-3]
    assert lines["alpha = 2r"].get_markevery() == [True, True, False]
    assert lines["falls as rank^-0.5"].get_ydata().tolist() == pytest.approx([4e-3, 2e-3, 1e-3])
    (bars,) = [collection for collection in ax.collections if len(collection.get_segments()) == 3]
    ends = [bar[:, 1].tolist() for bar in bars.get_segments()]
    assert ends == [[3e-3, 5e-3], pytest.approx([2e-3 / 1.6, 3e-3]), pytest.approx([1e-3 / 1.6, 1.6e-3])]
    lower, upper = (line.get_ydata() for line in ax.get_lines() if line.get_marker() == "_")
    np.testing.assert_array_equal(lower, [3e-3, np.nan, np.nan])
    np.testing.assert_array_equal(upper, [5e-3, 3e-3, np.nan])


ON_AXES = {
    "curves": lambda ax: plots.curves(RUNS, ax=ax),
    "bars": lambda ax: plots.stacked_bars({"a": {"x": 1.0}}, "MiB", {"x": ("#000000", "")}, ax),
    "bills": lambda ax: plots.bills({"a": bill(frozen=1)}, ax=ax),
    "paths": lambda ax: plots.paths(WALKS, BEST, ax=ax),
    "spectrum": lambda ax: plots.spectrum({"weight": [8.0, 1.0]}, ax),
    "sizes": lambda ax: plots.by_size(SIZES.iloc[:3], "loss", ax=ax),
}


@pytest.mark.parametrize("name", ON_AXES)
def test_functions_draw_on_the_axes_they_are_given_and_the_file_is_a_png(name, tmp_path):
    figure, (other, ax) = plots.plt.subplots(1, 2)
    assert ON_AXES[name](ax) is ax
    assert not [*other.lines, *other.patches, *other.collections]
    path = tmp_path / "new" / "picture.png"
    assert plots.save(figure, path) == path
    assert path.read_bytes().startswith(PNG)
    assert [each.name for each in path.parent.iterdir()] == ["picture.png"]
