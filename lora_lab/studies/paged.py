"""Records that are judged by pages: many seeds, and small language models of our own beside SmolLM2-135M.

The names begin with "tiny" for the four bases that are shipped, where a run takes seconds, and with "smol" for SmolLM2.

rank      Which rank is enough, and when does a rank run out of capacity? Full fine-tuning, full fine-tuning of the
          blocks alone (the embedding, which LoRA leaves frozen, stays as it is) and LoRA of several ranks, after 60 and
          240 steps and, on small bases, 720, on text that is never read twice, each at the rate that is best for it.
readmes   The same after 60 and 240 steps on another kind of text, far from what the bases have read.
batch     Do large batches hurt LoRA more than full fine-tuning? The same setups after 30 steps of 64 windows, which
          read as much as 240 steps of 8.
repeats   Does repetition lower the best rate, or the number of steps? Steps as in tiny_rank, on 480 windows.
layers    Which layers should have adapters, at equal numbers of trained parameters? Queries and values, attention, the
          MLP, or all.
variants  Does a variant of LoRA learn more? LoRA, rsLoRA, LoRA+, LoRA-FA, DoRA and PiSSA of rank 16, DoRA of half that
          rank, and LoRA and rsLoRA of four times that.

A small base shows signs, mechanisms and trends with the width, not the numbers of a real model.

How a verdict is reached, fixed before the runs: the rate of each setup is chosen by two seeds on validation pages and
lies inside its grid. Eight other seeds judge on 128 test pages (40 of READMEs). A difference of two setups has bounds
by resampling seeds and pages, and by Student's t over the seeds, of which the outer one counts. It is "lower" or
"higher" where the bounds exclude zero, "equal" where they lie within 0.01 nats, and else open; bounds for all that is
compared on a base hold together (95 %). A sentence stands if it holds on every base, falls if it fails on every one,
and depends if it holds on some and fails on others; it is open where that would need a comparison that is open. Where a
sentence compares best rates, each base counts as one value, with Student's t over the bases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lora_lab.ablation import materials
from lora_lab.methods import FullFineTuning, LoRA, Method, PartialFineTuning
from lora_lab.models.pretrained import SMOLLM2, load_tokenizer
from lora_lab.studies.recorder import BFLOAT16, BlockSweep, Methods, Source, plan_setups, record_sweeps
from lora_lab.studies.steps import ATTENTION
from lora_lab.task import Task
from lora_lab.tasks.pages import corpora, paged_task
from lora_lab.variants import DoRA, LoRAFA, LoRAPlus, PiSSA, RsLoRA

BASES = ("tiny-64-0", "tiny-64-1", "tiny-128-0", "tiny-128-1")
PER_PAGE = 8  # windows of a page, on small bases; one on SmolLM2
PAGES = 128  # of validation, and as many of test
README_PAGES = 40
SEQ_LEN, BATCH = 64, 8
BLOCKS = PartialFineTuning(("model.layers",))
# By base, the middles of the first rates: full fine-tuning, the blocks alone, LoRA with alpha = 32.
CENTRES: Mapping[str, tuple[float, float, float]] = {
    **dict.fromkeys(BASES[:2], (2e-3, 2e-3, 6e-3)),
    **dict.fromkeys(BASES[2:], (1e-3, 1e-3, 4e-3)),
    SMOLLM2: (1.25e-4, 1.25e-4, 1.5e-3),
}


def make_task(base: str, rows: int | None = None, per_page: int = PER_PAGE, corpus: str = "numpy") -> Task:
    """Return the task of a corpus for a base, by page; off-domain is text of what small bases have read.

    Args:
        rows: to train on; None takes all.
        per_page: windows of each page.
        corpus: of :mod:`lora_lab.tasks.pages`.
    """
    pages = corpora()
    about = f"{corpus}, by page; off-domain: docstrings of the kind that the small bases have read"
    held_out = README_PAGES if corpus == "readmes" else PAGES
    sizes = {"held_out": held_out, "per_page": per_page, "seq_len": SEQ_LEN}
    task = paged_task(load_tokenizer(base), pages[corpus], pages["known"], name=corpus, about=about, **sizes)
    return task.limited(rows, 0) if rows else task


def load_source(base: str, rows: int | None, per_page: int, device: torch.device, corpus: str = "numpy") -> Source:
    """Return what makes the base and its task."""
    return partial(materials.language_model, device, base), partial(make_task, base, rows, per_page, corpus)


def plan_pages(
    base: str, methods: Methods, steps: int | Sequence[int], batch: int = BATCH, **options: Any
) -> BlockSweep:
    """Return a sweep of methods on a base: two seeds choose the rates, eight judge.

    Args:
        batch: windows a step; SmolLM2 has four.
        options: of the BlockSweep, where they differ.
    """
    small, setups = base in BASES, {}
    for count in [steps] if isinstance(steps, int) else steps:
        named = {f"{name}, {count} steps": method for name, method in methods.items()}
        setups |= plan_setups(named, count, batch if small else 4, count=3, **({} if small else BFLOAT16))
    windows, some = (PER_PAGE, 256) if small else (1, 64)
    how: Any = {
        "data": f"{base}, numpy",
        "source": partial(load_source, base, None, windows),
        "chosen_on": some,
        "judged_on": {"validation": some, "test": PAGES * windows},
        "block": windows,
        "seq_len": SEQ_LEN,
    }
    return BlockSweep(setups, range(2), range(2, 10), **how | options)


# Rank


def list_methods(base: str, ranks: Sequence[int] = (1, 8, 64), factor: float = 1.0) -> Methods:
    """Return full fine-tuning, that of the blocks, and LoRA of these ranks, with the middles of their rates.

    Args:
        factor: by how much the rates are thought to be higher than those in :data:`CENTRES`.
    """
    full, blocks, lora = (factor * lr for lr in CENTRES[base])
    methods: Methods = {"full": (FullFineTuning(), full), "blocks": (BLOCKS, blocks)}
    return {**methods, **{f"r={rank}": (LoRA(rank, 32), lora) for rank in ranks}}


def plan_tiny_rank(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in three hours."""
    for base in BASES:
        yield plan_pages(base, list_methods(base), (60, 240, 720))


def plan_tiny_readmes(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in half an hour; fewer pages are long enough to judge."""
    for base in BASES[::2]:
        source = partial(load_source, base, None, PER_PAGE, corpus="readmes")
        judged = {"validation": 256, "test": README_PAGES * PER_PAGE}
        yield plan_pages(base, list_methods(base), (60, 240), data=f"{base}, readmes", source=source, judged_on=judged)


def plan_smol_rank(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in four hours: longer runs want a lower rate."""
    for steps, factor in {60: 1.0, 240: 0.6}.items():
        methods = list_methods(SMOLLM2, [8, 64], factor)
        yield plan_pages(SMOLLM2, methods, steps, data=f"{SMOLLM2}, numpy, {steps} steps")


def plan_tiny_batch(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in 40 minutes: larger batches want a higher rate."""
    for base in BASES:
        yield plan_pages(base, list_methods(base, factor=2), 30, 64)


REPEATED = 480  # windows, which 60 steps of 8 read once


def plan_tiny_repeats(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in an hour."""
    for base in BASES:
        source = partial(load_source, base, REPEATED, PER_PAGE)
        methods = list_methods(base, [8], 1 / 2)
        yield plan_pages(base, methods, (240, 720), data=f"{base}, numpy, repeated", source=source)


TINY_RANK = record_sweeps("tiny_rank", plan_tiny_rank)
SMOL_RANK = record_sweeps("smol_rank", plan_smol_rank)
TINY_READMES = record_sweeps("tiny_readmes", plan_tiny_readmes)
TINY_BATCH = record_sweeps("tiny_batch", plan_tiny_batch)
TINY_REPEATS = record_sweeps("tiny_repeats", plan_tiny_repeats)


# Layers, and variants

MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {"q, v": ("q_proj", "v_proj"), "attention": ATTENTION, "MLP": MLP, "all": (*ATTENTION, *MLP)}
# In that order, the ranks with which each trains as many numbers: of small bases, and of SmolLM2 to within 2 %.
SMALL_RANKS, SMOL_RANKS = (30, 15, 10, 6), (53, 26, 16, 10)
# A method, and by how much its best rate is thought to be another than LoRA's.
VARIANTS_OF: Mapping[str, tuple[Method, float]] = {
    "LoRA": (LoRA(16, 32), 1),
    "rsLoRA": (RsLoRA(16, 32), 1 / 2),
    "LoRA+": (LoRAPlus(16, 32, ratio=16), 1 / 8),
    "LoRA-FA": (LoRAFA(16, 32), 2),
    "DoRA": (DoRA(16, 32), 1),
    "PiSSA": (PiSSA(16, 32), 1 / 4),
    "DoRA r=8": (DoRA(8, 32), 1),
    "LoRA r=64": (LoRA(64, 32), 1),
    "rsLoRA r=64": (RsLoRA(64, 32), 1 / 4),
}


def list_layers(base: str) -> Methods:
    """Return adapters on each choice of layers."""
    *_, lora = CENTRES[base]
    ranks = SMALL_RANKS if base in BASES else SMOL_RANKS
    each = zip(TARGETS.items(), ranks, strict=True)
    return {name: (LoRA(rank, 32, targets=targets), lora) for (name, targets), rank in each}


def list_variants(base: str) -> Methods:
    """Return the variants."""
    *_, lora = CENTRES[base]
    return {name: (method, lora * factor) for name, (method, factor) in VARIANTS_OF.items()}


def plan_tiny_layers(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in an hour."""
    yield from (plan_pages(base, list_layers(base), 240) for base in BASES)


def plan_smol_layers(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in two hours."""
    yield plan_pages(SMOLLM2, list_layers(SMOLLM2), 60)


def plan_tiny_variants(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in an hour and a half."""
    yield from (plan_pages(base, list_variants(base), 240) for base in BASES)


def plan_smol_variants(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in two hours."""
    yield plan_pages(SMOLLM2, list_variants(SMOLLM2), 60)


TINY_LAYERS = record_sweeps("tiny_layers", plan_tiny_layers)
SMOL_LAYERS = record_sweeps("smol_layers", plan_smol_layers)
TINY_VARIANTS = record_sweeps("tiny_variants", plan_tiny_variants)
SMOL_VARIANTS = record_sweeps("smol_variants", plan_smol_variants)
