"""``lora-lab record rank_advice``: does one run at a high rank tell which rank is enough?

On each task a sweep over ranks, each at its own learning rate, says which rank is enough; and runs at rank 64, at the
rate chosen for it, give the statistics from which :mod:`lora_lab.ablation.rank_advice` predicts it. The tasks are nets
with a planted update of a known rank, on which the rule is chosen, and those on which it is judged: digits from few and
from many pictures, Python's manual, translation and summaries. The trials on Python's manual are those of
``lora-lab record rates``: copy them from ``runs/record-rates/docs/choosing-128-4`` into the folder here of the same
name, and they are not run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lab import tasks
from lora_lab.ablation import studies
from lora_lab.ablation.compare import Study, last_rows, rates_around
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.rank_advice import UpdateRanks
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.run import ablate
from lora_lab.lean import Lean
from lora_lab.methods import LoRA
from lora_lab.models.digits import DigitsMLP
from lora_lab.studies import rates
from lora_lab.studies.tuned import ON_TEST, Planned, processes, recorder, template
from lora_lab.system.schema import plain
from lora_lab.task import Task

RANKS = rates.RANKS
HIGH = f"r={RANKS[-1]}"  # the setup whose runs predict
PLANTED = (1, 2, 4, 8, 16)  # ranks of the planted updates
PICTURES = (100, 500, 1200)  # of digits to train on
MARGINS = {"planted": 0.001, "digits": 0.03, "language": 0.02}  # differences of losses that do not matter
DOWNSTREAM = {"translate-fr": (50, 44), "summarise": (25, 113)}  # steps, and the mean tokens of an example
# The middles of the first grids, by rank; those of digits and docs are in rates.CENTRES.
PLANTED_RATES = (1.6e-2, 1.6e-2, 1.6e-2, 8e-3, 8e-3, 4e-3, 4e-3)
DOWNSTREAM_RATES = (8e-3, 8e-3, 4e-3, 4e-3, 2e-3, 2e-3, 1e-3)


def plan(device: torch.device) -> dict[str, Planned]:
    """What two cores can do in two hours, or a GPU in one; there the downstream tasks have all ranks, too."""
    gpu = device.type == "cuda"
    centres = {data: rates.CENTRES[data]["alpha = 2r"] for data in ("digits", "docs")} | {"planted": PLANTED_RATES}
    small = {f"planted {rank}": (partial(planted, rank), 600) for rank in PLANTED}
    small |= {f"digits {count}": (partial(digits, count), 200) for count in PICTURES}
    plans = {}
    for name, (source, steps) in small.items():
        lrs, judged_on = grids(centres[name.partition(" ")[0]]), {"validation": 200, "test": 256}
        study = Study(setups(steps, 32), lrs, range(3), range(3, 13), chosen_on=200, judged_on=judged_on)
        plans[name] = Planned(study, source=source)
    docs = setups(300, 8, Lean(torch.bfloat16)) if gpu else setups(60, 4, Lean(torch.bfloat16))
    judging = range(5, 10) if gpu else range(3, 6)
    choosing = rates.docs_seeds(device)
    language = {"docs": Study(docs, grids(centres["docs"]), choosing, judging, chosen_on=128, judged_on=ON_TEST)}
    for name, (steps, _) in DOWNSTREAM.items():
        of_task = setups(steps, 8, Lean(torch.bfloat16), RANKS if gpu else RANKS[::2])
        lrs = {setup: grids(DOWNSTREAM_RATES, count=5 if gpu else 3)[setup] for setup in of_task}
        language[name] = Study(of_task, lrs, range(2), judging, chosen_on=64, judged_on=ON_TEST)
    for name, study in language.items():
        again = [replace(study.setups[HIGH], seed=seed) for seed in judging]
        _, tokens = DOWNSTREAM.get(name, (None, 64))
        plans[name] = Planned(study, tokens, again=again, again_on=len(RANKS) * study.chosen_on)
    return plans


def setups(steps: int, batch_size: int, lean: Lean | None = None, ranks: Sequence[int] = RANKS) -> dict[str, Trial]:
    """LoRA of each rank, with alpha twice the rank."""
    return {f"r={rank}": template(LoRA(rank, 2 * rank), steps, batch_size, lean) for rank in ranks}


def grids(centres: Sequence[float], count: int = 5) -> dict[str, tuple[float, ...]]:
    """The first rates of each rank."""
    return {f"r={rank}": rates_around(lr, count=count) for rank, lr in zip(RANKS, centres, strict=True)}


def planted(rank: int, device: torch.device) -> tuple[nn.Module, Task]:
    """A small net, and the task of imitating it plus a hidden update of this rank."""
    return DigitsMLP(dtype=torch.float64), tasks.planted(DigitsMLP(dtype=torch.float64), rank, n_train=4096)


def digits(count: int, device: torch.device) -> tuple[nn.Module, Task]:
    """A small net that reads digits, and the task of reading them moved down, learned from so many pictures."""
    return studies.pretrained_digits(count), tasks.digits(n_train=count)


def margin_of(data: str) -> float:
    """The difference of losses that does not matter, in the task's unit."""
    return MARGINS.get(data.partition(" ")[0], MARGINS["language"])


def high_rank_rows(
    data: str, planned: Planned, sweep: Sequence[Mapping[str, Any]], device: torch.device, folder: Path
) -> Iterator[dict[str, Any]]:
    """Rows of runs at rank 64 with its rate and the judging seeds, with their statistics.

    Args:
        data: the task's name.
        planned: its study.
        sweep: the rows of its trials.
        device: where to train.
        folder: of the study's results.
    """
    chosen = {row["lr"] for row in sweep if row["setup"] == HIGH and row["stage"] == "judging"}
    if not chosen:  # every rate failed
        return
    (lr,), study = chosen, planned.study
    trials = [replace(study.setups[HIGH], lr=lr, seed=seed) for seed in study.judging]
    model, task = planned.model_and_task(data, device)
    judge = UpdateRanks(RANKS, study.chosen_on)
    frame = ablate(model, task, trials, folder / "high rank", n_jobs=processes(data, device), judge=judge)
    about = {"data": data, "stage": "high rank", "setup": HIGH, "margin": margin_of(data)}
    losses = {"validation_loss": None, "test_loss": None}  # those of the judging trials are of more examples
    for row in last_rows(frame).to_dict("records"):
        scores = {str(name): value for name, value in row.items() if str(name).startswith(SCORE)}
        columns = {name: row[name] for name in ("rank", "lr", "seed", "outcome", "reason", "commit")}
        yield plain(about | columns | losses | scores)


RECORDER = recorder("rank_advice", plan, high_rank_rows)
