"""Figures of lesson 11, what training wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lora_lab.plots import METHOD_COLOURS, line_styles, panels


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
