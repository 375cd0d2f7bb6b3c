"""Figures of lesson 07, overfitting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.ablation.overfitting import training_losses
from lora_lab.plots import line_styles, log_axis

if TYPE_CHECKING:
    from pandas import DataFrame


def training_curve(rows: DataFrame, per_epoch: float, unit: str) -> Axes:
    """How a training curve is read: the lowest validation loss, the rise after it, and the gap at the end.

    Args:
        rows: as for :func:`lora_lab.ablation.overfitting.summarise_trials`, of one setup, rate and size. Seeds are
            averaged.
        per_epoch: steps in an epoch.
        unit: of the losses.
    """
    ax = plt.subplots()[1]
    mean = rows.assign(training=rows.validation_loss - rows.gap).groupby("step")[["training", "validation_loss"]].mean()
    mean.index = mean.index / per_epoch
    setup = rows.setup.iloc[0]
    colour = line_styles([setup])[setup]["color"]
    validation, training = mean.validation_loss, mean.training.dropna()
    ax.plot(validation, color=colour, label="validation loss")
    ax.plot(training, color=colour, linestyle=":", label="training loss")
    lowest, stop, last = validation.min(), validation.index[int(validation.argmin())], validation.index[-1]
    ax.plot([0, last], [validation.iloc[0]] * 2, "--", color="#999999", label="validation loss before training")
    ax.plot(stop, lowest, "o", color=colour)
    note: Any = {"textcoords": "offset points", "va": "center"}
    ax.annotate(f"lowest: {lowest:.2f}\nepoch {stop:g}", (stop, lowest), (0, -22), ha="right", fontsize="small", **note)
    ends, places, high = (lowest, training[last]), (last, 1.16 * last), validation[last]
    ax.vlines(places, ends, high, "#333333")
    ax.hlines([*ends, high], [stop, last, last], [*places, places[1]], "#999999", lw=0.8)
    for name, place, low in zip(("rise", "gap"), places, ends, strict=True):
        ax.annotate(f"{name} {high - low:.2f}", (place, (low + high) / 2), (5, 0), **note)
    ax.set(xlabel="epoch", ylabel=f"loss ({unit})")
    ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= last])
    ax.set(xlim=(0, 1.36 * last), ylim=(0, 1.25 * high))
    ax.legend(loc="upper left", ncols=2)
    return ax


def two_views(frame: DataFrame, per_epoch: float, unit: str, fit: float) -> Figure:
    """Validation losses after each epoch, and beside them the same by training loss.

    Args:
        frame: as for :func:`lora_lab.ablation.overfitting.by_training_loss`, of one size. Seeds are averaged.
        per_epoch: steps in an epoch.
        unit: of the losses.
        fit: a training loss that is marked.
    """
    import pandas

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
    styles = line_styles(frame.setup.unique())
    for setup, rows in frame.sort_values("step").groupby("setup", sort=False):
        trials = [trial.assign(training=training_losses(trial)) for _, trial in rows.groupby(["lr", "seed"])]
        mean = pandas.concat(trials).groupby("step")[["training", "validation_loss"]].mean()
        left.plot(mean.index / per_epoch, mean.validation_loss, label=setup, **styles[str(setup)])
        right.plot(mean.training, mean.validation_loss, **styles[str(setup)])  # there is none where it is not known
    right.axvline(fit, color="#999999", linestyle="--", linewidth=1)
    right.invert_xaxis()
    left.set(xlabel="epoch", ylabel=f"validation loss ({unit})")
    right.set_xlabel(f"training loss ({unit}), falling to the right")
    left.legend()
    return figure


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


def lowest_and_rise(trials: DataFrame) -> Axes:
    """The lowest validation loss and the rise after it against the learning rate, two lines for each setup.

    Args:
        trials: from :func:`lora_lab.ablation.overfitting.summarise_trials`, of one size, losses in nats.
            Seeds are averaged.
    """
    ax = plt.subplots()[1]
    means = trials.groupby(["setup", "lr"], sort=False)[["best_loss", "overfit"]].mean()
    for setup, style in line_styles(trials.setup.unique()).items():
        lowest: Any = style | {"linestyle": "-", "label": f"{setup}: lowest loss"}
        rise: Any = style | {"linestyle": ":", "label": f"{setup}: rise after it", "fillstyle": "none"}
        ax.plot(means.best_loss[setup], **lowest)
        ax.plot(means.overfit[setup], **rise)
    log_axis(ax, sorted(trials.lr.unique()), "learning rate", "g", base=10)
    ax.set(ylabel="validation loss (nats, mean of seeds)", ylim=(0, 1.35 * ax.get_ylim()[1]))
    ax.legend(loc="upper right", ncols=2)
    return ax
