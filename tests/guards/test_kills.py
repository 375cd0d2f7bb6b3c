"""Saving over an older adapter or model, stopped at any moment: by signals, by Ctrl-C, by a full disk.

What is left must be the old files or the new ones, all of one save. ``make hostile`` kills more often.
"""

import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from lora_lab import (
    History,
    Llama,
    LoRA,
    LoRAConfig,
    adapters,
    checkpoint,
    cli,
    fit,
    inject,
    load_adapter,
    load_pretrained,
    lora_layers,
    save_adapter,
    save_model,
    tasks,
)
from lora_lab.models import pretrained
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import LlamaConfig
from lora_lab.models.tokenizer import Tokenizer

resource = pytest.importorskip("resource", reason="Windows has neither its limits nor fork nor SIGKILL")
KILLS = int(os.environ.get("LORA_LAB_KILLS", "20"))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


class Adapters:
    """Two adapters of the same shapes, with other numbers and another base."""

    def __init__(self, tokenizer):
        self.models = {name: self.adapted(seed) for seed, name in enumerate(("old", "new"))}

    @staticmethod
    def adapted(seed):
        model = DigitsMLP(width=64)
        inject(model, LoRAConfig(rank=4, alpha=8), seed=seed)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B.fill_(1.0 + seed)
        return model

    def save(self, name, folder):
        save_adapter(self.models[name], folder, base=name)

    def load(self, folder):
        load_adapter(DigitsMLP(width=64), folder)


class Models:
    """Two models of the same shapes, with other numbers, other positions and another tokenizer."""

    def __init__(self, tokenizer):
        config = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        self.models = {
            "old": Llama(LlamaConfig(**config), seed=1),
            "new": Llama(LlamaConfig(**config, rope_theta=5e5), seed=2),
        }
        self.tokenizers = {
            name: Tokenizer(tokenizer.backend, eos_id=259, bos_id=258, chat_template=f"{name} {{{{ messages }}}}")
            for name in self.models
        }

    def save(self, name, folder):
        save_model(self.models[name], folder, self.tokenizers[name])

    def load(self, folder):
        load_pretrained(folder, device="cpu")


@pytest.fixture(params=[Adapters, Models])
def saver(request, tiny_tokenizer):
    return request.param(tiny_tokenizer)


class Arena:
    """A folder with the old files and one of the user's own, made anew for each try."""

    def __init__(self, saver, path):
        self.saver, self.folder, self.whole = saver, path / "folder", {}
        for name in ("old", "new"):
            saver.save(name, path / name)
            (path / name / "notes.txt").write_text("the user's own")
            self.whole[name] = contents(path / name)
        assert self.whole["old"].keys() == self.whole["new"].keys()
        assert self.whole["old"] != self.whole["new"]
        self.prepared = path / "old"

    def prepare(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.prepared, self.folder)

    def save(self):
        self.saver.save("new", self.folder)

    def outcome(self):
        """What a reader finds: "old" or "new", or what is wrong."""
        try:
            self.saver.load(self.folder)
        except (ValueError, OSError) as error:
            return f"does not load: {error}"
        left = contents(self.folder)
        return next((name for name, files in self.whole.items() if files == left), f"a mixture: {sorted(left)}")


@pytest.fixture
def arena(saver, tmp_path):
    return Arena(saver, tmp_path)


def contents(folder):
    """What the files of a folder hold; a killed process's temporary ones are left out."""
    found = {path.name: path for path in folder.iterdir() if not path.name.startswith(".lora_lab-new-")}
    return {name: held(path) for name, path in found.items()}


def held(path):
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return content
    start = 8 + int.from_bytes(content[:8], "little")  # of the numbers; the header's entries come in any order
    return json.loads(content[8:start]), content[start:]


@contextmanager
def forked(function):
    """A process that calls the function; within the block it has begun, and after the block it has ended."""
    begun, tell = os.pipe()
    process = SimpleNamespace(pid=os.fork(), exitcode=None)
    if process.pid == 0:
        signal.alarm(60)  # ends it, should a lock of another thread have been forked with it
        status = 1
        try:
            os.write(tell, b".")
            function()
            status = 0
        finally:
            os._exit(status)  # before pytest hears of an error
    os.close(tell)
    try:
        os.read(begun, 1)
        yield process
    finally:
        os.close(begun)
        process.exitcode = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])


@pytest.mark.slow
def test_a_save_that_is_killed_at_random_leaves_the_old_files_or_the_new_ones(arena):
    took = []
    for _ in range(5):
        arena.prepare()
        started = time.perf_counter()
        with forked(arena.save):
            pass
        took.append(time.perf_counter() - started)
    outcomes = []
    for i in range(KILLS):
        arena.prepare()
        delay = random.Random(i).uniform(0, 1.1 * statistics.median(took))
        with forked(arena.save) as process:
            time.sleep(delay)
            os.kill(process.pid, SIGNALS[i % len(SIGNALS)])
        outcomes.append(arena.outcome())
    lost = [outcome for outcome in outcomes if outcome not in arena.whole]
    print(f"{KILLS} kills: {outcomes.count('old')} old, {outcomes.count('new')} new, {len(lost)} lost")
    assert lost == []


@pytest.mark.slow
def test_a_kill_before_each_of_its_operations_on_files_leaves_the_old_files_or_the_new_ones(arena):
    outcomes = []
    operations = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")

    def killed_at(number):
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event in operations:
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(hook)
        arena.save()

    for number in range(1000):
        arena.prepare()
        with forked(partial(killed_at, number)) as process:
            pass
        outcomes.append(arena.outcome())
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert set(outcomes) == {"old", "new"}
    assert outcomes == sorted(outcomes, reverse=True)  # one of the operations decides
    assert outcomes.count("new") > 3  # it is followed by others


READERS = {
    "load_adapter": Adapters.load,
    "read_adapter": lambda saver, folder: adapters.read_adapter(folder),
    "the adapter's config": lambda saver, folder: adapters.read_config(folder),
    "analyze": lambda saver, folder: cli.main(["analyze", str(folder), "--out", str(folder.parent / "out")]),
    "load_pretrained": Models.load,
    "the model's config": lambda saver, folder: pretrained.read_config(folder),
    "the tokenizer": lambda saver, folder: Tokenizer.load(folder),
}


@pytest.mark.parametrize(
    ("saver", "reader"),
    [(Adapters if i < 4 else Models, name) for i, name in enumerate(READERS)],
    ids=READERS,
    indirect=["saver"],
)
def test_every_reader_finishes_a_save_that_was_stopped_when_it_was_decided(arena, reader):
    arena.prepare()
    ready = arena.folder / ".lora_lab-ready"
    shutil.copytree(arena.prepared.parent / "new", ready, ignore=shutil.ignore_patterns("notes.txt"))
    READERS[reader](arena.saver, arena.folder)
    assert contents(arena.folder) == arena.whole["new"]


def test_ctrl_c_in_any_line_leaves_the_old_files_or_the_new_ones(arena):
    watched = ("system/files.py", "adapters/peft_format.py", "models/pretrained.py", "models/tokenizer.py")

    def interrupted_at(number):
        """Returns how many lines there were, if none was the one."""
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            if not frame.f_code.co_filename.replace(os.sep, "/").endswith((*watched, "/contextlib.py")):
                return None
            if event == "line":
                if count == number:
                    sys.settrace(None)
                    raise KeyboardInterrupt
                count += 1
            return trace

        sys.settrace(trace)
        try:
            arena.save()
        finally:
            sys.settrace(None)
        return count

    arena.prepare()
    lines = interrupted_at(None)
    outcomes = []
    for number in random.Random(0).sample(range(lines), min(4 * KILLS, lines)):
        arena.prepare()
        with pytest.raises(KeyboardInterrupt):
            interrupted_at(number)
        outcomes.append(arena.outcome())
    assert set(outcomes) == {"old", "new"}


@contextmanager
def room(size):
    """No file of this process can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_room_the_old_files_stay_and_one_sentence_says_where(arena):
    sizes = sorted(path.stat().st_size for path in (arena.prepared.parent / "new").iterdir())
    for size in (0, 10, *(size + more for size in sizes for more in (-1, 0, 200))):
        arena.prepare()
        fits = size >= sizes[-1]
        says = r"folder could not be written \(File too large\), and the previous content is unchanged; make room"
        with nullcontext() if fits else pytest.raises(OSError, match=says), room(size):
            arena.save()
        assert arena.outcome() == ("new" if fits else "old")
        assert sorted(path.name for path in arena.folder.iterdir()) == sorted(arena.whole["new"])


def test_a_checkpoint_without_room_is_one_sentence_and_the_last_one_stays(tmp_path):
    path, before = tmp_path / "checkpoint.safetensors", b""

    def loss(model, inputs, targets):
        nonlocal before
        if not before and path.is_file():  # the first checkpoint has been written; for the second there is no room
            before = path.read_bytes()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return functional.mse_loss(model(inputs), targets)

    model = DigitsMLP(width=8)
    task = replace(tasks.planted(model, n_train=16), loss=loss)
    with pytest.raises(OSError, match=r"checkpoint\.safetensors could not be written \(File too large\)"), room(10**6):
        fit(model, task, LoRA(2), steps=4, lr=1e-2, checkpoint_dir=tmp_path, checkpoint_every=1, progress=False)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_what_a_killed_save_left_is_cleared_away_by_the_next_one(arena):
    arena.prepare()

    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        sys.addaudithook(lambda event, arguments: die() if event == "os.rename" else None)
        arena.save()

    with forked(killed):
        pass
    assert any(path.name.startswith(".") for path in arena.folder.iterdir())
    arena.save()
    assert sorted(path.name for path in arena.folder.iterdir()) == sorted(arena.whole["new"])


@pytest.mark.parametrize("number", SIGNALS)
def test_what_a_checkpoint_that_was_ended_by_a_signal_left_is_cleared_away_by_the_next_one(tmp_path, number):
    model = DigitsMLP(width=8)
    run = model, torch.optim.AdamW(model.parameters()), History({}, {}, {}, 1, 1)
    checkpoint.save(tmp_path, *run)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()

    def ended():
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)  # without a handler of Python's
        sys.addaudithook(lambda event, arguments: os.kill(os.getpid(), number) if event == "os.rename" else None)
        checkpoint.save(tmp_path, *run)

    with forked(ended) as process:
        pass
    assert process.exitcode == -number
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    checkpoint.save(tmp_path, *run)
    assert list(tmp_path.iterdir()) == [path]
