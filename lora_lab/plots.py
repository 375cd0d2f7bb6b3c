"""Pictures of results. The only place that imports matplotlib; functions draw on an Axes and return it.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; a second cue (line style, marker or
hatching) goes with each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.files import atomic_file
from lora_lab.train import History

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
NAMES = {
    "train_loss": "training loss",
    "validation_loss": "validation loss",
    "off_domain_loss": "off-domain loss",
}


def use_style() -> None:
    """One look for every figure: 100 dpi, light grid, open frame."""
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "figure.figsize": (6.4, 4.0),
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": "medium",
            "grid.alpha": 0.3,
            "legend.frameon": False,
        }
    )


def curves(
    histories: Mapping[str, History],
    columns: Sequence[str] = ("validation_loss",),
    unit: str = "nats per token",
    ax: Axes | None = None,
) -> Axes:
    """Losses against steps: a colour and marker for each run, a line style for each column."""
    ax = ax or plt.subplots()[1]
    for i, (label, history) in enumerate(histories.items()):
        for j, column in enumerate(columns):
            steps, values = history.curve(column)
            name = label if len(columns) == 1 else f"{label}: {NAMES.get(column, column)}"
            marker = MARKERS[i % len(MARKERS)] if len(steps) <= 25 else None
            ax.plot(steps, values, LINES[j % len(LINES)], color=COLOURS[i % len(COLOURS)], marker=marker, label=name)
    ax.set_xlabel("training step")
    what = NAMES.get(columns[0], columns[0]) if len(columns) == 1 else "loss"
    ax.set_ylabel(f"{what} ({unit})")
    ax.legend()
    return ax


def stacked_bars(bars: Mapping[str, Mapping[str, float]], ylabel: str, ax: Axes | None = None) -> Axes:
    """One bar a key, its parts on top of each other in one order, with the total above.

    Args:
        bars: bar -> part -> height; all in one unit, which ``ylabel`` names.
    """
    ax = ax or plt.subplots()[1]
    places = np.arange(len(bars))
    bottom = np.zeros(len(bars))
    for i, part in enumerate(dict.fromkeys(part for heights in bars.values() for part in heights)):
        heights = np.array([each.get(part, 0.0) for each in bars.values()])
        ax.bar(
            places,
            heights,
            bottom=bottom,
            width=0.6,
            label=part,
            color=COLOURS[i % len(COLOURS)],
            hatch=HATCHES[i % len(HATCHES)],
            edgecolor="white",
        )
        bottom += heights
    for place, total in zip(places, bottom, strict=True):
        ax.text(place, total, f"{total:,.0f}", ha="center", va="bottom")
    ax.set_xticks(places, list(bars))
    ax.set_ylabel(ylabel)
    ax.grid(axis="x", visible=False)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0))  # in the order of the stack
    return ax


def spectrum(values: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Singular values from the largest down, each divided by the largest, on a logarithmic scale."""
    ax = ax or plt.subplots()[1]
    for i, (label, sizes) in enumerate(values.items()):
        sizes = np.asarray(sizes, dtype=float)
        marker = MARKERS[i % len(MARKERS)]
        every = max(1, len(sizes) // 12)
        ax.plot(
            np.arange(1, len(sizes) + 1),
            sizes / sizes[0],
            LINES[i % len(LINES)],
            color=COLOURS[i % len(COLOURS)],
            marker=marker,
            markevery=every,
            label=label,
        )
    ax.set_yscale("log")
    ax.set_xlabel("index of the singular value, largest first")
    ax.set_ylabel("singular value / largest (no unit)")
    ax.legend()
    return ax


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)
