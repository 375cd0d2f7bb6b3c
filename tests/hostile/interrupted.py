"""Saves and runs that are stopped: by a kill, by Ctrl-C, by a full disk, by another process in the same folder.

What was there before must be there after, or what was to come, whole; and a run that is started again must end as one
that was never stopped. An audit hook of Python stops a call at its n-th operation on files, so that a case is the same
each time. ``tests/guards/test_kills.py`` stops saves at random moments.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_lab import (
    Llama,
    LoRA,
    Trial,
    ablate,
    ablation,
    adapters,
    fit,
    load_adapter,
    load_pretrained,
    save_adapter,
    save_model,
)
from lora_lab.models.digits import DigitsMLP
from lora_lab.system.files import read_json, write_json
from lora_lab.task import Task
from lora_lab.tasks import digits
from tests.helpers import randomise
from tests.hostile.core import Case
from tests.hostile.material import CONFIG, TEMPLATE, tokenizer
from tests.hostile.values import Values

_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.chmod", "fcntl.flock")
_GROWING = ("open", "os.mkdir", "os.rename")  # which a full disk refuses


class Trap:
    """Does something at the n-th operation on files from now on."""

    def __init__(self) -> None:
        self.action: Callable[[], Any] | None = None
        self.left = 0
        self.growing = False

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.action is not None and event in (_GROWING if self.growing else _OPERATIONS):
            if self.growing and event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            self.left -= 1
            if self.left < 0:
                action, self.action = self.action, None
                action()


_TRAP = Trap()


@dataclass
class Saver:
    """Something that is saved in two versions, and how to see which of them is there.

    Args:
        save: writes the version of that number, 0 or 1, to a folder.
        version: reads the folder, and returns the number; raises ValueError if it is neither.
        operations: on files, of one save.
    """

    save: Callable[[int, Path], Any]
    version: Callable[[Path], int]
    operations: int = 0


@dataclass
class Material:
    """What is saved, the task of runs, and what they end with."""

    savers: dict[str, Saver]
    task: Task
    trials: list[Trial]
    weights: dict[str, torch.Tensor]
    losses: list[float]


def prepare(folder: Path, values: Values) -> Material:
    """Each call once, undisturbed."""
    sys.addaudithook(_TRAP.hook)
    savers = {"adapter": _adapters(), "model": _models(), "gguf": _ggufs(), "json": _documents()}
    for name, saver in savers.items():
        for number in (0, 1):
            saver.save(number, folder / name)
            assert saver.version(folder / name) == number
        saver.operations = _counted(partial(saver.save, 0, folder / name))
    task = digits().limited(16)
    trials = [Trial(LoRA(2), 1e-2, seed=seed, steps=2, eval_examples=4) for seed in range(2)]
    model = DigitsMLP(width=8)
    _run(model, task, folder / "run")
    losses = _losses(_ablate(task, trials, folder / "sweep"))
    return Material(savers, task, trials, model.state_dict(), losses)


def _counted(call: Callable[[], Any]) -> int:
    _TRAP.left, _TRAP.action = 10**6, lambda: None
    call()
    count, _TRAP.action = 10**6 - _TRAP.left, None
    return count


def _adapters() -> Saver:
    """Two adapters of equal shapes."""

    def adapted(number: int) -> DigitsMLP:
        model = DigitsMLP(width=8)
        LoRA(2, alpha=4.0 + number).prepare(model, number)
        return randomise(model, seed=number)

    models = [adapted(0), adapted(1)]

    def version(folder: Path) -> int:
        state = adapters.read_adapter(folder)
        load_adapter(DigitsMLP(width=8), folder)
        return _matching(
            state["hidden1.lora_A"], [model.hidden1.lora_A for model in models], int(state["hidden1.alpha"]) - 4
        )

    return Saver(lambda number, folder: save_adapter(models[number], folder, base=str(number)), version)


def _matching(value: torch.Tensor, values: list[torch.Tensor], number: int) -> int:
    """The number, if the value is that of the same number."""
    if not torch.equal(value, values[number].detach()):
        raise ValueError("it is a mixture of two saves")
    return number


def _of_model(load: Callable[[Path], Any], save: Callable[[Any, Path, Any], Any]) -> Saver:
    """Two models of equal shapes, with other positions and another template."""
    models = [Llama(replace(CONFIG, rope_theta=1e4 * (1 + number)), seed=number).eval() for number in (0, 1)]

    def tokens(number: int) -> Any:
        both = tokenizer()
        both.chat_template = f"{number}{TEMPLATE}"
        return both

    def version(folder: Path) -> int:
        model, loaded = load(folder)
        number = int(model.config.rope_theta / 1e4) - 1
        if loaded.chat_template[0] != str(number):
            raise ValueError("it is a mixture of two saves")
        return _matching(model.lm_head.weight, [each.lm_head.weight for each in models], number)

    return Saver(lambda number, folder: save(models[number], folder, tokens(number)), version)


def _models() -> Saver:
    return _of_model(partial(load_pretrained, device="cpu"), save_model)


def _ggufs() -> Saver:
    return _of_model(
        lambda folder: load_pretrained(folder / "m.gguf", device="cpu"),
        lambda model, folder, tokens: save_model(model, folder / "m.gguf", tokens, "gguf", "f32"),
    )


def _documents() -> Saver:
    def version(folder: Path) -> int:
        (number,) = set(read_json(folder / "x.json"))
        return number

    return Saver(lambda number, folder: write_json(folder / "x.json", 3000 * [number]), version)


def case(rng: random.Random, folder: Path, material: Material) -> Case:
    """A save or a run that is stopped, or two at once."""
    return rng.choice((_save, _save, _save, _both_save, _fit, _fit, _sweep, _both_run))(rng, folder, material)


def _save(rng: random.Random, folder: Path, material: Material) -> Case:
    """A save over an older one."""
    name = rng.choice(list(material.savers))
    saver = material.savers[name]
    place = folder / "folder"
    if old := rng.random() < 0.9:
        saver.save(0, place)
        (place / "notes.txt").write_text("the user's own")
    how, what = _stop(rng, saver.operations)

    def wrong(_: object = None) -> Iterator[str]:
        try:
            saver.version(place)
        except (ValueError, OSError) as error:
            if old:
                yield f"neither the old one is there nor the new one: {error}"
        if old and (place / "notes.txt").read_text() != "the user's own":
            yield "a file of the user has changed"
        saver.save(1, place)
        if saver.version(place) != 1:
            yield "the next save is not there"
        if hidden := [path.name for path in place.iterdir() if path.name.startswith(".")]:
            yield f"the next save leaves {hidden}"

    return Case(f"save of {name}, {what}", partial(how, partial(saver.save, 1, place)), wrong, wrong, complaint="lost")


def _stop(rng: random.Random, operations: int) -> tuple[Callable[[Callable[[], Any]], Any], str]:
    """A function that runs a call and stops it, and its description."""
    number, kind = (
        rng.randrange(operations + 2),
        rng.choice(("kill", "kill", "interrupt", "full", "large", "terminate")),
    )
    size = rng.choice((0, 10, 100, 1000, 3000, 10_000, 30_000, 100_000))
    stops: dict[str, Callable[[Callable[[], Any]], Any]] = {
        "kill": partial(_killed, number, signal.SIGKILL),
        "terminate": partial(_killed, number, signal.SIGTERM),
        "interrupt": partial(_interrupted, number),
        "full": partial(_full, number),
        "large": partial(_large, size),
    }
    return stops[
        kind
    ], f"{kind} at {size} bytes" if kind == "large" else f"{kind} at operation {number} of {operations}"


def _killed(number: int, sent: signal.Signals, call: Callable[[], Any]) -> None:
    """Run the call in a process that is killed at an operation."""

    def kill() -> None:
        os.kill(os.getpid(), sent)

    def in_child() -> None:
        _TRAP.left, _TRAP.action = number, kill
        call()

    os.waitpid(_forked(in_child), 0)


def _forked(call: Callable[[], Any]) -> int:
    """A process that makes the call; its exit status is 1 after an error."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        call()
        status = 0
    finally:
        os._exit(status)


def _interrupted(number: int, call: Callable[[], Any]) -> None:
    """Run the call until Ctrl-C."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    _TRAP.left, _TRAP.action = number, interrupt
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        _TRAP.action = None


def _full(number: int, call: Callable[[], Any]) -> None:
    """Run the call on a disk that is full from an operation on."""

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    _TRAP.left, _TRAP.action, _TRAP.growing = number, full, True
    try:
        call()
    finally:
        _TRAP.action, _TRAP.growing = None, False


def _large(size: int, call: Callable[[], Any]) -> None:
    """Run the call where no file can have more bytes, whichever library writes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _both_save(rng: random.Random, folder: Path, material: Material) -> Case:
    """Two processes save to one folder, or one saves while this one reads."""
    name = rng.choice(list(material.savers))
    saver, place = material.savers[name], folder / "folder"
    saver.save(0, place)
    second, delay = rng.choice((0, 1)), rng.choice((0, 0.001, 0.003))

    def call() -> list[int]:
        children = [_forked(partial(saver.save, 1, place))]
        time.sleep(delay)
        if reads := second == 0:
            saver.version(place)
        else:
            children.append(_forked(partial(saver.save, 0, place)))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        if reads and saver.version(place) != 1:
            raise AssertionError("the save has ended, and is not there")
        return codes

    def wrong(codes: list[int]) -> Iterator[str]:
        if any(codes):
            yield "a save failed because of another one"
        saver.version(place)
        if hidden := [path.name for path in place.iterdir() if path.name.startswith(".")]:
            yield f"two saves leave {hidden}"

    return Case(f"two at once, {name}, {second}, {delay}", call, wrong, complaint="lost", good=True)


def _run(model: DigitsMLP, task: Task, folder: Path) -> Any:
    options: dict[str, Any] = {"steps": 3, "lr": 1e-2, "batch_size": 4, "eval_examples": 4, "progress": False}
    return fit(model, task, LoRA(2), checkpoint_dir=folder, checkpoint_every=1, **options)


def _fit(rng: random.Random, folder: Path, material: Material) -> Case:
    """A run that is stopped once or twice, and started again."""
    stops = [_stop(rng, 30) for _ in range(rng.choice((1, 1, 2)))]

    def call() -> None:
        for how, _ in stops:
            how(lambda: _run(DigitsMLP(width=8), material.task, folder / "run"))

    def wrong(_: object = None) -> Iterator[str]:
        model = DigitsMLP(width=8)
        _run(model, material.task, folder / "run")
        if not all(torch.equal(value, material.weights[name]) for name, value in model.state_dict().items()):
            yield "the run ended with other weights"

    what = "; ".join(what for _, what in stops)
    return Case(f"fit, {what}", call, wrong, wrong, complaint="lost")


def _ablate(task: Task, trials: list[Trial], folder: Path) -> Any:
    """One after another, because trials in one pass are equal to these up to rounding only."""
    return ablate(DigitsMLP(width=8), task, trials, folder, engine="separate", progress=False)


def _losses(table: Any) -> list[float]:
    return table.sort_values(["key", "step"]).validation_loss.tolist()


def _sweep(rng: random.Random, folder: Path, material: Material) -> Case:
    """A sweep that is stopped, and started again."""
    how, what = _stop(rng, 60)
    run = partial(_ablate, material.task, material.trials, folder / "sweep")

    def wrong(_: object = None) -> Iterator[str]:
        before = {path.name: path.read_bytes() for path in (folder / "sweep").glob("*.json")}
        if _losses(run()) != material.losses:
            yield "the sweep ended with another table"
        if not all((folder / "sweep" / name).read_bytes() == content for name, content in before.items()):
            yield "a trial that had ended was run again"

    return Case(f"sweep, {what}", partial(how, run), wrong, wrong, complaint="lost")


def _both_run(rng: random.Random, folder: Path, material: Material) -> Case:
    """The same sweep twice at once in one folder."""
    run = partial(_ablate, material.task, material.trials, folder / "sweep")

    def call() -> Any:
        child = _forked(run)
        time.sleep(rng.choice((0, 0.01, 0.03)))
        table = run()
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise AssertionError("the other process failed")
        return table

    def wrong(table: Any) -> Iterator[str]:
        if _losses(table) != material.losses or _losses(ablation.load(folder / "sweep")) != material.losses:
            yield "the table is another one"

    return Case("two sweeps at once", call, wrong, complaint="lost", good=True)
