"""Measured runs with their provenance, so that a number from another machine can be traced and reproduced.

A record is a JSON file, ``records/<device>-<what>.json``. It states what was run, on which machine and with which code,
and what was measured. Commands write records; nobody edits them. What others measured is in ``records/published``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_lab.system.files import read_json, write_json
from lora_lab.system.json_text import plain
from lora_lab.system.provenance import checkout, device_name, driver_version, machine_info, slug
from lora_lab.system.wording import short_repr, shortened

if TYPE_CHECKING:
    from pandas import DataFrame

SCHEMA = 1
_TEXTS = {  # field -> (pattern, what the error says is expected)
    "what": (r"[a-z][a-z0-9_]*", "one lower-case word without a hyphen, such as 'memory'"),
    "device": (r".*[A-Za-z0-9].*", "the device's name, such as 'NVIDIA H100 80GB HBM3'"),
    "commit": (r"unknown|[0-9a-f]{40,64}(\+changes)?", "a full git commit, perhaps with '+changes', or 'unknown'"),
    "date": (r"[0-9]{4}-[0-9]{2}-[0-9]{2}", "a day, such as '2026-11-24'"),
    "command": (r".*\S.*", "the one line that was run"),
}
# Names in the records of earlier versions -> names now.
_KINDS = {"trades": "downstream"}  # old name
_SETTINGS = {"ways": "setups"}
_COLUMNS = {"way": "setup", "wanted": "reference", "said": "prediction"}  # old name


@dataclass(frozen=True)
class Record:
    """One measured run.

    Args:
        what: the kind of record, one word such as "memory".
        device: the device's name, as its vendor writes it.
        facts: machine and software, from :func:`lora_lab.system.provenance.machine_info`; on CUDA also the driver.
        commit: git commit of the code that ran; "+changes" is appended if tracked files differed from it, and it is
            "unknown" outside a checkout.
        date: the day in UTC, such as "2026-11-24".
        command: the command line.
        settings: how the rows were made, in values of JSON.
        rows: what was measured, one flat dict per case, of texts, finite numbers, booleans and None.
        schema: version of this format.

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
        """The file's name without its suffix: device and kind."""
        return f"{slug(self.device)}-{self.what}"

    def validate(self) -> None:
        """Check every field.

        Raises:
            ValueError: a field does not conform to the format, or a number is not finite.
        """
        if type(self.schema) is not int or self.schema != SCHEMA:
            raise ValueError(f"schema is {self.schema!r}, but it must be {SCHEMA}.")
        for name, (pattern, expected) in _TEXTS.items():
            value = getattr(self, name)
            if not isinstance(value, str) or not re.fullmatch(pattern, value):
                raise ValueError(f"{name} is {short_repr(value)}, but it must be {expected}.")
        try:
            date.fromisoformat(self.date)
        except ValueError:
            raise ValueError(f"date is {self.date!r}, but it must be a day of the calendar.") from None
        if not _is_dict(self.facts) or not all(isinstance(value, str) and value for value in self.facts.values()):
            raise ValueError(f"facts are {short_repr(self.facts)}, but they must be a dict of texts, none empty.")
        if not _is_dict(self.settings) or not _is_json(self.settings):
            raise ValueError(
                f"settings are {short_repr(self.settings)}, but they must be a dict of JSON values, numbers finite."
            )
        _check_rows(self.rows)

    def frame(self) -> DataFrame:
        """The rows as a pandas DataFrame, its columns in alphabetical order, as in the file."""
        import pandas

        return pandas.DataFrame(self.rows).sort_index(axis="columns")


def json_safe(row: Mapping[Any, Any]) -> dict[str, Any]:
    """The row with NaN and infinity replaced by None, which JSON lacks."""
    return plain(row)


def new(
    what: str,
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    command: str,
    device: torch.device,
    commit: str,
) -> Record:
    """The record of a run that has just finished on this machine.

    Args:
        what, rows, settings, command, commit: as in :class:`Record`.
        device: where it ran.

    Raises:
        ValueError: as :meth:`Record.validate`.
    """
    facts = machine_info(device)
    if device.type == "cuda":
        facts["driver"] = driver_version()
    return Record(
        what=what,
        device=device_name(device),
        facts=facts,
        commit=commit,
        date=datetime.now(UTC).date().isoformat(),
        command=command,
        settings=settings,
        rows=rows,
    )


def write(record: Record, folder: str | Path | None = None) -> Path:
    """Write a record atomically, replacing an older one of the same name, and return its path.

    Args:
        folder: as for :func:`destination`.

    Raises:
        ValueError: the record was changed and no longer conforms to the format.
    """
    record.validate()  # again, because its fields are frozen, but not the contents of its dicts and lists
    path = destination(folder) / f"{record.name}.json"
    write_json(path, asdict(record))
    return path


def destination(folder: str | Path | None = None) -> Path:
    """The folder for a new record.

    Args:
        folder: None is ``records`` in the checkout; without a checkout it is ``records`` in the working directory,
            because commands do not write into an installed package.
    """
    if folder is not None:
        return Path(folder)
    return Path("records") if _packaged().is_dir() else checkout() / "records"


def load(path: str | Path) -> Record:
    """Read one record.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another schema, or has missing or unknown entries.
    """
    stored = read_json(path)
    try:
        return _from_json(stored)
    except (ValueError, RecursionError) as error:
        reason = str(error).removesuffix(".")
        raise ValueError(f"{path} is not a record of this version of lora_lab ({reason}); measure it anew.") from None


def load_all(what: str | None = None, folder: str | Path | None = None) -> dict[str, Record]:
    """All records of a folder by name, in alphabetical order.

    Args:
        what: only the records of this kind, such as "memory".
        folder: None is :func:`shipped`.

    Raises:
        ValueError: as :func:`load`.
    """
    folder = shipped() if folder is None else Path(folder)
    # A write that was killed leaves a hidden file.
    paths = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    records = {path.stem: load(path) for path in paths}
    return {name: record for name, record in records.items() if what in (None, record.what)}


def shipped() -> Path:
    """The folder of the records that come with lora_lab, in the checkout or in the installed package."""
    return _packaged() if _packaged().is_dir() else checkout() / "records"


@dataclass(frozen=True)
class Published:
    """Numbers that others measured and published.

    Args:
        what: what was measured, in words.
        source: where it is published.
        commit: the version of the source that was read.
        date: the day of that version or of the numbers, such as "2026-08-21".
        licence: the source's, by its SPDX identifier.
        settings: how they measured, as far as they say, in values of JSON.
        rows: as in :class:`Record`.

    Raises:
        ValueError: a field does not conform to the format.
    """

    what: str
    source: str
    commit: str
    date: str
    licence: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]

    def __post_init__(self) -> None:
        for name in ("what", "source", "commit", "date", "licence"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} is {short_repr(value)}, but it must be a string that is not empty.")
        date.fromisoformat(self.date)
        if not _is_dict(self.settings) or not _is_json(self.settings):
            raise ValueError(f"settings are {short_repr(self.settings)}, but they must be a dict of JSON values.")
        _check_rows(self.rows)


def published(name: str, folder: str | Path | None = None) -> Published:
    """What others measured, by the name of its file in ``records/published``, such as "torchtune".

    Args:
        folder: of the records, with a folder ``published`` in it; None is :func:`shipped`.

    Raises:
        ValueError: there is no such file, or it is damaged or has missing or unknown entries.
    """
    folder = shipped() if folder is None else Path(folder)
    paths = {path.stem: path for path in sorted((folder / "published").glob("*.json"))}
    if name not in paths:
        raise ValueError(f"Nothing published is known by the name {name!r}; use one of: {', '.join(paths)}.")
    stored = read_json(paths[name])
    try:
        return Published(**stored)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{paths[name]} does not hold published numbers ({error}); restore it.") from None


def _from_json(stored: Any) -> Record:
    if not isinstance(stored, dict):
        raise ValueError(f"it holds a {type(stored).__name__}, not an object")
    if stored.get("schema", SCHEMA) != SCHEMA:  # first, because another schema may have other entries
        raise ValueError(f"schema is {stored['schema']!r}, not {SCHEMA}")
    expected = {field.name for field in fields(Record)}
    if missing := expected - stored.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    if unknown := stored.keys() - expected:
        raise ValueError(f"it has unknown entries: {shortened(', '.join(sorted(unknown)))}")
    if stored["what"] in ("overfitting", *_KINDS):
        stored = _with_current_names(stored)
    return Record(**stored)


def _with_current_names(stored: dict[str, Any]) -> dict[str, Any]:
    """The entries of a record with the names of earlier versions replaced by those of today."""
    rows, settings = stored["rows"], stored["settings"]
    if isinstance(rows, list) and all(map(_is_dict, rows)):
        rows = [{_COLUMNS.get(name, name): value for name, value in row.items()} for row in rows]
    if _is_dict(settings):
        settings = {_SETTINGS.get(name, name): value for name, value in settings.items()}
    return stored | {"what": _KINDS.get(stored["what"], stored["what"]), "rows": rows, "settings": settings}


def _check_rows(rows: Any) -> None:
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"rows are {short_repr(rows)}, but they must be a list of at least one dict.")
    for i, row in enumerate(rows):
        if not _is_dict(row) or not row:
            raise ValueError(f"row {i} is {short_repr(row)}, but it must be a dict of at least one named value.")
        for name, value in row.items():
            if not _is_scalar(value):
                raise ValueError(
                    f"row {i} has {short_repr(value)} as {name!r}, but it must be a string, a finite number, "
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
    """The folder of the records in a wheel; pyproject.toml copies the checkout's ``records`` there."""
    return Path(__file__).parents[1] / "recorded"
