"""Figures of lesson 07, overfitting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.ablation.overfitting import training_losses
from lora_lab.plots import (
    draw_spread,
    legend_beside,
    line_styles,
    log_axis,
)

if TYPE_CHECKING:
    from pandas import DataFrame


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
