"""The shape of the tests: folders as in the package, files that know nothing of each other, and paths that exist."""

import ast
import re

import pytest

from tests.helpers import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("test_*.py"))


def imported_tests(source):
    """The test files that a source imports, by the last part of their names."""
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            parts |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            parts |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return {part for part in parts if part.startswith("test_")}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_file_imports_another(path):
    assert imported_tests(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    "line",
    [
        "from test_lora import X",
        "from tests.costs.test_memory import X",
        "import tests.test_lora",
        "from tests import test_lora",
    ],
)
def test_such_an_import_would_be_found(line):
    assert len(imported_tests(f"def f():\n    {line}")) == 1


def test_the_tests_lie_in_the_folders_of_the_code():
    code = {path.parent.relative_to(ROOT / "lora_lab") for path in (ROOT / "lora_lab").rglob("*.py")}
    folders = {path.parent.relative_to(TESTS) for path in FILES}
    assert {str(folder) for folder in folders - code} == {"guards", "hostile"}
    assert all((TESTS / folder / "__init__.py").is_file() for folder in folders)


def test_each_test_file_is_named_after_a_module_or_its_folder():
    for path in FILES:
        folder, name = path.parent.relative_to(TESTS), path.stem.removeprefix("test_")
        if folder.name != "guards":
            assert name == folder.name or any(
                (ROOT / "lora_lab" / folder / file).exists() for file in (name, f"{name}.py")
            ), path.name


def test_test_files_that_are_named_elsewhere_exist():
    named = set()
    for name in ("CONTRIBUTING.md", "README.md", "Makefile", "environment.yml", ".pre-commit-config.yaml"):
        named |= set(re.findall(r"\btests/[\w/]+\.\w+", (ROOT / name).read_text(encoding="utf-8")))
    (quick,) = re.findall(r"^QUICK := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named |= {f"tests/{name}.py" for name in quick.replace("\\", "").split()}
    assert len(named) > 10
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []
