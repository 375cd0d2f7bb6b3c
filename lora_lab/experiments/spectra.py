"""``lora-lab record spectra``: what full fine-tuning and LoRA write into all 210 matrices of the real model.

Spectra, overlaps of two adapters, intruder dimensions, and losses with the update cut to a rank. It takes most of an
hour on two cores.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_lab import rank as spectral
from lora_lab.ablation import studies
from lora_lab.adapters.edit import extract, resize
from lora_lab.analysis import spectra as whole
from lora_lab.analysis.spectra import Update
from lora_lab.experiments.ranks import Plan, plan, settings
from lora_lab.experiments.recorder import Recorder
from lora_lab.history import History
from lora_lab.inject import lora_layers, match_layers
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.rank import SVD
from lora_lab.system.progress import progress_bar
from lora_lab.task import Task
from lora_lab.train import evaluate, fit

_FOUR = 4  # significant digits of a spectral statistic: a record is read by people too


@dataclass(frozen=True)
class Training:
    """One way to train the model before its weights are looked at."""

    method: Method
    lr: float
    seed: int


# Rates by validation loss: LoRA's as the ablation found them, full fine-tuning's as in the demo.
RUNS = {
    "full": Training(FullFineTuning(), 2e-4, 0),
    "LoRA r=8": Training(LoRA(8, 16), 2e-3, 0),
    "LoRA r=8, other seed": Training(LoRA(8, 16), 2e-3, 1),
    "LoRA r=64": Training(LoRA(64, 128), 1e-3, 1),  # not the first one's seed: they would share a part of A
}
PAIRS = (("LoRA r=8", "LoRA r=8, other seed"), ("LoRA r=8", "LoRA r=64"))
CUTS = {"full": (576, 64, 16, 8, 4, 2, 1), "LoRA r=64": (16, 4, 1)}
INTRUDERS = ("full", "LoRA r=8")


def spectra(device: torch.device) -> Iterator[dict[str, Any]]:
    """The rows of a record of spectra; ``about`` says what a row is of.

    "run": losses before ("base") and after each training. "layer": :func:`lora_lab.analysis.spectra.report` of each run
    and layer. "intruders": how many, in each layer; and in a block in the middle of the model how many noise has.
    "cut": losses with the update cut to a rank. "pair": how much of the leading 1 and 8 directions two adapters share,
    on the side of the inputs and of the outputs (by chance 1 and 8 of as many as the layer is wide).
    """
    own = plan(device)
    make, make_task = studies.study("docs", own.seq_len, device)
    base, task = make(), make_task()
    yield {"about": "run", "run": "base", **_losses(base, task, own)}
    updates = {}
    for name, training in RUNS.items():
        model, history = _trained(base, task, training, own)
        yield {"about": "run", "run": name, "lr": training.lr, "seed": training.seed, **_losses(model, task, own)} | {
            "trainable_parameters": history.trainable_parameters
        }
        updates[name] = _updates(base, model)
        for row in whole.report(None, updates[name]).to_dict("records"):
            yield {"about": "layer", "run": name, **_rounded(row)}
        if name in INTRUDERS:
            yield from ({"about": "intruders", "run": name, **row} for row in _intruders(updates[name]))
        if name in CUTS:
            for row in _cuts(base, model, updates[name], CUTS[name], task, own):
                yield {"about": "cut", "run": name, **row}
        del model
        gc.collect()
    for first, second in PAIRS:
        for row in _overlaps(updates[first], updates[second]):
            yield {"about": "pair", "run": first, "other": second, **row}


def _trained(base: nn.Module, task: Task, training: Training, own: Plan) -> tuple[nn.Module, History]:
    model = copy.deepcopy(base)
    options = {"steps": own.steps, "batch_size": own.batch_size, "eval_every": own.steps, "eval_examples": 4}
    return model, fit(model, task, training.method, lr=training.lr, seed=training.seed, **options)


def _updates(base: nn.Module, model: nn.Module) -> dict[str, Update]:
    """The change of every linear layer in the blocks; embedding and head are left out, as "all-linear" leaves them."""
    if lora_layers(model):
        return whole.updates(None, model)
    before, after = (
        {n: net.get_submodule(n).weight for n in match_layers(net, "all-linear", ())} for net in (base, model)
    )
    return whole.updates(before, after)


def _losses(model: nn.Module, task: Task, own: Plan) -> dict[str, float]:
    """Of the parts that were not trained on, in nats per token."""
    parts = ("validation", "test", "off_domain")
    return {f"{part}_loss": evaluate(model, task, part, own.batch_size, own.eval_examples) for part in parts}


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a DataFrame as a record's: plain numbers, floats to four digits."""
    found = {}
    for name, value in row.items():
        if isinstance(value, float):
            value = float(f"{value:.{_FOUR}g}") if math.isfinite(value) else None
        elif hasattr(value, "item"):
            value = value.item()
        found[name] = None if value is not None and value != value else value
    return found


def _intruders(updates: Mapping[str, Update]) -> Iterator[dict[str, Any]]:
    """How many of each layer's 10 leading directions are new, and beside it in one block what noise does."""
    depths = sorted({whole.depth(name) for name in updates})
    beside = [name for name in updates if whole.depth(name) == depths[len(depths) // 2]]
    with_noise = whole.intruders(None, updates, beside).set_index("layer")
    with progress_bar(len(updates), "intruders", None, "layer") as bar:
        for name, update in updates.items():
            if name in beside:
                row = with_noise.loc[name].to_dict()
            else:
                seen = spectral.intruder_dimensions(update.before, update.before + _matrix(update.svd))
                row = {"intruders": int(seen.count), "energy_share": float(seen.energy_share), "floor": seen.floor}
            yield _rounded({"layer": name, **row, "relative_norm": float(update.svd.S.norm() / update.before.norm())})
            bar.update()


def _matrix(svd: SVD) -> torch.Tensor:
    return svd.U * svd.S @ svd.Vh  # (192, 576)


def _cuts(
    base: nn.Module, tuned: nn.Module, updates: Mapping[str, Update], ranks: Iterable[int], task: Task, own: Plan
) -> Iterator[dict[str, Any]]:
    """Losses with every layer's update cut to a rank, from the largest rank down; energy is the mean over layers."""
    energies = {name: update.svd.S.double().square() for name, update in updates.items()}
    ranks = sorted(ranks, reverse=True)
    if lora_layers(tuned):
        cut = copy.deepcopy(tuned)
    else:
        extract(cut := copy.deepcopy(base), tuned, ranks[0])
    for rank in ranks:
        resize(cut, rank)
        shares = [float(energy[:rank].sum() / energy.sum()) for energy in energies.values()]
        yield {"rank": rank, "energy": round(sum(shares) / len(shares), _FOUR), **_losses(cut, task, own)}


def _overlaps(first: Mapping[str, Update], second: Mapping[str, Update]) -> Iterator[dict[str, Any]]:
    """Hu et al. 2021, equation 4, of the 1 and of the 8 leading directions."""
    for name, one in first.items():
        other, row = second[name], {"layer": name, "out": one.shape[0], "in": one.shape[1]}
        sides = {"inputs": (one.svd.Vh.mT, other.svd.Vh.mT), "outputs": (one.svd.U, other.svd.U)}  # (576, 8), (576, 64)
        for side, (V1, V2) in sides.items():
            phi = spectral.subspace_similarity(V1, V2)  # (8, 64)
            row |= {f"{side}_1": float(phi[0, 0]), f"{side}_8": float(phi[7, 7])}
        yield _rounded(row)


def line(row: dict[str, Any]) -> str | None:
    """A row for a person to read; None for what is one of hundreds."""
    if row["about"] not in ("run", "cut"):
        return None
    what = row["run"] + (f", cut to rank {row['rank']}" if row["about"] == "cut" else "")
    return f"{what:<32} validation {row['validation_loss']:.4f}  test {row['test_loss']:.4f}"


RECORDER = Recorder("spectra", settings, spectra, line)
