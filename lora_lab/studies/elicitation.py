"""``lora-lab record elicitation``: how much of what fine-tuning scores can the real model do untrained, if asked well?

The tasks, the test prompts and the scores are those of ``downstream``, but for the style, where one answer to all
prompts has the highest score already. Each task is asked without examples (zero-shot) and with training examples in the
prompt (few-shot); sentiment also with calibrated labels, and by a linear probe that sees the training examples of
LoRA's trial with the same seed. Numbers of examples, calibration and penalties are chosen on the validation part. Each
has a control that can refute it: examples with random answers, and a probe that learned shuffled labels.

On two cores it takes half an hour.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_lab.ablation import studies
from lora_lab.ablation.stats import interval
from lora_lab.studies import downstream
from lora_lab.studies.recorder import Recorder
from lora_lab.tasks.elicitation import CONTENT_FREE, PENALTIES, calibrated, content_free, few_shot, linear_probe
from lora_lab.tasks.generate import answers, classes, last_states, log_likelihoods
from lora_lab.tasks.instruction import PairTask
from lora_lab.tasks.metrics import METRICS, score
from lora_lab.train import DataOrder

MAIN = {"classification": "accuracy", "summary": "rouge_l", "translation": "chrf"}
RESAMPLES = 500
Predictions = Mapping[str, Sequence[str]]  # part -> an answer to each of its prompts, from the first


@dataclass(frozen=True)
class Plan:
    """How the model is asked.

    Args:
        shots: task -> the numbers of examples in the prompt to choose from.
        draws: task -> how many sets of examples are drawn for each number, and for the control at the chosen one.
        chosen_on: how many validation prompts the numbers of examples are chosen on, where answers are written; all
            of them where a label is picked.
        shuffles: how many probes learn shuffled labels.
    """

    shots: Mapping[str, tuple[int, ...]]
    draws: Mapping[str, int]
    chosen_on: int = 16
    shuffles: int = 20


def plan(device: torch.device) -> Plan:
    """The same on every device."""
    shots = {"sentiment": (8, 16), "translate-fr": (16,), "summarise": (8,)}
    return Plan(shots, {"sentiment": 3, "translate-fr": 3, "summarise": 2})


def settings(device: torch.device) -> dict[str, Any]:
    """How the rows are made, as the record states it."""
    planned = asdict(plan(device))
    shots = {task: list(numbers) for task, numbers in planned["shots"].items()}
    return {**planned, "shots": shots, "content_free": list(CONTENT_FREE), "penalties": list(PENALTIES)}


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """The rows of a record; ``about`` names what a row is about.

    "task": a task and its size. "result": the scores of one setup on the test part, with the two-sided 95 % interval of
    the main one by a bootstrap over the test prompts, and the main score on the validation part. The setups are
    "zero-shot", "few-shot" with ``k`` examples, and "probe"; ``calibration`` names the reference of calibrated labels,
    ``seed`` draws the examples, or is that of the trial whose training examples the probe sees, and ``control`` is true
    where the answers of the examples are random, or the labels shuffled.
    """
    planned, model = plan(device), studies.language_model(device)
    for name in planned.shots:
        task = downstream.load_task(name)
        sizes = {part: len(examples) for part, examples in task.parts.items()}
        yield {"about": "task", "task": name, "metric": task.metric, **sizes, "fingerprint": task.fingerprint}
        for columns, predictions in _asked(planned, name, task, model):
            yield _result(task, columns, predictions)
        if task.metric == "classification":
            for columns, predictions in _probed(planned, name, task, model, device):
                yield _result(task, columns, predictions)


def _asked(planned: Plan, name: str, task: PairTask, model: nn.Module) -> Iterator[tuple[dict[str, Any], Predictions]]:
    """Zero-shot, few-shot, and the control at the number of examples that is best on the validation part."""
    yield from _answered(planned, task, model, 0, 0)
    scores: dict[tuple[int, str], list[float]] = {}  # (number of examples, calibration) -> on the validation part
    for k in planned.shots[name]:
        for seed in range(planned.draws[name]):
            for columns, predictions in _answered(planned, task, model, k, seed):
                on_validation = _main_score(task, "validation", predictions)
                scores.setdefault((k, columns["calibration"]), []).append(on_validation)
                yield columns, predictions
    best, _ = max(scores, key=lambda setup: sum(scores[setup]))
    for seed in range(planned.draws[name]):
        yield from _answered(planned, task, model, best, seed, control=True)


def _answered(
    planned: Plan, task: PairTask, model: nn.Module, k: int, seed: int, control: bool = False
) -> Iterator[tuple[dict[str, Any], Predictions]]:
    """What the model answers after k examples; for a classification, also with calibrated labels."""
    asked = few_shot(task, k, seed, random_answers=control) if k else task
    columns = {"setup": "few-shot" if k else "zero-shot", "k": k, "seed": seed, "control": control}
    if task.metric != "classification":
        limits = {"validation": planned.chosen_on, "test": None}
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
            compared = calibrated(likelihoods, references[calibration]) if calibration else likelihoods  # (n, labels)
            best: list[int] = compared.argmax(1).tolist()  # (n,)
            picked[part] = [labels[i] for i in best]
        yield {**columns, "calibration": calibration}, picked


def _probed(
    planned: Plan, name: str, task: PairTask, model: nn.Module, device: torch.device
) -> Iterator[tuple[dict[str, Any], Predictions]]:
    """Linear probes on the training examples that the trials of ``downstream`` see, and on shuffled labels."""
    trials = downstream.plan(device)
    states = {part: last_states(model, task, task.pairs[part]) for part in ("train", "validation", "test")}
    labels = {part: [pair.answer for pair in task.pairs[part]] for part in states}
    for control, seeds in ((False, trials.seeds), (True, planned.shuffles)):
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


def line(row: dict[str, Any]) -> str:
    """A row as a line for people."""
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


RECORDER = Recorder(settings, rows, line)
