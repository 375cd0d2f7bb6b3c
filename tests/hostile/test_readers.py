"""Damaged files of six kinds: each is read, or refused in one sentence, quickly, in little memory, and stays as it is.

`make test` reads a few of each kind, the same each time. `make hostile` reads 3,000, new ones each time; hypothesis
prints the smallest case that fails.
"""

import copy
import json
import os
import re
import shutil
import signal
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_lab import (
    Llama,
    LoRA,
    LoRAConfig,
    adapters,
    fit,
    inject,
    load_adapter,
    load_pretrained,
    records,
    save_adapter,
    save_model,
    tasks,
)
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import LlamaConfig
from lora_lab.models.tokenizer import Tokenizer
from tests.helpers import randomise

resource = pytest.importorskip("resource", reason="Windows has neither its limits nor alarms")
CASES = int(os.environ.get("LORA_LAB_HOSTILE", "150"))
SECONDS = 10  # for a case; most take milliseconds
ROOM = 2**31  # bytes of address space that a case may take
RECORD = Path(__file__).parents[2] / "records" / "amd-epyc-2-cores-elicitation.json"
LINES = "".join(f'{{"prompt": "a {i}", "answer": "c", "group": "{i}"}}\n' for i in range(8))


def digits():
    return DigitsMLP(width=8)


def save_an_adapter(folder, tokenizer):
    model = digits()
    inject(model, LoRAConfig(rank=2, alpha=3))
    save_adapter(randomise(model, 1), folder)


def read_an_adapter(folder, tokenizer):
    load_adapter(digits(), folder)
    return {name: value.tolist() for name, value in adapters.read_adapter(folder).items()}


def save_a_gguf(folder, tokenizer):
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    folder.mkdir()
    save_model(Llama(LlamaConfig(**sizes, **heads), seed=0), folder / "model.gguf", tokenizer, "gguf")


def read_a_gguf(folder, tokenizer):
    load_pretrained(folder / "model.gguf", device="cpu")


def train(folder, steps=2):
    options = {"steps": steps, "lr": 0.01, "batch_size": 4, "progress": False}
    model = digits()
    history = fit(model, tasks.planted(model, n_train=8), LoRA(2), checkpoint_dir=folder, **options)
    return history.rows, {name: value.tolist() for name, value in model.state_dict().items()}


def save_a_record(folder, tokenizer):
    folder.mkdir()
    shutil.copy(RECORD, folder / "record.json")


def save_lines(folder, tokenizer):
    folder.mkdir()
    (folder / "lines.jsonl").write_text(LINES)


@dataclass(frozen=True)
class Reader:
    """How a good folder is made, which of its files are damaged, and how it is read.

    Args:
        save: writes the folder.
        read: reads it; what it returns is compared, where one of ``guarded`` is damaged, with what the good one gives.
        files: that are damaged.
        guarded: files of which any damage that changes the result must be noticed.
    """

    save: object
    read: object
    files: tuple
    guarded: tuple = ()


READERS = {
    "gguf": Reader(save_a_gguf, read_a_gguf, ("model.gguf",)),
    "adapter": Reader(
        save_an_adapter,
        read_an_adapter,
        ("adapter_config.json", "adapter_model.safetensors"),
        ("adapter_config.json",),
    ),
    "record": Reader(save_a_record, lambda folder, _: records.load(folder / "record.json"), ("record.json",)),
    "checkpoint": Reader(
        lambda folder, _: train(folder),
        lambda folder, _: train(folder),
        ("checkpoint.safetensors",),
        ("checkpoint.safetensors",),
    ),
    "tokenizer": Reader(
        lambda folder, tokenizer: tokenizer.save(folder),
        lambda folder, _: Tokenizer.load(folder),
        ("tokenizer.json", "tokenizer_config.json"),
    ),
    "jsonl": Reader(
        save_lines, lambda folder, tokenizer: tasks.from_jsonl(tokenizer, folder / "lines.jsonl"), ("lines.jsonl",)
    ),
}


# Damages: of bytes, and of JSON, which is a file, each line of one, or a safetensors file's header


def damage_bytes(content, place, kind, value):
    """Flip a byte, overwrite some, cut the file, or repeat a part of it, at a place between 0 and 1."""
    at = int(place * len(content))
    if kind == "cut":
        return content[:at]
    if kind == "repeat":
        return content[:at] + content[at // 2 :]
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ (value % 255 + 1)]) + content[at + 1 :] if content else b""
    number = (value % 2**64).to_bytes(8, "little")[: 8 if kind == "number" else 4]
    at = int(place**3 * len(content))  # most of them in the header, at the beginning
    return content[:at] + number + content[at + len(number) :]


STRANGE = [
    *(None, True, -1, 0, 1, 3, 17, 2**31, 2**63, 10**400, 0.5, 1e300, float("nan"), float("inf")),
    *("", "x", "\ud83d", "x" * 5000, "../../etc/passwd", "(a|a)*!", "F64", "lora_A", [], [None], {}, {"x": 1}),
    *([[0, 1], [2**62, 2**63], ["x"] * 300, {"a": {"b": []}}]),
]


def damage_json(value, place, strange):
    """Replace one value within a JSON value, rename or lose an entry, or put a value into a list of lists."""
    value = copy.deepcopy(value)
    slots = []

    def walk(held):
        for key in held if isinstance(held, dict) else range(len(held)):
            slots.append((held, key))
            if isinstance(held[key], dict | list):
                walk(held[key])

    if isinstance(value, dict | list):
        walk(value)
    if not slots:
        return strange
    held, key = slots[int(place * len(slots))]
    if strange == "lose":
        del held[key]
    elif strange == "rename" and isinstance(held, dict):
        held[f"{key}x"] = held.pop(key)
    elif strange == "deepen":
        held[key] = [[held[key]]]
    elif strange == "nudge":
        held[key] = nudge(held[key])
    else:
        held[key] = strange
    return value


def nudge(value):
    """Return a value of the same kind that is a little different."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value[1:] or "y"
    return value[1:] if isinstance(value, list) else value


def damage_field(content, place, number):
    """Overwrite a field of a GGUF file's header: some bytes after the name of an entry or of a tensor."""
    ends = [name.end() for name in re.finditer(rb"(general|llama|tokenizer|blk)\.[\w.]+|token_embd\.weight", content)]
    at = ends[int(place * len(ends))] + int(place * 1000) % 10 * 4
    number = number.to_bytes(8, "little")[: 4 if number < 2**32 else 8]
    return content[:at] + number + content[at + len(number) :]


def damage_structure(name, content, place, strange):
    if name.endswith(".gguf"):
        return damage_field(content, place, strange)
    if name.endswith(".safetensors"):
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.dumps(damage_json(json.loads(content[8:end]), place, strange)).encode()
        return len(header).to_bytes(8, "little") + header + content[end:]
    if name.endswith(".jsonl"):
        lines = content.decode().splitlines()
        at = int(place * len(lines))
        lines[at] = json.dumps(damage_json(json.loads(lines[at]), place * 7 % 1, strange))
        return "\n".join(lines).encode()
    return json.dumps(damage_json(json.loads(content), place, strange)).encode()


PLACE = st.floats(0, 1, exclude_max=True)
BYTES = st.tuples(PLACE, st.sampled_from(["flip", "flip", "cut", "repeat", "number", "length"]), st.integers(0, 2**64))
NUMBERS = [0, 1, 2, 3, 8, 9, 12, 13, 77, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]
FIELDS = st.tuples(PLACE, st.sampled_from(NUMBERS))
STRUCTURE = st.tuples(
    PLACE, st.just("nudge") | st.sampled_from(["lose", "rename", "deepen"]) | st.sampled_from(STRANGE)
)


@st.composite
def damages(draw, reader, good):
    """A file's name and what it holds after one to three damages."""
    name = draw(st.sampled_from(reader.files))
    content = good[name]
    if draw(st.booleans()):
        content = damage_structure(name, content, *draw(FIELDS if name.endswith(".gguf") else STRUCTURE))
    else:
        for damage in draw(st.lists(BYTES, min_size=1, max_size=3)):
            content = damage_bytes(content, *damage)
    return name, content


@contextmanager
def limits():
    """Within the block, ten seconds and two GiB."""

    def too_long(*_):
        raise AssertionError(f"it took longer than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def judge(reader, folder, name, content, good, tokenizer, expected):
    """Read the folder with one file damaged, and raise AssertionError for what must not happen."""
    (folder / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = reader.read(folder, tokenizer)
        except (ValueError, OSError) as error:
            result = error
    if isinstance(result, Exception):
        sentence = str(result)
        assert type(result) in (ValueError, FileNotFoundError, OSError), f"{type(result).__name__}: {sentence}"
        assert sentence.strip(), "it was refused without a word"
        assert "\n" not in sentence, f"not one sentence: {sentence}"
        assert len(sentence) < 2000, f"a sentence of {len(sentence)} characters"
    elif name in reader.guarded:
        assert result == expected, "it was read as something else"
    for other, held in before.items():
        assert (folder / other).read_bytes() == held, f"{other} was changed"


@pytest.fixture(scope="module")
def start(tmp_path_factory, chatter):
    """A function that makes the good folder of a reader, and returns it, its files and its result."""

    def start(kind):
        reader, folder = READERS[kind], tmp_path_factory.mktemp(kind) / "folder"
        reader.save(folder, chatter)
        (folder / "mine.txt").write_text("the user's own")
        good = {name: (folder / name).read_bytes() for name in reader.files}
        return folder, good, reader.read(folder, chatter)

    return start


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_read_or_refused(kind, start, chatter):
    reader, (folder, good, expected) = READERS[kind], start(kind)

    @settings(
        max_examples=max(1, CASES // len(READERS)),
        deadline=None,
        derandomize="LORA_LAB_HOSTILE" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damages(reader, good))
    def case(damaged):
        for name, content in good.items():
            (folder / name).write_bytes(content)
        judge(reader, folder, *damaged, good, chatter, expected)

    case()


# The judge notices each class of fault


def fails(error):
    def read(*_):
        raise error

    return read


def spoil(folder, _):
    (folder / "mine.txt").write_text("")


FAULTS = {
    "crash": (fails(KeyError("x")), KeyError),
    "words of torch": (fails(RuntimeError("shape mismatch")), RuntimeError),
    "several lines": (fails(ValueError("one\ntwo")), AssertionError),
    "no words": (fails(ValueError()), AssertionError),
    "hang": (lambda *_: [None for _ in iter(int, 1)], (AssertionError, MemoryError)),
    "memory": (lambda *_: torch.empty(2**33, dtype=torch.uint8).fill_(1), RuntimeError),
    "lost": (spoil, AssertionError),
    "silent": (lambda *_: "another", AssertionError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_judge_notices_a_planted_fault(fault, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.hostile.test_readers.SECONDS", 1)
    read, error = FAULTS[fault]
    (tmp_path / "mine.txt").write_text("the user's own")
    reader = Reader(None, read, ("a.json",), ("a.json",))
    with pytest.raises(error):
        judge(reader, tmp_path, "a.json", b"{}", {}, None, "expected")


@pytest.mark.parametrize("kind", ["cut", "repeat", "flip", "number", "length"])
def test_damages_change_the_file(kind):
    content = bytes(range(200))
    assert damage_bytes(content, 0.4, kind, 2**60 + 7) != content
    assert damage_json({"a": [1, 2]}, 0.5, partial) == {"a": [partial, 2]}
