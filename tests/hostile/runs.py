"""What we have written and read again: checkpoints, histories, records, results of a sweep, lessons, replies."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from lora_lab import History, LoRA, Trial, ablate, ablation, checkpoint, fit, records
from lora_lab.course.copies import copy_lessons
from lora_lab.course.learner import MANIFEST
from lora_lab.models.digits import DigitsMLP
from lora_lab.studies import submission
from lora_lab.task import IGNORE, Task
from lora_lab.tasks import digits
from lora_lab.tasks.base_text import SHIPPED, base_replies
from lora_lab.tasks.instruction import Padded
from tests.hostile.core import Case
from tests.hostile.damage import (
    damaged_bytes,
    damaged_json,
    damaged_safetensors,
    damaged_tree,
    replace_file,
    safetensors_parts,
)
from tests.hostile.material import SECRET
from tests.hostile.values import Values

STEPS = 3
CHECKPOINT = "checkpoint.safetensors"


class Stopped(Exception):
    """Ends a run after its first checkpoint."""


@dataclass
class Material:
    """Whole files, and what the run ends with that the checkpoint is of."""

    task: Task
    checkpoint: bytes
    history: Path
    record: Path
    sweep: Path
    trials: list[Trial]
    weights: dict[str, torch.Tensor]
    losses: list[float]
    values: Values


def prepare(folder: Path, values: Values) -> Material:
    """A run that was stopped at step 2, the same run to its end, a sweep of two trials, and a shipped record."""
    task = digits().limited(16)
    whole = net()
    history = _run(whole, task)
    history.save(folder / "history.json")

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise Stopped

    try:
        _run(net(), task, folder / "run", on_row=stop)
    except Stopped:
        content = (folder / "run" / CHECKPOINT).read_bytes()
    trials = [Trial(LoRA(2), 1e-2, steps=1), Trial(LoRA(2), 1e-2, seed=1, steps=1)]

    ablate(net(), task, trials, folder / "sweep", progress=False)
    record = min(records.shipped().glob("*.json"), key=lambda path: path.stat().st_size)
    shutil.copy(record, folder / record.name)
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    losses = [row["train_loss"] for row in history.rows]
    return Material(
        task, content, folder / "history.json", folder / record.name, folder / "sweep", trials, state, losses, values
    )


def net() -> DigitsMLP:
    """The same small net each time."""
    return DigitsMLP(width=8)


def _run(model: nn.Module, task: Task, folder: Path | None = None, **options: Any) -> History:
    settings: dict[str, Any] = {"steps": STEPS, "lr": 1e-2, "batch_size": 4, "progress": False, "eval_examples": 4}
    if folder is not None:
        settings |= {"checkpoint_dir": folder, "checkpoint_every": 1}
    return fit(model, task, LoRA(2), **settings, **options)


def case(rng: random.Random, folder: Path, material: Material) -> Case:
    """A damaged file, which is read as a user would."""
    several = 2 * (_checkpoint, _history, _sweep, _record)
    kind = rng.choice((*several, _trial, _replies, _lessons, _published))
    return kind(rng, folder, material)


def _checkpoint(rng: random.Random, folder: Path, material: Material) -> Case:
    """The run goes on from the damaged checkpoint, and must end as if it had not been stopped."""
    (folder / "run").mkdir()
    path, model = folder / "run" / CHECKPOINT, net()
    kind, signed = rng.choice(("bytes", "any", "history", "history", "file")), True
    if kind == "history":
        note, tensors = safetensors_parts(material.checkpoint)[0]["__metadata__"], load(material.checkpoint)
        text = bytes(tensors["history"].tolist()).decode()
        history = json.loads(text)
        if signed := rng.random() < 0.5:
            content, what = damaged_json(text, rng, material.values)
        else:  # without a checksum, as the first versions wrote it, so that only its form can be checked
            del note["sha256"]
            what = _rows_damaged(history, rng, material.values)
            content = json.dumps(history).encode()
        tensors["history"] = torch.tensor([*content], dtype=torch.uint8)
        path.write_bytes(save(tensors, note))
    elif kind == "file":
        path.write_bytes(material.checkpoint)
        what = replace_file(path, rng)
    else:
        damage = damaged_bytes(material.checkpoint, rng) if kind == "bytes" else None
        content, what = damage or damaged_safetensors(material.checkpoint, rng, material.values)
        path.write_bytes(content)
        signed = b"sha256" in content

    def wrong(history: History) -> Iterator[str]:
        if [row["step"] for row in history.rows] != list(range(STEPS + 1)):
            yield "the history has other steps"
        state = model.state_dict()
        if signed and not all(torch.equal(state[name], material.weights[name]) for name in state):
            yield "the run went on and ended with other weights"
        if signed and [row["train_loss"] for row in history.rows] != material.losses:
            yield "the run went on with another history"

    if rng.random() < 0.1:
        return Case(f"checkpoint: {what}", partial(checkpoint.step_of, folder / "run"))
    if rng.random() < 0.1:
        return Case(f"checkpoint: {what}", partial(checkpoint.stored_history, folder / "run"))
    return Case(f"checkpoint: {what}", partial(_run, model, material.task, folder / "run"), wrong)


def _rows_damaged(history: dict[str, Any], rng: random.Random, values: Values) -> str:
    """Rows that are gone, twice, in another order, of other steps, or of odd values."""
    rows, kind = history["rows"], rng.choice(("step", "gone", "twice", "order", "value", "tree"))
    row = rng.choice(rows)
    if kind == "step":
        row["step"] = rng.choice((-1, 100, 1.0, "1", None, values.json_value(rng)))
    elif kind == "gone":
        rows.remove(row)
    elif kind == "twice":
        rows.append(copy.deepcopy(row))
    elif kind == "order":
        rows.reverse()
    elif kind == "value":
        row[rng.choice(list(row))] = values.json_value(rng)
    else:
        changed, what = damaged_tree(history, rng, values)
        history.clear()
        history.update(changed)
        return what
    return f"rows: {kind} {row!r:.80}"


def _history(rng: random.Random, folder: Path, material: Material) -> Case:
    """A history, and all that one asks it."""
    history = json.loads(material.history.read_text())
    if rng.random() < 0.5:
        content, what = damaged_json(material.history.read_text(), rng, material.values)
    else:
        what = _rows_damaged(history, rng, material.values)
        content = json.dumps(history).encode()
    path = folder / "history.json"
    path.write_bytes(content)

    def wrong(history: History) -> Iterator[str]:
        history.frame()
        for column in ("train_loss", "validation_loss", "gap"):
            if not all(math.isfinite(value) for value in history.curve(column)[1]):
                yield f"{column} is not finite"
        if len(history.rows) > 1:
            if history.curve("validation_loss")[1]:
                assert history.best_step >= 0
            assert history.step_seconds >= 0

    return Case(f"history: {what}", partial(History.load, path), wrong)


def _record(rng: random.Random, folder: Path, material: Material) -> Case:
    """A record of a machine, which is loaded, or checked as one that somebody hands in."""
    content, what = damaged_json(material.record.read_text(encoding="utf-8"), rng, material.values)
    path = folder / material.record.name
    path.write_bytes(content)
    if rng.random() < 0.2:
        return Case(f"record: {what}", partial(submission.check, path))

    def wrong(record: records.Record) -> Iterator[str]:
        yield from _changed(json.loads(content), vars(record), "schema")
        if len(record.frame()) != len(record.rows):
            yield "the table has other rows"

    return Case(f"record: {what}", partial(records.load, path), wrong)


def _changed(content: dict[str, Any], accepted: dict[str, Any], *others: str) -> Iterator[str]:
    """Entries of which something else was accepted than the file says, or what is no number in JSON."""
    for name in content.keys() - set(others):
        if content[name] != json.loads(json.dumps(accepted.get(name))):
            yield f"{name} is not what the file says"
        if re.search(r"\b(NaN|Infinity)\b", json.dumps(content[name])):
            yield f"{name} holds what is no number"


def _sweep(rng: random.Random, folder: Path, material: Material) -> Case:
    """A result in the folder of a sweep that goes on, or that is made a table of."""
    sweep = shutil.copytree(material.sweep, folder / "sweep")
    path = rng.choice(sorted(sweep.glob("*.json")))
    result = json.loads(path.read_text())
    if rng.random() < 0.6:
        content, what = damaged_json(path.read_text(), rng, material.values)
    else:
        name = rng.choice(list(result))
        result[name] = rng.choice((material.values.json_value(rng), None, "done", "failed", "stopped", "banana", 1))
        what, content = f"{name} = {result[name]!r:.80}", json.dumps(result).encode()
    path.write_bytes(content)
    if rng.random() < 0.1:
        what = replace_file(path, rng)

    def wrong(table: Any) -> Iterator[str]:
        if not set(table.outcome) <= {"done", "failed", "stopped"}:
            yield "the table has an outcome that is none"
        done = table[table.outcome == "done"]
        last = done.groupby("key").step.idxmax().dropna()
        if not all(isinstance(value, float) and math.isfinite(value) for value in done.loc[last, "test_loss"]):
            yield "the table has a test loss that is no number"

    what = f"result: {what}"
    if rng.random() < 0.5:
        return Case(what, partial(ablation.load, sweep), wrong)
    return Case(what, partial(ablate, net(), material.task, material.trials, sweep, progress=False), wrong)


def _replies(rng: random.Random, folder: Path, material: Material) -> Case:
    """What a base model answered, on which forgetting is measured."""
    stored = json.loads(SHIPPED.read_text(encoding="utf-8"))
    stored["replies"] = stored["replies"][:3]
    content, what = damaged_json(json.dumps(stored), rng, material.values)
    path = folder / "replies.json"
    path.write_bytes(content)

    def wrong(examples: Padded) -> Iterator[str]:
        replies = json.loads(content)["replies"]
        if len(replies) != len(examples.inputs):
            yield "there are other replies than in the file"
        for reply, inputs, targets in zip(replies, examples.inputs, examples.targets, strict=False):
            ids, start = [*reply["prompt"], *reply["reply"]], len(reply["prompt"]) - 1
            if (
                inputs[: len(ids) - 1].tolist() != ids[:-1]
                or targets[start : len(ids) - 1].tolist() != ids[start + 1 :]
            ):
                yield "a reply has other tokens than in the file"
            if not bool((torch.cat([targets[:start], targets[len(ids) - 1 :]]) == IGNORE).all()):
                yield "tokens of a prompt count"

    return Case(f"replies: {what}", partial(base_replies, path), wrong)


def _lessons(rng: random.Random, folder: Path, material: Material) -> Case:
    """The list of what was written to a learner's folder, in which the learner has changed a lesson."""
    copy_lessons(folder, only=["01"])
    lesson = next(folder.glob("01*.ipynb"))
    lesson.write_text(SECRET)
    path = folder / MANIFEST
    content, what = damaged_json(path.read_text(encoding="utf-8"), rng, material.values)
    path.write_bytes(content)

    def lost(copied: object = None) -> Iterator[str]:
        if lesson.read_text() != SECRET:
            yield "the learner's lesson has changed"

    call = partial(copy_lessons, folder, rng.random() < 0.5, ["01"])
    return Case(f"lessons: {what}", call, lost, lost, complaint="lost")


def _published(rng: random.Random, folder: Path, material: Material) -> Case:
    """Numbers that others published."""
    path = folder / "published" / "litgpt.json"
    path.parent.mkdir()
    whole = records.shipped() / "published" / path.name
    content, what = damaged_json(whole.read_text(encoding="utf-8"), rng, material.values)
    path.write_bytes(content)

    def wrong(published: records.Published) -> Iterator[str]:
        yield from _changed(json.loads(content), vars(published))

    return Case(f"published: {what}", partial(records.published, "litgpt", folder), wrong)


def _trial(rng: random.Random, folder: Path, material: Material) -> Case:
    """A trial as data."""
    content, what = damaged_tree(material.trials[0].to_dict(), rng, material.values)

    def wrong(trial: Trial) -> Iterator[str]:
        if Trial.from_dict(trial.to_dict()).key != trial.key:
            yield "its content is that of another trial"
        given = {name: value for name, value in content.items() if value is not None}  # None is for a default
        yield from _changed(given, trial.to_dict(), "method")
        yield from _changed(content["method"], trial.to_dict()["method"])

    return Case(f"trial: {what}", partial(Trial.from_dict, content), wrong)
