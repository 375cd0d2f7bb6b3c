"""Figures of lesson 09, many tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from lora_lab.course.figures.low_rank import write_entries
from lora_lab.plots import (
    METHOD_COLOURS,
)

if TYPE_CHECKING:
    from pandas import DataFrame


def copies_and_adapters(model_mb: float, adapter_mb: float) -> Axes:
    """The files that four tasks need, drawn as squares whose areas are to scale.

    Left full fine-tuning, with a model for each task; right LoRA, with one base and an adapter for each task.

    Args:
        model_mb: size of the model, in MB.
        adapter_mb: size of an adapter, in MB.
    """
    ax = plt.subplots(figsize=(9.5, 2.6))[1]
    tasks = 4
    side = (adapter_mb / model_mb) ** 0.5  # of an adapter's square; a model's is 1
    start = 1.15 * tasks + 0.4  # LoRA's files begin here, after those of full fine-tuning
    end = 1.15 * tasks + 1.4 + 0.6 * tasks

    def square(left: float, side: float, name: str, colour: str, hatch: str = "") -> None:
        ax.add_patch(Rectangle((left, 0), side, side, edgecolor="white", facecolor=colour, hatch=hatch, linewidth=0))
        ax.text(left + side / 2, -0.08, name, ha="center", va="top")

    square(start, 1, "base", "#d9d9d9")
    for task in range(tasks):
        square(1.15 * task, 1, f"task {task + 1}", METHOD_COLOURS["full"], "//")
        square(1.15 * tasks + 1.8 + 0.6 * task, side, f"task {task + 1}", METHOD_COLOURS["lora"])
    full = f"full fine-tuning: {tasks} x {model_mb:,.0f} MB = {tasks * model_mb:,.0f} MB"
    lora = f"LoRA: {model_mb:,.0f} MB + {tasks} x {adapter_mb:.1f} MB = {model_mb + tasks * adapter_mb:,.0f} MB"
    ax.text((start - 0.55) / 2, 1.15, full, ha="center", va="bottom")
    ax.text((start + end) / 2, 1.15, lora, ha="center", va="bottom")
    ax.set(xlim=(-0.1, end + 0.3), ylim=(-0.3, 1.4), aspect="equal")
    ax.set_title("A further task costs an adapter instead of a model (areas are to scale)")
    ax.axis("off")
    return ax


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
    ax.figure.colorbar(picture, ax=ax, extend="both", label="change in loss\n(nats per token)")
    return ax
