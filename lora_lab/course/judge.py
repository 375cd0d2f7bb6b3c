"""Is an answer right? If it is not: a known mistake, or the first of some general findings, in one or two sentences."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import linecache
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_lab.course.calls import Outcome, TimeUp, call, file_of, limited, parameters_of, untouched
from lora_lab.course.exercise import Exercise, Property
from lora_lab.course.values import SHOWN, as_array, difference, factor, same, short_text, size

SECONDS = 2.0  # for one check
HOLE = "____"  # stands in a stub where the learner is to write
NOT_STARTED = "Not started yet. Write your code, run the cell again, and it is checked."


@dataclass(frozen=True)
class Verdict:
    """The judgement of an answer.

    Attributes:
        passed: whether it is right; None if nothing has been written yet.
        text: one or two sentences.
        example: the smallest inputs on which a wrong answer differs, with both results; often empty.
        printed: what a wrong answer printed, on the first inputs or while the check ran that failed.
    """

    passed: bool | None
    text: str
    example: str = ""
    printed: str = ""


def judge(exercise: Exercise, answer: Any) -> Verdict:
    """Judge an answer on fresh inputs.

    Global random states are as before, arguments are copied for each call, and what the answer prints is not shown.
    After :data:`SECONDS` an answer that still runs is stopped, as far as :func:`lora_lab.course.calls.limited` can.

    Raises:
        KeyboardInterrupt: it is the only exception.
    """
    wants_class = isinstance(exercise.solution, type)
    if not callable(answer) or wants_class != isinstance(answer, type):
        kind = "class" if wants_class else "function"
        name = exercise.solution.__name__
        return Verdict(False, f'Pass the {kind} itself, without calling it: check("{exercise.name}", {name}).')
    rng = np.random.default_rng()  # no seed, so that no answer can be memorised
    with untouched():
        return _by_inputs(exercise, answer, rng) if exercise.inputs else _by_properties(exercise, answer, rng)


def _by_inputs(exercise: Exercise, answer: Callable[..., Any], rng: np.random.Generator) -> Verdict:
    deadline = time.monotonic() + SECONDS
    assert exercise.inputs is not None
    names = parameters_of(exercise.solution)
    cases = [exercise.inputs(rng) for _ in range(exercise.draws)]
    if not _takes(answer, len(names)):
        return Verdict(False, f"{exercise.solution.__name__} must take the arguments ({', '.join(names)}).")
    expected = [call(exercise.solution, case, names) for case in cases]
    try:
        outcomes = limited(lambda: [call(answer, case, names) for case in cases], SECONDS)
    except TimeUp:
        return Verdict(False, _still_running("function"))
    if any(_not_started(outcome, answer) for outcome in outcomes):
        return Verdict(None, NOT_STARTED)

    def agrees(outcome: Outcome, other: Outcome) -> bool:
        return _agrees(outcome, other, exercise)

    if all(map(agrees, outcomes, expected)) and not _changed(outcomes, expected):
        if name := _without_gradient(outcomes, expected):
            sentence = f"The result is right, but the gradient of {name} is not."
            return Verdict(False, f"{sentence} Does a detach or no_grad cut it off?")
        return Verdict(True, exercise.praise)

    def first_mistake() -> str | None:
        for wrong, sentence in exercise.mistakes:
            pairs = zip(outcomes, cases, strict=True)
            if all(agrees(outcome, call(wrong, case, names)) for outcome, case in pairs):
                return sentence
        return None

    try:
        sentence = limited(first_mistake, deadline - time.monotonic())
    except TimeUp:
        sentence = None
    if sentence is not None:
        return Verdict(False, sentence, printed=outcomes[0].printed)
    sentence = _named_difference(answer, outcomes, expected)
    if sentence is not None:
        return Verdict(False, sentence, printed=outcomes[0].printed)
    triples = [each for each in zip(cases, outcomes, expected, strict=True) if not agrees(each[1], each[2])]
    example = _example(names, *min(triples, key=lambda triple: size(triple[0])))
    return Verdict(False, _numbers_differ(outcomes, expected, len(triples)), example, outcomes[0].printed)


def _by_properties(exercise: Exercise, answer: Any, rng: np.random.Generator) -> Verdict:
    kind = "class" if isinstance(answer, type) else "function"
    printed = io.StringIO()

    def passes(each: Property) -> bool:
        printed.seek(0)
        printed.truncate()
        return bool(each.holds(answer, rng))

    def first_failure() -> Verdict:
        for each in exercise.properties:
            try:
                if not all(passes(each) for _ in range(exercise.draws)):
                    return Verdict(False, each.sentence, printed=printed.getvalue())
            except (TimeUp, KeyboardInterrupt):
                raise
            except BaseException as error:
                if _is_stub(error, answer):
                    return Verdict(None, NOT_STARTED)
                return Verdict(False, _about_error(error, answer), printed=printed.getvalue())
        return Verdict(True, exercise.praise)

    _warm_up(exercise)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            return limited(first_failure, SECONDS)
    except TimeUp:
        return Verdict(False, _still_running(kind))


@functools.cache
def _warm_up(exercise: Exercise) -> None:
    """Try the solution, so that imports at first use do not count as the answer's time."""
    for each in exercise.properties:
        each.holds(exercise.solution, np.random.default_rng())


def _agrees(outcome: Outcome, reference: Outcome, exercise: Exercise) -> bool:
    """Whether a call did what another did; it may have changed further arguments."""
    if not reference.changed <= outcome.changed:
        return False
    if outcome.error is not None or reference.error is not None:
        return type(outcome.error) is type(reference.error) and str(outcome.error) == str(reference.error)
    return same(outcome.value, reference.value, exercise.rtol, exercise.atol)


def _changed(outcomes: Sequence[Outcome], expected: Sequence[Outcome]) -> list[str]:
    """The arguments that some call changed in place although the solution does not."""
    names = {
        name
        for outcome, reference in zip(outcomes, expected, strict=True)
        for name in outcome.changed - reference.changed
    }
    return sorted(names)


def _without_gradient(outcomes: Sequence[Outcome], expected: Sequence[Outcome]) -> str | None:
    """The first argument whose gradient is not that of the solution."""
    for outcome, reference in zip(outcomes, expected, strict=True):
        for name, gradient in reference.gradients.items():
            if not same(outcome.gradients[name], gradient, 1e-4):
                return name
    return None


def _named_difference(
    answer: Callable[..., Any], outcomes: Sequence[Outcome], expected: Sequence[Outcome]
) -> str | None:
    """An error, a difference of type or shape, NaN, or a changed argument; None if only numbers differ."""
    for outcome in outcomes:
        if outcome.error is not None:
            return _about_error(outcome.error, answer)
    for outcome, reference in zip(outcomes, expected, strict=True):
        if sentence := difference(outcome.value, reference.value):
            return sentence
    if names := _changed(outcomes, expected):
        return f"Your function changes its argument {names[0]} in place. Work on a copy of {names[0]}."
    return None


def _numbers_differ(outcomes: Sequence[Outcome], expected: Sequence[Outcome], wrong: int) -> str:
    """How results differ whose types and shapes are right, on so many of the inputs."""
    pairs = zip(outcomes, expected, strict=True)
    factors = [factor(outcome.value, reference.value) for outcome, reference in pairs]
    constants = [number for number in factors if number is not None]
    if len(constants) < len(factors):
        share = "all" if wrong == len(outcomes) else f"{wrong} of {len(outcomes)}"
        return f"The result differs from the expected one on {share} inputs."
    if np.allclose(constants, -1, rtol=1e-3):
        return "The result has the wrong sign on all inputs."
    if np.allclose(constants, constants[0], rtol=1e-3):
        return f"The result is {constants[0]:.3g} times what it should be, on all inputs. A factor is wrong."
    return (
        "The result is wrong by a factor that depends on the inputs: it lies between "
        f"{min(constants):.3g} and {max(constants):.3g}."
    )


def _about_error(error: BaseException, answer: Any) -> str:
    """An error with its message, and the learner's line that led to it."""
    file, where = file_of(answer), ""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if lines and lines[-1].lineno is not None:
        text = linecache.getline(lines[-1].filename, lines[-1].lineno).strip()
        where = f" in line {lines[-1].lineno}" + (f" ({text})" if text else "")
    message = " ".join(str(error).split())
    if len(message) > 300:
        message = message[:300] + " ..."
    return f"Your code stops with {type(error).__name__}{where}" + (f": {message}" if message else ".")


def _is_stub(error: BaseException | None, answer: Any) -> bool:
    """Whether an error comes from a stub: NotImplementedError raised by the learner's file itself, or a hole."""
    if isinstance(error, NameError):
        return error.name == HOLE
    if not isinstance(error, NotImplementedError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return file_of(answer) in (None, frames[-1].filename)


def _not_started(outcome: Outcome, answer: Any) -> bool:
    return outcome.value is ... or _is_stub(outcome.error, answer)


def _takes(answer: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many positional arguments."""
    try:
        signature = inspect.signature(answer)
    except (TypeError, ValueError):  # some functions of C do not tell
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _still_running(kind: str) -> str:
    return f"Your {kind} was still running after {SECONDS:g} s. Is there a loop that never ends?"


def _example(names: Sequence[str], case: Sequence[Any], outcome: Outcome, reference: Outcome) -> str:
    """Inputs and both results, as aligned text; of large results the entry that differs most."""
    rows = [*zip(names, case, strict=True)]
    array, expected = as_array(outcome.value), as_array(reference.value)
    if array is not None and expected is not None and expected.size > SHOWN:
        index = np.unravel_index(np.argmax(np.abs(array - expected)), expected.shape)
        entry = f"[{', '.join(map(str, index))}]"
        rows += [(f"your result{entry}", array[index]), (f"expected{entry}", expected[index])]
    else:
        rows += [("your result", outcome.value), ("expected", reference.value)]
    width = max(len(name) for name, _ in rows)
    indent = "\n" + " " * (width + 3)
    return "\n".join(f"{name:<{width}} = {short_text(value)}".replace("\n", indent) for name, value in rows)
