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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lab.ablation.grid import Run
from lora_lab.ablation.packed_layer import TRIAL_LOSSES, PackedLinear, PackingError
from lora_lab.ablation.packing import lora_of, refusal
from lora_lab.costs.fake import copy_sharing_weights
from lora_lab.history import DivergedError, History, count_parameters
from lora_lab.inject import adapter_state, match_layers, replace
from lora_lab.lean import Lean, apply_lean
from lora_lab.lean import cross_entropy as lean_cross_entropy
from lora_lab.lora import LoRALinear
from lora_lab.system.device import own_randomness
from lora_lab.system.wording import progress_bar
from lora_lab.task import Examples, Loss, Task, cross_entropy, modes_restored
from lora_lab.train import (
    EVALUATED,
    Batch,
    DataOrder,
    TrainConfig,
    TrainingStep,
    check_batches,
    check_evaluated,
    data_order,
    enable_checkpointing,
    make_adamw,
    mean_loss,
    to_device,
)

MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW names them


@dataclass
class PackedResult:
    """What became of one trial: what ``fit`` would have returned or raised.

    Args:
        history: as ``fit`` returns it, except that ``seconds`` is the trial's share of the pack's step (a K-th of it),
            and that the settings hold K as ``packed``. None if the trial diverged.
        adapter: the trained adapter, as :func:`lora_lab.adapter_state` gives it; empty if the trial diverged.
        error: why the trial ended early, or None.
        moments: AdamW's moments, "exp_avg" and "exp_avg_sq", each of all tensors of the adapter by name, if the
            run pauses.
    """

    history: History | None = None
    adapter: dict[str, Tensor] = field(default_factory=dict)
    error: DivergedError | None = None
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history's rows; none if the trial diverged."""
        return [] if self.history is None else self.history.rows


def fit_packed(
    model: nn.Module,
    task: Task,
    runs: Sequence[Run],
    config: TrainConfig | None = None,
    *,
    progress: bool | None = None,
    paused: Sequence[PackedResult] | None = None,
    until: int | None = None,
    **options: Any,
) -> list[PackedResult]:
    """Train one adapter for each run, all in one pass, and leave ``model`` as it was.

    Result i is what ``fit(copy of model, task, runs[i].method, lr=runs[i].lr, seed=runs[i].seed, ...)`` gives,
    up to the rounding of sums in another order. (In float32 rounding errors grow with the steps, as they do between
    two numbers of threads.) A trial that diverges ends alone; the others are not affected.

    Args:
        model: a freshly loaded model, on the device where it is to be used. Its activations are K times as large
            as those of one run.
        task: data and loss.
        runs: a :class:`Run` or a :class:`lora_lab.Trial` for each adapter, with LoRA or RsLoRA without dropout; ranks,
            alphas, rates and seeds may differ, the adapted layers may not.
        config: how to train; ``lr`` and ``seed`` are each run's. ``batch_size`` is that of each trial.
        progress: as for :func:`lora_lab.fit`.
        paused: the results of a call with ``until``, one for each run and all of the same step, from where to go on.
        until: the step after which to pause; default: the last.
        **options: the fields of :class:`lora_lab.train.TrainConfig`; they override ``config``. With
            ``Lean(threads=2)`` two threads compute half of the runs each.

    Raises:
        PackingError: a ValueError; the sentence of :func:`refusal`, or the model mixes the examples of trials.
        ValueError: there are no runs, a number is out of range, or the lean step or gradient checkpointing does not
            fit the model.
    """
    make_config = TrainConfig if config is None else partial(dataclasses.replace, config)
    configs = [make_config(lr=run.lr, seed=run.seed, **options) for run in runs]
    names = _common_layers(model, task, runs, configs)
    check_evaluated(task, configs[0])
    orders = data_orders(task, configs)  # which checks the batches
    config = configs[0]  # all but lr and seed are the same for all
    lean = cast(Lean | None, config.lean)
    if lean is not None or config.gradient_checkpointing:
        model = copy_sharing_weights(model)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    with own_randomness(next(model.parameters()).device, 0), modes_restored(model), _restored(model, names):
        adapters = PackedAdapters(model, runs, names, lean)
        at_start = None
        if lean is not None and paused is None:
            loss = partial(lean_cross_entropy, rows=lean.loss_rows) if task.loss is cross_entropy else task.loss
            base = dataclasses.replace(task, loss=cast(Loss, loss))  # all updates are zero
            at_start = _evaluations(model, base, config, len(runs))
        adapters.place(1 if lean is None else lean.threads)
        step = PackedStep(task.loss, adapters, configs)
        history = PackedHistory(task, configs, step, paused)
        model.train()
        with step:
            if lean is None:  # the blocks of the lean step do not mix trials
                _check_independence(step, task, joined_rows(orders, 0, config.batch_size))
            _train(step, history, task, orders, configs, at_start, paused, until, progress)
        return [
            PackedResult(error=history.errors[k])
            if k in history.errors
            else PackedResult(history.live[k], adapters.unpack(k), moments=step.moments(k) if until else {})
            for k in range(len(runs))
        ]


def _train(
    step: PackedStep,
    history: PackedHistory,
    task: Task,
    orders: Sequence[DataOrder],
    configs: Sequence[TrainConfig],
    at_start: dict[str, list[float]] | None,
    paused: Sequence[PackedResult] | None,
    until: int | None,
    progress: bool | None,
) -> None:
    """Train all trials, from the beginning or from where they paused, to the end or to where they are to pause."""
    model, config, trials = step.model, configs[0], len(configs)
    judged = dataclasses.replace(task, loss=step.loss_on_same_batch)
    peaks = [group["lr"] for group in step.optimizer.param_groups]
    done = 0 if paused is None else len(paused[0].rows) - 1
    with progress_bar(config.steps, f"{trials} adapters", progress, done=done) as bar:
        bar.set_postfix_str("evaluating")
        if paused is None:
            history.add_evaluations(at_start or _evaluations(model, judged, config, trials))
        else:
            step.resume(paused)
        for number in range(done + 1, (until or config.steps) + 1):
            if not history.live:
                break
            started = time.perf_counter()
            parts, weights, counts = joined_batches(task, orders, number, config)
            factor = config.rate_factor(number)
            for group, peak in zip(step.optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            losses, norms = step([to_device(part, model) for part in parts], weights)  # (20,), (20,)
            history.add(
                number,
                train_loss=losses.tolist(),  # waits for the device
                grad_norm=norms.tolist(),
                lr=[each.lr * factor for each in configs],
                tokens=counts,
                seconds=[(time.perf_counter() - started) / trials] * trials,
            )
            bar.set_postfix_str(history.status())
            if config.evaluates(number):
                history.add_evaluations(_evaluations(model, judged, config, trials))
            bar.update()


def _evaluations(model: nn.Module, task: Task, config: TrainConfig, trials: int) -> dict[str, list[float]]:
    """The losses of each trial by part; a loss that is one number, as before training, is that of all trials."""
    sizes = config.batch_size, config.eval_examples, config.by_length
    return {part: mean_loss(model, task, part, *sizes).expand(trials).tolist() for part in EVALUATED}


def _common_layers(model: nn.Module, task: Task, runs: Sequence[Run], configs: Sequence[TrainConfig]) -> list[str]:
    """The names of the layers that all runs adapt."""
    if not runs:
        raise ValueError("runs is empty, but a pack needs at least one, such as Run(LoRA(rank=8), lr=1e-3).")
    for run in runs:
        if reason := refusal(model, task, run.method, configs[0].autocast):
            raise PackingError(reason)
    names = [list(match_layers(model, lora_of(run).targets, lora_of(run).exclude)) for run in runs]
    for run, adapted in zip(runs, names, strict=True):
        if adapted != names[0]:
            raise PackingError(
                f"{run.method} adapts different layers from {runs[0].method}, but the runs of a pack must adapt the "
                "same ones; put them into different packs."
            )
    return names[0]


@contextmanager
def _restored(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let the block change what is trainable, buffers and the named layers, and undo it afterwards."""
    layers = {name: model.get_submodule(name) for name in names}
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for name, layer in layers.items():
            replace(model, name, layer)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        for module, name, buffer, value in buffers:
            setattr(module, name, buffer.copy_(value))


@dataclass
class Lane:
    """The trials that one thread computes, in modules of its own, which share the frozen weights with the other lanes.

    Args:
        model: with a packed layer in place of each adapted one.
        trials: which of the pack's trials.
        layers: the packed layers by name.
    """

    model: nn.Module
    trials: slice
    layers: dict[str, PackedLinear]

    def __post_init__(self) -> None:
        self.factors = [factor for layer in self.layers.values() for factor in (layer.lora_A, layer.lora_B)]

    def __len__(self) -> int:
        return self.trials.stop - self.trials.start

    def rows(self, joined: Tensor, trials: int) -> Tensor:
        """This lane's rows of a tensor that holds those of all trials, one after another."""
        each = len(joined) // trials
        return joined[self.trials.start * each : self.trials.stop * each]


class PackedAdapters:
    """The adapters of all runs in one tensor, ``values`` (K, N), a row per trial.

    :meth:`place` puts them into the model. The factors of the layers are views of the tensor. So clipping is a norm of
    each row, and AdamW one call.

    Args:
        model: all its parameters are frozen, and its blocks made lean, in place.
        runs: the trials.
        names: the layers that all of them adapt.
        lean: how, or None.
    """

    def __init__(self, model: nn.Module, runs: Sequence[Run], names: Sequence[str], lean: Lean | None = None) -> None:
        self.model, self.runs, self.names = model, runs, names
        self.frozen_parameters = count_parameters(model)
        self.unpacked = [_new_adapters(model, names, run) for run in runs]
        model.requires_grad_(False)
        if lean is not None:  # it looks at the adapters, of which those of one run stand for all
            for name, adapter in self.unpacked[0].items():
                replace(model, name, adapter)
            apply_lean(model, lean)

    def place(self, threads: int = 1) -> None:
        """Put the adapters of all runs into the model, or into as many copies of its modules as there are threads."""
        first, count = self.unpacked[0], len(self.runs)
        rank = max(lora_of(run).rank for run in self.runs)
        shapes = [
            shape
            for base in (adapter.base for adapter in first.values())
            for shape in ((rank, base.in_features), (base.out_features, rank))
        ]
        self.sizes, self.shapes = [math.prod(shape) for shape in shapes], shapes
        like = first[self.names[0]].lora_A  # for its dtype and device
        self.values = like.new_zeros(count, sum(self.sizes))  # (20, N)
        views = [part.unflatten(1, shape) for part, shape in zip(self.values.split(self.sizes, 1), shapes, strict=True)]
        factors = dict(zip(self.names, zip(views[::2], views[1::2], strict=True), strict=True))
        for name, (A, _) in factors.items():
            for k, layers in enumerate(self.unpacked):
                A[k, : layers[name].rank] = layers[name].lora_A.detach()  # (r, in); B is zero, as LoRALinear starts
        size = math.ceil(count / threads)
        parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        models = [self.model, *(copy_sharing_weights(self.model) for _ in parts[1:])]
        self.lanes = [self._lane(model, part, factors) for model, part in zip(models, parts, strict=True)]

    def _lane(self, model: nn.Module, trials: slice, factors: dict[str, tuple[Tensor, Tensor]]) -> Lane:
        layers = {}
        for name, (A, B) in factors.items():
            layer = model.get_submodule(name)
            scaling = A.new_tensor([adapters[name].scaling for adapters in self.unpacked[trials]])  # (20,)
            base = cast(nn.Linear, layer.base if isinstance(layer, LoRALinear) else layer)
            layers[name] = PackedLinear(base, A[trials], B[trials], scaling)
            replace(model, name, layers[name])
        return Lane(model, trials, layers)

    def parts(self, row: Tensor, k: int) -> dict[str, Tensor]:
        """Views of trial k's row of a tensor like ``values``, without padding, named as in its adapter's state."""
        views = [part.view(shape) for part, shape in zip(row.split(self.sizes), self.shapes, strict=True)]
        rank = lora_of(self.runs[k]).rank
        A = {f"{name}.lora_A": view[:rank] for name, view in zip(self.names, views[::2], strict=True)}  # (r, in)
        B = {f"{name}.lora_B": view[:, :rank] for name, view in zip(self.names, views[1::2], strict=True)}  # (out, r)
        return A | B

    @torch.no_grad()
    def unpack(self, k: int) -> dict[str, Tensor]:
        """Put trial k's adapter alone into the model, and return its state."""
        parts = self.parts(self.values[k], k)
        for name, adapter in self.unpacked[k].items():
            adapter.lora_A.copy_(parts[f"{name}.lora_A"])  # (r, in)
            adapter.lora_B.copy_(parts[f"{name}.lora_B"])  # (out, r)
            replace(self.model, name, adapter)
        return adapter_state(self.model)


def _new_adapters(model: nn.Module, names: Sequence[str], run: Run) -> dict[str, LoRALinear]:
    """The adapters of one run as ``inject`` makes them: one generator, layers in the model's order."""
    generator = torch.Generator().manual_seed(run.seed)
    method = lora_of(run)
    layer = cast(type[LoRALinear], method.layer or LoRALinear)
    return {name: layer(model.get_submodule(name), method.rank, method.alpha, generator=generator) for name in names}


class PackedStep(TrainingStep):
    """A training step of all trials at once, with a loss and a norm for each.

    The optimiser has a parameter for each block of trials of one learning rate, their rows of ``adapters.values``.
    """

    def __init__(self, loss: Loss, adapters: PackedAdapters, configs: Sequence[TrainConfig]) -> None:
        self.adapters, self.trials, config = adapters, len(configs), configs[0]
        self.gradient = torch.zeros_like(adapters.values)  # (20, N)
        self.blocks: list[tuple[slice, nn.Parameter]] = []
        groups = []
        for lr, same in itertools.groupby(enumerate(configs), lambda pair: pair[1].lr):
            places = [k for k, _ in same]
            rows = slice(places[0], places[-1] + 1)
            parameter = nn.Parameter(adapters.values[rows])  # (20, N)
            parameter.grad = self.gradient[rows]  # (20, N)
            self.blocks.append((rows, parameter))
            groups.append({"params": [parameter], "lr": lr, "weight_decay": config.weight_decay})
        optimizer = make_adamw(groups)
        self.trial_losses = TRIAL_LOSSES[loss]
        if config.lean is not None and loss is cross_entropy:
            self.trial_losses = partial(self.trial_losses, rows=cast(Lean, config.lean).loss_rows)
        super().__init__(adapters.model, loss, optimizer, config.clip, len(adapters.lanes))
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> PackedStep:
        if self.threads > 1:
            self._pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def _in_lanes(self, compute: Callable[[Lane], Tensor]) -> Tensor:
        """What is computed for the trials of each lane, a number for each trial: (trials,)."""
        lanes = self.adapters.lanes
        if self._pool is None:
            return torch.cat([compute(lane) for lane in lanes])  # (20,)
        with_gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()

        def in_thread(lane: Lane) -> Tensor:
            with torch.set_grad_enabled(with_gradients):  # a setting of each thread
                return compute(lane)

        try:
            torch.set_num_threads(1)
            return torch.cat(list(self._pool.map(in_thread, lanes)))  # (20,)
        finally:
            torch.set_num_threads(threads)

    def __call__(self, batches: Sequence[Batch], weights: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """One step of every trial: forward, backward, clip, step.

        Args:
            batches: micro-batches, each of which holds those of all trials in their order.
            weights: of the micro-batches, each one's share of each trial's batch: (trials,) each.

        Returns:
            The losses, and the norms of the gradients before clipping: (trials,) each.
        """
        losses = self._in_lanes(lambda lane: self._backward(lane, batches, weights))  # (20,)
        norms = torch.linalg.vector_norm(self.gradient, dim=1)  # (20,)
        if self.clip is not None:
            # As torch.nn.utils.clip_grad_norm_, for each trial.
            self.gradient.mul_((self.clip / (norms + 1e-6)).clamp(max=1.0)[:, None])  # (20, N)
        self.optimizer.step()
        return losses, norms

    def _backward(self, lane: Lane, batches: Sequence[Batch], weights: Sequence[Tensor]) -> Tensor:
        """The weighted losses of a lane's trials, whose gradients are written into its rows of ``gradient``."""
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
        """Each trial's mean loss on its own rows: (trials,)."""
        return self._in_lanes(lambda lane: self._losses(lane, inputs, targets))  # (20,)

    def loss_on_same_batch(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Each trial's mean loss on one batch that all of them are given: (trials,)."""
        return self._in_lanes(
            lambda lane: self.trial_losses(
                lane.model, torch.cat([inputs] * len(lane)), torch.cat([targets] * len(lane)), trials=len(lane)
            )
        )  # (20,)

    def _row(self, k: int) -> tuple[nn.Parameter, int]:
        """The optimiser's parameter with trial k's adapter, and its row there."""
        rows, parameter = next(block for block in self.blocks if k < block[0].stop)
        return parameter, k - rows.start

    def moments(self, k: int) -> dict[str, dict[str, Tensor]]:
        """AdamW's moments of trial k's adapter."""
        parameter, place = self._row(k)
        state = self.optimizer.state[parameter]
        return {
            moment: {name: part.clone() for name, part in self.adapters.parts(state[moment][place], k).items()}
            for moment in MOMENTS
        }

    @torch.no_grad()
    def resume(self, paused: Sequence[PackedResult]) -> None:
        """Take up the adapters and moments of trials that have paused at the same step."""
        for rows, parameter in self.blocks:
            done = parameter.new_tensor(len(paused[0].rows) - 1, dtype=torch.float32)  # ()
            state = {moment: torch.zeros_like(parameter) for moment in MOMENTS}  # (20, N) each
            for k in range(rows.start, rows.stop):
                for key, stored in {"adapter": paused[k].adapter, **paused[k].moments}.items():
                    row = state.get(key, parameter)[k - rows.start]  # (N,)
                    for name, part in self.adapters.parts(row, k).items():
                        part.copy_(stored[name])
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


class PackedHistory:
    """The histories of a pack's trials, which grow together; a trial that diverges ends alone.

    They begin with row 0, the model before training, or with the rows of trials that have paused. ``live`` holds those
    that have not diverged by index, and ``errors`` what ``fit`` would have raised for the others.
    """

    def __init__(
        self, task: Task, configs: Sequence[TrainConfig], step: PackedStep, paused: Sequence[PackedResult] | None
    ) -> None:
        self.live: dict[int, History] = {}
        self.errors: dict[int, DivergedError] = {}
        self._step, adapters = step, step.adapters
        for k, (run, config) in enumerate(zip(adapters.runs, configs, strict=True)):
            factors = [factor for layer in adapters.unpacked[k].values() for factor in (layer.lora_A, layer.lora_B)]
            trainable = sum(factor.numel() for factor in factors)
            self.live[k] = History(
                task={"name": task.name, "fingerprint": task.fingerprint, "unit": task.unit},
                method=run.method.settings(),
                settings=config.settings() | {"packed": len(configs)},
                trainable_parameters=trainable,
                total_parameters=adapters.frozen_parameters + trainable,
                # What its own optimiser would hold: two moments per parameter, and one float32 counter per tensor.
                optimizer_bytes=2 * trainable * adapters.values.element_size() + 4 * len(factors),
            )
            if paused is None:
                self.live[k].start()
            else:
                self.live[k].rows = [dict(row) for row in paused[k].rows]

    def add(self, step: int, **columns: Sequence[float]) -> None:
        """Append the row of a step to each live history: of each column, the trial's number."""
        self._update(lambda k, history: history.add(step, **{name: column[k] for name, column in columns.items()}))

    def add_evaluations(self, losses: Mapping[str, Sequence[float]]) -> None:
        """Fill in ``<part>_loss`` in the last row of each live history."""
        for part, of_trials in losses.items():
            self._update(lambda k, history, part=part, of=of_trials: history.add_evaluation(part, of[k]))

    def _update(self, update: Callable[[int, History], None]) -> None:
        for k, history in list(self.live.items()):
            try:
                update(k, history)
            except DivergedError as error:
                self.errors[k] = error.with_traceback(None)  # which would keep the whole pack in memory
                del self.live[k]
                self._step.end(k)

    def status(self) -> str:
        """A few words for the progress bar."""
        losses = [history.rows[-1]["train_loss"] for history in self.live.values()]
        return f"best loss {min(losses):.3f}" if losses else "all have diverged"


def data_orders(task: Task, configs: Sequence[TrainConfig]) -> list[DataOrder]:
    """Return the data order of each trial; trials of one seed share theirs.

    Raises:
        ValueError: no target of a batch counts in the loss, or as for :func:`lora_lab.train.data_order`.
    """
    by_seed = {config.seed: config for config in configs}
    orders = {seed: data_order(task, config) for seed, config in by_seed.items()}
    for seed, config in by_seed.items():
        check_batches(task, orders[seed], config)
    return [orders[config.seed] for config in configs]


def joined_rows(orders: Sequence[DataOrder], position: int, count: int) -> Tensor:
    """Return what :meth:`DataOrder.rows` gives for each trial: (trials, count)."""
    return torch.stack([order.rows(position, count) for order in orders])


def joined_batches(
    task: Task, orders: Sequence[DataOrder], step: int, config: TrainConfig
) -> tuple[list[Examples], list[Tensor], list[int]]:
    """The micro-batches of a step, as :func:`lora_lab.train.micro_batches`, each with the examples of all trials.

    Returns:
        The micro-batches; each one's share of every trial's targets that count, (trials,); and the size of each trial's
        batch, as in ``task.size``.
    """
    rows = joined_rows(orders, (step - 1) * config.batch_size, config.batch_size)  # (20, 32)
    columns = rows.split(math.ceil(config.batch_size / config.accumulate), dim=1)
    parts = [task.train[part.flatten()] for part in columns]  # 640 rows
    counts = [part.counts.view(len(rows), -1).sum(1).double() for part in parts]  # (20,)
    total = torch.stack(counts).sum(0)  # (20,)
    sizes = total.long().tolist() if task.unit == "tokens" else [config.batch_size] * len(rows)
    return parts, [count / total for count in counts], sizes


def _check_independence(step: PackedStep, task: Task, rows: Tensor) -> None:
    """Make sure that trials do not influence each other, for no list of unsuitable modules can be complete.

    The examples and adapters of all other trials are changed: a trial's loss must neither change nor depend on them.
    Some models leak from a row to later ones, which the first trial does not notice; others leak backwards.

    Args:
        rows: the examples of each trial's first batch, (20, 32).

    Raises:
        PackingError: they do, or the forward pass draws at random, or a layer takes no part in the loss.
    """
    model, (lane,) = step.model, step.adapters.lanes
    # Not cut to its longest row, because other rows of another length would change the rounding of all losses.
    uncut = Examples(task.train.inputs, task.train.targets)

    def losses_on(rows: Tensor) -> Tensor:
        return step.batch_loss(*to_device(uncut[rows.flatten()], model))  # (20,)

    def state() -> list[Tensor]:
        device = lane.factors[0].device
        on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *on_gpu, *(buffer.clone() for buffer in model.buffers())]

    before, losses = state(), losses_on(rows).detach()  # (20,)
    alone = all(map(torch.equal, before, state()))
    for k in {0, len(losses) - 1}:
        others = torch.arange(len(losses)) != k  # (20,)
        changed = torch.where(others[:, None], (rows + 1) % len(task.train), rows)  # (20, 32)
        _fill(lane, others, 1.0)
        loss = losses_on(changed)[k]  # ()
        gradients = torch.autograd.grad(loss, lane.factors, allow_unused=True)
        _fill(lane, others, 0.0)
        alone &= bool(loss == losses[k]) or not bool(losses[k].isfinite())
        for gradient in gradients:  # infinite ones are of a trial that diverges
            alone &= gradient is not None and not bool(gradient[others].nan_to_num(0.0, 0.0, 0.0).any())
    if not alone:
        raise PackingError(
            "In this model the trials of a pack would not be independent: it draws at random or changes a buffer in "
            "training, an adapted layer takes no part in the loss, or numbers of one example reach another, as where "
            "the first dimension of a tensor is not the batch; run the trials separately, with fit."
        )


@torch.no_grad()
def _fill(lane: Lane, trials: Tensor, value: float) -> None:
    for layer in lane.layers.values():
        layer.lora_B[trials] = value  # (19, 128, 16)
