"""One progress bar for everything that takes long."""

from __future__ import annotations

import os
import sys

from tqdm.auto import tqdm


def progress_bar(total: int, label: str, progress: bool | None, unit: str = "step", done: int = 0) -> tqdm:
    """A bar; with ``progress`` None only where a person is looking and LORA_LAB_PROGRESS is not 0."""
    if progress is None:
        watched = "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
        progress = watched and os.environ.get("LORA_LAB_PROGRESS") != "0"
    return tqdm(total=total, initial=done, desc=label, unit=unit, disable=not progress, leave=False)
