"""Data sets of prompts and answers: summaries, translations, sentiment and a style.

Each function returns a :class:`~lora_lab.tasks.instruction.PairTask`. The data is installed with lora_lab.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Literal

from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system.schema import check
from lora_lab.tasks.instruction import Pair, PairTask, from_pairs

LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish"}
_SENTIMENT_PROMPT = "Is the feeling of this text negative, neutral or positive? Answer with one word.\n\n"
_DATA = Path(__file__).parent / "data"
_NOT_DOCUMENTED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
_from_pairs_that_fit = partial(from_pairs, skip_long=True)  # a pair of more than max_tokens is left out


def summarise(tokenizer: Tokenizer) -> PairTask:
    """Return a task of docstrings of Python's standard library: the prompt is the body, the answer is the first line.

    Docstrings are parsed from the source files; nothing is imported. Each top-level module or package is a group, so
    the test part comes from modules that do not occur in training. Pairs of more than 192 tokens are left out.
    """
    pairs = [
        Pair(f"Summarise this documentation in one sentence.\n\n{body}", summary, module)
        for module, summary, body in _docstrings()
    ]
    about = "docstrings of Python's standard library, body to first line"
    return _from_pairs_that_fit(
        tokenizer, pairs, max_tokens=192, name="summarise", metric="summary", licence="PSF-2.0", about=about
    )


@cache
def _docstrings() -> list[tuple[str, str, str]]:
    """Return (module, summary, body) of each docstring whose body has 20 to 110 words; no text occurs twice."""
    root = Path(sysconfig.get_path("stdlib"))
    docstrings: list[tuple[str, str, str]] = []
    texts = set()  # all summaries and bodies so far
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _NOT_DOCUMENTED.intersection(parts):
            continue
        module = parts[0].removesuffix(".py").lstrip("_")  # _pydecimal's docstrings are decimal's too
        for docstring in _docstrings_of(path):
            summary, _, body = docstring.partition("\n\n")
            summary = " ".join(summary.split())
            # An example, a list of versions or a block of code ends the prose.
            body = " ".join(re.split(r"\n\s*(?:>>>|\.\. |\S*::\n)", body)[0].split())
            fits = 4 <= len(summary.split()) <= 20 and 20 <= len(body.split()) <= 110
            if fits and summary.endswith(".") and (summary + body).isascii() and not {summary, body} & texts:
                texts |= {summary, body}
                docstrings.append((module, summary, body))
    return docstrings


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # Python's own tests include broken files
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield text


def translate(tokenizer: Tokenizer, language: str = "fr") -> PairTask:
    """Return a task of names of territories, languages and currencies in English and another language (CLDR, by Babel).

    Names that differ only in capitals, or not at all, are left out, because copying is not translating. If one name
    contains another ("Samoa", "American Samoa"), both are in one group. Pairs of more than 96 tokens are left out.

    Args:
        tokenizer: of the model.
        language: "fr", "de" or "es".

    Raises:
        ValueError: ``language`` is none of these.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}, but it must be one of {', '.join(LANGUAGES)}.")
    translations = cldr_names(language)
    groups = _families(list(translations))
    prompt = f"Translate into {LANGUAGES[language]}: "
    pairs = [Pair(prompt + english, foreign, groups[english]) for english, foreign in translations.items()]
    name = f"translate-{language}"
    about = f"names of territories, languages and currencies, English to {LANGUAGES[language]} (CLDR, by Babel)"
    return _from_pairs_that_fit(
        tokenizer, pairs, max_tokens=96, name=name, metric="translation", licence="Unicode-3.0", about=about
    )


@cache
def cldr_names(language: str) -> dict[str, str]:
    """Return English name -> name in the language ("fr", "de", "es"); of territories, languages, currencies (CLDR)."""
    from babel import Locale

    names = {}
    for kind in ("territories", "languages", "currencies"):
        english, foreign = getattr(Locale("en"), kind), getattr(Locale(language), kind)
        for code in sorted(english):
            name = english[code]
            if code in foreign and name.casefold() != foreign[code].casefold():
                names.setdefault(name, foreign[code])
    return names


def _families(names: Sequence[str]) -> dict[str, str]:
    """Return name -> one name of its family: two names are related if one contains all words of the other, in a row."""
    from scipy.cluster.hierarchy import DisjointSet

    words = {name: " ".join(["", *re.findall(r"[^\W\d_]+", name.casefold()), ""]) for name in names}
    families = DisjointSet(names)
    for short in names:
        for long in names:
            if words[short].strip() and words[short] in words[long]:
                families.merge(short, long)
    return {name: families[name] for name in names}


def sentiment(tokenizer: Tokenizer) -> PairTask:
    """Return a task of short texts whose writer is pleased, displeased or neither; written for this project (CC0).

    Variants of one text form a group. Pairs of more than 128 tokens are left out.
    """
    rows = _read("sentiment.jsonl")
    pairs = [Pair(_SENTIMENT_PROMPT + row["text"], row["label"], row["group"]) for row in rows]
    about = "short texts in varied domains, with negation, irony and mixed feelings, written for this project"
    return _from_pairs_that_fit(
        tokenizer, pairs, max_tokens=128, name="sentiment", metric="classification", licence="CC0-1.0", about=about
    )


def style(tokenizer: Tokenizer, variant: str = "log") -> PairTask:
    """Return a task of very short stories: a lighthouse keeper's log, or plain; written for this project (CC0).

    Pairs of more than 224 tokens are left out.

    Args:
        tokenizer: of the model.
        variant: "log", or "plain" for the same stories without the style, split in the same way, to compare with.

    Raises:
        ValueError: ``variant`` is neither "log" nor "plain".
    """
    check(variant, Literal["log", "plain"], "variant")
    name, key, manner = "style", "story", "as a lighthouse keeper's log"
    if variant == "plain":
        name, key, manner = "style-plain", "plain", "in plain style"
    pairs = [Pair(row["instruction"], row[key], row["group"]) for row in _read("style.jsonl")]
    about = f"very short stories {manner}"
    return _from_pairs_that_fit(
        tokenizer, pairs, max_tokens=224, name=name, metric="style", licence="CC0-1.0", about=about
    )


@cache
def _read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (_DATA / name).read_text(encoding="utf-8").splitlines()]
