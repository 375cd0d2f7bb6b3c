"""Figures of lesson 09b, did it learn?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lora_lab.plots import METHOD_COLOURS, line_styles


def loss_and_accuracy(seeds: Mapping[str, Sequence[tuple[float, float]]], guessing: float) -> Axes:
    """The share of right answers against the test loss: a mark for each seed, and a line at the loss of guessing.

    Args:
        seeds: setup -> the loss (nats a token) and the share of right answers of each seed.
        guessing: the loss of a model that knows the form of an answer, and guesses.
    """
    ax = plt.subplots(figsize=(7.6, 3.4))[1]
    ax.plot([guessing, guessing], [0, 55], color="#000000", linestyle=":")
    ax.annotate("a guess in the right form", (guessing, 6), xytext=(6, 0), textcoords="offset points")
    for setup, style in line_styles(seeds).items():
        losses, shares = np.array(seeds[setup]).T
        look = {"color": style["color"], "marker": style["marker"], "markersize": 9, "fillstyle": "none"}
        ax.plot(losses, 100 * shares, linestyle="none", **look)
        place = {"xytext": (12, 0), "textcoords": "offset points", "va": "center", "color": style["color"]}
        ax.annotate(setup, (losses.max(), 100 * shares.mean()), **place)
    ax.set(xlabel="test loss (nats a token)", ylabel="right answers (%)", ylim=(0, 100))
    ax.set_xlim(0, 1.2 * max(loss for each in seeds.values() for loss, _ in each))
    return ax


def contenders(scores: Mapping[str, tuple[str, Sequence[float]]], texts: int) -> Axes:
    """Shares of right answers, a row for each way to answer: a mark for each seed, a bar for so few texts.

    Args:
        scores: way -> a method of ``METHOD_COLOURS``, and a share for each seed, from 0 to 1.
        texts: that were asked; the bar is the mean and 1.96 of its standard errors to each side.
    """
    ax = plt.subplots(figsize=(8.4, 0.46 * len(scores) + 1.1))[1]
    for row, (method, shares) in enumerate(scores.values()):
        mean, colour = float(np.mean(shares)), METHOD_COLOURS[method]
        reach = 196 * (mean * (1 - mean) / texts) ** 0.5
        ax.errorbar(100 * mean, row, xerr=reach, color=colour, alpha=0.35, linewidth=7)
        ax.plot(100 * np.array(shares), [row] * len(shares), "o", color=colour, fillstyle="none", markersize=8)
        ax.plot(100 * mean, row, "|", color=colour, markersize=20, markeredgewidth=2.5)
    ax.set_yticks(range(len(scores)), list(scores))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel=f"right answers (%); bars: 95 % for {texts} texts", xlim=(0, 100))
    return ax
