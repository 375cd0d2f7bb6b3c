"""What is done to bytes, to JSON, and to the header of a safetensors file.

Each function returns what it has made, and in words what it did.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.values import Values

WHOLE = "whole"
_SIZES = (0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)


def damaged_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One to three changes; half of them among the first bytes, where headers are."""
    data, done = bytearray(content), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        within = rng.choice((16, 64, 1024, len(data), len(data)))
        place = rng.randrange(max(1, min(within, len(data))))
        kind = rng.choice(("flip", "flip", "byte", "cut", "insert", "remove", "size", "zeros", "copy", "append"))
        length = rng.choice((1, 2, 4, 8, 32, 500))
        if kind == "flip" and data:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == "byte" and data:
            data[place] = rng.choice((0, 1, 0x22, 0x2C, 0x5B, 0x7B, 0x7F, 0x80, 0xC3, 0xFF, rng.randrange(256)))
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = rng.randbytes(length)
        elif kind == "remove":
            del data[place : place + length]
        elif kind == "size":
            size = struct.pack("<Q", rng.choice(_SIZES))[: rng.choice((4, 8))]
            data[place : place + len(size)] = size
        elif kind == "zeros":
            data[place : place + length] = bytes(length)
        elif kind == "copy":
            source = rng.randrange(max(1, len(data)))
            data[place : place + length] = data[source : source + length]
        else:
            data += rng.randbytes(length)
        done.append(f"{kind} at {place}")
    return bytes(data), f"bytes: {', '.join(done)}"


def damaged_tree(tree: Any, rng: random.Random, values: Values) -> tuple[Any, str]:
    """One to three changes of what JSON holds."""
    tree, done = _copied(tree), []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        done.append(_damage_once(tree, rng, values))
    return tree, "; ".join(done)


def _copied(tree: Any) -> Any:
    return json.loads(json.dumps(tree))  # copy.deepcopy needs three calls for each level of a deep one


def _damage_once(tree: Any, rng: random.Random, values: Values) -> str:
    holder, key, path = tree, None, ""
    while isinstance(holder, dict | list) and holder:
        parent = holder
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        path += f".{key}"
        holder = parent[key]
        if rng.random() < 0.5:
            break
    if key is None:
        return "nothing"
    kind = rng.choice(
        ("value", "value", "value", "value", "number", "number", "drop", "rename", "add", "wrap", "repeat")
    )
    old = parent[key]
    if kind == "drop":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{key}x" if rng.random() < 0.5 else values.text(rng)] = parent.pop(key)
    elif kind == "add" and isinstance(parent, dict):
        parent[values.text(rng)] = values.json_value(rng)
    elif kind == "wrap":
        parent[key] = [old] if rng.random() < 0.5 else {"value": old}
    elif kind == "repeat" and isinstance(parent, list):
        parent.insert(key, _copied(old))
    elif kind == "number" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = rng.choice((-old, old + 1, old - 1, 2 * old, 10**6 * old, float(old), str(old), old / 2))
    else:
        kind, parent[key] = "value", values.json_value(rng)
    return f"{kind} {path[1:]}" + (f" = {parent[key]!r:.60}" if kind in ("value", "number") else "")


def damaged_json(content: str, rng: random.Random, values: Values) -> tuple[bytes, str]:
    """The tree is changed, or the text: nested too deeply, numbers of many digits, entries twice, wrong encodings."""
    kind = rng.choice(("tree",) * 12 + ("whole", "nested", "digits", "twice", "encoding", "bytes", "cut"))
    tree = json.loads(content)
    if kind == "tree":
        tree, what = damaged_tree(tree, rng, values)
        return json.dumps(tree).encode(), what
    if kind == "whole":
        value = values.json_value(rng)
        return json.dumps(value).encode(), f"all is {value!r:.60}"
    if kind == "nested":
        opening = rng.choice(("[", '{"a":', "[0,"))
        return (rng.choice((2000, 100_000)) * opening).encode(), f"nested deeply: {opening}"
    if kind == "digits" and isinstance(tree, dict) and tree:
        key = rng.choice(list(tree))
        digits = rng.choice((5000 * "9", "1e999999", "-" + 400 * "9", "0." + 400 * "0" + "1"))
        return json.dumps(tree | {key: "@"}).replace('"@"', digits).encode(), f"{key} is a number of many digits"
    if kind == "twice" and isinstance(tree, dict) and tree:
        key = rng.choice(list(tree))
        return (
            f"{content.rstrip()[:-1]}, {json.dumps(key)}: {json.dumps(values.json_value(rng))}}}".encode(),
            f"{key} twice",
        )
    if kind == "encoding":
        encoding = rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7"))
        return content.encode(encoding), f"encoded in {encoding}"
    if kind == "cut":
        place = rng.randrange(len(content))
        return content[:place].encode(), f"cut at {place}"
    return damaged_bytes(content.encode(), rng)


def safetensors_parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the numbers."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def safetensors_bytes(header: Any, numbers: bytes) -> bytes:
    """The inverse of :func:`safetensors_parts`, with a header that may be anything."""
    text = json.dumps(header).encode()
    text += -len(text) % 8 * b" "
    return struct.pack("<Q", len(text)) + text + numbers


def damaged_safetensors(content: bytes, rng: random.Random, values: Values) -> tuple[bytes, str]:
    """Header, length of the header, numbers, or any bytes."""
    kind = rng.choice(
        ("header", "header", "header", "metadata", "tensor", "tensor", "numbers", "length", "bytes", "bytes")
    )
    header, numbers = safetensors_parts(content)
    names = [name for name in header if name != "__metadata__"]
    if kind == "header":
        header, what = damaged_tree(header, rng, values)
        return safetensors_bytes(header, numbers), f"safetensors header: {what}"
    if kind == "metadata":
        header["__metadata__"], what = damaged_tree(header.get("__metadata__", {"format": "pt"}), rng, values)
        return safetensors_bytes(header, numbers), f"safetensors metadata: {what}"
    if kind == "tensor":
        return _damaged_entry(header, names, numbers, rng)
    if kind == "numbers":
        numbers = bytearray(numbers)
        for _ in range(rng.choice((1, 1, 20))):
            place = rng.randrange(len(numbers) // 4) * 4
            numbers[place : place + 4] = struct.pack(
                "<f", rng.choice((float("nan"), float("inf"), -float("inf"), 3e38))
            )
        return safetensors_bytes(header, bytes(numbers)), "safetensors numbers: NaN, infinite or huge"
    if kind == "length":
        length = rng.choice((*_SIZES, int.from_bytes(content[:8], "little") + rng.choice((-1, 1, 8))))
        return struct.pack("<Q", length) + content[8:], f"safetensors: the header's length is {length}"
    return damaged_bytes(content, rng)


def _damaged_entry(header: dict[str, Any], names: list[str], numbers: bytes, rng: random.Random) -> tuple[bytes, str]:
    """What a header may well say of a tensor, but not of this one."""
    name = rng.choice(names)
    entry = header[name]
    shape, kind = entry["shape"], rng.choice(("dtype", "flat", "turned", "more", "gone", "renamed", "other", "empty"))
    if kind == "dtype":
        entry["dtype"] = rng.choice(("I32", "U32", "F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "C64", "X9", "I64"))
        if rng.random() < 0.7 and entry["dtype"] in ("F16", "BF16") and shape:
            shape[-1] *= 2
    elif kind == "flat":
        size = 1
        for length in shape:
            size *= length
        entry["shape"] = [size]
    elif kind == "turned":
        entry["shape"] = shape[::-1]
    elif kind == "more":
        header[f"{name}2" if rng.random() < 0.5 else rng.choice(("x", "model.layers.7.mlp.up_proj.weight"))] = dict(
            entry
        )
    elif kind == "gone":
        del header[name]
    elif kind == "renamed":
        header[rng.choice((name + ".", name.upper(), name.replace("0", "1"), "x", ""))] = header.pop(name)
    elif kind == "other":
        entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
    else:
        entry["shape"], entry["data_offsets"] = [0, *shape[1:]], [entry["data_offsets"][0]] * 2
    return safetensors_bytes(header, numbers), f"safetensors: {name} {kind}"


def nothing(*_: object) -> str:
    """No damage, so that the file must be read."""
    return WHOLE


def replace_file(path: Path, rng: random.Random) -> str:
    """Put something else in the place of a file."""
    kind = rng.choice(
        ("gone", "empty", "folder", "link to itself", "link to nothing", "pipe", "device", "html", "pickle")
    )
    path.unlink(missing_ok=True)
    makers: dict[str, Callable[[], Any]] = {
        "empty": path.touch,
        "folder": path.mkdir,
        "link to itself": lambda: path.symlink_to(path),
        "link to nothing": lambda: path.symlink_to(path.with_name("nothing")),
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "html": lambda: path.write_text("<!DOCTYPE html><html>Not found</html>"),
        "pickle": lambda: path.write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s."),
    }
    makers.get(kind, lambda: None)()
    return f"{path.name}: {kind}"
