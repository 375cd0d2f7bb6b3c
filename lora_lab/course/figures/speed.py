"""Figures of lesson 05, speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from lora_lab.costs.flops import ADAPTERS, FORWARD, INPUT, WEIGHT, Flops
from lora_lab.costs.timing import MEMORY, UPDATE
from lora_lab.plots import COLOURS, METHOD_COLOURS, draw_spread, filling


def time_and_flops(steps: Mapping[str, tuple[float, float, float, float]], xlabel: str) -> Axes:
    """The time of LoRA's step and its FLOPs, both in units of full fine-tuning's.

    Args:
        steps: setting, such as a rank -> ratio of the FLOPs, ratio of the times, and the ends of that one's interval.
    """
    ax = plt.subplots(figsize=(8, 3.8))[1]
    places, (flops, times, low, high) = np.arange(len(steps)), np.array(list(steps.values())).T
    grey, lora = "#555555", METHOD_COLOURS["lora"]
    ax.axhline(1, color=METHOD_COLOURS["full"], linewidth=2, label="full fine-tuning")
    ax.plot(places, flops, "s--", color=grey, fillstyle="none", label="LoRA: arithmetic (FLOPs)")
    draw_spread(ax, places, times, low, high, color=lora, marker="o", capsize=4, label="LoRA: time, 95 % interval")
    for place, (flop, time, bottom, top) in zip(places, steps.values(), strict=True):
        above = time > flop  # the larger number stands on top
        for value, end, colour, up in ((time, top if above else bottom, lora, above), (flop, flop, grey, not above)):
            look: Any = {"color": colour, "ha": "center", "va": "bottom" if up else "top"}
            ax.annotate(f"{value:.2f}", (place, end), (0, 7 if up else -7), textcoords="offset points", **look)
    ax.set_xticks(places, list(steps))
    ax.set(xlabel=xlabel, ylabel="LoRA / full fine-tuning", ylim=(0, max(1.4, high.max() + 0.1)))
    ax.set_xlim(-0.5, len(steps) - 0.5)
    ax.grid(axis="x", visible=False)
    ax.legend(loc="lower right")
    return ax


def causes(steps: Mapping[str, Mapping[str, float]], measured: Mapping[str, float]) -> Axes:
    """The predicted time of each step in three parts: multiplications, passes over memory, and the optimiser.

    Args:
        steps: label -> cause -> seconds, as a prediction has them.
        measured: label -> measured seconds, drawn as a diamond.
    """
    ax = plt.subplots(figsize=(9, 0.8 * len(steps) + 1.6))[1]
    looks = {"matrix multiplications": ("#999999", ""), MEMORY: ("#999999", ".."), UPDATE: (COLOURS[4], "//")}
    for row, (label, seconds) in enumerate(steps.items()):
        left, others = 0.0, sum(size for cause, size in seconds.items() if cause not in looks)
        for cause, look in looks.items():
            width = 1e3 * seconds.get(cause, others if cause == next(iter(looks)) else 0.0)
            ax.barh(row, width, left=left, height=0.6, **filling(*look))
            left += width
        ax.text(left, row, f"   {left:,.0f}", va="center")
        if label in measured:
            ax.plot(1e3 * measured[label], row - 0.4, "d", color="#000000")
    handles = [Patch(**filling(*look), label=cause) for cause, look in looks.items()]
    handles += ax.plot([], [], "d", color="#000000", label="measured")
    ax.set_xlabel("ms a step, predicted")
    return _name_rows(ax, list(steps), handles)


def passes(steps: Mapping[str, Flops], ax: Axes | None = None) -> Axes:
    """The FLOPs of each step, from the forward pass to the weight gradients, and what is gone from the first one.

    Args:
        steps: label -> FLOPs of a step; what the first has and another lacks is drawn as an empty box.
    """
    ax = ax or plt.subplots(figsize=(9, 0.9 * len(steps) + 1.4))[1]
    full, lora = METHOD_COLOURS["full"], METHOD_COLOURS["lora"]
    looks = {FORWARD: ("#999999", ""), INPUT: ("#999999", ".."), ADAPTERS: (lora, "xx"), WEIGHT: (full, "//")}
    reference = next(iter(steps.values()))
    for row, step in enumerate(steps.values()):
        left = 0.0
        for name, look in looks.items():
            width, style = _gflop(step, name), filling(*look)
            gone = width == 0 < _gflop(reference, name)
            if gone:  # an empty box, as wide as what is missing
                width = _gflop(reference, name)
                style = {**filling("none", ""), "edgecolor": "#333333", "linestyle": "--"}
            ax.barh(row, width, left=left, height=0.6, **style)
            if width > 0.05 * reference.total / 1e9:
                text = f"gone: {width:,.0f}" if gone else f"{width:,.0f}"
                patch = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                ax.text(left + width / 2, row, text, ha="center", va="center", bbox=patch)
            elif width:  # too narrow for its number
                ax.text(left + width / 2, row - 0.32, f"{width:,.1f}", ha="center", va="bottom", fontsize="small")
            left += width
        share = f" ({step.total / reference.total:.2f})" if row else ""
        ax.text(left, row, f"  {step.total / 1e9:,.0f}{share}", va="center")
    handles = [Patch(**filling(*look), label=name) for name, look in looks.items()]
    ax.set_xlabel("GFLOP of a step")
    return _name_rows(ax, list(steps), handles)


def _name_rows(ax: Axes, names: list[str], handles: list[Any]) -> Axes:
    """Write a name beside each row, the first on top, and what colours mean below."""
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.26), ncols=4)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(axis="y", visible=False)
    return ax


def _gflop(step: Flops, name: str) -> float:
    """Return the GFLOP of a pass without those of the adapters, or for ADAPTERS theirs in all passes."""
    if name == ADAPTERS:
        return step.part(ADAPTERS) / 1e9
    return (step.in_pass(name) - step.counts.get((ADAPTERS, name), 0)) / 1e9


def published(reports: Mapping[str, float], bound: float) -> Axes:
    """Published ratios of times, LoRA's over full fine-tuning's, beside the lowest ratio of FLOPs.

    Args:
        reports: source -> ratio.
        bound: no ratio of FLOPs is below it.
    """
    ax = plt.subplots(figsize=(9, 0.45 * len(reports) + 1.4))[1]
    ax.plot(list(reports.values()), range(len(reports)), "o", color="#000000", markersize=8)
    for row, ratio in enumerate(reports.values()):
        ax.text(ratio, row - 0.18, f"{ratio:.2f}", ha="center", va="bottom", fontsize="small")
    low, high = min(*reports.values(), bound) - 0.1, max(*reports.values(), 1) + 0.1
    areas = [(low, bound, COLOURS[5]), (bound, 1, "#ffffff"), (1, high, COLOURS[4])]
    words = ["faster than FLOPs explain", "faster, FLOPs may be why", "slower"]
    for (start, end, colour), text in zip(areas, words, strict=True):
        ax.axvspan(start, end, color=colour, alpha=0.2, linewidth=0)
        ax.text((start + end) / 2, -0.8, text, ha="center", va="center", fontsize="small")
    ax.axvline(bound, color="#000000", linestyle="--", label=f"{bound:.2f}, the bound of FLOPs")
    ax.axvline(1, color="#000000", label="equal")
    ax.legend(loc="lower left", fontsize="small")
    ax.set(xlim=(low, high), ylim=(len(reports) - 0.5, -1.1), xlabel="time of LoRA / time of full fine-tuning")
    ax.set_yticks(range(len(reports)), list(reports))
    ax.grid(axis="y", visible=False)
    return ax
