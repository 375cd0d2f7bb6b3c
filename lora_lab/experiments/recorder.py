"""What a recorder is: it makes the rows of one kind of record. ``registry`` lists all of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

Row = dict[str, Any]


@dataclass(frozen=True)
class Recorder:
    """What ``lora-lab record NAME`` runs.

    Args:
        name: the record's kind.
        settings: what the record says of how its rows were made, for a device.
        rows: makes the rows on a device, one by one, as they are measured.
        line: a row for a person to read, or None for one of hundreds.
        of_models: ``rows`` takes names of models as well, and measures only those.
    """

    name: str
    settings: Callable[[torch.device], dict[str, Any]]
    rows: Callable[..., Iterator[Row]]
    line: Callable[[Row], str | None]
    of_models: bool = False


def with_bar(cases: Sequence[Any]) -> Iterator[Any]:
    """The cases in turn, behind a progress bar where a person is looking."""
    watched = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("LORA_LAB_PROGRESS") != "0"
    with tqdm(cases, unit="case", disable=not watched, leave=False) as bar:
        for case in bar:
            bar.set_postfix_str(f"{case.model}, {getattr(case, 'label', f'{case.batch_size} x {case.seq_len}')}")
            yield case
