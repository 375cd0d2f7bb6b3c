"""GGUF files of models, in which fields, counts, lengths, tensors or any bytes are damaged."""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from gguf import GGMLQuantizationType, quants

from lora_lab import Llama, load_pretrained
from lora_lab.models.gguf_reader import read_gguf
from lora_lab.models.pretrained import load_tokenizer
from lora_lab.models.tokenizer import Tokenizer
from tests.hostile.core import Case
from tests.hostile.damage import WHOLE, damaged_bytes, nothing
from tests.hostile.material import BOS, CONFIG, EOS, MERGES, TEMPLATE, TOKENS, complaints, llama
from tests.hostile.templates import any_template
from tests.hostile.values import Values

UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type
_ALIGNMENT = 32


@dataclass
class Entry:
    """An entry of the header: its type and the bytes of its value."""

    key: bytes
    kind: int
    value: bytes


@dataclass
class Tensor:
    """A tensor as the file lists it, and its numbers."""

    name: bytes
    lengths: list[int]
    kind: int
    numbers: bytes
    offset: int | None = None  # None: where its numbers are


@dataclass
class File:
    """A GGUF file that may contradict itself."""

    entries: list[Entry]
    tensors: list[Tensor]
    magic: bytes = b"GGUF"
    version: int = 3
    entry_count: int | None = None
    tensor_count: int | None = None
    padding: int = _ALIGNMENT
    contradicts: str = ""  # how the file contradicts itself so that a reader must see it

    def to_bytes(self) -> bytes:
        entries = len(self.entries) if self.entry_count is None else self.entry_count
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        head = self.magic + struct.pack("<IQQ", self.version, tensors, entries)
        for entry in self.entries:
            head += _string(entry.key) + struct.pack("<I", entry.kind) + entry.value
        numbers = b""
        for tensor in self.tensors:
            offset = len(numbers) if tensor.offset is None else tensor.offset
            head += _string(tensor.name) + struct.pack("<I", len(tensor.lengths))
            head += struct.pack(f"<{len(tensor.lengths)}Q", *tensor.lengths)
            head += struct.pack("<IQ", tensor.kind, offset)
            numbers += tensor.numbers + -len(tensor.numbers) % _ALIGNMENT * b"\0"
        return head + -len(head) % self.padding * b"\0" + numbers


def _string(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _value(value: Any) -> tuple[int, bytes]:
    """Type and bytes of a value that fits."""
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return (UINT32, struct.pack("<I", value)) if 0 <= value < 2**32 else (10, struct.pack("<Q", value % 2**64))
    if isinstance(value, float):
        return FLOAT32, struct.pack("<f", value) if abs(value) < 3e38 else struct.pack("<f", float("inf"))
    if isinstance(value, str | bytes):
        return STRING, _string(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)
    kinds = [_value(each) for each in value]
    return ARRAY, struct.pack("<IQ", kinds[0][0] if kinds else UINT32, len(kinds)) + b"".join(each for _, each in kinds)


def prepare(folder: Path, values: Values) -> tuple[File, Values]:
    """A whole file with tensors of four formats."""
    config = CONFIG
    header: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3 if i in (BOS, EOS) else 1 for i in range(len(TOKENS))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in MERGES],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.chat_template": TEMPLATE,
    }
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
    parts |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    names |= {f"model.layers.{i}.{part}": f"blk.{i}.{name}" for i in range(2) for part, name in parts.items()}
    formats = {"attn_q": "Q4_1", "ffn_up": "F16", "ffn_down": "Q8_0"}
    tensors = []
    for name, parameter in llama().named_parameters():
        value, stem = parameter.detach().numpy(), names[name.removesuffix(".weight")]
        kind = GGMLQuantizationType[formats.get(stem.rpartition(".")[2], "F32")]
        numbers = numpy.ascontiguousarray(quants.quantize(value, kind)).tobytes()
        tensors.append(Tensor(f"{stem}.weight".encode(), list(value.shape[::-1]), int(kind), numbers))
    return File([Entry(key.encode(), *_value(value)) for key, value in header.items()], tensors), values


def case(rng: random.Random, folder: Path, material: tuple[File, Values]) -> Case:
    """A damaged file, which is loaded as a model or read in part."""
    file, values = copy.deepcopy(material[0]), material[1]
    damages = (_entry, _entry, _entry, _entry, _list, _list, _structure, _counts, _tensor, _tensor, _tensor, _numbers)
    damage = rng.choice(2 * (*damages, None, None, _template) + (nothing,))
    if damage is None:
        content, what = damaged_bytes(file.to_bytes(), rng)
    else:
        what = damage(file, rng, values)
        content = file.to_bytes()
    path = folder / "model.gguf"
    path.write_bytes(content)
    keep = rng.random() < 0.3
    if rng.random() < 0.1:
        return Case(what, partial(read_gguf, path))
    if rng.random() < 0.1:
        return Case(what, partial(load_tokenizer, path))

    def wrong(both: tuple[Llama, Tokenizer]) -> Iterator[str]:
        if file.contradicts:
            yield f"it was loaded, although {file.contradicts}"
        yield from complaints(*both)

    return Case(what, partial(load_pretrained, path, device="cpu", keep_blocks=keep), wrong, good=what == WHOLE)


def _entry(file: File, rng: random.Random, values: Values) -> str:
    """Another value of an entry, of its type or of another."""
    entry = rng.choice(file.entries)
    if rng.random() < 0.5 and entry.kind in _FORMATS:
        value: Any = values.integer(rng) if entry.kind != FLOAT32 or rng.random() < 0.3 else values.number(rng)
    else:
        value = rng.choice((values.number, values.text, _some_list))(rng)
    if isinstance(value, float) and value != value and rng.random() < 0.5:
        entry.kind, entry.value = 12, struct.pack("<d", value)
    else:
        entry.kind, entry.value = _value(value)
    return f"{entry.key.decode()} = {value!r:.60}"


def _some_list(rng: random.Random) -> list[Any]:
    return rng.choice(([], [1], [4, 4], [0.5], ["x"], [True], [2**32 - 1], [0], ["llama"], 300 * ["x"], 5 * [1]))


def _list(file: File, rng: random.Random, values: Values) -> str:
    """Tokens, types or merges that contradict each other."""
    name = rng.choice(("tokens", "tokens", "token_type", "merges"))
    entry = next(entry for entry in file.entries if entry.key == f"tokenizer.ggml.{name}".encode())
    items: list[Any] = {
        "tokens": list(TOKENS),
        "token_type": [3 if i in (BOS, EOS) else 1 for i in range(len(TOKENS))],
        "merges": [" ".join(merge) for merge in MERGES],
    }[name]
    kind = rng.choice(("shorter", "longer", "same", "other", "bytes", "swapped", "ids", "nested"))
    place = rng.randrange(len(items))
    odd = values.integer(rng) % 2**32 if name == "token_type" else values.text(rng)
    if kind == "shorter":
        del items[place : place + rng.choice((1, 2, len(items)))]
        file.contradicts = "tokens and their types differ in number" if name != "merges" else ""
    elif kind == "longer":
        items += rng.choice((1, 2, 300)) * [odd]
    elif kind == "same":
        items[place] = items[place - 1]
    elif kind == "bytes" and name != "token_type":
        items[place] = rng.randbytes(rng.choice((1, 3)))
    elif kind == "swapped":
        other = rng.randrange(len(items))
        items[place], items[other] = items[other], items[place]
    elif kind == "ids":
        token = rng.choice((b"bos_token_id", b"eos_token_id"))
        other = next(each for each in file.entries if each.key.endswith(token))
        other.value = struct.pack("<I", rng.choice((0, 5, len(TOKENS), len(TOKENS) + 1, 2**31, 2**32 - 1)))
        file.entries.append(Entry(b"tokenizer.ggml.add_bos_token", BOOL, b"\1"))
    elif kind == "nested":
        entry.value = struct.pack("<IQ", ARRAY, 2) + 2 * _value(items[:3])[1]
        return f"{name}: nested"
    else:
        items[place] = odd
    _, entry.value = _value(items)
    return f"{name}: {kind} at {place}"


def _structure(file: File, rng: random.Random, values: Values) -> str:
    """Entries that are missing, twice, of unknown type, or of other names."""
    kind = rng.choice(("gone", "twice", "type", "named", "added"))
    entry = rng.choice(file.entries)
    what = f"{entry.key.decode()}: {kind}"
    if kind == "gone":
        file.entries.remove(entry)
    elif kind == "twice":
        file.entries.append(copy.copy(entry))
        file.contradicts = "an entry is there twice"
    elif kind == "type":
        entry.kind = rng.choice((*range(14), 255, 2**31))
        return f"{what} {entry.kind}"
    elif kind == "named":
        entry.key = rng.choice((b"", b"\xff\xfe", entry.key + b"x", rng.choice(file.entries).key, 70000 * b"k"))
    else:
        key, value = rng.choice(
            (
                (b"general.alignment", rng.choice((0, 1, 7, 31, 33, 64, 2**31, 2**32 - 1, "32", 32.0))),
                (b"general.type", values.text(rng)),
                (b"llama.rope.scaling.type", values.text(rng)),
                (b"llama.rope.dimension_count", values.integer(rng)),
                (
                    b"lora_lab.rope_scaling",
                    rng.choice(([8.0, 1.0, 4.0, 64.0], [], [0.0], ["x"], 1, [1.0, 4.0, 1.0, 8.0])),
                ),
                (b"lora_lab.normalizer", values.text(rng)),
                (b"llama.vocab_size", values.integer(rng)),
                (b"tokenizer.ggml.padding_token_id", values.integer(rng)),
                (b"tokenizer.ggml.add_bos_token", rng.choice((True, 1, "x", [True]))),
                (b"split.count", rng.choice((2, 65535))),
            )
        )
        file.entries.append(Entry(key, *_value(value)))
        return f"added {key.decode()} = {value!r:.50}"
    return what


def _counts(file: File, rng: random.Random, values: Values) -> str:
    """Counts and lengths that the file is too short for."""
    count = rng.choice((0, 1, 2**31, 2**32, 2**40, 2**60, 2**63, 2**64 - 1))
    kind = rng.choice(("entries", "tensors", "string", "array", "empty array", "key", "version", "magic", "padding"))
    if kind == "entries":
        file.entry_count = rng.choice((count, len(file.entries) + 1, len(file.entries) - 1))
    elif kind == "tensors":
        file.tensor_count = rng.choice((count, len(file.tensors) + 1, len(file.tensors) - 1))
    elif kind == "string":
        entry = rng.choice([entry for entry in file.entries if entry.kind == STRING])
        entry.value = struct.pack("<Q", count) + entry.value[8:]
    elif kind == "array":
        entry = rng.choice([entry for entry in file.entries if entry.kind == ARRAY])
        entry.value = entry.value[:4] + struct.pack("<Q", count) + entry.value[12:]
    elif kind == "empty array":  # its items take no bytes, or it ends the file
        items = rng.choice((ARRAY, STRING, 0, 7, 10, 99))
        file.entries = [Entry(b"a", ARRAY, struct.pack("<IQ", items, count))]
        file.tensors = []
    elif kind == "key":
        file.entries[rng.randrange(3)].key = rng.choice((1, 100_000)) * b"k"
    elif kind == "version":
        file.version = rng.choice((0, 1, 2, 4, 2**24, 0x03000000, 2**32 - 1))
    elif kind == "magic":
        file.magic = rng.choice((b"GGUf", b"FUGG", b"GGML", b"PK\3\4", b"\0\0\0\0", b""))
    else:
        file.padding = rng.choice((1, 4, 64))
    return f"{kind}: {count}"


def _tensor(file: File, rng: random.Random, values: Values) -> str:
    """What the file says of one tensor, and what not of this one."""
    tensor = rng.choice(file.tensors)
    kind = rng.choice(
        ("lengths", "length", "type", "offset", "offset", "name", "twice", "gone", "added", "flat", "cut")
    )
    what = f"{tensor.name.decode()}: {kind}"
    if kind == "lengths":
        tensor.lengths = rng.choice(
            (
                [],
                [0],
                [2**63],
                [2**32, 2**32],
                [2**60, 8],
                tensor.lengths[::-1],
                [*tensor.lengths, 1],
                [1, *tensor.lengths],
                [*tensor.lengths, 0],
                9 * [1],
                1000 * [1],
                [2**31, 2**31, 2, 1],
            )
        )
    elif kind == "length":
        tensor.lengths[rng.randrange(len(tensor.lengths))] = values.integer(rng) % 2**64
    elif kind == "type":
        tensor.kind = rng.choice((*range(35), 39, 99, 2**31, 2**32 - 1))
        what += f" {tensor.kind}"
        if tensor.kind in range(24, 28):
            file.contradicts = "a tensor of weights is of whole numbers"
    elif kind == "offset":
        tensor.offset = rng.choice((0, 1, 16, 32, 4096, 10**6, 2**31, 2**62, 2**63, 2**64 - 32, 2**64 - 1))
        what += f" {tensor.offset}"
        if tensor.offset % _ALIGNMENT or (tensor is not file.tensors[0] and tensor.offset == 0):
            file.contradicts = "a tensor begins within another one, or between the places where one may begin"
    elif kind == "name":
        names = (b"", b"\xff", b"x.weight", b"blk.7.attn_q.weight", b"blk.-1.attn_q.weight", b"blk.0.attn_q.bias")
        names += (b"blk.0.attn_norm.bias", b"rope_freqs.weight", b"output.weight", b"blk.00.attn_q.weight", 70 * b"n")
        tensor.name = rng.choice((*names, rng.choice(file.tensors).name, tensor.name.upper()))
        what += f" {tensor.name!r}"
    elif kind == "twice":
        file.tensors.append(copy.copy(tensor))
        file.contradicts = "a tensor is there twice"
    elif kind == "gone":
        file.tensors.remove(tensor)
    elif kind == "added":
        name = rng.choice((b"rope_freqs.weight", b"output.weight", b"blk.0.attn_q.bias", b"blk.0.ffn_up.bias", b"x"))
        lengths = rng.choice(([4], [32], [8], [32, len(TOKENS)], [1], [0]))
        size = 4 * int(numpy.prod(lengths))
        numbers = (
            numpy.frombuffer(rng.randbytes(size), "<f4").copy() if rng.random() < 0.5 else numpy.ones(size // 4, "<f4")
        )
        file.tensors.append(Tensor(name, lengths, 0, numbers.astype("<f4").tobytes()))
        what = f"added {name.decode()} {lengths}"
    elif kind == "flat":
        tensor.lengths = [int(numpy.prod(tensor.lengths))]
    else:
        file.tensors[-1].numbers = file.tensors[-1].numbers[: rng.choice((0, 1, 100))]
    return what


def _numbers(file: File, rng: random.Random, values: Values) -> str:
    """NaN, infinite or huge numbers in a tensor, in its own format."""
    tensor = rng.choice(file.tensors)
    numbers = bytearray(tensor.numbers)
    place = rng.choice((0, len(numbers) // 4 * 2))
    odd = struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38))) if tensor.kind == 0 else b"\x00\x7c\x01\x7e"
    numbers[place : place + 4] = odd
    tensor.numbers = bytes(numbers)
    return f"{tensor.name.decode()}: numbers {odd.hex()}"


def _template(file: File, rng: random.Random, values: Values) -> str:
    template = any_template(rng, TEMPLATE)
    entry = next(entry for entry in file.entries if entry.key == b"tokenizer.chat_template")
    _, entry.value = _value(template)
    return f"template: {template!r:.80}"
