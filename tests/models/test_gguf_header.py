"""The header of a GGUF file: as the gguf library reads it, and nothing believed that the file cannot hold."""

import struct

import gguf
import numpy as np
import pytest

from lora_lab.models.gguf import read_header

UINT32, BOOL, TEXT, ARRAY = 4, 7, 8, 9
F32, Q8_0 = 0, 8


def text(words):
    words = words if isinstance(words, bytes) else words.encode()
    return struct.pack("<Q", len(words)) + words


def entry(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def array(kind, length, values=b""):
    return struct.pack("<IQ", kind, length) + values


def tensor(name="a", shape=(4, 2), kind=F32, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def content(entries=(), tensors=(), size=32, counts=None):
    """The bytes of a file whose tensors begin at the next multiple of 32."""
    head = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(entries))))
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + size)


@pytest.fixture
def read(tmp_path):
    """Reads a file with the given bytes."""

    def read(content):
        (tmp_path / "model.gguf").write_bytes(content)
        return read_header(tmp_path / "model.gguf")

    return read


def test_every_type_is_read_as_by_the_gguf_library(tmp_path):
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in gguf.GGUFValueType:
        if kind not in (gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY):
            writer.add_key_value(kind.name, 1 if "INT" in kind.name else True if kind.name == "BOOL" else 0.1, kind)
    writer.add_string("text", "Grüße 😀")
    for values in ([1, -2, 3], [0.5, 1e-30], ["a", "", "ö"], [True, False]):
        writer.add_array(f"list of {type(values[0]).__name__}", values)
    draw = np.random.default_rng(0)
    numbers = {"a": draw.normal(size=(3, 7)), "b": draw.normal(size=5), "c": draw.normal(size=(2, 3, 4))}
    for name, value in numbers.items():
        writer.add_tensor(name, value.astype(np.float32))
    matrix = draw.normal(size=(4, 64)).astype(np.float32)
    for kind in ("F16", "BF16", "Q8_0", "Q4_0"):
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind.name, gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.GGUFReader(path)
    header, tensors = read_header(path)
    expected = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert header == expected
    assert len(header) == 17
    assert [(name, each.kind) for name, each in tensors.items()] == [
        (t.name, t.tensor_type.name) for t in theirs.tensors
    ]
    for ours, other in zip(tensors.values(), theirs.tensors, strict=True):
        assert np.array_equal(ours.data, other.data.view(np.uint8))


def test_the_smallest_files_are_read(read):
    assert read(content(size=0)) == ({}, {})
    header, tensors = read(content([entry("a", BOOL, b"\1"), entry("b", TEXT, text("c"))], [tensor()]))
    assert header == {"a": True, "b": "c"}
    assert [(name, each.kind, each.data.shape) for name, each in tensors.items()] == [("a", "F32", (2, 16))]


def test_alignment_moves_the_tensors(read):
    aligned = [entry("general.alignment", UINT32, struct.pack("<I", 8))]
    _, tensors = read(content(aligned, [tensor("a", (3,)), tensor("b", (2,), offset=16)], size=32))
    assert [each.data.shape for each in tensors.values()] == [(12,), (8,)]


def test_m1_an_array_of_2_to_the_60_items_in_49_bytes_is_refused_at_once(read):
    hostile = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", ARRAY) + array(0, 2**60)
    assert len(hostile) == 49
    with pytest.raises(ValueError, match=r"model.gguf is not a GGUF file or is truncated \(its header ends neither"):
        read(hostile)


HOSTILE = {
    "empty": (b"", "empty"),
    "another file": (b"PK" + bytes(100), "does not begin"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "does not begin"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "does not begin"),
    "numbers without end": (content([entry("a", ARRAY, array(10, 2**61))]), "ends neither"),
    "texts without end": (content([entry("a", ARRAY, array(TEXT, 2**60))]), "ends neither"),
    "a text without end": (content([entry("a", TEXT, struct.pack("<Q", 2**63))]), "ends neither"),
    "a name without end": (content([struct.pack("<Q", 2**63)]), "ends neither"),
    "entries without end": (content(counts=(0, 2**60)), "two entries"),
    "tensors without end": (content(counts=(2**60, 0)), "ends neither|dimensions"),
    "an array in an array": (content([entry("a", ARRAY, array(ARRAY, 1, array(0, 1, b"\0")))]), "of type 9"),
    "an unknown type": (content([entry("a", 13, bytes(8))]), "of type 13"),
    "an array of an unknown type": (content([entry("a", ARRAY, array(99, 2**60))]), "of type 99"),
    "L5: a text that is not UTF-8": (content([entry("a", TEXT, text(b"\xff\xfe"))]), "utf-8"),
    "L5: a name that is not UTF-8": (content([entry(b"\xff", BOOL, b"\1")]), "utf-8"),
    "two entries of a name": (content([entry("a", BOOL, b"\1"), entry("a", BOOL, b"\0")]), "two entries 'a'"),
    "alignment 0": (content([entry("general.alignment", UINT32, bytes(4))]), "alignment is 0"),
    "alignment 3": (content([entry("general.alignment", UINT32, b"\3\0\0\0")]), "alignment is 3"),
    "alignment in words": (content([entry("general.alignment", TEXT, text("32"))]), "alignment is '32'"),
    "no dimensions": (content(tensors=[tensor(shape=())]), "'a' has 0 dimensions"),
    "five dimensions": (content(tensors=[tensor(shape=(1,) * 5)]), "'a' has 5 dimensions"),
    "2^32 dimensions": (content(tensors=[text("a") + struct.pack("<I", 2**32 - 1)]), "dimensions"),
    "no rows": (content(tensors=[tensor(shape=(4, 0))]), "whole blocks"),
    "2^40 rows": (content(tensors=[tensor(shape=(4, 2**40))]), "within its tensor 'a'"),
    "a product beyond 64 bits": (content(tensors=[tensor(shape=(2**32, 2**32))]), "within its tensor 'a'"),
    "half a block": (content(tensors=[tensor(shape=(48, 2), kind=Q8_0)], size=200), "whole blocks of 32"),
    "an unknown kind": (content(tensors=[tensor(kind=4711)]), "4711"),
    "an offset beyond the end": (content(tensors=[tensor(offset=2**50)]), "is at 1,125,899,906,842,624"),
    "an offset between": (content(tensors=[tensor(offset=1)], size=100), "is at 1, but"),
    "overlap": (content(tensors=[tensor("a"), tensor("b")], size=100), "'b' is at 0, but the one before .* 32"),
    "two tensors of a name": (content(tensors=[tensor(), tensor(offset=32)], size=64), "two tensors 'a'"),
    "one byte short": (content(tensors=[tensor()], size=31), "ends after .* within its tensor 'a'"),
}


@pytest.mark.parametrize(("hostile", "says"), HOSTILE.values(), ids=HOSTILE)
def test_what_a_file_cannot_hold_is_refused_in_one_sentence(read, hostile, says):
    with pytest.raises(ValueError, match=rf"model.gguf is not a GGUF file or is truncated \(.*(?:{says}).*\); copy or"):
        read(hostile)
