"""Packing: several examples in one row, so that short examples need no padding.

    task = share_rows(summarise(tokenizer), length=512)
    fit(model, task, LoRA(rank=8), steps=100, lr=1e-3, batch_size=2)  # a batch is of rows now, each of many examples

Beside its token ids a row holds the position of each token in its example. From them the model knows where another
example begins: no token attends to another example, and positions start again at 0. So the loss of a row is that of its
examples in rows of their own.

Reference: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination", arXiv 2107.02027.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lora_lab.system.provenance import describe_value
from lora_lab.system.schema import Size, check
from lora_lab.task import (
    IGNORE,
    Examples,
    Task,
    accepts,
    cross_entropy,
    logits,
    mean_cross_entropy,
    restore_modes,
)
from lora_lab.tasks.instruction import Padded, PairTask, pad

# The root mean square difference of logits up to which it is rounding, in their standard deviations.
_ROUNDING, _ROUNDING_OF_HALF = 1e-3, 0.1


def row_cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """``cross_entropy`` of rows that hold several examples each.

    Our Llama and the models of transformers can skip logits. They are asked only for the columns in which a target of
    some row counts: answers are a small part of the tokens, and logits a large part of the work. (Fake tensors have no
    values, so for them all columns are computed.)

    Args:
        model: a causal language model that takes ``position_ids``.
        inputs: token ids and their positions in their examples, (batch, 2, length).
        targets: (batch, length).
    """
    ids, positions = inputs.unbind(1)  # (2, 512), (2, 512)
    options = {"position_ids": positions}
    if accepts(model, "logits_to_keep") and not isinstance(targets, FakeTensor):
        columns = (targets != IGNORE).any(0).nonzero().flatten()  # (100,)
        options["logits_to_keep"], targets = columns, targets[:, columns]  # (100,), (2, 100)
    return mean_cross_entropy(logits(model, ids, **options), targets)  # ()


@dataclass(frozen=True)
class RowTask(PairTask):
    """A :class:`PairTask` whose rows hold several examples each; :func:`share_rows` makes it.

    Args:
        source: the same examples in rows of their own. Descriptions, previews and answers are of its pairs.
        length: the most tokens of a row.
    """

    source: PairTask = field(kw_only=True, repr=False, compare=False)
    length: int = field(kw_only=True)

    def describe(self) -> str:
        """Return a summary as for the examples in rows of their own, and a line on the rows of each part."""
        lines = [self.source.describe(), f"  in rows of up to {self.length} tokens, which examples share:"]
        for part, rows in self.parts.items():
            columns, tokens = rows.targets.numel(), sum(_lengths(self.source.parts[part]))
            each = len(self.source.parts[part]) / len(rows)
            lines.append(f"  {part:<11}{len(rows):>6} rows of {each:.1f} examples, {1 - tokens / columns:.1%} padding")
        return "\n".join([*lines, f"  fingerprint {self.fingerprint}"])

    def preview(self, count: int = 2, part: str = "train") -> str:
        """Return the first examples as the model sees them, and how many rows all of them share."""
        rows = self.part(part)
        last = f"in {len(rows)} rows of up to {self.length} tokens, none of which attends to another example"
        return f"{self.source.preview(count, part)}\n{last}"

    def limited(self, n_train: int, seed: int | None = None) -> RowTask:
        """Return a smaller task, as for :class:`lora_lab.tasks.Task`; examples are counted, not rows."""
        return share_rows(self.source.limited(n_train, seed), self.length)

    def check_model(self, model: nn.Module) -> None:
        """Check a model as for :class:`Task`, and that it keeps the first two examples of a row separate.

        Raises:
            ValueError: as for :class:`Task`; or it takes no positions, as one with an encoder and a decoder, or its
                logits are not those of the examples in rows of their own, as for one that looks ahead.
        """
        self.source.check_model(model)
        shared = (self.train[row : row + 1].inputs for row in range(len(self.train)))  # (1, 2, tokens) each
        row = next((inputs for inputs in shared if int((inputs[0, 1] == 0).sum()) > 1), None)
        if not accepts(model, "position_ids") or (row is not None and _mixes(model, row)):
            raise ValueError(
                f"In a {type(model).__name__} the examples of a row would change each other's logits, because it is "
                "not causal or does not read position_ids; use the task whose examples have rows of their own, "
                "task.source."
            )


@torch.no_grad()
def _mixes(model: nn.Module, row: Tensor) -> bool:
    """Return whether the first two examples of a row (1, 2, tokens) have other logits than each alone."""
    (ids,), (positions,) = row.to(next(model.parameters()).device).unbind(1)  # (512,), (512,)
    starts = (positions == 0).nonzero().flatten().tolist()
    second, end = starts[1], [*starts, len(ids)][2]
    with restore_modes(model):
        model.eval()
        separate = [logits(model, each[None]) for each in (ids[:second], ids[second:end])]
        shared = logits(model, ids[None, :end], position_ids=positions[None, :end])  # (1, end, vocabulary)
    expected = torch.cat(separate, 1).double()  # (1, end, vocabulary)
    rounding = _ROUNDING if shared.dtype in (torch.float32, torch.float64) else _ROUNDING_OF_HALF
    return bool((shared.double() - expected).square().mean().sqrt() > rounding * expected.std())


def share_rows(task: Task, length: int = 512) -> RowTask:
    """Return the same examples in rows that hold several each, with the same loss and gradient for each of them.

    The batch size of a run, and the number of examples of an evaluation, then count rows. A row is filled with the
    longest example that still fits, so that each part has few rows, and the same examples always share one.

    Args:
        task: prompts and answers, for a causal language model.
        length: the most tokens of a row.

    Raises:
        ValueError: the task is of another kind or has a loss of its own, its rows hold several examples already, or
            an example is longer than a row.
    """
    if not isinstance(task, PairTask) or task.loss is not cross_entropy:
        raise ValueError(
            f"Task {task.name!r} is a {type(task).__name__} with the loss {describe_value(task.loss)!r}, but only a "
            "PairTask with cross_entropy, whose examples have rows of their own, can share rows; use it as it is."
        )
    length = check(length, Size, "length")
    for part, examples in task.parts.items():
        if (longest := max(_lengths(examples))) > length:
            raise ValueError(
                f"length is {length}, but an example of the {part} part has {longest} tokens; use at least {longest}."
            )
    contents: dict[str, Any] = {option.name: getattr(task, option.name) for option in fields(PairTask)}
    contents |= {part: _rows(examples, length) for part, examples in task.parts.items()}
    return RowTask(**contents | {"loss": row_cross_entropy, "source": task, "length": length})


def _lengths(examples: Examples) -> list[int]:
    lengths = examples.lengths
    return [examples.targets.shape[1]] * len(examples) if lengths is None else lengths.tolist()


def _rows(examples: Examples, length: int) -> Padded:
    """Return examples in rows: inputs (rows, 2, longest), targets (rows, longest)."""
    lengths = _lengths(examples)
    inputs, targets = [], []
    for row in _fill_rows(lengths, length):
        ids = torch.cat([examples.inputs[index, : lengths[index]] for index in row])  # (tokens,)
        positions = torch.cat([torch.arange(lengths[index]) for index in row])  # (tokens,)
        inputs.append(torch.stack([ids, positions], 1))  # (tokens, 2)
        targets.append(torch.cat([examples.targets[index, : lengths[index]] for index in row]))  # (tokens,)
    padded = pad(inputs, targets)
    return Padded(padded.inputs.mT.contiguous(), padded.targets)  # (rows, 2, longest), (rows, longest)


def _fill_rows(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Return the indices of each row's examples, by the rule of best fit, longest first; rows are in random order."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that still fit into a row, the row), sorted
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        place = bisect_left(rooms, (lengths[index], 0))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(rooms, (room - lengths[index], row))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))  # (rows,)
    return [rows[row] for row in order.tolist()]
