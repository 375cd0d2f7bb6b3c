"""A model's chat template: a program that a stranger may have written, rendered with limits of time and memory.

Jinja's sandbox denies it everything but text. But two loops in each other never end, ``x + x`` forty times fills the
memory, and nothing in the same process can interrupt Python within one such operation. So templates are rendered in a
process of their own, which the system ends. That costs 80 ms once and 45 us for each text, where rendering takes 20;
what cannot take long, such as most texts by SmolLM2's template, is rendered here.

This file is also the program of that process, so it imports nothing of the package.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from functools import cache
from threading import Lock
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SECONDS = 2  # of the processor, for one text
_MEMORY = 2**30  # bytes, for the process
_PASSED = f"it takes more than {_SECONDS} s or {_MEMORY / 2**30:g} GiB"
# A text is at most so many letters longer than this many times what it is made from.
_LETTERS, _TIMES = 2**20, 10
# A template of these parts alone, whose loops are over the messages and in no other loop, computes each part at most
# once for each message, and no part is longer than template and messages together.
_SIMPLE = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Name, nodes.Const, nodes.Getattr,
    nodes.Getitem, nodes.Add, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not,
)  # fmt: skip
_LONGEST_SIMPLE = 10_000  # letters of a template
_FEW = 10**8  # letters that all parts can write together


class _GenerationTag(Extension):
    """``{% generation %}`` and ``{% endgeneration %}``, between which a template writes what the assistant says."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, variables: dict[str, Any]) -> str:
    """The text that a template makes of its variables, which are values of JSON.

    Besides Jinja's own it may use what transformers offers. Only a template that insists on ``strftime_now`` gets it:
    most have a fixed date without it, and with it a task would be another one every day.

    Raises:
        Exception: of any class, with what is wrong with the template or the variables.
        ValueError: the text would take more time, memory or letters than a text can need.
    """
    letters = _simple_parts(template) * len(variables["messages"]) * (len(template) + len(str(variables)))
    return _rendered(template, variables) if letters <= _FEW else _by_process([template, variables])


@cache
def _simple_parts(template: str) -> float:
    """The number of a simple template's parts; infinity for any other template."""
    if len(template) > _LONGEST_SIMPLE:
        return math.inf
    tree = _environment(template).parse(template)
    parts, loops = list(tree.find_all(nodes.Node)), list(tree.find_all(nodes.For))
    over_messages = all(isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages" for loop in loops)
    nested = any(inner for loop in loops for inner in loop.find_all(nodes.For))
    simple = over_messages and not nested and all(isinstance(part, _SIMPLE) for part in parts)
    return len(parts) if simple else math.inf


def _environment(template: str) -> jinja2.Environment:
    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes for HTML

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = tojson
    if "strftime_now is defined" not in template:
        environment.globals["strftime_now"] = strftime_now
    return environment


@cache
def _compiled(template: str) -> jinja2.Template:
    return _environment(template).from_string(template)  # takes longer than rendering


def _rendered(template: str, variables: dict[str, Any]) -> str:
    return _compiled(template).render(**variables)


# The process


_one_at_a_time = Lock()
_running: dict[int, subprocess.Popen[bytes]] = {}  # by the process that started it: a fork must not use its parent's


def _by_process(request: list[Any]) -> str:
    line = json.dumps(request).encode() + b"\n"
    with _one_at_a_time:
        process = _running.get(os.getpid())
        if process is None or process.poll() is not None:
            process = _running[os.getpid()] = _start()
        try:
            with suppress(BrokenPipeError):  # it was ended while it read the line
                process.stdin.write(line)  # pyright: ignore[reportOptionalMemberAccess]
                process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
            answer = process.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
            if not answer:
                raise ValueError(_PASSED)
        except BaseException:  # such as a KeyboardInterrupt, after which the answer would be taken for the next one's
            _end()
            raise
    text, reason = json.loads(answer)
    if reason is not None:
        raise ValueError(reason)
    return text


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C in a terminal ends only this process
    )


@atexit.register
def _end() -> None:
    process = _running.pop(os.getpid(), None)
    if process is not None:
        process.kill()
        process.communicate()


def _serve() -> None:
    """Answer requests, one a line, until there are no more; the system ends the process where a limit is passed."""
    _limit_memory()
    for line in sys.stdin.buffer:
        _set_timer(_SECONDS)
        template, variables = json.loads(line)
        try:
            text, reason = _rendered(template, variables), None
            if len(text) > _LETTERS + _TIMES * len(line):
                text, reason = None, f"it makes a text of {len(text):,} letters"
        except Exception as error:
            text, reason = None, _PASSED if isinstance(error, MemoryError) else str(error) or type(error).__name__
        sys.stdout.buffer.write(json.dumps([text, reason]).encode() + b"\n")
        sys.stdout.buffer.flush()
        _set_timer(0)


def _limit_memory() -> None:
    if sys.platform != "win32":  # which has no such limit
        import resource

        with suppress(ValueError, OSError):  # there is a lower limit, or the system (macOS) knows none
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


def _set_timer(seconds: int) -> None:
    """Let the system end this process when it has computed so long; 0 turns that off."""
    if sys.platform != "win32":
        import signal

        signal.setitimer(signal.ITIMER_PROF, seconds)
        return
    import faulthandler

    faulthandler.cancel_dump_traceback_later()
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)


if __name__ == "__main__":
    _serve()
