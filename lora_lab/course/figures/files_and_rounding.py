"""Figures of lesson 03b, files and rounding."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from pandas import DataFrame

from lora_lab.plots import COLOURS, MARKERS


def lost_by_merging(layers: DataFrame) -> Axes:
    """How much of each layer's update is missing after a merge, by the update's size, for each format.

    Args:
        layers: a row for each layer and format, with columns "format", "size" (the update's norm over the weight's)
            and "missing" (a share of the update).
    """
    ax = plt.subplots(figsize=(7, 4))[1]
    for name, colour, marker in zip(layers["format"].unique(), COLOURS, MARKERS, strict=False):
        x, y = layers[layers["format"] == name].sort_values("size")[["size", "missing"]].to_numpy().T
        ax.plot(x, y, marker, color=colour, markersize=4, alpha=0.6)
        ax.text(0.97 * x[0], y[0], name, color=colour, ha="right", va="center")
    ax.set(xscale="log", yscale="log", xlabel="size of the update / size of the weight (norms)")
    ax.set(ylabel="missing after the merge\n(share of the update)", xlim=(0.72 * layers["size"].min(), None))
    ax.set_xticks([0.02, 0.03, 0.04, 0.06])
    ax.xaxis.minorticks_off()
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    return ax
