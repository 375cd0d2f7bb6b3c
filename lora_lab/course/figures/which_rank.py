"""Figures of lesson 06, which rank."""

from __future__ import annotations

from collections.abc import Mapping

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


def at_one_rate(losses: Mapping[int, Mapping[float, float]], rate: float, unit: str) -> Axes:
    """The loss of each rank at one learning rate for all, with a star at the lowest, beside each at its own best rate.

    Args:
        losses: rank -> rate -> loss. A rank that was not tried at the rate is left out of the first line.
        rate: the rate for all.
        unit: of the losses.
    """
    ax = plt.subplots()[1]
    at_rate = {rank: by_rate[rate] for rank, by_rate in losses.items() if rate in by_rate}
    winner = min(at_rate, key=lambda rank: at_rate[rank])
    look = line_styles(["LoRA"])["LoRA"]
    ax.plot(list(at_rate), list(at_rate.values()), label=f"all at {rate:g}", **look)
    ax.plot(winner, at_rate[winner], "*", color=look["color"], markersize=16)
    own = [min(by_rate.values()) for by_rate in losses.values()]
    ax.plot(list(losses), own, "P-", color="#000000", label="each at its own best")
    rank_axis(ax, [*losses])
    ax.set_ylabel(f"validation loss ({unit})")
    ax.set_title(f'At a rate of {rate:g} for all: "rank {winner} is the best!"')
    ax.legend(loc="upper center")
    return ax
