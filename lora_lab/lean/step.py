"""Lean blocks for an adapted Llama, AdamW over one flat tensor, and the step: see :mod:`lora_lab.lean`."""

from __future__ import annotations

import copy
import ctypes
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.adamw import adamw

from lora_lab.inject import lora_layers
from lora_lab.lean.blocks import LeanBlock, at_least_float32, is_plain_lora, make_lean
from lora_lab.lean.loss import cross_entropy
from lora_lab.lora import LoRALayer
from lora_lab.methods import Method
from lora_lab.models.llama import Llama, RMSNorm
from lora_lab.models.quantize import BlockEmbedding, BlockWeight
from lora_lab.system.schema import Size, check_bfloat16, check_fields
from lora_lab.task import IGNORE, Loss
from lora_lab.task import cross_entropy as plain_cross_entropy
from lora_lab.train import Batch, TrainConfig, TrainingStep, parameter_groups

_M_MMAP_THRESHOLD = -3  # the C library's number of the setting (malloc.h)


@dataclass(frozen=True)
class Lean:
    """Options of a lean step.

    Args:
        base_dtype: dtype of the frozen matrices (``torch.bfloat16``), except that of an adapted head; None leaves them
            as they are.
        checkpoint: save only the input of each block, and recompute the block in the backward pass: up to a half
            more FLOPs, a fraction of the activations. On Linux the whole process then returns freed memory to the
            system at once, which takes time too, most of it over 4-bit blocks.
        threads: 2 computes each half of a batch in a separate Python thread, on one core. For a CPU with two cores;
            without dropout.
        loss_rows: tokens whose logits exist at the same time.

    Raises:
        ValueError: a value is out of range.
    """

    base_dtype: torch.dtype | None = None
    checkpoint: bool = False
    threads: Size = 1
    loss_rows: Size = 256

    def __post_init__(self) -> None:
        check_bfloat16(self.base_dtype, "base_dtype")
        check_fields(self)

    def settings(self) -> dict[str, Any]:
        """Return the options as plain data, for a History."""
        return asdict(self) | {"base_dtype": self.base_dtype and str(self.base_dtype)}

    def make_step(self, model: nn.Module, loss: Loss, method: Method, config: TrainConfig) -> LeanStep:
        """Prepare ``model`` in place, as :func:`lora_lab.train.make_step` does, with lean blocks.

        Raises:
            ValueError: as for :func:`apply_lean`, or as for the method. The model is then left as it was.
        """
        self._rehearse(model, method, config.seed)
        method.prepare(model, config.seed)
        apply_lean(model, self)
        if loss is plain_cross_entropy:
            loss = cast(Loss, partial(cross_entropy, rows=self.loss_rows))  # apply_lean has checked for a Llama
        optimizer = FlatAdamW(parameter_groups(model, method, config))
        return LeanStep(model, loss, optimizer, config.clip, self.threads)

    def _rehearse(self, model: nn.Module, method: Method, seed: int) -> None:
        """Prepare a copy without values, so that a refusal comes before the model itself changes."""
        if _has_values(model):
            rehearsal = copy_to_meta(model)
            method.prepare(rehearsal, seed)
            _check(rehearsal, self)


@dataclass
class LeanStep(TrainingStep):
    """A training step with the lean loss.

    With several ``threads`` each micro-batch is computed in a Python thread, on one core. When every operation runs on
    all cores, each one waits for the slowest core; here the cores wait once per step. Gradients are those of the
    micro-batches in sequence, up to the order of the sum.
    """

    every_target: bool = False  # whether every target of the next batches is known to count

    def __post_init__(self) -> None:
        # It starts its threads when the first micro-batches come.
        self._pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))

    def read_targets(self, targets: Sequence[Tensor]) -> None:
        """Find out whether every target of the next batches counts, so that the step need not wait for a GPU to know.

        Without a call each step reads its targets itself. After a call, a step on other batches with targets of -100
        raises an error or has a loss of NaN: see :func:`lora_lab.lean.cross_entropy`.
        """
        self.every_target = all((part != IGNORE).all() for part in targets)

    def batch_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a micro-batch, a scalar."""
        if isinstance(self.loss, partial) and self.loss.func is cross_entropy:
            return self.loss(self.model, inputs, targets, every_target=self.every_target)  # ()
        return self.loss(self.model, inputs, targets)  # ()

    def backward(self, batches: Sequence[Batch], weights: Sequence[float]) -> list[Tensor]:
        """Add the gradients of the weighted losses to the parameters' ``grad``, and return those losses."""
        if self.threads == 1:
            return super().backward(batches, weights)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        def loss_and_gradients(batch: Batch, weight: float):
            weighted = self.batch_loss(*batch) * weight  # ()
            return weighted.detach(), torch.autograd.grad(weighted, parameters, allow_unused=True)

        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            results = list(self._pool.map(loss_and_gradients, batches, weights))
        finally:
            torch.set_num_threads(before)
        for _, gradients in results:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return [weighted for weighted, _ in results]


class FlatAdamW(torch.optim.Optimizer):
    """AdamW over one flat tensor per group: 420 adapter matrices take one pass instead of 420.

    Parameters become views of the flat tensor; their names, shapes and values do not change. ``state`` holds views
    for each parameter where ``torch.optim.AdamW`` holds tensors.

    Args:
        groups: each with its ``params``, of one dtype and device.
        lr, betas, eps, weight_decay: of groups without their own, as for ``torch.optim.AdamW``.

    Raises:
        ValueError: as for :meth:`add_param_group`.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self._gradients: dict[nn.Parameter, Tensor] = {}  # each parameter's view of its group's gradients
        self._flat: list[dict[str, Tensor]] = []  # of each group: values, gradients, moments, step
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, which become views of a flat tensor of their own.

        It does not call torch's method, which loads torch's compiler at its first call (60 MB, and a second).

        Raises:
            ValueError: a parameter is in a group already.
        """
        parameters = list(param_group["params"])
        if shared := self._gradients.keys() & set(parameters):
            raise ValueError(f"{len(shared)} parameters are in two groups, and would be updated twice; give each once.")
        self._flat.append(self._flatten(parameters))
        self.param_groups.append({**self.defaults, **param_group, "params": parameters})

    def _flatten(self, parameters: list[nn.Parameter]) -> dict[str, Tensor]:
        values = torch.cat([parameter.detach().flatten() for parameter in parameters])  # (2442240,)
        flat = {"values": values} | {name: torch.zeros_like(values) for name in ("gradients", "exp_avg", "exp_avg_sq")}
        step = torch.zeros((), device=values.device)
        sizes = [parameter.numel() for parameter in parameters]
        parts = (tensor.split(sizes) for tensor in flat.values())
        for parameter, *own in zip(parameters, *parts, strict=True):
            value, gradient, mean, square = (part.view_as(parameter) for part in own)
            parameter.data = value
            parameter.grad = self._gradients[parameter] = gradient
            self.state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        return flat | {"step": step}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero; they remain views, whatever ``set_to_none`` is."""
        for parameter, view in self._gradients.items():
            parameter.grad = view
        for flat in self._flat:
            flat["gradients"].zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned, here or for a ``torch.optim.AdamW`` with the same groups.

        Raises:
            ValueError: a parameter has no state, or the parameters of a group are at different steps.
        """
        states = state_dict["state"]
        for group in state_dict["param_groups"]:
            steps = {float(states[index]["step"]) if index in states else None for index in group["params"]}
            if None in steps or len(steps) > 1:
                raise ValueError(
                    f"The parameters of a group are at the steps {steps}, but a FlatAdamW counts the steps of a group "
                    "once; load what state_dict() returned after a step on all of them."
                )
        views = dict(self.state)
        super().load_state_dict(state_dict)  # which replaces the views by copies
        for parameter, state in views.items():
            for name, view in state.items():
                view.copy_(self.state[parameter][name])
            self.state[parameter] = state

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - the closure is optional in torch too
        """Take a step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2)."""
        for parameter, view in self._gradients.items():
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:  # after the zero_grad() of the model, which drops the views
                view.copy_(parameter.grad)
        for group, flat in zip(self.param_groups, self._flat, strict=True):
            beta1, beta2 = group["betas"]
            adamw(
                [flat["values"]],
                [flat["gradients"]],
                [flat["exp_avg"]],
                [flat["exp_avg_sq"]],
                max_exp_avg_sqs=[],
                state_steps=[flat["step"]],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                amsgrad=False,
                maximize=False,
                fused=True,
            )


def apply_lean(model: nn.Module, lean: Lean) -> None:
    """Turn the blocks, embedding and head of an adapted Llama into lean ones, in place. Lean ones take new options.

    Only the classes of modules change: names and parameters stay, and so does what the model computes. The blocks read
    the weights of adapted layers and norms without calling them, so forward hooks on modules inside a block do not
    fire; hooks on the lean blocks do. Under ``torch.autocast`` a block raises RuntimeError.

    Raises:
        ValueError: the model is not a Llama of ours, has adapters of a variant with another forward
            pass (DoRA, PiSSA), trains more than adapters, or has hooks; or ``threads`` is above 1 with dropout. The
            model is then left as it was.
    """
    model = _check(model, lean)
    if lean.checkpoint and _has_values(model):  # a rehearsal frees nothing
        _return_memory_at_once()
    if lean.base_dtype is not None:
        _cast_base(model, lean.base_dtype)
    trunk, head = model.model, model.lm_head
    blocks: Any = trunk.layers
    for block in blocks:
        make_lean(block, block.self_attn, block.mlp)
        block.checkpoint = lean.checkpoint
    make_lean(trunk.embed_tokens)
    for module in trunk.modules():
        if isinstance(module, RMSNorm | BlockEmbedding):
            _raise_to_float32(module)
    if isinstance(head, LoRALayer):  # called with float32, now and when it is merged
        _raise_to_float32(head.base)
    else:
        make_lean(head)


def _has_values(model: nn.Module) -> bool:
    parameter = next(model.parameters())
    return not (parameter.is_meta or isinstance(parameter, FakeTensor))


def copy_to_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose tensors have shapes but no values, so that it takes no memory."""
    return without_kernels(copy_with(model, lambda tensor: tensor.detach().to("meta")))


def without_kernels(twin: nn.Module) -> nn.Module:
    """Give a copy transformers' own forward passes back: since 5.25 it looks for kernels, and knows none for "meta"."""
    module: Any
    for module in twin.modules():
        if getattr(module, "_use_kernels", False):
            module._kernels_device, module.use_kernels = "cpu", False
    return twin


def copy_with(model: nn.Module, change: Callable[[Tensor], Tensor], left_out: Iterable[nn.Module] = ()) -> nn.Module:
    """Return a copy of a model with other parameters and buffers: what ``change`` makes of each."""
    copies: dict[int, Any] = {id(module): nn.Module() for module in left_out}
    for tensor in [*model.parameters(), *model.buffers()]:
        changed = change(tensor)
        trains = tensor.requires_grad
        copies[id(tensor)] = nn.Parameter(changed, trains) if isinstance(tensor, nn.Parameter) else changed
    return copy.deepcopy(model, copies)


def _check(model: nn.Module, lean: Lean) -> Llama:
    if not isinstance(model, Llama):
        raise ValueError(
            f"The lean step is built for lora_lab's Llama, but the model is a {type(model).__name__}; leave "
            "lean out, or save memory with gradient_checkpointing=True."
        )
    layers = lora_layers(model)
    for name, layer in layers.items():
        if not is_plain_lora(layer):
            raise ValueError(f"{name!r} is a {type(layer).__name__}, whose forward pass has no lean form.")
    in_adapted_layers = {parameter for layer in layers.values() for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in in_adapted_layers:
            raise ValueError(f"{name!r} is trained, but the lean step trains adapters only; use a LoRA method.")
    for name, module in model.named_modules():
        hooks = (getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))
        if any(hooks) and not isinstance(module, LeanBlock):
            raise ValueError(
                f"{name or 'the model'!r} has a hook, which the lean step would not call; remove it, or register it on "
                "a block once the model is lean."
            )
    if lean.threads > 1 and any(isinstance(layer.dropout, nn.Dropout) for layer in layers.values()):
        raise ValueError(
            f"threads is {lean.threads}, but the adapters have dropout, whose random numbers would depend on the "
            "timing of the threads; use dropout=0 or threads=1."
        )
    return model


def _cast_base(model: Llama, dtype: torch.dtype) -> None:
    """Cast all matrices to ``dtype``, except the factors of adapters and an adapted head."""
    excluded = {getattr(layer, part) for layer in lora_layers(model).values() for part in layer.parts}
    if isinstance(model.lm_head, LoRALayer):
        excluded |= {*model.lm_head.parameters()}
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.is_floating_point() and parameter not in excluded:
            parameter.data = parameter.data.to(dtype)


def _raise_to_float32(module: nn.Module) -> None:
    """Let a module compute in float32, or in a more precise dtype that it has, in place."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(at_least_float32(parameter.dtype))
    if isinstance(module, BlockWeight):
        module.dtype = at_least_float32(module.dtype)


def _return_memory_at_once() -> None:
    """Make Linux's C library return tensors of 256 KiB and more to the system as soon as they are freed.

    By default freed tensors stay in its heap, which the saved inputs of the blocks fragment: for SmolLM2 at 4 x 128
    tokens the gaps are larger than all memory in use. In return the system clears the memory of every new tensor anew.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 2**18)
        library.malloc_trim(0)  # what was freed before, by loading the model
