"""What a claim and a verdict are, which function decides which claim, the rules that all of them obey, and the ledger.

:func:`read_claims` reads what others state, and what is known of our test of it, from ``claims.toml``, which a person
can review. It never holds a verdict that something here can decide. A claim that no function decides has one of three
entries instead: ``lesson``, which lesson measures it, ``open``, what is missing, or ``untestable``, what cannot be had
here.

    @decides("checkpoint-size")                                        # counted or computed here, in seconds
    def size(claim): ...

    @decides("rank-one-is-enough", record="ablation", on="the rank")   # from each record of that kind
    def rank_one(record): ...

    @decides("qlora-time", published="litgpt")                         # from what others measured
    def qlora_time(claim, published): ...

A function takes the claim only if it compares with the claim's numbers. Each returns whether the claim holds, with
words; or yields that for each case that was tried, perhaps with the case's conditions; or returns a whole
:class:`Result`. No verdict is hard-coded: new data, or another number in the claim, can change it. A claim that only a
lesson measures has no function: what the lesson's stored outputs show decides it.

    print(table(load()))                                               # the ledger: each claim with its verdict
    print(verdict("rank-one-suffices").explained())                    # one, beside what shows it
"""

from __future__ import annotations

import difflib
import re
import textwrap
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from inspect import signature
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from lora_lab.studies import records
from lora_lab.studies.records import KINDS, Record, Text
from lora_lab.system.files import read_json
from lora_lab.system.provenance import machine_info, shipped_folder
from lora_lab.system.schema import check

NONE_GIVEN = "none given"
SHIPPED = Path(__file__).with_name("claims.toml")
WIDTH = 100  # of the ledger's lines
WAITS = "waits for a study"
# Of records or lessons; None is that of those that come with lora_lab.
Folder = str | Path | None
Records = Mapping[str, Record]  # by name


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Claim:
    """Something that is stated of LoRA, with a number if its authors give one.

    Args:
        id: lower-case words with hyphens.
        sentence: the claim, in one sentence.
        source: author, year and section or table, or where it is published.
        read: how the source was read; the last two are not the source's own words. A question that no source is known
            to answer is our own.
        kind: what kind of statement it is.
        fair: whether our test is fair to the claim.
        why: why it is fair, or what it cannot show.
        changes: what would decide the claim, if it is open, or change its verdict.
        number: the number that its authors give.
        interval: the interval, seeds or noise that they give with it.
        values: the numbers of ``number`` that the verdict's function compares with, in its order.
        scale: what our evidence is of, such as "digits"; none if there is none yet.
        weaker: by which weaker rule than those of docs/claims.md a verdict is made; none if it meets them.
        lesson: the lesson whose stored outputs decide it, such as "06_which_rank".
        open: what would decide it, if nothing here does yet.
        untestable: why nothing here can decide it.

    Raises:
        ValueError: an entry does not conform to that.
    """

    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    sentence: Annotated[str, Field(pattern=r"\.$")]
    source: Text
    read: Literal[
        "full text", "abstract", "repository", "issue", "page", "second-hand", "from memory", "our own question"
    ]
    kind: Literal["arithmetic", "mechanism", "small-scale", "at scale"]
    fair: Literal["yes", "sign only", "no"]
    why: Text
    changes: Text
    number: str = NONE_GIVEN
    interval: str = NONE_GIVEN
    values: Sequence[float] = ()
    scale: str = ""
    weaker: str = ""
    lesson: str = ""
    open: str = ""
    untestable: str = ""

    @property
    def stated(self) -> float:
        """The number that the claim is about, which its entry lists first.

        Raises:
            ValueError: the claim has none.
        """
        if not self.values:
            raise ValueError(f"The claim {self.id!r} has no values to compare with; add them to its entry.")
        return self.values[0]

    @property
    def cited(self) -> str:
        """The source, and in brackets how it was read if not in its own words."""
        return f"{self.source} [{self.read}]" if self.read in ("second-hand", "from memory") else self.source

    @property
    def own(self) -> bool:
        """Whether the question is our own: no source is named that states the sentence."""
        return self.read == "our own question"

    @property
    def whose(self) -> str:
        """Who states it, in a few words: the beginning of the source, up to the year; or that it is our own."""
        if self.own:
            return self.read
        found = re.match(r"[^;,(]+(, issues? \d+)|[^;(]{,40}?\b20\d\d\b|[^,;(]+", self.source)
        return found[0].strip() if found else self.source


@cache
def read_claims(path: Path = SHIPPED) -> Mapping[str, Claim]:
    """Read all claims by id, in the order of the file.

    Raises:
        ValueError: the file is no TOML or lists no claims; a claim lacks an entry, or has an unknown one (such as a
            typed verdict) or one that does not conform; or two claims have one id.
        FileNotFoundError: there is no such file.
    """
    stored = tomllib.loads(path.read_text(encoding="utf-8"))
    every = {}
    for claim in pydantic.TypeAdapter(list[Claim]).validate_python(stored.get("claim")):
        if claim.id in every:
            raise ValueError(f"{path} has two claims with the id {claim.id!r}; give each an id of its own.")
        every[claim.id] = claim
    return MappingProxyType(every)  # it cannot be changed, because all callers share it


STANDS, FALLS, DEPENDS, OPEN, UNTESTABLE = "stands", "falls", "depends", "open", "untestable"
VERDICTS = (STANDS, FALLS, DEPENDS, OPEN, UNTESTABLE)
WEAKER = "\N{DAGGER}"  # marks what a weaker rule decided
ANY_MACHINE = "any"
# The metadata of a lesson's output in which lora_lab.course.lessons.claims stores what it shows.
IN_OUTPUT = "claims"


@dataclass(frozen=True)
class Result:
    """What became of a claim.

    Args:
        verdict: one of :data:`VERDICTS`.
        measured: our number, with interval and seeds; or if it is open, why.
        on: what it depends on, if it depends.
        shown_by: the function, record or publication that shows it; filled in by :func:`judge`.
        date: the day of that measurement, or None where nothing was measured.
        machine: where it was measured; "any" if the same comes out on every machine.
    """

    verdict: str
    measured: str
    on: str = ""
    shown_by: str = ""
    date: str | None = None
    machine: str | None = None

    def __str__(self) -> str:
        """The verdict, and on what it depends."""
        return f"{self.verdict} on {self.on}" if self.on else self.verdict


# Whether a claim holds (None: the measurement cannot tell), and that in words.
Answer = tuple[bool | None, str]
# That of each case, and perhaps its conditions, as for decide_cases.
Cases = Iterable[tuple[Any, ...]]
# What cases differ in: in words, or the names of the conditions that each case gives.
Differing = str | tuple[str, ...]


@dataclass(frozen=True)
class Decider:
    """A function that decides a claim, and what it reads.

    Args:
        function: takes the claim, if it has a parameter ``claim`` because it compares with the claim's numbers, and
            what it reads.
        record: a kind of record, of which it takes one.
        published: a file of ``records/published``, which it takes.
        beside: a second kind of record, of which it takes all; there may be none.
        on, always: as for :func:`decide_cases`.
    """

    function: Callable[..., Result | Answer | Cases]
    record: str = ""
    published: str = ""
    beside: str = ""
    on: Differing = ""
    always: bool = False

    def decide(self, claim: Claim, *sources: Any) -> Result:
        """Return what the function decides from a record and those beside it, published numbers, or nothing.

        Raises:
            KeyError, ValueError: the record lacks what is needed, such as a setup, a column or a seed.
        """
        stated = [claim] if "claim" in signature(self.function).parameters else []
        found = self.function(*stated, *sources)
        if isinstance(found, Result):
            return found
        if isinstance(found, tuple):
            return Result({True: STANDS, False: FALLS, None: OPEN}[found[0]], str(found[1]))
        return decide_cases(found, self.on, self.always)


DECIDERS: dict[str, Decider] = {}  # id of a claim -> what decides it


def decides(*claims: str, **options: Any) -> Callable[[Callable], Callable]:
    """Register a function as the one that decides these claims; the options are those of :class:`Decider`."""

    def register(function: Callable) -> Callable:
        DECIDERS.update(dict.fromkeys(claims, Decider(function, **options)))
        return function

    return register


@dataclass(frozen=True)
class Entry:
    """A claim and what became of it.

    Args:
        claim, result: the two.
        where: in a word or two, what decides the claim, or what it waits for.
        again: what measures it anew: a function that has just run, or a command with its time.
    """

    claim: Claim
    result: Result
    where: str
    again: str

    @property
    def verdict(self) -> str:
        """The verdict, a mark if a weaker rule decided it, and the scale of its evidence: "stands†: digits"."""
        if self.result.verdict in (OPEN, UNTESTABLE):
            return self.result.verdict
        return f"{self.result.verdict}{WEAKER * bool(self.claim.weaker)}: {self.claim.scale}"

    def to_dict(self) -> dict[str, Any]:
        """Return the entry in values of JSON; ``shown_by`` ends with our number."""
        claim, result = self.claim, self.result
        measured = f"depends on {result.on}: {result.measured}" if result.on else result.measured
        return {
            "id": claim.id,
            "sentence": claim.sentence,
            "number": claim.number,
            "interval": claim.interval,
            "source": claim.cited,
            "own": claim.own,
            "kind": claim.kind,
            "fair": claim.fair,
            "verdict": result.verdict,
            "on": result.on,
            "scale": claim.scale,
            "weaker": claim.weaker,
            "shown_by": f"{result.shown_by}: {measured}",
            "date": result.date,
            "machine": result.machine,
        }

    def explained(self) -> str:
        """Return all about the claim: its source, their number beside ours, what shows it, how fair it is and why."""
        claim, result = self.claim, self.result
        theirs = claim.number if claim.interval == NONE_GIVEN else f"{claim.number} ({claim.interval})"
        lines = {
            "claim": claim.sentence,
            "source": f"{claim.source} (read: {claim.read})",
            "kind": claim.kind,
            "their number": theirs,
            "verdict": str(result),
            "scale": claim.scale or "no evidence yet",
            **({f"weaker rule {WEAKER}": claim.weaker} if claim.weaker else {}),
            "our number" if claim.lesson or claim.id in DECIDERS else "why": result.measured,
            "shown by": result.shown_by,
            "measured": f"{result.date}, {result.machine}" if result.date else "not yet",
            "fair test": f"{claim.fair}: {claim.why}",
            "would decide it" if result.verdict in (OPEN, UNTESTABLE) else "would change it": claim.changes,
        }
        paragraphs = [f"{name + ':':<16} {text}" for name, text in lines.items()]
        return "\n".join([claim.id, *(textwrap.fill(each, WIDTH, subsequent_indent=17 * " ") for each in paragraphs)])


def judge(claim: Claim, folder: Folder = None, lessons: Folder = None, every: Records | None = None) -> Entry:
    """Return a claim with its verdict, computed.

    Args:
        folder: of the records.
        lessons: folder of the lessons.
        every: the folder's records, where they have been read.
    """
    decider = DECIDERS.get(claim.id)
    if claim.lesson:
        result = _read_lesson(claim, shipped_folder("notebooks") if lessons is None else Path(lessons))
        again = f"python notebooks/execute.py {claim.lesson}.ipynb runs the lesson anew; --lessons takes yours."
        return Entry(claim, result, f"lesson {claim.lesson.partition('_')[0]}", again)
    if decider and (kind := decider.record):
        result = _judge_records(claim, decider, records.load_all(folder=folder) if every is None else every)
        again = "makes the record anew" if result.date else "will make the record"
        again = f"lora-lab record {kind} {again}, in {KINDS[kind].hours} on two cores."
        return Entry(claim, result, f"record {kind}" if result.date else WAITS, again)
    if decider is None:
        again = f"Nothing here measures it: {claim.open or claim.untestable}."
        if claim.untestable:
            return Entry(claim, Result(UNTESTABLE, claim.untestable, shown_by="nothing here"), "nothing here", again)
        return Entry(claim, Result(OPEN, claim.open, shown_by="nothing yet"), WAITS, again)
    if decider.published:
        source = records.published(decider.published)
        shown_by, machine = f"records/published/{decider.published}.json", f"theirs: {source.what}"
        result = replace(decider.decide(claim, source), shown_by=shown_by, date=source.date, machine=machine)
        again = "Its numbers are published ones, and were compared again just now; their machine is not here."
        return Entry(claim, result, decider.published.partition("-")[0], again)
    shown_by = f"{decider.function.__module__}.{decider.function.__name__}"
    today = datetime.now(UTC).date().isoformat()
    result = replace(decider.decide(claim), shown_by=shown_by, date=today, machine=ANY_MACHINE)
    where = "counted" if claim.kind == "arithmetic" else "computed"
    return Entry(claim, result, where, "It was computed again just now, on this machine.")


class _Notebook(TypedDict):
    cells: list[dict[str, Any]]


def _read_lesson(claim: Claim, folder: Path) -> Result:
    """Return the verdict in the stored outputs of a lesson, with the day and the machine of its last run."""
    shown_by, path = f"lesson {claim.lesson}", folder / f"{claim.lesson}.ipynb"
    notebook = check(read_json(path), _Notebook, str(path))
    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        stored = output.get("metadata", {}).get(IN_OUTPUT, {})
        if claim.id in stored.get("results", {}):
            result = Result(**stored["results"][claim.id])
            return replace(result, shown_by=shown_by, date=stored["date"], machine=stored["machine"])
    return Result(OPEN, "the lesson's stored outputs do not show it", shown_by=shown_by)


def judge_record(claim: Claim, record: Record, *beside: Record) -> Result:
    """Return the verdict of one record on a claim, beside those of a second kind where the claim asks for one.

    A record that lacks what is needed, such as a setup or a column, decides nothing: that is a KeyError, or the
    ValueError that functions of tables raise. Any other error of the function that decides is raised.
    """
    try:
        return DECIDERS[claim.id].decide(claim, record, *beside)
    except (KeyError, ValueError) as error:
        return Result(OPEN, f"this record lacks what is needed ({type(error).__name__}: {error})")


def _pool(parts: Sequence[Record]) -> Record:
    """Return records of one kind as one, with the rows of all, dated as the newest."""
    newest = max(parts, key=lambda part: part.date)
    settings = {data: each for part in parts for data, each in part.settings.items()}
    device = " and ".join(dict.fromkeys(part.device for part in parts))
    return replace(newest, rows=[row for part in parts for row in part.rows], settings=settings, device=device)


def _find_records(kind: str, every: Records) -> dict[str, Record]:
    """Return the records of a kind by name; those of one that grows sweep by sweep are parts of one."""
    found = {name: record for name, record in every.items() if record.what == kind}
    if len(found) > 1 and KINDS[kind].grows:
        return {" and record ".join(found): _pool([*found.values()])}
    return found


def _judge_records(claim: Claim, decider: Decider, every: Records) -> Result:
    """Return the verdict of all records of a kind: what is decided counts, not what one of them leaves open.

    Where several machines have a record and disagree, it depends on the machine.
    """
    beside, chosen = (_find_records(kind, every) for kind in (decider.beside, decider.record))
    results = []
    for name, record in chosen.items():
        result = judge_record(claim, record, *beside.values())
        shown_by = " and ".join(f"record {each}" for each in (name, *beside))
        results.append(replace(result, shown_by=shown_by, date=record.date, machine=record.device))
    if not results:
        return Result(OPEN, f"there is no record {decider.record!r}", shown_by=f"no record {decider.record!r}")
    decided = [result for result in results if result.verdict != OPEN] or results
    newest = max(decided, key=lambda result: result.date or "")
    if len({result.verdict for result in decided}) == 1:
        return newest
    texts = "; ".join(f"{result.machine}: {result.verdict}, {result.measured}" for result in decided)
    names = ", ".join(result.shown_by for result in decided)
    return replace(newest, verdict=DEPENDS, on="the machine", measured=texts, shown_by=names)


def decide_cases(cases: Cases, on: Differing = "", always: bool = False) -> Result:
    """Return the verdict on a claim that is stated without conditions, from the cases that were tried.

    Args:
        cases: whether the claim holds in a case (None: the measurement cannot tell), the case in words, and where
            ``on`` is a tuple, the condition of each of these names.
        on: what the cases differ in; or the names of their conditions, of which those that turn the answer are stated.
        always: the sentence says "never", "at most" or the like, so that one case in which it fails refutes it.

    Returns:
        It stands if it holds in every case, falls if it fails in some and holds in none, depends if it
        holds in some and fails in others (and falls if ``always``), and is open otherwise.
    """
    cases = list(cases)
    holds, fails, unclear = ([words for each, words, *_ in cases if each is answer] for answer in (True, False, None))
    groups = {"yes": holds, "no": fails, "not decided": unclear}
    text = ". ".join(f"{word}: {'; '.join(texts)}" for word, texts in groups.items() if texts) or "no case was tried"
    if holds and fails and not always:
        return Result(DEPENDS, text, on if isinstance(on, str) else find_turning_conditions(cases, on))
    return Result(FALLS if fails else STANDS if holds and not unclear else OPEN, text)


def above(lower: float, upper: float, limit: float = 0.0) -> bool | None:
    """Return whether an interval lies above a limit, or (False) below it; None if it holds the limit."""
    return True if lower > limit else False if upper < limit else None


def below(lower: float, upper: float, limit: float) -> bool | None:
    """Return whether an interval lies below a limit, or (False) above it; None if it holds the limit."""
    return True if upper < limit else False if lower > limit else None


def find_turning_conditions(cases: Sequence[tuple[Any, ...]], names: Sequence[str]) -> str:
    """Return the conditions whose change alone turns the answer, in words, such as "the rank and the model".

    Args:
        cases: as for :func:`decide_cases`, with conditions.
        names: of the conditions, as they are to be read: ("the rank", "the model").

    Returns:
        Each condition in which alone two cases with opposite answers differ; if there is none, "several conditions at
        once".
    """
    holds, fails = ([case for answer, _, *case in cases if answer is which] for which in (True, False))
    alone = set()
    for one, other in product(holds, fails):
        differing = [name for name, here, there in zip(names, one, other, strict=True) if here != there]
        if len(differing) == 1:
            alone.update(differing)
    *first, last = [name for name in names if name in alone] or ["several conditions at once"]
    return f"{', '.join(first)} and {last}" if first else last


def within(lower: float, upper: float, low: float, high: float) -> bool | None:
    """Return whether an interval lies within the limits of what is claimed, or (False) outside; None if partly."""
    if low <= lower and upper <= high:
        return True
    return False if upper < low or lower > high else None


def near(value: float, claimed: float, share: float = 0.1) -> bool:
    """Return whether a number is what was claimed, within a share of it."""
    return abs(value - claimed) <= share * abs(claimed)


# The ledger: each claim with its verdict


def load(folder: Folder = None, lessons: Folder = None) -> dict[str, Entry]:
    """Return all claims with their verdicts, by id, computed from records, lessons and functions; this takes seconds.

    Args:
        folder: of the records; None is :func:`lora_lab.studies.records.shipped`.
        lessons: folder of the lessons; None is that of the lessons that come with lora_lab.
    """
    every = records.load_all(folder=folder)
    return {name: judge(claim, folder, lessons, every) for name, claim in read_claims().items()}


def verdict(claim_id: str, folder: Folder = None, lessons: Folder = None) -> Entry:
    """Return one claim with its verdict.

    Args:
        folder: as for :func:`load`.
        lessons: as for :func:`load`.

    Raises:
        ValueError: there is no such claim.
    """
    every = read_claims()
    if claim_id not in every:
        nearest = ", ".join(difflib.get_close_matches(claim_id, every, cutoff=0))
        raise ValueError(f"There is no claim {claim_id!r}; the nearest are {nearest}.")
    return judge(every[claim_id], folder, lessons)


def table(entries: Mapping[str, Entry], width: int = WIDTH) -> str:
    """Return the claims: id and sentence, and below the verdict with its scale, whose it is, and what decides it.

    Args:
        entries: by id.
        width: columns of a line, at least 100. Long sentences are cut; the wider the lines, the fewer.
    """
    lines = []
    for name, entry in entries.items():
        lines.append(f"{name:<31}{textwrap.shorten(entry.claim.sentence, width - 31, placeholder=' ...')}")
        lines.append(f"{'':<8}{entry.verdict:<50}{entry.claim.whose:<21.20}{entry.where}")
    weaker = sum(WEAKER in entry.verdict for entry in entries.values())
    waiting = sum(entry.where == WAITS for entry in entries.values())
    lines += ["", f"{len(entries)} claims: {_count(entries.values())}; {waiting} open ones wait for a study."]
    for own, words in ((False, "Stated by others"), (True, "Our own questions")):
        of_kind = [entry for entry in entries.values() if entry.claim.own == own]
        lines.append(f"{words}: {len(of_kind)}, of which {_count(of_kind)}.")
    lines.append(f"{WEAKER}: a weaker rule decided, as {weaker} times. Why, and more on one: lora-lab claims ID")
    return "\n".join(lines)


def _count(entries: Collection[Entry]) -> str:
    counts = Counter(entry.result.verdict for entry in entries)
    return ", ".join(f"{counts[word]} {word}" for word in VERDICTS)


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
        raise ValueError(f"{path} is of the kind {record.what!r}, but must be one of {', '.join(KINDS)}; measure one.")
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
    if not re.fullmatch(r"lora-lab record \w+( --device \S+)?", record.command):
        yield f"was made by {record.command!r}, which does not measure every case; leave out all but --device"
    if absent := _find_setups_without_rows(record):
        yield f"has no row of {', '.join(absent)}, which its settings name; do not edit it by hand"
    for claim_id, decider in DECIDERS.items():
        if decider.record == record.what:
            try:
                decider.decide(read_claims()[claim_id], record)
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
