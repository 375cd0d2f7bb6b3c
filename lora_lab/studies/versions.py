"""Records of an adapter and of other versions of its base: in four bits, merged, or trained on.

In tiny_quantised and smol_quantised LoRA of rank 8 trains over each base in float32 and in NF4 (QLoRA), and is then
merged in every form: what does NF4 cost, and how should its adapter be merged? In tiny_upgrade it is copied to a base
that was trained on: does it keep its gain?

The rules of verdicts are those of :mod:`lora_lab.studies.paged`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.ablation import materials
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.stats import BlockLosses
from lora_lab.adapters.edit import off, switch
from lora_lab.costs.fake import Factory
from lora_lab.inject import adapter_state, inject, lora_layers
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.models.pretrained import SMOLLM2, load_tokenizer
from lora_lab.models.quantize import quantize_nf4, round_matrix
from lora_lab.studies.paged import BASES, BATCH, CENTRES, PAGES, PER_PAGE, SEQ_LEN, make_task, plan_pages
from lora_lab.studies.recorder import BlockSweep, Row, Source, read_loss, record_sweeps
from lora_lab.task import Task
from lora_lab.tasks.pages import corpora, paged_task
from lora_lab.train import fit

ADAPTER = LoRA(8, 32)


def plan_adapter(base: str, form: str, model: Factory, steps: int = 240, **options: Any) -> BlockSweep:
    """Return a sweep of the adapter over a form of a base."""
    *_, lora = CENTRES[base]
    source = partial(load_source, base, model)
    return plan_pages(base, {form: (ADAPTER, lora)}, steps, data=f"{base}, {form}", source=source, **options)


def load_source(base: str, model: Factory, device: torch.device) -> Source:
    """Return what makes a form of a base, and its task."""
    return model, partial(make_task, base, per_page=windows_of(base))


def windows_of(base: str) -> int:
    """Return how many windows of a page judge a base."""
    return PER_PAGE if base in BASES else 1


def form_rows(data: str, forms: Sequence[str], trial: Row) -> Iterator[Row]:
    """Yield a row for each form of an adapter, whose losses of blocks a judge returned as scores of these names.

    Args:
        data: follows the trial's own.
    """
    row = {"data": f"{trial['data']}, {data}", "stage": "judging"}
    row |= {name: trial[name] for name in ("edge", "lr", "seed", "steps", "step", "outcome", "reason", "commit")}
    for form in forms:
        losses = {SCORE + "test": trial.get(SCORE + form), "validation_loss": None}
        yield row | {"setup": form} | losses | {"test_loss": read_loss(losses, "test")}


# Four bits

NF4 = "NF4-double"  # as QLoRA has it
BLOCKS_OF = {"float32": None, "NF4": NF4}


def plan_tiny_quantised(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in half an hour."""
    yield from (plan_form(base, form, 240, device) for base, form in product(BASES, BLOCKS_OF))


def plan_smol_quantised(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in an hour."""
    yield from (plan_form(SMOLLM2, form, 60, device) for form in BLOCKS_OF)


def plan_form(base: str, form: str, steps: int, device: torch.device) -> BlockSweep:
    """Return a sweep of the adapter over a base in four bits or not, with its merges."""
    rerun = (Merges(base, form), partial(form_rows, "merged", forms_of(form)))
    return plan_adapter(base, form, partial(load_form, base, form, device), steps, rerun=rerun)


def load_form(base: str, form: str, device: torch.device) -> nn.Module:
    """Return a base in a form of :data:`BLOCKS_OF`."""
    model = materials.language_model(device, base)
    if form == "NF4":
        quantize_nf4(model)
    return model


def forms_of(form: str) -> list[str]:
    """Return the names of the models that are made of an adapter, in the order of :class:`Merges`."""
    forms = ["base", "unmerged", "merged", "unmerged, base in NF4", "merged, then NF4"]
    return forms if form == "float32" else [*forms, "merged into float32", "merged into float32, then NF4"]


@dataclass(frozen=True)
class Merges:
    """A judge for :func:`lora_lab.ablation.ablate`: the losses of every form in which an adapter can be used.

    With W the weight of the base in float32, Q the rounding to blocks, V the weight under which the adapter was trained
    (W, or Q(W) for QLoRA) and D its update, the forms are

        base                            V               without the adapter
        unmerged                        V + D           as it was trained
        merged                          V + D           as one dense matrix
        unmerged, base in NF4           Q(V) + D        the control: the base is rounded, the update is not
        merged, then NF4                Q(V + D)
        merged into float32             W + D           under V = Q(W) alone, as is the next
        merged into float32, then NF4   Q(W + D)

    Its scores are the losses of blocks of test examples by form, as those of
    :class:`lora_lab.ablation.stats.BlockLosses`.

    Args:
        base, form: under which the adapter was trained.
        pages: of the test part, how many.
    """

    base: str
    form: str
    pages: int = PAGES

    @torch.no_grad()
    def __call__(self, model: nn.Module, task: Task) -> dict[str, str]:
        state, device = adapter_state(model), next(model.parameters()).device
        model = materials.language_model(device, self.base)
        inject(model, ADAPTER)
        switch(model, state)
        layers, windows = lora_layers(model), windows_of(self.base)
        W = {name: layer.base.weight.detach().clone() for name, layer in layers.items()}  # (192, 576)
        V = {name: _quantise(weight, BLOCKS_OF[self.form]) for name, weight in W.items()}  # (192, 576)
        judge, scores = BlockLosses({"test": self.pages * windows}, windows), {}
        for form in forms_of(self.form):
            under = W if "float32" in form else V
            for name, layer in layers.items():
                dense = under[name] + layer.delta() if form.startswith("merged") else under[name]  # (192, 576)
                layer.base.weight.data.copy_(_quantise(dense, NF4 if form.endswith("NF4") else None))  # (192, 576)
            with nullcontext() if form.startswith("unmerged") else off(model):
                scores[form] = judge(model, task)["test"]
        return scores


def _quantise(weight: Tensor, kind: str | None) -> Tensor:
    return weight if kind is None else round_matrix(weight, kind)


TINY_QUANTISED = record_sweeps("tiny_quantised", plan_tiny_quantised)
SMOL_QUANTISED = record_sweeps("smol_quantised", plan_smol_quantised)


# Another version of the base

# By corpus, the steps of full fine-tuning that make it: of more of what the base has read, or of other text.
UPGRADES = {"known": 240, "readmes": 720}
COPIES = [f"{corpus}, {setup}" for corpus, setup in product(UPGRADES, ("alone", "copied"))]


def plan_tiny_upgrade(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in half an hour."""
    for base in BASES:
        rerun = (Copies(base), partial(form_rows, "on others", COPIES))
        yield plan_adapter(base, "as it is", partial(materials.language_model, device, base), rerun=rerun)
        for corpus in UPGRADES:
            yield plan_adapter(base, corpus, partial(upgrade, base, corpus, device))


def upgrade(base: str, corpus: str, device: torch.device) -> nn.Module:
    """Return another version of a base, by full fine-tuning on a corpus: the caller's own each time."""
    model = materials.language_model(device, base)
    model.load_state_dict(_train_on(base, corpus, device))
    return model


@cache
def _train_on(base: str, corpus: str, device: torch.device) -> dict[str, Tensor]:
    model, pages = materials.language_model(device, base), corpora()
    sizes = {"seq_len": SEQ_LEN, "held_out": 8, "per_page": 1}
    task = paged_task(load_tokenizer(base), pages[corpus], pages["known"], name=corpus, about=corpus, **sizes)
    steps, (lr, *_) = UPGRADES[corpus], CENTRES[base]
    fit(model, task, FullFineTuning(), steps=steps, lr=lr, batch_size=BATCH, eval_every=steps, progress=False)
    return model.state_dict()


@dataclass(frozen=True)
class Copies:
    """A judge for :func:`lora_lab.ablation.ablate`: an adapter on other versions of its base.

    Its scores are the losses of blocks of test examples, as those of :class:`lora_lab.ablation.stats.BlockLosses`, with
    the names in :data:`COPIES`: without the adapter and with it.
    """

    base: str

    def __call__(self, model: nn.Module, task: Task) -> dict[str, str]:
        state, device = adapter_state(model), next(model.parameters()).device
        judge, scores = BlockLosses({"test": PAGES * PER_PAGE}, PER_PAGE), {}
        for corpus in UPGRADES:
            version = upgrade(self.base, corpus, device)
            scores[f"{corpus}, alone"] = judge(version, task)["test"]
            inject(version, ADAPTER)
            switch(version, state)
            scores[f"{corpus}, copied"] = judge(version, task)["test"]
        return scores


TINY_UPGRADE = record_sweeps("tiny_upgrade", plan_tiny_upgrade)
