r"""Many adapters over one frozen base, trained in one pass.

A rank ablation trains K small adapters, and each of its runs sends its own batch through the same frozen W0.
Here the K batches are joined, so that the base multiplies once for all, and the adapters are stacked:

    h_k = W0 x_k + scaling_k * B_k A_k x_k,    k = 1 .. K        (Hu et al. 2021, equation 3, for K adapters)

Ranks are padded with zeros to the largest, R. The padding needs no mask. Where row j of A and column j of B are
zero, so are both gradients: dA[j] is B[:, j] times something, and dB[:, j] is A[j] times something. AdamW leaves
a zero whose gradient is zero where it is, with or without weight decay.

No trial knows of the others. Each has the data order, rate, clipping and schedule that it has in ``fit``, and
equals its run there up to rounding. A trial's numbers depend on how many trials there are, for kernels are chosen
by size, but to the last bit not on what the other trials compute.

Shapes in the comments follow one running example: K = 20 trials, a batch of 32 each, in = 64, out = 128, R = 16,
and N numbers in a padded adapter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.ablation.packed_layer import TRIAL_LOSSES, PackedLinear, PackingError
from lora_lab.ablation.packing import refusal
from lora_lab.history import COLUMNS, DivergedError, History, count_parameters, stop_if_diverged
from lora_lab.inject import adapter_state, match_layers, replace
from lora_lab.lora import LoRALinear
from lora_lab.methods import LoRA
from lora_lab.system.device import own_randomness
from lora_lab.system.progress import progress_bar
from lora_lab.task import IGNORE, Examples, Task
from lora_lab.train import DataOrder, TrainConfig, make_adamw, to_device


@dataclass(frozen=True)
class Run:
    """One trial of a pack.

    Args:
        method: rank, alpha and targets; LoRA or RsLoRA, no dropout.
        lr: peak learning rate.
        seed: seeds the adapter's weights and the order of data.
    """

    method: LoRA
    lr: float
    seed: int = 0


@dataclass
class Result:
    """What became of one trial: what ``fit`` would have returned or raised.

    Args:
        history: as ``fit`` returns it, but that ``seconds`` is the trial's share of the pack's step (a K-th of it),
            and that the settings hold K as ``packed``. None if the trial diverged.
        adapter: the trained adapter, as :func:`lora_lab.adapter_state` gives it; empty if the trial diverged.
        error: why the trial ended early, or None.
    """

    history: History | None = None
    adapter: dict[str, Tensor] = field(default_factory=dict)
    error: DivergedError | None = None


def fit_packed(
    model: nn.Module,
    task: Task,
    runs: Sequence[Run],
    *,
    progress: bool | None = None,
    **options: Any,
) -> list[Result]:
    """Train one adapter for each run, all in one pass, and leave ``model`` as it was.

    Result i is what ``fit(copy of model, task, runs[i].method, lr=runs[i].lr, seed=runs[i].seed, ...)`` gives,
    up to the rounding of sums in another order. (In float32 rounding grows with the steps, as it does between
    two numbers of threads.) A trial that diverges ends alone; the others do not notice.

    Args:
        model: a freshly loaded model, on the device where it is to be used. Its activations are K times as large
            as those of one run.
        task: data and loss.
        runs: the trials; ranks, alphas, rates and seeds may differ, the adapted layers may not.
        progress: as for :func:`lora_lab.fit`.
        **options: fields of :class:`lora_lab.train.TrainConfig` but for ``lr`` and ``seed``, which each run has of its
            own; ``batch_size`` is that of each trial.

    Returns:
        A result for each run, in their order.

    Raises:
        PackingError: a ValueError; the sentence of :func:`refusal`, or the model lets trials touch.
        ValueError: there are no runs, or a number is out of range.
    """
    configs = [TrainConfig(lr=run.lr, seed=run.seed, **options) for run in runs]
    names = _common_names(model, task, runs)
    config = configs[0]  # all but lr and seed are the same for all
    for name, only in {"accumulate": 1, "gradient_checkpointing": False, "lean": None}.items():
        if (value := getattr(config, name)) != only:
            raise ValueError(f"{name} is {value!r}, but a pack has no such step; leave it out, or use fit.")
    device = next(model.parameters()).device
    with own_randomness(device, 0), _put_back(model, names):
        pack = _Pack(model, task, runs, names, configs)
        with progress_bar(config.steps, f"{len(runs)} adapters", progress) as bar:
            bar.set_postfix_str("evaluating")
            pack.try_out()
            pack.evaluate()
            for step in range(1, config.steps + 1):
                if not pack.live:
                    break
                pack.step(step)
                bar.set_postfix_str(pack.status())
                if config.evaluates(step):
                    pack.evaluate()
                bar.update()
        return pack.results()


def _common_names(model: nn.Module, task: Task, runs: Sequence[Run]) -> list[str]:
    """The layers that all runs adapt."""
    if not runs:
        raise ValueError("runs is empty, but a pack needs at least one, such as Run(LoRA(rank=8), lr=1e-3).")
    for run in runs:
        if reason := refusal(model, task, run.method):
            raise PackingError(reason)
    names = [list(match_layers(model, run.method.targets, run.method.exclude)) for run in runs]
    for run, own in zip(runs, names, strict=True):
        if own != names[0]:
            raise PackingError(
                f"{run.method} adapts other layers than {runs[0].method}, but the runs of a pack must adapt the same; "
                "put them into packs of their own."
            )
    return names[0]


@contextmanager
def _put_back(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let the block change modes, what is trainable, buffers and the named layers, and undo it afterwards."""
    layers = {name: model.get_submodule(name) for name in names}
    modes = {module: module.training for module in model.modules()}
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(module, *own, own[1].clone()) for module in modes for own in module.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for name, layer in layers.items():
            replace(model, name, layer)
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        for module, name, buffer, value in buffers:
            setattr(module, name, buffer.copy_(value))


class _Pack:
    """What belongs together while a pack is trained.

    All adapters lie in one tensor ``values`` (K, N), a row a trial, so that clipping is a norm of each row and AdamW
    one call; the layers' factors are views of it.
    """

    def __init__(
        self, model: nn.Module, task: Task, runs: Sequence[Run], names: Sequence[str], configs: Sequence[TrainConfig]
    ) -> None:
        self.model, self.task, self.runs, self.configs = model, task, runs, configs
        self.numbers = count_parameters(model)
        self.about_task = {"name": task.name, "fingerprint": task.fingerprint, "unit": task.unit}
        self.device = next(model.parameters()).device
        self.adapters = [_adapters(model, names, run) for run in runs]
        model.requires_grad_(False)
        self._stack(names)
        seeds, size = list(dict.fromkeys(run.seed for run in runs)), configs[0].batch_size
        self.orders = torch.stack(  # (seeds, steps, 32), which examples
            [DataOrder(len(task.train), seed).rows(0, configs[0].steps * size).view(-1, size) for seed in seeds]
        )
        self.order_of = torch.tensor([seeds.index(run.seed) for run in runs])  # (20,)
        self.live = list(range(len(runs)))
        self.errors: dict[int, DivergedError] = {}
        # As a History's rows, but that losses, norms and tokens hold a number for each trial, and lr is a factor.
        self.rows: list[dict[str, Any]] = [{"step": 0, "seconds": 0.0, "tokens": [0] * len(runs)}]
        model.train()

    @torch.no_grad()
    def _stack(self, names: Sequence[str]) -> None:
        """Put the runs' adapters into one tensor, and layers that view it into the model."""
        trials, rank = len(self.runs), max(run.method.rank for run in self.runs)
        bases = {name: self.model.get_submodule(name) for name in names}
        shapes = [shape for base in bases.values() for shape in ((rank, base.in_features), (base.out_features, rank))]
        sizes = [math.prod(shape) for shape in shapes]
        dtype = self.adapters[0][names[0]].lora_A.dtype
        self.values = torch.zeros(trials, sum(sizes), dtype=dtype, device=self.device)  # (20, N)
        self.gradient = torch.zeros_like(self.values)  # (20, N)
        views = [part.unflatten(1, shape) for part, shape in zip(self.values.split(sizes, 1), shapes, strict=True)]
        self.layers: dict[str, PackedLinear] = {}
        for (name, base), A, B in zip(bases.items(), views[::2], views[1::2], strict=True):
            own = [adapter[name] for adapter in self.adapters]
            for k, layer in enumerate(own):
                A[k, : layer.rank] = layer.lora_A  # (r, in); B is zero, as LoRALinear starts
            scaling = torch.tensor([layer.scaling for layer in own], dtype=dtype, device=self.device)  # (20,)
            self.layers[name] = PackedLinear(base, A, B, scaling)
            replace(self.model, name, self.layers[name])
        self.parameters = [factor for layer in self.layers.values() for factor in (layer.lora_A, layer.lora_B)]
        # An optimiser has one rate, and trials have many. So it steps at rate 1 from zero, which gives the
        # direction, and each trial goes along it at its own rate.
        self.direction = nn.Parameter(torch.zeros_like(self.values))  # (20, N)
        self.direction.grad = self.gradient
        self.optimizer = make_adamw([{"params": [self.direction], "lr": 1.0, "weight_decay": 0.0}])
        self.peaks = self.values.new_tensor([[run.lr] for run in self.runs])  # (20, 1)

    def losses(self, batch: Examples) -> Tensor:
        """Each trial's mean loss on its part of a joined batch: (20,)."""
        inputs, targets = to_device(batch, self.model)
        return TRIAL_LOSSES[self.task.loss](self.model, inputs, targets, len(self.runs))  # (20,)

    def batch(self, step: int) -> Examples:
        """The joined batch of a step, trial by trial."""
        return self.task.train[self.orders[self.order_of, step - 1].flatten()]  # (640,) rows

    def step(self, step: int) -> None:
        """Train each trial on its batch of the step, and append the step's row."""
        started = time.perf_counter()
        config = self.configs[0]  # all that is read here is the same for all
        batch = self.batch(step)
        tokens = self.counted(batch, step)
        losses = self.losses(batch)  # (20,)
        # Trials do not touch, so the gradient of each loss is that of their sum.
        gradients = torch.autograd.grad(losses, self.parameters, torch.ones_like(losses))
        torch.cat([gradient.flatten(1) for gradient in gradients], dim=1, out=self.gradient)  # (20, N)
        norms = torch.linalg.vector_norm(self.gradient, dim=1)  # (20,)
        if config.clip is not None:
            # As torch.nn.utils.clip_grad_norm_, for each trial.
            self.gradient.mul_((config.clip / (norms + 1e-6)).clamp(max=1.0)[:, None])
        factor = config.rate_factor(step)
        self._descend(self.peaks * factor, config.weight_decay)
        row = {"step": step, "lr": factor, "train_loss": losses.tolist(), "grad_norm": norms.tolist(), "tokens": tokens}
        row["seconds"] = (time.perf_counter() - started) / len(self.runs)
        self.rows.append(row)
        self._end_diverged("loss", row["train_loss"])

    @torch.no_grad()
    def _descend(self, rates: Tensor, decay: float) -> None:
        self.direction.zero_()
        self.optimizer.step()
        if decay:
            self.values.mul_(1 - rates * decay)  # (20, N)
        self.values.addcmul_(self.direction, rates)  # (20, N)

    def counted(self, batch: Examples, step: int) -> list[int]:
        """How many targets of each trial's part of a joined batch count, as ``task.counted`` does.

        Raises:
            ValueError: none of a live trial's, as in ``fit``.
        """
        if self.task.unit != "tokens":
            return [len(batch) // len(self.runs)] * len(self.runs)
        counts = (batch.targets != IGNORE).view(len(self.runs), -1).sum(1).tolist()
        if empty := [k for k in self.live if not counts[k]]:
            seed = self.runs[empty[0]].seed
            raise ValueError(
                f"No target of the batch at step {step} of seed {seed} counts, so it teaches nothing; "
                "use larger batches."
            )
        return counts

    @torch.no_grad()
    def evaluate(self) -> None:
        """Fill in the last row's validation and off-domain losses."""
        row, config, trials = self.rows[-1], self.configs[0], len(self.runs)
        self.model.eval()
        for part in ("validation", "off_domain"):
            examples = self.task.parts[part][: config.eval_examples]
            total, count = torch.zeros(trials, dtype=torch.float64), 0  # (20,)
            for start in range(0, len(examples), config.batch_size):
                rows = torch.arange(len(examples))[start : start + config.batch_size]  # (32,)
                if counted := self.task.counted(examples[rows]):
                    total += self.losses(examples[rows.repeat(trials)]).cpu().double() * counted  # (20,)
                    count += counted
            row[f"{part}_loss"] = (total / count).tolist() if count else [math.nan] * trials
            self._end_diverged(f"{part} loss", row[f"{part}_loss"])
        self.model.train()

    def _end_diverged(self, what: str, losses: list[float]) -> None:
        """End the trials whose loss is NaN or infinite, each with the error that ``fit`` would raise.

        A trial that has ended keeps its place, with an update of zero. Without it the joined batch would be smaller,
        and the base's product may round the other trials' rows in another way (with three trials of the digits
        transformer it does).
        """
        if all(map(math.isfinite, losses)):
            return
        row = self.rows[-1]
        for k in [k for k in self.live if not math.isfinite(losses[k])]:
            try:
                stop_if_diverged(what, losses[k], {"step": row["step"], "lr": self._rate(k, row)})
            except DivergedError as error:
                self.errors[k] = error.with_traceback(None)  # which would keep the whole pack alive
            self.live.remove(k)
            with torch.no_grad():
                for state in (self.values, *self.optimizer.state[self.direction].values()):
                    if state.ndim:  # not the count of steps
                        state[k] = 0.0

    def status(self) -> str:
        """A few words for the progress bar."""
        losses = [self.rows[-1]["train_loss"][k] for k in self.live]
        return f"best loss {min(losses):.3f}" if losses else "all have diverged"

    def _rate(self, k: int, row: dict[str, Any]) -> float | None:
        return self.configs[k].lr * row["lr"] if row["step"] else None

    def try_out(self) -> None:
        """Make sure that trials do not touch, for no list of unsuitable modules can be complete.

        Raises:
            PackingError: they do, or the forward pass draws at random, or a layer takes no part in the loss.
        """
        before, buffers = self._random_states(), [buffer.clone() for buffer in self.model.buffers()]
        losses = self.losses(self.batch(1)).tolist()
        if not all(map(torch.equal, before, self._random_states())):
            raise PackingError(
                "The model draws random numbers in training, and in one pass trials cannot each draw their own; "
                "run them apart, with fit."
            )
        if not all(map(torch.equal, buffers, self.model.buffers())):
            raise PackingError(
                "The model changes a buffer of its own in training, which the trials would share; "
                "run them apart, with fit."
            )
        # Some models carry on from one row of a batch to the next, so that the first is never reached; others back.
        for k in dict.fromkeys((0, len(losses) - 1)):
            self._try_beside_others(k, losses[k])

    def _try_beside_others(self, k: int, expected: float) -> None:
        """Change the examples and adapters of all trials but one, whose loss must neither change nor depend on them."""
        others = torch.arange(len(self.runs)) != k  # (20,)
        rows = self.orders[self.order_of, 0]  # (20, 32)
        rows[others] = (rows[others] + 1) % len(self.task.train)
        with torch.no_grad():
            for layer in self.layers.values():
                layer.lora_B[others] = 1.0  # (19, 128, 16)
        loss = self.losses(self.task.train[rows.flatten()])[k]  # ()
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        with torch.no_grad():
            for layer in self.layers.values():
                layer.lora_B.zero_()
        for name, *factors in zip(self.layers, gradients[::2], gradients[1::2], strict=True):
            if factors[0] is None:
                raise PackingError(f"Layer {name!r} takes no part in the loss; leave it out of targets.")
            if any(bool(((own := factor[others]) != 0).logical_and(own.isfinite()).any()) for factor in factors):
                raise PackingError(
                    f"In layer {name!r} the examples of one trial reach another, as where the first dimension of a "
                    "tensor is not the batch; run the trials apart, with fit."
                )
        if math.isfinite(expected) and loss.item() != expected:
            raise PackingError(
                "The loss of a trial changes with the examples of the others, as where a number is taken over the "
                "whole batch; run the trials apart, with fit."
            )

    def _random_states(self) -> list[Tensor]:
        on_gpu = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_gpu]

    @torch.no_grad()
    def results(self) -> list[Result]:
        """What became of each trial."""
        return [Result(error=self.errors[k]) if k in self.errors else self._result(k) for k in range(len(self.runs))]

    def _result(self, k: int) -> Result:
        for name, layer in self.adapters[k].items():
            packed, rank = self.layers[name], layer.rank
            layer.lora_A.copy_(packed.lora_A[k, :rank])  # (r, in)
            layer.lora_B.copy_(packed.lora_B[k, :, :rank])  # (out, r)
            replace(self.model, name, layer)  # where adapter_state looks for it
        return Result(self._history(k), adapter_state(self.model))

    def _history(self, k: int) -> History:
        trained = [factor for layer in self.adapters[k].values() for factor in (layer.lora_A, layer.lora_B)]
        numbers = sum(factor.numel() for factor in trained)
        rows = [
            {name: value[k] if isinstance(value, list) else value for name, value in row.items()} for row in self.rows
        ]
        return History(
            task=dict(self.about_task),
            method=self.runs[k].method.settings(),
            settings=self.configs[k].settings() | {"packed": len(self.runs)},
            trainable_parameters=numbers,
            total_parameters=self.numbers + numbers,
            # What its own optimiser would hold: two moments of each number, and a float32 of steps for each tensor.
            optimizer_bytes=2 * numbers * self.values.element_size() + 4 * len(trained),
            rows=[dict.fromkeys(COLUMNS) | row | {"lr": self._rate(k, row)} for row in rows],
        )


def _adapters(model: nn.Module, names: Sequence[str], run: Run) -> dict[str, LoRALinear]:
    """The adapters of one run as ``inject`` makes them: one generator, layers in the model's order."""
    generator = torch.Generator().manual_seed(run.seed)
    method = run.method
    layer = method.layer or LoRALinear
    return {name: layer(model.get_submodule(name), method.rank, method.alpha, generator=generator) for name in names}
