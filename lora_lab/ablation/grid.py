"""Trials as data: a run described so completely that equal descriptions always mean the same run.

A :class:`Trial` is one call of :func:`lora_lab.fit`, written down. Its ``key`` is a hash of its content, the same on
every machine, so that a folder of results can be resumed, extended, and put together from several machines.
A :class:`Grid` is a product of ranks, learning rates, seeds and methods; a list of trials is as good.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lora_lab.lean.step import Lean
from lora_lab.methods import LoRA, Method
from lora_lab.system.schema import Positive, Seed, to_python
from lora_lab.train import TrainConfig

# Entries of a trial's content that are there only if in use.
BASE_DTYPE, AUTOCAST = "base_dtype", "autocast"
_MOST = 1_000_000  # trials of a grid
_NO_CHANGE = ("accumulate", "gradient_checkpointing", "lean")  # of a result


def hash_content(content: Mapping[str, Any]) -> str:
    """Return a trial's key: 16 hexadecimal digits of the SHA-256 of its content as canonical JSON.

    Among a million trials, two share a key with probability 3e-8.
    """
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


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
        model: the model's, filled in when the trial joins a sweep.

    Raises:
        ValueError: the method has no name of its own, or a number is out of range.
    """

    lr: Positive  # these two again, since here they may be given by position
    seed: Seed = 0
    task: str | None = field(default=None, kw_only=True)
    model: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "name" not in vars(type(self.method)):
            raise ValueError(
                f"The class {type(self.method).__name__} has no name of its own; give it one, or its results look like "
                "another method's."
            )
        for name, value in {"warmup": self.warmup_steps, "eval_every": self.evaluation_interval}.items():
            object.__setattr__(self, name, value)

    @cached_property
    def key(self) -> str:
        """The trial's identity (:func:`hash_content`)."""
        return hash_content(self.to_dict())

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Trial) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    def to_dict(self) -> dict[str, Any]:
        """Return the content in values of JSON, each in one form only."""
        settings = {name: value for name, value in self.settings().items() if name not in _NO_CHANGE}
        content = {"method": self.method.settings(), **settings, "task": self.task, "model": self.model}
        if isinstance(self.lean, Lean) and self.lean.base_dtype is not None:
            content[BASE_DTYPE] = str(self.lean.base_dtype)
        return {name: _plain(value) for name, value in content.items()}


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
        if alpha is not None and alpha_per_rank is not None:
            raise ValueError(f"alpha is {alpha} and alpha_per_rank {alpha_per_rank}; give one of them, or neither.")
        for name, values in {"ranks": ranks, "lrs": lrs, "seeds": seeds, "methods": methods}.items():
            if len(values) == 0 and (name != "ranks" or any(isinstance(method, LoRA) for method in methods)):
                raise ValueError(f"{name} is empty, so there is nothing to try; give at least one value.")
        if (count := math.prod(map(len, (ranks, lrs, seeds, methods)))) > _MOST:
            raise ValueError(f"These are {count} trials, but a grid has at most {_MOST}; try fewer values.")

        def alpha_of(template: LoRA, rank: int) -> float:
            if alpha_per_rank is not None:
                return alpha_per_rank * rank
            return template.alpha if alpha is None else alpha

        tried = []
        for method in methods:
            if isinstance(method, LoRA):
                tried += [replace(method, rank=rank, alpha=alpha_of(method, rank)) for rank in ranks]
            else:
                tried.append(method)
        trials = (Trial(method, lr, seed, **options) for method in tried for lr in lrs for seed in seeds)
        super().__init__(dict.fromkeys(trials))

    def __repr__(self) -> str:
        return f"Grid of {len(self)} trials"


def _plain(value: Any) -> Any:
    """Return a value in JSON's types, and equal values in one form: 16.0 is 16, -0.0 is 0, a tuple is a list."""
    value = to_python(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
