"""The ledger: each claim with its verdict, as a table, as JSON, and explained; and whether a record is whole.

print(table(load()))
print(verdict("rank-one-suffices").explained())
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lora_lab.studies import records
from lora_lab.studies.claims import compared, computed, counted, deciding, measured, rates  # noqa: F401  # they register themselves
from lora_lab.studies.claims.deciding import DECIDERS, FALLS, OPEN, Claim, Result, judge, read_claims
from lora_lab.studies.records import KINDS, Record
from lora_lab.system.provenance import machine_info
from lora_lab.system.schema import check

WIDTH = 100


@dataclass(frozen=True)
class Entry:
    """A claim and what became of it."""

    claim: Claim
    result: Result

    def to_dict(self) -> dict[str, Any]:
        """Return the entry in values of JSON; ``shown_by`` ends with our number."""
        claim, result = self.claim, self.result
        on = f" depends on {result.on}:" if result.on else ""
        keys = ("id", "sentence", "number", "interval", "source", "kind", "fair")
        stated = {key: getattr(claim, key) for key in keys} | {"source": claim.cited}
        decided = {key: getattr(result, key) for key in ("verdict", "on", "shown_by", "date", "machine")}
        return stated | decided | {"shown_by": f"{result.shown_by}:{on} {result.measured}"}

    def where(self) -> str:
        """Return in a word or two what decides the claim, or what it waits for."""
        if self.claim.lesson:
            return f"lesson {self.claim.lesson.partition('_')[0]}"
        if self.claim.id not in DECIDERS:
            return f"waits: {self.claim.record}" if self.claim.record else "no study" if self.claim.open else "-"
        decider = DECIDERS[self.claim.id]
        if decider.record:
            return f"{'record' if self.result.date else 'waits:'} {decider.record}"
        if decider.published:
            return decider.published.partition("-")[0]
        return decider.function.__module__.rpartition(".")[2]

    def explained(self) -> str:
        """Return all about the claim: its source, their number beside ours, what shows it, how fair it is and why."""
        claim, result = self.claim, self.result
        theirs = claim.number if claim.interval == deciding.NONE_GIVEN else f"{claim.number} ({claim.interval})"
        lines = {
            "claim": claim.sentence,
            "source": f"{claim.source} (read: {claim.read})",
            "kind": claim.kind,
            "their number": theirs,
            "verdict": str(result),
            "our number" if claim.lesson or claim.id in DECIDERS else "why": result.measured,
            "shown by": result.shown_by,
            "measured": f"{result.date}, {result.machine}" if result.date else "not yet",
            "fair test": f"{claim.fair}: {claim.why}",
            "would decide it" if result.verdict in (OPEN, deciding.UNTESTABLE) else "would change it": claim.changes,
        }
        paragraphs = [f"{name + ':':<16} {text}" for name, text in lines.items()]
        return "\n".join([claim.id, *(textwrap.fill(each, WIDTH, subsequent_indent=17 * " ") for each in paragraphs)])

    def how_to_run(self) -> str:
        """Return what measures the claim anew: a function that has just run, or a command with its time."""
        if self.claim.lesson:
            return (
                f"python notebooks/execute.py {self.claim.lesson}.ipynb runs the lesson anew, in minutes on two cores; "
                "or run a copy of it, from lora-lab course DIR --solved, and add --lessons DIR here."
            )
        decider = DECIDERS.get(self.claim.id)
        record = decider.record if decider else self.claim.record
        if record:
            again = "makes the record anew" if self.result.date else "will make the record"
            return f"lora-lab record {record} {again}, in {KINDS[record].hours} on two cores."
        if decider is None:
            return "Nothing here measures it: " + (self.claim.open or self.claim.untestable) + "."
        if decider.published:
            return "Its numbers are published ones, and were compared again just now; their machine is not here."
        return "It was computed again just now, on this machine."


def load(folder: str | Path | None = None, lessons: str | Path | None = None) -> dict[str, Entry]:
    """Return all claims with their verdicts, by id, computed from records, lessons and functions; this takes seconds.

    Args:
        folder: of the records; None is :func:`lora_lab.studies.records.shipped`.
        lessons: folder of the lessons; None is that of the lessons that come with lora_lab.
    """
    every = records.load_all(folder=folder)
    return {name: Entry(claim, judge(claim, folder, lessons, every)) for name, claim in read_claims().items()}


def verdict(claim_id: str, folder: str | Path | None = None, lessons: str | Path | None = None) -> Entry:
    """Return one claim with its verdict.

    Args:
        folder: as for :func:`load`.
        lessons: as for :func:`load`.

    Raises:
        ValueError: there is no such claim.
    """
    every = read_claims()
    if claim_id not in every:
        near = difflib.get_close_matches(claim_id, every, n=3, cutoff=0) or list(every)[:3]
        raise ValueError(f"There is no claim {claim_id!r}; the nearest are {', '.join(near)}.")
    return Entry(every[claim_id], judge(every[claim_id], folder, lessons))


def table(entries: Mapping[str, Entry], width: int = WIDTH) -> str:
    """Return the claims as lines: id, sentence, verdict and where it comes from.

    Args:
        entries: by id.
        width: columns of a line, at least 100. Long sentences are cut; the wider the lines, the fewer.
    """
    room = min(width - 60, 1 + max((len(entry.claim.sentence) for entry in entries.values()), default=40))
    lines = [f"{'id':<31}{'claim':<{room}}{'verdict':<11}from"]
    for name, entry in entries.items():
        sentence = entry.claim.sentence
        sentence = sentence if len(sentence) < room else f"{sentence[: room - 4].rstrip()}..."
        lines.append(f"{name:<31}{sentence:<{room}}{entry.result.verdict:<11}{entry.where()}")
    counts = Counter(entry.result.verdict for entry in entries.values())
    waiting = sum(entry.where().startswith("waits: ") for entry in entries.values())
    of_others = sum(entry.result.verdict == FALLS and entry.claim.read != "lesson" for entry in entries.values())
    notes = {OPEN: f" ({waiting} wait for a record)"}
    total = ", ".join(f"{counts[word]} {word}{notes.get(word, '')}" for word in deciding.VERDICTS)
    last = f"{len(entries)} claims: {total}."
    authors = f"{of_others} of those that fall have a source, the others are beliefs."
    return "\n".join([*lines, "", last, f"{authors} More on one: lora-lab claims ID"])


# Whether a record that somebody hands in is whole: ``lora-lab record FILE --check``


def check_record(path: str | Path) -> Record:
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
        raise ValueError(f"{path} is not named {record.name}.json, after its device and kind; rename it.")
    for fault in _find_faults(record):
        raise ValueError(f"{path} {fault}, then run lora-lab record {record.what} again.")
    return record


def _find_faults(record: Record) -> Iterator[str]:
    """Yield what is wrong with the origin that a record states, what rows it lacks, and what to do."""
    facts = machine_info(torch.device("cpu")).keys()
    if record.facts.get("device", "").startswith("cuda"):
        facts |= {"gpu", "driver"}
    if lacking := sorted(facts - record.facts.keys()):
        yield f"lacks the facts {', '.join(lacking)} of its machine, which the command writes; update lora_lab"
    if not re.fullmatch("[0-9a-f]+", record.commit):
        yield f"is of the code {record.commit!r}, but others can run only what is a commit; commit your changes"
    if record.date > (today := datetime.now(UTC).date().isoformat()):
        yield f"has the date {record.date}, but today is {today}; set the machine's clock"
    if not re.fullmatch(r"lora-lab record \w+( --device \S+)?", record.command):
        yield f"was made by {record.command!r}, which does not measure every case; leave out all but --device"
    if absent := _find_setups_without_rows(record):
        yield f"has no row of {', '.join(absent)}, which its settings name; do not edit it by hand"
    every = read_claims()
    for claim_id, decider in DECIDERS.items():
        if decider.record == record.what:
            try:
                decider.decide(every[claim_id], record)
            except (KeyError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {str(error).removesuffix('.')}"
                yield f"lacks what decides the claim {claim_id!r} ({reason}); update lora_lab"


def _find_setups_without_rows(record: Record) -> list[str]:
    """Return the setups that the settings of the record, or of one of its sweeps, name, and that have no row."""
    sweeps = [{"about": {"data": data}, **study} for data, study in record.settings.items() if isinstance(study, dict)]
    absent = []
    for sweep in (record.settings, *sweeps, *check(record.settings.get("cases", []), list[dict], "cases")):
        about = sweep.get("about", {})
        present = {row.get("setup") for row in record.rows if about.items() <= row.items()}
        where = " on " * bool(about) + ", ".join(map(str, about.values()))
        absent += [f"{setup}{where}" for setup in sweep.get("setups", ()) if setup not in present]
    return absent
