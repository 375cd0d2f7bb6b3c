"""What people ask about LoRA, and lessons: to each question one sentence, one number, its evidence, and what to do.

A person writes the sentence and what to do, in ``answers.toml``, beside the rows of the ledger that carry it and the
verdict of each that it was written for. The rest is computed: the number is read out of a row's words, or out of a
record, and the dots count where the rows that are decided were seen. If a verdict has changed since, the answer says
so, and docs/answers.md is not written until somebody has read the sentence again.

    print(table(load()))                      # all of them
    print(load("rank")["rank"].explained())   # one, with its rows
"""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import AfterValidator, ConfigDict, Field
from safetensors.torch import load_file

from lora_lab.ablation import overfitting
from lora_lab.adapters.peft_format import shipped
from lora_lab.inject import inject
from lora_lab.methods import LoRA
from lora_lab.models.llama import Llama
from lora_lab.models.shapes import config
from lora_lab.studies import records
from lora_lab.studies.claims.compared import select_inner_rates
from lora_lab.studies.claims.deciding import OPEN, STANDS, UNTESTABLE, WIDTH, Entry, judge, read_claims
from lora_lab.studies.records import Record, Text

SHIPPED = Path(__file__).with_name("answers.toml")
NOT_SETTLED = "Not settled here: "
COUNTED, SMALL, SMOLLM2, PUBLISHED = "a count", "small models", "SmolLM2", "published at scale"
READ = ("full text", "abstract", "page", "repository")  # a source whose own words were read


def _of_words(most: int) -> AfterValidator:
    """Accept texts of so many words at most."""

    def check(text: str) -> str:
        if len(text.split()) > most:
            raise ValueError(f"it has {len(text.split())} words; at most {most} are read")
        return text

    return AfterValidator(check)


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Answer:
    """What a person wrote.

    Args:
        ask: the question in a word, as the command takes it.
        question: as a person types it.
        answer: one sentence.
        number: in words, with braces for its values, which are computed.
        do: what to do.
        link: the lesson or guide that shows it, from the root of the repository.
        rows: the claims that carry the sentence, each with the verdict that it was written for; none where the lesson
            that it links to shows it by construction.
        of: the one of them whose numbers, theirs and ours, hold the values; a function of this file computes them if
            it is empty.
        pattern: a regular expression that finds them there.

    Raises:
        ValueError: an entry does not conform to that, or is too long.
    """

    ask: Annotated[str, Field(pattern=r"^[a-z]+$")]
    question: Annotated[str, Field(pattern=r"\?$")]
    answer: Annotated[str, Field(pattern=r"^[A-Z].*\.$"), _of_words(20)]
    number: Text
    do: Annotated[str, Field(pattern=r"\.$"), _of_words(40)]
    link: Text
    rows: dict[str, Literal["stands", "falls", "depends", "open", "untestable"]]
    of: str = ""
    pattern: str = ""


@dataclass(frozen=True)
class Found:
    """An answer with what is computed: its rows with their verdicts, and its number in words, "" if it is not found."""

    answer: Answer
    rows: Mapping[str, Entry]
    number: str

    @property
    def seen_on(self) -> list[str]:
        """What decided the rows: a count, small models, SmolLM2, published at scale; nothing if none is decided."""
        seen = set().union(*map(_seen_on, self.rows.values()))
        return [each for each in (COUNTED, SMALL, SMOLLM2, PUBLISHED) if each in seen]

    @property
    def scope(self) -> str:
        """The same in a sentence or two."""
        of_number = {_scale_of(row) for name, row in self.rows.items() if name == self.answer.of}  # open or not
        measured = [each for each in (SMOLLM2, SMALL) if each in of_number.union(self.seen_on)]
        ours = f"Measured on {' and '.join(measured)}." if measured else ""
        counted = "Counted, not measured." * (COUNTED in self.seen_on and not measured)
        also = "Others report on larger models, too." if ours or counted else "Measured by others."
        return " ".join(filter(None, (ours, counted, also * (PUBLISHED in self.seen_on))))

    @property
    def dots(self) -> str:
        """One for a count or small models, two for SmolLM2, and one more if it is published at scale, too.

        None at all, not even empty ones, where no row carries the sentence.
        """
        if not self.rows:
            return ""
        ours = 2 if SMOLLM2 in self.seen_on else bool({COUNTED, SMALL} & set(self.seen_on))
        count = ours + (PUBLISHED in self.seen_on)
        return "●" * count + "○" * (3 - count)

    @property
    def faults(self) -> list[str]:
        """Why a person should read the answer again: what no longer is as it was written for."""
        written = self.answer.rows
        verdicts = {name: entry.result.verdict for name, entry in self.rows.items()}
        faults = [
            f"{name} was {written[name]}, and now {now}" for name, now in verdicts.items() if now != written[name]
        ]
        if self.rows and self.answer.answer.startswith(NOT_SETTLED) == bool(self.seen_on):
            faults.append(f"it must begin with {NOT_SETTLED!r} if, and only if, none of its rows is decided")
        return faults if self.number else [*faults, "its number is not where it was"]

    def to_dict(self) -> dict[str, Any]:
        """Return the answer in values of JSON."""
        answer, verdicts = self.answer, {name: entry.verdict for name, entry in self.rows.items()}
        found = {"number": self.number, "strength": self.dots.count("●"), "seen_on": self.seen_on}
        written = {"ask": answer.ask, "question": answer.question, "answer": answer.answer}
        return written | found | {"do": answer.do, "rows": verdicts, "link": answer.link, "read_again": self.faults}

    def explained(self) -> str:
        """The answer in lines for reading."""
        lines = {
            "number": self.number,
            **({"strength": f"{self.dots} {', '.join(self.seen_on) or 'not settled here'}"} if self.rows else {}),
            "what to do": self.answer.do,
            "rests on": "; ".join(f"{name} ({entry.verdict})" for name, entry in self.rows.items())
            or "what the lesson builds",
            "more": self.answer.link,
            **({"read again": "; ".join(self.faults)} if self.faults else {}),
        }
        texts = [f"{f'{name}:':<12} {text}" for name, text in lines.items()]
        folded = [textwrap.fill(text, WIDTH, subsequent_indent=13 * " ", break_on_hyphens=False) for text in texts]
        return "\n".join([self.answer.question, self.answer.answer, "", *folded])


def _seen_on(row: Entry) -> set[str]:
    """Return where a row was seen, if it is decided: by us, and by a source that was read, if it states what stands."""
    if row.result.verdict in (OPEN, UNTESTABLE):
        return set()
    ours = _scale_of(row)
    return {ours, PUBLISHED} if row.result.verdict == STANDS and row.claim.read in READ else {ours}


def _scale_of(row: Entry) -> str:
    if row.claim.scale.startswith("published"):
        return PUBLISHED
    if row.claim.scale in ("counted", "predicted"):
        return COUNTED
    return SMOLLM2 if re.search("SmolLM2|two models", row.claim.scale) else SMALL


@cache
def read_answers(path: Path = SHIPPED) -> Mapping[str, Answer]:
    """Read what a person wrote, by the question in a word, in the order of the file.

    Raises:
        ValueError: the file is no TOML, or an entry is missing, unknown, of another form, or too long.
    """
    stored = tomllib.loads(path.read_text(encoding="utf-8"))
    return {each.ask: each for each in pydantic.TypeAdapter(list[Answer]).validate_python(stored.get("answer"))}


def load(ask: str | None = None) -> dict[str, Found]:
    """Return the answer to one question, or all of them, by the question in a word.

    Raises:
        ValueError: there is no such question.
    """
    written, claims, every = read_answers(), read_claims(), records.load_all()
    if ask is not None and ask not in written:
        raise ValueError(f"There is no answer {ask!r}; there are {', '.join(written)}.")
    chosen = [answer for name, answer in written.items() if ask in (None, name)]
    rows = {row: judge(claims[row], every=every) for answer in chosen for row in answer.rows}
    found = {}
    for answer in chosen:
        own = {row: rows[row] for row in answer.rows}
        found[answer.ask] = Found(answer, own, _say_number(answer, own, every))
    return found


def table(found: Mapping[str, Found]) -> str:
    """Return each question with its dots, and its sentence below."""
    lines = []
    for name, each in found.items():
        lines += [f"{name:<12} {each.dots} {each.answer.question}", f"{'':<16} {each.answer.answer}"]
        lines += [f"{'':<16} (read again: {fault})" for fault in each.faults]
    return "\n".join([*lines, "", "One, with its number and what to do: lora-lab answers rank"])


# Numbers


def _say_number(answer: Answer, rows: Mapping[str, Entry], every: Mapping[str, Record]) -> str:
    """Return the number of an answer in words, or "" if what holds it is not there, or says it in other words."""
    if not answer.of:
        values = NUMBERS[answer.ask](every)
        return answer.number.format(*values) if values else ""
    row = rows[answer.of]
    matches = [match.groups() for match in re.finditer(answer.pattern, f"{row.claim.number}; {row.result.measured}")]
    if not matches:
        return ""
    low, high = (extreme((match[0] for match in matches), key=float) for extreme in (min, max))
    return answer.number.format(*matches[0], low=low, high=high)


def _overfitting(every: Mapping[str, Record]) -> Record | None:
    return next((each for each in every.values() if each.what == "overfitting"), None)


def _validation_at_equal_fit(every: Mapping[str, Record]) -> list[str]:
    """Return LoRA's validation loss less full fine-tuning's at a training loss of 2 nats, with its bounds."""
    if (record := _overfitting(every)) is None:
        return []
    table = overfitting.by_training_loss(select_inner_rates(record)[0], [2.0])
    (row,) = table.query("setup == 'LoRA r=8' and n_train == 256").to_dict("records")
    return [f"{row[name]:+.2f}" for name in ("difference", "lower", "upper")]


def _numbers_of_the_keeper(every: Mapping[str, Record]) -> list[str]:
    """Return how many numbers the adapter that is shipped holds, and SmolLM2."""
    kept = load_file(shipped("lighthouse-keeper") / "adapter_model.safetensors")
    return [f"{each:,}" for each in (sum(tensor.numel() for tensor in kept.values()), count(None))]


def _trained_by_rank_8(every: Mapping[str, Record]) -> list[str]:
    """Return how many numbers LoRA of rank 8 trains on all linear layers of SmolLM2, and their share."""
    trained, all_of_them = count(LoRA(8, 16)), count(None)
    return [f"{trained:,}", f"{all_of_them:,}", f"{100 * trained / all_of_them:.1f}"]


def _megabytes_of_rank_8(every: Mapping[str, Record]) -> list[str]:
    """Return the megabytes of an adapter of rank 8 for all linear layers of SmolLM2, in float32, and of its weights."""
    return [f"{4 * count(method) / 1e6:.0f}" for method in (LoRA(8, 16), None)]


def count(method: LoRA | None) -> int:
    """Return how many numbers a method trains on SmolLM2, or how many that has."""
    with torch.device("meta"):
        model = Llama(config("smollm2-135m"))
        if method is not None:
            inject(model, method)
    return sum(each.numel() for each in model.parameters() if method is None or each.requires_grad)


NUMBERS: dict[str, Callable[[Mapping[str, Record]], list[str]]] = {
    "overfitting": _validation_at_equal_fit,
    "adapter": _numbers_of_the_keeper,
    "layer": _trained_by_rank_8,
    "file": _megabytes_of_rank_8,
}
