"""What a hidden test is: a property that every right answer has, a point each.

Its source goes into a cell of the sheet with that of the helpers that it calls, and runs there without lora_lab; so
these have no annotations. It does not call ``check``, and an answer that computes nothing has none of the properties.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import io
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from lora_lab.course.exercise import EXERCISES

# Learners may have given a name such as sum to something else.
PREAMBLE = """from builtins import *
import contextlib, copy, io, math, warnings
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F"""


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


def hidden_tests(exercise: str) -> list[Callable[..., Any]]:
    """Return the hidden tests of an exercise."""
    return EXERCISES[exercise].points


def hidden_cell(exercise: str, seed: int) -> str:
    """The code that grades an answer; its last line is the number of points, which nbgrader reads.

    Args:
        exercise: its name.
        seed: of the inputs.
    """
    each = EXERCISES[exercise]
    tests = hidden_tests(exercise)
    texts: dict[str, str] = {}
    for function in [*tests, points]:
        _collect(function.__name__, function, texts)
    given = [EXERCISES[name].source for name in each.uses]  # a mistake in these costs nothing here
    names = ", ".join(test.__name__ for test in tests)
    parts = [PREAMBLE, *given, *texts.values(), f"points({each.function}, [{names}], {seed})"]
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
