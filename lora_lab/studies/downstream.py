"""``lora-lab record downstream`` and ``elicitation``: what can the real model learn, and what could it already?

downstream   Sentiment, summaries, translation and a style, each by full fine-tuning and by LoRA at its own rate (chosen
             by validation loss on one seed), with three seeds. The baselines are the model untrained
             (zero-shot), answers that need no model (trivial), and for sentiment a randomly initialised model of the
             same shape (scratch). Scores are on the whole test part. On two cores it takes hours; on a GPU there are
             more steps, seeds and languages.
elicitation  The tasks, the test prompts and the scores are those of ``downstream``, but for the style, where one answer
             to all prompts has the highest score already. Each task is asked without examples (zero-shot) and with
             training examples in the prompt (few-shot); sentiment also with calibrated labels, and by a linear probe
             that sees the training examples of LoRA's trial with the same seed. Numbers of examples, calibration and
             penalties are chosen on the validation part. Each has a control that can refute it: examples with random
             answers, and a probe that learned shuffled labels. On two cores it takes half an hour.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from lora_lab.ablation import studies
from lora_lab.ablation.compare import last_rows
from lora_lab.ablation.grid import Trial
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.stats import interval
from lora_lab.costs.fake import Factory
from lora_lab.methods import FullFineTuning, LoRA, Method
from lora_lab.models.llama import Llama
from lora_lab.models.pretrained import SMOLLM2, load_pretrained
from lora_lab.studies.recorder import Case, Recorder, Row, record_trials
from lora_lab.system.schema import plain
from lora_lab.task import Task
from lora_lab.tasks import TASKS
from lora_lab.tasks.datasets import style
from lora_lab.tasks.elicitation import CONTENT_FREE, PENALTIES, calibrate, content_free, few_shot, linear_probe
from lora_lab.tasks.generate import answers, classes, last_states, log_likelihoods
from lora_lab.tasks.instruction import PairTask
from lora_lab.tasks.metrics import METRICS, StyleJudge, score, trivial
from lora_lab.train import DataOrder, evaluate

SCRATCH = "scratch"
SETUPS: dict[str, Method] = {"full": FullFineTuning(), "LoRA r=8": LoRA(8, 16), SCRATCH: FullFineTuning()}
FROM_SCRATCH = ("sentiment",)  # tasks that are also learned from scratch
SHOWN = 3  # answers per method in the record
_LOSSES = ("validation_loss", "off_domain_loss", "test_loss")


def start_from_random(seed: int, device: torch.device) -> Factory:
    """Return what makes a model of the language model's shape with random weights, the same for each seed."""
    return partial(studies.random_init, device)


@dataclass(frozen=True)
class Plan:
    """How much is trained.

    Args:
        steps: of each task.
        lrs: the learning rates to try for each setup.
        seeds: how many seeds; the first chooses the rates.
        batch_size: of a trial.
        eval_examples: how many examples of each part the losses are of, from its first.
    """

    steps: Mapping[str, int]
    lrs: Mapping[str, tuple[float, ...]]
    seeds: int
    batch_size: int
    eval_examples: int

    def trial(self, task: str, setup: str) -> Trial:
        """Return a setup's trial, evaluated before and after training; rate and seed are to be filled in."""
        steps = self.steps[task]
        options: dict[str, Any] = {"steps": steps, "eval_every": steps, "batch_size": self.batch_size}
        return Trial(SETUPS[setup], self.lrs[setup][0], eval_examples=self.eval_examples, **options)

    def case(self, task: str) -> Case:
        """Return what is trained on a task."""
        lrs = {setup: rates for setup, rates in self.lrs.items() if setup != SCRATCH or task in FROM_SCRATCH}
        return Case(
            {"about": "result", "task": task},
            {setup: self.trial(task, setup) for setup in lrs},
            lrs,
            range(1),
            range(1, self.seeds),
            partial(load_task_of_seed, task),
            {SCRATCH: start_from_random},
            options={"judge": judge},
            shared=True,
        )


def plan(device: torch.device) -> Plan:
    """Return what two cores can do in a few hours, or a GPU in one."""
    if device.type == "cuda":
        steps = {"sentiment": 207, "summarise": 226, "style": 81, "style-plain": 81}
        steps |= {f"translate-{language}": 279 for language in ("fr", "de", "es")}
        lrs = {"full": (1e-5, 3e-5, 1e-4, 3e-4), "LoRA r=8": (2e-4, 6e-4, 2e-3, 6e-3)}
        lrs[SCRATCH] = (1e-4, 3e-4, 1e-3, 3e-3)
        return Plan(steps, lrs, seeds=5, batch_size=8, eval_examples=128)
    steps = {"sentiment": 50, "translate-fr": 50, "style": 27, "summarise": 25}
    lrs = {"full": (3e-5, 1e-4, 3e-4), "LoRA r=8": (6e-4, 2e-3, 6e-3), SCRATCH: (1e-4, 3e-4, 1e-3)}
    return Plan(steps, lrs, seeds=3, batch_size=8, eval_examples=32)


def describe_downstream(device: torch.device) -> dict[str, Any]:
    """Return how the rows are made, as the record states it."""
    planned = plan(device)
    lrs = {setup: list(rates) for setup, rates in planned.lrs.items()}
    task = next(iter(planned.steps))
    setups = {setup: planned.trial(task, setup).to_dict()["method"] for setup in lrs}
    return {**asdict(planned), "lrs": lrs, "setups": setups}


def record_downstream(device: torch.device, folder: Path) -> Iterator[Row]:
    """Yield the rows of a record; ``about`` names what a row is about.

    "task": a task and its size. "result": losses and scores of one setup and seed at the setup's chosen rate, with the
    commit of the code that ran; the setups "trivial" and "zero-shot" have no seed. "tuning": the same at the rates that
    were not chosen. "answer": the answer to a prompt of the test part, after training with seed 0.
    """
    planned = plan(device)
    for name in planned.steps:
        yield from _task_rows(planned, name, device, folder)


def load_task(name: str) -> PairTask:
    """Return a downstream task for the real model."""
    return cast(PairTask, TASKS[name](load_pretrained(SMOLLM2)[1]))


def load_task_of_seed(name: str, seed: int) -> PairTask:
    """Return the task, which is the same for each seed."""
    return load_task(name)


def evaluate_answers(model: nn.Module, task: PairTask) -> tuple[dict[str, float], list[str]]:
    """Return the scores on the test part, and the first answers of that part."""
    predictions = answers(cast(Llama, model), task)
    return scores(task, predictions) | _plain_loss(model, task), predictions[:SHOWN]


def scores(task: PairTask, predictions: list[str]) -> dict[str, float]:
    """Return the scores of answers to the test part; for stories, the share that a classifier takes for the log."""
    if task.metric in METRICS:
        return score(task, predictions)
    return {"in_style": _style_judge(task).share(predictions)}


def _style_judge(task: PairTask) -> StyleJudge:
    return StyleJudge(style(task.tokenizer), style(task.tokenizer, "plain"))


def _plain_loss(model: nn.Module, task: PairTask) -> dict[str, float]:
    """Return for stories the test loss on the same stories in plain style, which grows as the style replaces it."""
    if task.metric in METRICS:
        return {}
    return {"plain_loss": evaluate(model, style(task.tokenizer, "plain"), "test")}


def judge(model: nn.Module, task: Task) -> dict[str, float | str]:
    """Return the scores and answers of a trial, as its file stores them: by name, in one dict."""
    test_scores, predictions = evaluate_answers(model, cast(PairTask, task))
    return test_scores | {f"prediction_{i}": prediction for i, prediction in enumerate(predictions)}


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
    yield from _train_rows(planned, name, task, device, folder)


def _zero_shot_rows(planned: Plan, name: str, task: PairTask, device: torch.device) -> Iterator[Row]:
    model = studies.language_model(device)
    result: dict[str, Any] = {"about": "result", "task": name, "setup": "zero-shot"}
    for part in ("validation", "off_domain", "test"):
        result[f"{part}_loss"] = evaluate(model, task, part, planned.batch_size, planned.eval_examples)
    test_scores, predictions = evaluate_answers(model, task)
    yield result | test_scores
    yield from _answer_rows(result, task, predictions)


def _train_rows(planned: Plan, name: str, task: PairTask, device: torch.device, folder: Path) -> Iterator[Row]:
    """Yield the rows of all trials: all rates with seed 0, then the best rate of each setup with the other seeds."""
    columns = ("about", "task", "setup", "lr", "seed", "outcome", "reason", *_LOSSES, "trainable_parameters", "commit")
    for frame in planned.case(name).run(device, folder):
        for trial in last_rows(frame).to_dict("records"):
            names = [str(column) for column in trial]
            scored = {column.removeprefix(SCORE): trial[column] for column in names if column.startswith(SCORE)}
            predictions = [scored.pop(f"prediction_{i}", None) for i in range(SHOWN)]
            row = {column: trial[column] for column in columns} | scored
            yield plain(row if trial["chosen"] else row | {"about": "tuning"})
            if trial["chosen"] and trial["seed"] == 0:
                yield from _answer_rows(row, task, predictions)


def _answer_rows(result: Mapping[str, Any], task: PairTask, predictions: list[str]) -> Iterator[Row]:
    """A row for each answer of a result, with its prompt and reference."""
    for pair, prediction in zip(task.pairs["test"], predictions, strict=False):
        shared = {"about": "answer", "task": result["task"], "setup": result["setup"]}
        yield {**shared, "prompt": pair.prompt, "reference": pair.answer, "prediction": prediction}


def tell_downstream(row: dict[str, Any]) -> str | None:
    """Return a row as a line for people; None for an answer."""
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


DOWNSTREAM = record_trials("downstream", describe_downstream, record_downstream, tell_downstream)


# Elicitation

MAIN = {"classification": "accuracy", "summary": "rouge_l", "translation": "chrf"}
RESAMPLES = 500
Predictions = Mapping[str, Sequence[str]]  # part -> an answer to each of its prompts, from the first
Answered = tuple[Row, Predictions]  # columns of a row, and what it is of


# Task -> the numbers of examples in the prompt to choose from; and how many sets of examples are drawn for each.
SHOTS = {"sentiment": (8, 16), "translate-fr": (16,), "summarise": (8,)}
DRAWS = {"sentiment": 3, "translate-fr": 3, "summarise": 2}
CHOSEN_ON = 16  # validation prompts that choose, where answers are written; all where a label is picked
SHUFFLES = 20  # probes that learn shuffled labels


def describe_elicitation(device: torch.device) -> dict[str, Any]:
    """Return how the rows are made, as the record states it; the same on every device."""
    shots = {task: list(numbers) for task, numbers in SHOTS.items()}
    asked = {"shots": shots, "draws": DRAWS, "chosen_on": CHOSEN_ON, "shuffles": SHUFFLES}
    return asked | {"content_free": list(CONTENT_FREE), "penalties": list(PENALTIES)}


def record_elicitation(device: torch.device) -> Iterator[Row]:
    """Yield the rows of a record; ``about`` names what a row is about.

    "task": a task and its size. "result": the scores of one setup on the test part, with the two-sided 95 % interval of
    the main one by a bootstrap over the test prompts, and the main score on the validation part. The setups are
    "zero-shot", "few-shot" with ``k`` examples, and "probe"; ``calibration`` names the reference of calibrated labels,
    ``seed`` draws the examples, or is that of the trial whose training examples the probe sees, and ``control`` is true
    where the answers of the examples are random, or the labels shuffled.
    """
    model = studies.language_model(device)
    for name in SHOTS:
        task = load_task(name)
        sizes = {part: len(examples) for part, examples in task.parts.items()}
        yield {"about": "task", "task": name, "metric": task.metric, **sizes, "fingerprint": task.fingerprint}
        for columns, predictions in _ask(name, task, model):
            yield _result(task, columns, predictions)
        if task.metric == "classification":
            for columns, predictions in _probe(name, task, model, device):
                yield _result(task, columns, predictions)


def _ask(name: str, task: PairTask, model: nn.Module) -> Iterator[Answered]:
    """Yield zero-shot, few-shot, and the control at the number of examples that is best on the validation part."""
    yield from _answer(task, model, 0, 0)
    scores: dict[tuple[int, str], list[float]] = {}  # (number of examples, calibration) -> on the validation part
    for k in SHOTS[name]:
        for seed in range(DRAWS[name]):
            for columns, predictions in _answer(task, model, k, seed):
                on_validation = _main_score(task, "validation", predictions)
                scores.setdefault((k, columns["calibration"]), []).append(on_validation)
                yield columns, predictions
    best, _ = max(scores, key=lambda setup: sum(scores[setup]))
    for seed in range(DRAWS[name]):
        yield from _answer(task, model, best, seed, control=True)


def _answer(task: PairTask, model: nn.Module, k: int, seed: int, control: bool = False) -> Iterator[Answered]:
    """Yield what the model answers after k examples; for a classification, also with calibrated labels."""
    asked = few_shot(task, k, seed, random_answers=control) if k else task
    columns = {"setup": "few-shot" if k else "zero-shot", "k": k, "seed": seed, "control": control}
    if task.metric != "classification":
        limits = {"validation": CHOSEN_ON, "test": None}
        written = {part: answers(model, asked, part, limit=limit) for part, limit in limits.items()}
        yield {**columns, "calibration": ""}, written
        return
    labels = classes(task)
    scores = {part: log_likelihoods(model, asked, asked.pairs[part], labels) for part in ("validation", "test")}
    references = {
        "content-free": log_likelihoods(model, asked, content_free(asked), labels),
        "validation texts": scores["validation"],
    }
    for calibration in ("", *references):
        picked = {}
        for part, likelihoods in scores.items():
            compared = calibrate(likelihoods, references[calibration]) if calibration else likelihoods  # (n, labels)
            best: list[int] = compared.argmax(1).tolist()  # (n,)
            picked[part] = [labels[i] for i in best]
        yield {**columns, "calibration": calibration}, picked


def _probe(name: str, task: PairTask, model: nn.Module, device: torch.device) -> Iterator[Answered]:
    """Yield linear probes on the training examples that the trials of ``downstream`` see, and on shuffled labels."""
    trials = plan(device)
    states = {part: last_states(model, task, task.pairs[part]) for part in ("train", "validation", "test")}
    labels = {part: [pair.answer for pair in task.pairs[part]] for part in states}
    for control, seeds in ((False, trials.seeds), (True, SHUFFLES)):
        for seed in range(seeds):
            seen = DataOrder(len(task.train), seed).rows(0, trials.steps[name] * trials.batch_size).unique()
            learned = [labels["train"][i] for i in seen.tolist()]
            if control:
                random.Random(seed).shuffle(learned)
            probe = linear_probe(states["train"][seen], learned, states["validation"], labels["validation"])
            columns = {"setup": "probe", "seed": seed, "control": control, "examples": len(seen)}
            columns["penalty"] = probe[-1].get_params()["C"]
            yield columns, {part: list(probe.predict(states[part].numpy())) for part in ("validation", "test")}


def _result(task: PairTask, columns: Mapping[str, Any], predictions: Predictions) -> dict[str, Any]:
    texts, references = predictions["test"], [pair.answer for pair in task.pairs["test"]]
    generator, samples, main = np.random.default_rng(0), [], MAIN[task.metric]
    for _ in range(RESAMPLES):
        drawn: list[int] = generator.integers(len(texts), size=len(texts)).tolist()
        samples.append(METRICS[task.metric]([texts[i] for i in drawn], [references[i] for i in drawn])[main])
    lower, upper = interval(np.array(samples))
    result = {"about": "result", "task": task.name, **columns, **score(task, texts)}
    return result | {"lower": lower, "upper": upper, "validation": _main_score(task, "validation", predictions)}


def _main_score(task: PairTask, part: str, predictions: Predictions) -> float:
    return score(task, predictions[part], part)[MAIN[task.metric]]


def tell_elicitation(row: dict[str, Any]) -> str:
    """Return a row as a line for people."""
    if row["about"] == "task":
        return f"{row['task']}: {row['test']} test prompts"
    names = [row["setup"]]
    if row.get("k"):
        names.append(f"{row['k']} examples")
    if row.get("calibration"):
        names.append(f"calibrated on {row['calibration']}")
    if row["control"]:
        names.append("control")
    numbers = [name for name in (*MAIN.values(), "validation") if name in row]
    texts = "  ".join(f"{name} {row[name]:.3f}" for name in numbers)
    return f"  {', '.join(names)}, seed {row['seed']}: {texts} ({row['lower']:.3f} to {row['upper']:.3f})"


ELICITATION = Recorder(describe_elicitation, record_elicitation, tell_elicitation)
