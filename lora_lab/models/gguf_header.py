"""The header of a GGUF file: its entries, and the bytes of its tensors.

    "GGUF", the version, the number of tensors, the number of entries
    entries: name, type, value
    tensors: name, shape, kind, offset
    from the next multiple of the alignment: the tensors' bytes, in the same order, each padded to the alignment

Every count, length and offset is held against the file's size before it is used, so that a damaged or hostile file is
refused at once. What llama.cpp refuses is refused here too: an array in an array, a tensor that overlaps another.

Reference: the specification of GGUF in the repository of ggml, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_TEXT, _ARRAY = 8, 9
# The types of numbers, as numpy names them.
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_MOST_DIMENSIONS = 4  # of a tensor in ggml
_LONGEST = 2**26  # bytes of a header; those of vocabularies of 200,000 tokens take some 10 MB


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Args:
        name: GGUF's, such as "blk.0.attn_q.weight".
        kind: how its numbers are stored, such as "Q4_1".
        data: its bytes, which are read when they are used: (rows, bytes of a row), or (bytes,).
    """

    name: str
    kind: str
    data: np.ndarray


def read_header(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """The entries of a file's header, and its tensors.

    Raises:
        ValueError: it is not a GGUF file, is truncated, or contradicts itself.
    """
    try:
        with open(path, "rb") as file:
            reader = _HeaderFile(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if reader.take(4) != b"GGUF" or reader.count(4) not in (2, 3):
            raise ValueError("it does not begin as one of version 2 or 3")
        tensors, entries = reader.count(), reader.count()
        header: dict[str, Any] = {}
        for _ in range(entries):
            name = reader.text()
            if name in header:
                raise ValueError(f"it has two entries {name!r:.80}")
            header[name] = reader.value()
        return header, _tensors(reader, tensors, header.get("general.alignment", 32))
    except ValueError as error:  # that of mmap, for an empty file, and of a text that is not UTF-8 too
        raise ValueError(f"{path} is not a GGUF file or is truncated ({error}); copy or download it again.") from None


class _HeaderFile:
    """Reads a file from its beginning."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.position = content, 0

    def take(self, size: int) -> bytes:
        start, self.position = self.position, self.position + size
        if self.position > min(len(self.content), _LONGEST):
            raise ValueError(f"its header ends neither within its {len(self.content):,} bytes nor within {_LONGEST:,}")
        return self.content[start : self.position]

    def count(self, size: int = 8) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        return self.take(self.count()).decode()

    def value(self) -> Any:
        kind = self.count(4)
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.numbers(kind, 1)[0]
        kind, length = self.count(4), self.count()
        return [self.text() for _ in range(length)] if kind == _TEXT else self.numbers(kind, length)

    def numbers(self, kind: int, length: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise ValueError(f"it has a value of type {kind}, which is not known here")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()


def _tensors(reader: _HeaderFile, number: int, alignment: Any) -> list[StoredTensor]:
    # Here, because the import takes a tenth of a second, and a converted model does not need it.
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r:.80}, but it must be a power of two")
    places: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
    for _ in range(number):
        name, dimensions = reader.text(), reader.count(4)
        if name in places:
            raise ValueError(f"it has two tensors {name!r:.80}")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"its tensor {name!r:.80} has {dimensions} dimensions")
        shape = tuple(reader.count() for _ in range(dimensions))[::-1]  # (rows, columns)
        places[name] = GGMLQuantizationType(reader.count(4)), shape, reader.count()
    first = _padded(reader.position, alignment)
    expected, tensors = 0, []
    for name, (kind, shape, offset) in places.items():
        weights, size = GGML_QUANT_SIZES[kind]  # in a block, and its bytes
        row, rest = divmod(shape[-1], weights)
        if rest or 0 in shape:
            raise ValueError(f"its tensor {name!r:.80} of shape {shape} is not whole blocks of {weights} weights")
        if offset != expected:
            raise ValueError(f"its tensor {name!r:.80} is at {offset:,}, but the one before it ends at {expected:,}")
        in_bytes = (*shape[:-1], row * size)
        length = math.prod(in_bytes)
        if first + offset + length > len(reader.content):
            raise ValueError(f"it ends after {len(reader.content):,} bytes, within its tensor {name!r:.80}")
        data = np.frombuffer(reader.content, np.uint8, length, first + offset).reshape(in_bytes)
        tensors.append(StoredTensor(name, kind.name, data))
        expected = _padded(offset + length, alignment)
    return tensors


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
