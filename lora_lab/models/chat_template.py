"""A model's chat template: a program that a stranger may have written, rendered with limits of time and memory.

Jinja's sandbox denies it everything but text. But two loops in each other never end, ``x + x`` forty times fills the
memory, and nothing in the same process can interrupt Python within one such operation. So a template is rendered in a
process of its own, which ends itself. That costs 80 ms once and 45 us for each text, where rendering takes 20.

This file is also the program of that process, so it imports nothing of the package.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from functools import cache
from threading import Lock
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SECONDS = 5  # for one text
_MEMORY = 2**30  # bytes, for the process
_PASSED = f"it takes more than {_SECONDS} s or {_MEMORY / 2**30:g} GiB"
# A text is at most so many letters longer than this many times what it is made from.
_LETTERS, _TIMES = 2**20, 10
_one_at_a_time = Lock()


class _GenerationTag(Extension):
    """``{% generation %}`` and ``{% endgeneration %}``, between which a template writes what the assistant says."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, variables: dict[str, Any]) -> str:
    """Return the text that a template makes of its variables, which are values of JSON.

    Besides Jinja's own it may use what transformers offers. Only a template that insists on ``strftime_now`` gets it:
    most have a fixed date without it, and with it a task would be another one every day.

    Raises:
        Exception: of any class, with what is wrong with the template or the variables.
        ValueError: the text would take more time, memory or letters than a text can need.
    """
    with _one_at_a_time:
        if _process(os.getpid()).poll() is not None:  # somebody has killed it
            _process.cache_clear()
        process = _process(os.getpid())
        try:
            process.stdin.write(json.dumps([template, variables]).encode() + b"\n")  # pyright: ignore
            process.stdin.flush()  # pyright: ignore
            text, reason = json.loads(process.stdout.readline())  # pyright: ignore
        except BaseException as error:  # of KeyboardInterrupt too: the answer would be taken for the next text's
            process.kill()
            process.communicate()
            _process.cache_clear()
            if isinstance(error, OSError | ValueError):  # it ended itself
                raise ValueError(_PASSED) from None
            raise
    if reason is not None:
        raise ValueError(reason)
    return text


@cache
def _compile(template: str) -> jinja2.Template:
    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes for HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = tojson
    if "strftime_now is defined" not in template:
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)


@cache
def _process(owner: int) -> subprocess.Popen[bytes]:
    """Return the process that renders for process ``owner``: a fork must not use its parent's."""
    return subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C in a terminal ends only the program
    )


def _limit_memory() -> None:
    """Let this process have no more memory than its limit; Windows and macOS have no such limit."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


def _serve() -> None:
    """Answer requests, one a line, until there are no more; the process ends where a limit is passed."""
    _limit_memory()
    for line in sys.stdin.buffer:
        faulthandler.dump_traceback_later(_SECONDS, exit=True)  # a timer, which ends the process if it is not stopped
        try:
            template, variables = json.loads(line)
            text, reason = _compile(template).render(**variables), None
            if len(text) > _LETTERS + _TIMES * len(line):
                text, reason = None, f"it makes a text of {len(text):,} letters"
        except MemoryError:
            text, reason = None, _PASSED
        except Exception as error:
            text, reason = None, str(error) or type(error).__name__
        sys.stdout.buffer.write(json.dumps([text, reason]).encode() + b"\n")
        sys.stdout.buffer.flush()
        faulthandler.cancel_dump_traceback_later()  # stop the timer


if __name__ == "__main__":
    _serve()
