"""How a record is made: what a recorder is, how a study goes on where it was stopped, and how long it takes.

A study is data: which setups train on which task, at which rates, with which seeds. There are two kinds.

    record_cases   each seed has a task, and perhaps a model, of its own (:class:`Case`)
    record_tuned   all seeds share one; losses of blocks of examples choose and judge (:class:`Planned`)

``lora-lab record NAME`` prints how many hours a study takes before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lora_lab.ablation import studies
from lora_lab.ablation.compare import Grids, Study, ablate_setups, compare_tuned, last_rows, tune_by_seed
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.stats import block_losses_of
from lora_lab.costs.cost_model import cost_model
from lora_lab.costs.fake import Factory
from lora_lab.costs.setup import Setup
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.models import shapes
from lora_lab.models.llama import Llama
from lora_lab.studies import records
from lora_lab.studies.records import KINDS
from lora_lab.system.files import read_json, write_json
from lora_lab.system.schema import plain
from lora_lab.task import Task

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]
Model = nn.Module | Factory  # or what makes it
Tell = Callable[[Row], str | None]  # a row as a line to print, or None to print nothing


@dataclass(frozen=True)
class Recorder:
    """What ``lora-lab record NAME`` runs.

    Args:
        settings: how the rows are made on a device, as the record states it.
        rows: makes the rows on a device, and yields each as soon as it is measured. Those of
            :data:`lora_lab.studies.records.OF_MODELS` also take the names of models, and measure only these.
        line: a row as a line to print, or None to print nothing.
    """

    settings: Callable[[torch.device], dict[str, Any]]
    rows: Callable[..., Iterator[Row]]
    line: Tell


def find_recorder(name: str) -> Recorder:
    """Return the recorder of a kind of record in :data:`KINDS`; no other one is imported."""
    if name not in KINDS:
        raise ValueError(f"There is no record {name!r}; there are {', '.join(KINDS)}.")
    return getattr(import_module(f"lora_lab.studies.{KINDS[name].module}"), name.upper())


def record_trials(
    name: str,
    settings: Callable[[torch.device], dict[str, Any]],
    rows: Callable[[torch.device, Path], Iterator[Row]],
    line: Tell,
    hours: Callable[[torch.device], float] | None = None,
) -> Recorder:
    """Return the recorder of a study that trains, which takes up a stopped run where it was.

    Args:
        name: of the record.
        settings: how the rows are made.
        rows: makes them on a device; finished trials are kept in the folder.
        line: as for :class:`Recorder`.
        hours: how long it takes on a device, which is stated and printed before it starts.
    """
    hours = None if hours is None else cache(hours)

    def all_settings(device: torch.device) -> dict[str, Any]:
        return settings(device) | ({} if hours is None else {"planned_hours": hours(device)})

    def all_rows(device: torch.device, folder: str | Path = Path("runs") / f"record-{name}") -> Iterator[Row]:
        if hours is not None:
            print(f"Planned: about {hours(device)} hours, more where grids of rates are widened.", flush=True)
        yield from rows(device, Path(folder))

    return Recorder(all_settings, all_rows, line)


def read_rows(frame: pandas.DataFrame, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a sweep's table with these columns, as a record can hold them."""
    yield from map(plain, frame.reindex(columns=[*columns]).to_dict("records"))


def tell_trial(row: Row, names: Sequence[str], losses: Sequence[str] = ("validation_loss", "test_loss")) -> str | None:
    """Return a trial's last row as a line for people; None for any other row.

    Args:
        row: of a trial.
        names: the columns that name the case.
        losses: the columns to show, where there is a value.
    """
    trial = "".join(f"{row[name]!s:<{20 if name == 'setup' else 10}} " for name in names)
    trial += f"lr {row['lr']:<8.4g} seed {row['seed']:g}: "
    if row["outcome"] == "failed":
        return trial + row["reason"]
    if row.get("step") != row.get("steps"):
        return None
    return trial + "  ".join(f"{name} {row[name]:.4f}" for name in losses if row.get(name) is not None)


def take_over(name: str) -> int:
    """Copy the finished trials of an incomplete record to the folder in which its recorder continues.

    A study of many hours takes several sittings. A trial that has ended is a file in ``runs/record-<name>``, which git
    ignores; those that are committed in ``records/unfinished/<name>`` need not be run again, on any machine.

    Args:
        name: of the record.

    Returns:
        How many trials were copied. Files that are there already are left as they are.
    """
    source, target = records.shipped() / "unfinished" / name, Path("runs") / f"record-{name}"
    missing = [path.relative_to(source) for path in sorted(source.rglob("*.json"))]
    missing = [path for path in missing if not (target / path).exists()]
    for path in missing:
        write_json(target / path, read_json(source / path), indent=None)
    return len(missing)


# Hours


def plan_hours(
    trials: Sequence[Trial], seq_len: int, device: torch.device, judged: int = 0, off_domain: int | None = None
) -> float:
    """Return the hours of training and evaluation on SmolLM2-135M by :mod:`lora_lab.costs.cost_model`.

    As many trials run at a time as :func:`lora_lab.ablation.studies.processes` allows, on one thread each if there are
    several; packs would take less. A forward pass is taken as half of a step with LoRA, which has no weight gradients,
    and as a third of one of full fine-tuning.

    Args:
        trials: all of one batch size.
        seq_len: tokens an example.
        device: where they train.
        judged: how many more examples each trial is evaluated on at its end.
        off_domain: the length of that part, in examples of ``seq_len`` tokens; None means as many as are evaluated.
    """
    (batch_size,) = {trial.batch_size for trial in trials}
    full, labels = "full, for evaluations", [f"{trial.method} {trial.lean} {trial.autocast}" for trial in trials]
    setups = {full: Setup(FullFineTuning())}
    for label, trial in zip(labels, trials, strict=True):
        setups[label] = Setup(trial.method, lean=cast(Lean | None, trial.lean), autocast=trial.autocast)
    at_a_time, threads = studies.processes(device), torch.get_num_threads()
    torch.set_num_threads(1 if at_a_time > 1 else threads)
    try:
        steps = cost_model(device).predict(partial(Llama, shapes.config("smollm2-135m")), setups, batch_size, seq_len)
    finally:
        torch.set_num_threads(threads)
    seconds = 0.0
    for label, trial in zip(labels, trials, strict=True):
        step_s = steps.total_s(label)
        forward_s = step_s / 2 if isinstance(trial.method, LoRA) else steps.total_s(full) / 3
        evaluations = 1 + sum(trial.evaluates(step) for step in range(1, trial.steps + 1))  # one before training
        limit = trial.eval_examples or 0
        examples = evaluations * (limit + min(limit, limit if off_domain is None else off_domain))
        examples += limit + judged  # of the test part, and of the judge
        seconds += trial.steps * step_s + examples * forward_s / batch_size
    return round(seconds / 3600 / at_a_time, 1)


# Studies whose seeds have tasks of their own


def start_from_base(seed: int, device: torch.device) -> Factory:
    """Return what makes the language model, the same for each seed."""
    return partial(studies.language_model, device)


@dataclass(frozen=True)
class Case:
    """Setups that learn the same: on some seeds each chooses its learning rate, and on others it is judged at it.

    Args:
        about: columns of all rows.
        trials: how each setup trains; rates and seeds are to be filled in.
        lrs: the rates that each setup tries first.
        choosing, judging: seeds. Where none judge, all rates are trained, and none is chosen.
        task: (seed) -> what is learned.
        starts: (seed, device) -> the model with which a setup begins; the language model, where it is not named.
        widen: how many rates may be added to a grid.
        by: the loss that chooses, as for :func:`lora_lab.ablation.compare.tune_by_seed`.
        judged: options of the trials that are judged, where they differ.
        options: more for :func:`lora_lab.ablation.ablate`.
        seq_len: tokens an example; None for a small net, whose trials take seconds.
        off_domain, judged_on: as ``off_domain`` and ``judged`` of :func:`plan_hours`.
        shared: the seeds have the same model and task, so that those that choose nothing train together.
    """

    about: Mapping[str, Any]
    trials: Mapping[str, Trial]
    lrs: Grids
    choosing: Sequence[int]
    judging: Sequence[int]
    task: Callable[[int], Task]
    starts: Mapping[str, Callable[[int, torch.device], Model]] = field(default_factory=dict)
    widen: int = 0
    by: str = "last_loss"
    judged: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seq_len: int | None = None
    off_domain: int | None = None
    judged_on: int = 0
    shared: bool = False

    def trial(self, setup: str, lr: float, seed: int) -> Trial:
        """Return one trial."""
        return replace(self.trials[setup], lr=lr, seed=seed, **(self.judged if seed in self.judging else {}))

    @property
    def planned(self) -> list[Trial]:
        """The expected trials if no grid is widened; the first rate stands in for the rate still to be chosen.

        With halving five constant rates take about as many steps as three full ones.
        """
        trials = []
        for setup, lrs in self.lrs.items():
            halved = "halving" in self.options and self.trials[setup].schedule == "constant"
            trials += [self.trial(setup, lr, seed) for lr in lrs[: 3 if halved else None] for seed in self.choosing]
            trials += [self.trial(setup, lrs[0], seed) for seed in self.judging]
        return trials

    def run(self, device: torch.device, folder: Path) -> Iterator[pandas.DataFrame]:
        """Yield the table of each seed, or of several, with ``about``, ``setup``, ``stage``, ``edge`` and ``chosen``.

        ``edge`` is where in its grid the chosen rate of a setup lies, as of
        :class:`lora_lab.ablation.compare.Choice`, and ``chosen`` whether the trial is at that rate.
        """
        train, choices = partial(self._train, device, folder), {}
        if self.judging:
            frames, choices = tune_by_seed(
                lambda *of: train([of[0]], of[1]), self.lrs, self.choosing, self.widen, self.by
            )
        else:
            frames = (train(seeds, self.lrs) for seeds in self._together(self.choosing))
        lrs = {setup: choice.lr for setup, choice in choices.items()}
        edges = {setup: choice.edge for setup, choice in choices.items()}
        at_chosen = {setup: [cast(float, lr)] for setup, lr in lrs.items()}
        judged = (train(seeds, at_chosen) for seeds in self._together(self.judging) if lrs)
        for stage, of_stage in (("choosing", frames), ("judging", judged)):
            for frame in of_stage:
                setup = frame["setup"]
                columns = {"edge": setup.map(edges), "chosen": frame["lr"] == setup.map(lrs)}
                yield frame.assign(**self.about, stage=stage, **columns)

    def _together(self, seeds: Sequence[int]) -> list[Sequence[int]]:
        return [seeds] if self.shared else [[seed] for seed in seeds]

    def _train(self, device: torch.device, folder: Path, seeds: Sequence[int], lrs: Grids) -> pandas.DataFrame:
        """Return the table of trials of equal tasks, with a column ``setup``; those with equal starts run together."""
        import pandas

        together, frames, first = {}, [], seeds[0]
        for setup in lrs:
            together.setdefault(self.starts.get(setup, start_from_base), []).append(setup)
        for start, setups in together.items():
            trials = {setup: [self.trial(setup, lr, seed) for lr in lrs[setup] for seed in seeds] for setup in setups}
            options = {"n_jobs": studies.processes(device), **self.options}
            frames.append(ablate_setups(start(first, device), partial(self.task, first), trials, folder, **options))
        return pandas.concat(frames, ignore_index=True)


def record_cases(
    name: str,
    plan: Callable[[torch.device], Sequence[Case]],
    settings: Callable[[torch.device], dict[str, Any]],
    columns: Sequence[str],
    show: Callable[[pandas.DataFrame], pandas.DataFrame],
    line: Tell,
) -> Recorder:
    """Return the recorder of a study of cases.

    Args:
        name: of the record.
        plan: what is trained on a device.
        settings: how the rows are made on a device.
        columns: of the rows.
        show: makes the rows of the record from the table of one seed (:meth:`Case.run`).
        line: as for :class:`Recorder`.
    """

    def rows(device: torch.device, folder: Path) -> Iterator[Row]:
        for case in plan(device):
            for frame in case.run(device, folder):
                yield from read_rows(show(frame), columns)

    return record_trials(name, settings, rows, line, lambda device: _case_hours(plan(device), device))


def _case_hours(cases: Sequence[Case], device: torch.device) -> float:
    """Return how long the cases of the language model take, for the small nets take minutes."""
    planned = [(case, trial) for case in cases if case.seq_len for trial in case.planned]
    case, trials = planned[0][0], [trial for _, trial in planned]
    judged = sum(case.judged_on for case, _ in planned) // len(planned)
    return plan_hours(trials, case.seq_len or 0, device, judged, case.off_domain)


# Studies whose seeds share one task

ON_TEST = {"validation": 128, "test": 140}  # of the 130 and 140 examples of 64 tokens in those parts of "docs"
_COLUMNS = (
    *("data", "stage", "setup", "method", "rank", "alpha", "lr", "edge", "seed", "steps", "outcome", "reason", "step"),
    *("validation_loss", "test_loss", "score_validation", "score_test", "trainable_parameters", "commit"),
)
Source = tuple[Model, Task | Callable[[], Task]]  # the task or what makes it


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
        small: the model is a small net, whose trials take seconds.
    """

    study: Study
    seq_len: int = 64
    source: Callable[[torch.device], Source] | None = None
    again: Sequence[Trial] = ()
    again_on: int = 0
    small: bool = False

    def model_and_task(self, data: str, device: torch.device) -> Source:
        """Return the model and the task of the study on that data."""
        return studies.study(data, self.seq_len, device) if self.source is None else self.source(device)

    def processes(self, device: torch.device) -> int:
        """Return how many trials run at a time."""
        return 1 if self.small else studies.processes(device)

    def settings(self) -> dict[str, Any]:
        """Return how the rows are made, as the record states it."""
        study = self.study
        return {
            "setups": {setup: trial.to_dict() for setup, trial in study.setups.items()},
            "lrs": {setup: list(lrs) for setup, lrs in study.lrs.items()},
            **{name: list(getattr(study, name)) for name in ("choosing", "judging")},
            **{name: getattr(study, name) for name in ("chosen_on", "block", "widen", "beyond", "answered")},
            "judged_on": dict(study.judged_on),
            "seq_len": self.seq_len,
        }

    def rows(self, data: str, device: torch.device, folder: Path) -> Iterator[Row]:
        """Yield the last row of each trial."""
        model, task = self.model_and_task(data, device)
        columns = [*_COLUMNS, *[f"{SCORE}accuracy"] * self.study.answered]
        for frame in compare_tuned(model, task, self.study, folder, n_jobs=self.processes(device)):
            for row in read_rows(last_rows(frame).assign(data=data), columns):
                for part in ("validation", "test"):
                    judged = isinstance(row[SCORE + part], str)
                    row[f"{part}_loss"] = fmean(block_losses_of(row, part)) if judged else None
                yield row

    def hours(self, device: torch.device) -> float:
        """Return how long it takes; the small nets take minutes."""
        study, trials = self.study, self.study.trials
        chosen, judged = ([each for each in trials if each.seed in seeds] for seeds in (study.choosing, study.judging))
        groups = ((chosen, study.chosen_on), (judged, sum(study.judged_on.values())), (self.again, self.again_on))
        return sum(plan_hours(each, self.seq_len, device, on) for each, on in groups if each and not self.small)


# Makes further rows of a study from its name, the study, its rows, the device and the folder of its results.
Further = Callable[[str, Planned, Sequence[Row], torch.device, Path], Iterator[Row]]
tell_tuned = partial(tell_trial, names=("data", "stage", "setup"))


def plan_trial(
    method: Method, steps: int, batch_size: int, lean: Lean | None = None, eval_every: int | None = None, **options: Any
) -> Trial:
    """Return a setup's trial, whose rate and seed are to be filled in; ``options`` are further ones of a Trial.

    It is evaluated on few examples, and on fewer still where its curve is not looked at, because the losses that decide
    are those of :class:`lora_lab.ablation.stats.BlockLosses`.
    """
    every, examples = (steps, 4) if eval_every is None else (eval_every, 16)
    options |= {"steps": steps, "batch_size": batch_size, "eval_every": every, "eval_examples": examples, "lean": lean}
    return Trial(method, 1e-3, **options)


def record_tuned(
    name: str,
    plan: Callable[[torch.device], Mapping[str, Planned]],
    further: Further | None = None,
    after: Callable[[torch.device], Iterator[Row]] | None = None,
    line: Tell = tell_tuned,
    **about: Any,
) -> Recorder:
    """Return the recorder of studies that compare setups, each at its own best rate.

    Args:
        name: of the record.
        plan: what is compared on a device, by the name of the data, such as "docs".
        further: makes more rows of each study, when its trials have ended.
        after: makes more rows when all studies have ended.
        line: as for :class:`Recorder`.
        **about: more settings.
    """

    def rows(device: torch.device, folder: Path) -> Iterator[Row]:
        for data, planned in plan(device).items():
            trials = []
            for row in planned.rows(data, device, folder / data):
                trials.append(row)
                yield row
            if further is not None:
                yield from further(data, planned, trials, device, folder / data)
        if after is not None:
            yield from after(device)

    def settings(device: torch.device) -> dict[str, Any]:
        return {data: planned.settings() for data, planned in plan(device).items()} | about

    def hours(device: torch.device) -> float:
        return round(sum(planned.hours(device) for planned in plan(device).values()), 1)

    return record_trials(name, settings, rows, line, hours)
