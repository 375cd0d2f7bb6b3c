"""A training step rehearsed: on a copy, or on tensors that have shapes but no numbers, and watched.

``memory`` and ``speed`` both ask what a step does before or while it is done. Here is what they share: how a
step is described (:class:`Setup`), how it is made ready without touching the model it is asked about
(:func:`pretend`, :func:`copied`), and how it is followed operation by operation (:class:`Watch`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_lab import lean as leanness
from lora_lab.device import pick_device
from lora_lab.lean import Lean
from lora_lab.lora import LoRALayer
from lora_lab.methods import FullFineTuning, Method
from lora_lab.quantize import BlockWeight, quantize_nf4
from lora_lab.tasks.base import Loss, cross_entropy
from lora_lab.train import Step, make_step

Factory = Callable[[], nn.Module]
Batch = tuple[Tensor, Tensor]
LOGITS, ADAPTERS = "logits and loss", "adapters"
_FEW = 2**20  # numbers that a rehearsal may hold for real
# The kind of a module from its class or name, the first that fits; the rest are what their parent is.
_KINDS = {"norm": "norms", "attention": "attention", "attn": "attention", "mlp": "MLP", "feedforward": "MLP"}


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as bytes and seconds go. What is left out is as in ``fit``.

    Args:
        method: FullFineTuning(), LoRA(...), ...; or ``methods.AsItIs()``, for a model that is ready already.
        dtype: cast the model's floating-point weights to this before it is made ready (adapters stay in
            float32 or finer); None leaves them as they are.
        nf4: put the linear layers into 4 bits first, as QLoRA does (:func:`lora_lab.quantize_nf4`).
        optimizer: "adamw", as ``fit`` has it, or "sgd", plain gradient descent, which has no state.
        gradient_checkpointing, lean, clip: as in :func:`lora_lab.fit`.
        accumulate: micro-batches that a batch is computed in.
        loss: (model, inputs, targets) -> mean loss.

    Raises:
        ValueError: a value is none of those that it can be, or plain gradient descent is asked of the lean step.
    """

    method: Method = field(default_factory=FullFineTuning)
    dtype: torch.dtype | None = None
    nf4: bool = False
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    lean: Lean | None = None
    clip: float | None = 1.0
    accumulate: int = 1
    loss: Loss = cross_entropy

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise ValueError(f"method is {self.method!r}, but it must be one such as LoRA(rank=8) or FullFineTuning().")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer is {self.optimizer!r}, but it must be 'adamw' or 'sgd'.")
        if self.optimizer == "sgd" and self.lean is not None:
            raise ValueError("optimizer is 'sgd', but the lean step has an AdamW of its own; use lean=None.")
        if self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate}, but it must be at least 1.")

    def step(self, model: nn.Module) -> Step:
        """Make ``model`` ready, in place; a fake one for batches in which every target counts.

        Args:
            model: from :func:`pretend` or :func:`made`, which have cast it to ``dtype``.
        """
        loss = self.loss
        if self.nf4:
            quantize_nf4(model)
        step = make_step(
            model.train(),
            loss,
            self.method,
            lr=1e-6,
            clip=self.clip,
            gradient_checkpointing=self.gradient_checkpointing,
            lean=self.lean,
        )
        if self.optimizer == "sgd":
            trained = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
            step.optimizer = torch.optim.SGD(trained, lr=1e-6)
        if self.lean is not None and loss is cross_entropy and isinstance(next(model.parameters()), FakeTensor):
            # Fake targets cannot be asked whether they count.
            step.loss = partial(leanness.cross_entropy, rows=self.lean.loss_rows, every_target=True)
        return step

    def batches(self, batch: Batch) -> tuple[list[Batch], list[float]]:
        """The batch as micro-batches, as many as ``accumulate`` says for each thread, and their weights.

        Raises:
            ValueError: there are fewer examples than micro-batches.
        """
        count = self.accumulate * (1 if self.lean is None else self.lean.threads)
        if count > len(batch[0]):
            raise ValueError(
                f"accumulate is {self.accumulate}, but the batch has only {len(batch[0])} examples"
                + (f" for {self.lean.threads} threads." if count > self.accumulate else ".")
            )
        parts = list(zip(*(tensor.tensor_split(count) for tensor in batch), strict=True))
        return parts, [len(inputs) / len(batch[0]) for inputs, _ in parts]

    def describe(self) -> str:
        """A few words, such as "LoRA r=8, bfloat16, checkpointing"."""
        settings = self.method.settings()
        words = [self.method.name + (f" r={settings['rank']}" if "rank" in settings else "")]
        if settings.get("targets", "all-linear") != "all-linear":
            names = settings["targets"]
            words.append("+".join(names) if len(names) <= 4 else f"{len(names)} targets")
        if self.nf4:
            words.append("NF4 base")
        if self.optimizer != "adamw":
            words.append(self.optimizer.upper())
        if self.dtype is not None:
            words.append(str(self.dtype).removeprefix("torch."))
        if self.lean is not None:
            words.append("lean" + (" bf16 base" if self.lean.base_dtype else ""))
        if self.gradient_checkpointing or (self.lean is not None and self.lean.checkpoint):
            words.append("checkpointing")
        if self.accumulate > 1:
            words.append(f"{self.accumulate} micro-batches")
        if self.clip is None:
            words.append("no clipping")
        return ", ".join(words)

    def check_watchable(self) -> None:
        """Raise ValueError if the step runs in threads, where hooks and modes, kept per thread, see nothing."""
        if self.lean is not None and self.lean.threads > 1:
            raise ValueError(
                f"lean.threads is {self.lean.threads}, but what autograd saves and the operations it runs are watched "
                "by hooks that hold for one thread only; use Lean(threads=1) here."
            )


def as_setup(method: Method | Setup, options: dict[str, Any]) -> Setup:
    """A setup from a method and keywords, or from a setup that keywords change."""
    return replace(method, **options) if isinstance(method, Setup) else Setup(method, **options)


# A model to rehearse with


def token_batch(model: nn.Module, batch_size: int, seq_len: int) -> Batch:
    """Inputs and targets (batch_size, seq_len) of token ids, all 0, on the model's device.

    Raises:
        ValueError: a size is below 1.
    """
    for name, size in {"batch_size": batch_size, "seq_len": seq_len}.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}, but it must be a whole number of at least 1.")
    return tuple(torch.zeros(batch_size, seq_len, dtype=torch.long, device=device_of(model)) for _ in range(2))


def batch_for(model: nn.Module, batch_size: int | None, seq_len: int | None, batch: Batch | None) -> Batch:
    """Zeros of the batch's shapes and dtypes, or token ids if there is none, on the model's device.

    Inside :func:`pretend` they are fake.

    Raises:
        ValueError: as for :func:`token_batch`.
    """
    if batch is None:
        return token_batch(model, batch_size, seq_len)
    return tuple(torch.zeros(tensor.shape, dtype=tensor.dtype, device=device_of(model)) for tensor in batch)


def shape_of(batch: Batch) -> str:
    """Such as "4 x 128"."""
    return " x ".join(str(size) for size in batch[0].shape)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are.

    Raises:
        ValueError: it has none.
    """
    for parameter in model.parameters():
        return parameter.device
    raise ValueError(f"The {type(model).__name__} has no parameters, so there is nothing to train.")


def storage_of(tensor: Tensor) -> int:
    """What tells a tensor's memory from any other's, as long as it lives."""
    return tensor.untyped_storage()._cdata


@contextmanager
def pretend(
    model: nn.Module | Factory, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Iterator[nn.Module]:
    """A model of fake tensors, which have shapes, dtypes and storages' sizes, but no numbers and no memory.

    In the block, what is computed is fake too, but for positions (``torch.arange``) and what is made of them alone. The
    model given is not touched.

    Args:
        model: a module; or a function that makes one from its shape (it is called on torch's meta device).
        device: where the fake tensors say they are. It must be there: on a CPU build a fake CUDA tensor would
            abort Python itself.
        dtype: cast floating-point weights to it; None leaves them as they are.

    Raises:
        ValueError: the device is not there, or ``model`` is neither module nor factory.
    """
    device = torch.device(device)
    if device.type == "cpu":
        device = torch.device("cpu")  # "cpu:0" is another device to torch, on which no tensor ever is
    if device.type not in ("cpu", "meta"):
        pick_device(device)  # raises if it is not there
    if not isinstance(model, nn.Module):
        model = _made(model, "meta")
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a model may hold tensors that are no parameters and no buffers
    converter = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        fake = mode.from_tensor(tensor.detach())
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if (fake.device, fake.dtype) != (device, wanted):
            with mode:
                fake = torch.empty_strided(fake.size(), fake.stride(), dtype=wanted, device=device)
        converter[id(tensor)] = _same_kind(tensor, fake)
    twin = copy.deepcopy(model, converter)
    for module in twin.modules():
        if dtype is not None and isinstance(module, BlockWeight):
            module.dtype = dtype  # what to(dtype) would make of it
    with mode, _RealPositions():
        yield twin


class _RealPositions(TorchDispatchMode):
    """Gives numbers to what comes from neither the model nor the batch but from ``torch.arange``, where it is small.

    The models of transformers look for several texts in a row by their positions, and where those are fake they go
    another way, by a mask, with other bytes and products than a step has.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = not any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if not known or not (inputs or func._overloadpacket is torch.ops.aten.arange):
            return func(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            out = None  # a number is asked for, or as many as numbers say: of what is small, as follows
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(tensor.numel() > _FEW or tensor.device.type == "meta" for tensor in made):
            return out
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def copied(model: nn.Module) -> nn.Module:
    """The model's modules copied, its weights shared: what is later replaced, frozen or marked is the copy's."""
    shared = {id(tensor): _same_kind(tensor, tensor.detach()) for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def made(model: nn.Module | Factory, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """A model to train for real, without harm to the one given.

    Args:
        model: a module, which is copied as by :func:`copied`; or a function that makes one.
        device: where a factory's model is made.
        dtype: cast floating-point weights to it; None leaves them as they are.
    """
    model = copied(model) if isinstance(model, nn.Module) else _made(model, device)
    return model if dtype is None else model.to(dtype)


def _made(factory: Factory, device: torch.device | str) -> nn.Module:
    if not callable(factory):
        raise ValueError(f"model is a {type(factory).__name__}, but it must be a torch.nn.Module or make one.")
    with torch.device(device), torch.random.fork_rng(devices=[]):
        model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"The factory made a {type(model).__name__}, but it must make a torch.nn.Module.")
    return model


def _same_kind(like: Tensor, tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else tensor


def keep_originals(model: nn.Module, shared: set[int]) -> None:
    """Give a :func:`copied` model, made ready to train, tensors of its own where training would write.

    Args:
        shared: the storages (:func:`storage_of`) that it shares.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and storage_of(parameter) in shared:
            parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()


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


def setting_of(setup: Setup, model: nn.Module, batch: Batch) -> str:
    """Such as "Llama, lora r=8, batch 4 x 128"."""
    return f"{type(model).__name__}, {setup.describe()}, batch {shape_of(batch)}"


def output_width(model: nn.Module) -> int | None:
    """How many classes or tokens the model chooses among, if it says which layer is its head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return None
    return getattr(head, "out_features", None) or head.weight.shape[0]


class Watch(TorchDispatchMode):
    """Sees every operation of a step, with its phase and the module it belongs to.

    A subclass says in :meth:`saw` what it makes of them. The phases are "forward", "backward", "clipping" and
    "optimiser step"; the backward pass of a checkpointed block runs modules again, which :attr:`again` tells.
    """

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step, self.phase = step, "before"
        self._kinds = module_kinds(step.model)
        self._names = {id(module): name for name, module in step.model.named_modules()}
        self._stack: list[int] = []

    def saw(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Called after each operation, with torch's name of it, what went in and what came out."""
        raise TypeError(f"{type(self).__name__} must say what it does with an operation, in a method saw.")

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
    def again(self) -> bool:
        """Whether a module is computed again in the backward pass."""
        return self.phase == "backward" and bool(self._stack)

    def run(self, batches: Sequence[Batch], weights: Sequence[float]) -> None:
        """Take one step and watch it."""
        step, plain = self.step, self.step.loss

        def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
            self.phase = "forward"
            result = plain(model, inputs, targets)
            self.phase = "backward"
            return result

        def backward(*args: Any) -> list[Tensor]:
            result = step.backward(*args)
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
            replace(step, loss=loss, backward=backward)(batches, weights)
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
        self.saw(func, args, kwargs or {}, out)
        return out
