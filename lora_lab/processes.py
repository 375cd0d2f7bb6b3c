"""A process of its own for each thing measured, so that one's memory is not counted with another's."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any


def apart(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What ``function(*arguments)`` returns, called in a fresh process.

    Args:
        function: importable by name, as are the classes of arguments and result.
        environment: variables that the process has besides this one's.

    Raises:
        MemoryError: the system ended the process, most likely for lack of memory.
        Exception: whatever the function raises.
    """
    context = multiprocessing.get_context("spawn")  # a forked one would share this one's memory, and torch's threads
    try:
        with _added(environment or {}), ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise MemoryError(
            "The process that trains was ended by the system, most likely for lack of memory: "
            "full fine-tuning of SmolLM2-135M needs about 4 GiB free."
        ) from None


@contextmanager
def _added(environment: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
