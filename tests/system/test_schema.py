"""Content of files and arguments against annotated types, tensors that must be finite, and results as JSON."""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Required

import numpy as np
import pandas
import pytest
import torch
from pydantic import Field
from torch._subclasses.fake_tensor import FakeTensorMode
from typing_extensions import TypedDict

from lora_lab.system.schema import (
    Count,
    Number,
    Positive,
    Seed,
    Size,
    check,
    check_fields,
    check_finite,
    json_text,
    plain,
    rows_of,
)


class Content(TypedDict, total=False):
    rank: Required[Size]
    steps: Count
    dropout: Annotated[float, Field(ge=0, lt=1)]
    loss: Number
    targets: str | list[str] | None
    alphas: dict[str, Positive]
    kind: Literal["LORA", "IA3"]
    name: Annotated[str, Field(pattern=r"^\S+$")]


@dataclass(frozen=True)
class Shape:
    width: Size
    scale: Positive = 1.0

    def __post_init__(self) -> None:
        check_fields(self)


def test_a_seed_is_one_that_torch_takes():
    for seed in (-(2**63), 2**63 - 1):
        torch.Generator().manual_seed(check(seed, Seed, "seed"))
    for seed in (-(2**63) - 1, 2**63):
        with pytest.raises(ValueError, match=f"^seed is {seed}, but it must be "):
            check(seed, Seed, "seed")


def test_content_of_the_types_is_accepted_and_more_than_they_name():
    check({"rank": 1}, Content)
    for targets in (None, "all", ["q"]):
        more = {"steps": 0, "dropout": 0, "loss": -1.5, "alphas": {"^q": 0.5}, "another": object()}
        check({"rank": 1, "targets": targets, **more}, Content, "a.json")  # a whole number is a number
    assert Shape(3, 2) == Shape(3, 2.0)


NESTED = []
for _ in range(100_000):
    NESTED = [NESTED]
REFUSED = [  # a call, and how its sentence begins
    *(
        (partial(check, content, Content, "a.json"), f"a.json{says}")
        for content, says in [
            ({}, " lacks the entry 'rank'."),
            ([], " is [], but it must be a valid dictionary."),
            (None, " is None, but it must be a valid dictionary."),
            ({"rank": "1"}, ": rank is '1', but it must be a valid integer."),
            ({"rank": True}, ": rank is True, but it must be a valid integer."),
            ({"rank": 1.0}, ": rank is 1.0, but it must be a valid integer."),
            ({"rank": 0}, ": rank is 0, but it must be greater than or equal to 1."),
            ({"rank": 2**31}, ": rank is 2147483648, but it must be less than or equal to 2147483647."),
            ({"rank": 1, "dropout": 1}, ": dropout is 1, but it must be less than 1."),
            ({"rank": 1, "dropout": math.nan}, ": dropout is nan, but it must be less than 1."),
            ({"rank": 1, "loss": math.inf}, ": loss is inf, but it must be a finite number."),
            ({"rank": 1, "alphas": {"^q": 0}}, ": alphas.^q is 0, but it must be greater than 0."),
            ({"rank": 1, "alphas": {"x" * 10**6: 0}}, ": alphas.xxx"),
            ({"rank": 1, "name": "a b"}, ": name is 'a b', but it must match pattern "),
            ({"rank": 1, "kind": "lora"}, ": kind is 'lora', but it must be 'LORA' or 'IA3'."),
            ({"rank": 1, "targets": 5}, ": targets is 5, but it must be a valid string."),
            ({"rank": 1, "targets": [5]}, ": targets is [5], but it must be a valid string."),
            *(({"rank": value}, ": rank is ") for value in ("x" * 10**6, list(range(10**5)), NESTED)),
        ]
    ),
    *(
        (partial(check, value, Size, "steps"), "steps is ")
        for value in (None, "3", [3], 0.5, np.ones(2), torch.ones(1), np.float64(0.5), np.bool_(True), 2**31)
    ),
    (partial(Shape, 0), "width is 0, but it must be greater than or equal to 1."),
    (partial(Shape, 1, -1), "scale is -1, but it must be greater than 0."),
]


@pytest.mark.parametrize(("call", "begins"), REFUSED)
def test_what_is_wrong_is_said_in_one_short_sentence_that_names_it(call, begins):
    with pytest.raises(ValueError, match=r"\.$") as caught:
        call()
    assert str(caught.value).startswith(begins)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("whole", [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3)])
@pytest.mark.parametrize("half", [0.5, np.float16(0.5), np.array(0.5), torch.tensor(0.5)])
def test_numbers_of_other_libraries_become_pythons(whole, half):
    assert (type(check(whole, Size, "steps")), type(check(half, Number, "lr"))) == (int, float)
    shape = Shape(whole, half)
    assert (shape, type(shape.width), type(shape.scale)) == (Shape(3, 0.5), int, float)


# Tensors


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_tensor_with_a_number_that_is_not_finite_is_named(dtype):
    good = torch.randn(3, 4).to(dtype)
    check_finite([("a", good), ("b", good)])
    for number in (math.nan, math.inf, -math.inf):
        bad = good.float().clone()
        bad[1, 2] = number
        bad = bad.to(dtype)
        if bad.float().isfinite().all():  # a type without infinity may have rounded to its largest number
            continue
        with pytest.raises(ValueError, match=r"^b holds numbers that are NaN or infinite, or above 1e\+09; "):
            check_finite([("a", good), ("b", bad), ("c", bad)])
        with pytest.raises(ValueError, match=r"^x\.safetensors: b holds numbers that are NaN"):
            check_finite([("b", bad)], "x.safetensors")


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_whose_products_are_infinite_is_not_taken_for_a_weight(sign):
    check_finite([("b", torch.tensor([0.5, sign * 1e9]))])
    with pytest.raises(ValueError, match=r"^b holds numbers .*, or above 1e\+09; "):
        check_finite([("b", torch.tensor([0.5, sign * 1.001e9]))])


def test_tensors_without_values_and_whole_numbers_pass():
    with FakeTensorMode():
        fake = torch.ones(2)
    check_finite([("i", torch.ones(2, dtype=torch.int32)), ("m", torch.ones(2, device="meta")), ("f", fake)])
    check_finite(
        [("empty", torch.ones(0, 3)), ("scalar", torch.tensor(1.0)), ("parameter", torch.nn.Parameter(torch.ones(2)))]
    )


# Results as JSON


def test_numbers_that_json_lacks_are_null_and_tuples_are_lists():
    value = {"a": (1, math.nan, [math.inf, {"b": -math.inf}]), "path": Path("x") / "y", "text": "nan", "yes": True}
    assert plain(value) == {
        "a": [1, None, [None, {"b": None}]],
        "path": str(Path("x") / "y"),
        "text": "nan",
        "yes": True,
    }
    assert json.loads(json_text(value)) == plain(value)
    assert plain({"a": 1.5, "b": None}) == {"a": 1.5, "b": None}


def test_a_frames_missing_values_are_null_and_its_numbers_pythons():
    frame = pandas.DataFrame({"n": pandas.array([1, None], dtype="Int64"), "x": [0.5, math.nan], "t": ["a", None]})
    assert rows_of(frame) == [{"n": 1, "x": 0.5, "t": "a"}, {"n": None, "x": None, "t": None}]
    assert json.loads(json_text(rows_of(frame.assign(m=[1, 2])))) == [
        {"n": 1, "x": 0.5, "t": "a", "m": 1},
        {"n": None, "x": None, "t": None, "m": 2},
    ]
