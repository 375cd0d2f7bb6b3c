"""What the learner calls: ``check``, ``hint``, ``progress`` and ``keep``.

In a folder that ``lora-lab course`` has written, passed exercises are remembered in the file
``progress.json``; elsewhere until the kernel stops.
"""

from __future__ import annotations

import difflib
import html
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from IPython.display import display

import lora_lab.course.exercises  # noqa: F401  # registers them
from lora_lab.course.exercise import EXERCISES, Exercise
from lora_lab.course.judge import judge
from lora_lab.system import schema
from lora_lab.system.files import read_json, write_json

MANIFEST = ".lora_lab_course.json"  # a folder with this file is a learner's copy of the lessons
PROGRESS = "progress.json"
PRINTED = 1000  # of what an answer printed, so many characters are shown
GREEN, AMBER, GREY = "#009e73", "#e69f00", "#999999"
State = Literal["done", "tried"]
_ICONS = {GREEN: "✓", AMBER: "✗", GREY: "○"}


_states: dict[str, str] = {}  # of the exercises that this kernel has checked
_hints_shown: dict[str, int] = {}


@dataclass(frozen=True)
class Box:
    """A few sentences: a box with an icon in a notebook, plain text elsewhere.

    Attributes:
        title: a word or two, in bold.
        text: sentences.
        example: text in columns.
        footer: a last sentence.
        colour: of the edge, beside the icon and the title, which say the same.
    """

    title: str
    text: str
    example: str = ""
    footer: str = ""
    colour: str = GREY

    def __repr__(self) -> str:
        lines = [f"{_ICONS[self.colour]} {self.title} {self.text}".rstrip(), self.example, self.footer]
        return "\n".join(filter(None, lines))

    def _repr_html_(self) -> str:
        parts = [f"<b>{_ICONS[self.colour]} {html.escape(self.title)}</b> {html.escape(self.text)}"]
        if self.example:
            parts.append(f'<pre style="margin: 0.5em 0">{html.escape(self.example)}</pre>')
        if self.footer:
            parts.append(f"<div><i>{html.escape(self.footer)}</i></div>")
        style = f"border-left: 6px solid {self.colour}; padding: 0.4em 0.8em; margin: 0.3em 0"
        return f'<div style="{style}">{"".join(parts)}</div>'


class Passed(int):
    """True or False, without a line of output of its own where a cell ends with it."""

    def __repr__(self) -> str:
        return repr(bool(self))

    def _ipython_display_(self) -> None:
        """Nothing: :func:`check` has displayed its box already."""


def check(name: str, answer: Any) -> Passed:
    """Check an answer to an exercise on fresh inputs, and say what is wrong with it.

    Args:
        name: of the exercise, such as "forward".
        answer: the function or class itself, such as ``forward`` and not ``forward(x)``.

    Returns:
        Whether it is right. Nothing is raised, whatever the answer does.
    """
    exercise = _look_up(name)
    if exercise is None:
        return Passed(False)
    verdict = judge(exercise, answer)
    if verdict.passed:
        _states[name] = "done"
        display(Box("Correct.", verdict.text, footer=_remember(), colour=GREEN))
    elif verdict.passed is None:
        display(Box("Open.", verdict.text, footer=_about_hints(exercise)))
    else:
        _states.setdefault(name, "tried")
        example = verdict.example
        if printed := verdict.printed.strip():
            example = f"{example}\n\nIt printed:\n{printed[:PRINTED]}".lstrip()
        footer = " ".join(filter(None, [_about_hints(exercise), _remember()]))
        display(Box("Not yet.", verdict.text, example, footer, AMBER))
    return Passed(bool(verdict.passed))


def hint(name: str) -> None:
    """Show the next hint of an exercise, one more at each call."""
    exercise = _look_up(name)
    if exercise is None:
        return
    shown, count = _hints_shown.get(name, 0), len(exercise.hints)
    if shown < count:
        _hints_shown[name] = shown + 1
        display(Box(f"Hint {shown + 1} of {count}.", exercise.hints[shown]))
    else:
        display(Box("That was the last hint.", exercise.hints[-1]))


def progress(lesson: str = "") -> None:
    """Show which exercises are done, tried and open.

    Args:
        lesson: the beginning of a lesson's name, such as "03"; all lessons by default.
    """
    states = _recall()
    chosen = [each for each in EXERCISES.values() if each.stated.lesson.startswith(lesson)]
    left = [each for each in chosen if states.get(each.name) != "done"]
    minutes = sum(each.stated.minutes for each in left)
    title = f"{len(chosen) - len(left)} of {len(chosen)} exercises done."
    rest = f"The others take about {minutes} minutes." if left else ""
    display(Box(title, rest, _align(chosen, states), colour=GREY if left else GREEN))


@cache
def keep(name: str) -> Path:
    """Return the path of a file or folder that stays: beside the learner's lessons, or elsewhere in a temporary folder.

    So a lesson that is run in the repository leaves nothing there.
    """
    return Path(name).absolute() if Path(MANIFEST).is_file() else Path(tempfile.mkdtemp()) / name


def _align(exercises: Iterable[Exercise], states: Mapping[str, str]) -> str:
    """Return a line for each exercise, in columns: its lesson, its name, what became of it, and its minutes."""
    marks = {"done": "✓ done", "tried": "✗ tried"}
    rows = [("lesson", "exercise", "state", "minutes")]
    for each in exercises:
        state = marks.get(states.get(each.name, ""), "○ open")
        rows.append((each.stated.lesson, each.name, state, str(each.stated.minutes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _look_up(name: str) -> Exercise | None:
    """Return the exercise of that name; if there is none, say so."""
    if name not in EXERCISES:
        close = difflib.get_close_matches(str(name), EXERCISES, 1)
        advice = f"Did you mean {close[0]!r}?" if close else "progress() lists all exercises."
        display(Box("No such exercise.", f"There is no exercise with the name {name!r}. {advice}", colour=AMBER))
    return EXERCISES.get(name)


def _about_hints(exercise: Exercise) -> str:
    shown, count = _hints_shown.get(exercise.name, 0), len(exercise.hints)
    if shown == count:
        return ""
    which = f"the first of {count} hints" if shown == 0 else f"hint {shown + 1} of {count}"
    return f'hint("{exercise.name}") gives {which}.'


def _recall() -> dict[str, str]:
    """Return what became of each exercise that was checked, in this kernel or before.

    A ``progress.json`` that is damaged is moved aside, and a box says so.
    """
    stored = {}
    if Path(MANIFEST).is_file() and Path(PROGRESS).is_file():
        try:
            stored = schema.check(read_json(PROGRESS), dict[str, State])
        except ValueError:
            aside = f"progress-damaged-{time.time_ns()}.json"
            Path(PROGRESS).replace(aside)
            text = f"{PROGRESS} was damaged and is now {aside}; a new one starts, so check again what you had done."
            display(Box("Damaged.", text, colour=AMBER))
    done = {name: state for name, state in stored.items() if state == "done"}
    return stored | _states | done  # what is done stays done


def _remember() -> str:
    """Save which exercises are done and tried, in a learner's folder; return a sentence if that fails."""
    if not Path(MANIFEST).is_file():
        return ""
    try:
        write_json(PROGRESS, _recall())
    except OSError as error:
        return f"{PROGRESS} could not be written ({error.strerror}), so this is remembered until the kernel stops."
    return ""
