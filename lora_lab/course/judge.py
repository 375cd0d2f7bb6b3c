"""Is an answer right? If it is not: a known mistake, or the first of some general findings, in one or two sentences.

A learner's code leaves no trace: arguments are copied, output is captured, errors are values, and time is limited.
What answers return are numbers, booleans, strings, None, arrays, tensors, and tuples, lists and dicts of them. They are
compared up to rounding; a tensor may equal an array, and a list a tuple.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import itertools
import linecache
import reprlib
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from lora_lab.course import nearly
from lora_lab.course.exercise import TRIALS, Exercise
from lora_lab.system.wording import shortened

Value = TypeVar("Value")
SECONDS = 2.0  # for one check
HOLE = "____"  # stands in a stub where the learner is to write
NOT_STARTED = "Not started yet. Write your code, run the cell again, and it is checked."
SEARCH_SECONDS, CHANGE_SECONDS = 3.0, 0.5  # for the one change that makes an answer right, and for each that is tried
REPEAT = 0.02  # seconds until the alarm rings again, in case the code has caught the exception
TOLERANCE = 1e-4  # of floats, as in grading
ENDLESS = "Your code was still running after {:g} s. Is there a loop that never ends?"
ADVICE = {  # by words of an error
    "Boolean value of Tensor": "Ask `is not None` whether there is one, or any() or all() of its entries.",
    "truth value of an array": "Ask any() or all() of its entries.",
}
SHOWN = 12  # arrays with more entries are described by their shape
_MATCHING_KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf", "c": "iufc"}  # kinds of numpy's dtypes
_KIND_NAMES = {"b": "True or False", "i": "whole numbers", "u": "whole numbers", "f": "floats", "c": "complex numbers"}


# A call


class TimeUp(BaseException):
    """The time limit has passed."""


@dataclass(frozen=True)
class Called:
    """What a call did.

    Attributes:
        value: what it returned; None after an error.
        error: what it raised, if anything.
        printed: what it printed.
        changed: names of the arguments that it changed in place.
    """

    value: Any
    error: BaseException | None
    printed: str
    changed: frozenset[str] = frozenset()


def call(function: Callable[..., Any], arguments: Sequence[Any], names: Sequence[str]) -> Called:
    """Call a function with copies of the arguments.

    Args:
        names: of the arguments.
    """
    copies = copy.deepcopy(tuple(arguments))
    called = watch(lambda: function(*copies))
    before_and_after = zip(names, arguments, copies, strict=True)
    return replace(called, changed=frozenset(name for name, *pair in before_and_after if _differs(*pair)))


def watch(function: Callable[[], Any]) -> Called:
    """Call a function and capture its output; an error is a value, SystemExit too.

    Raises:
        TimeUp, KeyboardInterrupt: nothing else is raised.
    """
    value, error, printed = None, None, io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            value = function()
    except (TimeUp, KeyboardInterrupt):
        raise
    except BaseException as raised:
        error = raised
    return Called(value, error, printed.getvalue())


def attempt(holds: Callable[..., Any], answer: Any, rng: np.random.Generator) -> Called:
    """Try a property of an exercise on an answer once; the value is whether it holds."""
    return watch(lambda: bool(holds(answer, rng)))


def _differs(before: Any, after: Any) -> bool:
    """Whether an argument was changed; False for objects that do not even equal a copy of themselves."""
    return not same(after, before, 0.0) and same(copy.deepcopy(before), before, 0.0)


def can_limit() -> bool:
    """Return whether :func:`limited` can stop what runs too long."""
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


def limited(function: Callable[[], Value], seconds: float = 0.0) -> Value:
    """Return ``function()``, or raise :class:`TimeUp` if it takes longer than :data:`SECONDS`, or so many.

    The limit holds for Python code in the main thread on systems with SIGALRM, such as Linux and macOS; elsewhere there
    is none. A single long call of a compiled library, such as a large matrix multiplication, is interrupted at its end,
    and a loop that catches every exception in its body is not.
    """
    if not can_limit():
        return function()

    def run() -> Value:
        return function()

    def ring(number: int, frame: Any) -> None:
        while frame is not None:
            if frame.f_code is run.__code__:  # otherwise the function has just ended
                raise TimeUp
            frame = frame.f_back

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds or SECONDS, REPEAT)
    try:
        return run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Restore stdout, stderr, torch's random state and whether gradients are recorded at the end of the block.

    Warnings are not shown inside it. Numpy and Python draw from generators of their own in all lessons.
    """
    # :func:`watch` replaces stdout and stderr. The alarm may ring at any time, so before it has put them back.
    with (
        contextlib.redirect_stdout(sys.stdout),
        contextlib.redirect_stderr(sys.stderr),
        torch.random.fork_rng(devices=[]),
        torch.set_grad_enabled(torch.is_grad_enabled()),
        warnings.catch_warnings(action="ignore"),
        np.errstate(all="ignore"),
    ):
        yield


def file_of(answer: Any) -> str | None:
    """The file or cell in which a function or class is defined; None if it does not tell."""
    candidates = [answer, *vars(answer).values()] if isinstance(answer, type) else [answer]
    # Unwrapped, because the code of a method under a decorator, such as torch.no_grad(), is the decorator's.
    codes = (getattr(inspect.unwrap(each), "__code__", None) for each in candidates if callable(each))
    return next((code.co_filename for code in codes if code is not None), None)


# The verdict


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

    Torch's random state is as before, arguments are copied for each call, and what the answer prints is not shown.
    After :data:`SECONDS` an answer that still runs is stopped, as far as :func:`limited` can.

    Raises:
        KeyboardInterrupt: it is the only exception.
    """
    kind = "class" if isinstance(exercise.solution, type) else "function"
    if not callable(answer) or isinstance(exercise.solution, type) != isinstance(answer, type):
        call_of_check = f'check("{exercise.name}", {exercise.solution.__name__})'
        return Verdict(False, f"Pass the {kind} itself, without calling it: {call_of_check}.")
    rng = np.random.default_rng()  # no seed, so that no answer can be memorised
    try:
        with untouched():
            if exercise.inputs and (wrong := _by_inputs(exercise, answer, rng)):
                return wrong
            _warm_up(exercise)
            verdict = limited(lambda: _by_properties(exercise, answer, rng))
            if verdict.passed is not False:
                return verdict
            search = _searcher(exercise, answer, rng)
            return _beside(verdict, search(nearly.slips) or search(nearly.others))
    except TimeUp:
        return Verdict(False, ENDLESS.format(SECONDS))


def _by_inputs(exercise: Exercise, answer: Callable[..., Any], rng: np.random.Generator) -> Verdict | None:
    """Compare an answer with the solution on fresh inputs, and return what is wrong, if anything."""
    assert exercise.inputs is not None
    names = list(inspect.signature(exercise.solution).parameters)
    try:
        inspect.signature(answer).bind(*names)
    except (TypeError, ValueError):  # of other arguments, or written in C
        return Verdict(False, f"{exercise.solution.__name__} must take the arguments ({', '.join(names)}).")
    cases = [exercise.inputs(rng) for _ in range(exercise.draws)]
    expected = [call(exercise.solution, case, names) for case in cases]
    try:
        outcomes = limited(lambda: [call(answer, case, names) for case in cases])
    except TimeUp:
        search = _searcher(exercise, answer, rng, cases, expected)
        return _beside(Verdict(False, ENDLESS.format(SECONDS)), search(nearly.slips) or search(nearly.others))
    if any(each.value is ... or _is_stub(each.error, answer) for each in outcomes):
        return Verdict(None, NOT_STARTED)
    pairs = list(zip(outcomes, expected, strict=True))
    wrong = [number for number, (outcome, right) in enumerate(pairs) if not _agrees(outcome, right)]
    changed = sorted({name for outcome in outcomes for name in outcome.changed})
    if not wrong and not changed:
        return None

    def known_mistake() -> str | None:
        for mistake, sentence in exercise.mistakes:
            called = [call(mistake, case, names) for case in cases]
            if all(map(_agrees, outcomes, called)) and (wrong or any(each.changed for each in called)):
                return sentence
        return None

    smallest = min(wrong or range(len(cases)), key=lambda number: len(repr(cases[number])))
    example = _example(names, cases[smallest], *pairs[smallest])
    order = sorted(range(len(cases)), key=lambda number: number not in wrong)  # what is wrong first
    search = _searcher(exercise, answer, rng, [cases[i] for i in order], [expected[i] for i in order])
    if slip := search(nearly.slips):
        return Verdict(False, slip, example, outcomes[0].printed)
    sentence = None
    with contextlib.suppress(TimeUp):  # slow mistakes do not prolong the check
        sentence = limited(known_mistake)
    if sentence is not None:
        return Verdict(False, sentence, printed=outcomes[0].printed)
    near, sentence = search(nearly.others), _wrong_interface(answer, pairs, changed)
    if sentence is not None:
        return _beside(Verdict(False, sentence, printed=outcomes[0].printed), near)
    sentence = near or _differs_on_some(pairs) or _constant_factor(pairs)
    with contextlib.suppress(TimeUp):
        if sentence is None and (sentence := limited(lambda: _broken_property(exercise, answer, rng))):
            example = f"Where it differs:\n{example}"  # the property drew its own
    sentence = sentence or f"The result differs from the expected one on {len(wrong)} of {len(pairs)} inputs."
    return Verdict(False, sentence, example, outcomes[0].printed)


def _by_properties(exercise: Exercise, answer: Any, rng: np.random.Generator) -> Verdict:
    """Judge an answer by the first property that it lacks; they are what a graded sheet asks for, too."""
    for each in exercise.properties:
        for _ in range(TRIALS):
            outcome = attempt(each.holds, answer, rng)
            if _is_stub(outcome.error, answer):
                return Verdict(None, NOT_STARTED)
            if outcome.error is not None:
                return Verdict(False, _about_error(outcome.error, answer), printed=outcome.printed)
            if not outcome.value:
                sentence = each.sentence or f"On other inputs this is not true: {each.holds.__doc__}"
                return Verdict(False, sentence, printed=outcome.printed)
    return Verdict(True, exercise.praise)


def _beside(verdict: Verdict, sentence: str | None) -> Verdict:
    return replace(verdict, text=f"{verdict.text} {sentence}") if sentence else verdict


def _searcher(
    exercise: Exercise, answer: Any, rng: np.random.Generator, cases: Sequence = (), rights: Sequence = ()
) -> Callable[[Callable], str | None]:
    """Return a function that takes changes, and says which makes the answer right on these cases and all properties."""
    end = time.monotonic() + SEARCH_SECONDS
    names = list(inspect.signature(exercise.solution).parameters)
    constants = getattr(getattr(exercise.solution, "__code__", None), "co_consts", ())
    words = {each for each in itertools.chain(constants, *cases) if isinstance(each, str)}

    def is_right(candidate: Any) -> bool:
        for case, right in zip(cases, rights, strict=True):
            called = call(candidate, case, names)
            if called.changed or not _agrees(called, right):
                return False
        trials = [each.holds for each in exercise.properties for _ in range(TRIALS)]
        return all(attempt(holds, candidate, rng).value for holds in trials)

    def passes(candidate: Any) -> bool:
        try:
            return limited(lambda: is_right(candidate), CHANGE_SECONDS)
        except TimeUp:
            return False

    def search(changes: Callable) -> str | None:
        changes = functools.partial(changes, words=words) if changes is nearly.slips else changes
        return nearly.find_change(answer, changes, passes, lambda: time.monotonic() < end) if can_limit() else None

    return search


@functools.cache
def _warm_up(exercise: Exercise) -> None:
    """Try the solution, so that imports at first use do not count as the answer's time."""
    for each in exercise.properties:
        each.holds(exercise.solution, np.random.default_rng())


def _agrees(outcome: Called, reference: Called) -> bool:
    """Return whether a call returned or raised what another did."""
    return repr(outcome.error) == repr(reference.error) and same(outcome.value, reference.value)


Pairs = Sequence[tuple[Called, Called]]  # what the answer did, and what the solution did


def _wrong_interface(answer: Callable[..., Any], pairs: Pairs, changed: Sequence[str]) -> str | None:
    """Return an error, a difference of type or shape on all inputs, or a changed argument; else None."""
    if error := next((outcome.error for outcome, _ in pairs if outcome.error is not None), None):
        return _about_error(error, answer)
    differences = [difference(outcome.value, right.value) for outcome, right in pairs]
    if all(differences):
        return differences[0]
    if changed:
        return f"Your function changes its argument {changed[0]} in place. Work on a copy of {changed[0]}."
    return None


def _differs_on_some(pairs: Pairs) -> str | None:
    """Return the first difference of type or shape, and on how many inputs, if all wrong results differ so."""
    wrong = [(outcome, right) for outcome, right in pairs if not _agrees(outcome, right)]
    differences = [difference(outcome.value, right.value) for outcome, right in wrong]
    if not all(differences):
        return None
    if wrong[0][0].value is None and any(right.value is None for _, right in pairs):  # so None can be an answer
        differences[0] = "The result is None, although there is an answer."
    return f"On {len(wrong)} of {len(pairs)} inputs: {differences[0]}"


def _constant_factor(pairs: Pairs) -> str | None:
    """Return by what factor all results are wrong, if it is the same."""
    # NaN where there is no factor.
    factors = np.array([factor(outcome.value, right.value) for outcome, right in pairs], dtype=float)
    if np.allclose(factors, factors[0], rtol=1e-3):
        return f"The result is {factors[0]:.3g} times what it should be, on all inputs. A factor is wrong."
    return None


def _broken_property(exercise: Exercise, answer: Any, rng: np.random.Generator) -> str | None:
    """Return the first property that the results lack, if any."""
    for each in exercise.properties:
        outcomes = [attempt(each.holds, answer, rng) for _ in range(TRIALS)]
        if any(outcome.error is None and not outcome.value for outcome in outcomes):
            return each.sentence or f"This is not true on every input: {each.holds.__doc__}"
    return None


def _about_error(error: BaseException, answer: Any) -> str:
    """Return an error with its message, and the learner's line that led to it."""
    file, where = file_of(answer), ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if lines and lines[-1] is not None:
        text = linecache.getline(str(file), lines[-1]).strip()
        where = f" in line {lines[-1]}" + (f" ({text})" if text else "")
    message = shortened(str(error))
    advice = next((f". {advice}" for words, advice in ADVICE.items() if words in message), "")
    return f"Your code stops with {type(error).__name__}{where}" + (f": {message}{advice}" if message else ".")


def _is_stub(error: BaseException | None, answer: Any) -> bool:
    """Return whether an error is a hole, or a NotImplementedError that the learner's file itself raises."""
    if isinstance(error, NameError):
        return error.name == HOLE
    if not isinstance(error, NotImplementedError):
        return False
    return file_of(answer) in (None, traceback.extract_tb(error.__traceback__)[-1].filename)


def _example(names: Sequence[str], case: Sequence[Any], outcome: Called, right: Called) -> str:
    """Return inputs and both results, as aligned text; of large results the entry that differs most."""
    rows = dict(zip(names, case, strict=True))
    array, expected = as_array(outcome.value), as_array(right.value)
    if array is not None and expected is not None and array.shape == expected.shape and expected.size > SHOWN:
        index = np.unravel_index(np.argmax(np.abs(array - expected)), expected.shape)
        entry = f"[{', '.join(map(str, index))}]"
        rows |= {f"your result{entry}": array[index], f"expected{entry}": expected[index]}
    else:
        rows |= {"your result": outcome.value, "expected": right.value}
    width = max(map(len, rows))
    indent = "\n" + " " * (width + 3)
    return "\n".join(f"{label:<{width}} = {SHORT.repr(value)}".replace("\n", indent) for label, value in rows.items())


# Values


def as_array(value: Any) -> np.ndarray | None:
    """Return a number, array or tensor as an array; None for everything else."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        array = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    elif isinstance(value, np.ndarray | np.generic | bool | int | float | complex):
        array = np.asarray(value)
    else:
        return None
    return array if array.dtype.kind in _MATCHING_KINDS else None


def same(value: Any, expected: Any, rtol: float = TOLERANCE) -> bool:
    """Return whether a value equals another; floats up to a tolerance, relative to the largest that is expected."""
    array, reference = as_array(value), as_array(expected)
    if array is not None and reference is not None:
        if array.shape != reference.shape or array.dtype.kind not in _MATCHING_KINDS[reference.dtype.kind]:
            return False
        equal = bool((array == reference).all())
        if equal or reference.dtype.kind in "biu":
            return equal
        scale = np.max(np.abs(reference), initial=1e-6, where=np.isfinite(reference))
        return np.allclose(array, reference, rtol=0.0, atol=rtol * scale, equal_nan=True)
    if isinstance(expected, Mapping):
        keys = isinstance(value, Mapping) and value.keys() == expected.keys()
        return keys and all(same(value[key], expected[key], rtol) for key in expected)
    if isinstance(expected, list | tuple):
        length = isinstance(value, list | tuple) and len(value) == len(expected)
        return length and all(same(*pair, rtol) for pair in zip(value, expected, strict=True))
    return reference is None and type(value) is type(expected) and bool(value == expected)


def difference(value: Any, expected: Any, subject: str = "The result") -> str | None:
    """Return a sentence about a difference of type, shape, kind of number or NaN; None if there is none of these.

    Args:
        subject: what the value is, at the beginning of the sentence.
    """
    if value is None:
        return None if expected is None else f"{subject} is None. Is the return missing?"
    array, reference = as_array(value), as_array(expected)
    if array is not None and reference is not None:
        return _difference_of_arrays(array, reference, subject)
    if isinstance(expected, Mapping) and isinstance(value, Mapping):
        if value.keys() != expected.keys():
            return f"{subject} has the keys {reprlib.repr([*value])}, but it should have {[*expected]}."
        parts = [(value[key], expected[key], f"The entry {key!r}") for key in expected]
    elif isinstance(expected, list | tuple) and isinstance(value, list | tuple):
        if len(value) != len(expected):
            return f"{subject} has {len(value)} items, but it should have {len(expected)}."
        parts = [(value[i], expected[i], f"Item {i} of the result") for i in range(len(expected))]
    elif reference is not None or type(value) is not type(expected):
        return f"{subject} is {_type_of(value)}, but it should be {_type_of(expected)}."
    else:
        return None
    return next(filter(None, (difference(*part) for part in parts)), None)


def _difference_of_arrays(array: np.ndarray, reference: np.ndarray, subject: str) -> str | None:
    if array.shape != reference.shape:
        if array.ndim == 2 and array.shape == reference.shape[::-1]:
            return f"{subject} is transposed: its shape is {array.shape}, but it should be {reference.shape}."
        if reference.shape and array.shape:
            return f"{subject} has the shape {array.shape}, but it should have {reference.shape}."
        one, other = (f"an array of shape {each.shape}" if each.shape else "a number" for each in (array, reference))
        return f"{subject} is {one}, but it should be {other}."
    kind = reference.dtype.kind
    if array.dtype.kind not in _MATCHING_KINDS[kind]:
        return f"{subject} consists of {_KIND_NAMES[array.dtype.kind]}, but {_KIND_NAMES[kind]} are expected."
    if not np.isfinite(array).all() and np.isfinite(reference).all():
        return f"{subject} holds {'NaN' if np.isnan(array).any() else 'infinity'}."
    return None


def factor(value: Any, expected: Any) -> float | None:
    """Return the real number c, not 0 or 1, for which a value is c times another, up to rounding; None without one."""
    array, reference = as_array(value), as_array(expected)
    if array is None or reference is None or array.shape != reference.shape:
        return None
    array, reference = array.astype(complex), reference.astype(complex)
    square = np.vdot(reference, reference).real
    if square == 0.0 or not np.isfinite(array).all():
        return None
    ratio = float(np.vdot(reference, array).real / square)  # of least squares
    return ratio if abs(ratio - 1) > 1e-4 and abs(ratio) > 1e-9 and same(array, ratio * reference) else None


class _Short(reprlib.Repr):
    """Values as short texts, with rounded numbers; large arrays by their shape."""

    def repr1(self, x: Any, level: int) -> str:
        array = as_array(x)
        if array is None:
            return super().repr1(x, level)
        if array.size > SHOWN:
            return f"an array of shape {array.shape}"
        if array.ndim:
            return np.array2string(array, precision=3, suppress_small=True, max_line_width=80)
        return f"{array.item():.4g}" if array.dtype.kind == "f" else str(array.item())

    def repr_dict(self, x: dict, level: int) -> str:
        """In its own order; the parent class sorts the keys."""
        pairs = [f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for key, value in x.items()]
        return f"{{{', '.join(pairs[: self.maxdict])}{', ...' * (len(pairs) > self.maxdict)}}}"


SHORT = _Short()
SHORT.maxdict = SHORT.maxlist = SHORT.maxtuple = SHOWN


def _type_of(value: Any) -> str:
    array = as_array(value)
    if array is None:
        return "None" if value is None else f"of type {type(value).__name__}"
    return f"an array of shape {array.shape}" if array.ndim else "a number"
