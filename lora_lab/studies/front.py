"""``lora-lab record tiny_front``: who forgets less where both have learned as much, and what helps against forgetting?

Full fine-tuning, that of the blocks, and LoRA of ranks 8 and 64 train the small bases at three rates each. Every 10 of
240 steps two losses are measured: on numpy's docstrings, which are learned, and on docstrings of the kind that the base
has read. The lowest that a method can reach of the one at each value of the other, over its steps and rates, is its
front. Three things may move it: windows to rehearse, which the base has read or written, and, after training, less of
the adapter.

How a verdict is reached, fixed before the runs: eight seeds are compared in pairs, where both methods have learned 50,
80 and 95 % of what the lesser one learns at its best; a method forgets less if the bounds over seeds lie beyond 0.01
nats at all three. Full fine-tuning beside itself is the control, four seeds against the other four: if they differ,
nothing is decided on that base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import pandas
import torch
from torch import nn

from lora_lab.ablation import materials
from lora_lab.ablation.results import SCORE
from lora_lab.adapters.edit import strength
from lora_lab.analysis.divergence import mean_divergence, with_replay
from lora_lab.analysis.spectra import updates
from lora_lab.costs.fake import Factory
from lora_lab.inject import lora_layers
from lora_lab.models.pretrained import load_pretrained, load_tokenizer
from lora_lab.studies.paged import BASES, BATCH, PAGES, SEQ_LEN, list_methods, make_task
from lora_lab.studies.recorder import CurveSweep, plan_setups, record_sweeps
from lora_lab.task import Examples, Task
from lora_lab.tasks.pages import corpora, cut_pages
from lora_lab.train import evaluate

REPLAYED, SHARE = 100, 0.2  # windows that are rehearsed, and which share of the training examples they make up
STRENGTHS = (0.25, 0.5, 0.75, 1.25)  # of an adapter
_OF_FRONT = (
    *("setup", "rank", "lr", "seed", "step", "outcome", "validation_loss", "off_domain_loss", "commit"),
    *(SCORE + name for name in ("divergence", "size")),
    *(f"{SCORE}{part}, {factor:g}" for part in ("new", "old") for factor in STRENGTHS),
)
REPLAYS = ("no replay", "replay of what it wrote", "replay of what it read")


def plan_tiny_front(device: torch.device) -> Iterator[CurveSweep]:
    """Yield what two cores can do in two hours; all rates of all seeds judge."""
    for base, replay in product(BASES, REPLAYS):
        methods = list_methods(base, [8, 64])
        if replay != "no replay":
            methods = {name: methods[name] for name in ("full", "r=8")}
        data = f"{base}, {replay}"
        yield CurveSweep(
            plan_setups(methods, 240, BATCH, 3, eval_every=10, eval_examples=None),
            *((), range(2, 10)),
            about={"data": data},
            data=data,
            task=partial(make_front_task, base, replay),
            starts=dict.fromkeys(methods, partial(_start, device, base)),
            options={"judge": Distance(base)},
            show=shorten,
            columns=_OF_FRONT,
            shared=True,
        )


def _start(device: torch.device, base: str, seed: int) -> Factory:
    return partial(materials.language_model, device, base)


def make_front_task(base: str, replay: str) -> Task:
    """Return the task of numpy's docstrings, a window of a page, and windows of another kind to rehearse."""
    task = make_task(base, per_page=1)
    if replay == "no replay":
        return task
    return with_replay(task, write(base) if "wrote" in replay else read(base), SHARE)


def read(base: str) -> Examples:
    """Return windows of pages of the kind that a base has read, a page each, of which none judges."""
    return cut_pages(load_tokenizer(base), corpora()["known"], SEQ_LEN, 1, PAGES + REPLAYED)[slice(PAGES, None)]


def write(base: str) -> Examples:
    """Return windows that a base writes, at temperature 1."""
    model, tokenizer = load_pretrained(base)
    start = torch.tensor(tokenizer.encode("\n\n"))  # (1,): between two pages
    texts = [model.generate(start, SEQ_LEN + 1, temperature=1.0, seed=seed) for seed in range(REPLAYED)]  # (65,) each
    ids = torch.stack(texts)  # (100, 65)
    return Examples(ids[:, :-1], ids[:, 1:])


@dataclass(frozen=True)
class Distance:
    """A judge for :func:`lora_lab.ablation.ablate`: how far a model has moved from its base.

    Its scores are "divergence", KL(base || tuned) on the new task's validation part in nats a token; "size", the norm
    of the change of its matrices; and for an adapter "new, 0.5" and "old, 0.5", the losses on validation and off-domain
    part at each of :data:`STRENGTHS`.
    """

    base: str

    def __call__(self, model: nn.Module, task: Task) -> dict[str, float]:
        base = materials.language_model(next(model.parameters()).device, self.base)
        changes = updates(base, model, progress=False).values()
        size = math.sqrt(sum(float(update.svd.S.square().sum()) for update in changes))
        scores = {"divergence": mean_divergence(base, model, task), "size": size}
        for factor in STRENGTHS if lora_layers(model) else ():
            with strength(model, factor):
                for name, part in {"new": "validation", "old": "off_domain"}.items():
                    scores[f"{name}, {factor:g}"] = evaluate(model, task, part)
        return scores


def shorten(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Return the table to six decimals, with the commit in the last row of each trial alone: there are many rows."""
    return frame.assign(commit=frame["commit"].where(frame["step"] == frame["steps"])).round(6)


TINY_FRONT = record_sweeps("tiny_front", plan_tiny_front)
