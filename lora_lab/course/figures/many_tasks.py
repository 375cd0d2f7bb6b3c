"""Figures of lesson 09, many tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from lora_lab.course.figures.low_rank import write_entries

if TYPE_CHECKING:
    from pandas import DataFrame


def effect_of_adapters(changes: DataFrame, ax: Axes | None = None) -> Axes:
    """What each adapter does to the loss of each task: below zero (orange) it helps.

    Args:
        changes: the loss with the adapter minus that of the base, in nats per token; a row for each adapter, a column
            for each task.
    """
    ax = ax or plt.subplots(figsize=(7.2, 1.6 + 0.6 * len(changes)))[1]
    limit = 3.0  # nats per token: from there on, colours are the darkest
    picture = ax.imshow(changes, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    write_entries(ax, changes.to_numpy(), "+z.2f", white_above=0.6 * limit)
    ax.set_xticks(range(len(changes.columns)), changes.columns)
    ax.set_yticks(range(len(changes)), changes.index)
    ax.set(xlabel="test loss of the task", ylabel="adapter")
    label = "change in loss (nats per token)\norange helps, violet harms"
    ax.figure.colorbar(picture, ax=ax, extend="both", label=label)
    return ax
