"""``lora-lab record ablation`` and ``spectra``: which rank is enough, and what does training write into the weights?

ablation  Which rank is enough for the real model? Ranks x learning rates x seeds on "docs". It takes most of an hour on
          two cores; a run that was stopped continues. On a GPU it does more, in less time.
spectra   What full fine-tuning and LoRA write into all 210 matrices of the real model: spectra, overlaps of two
          adapters, intruder dimensions, and losses with the update truncated to a rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean, median_high
from typing import Any

import torch
from torch import nn

from lora_lab.ablation import materials
from lora_lab.adapters.edit import extract, resize
from lora_lab.analysis import spectra
from lora_lab.analysis.spectra import Update
from lora_lab.inject import lora_layers
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.studies.recorder import (
    CurveSweep,
    Recorder,
    Row,
    evaluate_parts,
    plan_seeds,
    plan_setups,
    plan_size,
    record_sweeps,
)
from lora_lab.system.schema import plain
from lora_lab.system.wording import progress_bar
from lora_lab.task import Task
from lora_lab.train import fit

# Ablation


def plan(device: torch.device) -> dict[str, Any]:
    """Return what two cores, or a GPU, can do in an hour, as both records state it.

    Alpha is always twice the rank, so a higher rank moves further at the same rate, and its best rate is lower.
    """
    gpu, (steps, batch_size) = device.type == "cuda", plan_size(device)
    lrs = {"1": [2e-3, 4e-3, 8e-3], "4": [1e-3, 2e-3, 4e-3], "16": [1e-3, 2e-3, 4e-3], "64": [5e-4, 1e-3, 2e-3]}
    if gpu:
        lrs = {str(rank): [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3] for rank in (1, 2, 4, 8, 16, 32, 64, 128)}
    planned = {"lrs": lrs, "seeds": len(plan_seeds(device)), "steps": steps, "batch_size": batch_size}
    planned |= {"seq_len": 128 if gpu else 64, "eval_examples": 256 if gpu else 64}
    return planned | {"study": "docs", "alpha": "twice the rank"}


def plan_ablation(planned: Row, lean: Lean | None) -> CurveSweep:
    """Return all ranks at all their rates with all seeds; a lean step in float32 gives the same in less time."""
    options = {name: planned[name] for name in ("steps", "batch_size", "eval_examples")}
    methods = {f"r={rank}": (LoRA(int(rank), 2 * int(rank)), lrs) for rank, lrs in planned["lrs"].items()}
    return CurveSweep(
        plan_setups(methods, lean=lean, **options),
        *((), range(planned["seeds"])),
        task=partial(materials.docs_task, planned["seq_len"]),
        shared=True,
        show=lambda frame: frame.drop(columns="setup"),  # the rank tells it
    )


_SWEEP = record_sweeps("ablation", lambda device: [plan_ablation(plan(device), Lean())])
ABLATION = Recorder(plan, _SWEEP.rows)


# Spectra

DIGITS = 4  # significant digits of a spectral statistic: people read records too


# Method, rate and seed. No rate was swept: rank 64 has its best one of the ablation, the others have those of the demo.
RUNS = {
    "full": (FullFineTuning(), 2e-4, 0),
    "LoRA r=8": (LoRA(8, 16), 2e-3, 0),
    "LoRA r=8, other seed": (LoRA(8, 16), 2e-3, 1),
    "LoRA r=64": (LoRA(64, 128), 1e-3, 1),  # with seed 0 it would share a part of A with the first one
}
PAIRS = (("LoRA r=8", "LoRA r=8, other seed"), ("LoRA r=8", "LoRA r=64"))
CUTS = {"full": (576, 64, 16, 8, 4, 2, 1), "LoRA r=64": (16, 4, 1)}
INTRUDERS = ("full", "LoRA r=8")


def record_spectra(device: torch.device) -> Iterator[Row]:
    """Yield the rows of a record of spectra; ``about`` names what a row is about.

    "run": losses before ("base") and after each training. "layer": :func:`lora_lab.analysis.spectra.report` of each run
    and layer. "intruders": their number in each layer; for one block in the middle of the model, also that of noise.
    "cut": losses with the update truncated to a rank. "pair": the overlap of the leading directions of two adapters, on
    the side of the inputs and of the outputs (by chance, 1 over the layer's width).
    """
    planned = plan(device)
    base, task = materials.language_model(device), materials.docs_task(planned["seq_len"])
    yield {"about": "run", "run": "base", **evaluate_parts(base, task, planned)}
    updates = {}
    steps, batch = planned["steps"], planned["batch_size"]
    for name, (method, lr, seed) in RUNS.items():
        model = copy.deepcopy(base)
        fit(model, task, method, lr=lr, seed=seed, steps=steps, batch_size=batch, eval_every=steps, eval_examples=4)
        yield {"about": "run", "run": name, "lr": lr, "seed": seed, **evaluate_parts(model, task, planned)}
        found = spectra.updates(base, model)
        updates[name] = {layer: found[layer] for layer in found if spectra.depth(layer) is not None}  # of the blocks
        for row in spectra.report(None, updates[name]).to_dict("records"):
            yield {"about": "layer", "run": name, **_round_row(row)}
        if name in INTRUDERS:
            yield from ({"about": "intruders", "run": name, **row} for row in _intruders(updates[name]))
        if name in CUTS:
            for row in _cuts(base, model, updates[name], CUTS[name], task, planned):
                yield {"about": "cut", "run": name, **row}
    for first, second in PAIRS:
        for row in _overlaps(updates[first], updates[second]):
            yield {"about": "pair", "run": first, "other": second, **row}


def _round_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the row with floats rounded to four digits, and NaN and infinity as None."""
    rounded = {name: float(f"{value:.{DIGITS}g}") for name, value in row.items() if isinstance(value, float)}
    return plain({**row, **rounded})


def _intruders(updates: Mapping[str, Update]) -> Iterator[Row]:
    """Yield how many of each layer's 10 leading directions are new; in one block, also how many noise would add."""
    depths = {name: spectra.depth(name) or 0 for name in updates}
    middle = median_high({*depths.values()})
    with progress_bar(len(updates), "intruders", None, "layer") as bar:
        for name, update in updates.items():
            yield _round_row({"layer": name, **spectra.count_intruders(update, with_noise=depths[name] == middle)})
            bar.update()


def _cuts(
    base: nn.Module, tuned: nn.Module, updates: Mapping[str, Update], ranks: Sequence[int], task: Task, planned: Row
) -> Iterator[Row]:
    """Yield the losses with every update truncated to ranks in descending order; energy is the mean over layers."""
    energies = [update.svd.S.double().square() for update in updates.values()]
    if lora_layers(tuned):
        truncated = copy.deepcopy(tuned)
    else:
        extract(truncated := copy.deepcopy(base), tuned, ranks[0])
    for rank in ranks:
        resize(truncated, rank)
        energy = fmean(float(energy[:rank].sum() / energy.sum()) for energy in energies)
        yield {"rank": rank, "energy": round(energy, DIGITS), **evaluate_parts(truncated, task, planned)}


def _overlaps(first: Mapping[str, Update], second: Mapping[str, Update]) -> Iterator[Row]:
    """Yield Hu et al. 2021, equation 4, for the leading direction: the squared cosine of the angle between the two."""
    for name, update in first.items():
        svd1, svd2 = update.svd, second[name].svd
        row = {"layer": name, "out": update.shape[0], "in": update.shape[1]}
        row["inputs_1"] = float(svd1.Vh[0] @ svd2.Vh[0]) ** 2  # (576,) @ (576,)
        row["outputs_1"] = float(svd1.U[:, 0] @ svd2.U[:, 0]) ** 2  # (576,) @ (576,)
        yield _round_row(row)


SPECTRA = Recorder(plan, record_spectra)
