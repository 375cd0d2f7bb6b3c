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

# torch declares Function.backward(ctx, *grad_outputs), which each backward below narrows to its own outputs.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_lab.ablation.grid import Trial
from lora_lab.costs.fake import copy_sharing_weights
from lora_lab.history import DivergedError, History, count_parameters
from lora_lab.inject import adapter_state, match_layers, replace, require_no_adapters
from lora_lab.lean import Lean, apply_lean
from lora_lab.lean.blocks import JointLinear, LeanBlockHead, LeanHead, call_in_weight_dtype, cast_addmm_, cast_matmul
from lora_lab.lean.loss import token_losses
from lora_lab.lora import LoRALinear
from lora_lab.methods import LoRA, require_unmarked
from lora_lab.models.llama import Llama
from lora_lab.models.quantize import BlockLinear
from lora_lab.system.device import own_randomness
from lora_lab.system.distributed import ALONE
from lora_lab.system.provenance import describe_value
from lora_lab.system.schema import Size, check
from lora_lab.task import IGNORE, Examples, Loss, Task, cross_entropy, logits, mean_squared_error
from lora_lab.train import (
    EVALUATED,
    DataOrder,
    check_run,
    data_order,
    gradient_checkpointing_method,
    make_adamw,
    mean_loss,
    new_history,
    set_training_mode,
    to_device,
)
from lora_lab.variants import RsLoRA

# Tokens whose logits exist at one moment: 25 MB for SmolLM2, memory that the C library keeps.
_LOSS_ROWS = 128


class PackingError(ValueError):
    """These runs cannot share a pass: a ValueError of its own, so that a caller can run them separately."""


@dataclass
class PackedResult:
    """What became of one trial: what ``fit`` would have returned or raised.

    Args:
        history: as ``fit`` returns it, except that ``seconds`` is the trial's share of the pack's step, a K-th of it.
        error: why the trial diverged, where its history ends; or None.
        adapter: the trained adapter, as :func:`lora_lab.adapter_state` gives it; empty if the trial diverged.
    """

    history: History
    error: DivergedError | None = None
    adapter: dict[str, Tensor] = field(default_factory=dict)


def fit_packed(model: nn.Module, task: Task, trials: Sequence[Trial]) -> list[PackedResult]:
    """Train the adapter of each trial, all in one pass, on a copy of ``model`` that shares its weights.

    Result k is what ``fit(copy of model, task, trials[k].method, trials[k])`` gives, up to the rounding of sums in
    another order. (In float32 rounding errors grow with the steps, as they do between two numbers of threads.) A trial
    that diverges ends alone; the others are not affected.

    Args:
        model: on the device where it is to be used. Its activations are K times as large as those of one trial.
        task: data and loss.
        trials: with LoRA or RsLoRA without dropout, each batch in one piece. They may differ in rank, alpha, learning
            rate and seed. Of a lean step ``threads`` and ``loss_rows``, which change no result, are left out.

    Raises:
        PackingError: a ValueError; the sentence of :func:`refusal`, or the model mixes the examples of trials.
        ValueError: there are no trials, or the lean step or gradient checkpointing does not fit the model.
    """
    _check_pack(model, task, trials)
    config = trials[0]  # for all that they have in common
    order_of = {trial.seed: data_order(task, trial) for trial in trials}
    orders = [order_of[trial.seed] for trial in trials]
    model = copy_sharing_weights(model)
    for buffer in model.buffers():
        buffer.data = buffer.clone()  # a forward pass may change it
    if config.gradient_checkpointing:
        gradient_checkpointing_method(model)()
    with own_randomness(next(model.parameters()).device, 0):
        adapters = [_new_adapter(model, trial) for trial in trials]
        results = [PackedResult(_new_history(model, task, *pair)) for pair in zip(trials, adapters, strict=True)]
        model.requires_grad_(False)
        if config.lean is not None:
            for name, layer in adapters[0].items():  # it looks at the adapters: those of one trial stand for all
                replace(model, name, layer)
            apply_lean(model, cast(Lean, config.lean))
        alone = dataclasses.replace(task, loss=partial(TRIAL_LOSSES[task.loss], trials=1))
        at_start = _evaluate(model, alone, config, len(trials))  # once for all, since every update starts at zero
        step = PackedStep(model, task.loss, adapters, trials)
        set_training_mode(model)
        if config.lean is None:  # the blocks of the lean step do not mix trials
            first = torch.stack([order.rows(0, config.batch_size) for order in orders])  # (20, 32)
            _check_independence(step, task, first)
        _train(step, results, task, orders, trials, at_start)
        for k, result in enumerate(results):
            if result.error is None:
                result.adapter = step.adapter(k)
        return results


def _train(
    step: PackedStep,
    results: Sequence[PackedResult],
    task: Task,
    orders: Sequence[DataOrder],
    trials: Sequence[Trial],
    losses: Mapping[str, list[float]],
) -> None:
    """Train all trials to the end, or until the last of them has diverged.

    Args:
        losses: before training, of each part by trial.
    """
    config, count = trials[0], len(trials)
    judged = dataclasses.replace(task, loss=step.loss_on_same_batch)
    columns = {"seconds": [0.0] * count, "tokens": [0] * count}  # of the models before training
    for number in range(config.steps + 1):
        if number > 0:
            columns = _take_step(step, task, orders, trials, number)
            losses = _evaluate(step.model, judged, config, count) if config.evaluates(number) else {}
        for k, result in enumerate(results):
            if result.error is not None:
                continue
            try:
                result.history.add(number, **{name: of_trials[k] for name, of_trials in columns.items()})
                for part, of_trials in losses.items():
                    result.history.add_evaluation(part, of_trials[k])
            except DivergedError as error:  # its rows go on, and no other trial sees them
                result.error = error.with_traceback(None)  # which would keep the whole pack in memory
        if all(result.error for result in results):
            break


def _evaluate(model: nn.Module, task: Task, config: Trial, trials: int) -> dict[str, list[float]]:
    """Return the losses of each part by trial; one that is the same for all is repeated."""
    sizes = config.batch_size, config.eval_examples, config.by_length
    return {part: mean_loss(model, task, part, *sizes, ALONE).expand(trials).tolist() for part in EVALUATED}


def _take_step(
    step: PackedStep, task: Task, orders: Sequence[DataOrder], trials: Sequence[Trial], number: int
) -> dict[str, list[float]]:
    """Take the step of that number with all trials, and return the columns of its row, a value for each trial."""
    started, config = time.perf_counter(), trials[0]
    position = (number - 1) * config.batch_size
    rows = torch.stack([order.rows(position, config.batch_size) for order in orders])  # (20, 32)
    batch = task.train[rows.flatten()]  # 640 rows
    counts = batch.target_counts.view(len(rows), -1).sum(1)  # (20,)
    factor = config.rate_factor(number)
    for group in step.optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    losses, norms = step(*to_device(batch, step.model))  # (20,), (20,)
    return {
        "train_loss": losses.tolist(),  # waits for the device
        "grad_norm": norms.tolist(),
        "tokens": counts.tolist() if task.unit == "tokens" else [config.batch_size] * len(trials),
        "lr": [trial.lr * factor for trial in trials],
        "seconds": [(time.perf_counter() - started) / len(trials)] * len(trials),
    }


def lora_of(trial: Trial) -> LoRA:
    """Return the trial's method, after :func:`refusal` has found that it is one of LoRA."""
    return cast(LoRA, trial.method)


def _new_adapter(model: nn.Module, trial: Trial) -> dict[str, LoRALinear]:
    """Return the layers of one trial as ``inject`` makes them: one generator, layers in the model's order."""
    generator, method = torch.Generator().manual_seed(trial.seed), lora_of(trial)
    layer = cast(type[LoRALinear], method.layer or LoRALinear)
    layers = adapted_layers(model, method).items()
    return {name: layer(base, method.rank, method.alpha, generator=generator) for name, base in layers}


def _factors(layers: Iterable[LoRALinear | PackedLinear]) -> list[Tensor]:
    """Return A and B of each layer in turn."""
    return [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]


def _new_history(model: nn.Module, task: Task, trial: Trial, adapter: Mapping[str, LoRALinear]) -> History:
    """Return the history of a trial, with the sizes that it would have alone."""
    history, factors = new_history(task, trial.method, trial, model), _factors(adapter.values())
    history.trainable_parameters = sum(factor.numel() for factor in factors)
    history.total_parameters = count_parameters(model) + history.trainable_parameters
    history.optimizer_bytes = sum(2 * factor.nbytes + 4 for factor in factors)  # two moments, and a count of steps
    return history


class PackedStep:
    """A training step of all trials at once, with a loss and a norm for each.

    The adapters of all trials are the rows of one tensor, ``values`` (K, N), and the factors of the layers are views of
    it. So clipping is a norm of each row, and AdamW one call: its parameters are the rows of the neighbouring trials of
    one learning rate.

    Args:
        model: frozen; a packed layer is put in place of each adapted one.
        loss: one of :data:`TRIAL_LOSSES`.
        adapters: of each trial, as it starts.
        trials: whose adapters they are.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, adapters: Sequence[Mapping[str, LoRALinear]], trials: Sequence[Trial]
    ) -> None:
        self.model, self.adapters, self.trials = model, adapters, len(trials)
        self.trial_losses, self.clip = TRIAL_LOSSES[loss], trials[0].clip
        self.values, self.factors = self._pack_layers(max(lora_of(trial).rank for trial in trials))
        for k in range(self.trials):
            for factor, place in self._places(k):
                place.copy_(factor)
        self.gradient = torch.zeros_like(self.values)  # (20, N)
        self.optimizer = make_adamw(self._group_rows(trials))

    def _pack_layers(self, rank: int) -> tuple[Tensor, list[Tensor]]:
        """Put a packed layer with factors of zero in place of each adapted one.

        Returns:
            All factors as one tensor, (20, N); and its views: A and B of each layer in turn, padded to the rank.
        """
        layers, factors = self.adapters[0], []
        sizes = [rank * (layer.base.in_features + layer.base.out_features) for layer in layers.values()]
        values = _factors(layers.values())[0].new_zeros(self.trials, sum(sizes))  # (20, N)
        for (name, layer), part in zip(layers.items(), values.split(sizes, dim=1), strict=True):
            base = cast(nn.Linear, layer.base)
            A, B = part.tensor_split([rank * base.in_features], dim=1)  # (20, 1024), (20, 2048)
            scaling = A.new_tensor([adapter[name].scaling for adapter in self.adapters])  # (20,)
            packed = PackedLinear(base, A.unflatten(1, (rank, -1)), B.unflatten(1, (-1, rank)), scaling)
            replace(self.model, name, packed)
            factors += [packed.lora_A, packed.lora_B]  # (20, 16, 64), (20, 128, 16)
        return values, factors

    def _group_rows(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """Return a parameter group for each run of neighbouring trials of one learning rate: their rows."""
        groups, start = [], 0
        for lr, same in itertools.groupby(trial.lr for trial in trials):
            stop = start + len([*same])
            parameter = nn.Parameter(self.values[start:stop])  # (4, N)
            parameter.grad = self.gradient[start:stop]  # (4, N)
            groups.append({"params": [parameter], "lr": lr, "peak": lr, "weight_decay": trials[0].weight_decay})
            start = stop
        return groups

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step of every trial: forward, backward, clip, update.

        Args:
            inputs, targets: the batches of all trials, in their order.

        Returns:
            The losses, and the norms of the gradients before clipping: (trials,) each.
        """
        losses = self.batch_loss(inputs, targets)  # (20,)
        # Trials are independent, so the gradients of all losses are those of their sum.
        gradients = torch.autograd.grad(losses.sum(), self.factors)
        torch.cat([gradient.flatten(1) for gradient in gradients], dim=1, out=self.gradient)  # (20, N)
        norms = torch.linalg.vector_norm(self.gradient, dim=1)  # (20,)
        if self.clip is not None:
            # As torch.nn.utils.clip_grad_norm_, for each trial.
            self.gradient.mul_((self.clip / (norms + 1e-6)).clamp(max=1.0)[:, None])  # (20, N)
        self.optimizer.step()
        return losses.detach(), norms

    def batch_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return each trial's mean loss on its own rows: (trials,)."""
        return self.trial_losses(self.model, inputs, targets, self.trials)  # (20,)

    def loss_on_same_batch(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return each trial's mean loss on one batch that all of them are given: (trials,)."""
        return self.batch_loss(torch.cat([inputs] * self.trials), torch.cat([targets] * self.trials))  # (20,)

    def _places(self, k: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the factors of trial k's own adapter, and the place of each in the packed ones."""
        for factor, packed in zip(_factors(self.adapters[k].values()), self.factors, strict=True):
            yield factor.detach(), packed.detach()[k, : len(factor), : factor.shape[1]]

    def adapter(self, k: int) -> dict[str, Tensor]:
        """Put trial k's adapter alone into the model, and return its state."""
        for factor, place in self._places(k):
            factor.copy_(place)
        for name, layer in self.adapters[k].items():
            replace(self.model, name, layer)
        return adapter_state(self.model)


def _check_independence(step: PackedStep, task: Task, rows: Tensor) -> None:
    """Make sure that trials do not influence each other, for no list of unsuitable modules can be complete.

    The examples and adapters of all other trials are changed: a trial's loss must neither change nor depend on them.
    Some models leak from a row to later ones, which the first trial does not notice; others leak backwards.

    Args:
        rows: the examples of each trial's first batch, (20, 32).

    Raises:
        PackingError: they do, or the forward pass draws at random, or a layer takes no part in the loss.
    """
    device = step.values.device
    # Not cut to its longest row, because other rows of another length would change the rounding of all losses.
    uncut = Examples(task.train.inputs, task.train.targets)

    def losses_on(rows: Tensor) -> Tensor:
        return step.batch_loss(*to_device(uncut[rows.flatten()], step.model))  # (20,)

    Bs = step.factors[1::2]

    @torch.no_grad()
    def fill(trials: Tensor, value: float) -> None:
        for B in Bs:
            B[trials] = value  # (19, 128, 16)

    def state() -> list[Tensor]:
        on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *on_gpu, *(buffer.clone() for buffer in step.model.buffers())]

    before, losses = state(), losses_on(rows).detach()  # (20,)
    if not all(map(torch.equal, before, state())):
        raise PackingError(
            "The model draws at random or changes a buffer in training, which trials would share; use fit."
        )
    for k in {0, len(losses) - 1}:
        others = torch.arange(len(losses)) != k  # (20,)
        fill(others, 1.0)
        loss = losses_on(torch.where(others[:, None], (rows + 1) % len(task.train), rows))[k]  # ()
        gradients = torch.autograd.grad(loss, Bs, allow_unused=True)
        fill(others, 0.0)
        for name, gradient in zip(step.adapters[0], gradients, strict=True):
            if gradient is None:
                raise PackingError(f"Layer {name!r} takes no part in the loss; leave it out of targets.")
            if gradient[others].nan_to_num(0.0, 0.0, 0.0).any():  # infinite ones are of a trial that diverges
                raise PackingError(f"In layer {name!r} the examples of one trial reach another's loss; use fit.")
        if losses[k].isfinite() and loss != losses[k]:
            raise PackingError("The loss of a trial changes with the examples of the others; use fit.")


def _check_pack(model: nn.Module, task: Task, trials: Sequence[Trial]) -> None:
    """Raise ValueError if trials cannot be a pack."""
    check(len(trials), Size, "The number of trials")
    first = trials[0]
    check_run(model, task, first.method, first)
    require_unmarked(model)
    require_no_adapters(model)
    if any(common_settings(trial) != common_settings(first) for trial in trials):
        raise PackingError("The trials of a pack may differ in rank, alpha, learning rate and seed alone.")
    if reason := refusal(model, task, first):
        raise PackingError(reason)


def common_settings(trial: Trial) -> tuple[Any, ...]:
    """Return what the trials of a pack must have in common: all but rank, alpha, learning rate and seed."""
    method = trial.method
    method = dataclasses.replace(method, rank=1, alpha=1.0) if isinstance(method, LoRA) else method
    same = dataclasses.replace(trial, method=method, lr=1.0, seed=0)
    return same, trial.accumulate, trial.gradient_checkpointing, trial.lean


def refusal(model: nn.Module, task: Task, trial: Trial) -> str | None:
    """Return why a trial cannot be packed, in a sentence, or None if it can.

    It looks at modules and settings only; :func:`fit_packed` also tries the model, before it trains.

    Raises:
        ValueError: the method finds no layer to adapt.
    """
    method = trial.method
    if type(method) is not LoRA and type(method) is not RsLoRA:  # the two differ in scaling alone
        return f"Method {method.name!r} cannot be packed, only LoRA and RsLoRA can; use fit."
    if trial.autocast is not None:
        return "A pack multiplies in the dtypes of its weights, without autocast; use fit, or Lean(torch.bfloat16)."
    if trial.accumulate > 1:
        return f"accumulate is {trial.accumulate}, but a pack takes each batch in one piece; use fit."
    if method.dropout > 0:
        return f"The method's dropout is {method.dropout:g}, but trials in one pass must not draw at random; use fit."
    if not any(task.loss is loss for loss in TRIAL_LOSSES):  # a loss need not be hashable
        return f"The loss {describe_value(task.loss)!r} cannot be computed for each trial of a pack; use fit."
    for name, layer in adapted_layers(model, method).items():
        if type(layer) not in (nn.Linear, BlockLinear):
            return f"Layer {name!r} is a {type(layer).__name__}, but only adapters of nn.Linear can be packed; use fit."
    for name, module in model.named_modules():
        # torch's dropout keeps its probability as p, and other layers under a name with "drop" in it.
        drops = [value for key, value in vars(module).items() if key == "p" or "drop" in key]
        if any(isinstance(value, float) and value > 0 for value in drops):
            return f"Module {name!r} has dropout, but trials in one pass must not draw at random; use fit."
    return None


def adapted_layers(model: nn.Module, method: LoRA) -> dict[str, nn.Linear | BlockLinear]:
    """Return the layers that a method adapts, by name."""
    names = match_layers(model, method.targets, method.exclude)
    return {name: cast(nn.Linear | BlockLinear, model.get_submodule(name)) for name in names}


# A layer, and the losses of each trial


class PackedLinear(JointLinear):
    """A frozen linear layer with K updates beside it, each for one K-th of the rows.

    Args:
        base: the ``nn.Linear`` or BlockLinear that all trials share.
        A: (K, R, in), zero in the rows from each trial's rank on.
        B: (K, out, R), zero in those columns.
        scaling: (K,), alpha / rank of each trial.
    """

    scaling: Tensor

    def __init__(self, base: nn.Linear | BlockLinear, A: Tensor, B: Tensor, scaling: Tensor) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(A)  # (20, 16, 64)
        self.lora_B = nn.Parameter(B)  # (20, 128, 16)
        self.register_buffer("scaling", scaling.view(-1, 1, 1), persistent=False)  # (20, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project([self], x)[0]  # (640, 64) -> (640, 128)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the output for ``silu(gate) * up``, which is not saved: the backward pass computes it again."""
        return _GatedPackedLinear.apply(gate, up, self, *_factors([self]))  # 2 x (8, 64, 1536) -> (8, 64, 576)

    def project(self, layers: Sequence[PackedLinear], x: Tensor) -> Sequence[Tensor]:
        """Return the outputs of several packed layers of one input."""
        return _PackedLinears.apply(x, layers, *_factors(layers))  # (640, 64) -> a tuple of (640, 128)

    @property
    def weight(self) -> Tensor:
        """There is none: K trials have K weights.

        Raises:
            PackingError: always; some modules read the weight of a layer inside them and never call the layer.
        """
        raise PackingError(
            "The model reads the weight of an adapted layer instead of calling the layer, but in a pack each trial has "
            "a weight of its own; train the trials one by one, with fit."
        )


def _split_trials(rows: Tensor, factor: Tensor) -> Tensor:
    """Return rows, which come trial by trial, as (trials, rows of a trial, width), in the dtype of the adapters."""
    return rows.reshape(len(factor), -1, rows.shape[-1]).to(factor.dtype)


def _forward(x: Tensor, layers: Sequence[PackedLinear]) -> tuple[list[Tensor], Tensor]:
    """Return h_k = W0 x_k + scaling_k * B_k A_k x_k of each layer, and scaling_k * A_k x_k of all layers.

    Raises:
        PackingError: the rows of x are not those of all trials.
    """
    trials = len(layers[0].scaling)
    if len(x) % trials:
        raise PackingError(f"A layer was given {len(x)} rows, not the examples of {trials} trials; use fit.")
    per_trial = _split_trials(x, layers[0].lora_A)  # (20, 32, 64)
    narrow = torch.bmm(_join([layer.lora_A for layer in layers]), per_trial.mT)  # (20, 16, 64) @ (20, 64, 32)
    outputs = []
    for layer, Ax in zip(layers, narrow.chunk(len(layers), 1), strict=True):
        Ax.mul_(layer.scaling)  # (20, 16, 32)
        y = call_in_weight_dtype(layer.base, x).contiguous()  # (640, 64) -> (640, 128), one product for all trials
        _add_product(y.view(*per_trial.shape[:2], -1), Ax.mT, layer.lora_B.mT)  # (20, 32, 16) @ (20, 16, 128)
        outputs.append(y)
    return outputs, narrow


def _factor_gradients(
    gs: Sequence[Tensor], x: Tensor, narrow: Tensor, layers: Sequence[PackedLinear]
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of A and B of each layer in turn, and scaling_k * B_k^T g_k of all layers.

    Args:
        gs: gradients of the outputs, (640, 128) each.
        x: the input, (640, 64).
        narrow: scaling_k * A_k x_k of all layers, (20, 16, 32).
    """
    A = layers[0].lora_A  # (20, 16, 64)
    per_trial = [_split_trials(g, A) for g in gs]  # (20, 32, 128) each
    narrow_gs = _join(
        [
            torch.bmm(layer.lora_B.mT, g.mT).mul_(layer.scaling)  # (20, 16, 128) @ (20, 128, 32) -> (20, 16, 32)
            for layer, g in zip(layers, per_trial, strict=True)
        ]
    )
    dAs = torch.bmm(narrow_gs, _split_trials(x, A)).chunk(len(gs), 1)  # (20, 16, 32) @ (20, 32, 64) -> (20, 16, 64)
    gradients = []
    for dA, Ax, g in zip(dAs, narrow.chunk(len(gs), 1), per_trial, strict=True):
        dB = torch.bmm(Ax, g).mT  # (20, 16, 32) @ (20, 32, 128) -> (20, 128, 16)
        gradients += [dA, dB]
    return gradients, narrow_gs


def _input_gradient(gs: Sequence[Tensor], narrow_gs: Tensor, layers: Sequence[PackedLinear]) -> Tensor:
    """Return the sum of (W0 + scaling_k * B_k A_k)^T g_k over the layers: (rows, in).

    Args:
        gs: gradients of the outputs, (640, 128) each.
        narrow_gs: scaling_k * B_k^T g_k of all layers, (20, 16, 32).
    """
    dx = None
    for g, layer in zip(gs, layers, strict=True):  # (640, 128) @ (128, 64) -> (640, 64), one product again
        flat, weight = g.flatten(0, -2), layer.base.weight
        dx = cast_matmul(flat, weight) if dx is None else cast_addmm_(dx, flat, weight)  # (640, 64)
    dx = cast(Tensor, dx)
    As = _join([layer.lora_A for layer in layers])  # (20, 16, 64)
    _add_product(dx.view(len(As), -1, dx.shape[-1]), narrow_gs.mT, As)  # (20, 32, 16) @ (20, 16, 64)
    return dx


class _PackedLinears(torch.autograd.Function):
    """Several packed layers of one input, with gradients by hand.

    Autograd would give the same gradients. By hand the narrow products have their short side first, which takes half
    the time, and updates are added in place.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layers: Sequence[PackedLinear], *factors: Tensor):
        outputs, narrow = _forward(x, layers)
        ctx.save_for_backward(x, narrow)
        ctx.layers = layers
        return tuple(outputs)  # (640, 128) each

    @staticmethod
    @once_differentiable
    def backward(ctx, *gs: Tensor):
        x, narrow = ctx.saved_tensors
        gradients, narrow_gs = _factor_gradients(gs, x, narrow, ctx.layers)
        dx = _input_gradient(gs, narrow_gs, ctx.layers).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, *gradients


class _GatedPackedLinear(torch.autograd.Function):
    """A packed layer of silu(gate) * up, which the backward pass computes again."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, layer: PackedLinear, *factors: Tensor) -> Tensor:
        (y,), narrow = _forward(F.silu(gate).mul_(up), [layer])
        ctx.save_for_backward(gate, up, narrow)
        ctx.layer = layer
        return y  # (8, 64, 576)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        gate, up, narrow = ctx.saved_tensors
        activated = F.silu(gate)  # (8, 64, 1536)
        gradients, narrow_g = _factor_gradients([g], activated * up, narrow, [ctx.layer])
        d_gated = _input_gradient([g], narrow_g, [ctx.layer]).view(gate.shape)  # (8, 64, 1536)
        d_up = activated.mul_(d_gated)  # (8, 64, 1536)
        d_gate = torch.ops.aten.silu_backward(d_gated.mul_(up), gate)  # (8, 64, 1536)
        return d_gate, d_up, None, *gradients


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to total, in place; a base in half precision has adapters in float32."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))


def _cross_entropies(model: nn.Module, inputs: Tensor, targets: Tensor, trials: int) -> Tensor:
    counts = targets.flatten() != IGNORE  # (640,)
    if isinstance(model, Llama) and _sums_in_full_precision(model.lm_head):
        # In slices: the logits of a pack may take more memory than all else, and are needed only for a moment.
        hidden = model.model(inputs).flatten(0, -2)  # (512, 576)
        losses = token_losses(hidden, targets.flatten().clamp(min=0), model.lm_head, _LOSS_ROWS)  # (512,)
        losses = losses.where(counts, 0.0)  # (512,)
    else:
        outputs = logits(model, inputs, targets).flatten(0, -2)  # (640, 10)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # (640, 10)
        losses = F.cross_entropy(outputs, targets.flatten(), ignore_index=IGNORE, reduction="none")  # (640,)
    return losses.view(trials, -1).sum(1) / counts.view(trials, -1).sum(1).clamp(min=1)  # (20,)


def _sums_in_full_precision(head: nn.Module) -> bool:
    """Return whether a head has no adapter and its slices are summed in full precision, as losses must be."""
    dtype = head.dtype if isinstance(head, BlockLinear) else head.weight.dtype if type(head) is nn.Linear else None
    return isinstance(head, LeanHead | LeanBlockHead) or dtype in (torch.float32, torch.float64)


def _squared_errors(model: nn.Module, inputs: Tensor, targets: Tensor, trials: int) -> Tensor:
    return F.mse_loss(logits(model, inputs), targets, reduction="none").view(trials, -1).mean(1)  # (20,)


# The losses of lora_lab.tasks, and how to compute them for each trial of a joined batch.
TRIAL_LOSSES: dict[Loss, Callable[..., Tensor]] = {cross_entropy: _cross_entropies, mean_squared_error: _squared_errors}
