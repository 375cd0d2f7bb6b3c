"""Python's manual as a task of next tokens, and the prose that every text task is judged by for what it forgets."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from lora_lab.task import Examples, Task, TextTokenizer


def docs(tokenizer: TextTokenizer, seq_len: int = 128) -> Task:
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
    split: dict[str, list[str]] = {"train": [], "validation": [], "test": [], "off_domain": off_domain_texts()}
    for i, group in enumerate(_related(pages)):
        held_out = {1: "validation", 3: "test"}.get(i % 5) if len(group) < 8 else None  # the large one is for training
        split[held_out or "train"] += group
    return Task(
        name="docs",
        **{part: windows(tokenizer, texts, seq_len) for part, texts in split.items()},
        unit="tokens",
        about="Python's reference manual, cut by page; off-domain: scikit-learn's descriptions of data sets",
    )


def windows(tokenizer: TextTokenizer, texts: Sequence[str], seq_len: int) -> Examples:
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


def off_domain_texts() -> list[str]:
    """scikit-learn's descriptions of its data sets, text by text: the off-domain part of all tasks of text."""
    # Found without importing scikit-learn, which takes most of a second and 100 MB.
    folder = Path(find_spec("sklearn").origin).parent / "datasets" / "descr"
    pages = sorted(
        (page.name, page.read_text(encoding="utf-8")) for page in folder.iterdir() if page.name.endswith(".rst")
    )
    return [text for _, text in pages]
