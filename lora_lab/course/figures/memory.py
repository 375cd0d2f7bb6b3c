"""Figures of lesson 04, memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.costs.bill import MIB, PARTS, Bill, Part
from lora_lab.plots import COLOURS, METHOD_COLOURS, Looks, filling, legend_beside, panels, stacked_bars

# Five kinds of memory, from the bottom of a picture to its top.
LOOKS: Looks = {
    "weights": ("#999999", ""),
    "AdamW's state": (COLOURS[4], ".."),
    "gradients": (COLOURS[1], "\\\\"),
    "stored activations": (COLOURS[2], ""),
    "logits and loss": (COLOURS[3], "||"),
}
WEIGHTS, STATE, GRADIENTS, STORED, LOGITS = LOOKS
_KINDS = {
    **dict.fromkeys((Part.FROZEN, Part.TRAINED), WEIGHTS),
    Part.OPTIMISER: STATE,
    **dict.fromkeys((Part.GRADIENTS, Part.HEAD_GRADIENT), GRADIENTS),
    **{part: STORED for part in PARTS if part.startswith("saved") or part == Part.RECOMPUTED},
}


def by_kind(parts: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes of each of the five kinds; what is neither of the first four counts as logits and loss."""
    kinds = dict.fromkeys(LOOKS, 0)
    for part, size in parts.items():
        kinds[_KINDS.get(Part(part), LOGITS)] += size
    return kinds


def memory_of_steps(bills: Mapping[str, Bill], budget_bytes: int) -> Figure:
    """A panel for each step, on one scale: its memory from the forward pass to the end, and the line of a budget.

    Each moment of a timeline is equally wide, and around the peak it has every operation.
    """
    figure, axes = panels(bills, figsize=(10, 4.2), sharey=True)
    for ax, bill in zip(axes.values(), bills.values(), strict=True):
        moments = [moment for moment in bill.timeline if moment.phase != "before"]
        kinds = [by_kind(moment.parts) for moment in moments]
        totals = np.zeros(len(moments))
        for kind, look in LOOKS.items():
            below, totals = totals, totals + [each[kind] / MIB for each in kinds]
            ax.fill_between(
                range(len(moments)), below, totals, label=kind, **{**filling(*look), "linewidth": 0}, step="post"
            )
        top = int(totals.argmax())
        ax.axhline(budget_bytes / MIB, color="#000000", linestyle="--", label="budget")
        phases = [moment.phase for moment in moments]
        starts = [(phases.index(phase), phase) for phase in ("forward", "backward") if phase in phases]
        for start, _ in starts[1:]:
            ax.axvline(start, color="#000000", linewidth=0.8, linestyle=":")
        above = {
            "textcoords": "offset points",
            "ha": "center",
            "bbox": {"facecolor": "white", "linewidth": 0, "pad": 1},
        }
        ax.annotate(f"peak {totals[top]:,.0f}", (top, totals[top]), (0, 5), **above)
        ax.set_xticks([start for start, _ in starts], [f"{phase} →" for _, phase in starts], ha="left")
        ax.grid(axis="x", visible=False)
    figure.axes[0].set_ylim(0, 1.12 * max(budget_bytes, *(bill.peak_bytes for bill in bills.values())) / MIB)
    figure.axes[0].set_ylabel("memory (MiB)")
    figure.supxlabel("operations of the step, those around the peak drawn wider", fontsize="medium")
    legend_beside(figure.axes[len(bills) - 1])
    fits = [f"{name} {'fits' if bill.peak_bytes <= budget_bytes else 'does not fit'}" for name, bill in bills.items()]
    figure.suptitle(f"{budget_bytes / MIB:,.0f} MiB: {', '.join(fits)}")
    return figure


def peaks(bills: Mapping[str, Bill]) -> Axes:
    """A bar for each setup: its bytes at the peak of a step, by kind."""
    bars = {name: {kind: size / MIB for kind, size in by_kind(bill.parts).items()} for name, bill in bills.items()}
    ax = stacked_bars(bars, "memory at the peak (MiB)", LOOKS, plt.subplots(figsize=(9.5, 4.4))[1])
    ax.tick_params("x", labelsize="small")
    return ax


def saved_in_a_block(layers: Mapping[str, tuple[str, int, int, int]]) -> Figure:
    """A transformer block from its input down to its output, and beside each box what it stores for the backward pass.

    Args:
        layers: box -> what it does in a line, and how many values it stores for each token: with both methods, with
            full fine-tuning alone, with LoRA alone. A box in LoRA's colour has adapters: it stores values of theirs.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.55 * len(layers) + 1.1), sharey=True)
    looks: dict[str, Any] = {
        "both methods": (COLOURS[2], ""),
        "full fine-tuning alone": (METHOD_COLOURS["full"], "//"),
        "LoRA alone": (METHOD_COLOURS["lora"], ".."),
    }
    counts = np.array([values for _, *values in layers.values()])  # (layers, 3)
    ends, rows = counts.cumsum(1), range(len(layers))
    for i, (name, look) in enumerate(looks.items()):
        right.barh(rows, counts[:, i], left=ends[:, i] - counts[:, i], height=0.55, label=name, **filling(*look))
    for row, (name, (what, *values)) in enumerate(layers.items()):
        edge = METHOD_COLOURS["lora"] if values[-1] else "#888888"
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": edge, "linewidth": 1.6}
        left.text(0.16, row, name, ha="center", va="center", weight="bold", bbox=box)
        left.text(0.36, row, what, va="center")
        if row:
            left.annotate("", (0.16, row - 0.3), (0.16, row - 0.7), arrowprops={"arrowstyle": "->"})
        right.text(ends[row, -1], row, f"  {' + '.join(f'{value:,}' for value in values if value)}", va="center")
    left.set(xlim=(0, 1), ylim=(len(layers) - 0.4, -0.6))
    left.axis("off")
    left.set_title("a block, from its input down (orange: with adapters)", fontsize="medium")
    right.set(xlim=(0, 1.25 * ends.max()), xlabel="values", yticks=[])
    right.set_title("what it stores for each token", fontsize="medium")
    right.grid(axis="y", visible=False)
    right.legend(loc="upper right")
    return figure
