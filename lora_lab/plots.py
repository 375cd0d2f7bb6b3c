"""Pictures of results. The only place that imports matplotlib; functions draw on an Axes and return it.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; a second cue (line style, marker or
hatching) goes with each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.costs.memory import MIB, PARTS, SAVED, Bill
from lora_lab.history import History
from lora_lab.system.files import atomic_file

if TYPE_CHECKING:
    from pandas import DataFrame

    from lora_lab.ablation.verdict import Verdict


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
PART_COLOURS = {
    "frozen weights": "#999999",
    "trained weights": COLOURS[0],
    "gradients": COLOURS[1],
    "optimiser state": COLOURS[4],
    "logits and loss": COLOURS[3],
    "recomputed activations": COLOURS[5],
    "temporaries": COLOURS[7],
    "cuBLAS workspace": COLOURS[6],
    "unused ends of blocks": "#555555",
    "the rest, unexplained": "#dddddd",
}
STATISTICS = {
    "effective_rank": "effective rank of the update",
    "stable_rank": "stable rank of the update",
    "energy_rank": "directions with 90 % of the update's energy",
    "norm": "norm of the update (Frobenius)",
    "relative_norm": "norm of the update / of the weight",
    "amplification": "amplification factor",
}
NAMES = {
    "train_loss": "training loss",
    "validation_loss": "validation loss",
    "off_domain_loss": "off-domain loss",
}


def use_style() -> None:
    """One look for every figure: 100 dpi, light grid, open frame."""
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "figure.figsize": (6.4, 4.0),
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": "medium",
            "grid.alpha": 0.3,
            "legend.frameon": False,
        }
    )


def curves(
    histories: Mapping[str, History],
    columns: Sequence[str] = ("validation_loss",),
    unit: str = "nats per token",
    ax: Axes | None = None,
) -> Axes:
    """Losses against steps: a colour and marker for each run, a line style for each column."""
    ax = ax or plt.subplots()[1]
    for i, (label, history) in enumerate(histories.items()):
        for j, column in enumerate(columns):
            steps, values = history.curve(column)
            name = label if len(columns) == 1 else f"{label}: {NAMES.get(column, column)}"
            marker = MARKERS[i % len(MARKERS)] if len(steps) <= 25 else None
            ax.plot(steps, values, LINES[j % len(LINES)], color=COLOURS[i % len(COLOURS)], marker=marker, label=name)
    ax.set_xlabel("training step")
    what = NAMES.get(columns[0], columns[0]) if len(columns) == 1 else "loss"
    ax.set_ylabel(f"{what} ({unit})")
    ax.legend()
    return ax


def stacked_bars(bars: Mapping[str, Mapping[str, float]], ylabel: str, ax: Axes | None = None) -> Axes:
    """One bar a key, its parts on top of each other in one order, with the total above.

    Args:
        bars: bar -> part -> height; all in one unit, which ``ylabel`` names.
    """
    ax = ax or plt.subplots()[1]
    places = np.arange(len(bars))
    bottom = np.zeros(len(bars))
    for i, part in enumerate(dict.fromkeys(part for heights in bars.values() for part in heights)):
        heights = np.array([each.get(part, 0.0) for each in bars.values()])
        ax.bar(
            places,
            heights,
            bottom=bottom,
            width=0.6,
            label=part,
            color=COLOURS[i % len(COLOURS)],
            hatch=HATCHES[i % len(HATCHES)],
            edgecolor="white",
        )
        bottom += heights
    for place, total in zip(places, bottom, strict=True):
        ax.text(place, total, f"{total:,.0f}", ha="center", va="bottom")
    ax.set_xticks(places, list(bars))
    ax.set_ylabel(ylabel)
    ax.grid(axis="x", visible=False)
    return _legend_beside(ax)


def bills(found: Mapping[str, Bill], ax: Axes | None = None) -> Axes:
    """Memory bills side by side: one bar each, its parts in the order of the step, the peak above."""
    ax = ax or plt.subplots()[1]
    bottom = dict.fromkeys(found, 0.0)
    for part in _parts(bill.parts for bill in found.values()):
        heights = [bill.parts.get(part, 0) / MIB for bill in found.values()]
        ax.bar(list(found), heights, bottom=list(bottom.values()), width=0.6, label=part, **_part_style(part))
        bottom = {label: low + height for (label, low), height in zip(bottom.items(), heights, strict=True)}
    for label, total in bottom.items():
        ax.text(label, total, f"{total:,.0f}", ha="center", va="bottom")
    ax.set_ylim(0, 1.08 * max(bottom.values(), default=1))  # or the total above the highest bar is outside the axes
    ax.set_ylabel("memory at the peak of a step (MiB)")
    ax.grid(axis="x", visible=False)
    return _legend_beside(ax)


def memory_of_a_step(bill: Bill, ax: Axes | None = None) -> Axes:
    """What is in memory from the first operation of a step to the last, with its phases and its peak."""
    ax = ax or plt.subplots()[1]
    moments = bill.timeline
    places = np.linspace(0, 100, len(moments))
    parts = _parts(moment.parts for moment in moments)
    heights = np.array([[moment.parts.get(part, 0) / MIB for moment in moments] for part in parts])
    for low, high, part in zip(np.vstack([0 * heights[:1], heights.cumsum(0)]), heights.cumsum(0), parts, strict=False):
        ax.fill_between(places, low, high, label=part, linewidth=0, **_part_style(part))
    totals = heights.sum(0)
    peak = int(totals.argmax())
    ax.annotate(
        f"peak {totals[peak]:,.0f}", (places[peak], totals[peak]), (0, 12), textcoords="offset points", ha="center"
    )
    ax.plot(places[peak], totals[peak], "v", color="#000000")
    ax.set_ylim(0, 1.25 * totals.max())
    phases = [moment.phase for moment in moments]
    for phase in dict.fromkeys(phases):
        first = phases.index(phase)
        if first:
            ax.axvline(places[first], color="#000000", linewidth=0.8, linestyle=":")
        if phases.count(phase) > len(phases) / 12:  # the others are too narrow for their names
            at_the_top = ax.get_xaxis_transform()  # whatever limits a caller sets
            ax.text(places[first] + 0.6, 0.99, phase, va="top", fontsize="small", transform=at_the_top)
    ax.set_xlabel("operations done (% of the step)")
    ax.set_ylabel("memory (MiB)")
    return _legend_beside(ax)


def _parts(bars: Iterable[Mapping[str, int]]) -> list[str]:
    present = {part for parts in bars for part, size in parts.items() if size}
    return [part for part in PARTS if part in present]


def _part_style(part: str) -> dict[str, str]:
    """A colour for each cause; the saved activations share one, with a hatch for each kind of module."""
    hatch = HATCHES[1 + SAVED.index(part)] if part in SAVED else ""
    colour = COLOURS[2] if part in SAVED else PART_COLOURS[part]
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "white"}


def _legend_beside(ax: Axes) -> Axes:
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0))  # in the order of the stack
    return ax


def spectrum(values: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Singular values from the largest down, each divided by the largest, on a logarithmic scale."""
    ax = ax or plt.subplots()[1]
    for i, (label, sizes) in enumerate(values.items()):
        sizes = np.asarray(sizes, dtype=float)
        marker = MARKERS[i % len(MARKERS)]
        every = max(1, len(sizes) // 12)
        ax.plot(
            np.arange(1, len(sizes) + 1),
            sizes / sizes[0],
            LINES[i % len(LINES)],
            color=COLOURS[i % len(COLOURS)],
            marker=marker,
            markevery=every,
            label=label,
        )
    ax.set_yscale("log")
    ax.set_xlabel("index of the singular value, largest first")
    ax.set_ylabel("singular value / largest (no unit)")
    ax.legend()
    return ax


def rank_verdict(verdict: Verdict, ax: Axes | None = None) -> Axes:
    """What each rank loses against the largest, with its 95 % bounds, and the margin that decides.

    Each bound is one-sided: with 95 % confidence the true difference is below the upper end, and with 95 % above the
    lower end.
    """
    ax = ax or plt.subplots()[1]
    judged = [one for one in verdict.ranks if one.upper is not None]
    styles = {"enough": (COLOURS[2], "o"), "too small": (COLOURS[1], "v"), "open": (COLOURS[6], "s")}
    for status, (colour, marker) in styles.items():
        chosen = [one for one in judged if one.status == status]
        if chosen:
            differences = np.array([one.difference for one in chosen])
            reach = [
                differences - np.array([one.lower for one in chosen]),
                np.array([one.upper for one in chosen]) - differences,
            ]
            ranks = [one.rank for one in chosen]
            ax.errorbar(ranks, differences, reach, fmt=marker, color=colour, capsize=3, label=status)
    ax.axhline(0, color="#000000", linewidth=0.8)
    ax.axhline(verdict.margin, color=COLOURS[0], linestyle="--", label=f"margin {verdict.margin:g}")
    ticks = [one.rank for one in verdict.ranks]
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.set_xlabel("rank")
    ax.set_ylabel(f"test loss above that of rank {ticks[-1]}")
    seeds = len(verdict.seeds)
    ax.set_title(
        f"{verdict.method}: " + (f"rank {verdict.rank}" if verdict.decided else "undecided") + f", {seeds} seeds"
    )
    ax.legend()
    return ax


def loss_by_rate(frame: DataFrame, ax: Axes | None = None) -> Axes:
    """Validation loss after the last step against the learning rate, a line a rank: mean over seeds, least and most.

    Args:
        frame: of :func:`lora_lab.ablation.run.ablate`, of one method. A rate at which a seed failed is left out.
    """
    ax = ax or plt.subplots()[1]
    failed = frame[frame.outcome == "failed"][["rank", "lr"]].drop_duplicates().itertuples(index=False, name=None)
    last = frame[frame.step == frame.steps].set_index(["rank", "lr"]).drop(list(failed), errors="ignore")
    for i, (rank, losses) in enumerate(last.validation_loss.groupby("rank")):
        by_rate = losses.groupby("lr")
        mean = by_rate.mean()
        reach = [mean - by_rate.min(), by_rate.max() - mean]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "capsize": 2}
        ax.errorbar(mean.index, mean, reach, linestyle=LINES[i % len(LINES)], label=f"rank {rank:g}", **style)
    ax.set_xscale("log")
    ax.set_xlabel("peak learning rate")
    ax.set_ylabel("validation loss (mean of seeds, least and most)")
    ax.legend()
    return ax


def learning_and_forgetting(frame: DataFrame, ax: Axes | None = None) -> Axes:
    """Each trial's end: test loss (what was learned) against off-domain loss (what was forgotten); low is good in both.

    Args:
        frame: of :func:`lora_lab.ablation.run.ablate`.
    """
    ax = ax or plt.subplots()[1]
    last = frame[frame.step == frame.steps]
    for i, ((method, rank), trials) in enumerate(last.groupby(["method", "rank"], dropna=False)):
        label = method if rank != rank else f"{method}, rank {rank:g}"  # NaN: a method without a rank
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": "none"}
        ax.plot(trials.off_domain_loss, trials.test_loss, label=label, **style)
    ax.set_xlabel("off-domain loss after training (forgetting)")
    ax.set_ylabel("test loss after training (learning)")
    return _legend_beside(ax)


def paths(frame: DataFrame, best: DataFrame, ax: Axes | None = None) -> Axes:
    """From the start, how each method's validation loss falls while its off-domain loss rises: mean over seeds.

    A filled marker is where early stopping stops (at the mean of its steps), a hollow one the last step.

    Args:
        frame: as for :func:`lora_lab.ablation.overfitting.summarise_trials`, of one size of the training set.
        best: the trials to draw, as :func:`lora_lab.ablation.overfitting.at_best_rate` returns them.
    """
    ax = ax or plt.subplots()[1]
    for i, (setup, trials) in enumerate(best.groupby("setup", sort=False)):
        own = frame[(frame.setup == setup) & (frame.lr == trials.lr.iloc[0]) & frame.seed.isin(trials.seed)]
        mean = own.groupby("step")[["validation_loss", "off_domain_loss"]].mean()
        forgotten = mean.off_domain_loss - mean.off_domain_loss.iloc[0]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        line = LINES[i % len(LINES)]
        ax.plot(forgotten, mean.validation_loss, line, color=style["color"], linewidth=1.2)
        stop = int(np.abs(mean.index - trials.best_step.mean()).argmin())
        ax.plot(forgotten.iloc[stop], mean.validation_loss.iloc[stop], label=setup, linestyle=line, **style)
        ax.plot(forgotten.iloc[-1], mean.validation_loss.iloc[-1], fillstyle="none", **style)
    ax.set_xlabel("rise of the off-domain loss (forgetting)")
    ax.set_ylabel("validation loss (learning)")
    return _legend_beside(ax)


def by_size(table: DataFrame, ylabel: str, ax: Axes | None = None) -> Axes:
    """A number against the size of the training set, a line for each method: mean over seeds, least and most.

    Args:
        table: what :func:`lora_lab.ablation.overfitting.compare` returns, with sizes.
        ylabel: what was compared, with its unit.
    """
    ax = ax or plt.subplots()[1]
    for i, (setup, rows) in enumerate(table.groupby("setup", sort=False)):
        reach = [rows["mean"] - rows.least, rows.most - rows["mean"]]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "capsize": 2}
        shifted = rows.n_train * 1.06**i  # so that bars do not hide each other
        ax.errorbar(shifted, rows["mean"], reach, linestyle=LINES[i % len(LINES)], label=setup, **style)
    sizes = sorted(table.n_train.unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.minorticks_off()
    ax.set_xlabel("training examples")
    ax.set_ylabel(ylabel)
    return _legend_beside(ax)


def by_depth(frame: DataFrame, statistic: str = "stable_rank", ax: Axes | None = None) -> Axes:
    """A statistic of :func:`lora_lab.analysis.spectra.report` by depth, a line for each kind of layer, with its null.

    Args:
        frame: the report; layers without a depth are left out.
        statistic: one of its columns. Where it has a band, the widest of all layers is drawn in grey.
    """
    ax = ax or plt.subplots()[1]
    layers = frame.dropna(subset=["depth"])
    depths = layers.depth.astype(int)
    if f"{statistic}_low" in frame:
        low, high = layers[f"{statistic}_low"].min(), layers[f"{statistic}_high"].max()
        ax.axhspan(low, high, color="#bbbbbb", alpha=0.5, linewidth=0, label="without signal (95 %)")
    for i, kind in enumerate(layers.kind.unique()):
        chosen = layers.kind == kind
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        ax.plot(depths[chosen], layers[statistic][chosen], LINES[i % len(LINES)], label=kind, **style)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("block, from the input")
    ax.set_ylabel(STATISTICS.get(statistic, statistic))
    return _legend_beside(ax)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)
