"""Figures of lesson 11, what training wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from lora_lab.plots import (
    METHOD_COLOURS,
    line_styles,
    panels,
)

if TYPE_CHECKING:
    from pandas import DataFrame


def overlaps(similarities: Mapping[str, Any], width: int) -> Figure:
    """How much of the 1 and the 8 leading directions of one update lies among those of another: phi(i, j) against j.

    Args:
        similarities: label -> phi (I, J), from :func:`lora_lab.rank.subspace_similarity`.
        width: of the space in which the directions lie; phi is max(i, j) / width by chance.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9), sharey=True)
    phis = {label: np.asarray(similarity, dtype=float) for label, similarity in similarities.items()}
    styles = line_styles(phis)
    for ax, i in zip(axes, (1, 8), strict=True):
        for label, phi in phis.items():
            ax.plot(np.arange(phi.shape[1]) + 1, phi[i - 1], label=label, **styles[label], markevery=[0, -1])
        j = np.arange(max(phi.shape[1] for phi in phis.values())) + 1
        ax.plot(j, np.maximum(i, j) / width, color=METHOD_COLOURS["chance"], linewidth=3, alpha=0.6, label="chance")
        leading = "the leading direction" if i == 1 else f"the {i} leading directions"
        ax.set(xlabel="j, leading directions of the other update", ylim=(0, 1.05), title=f"Of {leading}: phi({i}, j)")
    axes[0].set_ylabel("similarity phi (no unit)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(phis) + 1)
    return figure


def intruders_by_size(table: DataFrame) -> Figure:
    """Intruder dimensions against the size of the update, a panel a layer, a line (or one marker) a setup.

    Args:
        table: columns ``layer``, ``setup``, ``size`` (norm of the update / of the weight) and ``intruders``.
    """
    figure, axes = panels(table.layer.unique(), figsize=(9, 3.9), sharey=True)
    styles = line_styles(table.setup.unique())
    for layer, ax in axes.items():
        for setup, rows in table[table.layer == layer].groupby("setup", sort=False):
            style = styles[str(setup)] if len(rows) > 1 else {**styles[str(setup)], "linestyle": "none"}
            ax.plot(rows["size"], rows.intruders, label=setup, **style)
        ax.set(xscale="log", xlabel="size of the update / of the weight (norms)")
    first = figure.axes[0]
    first.set_ylabel("intruders among the 10 leading directions")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=len(styles))
    return figure
