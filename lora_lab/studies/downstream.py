"""``lora-lab record downstream``: can the real model learn a downstream task, and how good is it then?

Sentiment, summaries, translation and a style, each by full fine-tuning and by LoRA at its own learning rate (chosen by
validation loss on one seed), with three seeds. The baselines are the model without training (zero-shot), answers that
need no model (trivial), and for sentiment a randomly initialised model of the same shape (scratch). Scores are on the
whole test part.

On two cores it takes hours; a run that was stopped continues. On a GPU there are more steps, seeds and languages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lora_lab.ablation import studies
from lora_lab.ablation.compare import last_rows
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.run import ablate
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.models.llama import Llama
from lora_lab.models.pretrained import SMOLLM2, load_pretrained
from lora_lab.studies.recorder import Row, record_trials
from lora_lab.system.schema import plain
from lora_lab.task import Task
from lora_lab.tasks import TASKS
from lora_lab.tasks.datasets import style
from lora_lab.tasks.generate import answers
from lora_lab.tasks.instruction import PairTask
from lora_lab.tasks.metrics import METRICS, StyleJudge, score, trivial
from lora_lab.train import evaluate

SCRATCH = "scratch"
SETUPS: dict[str, Method] = {"full": FullFineTuning(), "LoRA r=8": LoRA(8, 16), SCRATCH: FullFineTuning()}
FROM_SCRATCH = ("sentiment",)  # tasks that are also learned from scratch
SHOWN = 3  # answers per method in the record
_PREDICTIONS = [f"{SCORE}prediction_{i}" for i in range(SHOWN)]  # the columns of a trial's answers in the table
_LOSSES = ("validation_loss", "off_domain_loss", "test_loss")


@dataclass(frozen=True)
class Plan:
    """How much is trained.

    Args:
        steps: of each task.
        lrs: the learning rates to try for each setup.
        seeds: how many seeds.
        batch_size: of a trial.
        eval_examples: how many examples of each part the losses are of, from its first.
    """

    steps: Mapping[str, int]
    lrs: Mapping[str, tuple[float, ...]]
    seeds: int
    batch_size: int
    eval_examples: int

    def trial(self, task: str, setup: str, lr: float, seed: int) -> Trial:
        """Return one trial, evaluated before and after training."""
        steps = self.steps[task]
        options: dict[str, Any] = {"steps": steps, "eval_every": steps, "batch_size": self.batch_size}
        return Trial(SETUPS[setup], lr, seed, eval_examples=self.eval_examples, **options)


def plan(device: torch.device) -> Plan:
    """What two cores can do in a few hours, or a GPU in one."""
    if device.type == "cuda":
        steps = {"sentiment": 207, "summarise": 226, "style": 81, "style-plain": 81}
        steps |= {f"translate-{language}": 279 for language in ("fr", "de", "es")}
        lrs = {"full": (1e-5, 3e-5, 1e-4, 3e-4), "LoRA r=8": (2e-4, 6e-4, 2e-3, 6e-3)}
        lrs[SCRATCH] = (1e-4, 3e-4, 1e-3, 3e-3)
        return Plan(steps, lrs, seeds=5, batch_size=8, eval_examples=128)
    steps = {"sentiment": 50, "translate-fr": 50, "style": 27, "summarise": 25}
    lrs = {"full": (3e-5, 1e-4, 3e-4), "LoRA r=8": (6e-4, 2e-3, 6e-3), SCRATCH: (1e-4, 3e-4, 1e-3)}
    return Plan(steps, lrs, seeds=3, batch_size=8, eval_examples=32)


def settings(device: torch.device) -> dict[str, Any]:
    """How the rows are made, as the record states it."""
    planned = plan(device)
    lrs = {setup: list(rates) for setup, rates in planned.lrs.items()}
    task = next(iter(planned.steps))
    setups = {setup: planned.trial(task, setup, rates[0], 0).to_dict()["method"] for setup, rates in lrs.items()}
    return {**asdict(planned), "lrs": lrs, "setups": setups}


def rows(device: torch.device, folder: Path) -> Iterator[Row]:
    """Yield the rows of a record; ``about`` names what a row is about.

    "task": a task and its size. "result": losses and scores of one setup and seed at the setup's chosen rate, with the
    commit of the code that ran; the setups "trivial" and "zero-shot" have no seed. "tuning": the same at the rates that
    were not chosen. "answer": the answer to a prompt of the test part, after training with seed 0.
    """
    planned = plan(device)
    for name in planned.steps:
        yield from _task_rows(planned, name, device, folder)


def load_task(name: str) -> PairTask:
    """A downstream task for the real model."""
    return cast(PairTask, TASKS[name](load_pretrained(SMOLLM2)[1]))


def evaluate_answers(model: nn.Module, task: PairTask) -> tuple[dict[str, float], list[str]]:
    """Scores on the test part, and the first answers of that part."""
    predictions = answers(cast(Llama, model), task)
    return scores(task, predictions) | _plain_loss(model, task), predictions[:SHOWN]


def scores(task: PairTask, predictions: list[str]) -> dict[str, float]:
    """Scores of answers to the test part; for stories, the share that a classifier takes for the log."""
    if task.metric in METRICS:
        return score(task, predictions)
    return {"in_style": _style_judge(task).share(predictions)}


def _style_judge(task: PairTask) -> StyleJudge:
    return StyleJudge(style(task.tokenizer), style(task.tokenizer, "plain"))


def _plain_loss(model: nn.Module, task: PairTask) -> dict[str, float]:
    """For stories, the test loss on the same stories in plain style, which grows as the style replaces it."""
    if task.metric in METRICS:
        return {}
    return {"plain_loss": evaluate(model, style(task.tokenizer, "plain"), "test")}


def judge(model: nn.Module, task: Task) -> dict[str, float | str]:
    """Scores and answers of a trial, as its file stores them: by name, in one dict."""
    test_scores, predictions = evaluate_answers(model, cast(PairTask, task))
    return test_scores | {f"prediction_{i}": prediction for i, prediction in enumerate(predictions)}


def _stored_predictions(trial: Mapping[str, Any]) -> list[str]:
    """The answers that :func:`judge` stored, from a trial's row of the table; NaN where only other trials have one."""
    return [trial[name] for name in _PREDICTIONS if isinstance(trial.get(name), str)]


def _task_rows(planned: Plan, name: str, device: torch.device, folder: Path) -> Iterator[Row]:
    task = load_task(name)
    sizes = {part: len(examples) for part, examples in task.parts.items()}
    row = {"about": "task", "task": name, "says": task.about, "licence": task.licence, "metric": task.metric, **sizes}
    if task.metric not in METRICS:
        row |= {"judge_accuracy": _style_judge(task).accuracy}
    yield {**row, "fingerprint": task.fingerprint}
    if task.metric in METRICS:
        yield {"about": "result", "task": name, "setup": "trivial", **scores(task, trivial(task))}
    yield from _zero_shot_rows(planned, name, task, device)
    yield from _trained_rows(planned, name, task, device, folder)


def _zero_shot_rows(planned: Plan, name: str, task: PairTask, device: torch.device) -> Iterator[Row]:
    model = studies.language_model(device)
    result: dict[str, Any] = {"about": "result", "task": name, "setup": "zero-shot"}
    for part in ("validation", "off_domain", "test"):
        result[f"{part}_loss"] = evaluate(model, task, part, planned.batch_size, planned.eval_examples)
    test_scores, predictions = evaluate_answers(model, task)
    yield result | test_scores
    yield from _answer_rows(result, task, predictions)


def _trained_rows(planned: Plan, name: str, task: PairTask, device: torch.device, folder: Path) -> Iterator[Row]:
    """Yield the rows of all trials: all rates with seed 0, then the best rate of each setup with the other seeds."""
    train = partial(_train, planned, name, device, folder)
    lrs = {setup: rates for setup, rates in planned.lrs.items() if setup != SCRATCH or name in FROM_SCRATCH}
    tuning, best = train(lrs, range(1)), {}
    done = sorted((row for row in tuning if row["outcome"] == "done"), key=itemgetter("validation_loss", "lr"))
    for trial in reversed(done):
        best[trial["setup"]] = (trial["lr"],)  # the last one is the lowest
    for trial in tuning:
        row = _row(trial, name, "result" if trial["lr"] in best.get(trial["setup"], ()) else "tuning")
        yield row
        if row["about"] == "result":
            yield from _answer_rows(row, task, _stored_predictions(trial))
    chosen = {setup: best[setup] for setup in lrs if setup in best}
    for trial in train(chosen, range(1, planned.seeds)):
        yield _row(trial, name, "result")


def _train(
    planned: Plan, name: str, device: torch.device, folder: Path, lrs: Mapping[str, Sequence[float]], seeds: range
) -> list[Row]:
    """Return the last row of each trial, with its setup. Trials from scratch start from another model."""
    rows, options = [], {"judge": judge, "n_jobs": studies.processes(device)}
    for start, scratch in ((studies.language_model, False), (studies.random_init, True)):
        setups = [setup for setup in lrs if (setup == SCRATCH) == scratch]
        trials = [planned.trial(name, setup, lr, seed) for setup in setups for lr in lrs[setup] for seed in seeds]
        if trials:
            table = last_rows(ablate(partial(start, device), partial(load_task, name), trials, folder, **options))
            labels = {SETUPS[setup].name: setup for setup in setups}
            rows += table.assign(setup=table["method"].map(labels)).to_dict("records")
    return rows


def _row(trial: Mapping[str, Any], name: str, about: str) -> dict[str, Any]:
    """The last row of a trial in the table as a row of the record."""
    columns = ("setup", "lr", "seed", "outcome", "reason", *_LOSSES, "trainable_parameters", "commit")
    trial_scores = {
        column.removeprefix(SCORE): value
        for column, value in trial.items()
        if column.startswith(SCORE) and column not in _PREDICTIONS
    }
    return plain({"about": about, "task": name} | {column: trial[column] for column in columns} | trial_scores)


def _answer_rows(result: Mapping[str, Any], task: PairTask, predictions: list[str]) -> Iterator[Row]:
    """A row for each answer of a result, with its prompt and reference."""
    for pair, prediction in zip(task.pairs["test"], predictions, strict=False):
        shared = {"about": "answer", "task": result["task"], "setup": result["setup"]}
        yield {**shared, "prompt": pair.prompt, "reference": pair.answer, "prediction": prediction}


def line(row: dict[str, Any]) -> str | None:
    """A row as a line for people; None for an answer."""
    if row["about"] == "task":
        return f"{row['task']}: {row['says']}"
    if row["about"] == "answer":
        return None
    trial = f"lr {row['lr']:<7g} seed {row['seed']}" if "lr" in row else ""
    if row.get("reason"):
        return f"  {row['setup']:<10} {trial}: {row['reason']}"
    names = [name for name in row if name not in ("lr", "seed", "trainable_parameters")]
    numbers = (f"{name} {row[name]:.3f}" for name in names if isinstance(row[name], float))
    return f"  {row['setup']:<10} {trial:<20}" + "  ".join(numbers)


RECORDER = record_trials("downstream", settings, rows, line)
