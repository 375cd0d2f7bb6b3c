"""A bill: the bytes at the peak of a training step by part, and how they change in the course of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from lora_lab.costs.trace import Kind

MIB, GIB = 2**20, 2**30


class Part(StrEnum):
    """A part of a bill, in the order in which bills list them."""

    FROZEN = "frozen weights"
    TRAINED = "trained weights"
    GRADIENTS = "gradients"
    HEAD_GRADIENT = "gradient of the head"  # until it is added to the embedding's, if both are one weight
    OPTIMISER = "optimiser state"
    SAVED_ATTENTION = "saved: attention"
    SAVED_MLP = "saved: MLP"
    SAVED_NORMS = "saved: norms"
    SAVED_ADAPTERS = "saved: adapters"
    SAVED_OTHER = "saved: other layers"
    LOGITS = "logits and loss"
    RECOMPUTED = "recomputed activations"
    TEMPORARIES = "temporaries"
    WORKSPACE = "cuBLAS workspace"
    ENDS = "unused ends of blocks"
    REST = "the rest, unexplained"

    __repr__ = str.__repr__  # a bill's parts print as a dictionary of plain strings


PARTS = tuple(Part)
STATIC = (Part.FROZEN, Part.TRAINED, Part.GRADIENTS, Part.OPTIMISER)
SAVED = tuple(Part(f"saved: {kind}") for kind in Kind if kind != Kind.LOGITS)


@dataclass(frozen=True)
class Moment:
    """What is allocated after one operation: the phase of the step, bytes by part, and the operation's number."""

    phase: str
    parts: Mapping[str, int]
    operation: int

    @property
    def total_bytes(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Bill:
    """What a training step needs at its peak, in bytes by part; the parts add up to the peak.

    Args:
        parts: part -> bytes, with the names of :class:`Part`. Batches themselves are not counted.
        moment: the operation at which the peak is reached.
        source: "predicted", "measured", or "estimated for CUDA, not measured".
        setting: the model, the setup and the batch.
        saved: what autograd has saved at the end of the forward pass, by the kind of module that saved it. A storage
            that several modules save counts once, and for adapters only if no other kind of module saves it.
        timeline: up to 400 moments of the step in order; those within 25 operations of the peak are among them.
        reserved_bytes: the most that CUDA's allocator reserved on the device; None elsewhere.
    """

    parts: Mapping[str, int]
    moment: str
    source: str
    setting: str
    saved: Mapping[str, int] = field(default_factory=dict)
    timeline: Sequence[Moment] = field(default=(), repr=False)
    reserved_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """The most that is allocated at one moment."""
        return sum(self.parts.values())

    @property
    def saved_bytes(self) -> int:
        """What autograd has saved at the end of the forward pass."""
        return sum(self.saved.values())

    @property
    def static_bytes(self) -> int:
        """Weights, gradients and optimiser state at the peak. An early peak comes before the gradients."""
        return sum(self.parts.get(part, 0) for part in STATIC)

    def to_dict(self) -> dict[str, Any]:
        """Return the bill without its timeline, in values of JSON."""
        return {
            "peak_bytes": self.peak_bytes,
            "bytes_by_part": dict(self.parts),
            "saved_bytes": self.saved_bytes,
            "saved_bytes_by_kind": dict(self.saved),
            "reserved_bytes": self.reserved_bytes,
            "moment": self.moment,
            "source": self.source,
            "setting": self.setting,
        }

    def plus(self, part: str, size: int) -> Bill:
        """Return the same bill with one more part, of ``size`` bytes."""
        return replace(self, parts=ordered({**self.parts, part: size}))

    def __sub__(self, other: Bill) -> Difference:
        names = [part for part in PARTS if part in self.parts or part in other.parts]
        return Difference(
            {part: self.parts.get(part, 0) - other.parts.get(part, 0) for part in names}, self.setting, other.setting
        )

    def __str__(self) -> str:
        lines = [f"{self.setting}: {self.source}"]
        lines += [
            f"  {part:<26}{_mib(size):>12} MiB {size / self.peak_bytes:>5.0%}" for part, size in self.parts.items()
        ]
        lines.append(f"  {'peak':<26}{_mib(self.peak_bytes):>12} MiB, in the {self.moment}")
        if self.reserved_bytes is not None:
            lines.append(f"  {'reserved by the allocator':<26}{_mib(self.reserved_bytes):>12} MiB")
        return "\n".join(lines)


@dataclass(frozen=True)
class Difference:
    """One bill minus another, in bytes by part: negative where the first needs less."""

    parts: Mapping[str, int]
    first: str
    second: str

    @property
    def peak_bytes(self) -> int:
        """The difference of the peaks."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        lines = [f"{self.first} minus {self.second}"]
        lines += [f"  {part:<26}{_mib(size, '+'):>12} MiB" for part, size in self.parts.items()]
        return "\n".join([*lines, f"  {'peak':<26}{_mib(self.peak_bytes, '+'):>12} MiB"])


def _mib(size: int, sign: str = "") -> str:
    return f"{size / MIB:{sign},.1f}"


def ordered(parts: Mapping[str, int]) -> dict[str, int]:
    """Return the parts that are not 0, in the order in which bills list them."""
    return {part: parts[part] for part in PARTS if parts.get(part)}
