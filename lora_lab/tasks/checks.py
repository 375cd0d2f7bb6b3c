"""What is suspicious about a task of prompts and answers: one line each, with a count and an example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from lora_lab.task import IGNORE, Examples

_MOST_CLASSES = 20  # distinct answers; with more, answers are no labels
_NEARLY_ALL = 0.9


def suspicions(
    parts: Mapping[str, Examples], texts: Mapping[str, Sequence[tuple[str, str]]], stop: int | None
) -> list[str]:
    """Lines about the parts that have texts; none if nothing is suspicious.

    Args:
        parts: the task's parts by name.
        texts: part -> (context, answer) of each of its examples, in order.
        stop: the token that ends a turn; None leaves out the check of ends.
    """
    lines = []
    for part, pairs in texts.items():
        targets, count = parts[part].targets, len(pairs)  # (n, length)
        learned = (targets != IGNORE).any(1)  # (n,)
        if silent := (~learned).nonzero().flatten().tolist():
            lines.append(_line(part, len(silent), count, "train on nothing, because no token counts", pairs[silent[0]]))
        if stop is not None:
            open_ended = (learned & ~_ends_with(targets, stop)).nonzero().flatten().tolist()
            if open_ended:
                what = "do not end with the token that ends a turn, so the model never learns to stop"
                lines.append(_line(part, len(open_ended), count, what, pairs[open_ended[0]]))
        repeated = {pair: number for pair, number in Counter(pairs).items() if number > 1}
        if repeated:
            extra = sum(repeated.values()) - len(repeated)
            lines.append(_line(part, extra, count, "repeat another example word for word", next(iter(repeated))))
        answers = Counter(answer for _, answer in pairs)
        (answer, most), *_ = answers.most_common(1)
        if 1 < len(answers) <= _MOST_CLASSES and most > _NEARLY_ALL * count:
            lines.append(f"{part}: {most:,} of {count:,} answers are {answer!r:.60}; a constant guess scores as much")
    return lines


def _ends_with(targets: torch.Tensor, token: int) -> torch.Tensor:
    """Whether the last target of each row that counts is a token: (n,)."""
    counted = targets != IGNORE  # (n, length)
    last = counted.shape[1] - 1 - counted.flip(1).int().argmax(1)  # (n,)
    return targets.gather(1, last[:, None])[:, 0] == token


def _line(part: str, number: int, count: int, what: str, pair: tuple[str, str]) -> str:
    return f"{part}: {number:,} of {count:,} examples {what}, such as {pair[0]!r:.60}"
