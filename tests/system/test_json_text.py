"""What is not JSON becomes null or JSON, and nothing else changes."""

import json
import math
from pathlib import Path

import pandas
import pytest

from lora_lab.system.json_text import json_text, plain, rows_of


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


def test_what_json_has_no_form_for_is_an_error():
    with pytest.raises(ValueError, match="object"):
        json_text({"a": object()})
