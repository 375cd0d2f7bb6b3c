"""The exercises of a lesson as a sheet, and a course of such sheets, which nbgrader hands out, collects and grades.

A sheet has the lesson's imports, the text of each exercise with its answer, a locked cell with hidden tests after each,
and a reflection at the end. So running and grading a sheet takes seconds, and needs neither a model nor the rest of the
lesson. Learners keep the lesson open while they work on its sheet: each exercise names the section that explains it.

Hidden tests are the properties of an exercise, a point each: the ones that ``check`` tries. Hidden is the seed of their
inputs. An answer that computes nothing has none of the properties.
"""

from __future__ import annotations

import ast
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import torch
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lora_lab.course.copies import BEGIN, CONFIG, END, RAISE, STUB, choose_lessons
from lora_lab.course.exercise import EXERCISES, REFLECTIONS, TRIALS, Exercise, Reflection
from lora_lab.course.judge import attempt, untouched
from lora_lab.course.learner import MANIFEST
from lora_lab.system.files import atomic_file, atomic_folder

HEADING = re.compile(r"^(?=### Exercise)", re.MULTILINE)  # where the text of an exercise begins
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
TESTS = """# {function}: when you hand it in, a point for each of these that is true.
{sentences}
### BEGIN HIDDEN TESTS
from lora_lab.course.sheets import EXERCISES, points
{called}points({function}, EXERCISES[{name!r}].points, {seed})
### END HIDDEN TESTS"""
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

    Raises:
        ValueError: the lesson has no exercise or no reflection.
    """
    exercises = [each for each in EXERCISES.values() if each.stated.lesson == name]
    if not exercises or name not in REFLECTIONS:
        raise ValueError(f"{name} needs an exercise and a reflection, for a sheet to be made of it.")
    exercises.sort(key=lambda each: each.stated.cell)
    title = lesson.cells[0].source.splitlines()[0].removeprefix("# ")
    cells = [
        new_markdown_cell(INTRODUCTION.format(title=title, lesson=name), id="introduction"),
        new_code_cell(_imports(lesson.cells[: exercises[-1].stated.cell]), id="imports"),
    ]
    for each in exercises:
        before = lesson.cells[: each.stated.cell]
        origin = f'From the section "{_section(before)}" of the lesson {name}.'
        cells += _exercise_text(before, each.name, origin)
        cells += _graded(lesson.cells[each.stated.cell].source, each, seed)
    cells += _reflection(REFLECTIONS[name])
    return new_notebook(cells=cells, metadata={"kernelspec": dict(lesson.metadata.kernelspec)})


def _imports(cells: Sequence[NotebookNode]) -> str:
    """The imports at the top level of code, in order."""
    nodes = [node for cell in cells if cell.cell_type == "code" for node in ast.parse(cell.source).body]
    imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(dict.fromkeys(imports))


def _section(cells: Sequence[NotebookNode]) -> str:
    """The heading of the section that the last of these cells belongs to."""
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.findall(r"^##+ (?!Exercise)(.+)$", text, flags=re.MULTILINE)[-1]


def _exercise_text(cells: Sequence[NotebookNode], exercise: str, origin: str) -> Iterator[NotebookNode]:
    """From the last heading of an exercise on: the text, with its origin, and code that only defines functions."""
    starts = [number for number, cell in enumerate(cells) if HEADING.search(cell.source)]
    if not starts:
        raise ValueError(f"No heading '### Exercise' stands before the exercise {exercise!r}; add it to its text.")
    for number, cell in enumerate(cells[starts[-1] :]):
        source = cell.source
        if number == 0:
            heading, _, text = HEADING.split(source)[-1].partition("\n")
            source = f"{heading}\n\n{origin}\n{text}"
        if cell.cell_type == "markdown":
            for pattern, instead in LESSON_ONLY:
                source = re.sub(pattern, instead, source)
            yield new_markdown_cell(source, id=f"{exercise}-text-{number}")
        elif all(isinstance(node, ast.FunctionDef) for node in ast.parse(source).body):
            yield new_code_cell(source, id=f"{exercise}-code-{number}")


def _graded(source: str, exercise: Exercise, seed: int) -> list[NotebookNode]:
    """A cell with an answer, and the locked cell that grades it: the value of its last line is the points."""
    name, function = exercise.name, exercise.stated.function
    code = re.sub(rf"(?m)^ *{STUB}.*\n", "", source)
    answer = new_code_cell(code, id=name, metadata=_nbgrader(name, solution=True))
    sentences = "\n".join(f"# {number}. {each.__doc__}" for number, each in enumerate(exercise.points, start=1))
    # Solutions stand in for the answers that this one calls, so that a mistake in those costs nothing here.
    called = "".join(f"{EXERCISES[each].stated.function} = EXERCISES[{each!r}].solution\n" for each in exercise.uses)
    tests = TESTS.format(function=function, name=name, seed=seed, sentences=sentences, called=called)
    locked = _nbgrader(f"{name}-points", points=len(exercise.points), locked=True)
    return [answer, new_code_cell(tests, id=f"{name}-points", metadata=locked)]


def _reflection(reflection: Reflection) -> list[NotebookNode]:
    """A locked question with its rubric, and the cell for the answer, which a person grades."""
    rubric = "\n".join(f"- {sentence}" for sentence in reflection.rubric)
    question = f"### Reflection\n\n{reflection.question}\n\nA person reads this. A point each:\n\n{rubric}"
    answer = f"{BEGIN}\n{reflection.expected}\n{END}"
    graded = _nbgrader("reflection", solution=True, points=len(reflection.rubric))
    return [
        new_markdown_cell(question, id="question", metadata=_nbgrader("question", locked=True)),
        new_markdown_cell(answer, id="reflection", metadata=graded),
    ]


def _nbgrader(name: str, *, solution: bool = False, locked: bool = False, points: int | None = None) -> dict:
    """The metadata of a cell, as nbgrader reads it."""
    entries = {"schema_version": 3, "grade_id": name, "solution": solution, "locked": locked, "task": False}
    grade = {"grade": False} if points is None else {"grade": True, "points": points}
    return {"nbgrader": entries | grade}


def points(answer: Any, properties: Sequence[Callable[..., Any]], seed: int) -> int:
    """Return how many of the properties hold for an answer, in each trial and without an error; print which of them do.

    Nothing else is printed, because nbgrader takes anything on stderr for a failure.

    Args:
        seed: of the inputs.
    """
    count = 0
    for number, test in enumerate(properties):
        rng = np.random.default_rng([seed, number])
        with untouched():
            torch.default_generator.manual_seed(seed + number)
            holds = all(attempt(test, answer, rng).value for _ in range(TRIALS))
        count += holds
        print("holds:        " if holds else "does not hold:", test.__doc__)
    return count


# The course


def write_course(folder: str | Path, only: Sequence[str] = ()) -> list[str]:
    """Write a course of nbgrader: a sheet for each lesson, in ``source/``, and the settings.

    What is there already stays as it is. The seed of a sheet's hidden tests is drawn.

    Args:
        folder: is made if it does not exist.
        only: beginnings of lessons' names, such as "03"; all by default.

    Returns:
        What was done, in lines to print.

    Raises:
        ValueError: the folder has the lessons, or a lesson that was asked for is unknown.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds the lessons; name another folder for the course to grade.")
    done = []
    for path in choose_lessons(only):
        target = folder / "source" / path.stem
        if target.exists():
            done.append(f"Already there, so left as it is: {path.stem}")
            continue
        lesson = nbformat.read(path, as_version=4)
        with atomic_folder(target) as temporary:
            nbformat.write(sheet(lesson, path.stem, secrets.randbelow(2**31)), temporary / path.name)
        done.append(f"Written: {target / path.name}")
    if not (folder / CONFIG).exists():
        with atomic_file(folder / CONFIG) as temporary:
            temporary.write_text(SETTINGS, encoding="utf-8")
    return done
