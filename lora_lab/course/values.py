"""Values that functions return: whether two are equal up to rounding, and what the most telling difference is.

Numbers, booleans, strings, None, numpy arrays, tensors, and tuples, lists, sets and dicts of them. A tensor may equal
an array, and a list a tuple.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import torch

SHOWN = 12  # arrays with more entries are described by their shape
_MATCHING_KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf", "c": "iufc"}  # kinds of numpy's dtypes
_KIND_NAMES = {"b": "True or False", "i": "whole numbers", "u": "whole numbers", "f": "floats", "c": "complex numbers"}
_TYPE_NAMES = {"str": "a string", "NoneType": "None", "type": "a class"}
_TYPE_NAMES |= {name: f"a {name}" for name in ("list", "tuple", "dict", "set")}


def as_array(value: Any) -> np.ndarray | None:
    """Return a number, array or tensor as an array; None for everything else."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        array = value.float().numpy() if value.dtype in (torch.bfloat16, torch.float16) else value.numpy()
    elif isinstance(value, np.ndarray | np.generic | bool | int | float | complex):
        array = np.asarray(value)
    else:
        return None
    return array if array.dtype.kind in _MATCHING_KINDS else None


def same(value: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-9) -> bool:
    """Return whether a value equals another up to rounding.

    Args:
        rtol: tolerance of floats, relative to the largest entry of ``expected``.
        atol: absolute tolerance of floats.
    """
    try:
        return _same(value, expected, rtol, atol)
    except Exception:  # the comparison of objects that a learner made
        return False


def _same(value: Any, expected: Any, rtol: float, atol: float) -> bool:
    array, reference = as_array(value), as_array(expected)
    if array is not None and reference is not None:
        if array.shape != reference.shape or array.dtype.kind not in _MATCHING_KINDS[reference.dtype.kind]:
            return False
        if (array == reference).all() or reference.dtype.kind in "biu":
            return bool((array == reference).all())
        scale = np.max(np.abs(reference), initial=0.0, where=np.isfinite(reference))
        return np.allclose(array, reference, rtol=0.0, atol=atol + rtol * scale, equal_nan=True)
    if hasattr(expected, "state_dict"):  # a module
        return _same(value.state_dict(), expected.state_dict(), rtol, atol)
    if isinstance(expected, Mapping):
        keys = isinstance(value, Mapping) and value.keys() == expected.keys()
        return keys and all(_same(value[key], expected[key], rtol, atol) for key in expected)
    if isinstance(expected, list | tuple):
        length = isinstance(value, list | tuple) and len(value) == len(expected)
        return length and all(_same(*pair, rtol, atol) for pair in zip(value, expected, strict=True))
    if isinstance(expected, AbstractSet):
        return isinstance(value, AbstractSet) and set(value) == set(expected)
    return type(value) is type(expected) and bool(value == expected)


def difference(value: Any, expected: Any, subject: str = "The result") -> str | None:
    """Return a sentence about a difference of type, shape, kind of number or NaN; None if there is none of these.

    Args:
        subject: what the value is, at the beginning of the sentence.
    """
    if value is None:
        return None if expected is None else f"{subject} is None. Is the return missing?"
    array, reference = as_array(value), as_array(expected)
    if array is not None and reference is not None:
        return _difference_of_arrays(array, reference, subject)
    kinds = next((each for each in (list | tuple, Mapping, AbstractSet) if isinstance(expected, each)), type(expected))
    if reference is not None or not isinstance(value, kinds):
        return f"{subject} is {_type_of(value)}, but it should be {_type_of(expected)}."
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(expected, Mapping):
        if missing := [key for key in expected if key not in value]:
            return f"{subject} lacks the key {missing[0]!r}."
        if extra := [key for key in value if key not in expected]:
            return f"{subject} has the key {reprlib.repr(extra[0])}, which should not be there."
        parts = [(value[key], expected[key], f"The entry {key!r}") for key in expected]
    elif isinstance(expected, list | tuple):
        if len(value) != len(expected):
            return f"{subject} has {len(value)} items, but it should have {len(expected)}."
        parts = [(value[i], expected[i], f"Item {i} of the result") for i in range(len(expected))]
    return next(filter(None, (difference(*part) for part in parts)), None)


def _difference_of_arrays(array: np.ndarray, reference: np.ndarray, subject: str) -> str | None:
    if array.shape != reference.shape:
        if array.ndim == 2 and array.shape == reference.shape[::-1]:
            return f"{subject} is transposed: its shape is {array.shape}, but it should be {reference.shape}."
        if reference.shape and array.shape:
            return f"{subject} has the shape {array.shape}, but it should have {reference.shape}."
        one, other = (f"an array of shape {each.shape}" if each.shape else "a number" for each in (array, reference))
        return f"{subject} is {one}, but it should be {other}."
    kind = reference.dtype.kind
    if array.dtype.kind not in _MATCHING_KINDS[kind]:
        return f"{subject} consists of {_KIND_NAMES[array.dtype.kind]}, but {_KIND_NAMES[kind]} are expected."
    if not np.isfinite(array).all() and np.isfinite(reference).all():
        return f"{subject} holds {'NaN' if np.isnan(array).any() else 'infinity'}."
    return None


def factor(value: Any, expected: Any) -> float | None:
    """Return the number c, not 1, for which a value is c times another, up to rounding; None if there is none."""
    array, reference = as_array(value), as_array(expected)
    if array is None or reference is None or array.shape != reference.shape:
        return None
    if "b" in (array.dtype.kind, reference.dtype.kind):
        return None
    array, reference = array.astype(complex).ravel(), reference.astype(complex).ravel()
    square = float(np.vdot(reference, reference).real)
    if square == 0.0 or not np.isfinite(array).all():
        return None
    ratio = float((np.vdot(reference, array) / square).real)
    return ratio if abs(ratio - 1) > 1e-4 and abs(ratio) > 1e-9 and same(array, ratio * reference, 1e-4) else None


def size(value: Any) -> int:
    """Return how many numbers or other single items a value holds."""
    array = as_array(value)
    if array is not None:
        return array.size
    items = value.values() if isinstance(value, Mapping) else value
    return sum(map(size, items)) if isinstance(value, Mapping | list | tuple | AbstractSet) else 1


def short_text(value: Any) -> str:
    """Return a value as a short text with rounded numbers; large arrays by their shape."""
    array = as_array(value)
    if array is not None and array.size > SHOWN:
        return f"an array of shape {array.shape}"
    if array is not None and array.ndim:
        return np.array2string(array, precision=3, suppress_small=True, max_line_width=80)
    if array is not None:
        return f"{array.item():.4g}" if array.dtype.kind == "f" else str(array.item())
    if isinstance(value, list | tuple) and len(value) <= SHOWN:
        inner = ", ".join(map(short_text, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, Mapping) and len(value) <= SHOWN:
        return "{" + ", ".join(f"{key!r}: {short_text(entry)}" for key, entry in value.items()) + "}"
    return reprlib.repr(value)


def _type_of(value: Any) -> str:
    array = as_array(value)
    if array is None:
        name = type(value).__name__
        return _TYPE_NAMES.get(name, f"of type {name}")
    if array.ndim:
        return f"an array of shape {array.shape}"
    return {"b": "True or False", "i": "a whole number", "u": "a whole number"}.get(array.dtype.kind, "a number")
