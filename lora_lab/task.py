"""A task: examples in four parts, and the loss that goes with them."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -100  # a target that does not count, as in torch.nn.functional.cross_entropy


class TextTokenizer(Protocol):
    """All that a text task needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Examples:
    """Inputs and targets, one row an example: (n, ...) each, on the CPU."""

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs cannot be paired with {len(self.targets)} targets.")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Tensor | slice) -> Examples:
        return Examples(self.inputs[rows], self.targets[rows])


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a model says of a batch as one tensor, such as (batch, length, vocabulary), however it is wrapped.

    A model may return the tensor itself, a tuple that begins with it, or an object that has it as ``logits``, as the
    models of transformers do. Those are told by ``use_cache=False`` to keep no keys and values for later tokens, which
    neither a loss nor its gradient needs. That goes with the call, so that no setting of the model is changed.

    Args:
        model: takes the inputs as its first argument.
        inputs: (batch, ...), as in :class:`Examples`.

    Raises:
        TypeError: the model returns something else, such as the hidden states of a model without a head.
    """
    outputs = model(inputs, use_cache=False) if _takes(model, "use_cache") else model(inputs)
    found = getattr(outputs, "logits", outputs)
    if isinstance(found, tuple) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"A {type(model).__name__} returned a {type(outputs).__name__}, but it must return a tensor, a tuple that "
            "begins with one, or an object that has one as logits; use a model with a head, or a loss of your own."
        )
    return found


def _takes(model: nn.Module, argument: str) -> bool:
    # Wrappers, of peft and of torch.compile, hand on whatever they are given.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "_orig_mod", model)
    try:
        return argument in inspect.signature(getattr(inner, "forward", inner)).parameters
    except ValueError:  # a traced module has no signature
        return False


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats over the targets that count, for classes and for next tokens alike."""
    found = logits(model, inputs)  # (batch, classes), or (batch, length, vocabulary)
    found = found.to(torch.promote_types(found.dtype, torch.float32))  # in half precision the sum would be rounded
    return F.cross_entropy(found.flatten(0, -2), targets.flatten(), ignore_index=IGNORE)  # ()


def mean_squared_error(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over all numbers of the batch."""
    return F.mse_loss(logits(model, inputs), targets)  # ()


@dataclass(frozen=True)
class Task:
    """Data in four parts, and the loss that goes with it.

    Args:
        name: a short name.
        train, validation, test, off_domain: see ``lora_lab.tasks``.
        loss: (model, inputs, targets) -> mean loss of a batch: a function, or anything else that can be called so.
        unit: what is counted for speed: "tokens" or "examples".
        about: one sentence on where the data comes from.

    Raises:
        ValueError: a part is empty.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    off_domain: Examples
    loss: Loss = cross_entropy
    unit: str = "examples"
    about: str = ""

    def __post_init__(self) -> None:
        for part in self.parts:
            if len(self.parts[part]) == 0:
                raise ValueError(f"The {part} part of task {self.name!r} is empty; give it at least one example.")

    @property
    def parts(self) -> dict[str, Examples]:
        """The four parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:5]}

    @property
    def fingerprint(self) -> str:
        """A hash of the content. Texts differ between versions of Python; equal fingerprints mean equal data.

        Of the loss it knows what :func:`described` says and no more: its code is not looked at, so two lambdas, or a
        function before and after a change, look the same. Give a task with another loss another name.
        """
        digest = hashlib.sha256(f"{self.name} {described(self.loss)}".encode())
        for part, examples in self.parts.items():
            for tensor in (examples.inputs, examples.targets):
                digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(bytes_of(tensor))
        return digest.hexdigest()[:16]

    def counted(self, examples: Examples) -> int:
        """How many targets of a batch count: tokens for text, examples otherwise."""
        return int((examples.targets != IGNORE).sum()) if self.unit == "tokens" else len(examples)

    def describe(self) -> str:
        """A few lines a person can read: sizes, shapes, source, fingerprint."""
        lines = [f"{self.name}: {self.about}"]
        for part, examples in self.parts.items():
            shape = " x ".join(str(n) for n in examples.inputs.shape[1:])
            lines.append(f"  {part:<11}{len(examples):>6} examples of {shape}, {self.counted(examples):,} {self.unit}")
        return "\n".join([*lines, f"  fingerprint {self.fingerprint}"])

    def limited(self, n_train: int, seed: int | None = None) -> Task:
        """The same task with only ``n_train`` training examples.

        Args:
            n_train: how many.
            seed: draws them; None takes the first ones (a part is in random order already).

        Raises:
            ValueError: there are not so many.
        """
        return replace(self, train=self.train[drawn(self, n_train, seed)])


def drawn(task: Task, n_train: int, seed: int | None = None) -> Tensor:
    """Which training examples :meth:`Task.limited` keeps: (n_train,).

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= n_train <= len(task.train):
        raise ValueError(f"n_train is {n_train}, but task {task.name!r} has 1 to {len(task.train)} examples.")
    if seed is None:
        return torch.arange(n_train)  # (n_train,)
    return torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))[:n_train]  # (n_train,)


def described(value: Any) -> str:
    """What a loss is called, or an argument of one, in the same words in every process.

    A function has its own name. A partial has its function's name and the arguments that it holds, tensors and arrays
    with all their numbers. Any other object has its ``repr`` without addresses: the fields of a dataclass are in it,
    what a plain object holds is not.
    """
    if name := getattr(value, "__name__", None):
        return name
    if isinstance(value, partial):
        return f"partial({described([value.func, *value.args])}, {described(value.keywords)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{key!r}: {described(entry)}' for key, entry in value.items()))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(described, value))}]"
    if isinstance(value, set | frozenset):
        return described(sorted(value, key=repr))
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {described(value.tolist())}"
    if isinstance(value, Tensor):  # its repr leaves numbers out
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(bytes_of(value)).hexdigest()}"
    if type(value).__repr__ is object.__repr__:
        return type(value).__qualname__
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(value))


def bytes_of(tensor: Tensor) -> np.ndarray:
    """A tensor's numbers as bytes, without a copy where they lie in order on the CPU: (bytes,)."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
