"""Recorders of studies that compare setups, each at its own best learning rate (:mod:`lora_lab.ablation.compare`).

``lora-lab record NAME`` prints how many hours a study takes before it starts, and goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from lora_lab.ablation import studies
from lora_lab.ablation.compare import Study, compare_tuned, last_rows
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.stats import block_losses_of
from lora_lab.costs.fake import Factory
from lora_lab.lean import Lean
from lora_lab.methods import Method
from lora_lab.studies.planning import planned_hours
from lora_lab.studies.recorder import Recorder, Row, read_rows, record_trials, tell_trial
from lora_lab.task import Task

ON_TEST = {"validation": 128, "test": 140}  # of the 130 and 140 examples of 64 tokens in those parts of "docs"
_COLUMNS = (
    *("data", "stage", "setup", "method", "rank", "alpha", "lr", "edge", "seed", "steps", "outcome", "reason", "step"),
    *("validation_loss", "test_loss", "score_validation", "score_test", "trainable_parameters", "commit"),
)


Source = tuple[nn.Module | Factory, Task | Callable[[], Task]]  # the model or what makes it, and the task or what does


@dataclass(frozen=True)
class Planned:
    """A study, and what it needs to know of the data.

    Args:
        study: what is compared.
        seq_len: tokens an example, of a language model.
        source: makes the model and the task on a device; None makes those of the study of that name
            (:func:`lora_lab.ablation.studies.study`).
        again: trials that will be run once more to make further rows; used to estimate the planned hours.
        again_on: how many examples each of those is evaluated on.
    """

    study: Study
    seq_len: int = 64
    source: Callable[[torch.device], Source] | None = None
    again: Sequence[Trial] = ()
    again_on: int = 0

    def model_and_task(self, data: str, device: torch.device) -> Source:
        """The model and the task of the study.

        Args:
            data: its name.
            device: where a language model is put.
        """
        return studies.study(data, self.seq_len, device) if self.source is None else self.source(device)


def processes(data: str, device: torch.device) -> int:
    """How many trials of that data run at a time."""
    return 1 if is_of_small_net(data) else studies.processes(device)


def is_of_small_net(data: str) -> bool:
    """Whether the data is for a small net, whose trials take seconds, by its name, such as "digits"."""
    return data.partition(" ")[0] in ("digits", "planted")


line = partial(tell_trial, names=("data", "stage", "setup"))
Plan = Callable[[torch.device], Mapping[str, Planned]]  # the studies of a record, by name
# Makes further rows of a study from its name, the study, its rows, the device and the folder of its results.
Further = Callable[[str, Planned, Sequence[Row], torch.device, Path], Iterator[Row]]


def template(
    method: Method, steps: int, batch_size: int, lean: Lean | None = None, eval_every: int | None = None, **options: Any
) -> Trial:
    """A setup's trial, whose rate and seed are to be filled in; ``options`` are further ones of a Trial.

    It is evaluated on few examples, and on fewer still where its curve is not looked at, because the losses that decide
    are those of :class:`lora_lab.ablation.stats.BlockLosses`.
    """
    every, examples = (steps, 4) if eval_every is None else (eval_every, 16)
    options |= {"steps": steps, "batch_size": batch_size, "eval_every": every, "eval_examples": examples, "lean": lean}
    return Trial(method, 1e-3, **options)


def recorder(
    name: str,
    plan: Plan,
    further: Further | None = None,
    after: Callable[[torch.device], Iterator[Row]] | None = None,
    line: Callable[[Row], str | None] = line,
    **about: Any,
) -> Recorder:
    """Return what ``lora-lab record <name>`` runs.

    Args:
        name: of the record.
        plan: what is compared on a device, by the name of the data, such as "docs".
        further: makes more rows of each study, when its trials have ended.
        after: makes more rows when all studies have ended.
        line: as for :class:`lora_lab.studies.recorder.Recorder`.
        **about: more settings.
    """

    def rows(device: torch.device, folder: Path) -> Iterator[Row]:
        for data, planned in plan(device).items():
            trials = []
            for row in _run_trials(data, planned, device, folder / data):
                trials.append(row)
                yield row
            if further is not None:
                yield from further(data, planned, trials, device, folder / data)
        if after is not None:
            yield from after(device)

    def settings(device: torch.device) -> dict[str, Any]:
        return {data: _describe(planned) for data, planned in plan(device).items()} | about

    return record_trials(name, settings, rows, line, lambda device: _count_hours(plan(device), device))


def _run_trials(data: str, planned: Planned, device: torch.device, folder: Path) -> Iterator[Row]:
    """Yield the last row of each trial."""
    model, task = planned.model_and_task(data, device)
    columns = [*_COLUMNS, *[f"{SCORE}accuracy"] * planned.study.answered]
    for frame in compare_tuned(model, task, planned.study, folder, n_jobs=processes(data, device)):
        for row in read_rows(last_rows(frame).assign(data=data), columns):
            for part in ("validation", "test"):
                judged = isinstance(row[SCORE + part], str)
                row[f"{part}_loss"] = fmean(block_losses_of(row, part)) if judged else None
            yield row


def _describe(planned: Planned) -> dict[str, Any]:
    study = planned.study
    return {
        "setups": {setup: trial.to_dict() for setup, trial in study.setups.items()},
        "lrs": {setup: list(lrs) for setup, lrs in study.lrs.items()},
        **{name: list(getattr(study, name)) for name in ("choosing", "judging")},
        **{name: getattr(study, name) for name in ("chosen_on", "block", "widen", "beyond", "answered")},
        "judged_on": dict(study.judged_on),
        "seq_len": planned.seq_len,
    }


def _count_hours(plan: Mapping[str, Planned], device: torch.device) -> float:
    """Of the language model's part, for the small nets take minutes."""
    hours = 0.0
    for planned in (planned for data, planned in plan.items() if not is_of_small_net(data)):
        study = planned.study
        chosen = [trial for trial in study.trials if trial.seed in study.choosing]
        judged = [trial for trial in study.trials if trial.seed in study.judging]
        groups = ((chosen, study.chosen_on), (judged, sum(study.judged_on.values())), (planned.again, planned.again_on))
        hours += sum(planned_hours(trials, planned.seq_len, device, on) for trials, on in groups if trials)
    return round(hours, 1)
