"""``lora-lab record remedies``: what reduces forgetting at equal learning, and what predicts forgetting?

LoRA of rank 8 learns Python's manual: as it is, at three rates; with a share of the base's own replies, or of other
text, among its training examples; with a penalty on the divergence from the base; with weight decay; and its adapter
scaled down or up afterwards. Beside them are other ranks, full fine-tuning, and both at the rates of PEFT's benchmark.

The off-domain part is what the base itself wrote, to prompts that no replayed reply belongs to, so that the rise of the
loss on it is KL(base || tuned), which is what is forgotten (:mod:`lora_lab.tasks.base_text`). The rate is constant
after the warm-up, so a curve contains all shorter ones, and remedies are compared where they have learned as much:

    compare_over_rates(frame, "forgotten", "LoRA r=8", share=0.9)           # lora_lab.ablation.overfitting
    rank_correlations(runs, "forgotten_at_last", ["score_divergence", ...])  # lora_lab.ablation.stats

The rows of a setup that ends in "scaled" are the same trials with their adapters at several strengths: ``step`` is the
strength in per cent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_lab.ablation import studies
from lora_lab.ablation.compare import label_setups
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.run import ablate
from lora_lab.adapters.edit import strength
from lora_lab.analysis.divergence import NearBase, mean_divergence
from lora_lab.inject import lora_layers
from lora_lab.lean import Lean
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.studies.planning import planned_hours
from lora_lab.studies.recorder import Row, read_rows, record_trials, tell_trial
from lora_lab.system.schema import plain
from lora_lab.task import Task
from lora_lab.tasks.base_text import base_replies, on_base_text, with_replay
from lora_lab.train import evaluate

if TYPE_CHECKING:
    import pandas

REHEARSED, JUDGED = slice(16, None), slice(16)  # of the prompts: replies to train on, and to measure forgetting on
REPLIES = 50  # windows of 64 tokens: as long are the replies that judge, with their prompts
FULL_RANK = 576  # the least side of the widest matrices
STRENGTHS = (0.25, 0.5, 0.75, 1.2)
R8 = LoRA(8, 16)


def own_replies(share: float, task: Task) -> Task:
    """The task with replies of the base among its training examples."""
    return with_replay(task, base_replies(prompts=REHEARSED), share)


def other_text(share: float, task: Task) -> Task:
    """The same with as many windows of prose that the base did not write, the control of :func:`own_replies`."""
    return with_replay(task, task.off_domain[: len(base_replies(prompts=REHEARSED))], share)


def near_base(weight: float, task: Task) -> Task:
    """The task with a penalty on the divergence from the base."""
    return replace(task, loss=NearBase(weight))


@dataclass(frozen=True)
class Setup:
    """One setup, at its rates.

    Args:
        method: how it trains.
        lrs: its rates; none is chosen, for verdicts are over all of them.
        change: of the task.
        weight_decay: of AdamW.
    """

    method: Method
    lrs: Sequence[float]
    change: Callable[[Task], Task] | None = None
    weight_decay: float = 0.0


SETUPS = {
    "LoRA r=8": Setup(R8, (1e-3, 2e-3, 4e-3)),
    "LoRA r=1": Setup(LoRA(1, 2), (4e-3,)),
    "LoRA r=64": Setup(LoRA(64, 128), (1e-3,)),
    "full": Setup(FullFineTuning(), (6e-5, 1.2e-4)),
    "LoRA r=32, PEFT's rate": Setup(LoRA(32, 64), (1e-4,)),
    "full, PEFT's rate": Setup(FullFineTuning(), (1e-5,)),
    "weight decay 3": Setup(R8, (2e-3,), weight_decay=3.0),
    "weight decay 10": Setup(R8, (2e-3,), weight_decay=10.0),
    "own replies, a quarter": Setup(R8, (2e-3,), partial(own_replies, 0.25)),
    "own replies, half": Setup(R8, (2e-3,), partial(own_replies, 0.5)),
    "other text, a quarter": Setup(R8, (2e-3,), partial(other_text, 0.25)),
    "KL penalty 0.3": Setup(R8, (2e-3,), partial(near_base, 0.3)),
    "KL penalty 1": Setup(R8, (2e-3,), partial(near_base, 1.0)),
}
_COLUMNS = (
    *("setup", "method", "rank", "alpha", "lr", "weight_decay", "seed", "steps", "outcome", "reason", "step"),
    *("train_loss", "validation_loss", "off_domain_loss", "gap", "test_loss"),
    *("score_divergence", "score_size", "score_prose", "trainable_parameters", "commit"),
)


@dataclass(frozen=True)
class Plan:
    """How much is trained: every setup at every rate with every seed.

    Args:
        setups: by name.
        steps, batch_size: of a trial, which is evaluated after each sixth of its steps.
        seeds: of the order of the examples, and of the adapter.
        seq_len: tokens an example.
        eval_examples: how many validation examples, from the first.
    """

    setups: Mapping[str, Setup]
    steps: int
    batch_size: int
    seeds: Sequence[int]
    seq_len: int = 64
    eval_examples: int = 48

    def trials(self, name: str) -> list[Trial]:
        """The trials of one setup."""
        setup = self.setups[name]
        options = {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "schedule": "constant",
            "weight_decay": setup.weight_decay,
            "eval_every": max(1, self.steps // 6),
            "eval_examples": self.eval_examples,
        }
        options |= {"lean": Lean(torch.bfloat16)} if isinstance(setup.method, LoRA) else {"autocast": torch.bfloat16}
        return [Trial(setup.method, lr, seed, **options) for lr in setup.lrs for seed in self.seeds]

    def task(self, change: Callable[[Task], Task] | None) -> Task:
        """The manual, changed or not, and the base's replies to measure forgetting on."""
        task = studies.docs_task(self.seq_len)
        return on_base_text(task if change is None else change(task), prompts=JUDGED)


def plan(device: torch.device) -> Plan:
    """What two cores can do in an hour and a half, or a GPU in less."""
    gpu = device.type == "cuda"
    return Plan(SETUPS, 300 if gpu else 60, 8 if gpu else 4, range(5 if gpu else 3))


@dataclass(frozen=True)
class DistanceFromBase:
    """A judge: how far a trained model has moved from its base, and its losses with the adapter at other strengths.

    Its scores are ``divergence``, KL(base || tuned) on validation examples of the new task in nats a token; ``size``,
    the Frobenius norm of the change of all weights; ``prose``, the rise of the loss on other text; and, for an adapter,
    ``validation_0.25``, ``off_domain_0.25`` and so on.

    Args:
        seq_len: tokens an example.
        limit: how many examples.
        strengths: of the adapter.
    """

    seq_len: int
    limit: int
    strengths: Sequence[float] = ()

    def __call__(self, model: nn.Module, task: Task) -> dict[str, float]:
        base = studies.language_model(next(model.parameters()).device)
        few = self.limit // 2
        prose = replace(task, off_domain=studies.docs_task(self.seq_len).off_domain[-few:])  # not other_text's
        scores = {
            "divergence": mean_divergence(base, model, task, "validation", limit=few),
            "size": update_norm(base, model),
            "prose": evaluate(model, prose, "off_domain") - evaluate(base, prose, "off_domain"),
        }
        for factor in self.strengths if lora_layers(model) else ():
            with strength(model, factor):
                for part in ("validation", "off_domain"):
                    scores[f"{part}_{factor:g}"] = evaluate(model, task, part, limit=self.limit)
        return scores


@torch.no_grad()
def update_norm(base: nn.Module, tuned: nn.Module) -> float:
    """The Frobenius norm of the change of all weights together, ||dW||_F."""
    if layers := lora_layers(tuned):
        changes = [layer.delta() for layer in layers.values()]
    else:
        before = dict(base.named_parameters())
        changes = [parameter - before[name] for name, parameter in tuned.named_parameters()]
    return float(sum(change.double().square().sum() for change in changes)) ** 0.5


def group_by_task(planned: Plan) -> dict[Callable[[Task], Task] | None, dict[str, list[Trial]]]:
    """Return the changes of the task, each with the setups that train on it, and their trials."""
    groups: dict[Any, dict[str, list[Trial]]] = {}
    for name, setup in planned.setups.items():
        groups.setdefault(setup.change, {})[name] = planned.trials(name)
    return groups


def hours(device: torch.device) -> float:
    """Return how long it takes, by :mod:`lora_lab.studies.planning`; a penalty takes one more forward pass a step."""
    planned, trials, examples = plan(device), [], 0
    for change, group in group_by_task(planned).items():
        more = 3 * planned.eval_examples  # the judge's, and with strengths
        more += 2 * len(STRENGTHS) * planned.eval_examples if change is None else 0
        more += planned.steps * planned.batch_size if isinstance(change, partial) and change.func is near_base else 0
        trials += chain(*group.values())
        examples += more * sum(map(len, group.values()))
    return planned_hours(trials, planned.seq_len, device, examples // len(trials), off_domain=REPLIES)


def settings(device: torch.device) -> dict[str, Any]:
    """Return how the rows are made, as the record states it."""
    planned, setups = plan(device), {}
    for name, setup in planned.setups.items():
        of_all = {"lrs": list(setup.lrs), "weight_decay": setup.weight_decay}
        setups[name] = of_all | planned.trials(name)[0].to_dict()["method"]
    return {
        "study": "docs",
        "setups": setups,
        **{name: getattr(planned, name) for name in ("steps", "batch_size", "seq_len", "eval_examples")},
        "seeds": list(planned.seeds),
        "strengths": list(STRENGTHS),
        "schedule": "constant, after a warm-up of a tenth of the steps",
    }


def rows(device: torch.device, folder: Path) -> Iterator[Row]:
    """Yield for each trial a row of each evaluation, and one of each strength of its adapter."""
    planned, model = plan(device), partial(studies.language_model, device)
    for change, trials in group_by_task(planned).items():
        judge = DistanceFromBase(planned.seq_len, planned.eval_examples, STRENGTHS if change is None else ())
        every, task = [*chain(*trials.values())], partial(planned.task, change)
        table = ablate(model, task, every, folder, judge=judge, n_jobs=studies.processes(device))
        frame = label_setups(table, trials)
        frame["rank"] = frame["rank"].fillna(FULL_RANK)
        yield from read_rows(frame, _COLUMNS)
        if change is None:
            yield from _scale(frame[(frame["setup"] == "LoRA r=8") & (frame["outcome"] == "done")])


def _scale(frame: pandas.DataFrame) -> Iterator[Row]:
    """Yield the curves of adapters over their strengths, from the base (0) on."""
    for _, curve in frame.groupby("key", sort=False):
        first, last = curve.iloc[[0, -1]].to_dict("records")
        losses = {0.0: first, 1.0: last}
        parts = ("validation", "off_domain")
        for factor in STRENGTHS:
            losses[factor] = {f"{part}_loss": last[f"{SCORE}{part}_{factor:g}"] for part in parts}
        for factor, at_strength in sorted(losses.items()):
            row = {name: last[name] for name in _COLUMNS if not name.startswith(SCORE)}
            row |= {"setup": f"{last['setup']}, scaled", "step": round(100 * factor), "gap": None, "train_loss": None}
            yield plain(row | {f"{part}_loss": at_strength[f"{part}_loss"] for part in parts} | {"test_loss": None})


def line(row: Row) -> str | None:
    """Return a trial's last row as a line for people."""
    if row["setup"].endswith("scaled"):
        return None
    return tell_trial(row, ("setup",), ("validation_loss", "off_domain_loss"))


RECORDER = record_trials("remedies", settings, rows, line, hours)
