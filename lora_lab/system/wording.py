"""Words for messages: a count with its noun, and a long text in short."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """A count and its noun, in the plural unless it is one: "1 thread", "1,200 tokens"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def shortened(text: str, most: int = 300) -> str:
    """A text on one line, cut off after ``most`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 4] + " ..."
