"""``fit``: one loop that trains everything, so that every comparison is like for like.

Full fine-tuning, LoRA and its variants differ in one object, the method. Order of data, optimiser,
schedule and evaluation are the same code. A run stopped at any moment goes on where its last
checkpoint stands, and ends with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from lora_lab import lean as leanness
from lora_lab.files import atomic_file, read_json, write_json
from lora_lab.lean import FlatAdamW, InThreads, Lean
from lora_lab.methods import Method
from lora_lab.quantize import BlockWeight
from lora_lab.tasks.base import Examples, Loss, Task, bytes_of, cross_entropy

COLUMNS = ("step", "train_loss", "validation_loss", "off_domain_loss", "lr", "grad_norm", "seconds", "tokens")
_CHECKPOINT = "checkpoint.safetensors"
_ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")

Backward = Callable[[nn.Module, Loss, Sequence[tuple[Tensor, Tensor]], Sequence[float]], list[Tensor]]


class DivergedError(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass
class History:
    """What a run did, step by step.

    ``rows`` holds one dict a step with the keys of ``COLUMNS``; row 0 is the model before training. Losses
    are in nats (or the task's unit), ``seconds`` is the time of the step without evaluation, ``tokens``
    counts the task's unit. A loss that was not evaluated at a step is None.
    """

    task: dict[str, str]
    method: dict[str, Any]
    settings: dict[str, Any]
    trainable_parameters: int
    total_parameters: int
    optimizer_bytes: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def frame(self):
        """A pandas DataFrame, one row a step, one column for each of ``COLUMNS``."""
        import pandas

        return pandas.DataFrame(self.rows, columns=list(COLUMNS)).astype(dict.fromkeys(COLUMNS[1:-1], float))

    def curve(self, column: str) -> tuple[list[int], list[float]]:
        """Steps and values of one column, where it has values; or of "gap", the generalisation gap.

        The gap is the validation loss less the mean training loss over the steps since the evaluation before. Losses
        of training are taken before each step, so it lags a little: a gap at 0 is no proof that there is none.
        """
        if column == "gap":
            return self._gap()
        points = [(row["step"], row[column]) for row in self.rows if row[column] is not None]
        return [step for step, _ in points], [value for _, value in points]

    def _gap(self) -> tuple[list[int], list[float]]:
        steps, gaps, losses = [], [], []
        for row in self.rows[1:]:
            losses.append(row["train_loss"])
            if row["validation_loss"] is not None:
                steps.append(row["step"])
                gaps.append(row["validation_loss"] - statistics.fmean(losses))
                losses = []
        return steps, gaps

    @property
    def best_step(self) -> int:
        """The step of the lowest validation loss: where early stopping would have stopped."""
        steps, losses = self.curve("validation_loss")
        return steps[losses.index(min(losses))]

    @property
    def step_seconds(self) -> float:
        """Median time of a training step, in seconds."""
        return statistics.median(row["seconds"] for row in self.rows[1:])

    @property
    def tokens_per_second(self) -> float:
        """Median speed, in the task's unit (tokens or examples) a second."""
        return statistics.median(row["tokens"] / row["seconds"] for row in self.rows[1:])

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it holds something else, or is damaged.
        """
        stored = read_json(path)
        try:
            return cls.from_dict(stored)
        except ValueError as error:
            reason = str(error).removesuffix(".")
            raise ValueError(f"{path} holds no History ({reason}); give a file that History.save wrote.") from None

    @classmethod
    def from_dict(cls, content: Any) -> History:
        """The history that ``dataclasses.asdict`` has turned into ``content``, and perhaps JSON into a text and back.

        Raises:
            ValueError: an entry is missing, unknown or of another kind, or the rows are not those of steps 0, 1, 2, ...
        """
        if not isinstance(content, dict):
            raise ValueError(f"The content is a {type(content).__name__}, but it must be an object.")
        if odd := content.keys() ^ {each.name for each in fields(cls)}:
            raise ValueError(f"The content lacks, or should not have, {', '.join(sorted(map(str, odd)))}.")
        for name in ("task", "method", "settings"):
            if not isinstance(content[name], dict):
                raise ValueError(f"{name} is {reprlib.repr(content[name])}, but it must be an object.")
        for name in ("trainable_parameters", "total_parameters", "optimizer_bytes"):
            if type(content[name]) is not int or not 0 <= content[name] <= sys.float_info.max:
                raise ValueError(f"{name} is {reprlib.repr(content[name])}, but it must be a whole number.")
        if not isinstance(content["rows"], list):
            raise ValueError(f"rows are {reprlib.repr(content['rows'])}, but they must be a list.")
        for step, row in enumerate(content["rows"]):
            _check_row(step, row)
        return cls(**content)


def _check_row(step: int, row: Any) -> None:
    if not isinstance(row, dict) or row.keys() != set(COLUMNS):
        raise ValueError(f"Row {step} is {reprlib.repr(row)}, but it must have the values {', '.join(COLUMNS)}.")
    if type(row["step"]) is not int or row["step"] != step:
        raise ValueError(f"Row {step} is of step {reprlib.repr(row['step'])}, but rows must be of steps 0, 1, 2, ...")
    # Losses are not evaluated at every step, and no step led to row 0.
    optional = {"validation_loss", "off_domain_loss"} | ({"train_loss", "lr", "grad_norm"} if step == 0 else set())
    for name in COLUMNS[1:]:
        value = row[name]
        endless = name == "grad_norm" and value == math.inf  # its squares overflow; clipping survives that
        if not (is_number(value) or endless or (value is None and name in optional)):
            raise ValueError(f"Row {step} has {reprlib.repr(value)} as {name}, but it must be a finite number.")


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a number that a float can hold: no NaN, no infinity, no truth value."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def in_turn(
    model: nn.Module, loss: Loss, batches: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]
) -> list[Tensor]:
    """Add the weighted losses' gradients to the parameters' ``grad``, one micro-batch after another.

    Returns:
        The weighted losses, scalars.
    """
    losses = []
    for (inputs, targets), weight in zip(batches, weights, strict=True):
        part = loss(model, inputs, targets) * weight  # ()
        part.backward()
        losses.append(part.detach())
    return losses


def training_step(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float],
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    backward: Backward = in_turn,
) -> tuple[Tensor, Tensor]:
    """One step of the optimiser: forward, backward, clip, step.

    It reads no tensor's value, so that it runs on fake tensors too, which have none.

    Args:
        batches: micro-batches (inputs, targets), whose gradients are summed.
        weights: each micro-batch's share of the whole batch; they sum to 1.
        clip: largest norm of the gradient; None leaves it as it is.
        backward: how the micro-batches' gradients are summed; :class:`lora_lab.lean.InThreads` does it side by side.

    Returns:
        The batch's loss and the norm of its gradient before clipping, both scalars.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = backward(model, loss, batches, weights)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Said aloud, for by itself torch takes another way for fake tensors than for real ones.
    foreach = True if all(parameter.device.type in ("cpu", "cuda") for parameter in parameters) else None
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip, foreach=foreach)  # ()
    optimizer.step()
    return torch.stack(losses).sum(), norm  # (), ()


@dataclass
class Step:
    """A model made ready to train: calling it with micro-batches takes one step of its optimiser.

    What ``fit`` repeats, and what ``lora_lab.memory`` and ``lora_lab.speed`` measure.
    """

    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    clip: float | None = 1.0
    backward: Backward = in_turn
    threads: int = 1

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """As :func:`training_step`: the loss and the gradient's norm, both scalars."""
        return training_step(self.model, self.loss, batches, weights, self.optimizer, self.clip, self.backward)


def make_step(
    model: nn.Module,
    loss: Loss,
    method: Method,
    *,
    lr: float,
    seed: int = 0,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    gradient_checkpointing: bool = False,
    lean: Lean | None = None,
) -> Step:
    """Make ``model`` ready in place, by ``method``, with AdamW.

    Args: as for :func:`fit`.

    Raises:
        ValueError: as for :func:`fit`.
    """
    if gradient_checkpointing:
        if lean is not None:
            raise ValueError("gradient_checkpointing is the plain step's; with a lean step use Lean(checkpoint=True).")
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise ValueError(
                f"A {type(model).__name__} has no method gradient_checkpointing_enable, as lora_lab's Llama and "
                "transformers' models have; use gradient_checkpointing=False."
            )
    method.prepare(model, seed)
    if gradient_checkpointing:
        # transformers 5 has a new name for it, and warns of the old one.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    backward, threads = in_turn, 1
    if lean is not None:
        leanness.rewire(model, lean)
        if loss is cross_entropy:
            loss = partial(leanness.cross_entropy, rows=lean.loss_rows)
        if lean.threads > 1:
            backward, threads = InThreads(lean.threads), lean.threads
    groups = [
        {**group, "lr": lr * group.get("lr_factor", 1.0), "weight_decay": weight_decay}
        for group in method.groups(model)
    ]
    return Step(model, loss, make_adamw(groups, lean is not None), clip, backward, threads)


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate of step 1 .. ``steps``: a linear rise over ``warmup`` steps, then constant or half a cosine."""
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup - 1) / max(1, steps - warmup)))


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, part: str = "validation", batch_size: int = 8, limit: int | None = None
) -> float:
    """Mean loss over the targets of one part, without dropout.

    Args:
        part: "train", "validation", "test" or "off_domain".
        limit: only the first ``limit`` examples (parts are in random order).
    """
    if part not in task.parts:
        raise ValueError(f"part is {part!r}, but task {task.name!r} has {list(task.parts)}.")
    examples = task.parts[part][:limit]
    training = model.training
    model.eval()
    total = count = 0.0
    try:
        for start in range(0, len(examples), batch_size):
            batch = examples[slice(start, start + batch_size)]
            if counted := task.counted(batch):
                total += float(task.loss(model, *to_device(batch, model))) * counted
                count += counted
    finally:
        model.train(training)
    return total / count if count else math.nan


def fit(
    model: nn.Module,
    task: Task,
    method: Method,
    *,
    steps: int,
    lr: float,
    batch_size: int = 8,
    seed: int = 0,
    schedule: str = "cosine",
    warmup: int | None = None,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    lean: Lean | None = None,
    eval_every: int | None = None,
    eval_examples: int | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    progress: bool | None = None,
) -> History:
    """Train ``model`` in place on ``task`` by ``method``, with AdamW.

    All randomness (adapter weights, order of data, dropout) comes from ``seed``; nothing outside is
    disturbed. The model ends in the mode, train or eval, in which it came.

    Args:
        model: a freshly loaded model, on the device where it is to be trained.
        task: data and loss.
        method: FullFineTuning(), LoRA(...), ...
        steps: steps of the optimiser.
        lr: peak learning rate.
        batch_size: examples a step.
        schedule: after the warm-up, "cosine" (falling to 0) or "constant".
        warmup: steps of linear rise; default a tenth of ``steps``.
        weight_decay: AdamW's; on adapters it pulls the weights to the pre-trained ones.
        clip: largest norm of the gradient (None: any).
        accumulate: micro-batches that a batch is computed in; saves memory, changes no result.
        gradient_checkpointing: keep of each block only its input, and compute the block again in the backward pass:
            less memory, about a third more time, the same numbers (Chen et al. 2016, arXiv 1604.06174).
        lean: take the leaner step of ``lora_lab.lean`` (for LoRA on our Llama): the same numbers in less time
            and memory. The model keeps its lean blocks, which compute the same.
        eval_every: steps between evaluations; default a tenth of ``steps``. Step 0 and the last always are.
        eval_examples: examples of each part to evaluate on; default all.
        checkpoint_dir: a folder of this run's own. If it holds a checkpoint of the same run, the run goes on there.
        checkpoint_every: steps between checkpoints; default as ``eval_every``.
        progress: show a bar; default only where a person is looking (and LORA_LAB_PROGRESS is not 0).

    Raises:
        ValueError: the model already carries adapters or was made ready before, a number is out of
            range, the lean step or gradient checkpointing does not fit the model or the method, or the
            folder's checkpoint is damaged or of another run (nothing of it is in the model then).
        DivergedError: the loss became NaN or infinite.
    """
    shared = {"lr": lr, "seed": seed, "weight_decay": weight_decay, "clip": clip}
    settings = check_settings(
        **shared,
        steps=steps,
        batch_size=batch_size,
        schedule=schedule,
        warmup=warmup,
        accumulate=accumulate,
        eval_every=eval_every,
        eval_examples=eval_examples,
    )
    if gradient_checkpointing:
        settings["gradient_checkpointing"] = True
    if lean is not None:
        settings["lean"] = lean.settings()
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}, but it must be at least 1, or None.")
    ready = make_step(model, task.loss, method, **shared, gradient_checkpointing=gradient_checkpointing, lean=lean)
    history = History(
        task={"name": task.name, "fingerprint": task.fingerprint, "unit": task.unit},
        method=method.settings(),
        settings=settings,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=count_parameters(model),
    )
    run = _Run(ready, task, history)
    folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
    every = settings["eval_every"] if checkpoint_every is None else checkpoint_every
    training = model.training
    model.train()
    try:
        with own_randomness(run.device, seed):
            done = _resume(run, folder)
            with progress_bar(steps, method.name, progress, done=done) as bar:
                if not history.rows:
                    bar.set_postfix_str("evaluating")
                    history.rows.append({**dict.fromkeys(COLUMNS), "step": 0, "seconds": 0.0, "tokens": 0})
                    run.evaluate()
                for step in range(done + 1, steps + 1):
                    run.step(step)
                    bar.set_postfix_str(f"loss {history.rows[-1]['train_loss']:.3f}")
                    if step % settings["eval_every"] == 0 or step == steps:
                        run.evaluate()
                    if folder is not None and (step % every == 0 or step == steps):
                        _save_checkpoint(run, folder)
                    bar.update()
    finally:
        model.train(training)
    return history


class _Run:
    """What belongs together while a model is trained."""

    def __init__(self, ready: Step, task: Task, history: History) -> None:
        self.ready, self.history = ready, history
        self.model, self.optimizer = ready.model, ready.optimizer
        self.task = replace(task, loss=ready.loss)  # evaluated with the loss that it is trained with
        self.device = next(self.model.parameters()).device
        self.order = DataOrder(len(task.train), history.settings["seed"])
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, step: int) -> None:
        """Train on the step's batch and append its row."""
        settings, task = self.history.settings, self.task
        started = time.perf_counter()
        batch = task.train[self.order.rows((step - 1) * settings["batch_size"], settings["batch_size"])]
        size = math.ceil(len(batch) / (settings["accumulate"] * self.ready.threads))
        parts = [batch[slice(i, i + size)] for i in range(0, len(batch), size)]
        parts = [part for part in parts if task.counted(part)]  # a mean over no target would be NaN
        if not parts:
            raise ValueError(
                f"No target of the batch at step {step} counts, so it teaches nothing; use larger batches."
            )
        counts = [task.counted(part) for part in parts]
        factor = learning_rate(step, settings["steps"], 1.0, settings["warmup"], settings["schedule"])
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        ready = replace(self.ready, loss=leanness.with_every_target(self.ready.loss, [part.targets for part in parts]))
        batches = [to_device(part, self.model) for part in parts]
        loss, norm = ready(batches, [count / sum(counts) for count in counts])
        row = {**dict.fromkeys(COLUMNS), "step": step, "lr": settings["lr"] * factor, "tokens": sum(counts)}
        row["train_loss"], row["grad_norm"] = float(loss), float(norm)  # waits for the device
        row["seconds"] = time.perf_counter() - started
        stop_if_diverged("loss", row["train_loss"], row)
        self.history.rows.append(row)

    def evaluate(self) -> None:
        """Fill in the last row's validation and off-domain loss."""
        settings, row = self.history.settings, self.history.rows[-1]
        for part in ("validation", "off_domain"):
            loss = evaluate(self.model, self.task, part, settings["batch_size"], settings["eval_examples"])
            stop_if_diverged(f"{part} loss", loss, row)
            row[f"{part}_loss"] = loss
        self.history.optimizer_bytes = sum(
            value.numel() * value.element_size()
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )


def stop_if_diverged(what: str, loss: float, row: dict[str, Any]) -> None:
    """Raise DivergedError if a loss is NaN or infinite.

    Args:
        what: which loss it is.
        row: the step's: its number and its learning rate.
    """
    if not math.isfinite(loss):
        raise DivergedError(
            f"The {what} is {loss} at step {row['step']} (learning rate {row['lr'] or 0:.2g}), so training stops; "
            "lower the learning rate, and load the model anew, because its weights are spoilt."
        )


class DataOrder:
    """The order of training examples: one random permutation after another.

    It is a function of seed and position alone, so a resumed run needs to remember neither.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def rows(self, position: int, count: int) -> Tensor:
        """Indices of the ``count`` examples from ``position`` on, counted over all epochs: (count,)."""
        found = []
        while count:
            epoch, place = divmod(position, self.n)
            if epoch != self._epoch:
                # A generator of its own for each epoch; the large odd factor keeps the seeds of runs apart.
                generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
                self._epoch, self._permutation = epoch, torch.randperm(self.n, generator=generator)
            found.append(self._permutation[place : place + count])
            position, count = position + len(found[-1]), count - len(found[-1])
        return torch.cat(found)


def check_settings(**settings: Any) -> dict[str, Any]:
    """The settings of a run, by ``fit``'s names, with the defaults of ``warmup`` and ``eval_every`` filled in.

    Raises:
        ValueError: one is out of range.
    """

    def fail(name: str, expected: str) -> None:
        raise ValueError(f"{name} is {settings[name]!r}, but it must be {expected}.")

    for name in ("steps", "batch_size", "accumulate", "eval_every"):
        if name == "eval_every" and settings[name] is None:
            settings[name] = max(1, settings["steps"] // 10)
        if not isinstance(settings[name], int) or settings[name] < 1:
            fail(name, "a whole number of at least 1")
    if settings["warmup"] is None:
        settings["warmup"] = settings["steps"] // 10
    if not (math.isfinite(settings["lr"]) and settings["lr"] > 0):
        fail("lr", "a positive number, such as 1e-4")
    if settings["schedule"] not in ("cosine", "constant"):
        fail("schedule", "'cosine' or 'constant'")
    if not 0 <= settings["warmup"] <= settings["steps"]:
        fail("warmup", f"between 0 and steps, {settings['steps']}")
    if not settings["weight_decay"] >= 0:  # written so that NaN fails too
        fail("weight_decay", "0 or more")
    if settings["clip"] is not None and not settings["clip"] > 0:
        fail("clip", "positive, or None for no clipping")
    if settings["accumulate"] > settings["batch_size"]:
        fail("accumulate", f"at most batch_size, {settings['batch_size']}")
    if settings["eval_examples"] is not None and settings["eval_examples"] < 1:
        fail("eval_examples", "at least 1, or None for all")
    return settings


def count_parameters(model: nn.Module) -> int:
    """The model's numbers; a weight in blocks counts as what it stands for."""
    in_blocks = {}
    for module in model.modules():
        if isinstance(module, BlockWeight):
            in_blocks |= {id(parameter): 0 for parameter in (module.packed, module.steps)}
            in_blocks[id(module.packed)] = math.prod(module.shape)
    return sum(in_blocks.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def make_adamw(groups: list[dict[str, Any]], flat: bool) -> torch.optim.Optimizer:
    """The optimiser of ``fit``; flat, it is that of the lean step."""
    if flat:
        return FlatAdamW(groups)
    # Fused: on a CPU one pass over 134 million parameters takes a fifth of the loop's time.
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, fused=fused)


def to_device(examples: Examples, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs and targets where the model is."""
    device = next(model.parameters()).device
    return examples.inputs.to(device), examples.targets.to(device)


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators for the block (dropout draws from them), and put them back after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def progress_bar(total: int, label: str, progress: bool | None, unit: str = "step", done: int = 0) -> tqdm:
    """A bar; with ``progress`` None only where a person is looking and LORA_LAB_PROGRESS is not 0."""
    if progress is None:
        watched = "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
        progress = watched and os.environ.get("LORA_LAB_PROGRESS") != "0"
    return tqdm(total=total, initial=done, desc=label, unit=unit, disable=not progress, leave=False)


def _save_checkpoint(run: _Run, folder: Path) -> None:
    """One file, so that weights and history can never be of two moments."""
    tensors = trained(run.model)
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        stop_if_diverged("weight", math.nan, run.history.rows[-1])
    for name, parameter in run.model.named_parameters():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if run.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(run.device)
    note = {"history": json.dumps(asdict(run.history)), "frozen": frozen_hash(run.model)}
    save_tensors(folder / _CHECKPOINT, tensors, note)


def _resume(run: _Run, folder: Path | None) -> int:
    """Put the run where its checkpoint stands, and return the steps done (0 without a checkpoint).

    All of the checkpoint is checked before anything is changed.
    """
    if folder is None or not (folder / _CHECKPOINT).is_file():
        return 0
    path = folder / _CHECKPOINT
    advice = "delete it to start the run anew"
    try:
        tensors, note = load_tensors(path, {"history", "frozen"}, unsigned=True)
        stored = json.loads(note["history"])
        History.from_dict(stored)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({str(error).removesuffix('.')}); {advice}.") from None
    _same_run(path, asdict(run.history), stored)
    done, steps = len(stored["rows"]) - 1, run.history.settings["steps"]
    if not 1 <= done <= steps:
        raise ValueError(f"{path} is damaged (it is at step {done} of {steps}); {advice}.")
    if note["frozen"] != frozen_hash(run.model):
        raise ValueError(f"{path} was made with other frozen weights; load the same model, or use another folder.")
    if found := misfit(tensors, _wanted(run, tensors)):
        raise ValueError(f"{path} does not fit this model: {found}; use another folder, or delete it.")
    try:  # first, for these may refuse; what they were before, own_randomness puts back
        torch.set_rng_state(tensors["random.cpu"])
        if run.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], run.device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is damaged (it holds no state of a random generator: {error}); {advice}.") from None
    with torch.no_grad():
        for name, value in trained(run.model).items():
            value.copy_(tensors[name])
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad and f"optimizer.{name}.step" in tensors:
            for key in _ADAMW_STATE:
                value, state = tensors[f"optimizer.{name}.{key}"], run.optimizer.state[parameter]
                if key in state:  # a view of the flat optimiser's tensor
                    state[key].copy_(value)
                else:
                    state[key] = value.to(parameter.device)
    run.history.rows = stored["rows"]
    run.history.optimizer_bytes = stored["optimizer_bytes"]
    return done


def _wanted(run: _Run, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the checkpoint's tensors must look like."""
    wanted = trained(run.model)
    for name, parameter in run.model.named_parameters():
        state = {f"optimizer.{name}.{key}": parameter.detach() for key in _ADAMW_STATE}
        # The optimiser knows nothing of a parameter that took no part in the loss.
        if parameter.requires_grad and not tensors.keys().isdisjoint(state):
            step = run.optimizer.state.get(parameter, {}).get("step", torch.zeros((), dtype=torch.float32))
            wanted |= state | {f"optimizer.{name}.step": step}
    wanted["random.cpu"] = torch.get_rng_state()
    if "random.cuda" in tensors:  # the run may go on where there is no GPU
        wanted["random.cuda"] = tensors["random.cuda"]
    return wanted


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors that training changes, by the names they have in a checkpoint."""
    changing = {f"parameter.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return changing | {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}


def misfit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """How tensors differ from those that are wanted, in names, shapes and dtypes; None if they do not."""

    def looks(tensor: Tensor) -> str:
        return f"shape {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"

    for name, value in wanted.items():
        if name not in tensors:
            return f"{name} is missing"
        if looks(tensors[name]) != looks(value):
            return f"{name} has {looks(tensors[name])}, not {looks(value)}"
    if unknown := tensors.keys() - wanted.keys():
        return f"the model has no {min(unknown)}"
    return None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> None:
    """Write tensors and a note as one safetensors file, with a SHA-256 over both in its header."""
    # Copies: a tensor that shares memory with another cannot be stored.
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    with atomic_file(path) as temporary:
        save_file(copies, temporary, metadata={**note, "sha256": _checksum(copies, note)})


def load_tensors(path: Path, names: set[str], unsigned: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`save_tensors` wrote: tensors on the CPU, and the note.

    Args:
        names: the note's entries.
        unsigned: a file without a checksum will do, as the first versions wrote it.

    Raises:
        ValueError: it is no safetensors file, has another note, or any bit of it has changed. The sentence does not
            name the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            note = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The file cannot be read: {error}.") from None
    expected = {"sha256", *names}
    if note.keys() != expected and not (unsigned and note.keys() == names):
        raise ValueError(f"The header has the entries {sorted(note)}, not {sorted(expected)}.")
    checksum = note.pop("sha256", None)
    if checksum is not None and checksum != _checksum(tensors, note):
        raise ValueError("The content does not have the checksum that was written with it.")
    return tensors, note


def _checksum(tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> str:
    """SHA-256 over the note and over each tensor's name, dtype, shape and numbers."""
    digest = hashlib.sha256(json.dumps(note, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _same_run(path: Path, ours: dict[str, Any], stored: dict[str, Any]) -> None:
    ours = json.loads(json.dumps(ours))  # as the file has it: tuples are lists there
    for group in ("task", "method", "settings"):
        for name in {**ours[group], **stored[group]}:  # some settings are there only where they are in use
            mine, theirs = ours[group].get(name), stored[group].get(name)
            if mine != theirs:
                raise ValueError(
                    f"{path} is of another run: its {group}'s {name} is {theirs!r}, "
                    f"not {mine!r}; use another folder, or delete it."
                )


def frozen_hash(model: nn.Module) -> str:
    """A hash of all that is not trained: a resumed adapter must meet the base it was trained on."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(bytes_of(parameter))
    return digest.hexdigest()
