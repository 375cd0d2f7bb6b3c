"""Every operation of a step, with the pass and the module that it belongs to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.costs.fake import Batch
from lora_lab.lora import LoRALayer
from lora_lab.train import TrainingStep

LOGITS, ADAPTERS = "logits and loss", "adapters"
# The kind of a module from its class or name, the first that fits; the rest are what their parent is.
_KINDS = {"norm": "norms", "attention": "attention", "attn": "attention", "mlp": "MLP", "feedforward": "MLP"}


# Watching


def module_kinds(model: nn.Module) -> dict[int, str]:
    """id of each module -> attention, MLP, norms, adapters, logits and loss (the output head), or other layers."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def walk(module: nn.Module, name: str, inherited: str) -> Iterator[tuple[int, str]]:
        words = f"{name} {type(module).__name__}".lower()
        kind = next((kind for word, kind in _KINDS.items() if word in words), inherited)
        if module is head:
            kind = LOGITS
        below = ADAPTERS if name.startswith("lora_") else kind  # peft's lora_A is a dictionary of layers
        for child_name, child in module.named_children():
            yield from walk(child, child_name, below)
        yield id(module), ADAPTERS if isinstance(module, LoRALayer) or "lora" in words else kind

    return dict(walk(model, "", "other layers"))


def output_width(model: nn.Module) -> int | None:
    """How many classes or tokens the model chooses among, if it says which layer is its head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return None
    return getattr(head, "out_features", None) or head.weight.shape[0]


class StepTracer(TorchDispatchMode):
    """Sees every operation of a step, with its phase and the module it belongs to.

    A subclass says in :meth:`saw` what it makes of them. The phases are "forward", "backward", "clipping" and
    "optimiser step"; the backward pass of a checkpointed block runs modules again, which :attr:`recomputing` tells.
    """

    def __init__(self, step: TrainingStep) -> None:
        super().__init__()
        self.step, self.phase = step, "before"
        self._kinds = module_kinds(step.model)
        self._names = {id(module): name for name, module in step.model.named_modules()}
        self._stack: list[int] = []

    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Called after each operation, with torch's name of it, what went in and what came out."""
        raise TypeError(f"{type(self).__name__} must say what it does with an operation, in a method on_operation.")

    @property
    def kind(self) -> str:
        """The kind of the innermost module at work; what no module does in the forward pass is the loss."""
        if self._stack:
            return self._kinds.get(self._stack[-1], "other layers")
        return LOGITS if self.phase == "forward" else "other layers"

    @property
    def module(self) -> str:
        """The name of the innermost module at work, or nothing."""
        return self._names.get(self._stack[-1], "") if self._stack else ""

    @property
    def recomputing(self) -> bool:
        """Whether a module is computed again in the backward pass."""
        return self.phase == "backward" and bool(self._stack)

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and watch it."""
        step = copy.copy(self.step)
        plain_loss, plain_backward = step.batch_loss, step.backward

        def batch_loss(inputs: Tensor, targets: Tensor) -> Tensor:
            self.phase = "forward"
            result = plain_loss(inputs, targets)
            self.phase = "backward"
            return result

        def backward(*args: Any) -> list[Tensor]:
            result = plain_backward(*args)
            self.phase = "clipping"
            return result

        def begin(*_: Any) -> None:
            self.phase = "optimiser step"

        with ExitStack() as stack:
            stack.callback(step.optimizer.register_step_pre_hook(begin).remove)
            stack.callback(register_module_forward_pre_hook(self._enter_module).remove)
            # Called after an error too: a block that is computed again is left by one, once it has all it needs.
            stack.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
            stack.enter_context(self)
            self.phase = "before"
            stack.callback(vars(step).clear)  # it leads to itself now, and would keep the model until it is collected
            step.batch_loss, step.backward = batch_loss, backward
            step(batches, weights)
            self.phase = "after"

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._kinds:
            self._stack.append(id(module))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self._kinds:
            while self._stack and self._stack.pop() != id(module):
                pass

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.on_operation(func, args, kwargs or {}, out)
        return out
