"""Words for messages: a count with its noun, and a long text or value in short."""

from __future__ import annotations

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxother = 200  # such as a path


def counted(count: int, noun: str) -> str:
    """A count and its noun, in the plural unless it is one: "1 thread", "1,200 tokens"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def shortened(text: str, most: int = 300) -> str:
    """A text on one line, cut off after ``most`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 4] + " ..."


def short_repr(value: Any) -> str:
    """A value's repr on one line, cut off in the middle if it is long, as that of a model or a tensor."""
    try:
        return shortened(_SHORT.repr(value))
    except ValueError:  # Python refuses to write an integer of thousands of digits
        return "a number of very many digits"
