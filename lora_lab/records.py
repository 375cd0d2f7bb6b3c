"""Measured runs with their provenance, so that a number seen on another machine can be traced and repeated.

A record is a JSON file, ``records/<device>-<what>.json``, that says what was run, on which machine, with
which code, and what was measured. Commands write it; nobody edits it.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import torch

from lora_lab.system.files import read_json, write_json
from lora_lab.system.provenance import checkout, device_name, driver_version, machine_info, slug

SCHEMA = 1
_TEXTS = {  # field -> (pattern, what it stands for)
    "what": (r"[a-z][a-z0-9_]*", "one lower-case word without a hyphen, such as 'memory'"),
    "device": (r".*[A-Za-z0-9].*", "the device's name, such as 'NVIDIA H100 80GB HBM3'"),
    "commit": (r"unknown|[0-9a-f]{40,64}(\+changes)?", "a full git commit, perhaps with '+changes', or 'unknown'"),
    "date": (r"[0-9]{4}-[0-9]{2}-[0-9]{2}", "a day, such as '2026-11-24'"),
    "command": (r".*\S.*", "the one line that was run"),
}
# Names in records of earlier versions -> what they are called now.
_KINDS = {"trades": "downstream"}  # old name
_SETTINGS = {"ways": "setups"}
_COLUMNS = {"way": "setup", "wanted": "reference", "said": "prediction"}  # old name


@dataclass(frozen=True)
class Record:
    """One measured run.

    Args:
        what: what was measured, one word: "memory", "speed".
        device: the device's name, as people say it.
        facts: machine and software, from :func:`lora_lab.system.provenance.machine_info`; on CUDA the driver too.
        commit: git commit of the code that ran; "+changes" is appended if tracked files differed from it, and
            it is "unknown" outside a checkout.
        date: the day in UTC, such as "2026-11-24".
        command: what was typed.
        settings: what the run was asked to do: any values of JSON.
        rows: what was measured, one flat dict a case: texts, numbers, booleans, None.
        schema: the number of this format.

    Raises:
        ValueError: as :meth:`validate`.
    """

    what: str
    device: str
    facts: dict[str, str]
    commit: str
    date: str
    command: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        self.validate()

    @property
    def name(self) -> str:
        """The file's name without its ending: device and what was measured."""
        return f"{slug(self.device)}-{self.what}"

    def validate(self) -> None:
        """Check every field.

        Raises:
            ValueError: a field is not what the format asks for, or a number is not finite.
        """
        if type(self.schema) is not int or self.schema != SCHEMA:
            raise ValueError(f"schema is {self.schema!r}, but it must be {SCHEMA}.")
        for name, (pattern, expected) in _TEXTS.items():
            value = getattr(self, name)
            if not isinstance(value, str) or not re.fullmatch(pattern, value):
                raise ValueError(f"{name} is {reprlib.repr(value)}, but it must be {expected}.")
        try:
            date.fromisoformat(self.date)
        except ValueError:
            raise ValueError(f"date is {self.date!r}, but there is no such day.") from None
        if not _is_dict(self.facts) or not all(isinstance(value, str) and value for value in self.facts.values()):
            raise ValueError(f"facts are {reprlib.repr(self.facts)}, but they must be a dict of texts, none empty.")
        if not _is_dict(self.settings) or not _is_json(self.settings):
            raise ValueError(
                f"settings are {reprlib.repr(self.settings)}, but they must be a dict of JSON's values, numbers finite."
            )
        _check_rows(self.rows)

    def frame(self):
        """The rows as a pandas DataFrame, its columns in alphabetical order, as in the file."""
        import pandas

        return pandas.DataFrame(self.rows).sort_index(axis="columns")


def json_safe(row: Mapping[Any, Any]) -> dict[str, Any]:
    """The row with NaN and infinity replaced by None, which JSON lacks."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def new(
    what: str,
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    command: str,
    device: torch.device,
    commit: str,
) -> Record:
    """A record of a run that has just ended on this machine.

    Args:
        what, rows, settings, command, commit: as in :class:`Record`.
        device: where it ran.

    Raises:
        ValueError: as :meth:`Record.validate`.
    """
    described = machine_info(device)
    if device.type == "cuda":
        described["driver"] = driver_version()
    return Record(
        what=what,
        device=device_name(device),
        facts=described,
        commit=commit,
        date=datetime.now(UTC).date().isoformat(),
        command=command,
        settings=settings,
        rows=rows,
    )


def write(record: Record, folder: str | Path | None = None) -> Path:
    """Write a record, whole or not at all, in the place of an older one of the same name, and return its path.

    Args:
        folder: as for :func:`destination`.

    Raises:
        ValueError: the record was changed since it was made, and no longer holds to the format.
    """
    record.validate()  # once more, for its fields are frozen, but not what is in its dicts and lists
    path = destination(folder) / f"{record.name}.json"
    write_json(path, asdict(record))
    return path


def destination(folder: str | Path | None = None) -> Path:
    """Where a new record goes.

    Args:
        folder: None takes the checkout's ``records``; where lora_lab is installed without a checkout, it takes
            ``records`` in the working directory, for an installed package is not ours to write into.
    """
    if folder is not None:
        return Path(folder)
    return Path("records") if _packaged().is_dir() else checkout() / "records"


def load(path: str | Path) -> Record:
    """Read one record.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged, of another schema, or lacks or has entries that it should not.
    """
    stored = read_json(path)
    try:
        return _from_json(stored)
    except ValueError as error:
        reason = str(error).removesuffix(".")
        raise ValueError(f"{path} is not a record of this version of lora_lab ({reason}); measure it anew.") from None


def load_all(what: str | None = None, folder: str | Path | None = None) -> dict[str, Record]:
    """Records by name, in alphabetical order; none if the folder has none.

    Args:
        what: only those of one kind, such as "memory".
        folder: None takes :func:`shipped`.

    Raises:
        ValueError: as :func:`load`.
    """
    folder = shipped() if folder is None else Path(folder)
    # A killed write leaves a hidden file.
    paths = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    found = {path.stem: load(path) for path in paths}
    return {name: record for name, record in found.items() if what in (None, record.what)}


def shipped() -> Path:
    """The folder of the records that came with this lora_lab: the checkout's, or the installed package's own."""
    return _packaged() if _packaged().is_dir() else checkout() / "records"


def _from_json(stored: Any) -> Record:
    if not isinstance(stored, dict):
        raise ValueError(f"it holds a {type(stored).__name__}, not an object")
    if stored.get("schema", SCHEMA) != SCHEMA:  # asked first, because another schema may have other entries
        raise ValueError(f"schema is {stored['schema']!r}, not {SCHEMA}")
    expected = {field.name for field in fields(Record)}
    if missing := expected - stored.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    if unknown := stored.keys() - expected:
        raise ValueError(f"it has unknown entries: {', '.join(sorted(unknown))}")
    if stored["what"] in ("overfitting", *_KINDS):
        stored = _with_current_names(stored)
    return Record(**stored)


def _with_current_names(stored: dict[str, Any]) -> dict[str, Any]:
    """A record's entries, as an earlier version may have named them, under the names of today."""
    rows, settings = stored["rows"], stored["settings"]
    if isinstance(rows, list) and all(map(_is_dict, rows)):
        rows = [{_COLUMNS.get(name, name): value for name, value in row.items()} for row in rows]
    if _is_dict(settings):
        settings = {_SETTINGS.get(name, name): value for name, value in settings.items()}
    return stored | {"what": _KINDS.get(stored["what"], stored["what"]), "rows": rows, "settings": settings}


def _check_rows(rows: Any) -> None:
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"rows are {reprlib.repr(rows)}, but they must be a list of at least one dict.")
    for i, row in enumerate(rows):
        if not _is_dict(row) or not row:
            raise ValueError(f"row {i} is {reprlib.repr(row)}, but it must be a dict of at least one value by name.")
        for name, value in row.items():
            if not _is_scalar(value):
                raise ValueError(
                    f"row {i} has {reprlib.repr(value)} as {name!r}, but it must be a text, a finite number, "
                    "True, False or None."
                )


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, value))
    return _is_scalar(value) or (_is_dict(value) and all(map(_is_json, value.values())))


def _packaged() -> Path:
    """Where a wheel keeps the checkout's ``records``; pyproject.toml puts it there."""
    return Path(__file__).parent / "recorded"
