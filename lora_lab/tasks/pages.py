"""Prose that is installed with Python's packages, page by page: what small language models learn and are judged on.

numpy     its docstrings, a page each: near to what the small models that are shipped have read
manual    Python's reference manual, a page a topic: a step away
readmes   the descriptions of packages, a page each: far
known     docstrings of the kind that they have read, from files that were held out

A page is what a result must hold for: losses of one page resemble each other more than those of two. So validation
and test have equally many windows of each page, one page after another, and a block of losses is a page.

The texts are those of the installed versions. No paragraph occurs twice in them.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch

from lora_lab.models.tokenizer import Tokenizer
from lora_lab.task import Examples, Task
from lora_lab.tasks.python_docs import windows

# What the small models have read, a fiftieth of the files apart: Python's library, and packages that lora_lab needs.
READ = (
    *("stdlib", "torch", "scipy", "sympy", "pandas", "sklearn", "networkx", "nltk", "matplotlib", "IPython", "babel"),
    *("jupyter_server", "traitlets", "PIL", "joblib", "pydantic", "fontTools", "mpmath", "ipywidgets", "jinja2"),
    *("nbformat", "tornado", "tqdm", "safetensors"),
)
_HELD_OUT = 1 / 50
_SITE, _STDLIB = (Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib"))
_TESTS = {"test", "tests", "testing", "_test", "idlelib", "lib2to3", "site-packages", "pydoc_data"}
_WORD = re.compile(r"[A-Za-z]{2,}")


class Page(NamedTuple):
    """A text of its own, and where it is from."""

    name: str
    text: str


@cache
def corpora() -> dict[str, list[Page]]:
    """Return the pages of "numpy", "manual", "readmes" and "known"."""
    seen: set[str] = set()
    known = chain.from_iterable(docstrings(package, _is_held_out) for package in READ)
    kinds = {"numpy": docstrings("numpy"), "manual": manual(), "readmes": readmes(), "known": known}
    return {kind: [*_without_repeats(pages, seen)] for kind, pages in kinds.items()}


def read_pages() -> list[Page]:
    """Return what the small models have read, which has no paragraph of :func:`corpora`. It takes a minute."""
    seen: set[str] = set()
    for pages in corpora().values():
        for page in pages:
            seen.update(_plain(paragraph) for paragraph in _paragraphs(page.text))
    files = (docstrings(package, lambda name: not _is_held_out(name)) for package in READ)
    return [*_without_repeats(chain.from_iterable(files), seen)]


def docstrings(package: str, among: Callable[[str], bool] = lambda name: True) -> Iterator[Page]:
    """Yield the docstrings of an installed package, or of "stdlib", and other long strings, each a page.

    They are parsed from its files, of which none is imported and tests are left out.

    Args:
        package: a folder or a file of its name.
        among: whether a file counts, by the name of its pages.
    """
    root = _STDLIB if package == "stdlib" else _SITE / package
    for path in sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]:
        parts = path.relative_to(root.parent if package != "stdlib" else root).parts
        name = f"{package}: {'/'.join(parts)}"
        if _TESTS & set(parts) or any(part.startswith("test_") for part in parts) or not among(name):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= 40:
                yield Page(name, inspect.cleandoc(node.value))


def manual() -> Iterator[Page]:
    """Yield the pages of Python's reference manual."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Page(f"manual: {name}", topics[name])


def readmes() -> Iterator[Page]:
    """Yield the descriptions of the installed packages."""
    for path in sorted(_SITE.glob("*.dist-info/METADATA")):
        text = path.read_text(encoding="utf-8", errors="replace").partition("\n\n")[2]
        yield Page(f"readmes: {path.parent.name.partition('-')[0]}", text)


def _without_repeats(pages: Iterable[Page], seen: set[str]) -> Iterator[Page]:
    """Yield pages of English prose without the paragraphs that were seen before; those of these pages are added."""
    for name, text in pages:
        kept = []
        for paragraph in _paragraphs(text):
            plain = _plain(paragraph)
            if len(plain) < 30 or plain not in seen:
                kept.append(paragraph.rstrip())
            seen.add(plain)
        text = "\n\n".join(kept).strip().encode("ascii", "ignore").decode()
        words = _WORD.findall(text)
        if len(text) >= 80 and len(words) >= 6 and sum(map(len, words)) + text.count(" ") > 0.6 * len(text):
            yield Page(name, text)


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text.replace("\r\n", "\n"))


def _plain(paragraph: str) -> str:
    """Return the letters of a paragraph: those that differ in numbers, signs and spaces alone are the same."""
    return re.sub(r"[\W\d_]+", " ", paragraph.lower()).strip()


def _sentences(text: str) -> set[str]:
    """Return the sentences of 40 letters and more, as far as full stops, colons and semicolons tell."""
    plain = (_plain(sentence) for sentence in re.split(r"[.:;]\s", text))
    return {sentence for sentence in plain if len(sentence) >= 40}


def _fraction(name: str) -> float:
    """Return a number from 0 to 1 that looks random and is always the same for a name."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8


def _is_held_out(name: str) -> bool:
    return _fraction(name) < _HELD_OUT


def paged_task(
    tokenizer: Tokenizer,
    pages: Sequence[Page],
    known: Sequence[Page],
    *,
    name: str,
    about: str,
    seq_len: int = 64,
    held_out: int = 128,
    per_page: int = 8,
) -> Task:
    """Return the task of predicting the next token of pages, of which ``held_out`` validate and as many test.

    Paragraphs that share a sentence with one of those are left out of training.

    Args:
        tokenizer: turns text into token ids.
        pages: of which no two share a paragraph.
        known: pages of what the model knew before, for the off-domain part.
        name, about: as for :class:`lora_lab.task.Task`.
        seq_len: tokens per example.
        held_out: pages of each of the two parts, drawn by their names; the off-domain part has at most as many.
        per_page: windows of each such page: rows i * per_page to (i + 1) * per_page are page i.

    Raises:
        ValueError: too few pages are long enough.
    """
    drawn = sorted(pages, key=lambda page: _fraction(page.name + page.text))
    long = [page for page in drawn if len(tokenizer.encode(page.text)) > seq_len * per_page]
    if len(long) < 2 * held_out:
        raise ValueError(f"{name!r} has {len(long)} pages of {seq_len * per_page} tokens; lower held_out or per_page.")
    test, validation = long[:held_out], long[held_out : 2 * held_out]
    held = set().union(*(_sentences(page.text) for page in (*test, *validation)))
    rest = (page for page in drawn if page not in test and page not in validation)
    learned = ["\n\n".join(each for each in _paragraphs(page.text) if not _sentences(each) & held) for page in rest]
    return Task(
        name,
        train=windows(tokenizer, learned, seq_len),
        validation=cut_pages(tokenizer, validation, seq_len, per_page),
        test=cut_pages(tokenizer, test, seq_len, per_page),
        off_domain=cut_pages(tokenizer, known, seq_len, per_page, held_out),
        unit="tokens",
        about=about,
    )


def cut_pages(
    tokenizer: Tokenizer, pages: Sequence[Page], seq_len: int, per_page: int, limit: int | None = None
) -> Examples:
    """Return the first ``per_page`` windows of each page that has as many, in order; of ``limit`` pages at most."""
    length = seq_len * per_page
    texts = (torch.tensor(tokenizer.encode(page.text)[: length + 1]) for page in pages)  # (tokens,) each
    ids = torch.stack([*islice((text for text in texts if len(text) > length), limit)])  # (pages, length + 1)
    return Examples(ids[:, :-1].reshape(-1, seq_len), ids[:, 1:].reshape(-1, seq_len))
