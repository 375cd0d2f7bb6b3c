"""What an exercise is: a solution, wrong answers with a sentence each, properties of every right answer, and hints.

The solution stands in its lesson, between ``### BEGIN SOLUTION`` and ``### END SOLUTION`` in the cell that ends in
``check("gradient", gradient)``. Each file in ``exercises/`` holds the rest for one lesson:

    exercise = Exercise(
        "gradient",
        inputs=errors_and_inputs,
        wrong={"Sum over the tokens; you divided by their number.": ("delta.T @ z", "delta.T @ z / len(z)")},
        hints=["For one token the gradient is an outer product."],
        praise="Each token adds one direction.",
    )

    @exercise.must()
    def adds_up(gradient, rng):
        \"\"\"The gradient from all tokens is the sum of those from each part of them.\"\"\"
        delta, z = errors_and_inputs(rng)
        return close(gradient(delta, z), gradient(delta[:2], z[:2]) + gradient(delta[2:], z[2:]))

With inputs, an answer must agree with the solution on all of them. Where there are many right answers (classes,
scripts, random starts) there are none. Then the properties decide, in their order. A property states one case, and must
hold in several trials. In a graded sheet each property with a docstring is a hidden test and a point; so an answer that
passes a check has all points.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from lora_lab.system.provenance import shipped_folder

Edit = str | tuple[str, ...]
# Stands in the text of each exercise: how hard it is, how much the rest of the course needs it, and how long it takes.
TIME = re.compile(r"\*\*(?:Core|Deeper|Project)\*\*(?:, importance [●○]{3})?, about (\d+) minutes\.")
# A cell with a solution: its code, and the name of the exercise and of the function that its last line checks.
SOLVED_CELL = re.compile(r'(.*### BEGIN SOLUTION.*)^check\("(\w+)", (\w+)\)$', re.DOTALL | re.MULTILINE)
Holds = TypeVar("Holds", bound=Callable[..., Any])
TRIALS = 12  # of a property, each with inputs of its own, so it states one case
EXERCISES: dict[str, Exercise] = {}  # by name, in the order of the lessons
REFLECTIONS: dict[str, Reflection] = {}  # by the lesson's name


def normal(rng, *shape):
    """A tensor of that shape in float32, drawn from the standard normal distribution."""
    return torch.from_numpy(rng.normal(size=shape)).float()


def close(value, expected):
    """Whether two arrays, tensors or numbers have one shape and equal entries, up to rounding."""
    one, other = (np.asarray(each.detach() if isinstance(each, torch.Tensor) else each) for each in (value, expected))
    if one.shape != other.shape or one.dtype.kind not in "iuf":
        return False
    return bool((abs(one - other) <= 1e-4 * abs(other).max(initial=1e-6)).all())


def are(result, count, kind):
    """Whether a result is a tuple or list of so many objects of a kind."""
    return isinstance(result, tuple | list) and len(result) == count and all(isinstance(one, kind) for one in result)


def works(function, *errors):
    """Whether a call raises none of these errors, and returns something true."""
    try:
        return bool(function())
    except errors:
        return False


class Stated(NamedTuple):
    """What its lesson says of an exercise.

    Attributes:
        lesson: its file name without suffix, such as "03_lora_from_scratch".
        cell: the number of the cell with the solution, from 0.
        function: the name of the function or class that is checked.
        source: the solution, without comments.
        minutes: a guess of the time that a learner needs.
    """

    lesson: str
    cell: int
    function: str
    source: str
    minutes: int


@cache
def _stated() -> dict[str, Stated]:
    """What the lessons say of all exercises, by the exercises' names."""
    exercises = {}
    for path in shipped_folder("notebooks").glob("[0-9]*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for number, cell in enumerate(cells):
            for code, name, function in SOLVED_CELL.findall("".join(cell["source"])):
                text = "".join("".join(each["source"]) for each in cells[:number] if each["cell_type"] == "markdown")
                source, minutes = ast.unparse(ast.parse(code)), int(TIME.findall(text)[-1])
                exercises[name] = Stated(path.stem, number, function, source, minutes)
    return exercises


@dataclass(frozen=True)
class Property:
    """What every right answer has.

    Attributes:
        holds: called with the answer and a numpy Generator; whether the answer has the property. If it has a docstring,
            that is a point on a graded sheet.
        sentence: what is wrong with an answer without it; by default that its docstring is not true.
        wrong: edits of the solution that lack it, and have all properties before it.
    """

    holds: Callable[[Any, np.random.Generator], Any]
    sentence: str
    wrong: tuple[Edit, ...]


@dataclass(eq=False)
class Exercise:
    """An exercise.

    Args:
        name: unique; the learner writes ``check(name, answer)``.
        hints: shown one at a time; the last may say almost all.
        praise: one line after success: why it matters.
        inputs: takes a numpy Generator and returns fresh arguments, a tuple. Small arrays, never rank 1, alpha = rank,
            square or symmetric, so that mistakes do not coincide. None: the properties decide.
        wrong: sentence -> an edit, as in :meth:`answer`, or a list of edits. An answer that agrees with one on all
            inputs gets the sentence, which says what broke, and the likely mistake, in at most 160 characters.
        draws: number of fresh inputs for one check.
        uses: names of exercises whose solutions this one calls.
    """

    name: str
    hints: Sequence[str]
    praise: str
    inputs: Callable[[np.random.Generator], tuple[Any, ...]] | None = None
    wrong: Mapping[str, Edit | list[Edit]] = field(default_factory=dict)
    draws: int = 64
    uses: Sequence[str] = ()
    properties: list[Property] = field(default_factory=list)

    def __post_init__(self) -> None:
        EXERCISES[self.name] = self

    def must(self, sentence: str = "", *wrong: Edit) -> Callable[[Holds], Holds]:
        """Return a decorator that registers a property."""

        def register(holds: Holds) -> Holds:
            self.properties.append(Property(holds, sentence, wrong))
            return holds

        return register

    @property
    def stated(self) -> Stated:
        """What its lesson says of it."""
        return _stated()[self.name]

    @cached_property
    def solution(self) -> Any:
        """The function or class of the lesson."""
        return self.answer(())

    def answer(self, edit: Edit) -> Any:
        """Return the solution with an edit.

        Args:
            edit: old and new text, in turns; or one text, which replaces the whole body. Old texts are those of
                ``ast.unparse``, with single quotes and a line for each statement; every occurrence is replaced.

        Raises:
            ValueError: an old text is not in the solution.
        """
        source = self.stated.source
        if isinstance(edit, str):
            source = f"{source.splitlines()[0]}\n{textwrap.indent(textwrap.dedent(edit), '    ')}"
        else:
            for old, new in zip(edit[::2], edit[1::2], strict=True):
                if old not in source:
                    raise ValueError(f"{old!r} is not in the solution of {self.name!r}, which is:\n{source}")
                source = source.replace(old, new)
        names = dict(self.properties[0].holds.__globals__)  # of the file in exercises/, not of the lesson
        names |= {EXERCISES[name].stated.function: EXERCISES[name].solution for name in self.uses}
        exec(compile(source, f"<{self.name}>", "exec"), names)
        return names[self.stated.function]

    @cached_property
    def mistakes(self) -> list[tuple[Any, str]]:
        """The wrong answers, each with the sentence that it gets."""
        edits = [(edit, each.sentence) for each in self.properties for edit in each.wrong]
        for sentence, some in self.wrong.items():
            edits += [(edit, sentence) for edit in (some if isinstance(some, list) else [some])]
        return [(self.answer(edit), sentence) for edit, sentence in edits]

    @property
    def points(self) -> list[Callable[..., Any]]:
        """The properties that are hidden tests, a point each."""
        return [each.holds for each in self.properties if each.holds.__doc__]


@dataclass(frozen=True)
class Reflection:
    """A question at the end of a graded sheet, which a person grades.

    Args:
        lesson: the file name of its lesson without suffix.
        question: what is asked.
        rubric: what earns a point, one sentence for each; learners see it.
        expected: what a good answer says, for the person who grades.
    """

    lesson: str
    question: str
    rubric: tuple[str, ...]
    expected: str

    def __post_init__(self) -> None:
        REFLECTIONS[self.lesson] = self
