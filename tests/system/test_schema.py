"""Content of files against annotated types: what is accepted, and the sentence that names what is not."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Protocol, Required, runtime_checkable

import numpy as np
import pytest
import torch
from pydantic import Field
from typing_extensions import TypedDict

from lora_lab.system.schema import Count, Number, Positive, Seed, Size, check, check_fields


class Content(TypedDict, total=False):
    rank: Required[Size]
    steps: Count
    dropout: Annotated[float, Field(ge=0, lt=1)]
    loss: Number
    targets: str | list[str] | None
    alphas: dict[str, Positive]
    kind: Literal["LORA", "IA3"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"steps": 0},
        {"dropout": 0},  # a whole number is a number
        {"loss": -1.5},
        {"targets": None},
        {"targets": "all"},
        {"targets": ["q"]},
        {"alphas": {"^q": 0.5}},
        {"another": object()},
    ],
)
def test_content_of_the_types_is_accepted(more):
    check({"rank": 1, **more}, Content, "a.json")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "a.json lacks the entry 'rank'."),
        ([], "a.json is [], but it must be an object."),
        (None, "a.json is None, but it must be an object."),
        ({"rank": "1"}, "a.json: rank is '1', but it must be a whole number."),
        ({"rank": True}, "a.json: rank is True, but it must be a whole number."),
        ({"rank": 1.0}, "a.json: rank is 1.0, but it must be a whole number."),
        ({"rank": 0}, "a.json: rank is 0, but it must be at least 1."),
        ({"rank": 2**31}, "a.json: rank is 2147483648, but it must be at most 2147483647."),
        ({"rank": 1, "steps": -1}, "a.json: steps is -1, but it must be at least 0."),
        ({"rank": 1, "dropout": 1}, "a.json: dropout is 1, but it must be less than 1."),
        ({"rank": 1, "dropout": math.nan}, "a.json: dropout is nan, but it must be less than 1."),
        ({"rank": 1, "loss": math.nan}, "a.json: loss is nan, but it must be a finite number."),
        ({"rank": 1, "loss": math.inf}, "a.json: loss is inf, but it must be a finite number."),
        ({"rank": 1, "alphas": {"^q": 0}}, "a.json: alphas.^q is 0, but it must be greater than 0."),
        ({"rank": 1, "kind": "lora"}, "a.json: kind is 'lora', but it must be 'LORA' or 'IA3'."),
    ],
)
def test_other_content_is_refused_in_one_sentence(content, sentence):
    with pytest.raises(ValueError, match=r"\.$") as caught:
        check(content, Content, "a.json")
    assert str(caught.value) == sentence


@pytest.mark.parametrize("targets", [5, [5], {"q": 1}])
def test_of_several_types_one_must_fit(targets):
    with pytest.raises(ValueError, match=r"^a\.json: targets(\.0)? is .*, but it must be a string\.$"):
        check({"rank": 1, "targets": targets}, Content, "a.json")


def test_a_message_stays_short_whatever_the_value():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for value in ("x" * 10**6, list(range(10**5)), nested):
        with pytest.raises(ValueError, match="rank") as caught:
            check({"rank": value}, Content, "a.json")
        assert len(str(caught.value)) < 200


@dataclass(frozen=True)
class Shape:
    width: Size
    scale: Positive = 1.0

    def __post_init__(self) -> None:
        check_fields(self)


def test_the_fields_of_a_dataclass_are_checked_as_it_is_made():
    assert Shape(3, 2) == Shape(3, 2.0)
    with pytest.raises(ValueError, match=r"^width is 0, but it must be at least 1\.$"):
        Shape(0)
    with pytest.raises(ValueError, match=r"^scale is -1, but it must be greater than 0\.$"):
        Shape(1, -1)


@pytest.mark.parametrize("three", [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3)])
def test_a_whole_number_of_numpy_or_torch_is_returned_as_pythons(three):
    assert type(check(three, Size, "steps")) is int
    assert type(Shape(three, three).width) is int


@pytest.mark.parametrize(
    "half", [0.5, np.float16(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)]
)
def test_so_is_a_number(half):
    assert type(check(half, Number, "lr")) is float
    assert Shape(1, half) == Shape(1, 0.5)
    with pytest.raises(ValueError, match=r"^steps is 0\.5, but it must be a whole number\.$"):
        check(half, Size, "steps")


@pytest.mark.parametrize("value", [None, "3", [3], np.ones(2), torch.ones(1), object(), np.bool_(True), 2**31])
def test_what_is_no_such_number_is_refused_by_the_name_of_the_argument(value):
    with pytest.raises(ValueError, match=r"^steps is .*, but it must be .*\.$"):
        check(value, Size, "steps")


def test_a_seed_is_one_that_torch_takes():
    for seed in (-(2**63), 2**63 - 1):
        torch.Generator().manual_seed(check(seed, Seed, "seed"))
    for seed in (-(2**63) - 1, 2**63):
        with pytest.raises(ValueError, match=f"^seed is {seed}, but it must be at "):
            check(seed, Seed, "seed")


@runtime_checkable
class Engine(Protocol):
    """Something with a method."""

    def run(self) -> int: ...


@dataclass(frozen=True)
class Car(Shape):
    """Its fields are those of a shape too."""

    engine: Engine | None = None
    kind: ClassVar[str] = "car"


def test_a_field_may_be_of_any_class():
    assert Car(1).engine is None
    with pytest.raises(ValueError, match=r"^engine is 'v8', but it must be an instance of .*Engine\.$"):
        Car(1, engine="v8")


def test_a_long_name_is_cut_off():
    with pytest.raises(ValueError, match=r"alphas\.x+ \.\.\. is 0, but") as caught:
        check({"rank": 1, "alphas": {"x" * 10**6: 0}}, Content)
    assert len(str(caught.value)) < 500
