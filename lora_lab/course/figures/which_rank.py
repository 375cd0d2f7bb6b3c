"""Figures of lesson 06, which rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lora_lab.plots import (
    METHOD_COLOURS,
    draw_spread,
    legend_beside,
    line_styles,
    log_axis,
    rank_axis,
)

if TYPE_CHECKING:
    from pandas import DataFrame


def behind_full(gaps: Mapping[str, Mapping[int, tuple[float, float, float]]], margin: float, unit: str) -> Axes:
    """How far the loss of each setup is above full fine-tuning's after several numbers of steps, with bounds.

    Args:
        gaps: setup, such as "LoRA r=8" -> steps -> the mean difference, and its lower and upper bounds. At each number
            of steps the setups are drawn side by side.
        margin: up to which a setup counts as as good, drawn as a line.
        unit: of the loss.
    """
    ax = plt.subplots()[1]
    styles = line_styles(gaps)
    for i, (setup, by_steps) in enumerate(gaps.items()):
        middle, lower, upper = np.array(list(by_steps.values())).T
        places = np.array(list(by_steps)) * 2 ** (0.15 * (i - (len(gaps) - 1) / 2))
        look = {"fillstyle": "none", "markersize": 8, "capsize": 3, "label": setup}
        draw_spread(ax, places, middle, lower, upper, **look, **styles[setup])
    ax.axhline(0, color=METHOD_COLOURS["full"], linewidth=1, label="full")
    ax.axhline(margin, color="#000000", linewidth=1, linestyle=":", label="margin")
    log_axis(ax, sorted({steps for by_steps in gaps.values() for steps in by_steps}), "training steps")
    ax.set_ylabel(f"loss minus full fine-tuning's ({unit})")
    return legend_beside(ax)


def seed_by_seed(losses: DataFrame, ax: Axes | None = None) -> Axes:
    """What each seed alone says of the ranks: a grey line, and a star at its lowest loss; in black their mean.

    Args:
        losses: a row for each seed, a column for each rank; test losses in nats.
    """
    ax = ax or plt.subplots()[1]
    ranks = [int(rank) for rank in losses.columns]
    lora = METHOD_COLOURS["lora"]
    for i, row in enumerate(losses.to_numpy()):
        best = ranks[row.argmin()]
        ax.plot(ranks, row, color="#999999", linewidth=0.8, label=None if i else "one seed")
        ax.plot(best, row.min(), "*", color=lora, markersize=11, label=None if i else "its best rank")
    ax.plot(ranks, losses.mean(), "o-", color="#000000", label="mean of all seeds")
    rank_axis(ax, ranks)
    ax.set_ylabel("test loss (nats)")
    return legend_beside(ax)
