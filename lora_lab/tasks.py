"""What a model is trained on and judged by: data in four parts that do not leak into each other.

    train        what it learns from
    validation   the same kind of data, for choosing (rates, steps, ranks)
    test         the same kind of data, for the final verdict
    off_domain   another kind of data: does the model forget what it could do before?

All data is on the machine already: it comes with Python or scikit-learn, or is generated.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lab.lora import LoRAConfig, inject, lora_layers

IGNORE = -100  # a target that does not count, as in torch.nn.functional.cross_entropy


class Encoder(Protocol):
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


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats over the targets that count, for classes and for next tokens alike."""
    logits = model(inputs)  # (batch, classes), or (batch, length, vocabulary)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # in half precision the sum would be rounded
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE)  # ()


def mean_squared_error(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over all numbers of the batch."""
    return F.mse_loss(model(inputs), targets)  # ()


@dataclass(frozen=True)
class Task:
    """Data in four parts, and the loss that goes with it.

    Args:
        name: a short name.
        train, validation, test, off_domain: see the top of this module.
        loss: (model, inputs, targets) -> mean loss of a batch.
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
        """A hash of the content. Texts differ between versions of Python; equal fingerprints mean equal data."""
        digest = hashlib.sha256(f"{self.name} {self.loss.__name__}".encode())
        for part, examples in self.parts.items():
            for tensor in (examples.inputs, examples.targets):
                digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
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
        if not 1 <= n_train <= len(self.train):
            raise ValueError(f"n_train is {n_train}, but task {self.name!r} has 1 to {len(self.train)} examples.")
        if seed is None:
            return replace(self, train=self.train[:n_train])
        drawn = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))[:n_train]  # (n_train,)
        return replace(self, train=self.train[drawn])


def docs(tokenizer: Encoder, seq_len: int = 128) -> Task:
    """Next tokens of Python's own reference manual (``pydoc_data.topics``, part of CPython).

    Pages that quote each other (some repeat whole sections of others) form a group, and a group goes to one
    part as a whole, so that nothing in validation or test was read in training. Off-domain is prose on
    flowers, wines, houses and patients: scikit-learn's descriptions of its data sets.

    Args:
        tokenizer: turns text into token ids.
        seq_len: tokens an example.

    Raises:
        ValueError: seq_len is below 2, or so long that a part is left empty.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}, but an example needs at least 2 tokens.")
    from pydoc_data.topics import topics

    pages = list(dict.fromkeys(topics[name] for name in sorted(topics)))  # some topics share one page
    split: dict[str, list[str]] = {"train": [], "validation": [], "test": [], "off_domain": _descriptions()}
    for i, group in enumerate(_related(pages)):
        held_out = {1: "validation", 3: "test"}.get(i % 5) if len(group) < 8 else None  # the large one is for training
        split[held_out or "train"] += group
    return Task(
        name="docs",
        **{part: _windows(tokenizer, texts, seq_len) for part, texts in split.items()},
        unit="tokens",
        about="Python's reference manual, cut by page; off-domain: scikit-learn's descriptions of data sets",
    )


def digits(part: str = "adapt", seed: int = 0) -> Task:
    """scikit-learn's handwritten digits: learn them as they are first, then moved down by one pixel.

    To a person the moved digits are the same; a net that was trained on the others gets half of them wrong.

    Args:
        part: "pretrain" (900 pictures as they are) or "adapt" (the other 897, moved; off-domain is as they were).
        seed: seeds the split and the order.

    Raises:
        ValueError: another part.
    """
    if part not in ("pretrain", "adapt"):
        raise ValueError(f"part is {part!r}, but it must be 'pretrain' (digits as they are) or 'adapt' (moved down).")
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))  # (1797,)
    upright = torch.tensor(pictures, dtype=torch.float32)[order] / 16  # (1797, 64) in [0, 1]
    moved = F.pad(upright[:, :-8], (8, 0))  # (1797, 64): without the last row of 8 pixels, an empty one before
    labels = torch.tensor(labels)[order]  # (1797,)
    as_is, down = Examples(upright[:900], labels[:900]), Examples(moved[900:], labels[900:])
    held_out = as_is[700:800]
    if part == "pretrain":
        own = {"train": as_is[:700], "validation": held_out, "test": as_is[800:], "off_domain": down[500:700]}
    else:
        own = {"train": down[:500], "validation": down[500:700], "test": down[700:], "off_domain": held_out}
    return Task(
        name=f"digits-{part}", **own, about="scikit-learn's 8 x 8 digits: as they are, or moved down by a pixel"
    )


def planted(
    model: nn.Module,
    rank: int = 4,
    noise: float = 0.1,
    n_train: int = 512,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> Task:
    """A task whose answer is known: imitate ``model`` plus a hidden update of the given rank.

    The teacher is a copy of the model with an update of exactly that rank, as large as the weight itself,
    in each target layer. Inputs are Gaussian. Noise is added to the teacher's training answers and to no
    others, so a student that finds the update reaches zero validation loss, however noisy its lessons.

    Args:
        model: a net that takes (n, features); it is left as it is.
        rank: rank of the hidden update.
        noise: standard deviation of the noise, relative to that of the teacher's answers.
        n_train: number of training examples.
        targets: layers that the update touches, as in :class:`lora_lab.LoRAConfig`.
        seed: seeds all of it.

    Raises:
        ValueError: noise is negative, or as for :func:`lora_lab.inject`.
    """
    if noise < 0:
        raise ValueError(f"noise is {noise}, but a standard deviation cannot be negative.")
    teacher = copy.deepcopy(model).eval()
    inject(teacher, LoRAConfig(rank=rank, alpha=rank, targets=targets), seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    features = next(module for module in model.modules() if isinstance(module, nn.Linear)).in_features
    with torch.no_grad():
        for layer in lora_layers(teacher).values():
            layer.lora_B.copy_(draw(*layer.lora_B.shape))  # (out, rank)
            layer.lora_B.mul_(layer.base.weight.norm() / layer.delta().norm())
        inputs = draw(n_train + 3 * 256, features)
        answers = teacher(inputs)  # (n, out)
        answers[:n_train] += noise * answers.std() * draw(n_train, answers.shape[1])
        off_inputs = 3 * draw(256, features)  # three times as far out
        off_domain = Examples(off_inputs, model(off_inputs))
    rows = Examples(inputs, answers)
    return Task(
        name=f"planted-rank{rank}",
        train=rows[:n_train],
        validation=rows[n_train : n_train + 256],
        test=rows[n_train + 256 : n_train + 512],
        off_domain=off_domain,
        loss=mean_squared_error,
        about=f"a hidden update of rank {rank}, training answers with noise {noise:g}; off-domain: the model as it was",
    )


def _windows(tokenizer: Encoder, texts: Sequence[str], seq_len: int) -> Examples:
    """Texts joined and cut into rows of ``seq_len`` tokens, the targets one token ahead, in random order."""
    ids = torch.tensor(tokenizer.encode("\n\n".join(texts)))  # (tokens,)
    rows = (len(ids) - 1) // seq_len
    inputs = ids[: rows * seq_len].view(rows, seq_len)  # (rows, seq_len)
    targets = ids[1 : rows * seq_len + 1].view(rows, seq_len)  # (rows, seq_len)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))  # (rows,)
    return Examples(inputs[order], targets[order])


def _related(pages: Sequence[str]) -> list[list[str]]:
    """Pages in groups: two that share a paragraph of 60 characters or more are in the same one."""
    groups: list[tuple[set[str], list[str]]] = []
    for page in pages:
        paragraphs = {" ".join(paragraph.split()) for paragraph in page.split("\n\n")}
        paragraphs = {paragraph for paragraph in paragraphs if len(paragraph) >= 60}
        kin = [group for group in groups if group[0] & paragraphs]
        groups = [group for group in groups if group not in kin]
        groups.append((paragraphs.union(*(group[0] for group in kin)), [p for group in kin for p in group[1]] + [page]))
    return sorted((members for _, members in groups), key=lambda members: pages.index(members[0]))


def _descriptions() -> list[str]:
    # Found without importing scikit-learn, which takes most of a second and 100 MB.
    folder = Path(find_spec("sklearn").origin).parent / "datasets" / "descr"
    pages = sorted(
        (page.name, page.read_text(encoding="utf-8")) for page in folder.iterdir() if page.name.endswith(".rst")
    )
    return [text for _, text in pages]
