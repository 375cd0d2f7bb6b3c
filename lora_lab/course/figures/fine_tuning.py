"""Figures of lesson 02, why fine-tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas
from matplotlib.axes import Axes

from lora_lab.plots import COLOURS, draw_seeds, draw_spread, line_styles, log_axis

if TYPE_CHECKING:
    from pandas import DataFrame


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Write a name beside each row, the first one on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")


def from_start_to_end(losses: Mapping[str, tuple[float, float]], vocabulary: int) -> Axes:
    """Where the loss of each start begins and ends, as arrows; above, the equally likely tokens that it stands for.

    Args:
        losses: the start -> its loss before the first step and after the last, in nats per token.
        vocabulary: the number of tokens.
    """
    ax = plt.subplots(figsize=(7.2, 3.0))[1]
    for row, (name, style) in enumerate(line_styles(losses).items()):
        begin, end = losses[name]
        arrow = {"arrowstyle": "-|>", "color": style["color"], "linewidth": 3, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (end, row), (begin, row), arrowprops=arrow)
        ax.plot(begin, row, "o", color=style["color"], fillstyle="none")
        for x, side, text in ((begin, "left", f"   begins at {begin:.1f}"), (end, "right", f"ends at {end:.2f}  ")):
            ax.text(x, row, text, ha=side, va="center")
    _name_rows(ax, list(losses))
    ax.set(xlim=(0, np.log(vocabulary) + 3), xlabel="test loss (nats per token): lower is better")
    above = ax.twiny()
    above.set_xlim(ax.get_xlim())
    above.set_xticks(np.log([1, 10, 100, 1000, 10000]), ["1", "10", "100", "1,000", "10,000"])
    above.grid(visible=False)
    above.set_xlabel("as unsure as among so many equally likely tokens")
    return ax


def right_answers(counts: Mapping[str, Sequence[float]], baseline: str, total: int) -> Axes:
    """How many texts each method judges right: a mark for each seed, a bar at their mean; a line at a baseline.

    Args:
        counts: method -> the right answers of each of its seeds.
        baseline: the method at which a line is drawn, and which has a colour of its own.
        total: the number of texts.
    """
    ax = plt.subplots(figsize=(7.2, 3.2))[1]
    styles = line_styles(counts)
    for row, (name, right) in enumerate(counts.items()):
        style = {**styles[name], **({"color": COLOURS[4]} if name == baseline else {})}
        draw_seeds(ax, row, pandas.Series(right), style, upright=False)
        numbers = " to ".join(f"{count:g}" for count in sorted({min(right), max(right)}))
        ax.text(total, row, numbers, ha="right", va="center")
    ax.axvline(float(np.mean(counts[baseline])), color=COLOURS[4], linestyle=":")
    _name_rows(ax, list(counts))
    ax.set(xlim=(0, total), xlabel=f"right answers, of {total} texts")
    return ax


def head_starts(cases: DataFrame) -> Axes:
    """What a head start gains in each case, with bounds: a filled mark in the winner's colour if they exclude zero.

    Args:
        cases: from :func:`lora_lab.studies.claims.compared.table`.
    """
    ax = plt.subplots(figsize=(7.2, 3.2))[1]
    gains = cases[["points", "points_lower", "points_upper"]].to_numpy(float)  # (cases, 3)
    for row, (gain, lower, upper) in enumerate(gains.tolist()):
        winner = "fine-tuned" if lower > 0 else "from scratch" if upper < 0 else "chance"
        (style,) = line_styles([winner]).values()
        error = [[gain - lower], [upper - gain]]
        look = {"fmt": "o", "capsize": 4, "markersize": 8, "fillstyle": "none" if winner == "chance" else "full"}
        ax.errorbar(gain, row, xerr=error, color=style["color"], **look)
    ax.axvline(0, color="#000000", linewidth=1)
    _name_rows(ax, [f"{case.data}, {case.model}" for case in cases.itertuples()])
    ax.set_xlabel("← from scratch reads more    percentage points    fine-tuned reads more →")
    return ax


def by_rate(right: Mapping[str, Mapping[float, Sequence[float]]], chosen: Mapping[str, float]) -> Axes:
    """Right answers against the learning rate, mean, min and max of the seeds; a ring around the rate that was chosen.

    Args:
        right: the start -> learning rate -> the share of right answers of each seed.
        chosen: the start -> a learning rate.
    """
    ax = plt.subplots(figsize=(7.2, 3.6))[1]
    for name, style in line_styles(right).items():
        shares = 100 * np.array(list(right[name].values()))  # (rates, seeds)
        rates, means = list(right[name]), shares.mean(1)
        draw_spread(ax, rates, means, shares.min(1), shares.max(1), label=name, **style)
        at = rates.index(chosen[name])
        ax.plot(rates[at], means[at], "o", color=style["color"], fillstyle="none", markersize=16, markeredgewidth=2)
    log_axis(ax, sorted({rate for of_start in right.values() for rate in of_start}), "learning rate", ".1g", base=3)
    ax.set(ylabel="right answers (%)", ylim=(0, 100))
    ax.legend(title="ring: chosen by the loss", loc="upper left")
    return ax
