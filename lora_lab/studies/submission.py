"""Whether a record that somebody hands in is whole: ``lora-lab record FILE --check``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from lora_lab.studies import records
from lora_lab.studies.claims.deciding import DECIDERS, read_claims
from lora_lab.studies.records import KINDS, Record
from lora_lab.system.provenance import machine_info

ON_CUDA = {"gpu", "driver"}  # the facts that a record of a GPU has besides


def check(path: str | Path) -> Record:
    """Read a record that is to be added to ``records/``, and check that nothing is missing and its origin is stated.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no record, is not named after its device and kind, or does not name the code, machine
            and command that made it; or rows of a setup are missing, or what a claim needs.
    """
    path, record = Path(path), records.load(path)
    if record.what not in KINDS:
        names = ", ".join(KINDS)
        raise ValueError(f"{path} is of the kind {record.what!r}, but it must be one of {names}; measure one of these.")
    if path.name != f"{record.name}.json":
        raise ValueError(
            f"{path} holds the record of {record.what!r} on {record.device!r}, but is not named {record.name}.json; "
            "rename it."
        )
    for complaint in _find_faults(record):
        raise ValueError(f"{path} {complaint}, then run lora-lab record {record.what} again.")
    return record


def _find_faults(record: Record) -> Iterator[str]:
    """Yield what is wrong with the origin that a record states, what rows it lacks, and what to do."""
    on_cuda = record.facts.get("device", "").startswith("cuda")
    facts = machine_info(torch.device("cpu")).keys() | (ON_CUDA if on_cuda else set())
    if lacking := sorted(facts - record.facts.keys()):
        yield f"lacks the facts {', '.join(lacking)} of its machine, which the command writes; update lora_lab"
    if not re.fullmatch("[0-9a-f]+", record.commit):
        yield f"is of the code {record.commit!r}, but others can run only what is a commit; commit your changes"
    if record.date > (today := datetime.now(UTC).date().isoformat()):
        yield f"has the date {record.date}, but today is {today}; set the machine's clock"
    if not re.fullmatch(r"lora-lab record \w+( --device \S+)?", record.command):
        yield f"was made by {record.command!r}, which does not measure every case; leave out all but --device"
    if absent := _setups_without_rows(record):
        yield f"has no row of {', '.join(absent)}, which its settings name; do not edit it by hand"
    every = read_claims()
    for claim_id, decider in DECIDERS.items():
        if decider.record == record.what:
            try:
                decider.decide(every[claim_id], record)
            except (KeyError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {str(error).removesuffix('.')}"
                yield f"lacks what decides the claim {claim_id!r} ({reason}); update lora_lab"


def _setups_without_rows(record: Record) -> list[str]:
    """Return the setups that the settings name, by data where there are several, and that have no row."""
    studies = {data: study for data, study in record.settings.items() if isinstance(study, dict) and "setups" in study}
    absent = []
    for data, study in (studies or {"": record.settings}).items():
        present = {row.get("setup") for row in record.rows if not data or row.get("data") == data}
        absent += [f"{name} on {data}" if data else name for name in study.get("setups", ()) if name not in present]
    return absent
