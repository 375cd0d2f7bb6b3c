"""Measured runs with their provenance, so that a number from another machine can be traced and reproduced.

A record is a JSON file, ``records/<device>-<what>.json``. It states what was run, on which machine and with which code,
and what was measured. Commands write records; nobody edits them. What others measured is in ``records/published``.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError
from pydantic.dataclasses import dataclass

from lora_lab.system.files import read_json, write_json
from lora_lab.system.provenance import checkout, device_name, driver_version, machine_info, slug

if TYPE_CHECKING:
    from pandas import DataFrame


class Kind(NamedTuple):
    """A kind of record: the file of :mod:`lora_lab.studies` that makes it, how long that takes, and what it asks."""

    module: str
    hours: str  # on two cores
    question: str
    grows: bool = False  # sweep by sweep: what a record holds is not measured again


# The file has its recorder under the kind's name in capitals.
KINDS = {
    "memory": Kind("steps", "half an hour", "memory of training steps, predicted and measured"),
    "speed": Kind("steps", "half an hour", "times of training steps, predicted and measured"),
    "rates": Kind("tuned", "three hours", "how the best learning rate depends on the rank"),
    "quality": Kind("tuned", "eleven hours", "is LoRA as good as full fine-tuning, after how many steps?"),
    "ablation": Kind("spectra", "an hour", "which rank is enough"),
    "tiny_rank": Kind("paged", "three hours", "which rank is enough, on four small bases", grows=True),
    "tiny_readmes": Kind("paged", "half an hour", "does that hold on another kind of text?", grows=True),
    "tiny_batch": Kind("paged", "40 minutes", "do large batches hurt LoRA more, on the same?", grows=True),
    "tiny_repeats": Kind("paged", "an hour", "does repeated text want a lower rate, on the same?", grows=True),
    "tiny_layers": Kind("paged", "half an hour", "which layers should have adapters, on the same", grows=True),
    "tiny_variants": Kind("paged", "an hour", "do variants of LoRA learn more, on the same?", grows=True),
    "tiny_quantised": Kind("versions", "half an hour", "what NF4 and merges cost, on the same", grows=True),
    "tiny_upgrade": Kind("versions", "half an hour", "is an adapter of use to a later base, on the same?", grows=True),
    "tiny_front": Kind("front", "three hours", "who forgets less at equal learning, on the same?", grows=True),
    "smol_rank": Kind("paged", "four hours", "is LoRA as good as full fine-tuning, judged by pages?", grows=True),
    "smol_layers": Kind("paged", "two hours", "which layers should have adapters, judged by pages", grows=True),
    "smol_variants": Kind("paged", "two hours", "do variants of LoRA learn more, judged by pages?", grows=True),
    "smol_quantised": Kind("versions", "an hour", "what NF4 and merges cost, judged by pages", grows=True),
    "spectra": Kind("spectra", "half an hour", "what training writes into the weights"),
    "overfitting": Kind("curves", "six hours", "which method overfits, and which forgets"),
    "head_start": Kind("curves", "an hour", "is fine-tuning better than training from scratch?"),
    "downstream": Kind("downstream", "three hours", "can the model learn a downstream task?"),
    "elicitation": Kind("downstream", "half an hour", "how much of that can it do untrained, asked well?"),
}
OF_MODELS = ("memory", "speed")  # measure several models; all others are about SmolLM2-135M


Text = Annotated[str, Field(pattern=r"\S")]
_Digits = Field(pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}$")
Day = Annotated[str, _Digits, AfterValidator(lambda day: str(date.fromisoformat(day)))]
if TYPE_CHECKING:  # what the types below let in is known to pydantic alone
    Settings = dict[str, Any]
    Row = dict[str, Any]
else:
    Settings = dict[str, JsonValue]
    Row = Annotated[dict[str, str | bool | int | FiniteFloat | None], Field(min_length=1)]
Rows = Annotated[list[Row], Field(min_length=1)]
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=_STRICT)
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
        ValueError: a field does not conform to the format.
    """

    what: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    device: Annotated[str, Field(pattern=r"^.*[A-Za-z0-9].*$")]
    facts: dict[str, Text]
    commit: Annotated[str, Field(pattern=r"^(unknown|[0-9a-f]{40,64}(\+changes)?)$")]
    date: Day
    command: Annotated[str, Field(pattern=r"^.*\S.*$")]
    settings: Settings
    rows: Rows
    schema: Literal[1] = 1

    @property
    def name(self) -> str:
        """The file's name without its suffix: device and kind."""
        return f"{slug(self.device)}-{self.what}"

    def frame(self) -> DataFrame:
        """Return the rows as a pandas DataFrame, its columns in alphabetical order, as in the file."""
        import pandas

        return pandas.DataFrame(self.rows).sort_index(axis="columns")


@dataclass(frozen=True, config=_STRICT)
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
    """

    what: Text
    source: Text
    commit: Text
    date: Day
    licence: Text
    settings: Settings
    rows: Rows


def new(
    what: str, rows: list[dict[str, Any]], settings: dict[str, Any], command: str, device: torch.device, commit: str
) -> Record:
    """Return the record of a run that has just finished on this machine.

    Args:
        what, rows, settings, command, commit: as in :class:`Record`.
        device: where it ran.

    Raises:
        ValueError: as :class:`Record`.
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


def write(record: Record, folder: str | Path) -> Path:
    """Write a record atomically, replacing an older one of the same name, and return its path."""
    path = Path(folder) / f"{record.name}.json"
    write_json(path, asdict(record))
    return path


def destination() -> Path:
    """Return the folder for new records: in the checkout or, without one, in the working directory.

    Commands do not write into an installed package.
    """
    return Path("records") if _packaged().is_dir() else checkout() / "records"


def shipped() -> Path:
    """Return the folder of the records that come with lora_lab, in the checkout or in the installed package."""
    return _packaged() if _packaged().is_dir() else checkout() / "records"


def load(path: str | Path) -> Record:
    """Read one record.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another schema, or has missing or unknown entries.
    """
    return _read(path, Record, "a record")


def load_all(what: str | None = None, folder: str | Path | None = None) -> dict[str, Record]:
    """Read all records of a folder, by name in alphabetical order.

    Args:
        what: only the records of this kind, such as "memory".
        folder: None is :func:`shipped`.

    Raises:
        ValueError: as :func:`load`.
    """
    folder = shipped() if folder is None else Path(folder)
    # A write that was killed leaves a hidden file, which is no record.
    paths = sorted(folder.glob("[!.]*.json"))
    records = {path.stem: load(path) for path in paths}
    return {name: record for name, record in records.items() if what in (None, record.what)}


def published(name: str, folder: str | Path | None = None) -> Published:
    """Read what others measured, by the name of its file in ``records/published``, such as "torchtune".

    Args:
        name: of the file, without its suffix.
        folder: of the records, with a folder ``published`` in it; None is :func:`shipped`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or has missing or unknown entries.
    """
    path = (shipped() if folder is None else Path(folder)) / "published" / f"{name}.json"
    return _read(path, Published, "a file of published numbers")


def _read(path: str | Path, kind: Any, words: str) -> Any:
    stored = read_json(path)
    try:
        return kind(**stored)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except TypeError:
        reason = f"it holds a {type(stored).__name__}, not an object"
    raise ValueError(f"{path} is not {words} of this version of lora_lab ({reason}); measure or copy it anew.")


def _packaged() -> Path:
    """Return the folder of the records in a wheel; pyproject.toml copies the checkout's ``records`` there."""
    return Path(__file__).parents[1] / "recorded"
