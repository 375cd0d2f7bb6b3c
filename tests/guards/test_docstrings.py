"""Docstrings that the site can print: text between bars is code, or reStructuredText takes it for a substitution."""

import ast
import io

from docutils import nodes
from docutils.core import publish_doctree

from tests.helpers import ROOT


def undefined(docstring):
    """The texts between bars that docutils takes for substitutions, which nobody defines."""
    quiet = {"report_level": 5, "halt_level": 5, "warning_stream": io.StringIO()}
    tree = publish_doctree(docstring, settings_overrides=quiet)
    return [text for node in tree.findall(nodes.problematic) if (text := node.astext()).startswith("|")]


def docstrings():
    """The docstrings with bars, by file and name."""
    for path in sorted((ROOT / "lora_lab").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                if "|" in docstring:
                    yield f"{path.relative_to(ROOT)} {getattr(node, 'name', '')}", docstring


def test_no_docstring_names_a_substitution_that_nobody_defines():
    found = dict(docstrings())
    assert found
    assert {place: texts for place, docstring in found.items() if (texts := undefined(docstring))} == {}


def test_such_a_docstring_would_be_found_and_code_is_none():
    assert undefined('Some templates put those together ("<|" + role + "|>").')
    assert undefined("It may hold a token such as <|im_end|>; it becomes that token.")
    assert undefined("The norm of a difference, |W - V|.")
    assert not undefined("A list[int | None], and the norm ``|W - V|``.")
    assert not undefined("It may hold a token such as ``<|im_end|>``.")
