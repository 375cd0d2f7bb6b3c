"""``lora-lab record quantised``: what does a base in fewer bits cost in loss and time, and what do its merges lose?

LoRA over four bases: float32, bfloat16, NF4 (QLoRA), and the blocks of Q4_1 in which the model is shipped, each at its
own best rate. The float32 base is what those blocks hold, so the two differ in time alone, and the loss of NF4 is that
of a second quantisation. Then each adapter that was trained over float32 or NF4 is merged, in every form; and the steps
are timed in turn.

A merge into blocks rounds twice: the base, which may not lie on the grid of the blocks, and the update, which may be
smaller than the grid. The control shows the first alone: the base is rounded, and the adapter stays unmerged beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.ablation import studies
from lora_lab.ablation.compare import rates_around
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.stats import BlockLosses
from lora_lab.adapters.edit import off, switch
from lora_lab.costs.fake import Factory
from lora_lab.costs.setup import Setup
from lora_lab.costs.timing import step_time
from lora_lab.inject import adapter_state, inject, lora_layers
from lora_lab.lean import Lean
from lora_lab.methods import LoRA
from lora_lab.models.pretrained import SMOLLM2, load_pretrained
from lora_lab.models.quantize import quantize_nf4, round_matrix
from lora_lab.studies.recorder import (
    ON_TEST,
    BlockSweep,
    Rerun,
    Row,
    Source,
    plan_judges,
    plan_setup,
    plan_size,
    read_loss,
    record_sweeps,
)
from lora_lab.task import Task

NF4, Q4_1 = "NF4-double", "Q4_1"  # the blocks, of which the first is QLoRA's and the second that of the model's file
METHOD = LoRA(8, 16)
BASES = {"float32": Lean(), "bfloat16": Lean(torch.bfloat16), "NF4": Lean(), "Q4_1": Lean()}
CENTRE = 2e-3  # of the first grids
BLOCKS_OF = {"float32": None, "NF4": NF4}  # of the bases whose adapters are merged
ROUNDS = 9  # of the timing
BLOCK = 4  # examples whose losses are one, as in the sweeps
_ROUNDING = "rounding"


def plan(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in an hour and a half, or a GPU in less."""
    for base, lean in BASES.items():
        setups = {base: plan_setup(METHOD, rates_around(CENTRE), *plan_size(device), lean)}
        rerun = Rerun(base, Merges(base, ON_TEST["test"]), "merged", merge_rows) if base in BLOCKS_OF else None
        options: dict[str, Any] = {"source": partial(load_source, base), "judged_on": ON_TEST, "rerun": rerun}
        yield BlockSweep(setups, range(2), plan_judges(device), data=base, chosen_on=64, **options)


def load_source(base: str, device: torch.device) -> Source:
    """Return what makes the model and the task."""
    return partial(load_base, base, device), partial(studies.docs_task, 64)


def load_base(base: str, device: torch.device) -> nn.Module:
    """Return the language model over that base; in bfloat16 it is the lean step that casts it."""
    if base == "Q4_1":
        return load_pretrained(SMOLLM2, device=device, keep_blocks=True)[0]
    model = studies.language_model(device)
    if base == "NF4":
        quantize_nf4(model)
    return model


def forms_of(base: str) -> list[str]:
    """Return the names of the models that are made of an adapter, in the order of :class:`Merges`."""
    forms = ["base", "unmerged", "merged"]
    for blocks in (NF4, Q4_1):
        forms += [f"unmerged, base in {blocks}", f"merged, then {blocks}"]
    if base != "float32":
        forms += ["merged into float32", *(f"merged into float32, then {blocks}" for blocks in (NF4, Q4_1))]
    return forms


@dataclass(frozen=True)
class Merges:
    """A judge for :func:`lora_lab.ablation.ablate`: the losses of every form in which an adapter can be used.

    With W the weight of the base in float32, Q the rounding to blocks, V the weight under which the adapter was trained
    (W, or Q(W) for QLoRA) and D its update, the forms are

        base                          V               without the adapter
        unmerged                      V + D           as it was trained
        merged                        V + D           as one dense matrix
        unmerged, base in Q           Q(V) + D        the control: the base is rounded, the update is not
        merged, then Q                Q(V + D)
        merged into float32           W + D           under V = Q(W) alone, as are the next
        merged into float32, then Q   Q(W + D)

    Its scores are the losses of blocks of test examples by form, as those of
    :class:`lora_lab.ablation.stats.BlockLosses`; and "rounding", a text: for each kind of blocks what :func:`rounding`
    says of Q(V) and Q(V + D).

    Args:
        base: of the adapter, in :data:`BLOCKS_OF`.
        examples: of the test part, how many.
    """

    base: str
    examples: int

    @torch.no_grad()
    def __call__(self, model: nn.Module, task: Task) -> dict[str, str]:
        state, device = adapter_state(model), next(model.parameters()).device
        model = studies.language_model(device)
        inject(model, METHOD)
        switch(model, state)
        layers = lora_layers(model)
        W = {name: layer.base.weight.detach().clone() for name, layer in layers.items()}  # (192, 576)
        V = {name: _quantise(weight, BLOCKS_OF[self.base]) for name, weight in W.items()}  # (192, 576)
        judge = BlockLosses({"test": self.examples}, BLOCK)
        scores = {}
        for form in forms_of(self.base):
            unmerged = form.startswith("unmerged")
            under = W if "float32" in form else V
            blocks = next((kind for kind in (NF4, Q4_1) if form.endswith(kind)), None)
            for name, layer in layers.items():
                dense = under[name] + layer.delta() if form.startswith("merged") else under[name]  # (192, 576)
                layer.base.weight.data.copy_(_quantise(dense, blocks))  # (192, 576)
            with nullcontext() if unmerged else off(model):
                scores[form] = judge(model, task)["test"]
        lost = {}
        for kind in (NF4, Q4_1):
            lost[kind] = rounding(((V[name], layer.delta()) for name, layer in layers.items()), kind)
        return scores | {_ROUNDING: json.dumps(lost)}


def _quantise(weight: Tensor, kind: str | None) -> Tensor:
    return weight if kind is None else round_matrix(weight, kind)


def rounding(layers: Iterable[tuple[Tensor, Tensor]], kind: str) -> dict[str, float]:
    """What blocks make of weights and of updates to them, over all layers together.

    Args:
        layers: the weight V and the update D of each, (out, in).
        kind: of the blocks Q.

    Returns:
        ``base_error``, ``|Q(V) - V| / |V|``; ``merged_error``, ``|Q(V + D) - (V + D)| / |V|``; ``update``,
        ``|D| / |V|``; ``change``, ``|Q(V + D) - Q(V)| / |V|``; and ``cosine``, the cosine between that change and D.
        Norms are Frobenius norms.
    """
    size = product = 0.0
    squares = dict.fromkeys(("base_error", "merged_error", "update", "change"), 0.0)
    for V, D in layers:
        before, after = round_matrix(V, kind), round_matrix(V + D, kind)  # (192, 576)
        change = after - before  # (192, 576)
        size += _sum_products(V, V)
        product += _sum_products(change, D)
        for name, matrix in zip(squares, (before - V, after - V - D, D, change), strict=True):
            squares[name] += _sum_products(matrix, matrix)
    cosine = product / max((squares["change"] * squares["update"]) ** 0.5, 1e-30)
    return {name: (square / size) ** 0.5 for name, square in squares.items()} | {"cosine": cosine}


def _sum_products(first: Tensor, second: Tensor) -> float:
    return float((first.double() * second.double()).sum())


def merge_rows(trial: Row, judged: Row) -> Iterator[Row]:
    """Yield rows of every form of an adapter, and of what rounding does to it.

    The first have the data "<base>, merged" and the form as their setup, so that
    :func:`lora_lab.ablation.compare.compare_losses` compares the forms.
    """
    base = judged["data"]
    row = {"data": f"{base}, merged", "stage": "judging", "edge": judged["edge"]}
    row |= {name: trial[name] for name in ("lr", "seed", "steps", "step", "outcome", "reason", "commit")}
    for form in forms_of(base):
        losses = {SCORE + "test": trial.get(SCORE + form), "validation_loss": None}
        yield row | {"setup": form} | losses | {"test_loss": read_loss(losses, "test")}
    if trial["outcome"] == "done":
        for blocks, numbers in json.loads(trial[SCORE + _ROUNDING]).items():
            yield row | {"data": f"{base}, rounded", "stage": _ROUNDING, "setup": blocks} | numbers


def time_steps(device: torch.device) -> Iterator[Row]:
    """Yield rows of the time of a step over each base, measured in turn, with the data "time"."""
    sources: dict[str, Factory] = {base: partial(load_base, base, device) for base in BASES}
    variants = {base: Setup(METHOD, lean=lean) for base, lean in BASES.items()}
    times = step_time(sources, variants, plan_size(device)[1], 64, rounds=ROUNDS, device=device)
    for row in times.to_dict()["variants"]:
        setup = {"data": "time", "stage": "timing", "setup": row.pop("variant"), "rounds": ROUNDS}
        yield setup | {**row, "disturbance": times.disturbance}


QUANTISED = record_sweeps("quantised", plan, after=time_steps)
