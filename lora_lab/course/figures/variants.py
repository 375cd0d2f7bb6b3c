"""Figures of lesson 10, variants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.plots import MARKERS, line_styles, loss_by_rate

if TYPE_CHECKING:
    from pandas import DataFrame


def at_common_rate(frame: DataFrame, rate: float, xlabel: str) -> Figure:
    """Validation loss against the learning rate, and beside it the methods ranked, and compared with LoRA, at one rate.

    Args:
        frame: as for :func:`lora_lab.plots.loss_by_rate`, of several methods at one rank; ``method`` holds the
            names to show.
        rate: at which the methods are ranked, by their mean loss over the seeds, and LoRA has runs. Those without a
            run at it are named below, without a bar.
        xlabel: whose learning rate that is.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), width_ratios=[3, 2])
    loss_by_rate(frame, left, by="method").legend().remove()
    left.axvline(rate, color="#000000", linewidth=5, alpha=0.2)
    rates = sorted(frame.lr.unique())
    left.set_xticks(rates[::2], [f"{each:g}" for each in rates[::2]])
    left.set_yscale("log")
    left.set_yticks([0.2, 0.3, 0.5, 1, 2], ["0.2", "0.3", "0.5", "1", "2"])
    left.minorticks_off()
    left.set(xlabel=xlabel, title="Each method at every rate")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=frame.method.nunique())
    methods = frame.method.unique()
    losses = frame[(frame.step == frame.steps) & (frame.lr == rate)].groupby("method").validation_loss.mean()
    losses = losses.reindex(methods).sort_values(ascending=False, na_position="first")
    styles = line_styles(methods)
    right.barh(losses.index, losses, color=[styles[method]["color"] for method in losses.index], height=0.6)
    for position, (method, loss) in enumerate(losses.items()):
        difference = "" if method == "LoRA" else f" ({loss / losses['LoRA'] - 1:+.0%})"
        text = " no run at this rate" if np.isnan(loss) else f" {loss:.2f}{difference}"
        right.text(np.nan_to_num(loss), position, text, va="center")
    right.set(xlim=(0, 1.5 * losses.max()), ylim=(-0.55, len(methods) - 0.45))
    right.set_xlabel("validation loss (mean over seeds)")
    right.set_title(f"At {rate:g}, {losses.index[-1]} is ahead\n(in brackets: difference from LoRA)")
    right.grid(axis="y", visible=False)
    return figure


def differences(table: DataFrame, xlabel: str, margin: float | None = None) -> Axes:
    """Differences from a reference with their bounds, a row for each method and a mark for each case.

    Args:
        table: columns ``setup``, ``case`` (such as the model), ``difference``, ``lower`` and ``upper``.
        xlabel: what differs from what, with its unit.
        margin: a difference that does not matter, drawn as a grey band.
    """
    setups, cases = list(table.setup.unique()), list(table.case.unique())
    ax = plt.subplots(figsize=(8, 1 + 0.47 * len(setups)))[1]
    if margin is not None:
        ax.axvspan(-margin, margin, color="#bbbbbb", alpha=0.5, linewidth=0, label=f"margin: ±{margin:g}")
    ax.axvline(0, color="#000000", linewidth=1)
    shades = np.linspace(0, 0.65, len(cases))[::-1]
    for i, case in enumerate(cases):
        rows = table[table.case == case]
        position = [setups.index(setup) + 0.18 * (i - (len(cases) - 1) / 2) for setup in rows.setup]
        reach = [rows.difference - rows.lower, rows.upper - rows.difference]
        style = {"fmt": MARKERS[i], "color": str(shades[i]), "capsize": 3, "markersize": 7}
        ax.errorbar(rows.difference, position, xerr=reach, label=case, **style)
    ax.set(yticks=range(len(setups)), yticklabels=setups, ylim=(len(setups) - 0.5, -0.5), xlabel=xlabel)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax
