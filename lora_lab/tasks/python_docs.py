"""Next-token prediction on Python's manual, and the prose on which every text task measures forgetting."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.schema import check
from lora_lab.task import Examples, Task

_CHUNK = 2**19  # characters tokenised at once; the library needs about 140 bytes for each
_CONTEXT = 100  # characters on each side of a cut: far more than a token has
_WORD_END = re.compile(r"(?<=[^\W_])(?=[\W_])")


def docs(tokenizer: Tokenizer, seq_len: int = 128) -> Task:
    """Return the task of predicting the next token of Python's reference manual (``pydoc_data.topics``).

    Pages that quote each other (some repeat whole sections of others) form a group, and a whole group goes to one part,
    so that validation and test repeat nothing from training. Off-domain is prose on flowers, wines, houses and
    patients: scikit-learn's descriptions of its data sets.

    Args:
        tokenizer: turns text into token ids.
        seq_len: tokens per example.

    Raises:
        ValueError: as for :func:`text_task`.
    """
    from pydoc_data.topics import topics

    pages = list(dict.fromkeys(topics[name] for name in sorted(topics)))  # some topics share one page
    split = {"train": [], "validation": [], "test": []}
    parts = "train", "validation", "train", "test", "train"  # of every five groups
    for i, group in enumerate(_group_related(pages)):
        part = parts[i % 5] if len(group) < 8 else "train"  # the one large group is for training
        split[part] += group
    return text_task(tokenizer, split, name="docs", about="Python's reference manual, cut by page", seq_len=seq_len)


def text_task(
    tokenizer: Tokenizer, split: Mapping[str, Sequence[str]], name: str, about: str, seq_len: int = 128
) -> Task:
    """Return the task of predicting the next token of texts; off-domain are scikit-learn's descriptions of data sets.

    Args:
        tokenizer: turns text into token ids.
        split: the texts of "train", "validation" and "test".
        name, about: as for :class:`lora_lab.task.Task`.
        seq_len: tokens per example.

    Raises:
        ValueError: as for :func:`windows`, or a part has too few tokens for an example.
    """
    parts: Any = {}
    for part, texts in {**split, "off_domain": off_domain_texts()}.items():
        parts[part] = windows(tokenizer, texts, seq_len)
        if len(parts[part]) == 0:
            raise ValueError(f"The {part} part of task {name!r} has fewer tokens than seq_len, {seq_len}; lower it.")
    about += "; off-domain: scikit-learn's descriptions of data sets"
    return Task(name, **parts, unit="tokens", about=about)


def windows(tokenizer: Tokenizer, texts: Sequence[str], seq_len: int) -> Examples:
    """Return texts joined and cut into sequences of ``seq_len`` tokens, in random order; targets are one token ahead.

    Raises:
        ValueError: ``seq_len`` is below 2.
    """
    check(seq_len, Annotated[int, Field(ge=2, lt=2**31)], "seq_len")
    chunks = _chunks(tokenizer, "\n\n".join(texts))
    ids = torch.cat([torch.tensor(tokenizer.encode(chunk), dtype=torch.long) for chunk in chunks])  # (tokens,)
    rows = max(0, len(ids) - 1) // seq_len
    inputs = ids[: rows * seq_len].view(rows, seq_len)  # (rows, seq_len)
    targets = ids[1 : rows * seq_len + 1].view(rows, seq_len)  # (rows, seq_len)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))  # (rows,)
    return Examples(inputs[order], targets[order])


def _chunks(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Yield parts of a long text whose tokens, one after another, are those of the text."""
    start = 0
    while len(text) - start > _CHUNK and (end := _cut(tokenizer, text, start + _CHUNK)) < len(text):
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(tokenizer: Tokenizer, text: str, start: int) -> int:
    """Return the first place from ``start`` on at which a cut changes no token; the text's end if that is far away."""
    for word_end in islice(_WORD_END.finditer(text, start), 100):
        place = word_end.start()
        left, right = text[place - _CONTEXT : place], text[place : place + _CONTEXT]
        if tokenizer.encode(left + right) == tokenizer.encode(left) + tokenizer.encode(right):
            return place
    return len(text)


def _group_related(pages: Sequence[str]) -> list[list[str]]:
    """Return groups of pages, in order: those that share a paragraph of at least 60 characters are in one group."""
    # scipy's DisjointSet forgets the order in which groups were merged, and so the order of the pages, which the data
    # depends on. Its import would also cost every training process half a second and 28 MiB.
    paragraphs = {
        page: {text for part in page.split("\n\n") if len(text := " ".join(part.split())) >= 60} for page in pages
    }
    groups = []
    for page in pages:
        related = [group for group in groups if any(paragraphs[page] & paragraphs[other] for other in group)]
        groups = [group for group in groups if group not in related]
        groups.append([*chain(*related), page])
    return sorted(groups, key=lambda group: pages.index(group[0]))


def off_domain_texts() -> list[str]:
    """Return scikit-learn's descriptions of its data sets, one text each: the off-domain part of every text task."""
    # find_spec does not import scikit-learn, which takes most of a second and 100 MB.
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("The off-domain texts come with scikit-learn; run pip install scikit-learn.")
    folder = Path(spec.origin).parent / "datasets" / "descr"
    return [page.read_text(encoding="utf-8") for page in sorted(folder.glob("*.rst"), key=lambda page: page.name)]
