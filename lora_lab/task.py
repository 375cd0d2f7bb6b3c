"""A task: examples in four parts, and the loss to train and evaluate with."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.inject import uncompiled
from lora_lab.system.provenance import bytes_of, describe_value
from lora_lab.system.schema import check
from lora_lab.system.wording import count_noun

IGNORE = -100  # a target that does not count in the loss, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Examples:
    """Inputs and targets, (n, ...) each, one row per example, on the CPU.

    Raises:
        ValueError: their numbers differ.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs cannot be paired with {len(self.targets)} targets.")

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def lengths(self) -> Tensor | None:
        """The length of each example, (n,), in a subclass that pads them; None if all have the same."""
        return None

    @property
    def target_counts(self) -> Tensor:
        """The number of targets of each example that count (not ``IGNORE``), (n,): its weight in a mean over batches.

        Targets in floating point all count, so every example has the weight 1.
        """
        if self.targets.is_floating_point():
            return torch.ones(len(self), dtype=torch.long)
        return (self.targets != IGNORE)[:, None].flatten(1).sum(1)  # of targets (n,) or (n, length)

    def __getitem__(self, rows: Tensor | slice) -> Examples:
        return Examples(self.inputs[rows], self.targets[rows])


Batch = tuple[Tensor, Tensor]  # inputs and targets, on the model's device
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (model, inputs, targets) -> mean loss of the batch, ()


def logits(model: nn.Module, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the logits of a model for a batch as one tensor, such as (batch, length, vocabulary).

    The model may return the tensor, a tuple that begins with it, or an object with an attribute ``logits``, as the
    models of transformers do. Those get three more arguments where they take them:

    - ``use_cache=False``, because neither a loss nor its gradient needs a cache of keys and values. The model's config
      is not changed.
    - ``attention_mask``, which hides padding where :func:`padding_id` gives its token.
    - ``decoder_input_ids`` for an encoder-decoder: the targets, shifted by the model's own rule.

    Args:
        model: takes the inputs as its first argument.
        inputs: (batch, ...), as in :class:`Examples`.
        targets: (batch, length), which the decoder of an encoder-decoder reads; no other model needs them.

    Raises:
        TypeError: the model returns something else, such as the hidden states of a model without a head.
        ValueError: an encoder-decoder gets no targets, or has no rule for shifting them.
    """
    more = {}
    if accepts(model, "use_cache"):
        more["use_cache"] = False
    pad = padding_id(model)
    if pad is not None and inputs.ndim == 2 and not inputs.is_floating_point():
        more["attention_mask"] = (inputs != pad).long()  # (batch, length)
    if is_encoder_decoder(model):
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if targets is None or shift is None:
            raise ValueError(f"A {type(model).__name__}'s decoder reads shifted targets; give the task your own loss.")
        more["decoder_input_ids"] = shift(labels=targets)  # (batch, length of the targets)
    outputs = model(inputs, **more)
    result = getattr(outputs, "logits", outputs)
    if isinstance(result, tuple) and result:
        result = result[0]
    if not isinstance(result, Tensor):
        raise TypeError(
            f"A {type(model).__name__} returned a {type(outputs).__name__} without logits; use a model with a head."
        )
    return result


def accepts(model: nn.Module, argument: str) -> bool:
    """Return whether the model's forward takes an argument of that name."""
    # Wrappers of peft and of torch.compile pass all arguments on, so the wrapped model decides.
    unwrap = getattr(model, "get_base_model", None)
    inner = uncompiled(model) if unwrap is None else unwrap()
    forward = getattr(inner, "forward", inner)
    method = getattr(forward, "__func__", None)
    try:
        if method is not None:
            return argument in _parameters(method)  # from a cache
        # Anything but a method, such as a partial, may hold a model, which a cache would keep in memory.
        return argument in inspect.signature(forward).parameters
    except ValueError:  # a traced module has no signature
        return False


@lru_cache(maxsize=1)  # every step asks, mostly of the same class
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def embedding_rows(model: nn.Module) -> int | None:
    """Return how many tokens a model knows, by its input embedding; None if it has none that says so."""
    method = getattr(model, "get_input_embeddings", None)
    try:
        embedding = None if method is None else method()
    except NotImplementedError:  # transformers', for a model without one
        return None
    return getattr(getattr(embedding, "base", embedding), "num_embeddings", None)


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens a model is made to read; None if its config does not say, or says -1 for any number."""
    length = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether this is an encoder-decoder of transformers, by its config."""
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True


def padding_id(model: nn.Module) -> int | None:
    """Return the padding token of a model that must mask it, or None.

    Those are the encoders and encoder-decoders of transformers whose config has a ``pad_token_id``. In a causal model
    no token attends to the padding on its right, so a mask would change no loss and cost time.
    """
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or (can_generate() and not is_encoder_decoder(model)):
        return None
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) and accepts(model, "attention_mask") else None


@contextmanager
def restore_modes(model: nn.Module) -> Iterator[None]:
    """Restore the mode, train or eval, of every module after the block.

    Modules added in the block, such as adapters, take the mode of their parent.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        yield
    finally:
        for name, module in model.named_modules():  # a parent comes before its children
            module.training = modes.setdefault(name, modes[name.rpartition(".")[0]])


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats over the targets other than ``IGNORE``, for classes and for next tokens."""
    return mean_cross_entropy(logits(model, inputs, targets), targets)  # ()


def mean_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (batch, classes) or (batch, length, vocabulary)."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # half precision would round the sum
    return F.cross_entropy(scores.flatten(0, -2), targets.flatten(), ignore_index=IGNORE)  # ()


def mean_squared_error(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error over all elements of the batch."""
    return F.mse_loss(logits(model, inputs), targets)  # ()


@dataclass(frozen=True)
class Task:
    """Data in four parts, and the loss to train and evaluate with.

    Args:
        name: a short name.
        train: the examples to learn from, in random order.
        validation: of the same kind, to choose settings and stop by.
        test: of the same kind, for the result alone.
        off_domain: of another kind, to see what is forgotten.
        loss: (model, inputs, targets) -> mean loss of a batch; a function or another callable.
        unit: what sizes and speed are given in: "tokens", for targets that are tokens, or "examples".
        about: one sentence on where the data comes from.

    Raises:
        ValueError: a part is empty or has no target that counts in the loss; or the unit is another.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    off_domain: Examples
    loss: Loss = cross_entropy
    unit: Literal["tokens", "examples"] = "examples"
    about: str = ""

    def __post_init__(self) -> None:
        check(self.unit, Literal["tokens", "examples"], "unit")
        for part in self.parts:
            self.require_targets(part, None)

    @property
    def parts(self) -> dict[str, Examples]:
        """The four parts by name."""
        return {name: getattr(self, name) for name in ("train", "validation", "test", "off_domain")}

    def part(self, name: str) -> Examples:
        """Return the part of that name.

        Raises:
            ValueError: the task has no such part.
        """
        if name not in self.parts:
            raise ValueError(f"part is {name!r}, but task {self.name!r} has {list(self.parts)}.")
        return self.parts[name]

    @property
    def fingerprint(self) -> str:
        """A hash of name, data and loss. Tasks with equal fingerprints have equal data.

        The texts of a task may depend on the version of Python. The hash covers the loss as :func:`describe_value` has
        it, without its code: two lambdas, or a function before and after a change, have the same description. Give a
        task with another loss another name.
        """
        digest = hashlib.sha256(f"{self.name} {describe_value(self.loss)}".encode(errors="backslashreplace"))
        for part, examples in self.parts.items():
            for tensor in (examples.inputs, examples.targets):
                digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(bytes_of(tensor))
        return digest.hexdigest()[:16]

    def count_targets(self, examples: Examples) -> int:
        """Return the number of targets that count in a batch, which is the weight of its mean loss."""
        return int(examples.target_counts.sum())

    def size(self, examples: Examples) -> int:
        """Return the size of a batch in the task's unit: its targets that count, or its examples."""
        return self.count_targets(examples) if self.unit == "tokens" else len(examples)

    def require_targets(self, part: str, limit: int | None) -> None:
        """Check that a target counts in the loss.

        Args:
            part: its name.
            limit: how many of its examples, the first ones, are to be used; None for all.

        Raises:
            ValueError: all their targets are ``IGNORE``.
        """
        if self.count_targets(self.part(part)[:limit]) == 0:
            examples = "" if limit is None else f"first {count_noun(limit, 'example')} of the "
            of_part = f"the {examples}{part} part of task {self.name!r}"
            raise ValueError(f"No target of {of_part} counts in the loss: there is none, or all are {IGNORE}.")

    def check_model(self, model: nn.Module) -> None:
        """Check that a model can be trained on this task, before training changes it.

        The model must have parameters, and its vocabulary must contain all tokens of the task.

        Warns of examples that are longer than the model's context.

        Raises:
            ValueError: it cannot.
        """
        if next(model.parameters(), None) is None:
            raise ValueError(f"The model, a {type(model).__name__}, has no parameters; pass the one that is to learn.")
        rows, context = embedding_rows(model), context_length(model)
        if rows is None or self.train.inputs.ndim != 2 or self.train.inputs.is_floating_point():
            return
        # Where the next token is predicted, the last one of a row is among the targets alone.
        predicts_next = self.unit == "tokens" and not is_encoder_decoder(model)
        for part, examples in self.parts.items():
            ids = [examples.inputs, examples.targets] if predicts_next else [examples.inputs]
            largest = max(int(tensor.max()) for tensor in ids)
            if largest >= rows:
                raise ValueError(
                    f"The {part} part of task {self.name!r} has the token {largest}, but the model knows {rows} "
                    "tokens; make the task with the model's own tokenizer."
                )
        lengths = self.train.lengths
        longest = self.train.inputs.shape[-1] if lengths is None else int(lengths.max())
        if context is not None and longest > context:
            warnings.warn(
                f"Training examples of task {self.name!r} have up to {longest} tokens, but the model is for at most "
                f"{context} (max_position_embeddings); make shorter examples (max_tokens, seq_len).",
                stacklevel=3,
            )

    def describe(self) -> str:
        """Return a summary in a few lines of text: sizes, shapes, source, fingerprint."""
        lines = [f"{self.name}: {self.about}"]
        for part, examples in self.parts.items():
            shape = " x ".join(str(n) for n in examples.inputs.shape[1:])
            lines.append(f"  {part:<11}{len(examples):>6} examples of {shape}, {self.size(examples):,} {self.unit}")
        return "\n".join([*lines, f"  fingerprint {self.fingerprint}"])

    def limited(self, n_train: int, seed: int | None = None) -> Task:
        """Return the same task with only ``n_train`` training examples.

        Args:
            n_train: number of training examples.
            seed: for a random selection; None takes the first examples, which are in random order already.

        Raises:
            ValueError: ``n_train`` is below 1 or above the number of training examples.
        """
        return replace(self, train=self.train[draw_rows(self, n_train, seed)])


def draw_rows(task: Task, n_train: int, seed: int | None = None) -> Tensor:
    """Return the indices of the training examples that :meth:`Task.limited` selects: (n_train,).

    Raises:
        ValueError: ``n_train`` is below 1 or above the number of training examples, or the seed is none.
    """
    if not 1 <= n_train <= len(task.train):
        raise ValueError(f"n_train is {n_train}, but it must be from 1 to {len(task.train)}, the training examples.")
    if seed is None:
        return torch.arange(n_train)  # (n_train,)
    return torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))[:n_train]  # (n_train,)
