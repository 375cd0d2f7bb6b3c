"""Odd arguments to ``lora-lab``: a command that works, with one argument or two changed, added or left out.

The command is called in the process, as ``lora-lab`` does. An error must end with status 1 and one line that begins
with "lora-lab: ", or with status 2 and argparse's usage; any other status, and a traceback anywhere, is a crash. Now
and then no word is changed, and the command must succeed.
"""

from __future__ import annotations

import io
import json
import random
import re
import sys
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from lora_lab import LoRA, cli, inject, records, save_adapter
from tests.helpers import randomise
from tests.hostile.core import Case, Sentence
from tests.hostile.material import HERE, SECRET, llama, model_folder
from tests.hostile.values import Values


def prepare(folder: Path, values: Values) -> tuple[Path, Values]:
    """A model, an adapter, data, a folder of a sweep; each command has been called once, so that it is imported."""
    model_folder(folder / "model")
    model = llama()
    inject(model, LoRA(2))
    save_adapter(randomise(model), folder / "adapter", base=str(folder / "model"))
    lines = [json.dumps({"prompt": f"question {i}", "answer": f"answer {i}"}) for i in range(12)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "text.txt").write_text("\n\n".join(f"Paragraph {i} " + 60 * "so on " for i in range(12)))
    for number, (name, words) in enumerate(_commands(folder).items()):
        place = folder / f"warm-{number}"
        place.mkdir()
        if name not in ("record", "speed", "memory cpu"):  # what these import, others do too
            with chdir(place):
                called(words)
    return folder, values


def _commands(folder: Path) -> dict[str, list[str]]:
    """Commands that end within a second."""
    model, adapter, data = str(folder / "model"), str(folder / "adapter"), str(folder / "data.jsonl")
    small = [
        "--model",
        model,
        "--steps",
        "1",
        "--batch",
        "2",
        "--eval-examples",
        "2",
        "--device",
        "cpu",
        "--out",
        "out",
    ]
    record = min(records.shipped().glob("*.json"), key=lambda path: path.stat().st_size)
    commands = {
        "finetune": ["finetune", "--task", data, *small, "--rank", "2", "--lr", "1e-3", "--seed", "0"],
        "finetune alpha": ["finetune", "--task", data, *small, "--alpha", "4", "--method", "lora", "--json"],
        "finetune preview": ["finetune", "--task", data, "--model", model, "--preview"],
        "finetune text": [
            "finetune",
            "--task",
            str(folder / "text.txt"),
            *small,
            "--checkpoint-every",
            "1",
        ],
        "generate": ["generate", "the", "--model", model, "--tokens", "3", "--temperature", "0.5", "--seed", "0"],
        "generate adapter": ["generate", "the", "--adapter", adapter, "--tokens", "2", "--repetition-penalty", "1.1"],
        "generate chat": ["generate", "the", "--model", model, "--tokens", "2", "--chat", "--device", "cpu"],
        "chat": ["chat", "--adapter", adapter, "--tokens", "3", "--temperature", "0", "--seed", "0"],
        "export": ["export", adapter, "--out", "out.gguf", "--dtype", "f16"],
        "export merged": ["export", adapter, "--out", "out", "--merged", "--dtype", "f32"],
        "export model": ["export", model, "--out", "m.gguf", "--dtype", "q8_0"],
        "speed": ["speed", "--model", model, "--card", "l40s", "--batch", "1", "--seq", "8", "--rank", "2", "4"],
        "memory": ["memory", "--model", model, "--budget", "1GiB", "--batch", "1", "--seq", "8", "--rank", "2"],
        "memory cpu": ["memory", "--model", model, "--device", "cpu", "--dtype", "float32", "--seq", "8", "--json"],
        "analyze": ["analyze", adapter, "--out", "out"],
        "ablate": ["ablate", "--task", "digits", "--ranks", "1", "--lrs", "1e-2", "--seeds", "1", "--steps", "1"],
        "check-record": ["check-record", str(record)],
        "claims show": ["claims", "show", "rank-one-suffices"],
        "course": ["course", "lessons", "--only", "01"],
        "lessons": ["lessons", "lessons", "--only", "01"],
        "doctor": ["doctor", "--json"],
        "record": ["record", "nothing", "--out", "out"],  # a whole one takes hours
        "no command": [],
    }
    commands["ablate"] += [
        "--eval-examples",
        "4",
        "--batch",
        "4",
        "--margin",
        "0.1",
        "--alpha-per-rank",
        "2",
        "--out",
        "out",
    ]
    return commands


# These predict by going through a step of training, which takes seconds.
_SLOW = ("speed", "memory", "memory cpu", "analyze")
_FAILING = ("record",)  # there is no record of that name
# Values of these options are taken at their word, so that a large one takes as long as it says.
_LONG = {"--steps", "--seeds", "--jobs", "--measure", "--threads", "--tokens"}
_PATHS = ["nowhere", "", ".", "..", "/dev/null", "/dev/zero", "/dev/null/x", "/etc/passwd", "a\0b", 300 * "x", "~", "-"]
_PATHS += ["out/\u00e9 \u2028 x", "x.jsonl", "x.gguf", "//", "$(true)", "out;true", "*", "a\nb", "\udcff"]
_OPTIONS = re.findall(
    r"\S+",
    """
    --json --half --preview --merged --bills --by-length --chat --nope -- -x --help --device=meta --device=cuda
    --device=tpu --rank=0 --rank=-1 --method=full --method=x --card=x --largest=batch --dtype=int4 --alpha=nan
    --lr=inf --temperature=nan --ranks=1,1 --budget=x --budget=-1GB --budget=nanGB
    --budget=99999999999999999999GB --seq=0 --batch=-1 --engine=x --task=x --lrs= --lrs=0 --lrs=nan --ranks=
    --margin=-1 --margin=nan --alpha=0
    """,
)


def case(rng: random.Random, folder: Path, material: tuple[Path, Values]) -> Case:
    """A command with odd arguments, called in an empty folder."""
    place, values = material
    commands = _commands(place)
    name = rng.choice([*commands, *4 * [name for name in commands if name not in _SLOW]])
    words = commands[name]
    good = rng.random() < 0.05 and name not in _FAILING
    for _ in range(0 if good else rng.choice((1, 1, 1, 2))):
        _change(words, rng, values)
    if rng.random() < 0.2 and not good:
        (folder / HERE / "out" / "result.json").write_text(SECRET)
    what = " ".join(map(repr, words))[:300]
    return Case(what, lambda: called(words), partial(_wrong_numbers, folder / HERE), good=good)


def _wrong_numbers(here: Path, printed: str) -> Iterator[str]:
    """What a command printed or wrote that is no number."""
    if odd := re.findall(r"(?i)(?<![\w.-])[+-]?(?:nan|inf|infinity)(?![\w-])", printed):
        yield f"it printed {odd[0]}"
    for path in here.rglob("*.json"):
        if odd := re.findall(r"(?<=[:,\[])\s*(?:NaN|-?Infinity)\b", path.read_text(encoding="utf-8")):
            yield f"it wrote {odd[0].strip()} to {path.name}"
    for path in here.rglob("*.safetensors"):
        if not all(
            bool(torch.isfinite(value).all()) for value in load_file(path).values() if value.is_floating_point()
        ):
            yield f"it wrote numbers that are not finite to {path.name}"


def _change(words: list[str], rng: random.Random, values: Values) -> None:
    """Change, add or leave out an argument."""
    kind = rng.choice(("value", "value", "value", "path", "option", "option", "gone", "twice", "word"))
    if kind == "option" or not words:
        words.insert(rng.randrange(1, len(words) + 1) if words else 0, rng.choice(_OPTIONS))
        return
    place = rng.randrange(len(words)) if rng.random() < 0.1 or len(words) < 2 else rng.randrange(1, len(words))
    if kind == "gone":
        del words[place]
    elif kind == "twice":
        words.insert(place, words[place])
    elif kind == "word":
        words.insert(place, values.text(rng))
    elif kind == "path":
        words[place] = rng.choice(_PATHS)
    else:
        if (numbers := [i for i, word in enumerate(words) if _is_number(word)]) and rng.random() < 0.7:
            place = rng.choice(numbers)
        number = rng.choice((values.integer, values.number))(rng)
        if place and words[place - 1] in _LONG:
            number = -abs(number)
        elif place and words[place - 1] == "--batch" and 64 < number < 10**12:
            number *= 10**12  # a batch of thousands can be meant
        words[place] = rng.choice((str, str, lambda n: f"{n}GB", lambda n: f"{n},1"))(number)
        if rng.random() < 0.3:
            words[place] = values.text(rng)


def _is_number(word: str) -> bool:
    return word.replace("e-", "").replace(".", "").isdigit()


class NoEnd(Exception):
    """A command ended as none should."""


def called(words: list[str]) -> str:
    """Call the command in the working folder, and return what it printed.

    Raises:
        Sentence: it has ended with status 1 or 2, and a line that says why.
        NoEnd: it has ended with another status, or printed a traceback.
    """
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "stdin", io.StringIO("the\n/quit\n")):
            status: Any = cli.main([*words])
    except SystemExit as end:
        status = end.code
    said = err.getvalue()
    for word in words:
        if len(word) > 100 or "\n" in word.strip():  # which is quoted as it was written
            said = said.replace(word, "...")
    return ended(status, out.getvalue(), said)


def ended(status: Any, out: str, err: str) -> str:
    """What a command printed, if it ended as one should; see :func:`called`."""
    lines = err.strip().split("\n")
    if "Traceback" in out + err or status not in (None, 0, 1, 2):
        raise NoEnd(f"status {status}: {err[-300:]}")
    if "can't allocate memory" in lines[-1]:
        raise MemoryError(lines[-1])
    if "[Errno " in lines[-1]:
        raise NoEnd(f"the words of the system: {lines[-1][-300:]}")
    if status == 1 and (not lines[-1].startswith("lora-lab: ") or err.count("lora-lab: ") > 1):
        raise Sentence("\n".join(lines[-3:]))  # several lines, which is too long
    if status == 2 and not re.match(r"(?s)usage: lora-lab.*\nlora-lab[^\n]*: error: ", err):
        raise NoEnd(f"status 2 without a usage: {err[-300:]}")
    if status:
        raise Sentence(lines[-1] if status == 1 else lines[-1][:300])  # argparse quotes in full
    return out
