"""Figures of lesson 08, forgetting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lora_lab.plots import COLOURS, MARKERS, line_styles

FORGOTTEN = "forgotten: rise of the loss on old text (nats)"
NEUTRAL = (*COLOURS[2:6], "#555555")  # neither full's nor LoRA's
Line = tuple[Sequence[float], Sequence[float]]


def by_strength(learned: Mapping[float, float], forgotten: Mapping[float, float]) -> Axes:
    """What an adapter at each strength has learned and forgotten, as shares of that at full strength.

    Args:
        learned, forgotten: strength -> nats; 1 is among them.
    """
    ax = plt.subplots()[1]
    lines = {"learned": (learned, COLOURS[2], "o-"), "forgotten": (forgotten, COLOURS[3], "s--")}
    for label, (values, colour, look) in lines.items():
        shares = [100 * value / values[1] for value in values.values()]
        ax.plot([*values], shares, look, color=colour, label=label)
    ax.axvline(1, color=COLOURS[6], linewidth=1, linestyle=":")
    ax.set(xlabel="strength of the adapter", ylabel="% of what it is at strength 1")
    ax.legend()
    return ax


def fronts(lines: Mapping[str, Line]) -> Axes:
    """What is forgotten against what is learned, a line for each setup: lower is better.

    Args:
        lines: setup -> what is learned, and what is forgotten there, in nats.
    """
    ax = plt.subplots()[1]
    for setup, style in line_styles(lines).items():
        learned, forgotten = lines[setup]
        ax.plot(learned, forgotten, label=setup, **{**style, "markersize": 4})
    ax.set(xlabel="learned: fall of the loss on new text (nats)", ylabel=FORGOTTEN)
    ax.legend()
    return ax


def remedies(points: Mapping[str, Sequence[tuple[float, float]]]) -> Axes:
    """How each remedy moves the losses on new and old text: a hollow mark for each model, and the mean.

    Args:
        points: remedy -> for each model the change of the loss on new text, and of that on old text, in nats. Without
            a remedy both are zero, which is the star.
    """
    ax = plt.subplots(figsize=(7.2, 4.0))[1]
    ax.plot(0, 0, "*", color=COLOURS[6], markersize=14, label="as trained")
    for i, (remedy, moved) in enumerate(points.items()):
        look: Any = {"color": NEUTRAL[i], "marker": MARKERS[i], "linestyle": "none"}
        ax.plot(*zip(*moved, strict=True), **look, fillstyle="none", markersize=5)
        ax.plot(*np.mean(moved, axis=0), **look, markersize=9, label=remedy)
    ax.axhline(0, color=COLOURS[6], linewidth=1)
    ax.axvline(0, color=COLOURS[6], linewidth=1)
    ax.set(xlabel="change of the loss on new text (nats); left is better")
    ax.set(ylabel="change of the loss on old text\n(nats); down is better")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def predicts(points: Mapping[str, Line]) -> Axes:
    """What runs have forgotten against their KL from the base on the new text, a mark for each run.

    Args:
        points: setup -> KL and what is forgotten of its runs, in nats.
    """
    ax = plt.subplots()[1]
    for setup, style in line_styles(points).items():
        ax.plot(*points[setup], label=setup, **{**style, "linestyle": "none", "alpha": 0.7})
    ax.set(xlabel="KL from the base on the new text (nats per token)", ylabel=FORGOTTEN)
    ax.legend()
    return ax
