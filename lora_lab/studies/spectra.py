"""``lora-lab record ablation`` and ``spectra``: which rank is enough, and what does training write into the weights?

ablation  Which rank is enough for the real model? Ranks x learning rates x seeds on "docs". It takes most of an hour on
          two cores; a run that was stopped continues. On a GPU it does more, in less time.
spectra   What full fine-tuning and LoRA write into all 210 matrices of the real model: spectra, overlaps of two
          adapters, intruder dimensions, and losses with the update truncated to a rank.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from lora_lab.ablation import studies
from lora_lab.ablation.grid import Trial
from lora_lab.adapters.edit import extract, resize
from lora_lab.analysis import spectra
from lora_lab.analysis.spectra import Update
from lora_lab.inject import lora_layers, match_layers
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.rank import intruder_dimensions, subspace_similarity
from lora_lab.studies.recorder import CurveSweep, Recorder, Row, record_sweeps, tell_row
from lora_lab.system.schema import plain
from lora_lab.system.wording import progress_bar
from lora_lab.task import Task
from lora_lab.train import evaluate, fit

# Ablation

COLUMNS = (
    *("task", "model", "method", "rank", "alpha", "targets", "exclude", "dropout", "steps", "batch_size", "schedule"),
    *("lr", "warmup", "clip", "weight_decay", "eval_every", "eval_examples", "seed", "outcome", "reason", "step"),
    *("train_loss", "validation_loss", "off_domain_loss", "gap", "test_loss", "trainable_parameters"),
)


def plan(device: torch.device) -> dict[str, Any]:
    """Return what two cores, or a GPU, can do in an hour, as both records state it.

    Alpha is always twice the rank, so a higher rank moves further at the same rate, and its best rate is lower.
    """
    stated: dict[str, Any] = {"study": "docs", "alpha": "twice the rank"}
    if device.type == "cuda":
        rates = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
        lrs = {str(rank): rates for rank in (1, 2, 4, 8, 16, 32, 64, 128)}
        return stated | {"lrs": lrs, "seeds": 5, "steps": 300, "batch_size": 8, "seq_len": 128, "eval_examples": 256}
    lrs = {"1": [2e-3, 4e-3, 8e-3], "4": [1e-3, 2e-3, 4e-3], "16": [1e-3, 2e-3, 4e-3], "64": [5e-4, 1e-3, 2e-3]}
    return stated | {"lrs": lrs, "seeds": 3, "steps": 60, "batch_size": 4, "seq_len": 64, "eval_examples": 64}


def plan_ablation(planned: Row, lean: Lean | None) -> CurveSweep:
    """Return all ranks at all their rates with all seeds; a lean step in float32 gives the same in less time."""
    options: dict[str, Any] = {name: planned[name] for name in ("steps", "batch_size", "eval_examples")}
    options |= {"eval_every": planned["steps"], "lean": lean}
    setups = {}
    for rank, lrs in planned["lrs"].items():
        setups[f"r={rank}"] = Trial(LoRA(int(rank), 2 * int(rank)), lrs[0], **options), lrs
    return CurveSweep(
        setups,
        range(planned["seeds"]),
        task=partial(studies.docs_task, planned["seq_len"]),
        shared=True,
        columns=COLUMNS,
        show=lambda frame: frame,
    )


_SWEEP = record_sweeps("ablation", lambda device: [plan_ablation(plan(device), Lean())])
ABLATION = replace(_SWEEP, settings=plan)


# Spectra

DIGITS = 4  # significant digits of a spectral statistic: people read records too


# Method, rate and seed. No rate was swept: rank 64 has its best one of the ablation, the others have those of the demo.
RUNS: dict[str, tuple[Method, float, int]] = {
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
    "cut": losses with the update truncated to a rank. "pair": the overlap of the leading 1 and 8 directions of two
    adapters, on the side of the inputs and of the outputs (by chance, 1 and 8 over the layer's width).
    """
    planned = plan(device)
    base, task = studies.language_model(device), studies.docs_task(planned["seq_len"])
    yield {"about": "run", "run": "base", **_losses(base, task, planned)}
    updates = {}
    steps, batch_size = planned["steps"], planned["batch_size"]
    for name, (method, lr, seed) in RUNS.items():
        model = copy.deepcopy(base)
        options: dict[str, Any] = {"lr": lr, "seed": seed, "steps": steps, "batch_size": batch_size}
        history = fit(model, task, method, eval_every=steps, eval_examples=4, **options)
        about = {"about": "run", "run": name, "lr": lr, "seed": seed}
        yield {**about, **_losses(model, task, planned), "trainable_parameters": history.trainable_parameters}
        updates[name] = _updates(base, model)
        for row in spectra.report(None, updates[name]).to_dict("records"):
            yield {"about": "layer", "run": name, **_round_row(row)}
        if name in INTRUDERS:
            yield from ({"about": "intruders", "run": name, **row} for row in _intruders(updates[name]))
        if name in CUTS:
            for row in _cuts(base, model, updates[name], CUTS[name], task, planned):
                yield {"about": "cut", "run": name, **row}
        del model
        gc.collect()
    for first, second in PAIRS:
        for row in _overlaps(updates[first], updates[second]):
            yield {"about": "pair", "run": first, "other": second, **row}


def _updates(base: nn.Module, model: nn.Module) -> dict[str, Update]:
    """Return the update of every linear layer in the blocks; "all-linear" does not include embedding and head."""
    if lora_layers(model):
        return spectra.updates(None, model)
    before, after = (
        {name: net.get_parameter(f"{name}.weight") for name in match_layers(net, "all-linear", ())}
        for net in (base, model)
    )
    return spectra.updates(before, after)


def _losses(model: nn.Module, task: Task, planned: Row) -> dict[str, float]:
    """Return the losses of the parts not trained on, in nats per token."""
    size = planned["batch_size"], planned["eval_examples"]
    return {f"{part}_loss": evaluate(model, task, part, *size) for part in ("validation", "test", "off_domain")}


def _round_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the row with numpy's numbers as Python's, floats rounded to four digits, and NaN and infinity as None."""
    values = {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}
    return plain(
        {name: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for name, value in values.items()}
    )


def _intruders(updates: Mapping[str, Update]) -> Iterator[Row]:
    """Yield how many of each layer's 10 leading directions are new; in one block, also how many noise would add."""
    depths = sorted({depth for name in updates if (depth := spectra.depth(name)) is not None})
    block = [name for name in updates if spectra.depth(name) == depths[len(depths) // 2]]
    with_noise = spectra.intruders(None, updates, block).set_index("layer").to_dict("index")
    with progress_bar(len(updates), "intruders", None, "layer") as bar:
        for name, update in updates.items():
            before = cast(torch.Tensor, update.before)  # known for every update from _updates: (192, 576)
            row: dict[Any, Any] = with_noise.get(name, {})
            if not row:
                U, S, Vh = update.svd
                result = intruder_dimensions(before, before + U * S @ Vh)  # (192, 576)
                row = {"intruders": int(result.count), "energy_share": float(result.energy_share)}
                row["floor"] = result.floor
            yield _round_row({"layer": name, **row, "relative_norm": float(update.svd.S.norm() / before.norm())})
            bar.update()


def _cuts(
    base: nn.Module, tuned: nn.Module, updates: Mapping[str, Update], ranks: Iterable[int], task: Task, planned: Row
) -> Iterator[Row]:
    """Yield the losses with every update truncated, from the largest rank down; energy is the mean over layers."""
    energies = {name: update.svd.S.double().square() for name, update in updates.items()}
    ranks = sorted(ranks, reverse=True)
    if lora_layers(tuned):
        truncated = copy.deepcopy(tuned)
    else:
        extract(truncated := copy.deepcopy(base), tuned, ranks[0])
    for rank in ranks:
        resize(truncated, rank)
        shares = [float(energy[:rank].sum() / energy.sum()) for energy in energies.values()]
        yield {"rank": rank, "energy": round(sum(shares) / len(shares), DIGITS), **_losses(truncated, task, planned)}


def _overlaps(first: Mapping[str, Update], second: Mapping[str, Update]) -> Iterator[Row]:
    """Yield Hu et al. 2021, equation 4, for the leading direction and for the 8 leading ones."""
    for name, update in first.items():
        svd1, svd2 = update.svd, second[name].svd
        row = {"layer": name, "out": update.shape[0], "in": update.shape[1]}
        sides = {"inputs": (svd1.Vh.mT, svd2.Vh.mT), "outputs": (svd1.U, svd2.U)}  # (576, 8), (576, 64)
        for side, (V1, V2) in sides.items():
            phi = subspace_similarity(V1, V2)  # (8, 64)
            row |= {f"{side}_1": float(phi[0, 0]), f"{side}_8": float(phi[7, 7])}
        yield _round_row(row)


def tell_spectra(row: Row) -> str | None:
    """Return a row with losses as a line for people."""
    return tell_row(row) if "test_loss" in row else None


SPECTRA = Recorder(plan, record_spectra, tell_spectra)
