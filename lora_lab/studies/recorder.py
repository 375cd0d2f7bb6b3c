"""What a recorder is: it makes the rows of one kind of record. ``registry`` knows all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_lab.studies import records
from lora_lab.system.files import read_json, write_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Recorder:
    """What ``lora-lab record NAME`` runs.

    Args:
        settings: how the rows are made on a device, as the record states it.
        rows: makes the rows on a device, and yields each as soon as it is measured. Those of
            :data:`lora_lab.studies.registry.OF_MODELS` also take the names of models, and measure only these.
        line: a row as a line to print, or None to print nothing.
    """

    settings: Callable[[torch.device], dict[str, Any]]
    rows: Callable[..., Iterator[Row]]
    line: Callable[[Row], str | None]


def take_over(name: str) -> int:
    """Copy the finished trials of an incomplete record to the folder in which its recorder continues.

    A study of many hours takes several sittings. A trial that has ended is a file in ``runs/record-<name>``, which git
    ignores; those that are committed in ``records/unfinished/<name>`` need not be run again, on any machine.

    Args:
        name: of the record.

    Returns:
        How many trials were copied. Files that are there already are left as they are.
    """
    source, target = records.shipped() / "unfinished" / name, Path("runs") / f"record-{name}"
    missing = [path.relative_to(source) for path in sorted(source.rglob("*.json"))]
    missing = [path for path in missing if not (target / path).exists()]
    for path in missing:
        write_json(target / path, read_json(source / path), indent=None)
    return len(missing)
