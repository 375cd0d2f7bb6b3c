"""What a recorder is: it makes the rows of one kind of record. ``registry`` knows all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_lab.studies import records
from lora_lab.system.files import read_json, write_json
from lora_lab.system.schema import plain

if TYPE_CHECKING:
    import pandas

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


def record_trials(
    name: str,
    settings: Callable[[torch.device], dict[str, Any]],
    rows: Callable[[torch.device, Path], Iterator[Row]],
    line: Callable[[Row], str | None],
    hours: Callable[[torch.device], float] | None = None,
) -> Recorder:
    """Return the recorder of a study that trains, which takes up a stopped run where it was.

    Args:
        name: of the record.
        settings: how the rows are made.
        rows: makes them on a device; finished trials are kept in the folder.
        line: as for :class:`Recorder`.
        hours: how long it takes on a device, which is stated and printed before it starts.
    """
    hours = None if hours is None else cache(hours)

    def all_settings(device: torch.device) -> dict[str, Any]:
        return settings(device) | ({} if hours is None else {"planned_hours": hours(device)})

    def all_rows(device: torch.device, folder: str | Path = Path("runs") / f"record-{name}") -> Iterator[Row]:
        if hours is not None:
            print(f"Planned: about {hours(device)} hours, more where grids of rates are widened.", flush=True)
        yield from rows(device, Path(folder))

    return Recorder(all_settings, all_rows, line)


def read_rows(frame: pandas.DataFrame, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a sweep's table with these columns, as a record can hold them."""
    yield from map(plain, frame.reindex(columns=[*columns]).to_dict("records"))


def tell_trial(row: Row, names: Sequence[str], losses: Sequence[str] = ("validation_loss", "test_loss")) -> str | None:
    """Return a trial's last row as a line for people; None for any other row.

    Args:
        row: of a trial.
        names: the columns that name the case.
        losses: the columns to show, where there is a value.
    """
    trial = "".join(f"{row[name]!s:<{20 if name == 'setup' else 10}} " for name in names)
    trial += f"lr {row['lr']:<8.4g} seed {row['seed']:g}: "
    if row["outcome"] == "failed":
        return trial + row["reason"]
    if row.get("step") != row.get("steps"):
        return None
    return trial + "  ".join(f"{name} {row[name]:.4f}" for name in losses if row.get(name) is not None)


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
