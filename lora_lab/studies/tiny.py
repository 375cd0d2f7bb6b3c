"""Records of the small language models that are shipped: many seeds, several bases, seconds a run.

tiny_rank   Which rank is enough, and when does a rank run out of capacity? Full fine-tuning, full fine-tuning of the
            blocks alone (the embedding, which LoRA leaves frozen, stays as it is) and LoRA of three ranks, after 60,
            240 and 960 steps on text that is never read twice, each at the rate that is best for it.

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
from lora_lab.task import Task
from lora_lab.tasks.pages import corpora, paged_task

PER_PAGE = 8  # windows of a page
HELD_OUT = {"numpy": 128, "readmes": 40}  # pages of validation, and as many of test
SEQ_LEN, BATCH = 64, 8
BLOCKS = PartialFineTuning(("model.layers",))
# By width, the middles of the first rates: full fine-tuning, the blocks alone, LoRA with alpha = 32.
CENTRES = {64: (2e-3, 2e-3, 6e-3), 128: (1e-3, 1e-3, 4e-3), 256: (5e-4, 5e-4, 2e-3)}


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
    """Yield what two cores can do in four hours: the small bases first, which take a tenth of the largest."""
    for base in ("tiny-64-0", "tiny-64-1", "tiny-128-0", "tiny-128-1", "tiny-256-0"):
        full, blocks, lora = CENTRES[width_of(base)]
        methods: Methods = {"full": (FullFineTuning(), full), "blocks": (BLOCKS, blocks)}
        methods |= {f"r={rank}": (LoRA(rank, 32), lora) for rank in RANKS}
        yield plan_tiny(methods, "numpy", base, (60, 240, 960) if width_of(base) < 256 else (60, 240))


TINY_RANK = record_sweeps("tiny_rank", plan_tiny_rank)
