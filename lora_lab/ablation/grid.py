"""Trials as data: a run described so completely that equal descriptions always mean the same run.

A :class:`Trial` is one call of :func:`lora_lab.fit`, written down. Its ``key`` is a hash of its content, the same on
every machine, so that a folder of results can be resumed, extended, and put together from several machines.
A :class:`Grid` is a product of ranks, learning rates, seeds and methods; a list of trials is as good.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch

from lora_lab.lean.step import Lean
from lora_lab.methods import LoRA, Method
from lora_lab.system.schema import Positive, Seed, Size, as_number, check
from lora_lab.system.wording import short_repr, shortened
from lora_lab.train import TrainConfig, check_options

# Entries of a trial's content that are there only if in use.
BASE_DTYPE, AUTOCAST = "base_dtype", "autocast"
_NO_CHANGE = ("accumulate", "gradient_checkpointing", "lean")  # of a result
_MOST = 1_000_000  # trials of a grid
_KEY_LENGTH = 16  # hexadecimal digits: among a million trials, two share a key with probability 3e-8


@dataclass(frozen=True)
class _Varied:
    """What a grid varies: a method, its peak learning rate, and its seed."""

    method: Method
    lr: float
    seed: int = 0


@dataclass(frozen=True, eq=False)
# The last base's fields come first: Trial(method, lr, seed, steps=...)
class Trial(TrainConfig, _Varied):
    """One training run as data. Trials are equal if their content is: a list equals a tuple, and 1 equals 1.0.

    A config becomes a trial by ``Trial(method, **vars(config))``.

    Args:
        method: FullFineTuning(), LoRA(...), ...
        lr, seed, steps, batch_size, batches, schedule, warmup, weight_decay, clip, eval_every, eval_examples: as for
            :class:`lora_lab.train.TrainConfig`. The defaults of ``warmup`` and ``eval_every`` are filled in.
        autocast: as there; part of the content.
        accumulate, gradient_checkpointing, lean: as there. They change no result but for rounding, and for what dropout
            draws in micro-batches, so two trials that differ in them are equal; all but the lean step's ``base_dtype``,
            which rounds the frozen weights and is part of the content.
        task: the task's fingerprint, and
        model: the model's, filled in when the trial joins a sweep (see :meth:`bound`).

    Raises:
        ValueError: the method has no name of its own, or a number is out of range.
    """

    lr: Positive  # these two again, since here they may be given by position
    seed: Seed = 0
    task: str | None = field(default=None, kw_only=True)
    model: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = getattr(self.method, "name", "")
        if _address(_methods().get(name)) != _address(type(self.method)):
            raise ValueError(
                f"The class {type(self.method).__name__} has the name {name!r}, which is not its own; give it one, "
                "or its results look like another method's."
            )
        for name, value in {"warmup": self.warmup_steps, "eval_every": self.evaluation_interval}.items():
            object.__setattr__(self, name, value)

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
        """Return the same trial on the task and the model of these fingerprints.

        Raises:
            ValueError: it is bound to others already.
        """
        for name, fingerprint in {"task": task, "model": model}.items():
            bound_to = getattr(self, name)
            if bound_to not in (None, fingerprint):
                raise ValueError(
                    f"Trial {self.key} belongs to the {name} {bound_to}, but this sweep's is {fingerprint}; make it "
                    f"anew with {name}=None, or sweep with that {name}."
                )
        return replace(self, task=task, model=model)

    def to_dict(self) -> dict[str, Any]:
        """Return the content in values of JSON, each in one form only."""
        settings = {name: value for name, value in self.settings().items() if name not in _NO_CHANGE}
        content = {"method": self.method.settings(), **settings, "task": self.task, "model": self.model}
        if isinstance(self.lean, Lean) and self.lean.base_dtype is not None:
            content[BASE_DTYPE] = str(self.lean.base_dtype)
        return {name: _plain(value) for name, value in content.items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Trial:
        """Return the trial of which :meth:`to_dict` gave the content.

        Raises:
            ValueError: an entry is missing or unknown, or the method is not known here.
        """
        try:
            settings = {**content["method"]}
            name, methods = settings.pop("name"), _methods()
            if name not in methods:
                raise ValueError(f"The method {name!r} is not known here; import the module that defines it first.")
            options = {**content, "method": methods[name](**settings)}
            if BASE_DTYPE in options:
                options["lean"] = Lean(_dtype(options.pop(BASE_DTYPE)))
            if AUTOCAST in options:
                options[AUTOCAST] = _dtype(options[AUTOCAST])
            return cls(**options)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            reason = shortened(str(error))
            raise ValueError(f"This is not a trial's content ({reason}): {short_repr(content)}.") from None


class Grid(list[Trial]):
    """All combinations of methods, ranks, learning rates and seeds, as a list of trials without repeats.

        Grid(ranks=[1, 2, 4, 8], lrs=[3e-3, 1e-2], seeds=range(5), steps=200, alpha_per_rank=2)

    Args:
        ranks: each LoRA method is tried with each of them; methods without a rank are tried once.
        lrs: peak learning rates.
        seeds: each seeds the adapter's weights and the order of the data, so that trials pair by seed.
        methods: templates; their rank is replaced, and their alpha too if a rule is given.
        alpha: one alpha for all ranks (the update's scaling alpha / rank then falls with the rank), or
        alpha_per_rank: alpha as a multiple of the rank (the scaling is then the same for all ranks). Without
            either, the templates keep their alpha.
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
        check_options(
            "Grid", options, [each.name for each in fields(Trial) if each.name not in ("method", "lr", "seed")]
        )
        alpha_per_rank = check(alpha_per_rank, Positive | None, "alpha_per_rank")
        if alpha is not None and alpha_per_rank is not None:
            raise ValueError(f"alpha is {alpha} and alpha_per_rank {alpha_per_rank}; give one of them, or neither.")
        for name, values in {"ranks": ranks, "lrs": lrs, "seeds": seeds, "methods": methods}.items():
            if len(values) == 0 and (name != "ranks" or any(isinstance(method, LoRA) for method in methods)):
                raise ValueError(f"{name} is empty, so there is nothing to try; give at least one value.")
        if (count := math.prod(map(len, (ranks, lrs, seeds, methods)))) > _MOST:
            raise ValueError(f"These are {count} trials, but a grid has at most {_MOST}; try fewer values.")
        sizes = [check(rank, Size, "rank") for rank in ranks]

        def at_rank(template: Method, rank: int) -> Method:
            if not isinstance(template, LoRA):
                return template
            fixed = template.alpha if alpha is None else alpha
            return replace(template, rank=rank, alpha=fixed if alpha_per_rank is None else alpha_per_rank * rank)

        tried = [at_rank(each, rank) for each in methods for rank in (sizes if isinstance(each, LoRA) else [0])]
        super().__init__(dict.fromkeys(Trial(*each, **options) for each in itertools.product(tried, lrs, seeds)))

    def __repr__(self) -> str:
        return f"Grid of {len(self)} trials"


def _dtype(name: str) -> torch.dtype:
    """Return the dtype of which ``str`` gave the name."""
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if str(dtype) != name or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype's name, such as 'torch.bfloat16'.")
    return dtype


def _methods() -> dict[str, type[Method]]:
    """Return the classes of methods by name, users' own included; where two share a name, the later one counts."""

    def family(parent: type[Method]) -> list[type[Method]]:
        return [parent, *itertools.chain.from_iterable(map(family, parent.__subclasses__()))]

    return {each.name: each for each in family(Method) if "name" in vars(each)}


def _address(method: type[Method] | None) -> tuple[str, str] | None:
    """Return where a class is defined: running a notebook's cell again makes a new class with the same address."""
    return method and (method.__module__, method.__qualname__)


def _plain(value: Any) -> Any:
    """Return a value in JSON's types, and equal values in one form: 16.0 is 16, -0.0 is 0, a tuple is a list."""
    value = as_number(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
