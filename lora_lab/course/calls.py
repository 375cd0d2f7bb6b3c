"""Calls of a learner's code that leave no trace: copied arguments, captured output, a time limit, errors as values."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch

from lora_lab.course.values import same

Value = TypeVar("Value")
REPEAT = 0.02  # seconds until the alarm rings again, in case the code has caught the exception


class TimeUp(BaseException):
    """The time limit has passed."""


@dataclass(frozen=True)
class Outcome:
    """What a call did.

    Attributes:
        value: what it returned; None after an error.
        error: what it raised, if anything.
        changed: names of the arguments that it changed in place.
        printed: what it printed.
        gradients: those of the sum of the value, by the name of the argument, for tensors that require one.
    """

    value: Any
    error: BaseException | None
    changed: frozenset[str]
    printed: str
    gradients: Mapping[str, torch.Tensor | None]


def call(function: Callable[..., Any], arguments: Sequence[Any], names: Sequence[str]) -> Outcome:
    """Call a function with copies of the arguments.

    Args:
        names: of the arguments.

    Raises:
        TimeUp, KeyboardInterrupt: nothing else is raised, SystemExit included.
    """
    copies = copy.deepcopy(tuple(arguments))
    value, error, printed = None, None, io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            value = function(*copies)
    except (TimeUp, KeyboardInterrupt):
        raise
    except BaseException as raised:
        error = raised
    before_and_after = zip(names, arguments, copies, strict=True)
    changed = frozenset(name for name, before, after in before_and_after if _differs(after, before))
    return Outcome(value, error, changed, printed.getvalue(), _gradients(value, dict(zip(names, copies, strict=True))))


def _gradients(value: Any, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor | None]:
    tensors = {name: each for name, each in arguments.items() if isinstance(each, torch.Tensor) and each.requires_grad}
    if not tensors or not isinstance(value, torch.Tensor) or not value.requires_grad:
        return dict.fromkeys(tensors)
    gradients = torch.autograd.grad(value.sum(), list(tensors.values()), allow_unused=True)
    return dict(zip(tensors, gradients, strict=True))


def _differs(after: Any, before: Any) -> bool:
    """Whether an argument was changed; False for objects that do not even equal a copy of themselves."""
    return not same(after, before, 0.0, 0.0) and same(copy.deepcopy(before), before, 0.0, 0.0)


def limited(function: Callable[[], Value], seconds: float) -> Value:
    """Return ``function()``, or raise :class:`TimeUp` if it takes longer.

    The limit holds for Python code in the main thread on systems with SIGALRM, such as Linux and macOS; elsewhere there
    is none. A single long call of a compiled library, such as a large matrix multiplication, is interrupted at its end,
    and a loop that catches every exception in its body is not.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        return function()
    if seconds <= 0:
        raise TimeUp

    def run() -> Value:
        return function()

    def ring(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is run.__code__:  # otherwise the function has just ended
                raise TimeUp
            frame = frame.f_back

    started = time.monotonic()
    previous = signal.signal(signal.SIGALRM, ring)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT)
    try:
        return run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if previous is None else previous)
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - started), 1e-6), interval)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Restore at the end of the block the state of the global random generators and whether gradients are recorded.

    Warnings are not shown inside it.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  # it is the global one
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"), torch.set_grad_enabled(torch.is_grad_enabled()):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def file_of(answer: Any) -> str | None:
    """The file or cell in which a function or class is defined; None if it does not tell."""
    candidates = [answer, *vars(answer).values()] if isinstance(answer, type) else [answer]
    # Unwrapped, because the code of a method under a decorator, such as torch.no_grad(), is the decorator's.
    codes = (getattr(inspect.unwrap(each), "__code__", None) for each in candidates if callable(each))
    return next((code.co_filename for code in codes if code is not None), None)
