"""Figures that one lesson draws, for a point that it makes, in the order of the lessons.

What can be drawn of a model, a table or a record of one's own is in ``lora_lab.plots``, with colours and styles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from lora_lab.ablation.overfitting import training_losses
from lora_lab.costs.flops import ADAPTERS, FORWARD, INPUT, WEIGHT, Flops
from lora_lab.costs.memory import MIB, Bill, Part
from lora_lab.plots import (
    COLOURS,
    LINES,
    MARKERS,
    METHOD_COLOURS,
    draw_spread,
    filling,
    legend_beside,
    line_styles,
    log_axis,
    loss_by_rate,
    memory_of_a_step,
    panels,
    rank_axis,
)

if TYPE_CHECKING:
    from pandas import DataFrame


# Lesson 01, low rank


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
        _write_entries(ax, array, ".0f", white_above=0.7 * limit)
        ax.set(xticks=range(array.shape[1]), yticks=range(array.shape[0]), xlabel="column")
    figure.axes[0].set_ylabel("row")
    return figure


def _write_entries(ax: Axes, array: np.ndarray, form: str, white_above: float) -> None:
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


# Lesson 03, LoRA from scratch


def schematic(rank: int = 4, alpha: float = 8) -> Axes:
    """LoRA drawn to scale: the frozen W0, and beside it B and A, whose product has the shape of W0.

    Args:
        rank: r, at most 48.
        alpha: the update is scaled by alpha / rank.
    """
    ax, lora = plt.subplots(figsize=(8.5, 3.7))[1], METHOD_COLOURS["lora"]
    count, whole = rank * (64 + 48), 64 * 48
    boxes = {  # name -> left, rows, columns, colour, how it is treated
        "$W_0$": (0, 48, 64, "#d9d9d9", "frozen"),
        "$B$": (98, 48, rank, lora, "trained,\nstarts at zero"),
        "$A$": (118 + rank, rank, 64, lora, "trained,\nstarts random"),
    }
    for name, (left, rows, columns, colour, what) in boxes.items():
        ax.add_patch(Rectangle((left, -rows / 2), columns, rows, facecolor=colour, edgecolor="#333333"))
        middle = left + columns / 2
        ax.text(middle, rows / 2 + 2, name, ha="center", va="bottom", fontsize=14)
        ax.text(middle, -rows / 2 - 3, f"{rows} x {columns}, {what}", ha="center", va="top")
    ax.text(81, 0, r"$+\quad s$", ha="center", va="center", fontsize=14)
    update = rf"$h = W_0\,x + s\,B A\,x$ with $s$ = {alpha:g} / {rank} = {alpha / rank:.3g}"
    trained = f"LoRA trains {count:,} parameters beside {whole:,} frozen ones ({count / whole:.0%})"
    ax.set_title(f"{trained}\n{update}")
    ax.set(xlim=(-3, 185 + rank), ylim=(-42, 36), aspect="equal")
    ax.axis("off")
    return ax


# Lesson 04, memory


def memory_of_steps(bills: Mapping[str, Bill]) -> Figure:
    """A row for each step, on one scale: the whole step, and beside it the 20 operations before and after its peak.

    The step begins with its forward pass: what an earlier one left behind and is released first is not drawn.
    """
    size = {"figsize": (10, 3.5 * len(bills)), "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(len(bills), 2, width_ratios=[2, 1], **size)
    for (whole, near), (title, bill) in zip(axes, bills.items(), strict=True):
        begun = [moment for moment in bill.timeline if moment.phase != "before"]
        memory_of_a_step(replace(bill, timeline=begun), whole).set_title(title)
        whole.get_legend().remove()
        whole.texts[0].set_text(f"{whole.texts[0].get_text()} (see right)")
        last = begun[-1].phase
        if last not in [text.get_text() for text in whole.texts]:  # too narrow for its name
            at_the_top = whole.get_xaxis_transform()
            whole.text(99.5, 0.99, f"{last} →", ha="right", va="top", fontsize="small", transform=at_the_top)
        memory_of_a_step(bill, near, around_peak=20).set_title("the same, around the peak")
        near.set_ylabel("")
        logits = max(bill.timeline, key=lambda moment: moment.total_bytes).parts.get(Part.LOGITS, 0)
        if logits:
            near.text(2, bill.peak_bytes / MIB, f"{logits / MIB:,.0f} of it logits", va="center", fontsize="small")
    axes[0, 0].set_ylim(0, 1.2 * max(bill.peak_bytes for bill in bills.values()) / MIB)
    return figure


def saved_in_a_block(saved: Mapping[str, tuple[str, int, int, int]]) -> Axes:
    """What each layer of a transformer block saves for the backward pass, from its input down to its output.

    Args:
        saved: layer, in the order of computation -> what it saves, and how many values for each token: with both
            methods, with full fine-tuning alone, with LoRA alone.
    """
    ax = plt.subplots(figsize=(10, 0.42 * len(saved) + 1))[1]
    looks = {
        "both": (COLOURS[2], ""),
        "full fine-tuning alone": (METHOD_COLOURS["full"], "//"),
        "LoRA alone": (METHOD_COLOURS["lora"], ".."),
    }
    counts = np.array([values for _, *values in saved.values()])  # (layers, 3)
    ends = counts.cumsum(1)
    for i, (name, look) in enumerate(looks.items()):
        ax.barh(list(saved), counts[:, i], left=ends[:, i] - counts[:, i], height=0.6, label=name, **filling(*look))
    for row, (what, *values) in enumerate(saved.values()):
        text = " + ".join(f"{value:,}" for value in values if value) or "nothing"
        ax.text(ends[row, -1], row, f"  {text}   {what}", va="center", fontsize="small")
    ax.set(xlim=(0, 1.6 * ends.max()), xlabel="values stored for each token")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend()
    return ax


# Lesson 05, speed


def passes(steps: Mapping[str, Flops], ax: Axes | None = None) -> Axes:
    """The FLOPs of each step, from the forward pass to the weight gradients, and what is gone from the first one.

    Args:
        steps: label -> FLOPs of a step; what the first has and another lacks is drawn as an empty box.
    """
    ax = ax or plt.subplots(figsize=(9, 0.9 * len(steps) + 1.4))[1]
    full, lora = METHOD_COLOURS["full"], METHOD_COLOURS["lora"]
    looks = {FORWARD: ("#999999", ""), INPUT: ("#999999", ".."), ADAPTERS: (lora, "xx"), WEIGHT: (full, "//")}
    reference = next(iter(steps.values()))
    for row, step in enumerate(steps.values()):
        left = 0.0
        for name, look in looks.items():
            width, style = _gflop(step, name), filling(*look)
            gone = width == 0 < _gflop(reference, name)
            if gone:  # an empty box, as wide as what is missing
                width = _gflop(reference, name)
                style = {**filling("none", ""), "edgecolor": "#333333", "linestyle": "--"}
            ax.barh(row, width, left=left, height=0.6, **style)
            if width > 0.05 * reference.total / 1e9:
                text = f"gone: {width:,.0f}" if gone else f"{width:,.0f}"
                patch = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                ax.text(left + width / 2, row, text, ha="center", va="center", bbox=patch)
            elif width:  # too narrow for its number
                ax.text(left + width / 2, row - 0.32, f"{width:,.1f}", ha="center", va="bottom", fontsize="small")
            left += width
        share = f" ({step.total / reference.total:.2f})" if row else ""
        ax.text(left, row, f"  {step.total / 1e9:,.0f}{share}", va="center")
    handles = [Patch(**filling(*look), label=name) for name, look in looks.items()]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=4)
    ax.set_yticks(range(len(steps)), list(steps))
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel("GFLOP of a step")
    ax.grid(axis="y", visible=False)
    return ax


def _gflop(step: Flops, name: str) -> float:
    """Return the GFLOP of a pass without those of the adapters, or for ADAPTERS theirs in all passes."""
    if name == ADAPTERS:
        return step.part(ADAPTERS) / 1e9
    return (step.in_pass(name) - step.counts.get((ADAPTERS, name), 0)) / 1e9


def published(reports: Mapping[str, float], bound: float) -> Axes:
    """Published ratios of times, LoRA's over full fine-tuning's, beside the lowest ratio of FLOPs.

    Args:
        reports: source -> ratio.
        bound: no ratio of FLOPs is below it.
    """
    ax = plt.subplots(figsize=(9, 0.45 * len(reports) + 1.4))[1]
    ax.plot(list(reports.values()), range(len(reports)), "o", color="#000000", markersize=8)
    for row, ratio in enumerate(reports.values()):
        ax.text(ratio, row - 0.18, f"{ratio:.2f}", ha="center", va="bottom", fontsize="small")
    low, high = min(*reports.values(), bound) - 0.1, max(*reports.values(), 1) + 0.1
    areas = [(low, bound, COLOURS[5]), (bound, 1, "#ffffff"), (1, high, COLOURS[4])]
    words = ["faster than FLOPs explain", "faster, FLOPs may be why", "slower"]
    for (start, end, colour), text in zip(areas, words, strict=True):
        ax.axvspan(start, end, color=colour, alpha=0.2, linewidth=0)
        ax.text((start + end) / 2, -0.8, text, ha="center", va="center", fontsize="small")
    ax.axvline(bound, color="#000000", linestyle="--", label=f"{bound:.2f}, the bound of FLOPs")
    ax.axvline(1, color="#000000", label="equal")
    ax.legend(loc="lower left", fontsize="small")
    ax.set(xlim=(low, high), ylim=(len(reports) - 0.5, -1.1), xlabel="time of LoRA / time of full fine-tuning")
    ax.set_yticks(range(len(reports)), list(reports))
    ax.grid(axis="y", visible=False)
    return ax


# Lesson 06, which rank


def behind_full(gaps: Mapping[str, Mapping[int, tuple[float, float, float]]], margin: float, unit: str) -> Axes:
    """How far the loss of each setup is above full fine-tuning's after several numbers of steps, with bounds.

    Args:
        gaps: setup, such as "LoRA r=8" -> steps -> the mean difference, and its lower and upper bounds. At each number
            of steps the setups are drawn side by side.
        margin: up to which a setup counts as as good, drawn as a line.
        unit: of the loss.
    """
    ax = plt.subplots()[1]
    styles = line_styles(gaps)
    for i, (setup, by_steps) in enumerate(gaps.items()):
        middle, lower, upper = np.array(list(by_steps.values())).T
        places = np.array(list(by_steps)) * 2 ** (0.15 * (i - (len(gaps) - 1) / 2))
        look = {"fillstyle": "none", "markersize": 8, "capsize": 3, "label": setup}
        draw_spread(ax, places, middle, lower, upper, **look, **styles[setup])
    ax.axhline(0, color=METHOD_COLOURS["full"], linewidth=1, label="full")
    ax.axhline(margin, color="#000000", linewidth=1, linestyle=":", label="margin")
    log_axis(ax, sorted({steps for by_steps in gaps.values() for steps in by_steps}), "training steps")
    ax.set_ylabel(f"loss minus full fine-tuning's ({unit})")
    return legend_beside(ax)


def seed_by_seed(losses: DataFrame, ax: Axes | None = None) -> Axes:
    """What each seed alone says of the ranks: a grey line, and a star at its lowest loss; in black their mean.

    Args:
        losses: a row for each seed, a column for each rank; test losses in nats.
    """
    ax = ax or plt.subplots()[1]
    ranks = [int(rank) for rank in losses.columns]
    lora = METHOD_COLOURS["lora"]
    for i, row in enumerate(losses.to_numpy()):
        best = ranks[row.argmin()]
        ax.plot(ranks, row, color="#999999", linewidth=0.8, label=None if i else "one seed")
        ax.plot(best, row.min(), "*", color=lora, markersize=11, label=None if i else "its best rank")
    ax.plot(ranks, losses.mean(), "o-", color="#000000", label="mean of all seeds")
    rank_axis(ax, ranks)
    ax.set_ylabel("test loss (nats)")
    return legend_beside(ax)


# Lesson 07, overfitting


def training_curve(rows: DataFrame) -> Axes:
    """How a training curve is read: the lowest validation loss, the rise after it, and the gap at the end.

    Args:
        rows: as for :func:`lora_lab.ablation.overfitting.summarise_trials`, of one setup, rate and size, losses in
            nats. Seeds are averaged.
    """
    ax = plt.subplots()[1]
    mean = rows.assign(training=rows.validation_loss - rows.gap).groupby("step")[["training", "validation_loss"]].mean()
    setup = rows.setup.iloc[0]
    colour = line_styles([setup])[setup]["color"]
    validation, training = mean.validation_loss, mean.training.dropna()
    ax.plot(validation, color=colour, label="validation loss")
    ax.plot(training, color=colour, linestyle=":", label="training loss")
    lowest, stop, last = validation.min(), validation.index[int(validation.argmin())], validation.index[-1]
    ax.plot(stop, lowest, "o", color=colour)
    note: Any = {"textcoords": "offset points", "va": "center", "fontsize": "small"}
    ax.annotate(f"lowest: {lowest:.2f}, step {stop:.0f}", (stop, lowest), (8, -12), **note)
    ends, places, high = (lowest, training[last]), (last, 1.16 * last), validation[last]
    ax.vlines(places, ends, high, "#333333")
    ax.hlines([*ends, high], [stop, last, last], [*places, places[1]], "#999999", lw=0.8)
    for name, place, low in zip(("rise", "gap"), places, ends, strict=True):
        ax.annotate(f"{name} {high - low:.2f}", (place, (low + high) / 2), (5, 0), **note)
    ax.set(xlabel="training step", ylabel="loss (nats, mean of seeds)")
    ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= last])
    ax.set(xlim=(0, 1.32 * last), ylim=(0, None))
    ax.legend()
    return ax


def rigged(frame: DataFrame, rates: Mapping[str, float]) -> Axes:
    """Two setups at one rate each, and the headline that their rises after the lowest loss seem to allow.

    Args:
        frame: as for :func:`lora_lab.ablation.overfitting.summarise_trials`, of one size, losses in nats; other
            setups may be in it.
        rates: two setups -> learning rate; the headline is about the second one.
    """
    ax = plt.subplots()[1]
    styles, rises = line_styles(frame.setup.unique()), []
    for setup, rate in rates.items():
        rows = frame[(frame.setup == setup) & (frame.lr == rate)]
        mean = rows.groupby("step").validation_loss.mean()
        ends = rows.sort_values("step").groupby("seed").validation_loss.agg(["min", "last"])
        rises.append((ends["last"] - ends["min"]).mean())
        label = f"{setup}, rate {rate:g}: lowest {ends['min'].mean():.2f}, rise {rises[-1]:.2f}"
        ax.plot(mean, label=label, markevery=[int(mean.argmin())], **styles[setup])
    reference, setup = rates
    ax.set_title(f'"{setup} overfits {"MORE" if rises[1] > rises[0] else "LESS"} than {reference}!"')
    ax.set(xlabel="training step", ylabel="validation loss (nats, mean of seeds)", yscale="log", ylim=(0.4, 8))
    ax.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    ax.minorticks_off()
    ax.legend(loc="upper right")
    return ax


def lowest_and_rise(trials: DataFrame) -> Figure:
    """The lowest validation loss and the rise after it against the learning rate, a line for each setup.

    Args:
        trials: from :func:`lora_lab.ablation.overfitting.summarise_trials`, of one size, losses in nats.
            Seeds are averaged.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    means = trials.groupby(["setup", "lr"], sort=False)[["best_loss", "overfit"]].mean()
    styles = line_styles(trials.setup.unique())
    for setup, style in styles.items():
        left.plot(means.best_loss[setup].sort_index(), label=setup, **style)
        right.plot(means.overfit[setup].sort_index(), label=setup, **style)
    for ax in (left, right):
        log_axis(ax, sorted(trials.lr.unique()), "learning rate", "g", base=10)
    left.set(ylabel="lowest validation loss (nats)", ylim=(0, None))
    right.set_yscale("symlog", linthresh=0.01)
    right.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    right.set(ylabel="rise after the lowest (nats)", ylim=(0, max(1.0, 1.5 * means.overfit.max())))
    right.axhline(0.01, color="#999999", linewidth=0.8, linestyle=":")
    note = "logarithmic above the dotted line, linear below"
    right.text(0.03, 0.94, note, transform=right.transAxes, color="#666666", fontsize="x-small")
    legend_beside(right)
    return figure


def stopping_points(frame: DataFrame, compared: DataFrame, per_epoch: float, unit: str) -> Figure:
    """Validation losses, and beside them how much more each setup had risen than another at each stopping point.

    Args:
        frame: as for :func:`lora_lab.ablation.overfitting.by_stopping_point`, of one size. Seeds are averaged.
        compared: what that returns for "overfit".
        per_epoch: steps in an epoch.
        unit: of the loss.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    styles = line_styles(frame.setup.unique())
    for setup, rows in frame.groupby("setup", sort=False):
        mean = rows.groupby("step").validation_loss.mean()
        left.plot(mean.index / per_epoch, mean, label=setup, **styles[str(setup)])
    for i, (setup, rows) in enumerate(compared.groupby("setup", sort=False)):
        epochs = rows.step / per_epoch + 0.12 * i  # shifted, so that bounds do not hide each other
        draw_spread(right, epochs, rows.difference, rows.lower, rows.upper, label=setup, **styles[str(setup)])
    right.axhline(0, color="#000000", linewidth=0.8)
    left.set(xlabel="epoch", ylabel=f"validation loss ({unit})")
    right.set(xlabel="if training had stopped after epoch", ylabel=f"rise minus full's ({unit})")
    for ax in (left, right):
        ax.legend()
    return figure


def equal_training_loss(frame: DataFrame, compared: DataFrame, unit: str) -> Figure:
    """Validation loss against training loss, and beside it how much each setup differs from another at equal ones.

    Args:
        frame: as for :func:`lora_lab.ablation.overfitting.by_training_loss`, of one size. Seeds are averaged.
        compared: what that returns.
        unit: of the losses.
    """
    import pandas

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    styles = line_styles(frame.setup.unique())
    for setup, rows in frame.sort_values("step").groupby("setup", sort=False):
        trials = [trial.assign(training=training_losses(trial)) for _, trial in rows.groupby(["lr", "seed"])]
        mean = pandas.concat(trials).groupby("step")[["training", "validation_loss"]].mean().dropna()
        left.plot(mean.training, mean.validation_loss, label=setup, **styles[str(setup)])
    for i, (setup, rows) in enumerate(compared.groupby("setup", sort=False)):
        losses = rows.train_loss * 1.03**i  # shifted, so that bounds do not hide each other
        draw_spread(right, losses, rows.difference, rows.lower, rows.upper, label=setup, **styles[str(setup)])
    right.axhline(0, color="#000000", linewidth=0.8)
    xlabel = f"training loss ({unit}), falling to the right"
    log_axis(right, compared.train_loss.unique().tolist(), xlabel, "g", base=10)
    left.set(xlabel=xlabel, ylabel=f"validation loss ({unit})")
    right.set_ylabel(f"LoRA's loss minus full's ({unit})")
    for ax in (left, right):
        ax.invert_xaxis()
        ax.legend()
    return figure


# Lesson 08, forgetting


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


# Lesson 09, many tasks


def copies_and_adapters(model_mb: float, adapter_mb: float) -> Axes:
    """The files that four tasks need, drawn as squares whose areas are to scale.

    Left full fine-tuning, with a model for each task; right LoRA, with one base and an adapter for each task.

    Args:
        model_mb: size of the model, in MB.
        adapter_mb: size of an adapter, in MB.
    """
    ax = plt.subplots(figsize=(9.5, 2.6))[1]
    tasks = 4
    side = (adapter_mb / model_mb) ** 0.5  # of an adapter's square; a model's is 1
    start = 1.15 * tasks + 0.4  # LoRA's files begin here, after those of full fine-tuning
    end = 1.15 * tasks + 1.4 + 0.6 * tasks

    def square(left: float, side: float, name: str, colour: str, hatch: str = "") -> None:
        ax.add_patch(Rectangle((left, 0), side, side, edgecolor="white", facecolor=colour, hatch=hatch, linewidth=0))
        ax.text(left + side / 2, -0.08, name, ha="center", va="top")

    square(start, 1, "base", "#d9d9d9")
    for task in range(tasks):
        square(1.15 * task, 1, f"task {task + 1}", METHOD_COLOURS["full"], "//")
        square(1.15 * tasks + 1.8 + 0.6 * task, side, f"task {task + 1}", METHOD_COLOURS["lora"])
    full = f"full fine-tuning: {tasks} x {model_mb:,.0f} MB = {tasks * model_mb:,.0f} MB"
    lora = f"LoRA: {model_mb:,.0f} MB + {tasks} x {adapter_mb:.1f} MB = {model_mb + tasks * adapter_mb:,.0f} MB"
    ax.text((start - 0.55) / 2, 1.15, full, ha="center", va="bottom")
    ax.text((start + end) / 2, 1.15, lora, ha="center", va="bottom")
    ax.set(xlim=(-0.1, end + 0.3), ylim=(-0.3, 1.4), aspect="equal")
    ax.set_title("A further task costs an adapter instead of a model (areas are to scale)")
    ax.axis("off")
    return ax


def effect_of_adapters(changes: DataFrame, ax: Axes | None = None) -> Axes:
    """What each adapter does to the loss of each task: below zero (orange) it helps.

    Args:
        changes: the loss with the adapter minus that of the base, in nats per token; a row for each adapter, a column
            for each task.
    """
    ax = ax or plt.subplots(figsize=(7.2, 1.6 + 0.6 * len(changes)))[1]
    limit = 3.0  # nats per token: from there on, colours are the darkest
    picture = ax.imshow(changes, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    _write_entries(ax, changes.to_numpy(), "+.2f", white_above=0.6 * limit)
    ax.set_xticks(range(len(changes.columns)), changes.columns)
    ax.set_yticks(range(len(changes)), changes.index)
    ax.set(xlabel="test loss of the task", ylabel="adapter")
    ax.figure.colorbar(picture, ax=ax, extend="both", label="change in loss\n(nats per token)")
    return ax


# Lesson 10, variants


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
    """Differences from a reference with their bounds, a row for each method and a mark for each rule of comparison.

    Args:
        table: columns ``setup``, ``rule``, ``difference``, ``lower`` and ``upper``, from
            :func:`lora_lab.ablation.compare.compare_by_seed` and a name for the rule.
        xlabel: what differs from what, with its unit.
        margin: a difference that does not matter, drawn as a grey band.
    """
    ax = plt.subplots(figsize=(8, 3.8))[1]
    setups, rules = list(table.setup.unique()), list(table.rule.unique())
    if margin is not None:
        ax.axvspan(-margin, margin, color="#bbbbbb", alpha=0.5, linewidth=0, label=f"margin: ±{margin:g}")
    ax.axvline(0, color="#000000", linewidth=1)
    shades = np.linspace(0, 0.65, len(rules))[::-1]
    for i, rule in enumerate(rules):
        rows = table[table.rule == rule]
        position = [setups.index(setup) + 0.22 * (i - (len(rules) - 1) / 2) for setup in rows.setup]
        reach = [rows.difference - rows.lower, rows.upper - rows.difference]
        style = {"fmt": MARKERS[i], "color": str(shades[i]), "capsize": 3, "markersize": 7}
        ax.errorbar(rows.difference, position, xerr=reach, label=rule, **style)
    ax.set(yticks=range(len(setups)), yticklabels=setups, ylim=(len(setups) - 0.5, -0.5), xlabel=xlabel)
    ax.grid(axis="y", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


# Lesson 11, what training wrote


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
