"""Results as JSON text for other programs: what ``lora-lab ... --json`` prints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


def plain(value: Any) -> Any:
    """The value in JSON's types: a tuple is a list, a path its text, and NaN and infinity, which JSON lacks, None."""
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def rows_of(frame: DataFrame) -> list[dict[str, Any]]:
    """One dict for each row of the frame, by column; what is missing there is None."""
    return plain(frame.astype(object).where(frame.notna(), None).to_dict("records"))


def json_text(value: Any) -> str:
    """Indented JSON of the value, made :func:`plain`.

    Raises:
        TypeError: it holds something that JSON has no form for.
    """
    return json.dumps(plain(value), indent=2, allow_nan=False)
