"""Which rank is enough for a task of yours: a sweep of short runs, with few learning rates because of a scaling law.

    print(find_rank(model, task, (1, 4, 16, 64), lr=2e-3, steps=60, batch_size=4, folder="runs/rank", margin=0.01))

With alpha fixed the best learning rate hardly depends on the rank from rank 4 on, and is a little lower below (Chen,
Villar and Hayou 2026, arXiv 2602.06204; measured in lesson 12). So three rates are tried for each rank, in factors of 2
around one that serves all, instead of a wide grid for each; if the best is at a grid's edge, the grid is extended. Two
seeds choose the rates on validation examples, and others judge on test examples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_lab.ablation.compare import RankVerdict, compare_tuned, judge_ranks, rates_around
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.run import ModelOrFactory, TaskOrFactory
from lora_lab.methods import LoRA
from lora_lab.train import fit

if TYPE_CHECKING:
    from lora_lab.task import Task

ALPHA = 32.0
COUNT = 3  # of rates of each rank, to begin with
CHOOSING = range(2)  # seeds
EXAMPLES = 512  # of validation and of test, at most
_TIMED = 4  # steps


Setups = dict[str, tuple[Trial, Sequence[float]]]


def plan_ranks(ranks: Sequence[int], lr: float, steps: int, batch_size: int) -> Setups:
    """Return how each rank trains and the rates that it tries first, by setup, from the lowest rank to the highest.

    Args:
        ranks: two or more.
        lr: the middle of the rates from rank 4 on; half of it below.
        steps, batch_size: of each run.
    """
    options: Any = {"steps": steps, "batch_size": batch_size, "eval_every": steps, "eval_examples": 4}
    setups = {}
    for rank in sorted(set(ranks)):
        lrs = rates_around(lr if rank >= 4 else lr / 2, count=COUNT)
        setups[f"rank {rank}"] = Trial(LoRA(rank, ALPHA), lr, **options), lrs
    return setups


def count_runs(ranks: Sequence[int], seeds: int) -> int:
    """Return how many runs :func:`find_rank` trains, if no grid has to be widened."""
    return len(set(ranks)) * (COUNT * len(CHOOSING) + seeds)


def time_run(model_factory: ModelOrFactory, task: Task, ranks: Sequence[int], steps: int, batch_size: int) -> float:
    """Return the seconds of a run of the highest rank, from a few steps; its evaluations come on top."""
    model = copy.deepcopy(model_factory) if isinstance(model_factory, nn.Module) else model_factory()
    options = {"lr": 1e-6, "eval_examples": 4, "batch_size": batch_size, "progress": False}
    rows = fit(model, task, LoRA(max(ranks), ALPHA), steps=_TIMED, **options).rows
    return steps * min(row["seconds"] for row in rows[1:])


def find_rank(
    model_factory: ModelOrFactory,
    task: TaskOrFactory,
    ranks: Sequence[int] = (1, 4, 16, 64),
    *,
    lr: float,
    steps: int,
    batch_size: int,
    folder: str | Path,
    margin: float = 0.01,
    seeds: int = 5,
    **options: Any,
) -> RankVerdict:
    """Return the smallest rank whose loss is at most ``margin`` above that of the highest one.

    Args:
        model_factory, task, folder, **options: as for :func:`lora_lab.ablation.ablate`.
        ranks: two or more; the highest is what the others are held against.
        lr: where the rates begin, with alpha = 32: about ten times full fine-tuning's.
        steps, batch_size: of each run.
        margin: the difference of losses that does not matter, in the task's unit.
        seeds: that judge; two more choose the rates.

    Raises:
        ValueError: as for ablate, or the highest rank has no result for each seed.
    """
    import pandas

    setups = plan_ranks(ranks, lr, steps, batch_size)
    trials = {setup: trial for setup, (trial, _) in setups.items()}
    lrs = {setup: rates for setup, (_, rates) in setups.items()}
    data = task if not callable(task) else task()
    sizes = {part: min(EXAMPLES, len(data.parts[part])) for part in ("validation", "test")}
    first = len(CHOOSING)
    study: Any = {"choosing": CHOOSING, "judging": range(first, first + seeds)}
    study |= {"chosen_on": sizes["validation"], "judged_on": {"test": sizes["test"]}}
    frames = [*compare_tuned(model_factory, task, trials, lrs, folder, **study, **options)]
    return judge_ranks(pandas.concat(frames, ignore_index=True), margin)
