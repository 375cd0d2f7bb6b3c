"""What a case is, and which name its outcome has."""

from __future__ import annotations

import dis
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_lab

PACKAGE = Path(lora_lab.__file__).parent
LONGEST_MESSAGE = 1500

# Each outcome that a case may have. The first two are as they should be, and the next two are let through.
OUTCOMES = {
    "accepted": "it was read, and nothing is wrong with what was read, as far as the case can see",
    "clean": "one sentence that the package wrote; whether it names a remedy is not seen",
    "foreign": "torch's words, where what was passed runs a model on data that it is not for: let through for the "
    "arguments in api.RUN",
    "wrong type": "Python's words for an object of another type than the argument's: let through for the arguments in "
    "api.LET_THROUGH",
    "too long": "a permitted error without a message, or whose message has several lines or too many letters",
    "crash": "an error of another class, or in the words of Python, torch or a library, where a check is missing",
    "late": "it was accepted, and the first use of it raised an error that is no sentence of the package",
    "hang": "it did not end",
    "slow": "it ended, but took far longer than it should, its child processes included",
    "memory": "it took far more memory than the input is large",
    "segfault": "a signal of the system ended the process, such as one for a wrong address",
    "silent": "it was accepted, although something is wrong that could have been seen",
    "lost": "something that was there before is gone or damaged",
    "refused": "nothing is wrong with the input, and yet it was refused",
}
BAD = tuple(OUTCOMES)[4:]

_PERMITTED = (ValueError, OSError, RuntimeError, ModuleNotFoundError)


class Sentence(ValueError):
    """What a command printed about an error, which counts as a sentence of the package."""


@dataclass(frozen=True)
class Case:
    """One input, what is called with it, and how to see whether the result is any good.

    Args:
        what: the damage, in words.
        call: what a user would call. An error here must be one sentence.
        use: looks at what ``call`` returned, and yields a complaint for each thing that is wrong with it.
        after_error: yields a complaint for each thing that an error of ``call`` should have left alone.
        complaint: which outcome a complaint is, "silent" or "lost".
        python: called from Python, where the package may also raise a TypeError or an AttributeError.
        wrong_type: an argument has another type than it should, and Python's words for that are let through.
        foreign: a model or its data is odd, and torch's words are let through.
        good: nothing is wrong with the input, so any error is one of the package.
    """

    what: str
    call: Callable[[], Any]
    use: Callable[[Any], Iterable[str]] = lambda result: ()
    after_error: Callable[[], Iterable[str]] = lambda: ()
    complaint: str = "silent"
    python: bool = False
    wrong_type: bool = False
    foreign: bool = False
    good: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Args:
        name: one of :data:`OUTCOMES`.
        error: the class of the exception, or "".
        where: the last line of the package that was involved, as "models/llama.py:12".
        message: of the exception, or the complaints.
    """

    name: str
    error: str = ""
    where: str = ""
    message: str = ""


def outcome_of(case: Case) -> Outcome:
    """Run a case in this process."""
    try:
        result = case.call()
    except BaseException as error:
        outcome = outcome_of_error(error, case)
        if case.good and outcome.name != "memory":
            return Outcome("refused", outcome.error, outcome.where, outcome.message)
        changed = [*case.after_error()] if outcome.name not in BAD else []
        return Outcome(case.complaint, message="; ".join(changed)) if changed else outcome
    try:
        complaints = [*case.use(result)]
    except BaseException as error:
        outcome = outcome_of_error(error, case)
        late = outcome.name not in ("clean", "wrong type", "memory")
        return Outcome("late", outcome.error, outcome.where, outcome.message) if late else outcome
    return Outcome(case.complaint, message="; ".join(complaints)) if complaints else Outcome("accepted")


def outcome_of_error(error: BaseException, case: Case) -> Outcome:
    """The outcome that an exception is."""
    message, where, ours = str(error), last_line(error), _raised_by_package(error)
    permitted = (*_PERMITTED, TypeError, AttributeError) if case.python and ours else _PERMITTED
    if isinstance(error, MemoryError) or "can't allocate memory" in message:
        name = "memory"
    elif case.wrong_type and not ours and _is_of_a_type(error):
        name = "wrong type"
    elif case.foreign and not ours and _is_torchs(error):
        name = "foreign"
    elif not isinstance(error, permitted) or not ours:
        name = "crash"
    elif not message.strip() or "\n" in message.strip() or len(message) > LONGEST_MESSAGE:
        name = "too long"
    else:
        name = "clean"
    return Outcome(name, type(error).__name__, where, message[:300])


def _is_of_a_type(error: BaseException) -> bool:
    """Whether an error of Python or a library is one for an object of the wrong type."""
    array_as_condition = isinstance(error, ValueError | RuntimeError) and "ambiguous" in str(error)
    return isinstance(error, TypeError | AttributeError) or array_as_condition


def _is_torchs(error: BaseException) -> bool:
    """Whether an error is one of torch about tensors, and not Python's own RuntimeError."""
    pythons = isinstance(error, RecursionError) or "StopIteration" in str(error)
    return isinstance(error, RuntimeError) and not pythons


def last_line(error: BaseException) -> str:
    """The last line of the package in an exception's traceback, as "models/llama.py:12"."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(PACKAGE)]
    return f"{Path(frames[-1].filename).relative_to(PACKAGE).as_posix()}:{frames[-1].lineno}" if frames else ""


def _raised_by_package(error: BaseException) -> bool:
    """Whether a ``raise`` statement of the package made it, and not a library that the package called."""
    if isinstance(error, Sentence):
        return True
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None or not Path(step.tb_frame.f_code.co_filename).is_relative_to(PACKAGE):
        return False
    return dis.opname[step.tb_frame.f_code.co_code[step.tb_lasti]] == "RAISE_VARARGS"
