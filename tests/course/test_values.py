"""Equal up to rounding, and the most telling difference."""

import numpy as np
import pytest
import torch

from lora_lab.course.values import difference, factor, same, short_text, size

M = np.arange(6.0).reshape(2, 3)


class Hostile:
    """Whatever is asked of it raises."""

    def __eq__(self, other):
        raise RuntimeError

    __hash__ = None

    def __repr__(self):
        raise RuntimeError


EQUAL = {
    "None": (None, None),
    "int": (3, np.int64(3)),
    "large int": (10**30, 10**30),
    "int for a float": (2, 2.0),
    "tensor of no dimension": (torch.tensor(2.0), 2.0),
    "rounding": (0.1 + 0.2, 0.3),
    "float32": (torch.tensor(M).float() / 3, M / 3),
    "bfloat16": (torch.tensor(M).bfloat16(), M),
    "with a gradient": (torch.tensor(M, requires_grad=True), M),
    "small beside large": (np.array([1e6, 1e-3]), np.array([1e6, 0.0])),
    "nan": (np.array([np.nan, 1]), np.array([np.nan, 1])),
    "list and tuple": ([1, "a", M], (1, "a", torch.tensor(M))),
    "set": ({1, 2}, frozenset({2, 1})),
    "dict": ({"a": M, "b": [True]}, {"b": [True], "a": torch.tensor(M)}),
}
UNEQUAL = {
    "None": (None, 0),
    "zero for None": (0, None),
    "True for 1": (True, 1),
    "1 for True": (1, True),
    "whole float for an int": (3.0, 3),
    "text of a number": ("3", 3),
    "large int": (2**63 + 1, 2**63),
    "int beyond 2**53": (2**60 + 1, 2**60),
    "beyond the tolerance": (1.0001, 1.0),
    "shape": (M, M.T),
    "column": (np.ones((2, 1)), np.ones(2)),
    "number for a constant array": (1.0, np.ones(2)),
    "nan": (np.nan, 1.0),
    "infinity": (np.inf, 1.0),
    "list for an array": ([0.0, 1.0], np.array([0.0, 1.0])),
    "shorter": ((1, 2), (1, 2, 3)),
    "other order": ((1, 2), (2, 1)),
    "set": ({1}, {1, 2}),
    "key": ({"a": 1}, {"b": 1}),
    "value in a dict": ({"a": 1}, {"a": 2}),
    "hostile": (Hostile(), Hostile()),
    "array of objects": (np.array([None]), 1.0),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_values(name):
    value, expected = EQUAL[name]
    assert same(value, expected)
    assert difference(value, expected) is None


@pytest.mark.parametrize("name", UNEQUAL)
def test_unequal_values(name):
    assert not same(*UNEQUAL[name])


def test_modules_are_compared_by_their_tensors():
    layer, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    assert same(layer, layer)
    assert not same(other, layer)
    other.load_state_dict(layer.state_dict())
    assert same(other, layer)


@pytest.mark.parametrize(
    ("value", "expected", "sentence"),
    [
        (None, M, "The result is None. Is the return missing?"),
        ("x", M, "The result is a string, but it should be an array of shape (2, 3)."),
        ([[1, 2], [3]], M, "The result is a list, but it should be an array of shape (2, 3)."),
        (M.T, M, "The result is transposed: its shape is (3, 2), but it should be (2, 3)."),
        (M[0], M, "The result has the shape (3,), but it should have (2, 3)."),
        (M, 1.0, "The result is an array of shape (2, 3), but it should be a number."),
        (0, M, "The result is a number, but it should be an array of shape (2, 3)."),
        (2.5, 2, "The result consists of floats, but whole numbers are expected."),
        (M > 1, M, "The result consists of True or False, but floats are expected."),
        (M / np.array([1, 1, np.nan]), M, "The result holds NaN."),
        (np.inf, 1.0, "The result holds infinity."),
        (3, "x", "The result is a whole number, but it should be a string."),
        (3, (1, 2), "The result is a whole number, but it should be a tuple."),
        ((1, 2), (1, 2, 3), "The result has 2 items, but it should have 3."),
        ((1, M.T), (1, M), "Item 1 of the result is transposed: its shape is (3, 2), but it should be (2, 3)."),
        ({"a": 1}, {"a": 1, "b": 2}, "The result lacks the key 'b'."),
        ({"a": 1, "b": 2}, {"a": 1}, "The result has the key 'b', which should not be there."),
        ({"a": None}, {"a": 1}, "The entry 'a' is None. Is the return missing?"),
        (1, {"a": 1}, "The result is a whole number, but it should be a dict."),
        (1, {1, 2}, "The result is a whole number, but it should be a set."),
        (M + 1, M, None),
        (4, 3, None),
        ("x", "y", None),
    ],
)
def test_the_most_telling_difference(value, expected, sentence):
    assert difference(value, expected) == sentence


@pytest.mark.parametrize(
    ("value", "expected", "ratio"),
    [
        (3 * M, M, 3),
        (-M, M, -1),
        (torch.tensor(M) / 4, M, 0.25),
        (6, 3, 2),
        (M, M, None),
        (M + 1, M, None),
        (M, 0 * M, None),
        (0 * M, M, None),
        (M.T, M, None),
        ("x", M, None),
        (np.nan * M, M, None),
        (True, 2, None),
    ],
)
def test_factors(value, expected, ratio):
    assert factor(value, expected) == (None if ratio is None else pytest.approx(ratio))


def test_sizes_and_short_texts():
    assert size({"a": M, "b": [1, (2, 3)]}) == 9
    assert short_text(1 / 3) == "0.3333"
    assert short_text(7) == "7"
    assert short_text(torch.tensor([1 / 3, 2])) == "[0.333 2.   ]"
    assert short_text(np.zeros((5, 5))) == "an array of shape (5, 5)"
    assert short_text((1, [M[0], "a"], {"b": None})) == "(1, [[0. 1. 2.], 'a'], {'b': None})"
    assert len(short_text("x" * 1000)) < 50
    assert "Hostile" in short_text(Hostile())  # reprlib copes with a repr that raises
