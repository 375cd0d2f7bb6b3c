"""Odd numbers, texts, JSON values, patterns and Python objects to damage things with."""

from __future__ import annotations

import math
import random
from typing import Any, TypeVar

import hypothesis
from hypothesis import strategies as st

T = TypeVar("T")

INTEGERS = [0, 1, -1, 2, 3, 7, 64, 255, 256, 1000, 65536, 10**6, 10**9, 2**31 - 1, 2**31, 2**32, 2**53 + 1]
INTEGERS += [2**60, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31), -(2**63), 10**30, 10**400]
FLOATS = [0.0, -0.0, 0.5, -0.5, 1e-5, 1e-30, 5e-324, 1e30, 1e39, 1.7e308, -1e308, math.nan, math.inf, -math.inf]
TEXTS = ["", " ", "0", "1", "10000", "1e-5", "nan", "None", "true", "x", "llama", "q_proj", "../x", "/etc/passwd"]
TEXTS += ["\0", "\n", "\\", '"', "'", "{}", "{{", "%s", "\u2028", "\ufeff", "\ud83d", "e\u0301", "\U0001f600"]
TEXTS += [100 * "long ", 10**5 * "x", "-", "--help", "$(true)", ";true", "~", "C:\\x", "con", "a/b", ".", "..", "*"]
WORDS_OF_TEMPLATES = ["<|im_start|>", "<|im_end|>", "{% for x in y %}", "{{ x }}", "{# x", "<s>", "</s>"]

# The first seven take exponential time on a long name; most others are no patterns.
PATTERNS = [r"((\w+\.?)+)+!", r"(.*)*x", r"(a|a)*b", r"(.*.*.*.*.*.*.*.*)!", r"(\w+)+\d", r"(?:.|\w)*!", "(x+x+)+y"]
PATTERNS += ["(", "[", "*", "+a", "(?i)x", "a{99999999999}", "(?P<n>", r"\1", "(?<=a*)b", "a**", "[z-a]", "\\", "(?"]
PATTERNS += [")", 500 * "(" + 500 * ")", 5000 * "(a|", "(?R)", "(?#", "[[:alpha:]]", "q_proj$", "^q_proj", ".*", ""]
PATTERNS += ["|", ".*|x"]
_ATOMS = ["q_proj", "layers", r"\.", ".", r"\d", r"\w", "[a-z]", "(", ")", "(?:", "|", "*", "+", "?", "{2,5}", "{0,}"]
_ATOMS += ["^", "$", "\\", "[", "]", "(?i)", "x", "0", "(?=", "(?!", "é", r"\b", "{"]


def drawn(strategy: st.SearchStrategy[T], count: int, seed: int) -> list[T]:
    """So many values of a strategy of hypothesis, the same for a seed."""
    values: list[T] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(value: T) -> None:
        values.append(value)

    collect()
    return values


class Values:
    """Odd values, of which a random generator chooses; hypothesis has drawn some of them.

    Args:
        seed: of hypothesis.
    """

    def __init__(self, seed: int) -> None:
        text = st.text(st.characters(), max_size=20)
        scalar = st.none() | st.booleans() | st.integers() | st.floats() | text
        tree = st.recursive(
            scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4)
        )
        self.texts = TEXTS + drawn(text, 60, seed)
        self.json = drawn(tree, 120, seed)

    def integer(self, rng: random.Random) -> int:
        return rng.choice(INTEGERS) + rng.choice((0, 0, 0, 1, -1))

    def number(self, rng: random.Random) -> float:
        return rng.choice((self.integer, lambda rng: rng.choice(FLOATS), _any_float))(rng)

    def text(self, rng: random.Random) -> str:
        return rng.choice(self.texts)

    def json_value(self, rng: random.Random) -> Any:
        """Any value that ``json.dumps`` writes, NaN among them."""
        return rng.choice(
            (
                self.number,
                self.number,
                self.text,
                lambda rng: rng.choice((None, True, False)),
                lambda rng: rng.choice(([], {}, [None], [[]], [1, 2], ["x"], {"a": 1}, {"": None}, [{}])),
                lambda rng: rng.choice(self.json),
                lambda rng: nested(rng.choice((3, 50, 450)), rng.random() < 0.5),
                lambda rng: {"type": self.text(rng), "rope_type": self.text(rng), "content": self.text(rng)},
            )
        )(rng)

    def pattern(self, rng: random.Random) -> str:
        """A regular expression, a broken one, or one that takes for ever."""
        if rng.random() < 0.5:
            return rng.choice(PATTERNS)
        return "".join(rng.choices(_ATOMS, k=rng.randint(1, 12)))


def nested(depth: int, of_lists: bool) -> Any:
    """A list in a list in a list, or objects in objects."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if of_lists else {"a": value}
    return value


def _any_float(rng: random.Random) -> float:
    return rng.choice((1, -1)) * rng.random() * 10.0 ** rng.randint(-40, 40)
