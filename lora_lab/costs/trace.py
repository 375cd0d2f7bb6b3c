"""Every operation of a training step, with the phase and the module that it belongs to."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.inject import lora_layers, output_head
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import MLP, Attention
from lora_lab.train import Batch, TrainingStep

PHASES = ("forward", "backward", "clipping", "optimiser step")


# Modules


class Kind(StrEnum):
    """What a module belongs to."""

    ATTENTION = "attention"
    MLP = "MLP"
    NORMS = "norms"
    ADAPTERS = "adapters"
    LOGITS = "logits and loss"  # the output head, and what is computed outside all modules
    OTHER = "other layers"


# By the name of the attribute that holds a module, as in our Llama and in the models of transformers.
_KIND_BY_ATTRIBUTE = {
    **dict.fromkeys(("attn", "attention", "self_attn", "self_attention", "SelfAttention"), Kind.ATTENTION),
    **dict.fromkeys(("encoder_attn", "crossattention", "EncDecAttention"), Kind.ATTENTION),
    **dict.fromkeys(("mlp", "ffn", "feed_forward", "DenseReluDense"), Kind.MLP),
    **dict.fromkeys(("norm", "layer_norm"), Kind.NORMS),
}


def module_kinds(model: nn.Module) -> dict[int, Kind]:
    """id of each module -> its kind. A module of no kind of its own has that of the module around it."""
    head, adapters = output_head(model), adapter_modules(model)
    kinds: dict[int, Kind] = {}

    def visit(module: nn.Module, name: str, inherited: Kind) -> None:
        kind = Kind.LOGITS if module is head else _kind_of(module, name) or inherited
        kinds[id(module)] = Kind.ADAPTERS if module in adapters else kind
        for child_name, child in module.named_children():
            visit(child, child_name, kind)

    visit(model, "", Kind.OTHER)
    return kinds


def _kind_of(module: nn.Module, name: str) -> Kind | None:
    if hasattr(module, "eps") or hasattr(module, "variance_epsilon"):  # torch's norms and ours; transformers' norms
        return Kind.NORMS
    if isinstance(module, Attention | nn.MultiheadAttention):
        return Kind.ATTENTION
    if isinstance(module, MLP | DigitsMLP):
        return Kind.MLP
    return _KIND_BY_ATTRIBUTE.get(name)


def adapter_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that hold adapters: our adapted layers; inside a layer of peft's, all but the base layer."""
    modules: set[nn.Module] = {*lora_layers(model).values()}
    for layer in model.modules():
        if hasattr(layer, "adapter_layer_names"):  # as all layers of peft have
            parts = [child for name, child in layer.named_children() if name != "base_layer"]
            modules.update(module for part in parts for module in part.modules())
    return modules


def output_width(model: nn.Module) -> int | None:
    """Return the number of classes or tokens that the output head scores; None if the model does not name its head."""
    head = output_head(model)
    if head is None:
        return None
    return getattr(head, "out_features", None) or len(cast("Tensor", head.weight))


# Steps


class StepTracer(TorchDispatchMode, ABC):
    """Passes every operation of a step to :meth:`on_operation`, and knows its phase and module.

    ``phase`` is one of the ``PHASES``, or "before" or "after". The backward pass of a checkpointed block runs its
    modules again; then :attr:`recomputing` is true.
    """

    def __init__(self, step: TrainingStep) -> None:
        super().__init__()
        self.step, self.phase = step, "before"
        self._kinds = module_kinds(step.model)
        self._names = {id(module): name for name, module in step.model.named_modules()}
        self._stack: list[int] = []

    @abstractmethod
    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Called after each operation with torch's operator, its arguments and its result."""

    @property
    def kind(self) -> Kind:
        """The kind of the innermost module that is running; outside all modules, the forward pass computes the loss."""
        if self._stack:
            return self._kinds.get(self._stack[-1], Kind.OTHER)
        return Kind.LOGITS if self.phase == "forward" else Kind.OTHER

    @property
    def module(self) -> str:
        """The name of the innermost module that is running, or an empty string."""
        return self._names.get(self._stack[-1], "") if self._stack else ""

    @property
    def recomputing(self) -> bool:
        """Whether a module is being computed again in the backward pass."""
        return self.phase == "backward" and bool(self._stack)

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and trace it. With several micro-batches, forward and backward alternate."""
        self.phase = "before"
        step = copy.copy(self.step)
        step.batch_loss = self._in_phase(step.batch_loss, "forward", "backward")
        step.backward = self._in_phase(step.backward, self.phase, "clipping")
        with ExitStack() as stack:
            stack.callback(vars(step).clear)  # it refers to itself, and would keep the model alive
            enter_last = self.step.optimizer.register_step_pre_hook(lambda *_: setattr(self, "phase", "optimiser step"))
            stack.callback(enter_last.remove)
            stack.callback(register_module_forward_pre_hook(self._enter_module).remove)
            # Called after an error too: checkpointing leaves a block by an exception once it has recomputed enough.
            stack.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
            stack.enter_context(self)
            step(batches, weights)
        self.phase = "after"

    def _in_phase(self, function: Callable[..., Any], phase: str, following: str) -> Callable[..., Any]:
        """Return the function between two phases: in the one while it runs, and in the other from then on."""

        def run(*args: Any) -> Any:
            self.phase = phase
            result = function(*args)
            self.phase = following
            return result

        return run

    def run_second(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Trace the second step: the first lacks the optimiser's state."""
        if type(self.step) is TrainingStep:  # what it leaves behind is known without taking it
            for group in self.step.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            self.step.optimizer.step()
        else:  # a lean step keeps more than its optimiser does
            self.run(batches, weights)
        self.run(batches, weights)

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._kinds:
            self._stack.append(id(module))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self._kinds:
            while self._stack and self._stack.pop() != id(module):
                pass

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two thirds of all calls: torch asks a fake tensor for its device
        out = func(*args, **(kwargs or {}))
        self.on_operation(func, args, kwargs or {}, out)
        return out
