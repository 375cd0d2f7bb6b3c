"""Figures of lesson 04, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.costs.memory import MIB, Bill, Part
from lora_lab.plots import (
    COLOURS,
    METHOD_COLOURS,
    filling,
    memory_of_a_step,
)


def memory_of_steps(bills: Mapping[str, Bill]) -> Figure:
    """A row for each step, on one scale: the whole step, and beside it the 20 operations before and after its peak.

    The step begins with its forward pass: what an earlier one left behind and is released first is not drawn.
    """
    size = {"figsize": (10, 3.5 * len(bills)), "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(len(bills), 2, width_ratios=[2, 1], **size)
    for (whole, near), (title, bill) in zip(axes, bills.items(), strict=True):
        begun = [moment for moment in bill.timeline if moment.phase != "before"]
        memory_of_a_step(replace(bill, timeline=begun), whole).set_title(title)
        whole.get_legend().remove()
        whole.texts[0].set_text(f"{whole.texts[0].get_text()} (see right)")
        last = begun[-1].phase
        if last not in [text.get_text() for text in whole.texts]:  # too narrow for its name
            at_the_top = whole.get_xaxis_transform()
            whole.text(99.5, 0.99, f"{last} →", ha="right", va="top", fontsize="small", transform=at_the_top)
        memory_of_a_step(bill, near, around_peak=20).set_title("the same, around the peak")
        near.set_ylabel("")
        logits = max(bill.timeline, key=lambda moment: moment.total_bytes).parts.get(Part.LOGITS, 0)
        if logits:
            near.text(2, bill.peak_bytes / MIB, f"{logits / MIB:,.0f} of it logits", va="center", fontsize="small")
    axes[0, 0].set_ylim(0, 1.2 * max(bill.peak_bytes for bill in bills.values()) / MIB)
    return figure


def saved_in_a_block(saved: Mapping[str, tuple[str, int, int, int]]) -> Axes:
    """What each layer of a transformer block saves for the backward pass, from its input down to its output.

    Args:
        saved: layer, in the order of computation -> what it saves, and how many values for each token: with both
            methods, with full fine-tuning alone, with LoRA alone.
    """
    ax = plt.subplots(figsize=(10, 0.42 * len(saved) + 1))[1]
    looks = {
        "both": (COLOURS[2], ""),
        "full fine-tuning alone": (METHOD_COLOURS["full"], "//"),
        "LoRA alone": (METHOD_COLOURS["lora"], ".."),
    }
    counts = np.array([values for _, *values in saved.values()])  # (layers, 3)
    ends = counts.cumsum(1)
    for i, (name, look) in enumerate(looks.items()):
        ax.barh(list(saved), counts[:, i], left=ends[:, i] - counts[:, i], height=0.6, label=name, **filling(*look))
    for row, (what, *values) in enumerate(saved.values()):
        text = " + ".join(f"{value:,}" for value in values if value) or "nothing"
        ax.text(ends[row, -1], row, f"  {text}   {what}", va="center", fontsize="small")
    ax.set(xlim=(0, 1.6 * ends.max()), xlabel="values stored for each token")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend()
    return ax
