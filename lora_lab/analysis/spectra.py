"""What training wrote into a model's weights, layer by layer, beside what chance would have written there.

    report(base, tuned)        # two models, or their state dicts: the difference of every matrix
    report(None, adapted)      # a model with adapters, an adapter_state, or the folder of a saved adapter
    group(frame, "kind")       # medians over the layers of each kind, or of each depth

The statistics are those of :mod:`lora_lab.rank`. Each comes with its band for noise, in the columns
``<statistic>_low`` and ``<statistic>_high``, which holds 95 % of draws: a product of Gaussian factors of the same shape
and rank for an adapter, a Gaussian matrix for a difference of two matrices. Where the norm matters, both have the norm
of the update. Noise sets the scale, but it is not a null model of training: an update from labels drawn from the base's
own predictions, with nothing to learn, lies below the band, too (lesson 11). :func:`null` makes a task for such a
training run; a report on that run shows what training alone writes:

    tuned, control = copy.deepcopy(base), copy.deepcopy(base)
    settings = {"steps": 60, "lr": 1e-3, "seed": 0}    # the same for both
    fit(tuned, task, LoRA(rank=8), **settings)
    fit(control, null(task, base), LoRA(rank=8), **settings)
    print(table(report(base, tuned)), table(report(base, control)))
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lora_lab import rank
from lora_lab.adapters.edit import check_plain
from lora_lab.adapters.peft_format import read
from lora_lab.inject import lora_layers
from lora_lab.layers import LoRAConv1D, LoRAEmbedding
from lora_lab.lora import LoRALayer
from lora_lab.rank import SVD, Band, by_chance, gaussian, gaussian_factors, product_svd, singular_values, svd
from lora_lab.system.wording import progress_bar
from lora_lab.task import IGNORE, Task, logits, mean_cross_entropy
from lora_lab.variants import PiSSALinear

if TYPE_CHECKING:
    from pandas import DataFrame


STATISTICS = {"effective_rank": rank.effective_rank, "stable_rank": rank.stable_rank, "energy_rank": rank.energy_rank}
_DIRECTIONS = 8  # the leading ones, of which the amplification is reported


@dataclass(frozen=True)
class Update:
    """The change of one weight, decomposed.

    Args:
        svd: of the change (out, in).
        rank: of the adapter; None for the difference of two matrices.
        before: the weight before the change (out, in), if it is known.
    """

    svd: SVD
    rank: int | None = None
    before: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.svd.shape


@dataclass(frozen=True)
class _Factors:
    """An update scaling * B A, and the weight before it (out, in), if it is known."""

    B: Tensor  # (out, rank)
    A: Tensor  # (rank, in)
    scaling: float
    before: Tensor | None = None


Weights = nn.Module | Mapping[str, Tensor]
Source = Weights | str | Path | Mapping[str, Update]


@torch.no_grad()
def updates(before: Weights | None, after: Source, *, progress: bool | None = None) -> dict[str, Update]:
    """Return the change of every weight, by layer. That of an adapter is exact, computed from its factors alone.

    Matrices are (out, in), as an adapter's B A is; a convolution's is (out, in * window).

    Args:
        before: the model before training, or its state dict. With an adapter it may be None: a model with adapters
            holds its base itself; for other sources, results that need the weights are then left out.
        after: one of

            - the tuned model, or its state dict, which needs ``before``;
            - a model with adapters;
            - what ``adapter_state`` returned;
            - the folder of a saved adapter (PEFT's too);
            - what this function returned, so that several functions can share one decomposition.
        progress: show a progress bar; by default only on a terminal or in a notebook (and if LORA_LAB_PROGRESS is
            not 0).

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: the two have no matrix in common, shapes differ, or an adapter cannot be read without its model
            (DoRA).
    """
    if isinstance(after, Mapping) and any(isinstance(value, Update) for value in after.values()):
        return dict(cast(Mapping[str, Update], after))
    if adapter := _read_adapter(cast(Weights | str | Path, after)):
        return _decompose(adapter, {} if before is None else _matrices(before))
    if before is None:
        raise ValueError("after has no adapters, so before is needed to compute the change; pass the model before.")
    pairs, result = _pair_matrices(before, cast(Weights, after)), {}
    with progress_bar(len(pairs), "decomposing", progress, "matrix") as bar:
        for name, (old, new) in pairs.items():
            dtype = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
            result[name] = Update(svd(new.to(dtype) - old.to(dtype)), None, old)
            bar.update()
    return result


def report(before: Weights | None, after: Source, *, progress: bool | None = None) -> DataFrame:
    """Return one row per layer: how large the update is, how many directions it has, and what chance would give.

    Columns: ``layer``; ``kind``, the last part of its name; ``depth``, the number in its name; ``out`` and ``in``;
    ``rank`` of the adapter; ``norm`` (Frobenius) and ``spectral_norm`` of the update; effective_rank, stable_rank and
    energy_rank (of 90 %), each with its band for noise; and, if the weight before is known, ``relative_norm`` (relative
    to that weight's norm) and ``amplification`` of the 8 leading directions (Hu et al. 2021, section 7.3) with the band
    of random directions.

    Args:
        before, after, progress: as for :func:`updates`.

    Raises:
        FileNotFoundError, ValueError: as for :func:`updates`.
    """
    import pandas

    rows = []
    for name, update in updates(before, after, progress=progress).items():
        S = update.svd.S
        row = {
            "layer": name,
            "kind": name.rpartition(".")[2],
            "depth": depth(name),
            **dict(zip(("out", "in"), update.shape, strict=True)),
            "rank": update.rank,
            "norm": float(S.norm()),
            "spectral_norm": float(S[0]),
        }
        for statistic, band in null_bands(update.shape, update.rank).items():
            row |= _with_band(statistic, float(STATISTICS[statistic](S)), band)
        if update.before is not None:
            row["relative_norm"] = row["norm"] / max(float(update.before.float().norm()), 1e-30)
            rounding = len(S) * torch.finfo(S.dtype).eps * S[0]
            nonzero = int((rounding < S).sum())  # singular vectors of zero singular values are arbitrary
            row |= _amplification(update.svd, update.before, max(1, min(_DIRECTIONS, nonzero)))
        rows.append(row)
    return pandas.DataFrame(rows).astype({"depth": "Int64", "rank": "Int64"})


def depth(layer: str) -> int | None:
    """Return the number in a layer's name, which is the index of its block, or None."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer)
    return int(match[1]) if match else None


def _with_band(statistic: str, value: float, band: Band) -> dict[str, float]:
    """Return the columns of a statistic: its value, and the band for noise."""
    return {statistic: value, f"{statistic}_low": float(band.low), f"{statistic}_high": float(band.high)}


def _amplification(update: SVD, before: Tensor, directions: int) -> dict[str, float]:
    """Return the amplification factor of the update's leading directions, with the band of as many random ones."""
    W = before.to(update.U.dtype)  # (192, 576)
    left, right = _random_directions(*W.shape, directions)  # (39, 192, 8), (39, 576, 8)
    projected = torch.linalg.matrix_norm(left.mT.to(W) @ W @ right.to(W))  # (39,)
    random_factors = (update.S.norm() / projected).sort().values  # (39,)
    factor = rank.amplification_factor(update, W, directions)
    band = Band(random_factors[0], random_factors.mean(), random_factors[-1])
    return _with_band("amplification", float(factor), band)


@cache
def _random_directions(out_features: int, in_features: int, count: int) -> tuple[Tensor, Tensor]:
    """Return 39 random sets of ``count`` orthonormal directions of the outputs, and 39 of the inputs."""
    generator = torch.Generator().manual_seed(0)
    left, right = [], []
    for _ in range(rank.DRAWS):
        left.append(rank.orthonormal(out_features, count, generator=generator))
        right.append(rank.orthonormal(in_features, count, generator=generator))
    return torch.stack(left).float(), torch.stack(right).float()  # (39, 192, 8), (39, 576, 8)


@cache
def null_bands(shape: tuple[int, ...], rank: int | None = None) -> dict[str, Band]:
    """Return the band for noise of each of :data:`STATISTICS`, for an adapter of this rank, or (None) a matrix."""

    def draw(generator: torch.Generator) -> Tensor:
        if rank is not None:
            S = product_svd(*gaussian_factors(shape, rank, generator=generator)).S  # (8,)
        else:
            S = singular_values(gaussian(shape, generator=generator))  # (192,)
        return torch.stack([statistic(S).double() for statistic in STATISTICS.values()])  # (3,)

    band = by_chance(draw)
    return {name: Band(*(edge[index] for edge in band)) for index, name in enumerate(STATISTICS)}


def count_intruders(update: Update, with_noise: bool = True) -> dict[str, float]:
    """Return the intruder dimensions of a layer (Shuttleworth et al. 2024), beside those of noise of the same norm.

    ``intruders``, how many of the 10 leading directions of the tuned weight have a cosine below 0.5 with every
    direction of the old weight, with the band of Gaussian updates of the same norm and rank; ``energy_share`` of the
    intruders in the tuned weight; ``floor``, the cosine of a random direction.

    Args:
        update: one of :func:`updates`.
        with_noise: the band takes about 40 decompositions, half a minute if the weight is 576 x 1536.

    Raises:
        ValueError: the weight before the update is not known.
    """
    if update.before is None:
        raise ValueError("The weight before training is not known; pass the model before, to updates.")
    U, S, Vh = update.svd
    W = update.before.to(U.dtype)  # (192, 576)
    old, size, top = svd(W), float(S.norm()), min(10, *update.shape)
    result = rank.intruder_dimensions(old, W + U * S @ Vh, top)
    row = {"intruders": int(result.count)}

    def draw(generator: torch.Generator) -> Tensor:
        if update.rank is None:
            noise = gaussian(update.shape, norm=size, generator=generator)  # (192, 576)
        else:
            B, A = gaussian_factors(update.shape, update.rank, norm=size, generator=generator)
            noise = B @ A  # (192, 576)
        return rank.intruder_dimensions(old, W + noise.to(W), top).count

    if with_noise:
        row = _with_band("intruders", row["intruders"], by_chance(draw))
    return {**row, "energy_share": float(result.energy_share), "floor": result.floor}


def group(frame: DataFrame, by: str = "kind") -> DataFrame:
    """Return medians of a report over the layers of each ``kind`` or ``depth``, and how many layers those are.

    Raises:
        ValueError: ``by`` is another column.
    """
    # A median depth says nothing, nor does a median shape over the layers of one block.
    meaningless = {"kind": ["depth"], "depth": ["out", "in"]}
    if by not in meaningless:
        raise ValueError(f"by is {by!r}, but layers are grouped by 'kind' or by 'depth'.")
    groups = frame.groupby(by, sort=by == "depth", dropna=False)
    medians = groups.median(numeric_only=True).drop(columns=meaningless[by])
    medians.insert(0, "layers", groups.size())
    return medians


def table(frame: DataFrame, by: str = "kind") -> str:
    """Return the medians of :func:`group` as text, each statistic with its band for noise in brackets.

    Raises:
        ValueError: as for :func:`group`.
    """
    import pandas

    medians = group(frame, by)
    cells = {}
    for name in medians.columns.astype(str):
        if f"{name}_low" in medians:
            bands = medians[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False)
            cells[name] = [f"{value:.3g} [{low:.3g}-{high:.3g}]" for value, low, high in bands]
        elif not name.endswith(("_low", "_high")):
            cells[name] = [f"{value:.4g}" for value in medians[name]]
    rows = pandas.DataFrame(cells, index=medians.index.rename(None)).rename_axis(columns=by)
    return f"Medians over layers; in brackets 95 % of Gaussian noise of the same shape and rank.\n{rows.to_string()}"


# Reading


def _matrices(source: Weights) -> dict[str, Tensor]:
    """Return the weights with two dimensions or more, by layer, as matrices; each tensor once."""
    state = dict(source.named_parameters()) if isinstance(source, nn.Module) else source
    return {
        _layer_of(name, state): tensor.detach().flatten(1)
        for name, tensor in state.items()
        if tensor.ndim >= 2 and tensor.dtype.is_floating_point
    }


def _layer_of(name: str, state: Mapping[str, Tensor]) -> str:
    """Return the layer of a parameter; a weight under an adapter, ``<layer>.base.weight``, is its adapted layer's."""
    module = name.removesuffix(".weight")
    layer = module.removesuffix(".base")
    return layer if f"{layer}.lora_A" in state else module


def _pair_matrices(before: Weights, after: Weights) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the matrices that both have, by name, if their shapes agree."""
    old, new = _matrices(before), _matrices(after)
    pairs = {name: (old[name], new[name]) for name in old if name in new}
    if not pairs:
        example = next(iter(old), "none")
        raise ValueError(f"The two have no matrix of the same name, such as {example!r}; pass two states of one model.")
    for name, (first, second) in pairs.items():
        if first.shape != second.shape:
            shapes = f"{tuple(first.shape)} before and {tuple(second.shape)} after"
            raise ValueError(f"{name!r} has shape {shapes}; pass two states of one model.")
    return pairs


def _read_adapter(source: Weights | str | Path) -> dict[str, _Factors | Update]:
    """Return the update of each adapted layer, as factors if it has low rank; empty if the source has no adapters."""
    if isinstance(source, nn.Module):
        return {name: _update_of(layer) for name, layer in lora_layers(source).items()}
    if isinstance(source, Mapping) and not any(name.endswith(".lora_A") for name in source):
        return {}
    factors = read(source).factors
    check_plain(factors)
    return {
        name: _Factors(each.tensors["lora_B"].flatten(1), each.tensors["lora_A"].flatten(1), each.scaling)
        for name, each in factors.items()
    }


def _update_of(layer: LoRALayer) -> _Factors | Update:
    """Return a layer's update: scaling * B A as its factors; another kind's, such as DoRA's, decomposed."""
    before = layer.base.weight.flatten(1)  # (192, 576)
    if isinstance(layer, LoRAEmbedding | LoRAConv1D):  # these store their weight as (in, out)
        before = before.T
    A, B = layer.lora_A, layer.lora_B  # (8, 576), (192, 8)
    if isinstance(layer, PiSSALinear):  # B A starts as a part of the weight, and the update is B A - B0 A0
        A, B = layer.plain_factors(A, B, layer.start_A, layer.start_B)  # (16, 576), (192, 16)
    elif layer.parts != LoRALayer.parts:  # such as DoRA, whose row norms change too
        return Update(svd(layer.weight - before), None, before)
    return _Factors(B.flatten(1), A.flatten(1), layer.scaling, before)


def _decompose(adapter: Mapping[str, _Factors | Update], weights: Mapping[str, Tensor]) -> dict[str, Update]:
    """Return the adapter's updates. Factors of the same shape are stacked and decomposed together."""
    result = {name: update for name, update in adapter.items() if isinstance(update, Update)}
    stacks = defaultdict(dict)  # of factors, by name
    for name, factors in adapter.items():
        if isinstance(factors, _Factors):
            stacks[factors.B.shape, factors.A.shape, factors.B.dtype][name] = factors
    for stack in stacks.values():
        B = torch.stack([factors.B for factors in stack.values()])  # (30, 192, 8)
        A = torch.stack([factors.A for factors in stack.values()])  # (30, 8, 576)
        scaling = torch.tensor([factors.scaling for factors in stack.values()])  # (30,)
        stacked = product_svd(B, A, scaling)  # (30, 192, 8), (30, 8), (30, 8, 576)
        for (name, factors), U, S, Vh in zip(stack.items(), *stacked, strict=True):
            before = weights.get(name, factors.before)
            result[name] = Update(SVD(U, S, Vh), len(factors.A), before)
    return {name: result[name] for name in [*weights, *adapter] if name in result}


# The control: a training with nothing to learn


@dataclass(frozen=True)
class DrawnLabels:
    """A loss on labels that are drawn anew for every batch from the predictions of a frozen model.

    In training they are drawn by torch's global generator, which ``fit`` seeds; without gradients by one that begins
    anew at every batch, so that an evaluation repeats, and does not change what training draws. Each loss costs a
    forward pass of the base too, which is a second model in memory.

    Args:
        base: the model that predicts; in evaluation mode.
    """

    base: nn.Module

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        generator = None if torch.is_grad_enabled() else torch.Generator(inputs.device).manual_seed(0)
        with torch.no_grad():
            scores = logits(self.base, inputs, targets).float()  # (32, 10) or (4, 128, 49152)
            chances = scores.flatten(0, -2).softmax(-1)  # (32, 10) or (4 * 128, 49152)
            labels = torch.multinomial(chances, 1, generator=generator).view(targets.shape)  # (32,) or (4, 128)
        labels = labels.where(targets != IGNORE, IGNORE)
        return mean_cross_entropy(logits(model, inputs, targets), labels)  # ()


def null(task: Task, base: nn.Module) -> Task:
    """Return the task with labels from the base's own predictions: with it, training has nothing to learn.

    Args:
        task: whose targets are classes or next tokens.
        base: the model from which training starts; it is copied.
    """
    frozen = copy.deepcopy(base).eval().requires_grad_(False)
    return replace(task, name=f"{task.name}, nothing to learn", loss=DrawnLabels(frozen))
