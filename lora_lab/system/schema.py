"""What a file may say, what an argument may be, and results as JSON.

The content of a file is held against annotated types, by pydantic, before anything is done with it:

    class Settings(TypedDict, total=False):
        r: Required[Size]
        lora_dropout: Dropout

    check(read_json(path), Settings, str(path))

The types are strict: a text is no number, nor is True, and NaN and infinity are no numbers either. The arguments of a
function are checked alike, and there a number of numpy or torch is a number too:

    batch_size = check(batch_size, Size, "batch_size")
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from typing_extensions import TypedDict  # typing's own suits pydantic from Python 3.12 on

from lora_lab.system.wording import short_repr, shortened

if TYPE_CHECKING:
    from pandas import DataFrame

# So large that no real size reaches it, and products of two fit into the 64 bits of torch's sizes.
_LARGEST = 2**31 - 1

Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Size = Annotated[int, Field(ge=1, le=_LARGEST)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]  # a probability
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]  # of a torch.Generator


def check(content: Any, schema: Any, where: str = "") -> Any:
    """Check what was read from a file, or what was passed as an argument, and return it.

    Args:
        content: in the values of JSON; or a number of numpy or torch, which is returned as Python's.
        schema: a type with annotations, such as a TypedDict; entries that it does not name may have any value.
        where: what holds the content, such as a path, or the argument's name, for the beginning of the message.

    Raises:
        ValueError: an entry is missing, is of another type, or is out of its range. The message names the first one.
    """
    content = to_python(content)
    try:
        _validator(schema).validate_python(content, strict=True)
    except ValidationError as error:
        raise ValueError(_sentence(error.errors(include_url=False)[0], where)) from None
    return content


def check_fields(instance: Any) -> None:
    """Check the fields of a dataclass instance against their annotations, for its ``__post_init__``.

    Numbers of numpy or torch become Python's, so that the fields can be written as JSON.

    Raises:
        ValueError: as for :func:`check`.
    """
    content = {field.name: to_python(getattr(instance, field.name)) for field in fields(instance)}
    check(content, _fields_of(type(instance)))
    for name, value in content.items():
        object.__setattr__(instance, name, value)  # which a frozen instance allows


def check_bfloat16(dtype: Any, name: str) -> None:
    """Raise ValueError if an argument is neither ``torch.bfloat16`` nor None."""
    if dtype is not None and dtype is not torch.bfloat16:
        raise ValueError(f"{name} is {short_repr(dtype)}, but it must be torch.bfloat16 or None.")


def to_python(value: Any) -> Any:
    """Return a number of numpy or torch as Python's, for JSON; anything else as it is."""
    return value.item() if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0 else value


@cache
def _fields_of(kind: type) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    schema: Any = TypedDict(kind.__name__, {field.name: hints[field.name] for field in fields(kind)})  # pyright: ignore
    schema.__pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)  # checked by isinstance
    return schema


@cache
def _validator(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _sentence(error: Mapping[str, Any], where: str) -> str:
    """Return an error of pydantic as one sentence: "steps is -1, but it must be greater than or equal to 0."."""
    # Of a union, the location also says which type was tried: "str", "list[str]".
    parts = [str(part) for part in error["loc"] if "[" not in str(part) and part not in ("str", "int", "float", "bool")]
    name = shortened(".".join(parts))
    if error["type"] == "missing":
        return f"{where or 'The content'} lacks the entry {name!r}."
    _, _, rule = error["msg"].partition(" should ")  # of "Input should be ...", "String should match ..."
    named = f"{where}: {name}" if where and name else name or where or "The content"
    return f"{named} is {short_repr(error['input'])}, but it must {rule}."


# Tensors


# Trained weights are far below it, and products of a few numbers beyond it are infinite in float32.
_LARGEST_WEIGHT = 1e9


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str = "") -> None:
    """Check that no number is NaN, infinite or so large that products are, which spreads to all that is computed.

    Args:
        tensors: each with its name. Integers pass, and so do tensors without values: fake, on the meta device, empty.
        where: what holds them, such as a path, for the beginning of the message.

    Raises:
        ValueError: a number is NaN or infinite, or its magnitude is above 1e9. The message names the first tensor that
            holds one.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.numel() == 0:
            continue
        # One pass, in which NaN propagates; numbers of one byte have no order in torch.
        smallest, largest = (tensor.detach() if tensor.itemsize > 1 else tensor.detach().float()).aminmax()
        if not -_LARGEST_WEIGHT <= float(smallest) <= float(largest) <= _LARGEST_WEIGHT:
            named = f"{where}: {name}" if where else name
            raise ValueError(
                f"{named} holds numbers that are NaN or infinite, or above {_LARGEST_WEIGHT:g}; training has diverged, "
                "or the file is damaged, so train or copy it anew."
            )


# Results as JSON


def plain(value: Any) -> Any:
    """Return a value in JSON's types: a tuple is a list, a path its text; NaN and infinity, which JSON lacks, None."""
    return to_jsonable_python(value, inf_nan_mode="null")


def rows_of(frame: DataFrame) -> list[dict[str, Any]]:
    """Return one dict for each row of the frame, by column; what is missing there is None."""
    return plain(frame.astype(object).where(frame.notna(), None).to_dict("records"))


def json_text(value: Any) -> str:
    """Return indented JSON of a value, as ``lora-lab ... --json`` prints it.

    Raises:
        ValueError: it holds something that JSON has no form for.
    """
    return json.dumps(plain(value), indent=2, allow_nan=False)
