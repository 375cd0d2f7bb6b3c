"""How a record is made: what a recorder is, and how a study goes on where it was stopped.

A study is data: which setups train on which task, at which rates, with which seeds. Its sweeps are of two kinds.

    BlockSweep   all seeds share one task; losses of blocks of examples choose and judge
    CurveSweep   each seed has a task, and perhaps a model, of its own; losses of the training's curve choose
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lora_lab.ablation import studies
from lora_lab.ablation.compare import Grids, ablate_setups, compare_tuned, last_rows, tune_by_seed
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.run import ablate
from lora_lab.ablation.stats import block_losses_of
from lora_lab.costs.fake import Factory
from lora_lab.lean import Lean
from lora_lab.methods import Method
from lora_lab.studies.records import KINDS
from lora_lab.system.schema import plain
from lora_lab.task import Task

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]
Model = nn.Module | Factory  # or what makes it
Source = tuple[Model, Task | Callable[[], Task]]  # the task or what makes it
# How it trains, whatever its seed; and the rates that it tries first.
TrialAndRates = tuple[Trial, Sequence[float]]
# Of the 130 and 140 examples of 64 tokens in those parts of "docs".
ON_TEST = {"validation": 128, "test": 140}
_BLOCK_COLUMNS = (
    *("data", "stage", "setup", "method", "rank", "alpha", "lr", "edge", "seed", "steps", "outcome", "reason", "step"),
    *("validation_loss", "test_loss", "score_validation", "score_test", "trainable_parameters", "commit"),
)
_LONGEST = 30  # characters of a text that is told


def tell_row(row: Row) -> str | None:
    """Return a row as a line for people; None if it has no decimals, or more will be in a later row of its trial."""
    if row.get("outcome") == "failed":
        return f"{row['setup']}, lr {row['lr']:g}, seed {row['seed']}: {row['reason']}"
    if row.get("step") != row.get("steps") or not any(isinstance(value, float) for value in row.values()):
        return None
    texts = [value for value in row.values() if isinstance(value, str) and 0 < len(value) <= _LONGEST]
    numbers = [f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, int | float)]
    return "  ".join(texts + numbers)


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
    line: Callable[[Row], str | None] = tell_row


def find_recorder(name: str) -> Recorder:
    """Return the recorder of a kind of record in :data:`KINDS`; no other one is imported."""
    if name not in KINDS:
        raise ValueError(f"There is no record {name!r}; there are {', '.join(KINDS)}.")
    module, _, recorder = KINDS[name].recorder.partition(".")
    return getattr(import_module(f"lora_lab.studies.{module}"), recorder)


def find_folder(name: str) -> Path:
    """Return the folder in which the trials of a record are kept, from which a stopped run goes on."""
    return Path("runs") / f"record-{name}"


# Sweeps


@dataclass(frozen=True)
class Sweep:
    """Setups that learn the same: on some seeds each chooses its learning rate, and on others it is judged at it.

    Args:
        setups: how each trains, and the rates that it tries first.
        choosing, judging: seeds. Where none judge, all rates are trained.
        widen: how many rates may be added to a grid.
    """

    setups: Mapping[str, TrialAndRates]
    choosing: Sequence[int]
    judging: Sequence[int] = ()
    _: KW_ONLY
    widen: int = 4

    @property
    def lrs(self) -> Grids:
        """The rates that each setup tries first."""
        return {setup: lrs for setup, (_, lrs) in self.setups.items()}

    def settings(self) -> dict[str, Any]:
        """Return how the rows are made, as the record states it."""
        return {
            "setups": {setup: trial.to_dict() for setup, (trial, _) in self.setups.items()},
            "lrs": {setup: list(lrs) for setup, lrs in self.lrs.items()},
            **{"choosing": list(self.choosing), "judging": list(self.judging), "widen": self.widen},
        }


@dataclass(frozen=True)
class Rerun:
    """One setup's judging trials at the rate that was chosen, trained once more with another judge.

    Args:
        setup: of the sweep.
        judge: as for :func:`lora_lab.ablation.ablate`.
        folder: of the results.
        rows: makes rows of the record from the last row of a trial, and that of the judged trial.
    """

    setup: str
    judge: Callable[[nn.Module, Task], Mapping[str, Any]]
    folder: str
    rows: Callable[[Row, Row], Iterator[Row]]


@dataclass(frozen=True, kw_only=True)
class BlockSweep(Sweep):
    """All seeds share one task, and losses of blocks of its examples choose and judge.

    Args:
        data: its name, such as "docs"; the first column of all rows.
        source: makes the model and the task on a device; None makes those of the study of that name
            (:func:`lora_lab.ablation.studies.study`).
        rerun: makes further rows.
        chosen_on, judged_on, block, beyond, answered: as for :func:`lora_lab.ablation.compare.compare_tuned`.
        seq_len: tokens an example; None for a small net, whose trials take seconds.
    """

    data: str
    source: Callable[[torch.device], Source] | None = None
    rerun: Rerun | None = None
    chosen_on: int
    judged_on: Mapping[str, int] = field(default_factory=lambda: ON_TEST)
    block: int = 4
    beyond: int = 1
    answered: bool = False
    seq_len: int | None = 64

    def settings(self) -> dict[str, Any]:
        """Return how the rows are made, as the record states it."""
        names = ("chosen_on", "judged_on", "block", "beyond", "answered", "seq_len")
        return super().settings() | {name: getattr(self, name) for name in names}

    def rows(self, device: torch.device, folder: Path) -> Iterator[Row]:
        """Yield the last row of each trial, and what is made of those that are trained again."""
        trials = {setup: trial for setup, (trial, _) in self.setups.items()}
        names = ("choosing", "judging", "chosen_on", "judged_on", "block", "widen", "beyond", "answered")
        study = {name: getattr(self, name) for name in names}
        model, task = (self.source or partial(studies.study, self.data, self.seq_len or 64))(device)
        options: dict[str, Any] = {"n_jobs": studies.processes(device) if self.seq_len else 1}
        folder = folder / self.data
        columns, judged = [*_BLOCK_COLUMNS, *[f"{SCORE}accuracy"] * self.answered], {}
        for frame in compare_tuned(model, task, trials, self.lrs, folder, **study, **options):
            for row in read_rows(last_rows(frame).assign(data=self.data), columns):
                row |= {f"{part}_loss": read_loss(row, part) for part in ("validation", "test")}
                yield row
                if row["stage"] == "judging":
                    judged[row["setup"]] = row
        if self.rerun and (row := judged.get(self.rerun.setup)):
            reruns = [replace(trials[row["setup"]], lr=row["lr"], seed=seed) for seed in self.judging]
            frame = ablate(model, task, reruns, folder / self.rerun.folder, judge=self.rerun.judge, **options)
            for trial in last_rows(frame).to_dict("records"):
                yield from map(plain, self.rerun.rows(cast(Row, trial), row))


def read_rows(frame: pandas.DataFrame, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a sweep's table with these columns, as a record can hold them."""
    yield from map(plain, frame.reindex(columns=[*columns]).to_dict("records"))


def read_loss(row: Row, part: str) -> float | None:
    """Return the mean of the losses of blocks of a part; None if no judge measured them."""
    return fmean(block_losses_of(row, part)) if isinstance(row.get(SCORE + part), str) else None


@dataclass(frozen=True, kw_only=True)
class CurveSweep(Sweep):
    """Each seed has a task of its own, and a loss of the training's curve chooses.

    Args:
        about: columns of all rows.
        task: (seed) -> what is learned; of ``shared`` seeds without an argument.
        starts: (seed) -> the model with which a setup begins; the language model, where it is not named.
        best: which loss chooses, as for :func:`lora_lab.ablation.compare.choose_rates`.
        judged: options of the trials that are judged, where they differ.
        options: more for :func:`lora_lab.ablation.ablate`.
        columns: of the rows.
        show: makes the rows from the table of one seed (:meth:`frames`).
        shared: the seeds have the same model and task, so that those that choose nothing train together.
    """

    about: Mapping[str, Any] = field(default_factory=dict)
    task: Callable[..., Task]
    starts: Mapping[str, Callable[[int], Model]] = field(default_factory=dict)
    best: bool = False
    judged: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: Sequence[str] = ()
    show: Callable[[pandas.DataFrame], pandas.DataFrame] = last_rows
    shared: bool = False

    def settings(self) -> dict[str, Any]:
        """Return how the rows are made, as the record states it."""
        return {"about": dict(self.about), **super().settings(), "judged": dict(self.judged)}

    def trial(self, setup: str, lr: float, seed: int) -> Trial:
        """Return one trial."""
        return replace(self.setups[setup][0], lr=lr, seed=seed, **(self.judged if seed in self.judging else {}))

    def rows(self, device: torch.device, folder: Path) -> Iterator[Row]:
        """Yield the rows of the record."""
        for frame in self.frames(device, folder):
            yield from read_rows(self.show(frame), self.columns)

    def frames(self, device: torch.device, folder: Path) -> Iterator[pandas.DataFrame]:
        """Yield the table of each seed, or of several, with ``about``, ``setup``, ``stage``, ``edge`` and ``chosen``.

        ``edge`` is where in its grid the chosen rate of a setup lies, as of
        :class:`lora_lab.ablation.compare.Choice`, and ``chosen`` whether the trial is at that rate.
        """
        train, choices = partial(self._train, device, folder), {}
        if self.judging:
            choosing, choices = tune_by_seed(
                lambda seed, lrs: train([seed], lrs), self.lrs, self.choosing, self.widen, self.best
            )
        else:
            choosing = (train(seeds, self.lrs) for seeds in self._together(self.choosing))
        lrs = {setup: cast(float, choice.lr) for setup, choice in choices.items()}
        edges = {setup: choice.edge for setup, choice in choices.items()}
        at_chosen = {setup: [lr] for setup, lr in lrs.items()}
        judging = (train(seeds, at_chosen) for seeds in self._together(self.judging) if lrs)
        for stage, frames in (("choosing", choosing), ("judging", judging)):
            for frame in frames:
                setup = frame["setup"]
                columns = {"edge": setup.map(edges), "chosen": frame["lr"] == setup.map(lrs)}
                yield frame.assign(**self.about, stage=stage, **columns)

    def _together(self, seeds: Sequence[int]) -> list[Sequence[int]]:
        return [seeds] if self.shared else [[seed] for seed in seeds]

    def _train(self, device: torch.device, folder: Path, seeds: Sequence[int], lrs: Grids) -> pandas.DataFrame:
        """Return the table of trials of equal tasks, with a column ``setup``; those with equal starts run together."""
        import pandas

        starts, frames = {setup: self.starts.get(setup) for setup in lrs}, []
        for start in dict.fromkeys(starts.values()):
            trials = {
                setup: [self.trial(setup, lr, seed) for lr in rates for seed in seeds]
                for setup, rates in lrs.items()
                if starts[setup] is start
            }
            options = {"n_jobs": studies.processes(device), **self.options}
            model = start(seeds[0]) if start else partial(studies.language_model, device)
            task = self.task if self.shared else partial(self.task, seeds[0])
            frames.append(ablate_setups(model, task, trials, folder, **options))
        return pandas.concat(frames, ignore_index=True)


def plan_setup(
    method: Method,
    lrs: Sequence[float],
    steps: int,
    batch_size: int,
    lean: Lean | None = None,
    eval_every: int | None = None,
    **options: Any,
) -> TrialAndRates:
    """Return how a method trains, and the rates that it tries first; ``options`` are further ones of a Trial.

    It is evaluated on few examples, and on fewer still where its curve is not looked at, because the losses that decide
    are those of :class:`lora_lab.ablation.stats.BlockLosses`.
    """
    every, examples = (steps, 4) if eval_every is None else (eval_every, 16)
    options |= {"steps": steps, "batch_size": batch_size, "eval_every": every, "eval_examples": examples, "lean": lean}
    return Trial(method, lrs[0], **options), lrs


def plan_size(device: torch.device) -> tuple[int, int]:
    """Return the steps on Python's manual and the examples in each that two cores, or a GPU, can do in little time."""
    return (300, 8) if device.type == "cuda" else (60, 4)


def plan_judges(device: torch.device, first: int = 2) -> range:
    """Return the seeds that judge, after those that choose."""
    return range(first, first + (5 if device.type == "cuda" else 3))


def record_sweeps(
    name: str,
    plan: Callable[[torch.device], Iterable[BlockSweep | CurveSweep]],
    stated: Mapping[str, Any] | None = None,
    after: Callable[[torch.device], Iterator[Row]] | None = None,
) -> Recorder:
    """Return the recorder of a study, which takes up a stopped run where it was.

    Args:
        name: of the record.
        plan: what is trained on a device.
        stated: what the record's settings say besides what its sweeps do.
        after: makes more rows when all sweeps have ended.
    """

    def settings(device: torch.device) -> dict[str, Any]:
        sweeps = [*plan(device)]
        blocks = {sweep.data: sweep.settings() for sweep in sweeps if isinstance(sweep, BlockSweep)}
        return (blocks or {"cases": [sweep.settings() for sweep in sweeps]}) | dict(stated or {})

    def rows(device: torch.device, folder: Path | None = None) -> Iterator[Row]:
        for sweep in plan(device):
            yield from sweep.rows(device, folder or find_folder(name))
        yield from after(device) if after else ()

    return Recorder(settings, rows)
