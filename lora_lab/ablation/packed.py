r"""Many adapters over one frozen base, trained in one pass.

A rank ablation trains K small adapters, and each of its runs sends its own batch through the same frozen W0.
Here the K batches are joined, so that the base multiplies once for all, and the adapters are stacked:

    h_k = W0 x_k + scaling_k * B_k A_k x_k,    k = 1 .. K        (Hu et al. 2021, equation 3, for K adapters)

Ranks are padded with zeros to the largest, R. The padding needs no mask. Where row j of A and column j of B are
zero, so are both gradients: dA[j] is B[:, j] times something, and dB[:, j] is A[j] times something. AdamW does
not move a parameter whose value and gradient are zero, with or without weight decay.

Trials are independent. Each has the data order, learning rate, clipping and schedule that it has in ``fit``, and
equals its run there up to rounding. A trial's numbers depend on how many trials there are, because kernels are chosen
by size, but are bit for bit independent of what the other trials compute.

Shapes in the comments follow one running example: K = 20 trials, a batch of 32 each, in = 64, out = 128, R = 16,
and N numbers in a padded adapter.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lab.ablation.grid import Trial
from lora_lab.ablation.packed_layer import TRIAL_LOSSES, PackedLinear, PackingError
from lora_lab.costs.fake import copy_sharing_weights
from lora_lab.history import DivergedError, History, count_parameters
from lora_lab.inject import adapter_state, match_layers, replace, require_no_adapters
from lora_lab.lean import Lean, apply_lean
from lora_lab.lean import cross_entropy as lean_cross_entropy
from lora_lab.lora import LoRALinear
from lora_lab.methods import LoRA, Method, require_unmarked
from lora_lab.models.quantize import BlockLinear
from lora_lab.system.device import own_randomness
from lora_lab.system.provenance import describe_value
from lora_lab.system.wording import progress_bar
from lora_lab.task import Examples, Loss, Task, cross_entropy
from lora_lab.train import (
    EVALUATED,
    Batch,
    DataOrder,
    TrainingStep,
    data_order,
    gradient_checkpointing_method,
    make_adamw,
    mean_loss,
    new_history,
    to_device,
)
from lora_lab.variants import RsLoRA

MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW names them


@dataclass
class PackedResult:
    """What became of one trial: what ``fit`` would have returned or raised.

    Args:
        history: as ``fit`` returns it, except that ``seconds`` is the trial's share of the pack's step (a K-th of it),
            and that the settings hold K as ``packed``.
        error: why the trial diverged, where its history ends; or None.
        adapter: the trained adapter, as :func:`lora_lab.adapter_state` gives it; empty if the trial diverged.
        state: AdamW's state of each tensor of the adapter, by name, if the trial pauses.
    """

    history: History
    error: DivergedError | None = None
    adapter: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def fit_packed(
    model: nn.Module,
    task: Task,
    trials: Sequence[Trial],
    *,
    progress: bool | None = None,
    paused: Sequence[PackedResult] | None = None,
    until: int | None = None,
) -> list[PackedResult]:
    """Train the adapter of each trial, all in one pass, on a copy of ``model`` that shares its weights.

    Result k is what ``fit(copy of model, task, trials[k].method, trials[k])`` gives, up to the rounding of sums in
    another order. (In float32 rounding errors grow with the steps, as they do between two numbers of threads.) A trial
    that diverges ends alone; the others are not affected.

    Args:
        model: on the device where it is to be used. Its activations are K times as large as those of one trial.
        task: data and loss.
        trials: with LoRA or RsLoRA without dropout. They may differ in rank, alpha, learning rate and seed. With
            ``Lean(threads=2)`` two threads compute half of them each.
        progress: as for :func:`lora_lab.fit`.
        paused: the results of a call with ``until``, one for each trial and all of the same step, from where to go on.
        until: the step after which to pause; default: the last.

    Raises:
        PackingError: a ValueError; the sentence of :func:`refusal`, or the model mixes the examples of trials.
        ValueError: there are no trials, or the lean step or gradient checkpointing does not fit the model.
    """
    _check_pack(model, task, trials)
    config = trials[0]  # for all that they have in common
    orders = _data_orders(task, trials)
    model = copy_sharing_weights(model)
    for buffer in model.buffers():
        buffer.data = buffer.clone()  # a forward pass may change it
    if config.gradient_checkpointing:
        gradient_checkpointing_method(model)()
    lean = cast(Lean | None, config.lean)
    threads = 1 if lean is None else lean.threads
    with (
        own_randomness(next(model.parameters()).device, 0),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        adapters = [_new_adapter(model, trial) for trial in trials]
        results = [
            PackedResult(_new_history(model, task, trial, adapter, len(trials)))
            for trial, adapter in zip(trials, adapters, strict=True)
        ]
        model.requires_grad_(False)
        if lean is not None:  # it looks at the adapters, of which those of one trial stand for all
            for name, layer in adapters[0].items():
                replace(model, name, layer)
            apply_lean(model, lean)
        at_start = None if lean is None or paused else _evaluate_base(model, task, config, len(trials))
        step = PackedStep(model, task.loss, adapters, trials, threads, pool)
        model.train()
        if lean is None:  # the blocks of the lean step do not mix trials
            first = torch.stack([order.rows(0, config.batch_size) for order in orders])  # (20, 32)
            _check_independence(step, task, first)
        _train(step, results, task, orders, trials, at_start, paused, until, progress)
        for k, result in enumerate(results):
            if result.error is None:
                result.adapter, result.state = step.adapter(k), step.state(k) if until else {}
        return results


def _train(
    step: PackedStep,
    results: Sequence[PackedResult],
    task: Task,
    orders: Sequence[DataOrder],
    trials: Sequence[Trial],
    at_start: dict[str, list[float]] | None,
    paused: Sequence[PackedResult] | None,
    until: int | None,
    progress: bool | None,
) -> None:
    """Train all trials, from the beginning or from where they paused, to the end or to where they are to pause."""
    model, config, count = step.model, trials[0], len(trials)
    judged = dataclasses.replace(task, loss=step.loss_on_same_batch)

    def record(number: int, columns: Mapping[str, Sequence[float]], losses: Mapping[str, Sequence[float]]) -> None:
        """Add a row to the history of each trial that goes on; one that diverges ends alone."""
        for k, result in enumerate(results):
            if result.error is None:
                try:
                    result.history.add(number, **{name: column[k] for name, column in columns.items()})
                    for part, of_trials in losses.items():
                        result.history.add_evaluation(part, of_trials[k])
                except DivergedError as error:
                    result.error = error.with_traceback(None)  # which would keep the whole pack in memory
                    step.end(k)

    done = 0 if paused is None else len(paused[0].history.rows) - 1
    with progress_bar(config.steps, f"{count} adapters", progress, done=done) as bar:
        bar.set_postfix_str("evaluating")
        if paused is None:
            nothing = {"seconds": [0.0] * count, "tokens": [0] * count}
            record(0, nothing, at_start or _evaluate(model, judged, config, count))
        else:
            for result, before in zip(results, paused, strict=True):
                result.history.rows.extend(map(dict, before.history.rows))
            step.resume(paused)
        for number in range(done + 1, (until or config.steps) + 1):
            if all(result.error for result in results):
                break
            columns = _take_step(step, task, orders, trials, number)
            bar.set_postfix_str(f"best loss {min(columns['train_loss']):.3f}")
            record(number, columns, _evaluate(model, judged, config, count) if config.evaluates(number) else {})
            bar.update()


def _take_step(
    step: PackedStep, task: Task, orders: Sequence[DataOrder], trials: Sequence[Trial], number: int
) -> dict[str, list[float]]:
    """Take the step of that number with all trials, and return the columns of its row, a value for each trial."""
    started, config = time.perf_counter(), trials[0]
    parts, weights, sizes = join_batches(task, orders, number, config)
    factor = config.rate_factor(number)
    for group in step.optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    losses, norms = step([to_device(part, step.model) for part in parts], weights)  # (20,), (20,)
    columns = {"train_loss": losses.tolist(), "grad_norm": norms.tolist()}  # waits for the device
    columns |= {"lr": [trial.lr * factor for trial in trials], "tokens": sizes}
    return columns | {"seconds": [(time.perf_counter() - started) / len(trials)] * len(trials)}


def _evaluate(model: nn.Module, task: Task, config: Trial, trials: int) -> dict[str, list[float]]:
    """Return the losses of each trial by part; a loss that is one number, as before training, is that of all trials."""
    sizes = config.batch_size, config.eval_examples, config.by_length
    return {part: mean_loss(model, task, part, *sizes).expand(trials).tolist() for part in EVALUATED}


def _evaluate_base(model: nn.Module, task: Task, config: Trial, trials: int) -> dict[str, list[float]]:
    """Return the losses before training of a lean model, in which all updates are zero: the same for all trials."""
    rows = cast(Lean, config.lean).loss_rows
    loss = partial(lean_cross_entropy, rows=rows) if task.loss is cross_entropy else task.loss
    return _evaluate(model, dataclasses.replace(task, loss=cast(Loss, loss)), config, trials)


def _data_orders(task: Task, trials: Sequence[Trial]) -> list[DataOrder]:
    """Check that what is evaluated has targets, and return the data order of each trial; one for each seed."""
    for part in EVALUATED:
        task.require_targets(part, trials[0].eval_examples)
    by_seed = {trial.seed: data_order(task, trial) for trial in trials}
    return [by_seed[trial.seed] for trial in trials]


def join_batches(
    task: Task, orders: Sequence[DataOrder], step: int, config: Trial
) -> tuple[list[Examples], list[Tensor], list[int]]:
    """Return the micro-batches of a step, as :func:`lora_lab.train.micro_batches`, each with those of all trials.

    Returns:
        The micro-batches; each one's share of every trial's targets that count, (trials,); and the size of each trial's
        batch, as in ``task.size``.
    """
    position = (step - 1) * config.batch_size
    rows = torch.stack([order.rows(position, config.batch_size) for order in orders])  # (20, 32)
    columns = rows.split(math.ceil(config.batch_size / config.accumulate), dim=1)
    parts = [task.train[part.flatten()] for part in columns]  # 640 rows
    counts = [part.target_counts.view(len(rows), -1).sum(1).double() for part in parts]  # (20,)
    total = torch.stack(counts).sum(0)  # (20,)
    sizes = total.long().tolist() if task.unit == "tokens" else [config.batch_size] * len(rows)
    return parts, [count / total for count in counts], sizes


def lora_of(trial: Trial) -> LoRA:
    """Return the trial's method, after :func:`refusal` has found that it is one of LoRA."""
    return cast(LoRA, trial.method)


def _new_adapter(model: nn.Module, trial: Trial) -> dict[str, LoRALinear]:
    """Return the layers of one trial as ``inject`` makes them: one generator, layers in the model's order."""
    generator, method = torch.Generator().manual_seed(trial.seed), lora_of(trial)
    layer = cast(type[LoRALinear], method.layer or LoRALinear)
    layers = adapted_layers(model, method).items()
    return {name: layer(base, method.rank, method.alpha, generator=generator) for name, base in layers}


def _factors(adapter: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    """Return A (r, in) and B (out, r) of each layer, by their names in :func:`lora_lab.adapter_state`."""
    return {f"{name}.{part}": getattr(layer, part) for name, layer in adapter.items() for part in ("lora_A", "lora_B")}


def _new_history(model: nn.Module, task: Task, trial: Trial, adapter: Mapping[str, LoRALinear], trials: int) -> History:
    """Return the history of a trial, with the sizes that it would have alone."""
    history, factors = new_history(task, trial.method, trial, model), _factors(adapter).values()
    history.settings["packed"] = trials
    history.trainable_parameters = sum(factor.numel() for factor in factors)
    history.total_parameters = count_parameters(model) + history.trainable_parameters
    history.optimizer_bytes = sum(2 * factor.nbytes + 4 for factor in factors)  # two moments, and a count of steps
    return history


@dataclass
class Lane:
    """The trials that one thread computes, in modules of its own, which share the frozen weights with the other lanes.

    Args:
        model: with a packed layer in place of each adapted one.
        trials: which of the pack's trials.
        factors: A and B of each packed layer in turn.
    """

    model: nn.Module
    trials: slice
    factors: list[Tensor]

    def __len__(self) -> int:
        return self.trials.stop - self.trials.start

    def rows(self, joined: Tensor, trials: int) -> Tensor:
        """Return this lane's rows of a tensor that holds those of all trials, one after another."""
        each = len(joined) // trials
        return joined[self.trials.start * each : self.trials.stop * each]


class PackedStep(TrainingStep):
    """A training step of all trials at once, with a loss and a norm for each.

    The adapters of all trials are the rows of one tensor, ``values`` (K, N), and the factors of the layers are views of
    it. So clipping is a norm of each row, and AdamW one call: its parameters are the rows of the neighbouring trials of
    one learning rate.

    Args:
        model: frozen; the packed layers are put into it, and into a copy of its modules for each further thread.
        loss: one of :data:`TRIAL_LOSSES`.
        adapters: of each trial, as it starts.
        trials: whose adapters they are.
        threads, pool: how many lanes there are, and where they are computed.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        adapters: Sequence[Mapping[str, LoRALinear]],
        trials: Sequence[Trial],
        threads: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        config, layers = trials[0], adapters[0].values()
        rank = max(layer.rank for adapter in adapters for layer in adapter.values())
        sides = [(layer.base.in_features, layer.base.out_features) for layer in layers]
        self.shapes = [shape for inputs, outputs in sides for shape in ((rank, inputs), (outputs, rank))]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.adapters, self.trials, self.pool = adapters, len(adapters), pool
        self.values = next(iter(layers)).lora_A.new_zeros(self.trials, sum(self.sizes))  # (20, N)
        self.gradient = torch.zeros_like(self.values)  # (20, N)
        for k, adapter in enumerate(adapters):
            self._write(self.values[k], k, _factors(adapter))
        self.lanes = self._place(model, math.ceil(self.trials / threads))
        self.blocks: list[tuple[slice, nn.Parameter]] = []
        groups = []
        for lr, same in itertools.groupby(range(self.trials), lambda k: trials[k].lr):
            first, *others = same
            rows = slice(first, first + 1 + len(others))
            parameter = nn.Parameter(self.values[rows])  # (20, N)
            parameter.grad = self.gradient[rows]  # (20, N)
            self.blocks.append((rows, parameter))
            groups.append({"params": [parameter], "lr": lr, "peak": lr, "weight_decay": config.weight_decay})
        self.trial_losses = TRIAL_LOSSES[loss]
        if config.lean is not None and loss is cross_entropy:
            self.trial_losses = partial(self.trial_losses, rows=cast(Lean, config.lean).loss_rows)
        super().__init__(model, loss, make_adamw(groups), config.clip, len(self.lanes))

    def _place(self, model: nn.Module, size: int) -> list[Lane]:
        """Put the packed layers into the model, and into copies of it, each for so many trials."""
        views = [
            part.unflatten(1, shape) for part, shape in zip(self.values.split(self.sizes, 1), self.shapes, strict=True)
        ]
        starts, lanes = range(0, self.trials, size), []
        models = [model, *(copy_sharing_weights(model) for _ in starts[1:])]
        for start, own in zip(starts, models, strict=True):
            trials, factors = slice(start, min(start + size, self.trials)), []
            for name, A, B in zip(self.adapters[0], views[::2], views[1::2], strict=True):
                scaling = A.new_tensor([adapter[name].scaling for adapter in self.adapters[trials]])  # (20,)
                layer = own.get_submodule(name)
                base = cast(nn.Linear, layer.base if isinstance(layer, LoRALinear) else layer)
                packed = PackedLinear(base, A[trials], B[trials], scaling)
                replace(own, name, packed)
                factors += [packed.lora_A, packed.lora_B]
            lanes.append(Lane(own, trials, factors))
        return lanes

    def _run_lanes(self, compute: Callable[[Lane], Tensor]) -> Tensor:
        """Return what is computed for the trials of each lane, a number for each trial: (trials,)."""
        if len(self.lanes) == 1:
            return compute(self.lanes[0])  # (20,)
        with_gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()

        def in_thread(lane: Lane) -> Tensor:
            with torch.set_grad_enabled(with_gradients):  # a setting of each thread
                return compute(lane)

        try:
            torch.set_num_threads(1)
            return torch.cat(list(self.pool.map(in_thread, self.lanes)))  # (20,)
        finally:
            torch.set_num_threads(threads)

    def __call__(self, batches: Sequence[Batch], weights: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Take one step of every trial: forward, backward, clip, update.

        Args:
            batches: micro-batches, each of which holds those of all trials in their order.
            weights: of the micro-batches, each one's share of each trial's batch: (trials,) each.

        Returns:
            The losses, and the norms of the gradients before clipping: (trials,) each.
        """
        losses = self._run_lanes(lambda lane: self._backward(lane, batches, weights))  # (20,)
        norms = torch.linalg.vector_norm(self.gradient, dim=1)  # (20,)
        if self.clip is not None:
            # As torch.nn.utils.clip_grad_norm_, for each trial.
            self.gradient.mul_((self.clip / (norms + 1e-6)).clamp(max=1.0)[:, None])  # (20, N)
        self.optimizer.step()
        return losses, norms

    def _backward(self, lane: Lane, batches: Sequence[Batch], weights: Sequence[Tensor]) -> Tensor:
        """Return the weighted losses of a lane's trials; their gradients are written into its rows of ``gradient``."""
        into = self.gradient[lane.trials]  # (20, N)
        total = into.new_zeros(len(lane))  # (20,)
        for number, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            losses = self._losses(lane, *batch)  # (20,)
            shares = weight[lane.trials].to(losses)  # (20,)
            # Trials are independent, so the gradients of all losses are those of their sum.
            parts = [part.flatten(1) for part in torch.autograd.grad(losses, lane.factors, shares)]
            if number == 0:
                torch.cat(parts, dim=1, out=into)  # (20, N)
            else:
                into.add_(torch.cat(parts, dim=1))  # (20, N)
            total += losses.detach() * shares
        return total

    def _losses(self, lane: Lane, inputs: Tensor, targets: Tensor) -> Tensor:
        rows = (lane.rows(part, self.trials) for part in (inputs, targets))
        return self.trial_losses(lane.model, *rows, trials=len(lane))  # (20,)

    def batch_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return each trial's mean loss on its own rows: (trials,)."""
        return self._run_lanes(lambda lane: self._losses(lane, inputs, targets))  # (20,)

    def loss_on_same_batch(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return each trial's mean loss on one batch that all of them are given: (trials,)."""
        return self._run_lanes(
            lambda lane: self.trial_losses(
                lane.model, torch.cat([inputs] * len(lane)), torch.cat([targets] * len(lane)), trials=len(lane)
            )
        )  # (20,)

    def _parts(self, row: Tensor, k: int) -> dict[str, Tensor]:
        """Return views of trial k's row of a tensor like ``values``, in the shapes and by the names of its factors."""
        views = (part.view(shape) for part, shape in zip(row.split(self.sizes), self.shapes, strict=True))
        factors = _factors(self.adapters[k]).items()
        return {name: view[: len(own), : own.shape[1]] for (name, own), view in zip(factors, views, strict=True)}

    @torch.no_grad()
    def _write(self, row: Tensor, k: int, factors: Mapping[str, Tensor]) -> None:
        for name, part in self._parts(row, k).items():
            part.copy_(factors[name])

    @torch.no_grad()
    def adapter(self, k: int) -> dict[str, Tensor]:
        """Put trial k's adapter alone into the model, and return its state."""
        parts = self._parts(self.values[k], k)
        for name, factor in _factors(self.adapters[k]).items():
            factor.copy_(parts[name])
        for name, layer in self.adapters[k].items():
            replace(self.model, name, layer)
        return adapter_state(self.model)

    def _row(self, k: int) -> tuple[nn.Parameter, int]:
        """Return the optimiser's parameter with trial k's adapter, and its row there."""
        rows, parameter = next(block for block in self.blocks if k < block[0].stop)
        return parameter, k - rows.start

    def state(self, k: int) -> dict[str, dict[str, Tensor]]:
        """Return AdamW's state of each tensor of trial k's adapter."""
        parameter, place = self._row(k)
        state = self.optimizer.state[parameter]
        parts = {moment: self._parts(state[moment][place], k) for moment in MOMENTS}
        return {
            name: {"step": state["step"].clone()} | {moment: parts[moment][name].clone() for moment in MOMENTS}
            for name in _factors(self.adapters[k])
        }

    def resume(self, paused: Sequence[PackedResult]) -> None:
        """Take up the adapters and moments of trials that have paused at the same step."""
        for rows, parameter in self.blocks:
            state = {moment: torch.zeros_like(parameter) for moment in MOMENTS}  # (20, N) each
            for k in range(rows.start, rows.stop):
                self._write(self.values[k], k, paused[k].adapter)
                for moment, of_trials in state.items():
                    of_trial = {name: own[moment] for name, own in paused[k].state.items()}
                    self._write(of_trials[k - rows.start], k, of_trial)
            done = parameter.new_tensor(len(paused[0].history.rows) - 1, dtype=torch.float32)  # ()
            self.optimizer.state[parameter] = {"step": done, **state}

    @torch.no_grad()
    def end(self, k: int) -> None:
        """End trial k: its place computes the base model from now on, with updates of zero.

        Without the place the joined batch would be smaller, and the base's product may round the other trials' rows
        differently (with three trials of the digits transformer it does).
        """
        parameter, place = self._row(k)
        for tensor in (parameter, *self.optimizer.state[parameter].values()):
            if tensor.ndim:  # not the count of steps
                tensor[place] = 0.0  # (N,)


def _check_independence(step: PackedStep, task: Task, rows: Tensor) -> None:
    """Make sure that trials do not influence each other, for no list of unsuitable modules can be complete.

    The examples and adapters of all other trials are changed: a trial's loss must neither change nor depend on them.
    Some models leak from a row to later ones, which the first trial does not notice; others leak backwards.

    Args:
        rows: the examples of each trial's first batch, (20, 32).

    Raises:
        PackingError: they do, or the forward pass draws at random, or a layer takes no part in the loss.
    """
    (lane,), device = step.lanes, step.values.device
    # Not cut to its longest row, because other rows of another length would change the rounding of all losses.
    uncut = Examples(task.train.inputs, task.train.targets)

    def losses_on(rows: Tensor) -> Tensor:
        return step.batch_loss(*to_device(uncut[rows.flatten()], step.model))  # (20,)

    @torch.no_grad()
    def fill(trials: Tensor, value: float) -> None:
        for B in lane.factors[1::2]:
            B[trials] = value  # (19, 128, 16)

    def state() -> list[Tensor]:
        on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *on_gpu, *(buffer.clone() for buffer in step.model.buffers())]

    before, losses = state(), losses_on(rows).detach()  # (20,)
    alone = all(map(torch.equal, before, state()))
    for k in {0, len(losses) - 1}:
        others = torch.arange(len(losses)) != k  # (20,)
        fill(others, 1.0)
        loss = losses_on(torch.where(others[:, None], (rows + 1) % len(task.train), rows))[k]  # ()
        gradients = torch.autograd.grad(loss, lane.factors, allow_unused=True)
        fill(others, 0.0)
        alone &= bool(loss == losses[k]) or not bool(losses[k].isfinite())
        for gradient in gradients:  # infinite ones are of a trial that diverges
            alone &= gradient is not None and not bool(gradient[others].nan_to_num(0.0, 0.0, 0.0).any())
    if not alone:
        raise PackingError(
            "In this model the trials of a pack would not be independent: it draws at random or changes a buffer in "
            "training, an adapted layer takes no part in the loss, or numbers of one example reach another, as where "
            "the first dimension of a tensor is not the batch; run the trials separately, with fit."
        )


def _check_pack(model: nn.Module, task: Task, trials: Sequence[Trial]) -> None:
    """Raise ValueError if trials cannot be a pack."""
    if not trials:
        raise ValueError(
            "trials is empty, but a pack needs at least one, such as Trial(LoRA(rank=8), 1e-3, steps=100)."
        )
    first = trials[0]
    for trial in trials:
        if common_settings(trial) != common_settings(first):
            raise PackingError(
                f"The trials of a pack may differ in rank, alpha, learning rate and seed alone, and {trial} differs "
                f"from {first} in more; put them into different packs."
            )
    if reason := refusal(model, task, first.method, first.autocast):
        raise PackingError(reason)


def common_settings(trial: Trial) -> tuple[Any, ...]:
    """Return what the trials of a pack must have in common: all but rank, alpha, learning rate and seed."""
    method = trial.method
    method = dataclasses.replace(method, rank=1, alpha=1.0) if isinstance(method, LoRA) else method
    same = dataclasses.replace(trial, method=method, lr=1.0, seed=0)
    return same, trial.accumulate, trial.gradient_checkpointing, trial.lean


def refusal(model: nn.Module, task: Task, method: Method, autocast: torch.dtype | None = None) -> str | None:
    """Return why a run cannot be packed, in a sentence, or None if it can.

    It looks at modules and settings only; :func:`fit_packed` also tries the model, before it trains.
    """
    if type(method) is not LoRA and type(method) is not RsLoRA:  # the two differ in scaling alone
        name = getattr(method, "name", method)
        return f"Method {name!r} cannot be packed, only LoRA and RsLoRA can; use fit."
    if autocast is not None:
        return "A pack multiplies in the dtypes of its weights, without autocast; use fit, or Lean(torch.bfloat16)."
    if method.dropout > 0:
        return f"The method's dropout is {method.dropout:g}, but trials in one pass must not draw at random; use fit."
    if not any(task.loss is loss for loss in TRIAL_LOSSES):  # a loss need not be hashable
        return (
            f"The loss {describe_value(task.loss)!r} cannot be computed for each trial of a pack; use fit, or "
            f"{' or '.join(loss.__name__ for loss in TRIAL_LOSSES)} of lora_lab.tasks."
        )
    try:
        require_unmarked(model)
        require_no_adapters(model)
        layers = adapted_layers(model, method)
    except ValueError as error:  # fit would say the same
        return str(error)
    dtypes = set()
    for name, layer in layers.items():
        if type(layer) not in (nn.Linear, BlockLinear):
            return f"Layer {name!r} is a {type(layer).__name__}, but only adapters of nn.Linear can be packed; use fit."
        dtypes.add(layer.dtype if isinstance(layer, BlockLinear) else layer.weight.dtype)
    if len({torch.promote_types(dtype, torch.float32) for dtype in dtypes}) > 1:
        named = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"The layers to adapt are in {named}, but a pack needs adapters of one dtype; use fit."
    for name, module in model.named_modules():
        if reason := _mixing(module):
            return f"Module {name!r} ({type(module).__name__}) {reason}; use fit."
    return None


def adapted_layers(model: nn.Module, method: LoRA) -> dict[str, nn.Linear | BlockLinear]:
    """Return the layers that a method adapts, by name."""
    names = match_layers(model, method.targets, method.exclude)
    return {name: cast(nn.Linear | BlockLinear, model.get_submodule(name)) for name in names}


def _mixing(module: nn.Module) -> str | None:
    """Return why a module would mix the trials of a pack, or None."""
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    if batch_norm or getattr(module, "track_running_stats", False):
        return "keeps statistics of the batch in training, which the trials of a pack would share"
    # torch's own dropout keeps its probability as p; attention and recurrent layers, here and in other libraries,
    # keep it under a name with "drop" in it.
    own = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
    for name in [*own, *(name for name in vars(module) if "drop" in name)]:
        value = getattr(module, name)
        if isinstance(value, float) and value > 0:
            return f"has dropout {value:g}, but trials in one pass must not draw at random"
    return None
