"""The exercises of a lesson as a sheet, and a course of such sheets, which nbgrader hands out, collects and grades.

A sheet has the lesson's imports, the text of each exercise with its answer, a locked cell with hidden tests after each,
and a reflection at the end. So running and grading a sheet takes seconds, and needs neither a model nor the rest of the
lesson. Learners keep the lesson open while they work on its sheet: each exercise names the section that explains it.

Hidden tests are the properties of an exercise, a point each. The source of a property goes into a cell of the sheet
with that of the helpers that it calls, and runs there without lora_lab; so these have no annotations. An answer that
computes nothing has none of the properties.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import inspect
import io
import re
import secrets
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import torch
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lora_lab.course.copies import BEGIN, CONFIG, END, RAISE, STUB, choose_lessons
from lora_lab.course.exercise import EXERCISES, REFLECTIONS, TRIALS, Answer, Reflection, answers, close
from lora_lab.course.learner import MANIFEST
from lora_lab.system.files import atomic_file, atomic_folder

HEADING = "### Exercise"  # with it the text of an exercise begins
LESSON_ONLY = (  # what a lesson's text says and a sheet's must not, and what the sheet says instead
    (r" ?[^.]*`lora-lab course solved[^.]*\.\)?", ""),  # the sentence that tells where the solutions are
    (r", `TASKS\[[^`]*`\.", " in the lesson."),  # names that are defined in the lesson alone
    (r" Compute this chrF on the test part too.*? for the record below\.", ""),
)
INTRODUCTION = """# {title}: the exercises

This sheet belongs to the lesson `{lesson}`. Have the lesson open beside it: each exercise names the section that it
comes from, which explains its words and symbols, and *above* and *below* in a text refer to the exercise's place in the
lesson. Write your code where a cell says so, and run it: `check` names the mistake, and `hint("NAME")` in a new cell
helps. After you hand in the sheet, the cell below each answer tests that answer on new inputs, and gives a point for
each sentence in the cell that is true. Do not edit these cells: they contain no tests until you hand in the sheet, so
nbgrader's *Validate* button tests none of your code. A person reads your answer to the question at the end."""
SETTINGS = f'''"""The settings of this course, for every command of nbgrader that is called in this folder."""

import os
import sys
from pathlib import Path

from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, DeduplicateIds, OverwriteCells, OverwriteKernelspec

# nbgrader calls the command alembic, which lies beside this Python, even where its environment is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


class RestoreCells(OverwriteCells):
    """Graded cells that were deleted are put back at the end; nbgrader's own class fails if the answer is gone, too."""

    def add_missing_grade_cells(self, notebook, resources):
        present = {{cell.metadata.get("nbgrader", {{}}).get("grade_id") for cell in notebook.cells}}
        source = self.gradebook.find_notebook(self.notebook_id, self.assignment_id)
        graded = {{cell.name: cell.max_score for cell in source.grade_cells}}
        written = {{cell.name for cell in source.solution_cells}}  # by the learner
        for cell in source.source_cells:
            if cell.name in graded and cell.name not in present:
                restored = self.missing_cell_transform(cell, graded[cell.name], is_solution=cell.name in written)
                restored.id = cell.name
                notebook.cells.append(restored)
        return notebook, resources


c = get_config()  # noqa: F821  # nbgrader defines it
c.CourseDirectory.root = str(Path(__file__).parent)
c.CourseDirectory.course_id = "lora_lab"
c.ClearSolutions.code_stub = {{"python": {RAISE!r}}}
c.Execute.timeout = 60  # seconds for a cell: an answer that never ends is stopped then, and the next cell runs
c.OverwriteCells.add_missing_cells = True
c.Autograde.sanitize_preprocessors = [ClearOutput, DeduplicateIds, OverwriteKernelspec, RestoreCells, CheckCellMetadata]
'''


def sheet(lesson: NotebookNode, name: str, seed: int) -> NotebookNode:
    """The source of a sheet, with solutions, hidden tests and what nbgrader reads.

    Args:
        lesson: with the solutions.
        name: the file name of the lesson without suffix.
        seed: of the hidden tests' inputs.
    """
    solved = list(answers(lesson.cells))
    title = lesson.cells[0].source.splitlines()[0].removeprefix("# ")
    cells = [
        new_markdown_cell(INTRODUCTION.format(title=title, lesson=name), id="introduction"),
        new_code_cell(_imports(lesson, solved[-1].cell), id="imports"),
    ]
    for position, each in enumerate(solved):
        first = solved[position - 1].cell + 1 if position else 0
        origin = f"From {_section(lesson.cells[: each.cell])} of the lesson {name}."
        cells += _exercise_text(lesson.cells[first : each.cell], each.exercise, origin)
        cells += _graded(lesson.cells[each.cell].source, each, seed)
    cells += _reflection(REFLECTIONS[name])
    return new_notebook(cells=cells, metadata={"kernelspec": dict(lesson.metadata.kernelspec)})


def _imports(lesson: NotebookNode, end: int) -> str:
    """The imports at the top level of the code before a cell, in order."""
    lines: dict[str, None] = {}
    for cell in lesson.cells[:end]:
        if cell.cell_type == "code":
            imports = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Import | ast.ImportFrom)]
            lines |= dict.fromkeys(map(ast.unparse, imports))
    return "\n".join(lines)


def _section(cells: Sequence[NotebookNode]) -> str:
    """The section that the last of these cells belongs to, in words."""
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    headings = re.findall(r"^##+ (?!Exercise)(.+)$", text, flags=re.MULTILINE)
    return f'the section "{headings[-1]}"' if headings else "the beginning"


def _exercise_text(cells: Sequence[NotebookNode], exercise: str, origin: str) -> Iterator[NotebookNode]:
    """From the heading of an exercise on: the text, with its origin, and code that only defines functions."""
    starts = [number for number, cell in enumerate(cells) if f"\n{HEADING}" in f"\n{cell.source}"]
    for number, cell in enumerate(cells[starts[-1] :]):
        source = cell.source if number else cell.source[f"\n{cell.source}".rindex(f"\n{HEADING}") :]
        if cell.cell_type == "markdown":
            for pattern, instead in LESSON_ONLY:
                source = re.sub(pattern, instead, source)
            if not number:
                heading, _, text = source.partition("\n")
                source = f"{heading}\n\n{origin}\n{text}"
            yield new_markdown_cell(source, id=f"{exercise}-text-{number}")
        elif all(isinstance(node, ast.FunctionDef) for node in ast.parse(source).body):
            yield new_code_cell(source, id=f"{exercise}-code-{number}")


def _graded(source: str, answer: Answer, seed: int) -> list[NotebookNode]:
    """A cell with an answer, and the locked cell that grades it."""
    code = "\n".join(line for line in source.splitlines() if not line.strip().startswith(STUB.strip()))
    cell = new_code_cell(code, id=answer.exercise, metadata=_nbgrader(answer.exercise, solution=True))
    invariants = EXERCISES[answer.exercise].points
    sentences = [f"# {number}. {each.__doc__}" for number, each in enumerate(invariants, start=1)]
    tests = ["### BEGIN HIDDEN TESTS", hidden_cell(answer.exercise, seed), "### END HIDDEN TESTS"]
    heading = f"# {answer.function}: when you hand it in, a point for each of these that is true."
    name = f"{answer.exercise}-points"
    locked = _nbgrader(name, points=len(invariants), locked=True)
    return [cell, new_code_cell("\n".join([heading, *sentences, *tests]), id=name, metadata=locked)]


def _reflection(reflection: Reflection) -> list[NotebookNode]:
    """A locked question with its rubric, and the cell for the answer, which a person grades."""
    rubric = "\n".join(f"- {sentence}" for sentence in reflection.rubric)
    question = f"### Reflection\n\n{reflection.question}\n\nA person reads this. A point each:\n\n{rubric}"
    points = len(reflection.rubric)
    answer = f"{BEGIN}\n{reflection.expected}\n{END}"
    return [
        new_markdown_cell(question, id="question", metadata=_nbgrader("question", locked=True)),
        new_markdown_cell(answer, id="reflection", metadata=_nbgrader("reflection", solution=True, points=points)),
    ]


def _nbgrader(name: str, *, solution: bool = False, locked: bool = False, points: int | None = None) -> dict:
    """The metadata of a cell, as nbgrader reads it."""
    entries = {"schema_version": 3, "grade_id": name, "solution": solution, "locked": locked, "task": False}
    return {"nbgrader": entries | {"grade": points is not None} | ({} if points is None else {"points": points})}


# Hidden tests

# Learners may have given a name such as sum to something else.
PREAMBLE = """from builtins import *
import contextlib, copy, io, math, warnings
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F"""


def points(answer, properties, seed):
    """Return how many of the properties hold for an answer; which of them is printed."""
    count = 0
    for number, holds_for in enumerate(properties):
        quiet = io.StringIO()  # nbgrader takes anything on stderr for a failure
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed + number)
                    rng = np.random.default_rng([seed, number])
                    holds = all(holds_for(answer, rng) for _ in range(TRIALS))
        except (Exception, SystemExit):
            holds = False
        count += holds
        print("holds:        " if holds else "does not hold:", holds_for.__doc__)
    return count


def hidden_cell(exercise: str, seed: int) -> str:
    """Return the code that grades an answer; its last line is the number of points, which nbgrader reads.

    Args:
        exercise: its name.
        seed: of the inputs.
    """
    each = EXERCISES[exercise]
    texts: dict[str, str] = {}
    for function in [close, *each.points, points]:
        _collect(function.__name__, function, texts)
    given = [EXERCISES[name].stated.source for name in each.uses]  # a mistake in these costs nothing here
    names = ", ".join(test.__name__ for test in each.points)
    parts = [PREAMBLE, *given, *texts.values(), f"points({each.stated.function}, [{names}], {seed})"]
    return "\n\n\n".join(parts)


def _collect(name: str, value: Any, texts: dict[str, str]) -> None:
    """Add to some texts, by name, the source of a function of the course and of what it uses; imports of the rest."""
    if name in texts:
        return
    value = inspect.unwrap(value)  # a cache is not needed there
    if isinstance(value, types.ModuleType):
        texts[name] = f"import {value.__name__} as {name}"
    elif isinstance(value, types.FunctionType) and value.__module__.startswith("lora_lab.course"):
        source = inspect.getsource(value)
        texts[name] = source[source.index("def ") :].rstrip()  # without its decorator
        for used in _globals(value.__code__):
            if used in value.__globals__:
                _collect(used, value.__globals__[used], texts)
    elif callable(value):
        texts[name] = f"from {value.__module__} import {value.__name__} as {name}"
    else:
        texts[name] = f"{name} = {value!r}"


def _globals(code: types.CodeType) -> Iterator[str]:
    """The names that code looks up outside itself, also in what is defined in it."""
    yield from (each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals(constant)


# The course


def write_course(folder: str | Path, only: Sequence[str] = (), seed: int | None = None) -> list[str]:
    """Write a course of nbgrader: a sheet for each lesson, in ``source/``, and the settings.

    What is there already stays as it is.

    Args:
        folder: is made if it does not exist.
        only: beginnings of lessons' names, such as "03"; all by default.
        seed: of the hidden tests' inputs; drawn for each sheet by default, so that it stands in this course alone.

    Returns:
        What was done, in lines to print.

    Raises:
        ValueError: the folder is a file or has the lessons; or a lesson that was asked for is unknown.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (folder / MANIFEST).exists()):
        raise ValueError(f"{folder} is a file or holds the lessons; name another folder for the course to grade.")
    new: dict[Path, NotebookNode] = {}
    done = []
    for path in choose_lessons(only):
        target = folder / "source" / path.stem
        if target.exists():
            done.append(f"Already there, so left as it is: {path.stem}")
            continue
        lesson = nbformat.read(path, as_version=4)
        new[target] = sheet(lesson, path.stem, secrets.randbelow(2**31) if seed is None else seed)
        done.append(f"Written: {target / path.name}")
    for target, notebook in new.items():
        with atomic_folder(target) as temporary:
            nbformat.write(notebook, temporary / f"{target.name}.ipynb")
    if not (folder / CONFIG).exists():
        with atomic_file(folder / CONFIG) as temporary:
            temporary.write_text(SETTINGS, encoding="utf-8")
    return done
