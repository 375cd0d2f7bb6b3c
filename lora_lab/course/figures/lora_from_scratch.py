"""Figures of lesson 03, LoRA from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lora_lab.plots import COLOURS, LINES, MARKERS, METHOD_COLOURS


def schematic(rank: int = 4, alpha: float = 8) -> Axes:
    """LoRA drawn to scale: the frozen W0, and beside it B and A, whose product has the shape of W0.

    Args:
        rank: r, at most 48.
        alpha: the update is scaled by alpha / rank, which the height of the band shows.
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
    s = alpha / rank
    ax.plot([68, 94], [0, 0], color=lora, linewidth=2.5 * s, alpha=0.6, solid_capstyle="butt")
    ax.text(81, 26, rf"$+\ s$ = {s:.3g}", ha="center", va="bottom", fontsize=14)
    update = rf"$h = W_0\,x + s\,B A\,x$ with $s$ = {alpha:g} / {rank} = {s:.3g}"
    trained = f"LoRA trains {count:,} parameters beside {whole:,} frozen ones ({count / whole:.0%})"
    ax.set_title(f"{trained}\n{update}")
    ax.set(xlim=(-3, 185 + rank), ylim=(-42, 36), aspect="equal")
    ax.axis("off")
    return ax


def filling(losses: Sequence[float], products: Mapping[int, Tensor]) -> Figure:
    """The loss of each step of training, and below it B A before some of the steps, all on one scale.

    Args:
        losses: by step, from 0.
        products: step -> B A, (out, in).
    """
    lora, limit = METHOD_COLOURS["lora"], 0.6 * max(float(each.abs().max()) for each in products.values())
    mosaic: Any = [["loss"] * len(products), [f"{step}" for step in products]]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(9, 5), height_ratios=[1.3, 1])
    axes["loss"].plot(losses, color=lora, linewidth=1)
    for step, product in products.items():
        axes["loss"].plot(step, losses[step], "o", color="black")
        look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
        axes[f"{step}"].imshow(product.detach().numpy(), **look)
        axes[f"{step}"].set(xticks=[], yticks=[], title=f"$BA$ before step {step}")
        axes[f"{step}"].grid(False)
    axes["loss"].set(xlabel="step", ylabel="loss of a batch (nats)", ylim=(0, None))
    axes["loss"].set_title("The loss falls while $BA$ fills up from zero (dots: before these steps)")
    below = [axes[f"{step}"] for step in products]
    figure.colorbar(below[0].images[0], ax=below, shrink=0.8)
    return figure


def sentences(losses: Mapping[str, Sequence[float]]) -> Axes:
    """How fast a model learns sentences by heart: the loss of each step of training, for each of them."""
    ax = plt.subplots(figsize=(6.4, 3.4))[1]
    for (name, each), colour, marker, line in zip(losses.items(), COLOURS[1:], MARKERS, LINES, strict=False):
        ax.plot(each, color=colour, marker=marker, linestyle=line, label=name)
    ax.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    ax.set_title("A few steps are enough to learn a sentence by heart")
    ax.legend()
    return ax
