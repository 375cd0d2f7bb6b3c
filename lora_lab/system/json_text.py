"""Results as JSON text for other programs: what ``lora-lab ... --json`` prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

if TYPE_CHECKING:
    from pandas import DataFrame


def plain(value: Any) -> Any:
    """The value in JSON's types: a tuple is a list, a path its text, and NaN and infinity, which JSON lacks, None."""
    return to_jsonable_python(value, inf_nan_mode="null")


def rows_of(frame: DataFrame) -> list[dict[str, Any]]:
    """One dict for each row of the frame, by column; what is missing there is None."""
    return plain(frame.astype(object).where(frame.notna(), None).to_dict("records"))


def json_text(value: Any) -> str:
    """Indented JSON of the value, made :func:`plain`.

    Raises:
        ValueError: it holds something that JSON has no form for.
    """
    return json.dumps(plain(value), indent=2, allow_nan=False)
