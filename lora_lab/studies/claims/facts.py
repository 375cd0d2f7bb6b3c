"""What is claimed: each claim as data, in ``claims.toml``, which a person can review.

A file holds what others state, and what is known of our test of it. It never holds a verdict that something here can
decide: those are computed (``lora_lab.studies.claims.deciding``). A claim that no function decides has one of three
entries instead: ``lesson``, which lesson measures it, ``open``, what is missing, or ``untestable``, what cannot be had
here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from lora_lab.studies.records import Text

NONE_GIVEN = "none given"
SHIPPED = Path(__file__).with_name("claims.toml")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Claim:
    """Something that is stated of LoRA, with a number if its authors give one.

    Args:
        id: lower-case words with hyphens.
        sentence: the claim, in one sentence.
        source: author, year and section or table, or where it is published.
        read: how the source was read; the last two are not the source's own words.
        kind: what kind of statement it is.
        fair: whether our test is fair to the claim.
        why: why it is fair, or what it cannot show.
        changes: what would decide the claim, if it is open, or change its verdict.
        number: the number that its authors give.
        interval: the interval, seeds or noise that they give with it.
        value: ``number`` as a number, if the verdict's function compares with it.
        values: further numbers of ``number`` that it compares with, in the order in which it takes them.
        record: the kind of record that the claim waits for, if it is open.
        lesson: the lesson whose stored outputs decide it, such as "06_which_rank".
        open: why nothing here decides it yet.
        untestable: why nothing here can decide it.

    Raises:
        ValueError: an entry does not conform to that.
    """

    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    sentence: Annotated[str, Field(pattern=r"\.$")]
    source: Text
    read: Literal["full text", "abstract", "repository", "issue", "page", "lesson", "second-hand", "from memory"]
    kind: Literal["arithmetic", "mechanism", "small-scale", "at scale"]
    fair: Literal["yes", "sign only", "no"]
    why: Text
    changes: Text
    number: str = NONE_GIVEN
    interval: str = NONE_GIVEN
    value: float | None = None
    values: Sequence[float] = ()
    record: str = ""
    lesson: str = ""
    open: str = ""
    untestable: str = ""

    def __post_init__(self) -> None:
        for each in self.values if self.value is None else (self.value, *self.values):
            if f"{each:g}" not in self.number.replace(",", ""):
                raise ValueError(f"The claim {self.id!r} has the value {each!r}, which its number does not show.")
        if sum(map(bool, (self.lesson, self.open, self.untestable))) > 1:
            raise ValueError(f"The claim {self.id!r} has several of lesson, open and untestable; keep one of them.")
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
        return f"{self.source} [{self.read}]" if self.read in ("second-hand", "from memory") else self.source


@cache
def read_claims(path: Path = SHIPPED) -> dict[str, Claim]:
    """Read all claims by id, in the order of the file.

    Raises:
        ValueError: the file is no TOML, an id is there twice, or a claim lacks an entry, or has an unknown one (such as
            a typed verdict) or one that does not conform.
    """
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["claim"]
    claims = {entry["id"]: Claim(**entry) for entry in entries}
    if len(claims) < len(entries):
        raise ValueError(f"{path} has a claim twice; give each an id of its own.")
    return claims
