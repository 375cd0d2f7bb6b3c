"""The progress bar of everything that takes long."""

from __future__ import annotations

import os
import sys

from tqdm.auto import tqdm


def progress_bar(total: int, label: str, progress: bool | None, unit: str = "step", done: int = 0) -> tqdm:
    """A progress bar over ``total`` units, ``done`` of them already done.

    Args:
        progress: whether to show it; None shows it in a terminal or notebook, unless LORA_LAB_PROGRESS is 0.
    """
    if progress is None:
        interactive = "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
        progress = interactive and os.environ.get("LORA_LAB_PROGRESS") != "0"
    return tqdm(total=total, initial=done, desc=label, unit=unit, disable=not progress, leave=False)
