"""What people are shown: words for messages, and the progress bar."""

from __future__ import annotations

import os
import reprlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

_SHORT = reprlib.Repr()
_SHORT.maxother = 200  # such as a path


def count_noun(count: int, noun: str) -> str:
    """Return a count and its noun, in the plural unless it is one: "1 thread", "1,200 tokens"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def shortened(text: str, most: int = 300) -> str:
    """Return a text on one line, cut off after ``most`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 4] + " ..."


def short_repr(value: object) -> str:
    """Return a value's repr on one line, cut off in the middle if it is long, as that of a model or a tensor."""
    return shortened(_SHORT.repr(value))


def progress_bar(total: int, label: str, progress: bool | None, unit: str = "step", done: int = 0) -> tqdm:
    """Return a progress bar over ``total`` units, ``done`` of them already done.

    Args:
        progress: whether to show it; None shows it in a terminal or notebook, unless LORA_LAB_PROGRESS is 0.
    """
    from tqdm.auto import tqdm

    if progress is not None:
        hidden = not progress
    elif sys.stderr is None or os.environ.get("LORA_LAB_PROGRESS") == "0":
        hidden = True
    else:
        hidden = None  # tqdm shows the bar in a terminal or notebook
    return tqdm(total=total, initial=done, desc=label, unit=unit, disable=hidden, leave=False)
