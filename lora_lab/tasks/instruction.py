r"""Questions and answers: a model is trained on the answers alone, in its own chat format.

    task = from_pairs(tokenizer, [Pair("Capital of France?", "Paris"), ...])
    task = from_jsonl(tokenizer, "mine.jsonl")      # {"prompt": "...", "answer": "...", "group": "..."} on each line
    print(task.preview())                           # what the model will see, before an hour is spent on it

The prompt is put through the model's chat template, and the answer follows with the token that ends a turn. Targets of
the prompt do not count: the loss is the mean over the tokens of answers. Pairs of one group (the same source, the same
wording) go to one part, so that nothing in validation or test was half read in training.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lora_lab.task import IGNORE, Examples, Task, TextTokenizer, drawn
from lora_lab.tasks.python_docs import off_domain_texts, windows

PARTS = ("train", "validation", "test")


class ChatTokenizer(TextTokenizer, Protocol):
    """What a task of questions and answers needs of a tokenizer."""

    eos_id: int | None
    pad_id: int | None

    def decode(self, ids: Sequence[int]) -> str: ...

    def chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str: ...


@dataclass(frozen=True)
class Pair:
    """A prompt and the answer wanted; pairs of one group are never split between parts ("" is a group of its own)."""

    prompt: str
    answer: str
    group: str = ""


class Padded(Examples):
    """Rows padded on the right, where nothing counts; what is taken of them is only as long as it needs to be.

    For causal models, in which no token sees a later one: what is cut changes no number, and its time is saved.
    """

    def __getitem__(self, rows: Tensor | slice) -> Padded:
        targets = self.targets[rows]  # (8, 191)
        counting = (targets != IGNORE).any(0).nonzero()  # (columns, 1)
        length = int(counting[-1]) + 1 if len(counting) else 0
        return Padded(self.inputs[rows][:, :length], targets[:, :length])


@dataclass(frozen=True)
class PairTask(Task):
    """A Task that knows the texts behind its tensors.

    Args:
        pairs: of the parts train, validation and test, in the order of their examples.
        tokenizer: made the tensors, and reads what a model answers.
        metric: how answers are judged: a name in :data:`lora_lab.tasks.metrics.METRICS`, or "" for the loss alone.
        licence: of the data.
    """

    pairs: Mapping[str, Sequence[Pair]] = field(default_factory=dict, repr=False, compare=False)
    tokenizer: ChatTokenizer | None = field(default=None, repr=False, compare=False)
    metric: str = ""
    licence: str = ""

    def limited(self, n_train: int, seed: int | None = None) -> PairTask:
        """As for :class:`Task`."""
        rows = drawn(self, n_train, seed)
        kept = {**self.pairs, "train": [self.pairs["train"][row] for row in rows]}
        return replace(self, train=self.train[rows], pairs=kept)

    def prompt_ids(self, pair: Pair) -> list[int]:
        """What the model reads before it answers."""
        return self.tokenizer.encode(_asked(self.tokenizer, pair.prompt))

    def preview(self, count: int = 2, part: str = "train") -> str:
        """The first examples as the model sees them, what counts marked, and how long they are."""
        examples, lines = self.parts[part], []
        for row in range(min(count, len(examples))):
            inputs, targets = examples.inputs[row], examples.targets[row]  # (length,), (length,)
            answer = targets[targets != IGNORE]  # (n,)
            first = int((targets != IGNORE).nonzero()[0])
            lines += [
                f"{part} {row}: {first + 1} tokens are read, {len(answer)} count",
                "  reads   " + repr(self.tokenizer.decode(inputs[: first + 1].tolist())),
                "  learns  " + repr(self.tokenizer.decode(answer.tolist())),
            ]
        lengths = (examples.targets != IGNORE).sum(1).float()  # (n,)
        lines.append(
            f"{len(examples)} examples, padded to {examples.inputs.shape[1]} tokens; answers have "
            f"{int(lengths.min())} to {int(lengths.max())} tokens, {float(lengths.median()):g} in the middle"
        )
        return "\n".join(lines)


def from_pairs(
    tokenizer: ChatTokenizer,
    pairs: Iterable[Pair] | Mapping[str, Iterable[Pair]],
    *,
    name: str = "pairs",
    max_tokens: int = 512,
    seed: int = 0,
    metric: str = "",
    about: str = "",
    licence: str = "",
) -> PairTask:
    """A task of your own questions and answers.

    Args:
        tokenizer: of the model that will be trained.
        pairs: split into parts already (a dict of "train", "validation" and "test"); or not, and then eight tenths of
            the groups are for training, one for validation, one for the test.
        name: of the task.
        max_tokens: the most that an example may have, prompt and answer together.
        seed: of the split, and of the order within parts.
        metric, about, licence: as for :class:`PairTask`.

    Raises:
        ValueError: a text is empty, an example too long, a part empty or missing, a group in two parts, a prompt in two
            parts, or there are fewer than three groups.
    """
    given = {part: list(own) for part, own in pairs.items()} if isinstance(pairs, Mapping) else _split(pairs, seed)
    if set(given) != set(PARTS):
        raise ValueError(f"pairs has the parts {sorted(given)}, but it must have {', '.join(PARTS)}.")
    for part, own in given.items():
        if not own:
            raise ValueError(f"The {part} part has no pairs; give it at least one.")
    _check_disjoint(given)
    shuffled = {part: _shuffled(own, seed) for part, own in given.items()}
    return PairTask(
        name=name,
        **{part: _examples(tokenizer, own, max_tokens) for part, own in shuffled.items()},
        off_domain=windows(tokenizer, off_domain_texts(), 64),
        unit="tokens",
        about=about or "questions and answers of your own; off-domain: scikit-learn's descriptions of data sets",
        pairs=shuffled,
        tokenizer=tokenizer,
        metric=metric,
        licence=licence,
    )


def from_jsonl(tokenizer: ChatTokenizer, path: str | Path, **options) -> PairTask:
    """A task from a file of JSON Lines: an object with "prompt" and "answer" (and perhaps "group") on each.

    With "part" ("train", "validation" or "test") on every line the split is yours.

    Args:
        tokenizer, **options: as for :func:`from_pairs`; the name is the file's unless another is given.
        path: of the file; empty lines are skipped.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: lines are malformed (all are named, each with its reason), or as for :func:`from_pairs`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; give the path of a JSON Lines file.")
    pairs, parts, problems = [], [], []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            pair, part = _parsed(line)
            pairs.append(pair)
            parts.append(part)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{path} has {len(problems)} malformed line{'s' if len(problems) > 1 else ''}: {shown}.")
    if not pairs:
        raise ValueError(f"{path} has no lines; give each example one.")
    options = {"name": path.stem, "about": f"from the file {path.name}", **options}
    if not any(parts):
        return from_pairs(tokenizer, pairs, **options)
    if not all(parts):
        raise ValueError(f'{path} has "part" on {sum(map(bool, parts))} of {len(parts)} lines; give it on all or none.')
    split: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for pair, part in zip(pairs, parts, strict=True):
        split[part].append(pair)
    return from_pairs(tokenizer, split, **options)


def from_text(tokenizer: TextTokenizer, path: str | Path, *, seq_len: int = 128, name: str | None = None) -> Task:
    """Next tokens of a text file of your own.

    Paragraphs (parted by an empty line) stay whole; of every ten in turn the ninth is for validation and the tenth for
    the test.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not UTF-8, or too short for ``seq_len``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; give the path of a text file.")
    paragraphs = [text for text in "".join(line for _, line in _lines(path)).split("\n\n") if text.strip()]
    split = {
        "train": [text for i, text in enumerate(paragraphs) if i % 10 < 8],
        "validation": paragraphs[8::10],
        "test": paragraphs[9::10],
    }
    parts = {}
    for part, texts in split.items():
        parts[part] = windows(tokenizer, texts, seq_len)
        if len(parts[part]) == 0:
            raise ValueError(
                f"{path} has {len(paragraphs)} paragraphs, too few for a {part} part of {seq_len} tokens an example; "
                "give a longer text, more paragraphs, or a smaller seq_len."
            )
    about = f"from the file {path.name}; off-domain: scikit-learn's descriptions of data sets"
    off_domain = windows(tokenizer, off_domain_texts(), seq_len)
    return Task(name or path.stem, **parts, off_domain=off_domain, unit="tokens", about=about)


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        return list(enumerate(path.read_text(encoding="utf-8-sig").splitlines(keepends=True), start=1))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None


def _parsed(line: str) -> tuple[Pair, str]:
    """A pair and its part ("" if none is given).

    Raises:
        ValueError: what is wrong, in a few words.
    """
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, not an object")
    if missing := [name for name in ("prompt", "answer") if name not in found]:
        raise ValueError(f"lacks {' and '.join(map(repr, missing))}")
    if unknown := sorted(set(found) - {"prompt", "answer", "group", "part"}):
        raise ValueError(f"has an unknown entry {unknown[0]!r}")
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{name!r} is a {type(value).__name__}, not a text")
        if name in ("prompt", "answer") and not value.strip():
            raise ValueError(f"{name!r} is empty")
    part = found.pop("part", "")
    if part and part not in PARTS:
        raise ValueError(f"'part' is {part!r}, not one of {', '.join(PARTS)}")
    return Pair(**found), part


def _group(pair: Pair) -> str:
    """Pairs without a group are alone in theirs, but those that ask the same are together."""
    return pair.group or f"\0{pair.prompt.strip().casefold()}"


def _split(pairs: Iterable[Pair], seed: int) -> dict[str, list[Pair]]:
    """Whole groups in drawn order: into validation and test while they have less than a tenth, all else to training."""
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[_group(pair)].append(pair)
    if len(groups) < len(PARTS):
        raise ValueError(
            f"There are {len(groups)} groups of pairs, but each of {', '.join(PARTS)} needs one at least; give more "
            "pairs, or smaller groups."
        )
    tenth, left = max(1, sum(map(len, groups.values())) // 10), _shuffled(list(groups.values()), seed)
    split: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for part in ("validation", "test"):  # one each, before anything else
        first = next((group for group in left if len(group) <= tenth), None) or min(left, key=len)
        left.remove(first)
        split[part] += first
    largest = max(left, key=len)
    for group in left:
        room = [part for part in ("validation", "test") if len(split[part]) + len(group) <= tenth]
        split[room[0] if room and group is not largest else "train"] += group
    return split


def _check_disjoint(split: Mapping[str, Sequence[Pair]]) -> None:
    """No group and no prompt may be in two parts."""
    where: dict[str, str] = {}
    for part, pairs in split.items():
        for group in {_group(pair) for pair in pairs} | {f"\0{pair.prompt.strip().casefold()}" for pair in pairs}:
            if where.setdefault(group, part) != part:
                what = f"The prompt {group[1:60]!r}" if group[0] == "\0" else f"The group {group!r}"
                raise ValueError(f"{what} is in {where[group]} and in {part}; put it into one part.")


def _shuffled(items: Sequence, seed: int) -> list:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))  # (n,)
    return [items[i] for i in order]


def _asked(tokenizer: ChatTokenizer, prompt: str) -> str:
    return tokenizer.chat([{"role": "user", "content": prompt}])


def _answered(tokenizer: ChatTokenizer, pair: Pair) -> str:
    """The answer as the template writes it, to the end of the turn.

    Raises:
        ValueError: the template writes the question in another way once it is answered.
    """
    asked = _asked(tokenizer, pair.prompt)
    turns = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}]
    whole = tokenizer.chat(turns, add_generation_prompt=False)
    if not whole.startswith(asked):
        raise ValueError(
            "The model's chat template does not end a question where its answer begins, so what is to be learned is "
            "not plain; use a model with another template."
        )
    return whole[len(asked) :].rstrip("\n")  # after the end of the turn nothing is to be learned


def encode(tokenizer: ChatTokenizer, pair: Pair) -> tuple[list[int], list[int]]:
    """Inputs and targets of one pair; targets of the prompt are IGNORE."""
    asked = tokenizer.encode(_asked(tokenizer, pair.prompt))
    answer = tokenizer.encode(_answered(tokenizer, pair))
    ids = asked + answer
    return ids[:-1], [IGNORE] * (len(asked) - 1) + answer


def _examples(tokenizer: ChatTokenizer, pairs: Sequence[Pair], max_tokens: int) -> Padded:
    """Padded on the right, where no counted token looks."""
    encoded = []
    for pair in pairs:
        if not pair.prompt.strip() or not pair.answer.strip():
            raise ValueError(f"{pair!r:.120} has an empty text; give both prompt and answer.")
        inputs, targets = encode(tokenizer, pair)
        if len(inputs) + 1 > max_tokens:
            raise ValueError(
                f"The pair with the prompt {pair.prompt[:60]!r} has {len(inputs) + 1} tokens, but max_tokens is "
                f"{max_tokens}; shorten it, or raise max_tokens."
            )
        encoded.append((inputs, targets))
    length = max(len(inputs) for inputs, _ in encoded)
    blank = next((token for token in (tokenizer.pad_id, tokenizer.eos_id) if token is not None), 0)
    return Padded(
        _padded([inputs for inputs, _ in encoded], length, blank), _padded([t for _, t in encoded], length, IGNORE)
    )


def _padded(rows: Sequence[Sequence[int]], length: int, blank: int) -> Tensor:
    return torch.tensor([[*row, *[blank] * (length - len(row))] for row in rows])  # (n, length)
