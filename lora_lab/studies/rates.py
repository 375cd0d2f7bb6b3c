"""``lora-lab record rates`` and ``rank_advice``: which rate suits a rank, and does one run tell which rank is enough?

rates        How does the best learning rate depend on the rank, and how far is it from full's? Full fine-tuning and
             LoRA of seven ranks, each under two rules for alpha (twice the rank: the scaling alpha / r is the same for
             all ranks; and 32: it falls as 1 / r), on the digits net and on the real model.
rank_advice  On each task a sweep over ranks, each at its own learning rate, says which rank is enough; and runs at rank
             64, at the rate chosen for it, give the statistics from which :mod:`lora_lab.ablation.rank_advice` predicts
             it. The tasks are nets with a planted update of a known rank, on which the rule is chosen, and those on
             which it is judged: digits from few and from many pictures, Python's manual, translation and summaries. The
             trials on Python's manual are those of ``lora-lab record rates``: copy them from
             ``runs/record-rates/docs/choosing-128-4`` into the folder of the same name here, to run them only once.
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
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.models.digits import DigitsMLP
from lora_lab.studies.recorder import ON_TEST, Planned, Row, plan_trial, record_tuned
from lora_lab.system.schema import plain
from lora_lab.task import Task

RANKS = (1, 2, 4, 8, 16, 32, 64)
RULES = {"alpha = 2r": lambda rank: 2 * rank, "alpha = 32": lambda rank: 32}
# The middles of the first grids, by rank; they are widened where the best rate is not inside.
CENTRES = {
    "digits": {
        "full": 8e-3,
        "alpha = 2r": (6.4e-2, 3.2e-2, 3.2e-2, 1.6e-2, 1.6e-2, 8e-3, 8e-3),
        "alpha = 32": (8e-3, 8e-3, 8e-3, 1.6e-2, 1.6e-2, 1.6e-2, 1.6e-2),
    },
    "docs": {
        "full": 1.25e-4,
        "alpha = 2r": (8e-3, 4e-3, 4e-3, 2e-3, 2e-3, 1e-3, 1e-3),
        "alpha = 32": (1e-3, 1e-3, 1e-3, 1e-3, 2e-3, 2e-3, 2e-3),
    },
}


def plan_rates(device: torch.device) -> dict[str, Planned]:
    """Return what two cores can do in a few hours, or a GPU in one."""
    none = {"judging": (), "judged_on": {}, "beyond": 2}  # the rates and their intervals are all that is asked for
    digits, docs = (_list_rules(data, device) for data in ("digits", "docs"))
    return {
        "digits": Planned(Study(*digits, range(5), chosen_on=200, **none), small=True),
        "docs": Planned(Study(*docs, _docs_seeds(device), chosen_on=128, **none)),
    }


def _docs_seeds(device: torch.device) -> range:
    """Return the seeds that choose the rates of the real model."""
    return range(5 if device.type == "cuda" else 3)


def _step(device: torch.device) -> tuple[int, int, Lean]:
    """Return steps, batch and lean step of LoRA on the real model."""
    return (300, 8, Lean(torch.bfloat16)) if device.type == "cuda" else (60, 4, Lean(torch.bfloat16))


def _list_rules(data: str, device: torch.device) -> tuple[dict[str, Trial], dict[str, tuple[float, ...]]]:
    """Return full fine-tuning, and LoRA of each rank under each rule: the setups, and the first rates of each."""
    step = (200, 32, None) if data == "digits" else _step(device)
    setups, lrs = {"full": plan_trial(FullFineTuning(), *step[:2])}, {"full": rates_around(CENTRES[data]["full"])}
    for rule, alpha in RULES.items():
        for rank, lr in zip(RANKS, CENTRES[data][rule], strict=True):
            setups[f"r={rank}, {rule}"] = plan_trial(LoRA(rank, alpha(rank)), *step)
            lrs[f"r={rank}, {rule}"] = rates_around(lr)
    return setups, lrs


HIGH = f"r={RANKS[-1]}"  # the setup whose runs predict
PLANTED = (1, 2, 4, 8, 16)  # ranks of the planted updates
PICTURES = (100, 500, 1200)  # of digits to train on
MARGINS = {"planted": 0.001, "digits": 0.03}  # differences of losses that do not matter, and of language models:
MARGIN = 0.02
DOWNSTREAM = {"translate-fr": (50, 44), "summarise": (25, 113)}  # steps, and the mean tokens of an example
# The middles of the first grids, by rank; those of digits and docs are in CENTRES.
PLANTED_RATES = (1.6e-2, 1.6e-2, 1.6e-2, 8e-3, 8e-3, 4e-3, 4e-3)
DOWNSTREAM_RATES = (8e-3, 8e-3, 4e-3, 4e-3, 2e-3, 2e-3, 1e-3)


def plan_rank_advice(device: torch.device) -> dict[str, Planned]:
    """Return what two cores can do in two hours, or a GPU in one; there the downstream tasks have all ranks, too."""
    gpu = device.type == "cuda"
    small = {f"planted {rank}": (partial(imitate, rank), 600, PLANTED_RATES) for rank in PLANTED}
    digits = CENTRES["digits"]["alpha = 2r"]
    small |= {f"digits {count}": (partial(read_moved_digits, count), 200, digits) for count in PICTURES}
    judged_on = {"validation": 200, "test": 256}
    plans = {
        name: Planned(
            Study(*_list_ranks(rates, (steps, 32, None)), range(3), range(3, 13), 200, judged_on),
            source=source,
            small=True,
        )
        for name, (source, steps, rates) in small.items()
    }
    judging = range(5, 10) if gpu else range(3, 6)
    docs = _list_ranks(CENTRES["docs"]["alpha = 2r"], _step(device))
    language = {"docs": (Study(*docs, _docs_seeds(device), judging, 128, ON_TEST), 64)}
    for name, (steps, tokens) in DOWNSTREAM.items():
        ranks, count = (RANKS, 5) if gpu else (RANKS[::2], 3)
        of_task = _list_ranks(DOWNSTREAM_RATES, (steps, 8, Lean(torch.bfloat16)), ranks, count)
        language[name] = Study(*of_task, range(2), judging, 64, ON_TEST), tokens
    for name, (study, tokens) in language.items():
        again = [replace(study.setups[HIGH], seed=seed) for seed in judging]
        plans[name] = Planned(study, tokens, again=again, again_on=len(RANKS) * study.chosen_on)
    return plans


def _list_ranks(
    centres: Sequence[float], step: tuple[int, int, Lean | None], ranks: Sequence[int] = RANKS, count: int = 5
) -> tuple[dict[str, Trial], dict[str, tuple[float, ...]]]:
    """Return LoRA of each rank, with alpha twice the rank: the setups, and the first rates of each."""
    lrs = {rank: rates_around(lr, count=count) for rank, lr in zip(RANKS, centres, strict=True)}
    setups = {f"r={rank}": plan_trial(LoRA(rank, 2 * rank), *step) for rank in ranks}
    return setups, {f"r={rank}": lrs[rank] for rank in ranks}


def imitate(rank: int, device: torch.device) -> tuple[nn.Module, Task]:
    """Return a small net, and the task of imitating it plus a hidden update of this rank."""
    return DigitsMLP(dtype=torch.float64), tasks.planted(DigitsMLP(dtype=torch.float64), rank, n_train=4096)


def read_moved_digits(count: int, device: torch.device) -> tuple[nn.Module, Task]:
    """Return a small net that reads digits, and the task of reading them moved down, from so many pictures."""
    return studies.pretrained_digits(count), tasks.digits(n_train=count)


def run_high_rank(
    data: str, planned: Planned, sweep: Sequence[Mapping[str, Any]], device: torch.device, folder: Path
) -> Iterator[Row]:
    """Yield rows of runs at rank 64 with its rate and the judging seeds, with their statistics.

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
    frame = ablate(model, task, trials, folder / "high rank", n_jobs=planned.processes(device), judge=judge)
    margin = MARGINS.get(data.partition(" ")[0], MARGIN)
    about = {"data": data, "stage": "high rank", "setup": HIGH, "margin": margin}
    losses = {"validation_loss": None, "test_loss": None}  # those of the judging trials are of more examples
    for row in last_rows(frame).to_dict("records"):
        scores = {str(name): value for name, value in row.items() if str(name).startswith(SCORE)}
        columns = {name: row[name] for name in ("rank", "lr", "seed", "outcome", "reason", "commit")}
        yield plain(about | columns | losses | scores)


RATES = record_tuned("rates", plan_rates)
RANK_ADVICE = record_tuned("rank_advice", plan_rank_advice, run_high_rank)
