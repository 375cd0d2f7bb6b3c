"""Files of examples: JSON Lines of every form, plain text, tables. Some are odd and whole, and must be read."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lora_lab.models.tokenizer import Tokenizer
from lora_lab.task import IGNORE, Task
from lora_lab.tasks import PairTask, from_jsonl, task_of
from tests.hostile.core import Case
from tests.hostile.damage import damaged_bytes, damaged_json
from tests.hostile.material import EOS, tokenizer
from tests.hostile.values import WORDS_OF_TEMPLATES, Values

LINES = 12
# Line ends for Python's splitlines, but letters of a text for JSON; and other letters that are rare.
RARE = [
    "\u2028",
    "\u2029",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1d",
    "\x1e",
    "\r",
    "\0",
    "\u200b",
    "\ufeff",
    "\U0001f600",
]
RARE += ["e\u0301", "\u202e", "\ufffd", "\x7f", "\t", "\\", '"', "\u0600", "\ud7ff", "\U0010ffff", "{", "%", "<", "</"]
FORMS = ("messages", "sharegpt", "alpaca", "prompt", "completion", "question", "system", "turns")


def prepare(folder: Path, values: Values) -> tuple[Tokenizer, Values]:
    """The tokenizer; each reader has been used once, so that what it caches is there."""
    tokens = tokenizer()
    for form in (*FORMS, "text"):
        path = folder / f"{form}.jsonl"
        path.write_text(_joined([json.dumps(_entry(form, i)) for i in range(LINES)]))
        from_jsonl(tokens, path)
    (folder / "table.csv").write_text(_table(",", _rows()))
    task_of(str(folder / "table.csv"), tokens)
    return tokens, values


def _entry(form: str, number: int, odd: str = "") -> dict[str, Any]:
    """A whole entry."""
    prompt, answer = f"question {number} {odd}?", f"answer {odd} {number}"
    if form == "text":
        return {"text": f"{prompt} {answer}, and so on for a while, so that there are enough tokens. " * 3}
    user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
    turns = [user, assistant]
    if form == "system":
        turns = [{"role": "system", "content": f"Be kind {odd}."}, *turns]
    if form == "turns":
        turns = [user, assistant, {"role": "user", "content": f"And {odd} then?"}, assistant]
    return {
        "sharegpt": {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]},
        "alpaca": {"instruction": prompt, "input": odd, "output": answer},
        "prompt": {"prompt": prompt, "answer": answer, "group": f"g{number // 2}"},
        "completion": {"prompt": prompt, "completion": answer, "source": [number]},
        "question": {"question": prompt, "answer": answer},
    }.get(form, {"messages": turns})


def _joined(lines: list[str], end: str = "\n") -> str:
    return end.join([*lines, ""])


def case(rng: random.Random, folder: Path, material: tuple[Tokenizer, Values]) -> Case:
    """A damaged file, or an odd one that is whole."""
    tokens, values = material
    kind = rng.choice(
        (_lines_damaged,) * 6 + (_odd_texts,) * 3 + (_whole,) * 3 + (_bytes, _text, _text, _csv, _csv, _large)
    )
    return kind(rng, folder, tokens, values)


def _task(path: Path, tokens: Tokenizer) -> Task:
    """As the commands read a file."""
    return task_of(str(path), tokens)


def _complaints(task: Task) -> Iterator[str]:
    """What a user would not have meant."""
    task.describe()
    for part, examples in task.parts.items():
        if len(examples) == 0:
            yield f"the {part} part is empty"
        elif not bool((examples.targets != IGNORE).any(1).all()):
            yield f"an example of the {part} part teaches nothing"
    if isinstance(task, PairTask):
        task.preview(3)
        for part, pairs in task.pairs.items():
            for pair, targets in zip(pairs, task.parts[part].targets, strict=True):
                answers = 1 + sum(role == "assistant" for role, _ in pair.before)
                if int((targets == EOS).sum()) != answers:
                    yield "a text of a user has become a turn"


def _lines_damaged(rng: random.Random, folder: Path, tokens: Tokenizer, values: Values) -> Case:
    """One line or more, in the values of its JSON or in its letters."""
    form = rng.choice((*FORMS, "text"))
    lines = [json.dumps(_entry(form, i)).encode() for i in range(LINES)]
    what = ""
    for _ in range(rng.choice((1, 1, 1, 3, LINES))):
        place = rng.randrange(len(lines))
        lines[place], what = damaged_json(json.dumps(_entry(form, place)), rng, values)
    if rng.random() < 0.1:
        other = rng.choice((*FORMS, "text"))
        lines[0], what = json.dumps(_entry(other, 0)).encode(), f"and a line of {other}"
    if rng.random() < 0.1:
        parts = [json.loads(line) for line in (json.dumps(_entry(form, i)) for i in range(LINES))]
        odd = rng.choice(("train", "test", "dev", "", None, 5, [], values.text(rng)))
        lines = [json.dumps(each | {"part": odd if i % 3 else "train"}).encode() for i, each in enumerate(parts)]
        what = f"part {odd!r:.40}"
    path = folder / "lines.jsonl"
    path.write_bytes(b"\n".join([*lines, b""]))
    return Case(f"{form}: {what}", partial(_task, path, tokens), _complaints)


def _odd_texts(rng: random.Random, folder: Path, tokens: Tokenizer, values: Values) -> Case:
    """Texts that are lone surrogates, special tokens, empty, or very long."""
    form = rng.choice((*FORMS, "text"))
    odd = rng.choice(
        (values.text(rng), rng.choice(WORDS_OF_TEMPLATES), "\ud83d", "x</s>\n<s>assistant\ny", 3000 * "ab ")
    )
    entries = [_entry(form, i, odd if i == 3 or rng.random() < 0.1 else "") for i in range(LINES)]
    path = folder / "odd.jsonl"
    path.write_text(_joined([json.dumps(entry) for entry in entries]))
    return Case(f"{form}: {odd!r:.60}", partial(_task, path, tokens), _complaints)


def _whole(rng: random.Random, folder: Path, tokens: Tokenizer, values: Values) -> Case:
    """Nothing is wrong: rare letters, other line ends, a mark of the encoding, empty lines, entries of other names."""
    form, odd = rng.choice(FORMS), rng.choice(RARE)
    plain, end = rng.random() < 0.7, rng.choice(("\n", "\n", "\r\n", "\n\n"))
    entries = [_entry(form, i, odd) | {"id": i, "meta": {"x": [None, 1.5]}} for i in range(LINES)]
    text = _joined([json.dumps(entry, ensure_ascii=not plain) for entry in entries], end)
    path = folder / "whole.jsonl"
    path.write_bytes(text.encode("utf-8-sig" if rng.random() < 0.2 else "utf-8"))

    def wrong(task: Task) -> Iterator[str]:
        yield from _complaints(task)
        assert isinstance(task, PairTask)
        if sum(map(len, task.pairs.values())) != LINES:
            yield "some lines are not in the task"
        if not all(odd in pair.answer for pairs in task.pairs.values() for pair in pairs):
            yield "a text has lost a letter"

    return Case(f"{form}: whole, with {odd!r} and {end!r}", partial(_task, path, tokens), wrong, good=True)


def _bytes(rng: random.Random, folder: Path, tokens: Tokenizer, values: Values) -> Case:
    form = rng.choice((*FORMS, "text"))
    content = _joined([json.dumps(_entry(form, i)) for i in range(LINES)]).encode()
    path = folder / "bytes.jsonl"
    data, what = damaged_bytes(content, rng)
    if rng.random() < 0.2:
        data = rng.choice((b"", b"\n\n", b"\xff\xfe", content.decode().encode("utf-16"), b"[", b"PAR1", bytes(1000)))
        what = f"all is {data[:20]!r}"
    path.write_bytes(data)
    return Case(f"{form}: {what}", partial(_task, path, tokens), _complaints)


def _text(rng: random.Random, folder: Path, tokens: Tokenizer, values: Values) -> Case:
    """Paragraphs: damaged, few, odd."""
    paragraphs = [f"Paragraph {i}, {rng.choice(RARE)}{values.text(rng)} " + 150 * "so on " for i in range(LINES)]
    text = "\n\n".join(paragraphs[: rng.choice((0, 1, 8, LINES, LINES))])
    content, what = text.encode("utf-8", "surrogatepass"), "whole"
    if rng.random() < 0.3:
        content, what = damaged_bytes(content, rng)
    path = folder / "text.txt"
    path.write_bytes(content)
    return Case(f"text of {len(content)} bytes: {what}", partial(_task, path, tokens), _complaints)


def _rows() -> list[list[str]]:
    return [["prompt", "answer"], *([f"question {i}?", f"answer, {i}"] for i in range(LINES))]


def _table(separator: str, rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(rows)
    return text.getvalue()


def _csv(rng: random.Random, folder: Path, tokens: Tokenizer, values: Values) -> Case:
    """Tables with odd cells, columns or bytes."""
    rows, suffix = _rows(), rng.choice((".csv", ".csv", ".tsv", ".parquet"))
    kind = rng.choice(("cell", "cell", "column", "short", "quote", "bytes", "bytes", "number"))
    row = rng.choice(rows)
    if kind == "cell":
        row[rng.randrange(2)] = values.text(rng)
    elif kind == "column":
        rows[0] = rng.choice(
            (["prompt"], ["Prompt", "Answer"], ["prompt", "prompt"], [], ["answer", "prompt", "x"], ["", ""])
        )
    elif kind == "short":
        row[:] = rng.choice(([], ["x"], 5 * ["x"], [""], ["", ""]))
    elif kind == "number":
        rows[1:] = [[str(i), rng.choice(("1", "nan", "NA", "1e400", "inf"))] for i in range(LINES)]
    content = _table("\t" if suffix == ".tsv" else ",", rows).encode("utf-8", "surrogatepass")
    what = f"{suffix}: {kind} {row!r:.60}"
    if kind == "quote":
        content = content.replace(b"question 3", b'"question 3')
    elif kind == "bytes":
        content, what = damaged_bytes(content, rng)
    path = folder / f"table{suffix}"
    path.write_bytes(content)
    return Case(what, partial(_task, path, tokens), _complaints)


def _large(rng: random.Random, folder: Path, tokens: Tokenizer, values: Values) -> Case:
    """Half a megabyte, in one line, in many short ones, or of one letter."""
    size, kind = 500_000, rng.choice(("one line", "short lines", "one letter", "spaces", "short words"))
    path = folder / rng.choice(("large.jsonl", "large.txt"))
    text = {
        "one line": json.dumps({"prompt": size * "a", "answer": "b"}),
        "short lines": _joined([json.dumps({"text": f"{i} x"}) for i in range(size // 20)]),
        "one letter": size * "a",
        "spaces": size * " ",
        "short words": size // 3 * "ab ",
    }[kind]
    path.write_text(text)
    return Case(f"{path.name}: {kind}", partial(_task, path, tokens), _complaints)
