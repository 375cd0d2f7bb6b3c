"""Figures of lesson 03, LoRA from scratch."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from lora_lab.plots import (
    METHOD_COLOURS,
)


def schematic(rank: int = 4, alpha: float = 8) -> Axes:
    """LoRA drawn to scale: the frozen W0, and beside it B and A, whose product has the shape of W0.

    Args:
        rank: r, at most 48.
        alpha: the update is scaled by alpha / rank.
    """
    ax, lora = plt.subplots(figsize=(8.5, 3.7))[1], METHOD_COLOURS["lora"]
    count, whole = rank * (64 + 48), 64 * 48
    boxes = {  # name -> left, rows, columns, colour, how it is treated
        "$W_0$": (0, 48, 64, "#d9d9d9", "frozen"),
        "$B$": (98, 48, rank, lora, "trained,\nstarts at zero"),
        "$A$": (118 + rank, rank, 64, lora, "trained,\nstarts random"),
    }
    for name, (left, rows, columns, colour, what) in boxes.items():
        ax.add_patch(Rectangle((left, -rows / 2), columns, rows, facecolor=colour, edgecolor="#333333"))
        middle = left + columns / 2
        ax.text(middle, rows / 2 + 2, name, ha="center", va="bottom", fontsize=14)
        ax.text(middle, -rows / 2 - 3, f"{rows} x {columns}, {what}", ha="center", va="top")
    ax.text(81, 0, r"$+\quad s$", ha="center", va="center", fontsize=14)
    update = rf"$h = W_0\,x + s\,B A\,x$ with $s$ = {alpha:g} / {rank} = {alpha / rank:.3g}"
    trained = f"LoRA trains {count:,} parameters beside {whole:,} frozen ones ({count / whole:.0%})"
    ax.set_title(f"{trained}\n{update}")
    ax.set(xlim=(-3, 185 + rank), ylim=(-42, 36), aspect="equal")
    ax.axis("off")
    return ax
