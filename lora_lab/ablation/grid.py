"""Trials as data: what a run is, said so completely that the same words always name the same run.

A :class:`Trial` is one call of :func:`lora_lab.fit`, written down. Its ``key`` is a hash of its content, the same on
every machine, so that a folder of results can be resumed, extended, and put together from several machines.
A :class:`Grid` is a product of ranks, learning rates, seeds and methods; a list of trials is as good.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Integral, Real
from operator import index
from typing import Any

from lora_lab.methods import LoRA, Method
from lora_lab.train import TrainConfig

_KEY_LENGTH = 16  # hexadecimal digits: among a million trials, two share a key with probability 3e-8


@dataclass(frozen=True, eq=False)
class Trial:
    """One training run as data. Two trials are equal if their content is: lists and tuples, 1 and 1.0 are the same.

    Args:
        method: FullFineTuning(), LoRA(...), ...
        lr, seed, steps, batch_size, schedule, warmup, weight_decay, clip, eval_every, eval_examples: as for
            :func:`lora_lab.fit`. The defaults of ``warmup`` and ``eval_every`` are filled in.
        task: the task's fingerprint, and
        model: the model's, filled in when the trial joins a sweep (see :meth:`bound`).

    Raises:
        ValueError: the method is no Method, or has no name of its own, or a number is out of range.
    """

    method: Method
    lr: float
    seed: int = 0
    steps: int = field(kw_only=True)
    batch_size: int = field(default=8, kw_only=True)
    schedule: str = field(default="cosine", kw_only=True)
    warmup: int | None = field(default=None, kw_only=True)
    weight_decay: float = field(default=0.0, kw_only=True)
    clip: float | None = field(default=1.0, kw_only=True)
    eval_every: int | None = field(default=None, kw_only=True)
    eval_examples: int | None = field(default=None, kw_only=True)
    task: str | None = field(default=None, kw_only=True)
    model: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise ValueError(f"method is {self.method!r}, but it must be one such as LoRA(rank=8) or FullFineTuning().")
        name = getattr(self.method, "name", None)
        if _address(_methods().get(name)) != _address(type(self.method)):
            raise ValueError(
                f"The class {type(self.method).__name__} has the name {name!r}, which is not its own, so its results "
                "could not be told from another method's; give the class a name of its own."
            )
        for name in ("seed", "steps", "batch_size", "warmup", "eval_every", "eval_examples"):
            self._normalise(name, index)
        for name in ("lr", "weight_decay", "clip"):
            self._normalise(name, float)
        settings = TrainConfig(**self.options).settings()
        for name in ("warmup", "eval_every"):  # the defaults that fit fills in
            object.__setattr__(self, name, settings[name])

    def _normalise(self, name: str, kind: Any) -> None:
        """numpy's numbers become Python's; what is no number is left for the check."""
        value = getattr(self, name)
        if isinstance(value, Real) and not isinstance(value, bool):
            try:
                object.__setattr__(self, name, kind(value))
            except TypeError:
                raise ValueError(f"{name} is {value!r}, but it must be a whole number.") from None

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of :func:`lora_lab.fit`, all of them but those that change no result."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("method", "task", "model")}

    @cached_property
    def key(self) -> str:
        """The trial's identity: 16 hexadecimal digits of the SHA-256 of its content as canonical JSON."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:_KEY_LENGTH]

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Trial) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    def bound(self, task: str, model: str) -> Trial:
        """The same trial on the task and the model of these fingerprints.

        Raises:
            ValueError: it is bound to others already.
        """
        for name, given in {"task": task, "model": model}.items():
            own = getattr(self, name)
            if own not in (None, given):
                raise ValueError(
                    f"Trial {self.key} belongs to the {name} {own}, but this sweep's is {given}; make it anew with "
                    f"{name}=None, or sweep with that {name}."
                )
        return replace(self, task=task, model=model)

    def to_dict(self) -> dict[str, Any]:
        """The content in values of JSON, each in one form only."""
        return {"method": _plain(self.method.settings())} | {
            f.name: _plain(getattr(self, f.name)) for f in fields(self)[1:]
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Trial:
        """The trial of which :meth:`to_dict` gave the content.

        Raises:
            ValueError: an entry is missing or unknown, or the method is not known here.
        """
        try:
            settings = {**content["method"]}  # a TypeError where it is no mapping
            name = settings.pop("name")
            if name not in _methods():
                raise ValueError(f"The method {name!r} is not known here; import the module that defines it first.")
            return cls(**{**content, "method": _methods()[name](**settings)})
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"This is not a trial's content ({error}): {reprlib.repr(content)}.") from None


class Grid(Sequence[Trial]):
    """All combinations of methods, ranks, learning rates and seeds, as a sequence of trials without repeats.

        Grid(ranks=[1, 2, 4, 8], lrs=[3e-3, 1e-2], seeds=range(5), steps=200, alpha_per_rank=2)

    Args:
        ranks: each LoRA method is tried with each of them; methods without a rank are tried once.
        lrs: peak learning rates.
        seeds: each seeds the adapter's weights and the order of the data, so that trials pair by seed.
        methods: templates; their rank is replaced, and their alpha too if a rule is given.
        alpha: one alpha for all ranks (the update's scaling alpha / rank then falls with the rank), or
        alpha_per_rank: alpha as a multiple of the rank (the scaling is then the same for all ranks). Without
            either the templates' own alpha holds.
        **options: ``steps`` and what else a :class:`Trial` takes, the same for all.

    Raises:
        ValueError: a list is empty, both rules for alpha are given, or as for :class:`Trial`.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        lrs: Sequence[float],
        seeds: Sequence[int],
        methods: Sequence[Method] = (LoRA(),),
        *,
        alpha: float | None = None,
        alpha_per_rank: float | None = None,
        **options: Any,
    ) -> None:
        if alpha is not None and alpha_per_rank is not None:
            raise ValueError(f"alpha is {alpha} and alpha_per_rank {alpha_per_rank}; give one of them, or neither.")
        for name, values in {"ranks": ranks, "lrs": lrs, "seeds": seeds, "methods": methods}.items():
            if len(values) == 0 and (name != "ranks" or any(isinstance(method, LoRA) for method in methods)):
                raise ValueError(f"{name} is empty, so there is nothing to try; give at least one value.")

        def variants(method: Method) -> list[Method]:
            if not isinstance(method, LoRA):
                return [method]
            found = []
            for rank in map(index, ranks):
                strength = method.alpha if alpha is None else alpha
                strength = strength if alpha_per_rank is None else alpha_per_rank * rank
                found.append(replace(method, rank=rank, alpha=strength))
            return found

        ready = [variant for method in methods for variant in variants(method)]
        made = (Trial(*choice, **options) for choice in itertools.product(ready, lrs, seeds))
        self._trials = tuple(dict.fromkeys(made))

    def __len__(self) -> int:
        return len(self._trials)

    def __getitem__(self, place: int | slice) -> Trial | tuple[Trial, ...]:
        return self._trials[place]

    def __repr__(self) -> str:
        return f"Grid of {len(self)} trials"


def _methods() -> dict[str, type[Method]]:
    """The classes of methods by name, those that users have written too; of one name, the latest counts."""

    def below(kind: type[Method]) -> list[type[Method]]:
        return [kind, *itertools.chain.from_iterable(below(child) for child in kind.__subclasses__())]

    return {kind.name: kind for kind in below(Method) if "name" in vars(kind)}


def _address(kind: type | None) -> tuple[str, str] | None:
    """Where a class is defined: a notebook's cell that is run again makes another class of the same address."""
    return kind and (kind.__module__, kind.__qualname__)


def _plain(value: Any) -> Any:
    """A value in JSON's types, one form for what is equal: 16.0 is 16, -0.0 is 0, a tuple is a list."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return int(value) if float(value).is_integer() else float(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence):
        return [_plain(entry) for entry in value]
    raise ValueError(f"{value!r} has no place in a trial; its values are texts, finite numbers, lists and dicts.")
