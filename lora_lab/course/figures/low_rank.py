"""Figures of lesson 01, low rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.plots import (
    legend_beside,
    line_styles,
    panels,
    rank_axis,
)


def numbers(matrices: Mapping[str, Any]) -> Figure:
    """Small matrices side by side below their names, coloured and with their entries written on them.

    Args:
        matrices: name -> (rows, columns). All share one colour scale, white at zero.
    """
    arrays = {name: np.asarray(matrix, dtype=float) for name, matrix in matrices.items()}
    limit = max(np.abs(array).max() for array in arrays.values())
    figure, axes = panels(arrays, figsize=(2.3 * len(arrays), 2.9))
    for name, ax in axes.items():
        array = arrays[name]
        ax.imshow(array, cmap="PuOr", vmin=-limit, vmax=limit)  # orange is negative
        write_entries(ax, array, "z.0f", white_above=0.7 * limit)
        ax.set(xticks=range(array.shape[1]), yticks=range(array.shape[0]), xlabel="column")
    figure.axes[0].set_ylabel("row")
    return figure


def write_entries(ax: Axes, array: np.ndarray, form: str, white_above: float) -> None:
    """Write a matrix's entries on its picture, without a grid: large ones, whose cells are dark, in white."""
    for (row, column), entry in np.ndenumerate(array):
        ink = "#ffffff" if abs(entry) > white_above else "#000000"
        ax.text(column, row, f"{entry:{form}}", ha="center", va="center", color=ink)
    ax.grid(visible=False)


def shares_by_rank(shares: Mapping[str, Mapping[int, Sequence[float]]], ylabel: str) -> Axes:
    """Shares in per cent against the rank: a line through the means of the draws, a band from min to max.

    Args:
        shares: label -> rank -> one share for each draw; 1 is the whole.
        ylabel: what the shares are of, with "(%)".
    """
    ax = plt.subplots(figsize=(9, 4))[1]
    styles = line_styles(shares)
    for label, by_rank in shares.items():
        draws = 100 * np.array(list(by_rank.values()))  # (ranks, draws)
        ax.fill_between(list(by_rank), draws.min(1), draws.max(1), color=styles[label]["color"], alpha=0.25)
        ax.plot(list(by_rank), draws.mean(1), label=label, **styles[label])
    rank_axis(ax, sorted({rank for by_rank in shares.values() for rank in by_rank}))
    ax.set_ylabel(ylabel)
    return legend_beside(ax)
