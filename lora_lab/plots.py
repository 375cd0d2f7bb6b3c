"""Figures of results, your own or those of a lesson; functions draw on an Axes and return it.

Colours are Okabe and Ito's, which colour-blind readers can distinguish; a second cue (line style, marker or hatch)
goes with each. A method, and a part of a memory bill, look the same in every figure. Only this file and
``lora_lab.course.figures``, with the figures that belong to one lesson each, import matplotlib.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogLocator

from lora_lab.costs.bill import GIB, MIB, PARTS, Bill, Part
from lora_lab.history import History
from lora_lab.rank import energy_rank
from lora_lab.system.files import atomic_file

if TYPE_CHECKING:
    from pandas import DataFrame, Series

    from lora_lab.ablation.compare import RankVerdict
    from lora_lab.ablation.stats import BestRate
    from lora_lab.lora import LoRALinear


DPI = 150
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
# By a method's ``name``. Methods of one kind, such as LoRA at several ranks, need colours in turn.
METHOD_COLOURS = {
    "full": COLOURS[0],
    "lora": COLOURS[1],
    "partial": COLOURS[2],
    "rslora": COLOURS[4],
    "lora+": COLOURS[5],
    "lora-fa": "#999933",
    "pissa": COLOURS[3],
    "dora": "#6b4c9a",
    "as it is": COLOURS[6],
    "scratch": "#882255",
    "chance": "#999999",
}
# Colour and hatch of each part of a memory bill. The saved activations share a colour: they are one kind of memory.
Looks = dict[str, tuple[str, str]]
PART_LOOKS: Looks = {
    Part.FROZEN: ("#999999", ""),
    Part.TRAINED: (COLOURS[0], "//"),
    Part.GRADIENTS: (COLOURS[1], "\\\\"),
    Part.HEAD_GRADIENT: ("#f5b183", "\\\\"),
    Part.OPTIMISER: (COLOURS[4], ".."),
    Part.SAVED_ATTENTION: (COLOURS[2], "//"),
    Part.SAVED_MLP: (COLOURS[2], ".."),
    Part.SAVED_NORMS: (COLOURS[2], "\\\\"),
    Part.SAVED_ADAPTERS: (COLOURS[2], "xx"),
    Part.SAVED_OTHER: (COLOURS[2], "--"),
    Part.LOGITS: (COLOURS[3], "||"),
    Part.RECOMPUTED: (COLOURS[5], "--"),
    Part.TEMPORARIES: (COLOURS[7], "oo"),
    Part.WORKSPACE: (COLOURS[6], "++"),
    Part.ENDS: ("#555555", "//"),
    Part.REST: ("#dddddd", "xx"),
}
_LIGHT = (COLOURS[4], COLOURS[5], COLOURS[7], "#dddddd", "#f5b183")  # colours on which a white hatch would not show
# Other words for the same methods, as labels of figures begin with them.
_SAME_METHOD = {
    **dict.fromkeys(("full fine-tuning", "fine-tuned"), "full"),
    **dict.fromkeys(("blocks", "head only", "head", "last blocks", "first layer", "linear probe"), "partial"),
    **dict.fromkeys(("untrained", "before training", "before fine-tuning", "base", "adapter off"), "as it is"),
    **dict.fromkeys(("zero-shot", "few-shot", "calibrated"), "as it is"),
    # Controls: trained like the others, on labels with nothing to learn, or little.
    **dict.fromkeys(("random labels", "random targets", "base's labels"), "as it is"),
    **dict.fromkeys(("from scratch", "random weights"), "scratch"),
    **dict.fromkeys(("noise", "majority class", "random directions"), "chance"),
    "with the adapter": "lora",
}
_NEUTRAL = (COLOURS[6], COLOURS[2], COLOURS[5], COLOURS[4], COLOURS[3])  # neither full's nor LoRA's
_RANKS = ("#f5b183", COLOURS[1], "#6b2f00")  # LoRA's colour, from light (a low rank) to dark
_RANK_PLACES = (0, 3, 8), (0.0, 0.5, 1.0)  # log2 of the ranks 1, 8, 256, and their places on that ramp
STATISTICS = {
    "effective_rank": "effective rank of the update",
    "stable_rank": "stable rank of the update",
    "energy_rank": "directions with 90 % of the update's energy",
    "norm": "norm of the update (Frobenius)",
    "relative_norm": "norm of the update / of the weight",
    "amplification": "amplification factor",
}


def use_style() -> None:
    """One style for every figure: 150 dots per inch, light grid, open frame."""
    plt.rcParams.update(
        {
            "figure.dpi": DPI,
            "figure.figsize": (6.4, 4.0),
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": "medium",
            "grid.alpha": 0.3,
            "legend.frameon": False,
        }
    )


def curves(histories: Mapping[str, History], unit: str = "nats per token", ax: Axes | None = None) -> Axes:
    """The validation loss against steps, a line with a colour and a marker for each run.

    Runs of different methods have their methods' colours, other runs those of their labels (see :func:`line_styles`).
    """
    ax = ax or plt.subplots()[1]
    names = [history.method["name"] for history in histories.values()]
    by_method = len(set(names)) == len(names) and METHOD_COLOURS.keys() >= set(names)
    # Otherwise by their labels, such as "from scratch" and "fine-tuned", which are both of full fine-tuning.
    styles = line_styles(names if by_method else histories).values()
    for (label, history), style in zip(histories.items(), styles, strict=True):
        steps, values = history.curve("validation_loss")
        marker = style["marker"] if len(steps) <= 25 else None
        ax.plot(steps, values, color=style["color"], marker=marker, label=label)
    ax.set(xlabel="training step", ylabel=f"validation loss ({unit})")
    ax.legend()
    return ax


def line_styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """label -> colour, marker and line style: a method has one colour in every figure, and so has each rank of LoRA.

    Args:
        labels: such as "full", "LoRA r=8", "LoRA rank 64", "head", "zero-shot"; several of one colour, and those of
            unknown methods, differ in marker and line.
    """
    parsed = {label: re.fullmatch(r"(.*?)[\s,]*(?:(?:r ?=|rank) ?(\d+))?", label) for label in labels}
    ramp = LinearSegmentedColormap.from_list("ranks", _RANKS)
    styles = {}
    for i, (label, match) in enumerate(parsed.items()):
        name, rank = (match[1].lower(), match[2]) if match else (label.lower(), None)
        colour = METHOD_COLOURS.get(_SAME_METHOD.get(name, name), COLOURS[i % len(COLOURS)])
        if rank and name in ("lora", ""):
            colour = to_hex(ramp(np.interp(np.log2(int(rank)), *_RANK_PLACES)))
        styles[label] = {**_style(i), "color": colour}
    return styles


def _style(i: int) -> dict[str, Any]:
    """Return colour, marker and line style of the ``i``-th line."""
    cues = {"color": COLOURS, "marker": MARKERS, "linestyle": LINES}
    return {name: values[i % len(values)] for name, values in cues.items()}


def panels(names: Collection[Any], **options: Any) -> tuple[Figure, dict[Any, Axes]]:
    """Return a figure and a row of Axes, one for each name, which is its title.

    Args:
        options: of ``plt.subplots``, such as ``figsize``.
    """
    figure, axes = plt.subplots(1, len(names), squeeze=False, **options)
    by_name = dict(zip(names, axes[0], strict=True))
    for name, ax in by_name.items():
        ax.set_title(name)
    return figure, by_name


def draw_spread(ax: Axes, x: Any, middle: Any, low: Any, high: Any, **look: Any) -> None:
    """Draw a line with bars from ``low`` to ``high``."""
    ax.errorbar(x, middle, [middle - low, high - middle], **{"capsize": 2, **look})


def log_axis(ax: Axes, ticks: Sequence[float], xlabel: str, form: str = ",", base: int = 2) -> None:
    """Make x a logarithmic axis with a tick at each of these values, and nowhere else."""
    ax.set_xscale("log", base=base)
    ax.set_xlabel(xlabel)
    ax.set_xticks(ticks, [f"{tick:{form}}" for tick in ticks])
    ax.minorticks_off()


def draw_seeds(ax: Axes, place: int, values: Series, style: Mapping[str, Any], upright: bool) -> None:
    """Draw a hollow mark for each seed and a bar at their mean, at a place on the other axis."""
    x, y, draw_bar, reach = [place] * len(values), values, ax.hlines, 0.3
    if not upright:
        x, y, draw_bar, reach = y, x, ax.vlines, 0.35
    ax.plot(x, y, **{**style, "linestyle": "none", "fillstyle": "none"})
    draw_bar(values.mean(), place - reach, place + reach, color=style["color"], linewidth=2)


def stacked_bars(bars: Mapping[str, Mapping[str, float]], ylabel: str, looks: Looks, ax: Axes | None = None) -> Axes:
    """One bar a key, its parts stacked in one order, with the total above.

    Args:
        bars: bar -> part -> height; all in one unit, which ``ylabel`` names.
        looks: part -> colour and hatch, such as ``PART_LOOKS``.
    """
    ax = ax or plt.subplots()[1]
    positions, bottom = range(len(bars)), np.zeros(len(bars))
    for part in dict.fromkeys(part for heights in bars.values() for part in heights):
        heights = np.array([each.get(part, 0.0) for each in bars.values()])
        ax.bar(positions, heights, bottom=bottom, width=0.6, label=part, **filling(*looks[part]))
        bottom += heights
    for position, total in zip(positions, bottom, strict=True):
        ax.text(position, total, f"{total:,.0f}", ha="center", va="bottom")
    ax.set_ylim(0, 1.08 * max(bottom, default=1))  # room for the total above the highest bar
    ax.set_xticks(positions, list(bars))
    ax.set_ylabel(ylabel)
    ax.grid(axis="x", visible=False)
    return legend_beside(ax)


def bills(bars: Mapping[str, Bill], ax: Axes | None = None, card_bytes: int | None = None) -> Axes:
    """Memory bills side by side: one bar each, its parts in the order of the step, the peak above.

    Args:
        card_bytes: the memory of a card, drawn as a line; the title then states which bills fit.
    """
    parts = _parts(bill.parts for bill in bars.values())
    heights = {label: {str(part): bill.parts.get(part, 0) / MIB for part in parts} for label, bill in bars.items()}
    ax = stacked_bars(heights, "memory at the peak of a step (MiB)", PART_LOOKS, ax)
    if card_bytes is not None:
        name = f"card of {card_bytes / GIB:g} GiB"
        ax.axhline(card_bytes / MIB, color="#000000", linestyle="--", label=name)
        legend_beside(ax)
        peaks = {label: bill.peak_bytes for label, bill in bars.items()}
        ax.set_ylim(0, 1.15 * max(card_bytes, *peaks.values()) / MIB)
        fits = [f"{label} {'fits' if peak <= card_bytes else 'does not fit'}" for label, peak in peaks.items()]
        ax.set_title(f"A {name}: {', '.join(fits)}")
    return ax


def ratios(
    series: Mapping[str, Mapping[int, float | tuple[float, float, float]]],
    ylabel: str,
    lines: Mapping[str, float] | None = None,
    ax: Axes | None = None,
    xlabel: str = "tokens per step",
) -> Axes:
    """Ratios against tokens per step, a line with markers for each series.

    Args:
        series: label -> tokens -> ratio, or the ratio and the ends of its interval. One of more than 12 values is a
            curve, beside which the others are markers without lines.
        lines: label -> a ratio to compare with, drawn as a horizontal line.
        xlabel: for another quantity than tokens.
    """
    ax = ax or plt.subplots()[1]
    curves = {label for label, values in series.items() if len(values) > 12}
    for i, (label, values) in enumerate(series.items()):
        points = [value if isinstance(value, tuple) else (value, value, value) for value in values.values()]
        middle, low, high = (np.array(column) for column in zip(*points, strict=True))
        style = {**_style(i), "color": _NEUTRAL[i % len(_NEUTRAL)]}
        if label in curves:
            ax.plot(list(values), middle, label=label, **{**style, "marker": None})
            continue
        style["linestyle"] = "none" if curves else style["linestyle"]
        reach = [middle - low, high - middle] if (low < high).any() else None
        ax.errorbar(list(values), middle, reach, capsize=3, fillstyle="none", markersize=8, label=label, **style)
    for i, (label, level) in enumerate((lines or {}).items()):
        ax.axhline(level, color="#000000", linewidth=1, linestyle=LINES[(i + 1) % len(LINES)], label=label)
    log_axis(ax, sorted({size for values in series.values() if len(values) <= 12 for size in values}), xlabel)
    ax.set_ylabel(ylabel)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _parts(bills: Iterable[Mapping[str, int]]) -> list[Part]:
    present = {part for parts in bills for part, size in parts.items() if size}
    return [part for part in PARTS if part in present]


def filling(colour: str, hatch: str) -> dict[str, Any]:
    """Return matplotlib's arguments for a bar or area: hatches and edges are white, on light colours dark."""
    if colour in _LIGHT:
        return {"facecolor": colour, "hatch": hatch, "edgecolor": "#555555", "linewidth": 0}
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "white"}


def legend_beside(ax: Axes) -> Axes:
    """Put the legend to the right of the Axes, with the last label on top, as in a stack of bars."""
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def spectrum(spectra: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Singular values, each divided by the largest, on a logarithmic scale; a line for each matrix.

    Args:
        spectra: label -> singular values, the largest first.
    """
    ax = ax or plt.subplots()[1]
    styles = line_styles(spectra)
    for label, values in spectra.items():
        S = np.asarray(values, dtype=float)
        every = max(1, len(S) // 12)  # about 12 markers a line
        ax.plot(np.arange(1, len(S) + 1), S / S[0], markevery=every, label=label, **styles[label])
    ax.set(xlabel="index of the singular value, largest first", ylabel="singular value / largest (no unit)")
    ax.set_yscale("log")
    ax.legend()
    return ax


def rank_verdict(verdict: RankVerdict, ax: Axes | None = None) -> Axes:
    """The loss of each rank minus that of the largest, with its 95 % bounds, and the margin that decides.

    Each bound is one-sided: with 95 % confidence the true difference is below the upper end, and with 95 % above the
    lower end.
    """
    ax = ax or plt.subplots()[1]
    judged = [rank for rank in verdict.ranks if rank.upper is not None]
    styles = {"enough": (COLOURS[2], "o"), "too small": (COLOURS[1], "v"), "open": (COLOURS[6], "s")}
    for status, (colour, marker) in styles.items():
        chosen = [(rank.rank, rank.difference, rank.lower, rank.upper) for rank in judged if rank.status == status]
        if chosen:
            draw_spread(ax, *np.array(chosen, dtype=float).T, fmt=marker, color=colour, capsize=3, label=status)
    ax.axhline(0, color="#000000", linewidth=0.8)
    ax.axhline(verdict.margin, color=COLOURS[0], linestyle="--", label=f"margin {verdict.margin:.3g}")
    ticks = [rank.rank for rank in verdict.ranks]
    ax.plot(ticks[-1], 0, "D", color="#000000", label="reference")
    rank_axis(ax, ticks)
    ax.set(ylabel=f"test loss above that of rank {ticks[-1]}", title=f"{len(verdict.seeds)} seeds: {verdict.answer}")
    ax.legend()
    return ax


def loss_by_rate(frame: DataFrame, ax: Axes | None = None, by: str = "rank", untrained: float | None = None) -> Axes:
    """Validation loss after the last step against the learning rate, a line a rank: mean, min and max over seeds.

    The lines are shifted sideways by a few per cent, so that their bars do not cover each other.

    Args:
        frame: from :func:`lora_lab.ablation.run.ablate`, of one method. A rate at which a seed failed or was
            stopped is left out.
        by: the column that distinguishes the lines; "method" for a frame of several methods at one rank.
        untrained: the loss before training, drawn as a line.
    """
    ax = ax or plt.subplots()[1]
    failed = frame[frame.outcome != "done"][[by, "lr"]].drop_duplicates().itertuples(index=False, name=None)
    last = frame[frame.step == frame.steps].set_index([by, "lr"]).drop(list(failed), errors="ignore")
    names = {value: f"rank {value:g}" if by == "rank" else str(value) for value in last.reset_index()[by].unique()}
    styles = line_styles([names[value] for value in (sorted(names) if by == "rank" else names)])
    for place, (value, losses) in enumerate(last.validation_loss.groupby(by, sort=by == "rank")):
        by_rate = losses.groupby("lr")
        mean = by_rate.mean()
        shifted = mean.index * 1.04 ** (place - (len(names) - 1) / 2)
        name = names[value]
        draw_spread(ax, shifted, mean, by_rate.min(), by_rate.max(), label=name, **styles[name])
    if untrained is not None:
        ax.axhline(untrained, color=METHOD_COLOURS["as it is"], linestyle=":", linewidth=1, label="untrained")
    log_axis(ax, sorted(last.reset_index()["lr"].unique()), "peak learning rate", "g", base=10)
    ax.set_ylabel("validation loss (mean, min and max over seeds)")
    if by == "rank":
        return legend_beside(ax)
    ax.legend()
    return ax


def by_rank(lines: Mapping[str, Mapping[int, float]], ylabel: str) -> Axes:
    """A quantity against the rank, on a logarithmic axis: a line for each label.

    Args:
        lines: label -> rank -> value; the last line is drawn in black, as what the others are compared with.
        ylabel: the quantity, with its unit.
    """
    ax = plt.subplots()[1]
    looks = [*map(_style, range(len(lines) - 1)), {"color": "#000000", "marker": "P", "linestyle": "-"}]
    for (label, values), look in zip(lines.items(), looks, strict=True):
        ax.plot(list(values), list(values.values()), label=label, **look)
    rank_axis(ax, sorted({rank for values in lines.values() for rank in values}))
    ax.set_ylabel(ylabel)
    return legend_beside(ax)


def best_rates(lines: Mapping[str, Mapping[int, BestRate]], full: BestRate | None = None, power: float = 0) -> Axes:
    """Best learning rates against the rank, both logarithmic, with resampled intervals; a line for each label.

    The end of a bar has no cap where the grid does not bound it, and a best rate at the edge of its grid no mark.

    Args:
        lines: label -> rank -> best rate.
        full: full fine-tuning's, drawn as a line with a band.
        power: a thin line falls as rank ** power from where the first line begins; none if it is 0.
    """
    ax = plt.subplots()[1]
    if full is not None and full.vertex is not None:
        blue = METHOD_COLOURS["full"]
        ax.axhline(full.vertex, color=blue, label="full fine-tuning")
        ax.axhspan(full.lower or full.tried, full.upper or full.tried, color=blue, alpha=0.15, linewidth=0)
    for i, (label, by_rank) in enumerate(lines.items()):
        style = {**_style(i), "color": (COLOURS[1], "#6b2f00", *_NEUTRAL)[i]}
        ranks = np.array([*by_rank]) * 1.06 ** (i - (len(lines) - 1) / 2)
        middles = np.array([best.vertex or best.tried for best in by_rank.values()])
        ends = np.array([(best.lower, best.upper) for best in by_rank.values()], dtype=float)  # NaN: not bounded
        bars = np.where(np.isnan(ends), np.outer(middles, (1 / 1.6, 1.6)), ends)
        ax.plot(ranks, middles, label=label, markevery=[best.vertex is not None for best in by_rank.values()], **style)
        ax.vlines(ranks, *bars.T, color=style["color"], linewidth=1)
        ax.plot(ranks, ends, "_", color=style["color"])
    every = sorted({rank for by_rank in lines.values() for rank in by_rank})
    if power:
        first = next(iter(lines.values()))
        start = first[min(first)]
        falling = (start.vertex or start.tried) * (np.array(every) / min(first)) ** power
        ax.plot(every, falling, color="#999999", linewidth=1, linestyle=(0, (1, 3)), label=f"falls as rank^{power:g}")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    rank_axis(ax, every)
    ax.set_ylabel("best peak learning rate (bars: resampled)")
    return legend_beside(ax)


def rank_axis(ax: Axes, ranks: Sequence[int]) -> None:
    """Make x a logarithmic axis of ranks, with a tick at each of those given."""
    log_axis(ax, ranks, "rank", "")


def learning_and_forgetting(frame: DataFrame) -> Axes:
    """The last step of each trial: test loss (learning) against off-domain loss (forgetting); lower is better in both.

    Args:
        frame: from :func:`lora_lab.ablation.run.ablate`.
    """
    ax = plt.subplots()[1]
    last = frame[frame.step == frame.steps]
    groups = last.groupby(["method", "rank"], dropna=False)
    # NaN: a method without a rank.
    labels = [str(method) if rank != rank else f"{method}, rank {rank:g}" for (method, rank), _ in groups]
    styles = line_styles(labels)
    for label, (_, trials) in zip(labels, groups, strict=True):
        ax.plot(trials.off_domain_loss, trials.test_loss, label=label, **{**styles[label], "linestyle": "none"})
    ax.set(xlabel="off-domain loss after training (forgetting)", ylabel="test loss after training (learning)")
    return legend_beside(ax)


def paths(frame: DataFrame, best: DataFrame, ax: Axes | None = None) -> Axes:
    """How each method's validation loss falls while its off-domain loss rises, from the start: mean over seeds.

    A star shows the start and a hollow marker the last step. A filled marker shows where early stopping stops: the mean
    of the trials, each at its own best step, so that it may lie beside the path.

    Args:
        frame: as for :func:`lora_lab.ablation.overfitting.summarise_trials`, of one size of the training set.
        best: a row for each trial to draw, as that function returns them, of each setup's best rate alone:
            ``summarise_trials(frame).merge(best_rates(frame))``.
    """
    ax = ax or plt.subplots()[1]
    styles = line_styles(best.setup.unique())
    for setup, trials in best.groupby("setup", sort=False):
        style = styles[str(setup)]
        rows = frame[(frame.setup == setup) & (frame.lr == trials.lr.iloc[0]) & frame.seed.isin(trials.seed)]
        mean = rows.groupby("step")[["validation_loss", "off_domain_loss"]].mean()
        loss = mean.validation_loss
        forgotten = mean.off_domain_loss - mean.off_domain_loss.iloc[0]
        ax.plot(0, loss.iloc[0], marker="*", markersize=12, color="#000000", zorder=3)
        ax.plot(forgotten, loss, linewidth=1.2, **{**style, "marker": None})
        ax.plot(trials.forgotten.mean(), trials.best_loss.mean(), label=setup, **style)
        ax.plot(forgotten.iloc[-1], loss.iloc[-1], fillstyle="none", **style)
    ax.set(xlabel="rise of the off-domain loss (forgetting)", ylabel="validation loss (learning)")
    return legend_beside(ax)


def paths_by_size(frame: DataFrame, best: DataFrame, unit: str = "nats", level: float | None = None) -> Figure:
    """:func:`paths`, a panel for each size of the training set.

    Args:
        frame, best: as for :func:`paths`, of several sizes.
        unit: of the losses.
        level: where to draw a dotted line, such as the rise at which nothing is known any more.
    """
    sizes = {f"{size:,} examples": size for size in sorted(best.n_train.unique())}
    figure, axes = panels(sizes, figsize=(9.5, 4.2), sharey=True)
    for title, ax in axes.items():
        size = sizes[title]
        paths(frame[frame.n_train == size], best[best.n_train == size], ax)
        if level is not None:
            ax.axvline(level, color="#000000", linestyle=":", linewidth=1)
        ax.set(xlabel=f"rise of the off-domain loss ({unit})", ylabel="")
    for ax in figure.axes[:-1]:
        if legend := ax.get_legend():  # the one beside the last panel serves all
            legend.remove()
    figure.axes[0].set_ylabel(f"validation loss ({unit})")
    return figure


def by_size(table: DataFrame, ylabel: str, ax: Axes | None = None) -> Axes:
    """A quantity against the size of the training set, a line for each method: mean, min and max over seeds.

    Args:
        table: from :func:`lora_lab.ablation.compare.compare_by_seed`, with sizes.
        ylabel: the quantity, with its unit.
    """
    ax = ax or plt.subplots()[1]
    styles = line_styles(table.setup.unique())
    for i, (setup, rows) in enumerate(table.groupby("setup", sort=False)):
        shifted = rows.n_train * 1.06**i  # so that error bars do not hide each other
        draw_spread(ax, shifted, rows["mean"], rows.least, rows.most, label=setup, **styles[str(setup)])
    log_axis(ax, sorted(table.n_train.unique()), "training examples")
    ax.set_ylabel(ylabel)
    return legend_beside(ax)


def gains(table: DataFrame) -> Figure:
    """By how much one way is better than another, against the size of the training set: a panel for each model.

    Args:
        table: columns ``model``, ``data`` (a line each), ``n_train``, and the gain in percentage points with its
            bounds, ``points``, ``points_lower`` and ``points_upper``.
    """
    models = table["model"].unique()
    figure, axes = panels(models, figsize=(4.4 * len(models), 3.6), sharey=True)
    for model, ax in axes.items():
        of_model = table[table["model"] == model]
        for i, data in enumerate(table["data"].unique()):
            rows = of_model[of_model["data"] == data]
            ends = rows["points"], rows["points_lower"], rows["points_upper"]
            draw_spread(ax, rows["n_train"] * 1.06**i, *ends, label=data, **_style(i))
        ax.axhline(0, color="#000000", linewidth=0.8)
        log_axis(ax, sorted(of_model["n_train"].unique()), "training examples")
    first = figure.axes[0]
    first.set_ylabel("percentage points")
    first.legend()
    return figure


def by_depth(frame: DataFrame, statistic: str = "stable_rank", ax: Axes | None = None) -> Axes:
    """A statistic of :func:`lora_lab.analysis.spectra.report` by depth, a line for each kind of layer.

    Each layer's value is divided by that of noise of its own shape and rank, where the report has it, so that one
    grey band around 1 serves all layers.

    Args:
        frame: the report; layers without a depth are left out.
        statistic: one of its columns.
    """
    ax = ax or plt.subplots()[1]
    layers = frame.dropna(subset=["depth"])
    values = _against_noise(layers, statistic, ax)
    for i, kind in enumerate(layers.kind.unique()):
        chosen = layers.kind == kind
        ax.plot(layers.depth[chosen].astype(int), values[chosen], markersize=4, label=kind, **_style(i))
    ax.set_ylim(bottom=0)
    return legend_beside(ax)


def medians_by_depth(frames: Mapping[str, DataFrame], statistic: str = "stable_rank", ax: Axes | None = None) -> Axes:
    """As :func:`by_depth` for several reports: medians over the layers of each block, and bands from min to max."""
    ax = ax or plt.subplots()[1]
    styles = line_styles(frames)
    for label, frame in frames.items():
        layers = frame.dropna(subset=["depth"])
        blocks = _against_noise(layers, statistic, ax).groupby(layers.depth.astype(int))
        medians, least, most = blocks.median(), blocks.min(), blocks.max()
        ax.plot(medians, label=f"{label}: median", **styles[label])
        colour = styles[label]["color"]
        ax.fill_between(medians.index, least, most, color=colour, alpha=0.15, label=f"{label}: min to max")
    ax.set_ylim(bottom=0)
    return legend_beside(ax)


def _against_noise(layers: DataFrame, statistic: str, ax: Axes) -> Series:
    """Return a statistic divided by the middle of its own layer's band, if there are bands; draw the band once."""
    name = STATISTICS.get(statistic, statistic)
    ax.set(xlabel="block, from the input", ylabel=name)
    if f"{statistic}_low" not in layers:
        return layers[statistic]
    low, high = layers[f"{statistic}_low"], layers[f"{statistic}_high"]
    middle = (low + high) / 2
    ax.set_ylabel(f"{name}\n/ that of noise of the same shape and rank")
    if not ax.patches:
        span = {"facecolor": "#cccccc", "edgecolor": "white", "hatch": "//", "linewidth": 0, "label": "noise, 95 %"}
        ax.axhspan((low / middle).min(), (high / middle).max(), **span)
    return layers[statistic] / middle


def after_truncation(
    table: DataFrame, ylabel: str, columns: Sequence[str] = ("gain", "energy"), ax: Axes | None = None
) -> Axes:
    """What is left when updates are truncated to a rank, against that rank.

    Args:
        table: columns ``setup``, ``rank`` and those to draw; with ``least`` and ``most`` the first one has error bars.
        ylabel: what is left, with its unit.
        columns: each is a line for each setup, in a line style of its own.
    """
    ax = ax or plt.subplots()[1]
    styles = line_styles(table.setup.unique())
    for setup in styles:
        rows = table[table.setup == setup].sort_values("rank")
        for column, line in zip(columns, LINES, strict=False):
            style = {**styles[setup], "linestyle": line, "label": f"{setup}: {column}"}
            if column == columns[0] and "least" in rows:
                draw_spread(ax, rows["rank"], rows[column], rows.least, rows.most, capsize=3, **style)
            else:
                ax.plot(rows["rank"], rows[column], **{**style, "fillstyle": "none"})
    log_axis(ax, sorted(table["rank"].unique()), "rank to which each update is truncated", "g")
    ax.set_ylabel(ylabel)
    ax.legend()
    return ax


def matrices(layer: LoRALinear) -> Figure:
    """A layer's W0, A, B and scaled B A in colour, laid out as one multiplies by hand: B left of the update, A above.

    Each has its own colour scale, on which the largest 1 % of its entries are all drawn in the darkest colour.

    Args:
        layer: has ``base``, ``lora_A``, ``lora_B`` and ``scaling``, as the learner's layer in lesson 03 does too.
    """
    parts = {
        "W0": ("$W_0$, frozen", layer.base.weight),
        "A": ("$A$", layer.lora_A),
        "B": ("$B$", layer.lora_B),
        "update": (f"update: {layer.scaling:g} $B A$", layer.scaling * (layer.lora_B @ layer.lora_A)),
    }
    mosaic: Any = [[".", ".", "A"], ["W0", "B", "update"]]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(9, 5), width_ratios=[5, 1.4, 5], height_ratios=[1, 4])
    for name, (symbol, part) in parts.items():
        array = part.detach().float().cpu().numpy()
        limit = float(np.quantile(np.abs(array), 0.99)) or 1.0
        look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "aspect": "auto"}
        image = axes[name].imshow(array, interpolation="nearest", **look)
        axes[name].set_title(f"{symbol} ({array.shape[0]} x {array.shape[1]})")
        axes[name].grid(False)
        axes[name].set(xticks=[], yticks=[])
        bar = figure.colorbar(image, ax=axes[name], format="%.2g", location="bottom" if name != "A" else "right")
        if name == "B":  # too narrow for more than two numbers
            bar.set_ticks([-0.75 * limit, 0.75 * limit])
    axes["W0"].set(xlabel="input", ylabel="output")
    axes["update"].set(xlabel="input")
    return figure


def answers(prompt: str, texts: Mapping[str, str], columns: int = 56) -> Figure:
    """What several models answer to one prompt, as speech bubbles one below another.

    Args:
        prompt: stands above, to the right.
        texts: who answers -> what; a name that :func:`line_styles` knows gives the bubble its method's colour.
        columns: where lines are broken.
    """
    styles = line_styles(texts)
    bubbles = [("you", prompt, "#555555"), *((who, text, styles[who]["color"]) for who, text in texts.items())]
    wrapped = [textwrap.wrap(text, columns) or [""] for _, text, _ in bubbles]
    heights = [len(lines) + 2.4 for lines in wrapped]  # in lines of text
    # A character of this size and font is 0.08 inches wide, a line 0.165 inches high, and the axes fill the figure.
    figure = plt.figure(figsize=(0.081 * (columns + 9.5), 0.175 * sum(heights)), layout="none")
    ax = figure.add_axes((0, 0, 1, 1))
    top = 0.0
    for (who, _, colour), lines, height in zip(bubbles, wrapped, heights, strict=True):
        right = who == "you"
        width = max(map(len, lines))
        left = columns + 6 - width if right else 0
        size = (width + 2, len(lines) + 0.8)
        box = FancyBboxPatch((left, top + 1.2), *size, boxstyle="round,pad=0,rounding_size=0.8", mutation_aspect=0.4)
        box.set(facecolor=to_rgba(colour, 0.12), edgecolor=colour, linewidth=1.2)
        ax.add_patch(box)
        side = "right" if right else "left"
        x = left + width + 2 if right else left
        ax.text(x, top + 0.7, who, ha=side, va="center", fontsize=9, fontweight="bold", color=colour)
        text = {"ha": "left", "va": "center", "fontsize": 9.5, "family": "monospace", "linespacing": 1.25}
        ax.text(left + 1, top + 1.6 + len(lines) / 2, "\n".join(lines), **text)
        top += height
    ax.set(xlim=(-0.5, columns + 9), ylim=(top + 0.3, 0))
    ax.axis("off")
    return figure


def pictures(
    images: Mapping[str, Any], columns: int = 3, limits: tuple[float, float] = (0, 255), ink: bool = False
) -> Figure:
    """Grey pictures below their names, all on one scale.

    Args:
        images: name -> (rows, columns) of brightness; all of one shape.
        columns: number of pictures side by side.
        limits: the values at which black and white begin.
        ink: large values are dark, as on paper, instead of bright.
    """
    arrays = {name: np.asarray(image, dtype=float) for name, image in images.items()}
    rows = -(-len(arrays) // columns)
    height, width = next(iter(arrays.values())).shape
    size = 8 / columns
    shape = {"figsize": (8, rows * (size * height / width + 0.35)), "squeeze": False}
    figure, axes = plt.subplots(rows, columns, **shape)
    for ax in axes.flat[len(arrays) :]:
        ax.axis("off")
    for ax, (name, array) in zip(axes.flat, arrays.items(), strict=False):
        ax.imshow(array, cmap="gray_r" if ink else "gray", vmin=limits[0], vmax=limits[1])
        ax.set(title=name, xticks=[], yticks=[])
        ax.grid(visible=False)
        ax.spines[:].set(visible=True, color="#999999")  # a picture's edge, also where it is white
    return figure


def energy(spectra: Mapping[str, Sequence[float]]) -> Axes:
    """The energy (sum of squared singular values) in the first terms, with a mark where it reaches 90 %.

    Args:
        spectra: label -> singular values, the largest first.
    """
    ax = plt.subplots()[1]
    styles = line_styles(spectra)
    share = 0.9  # of the energy
    for label, values in spectra.items():
        S = torch.as_tensor(np.asarray(values, dtype=float))
        percent = 100 * (S.square().cumsum(0) / S.square().sum()).numpy()
        count = int(energy_rank(S, share))
        name = f"{label}: {count} of {len(S)} terms"
        ax.plot(np.arange(1, len(S) + 1), percent, label=name, **styles[label], markevery=[count - 1])
    ax.axhline(100 * share, color="#000000", linestyle=":", linewidth=0.8)
    ax.set(xlabel="terms kept, largest first", ylabel="energy held (%)")
    ax.legend(title=f"{share:.0%} of the energy in")
    return ax


def scores(table: DataFrame, baselines: Mapping[str, float], axes_labels: Mapping[str, str]) -> Figure:
    """The scores of tasks, a panel each: a mark for each seed, a bar at their mean, a dotted line at the best baseline.

    Args:
        table: a row for each seed, with the columns task, setup and score. Setups are drawn in the order of the table.
        baselines: task -> the best score of a method without training.
        axes_labels: task -> the score and its unit.
    """
    figure, axes = panels(baselines, figsize=(2.6 * len(baselines), 3.6))
    styles = line_styles(table.setup.unique())
    for task, ax in axes.items():
        rows = table[table.task == task]
        setups = list(rows.setup.unique())
        for i, setup in enumerate(setups):
            draw_seeds(ax, i, rows.score[rows.setup == setup], styles[setup], upright=True)
        ax.axhline(baselines[task], color="#000000", linestyle=":", linewidth=1.2)
        ax.set_xticks(range(len(setups)), setups, rotation=60)
        top = 1.12 * max(baselines[task], rows.score.max())
        ax.set(ylabel=axes_labels[task], xlim=(-0.6, len(setups) - 0.4), ylim=(-0.03 * top, top))  # 0 shows its mark
    above = {"xytext": (0, 3), "textcoords": "offset points", "fontsize": "small"}
    figure.axes[0].annotate("best baseline", (-0.55, next(iter(baselines.values()))), **above)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)
