"""Figures of lesson 11, what training wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.plots import METHOD_COLOURS, line_styles, log_axis, panels

if TYPE_CHECKING:
    from pandas import DataFrame


def energy_ranks(
    counts: Mapping[str, Sequence[Sequence[int]]], labels: Sequence[str], noise: Sequence[float]
) -> Figure:
    """The energy rank of updates, a panel a method, with a bar (the seeds' median) for each kind of labels, and noise.

    Args:
        counts: method -> for each kind of labels the energy rank of each seed.
        labels: the kinds, first those of the task.
        noise: for each method that of noise of the same shape and rank.
    """
    figure, axes = panels(counts, figsize=(10, 2.9), sharey=True)
    colours = [style["color"] for style in line_styles(counts).values()]
    for (method, ax), colour, level in zip(axes.items(), colours, noise, strict=True):
        medians = [*map(median, counts[method]), level]
        looks = [colour, *[METHOD_COLOURS["as it is"]] * (len(labels) - 1), METHOD_COLOURS["chance"]]
        ax.bar_label(ax.barh([*labels, "noise"], medians, color=looks, height=0.65), fmt=" %.0f")
        ax.set(xlabel="directions that hold 90 % of the energy")
        ax.margins(x=0.1)
        ax.grid(visible=False, axis="y")
    figure.axes[0].invert_yaxis()
    return figure


def two_cuts(right: DataFrame, levels: Mapping[str, float]) -> Axes:
    """Right answers with only the strongest directions of full fine-tuning, and with all but these, by their number.

    Args:
        right: a row for each number of directions, a column for each cut, of 100 digits.
        levels: right answers of the base, and of full fine-tuning.
    """
    ax = plt.subplots()[1]
    for (name, values), line in zip(right.items(), ("-", "--"), strict=True):
        ax.plot(values, line, marker="o", color=METHOD_COLOURS["full"], label=str(name))
    for level, words in zip(levels.values(), ("the base", "full fine-tuning, uncut"), strict=True):
        ax.axhline(level, color=METHOD_COLOURS["as it is"], linewidth=1, linestyle=":")
        ax.annotate(words, (1, level), xytext=(0, 4), textcoords="offset points")
    log_axis(ax, list(right.index), "k, strongest directions of each layer's update")
    ax.set(ylabel="test digits read (of 100)", ylim=(30, 105))
    ax.legend(loc="center right")
    return ax


def agreement(overlaps: Mapping[str, Mapping[str, Sequence[Any]]], widths: Mapping[str, int]) -> Figure:
    """How much of their k leading directions two runs share, phi(k, k) against k, beside chance; a panel a layer.

    Args:
        overlaps: layer -> labels -> phi(k, k) for k = 1, 2, ...; the first labels are those of the task.
        widths: layer -> the dimensions in which the directions lie.
    """
    figure, axes = panels(overlaps, figsize=(10, 3.9), sharey=True)
    for layer, ax in axes.items():
        styles = line_styles(overlaps[layer])
        k = np.arange(max(map(len, overlaps[layer].values()))) + 1
        for labels, phi in overlaps[layer].items():
            ax.plot(k[: len(phi)], phi, label=labels, **styles[labels])
        ax.plot(k, k / widths[layer], color=METHOD_COLOURS["chance"], linewidth=3, alpha=0.6, label="chance")
        ax.set(xlabel="k, leading directions of each run", xlim=(0.5, 16.5), ylim=(0, 1.05), xticks=[1, 2, 4, 8, 16])
    first = figure.axes[0]
    first.set_ylabel("overlap phi (1: all in common)")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
