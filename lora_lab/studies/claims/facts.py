"""What is claimed: each claim as data, in ``claims.toml``, which a person can review.

A file holds what others state, and what is known of our test of it. It never holds a verdict that something here can
decide: those are computed (``lora_lab.studies.claims.deciding``). A claim that no function decides has one of three
entries instead: ``lesson``, which lesson measures it, ``open``, what is missing, or ``untestable``, what cannot be had
here.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

KINDS = ("arithmetic", "mechanism", "small-scale", "at scale")
FAIRNESS = ("yes", "sign only", "no")
# How the source was read, in descending order of trust. The last two are not the source's own words.
READINGS = ("full text", "abstract", "repository", "issue", "page", "lesson", "second-hand", "from memory")
NONE_GIVEN = "none given"
WITHOUT_FUNCTION = ("lesson", "open", "untestable")  # entries of claims that no function decides


@dataclass(frozen=True)
class Claim:
    """Something that is stated of LoRA, with a number if its authors give one.

    Args:
        id: lower-case words with hyphens.
        sentence: the claim, in one sentence.
        number: the number that its authors give, or "none given".
        interval: the interval, seeds or noise that they give with it, or "none given".
        source: author, year and section or table, or where it is published.
        read: how it was read, one of :data:`READINGS`.
        kind: one of :data:`KINDS`.
        fair: whether our test is fair to the claim, one of :data:`FAIRNESS`.
        why: why it is fair, or what it cannot show.
        changes: what would decide the claim, if it is open, or change its verdict.
        value: ``number`` as a number, if the verdict's function compares with it.
        values: further numbers of ``number`` that it compares with, in the order in which it takes them.
        record: the kind of record that the claim waits for, if it is open.
        lesson: the lesson whose stored outputs decide it, such as "06_which_rank".
        open: why nothing here decides it yet.
        untestable: why nothing here can decide it.

    Raises:
        ValueError: an entry does not conform to that.
    """

    id: str
    sentence: str
    source: str
    read: str
    kind: str
    fair: str
    why: str
    changes: str
    number: str = NONE_GIVEN
    interval: str = NONE_GIVEN
    value: float | None = None
    values: Sequence[float] = ()
    record: str = ""
    lesson: str = ""
    open: str = ""
    untestable: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.id):
            raise ValueError(f"The id of a claim is {self.id!r}, but it must be lower-case words with hyphens.")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("value", "values"):
                continue
            if not isinstance(value, str) or (field.default is MISSING and not value.strip()):
                raise ValueError(f"The claim {self.id!r} has {value!r} as {field.name}, but it must be a string.")
        for each in self.values if self.value is None else (self.value, *self.values):
            if f"{each:g}" not in self.number.replace(",", ""):
                raise ValueError(f"The claim {self.id!r} has the value {each!r}, which its number does not show.")
        for name, allowed in (("read", READINGS), ("kind", KINDS), ("fair", FAIRNESS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"The claim {self.id!r} has {getattr(self, name)!r} as {name}, but it must be one of "
                    f"{', '.join(allowed)}."
                )
        if not self.sentence.endswith("."):
            raise ValueError(f"The sentence of the claim {self.id!r} is {self.sentence!r}, but it must end with a dot.")
        if len(reasons := [name for name in WITHOUT_FUNCTION if getattr(self, name)]) > 1:
            raise ValueError(f"The claim {self.id!r} has {' and '.join(reasons)}; keep one of them.")
        if self.record and not self.open:
            raise ValueError(f"The claim {self.id!r} waits for the record {self.record!r} but is not open.")

    @property
    def stated(self) -> float:
        """The claim's number as a number.

        Raises:
            ValueError: the claim has none.
        """
        if self.value is None:
            raise ValueError(f"The claim {self.id!r} has no value to compare with; add one to its entry.")
        return self.value

    @property
    def cited(self) -> str:
        """The source, and in brackets how it was read if not in its own words."""
        return self.source if self.read not in READINGS[-2:] else f"{self.source} [{self.read}]"


def read_claims(path: Path | None = None) -> dict[str, Claim]:
    """All claims by id, in the order of the file.

    Args:
        path: of the file; None is the one that comes with lora_lab.

    Raises:
        ValueError: the file is no TOML, or a claim has a typed verdict, lacks an entry, has an unknown one or one that
            does not conform, or an id is there twice.
    """
    if path is None:
        return dict(_shipped())
    try:
        stored = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML ({error}); correct that line.") from None
    if set(stored) != {"claim"}:
        raise ValueError(f"{path} has {', '.join(map(repr, stored)) or 'nothing'}, but it must hold [[claim]] only.")
    every = [_claim(entry) for entry in stored["claim"]]
    if repeated := [name for name, count in Counter(claim.id for claim in every).items() if count > 1]:
        raise ValueError(f"{path} has the claim {repeated[0]!r} twice; give each an id of its own.")
    return {claim.id: claim for claim in every}


@cache
def _shipped() -> dict[str, Claim]:
    return read_claims(Path(__file__).with_name("claims.toml"))


def _claim(entry: dict[str, Any]) -> Claim:
    name = entry.get("id", "?")
    if "verdict" in entry:
        raise ValueError(
            f"The claim {name!r} has the verdict {entry['verdict']!r} typed in; write the function that decides it, or "
            "state the 'lesson' that does, or as 'open' or 'untestable' why none can."
        )
    if unknown := entry.keys() - {field.name for field in fields(Claim)}:
        raise ValueError(f"The claim {name!r} has unknown entries: {', '.join(sorted(unknown))}.")
    needed = [field.name for field in fields(Claim) if field.default is MISSING]
    if missing := [each for each in needed if each not in entry]:
        raise ValueError(f"The claim {name!r} lacks {', '.join(missing)}.")
    return Claim(**entry)
