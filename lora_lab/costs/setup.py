"""How a model is trained, as far as memory, FLOPs and time depend on it; and its step, operation by operation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.costs.fake import (
    Source,
    batch_for,
    blocks_are_alike,
    build_on_meta,
    fake_copy,
    keep_blocks,
    shape_of,
    transformer_blocks,
)
from lora_lab.inject import lora_layers, output_head
from lora_lab.lean.step import Lean, LeanStep, copy_to_meta
from lora_lab.methods import FullFineTuning, Method
from lora_lab.models.quantize import quantize_nf4
from lora_lab.system.device import own_randomness
from lora_lab.system.schema import Size, check_fields
from lora_lab.system.wording import short_repr
from lora_lab.task import Loss, cross_entropy
from lora_lab.train import Batch, TrainConfig, TrainingStep, make_step, set_training_mode

Recorded = TypeVar("Recorded")  # what is recorded of a step, or counted


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as bytes and seconds depend on it. All else is as in ``fit``.

    Args:
        method: FullFineTuning(), LoRA(...), ...; or ``methods.AsItIs()``, for a model that is ready to train.
        dtype: cast the model's floating-point weights to this first (adapters stay in float32 or finer); None leaves
            them as they are.
        nf4: quantise the linear layers to 4 bits first, as QLoRA does (:func:`lora_lab.quantize_nf4`).
        optimizer: "adamw", as in ``fit``: one operation a weight; "adamw-foreach", torch's default on a GPU: eight
            passes over all weights; or "sgd": plain gradient descent, which has no state.
        gradient_checkpointing, lean, autocast, clip: as in :func:`lora_lab.fit`.
        accumulate: the number of micro-batches that a batch is split into.
        loss: (model, inputs, targets) -> mean loss.

    Raises:
        ValueError: a value is not one of those listed, or plain gradient descent is combined with the lean step.
    """

    method: Method = field(default_factory=FullFineTuning)
    dtype: torch.dtype | None = None
    nf4: bool = False
    optimizer: Literal["adamw", "adamw-foreach", "sgd"] = "adamw"
    gradient_checkpointing: bool = False
    lean: Lean | None = None
    clip: float | None = 1.0
    accumulate: Size = 1
    loss: Loss = cross_entropy
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.optimizer != "adamw" and self.lean is not None:
            raise ValueError(f"optimizer is {self.optimizer!r}, but the lean step has its own AdamW; use lean=None.")

    def step(self, model: nn.Module) -> TrainingStep:
        """Make ``model`` ready to train, in place. A fake model gets a step that assumes that every target counts.

        Args:
            model: from :func:`fake_copy` or :func:`build_model`, which have cast it to ``dtype``.
        """
        if self.nf4:
            quantize_nf4(model)
        config = TrainConfig(
            steps=1,
            lr=1e-6,
            clip=self.clip,
            gradient_checkpointing=self.gradient_checkpointing,
            lean=self.lean,
            autocast=self.autocast,
        )
        step = make_step(model, self.loss, self.method, config)
        set_training_mode(model)
        trained = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
        if self.optimizer == "sgd":
            step.optimizer = torch.optim.SGD(trained, lr=1e-6)
        elif self.optimizer == "adamw-foreach":
            step.optimizer = torch.optim.AdamW(trained, foreach=True)
        if isinstance(step, LeanStep) and isinstance(next(model.parameters()), FakeTensor):
            step.every_target = True  # fake targets have no values to compare with IGNORE
        return step

    def batches(self, batch: Batch) -> tuple[list[Batch], list[float]]:
        """Return the batch split into ``accumulate`` micro-batches for each thread, and their weights.

        Raises:
            ValueError: there are fewer examples than micro-batches.
        """
        threads = 1 if self.lean is None else self.lean.threads
        count, size = self.accumulate * threads, len(batch[0])
        if count > size:
            raise ValueError(f"accumulate is {self.accumulate}, but the batch has {size} examples for {count} parts.")
        parts = list(zip(*(tensor.tensor_split(count) for tensor in batch), strict=True))
        return parts, [len(inputs) / size for inputs, _ in parts]

    def describe(self) -> str:
        """Return the method and the options that are not as usual, such as "lora, rank=8, nf4=True"."""
        method = self.method.settings()
        chosen = {name: method[name] for name in ("rank", "targets") if method.get(name, "all-linear") != "all-linear"}
        for option in fields(self):
            if option.name not in ("method", "loss") and getattr(self, option.name) != option.default:
                chosen[option.name] = getattr(self, option.name)
        return ", ".join([self.method.name, *(f"{name}={short_repr(value)}" for name, value in chosen.items())])


def as_setup(method: Method | Setup, options: dict[str, Any]) -> Setup:
    """Return a setup from a method and options, or from another setup and the options that differ."""
    return replace(method, **options) if isinstance(method, Setup) else Setup(method, **options)


def setting_of(setup: Setup, model: nn.Module, batch: Batch) -> str:
    """Return the model's class, the setup and the batch as text, such as "Llama, lora, rank=8, batch 4 x 128"."""
    return f"{type(model).__name__}, {setup.describe()}, batch {shape_of(batch)}"


# Modules


class Part(StrEnum):
    """A part of a memory bill, in the order in which bills list them. A module is of the kind that it saves."""

    FROZEN = "frozen weights"
    TRAINED = "trained weights"
    GRADIENTS = "gradients"
    HEAD_GRADIENT = "gradient of the head"  # until it is added to the embedding's, if both are one weight
    OPTIMISER = "optimiser state"
    SAVED_ATTENTION = "saved: attention"
    SAVED_MLP = "saved: MLP"
    SAVED_NORMS = "saved: norms"
    SAVED_ADAPTERS = "saved: adapters"
    SAVED_OTHER = "saved: other layers"
    LOGITS = "logits and loss"
    RECOMPUTED = "recomputed activations"
    TEMPORARIES = "temporaries"
    WORKSPACE = "cuBLAS workspace"
    ENDS = "unused ends of blocks"
    REST = "the rest, unexplained"

    __repr__ = str.__repr__  # a bill's parts print as a dictionary of plain strings


# By a word in the name of a module's class or of the attribute that holds it, in our Llama and in transformers' models.
_KIND_BY_WORD = {
    **dict.fromkeys(("attention", "attn"), Part.SAVED_ATTENTION),
    **dict.fromkeys(("mlp", "ffn", "feed_forward", "feedforward", "densereludense"), Part.SAVED_MLP),
}


def module_kinds(model: nn.Module) -> dict[int, Part]:
    """Return the kind of each module, by its id. A module of no kind of its own has that of the module around it."""
    head, kinds = output_head(model), dict[int, Part]()

    def visit(module: nn.Module, attribute: str, kind_around: Part) -> None:
        kind = Part.LOGITS if module is head else _kind_of(module, attribute) or kind_around
        kinds[id(module)] = kind
        for name, child in module.named_children():
            visit(child, name, kind)

    visit(model, "", Part.SAVED_OTHER)
    return kinds | {id(module): Part.SAVED_ADAPTERS for module in adapter_modules(model)}


def _kind_of(module: nn.Module, attribute: str) -> Part | None:
    # torch's norms and ours, those of transformers, and others by their names
    if hasattr(module, "eps") or hasattr(module, "variance_epsilon") or attribute in ("norm", "layer_norm"):
        return Part.SAVED_NORMS
    names = f"{type(module).__name__} {attribute}".lower()
    return next((kind for word, kind in _KIND_BY_WORD.items() if word in names), None)


def adapter_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that hold adapters: our adapted layers; inside a layer of peft's, all but the base layer."""
    modules: set[nn.Module] = {*lora_layers(model).values()}
    for layer in model.modules():
        if hasattr(layer, "adapter_layer_names"):  # as all layers of peft have
            parts = [child for name, child in layer.named_children() if name != "base_layer"]
            modules.update(module for part in parts for module in part.modules())
    return modules


# Steps


class StepTracer(TorchDispatchMode):
    """Passes every operation of a step to :meth:`on_operation`, and knows its phase and module.

    ``phase`` is "before", "forward", "backward", "clipping", "optimiser step" or "after". The backward pass of a
    checkpointed block runs its modules again; then :attr:`recomputing` is true.

    Raises:
        ValueError: the step has several threads, of which hooks and dispatch modes see one only.
    """

    def __init__(self, step: TrainingStep) -> None:
        super().__init__()
        if step.threads > 1:
            raise ValueError(f"lean.threads is {step.threads}, but only one thread can be watched; use threads=1 here.")
        self.step, self.phase = step, "before"
        self._kinds = module_kinds(step.model)
        self._names = {id(module): name for name, module in step.model.named_modules()}
        self._stack: list[int] = []

    def on_operation(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Called after each operation with torch's operator, its arguments and its result."""

    @property
    def kind(self) -> Part:
        """The kind of the innermost module that is running; outside all modules, the forward pass computes the loss."""
        if self._stack:
            return self._kinds.get(self._stack[-1], Part.SAVED_OTHER)
        return Part.LOGITS if self.phase == "forward" else Part.SAVED_OTHER

    @property
    def module(self) -> str:
        """The name of the innermost module that is running, or an empty string."""
        return self._names.get(self._stack[-1], "") if self._stack else ""

    @property
    def recomputing(self) -> bool:
        """Whether a module is being computed again in the backward pass."""
        return self.phase == "backward" and bool(self._stack)

    @property
    def running_node(self) -> int | None:
        """The number of the node of autograd's graph that is running in the backward pass, or None."""
        node = torch._C._current_autograd_node()
        return None if node is None else node._sequence_nr()

    @property
    def newest_node(self) -> int:
        """The number of the node that was made last in the forward pass."""
        return torch.autograd._get_sequence_nr() - 1  # pyright: ignore[reportPrivateImportUsage]

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and trace it. With several micro-batches, forward and backward alternate."""
        self.phase = "before"
        with self._follow_phases() as step, ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._enter_module).remove)
            # Called after an error too: checkpointing leaves a block by an exception once it has recomputed enough.
            stack.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
            stack.enter_context(self)  # torch passes every operation to __torch_dispatch__ from here on
            step(batches, weights)
        self.phase = "after"

    @contextmanager
    def _follow_phases(self) -> Iterator[TrainingStep]:
        """Yield a copy of the step that sets ``phase`` as it goes through forward, backward, clipping and update."""
        step = copy.copy(self.step)
        step.batch_loss = self._in_phase(step.batch_loss, "forward", "backward")
        step.backward = self._in_phase(step.backward, self.phase, "clipping")
        update = self.step.optimizer.register_step_pre_hook(lambda *_: setattr(self, "phase", "optimiser step"))
        try:
            yield step
        finally:
            update.remove()
            vars(step).clear()  # it refers to itself, and would keep the model alive

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


# Rehearsals


@contextmanager
def rehearse_step(
    model: Source, setup: Setup, device: torch.device, batch_size: int | None, seq_len: int | None, batch: Batch | None
) -> Iterator[tuple[TrainingStep, Batch]]:
    """A step on fake tensors that is ready to be taken, and its batch; what is computed in the block is fake too."""
    with fake_copy(model, device, setup.dtype) as twin, own_randomness(torch.device("cpu"), 0):
        step = setup.step(twin)
        yield step, batch_for(twin, batch_size, seq_len, batch)


def prepare_shapes(model: nn.Module, setup: Setup) -> nn.Module:
    """Return a copy of a model, ready to train, on the meta device: a tenth of the time that fake tensors take."""
    twin = copy_to_meta(model)
    with torch.device("meta"), own_randomness(torch.device("cpu"), 0):
        return setup.step(twin if setup.dtype is None else twin.to(setup.dtype)).model


class Rehearsal:
    """Steps of a model and a setup on fake tensors, with batches of any size. Of identical blocks a few are rehearsed.

    A Llama of 80 equal blocks takes 80 times the same operations, and a rehearsal spends nearly all its time on them.
    What is recorded of the same model with two and with three blocks shows what one more block adds.

    Args:
        model, setup: as for :func:`lora_lab.memory.predict`.
        device: that the fake tensors report.
    """

    def __init__(self, model: Source, setup: Setup, device: torch.device) -> None:
        self.model, self.setup, self.device = build_on_meta(model), setup, device
        self.alike = blocks_are_alike(prepare_shapes(self.model, setup))

    def follow(
        self,
        record: Callable[[TrainingStep, Batch], Recorded],
        extend: Callable[[Recorded, Recorded, int], Recorded],
        batch_size: int | None,
        seq_len: int | None,
        batch: Batch | None,
    ) -> Recorded:
        """Return what is recorded of a step of the whole model; if possible, from those with two to four blocks.

        Args:
            record: takes a step on a batch, and returns what it has recorded.
            extend: makes the record of a longer model from those of two shorter ones, of which the second has a block
                more, and from the number of blocks that the first lacks; raises ValueError if they do not determine it.
            batch_size, seq_len, batch: as for :func:`lora_lab.memory.predict`.
        """

        def rehearse(model: nn.Module) -> Recorded:
            with rehearse_step(model, self.setup, self.device, batch_size, seq_len, batch) as (step, fake_batch):
                return record(step, fake_batch)

        if self.alike:
            # Also where the method names blocks one by one, and some of them are left out.
            with suppress(ValueError):
                shorter = rehearse(keep_blocks(self.model, 2))
                for count in (3, 4):  # the first and the last block may differ from those between
                    longer = rehearse(keep_blocks(self.model, count))
                    with suppress(ValueError):
                        return extend(shorter, longer, len(transformer_blocks(self.model)) - count + 1)
                    shorter = longer
        return rehearse(self.model)
