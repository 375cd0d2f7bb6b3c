"""Figures of lesson 08, forgetting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from lora_lab.plots import (
    LINES,
    line_styles,
)

if TYPE_CHECKING:
    from pandas import DataFrame


def weight_decay(means: DataFrame) -> Figure:
    """What stronger and stronger weight decay does to weights, losses and right answers, a colour for each setup.

    Args:
        means: columns ``setup``, ``decay``; ``moved`` and ``size``, the norm of the change of the weights and of the
            weights themselves, each over the norm at the start; ``new_loss`` on the new task; ``old_scaled``, the
            loss on the old task after temperature scaling; ``old_right``, the share of right answers on the old task.
            Losses are in nats.
    """
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.2))
    drawn = {
        "norm / norm at the start": {"size": "size of the weights", "moved": "distance from the start"},
        "loss (nats)": {"new_loss": "new task, lowest", "old_scaled": "old task, scaled, at the end"},
        "share of right answers": {"old_right": "old task, at the end"},
    }
    decays = sorted(means.decay.unique())
    styles = line_styles(means.setup.unique())
    for ax, (ylabel, columns) in zip(axes, drawn.items(), strict=True):
        for line, (column, what) in zip(LINES, columns.items(), strict=False):
            for setup, rows in means.groupby("setup", sort=False):
                values = rows.set_index("decay")[column].loc[decays]
                ax.plot(values.tolist(), label=f"{setup}: {what}", **{**styles[str(setup)], "linestyle": line})
        ax.set(xlabel="weight decay (not to scale)", ylabel=ylabel, ylim=(0, None))
        ax.set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays])
        ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return figure
