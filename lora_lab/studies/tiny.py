"""Records of the small language models that are shipped: many seeds, several bases, seconds a run.

tiny_rank      Which rank is enough, and when does a rank run out of capacity? Full fine-tuning, full fine-tuning of the
               blocks alone (the embedding, which LoRA leaves frozen, stays as it is) and LoRA of three ranks, after 60,
               240 and 720 steps on text that is never read twice, each at the rate that is best for it.
tiny_layers    Which layers should have adapters, at equal numbers of trained parameters? Queries and values, attention,
               the MLP, or all, after 240 steps.
tiny_variants  Does a variant of LoRA learn more? LoRA, rsLoRA, LoRA+, LoRA-FA, DoRA and PiSSA of rank 16, DoRA of half
               that rank, and LoRA and rsLoRA of four times that, after 240 steps.

A small base shows signs, mechanisms and trends with the width, not the numbers of a real model.

How a verdict is reached, fixed before the runs: the rate of each setup is chosen by two seeds on validation pages and
lies inside its grid. Eight other seeds judge on 128 test pages. A difference of two setups has bounds by resampling
seeds and pages, and by Student's t over the seeds, of which the outer one counts. It is "lower" or "higher" where the
bounds exclude zero, "equal" where they lie within 0.01 nats, and else open; bounds for all that is compared on a base
hold together (95 %). A sentence stands if it holds on every base and corpus, falls if it fails on every one, and
depends if it holds on some and fails on others; it is open where that would need a comparison that is open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from lora_lab.ablation import materials
from lora_lab.methods import FullFineTuning, LoRA, PartialFineTuning
from lora_lab.models.pretrained import load_tokenizer
from lora_lab.studies.recorder import BlockSweep, Methods, Source, plan_setups, record_sweeps
from lora_lab.studies.steps import ATTENTION
from lora_lab.task import Task
from lora_lab.tasks.pages import corpora, paged_task
from lora_lab.variants import DoRA, LoRAFA, LoRAPlus, PiSSA, RsLoRA

BASES = ("tiny-64-0", "tiny-64-1", "tiny-128-0", "tiny-128-1")
PER_PAGE = 8  # windows of a page
HELD_OUT = {"numpy": 128, "readmes": 40}  # pages of validation, and as many of test
SEQ_LEN, BATCH = 64, 8
BLOCKS = PartialFineTuning(("model.layers",))
# By width, the middles of the first rates: full fine-tuning, the blocks alone, LoRA with alpha = 32.
CENTRES = {64: (2e-3, 2e-3, 6e-3), 128: (1e-3, 1e-3, 4e-3)}


def make_task(corpus: str, base: str) -> Task:
    """Return the task of a corpus for a base, with pages as blocks; off-domain is text of what the base has read."""
    pages = corpora()
    about = f"{corpus}, by page; off-domain: docstrings of the kind that the small bases have read"
    sizes = {"held_out": HELD_OUT[corpus], "per_page": PER_PAGE, "seq_len": SEQ_LEN}
    return paged_task(load_tokenizer(base), pages[corpus], pages["known"], name=corpus, about=about, **sizes)


def load_source(corpus: str, base: str, device: torch.device) -> Source:
    """Return what makes the base and its task."""
    return partial(materials.language_model, device, base), partial(make_task, corpus, base)


def plan_tiny(methods: Methods, corpus: str, base: str, steps: Sequence[int]) -> BlockSweep:
    """Return a sweep of methods on a base: two seeds choose the rates, eight judge."""
    setups = {}
    for count in steps:
        named = {f"{name}, {count} steps": method for name, method in methods.items()}
        setups |= plan_setups(named, count, BATCH, count=3)
    pages = HELD_OUT[corpus] * PER_PAGE
    return BlockSweep(
        setups,
        range(2),
        range(2, 10),
        data=f"{base}, {corpus}",
        source=partial(load_source, corpus, base),
        chosen_on=min(256, pages),
        judged_on={"validation": min(256, pages), "test": pages},
        block=PER_PAGE,
        seq_len=SEQ_LEN,
    )


def width_of(base: str) -> int:
    """Return the width of a small base, from its name."""
    return int(base.split("-")[1])


# Rank

RANKS = (1, 8, 64)


def plan_tiny_rank(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in three hours."""
    for base in BASES:
        full, blocks, lora = CENTRES[width_of(base)]
        methods: Methods = {"full": (FullFineTuning(), full), "blocks": (BLOCKS, blocks)}
        methods |= {f"r={rank}": (LoRA(rank, 32), lora) for rank in RANKS}
        yield plan_tiny(methods, "numpy", base, (60, 240, 720))


TINY_RANK = record_sweeps("tiny_rank", plan_tiny_rank)


# Layers, and variants

MLP = ("gate_proj", "up_proj", "down_proj")
# The ranks with which each trains 120 d numbers a block, where d is the width and the MLP is three times as wide.
TARGETS_OF = {"q, v": (30, ("q_proj", "v_proj")), "attention": (15, ATTENTION), "MLP": (10, MLP)}
TARGETS_OF |= {"all": (6, (*ATTENTION, *MLP))}
# A method, and by how much its best rate is thought to be another than LoRA's.
VARIANTS_OF = {
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


def plan_tiny_layers(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in an hour."""
    for base in BASES:
        *_, lora = CENTRES[width_of(base)]
        methods = {name: (LoRA(rank, 32, targets=targets), lora) for name, (rank, targets) in TARGETS_OF.items()}
        yield plan_tiny(methods, "numpy", base, (240,))


def plan_tiny_variants(device: torch.device) -> Iterator[BlockSweep]:
    """Yield what two cores can do in an hour and a half."""
    for base in BASES:
        *_, lora = CENTRES[width_of(base)]
        methods = {name: (method, lora * factor) for name, (method, factor) in VARIANTS_OF.items()}
        yield plan_tiny(methods, "numpy", base, (240,))


TINY_LAYERS = record_sweeps("tiny_layers", plan_tiny_layers)
TINY_VARIANTS = record_sweeps("tiny_variants", plan_tiny_variants)
