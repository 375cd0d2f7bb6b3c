"""Figures of lesson 12, which learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from lora_lab.plots import draw_spread, line_styles, log_axis


def valleys(losses: Mapping[str, Mapping[float, np.ndarray]], unit: str) -> Axes:
    """The validation loss of each setup against the learning rate: the mean over seeds, and bars from min to max.

    Args:
        losses: label -> rate -> losses (seeds, blocks), as of :func:`lora_lab.ablation.stats.losses_by_rate`.
        unit: of the losses.
    """
    ax = plt.subplots()[1]
    for label, style in line_styles(losses).items():
        of_seeds = np.array([of_rate.mean(axis=1) for of_rate in losses[label].values()])  # (rates, seeds)
        middle, low, high = (reduce(of_seeds, axis=1) for reduce in (np.mean, np.min, np.max))
        draw_spread(ax, [*losses[label]], middle, low, high, label=label, **style)
    every = sorted({rate for by_rate in losses.values() for rate in by_rate})
    ticks = every[:: 1 + len(every) // 7]
    log_axis(ax, ticks, "peak learning rate", "g", base=10)
    ax.set_xticks(ticks, [np.format_float_scientific(tick, 1, trim="-", exp_digits=1) for tick in ticks])  # as typed
    ax.set_ylabel(f"validation loss ({unit}, bars: min to max)")
    ax.legend()
    return ax


def best_rates(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    looks: Mapping[str, Any] | None = None,
) -> Axes:
    """Best learning rates against another setting, such as alpha or the number of steps, both logarithmic.

    Args:
        lines: label -> pairs of a setting and the best rate there.
        xlabel: the setting.
        ylabel: the rate, and its unit.
        looks: label -> colour, marker and so on, where they are not those of :func:`lora_lab.plots.line_styles`.
    """
    ax = plt.subplots()[1]
    for label, pairs in lines.items():
        ax.plot(*zip(*pairs, strict=True), label=label, **line_styles(lines)[label] | (looks or {}).get(label, {}))
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    log_axis(ax, sorted({setting for pairs in lines.values() for setting, _ in pairs}), xlabel)
    ax.set_ylabel(ylabel)
    ax.legend()
    return ax
