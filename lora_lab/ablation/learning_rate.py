r"""Which learning rate is best? Grids that are widened until the best rate is inside, and a vertex with an interval.

    template = Trial(LoRA(8, 16), 1e-3, steps=60)
    frame = tune(model, task, {"r=8": template}, {"r=8": rates_around(1e-3)}, range(3), "runs/rates")
    print(best_rate(losses_by_rate(frame)))

Around its minimum the loss is nearly a parabola in the logarithm of the learning rate, whereas a grid knows its best
rate only up to a factor. The vertex of the parabola through the best rate of the grid and its two neighbours is finer:
from the slopes s of the mean losses on either side, taken at the middles x of the two intervals in log(lr), it is where
the slope is zero:

    log(lr*) = x_left - s_left (x_right - x_left) / (s_right - s_left)

The interval is from a bootstrap over the seeds and, where losses are known by blocks of examples, over those
(:func:`lora_lab.ablation.stats.resampled_means`, which states how far it can be trusted with few seeds).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lora_lab.ablation.blocks import block_losses_of
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.results import OUT_OF_MEMORY, STOPPED
from lora_lab.ablation.run import ablate
from lora_lab.ablation.stats import CONFIDENCE, RESAMPLES, interval, resampled_means
from lora_lab.costs.fake import Factory
from lora_lab.task import Task

if TYPE_CHECKING:
    import pandas

_SIGNIFICANT = 3  # digits of a rate


def rates_around(centre: float, factor: float = 2.0, count: int = 5) -> tuple[float, ...]:
    """An ascending grid of rates, each ``factor`` times the one before, with ``centre`` in the middle.

    Raises:
        ValueError: the centre is not positive, the factor not above 1, or the count below 1.
    """
    if not (centre > 0 and factor > 1 and count >= 1):
        raise ValueError(
            f"centre is {centre!r}, factor {factor!r} and count {count!r}, but they must be a positive rate, a number "
            "above 1 and at least 1."
        )
    return tuple(_rounded(centre * factor ** (i - count // 2)) for i in range(count))


def _rounded(rate: float) -> float:
    return float(f"{rate:.{_SIGNIFICANT}g}")


def rate_beyond(lrs: Sequence[float], edge: str) -> float:
    """The rate with which a grid of at least two goes on at its edge, by the ratio there.

    Args:
        lrs: the rates tried.
        edge: "smallest" or "largest".
    """
    grid = sorted(lrs)
    return _rounded(grid[0] ** 2 / grid[1] if edge == "smallest" else grid[-1] ** 2 / grid[-2])


@dataclass(frozen=True)
class Choice:
    """The rate of the lowest mean validation loss among those that have a result for every seed.

    If the trials were judged by :class:`lora_lab.ablation.blocks.BlockLosses`, that is the loss of those blocks.

    ``lr`` and ``validation_loss`` are None if there is none, and ``rows`` are its trials. ``note`` lists the rates that
    do not count, with the reason, and an edge of the grid that was stopped early where nothing else lies beyond the
    choice. ``edge`` is "smallest", "largest" or "only" where nothing is known beyond the rate: rates that are missing
    or ran out of memory say nothing, whereas one that diverged or was stopped is worse. ``diverged`` is the rate next
    to the choice if it diverged and no rate that counts lies beyond; the best may lie between the two.
    """

    lr: float | None
    validation_loss: float | None
    rows: pandas.DataFrame
    note: str = ""
    edge: str = ""
    diverged: float | None = None


def choose_rate(rows: pandas.DataFrame, seeds: Sequence[int]) -> Choice:
    """Choose by the validation losses after the last step.

    Args:
        rows: the last row of each trial of one setup, as in the table of :func:`lora_lab.ablation.ablate`.
        seeds: which a rate needs to count.
    """
    tried = sorted(map(float, rows["lr"].unique()))
    complete, incomplete, stopped_early, diverged = [], [], [], []
    for lr in tried:
        trials = rows[rows["lr"] == lr]
        done = trials[(trials["outcome"] == "done") & trials["test_loss"].notna() & trials["validation_loss"].notna()]
        stopped = set(map(int, trials.loc[trials["outcome"] == STOPPED, "seed"]))
        failed = sorted(set(map(int, trials["seed"])) - set(map(int, done["seed"])) - stopped)
        missing = sorted(set(seeds) - set(map(int, trials["seed"])))
        gaps = [f"{_listed(part)} {word}" for part, word in ((failed, "failed"), (missing, "missing")) if part]
        if (trials["outcome"] == "failed").any() and not trials["reason"].str.startswith(OUT_OF_MEMORY).any():
            diverged.append(lr)
        if gaps:
            incomplete.append(f"lr {lr:g} does not count ({', '.join(gaps)})")
        elif stopped:  # validation has ruled it out already
            stopped_early.append(lr)
        else:
            done = done.sort_values("seed")
            loss = fmean(fmean(block_losses_of(row, "validation")) for row in done.to_dict("records"))
            complete.append((loss, lr, done))
    if not complete:
        return Choice(None, None, rows[:0], ", ".join(incomplete))
    loss, lr, done = min(complete, key=lambda choice: choice[:2])  # of equal means, the smaller rate
    counted = [each for _, each, _ in complete]
    known = sorted({*counted, *stopped_early, *diverged})
    edge = "only" if len(known) == 1 else {known[0]: "smallest", known[-1]: "largest"}.get(lr, "")
    above, below = [each for each in diverged if each > lr], [each for each in diverged if each < lr]
    next_diverged = min(above) if above and lr == max(counted) else max(below) if below and lr == min(counted) else None
    for rate, name in ((tried[0], "smallest"), (tried[-1], "largest")):
        beyond = [each for _, each, _ in complete if lr < each <= rate or rate <= each < lr]
        if rate in stopped_early and not beyond:
            incomplete.append(f"lr {rate:g}, the {name} tried, was stopped early")
    return Choice(lr, loss, done, ", ".join(incomplete), edge, next_diverged)


def _listed(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def last_rows(frame: pandas.DataFrame) -> pandas.DataFrame:
    """One row for each trial: its last evaluation, its failure, or its first row if it was stopped."""
    first = (frame["outcome"] == STOPPED) & ~(frame["step"] > 0)  # of a stopped trial its settings count, no loss
    return frame[(frame["outcome"] == "failed") | first | (frame["step"] == frame["steps"])]


def tune(
    model_factory: nn.Module | Factory,
    task: Task | Callable[[], Task],
    setups: Mapping[str, Trial],
    lrs: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    folder: str | Path | None = None,
    *,
    widen: int = 4,
    beyond: int = 1,
    **options: Any,
) -> pandas.DataFrame:
    """Train each setup at its rates, and at rates beyond as long as the best is at the edge.

    A rate at the edge of its grid says only that the best may be further out, so no verdict can rest on it. Between the
    best rate and one beyond it that diverged another is added, halfway by factors.

    Args:
        model_factory, task, folder, **options: as for :func:`lora_lab.ablation.ablate`.
        setups: how each trains; its own rate and seed do not count. Setups may be equal: they share their trials.
        lrs: the rates to begin with, at least two for each setup. A grid goes on by the ratio at its edge.
        seeds: train at each rate.
        widen: how many rates may be added to a grid.
        beyond: how many rates shall lie on either side of the best. With one the best is inside; with two the interval
            of :func:`best_rate` is mostly bounded too, for which the best of every sample must be inside.

    Returns:
        The table of ablate with a column ``setup``, in the order of ``setups``.

    Raises:
        ValueError: a setup has fewer than two rates; or as ablate.
    """
    grids = {setup: sorted({float(lr) for lr in lrs[setup]}) for setup in setups}
    if short := [setup for setup, grid in grids.items() if len(grid) < 2]:
        raise ValueError(
            f"The setup {short[0]!r} has the rates {grids[short[0]]}, but needs at least two to begin with."
        )
    most = {setup: len(grid) + widen for setup, grid in grids.items()}
    with nullcontext(folder) if folder is not None else TemporaryDirectory() as place:
        return _widened(model_factory, task, setups, grids, most, beyond, seeds, place, options)


def _widened(
    model_factory: nn.Module | Factory,
    task: Task | Callable[[], Task],
    setups: Mapping[str, Trial],
    grids: dict[str, list[float]],
    most: Mapping[str, int],
    beyond: int,
    seeds: Sequence[int],
    folder: str | Path,
    options: Mapping[str, Any],
) -> pandas.DataFrame:
    while True:
        trials = {
            setup: [replace(template, lr=lr, seed=seed) for lr in grids[setup] for seed in seeds]
            for setup, template in setups.items()
        }
        table = ablate(model_factory, task, [*chain(*trials.values())], folder, **options)
        frame = labelled(table, trials)
        choices = {str(setup): choose_rate(last_rows(rows), seeds) for setup, rows in frame.groupby("setup")}
        added = {setup: _next_rate(choice, grids[setup], beyond) for setup, choice in choices.items()}
        added = {setup: rate for setup, rate in added.items() if rate is not None and len(grids[setup]) < most[setup]}
        if not added:
            return frame
        for setup, rate in added.items():
            grids[setup] = sorted([*grids[setup], rate])


def _next_rate(choice: Choice, grid: Sequence[float], beyond: int) -> float | None:
    """The rate to try next, if the best is not inside the rates that count; None too if it was tried already."""
    if choice.lr is None:
        return None
    below = grid.index(choice.lr)
    above = len(grid) - 1 - below
    if choice.diverged is not None:
        rate = _rounded(math.sqrt(choice.lr * choice.diverged))
    elif choice.edge == "smallest" or below < beyond:
        rate = rate_beyond(grid, "smallest")
    elif choice.edge == "largest" or above < beyond:
        rate = rate_beyond(grid, "largest")
    else:
        return None
    return None if rate in grid else rate


def labelled(table: pandas.DataFrame, trials: Mapping[str, Sequence[Trial]]) -> pandas.DataFrame:
    """A sweep's table with a column ``setup``, setup after setup; trials that two setups share are there twice.

    Args:
        table: what ablate returned for all the trials.
        trials: of each setup.
    """
    import pandas

    identity = {"task": table["task"].iloc[0], "model": table["model"].iloc[0]}
    keys = {setup: [trial.bound(**identity).key for trial in of_setup] for setup, of_setup in trials.items()}
    parts = [table[table["key"].isin(of_setup)].assign(setup=setup) for setup, of_setup in keys.items()]
    return pandas.concat(parts, ignore_index=True)


# The best rate


def losses_by_rate(frame: pandas.DataFrame) -> dict[float, np.ndarray]:
    """rate -> the validation losses of one setup's trials after the last step, (seeds, blocks of examples).

    There are several blocks if the trials were judged by :class:`lora_lab.ablation.blocks.BlockLosses`. Only rates that
    have a result for every seed are there.

    Raises:
        ValueError: there is no such rate, or the frame has several setups.
    """
    if "setup" in frame and frame["setup"].nunique() > 1:
        raise ValueError(f"The frame has the setups {[*frame['setup'].unique()]}, but must have one; select its rows.")
    rows = last_rows(frame)
    seeds, losses = sorted(rows["seed"].unique()), {}
    done = rows[rows["outcome"] == "done"].sort_values("seed")
    for lr in map(float, sorted(done["lr"].unique())):
        at_rate = done[done["lr"] == lr]
        if at_rate["seed"].tolist() == seeds:
            losses[lr] = np.array([block_losses_of(row, "validation") for row in at_rate.to_dict("records")])
    if not losses:
        raise ValueError("No learning rate has a result for every seed; run the trials that are missing.")
    return losses


@dataclass(frozen=True)
class BestRate:
    """The best learning rate, as far as the trials tell.

    Args:
        tried: the rate of the lowest mean loss among those tried.
        loss: that mean, in the task's unit.
        vertex: of the parabola; None if ``tried`` is at an edge.
        lower, upper: the two-sided 95 % interval of the vertex; None where it reaches beyond the rates tried, and if
            there is only one loss a rate, so that there is no interval.
        edge: "smallest" or "largest" where ``tried`` is that of the rates that count, else "".
        seeds, blocks: how many were resampled.
    """

    tried: float
    loss: float
    vertex: float | None
    lower: float | None
    upper: float | None
    edge: str
    seeds: int
    blocks: int

    def __str__(self) -> str:
        if self.vertex is None:
            return f"{self.tried:.3g}, the {self.edge} rate tried, so the best may lie beyond"
        if self.seeds * self.blocks == 1:
            return f"{self.vertex:.3g} (one loss per rate, so no interval; best rate tried: {self.tried:.3g})"
        lower = "below all tried" if self.lower is None else f"{self.lower:.3g}"
        upper = "above all tried" if self.upper is None else f"{self.upper:.3g}"
        seeds = f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        return f"{self.vertex:.3g} ({CONFIDENCE:.0%}, {seeds}: {lower} to {upper}; best rate tried: {self.tried:.3g})"


def best_rate(losses: Mapping[float, np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> BestRate:
    """The vertex of the parabola around the rate of the lowest mean loss, with its interval.

    Args:
        losses: rate -> losses (seeds, blocks), the same seeds and examples for all rates.
        resamples: of the bootstrap.
        seed: of the resampling.

    Raises:
        ValueError: the losses of two rates differ in shape, or there is no rate.
    """
    rates, values = _stacked(losses)
    means = values.mean(axis=(1, 2))  # (rates,)
    lowest = int(means.argmin())
    log_vertex = _log_vertices(np.log(rates), means[:, None])[0]
    bounds = map(math.exp, interval(sample_vertices(losses, resamples, seed)))
    lower, upper = (bound if 0 < bound < math.inf and values[0].size > 1 else None for bound in bounds)
    return BestRate(
        tried=float(rates[lowest]),
        loss=float(means[lowest]),
        vertex=float(np.exp(log_vertex)) if math.isfinite(log_vertex) else None,
        lower=lower,
        upper=upper,
        edge="" if math.isfinite(log_vertex) else "largest" if log_vertex > 0 else "smallest",
        seeds=values.shape[1],
        blocks=values.shape[2],
    )


def sample_vertices(losses: Mapping[float, np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """log(lr*) in each sample of the bootstrap, (resamples,); infinite where the lowest mean is at an edge.

    Setups that were trained on the same seeds and judged on the same examples, and are resampled by the same ``seed``,
    share their samples, so that differences of these numbers are paired.
    """
    rates, values = _stacked(losses)
    return _log_vertices(np.log(rates), resampled_means(values, resamples, seed))


def slope(samples: Mapping[int, np.ndarray] | Mapping[float, np.ndarray]) -> tuple[float, float, float]:
    """How the best rate goes with a size x, such as the rank: p in lr* ~ x^p, as :func:`powers` with one size."""
    (power,) = powers({(x,): of_size for x, of_size in samples.items()})
    return power


def powers(samples: Mapping[tuple[float, ...], np.ndarray]) -> list[tuple[float, float, float]]:
    """How the best rate goes with several sizes, such as alpha and rank: p and q in lr* ~ x^p y^q.

    By least squares in logarithms. Where a best rate is beyond its grid it may be anywhere there, and so may the power.

    Args:
        samples: (x, y, ...) -> what :func:`sample_vertices` returned there; more of them than sizes.

    Returns:
        For each size the median of its power over the samples, NaN if it is beyond the grids, and the bounds of its
        two-sided 95 % interval, infinite where the grids do not bound it.

    Raises:
        ValueError: there are too few sizes to fit, or they do not differ.
    """
    sizes = np.log(np.array([*samples]))  # (setups, sizes)
    design = np.column_stack([sizes, np.ones(len(sizes))])
    if sizes.ndim < 2 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError(f"A power cannot be fitted to the sizes {[*samples]}; give more that differ.")
    vertices = np.array([*samples.values()])  # (setups, resamples)
    fitted = []
    for weights in np.linalg.pinv(design)[:-1]:  # (setups,): what each setup contributes to the power of a size
        with np.errstate(invalid="ignore"):  # beyond two grids in opposite directions: unknown
            power = np.where(weights[:, None] == 0, 0, weights[:, None] * vertices).sum(axis=0)
        middle = float(np.median(np.nan_to_num(power, nan=math.inf, posinf=math.inf, neginf=-math.inf)))
        fitted.append((middle if math.isfinite(middle) else math.nan, *_bounds(power)))
    return fitted


def ratio_interval(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """The two-sided 95 % interval of a ratio of best rates, 0 or infinite where a grid does not bound it.

    Args:
        above, below: what :func:`sample_vertices` returned for the two, with equal samples.
    """
    with np.errstate(invalid="ignore"):  # beyond both grids: nothing is known of the ratio
        lower, upper = _bounds(above - below)
    return math.exp(lower), math.exp(upper)


def _bounds(samples: np.ndarray) -> tuple[float, float]:
    """The interval of samples of which some may be unknown (NaN): those count as the lowest and as the highest."""
    lower, _ = interval(np.nan_to_num(samples, nan=-math.inf, posinf=math.inf, neginf=-math.inf))
    _, upper = interval(np.nan_to_num(samples, nan=math.inf, posinf=math.inf, neginf=-math.inf))
    return lower, upper


def _stacked(losses: Mapping[float, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ascending rates, and their losses (rates, seeds, blocks)."""
    if not losses:
        raise ValueError("There are no learning rates; give the losses of at least one.")
    shapes = {np.shape(values) for values in losses.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"losses have the shapes {sorted(shapes)}, but all must have one, (seeds, blocks).")
    rates = np.array(sorted(losses))
    return rates, np.array([losses[rate] for rate in rates])


def _log_vertices(x: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Vertices (samples,) from log rates x (rates,) and mean losses (rates, samples); infinite at an edge."""
    lowest = means.argmin(axis=0)  # (samples,)
    vertices = np.where(lowest == 0, -math.inf, math.inf)  # (samples,)
    (inside,) = np.nonzero((lowest > 0) & (lowest < len(x) - 1))
    i = lowest[inside]
    left, here, right = (means[i + side, inside] for side in (-1, 0, 1))
    falling, rising = (here - left) / (x[i] - x[i - 1]), (right - here) / (x[i + 1] - x[i])
    middle_left, middle_right = (x[i - 1] + x[i]) / 2, (x[i] + x[i + 1]) / 2
    curvature = rising - falling
    # Three equal losses have no vertex; the middle one is as good as any.
    share = np.divide(-falling, curvature, out=np.full_like(curvature, 0.5), where=curvature > 0)
    vertices[inside] = middle_left + share * (middle_right - middle_left)
    return vertices
