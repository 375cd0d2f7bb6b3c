"""Figures of lesson 03, LoRA from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lora_lab.plots import METHOD_COLOURS


def schematic(rank: int = 4, alpha: float = 8) -> Axes:
    """LoRA drawn to scale: the frozen W0, and beside it B and A, whose product has the shape of W0.

    Args:
        rank: r, at most 48.
        alpha: the update is scaled by alpha / rank, which stands before it, the larger the greater it is.
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
    ax.text(81, 0, f"+ {s:.3g} \N{MULTIPLICATION SIGN}", ha="center", va="center", fontsize=12 + 2 * s**0.5)
    ax.text(81, 26, "$s$", ha="center", va="bottom", fontsize=14)
    update = rf"$h = W_0\,x + s\,B A\,x$ with $s$ = {alpha:g} / {rank} = {s:.3g}"
    trained = f"LoRA trains {count:,} parameters beside {whole:,} frozen ones ({count / whole:.0%})"
    ax.set_title(f"{trained}\n{update}")
    ax.set(xlim=(-3, 185 + rank), ylim=(-42, 36), aspect="equal")
    ax.axis("off")
    return ax


def filling(losses: Sequence[float], products: Mapping[int, Tensor], frozen: Tensor | None = None) -> Figure:
    """The loss of each step of training, and below it W0, if given, and B A before some of the steps, on one scale.

    Args:
        losses: by step, from 0.
        products: step -> B A, (out, in).
        frozen: W0, (out, in).
    """
    lora, limit = METHOD_COLOURS["lora"], 0.6 * max(float(each.abs().max()) for each in products.values())
    below = {f"$BA$ before step {step}": product for step, product in products.items()}
    if frozen is not None:
        below = {"$W_0$, frozen": frozen, **below}
    mosaic: Any = [["loss"] * len(below), [*below]]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(9, 5), height_ratios=[1.3, 1])
    axes["loss"].plot(losses, color=lora, linewidth=1)
    for step in products:
        axes["loss"].plot(step, losses[step], "o", color="black")
    look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
    for title, matrix in below.items():
        axes[title].imshow(matrix.detach().numpy(), **look)
        axes[title].set(xticks=[], yticks=[])
        axes[title].set_title(title, fontsize="medium")
        axes[title].grid(False)
    axes["loss"].set(xlabel="step", ylabel="loss of a batch (nats)", ylim=(0, None))
    axes["loss"].set_title("The loss falls while $BA$ fills up from zero (dots: before these steps)")
    lower = [axes[title] for title in below]
    figure.colorbar(lower[0].images[0], ax=lower, shrink=0.8)
    return figure


def postcard(sentence: str, A: Tensor, B: Tensor, trained: int, losses: Sequence[float]) -> Figure:
    """A taught sentence, above one layer's B, A and B A, and what they took: to keep, or to send to a friend.

    Args:
        sentence: that the adapter was taught.
        A: (r, in).
        B: (out, r).
        trained: numbers in all layers.
        losses: by step, from 0.
    """
    parts = {"A": A.detach(), "B": B.detach(), "BA": B.detach() @ A.detach()}
    mosaic: Any = [[".", "A"], ["B", "BA"]]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(6, 6.6), width_ratios=[1, 6], height_ratios=[1, 6])
    for name, matrix in parts.items():
        limit = 3 * float(matrix.std())
        look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
        axes[name].imshow(matrix.numpy(), aspect="auto", **look)
        axes[name].set(
            xticks=[], yticks=[], xlabel=f"${name}$" if name != "A" else "", ylabel="$A$" if name == "A" else ""
        )
        axes[name].grid(False)
    figure.suptitle("\n".join(wrap(f"“{sentence}”", 46)), fontsize=17, style="italic")
    figure.supxlabel(
        f"{trained:,} numbers, {len(losses)} steps, from {losses[0]:.1f} to {losses[-1]:.1f} nats", fontsize=11
    )
    return figure
