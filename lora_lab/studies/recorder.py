"""How a record is made: what a recorder is, and how a study goes on where it was stopped.

A study is data: which setups train on which task, at which rates, with which seeds. Its sweeps are of two kinds.

    BlockSweep   all seeds share one task; losses of blocks of examples choose and judge
    CurveSweep   each seed has a task, and perhaps a model, of its own; losses of the training's curve choose
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lora_lab.ablation import materials
from lora_lab.ablation.compare import Grids, ablate_setups, compare_tuned, last_rows, rates_around, tune_by_seed
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.run import ablate
from lora_lab.ablation.stats import block_losses_of
from lora_lab.costs.fake import Factory
from lora_lab.lean import Lean
from lora_lab.methods import LoRA, Method
from lora_lab.studies.records import KINDS, destination, load_all
from lora_lab.system.provenance import device_name, slug
from lora_lab.system.schema import plain
from lora_lab.task import Task
from lora_lab.train import evaluate
from lora_lab.variants import DoRA, PiSSA

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]
Model = nn.Module | Factory  # or what makes it
Source = tuple[Model, Task | Callable[[], Task]]  # the task or what makes it
# A judge, as for ablate; and what makes rows of the record from the last row of a trial that it judged.
Rerun = tuple[Callable[[nn.Module, Task], Mapping[str, Any]], Callable[[Row], Iterator[Row]]]
# Setup -> a method, and its rates or the one in their middle.
Methods = Mapping[str, tuple[Method, float | Sequence[float]]]
# Setup -> how it trains, whatever its seed, and the rates that it tries first.
Setups = dict[str, tuple[Trial, Sequence[float]]]
# Of the 130 and 140 examples of 64 tokens in those parts of "docs".
ON_TEST = {"validation": 128, "test": 140}
# What a record holds of the table of trials, as far as it is there.
_COLUMNS = (
    *("stage", "setup", "method", "rank", "alpha", "lr", "edge", "seed", "steps", "outcome", "reason", "step"),
    *("schedule", "weight_decay", "validation_loss", "test_loss", "score_accuracy", "trainable_parameters", "commit"),
)
_OF_BLOCKS = ("data", *_COLUMNS, "score_validation", "score_test")
_OF_CURVES = (*_COLUMNS, "train_loss", "off_domain_loss", "gap", "score_divergence", "score_size")


def tell_row(row: Row) -> str | None:
    """Return a row as a line for people; None if it is of no training, of one layer, or not the last of its trial."""
    if row.get("outcome") == "failed":
        setup = row.get("setup") or f"r={row['rank']:g}"
        return f"{setup}, lr {row['lr']:g}, seed {row['seed']}: {row['reason']}"
    of_training, of_a_part = {"setup", "run", "rank"} & row.keys(), {"layer", "prediction"} & row.keys()
    if not of_training or of_a_part or row.get("step") != row.get("steps"):
        return None
    texts = [value if isinstance(value, str) else _tell_number(name, value) for name, value in row.items()]
    return "  ".join(text for text in texts if 0 < len(text) < 40)  # neither commits nor losses by block


def _tell_number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"


@dataclass(frozen=True)
class Recorder:
    """What ``lora-lab record NAME`` runs.

    Args:
        settings: how the rows are made on a device, as the record states it.
        rows: makes the rows on a device, and yields each as soon as it is measured. Those of
            :data:`lora_lab.studies.records.OF_MODELS` also take the names of models, and measure only these; those of
            a record that grows take what is to be called after each sweep.
    """

    settings: Callable[[torch.device], dict[str, Any]]
    rows: Callable[..., Iterator[Row]]


def find_recorder(name: str) -> Recorder:
    """Return the recorder of a kind of record in :data:`KINDS`; no other one is imported."""
    if name not in KINDS:
        raise ValueError(f"There is no record {name!r}; there are {', '.join(KINDS)}.")
    return getattr(import_module(f"lora_lab.studies.{KINDS[name].module}"), name.upper())


# Sweeps


@dataclass(frozen=True)
class Sweep:
    """Setups that learn the same: on some seeds each chooses its learning rate, and on others it is judged at it.

    Args:
        setups: how each trains, and the rates that it tries first.
        choosing, judging: seeds.
        widen: how many rates may be added to a grid.
    """

    setups: Setups
    choosing: Sequence[int]
    judging: Sequence[int] = ()
    widen: int = 4

    @property
    def lrs(self) -> Grids:
        """The rates that each setup tries first."""
        return {setup: lrs for setup, (_, lrs) in self.setups.items()}

    def settings(self) -> dict[str, Any]:
        """Return how the rows are made, as the record states it."""
        setups = {setup: trial.to_dict() for setup, (trial, _) in self.setups.items()}
        seeds = {"choosing": [*self.choosing], "judging": [*self.judging]}
        return {"setups": setups, "lrs": self.lrs, **seeds, "widen": self.widen}


@dataclass(frozen=True, kw_only=True)
class BlockSweep(Sweep):
    """All seeds share one task, and losses of blocks of its examples choose and judge.

    Args:
        data: its name, such as "docs"; the first column of all rows.
        source: makes the model and the task on a device; None makes those of that name
            (:func:`lora_lab.ablation.materials.get`), up to a comma.
        rerun: another judge, for which the last setup's judging trials train once more, and the rows that it makes.
        chosen_on, judged_on, block, beyond, answered: as for :func:`lora_lab.ablation.compare.compare_tuned`.
        seq_len: tokens an example; None for a small net, whose trials take seconds.
    """

    data: str
    source: Callable[[torch.device], Source] | None = None
    rerun: Rerun | None = None
    chosen_on: int = 64
    judged_on: Mapping[str, int] = field(default_factory=lambda: ON_TEST)
    block: int = 4
    beyond: int = 1
    answered: bool = False
    seq_len: int | None = 64

    def study(self) -> dict[str, Any]:
        """Return how rates are chosen and setups judged, for :func:`lora_lab.ablation.compare.compare_tuned`."""
        names = ("choosing", "judging", "chosen_on", "judged_on", "block", "widen", "beyond", "answered")
        return {name: getattr(self, name) for name in names}

    def settings(self) -> dict[str, Any]:
        """Return how the rows are made, as the record states it."""
        return self.study() | {"seq_len": self.seq_len} | super().settings()

    def rows(self, device: torch.device, folder: Path) -> Iterator[Row]:
        """Yield the last row of each trial, and what is made of those that are trained again."""
        trials = {setup: trial for setup, (trial, _) in self.setups.items()}
        source = self.source or partial(materials.get, self.data.partition(",")[0], self.seq_len or 64)
        model, task = source(device)
        options: Any = {"n_jobs": materials.processes(device) if self.seq_len else 1}
        folder = folder / self.data
        row = {}
        for frame in compare_tuned(model, task, trials, self.lrs, folder, **self.study(), **options):
            for row in read_rows(last_rows(frame).assign(data=self.data), _OF_BLOCKS):
                row |= {f"{part}_loss": read_loss(row, part) for part in ("validation", "test")}
                yield row
        setup, trial = [*trials.items()][-1]
        if self.rerun and (row.get("setup"), row.get("stage")) == (setup, "judging"):
            judge, make_rows = self.rerun
            reruns = [replace(trial, lr=row["lr"], seed=seed) for seed in self.judging]
            frame = last_rows(ablate(model, task, reruns, folder / "again", judge=judge, **options))
            for again in frame.assign(data=self.data, setup=setup, edge=row["edge"]).to_dict("records"):
                yield from map(plain, make_rows(cast(Row, again)))


def read_rows(frame: pandas.DataFrame, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a sweep's table with those of these columns that it has, as a record can hold them."""
    yield from map(plain, frame.filter([*columns]).to_dict("records"))


def read_loss(row: Row, part: str) -> float | None:
    """Return the mean of the losses of blocks of a part; None if no judge measured them."""
    return fmean(block_losses_of(row, part)) if isinstance(row.get(SCORE + part), str) else None


@dataclass(frozen=True, kw_only=True)
class CurveSweep(Sweep):
    """Each seed has a task of its own, and a loss of the training's curve chooses; without such seeds all rates judge.

    Args:
        about: columns of all rows.
        data: its name in a record that grows, which ``about`` has, too.
        task: (seed) -> what is learned; of ``shared`` seeds without an argument.
        starts: (seed) -> the model with which a setup begins; the language model, where it is not named.
        best: which loss chooses, as for :func:`lora_lab.ablation.compare.choose_rates`.
        judged: options of the trials that are judged, where they differ.
        options: more for :func:`lora_lab.ablation.ablate`.
        show: makes the rows from the table of one seed (:meth:`frames`).
        columns: of the rows, where they hold few and no empty ones.
        shared: the seeds have the same model and task, so that those that judge train together.
    """

    about: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    task: Callable[..., Task]
    starts: Mapping[str, Callable[[int], Model]] = field(default_factory=dict)
    best: bool = False
    judged: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    show: Callable[[pandas.DataFrame], pandas.DataFrame] = last_rows
    columns: Sequence[str] = ()
    shared: bool = False

    def settings(self) -> dict[str, Any]:
        """Return how the rows are made, as the record states it."""
        return {"about": self.about, **super().settings(), "judged": self.judged}

    def trial(self, setup: str, lr: float, seed: int) -> Trial:
        """Return one trial."""
        return replace(self.setups[setup][0], lr=lr, seed=seed, **(self.judged if seed in self.judging else {}))

    def rows(self, device: torch.device, folder: Path) -> Iterator[Row]:
        """Yield the rows of the record."""
        for frame in self.frames(device, folder):
            for row in read_rows(self.show(frame), [*self.about, *(self.columns or _OF_CURVES)]):
                yield {name: value for name, value in row.items() if value is not None} if self.columns else row

    def frames(self, device: torch.device, folder: Path) -> Iterator[pandas.DataFrame]:
        """Yield the table of each seed, or of several, with ``about``, ``setup``, ``stage``, ``edge`` and ``chosen``.

        ``edge`` is where in its grid the chosen rate of a setup lies, as of
        :class:`lora_lab.ablation.compare.Choice`, and ``chosen`` whether the trial is at that rate.
        """
        train, choosing, choices, lrs = partial(self._train, device, folder), [], {}, self.lrs
        if self.choosing:
            choosing, choices = tune_by_seed(
                lambda seed, lrs: train([seed], lrs), self.lrs, self.choosing, self.widen, self.best
            )
            lrs = {setup: [cast(float, choice.lr)] for setup, choice in choices.items()}
        seeds = [self.judging] if self.shared else [[seed] for seed in self.judging]
        judging = (train(together, lrs) for together in seeds if lrs)
        edges = {setup: choice.edge for setup, choice in choices.items()}
        chosen = {setup: choice.lr for setup, choice in choices.items()}
        for stage, frames in (("choosing", choosing), ("judging", judging)):
            for frame in frames:
                setup = frame["setup"]
                columns = {"edge": setup.map(edges), "chosen": frame["lr"] == setup.map(chosen)}
                yield frame.assign(**self.about, stage=stage, **columns)

    def _train(self, device: torch.device, folder: Path, seeds: Sequence[int], lrs: Grids) -> pandas.DataFrame:
        """Return the table of trials of equal tasks, with a column ``setup``; those with equal starts run together."""
        import pandas

        frames = []
        for start in dict.fromkeys(map(self.starts.get, lrs)):
            trials = {
                setup: [self.trial(setup, lr, seed) for lr in rates for seed in seeds]
                for setup, rates in lrs.items()
                if self.starts.get(setup) is start
            }
            options = {"n_jobs": materials.processes(device), **self.options}
            model = start(seeds[0]) if start else partial(materials.language_model, device)
            task = self.task if self.shared else partial(self.task, seeds[0])
            frames.append(ablate_setups(model, task, trials, folder, **options))
        return pandas.concat(frames, ignore_index=True)


def evaluate_parts(model: nn.Module, task: Task, planned: Mapping[str, Any]) -> Row:
    """Return the losses of the parts that are not trained on, by the planned batch size and number of examples."""
    size = planned["batch_size"], planned["eval_examples"]
    return {f"{part}_loss": evaluate(model, task, part, *size) for part in ("validation", "test", "off_domain")}


BF16_BASE = Lean(torch.bfloat16)  # LoRA's step over a base in bfloat16
# All methods multiply in bfloat16, and what they train is in float32.
BFLOAT16 = {"lean": BF16_BASE, "autocast": torch.bfloat16}


def plan_setups(methods: Methods, steps: int, batch_size: int, count: int = 5, **options: Any) -> Setups:
    """Return how methods train, and the rates that each tries first, by setup.

    Unless the options say otherwise, trials are evaluated on few examples and only at the end, because the losses that
    decide are those of :class:`lora_lab.ablation.stats.BlockLosses`.

    Args:
        methods: with the rates of each, or the one in the middle of ``count`` rates.
        options: more of a Trial; ``lean`` of the methods that have that step, and ``autocast`` of the others.
    """
    setups, options = {}, {"eval_every": steps, "eval_examples": 4} | options
    for setup, (method, rates) in methods.items():
        has_lean = isinstance(method, LoRA) and not isinstance(method, PiSSA | DoRA)
        step: Any = options | {"autocast" if has_lean else "lean": None}
        lrs = rates if isinstance(rates, Sequence) else rates_around(rates, count=count)
        setups[setup] = Trial(method, lrs[0], steps=steps, batch_size=batch_size, **step), lrs
    return setups


def plan_size(device: torch.device) -> tuple[int, int]:
    """Return the steps on Python's manual and the examples in each that two cores, or a GPU, can do in little time."""
    return (300, 8) if device.type == "cuda" else (60, 4)


def plan_seeds(device: torch.device, first: int = 0) -> range:
    """Return three seeds, or on a GPU five; those that judge come after those that choose."""
    return range(first, first + (5 if device.type == "cuda" else 3))


def record_sweeps(
    name: str,
    plan: Callable[[torch.device], Iterable[BlockSweep | CurveSweep]],
    stated: Mapping[str, Any] | None = None,
    after: Callable[[torch.device], Iterator[Row]] | None = None,
) -> Recorder:
    """Return the recorder of a study, which keeps its trials in ``runs``, where a stopped run goes on.

    Args:
        name: of the record.
        plan: what is trained on a device.
        stated: what the record's settings say besides what its sweeps do.
        after: makes more rows when all sweeps have ended.
    """

    def settings(device: torch.device) -> dict[str, Any]:
        sweeps = [*plan(device)]
        named = {sweep.data: sweep.settings() for sweep in sweeps if sweep.data}
        return plain((named or {"cases": [sweep.settings() for sweep in sweeps]}) | dict(stated or {}))

    def rows(device: torch.device, save: Callable[[], Any] = lambda: None) -> Iterator[Row]:
        for sweep in plan(device):
            held = _find_held(name, sweep, device) if KINDS[name].grows else None
            yield from sweep.rows(device, Path("runs") / f"record-{name}") if held is None else held
            save()
        yield from after(device) if after else ()

    return Recorder(settings, rows)


def _find_held(name: str, sweep: BlockSweep | CurveSweep, device: torch.device) -> list[Row] | None:
    """Return the rows of a sweep that this machine's record holds; none if another's does; None if no record does."""
    held = None
    for record in load_all(name, destination()).values():
        if record.settings.get(sweep.data) == plain(sweep.settings()):
            here = slug(record.device) == slug(device_name(device))
            of_sweep = [row for row in record.rows if f"{row['data']}, ".startswith(f"{sweep.data}, ")]
            held = of_sweep if here else held or []
    return held
