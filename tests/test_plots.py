"""Pictures: labels with units, the numbers that were given, and files that are whole."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes

mpl.use("Agg")

from lora_lab import History, plots
from lora_lab.train import COLUMNS

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def close():
    yield
    plots.plt.close("all")


def history(validation, train=None):
    train = train or [None] * len(validation)
    rows = [
        {**dict.fromkeys(COLUMNS), "step": step, "train_loss": t, "validation_loss": v}
        for step, (v, t) in enumerate(zip(validation, train, strict=True))
    ]
    return History({"name": "t"}, {"name": "full"}, {}, 1, 1, rows=rows)


RUNS = {
    "LoRA r=8": history([3.0, None, 2.0, 1.5], [None, 2.9, 2.2, 1.4]),
    "full": history([3.0, None, 1.0, 1.25], [None, 2.8, 2.1, 0.9]),
}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_curves_draw_each_run_where_it_has_values():
    ax = plots.curves(RUNS)
    assert isinstance(ax, Axes)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", "validation loss (nats per token)")
    assert legend(ax) == ["LoRA r=8", "full"]
    first, second = ax.get_lines()
    assert (first.get_xdata().tolist(), first.get_ydata().tolist()) == ([0, 2, 3], [3.0, 2.0, 1.5])
    assert (second.get_xdata().tolist(), second.get_ydata().tolist()) == ([0, 2, 3], [3.0, 1.0, 1.25])


def test_runs_differ_by_colour_and_marker_and_columns_by_line_style():
    ax = plots.curves(RUNS, columns=("train_loss", "validation_loss"), unit="mean squared error")
    assert ax.get_ylabel() == "loss (mean squared error)"
    assert legend(ax) == [f"{run}: {loss} loss" for run in ("LoRA r=8", "full") for loss in ("training", "validation")]
    lines = ax.get_lines()
    assert [line.get_ydata().tolist() for line in lines[:2]] == [[2.9, 2.2, 1.4], [3.0, 2.0, 1.5]]
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines]
    assert len(set(looks)) == 4
    assert looks[0][:2] == looks[1][:2] != looks[2][:2] == looks[3][:2]
    assert looks[0][0] != looks[2][0]
    assert looks[0][1] != looks[2][1]
    assert looks[0][2] == looks[2][2] != looks[1][2] == looks[3][2]


def test_curves_of_another_column_are_labelled_by_it():
    ax = plots.curves({"a": history([1.0], [0.5])}, columns=("train_loss",), unit="nats")
    assert ax.get_ylabel() == "training loss (nats)"


def test_functions_draw_on_the_axes_they_are_given():
    _, axes = plots.plt.subplots(1, 3)
    assert plots.curves(RUNS, ax=axes[0]) is axes[0]
    assert plots.stacked_bars({"a": {"x": 1.0}}, "MiB", ax=axes[1]) is axes[1]
    assert plots.spectrum({"a": [1.0, 0.5]}, ax=axes[2]) is axes[2]


def test_bars_are_stacked_in_one_order_with_the_total_above():
    bars = {"LoRA": {"weights": 500.0, "gradients": 20.0}, "full": {"weights": 510.0, "gradients": 490.0, "rest": 7.0}}
    ax = plots.stacked_bars(bars, "memory (MiB)")
    assert ax.get_ylabel() == "memory (MiB)"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["LoRA", "full"]
    assert legend(ax) == ["rest", "gradients", "weights"]  # in the order of the stack, from the top
    drawn = {c.get_label(): [(bar.get_y(), bar.get_height()) for bar in c] for c in ax.containers}
    assert drawn == {
        "weights": [(0.0, 500.0), (0.0, 510.0)],
        "gradients": [(500.0, 20.0), (510.0, 490.0)],
        "rest": [(520.0, 0.0), (1000.0, 7.0)],
    }
    assert [(text.get_text(), text.get_position()[1]) for text in ax.texts] == [("520", 520.0), ("1,007", 1007.0)]
    assert len({c[0].get_facecolor() for c in ax.containers}) == 3
    assert len({c[0].get_hatch() for c in ax.containers}) == 3


def test_spectrum_is_divided_by_the_largest_value_on_a_logarithmic_scale():
    ax = plots.spectrum({"weight": [8.0, 4.0, 1.0], "noise": np.array([2.0, 1.0])})
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "index of the singular value, largest first"
    assert ax.get_ylabel() == "singular value / largest (no unit)"
    assert legend(ax) == ["weight", "noise"]
    first, second = ax.get_lines()
    assert (first.get_xdata().tolist(), first.get_ydata().tolist()) == ([1, 2, 3], [1.0, 0.5, 0.125])
    assert second.get_ydata().tolist() == [1.0, 0.5]
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_marker() != second.get_marker()


def test_colours_markers_and_hatches_stay_apart():
    assert len(set(plots.COLOURS)) == len(set(plots.MARKERS)) == len(set(plots.HATCHES)) == 8
    assert set(plots.COLOURS) == {  # Okabe and Ito 2008
        "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
    }  # fmt: skip


def test_style_sets_one_look():
    with mpl.rc_context():
        plots.use_style()
        assert mpl.rcParams["figure.dpi"] == 100
        assert mpl.rcParams["axes.spines.top"] is False
        assert mpl.rcParams["axes.prop_cycle"].by_key()["color"] == list(plots.COLOURS)


def test_a_saved_figure_is_a_whole_png_whatever_the_files_name(tmp_path):
    figure = plots.curves(RUNS).figure
    path = tmp_path / "new" / "picture.png"
    assert plots.save(figure, path) == path
    assert path.read_bytes().startswith(PNG)
    assert path.read_bytes().rstrip().endswith(b"IEND\xaeB`\x82")
    assert [each.name for each in path.parent.iterdir()] == ["picture.png"]


def test_a_failed_save_leaves_the_old_picture_and_nothing_else(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    class Broken:
        def savefig(self, target, format):
            target.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        plots.save(Broken(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
