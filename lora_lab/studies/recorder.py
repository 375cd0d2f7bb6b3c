"""How a record is made: what a recorder is, how a study goes on where it was stopped, and how long it takes.

A study is data: which setups train on which task, at which rates, with which seeds. Its sweeps are of two kinds.

    BlockSweep   all seeds share one task; losses of blocks of examples choose and judge
    CurveSweep   each seed has a task, and perhaps a model, of its own; losses of the training's curve choose

``lora-lab record NAME`` prints how many hours a study of the language model takes before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
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
from lora_lab.ablation.run import ablate
from lora_lab.ablation.stats import block_losses_of
from lora_lab.costs.fake import Factory
from lora_lab.costs.setup import Setup
from lora_lab.costs.timing import cost_model
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
Source = tuple[Model, Task | Callable[[], Task]]  # the task or what makes it
ON_TEST = {"validation": 128, "test": 140}  # of the 130 and 140 examples of 64 tokens in those parts of "docs"
_BLOCK_COLUMNS = (
    *("data", "stage", "setup", "method", "rank", "alpha", "lr", "edge", "seed", "steps", "outcome", "reason", "step"),
    *("validation_loss", "test_loss", "score_validation", "score_test", "trainable_parameters", "commit"),
)
# The columns that are told: what a row is of, and what was found.
_LABELS = (
    *("data", "model", "batch", "length", "task", "stage", "about", "run", "n_train", "setup", "rank"),
    *("k", "calibration", "control"),
)
_FOUND = (
    *("validation_loss", "off_domain_loss", "test_loss", "plain_loss", "base_error", "merged_error", "cosine"),
    *("score_accuracy", "accuracy", "exact", "chrf", "rouge_l", "in_style", "lower", "upper"),
    *("seconds", "ratio", "predicted_ratio"),
)


def tell_row(row: Row) -> str | None:
    """Return a row as a line for people; None if nothing was found, or more will be in a later row of the trial."""
    labels = {name: row[name] for name in _LABELS if row.get(name)}
    about = [value if isinstance(value, str) else f"{name} {value:g}" for name, value in labels.items()]
    about += [f"{name} {row[name]:g}" for name in ("lr", "seed") if row.get(name) is not None]
    found = [f"{name} {row[name]:.4f}" for name in _FOUND if isinstance(row.get(name), float)]
    if row.get("outcome") == "failed":
        found = [row["reason"]]
    elif row.get("step") != row.get("steps"):
        return None
    return f"{'  '.join(about)}: {'  '.join(found)}" if found else None


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
    return getattr(import_module(f"lora_lab.studies.{KINDS[name].module}"), name.upper())


def take_over(name: str) -> int:
    """Copy the finished trials of an incomplete record to the folder in which its recorder continues.

    A study of many hours takes several sittings. A trial that has ended is a file in ``runs/record-<name>``, which git
    ignores; those that are committed in ``records/unfinished/<name>`` need not be run again, on any machine.

    Args:
        name: of the record.

    Returns:
        How many trials were copied. Files that are there already are left as they are.
    """
    source, target = records.shipped() / "unfinished" / name, find_folder(name)
    missing = [path.relative_to(source) for path in sorted(source.rglob("*.json"))]
    missing = [path for path in missing if not (target / path).exists()]
    for path in missing:
        write_json(target / path, read_json(source / path), indent=None)
    return len(missing)


def find_folder(name: str) -> Path:
    """Return the folder in which the trials of a record are kept, from which a stopped run goes on."""
    return Path("runs") / f"record-{name}"


# Sweeps


@dataclass(frozen=True)
class Sweep:
    """Setups that learn the same: on some seeds each chooses its learning rate, and on others it is judged at it.

    Args:
        setups: how each trains, where rate and seed are to be filled in; and the rates that it tries first.
        choosing, judging: seeds. Where none judge, all rates are trained.
        widen: how many rates may be added to a grid.
        chosen_on, judged_on: on how many more examples a judge evaluates the trials that choose and those that are
            judged; the latter for each part.
        judged: options of the trials that are judged, where they differ.
        options: more for :func:`lora_lab.ablation.ablate`.
        seq_len: tokens an example; None for a small net, whose trials take seconds.
        off_domain: the length of that part, in examples of ``seq_len`` tokens; None means as many as are evaluated.
    """

    setups: Mapping[str, tuple[Trial, Sequence[float]]]
    choosing: Sequence[int]
    judging: Sequence[int] = ()
    _: KW_ONLY
    widen: int = 4
    chosen_on: int = 0
    judged_on: Mapping[str, int] = field(default_factory=dict)
    judged: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seq_len: int | None = None
    off_domain: int | None = None

    @property
    def lrs(self) -> Grids:
        """The rates that each setup tries first."""
        return {setup: lrs for setup, (_, lrs) in self.setups.items()}

    def trial(self, setup: str, lr: float, seed: int) -> Trial:
        """Return one trial."""
        return replace(self.setups[setup][0], lr=lr, seed=seed, **(self.judged if seed in self.judging else {}))

    def trials(self) -> Iterator[tuple[Trial, int]]:
        """Yield the trials if no grid is widened, and on how many examples the judge of each evaluates it.

        The first rate stands in for the one to be chosen. A single rate is judged as it is. With halving five constant
        rates take about as many steps as three full ones.
        """
        for setup, (trial, lrs) in self.setups.items():
            if len(lrs) > 1 or not self.judging:
                halved = "halving" in self.options and trial.schedule == "constant"
                for lr in lrs[: 3 if halved else None]:
                    yield from ((self.trial(setup, lr, seed), self.chosen_on) for seed in self.choosing)
            yield from ((self.trial(setup, lrs[0], seed), sum(self.judged_on.values())) for seed in self.judging)

    def settings(self) -> dict[str, Any]:
        """Return how the rows are made, as the record states it."""
        return {
            "setups": {setup: trial.to_dict() for setup, (trial, _) in self.setups.items()},
            "lrs": {setup: list(lrs) for setup, lrs in self.lrs.items()},
            **{"choosing": list(self.choosing), "judging": list(self.judging), "widen": self.widen},
        }


def plan_hours(sweep: Sweep, device: torch.device) -> float:
    """Return the hours of a sweep of SmolLM2-135M by :mod:`lora_lab.costs.timing`; 0 for small nets.

    As many trials run at a time as :func:`lora_lab.ablation.studies.processes` allows, on one thread each if there are
    several; packs would take less. A forward pass is taken as half of a step with LoRA, which has no weight gradients,
    and as a third of one of full fine-tuning.
    """
    if sweep.seq_len is None:
        return 0.0
    trials = [(f"{trial.method} {trial.lean} {trial.autocast}", trial, judged) for trial, judged in sweep.trials()]
    setups = {"full": Setup(FullFineTuning())}
    for label, trial, _ in trials:
        setups[label] = Setup(trial.method, lean=cast(Lean | None, trial.lean), autocast=trial.autocast)
    (batch_size,) = {trial.batch_size for _, trial, _ in trials}
    at_a_time, threads = studies.processes(device), torch.get_num_threads()
    model = partial(Llama, shapes.config("smollm2-135m"))
    torch.set_num_threads(1 if at_a_time > 1 else threads)
    try:
        steps = cost_model(device).predict(model, setups, batch_size, sweep.seq_len)
    finally:
        torch.set_num_threads(threads)
    seconds = 0.0
    for label, trial, judged in trials:
        step_s = steps.total_s(label)
        forward_s = step_s / 2 if isinstance(trial.method, LoRA) else steps.total_s("full") / 3
        evaluations = 1 + sum(trial.evaluates(step) for step in range(1, trial.steps + 1))  # one before training
        limit = trial.eval_examples or 0
        examples = evaluations * (limit + min(limit, limit if sweep.off_domain is None else sweep.off_domain))
        examples += limit + judged  # of the test part, and of the judge
        seconds += trial.steps * step_s + examples * forward_s / batch_size
    return seconds / 3600 / at_a_time


@dataclass(frozen=True)
class Again:
    """One setup's judging trials at the rate that was chosen, trained once more with another judge.

    Args:
        setup: of the sweep.
        judge: as for :func:`lora_lab.ablation.ablate`.
        examples: how many the judge evaluates.
        folder: of the results.
        rows: makes rows of the record from the last row of a trial, and that of the judged trial.
    """

    setup: str
    judge: Callable[[nn.Module, Task], Mapping[str, Any]]
    examples: int
    folder: str
    rows: Callable[[Row, Row], Iterator[Row]]


@dataclass(frozen=True, kw_only=True)
class BlockSweep(Sweep):
    """All seeds share one task, and losses of blocks of its examples choose and judge.

    Args:
        data: its name, such as "docs"; the first column of all rows.
        source: makes the model and the task on a device; None makes those of the study of that name
            (:func:`lora_lab.ablation.studies.study`).
        again: makes further rows.
        block, beyond, answered: as for :class:`lora_lab.ablation.compare.Study`.
    """

    data: str
    source: Callable[[torch.device], Source] | None = None
    again: Again | None = None
    judged_on: Mapping[str, int] = field(default_factory=lambda: ON_TEST)
    block: int = 4
    beyond: int = 1
    answered: bool = False
    seq_len: int | None = 64

    def trials(self) -> Iterator[tuple[Trial, int]]:
        """Yield those that run again, too."""
        yield from super().trials()
        if self.again:
            yield from ((self.trial(self.again.setup, 1e-3, seed), self.again.examples) for seed in self.judging)

    def settings(self) -> dict[str, Any]:
        """Return how the rows are made, as the record states it."""
        names = ("chosen_on", "judged_on", "block", "beyond", "answered", "seq_len")
        return super().settings() | {name: getattr(self, name) for name in names}

    def rows(self, device: torch.device, folder: Path) -> Iterator[Row]:
        """Yield the last row of each trial, and what is made of those that are trained again."""
        trials = {setup: trial for setup, (trial, _) in self.setups.items()}
        study = Study(
            trials,
            self.lrs,
            choosing=self.choosing,
            judging=self.judging,
            chosen_on=self.chosen_on,
            judged_on=self.judged_on,
            block=self.block,
            widen=self.widen,
            beyond=self.beyond,
            answered=self.answered,
        )
        model, task = (self.source or partial(studies.study, self.data, self.seq_len or 64))(device)
        options: dict[str, Any] = {"n_jobs": studies.processes(device) if self.seq_len else 1}
        folder = folder / self.data
        columns, judged = [*_BLOCK_COLUMNS, *[f"{SCORE}accuracy"] * self.answered], {}
        for frame in compare_tuned(model, task, study, folder, **options):
            for row in read_rows(last_rows(frame).assign(data=self.data), columns):
                row |= {f"{part}_loss": read_loss(row, part) for part in ("validation", "test")}
                yield row
                if row["stage"] == "judging":
                    judged[row["setup"]] = row
        if self.again and self.again.setup in judged:
            row = judged[self.again.setup]
            trials = [self.trial(row["setup"], row["lr"], seed) for seed in self.judging]
            frame = ablate(model, task, trials, folder / self.again.folder, judge=self.again.judge, **options)
            for trial in last_rows(frame).to_dict("records"):
                yield from map(plain, self.again.rows(cast(Row, trial), row))


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
        task: (seed) -> what is learned.
        starts: (seed, device) -> the model with which a setup begins; the language model, where it is not named.
        by: the loss that chooses, as for :func:`lora_lab.ablation.compare.tune_by_seed`.
        columns: of the rows.
        show: makes the rows from the table of one seed (:meth:`frames`).
        shared: the seeds have the same model and task, so that those that choose nothing train together.
    """

    about: Mapping[str, Any] = field(default_factory=dict)
    task: Callable[[int], Task]
    starts: Mapping[str, Callable[[int, torch.device], Model]] = field(default_factory=dict)
    by: str = "last_loss"
    columns: Sequence[str] = ()
    show: Callable[[pandas.DataFrame], pandas.DataFrame] = last_rows
    shared: bool = False

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
                lambda seed, lrs: train([seed], lrs), self.lrs, self.choosing, self.widen, self.by
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

        starts, frames = {setup: self.starts.get(setup, start_from_base) for setup in lrs}, []
        for start in dict.fromkeys(starts.values()):
            trials = {
                setup: [self.trial(setup, lr, seed) for lr in rates for seed in seeds]
                for setup, rates in lrs.items()
                if starts[setup] is start
            }
            options = {"n_jobs": studies.processes(device), **self.options}
            task = partial(self.task, seeds[0])
            frames.append(ablate_setups(start(seeds[0], device), task, trials, folder, **options))
        return pandas.concat(frames, ignore_index=True)


def start_from_base(seed: int, device: torch.device) -> Factory:
    """Return what makes the language model, the same for each seed."""
    return partial(studies.language_model, device)


def start_from_random(seed: int, device: torch.device) -> Factory:
    """Return what makes a model of the language model's shape with random weights, drawn by the seed."""
    return partial(studies.random_init, device, seed)


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


def plan_size(device: torch.device) -> tuple[int, int]:
    """Return the steps on Python's manual and the examples in each that two cores, or a GPU, can do in little time."""
    return (300, 8) if device.type == "cuda" else (60, 4)


def plan_judges(device: torch.device, first: int = 2) -> range:
    """Return the seeds that judge, after those that choose."""
    return range(first, first + (5 if device.type == "cuda" else 3))


def record_sweeps(
    name: str,
    plan: Callable[[torch.device], Iterable[BlockSweep | CurveSweep]],
    describe: Callable[[torch.device], dict[str, Any]] | None = None,
    after: Callable[[torch.device], Iterator[Row]] | None = None,
) -> Recorder:
    """Return the recorder of a study, which takes up a stopped run where it was.

    Args:
        name: of the record.
        plan: what is trained on a device.
        describe: says how the rows are made; None if the sweeps, all of blocks, state it.
        after: makes more rows when all sweeps have ended.
    """

    @cache
    def hours(device: torch.device) -> float:
        return round(sum(plan_hours(sweep, device) for sweep in plan(device)), 1)

    def settings(device: torch.device) -> dict[str, Any]:
        stated = describe(device) if describe else describe_blocks(plan(device))
        return stated | {"planned_hours": hours(device)}

    def rows(device: torch.device, folder: Path | None = None) -> Iterator[Row]:
        if hours(device):
            print(f"Planned: about {hours(device)} hours, more where grids of rates are widened.", flush=True)
        for sweep in plan(device):
            yield from sweep.rows(device, folder or find_folder(name))
        yield from after(device) if after else ()

    return Recorder(settings, rows)


def describe_blocks(sweeps: Iterable[Any]) -> dict[str, Any]:
    """Return how the rows of sweeps of blocks are made, by their data."""
    return {sweep.data: sweep.settings() for sweep in sweeps}
