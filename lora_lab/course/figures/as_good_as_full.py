"""Figures of lesson 13, as good as full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lora_lab.plots import COLOURS, line_styles, log_axis

if TYPE_CHECKING:
    from pandas import DataFrame

Rows = Mapping[str, tuple[np.ndarray, tuple[float, float]]]  # label -> values of the seeds, and bounds of their mean


def differences(groups: Mapping[str, Rows], margin: float, xlabel: str, colours: Sequence[str] = ()) -> Axes:
    """Differences of losses, one below the other: a hollow mark for each seed, and the mean with its bounds.

    Args:
        groups: name -> its rows, which share a colour.
        margin: up to which a difference counts as none, drawn as a band below and above zero.
        xlabel: whose loss less whose, with the unit.
        colours: of the groups; those of their names by default.
    """
    count = sum(map(len, groups.values()))
    ax = plt.subplots(figsize=(7.2, 0.9 + 0.36 * count))[1]
    ticks: dict[float, str] = {}
    place = 0.0
    styles = line_styles(groups)
    for i, (name, rows) in enumerate(groups.items()):
        look: Any = {**styles[name], "linestyle": "none"} | ({"color": colours[i]} if colours else {})
        for label, (values, (lower, upper)) in rows.items():
            mean = float(np.mean(values))
            ax.plot(values, [place + 0.22] * len(values), **look, fillstyle="none", markersize=4, alpha=0.7)
            own: Any = {} if name in ax.get_legend_handles_labels()[1] else {"label": name}
            ax.errorbar(mean, place, xerr=[[mean - lower], [upper - mean]], capsize=3, **look, **own)
            ticks[place] = label
            place -= 1
        place -= 0.4
    ax.axvspan(-margin, margin, color="#999999", alpha=0.2, linewidth=0, label="margin")
    ax.axvline(0, color=COLOURS[6], linewidth=1)
    ax.set_yticks([*ticks], [*ticks.values()])
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"{xlabel}\nlarge marks: means with bounds; small ones: seeds")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def by_examples(lowest: DataFrame) -> Axes:
    """The lowest validation loss of each setup against the number of examples: means, and a hollow mark for each seed.

    Args:
        lowest: columns ``n_train``, ``setup`` and ``best_loss``, a row for each run.
    """
    ax = plt.subplots()[1]
    for setup, style in line_styles(lowest.setup.unique()).items():
        rows = lowest[lowest.setup == setup]
        ax.plot(rows.groupby("n_train").best_loss.mean(), label=setup, **style)
        ax.plot(rows.n_train, rows.best_loss, **{**style, "linestyle": "none", "fillstyle": "none", "markersize": 4})
    log_axis(ax, sorted(lowest.n_train.unique()), "training examples of 32 tokens")
    ax.set_ylabel("lowest validation loss (nats per token)")
    ax.legend()
    return ax
