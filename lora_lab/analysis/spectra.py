"""What training wrote into a model's weights, layer by layer, beside what chance would have written there.

    report(base, tuned)        # two models, or their state dicts: the difference of every matrix
    report(None, adapted)      # a model with adapters, an adapter_state, or the folder of a saved adapter
    group(frame, "kind")       # medians over the layers of a kind; or over those of a depth

The numbers are those of :mod:`lora_lab.rank`. Beside each stands its null, as ``<statistic>_low`` and ``_high``:
between these lie 95 of 100 updates without signal. For an adapter that is a product of Gaussian factors of its shape
and rank, for the difference of two matrices a Gaussian matrix; both of the update's own norm where that matters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_lab import rank as spectral
from lora_lab.adapters.peft_format import read_adapter
from lora_lab.inject import lora_layers
from lora_lab.layers import LoRAConv1D, LoRAEmbedding
from lora_lab.lora import LoRALayer
from lora_lab.rank import SVD, Band
from lora_lab.system.progress import progress_bar
from lora_lab.variants import DoRALinear, PiSSALinear

if TYPE_CHECKING:
    from pandas import DataFrame


Source = nn.Module | Mapping[str, Tensor] | str | Path
STATISTICS = {
    "effective_rank": spectral.effective_rank,
    "stable_rank": spectral.stable_rank,
    "energy_rank": spectral.energy_rank,
}
_DRAWS = 39


@dataclass(frozen=True)
class Update:
    """What was added to one weight, decomposed, and the weight before, where it is known: (out, in).

    ``rank`` is the adapter's; None for the difference of two matrices.
    """

    svd: SVD
    rank: int | None = None
    before: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.svd.U.shape[-2], self.svd.Vh.shape[-1]


@dataclass(frozen=True)
class _Factors:
    """An update scaling * B A, and the weight it is added to, if that is at hand."""

    B: Tensor
    A: Tensor
    scaling: float
    before: Tensor | None = None


@torch.no_grad()
def updates(before: Source | None, after: Source, *, progress: bool | None = None) -> dict[str, Update]:
    """The change of every weight, by layer; of adapters exactly and from the factors alone.

    Matrices lie as an adapter's B A does, (out, in), and a convolution's is (out, in * window).

    Args:
        before: the model before, or its state dict. With an adapter it may be None: a model holds its base itself, and
            of others what needs the weights is left out.
        after: a tuned model or its state dict; or an adapter: a model that has one, what ``adapter_state`` returned, or
            the folder it was saved in (by PEFT too). What this function has returned is given back as it is, so that
            whatever takes ``after`` can be asked several things and decompose but once.
        progress: show a bar; default only where a person is looking (and LORA_LAB_PROGRESS is not 0).

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: no matrix is in both, shapes differ, or an adapter cannot be read without its model (DoRA's).
    """
    if isinstance(after, Mapping) and any(isinstance(value, Update) for value in after.values()):
        return dict(after)
    weights = {} if before is None else _matrices(before)
    factors = _adapter(after)
    if factors is not None:
        return _decomposed(factors, weights)
    if before is None:
        raise ValueError("after has no adapters, so its change shows only beside the model before; give that too.")
    tuned = _matrices(after)
    common = _common(weights, tuned)
    found = {}
    with progress_bar(len(common), "decomposing", progress, "matrix") as bar:
        for name in common:
            old, new = weights[name], tuned[name]
            dtype = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
            found[name] = Update(spectral.svd(new.to(dtype) - old.to(dtype)), None, old)
            bar.update()
    return found


@torch.no_grad()
def singular_values(
    before: nn.Module | Mapping[str, Tensor], after: nn.Module | Mapping[str, Tensor], *, progress: bool | None = None
) -> dict[str, Tensor]:
    """The singular values (k,) of every matrix's change, in float64: several times as fast as :func:`updates`.

    Each matrix is one thread's work (the eigenvalues of small matrices gain nothing from a second), and as many are
    worked on at once as torch has threads. On a GPU all are this thread's: more of them would take turns there.

    Args:
        before, after: two models, or their state dicts.
        progress: as for :func:`updates`.

    Raises:
        ValueError: as for :func:`updates`.
    """
    old, new = _matrices(before), _matrices(after)
    names, threads = _common(old, new), torch.get_num_threads()

    def work(name: str) -> Tensor:
        found = spectral.singular_values(new[name].double() - old[name].double())  # (192,)
        bar.update()
        return found

    on_cpu = all(matrices[name].device.type == "cpu" for matrices in (old, new) for name in names)
    with progress_bar(len(names), "singular values", progress, "matrix") as bar, ThreadPoolExecutor(threads) as pool:
        torch.set_num_threads(1)
        try:
            return dict(zip(names, (pool.map if on_cpu else map)(work, names), strict=True))
        finally:
            torch.set_num_threads(threads)


def report(before: Source | None, after: Source, *, directions: int = 8, progress: bool | None = None) -> DataFrame:
    """One row a layer: how large the update is, how many directions it has, and what chance would give.

    Columns: ``layer``; ``kind``, the last part of its name; ``depth``, the number in its name; ``out`` and ``in``;
    ``rank`` of the adapter; ``norm`` (Frobenius) and ``spectral_norm`` of the update; each of effective_rank,
    stable_rank and energy_rank (of 90 %) with its band; and, where the weight before is known, ``relative_norm`` (to
    that weight's) and ``amplification`` of the leading directions (Hu et al. 2021, section 7.3) with the band of random
    ones.

    Args:
        before, after, progress: as for :func:`updates`.
        directions: how many are looked at for the amplification, where the update has so many.

    Raises:
        FileNotFoundError, ValueError: as for :func:`updates`.
    """
    import pandas

    rows = []
    for name, update in updates(before, after, progress=progress).items():
        S = update.svd.S
        sizes = spectral.norms(S)
        row = {
            "layer": name,
            "kind": name.rpartition(".")[2],
            "depth": depth(name),
            "out": update.shape[0],
            "in": update.shape[1],
            "rank": update.rank,
            "norm": float(sizes.frobenius),
            "spectral_norm": float(sizes.spectral),
        }
        for statistic, band in null_bands(update.shape, update.rank).items():
            row |= _with_band(statistic, float(STATISTICS[statistic](S)), band)
        if update.before is not None:
            row["relative_norm"] = row["norm"] / max(float(update.before.float().norm()), 1e-30)
            rounding = len(S) * torch.finfo(S.dtype).eps * S[0]
            there = int((rounding < S).sum())  # the vectors of others point anywhere
            row |= _amplified(update, max(1, min(directions, there)))
        rows.append(row)
    return pandas.DataFrame(rows).astype({"depth": "Int64", "rank": "Int64"})


def depth(layer: str) -> int | None:
    """The number in a layer's name, or None: which block it is in."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer)
    return int(found[1]) if found else None


def _with_band(statistic: str, value: float, band: Band) -> dict[str, float]:
    return {statistic: value, f"{statistic}_low": float(band.low), f"{statistic}_high": float(band.high)}


def _amplified(update: Update, directions: int) -> dict[str, float]:
    """The amplification factor, and what random directions of the same number give."""
    W = update.before.to(update.svd.U.dtype)  # (192, 576)
    size = update.svd.S.norm()  # ()
    left, right = _random_directions(*W.shape, directions)  # (39, 192, 8), (39, 576, 8)
    by_chance = torch.linalg.matrix_norm(left.mT.to(W) @ W @ right.to(W))  # (39,)
    factors = (size / by_chance).sort().values  # (39,)
    factor = spectral.amplification(update.svd, W, directions).factor
    return _with_band("amplification", float(factor), Band(factors[0], factors.mean(), factors[-1]))


@cache
def _random_directions(out: int, width: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws = [[spectral.orthonormal(n, count, generator=generator).float() for n in (out, width)] for _ in range(_DRAWS)]
    left, right = zip(*draws, strict=True)
    return torch.stack(left), torch.stack(right)  # (39, 192, 8), (39, 576, 8)


@cache
def null_bands(shape: tuple[int, int], rank: int | None = None) -> dict[str, Band]:
    """For each of :data:`STATISTICS` the band of updates without signal: of an adapter's rank, or of full rank."""

    def draw(generator: torch.Generator) -> Tensor:
        if rank is not None:
            S = spectral.product_svd(*spectral.gaussian_factors(shape, rank, generator=generator)).S  # (8,)
        else:
            S = spectral.singular_values(spectral.gaussian(shape, generator=generator))  # (192,)
        return torch.stack([statistic(S).double() for statistic in STATISTICS.values()])  # (3,)

    band = spectral.by_chance(draw, _DRAWS)
    return {name: Band(*(edge[place] for edge in band)) for place, name in enumerate(STATISTICS)}


def intruders(
    before: Source | None,
    after: Source,
    layers: Sequence[str] | None = None,
    *,
    top: int = 10,
    epsilon: float = 0.5,
    progress: bool | None = None,
) -> DataFrame:
    """Intruder dimensions of each layer (Shuttleworth et al. 2024), beside those of equally large noise.

    Columns: ``layer``; ``intruders``, how many of the ``top`` leading directions of the tuned weight have no cosine of
    ``epsilon`` with any of the old one, with the band of Gaussian updates of the same norm and rank; ``energy_share``
    of the intruders in the tuned weight; ``floor``, the cosine that a random direction has.

    It takes 40 decompositions a layer, half a minute for 40 of 576 x 1536, so name some.

    Args:
        before, after, progress: as for :func:`updates`.
        layers: names; None takes all.

    Raises:
        FileNotFoundError, ValueError: as for :func:`updates`; or a name is unknown, or the weights before are.
    """
    import pandas

    found = updates(before, after, progress=progress)
    chosen = list(found) if layers is None else list(layers)
    if unknown := [name for name in chosen if name not in found]:
        raise ValueError(f"There is no update of {unknown[0]!r}; the layers are such as {next(iter(found))!r}.")
    rows = []
    with progress_bar(len(chosen), "intruders", progress, "layer") as bar:
        for name in chosen:
            if found[name].before is None:
                raise ValueError(f"The weight of {name!r} before training is not known; give the model before.")
            rows.append({"layer": name, **_intruders(found[name], top, epsilon)})
            bar.update()
    return pandas.DataFrame(rows)


def _intruders(update: Update, top: int, epsilon: float) -> dict[str, float]:
    U, S, Vh = update.svd
    W = update.before.to(U.dtype)  # (192, 576)
    old, size = spectral.svd(W), float(S.norm())
    seen = spectral.intruder_dimensions(old, W + U * S @ Vh, top, epsilon)

    def draw(generator: torch.Generator) -> Tensor:
        if update.rank is None:
            noise = spectral.gaussian(update.shape, norm=size, generator=generator)  # (192, 576)
        else:
            B, A = spectral.gaussian_factors(update.shape, update.rank, norm=size, generator=generator)
            noise = B @ A  # (192, 576)
        return spectral.intruder_dimensions(old, W + noise.to(W), top, epsilon).count

    row = _with_band("intruders", int(seen.count), spectral.by_chance(draw, _DRAWS))
    return {**row, "energy_share": float(seen.energy_share), "floor": seen.floor}


def group(frame: DataFrame, by: str = "kind") -> DataFrame:
    """Medians of a report over the layers of each ``kind`` or ``depth``, with their number.

    Raises:
        ValueError: ``by`` is another column.
    """
    if by not in ("kind", "depth"):
        raise ValueError(f"by is {by!r}, but layers are grouped by 'kind' or by 'depth'.")
    groups = frame.groupby(by, sort=by == "depth", dropna=False)
    senseless = ["depth", *(["out", "in"] if by == "depth" else [])]  # layers of a block have other shapes
    medians = groups.median(numeric_only=True).drop(columns=senseless, errors="ignore")
    medians.insert(0, "layers", groups.size())
    return medians


def table(frame: DataFrame, by: str = "kind") -> str:
    """The medians of :func:`group` as text, each statistic with its null in brackets.

    Raises:
        ValueError: as for :func:`group`.
    """
    medians, columns = group(frame, by), {}
    for name in medians:
        if f"{name}_low" in medians:
            rows = medians[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False)
            columns[name] = [f"{value:.3g} [{low:.3g}-{high:.3g}]" for value, low, high in rows]
        elif not name.endswith(("_low", "_high")):
            columns[name] = [f"{value:.4g}" for value in medians[name]]
    widths = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    labels = [by, *map(str, medians.index)]
    first = max(map(len, labels))
    lines = ["  ".join([labels[0].ljust(first), *(name.rjust(width) for name, width in widths.items())])]
    for place, label in enumerate(labels[1:]):
        cells = (columns[name][place].rjust(width) for name, width in widths.items())
        lines.append("  ".join([label.ljust(first), *cells]))
    return "\n".join(["Medians over layers; in brackets 95 % of what updates without signal give.", *lines])


# Reading


def _matrices(source: Source) -> dict[str, Tensor]:
    """The weights with two dimensions or more, by layer, as matrices; each tensor once."""
    if isinstance(source, str | Path):
        raise ValueError(f"before is {str(source)!r}; load it first, with load_pretrained(...).")
    state = dict(source.named_parameters()) if isinstance(source, nn.Module) else dict(source)
    found = {}
    for name, tensor in state.items():
        if tensor.ndim >= 2 and tensor.dtype.is_floating_point:
            layer = name.removesuffix(".weight").replace(".base", "")
            found[layer] = tensor.detach().flatten(1)
    return found


def _common(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """The names of the matrices that both have, if they are of like shapes."""
    names = [name for name in before if name in after]
    if not names:
        raise ValueError(
            f"The two have no matrix of the same name (such as {next(iter(before), 'none')!r} and "
            f"{next(iter(after), 'none')!r}); give two states of one model."
        )
    for name in names:
        if before[name].shape != after[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(before[name].shape)} before and {tuple(after[name].shape)} after; "
                "give two states of one model."
            )
    return names


def _adapter(source: Source) -> dict[str, _Factors | Update] | None:
    """The update of each layer as factors (or whole, where it is none of low rank), if it is an adapter or has one."""
    if isinstance(source, nn.Module):
        layers = lora_layers(source)
        return {name: _of_layer(layer) for name, layer in layers.items()} if layers else None
    state = read_adapter(source) if isinstance(source, str | Path) else source
    found = {}
    for name, tensor in state.items():
        layer, _, part = name.rpartition(".")
        if part == "lora_magnitude_vector":
            raise ValueError(
                f"The adapter of {layer!r} is DoRA's, which is no update by itself; give the model it is on."
            )
        if part == "lora_A":
            B, scaling = state[f"{layer}.lora_B"], float(state[f"{layer}.scaling"])
            found[layer] = _Factors(B.flatten(1), tensor.flatten(1), scaling)
    return found or None


def _of_layer(layer: LoRALayer) -> _Factors | Update:
    before = layer.base.weight.flatten(1)  # (192, 576)
    if isinstance(layer, DoRALinear):  # the lengths of all rows change too
        return Update(spectral.svd(layer.weight - before), None, before)
    if isinstance(layer, PiSSALinear):  # its B A starts as a part of the weight, which is no update
        layer = layer.difference()
    if isinstance(layer, LoRAEmbedding | LoRAConv1D):  # these keep their weight as (in, out)
        before = before.T
    return _Factors(layer.lora_B.flatten(1), layer.lora_A.flatten(1), layer.scaling, before)


def _decomposed(adapter: Mapping[str, _Factors | Update], weights: Mapping[str, Tensor]) -> dict[str, Update]:
    """The adapter's updates, those of one shape all at once."""
    alike = defaultdict(list)
    for name, update in adapter.items():
        if isinstance(update, _Factors):
            alike[update.B.shape, update.A.shape, update.B.dtype].append(name)
    found = {name: update for name, update in adapter.items() if isinstance(update, Update)}
    for names in alike.values():
        B, A = (torch.stack([getattr(adapter[name], part) for name in names]) for part in "BA")  # (30, 192, 8), ...
        scaling = torch.tensor([adapter[name].scaling for name in names])  # (30,)
        U, S, Vh = spectral.product_svd(B, A, scaling)  # (30, 192, 8), (30, 8), (30, 8, 576)
        for place, name in enumerate(names):
            before = weights.get(name, adapter[name].before)
            found[name] = Update(SVD(U[place], S[place], Vh[place]), adapter[name].A.shape[0], before)
    order = [name for name in weights if name in found]
    return {name: found[name] for name in [*order, *(name for name in adapter if name not in order)]}
