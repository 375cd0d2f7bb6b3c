"""Figures of lesson 01, low rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.plots import COLOURS, legend_beside, line_styles, panels, pictures, rank_axis
from lora_lab.rank import truncate


def ellipse(M: Any, to_the_ellipse: float = 1.0, second_direction: float = 0.0) -> Figure:
    """What a matrix makes of a circle: the circle, on its way to the ellipse, and with less of the weaker direction.

    Args:
        M: (2, 2).
        to_the_ellipse: from 0, where the circle is as it was, to 1, where M has turned it into an ellipse.
        second_direction: how much is left of the second term of M in the last picture; at 0 it has rank 1.
    """
    M = np.asarray(M, dtype=float)
    U, S, Vh = np.linalg.svd(M)
    moved = (1 - to_the_ellipse) * np.eye(2) + to_the_ellipse * M
    way = "M: an ellipse" if to_the_ellipse == 1 else f"{100 * to_the_ellipse:.0f} % of the way to M"
    left = f"{100 * second_direction:.0f} % of the second" if second_direction else "without the second: a line, rank 1"
    maps = {"all directions: a circle": np.eye(2), way: moved, left: (U * S * [1, second_direction]) @ Vh}
    figure, axes = panels(maps, figsize=(9, 2.6))
    angles = np.linspace(0, 2 * np.pi, 73)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    for ax, map_ in zip(axes.values(), maps.values(), strict=True):
        ax.plot(*circle, ":", color="#999999")
        ax.plot(*(map_ @ circle), color="#000000")
        for number, (v, colour, line) in enumerate(zip(Vh, COLOURS[2:4], ("-", "--"), strict=True), start=1):
            v = v * np.sign(v[0])  # svd may return the opposite of both v and u
            x, y = map_ @ v
            length = np.hypot(x, y)
            ax.plot([0, x], [0, y], line, color=colour, linewidth=2.5)
            name = f" v{number}" if ax is figure.axes[0] else f" {length:.2g} long"
            if length > 0.05:
                ax.text(x, y, name, va="bottom" if number == 1 else "top")
        ax.set(xlim=(-4.2, 5.8), ylim=(-2.4, 2.6), aspect="equal")
    figure.suptitle("A matrix stretches a circle into an ellipse; without the weaker direction it is a line")
    return figure


def approximation(picture: torch.Tensor, rank: int) -> Figure:
    """A grey picture in its best approximation of a rank, and what is missing, below their price and error."""
    B, A, error = truncate(picture, rank)
    price = (B.numel() + A.numel()) / picture.numel()
    missing = picture - B @ A + 128  # has both signs
    figure = pictures({f"rank {rank}": B @ A, "still missing (grey is zero)": missing}, columns=2)
    figure.suptitle(f"{100 * price:.0f} % of the numbers leave an error of {100 * error:.0f} %")
    return figure


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
    ax.set(ylabel=ylabel, ylim=(min(0, ax.get_ylim()[0]), None))
    return legend_beside(ax)
