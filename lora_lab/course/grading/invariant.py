"""What a hidden test is: properties that every right answer has, a point each.

    @invariant_of("gradient")
    def adds_up(gradient, rng):
        \"\"\"The gradient from all tokens is the sum of those from each part of them.\"\"\"
        delta, z = torch.randn(6, 3), torch.randn(6, 5)
        return close(gradient(delta, z), gradient(delta[:2], z[:2]) + gradient(delta[2:], z[2:]))

Its source goes into a cell of the sheet, where it runs without lora_lab; so it has no annotations, and uses only what
:data:`PREAMBLE` imports. It does not call ``check``, and an answer that computes nothing has none of the properties.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Function = TypeVar("Function", bound=Callable[..., Any])
INVARIANTS: dict[str, list[Callable[..., bool]]] = {}  # by the exercise's name
PROVIDED: dict[str, list[Callable[..., Any]]] = {}  # what a right answer calls, by the exercise's name
REFLECTIONS: dict[str, Reflection] = {}  # by the lesson's name
# The first line is for learners who have given a name such as sum to something else.
PREAMBLE = """from builtins import *
import contextlib, copy, io, math, warnings
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F"""


@dataclass(frozen=True)
class Reflection:
    """A question that a person grades.

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


def invariant_of(exercise: str) -> Callable[[Function], Function]:
    """Register the decorated function as an invariant of an exercise.

    It takes the answer and a numpy Generator, and returns whether the answer has the property; its docstring says the
    property in one sentence, which learners see.
    """

    def register(function: Function) -> Function:
        INVARIANTS.setdefault(exercise, []).append(function)
        return function

    return register


def provided_for(exercise: str) -> Callable[[Function], Function]:
    """Register the decorated function as one that answers to this exercise call: a mistake there costs nothing here."""

    def register(function: Function) -> Function:
        PROVIDED.setdefault(exercise, []).append(function)
        return function

    return register


def close(value, expected):
    """Whether two arrays, tensors or numbers have one shape and equal entries, up to rounding."""
    one, other = (np.asarray(each.detach() if isinstance(each, torch.Tensor) else each) for each in (value, expected))
    if one.shape != other.shape or one.dtype.kind not in "iuf":
        return False
    return bool((abs(one - other) <= 1e-4 * abs(other).max(initial=1e-6)).all())


def points(answer, invariants, seed):
    """How many of the invariants hold for an answer; which of them is printed."""
    count = 0
    for number, invariant in enumerate(invariants):
        quiet = io.StringIO()  # nbgrader takes anything on stderr for a failure
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed + number)
                    holds = bool(invariant(answer, np.random.default_rng([seed, number])))  # numpy has its own True
        except (Exception, SystemExit):
            holds = False
        count += holds
        print("holds:        " if holds else "does not hold:", invariant.__doc__)
    return count


def hidden_cell(exercise: str, answer: str, seed: int) -> str:
    """The code that grades an answer; its last line is the number of points, which nbgrader reads.

    Args:
        exercise: its name.
        answer: the name of the learner's function or class.
        seed: of the inputs.
    """
    functions: Sequence[Callable[..., Any]] = [*PROVIDED.get(exercise, []), *INVARIANTS[exercise]]
    parts = [PREAMBLE, *map(_source, [close, *functions, points])]
    names = ", ".join(each.__name__ for each in INVARIANTS[exercise])
    return "\n\n\n".join([*parts, f"points({answer}, [{names}], {seed})"])


def _source(function: Callable[..., Any]) -> str:
    """The lines of a function without its decorator."""
    source = inspect.getsource(function)
    return source[source.index("def ") :].rstrip()
