"""What ``lora-lab record downstream`` runs on the real model: can it learn a trade, and how good is it then?

Sentiment, summaries, translation and a style, each by full fine-tuning and by LoRA at its own learning rate (chosen by
validation loss on one seed), with three seeds; beside them the model as it is (zero-shot), answers that take no model
(trivial), and for sentiment a model of the same shape that was never trained before (scratch). Scores are on the whole
test part.

On two cores it takes hours; a stopped run goes on where it was. On a GPU there are more steps, seeds and languages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lab.ablation import studies
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.run import ablate
from lora_lab.experiments.finetune import TASKS
from lora_lab.experiments.recorder import Recorder
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.models.pretrained import SMOLLM2, load_pretrained
from lora_lab.records import json_safe
from lora_lab.tasks.datasets import style
from lora_lab.tasks.generate import answers
from lora_lab.tasks.instruction import PairTask
from lora_lab.tasks.metrics import METRICS, StyleJudge, score, trivial
from lora_lab.train import evaluate

FOLDER = Path("runs/record-downstream")  # where a stopped run goes on
SCRATCH = "scratch"
SETUPS: dict[str, Method] = {"full": FullFineTuning(), "LoRA r=8": LoRA(8, 16), SCRATCH: FullFineTuning()}
FROM_SCRATCH = ("sentiment",)  # tasks that are learned from scratch as well
SHOWN = 3  # answers of each method that are kept
_LOSSES = ("validation_loss", "off_domain_loss", "test_loss")


@dataclass(frozen=True)
class Plan:
    """How much is trained: steps for each task, rates for each method; losses are of ``eval_examples`` of a part."""

    steps: Mapping[str, int]
    lrs: Mapping[str, tuple[float, ...]]
    seeds: int
    batch_size: int
    eval_examples: int

    def trial(self, task: str, setup: str, lr: float, seed: int) -> Trial:
        """One run, evaluated before and after."""
        steps = self.steps[task]
        options = {"steps": steps, "eval_every": steps, "eval_examples": self.eval_examples}
        return Trial(SETUPS[setup], lr, seed, batch_size=self.batch_size, **options)


def plan(device: torch.device) -> Plan:
    """What two cores do in a few hours, or a GPU in one."""
    if device.type == "cuda":
        steps = {"sentiment": 207, "summarise": 226, "style": 81, "style-plain": 81}
        steps |= {f"translate-{language}": 279 for language in ("fr", "de", "es")}
        rates = {"full": (1e-5, 3e-5, 1e-4, 3e-4), "LoRA r=8": (2e-4, 6e-4, 2e-3, 6e-3)}
        return Plan(steps, {**rates, SCRATCH: (1e-4, 3e-4, 1e-3, 3e-3)}, 5, 8, 128)
    steps = {"sentiment": 50, "translate-fr": 50, "style": 27, "summarise": 25}
    rates = {"full": (3e-5, 1e-4, 3e-4), "LoRA r=8": (6e-4, 2e-3, 6e-3), SCRATCH: (1e-4, 3e-4, 1e-3)}
    return Plan(steps, rates, 3, 8, 32)


def settings(device: torch.device) -> dict[str, Any]:
    """What a record says of how its rows were made."""
    own = plan(device)
    first = next(iter(own.steps))
    setups = {setup: own.trial(first, setup, rates[0], 0).to_dict()["method"] for setup, rates in own.lrs.items()}
    return {**asdict(own), "lrs": {setup: list(rates) for setup, rates in own.lrs.items()}, "setups": setups}


def downstream(device: torch.device, folder: str | Path = FOLDER) -> Iterator[dict[str, Any]]:
    """The rows of a record; ``about`` says what a row is of.

    "task": what it is, and how large. "result": losses and scores of one method and seed at its chosen rate, with the
    commit of the code that ran; the setups "trivial" and "zero-shot" have no seed. "tuning": the same at the rates
    that were not chosen. "answer": what a method said to a prompt of the test part, after training with seed 0.

    Args:
        folder: keeps the trials, from where a stopped run goes on.
    """
    own = plan(device)
    for name in own.steps:
        yield from _one_task(own, name, device, folder)


def task(name: str) -> PairTask:
    """A trade for the real model."""
    return TASKS[name](load_pretrained(SMOLLM2)[1])


def judge(model: nn.Module, data: PairTask) -> dict[str, float | str]:
    """Scores on the test part, and the first predictions as ``prediction_0`` and so on."""
    predictions = answers(model, data)
    shown = {f"prediction_{i}": text for i, text in enumerate(predictions[:SHOWN])}
    return scores(data, predictions) | shown | _plain_loss(model, data)


def scores(data: PairTask, predictions: list[str]) -> dict[str, float]:
    """Of answers to the test part, by the task's metric; of stories, the share that a classifier takes for the log."""
    if data.metric in METRICS:
        return score(data, predictions)
    return {"in_style": _style_judge(data).share(predictions)}


def _style_judge(data: PairTask) -> StyleJudge:
    return StyleJudge(style(data.tokenizer), style(data.tokenizer, "plain"))


def _plain_loss(model: nn.Module, data: PairTask) -> dict[str, float]:
    """The test loss on the same stories told plainly: what a style gains, these lose."""
    if data.metric in METRICS:
        return {}
    return {"plain_loss": evaluate(model, style(data.tokenizer, "plain"), "test")}


def _one_task(own: Plan, name: str, device: torch.device, folder: str | Path) -> Iterator[dict[str, Any]]:
    data = task(name)
    about = {"about": "task", "task": name, "says": data.about, "licence": data.licence, "metric": data.metric}
    about |= {part: len(examples) for part, examples in data.parts.items()}
    if data.metric not in METRICS:
        about["judge_accuracy"] = _style_judge(data).accuracy
    yield {**about, "fingerprint": data.fingerprint}
    result = {"about": "result", "task": name}
    if data.metric in METRICS:
        yield {**result, "setup": "trivial", **scores(data, trivial(data))}
    yield from _without_answers(result | {"setup": "zero-shot"} | _zero_shot(own, data, device), data)
    yield from _trained(own, name, data, device, folder)


def _zero_shot(own: Plan, data: PairTask, device: torch.device) -> dict[str, Any]:
    model = studies.language_model(device)
    parts = {f"{part}_loss": part for part in ("validation", "off_domain", "test")}
    losses = {key: evaluate(model, data, part, own.batch_size, own.eval_examples) for key, part in parts.items()}
    return losses | judge(model, data)


def _trained(own: Plan, name: str, data: PairTask, device: torch.device, folder: str | Path) -> Iterator[dict]:
    """All trials: the rates on seed 0, and the best one of each method on the other seeds."""
    lrs = {setup: rates for setup, rates in own.lrs.items() if setup != SCRATCH or name in FROM_SCRATCH}
    tried = _run(own, name, lrs, range(1), device, folder)
    done = [row for row in tried if row["outcome"] == "done"]
    best: dict[str, tuple[float, ...]] = {}
    for setup in lrs:
        losses = {row["lr"]: row["validation_loss"] for row in done if row["setup"] == setup}
        if losses:
            best[setup] = (min(losses, key=losses.get),)
    for row in tried:
        yield from _without_answers(
            _row(row, name, "result" if row["lr"] in best.get(row["setup"], ()) else "tuning"), data
        )
    for row in _run(own, name, best, range(1, own.seeds), device, folder):
        yield from _without_answers(_row(row, name, "result"), data)


def _run(
    own: Plan, name: str, lrs: Mapping[str, tuple[float, ...]], seeds: range, device: torch.device, folder: str | Path
) -> list[dict[str, Any]]:
    """The last row of each trial in the table, with its method; trials from scratch start from another model."""
    found = []
    for scratch in (False, True):
        setups = [setup for setup in lrs if (setup == SCRATCH) == scratch]
        trials = [own.trial(name, setup, lr, seed) for setup in setups for lr in lrs[setup] for seed in seeds]
        if trials:
            make = partial(studies.random_init if scratch else studies.language_model, device)
            options = {"n_jobs": studies.processes(device), "judge": judge}
            frame = ablate(make, partial(task, name), trials, folder, **options)
            last = frame[(frame.step == frame.steps) | (frame.outcome == "failed")]
            names = {SETUPS[setup].name: setup for setup in setups}
            found += last.assign(setup=last["method"].map(names)).to_dict("records")
    return found


def _row(row: Mapping[str, Any], name: str, about: str) -> dict[str, Any]:
    """A trial's last row of the table as a record's."""
    kept = ("setup", "lr", "seed", "outcome", "reason", *_LOSSES, "trainable_parameters", "commit")
    found = {key.removeprefix(SCORE): value for key, value in row.items() if key.startswith(SCORE)}
    return json_safe({"about": about, "task": name} | {key: row[key] for key in kept} | found)


def _without_answers(row: dict[str, Any], data: PairTask) -> Iterator[dict[str, Any]]:
    """The row without its answers, and after it a row for each answer, of the first seed's result."""
    predictions = {i: row.pop(f"prediction_{i}", None) for i in range(SHOWN)}
    yield row
    if row["about"] != "result" or row.get("seed", 0) != 0:
        return
    for i, pair in enumerate(data.pairs["test"][:SHOWN]):
        if predictions[i] is not None:
            shared = {"about": "answer", "task": row["task"], "setup": row["setup"]}
            yield {**shared, "prompt": pair.prompt, "reference": pair.answer, "prediction": predictions[i]}


def line(row: dict[str, Any]) -> str | None:
    """A row for a person to read."""
    if row["about"] == "task":
        return f"{row['task']}: {row['says']}"
    if row["about"] == "answer":
        return None
    at = f"lr {row['lr']:<7g} seed {row['seed']}" if "lr" in row else ""
    if row.get("reason"):
        return f"  {row['setup']:<10} {at}: {row['reason']}"
    names = [name for name in row if name not in ("lr", "seed", "trainable_parameters")]
    numbers = (f"{name} {row[name]:.3f}" for name in names if isinstance(row[name], float))
    return f"  {row['setup']:<10} {at:<20}" + "  ".join(numbers)


RECORDER = Recorder("downstream", settings, downstream, line)
