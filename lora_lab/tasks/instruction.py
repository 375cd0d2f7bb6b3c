"""Tasks of prompts and answers: the model reads both in its own chat format, and the loss counts the answers alone.

    task = from_pairs(tokenizer, [Pair("Capital of France?", "Paris"), ...])
    task = from_jsonl(tokenizer, "mine.jsonl")      # {"prompt": "...", "answer": "..."} or chat messages on each line
    print(task.preview())                           # what the model reads and learns, before an hour of training

The prompt is put through the model's chat template; the answer follows, up to and including the token that ends the
turn. Targets of the prompt are IGNORE, so the loss is the mean over the tokens of the answers: in a conversation of
several turns, of all the assistant's. All pairs of a group (the same source, the same wording) go to one part, so that
validation and test repeat nothing from training.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.schema import Count, Seed, Size, check
from lora_lab.system.wording import count_noun, short_repr
from lora_lab.task import IGNORE, Examples, Task, draw_rows
from lora_lab.tasks.python_docs import off_domain_texts, windows

PARTS = ("train", "validation", "test")
Metric = Literal["", "classification", "style", "summary", "translation"]
Turn = tuple[str, str]  # role and content
_SAMPLE = "Good day."  # of an assistant
# Per token, more than any token has: a text above this limit is too long without tokenising it.
_MOST_CHARACTERS = 1000
# Distinct answers, with more of which they are no labels; a suspicious share.
_MOST_CLASSES, _NEARLY_ALL = 20, 0.9
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """A prompt and its reference answer.

    Pairs of one group always go to the same part of a task. Without a group ("") a pair goes with those that have the
    same prompt.

    Args:
        before: the turns of a conversation before the prompt, each (role, content), such as a system turn. The answers
            among them are learned too.
    """

    prompt: str
    answer: str
    group: str = ""
    before: tuple[Turn, ...] = ()

    @property
    def context(self) -> str:
        """All texts before the answer."""
        return "\n".join([*(content for _, content in self.before), self.prompt])


class Padded(Examples):
    """Rows padded on the right; a batch of them is only as long as its longest row.

    For causal models, in which no token attends to a later one: cutting the padding changes no loss and saves its time.
    """

    @property
    def lengths(self) -> Tensor:
        """The columns of each row up to the last target that counts, (n,)."""
        counted = self.targets != IGNORE  # (552, 82)
        return counted.flip(1).cumsum(1).bool().sum(1)  # (552,): columns from which on, to the right, a target counts

    def __getitem__(self, rows: Tensor | slice) -> Padded:
        targets = self.targets[rows]  # (8, 191)
        columns = (targets != IGNORE).any(0).nonzero()  # (columns in which a target counts, 1)
        length = int(columns[-1]) + 1 if len(columns) else 0
        return Padded(self.inputs[rows][:, :length], targets[:, :length])


def pad(inputs: Sequence[Tensor], targets: Sequence[Tensor], pad_id: int = 0) -> Padded:
    """Return rows (length, ...) as examples, padded on the right to the longest: (n, longest, ...)."""
    return Padded(
        pad_sequence(list(inputs), batch_first=True, padding_value=pad_id),
        pad_sequence(list(targets), batch_first=True, padding_value=IGNORE),
    )


@dataclass(frozen=True)
class PairTask(Task):
    """A Task that keeps the texts behind its tensors.

    Args:
        pairs: the pairs of train, validation and test, in the order of their examples.
        tokenizer: encodes the prompts and decodes what a model answers.
        metric: how answers are scored: a name in :data:`lora_lab.tasks.metrics.METRICS`, "style" (see
            :class:`lora_lab.tasks.metrics.StyleJudge`), or "" for the loss alone.
        licence: of the data.
        left_out: how many pairs were left out because they are too long.
    """

    pairs: Mapping[str, Sequence[Pair]] = field(kw_only=True, repr=False, compare=False)
    tokenizer: Tokenizer = field(kw_only=True, repr=False, compare=False)
    metric: Metric = ""
    licence: str = ""
    left_out: int = field(default=0, compare=False)

    def describe(self) -> str:
        """Return a summary as for :class:`Task`, with a line for each thing that is suspicious."""
        return "\n".join([super().describe(), *(f"  check: {line}" for line in _suspicions(self))])

    def limited(self, n_train: int, seed: int | None = None) -> PairTask:
        """Return a smaller task, as for :class:`Task`."""
        rows = draw_rows(self, n_train, seed)  # (n_train,)
        train_pairs = [self.pairs["train"][row] for row in rows.tolist()]
        return replace(self, train=self.train[rows], pairs={**self.pairs, "train": train_pairs})

    def pairs_of(self, part: str) -> Sequence[Pair]:
        """Return the pairs of "train", "validation" or "test".

        Raises:
            ValueError: the part has no pairs, or there is no such part.
        """
        if part not in self.pairs:
            raise ValueError(f"part is {part!r}, but the pairs of task {self.name!r} are in {list(self.pairs)}.")
        return self.pairs[part]

    def prompt_ids(self, pair: Pair) -> list[int]:
        """Return the tokens that the model reads before it answers."""
        return self.tokenizer.encode(self.tokenizer.chat(_messages(pair)[:-1]))

    def preview(self, count: int = 2, part: str = "train") -> str:
        """Return the first examples as the model sees them: the text it reads, the text it learns, and their lengths.

        Raises:
            ValueError: the part has no pairs, there is no such part, or the count is none.
        """
        most, examples, lines = len(self.pairs_of(part)), self.part(part), []
        for row in range(min(check(count, Count, "count"), most)):
            example = examples[row : row + 1]  # without its padding
            ids = [*example.inputs[0].tolist(), int(example.targets[0, -1])]
            answered = [False, *(example.targets[0] != IGNORE).tolist()]  # of each token of the conversation
            lines.append(f"{part} {row}: {answered.count(False)} tokens of prompt, {answered.count(True)} of answer")
            for learned, tokens in groupby(zip(answered, ids, strict=True), key=itemgetter(0)):
                text = self.tokenizer.decode([token for _, token in tokens])
                lines.append(("  learns  " if learned else "  reads   ") + repr(text))
        lengths = (examples.targets != IGNORE).sum(1).float()  # (n,)
        lines.append(
            f"{len(examples)} examples, padded to {examples.inputs.shape[1]} tokens; answers of "
            f"{int(lengths.min())} to {int(lengths.max())} tokens (median {float(lengths.median()):g})"
        )
        return "\n".join(lines)


def from_pairs(
    tokenizer: Tokenizer,
    pairs: Iterable[Pair | tuple[str, str]] | Mapping[str, Iterable[Pair | tuple[str, str]]],
    *,
    name: str = "pairs",
    max_tokens: int = 512,
    skip_long: bool = False,
    seed: int = 0,
    metric: Metric = "",
    about: str = "",
    licence: str = "",
) -> PairTask:
    """Return a task of your own prompts and answers.

    Args:
        tokenizer: of the model that will be trained.
        pairs: of :class:`Pair`, or of a prompt and an answer; in a dict of "train", "validation" and "test" if they are
            split already. Otherwise about 80 % of the pairs go to training and 10 % each to validation and test, by
            whole groups.
        name: of the task.
        max_tokens: the most tokens that an example may have, prompt and answer together.
        skip_long: leave longer examples out, after the split, instead of raising an error.
        seed: of the split, and of the order within parts.
        metric, about, licence: as for :class:`PairTask`.

    Raises:
        ValueError: an argument is of another type, there is no such metric, a text is empty, an example too long, a
            part empty or missing, a group in two parts, a prompt in two parts, or there are fewer than three groups.
    """
    max_tokens, seed = check(max_tokens, Size, "max_tokens"), check(seed, Seed, "seed")
    check(metric, Metric, "metric")
    split: dict[Any, list[Pair]]
    if isinstance(pairs, Mapping):
        split = {part: list(map(_as_pair, own)) for part, own in pairs.items()}
    else:
        split = _split(list(map(_as_pair, pairs)), seed)
    if set(split) != set(PARTS) or not all(split.values()):
        filled = sorted(part for part in split if split[part])
        raise ValueError(f"pairs has the parts {filled}, but it must have {', '.join(PARTS)}.")
    _check_disjoint(split)
    examples = {}
    count = sum(map(len, split.values()))
    for part in PARTS:
        split[part], examples[part] = _encode_part(tokenizer, part, _shuffle(split[part], seed), max_tokens, skip_long)
    return PairTask(
        name,
        **examples,
        off_domain=windows(tokenizer, off_domain_texts(), 64),
        unit="tokens",
        about=about or "questions and answers of your own; off-domain: scikit-learn's descriptions of data sets",
        pairs=split,
        tokenizer=tokenizer,
        metric=metric,
        licence=licence,
        left_out=count - sum(map(len, split.values())),
    )


def _as_pair(pair: Any) -> Pair:
    match pair:
        case Pair():
            return pair
        case [str(prompt), str(answer)]:
            return Pair(prompt, answer)
    raise ValueError(f"pairs holds {short_repr(pair)}, but each must be a Pair, or two texts: a prompt and an answer.")


def _suspicions(task: PairTask) -> Iterator[str]:
    """Yield a line for each thing that is suspicious about a task's examples, with a count and an example."""
    if task.left_out:
        yield f"{task.left_out:,} pairs were left out, because they have too many tokens"
    stop = stop_token(task.tokenizer)
    for part, pairs in task.pairs.items():
        texts = [(pair.context, pair.answer) for pair in pairs]
        first = {text: i for i, text in reversed([*enumerate(texts)])}
        learned = [row[row != IGNORE].tolist() for row in task.parts[part].targets]
        found = {
            "train on nothing, because no token counts": [not tokens for tokens in learned],
            "do not end with the token that ends a turn, so the model never learns to stop": [
                stop is not None and tokens[-1:] not in ([], [stop]) for tokens in learned
            ],
            "repeat another example word for word": [first[text] != i for i, text in enumerate(texts)],
        }
        for what, rows in found.items():
            if any(rows):
                example = texts[rows.index(True)][0]
                yield f"{part}: {sum(rows):,} of {len(texts):,} examples {what}, such as {example!r:.60}"
        (answer, most), *others = Counter(answer for _, answer in texts).most_common()
        if 0 < len(others) < _MOST_CLASSES and most > _NEARLY_ALL * len(texts):
            yield f"{part}: {most:,} of {len(texts):,} answers are {answer!r:.60}; a constant guess scores as much"


def _prompt_group(prompt: str) -> str:
    """Return the group of all pairs with this prompt; its first character keeps it distinct from a user's groups."""
    return f"\0{prompt.strip().casefold()}"


def _group(pair: Pair) -> str:
    return pair.group or _prompt_group(pair.context)


def _split(pairs: Sequence[Pair], seed: int) -> dict[str, list[Pair]]:
    """Return whole groups in random order: validation and test get what fits into a tenth of the pairs each.

    scikit-learn's GroupShuffleSplit counts groups where this counts pairs, and would change every data set.
    """
    groups = defaultdict(list)
    for pair in pairs:
        groups[_group(pair)].append(pair)
    if len(groups) < len(PARTS):
        raise ValueError(
            f"There are {count_noun(len(pairs), 'pair')} in {count_noun(len(groups), 'group')} of the same prompt or "
            "group, but each part needs a group; give more pairs with other prompts, or smaller groups."
        )
    tenth, remaining = max(1, len(pairs) // 10), _shuffle(list(groups.values()), seed)
    split = {part: [] for part in PARTS}
    # Neither may stay empty: the first group that fits, or else the smallest.
    for part in ("validation", "test"):
        group = next((group for group in remaining if len(group) <= tenth), min(remaining, key=len))
        remaining.remove(group)
        split[part] += group
    largest = max(remaining, key=len)  # nor may training
    for group in remaining:
        with_room = [part for part in ("validation", "test") if len(split[part]) + len(group) <= tenth]
        split[with_room[0] if with_room and group is not largest else "train"] += group
    return split


def _check_disjoint(split: Mapping[str, Sequence[Pair]]) -> None:
    """Check that no group and no prompt is in two parts."""
    part_of = {}
    for part, pairs in split.items():
        for group in {_group(pair) for pair in pairs} | {_prompt_group(pair.context) for pair in pairs}:
            if part_of.setdefault(group, part) != part:
                what = f"The prompt {group[1:60]!r}" if group[0] == "\0" else f"The group {group!r:.60}"
                raise ValueError(f"{what} is in {part_of[group]} and in {part}; put it into one part.")


def _shuffle(items: Sequence[T], seed: int) -> list[T]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))  # (n,)
    return [items[i] for i in order.tolist()]


def _messages(pair: Pair) -> list[dict[str, str]]:
    """Return the conversation of a pair, its answer included."""
    turns = (*pair.before, ("user", pair.prompt), ("assistant", pair.answer))
    return [{"role": role, "content": content} for role, content in turns]


def encode(tokenizer: Tokenizer, pair: Pair) -> tuple[list[int], list[int]]:
    """Return inputs and targets of one pair, of equal length; targets of all but the assistant's turns are IGNORE.

    Raises:
        ValueError: the assistant's turns cannot be found in what the template writes.
    """
    ids, targets = [], []
    for read, learned in _turns(tokenizer, _messages(pair)):
        read_ids, learned_ids = tokenizer.encode(read), tokenizer.encode(learned)
        ids += read_ids + learned_ids
        targets += [IGNORE] * len(read_ids) + learned_ids
    return ids[:-1], targets[1:]


def _turns(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """Return a conversation as the template writes it, in a piece for each answer: (what is read, what is learned).

    What is learned is the assistant's text and the token that ends the turn, with what the template puts before the
    text, such as an empty thought. Most templates write a turn alike whatever follows. Those of reasoning models drop
    the thoughts of earlier turns, so that the whole conversation is written once and searched for its turns.
    """
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [tokenizer.chat(messages[:i]) for i in assistant]
    written = [tokenizer.chat(messages[: i + 1], add_generation_prompt=False) for i in assistant]
    # Nothing after the end of the turn is to be learned.
    ends = [len(text.rstrip("\n")) for text in written]
    whole = written[-1]
    if not all(whole.startswith(text[:end]) for text, end in zip(written, ends, strict=True)):
        ends = []
        for i, prompt in zip(assistant, prompts, strict=True):
            content = messages[i]["content"].strip()
            start = whole.find(content, len(prompt))
            ends.append(start + len(content) + len(_turn_end(tokenizer)) if start >= 0 else 0)
    turns, begin = [], 0
    for prompt, end in zip(prompts, ends, strict=True):
        if not (begin <= len(prompt) < end and whole.startswith(prompt)):
            raise ValueError("The model's chat template does not end a prompt where its answer begins; use another.")
        turns.append((whole[begin : len(prompt)], whole[len(prompt) : end]))
        begin = end
    return turns


def _turn_end(tokenizer: Tokenizer) -> str:
    """Return what the template writes after the text of an assistant's turn, up to the end of the line."""
    text = tokenizer.chat(
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _SAMPLE}], add_generation_prompt=False
    )
    return text.rpartition(_SAMPLE)[2].rstrip("\n")


def stop_token(tokenizer: Tokenizer) -> int | None:
    """Return the token at which an answer ends: the one with which the chat template closes an assistant's turn.

    In some models it is not the one that ends a text, ``eos_id``, which is returned where the template closes no turn
    with a single token.
    """
    try:
        ids = tokenizer.encode(_turn_end(tokenizer).strip())
    except ValueError:  # there is no template, or it refuses so short a conversation
        ids = []
    return ids[0] if len(ids) == 1 else tokenizer.eos_id


def _encode_part(
    tokenizer: Tokenizer, part: str, pairs: Sequence[Pair], max_tokens: int, skip_long: bool
) -> tuple[list[Pair], Padded]:
    """Return the pairs of a part that are short enough, and their examples, padded to the longest of them."""
    short: list[Any] = []  # pairs with their inputs and targets, (length,) each
    for pair in pairs:
        if not pair.prompt.strip() or not pair.answer.strip():
            raise ValueError(f"{pair!r:.120} has an empty text; give both prompt and answer.")
        if len(pair.context) + len(pair.answer) <= max_tokens * _MOST_CHARACTERS:
            ids, targets = encode(tokenizer, pair)
            if len(ids) < max_tokens:
                short.append((pair, torch.tensor(ids), torch.tensor(targets)))
                continue
        if not skip_long:
            what = f"The pair with the prompt {pair.prompt[:60]!r}"
            raise ValueError(f"{what} has more than {max_tokens} tokens; shorten it, or raise max_tokens.")
    if not short:
        raise ValueError(f"All pairs of the {part} part have more than {max_tokens} tokens; raise max_tokens.")
    kept, inputs, targets = zip(*short, strict=True)
    return list(kept), pad(inputs, targets, tokenizer.pad_id or 0)
