"""The page "What can go wrong" quotes what the package says, and so changes with it."""

import ast
import re

import pytest

from tests.helpers import ROOT

PAGE = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
TABLES = re.findall(r"^\| the message says .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
QUOTED = [words for table in TABLES for words in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)]


def texts(source):
    """All texts of a source, those with placeholders in the parts between them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


SOURCE = {path: [*texts(path.read_text(encoding="utf-8"))] for path in sorted((ROOT / "lora_lab").rglob("*.py"))}


def test_every_row_of_the_tables_quotes_a_message():
    assert len(QUOTED) == sum(table.count("\n") for table in TABLES) - 1  # of one row the message is a verdict's
    assert len(QUOTED) > 40


@pytest.mark.parametrize("words", QUOTED)
def test_a_quoted_message_is_in_the_package(words):
    assert any(words in text for each in SOURCE.values() for text in each)


def test_other_words_would_not_be_found():
    assert not any("is no file of a known kind here" in text for each in SOURCE.values() for text in each)
