"""Words that must not come back: code and documentation use the field's terms, which readers know or can look up.

Names are checked where the package defines them, and words in comments, docstrings, other strings and Markdown. Old
names that are still accepted are allowed in a call of ``renamed`` or ``warn_renamed``, in the condition of an ``if``
that begins with such a call, and on a line with the comment ``# old name``.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = sorted((ROOT / "lora_lab").rglob("*.py"))
PROSE = [*map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md", "records/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]

NAMES = {
    "own": "what it holds, such as parameters, settings, rows",
    "found": "what it holds, such as matches, result, rows",
    "given": "what it holds, such as value, batch, inputs",
    "kept": "what it holds, such as saved, selected, remaining",
    "told": "what it holds, such as reasons, reported",
    "said": "predictions, answers or output",
    "wanted": "references, expected or requested",
    "apart": "separate, unfused or per_trial",
    "ways?": "method, setup or direction",
    "trades?": "task or dataset",
    "pieces?": "chunk, window, sequence or part",
}
WORDS = {
    "told": "given, passed or reported; for 'cannot be told from', indistinguishable",
    "said": "given, stated or documented",
    "apart": "separate(ly), except or distinguish",
    "trades?": "task or skill",
    "pieces?": "chunk, window or sequence",
    r"ways?\s+to\s+train": "method or training setup",
    "whoever": "you, or a model (user, method) that",
    "newborn": "randomly initialised",
    "commonest": "most frequent, or majority class",
}


def bad_names(source):
    """(line, complaint) for the names that a Python source defines: variables, attributes, arguments, functions."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case (
                ast.Name(id=str(name), ctx=ast.Store())
                | ast.Attribute(attr=str(name), ctx=ast.Store())
                | ast.arg(arg=str(name))
                | ast.FunctionDef(name=str(name))
                | ast.ClassDef(name=str(name))
                | ast.alias(asname=str(name))
                | ast.ExceptHandler(name=str(name))
            ):
                for word, advice in NAMES.items():
                    if re.fullmatch(word, name.strip("_0123456789").lower()):
                        yield node.lineno, f"instead of the name {name!r} write {advice}"


def bad_words(text, first_line=1):
    """(line, complaint) for the words of a text, outside URLs, paths, names and compounds such as trade-off."""
    text = re.sub(r"https?://\S+", "", text)
    for word, advice in WORDS.items():
        for match in re.finditer(rf"(?<![\w/.-])({word})(?![\w/-]|\.\w)", text, re.IGNORECASE):
            yield first_line + text.count("\n", 0, match.start()), f"instead of the word {match[1]!r} write {advice}"


def complaints(source):
    """(line, complaint) for a Python source."""
    result, old = [*bad_names(source)], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("renamed", "warn_renamed"):
            old |= {*range(node.lineno, node.end_lineno + 1)}
        elif isinstance(node, ast.If) and ast.unparse(node.body[0]).startswith("warn_renamed("):
            old.add(node.lineno)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, text, line = tokenize.tok_name[token.type], token.string, token.start[0]
        if kind == "COMMENT" and "# old name" in text:
            old.add(line)
        if kind == "STRING" and re.match("[rR]?[fF]", text):  # before Python 3.12 an f-string is one token
            text = re.sub(r"\{[^{}]*\}", lambda code: "\n" * code[0].count("\n"), text)
        if kind in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
            result += bad_words(text, line)
    return sorted(entry for entry in result if entry[0] not in old)


def check(path, result):
    name = path.relative_to(ROOT).as_posix()
    assert not result, "\n".join(["", *(f"{name}:{line}: {complaint}" for line, complaint in result)])


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_has_none_of_these_names_and_words(path):
    check(path, complaints(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documentation_has_none_of_these_words(path):
    check(path, sorted(bad_words(path.read_text(encoding="utf-8"))))


PLANTED = '''"""Trials that run
apart: a trade-off."""
import numpy as way_1
__getattr__ = renamed(__name__, {"newborn": "random_init"})
KINDS = {"trades": "downstream"}  # old name
if kind == "trades":
    warn_renamed("The record 'trades'", "'downstream'")
def answer(self, told, *, shown=0):
    self._kept = found.rows  # Whoever reads this
    return f"{said} by {told!r}", f"two ways to train {told}"
PATHS = "https://example.org/told", "notebooks/09_many_trades.ipynb", "records/trades.json", "these ways"
rows = [own for own in rows]
'''


def test_planted_names_and_words_are_found_and_old_names_paths_and_compounds_are_not():
    lines = [(line, re.search("'(.+?)'", complaint)[1]) for line, complaint in complaints(PLANTED)]
    assert lines == [
        (2, "apart"),
        (3, "way_1"),
        (8, "told"),
        (9, "_kept"),
        (9, "Whoever"),
        (10, "ways to train"),
        (12, "own"),
    ]
    with pytest.raises(AssertionError, match=r"README\.md:2: instead of the word 'commonest' write most frequent, or"):
        check(ROOT / "README.md", [*bad_words("Say which class is\nthe commonest [here](a/said.md).")])
