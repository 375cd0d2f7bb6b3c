"""What a file may say: its content is held against annotated types, by pydantic, before anything is done with it.

    class Settings(TypedDict, total=False):
        r: Required[Size]
        lora_dropout: Annotated[float, Field(ge=0, lt=1)]

    check(read_json(path), Settings, str(path))

The types are strict: a text is no number, nor is True, and NaN and infinity are no numbers either.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # typing's own suits pydantic from Python 3.12 on

# So large that no real size reaches it, and products of two fit into the 64 bits of torch's sizes.
_LARGEST = 2**31 - 1

Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Size = Annotated[int, Field(ge=1, le=_LARGEST)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def check(content: Any, schema: Any, where: str = "") -> None:
    """Check what was read from a file.

    Args:
        content: in the values of JSON.
        schema: a type with annotations, such as a TypedDict; entries that it does not name may have any value.
        where: what holds the content, such as a path, for the beginning of the message.

    Raises:
        ValueError: an entry is missing, is of another type, or is out of its range. The message names the first one.
    """
    try:
        _validator(schema).validate_python(content, strict=True)
    except ValidationError as error:
        raise ValueError(_sentence(error.errors(include_url=False)[0], where)) from None


def check_fields(instance: Any) -> None:
    """Check the fields of a dataclass instance against their annotations, for its ``__post_init__``.

    Raises:
        ValueError: as for :func:`check`.
    """
    check(vars(instance), _fields_of(type(instance)))


@cache
def _fields_of(kind: type) -> Any:
    return TypedDict(kind.__name__, get_type_hints(kind, include_extras=True))  # pyright: ignore


@cache
def _validator(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


# pydantic's wording and ours.
_WORDS = {
    "Input should be": "it must be",
    "valid ": "",
    "a integer": "a whole number",
    "a string": "a text",
    "a boolean": "true or false",
    "a dictionary": "an object",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}


def _sentence(error: Mapping[str, Any], where: str) -> str:
    name = ".".join(str(part) for part in error["loc"] if "[" not in str(part))  # "list[str]" says which of a union
    if error["type"] == "missing":
        return f"{where or 'The content'} lacks the entry {name!r}."
    expected = error["msg"]
    for words, ours in _WORDS.items():
        expected = expected.replace(words, ours)
    named = f"{where}: {name}" if where and name else name or where or "The content"
    return f"{named} is {reprlib.repr(error['input'])}, but {expected}."
