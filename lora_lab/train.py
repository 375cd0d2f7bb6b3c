"""``fit``: one training loop for all methods, so that every comparison is like for like.

Full fine-tuning, LoRA and its variants differ in one object, the method. Data order, optimiser, schedule
and evaluation are the same code. A run that was stopped at any moment continues from its last checkpoint
and ends with the same results.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lora_lab import checkpoint
from lora_lab.history import History
from lora_lab.inject import adapter_state, lora_layers
from lora_lab.methods import ContinueLoRA, Method
from lora_lab.system.device import own_randomness, restore_randomness
from lora_lab.system.distributed import ALONE, Processes, current_processes
from lora_lab.system.files import check_writable
from lora_lab.system.schema import Count, NotNegative, Positive, Seed, Size, check, check_bfloat16, check_fields
from lora_lab.system.wording import progress_bar, short_repr
from lora_lab.task import Batch, Examples, Loss, Task, restore_modes

EVALUATED = ("validation", "off_domain")  # the parts of which a history has losses
# Left out of a history where they have their default, so that only the runs that use one name it.
_ONLY_IF_USED = ("batches", "gradient_checkpointing", "lean", "autocast")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: all options of a run except its model, task and method.

    Args:
        lr: peak learning rate.
        seed: seeds adapter weights, data order and dropout.
        weight_decay: AdamW's; with plain LoRA it pulls weights towards the pre-trained ones, with PiSSA and DoRA not.
        clip: maximum norm of the gradient; None for no clipping.
        steps: number of optimiser steps.
        batch_size: examples per step.
        batches: "random", or "by_length" for batches of examples of similar length, which pad each other less; every
            epoch still has each example once, and its batches are in random order. Evaluations go by length too.
        schedule: after the warm-up, "cosine" (decaying towards 0) or "constant".
        warmup: steps of linear warm-up; default: a tenth of ``steps``.
        accumulate: number of micro-batches per batch; saves memory, and changes the result by rounding alone in a
            model without dropout and batch norms.
        eval_every: steps between evaluations; default: a tenth of ``steps``. Step 0 and the last are always evaluated.
        eval_examples: examples of each part to evaluate on; default: all.
        gradient_checkpointing: save only the input of each block, and compute the block again in the backward pass:
            less memory and the same results (Chen et al. 2016, arXiv 1604.06174), for up to a third more FLOPs in full
            fine-tuning and up to a half more with LoRA, which has no weight gradients (SmolLM2-135M: 39 %).
        lean: use the training step of ``lora_lab.lean`` (for LoRA on our Llama): the same results in less time and
            memory. The model's blocks stay replaced by lean ones, which compute the same function.
        autocast: ``torch.bfloat16`` multiplies matrices in that dtype, by ``torch.autocast``, in evaluations too, while
            weights, gradients and the optimiser's state stay as they are (mixed precision, Micikevicius et al. 2018,
            arXiv 1710.03740, section 3.1): less time where the device is faster in it, and other rounding. The lean
            step has ``base_dtype`` instead.

    Raises:
        ValueError: an option is out of range, or two options exclude each other.
    """

    lr: Positive
    seed: Seed = 0
    weight_decay: NotNegative = 0.0
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    steps: Size
    batch_size: Size = 8
    batches: Literal["random", "by_length"] = "random"
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Count | None = None
    accumulate: Size = 1
    eval_every: Size | None = None
    eval_examples: Size | None = None
    gradient_checkpointing: bool = False
    lean: Any = None  # a lora_lab.lean.Lean; that module imports this one
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        # float16 has a smaller range, and would need its loss scaled.
        check_bfloat16(self.autocast, "autocast")
        check_fields(self)
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup is {self.warmup}, but it must be at most steps, {self.steps}.")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate is {self.accumulate}, but it must be at most batch_size, {self.batch_size}.")
        if self.lean is not None and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing is True, but lean has its own; use Lean(checkpoint=True).")
        if self.lean is not None and self.autocast is not None:
            raise ValueError(f"autocast is {self.autocast}, but lean has its own; use Lean(base_dtype=torch.bfloat16).")

    @property
    def by_length(self) -> bool:
        """Whether examples of similar length share a batch."""
        return self.batches == "by_length"

    @property
    def warmup_steps(self) -> int:
        """``warmup``, or its default."""
        return self.steps // 10 if self.warmup is None else self.warmup

    @property
    def evaluation_interval(self) -> int:
        """``eval_every``, or its default, in steps."""
        return max(1, self.steps // 10) if self.eval_every is None else self.eval_every

    def rate_factor(self, step: int) -> float:
        """Return the rate of step 1 .. ``steps``, as a share of the peak: a linear rise, then flat or half a cosine."""
        warmup = self.warmup_steps
        if step <= warmup:
            return step / warmup
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup - 1) / max(1, self.steps - warmup)))

    def evaluates(self, step: int) -> bool:
        """Return whether the validation and off-domain losses are evaluated after this step."""
        return step % self.evaluation_interval == 0 or step == self.steps

    def saves(self, step: int, every: int | None) -> bool:
        """Return whether a checkpoint is written after this step, with ``every`` steps between two."""
        return step > 0 and (step % (every or self.evaluation_interval) == 0 or step == self.steps)

    def settings(self) -> dict[str, Any]:
        """Return the options as plain data, for a History, with defaults filled in.

        ``batches``, ``gradient_checkpointing``, ``lean`` and ``autocast`` are included only if they are in use.
        """
        settings = {option.name: getattr(self, option.name) for option in fields(TrainConfig)}
        settings |= {"warmup": self.warmup_steps, "eval_every": self.evaluation_interval}
        settings["lean"] = self.lean and self.lean.settings()
        settings["autocast"] = self.autocast and str(self.autocast)
        unused = [name for name in _ONLY_IF_USED if settings[name] == getattr(TrainConfig, name)]
        return {name: value for name, value in settings.items() if name not in unused}


@dataclass
class TrainingStep:
    """A model prepared for training: calling it with micro-batches takes one step of the optimiser.

    ``fit`` calls it in a loop, and ``lora_lab.costs`` measures it and runs it on fake tensors, which have no values: so
    with one process it never reads the value of a tensor.
    """

    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    clip: float | None = 1.0
    threads: int = 1  # micro-batches computed at the same time; more than one only in a lean step
    processes: Processes = ALONE  # whose micro-batches make up a batch

    def __call__(self, batches: Sequence[Batch], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Take one step: forward, backward, clip, update.

        Args:
            batches: micro-batches (inputs, targets) on the model's device, whose gradients are summed; of several
                processes, those of this one.
            weights: of the micro-batches, each one's share of the whole batch; they sum to 1 over all processes.

        Returns:
            The batch's loss and the norm of its gradient before clipping, both scalars.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.backward(batches, weights)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if self.processes.world_size > 1:
            losses = [self._sum_over_processes(losses, parameters)]
        # Set explicitly: torch's default differs for fake tensors, on which the step would then run other operations.
        foreach = True if all(parameter.device.type in ("cpu", "cuda") for parameter in parameters) else None
        if self.clip is None:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients, foreach=foreach)  # ()
        else:
            norm = nn.utils.clip_grad_norm_(parameters, self.clip, foreach=foreach)  # ()
        self.optimizer.step()
        return torch.stack(losses).sum(), norm  # (), ()

    def backward(self, batches: Sequence[Batch], weights: Sequence[float]) -> list[Tensor]:
        """Add the gradients of the weighted losses to the parameters' ``grad``, and return those losses."""
        losses = []
        for (inputs, targets), weight in zip(batches, weights, strict=True):
            loss = self.batch_loss(inputs, targets) * weight  # ()
            loss.backward()
            losses.append(loss.detach())
        return losses

    def _sum_over_processes(self, losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        """Sum the gradients and the losses of all processes, and return the loss of the whole batch, a scalar."""
        exact = {"dtype": torch.float64, "device": parameters[0].device}
        loss = sum(losses, torch.zeros((), **exact))  # ()
        # A process may have no gradient to add: it got no example, or none of its tokens chose an expert.
        counts = torch.tensor([parameter.grad is not None for parameter in parameters], **exact)  # (parameters,)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.processes.sum([loss, counts, *(parameter.grad for parameter in parameters if parameter.grad is not None)])
        for parameter, count in zip(parameters, counts.tolist(), strict=True):
            if count == 0:
                parameter.grad = None  # as one process would leave it
        return loss

    def batch_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a micro-batch, a scalar."""
        return self.loss(self.model, inputs, targets)  # ()

    def read_targets(self, targets: Sequence[Tensor]) -> None:
        """Hook for the lean step, which looks at the next targets while they are on the CPU; does nothing here."""


def make_step(model: nn.Module, loss: Loss, method: Method, config: TrainConfig) -> TrainingStep:
    """Prepare ``model`` in place with ``method``, and return its training step with AdamW.

    Raises:
        ValueError: as for :func:`fit`. The model is then unchanged.
    """
    if config.lean is not None:
        return config.lean.make_step(model, loss, method, config)
    # Looked up before the model is prepared, because it may have no such method.
    enable = gradient_checkpointing_method(model) if config.gradient_checkpointing else None
    method.prepare(model, config.seed)
    if enable is not None:
        enable()
    optimizer = make_adamw(parameter_groups(model, method, config))
    return TrainingStep(model, in_autocast(loss, config.autocast), optimizer, config.clip)


def in_autocast(loss: Loss, dtype: torch.dtype | None) -> Loss:
    """Return a loss that multiplies matrices in ``dtype``, by ``torch.autocast``; with None, the loss itself."""

    def cast_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, dtype):
            return loss(model, inputs, targets)

    return loss if dtype is None else cast_loss


def gradient_checkpointing_method(model: nn.Module, to: Literal["enable", "disable"] = "enable") -> Callable[[], None]:
    """Return the model's method that lets it save only the input of each block, and compute the block again; or not.

    Raises:
        ValueError: it has none, or says that it does not support it.
    """
    # transformers 5 has renamed the methods, and warns of the old names.
    for name in (f"activation_checkpointing_{to}", f"gradient_checkpointing_{to}"):
        if hasattr(model, name) and getattr(model, "supports_gradient_checkpointing", True):
            return getattr(model, name)
    raise ValueError(f"A {type(model).__name__} has no method {name} that works; leave gradient_checkpointing out.")


def parameter_groups(model: nn.Module, method: Method, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the optimiser's groups, each with its learning rate and weight decay."""
    return [
        {**group, "lr": config.lr * group.get("lr_factor", 1.0), "weight_decay": config.weight_decay}
        for group in method.groups(model)
    ]


def make_adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), fused if the device supports it."""
    # On a CPU, fused AdamW takes a fifth of the time of torch's default for 134 million parameters.
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, fused=fused)


def fit(
    model: nn.Module,
    task: Task,
    method: Method,
    config: TrainConfig | None = None,
    *,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    progress: bool | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> History:
    """Train ``model`` in place on ``task`` with ``method`` and AdamW, and return the record of the run.

        fit(model, task, LoRA(rank=8), steps=40, lr=2e-3, batch_size=4)

    All randomness (adapter weights, data order, dropout) comes from ``seed``. Modules end in the modes that they had,
    and without gradients. A ValueError about options, task, method or an unreadable checkpoint leaves the model's
    weights unchanged. Two checks come after preparation (does the checkpoint fit; do all processes agree): after those,
    and after any other error, load the model again. With the same ``checkpoint_dir``, and the model loaded again, the
    run goes on from its last checkpoint, bit for bit; one that had ended returns its history. Several processes train
    together if torch's process group is initialised (docs/costs.md).

    Args:
        model: a freshly loaded model, on the device to train on.
        task: data and loss.
        method: FullFineTuning(), LoRA(...), ...
        config: how to train; or its fields as keywords.
        checkpoint_dir: a folder for this run alone, for checkpoints.
        checkpoint_every: steps between checkpoints; default: as ``eval_every``.
        progress: show a progress bar; default: only in a terminal or notebook, and unless LORA_LAB_PROGRESS is 0.
        on_row: called with a copy of each new row of the History, for a logger of your own.
        **options: the fields of :class:`TrainConfig`, such as ``steps`` and ``lr``; they override ``config``.

    Raises:
        ValueError: the arguments do not fit together, the model is prepared already, or the checkpoint another run's.
        OSError: ``checkpoint_dir`` cannot be written to.
        TypeError: an option is no field of TrainConfig.
        DivergedError: the loss became NaN or infinite. One that only rises stops nothing.
    """
    check_options(options)
    config = TrainConfig(**options) if config is None else replace(config, **options)
    check_run(model, task, method, config)
    order, processes, device = data_order(task, config), current_processes(), next(model.parameters()).device
    history = new_history(task, method, config, model)
    start = check_checkpoints(checkpoint_dir, checkpoint_every, model, history)
    leads = processes.rank == 0  # this process shows the bar, writes checkpoints and reports
    with restore_switches(model), own_randomness(device, config.seed), checkpoint.advise(checkpoint_dir):
        step = make_step(model, task.loss, method, config)
        step.processes = processes
        set_training_mode(model)
        history.count(model)
        done = checkpoint.resume(checkpoint_dir, model, step.optimizer, history)
        check_alike(processes, model, history, done)
        with progress_bar(config.steps, method.name, progress if leads else False, done=done) as bar:
            for number in range(len(history.rows), config.steps + 1):
                if number == 0:
                    history.add(0, seconds=0.0, tokens=0)  # the model before training
                else:
                    history.add(number, **take_step(step, task, order, config, number))
                    bar.update()
                    bar.set_postfix_str(f"loss {history.rows[-1]['train_loss']:.3f}")
                if config.evaluates(number):
                    evaluate_parts(step, task, config, history)
                if leads and checkpoint_dir is not None and config.saves(number, checkpoint_every):
                    with warn_if_complete(number == config.steps):
                        checkpoint.save(checkpoint_dir, model, step.optimizer, history, start)
                if leads and on_row is not None:
                    report(on_row, history, model)
    return history


@contextmanager
def warn_if_complete(complete: bool) -> Iterator[None]:
    """Warn of a checkpoint that cannot be written where the run is complete, so that its result is not lost."""
    try:
        yield
    except OSError as error:
        if not complete:
            raise
        warnings.warn(f"The run is complete, but its last checkpoint is missing: {error}", stacklevel=3)


def check_options(options: Collection[str]) -> None:
    """Raise TypeError for an option of fit that is no field of TrainConfig, suggesting the closest match."""
    known = [option.name for option in fields(TrainConfig)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, 1)
            advice = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}."
            raise TypeError(f"fit has no option {name!r}; {advice}")


def check_run(model: nn.Module, task: Task, method: Method, config: TrainConfig) -> None:
    """Raise ValueError if model, task, method and config do not fit together."""
    if not isinstance(method, Method):
        raise ValueError(f"method is {short_repr(method)}, but it must be an instance of Method, such as LoRA(rank=8).")
    task.check_model(model)
    for part in EVALUATED:
        task.require_targets(part, config.eval_examples)


def check_checkpoints(folder: str | Path | None, every: int | None, model: nn.Module, history: History) -> str:
    """Check that a run can go on from the checkpoint in a folder, and can write the next one.

    Returns:
        A hash of the weights that the run starts from; "" without a folder.

    Raises:
        ValueError: the checkpoint is damaged or of another run, or ``every`` is out of range or without a folder.
        OSError: the folder cannot be written to.
    """
    check(every, Size | None, "checkpoint_every")
    if folder is None:
        if every is not None:
            raise ValueError(f"checkpoint_every is {every}, but there is no folder to write to; give checkpoint_dir.")
        return ""
    checkpoint.check_belongs(folder, history, model)
    if current_processes().rank == 0:
        check_writable(folder)
    return checkpoint.hash_parameters(model)


def new_history(task: Task, method: Method, config: TrainConfig, model: nn.Module) -> History:
    """Return the history of a run before its first step, without the sizes that only a prepared model has.

    Args:
        task, method, config: of the run.
        model: as it was loaded. If its adapters are to be trained further, their hash belongs to the method's settings.
    """
    settings = method.settings()
    if isinstance(method, ContinueLoRA) and lora_layers(model):
        settings["start"] = checkpoint.hash_tensors(adapter_state(model))
    about = {"name": task.name, "fingerprint": task.fingerprint, "unit": task.unit}
    return History(task=about, method=settings, settings=config.settings())


def take_step(step: TrainingStep, task: Task, order: DataOrder, config: TrainConfig, number: int) -> dict[str, float]:
    """Take the step of that number, counted from 1, and return the values of its row in a History."""
    started, model, processes = time.perf_counter(), step.model, step.processes
    processes.seed(next(model.parameters()).device, config.seed, number)
    batches, weights, tokens = micro_batches(task, order, number, config, step.threads, processes)
    factor = config.rate_factor(number)
    for group in step.optimizer.param_groups:
        group["lr"] = config.lr * group.get("lr_factor", 1.0) * factor
    step.read_targets([batch.targets for batch in batches])
    loss, norm = step([to_device(batch, model) for batch in batches], weights)
    row = {"train_loss": float(loss), "grad_norm": float(norm)}  # waits for the device
    return row | {"lr": config.lr * factor, "tokens": tokens, "seconds": time.perf_counter() - started}


def evaluate_parts(step: TrainingStep, task: Task, config: TrainConfig, history: History) -> None:
    """Write the losses of the evaluated parts into the last row, computed as the step computes its loss."""
    task = replace(task, loss=step.loss)
    sizes = config.batch_size, config.eval_examples, config.by_length
    for part in EVALUATED:
        history.add_evaluation(part, mean_loss(step.model, task, part, *sizes, step.processes).item())
    # Here, since AdamW makes its state in its first step.
    history.optimizer_bytes = state_bytes(step.optimizer)


def report(on_row: Callable[[dict[str, Any]], None], history: History, model: nn.Module) -> None:
    """Pass on a copy of the newest row; a logger that samples from the model does not change the run."""
    with restore_modes(model), restore_randomness(next(model.parameters()).device):
        on_row(dict(history.rows[-1]))


@contextmanager
def restore_switches(model: nn.Module) -> Iterator[None]:
    """Give a model its modes and its gradient checkpointing back after a block, and take its gradients off."""

    def is_on() -> bool:  # as transformers find it out
        return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    before = is_on()
    with restore_modes(model):
        try:
            yield
        finally:
            model.zero_grad()
            if is_on() and not before:
                gradient_checkpointing_method(model, "disable")()


def set_training_mode(model: nn.Module) -> None:
    """Put a prepared model into training mode, but keep frozen batch norms from changing their running statistics.

    If the whole model is trained, those without parameters are trained with it.
    """
    model.train()
    if all(parameter.requires_grad for parameter in model.parameters()):
        return
    for module in model.modules():
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if getattr(module, "track_running_stats", False) and not trained:
            module.eval()


def check_alike(processes: Processes, model: nn.Module, history: History, done: int) -> None:
    """Check that all processes train the same model in the same way, and go on from the same step.

    Raises:
        ValueError: they do not, or the model has batch norms that are trained.
    """
    if processes.world_size == 1:
        return
    for name, module in model.named_modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and module.training and not isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"{name!r} is a {type(module).__name__}, whose statistics would be those of one process's examples; "
                "use one process, or on GPUs torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)."
            )
    groups = {"task": history.task, "method": history.method, "settings": history.settings}
    values = {f"{group}.{name}": value for group, entries in groups.items() for name, value in entries.items()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values |= {"the step of the checkpoint": done, "the hash of the weights": checkpoint.hash_tensors(tensors)}
    processes.check_same(values)


def micro_batches(
    task: Task, order: DataOrder, number: int, config: TrainConfig, threads: int, processes: Processes
) -> tuple[list[Examples], list[float], int]:
    """Return the micro-batches of a step for this process: ``accumulate`` for each thread of each process, or fewer.

    Returns:
        The micro-batches, the weight of each in the loss of the whole batch, and the size of the whole batch in the
        task's unit.
    """
    batch = task.train[order.rows((number - 1) * config.batch_size, config.batch_size)]
    size = math.ceil(len(batch) / (config.accumulate * threads * processes.world_size))
    cuts = [batch[i : i + size] for i in range(0, len(batch), size)]
    filled = [(cut, count) for cut in cuts if (count := task.count_targets(cut))]  # a mean over no target would be NaN
    whole, mine = sum(count for _, count in filled), filled[processes.rank :: processes.world_size]
    return [cut for cut, _ in mine], [count / whole for _, count in mine], task.size(batch)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of the optimiser's state, in bytes."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def evaluate(
    model: nn.Module,
    task: Task,
    part: str = "validation",
    batch_size: int = 8,
    limit: int | None = None,
    by_length: bool = False,
) -> float:
    """Return the mean loss over the targets of one part, without dropout.

    Args:
        part: "train", "validation", "test" or "off_domain".
        limit: use only the first ``limit`` examples.
        by_length: let examples of similar length share a batch: the same mean, up to rounding, in less time.

    Raises:
        ValueError: the task has no such part, no target of these examples counts in the loss, or an argument is out of
            range or of another type.
    """
    task.check_model(model)
    task.require_targets(part, check(limit, Size | None, "limit"))
    return mean_loss(model, task, part, batch_size, limit, by_length, ALONE).item()


@torch.no_grad()
def mean_loss(
    model: nn.Module, task: Task, part: str, batch_size: int, limit: int | None, by_length: bool, processes: Processes
) -> Tensor:
    """Return the loss of a part, on the CPU in float64, in the shape of the task's loss.

    That is (), or (trials,) in ``lora_lab.ablation.packed``, which trains several runs at once.

    Args:
        model, task, part, batch_size, limit, by_length: as for :func:`evaluate`.
        processes: they share the batches, and all of them get the mean.
    """
    total, targets = torch.zeros((), dtype=torch.float64, device="cpu"), 0  # summed over the batches
    for loss, count in batch_losses(model, task, part, batch_size, limit, by_length, processes):
        total, targets = total + loss * count, targets + count
    if processes.world_size > 1:
        sums = torch.stack([total, torch.full_like(total, targets)]).to(next(model.parameters()).device)
        processes.sum([sums])
        total, targets = sums.cpu()
    return total / targets  # NaN if no target counts


@torch.no_grad()
def batch_losses(
    model: nn.Module, task: Task, part: str, batch_size: int, limit: int | None, by_length: bool, processes: Processes
) -> Iterator[tuple[Tensor, int]]:
    """Yield each batch's mean loss and the number of targets in that mean, for one part, without dropout.

    The losses are on the CPU, in float64. Batches without a target that counts are left out.

    Args:
        model, task, part, batch_size, limit, by_length: as for :func:`evaluate`.
        processes: this one gets its share of the batches.

    Raises:
        ValueError: the task has no such part, or batch_size or limit is below 1.
    """
    batch_size, limit = check(batch_size, Size, "batch_size"), check(limit, Size | None, "limit")
    examples = task.part(part)[:limit]
    if by_length and examples.lengths is not None:
        examples = examples[examples.lengths.argsort(stable=True)]
    with restore_modes(model):
        model.eval()
        for start in range(processes.rank * batch_size, len(examples), processes.world_size * batch_size):
            batch = examples[slice(start, start + batch_size)]
            if targets := task.count_targets(batch):
                yield task.loss(model, *to_device(batch, model)).cpu().double(), targets


def data_order(task: Task, config: TrainConfig) -> DataOrder:
    """Return the order of a run's training examples.

    Raises:
        ValueError: it is to be by length, but all examples have the same; or no target counts in one of the batches,
            whose loss would be a mean over nothing.
    """
    if not config.by_length:
        order = DataOrder(len(task.train), config.seed)
    elif task.train.lengths is None:
        raise ValueError(
            f"batches is {config.batches!r}, but all examples of task {task.name!r} have the same length; use 'random'."
        )
    else:
        order = LengthOrder(task.train.lengths, config.seed, config.batch_size)
    counts = task.train.target_counts  # (n,)
    if (empty := int((counts == 0).sum())) == 0:
        return order
    for step in range(1, config.steps + 1):
        if not counts[order.rows((step - 1) * config.batch_size, config.batch_size)].any():
            raise ValueError(
                f"No target of the batch at step {step} (seed {config.seed}) counts in the loss; remove the training "
                f"examples in which none counts, {empty} of {len(counts)} in task {task.name!r}, or use larger batches."
            )
    return order


class DataOrder:
    """The order of training examples: a new random permutation in each epoch.

    It depends on nothing but the seed and the position, so that a run can be resumed without stored state.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def rows(self, position: int, count: int) -> Tensor:
        """Return the indices of the ``count`` examples from ``position`` on, counted over all epochs: (count,)."""
        rows = []
        while count:
            epoch, start = divmod(position, self.n)
            if epoch != self._epoch:
                # A new generator for each epoch; the large odd factor keeps epochs of runs with near seeds distinct.
                generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
                self._epoch, self._permutation = epoch, self.permutation(epoch, generator)
            rows.append(self._permutation[start : start + count])
            position, count = position + len(rows[-1]), count - len(rows[-1])
        return torch.cat(rows)

    def permutation(self, epoch: int, generator: torch.Generator) -> Tensor:
        """Return the order of one epoch's examples: (n,)."""
        return torch.randperm(self.n, generator=generator)  # (n,)


class LengthOrder(DataOrder):
    """Batches of examples of similar length, in random order: new ones in each epoch.

    The random permutation of an epoch is cut into groups of up to 50 batches, and each group is sorted by length before
    it is cut into batches, so that the same examples do not always meet. (Hugging Face's LengthGroupedSampler does so
    too, but leaves the batches in the order of the groups.)

    Args:
        lengths: of the examples, (n,).
        seed: as for :class:`DataOrder`.
        batch_size: examples per step.
    """

    def __init__(self, lengths: Tensor, seed: int, batch_size: int) -> None:
        super().__init__(len(lengths), seed)
        self.lengths, self.batch_size = lengths, batch_size
        # A small data set makes two groups, for its batches would be the same in every epoch if it were one.
        self.group_size = batch_size * min(50, math.ceil(self.n / (2 * batch_size)))

    def permutation(self, epoch: int, generator: torch.Generator) -> Tensor:
        """Return the order of one epoch's examples: (n,)."""
        groups = super().permutation(epoch, generator).split(self.group_size)
        rows = torch.cat([group[self.lengths[group].argsort(stable=True)] for group in groups])  # (n,)
        # A batch may take its examples from two epochs. With 10 examples in batches of 4, epoch 0 has two batches in
        # random order, then 2 examples of a third; epoch 1 begins with the 2 that complete it, then has two batches.
        # Both pairs are the last of their epoch's rows, its longest as a rule, so they too are of similar length.
        missing = min(-epoch * self.n % self.batch_size, self.n)  # from the last batch of the epoch before
        count = (self.n - missing) // self.batch_size  # batches of this epoch alone
        batches, longest = rows[: count * self.batch_size], rows[count * self.batch_size :]
        order = torch.randperm(count, generator=generator)  # (count,)
        shuffled = batches.view(count, self.batch_size)[order].flatten()  # (count * batch,)
        return torch.cat([longest[:missing], shuffled, longest[missing:]])  # (n,)


def to_device(examples: Examples, model: nn.Module) -> Batch:
    """Return inputs and targets on the model's device."""
    device = next(model.parameters()).device
    return examples.inputs.to(device), examples.targets.to(device)
