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
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from lora_lab.ablation import materials
from lora_lab.ablation.compare import last_rows
from lora_lab.ablation.results import SCORE
from lora_lab.ablation.stats import interval
from lora_lab.methods import FullFineTuning, LoRA
from lora_lab.models.pretrained import SMOLLM2, load_pretrained
from lora_lab.studies.recorder import CurveSweep, Recorder, Row, evaluate_parts, plan_setups
from lora_lab.system.schema import plain
from lora_lab.task import Task
from lora_lab.tasks import TASKS
from lora_lab.tasks.datasets import style
from lora_lab.tasks.elicitation import calibrate, content_free, few_shot, linear_probe
from lora_lab.tasks.generate import answers, classes, last_states, log_likelihoods
from lora_lab.tasks.instruction import PairTask
from lora_lab.tasks.metrics import METRICS, StyleJudge, score, trivial
from lora_lab.train import DataOrder

SCRATCH = "scratch"
SETUPS = {"full": FullFineTuning(), "LoRA r=8": LoRA(8, 16), SCRATCH: FullFineTuning()}
SHOWN = 3  # answers per method in the record
_COLUMNS = (
    *("task", "setup", "lr", "seed", "outcome", "reason"),
    *("validation_loss", "off_domain_loss", "test_loss", "trainable_parameters", "commit"),
)


def plan(device: torch.device) -> dict[str, Any]:
    """Return what two cores can do in a few hours, or a GPU in one, as the record states it; one seed chooses."""
    stated = {"setups": {setup: method.settings() for setup, method in SETUPS.items()}, "batch_size": 8}
    if device.type == "cuda":
        steps = {"sentiment": 207, "summarise": 226, "style": 81, "style-plain": 81}
        steps |= {f"translate-{language}": 279 for language in ("fr", "de", "es")}
        lrs = {"full": [1e-5, 3e-5, 1e-4, 3e-4], "LoRA r=8": [2e-4, 6e-4, 2e-3, 6e-3]}
        lrs[SCRATCH] = [1e-4, 3e-4, 1e-3, 3e-3]
        return stated | {"steps": steps, "lrs": lrs, "seeds": 5, "eval_examples": 128}
    steps = {"sentiment": 50, "translate-fr": 50, "style": 27, "summarise": 25}
    lrs = {"full": [3e-5, 1e-4, 3e-4], "LoRA r=8": [6e-4, 2e-3, 6e-3], SCRATCH: [1e-4, 3e-4, 1e-3]}
    return stated | {"steps": steps, "lrs": lrs, "seeds": 3, "eval_examples": 32}


def plan_sweep(task: str, planned: Row, device: torch.device) -> CurveSweep:
    """Return what is trained on a task, and evaluated before and after training."""
    options = {name: planned[name] for name in ("batch_size", "eval_examples")} | {"steps": planned["steps"][task]}
    rates = {setup: lrs for setup, lrs in planned["lrs"].items() if setup != SCRATCH or task == "sentiment"}
    return CurveSweep(
        plan_setups({setup: (SETUPS[setup], lrs) for setup, lrs in rates.items()}, **options),
        *(range(1), range(1, planned["seeds"])),
        about={"task": task},
        task=partial(load_task, task),
        starts={SCRATCH: lambda seed: partial(materials.random_init, device, 0)},
        widen=0,
        options={"judge": judge},
        shared=True,
    )


def load_task(name: str) -> PairTask:
    """Return a downstream task for the real model."""
    return TASKS[name](load_pretrained(SMOLLM2)[1])


def judge(model: nn.Module, task: Task) -> dict[str, float | str]:
    """Return the scores on the test part, and the first answers of that part, by name."""
    task = cast(PairTask, task)
    predictions = answers(model, task)
    first = {f"prediction_{i}": prediction for i, prediction in enumerate(predictions[:SHOWN])}
    return {**scores(task, predictions), **first}


def scores(task: PairTask, predictions: list[str]) -> dict[str, float]:
    """Return the scores of answers to the test part; for stories, the share that a classifier takes for the log."""
    if task.metric in METRICS:
        return score(task, predictions)
    return {"in_style": StyleJudge(style(task.tokenizer), style(task.tokenizer, "plain")).share(predictions)}


def record_downstream(device: torch.device) -> Iterator[Row]:
    """Yield the rows of a record; ``about`` names what a row is about.

    "task": a task and its size. "result": losses and scores of one setup and seed at the setup's chosen rate, with the
    commit of the code that ran; the setups "trivial" and "zero-shot" have no seed. "tuning": the same at the rates that
    were not chosen. "answer": the answer to a prompt of the test part, after training with seed 0.
    """
    planned = plan(device)
    for name in planned["steps"]:
        task = load_task(name)
        yield describe_task(task, name)
        result = {"about": "result", "task": name}
        if task.metric in METRICS:
            yield {**result, "setup": "trivial", **scores(task, trivial(task))}
        model, result = materials.language_model(device), {**result, "setup": "zero-shot"}
        yield from _split(result | evaluate_parts(model, task, planned) | judge(model, task), task, answered=True)
        del model
        for frame in plan_sweep(name, planned, device).frames(device, Path("runs/record-downstream")):
            for trial in last_rows(frame).to_dict("records"):
                row = {"about": "result" if trial["chosen"] else "tuning"}
                row |= {name: trial[name] for name in _COLUMNS}
                row |= {str(name).removeprefix(SCORE): trial[name] for name in trial if str(name).startswith(SCORE)}
                yield from _split(row, task, answered=trial["chosen"] and trial["seed"] == 0)


def describe_task(task: PairTask, name: str) -> Row:
    """Return the row of a task and its size."""
    sizes = {part: len(examples) for part, examples in task.parts.items()}
    return {"about": "task", "task": name, **sizes, "fingerprint": task.fingerprint}


def _split(result: Row, task: PairTask, answered: bool) -> Iterator[Row]:
    """Yield a result without its answers, and if asked a row for each answer, with its prompt and reference."""
    predictions = [result.pop(f"prediction_{i}", None) for i in range(SHOWN)]
    yield plain(result)
    for pair, prediction in zip(task.pairs["test"], predictions if answered else (), strict=False):
        about = {"about": "answer", "task": result["task"], "setup": result["setup"]}
        yield about | {"prompt": pair.prompt, "reference": pair.answer, "prediction": prediction}


DOWNSTREAM = Recorder(plan, record_downstream)


# Elicitation

MAIN = {"classification": "accuracy", "summary": "rouge_l", "translation": "chrf"}
RESAMPLES = 500
# Task -> the numbers of examples in the prompt to choose from; and how many sets of examples are drawn for each.
SHOTS = {"sentiment": (8, 16), "translate-fr": (16,), "summarise": (8,)}
DRAWS = {"sentiment": 3, "translate-fr": 3, "summarise": 2}
# Validation prompts that choose, where answers are written; all where a label is picked.
CHOSEN_ON = 16
SHUFFLES = 20  # probes that learn shuffled labels


def record_elicitation(device: torch.device) -> Iterator[Row]:
    """Yield the rows of a record; ``about`` names what a row is about.

    "task": a task and its size. "result": the scores of one setup on the test part, with the two-sided 95 % interval of
    the main one by a bootstrap over the test prompts, and the main score on the validation part. The setups are
    "zero-shot", "few-shot" with ``k`` examples, and "probe"; ``calibration`` names the reference of calibrated labels,
    ``seed`` draws the examples, or is that of the trial whose training examples the probe sees, and ``control`` is true
    where the answers of the examples are random, or the labels shuffled.
    """
    model = materials.language_model(device)
    for name in SHOTS:
        task = load_task(name)
        yield describe_task(task, name)
        yield from _ask(name, task, model)
        if task.metric == "classification":
            yield from _probe(name, task, model, device)


def _ask(name: str, task: PairTask, model: nn.Module) -> Iterator[Row]:
    """Yield zero-shot, few-shot, and the control at the number of examples that is best on the validation part."""
    yield from _answer(task, model, 0, 0)
    scores = {}  # (number of examples, calibration) -> on the validation part
    for k, seed in product(SHOTS[name], range(DRAWS[name])):
        for row in _answer(task, model, k, seed):
            scores.setdefault((k, row["calibration"]), []).append(row["validation"])
            yield row
    best, _ = max(scores, key=lambda setup: sum(scores[setup]))
    for seed in range(DRAWS[name]):
        yield from _answer(task, model, best, seed, control=True)


def _answer(task: PairTask, model: nn.Module, k: int, seed: int, control: bool = False) -> Iterator[Row]:
    """Yield the results of what the model answers after k examples; of a classification also with calibrated labels."""
    asked = few_shot(task, k, seed, random_answers=control) if k else task
    about = {"setup": "few-shot" if k else "zero-shot", "k": k, "seed": seed, "control": control}
    if task.metric != "classification":
        limits = {"validation": CHOSEN_ON, "test": None}
        written = {part: answers(model, asked, part, limit=limit) for part, limit in limits.items()}
        yield _score(task, {**about, "calibration": ""}, written)
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
            picked[part] = [labels[int(best)] for best in compared.argmax(1)]
        yield _score(task, {**about, "calibration": calibration}, picked)


def _probe(name: str, task: PairTask, model: nn.Module, device: torch.device) -> Iterator[Row]:
    """Yield results of linear probes on the training examples that the trials of ``downstream`` see.

    Those of the controls have shuffled labels.
    """
    planned = plan(device)
    states = {part: last_states(model, task, task.pairs[part]) for part in ("train", "validation", "test")}
    labels = {part: [pair.answer for pair in task.pairs[part]] for part in states}
    examples = planned["steps"][name] * planned["batch_size"]
    for control, seeds in ((False, planned["seeds"]), (True, SHUFFLES)):
        for seed in range(seeds):
            seen = DataOrder(len(task.train), seed).rows(0, examples).unique()
            learned = [labels["train"][i] for i in seen.tolist()]
            if control:
                random.Random(seed).shuffle(learned)
            probe = linear_probe(states["train"][seen], learned, states["validation"], labels["validation"])
            found = {part: list(probe.predict(states[part].numpy())) for part in ("validation", "test")}
            yield _score(task, {"setup": "probe", "seed": seed, "control": control}, found)


def _score(task: PairTask, about: Row, predictions: Mapping[str, list[str]]) -> Row:
    """Return the result of predictions by part, for its prompts from the first on."""
    texts, references = predictions["test"], [pair.answer for pair in task.pairs["test"]]
    generator, samples, main = np.random.default_rng(0), [], MAIN[task.metric]
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(texts), size=len(texts)).tolist()
        samples.append(METRICS[task.metric]([texts[i] for i in drawn], [references[i] for i in drawn])[main])
    lower, upper = interval(np.array(samples))
    validation = score(task, predictions["validation"], "validation")[main]
    row = {"about": "result", "task": task.name, **about, **score(task, texts)}
    return row | {"lower": lower, "upper": upper, "validation": validation}


ELICITATION = Recorder(
    lambda device: plain({"shots": SHOTS, "draws": DRAWS, "chosen_on": CHOSEN_ON, "shuffles": SHUFFLES}),
    record_elicitation,
)
