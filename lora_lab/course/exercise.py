"""What an exercise is: a solution, fresh inputs, known mistakes with a sentence each, and hints.

Each file in ``exercises/`` holds those of one lesson:

    exercise = exercises_of("03_lora_from_scratch")

    @exercise(
        "forward",
        inputs=layer_case,
        mistakes={"The scaling is missing. Multiply the update by alpha / r.": lambda x, W, A, B, alpha: ...},
        hints=["Two paths are added: ..."],
        minutes=6,
        difficulty=1,
        praise="This line is LoRA: all else is bookkeeping.",
    )
    def forward(x, W, A, B, alpha):
        \"\"\"The result is W x + alpha / r * B A x, for every shape, rank and alpha.\"\"\"
        return x @ W.T + alpha / len(A) * (x @ A.T @ B.T)

The solution is the oracle: an answer is right if it agrees with the solution on all inputs. Where there are many right
answers (classes, scripts, random starts), ``probes`` decide instead, each with broken answers that show that it works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Solution = TypeVar("Solution", bound=Callable[..., Any])
EXERCISES: dict[str, Exercise] = {}  # by name, in the order of the lessons


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """A tensor of that shape in float32, drawn from the standard normal distribution."""
    return torch.from_numpy(rng.normal(size=shape)).float()


@dataclass(frozen=True)
class Mistake:
    """A known wrong answer.

    Args:
        answer: a function with the solution's parameters, or a class, that makes the mistake.
        sentence: what broke, and the likely mistake: at most 160 characters in full sentences.
    """

    answer: Callable[..., Any]
    sentence: str


@dataclass(frozen=True)
class Probe:
    """A property that every right answer has.

    Args:
        passes: called with the answer (the function or class itself) and a numpy Generator; returns whether the answer
            has the property.
        sentence: what is wrong with an answer without it, as for :class:`Mistake`.
        broken: one or more answers that lack the property and pass all probes before it. Tests judge them.
    """

    passes: Callable[[Any, np.random.Generator], bool]
    sentence: str
    broken: tuple[Callable[..., Any], ...]


@dataclass(frozen=True)
class Exercise:
    """An exercise.

    Args:
        name: unique; the learner writes ``check(name, answer)``.
        solution: a right answer. Its docstring states the invariant: what a passed check has shown.
        lesson: the file name of its lesson without suffix, such as "03_lora_from_scratch".
        inputs: takes a numpy Generator and returns fresh arguments, a tuple. Small arrays, never rank 1, alpha = rank,
            square or symmetric, so that mistakes do not coincide. Not needed where there are probes.
        mistakes: in order; an answer that agrees with one on all inputs gets its sentence. With probes, their broken
            answers.
        probes: in order of likelihood; the first that an answer does not pass gives its sentence.
        hints: shown one at a time; the last may say almost all.
        minutes: a guess of the time that a learner needs.
        difficulty: 1 core, 2 deeper, 3 project.
        praise: one line after success: why it matters.
        draws: number of fresh inputs for one check.
        rtol, atol: tolerance relative to the largest entry of the expected array, and absolute tolerance. Integers,
            booleans and strings are compared exactly.

    Raises:
        ValueError: the exercise has neither inputs nor probes, or its solution has no docstring.
    """

    name: str
    solution: Callable[..., Any]
    lesson: str
    inputs: Callable[[np.random.Generator], tuple[Any, ...]] | None
    mistakes: tuple[Mistake, ...]
    probes: tuple[Probe, ...]
    hints: tuple[str, ...]
    minutes: int
    difficulty: int
    praise: str
    draws: int
    rtol: float
    atol: float

    def __post_init__(self) -> None:
        if (self.inputs is None) == (not self.probes):
            raise ValueError(f"The exercise {self.name!r} needs either inputs or probes.")
        if not self.solution.__doc__:
            raise ValueError(f"The solution of {self.name!r} needs a docstring, which states what the check proves.")

    @property
    def invariant(self) -> str:
        """What a passed check has shown, in words: the solution's docstring."""
        return self.solution.__doc__ or ""


def exercises_of(lesson: str) -> Callable[..., Callable[[Solution], Solution]]:
    """The decorator ``exercise`` for the solutions of one lesson.

    Args:
        lesson: as in :class:`Exercise`.
    """

    def exercise(
        name: str,
        *,
        hints: Sequence[str],
        minutes: int,
        difficulty: int,
        praise: str,
        inputs: Callable[[np.random.Generator], tuple[Any, ...]] | None = None,
        mistakes: Mapping[str, Callable[..., Any] | Sequence[Callable[..., Any]]] | None = None,
        probes: Sequence[Probe] = (),
        draws: int = 6,
        rtol: float = 1e-5,
        atol: float = 1e-9,
    ) -> Callable[[Solution], Solution]:
        """Register the decorated solution. Mistakes are {sentence: a function, or several}; the rest as in Exercise."""
        planted = [Mistake(broken, probe.sentence) for probe in probes for broken in probe.broken]
        for sentence, answers in (mistakes or {}).items():
            planted += [Mistake(each, sentence) for each in ([answers] if callable(answers) else answers)]

        def register(solution: Solution) -> Solution:
            if name in EXERCISES:
                raise ValueError(f"There are two exercises with the name {name!r}; rename one of them.")
            EXERCISES[name] = Exercise(
                name=name,
                solution=solution,
                lesson=lesson,
                inputs=inputs,
                mistakes=tuple(planted),
                probes=tuple(probes),
                hints=tuple(hints),
                minutes=minutes,
                difficulty=difficulty,
                praise=praise,
                draws=draws,
                rtol=rtol,
                atol=atol,
            )
            return solution

        return register

    return exercise
