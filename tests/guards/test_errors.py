"""The page "What can go wrong" quotes what the package says: each row's mistake is made here, and then its remedy."""

import ast
import dataclasses
import errno
import importlib.machinery
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import joblib
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_lab as ll
from lora_lab import ablation, finetune
from lora_lab.models import download
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.pretrained import load_pretrained, save_model
from lora_lab.models.tokenizer import Tokenizer
from lora_lab.system import files
from lora_lab.tasks import IGNORE, Examples, Pair, from_jsonl, from_pairs, from_table, from_text
from tests.helpers import ROOT, random_ids, small_task

PAGE = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
TABLES = re.findall(r"^\| the message says .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
QUOTED = [
    words for table in TABLES for words in re.findall(r"^\| `([^`]+)` (?:\(a warning\) )?\|", table, re.MULTILINE)
]

# Rows whose mistake is not made here, because that takes seconds or another machine; the words must be in the source.
NOT_MADE = {
    "is of kind": "a file in a kind that the gguf library lacks must be written; tests/models/test_pretrained.py",
    "cannot be read (": "takes a user who is not root; tests/system/test_files.py",
    "The system ended a worker": "takes processes of which one is killed; tests/ablation/test_run.py",
    "The output cannot be written": "takes a device that is full; tests/test_cli.py",
    "The files are in": "takes a training whose folder vanishes; tests/studies/test_finetune.py",
}
MISTAKES = {}  # the quoted words: the class of the error, and a function that makes the mistake, or does it right


def mistake(words, kind=ValueError):
    """Register a function ``make(lab, right)``, or ``make(lab)`` if the remedy cannot be tried in milliseconds."""

    def register(make):
        MISTAKES[words] = kind, make
        return make

    return register


@dataclasses.dataclass
class Lab:
    """What a mistake is made with: a folder, a tiny model, two tokenizers, and pytest's monkeypatch."""

    folder: Path
    config: ll.LlamaConfig
    tokenizer: Tokenizer
    chatter: Tokenizer
    patch: pytest.MonkeyPatch

    def llama(self, seed=1, **changes):
        return ll.Llama(dataclasses.replace(self.config, **changes), seed=seed).eval()

    def saved(self, name="model", seed=1, **changes):
        """The folder of a model."""
        return save_model(self.llama(seed, **changes), self.folder / name, self.tokenizer)

    def adapted(self):
        """A model with an adapter, and the folder of the adapter."""
        model = self.llama()
        ll.inject(model, ll.LoRAConfig(rank=2, targets=["q_proj"]))
        return model, ll.save_adapter(model, self.folder / "adapter")

    def file(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def foreign(self, config=None):
        """The folder of a model that is no Llama, and a stand-in for transformers, which takes seconds to import."""
        folder = self.folder / "foreign"
        self.tokenizer.save(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        auto = types.SimpleNamespace(from_pretrained=lambda *_, **__: types.SimpleNamespace(**config or {}))
        stand_in = types.SimpleNamespace(AutoConfig=auto, CONFIG_MAPPING=("gpt2",), __version__="0")
        self.patch.setitem(sys.modules, "transformers", stand_in)
        return folder


@pytest.fixture
def lab(tmp_path, tiny_config, tiny_tokenizer, chatter, monkeypatch):
    return Lab(tmp_path, tiny_config, tiny_tokenizer, chatter, monkeypatch)


def edit(path, **changes):
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def pairs(n=10, answer="good"):
    return [Pair(f"{i} apples?", f"{answer} {i}") for i in range(n)]


def lines(*entries):
    return "".join(f"{json.dumps(entry)}\n" for entry in entries)


def train(model=None, task=None, method=None, **options):
    """Two steps of a small net."""
    model = model or DigitsMLP(width=8)
    options = {"steps": 2, "lr": 1e-3, "batch_size": 4, "progress": False} | options
    return ll.fit(model, task or small_task(), method or ll.LoRA(rank=2, alpha=4), **options)


# Installing, and the model's file


@mistake("could not download", RuntimeError)
def _(lab):
    lab.patch.setenv("LORA_LAB_CACHE", str(lab.folder))
    lab.patch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=1, stderr="ERROR: no index"))
    download.fetch_smollm2()


@mistake("is not the expected file (its sha256 is")
def _(lab):
    lab.patch.setenv("LORA_LAB_CACHE", str(lab.folder))
    lab.patch.setattr(download, "SIZE_BYTES", 7)
    lab.file(download.FILE, "another")
    download.fetch_smollm2()


@mistake("This model needs transformers", ModuleNotFoundError)
def _(lab):
    folder = lab.foreign()
    lab.patch.setitem(sys.modules, "transformers", None)
    load_pretrained(folder)


@mistake("module 'lora_lab' has no attribute", AttributeError)
def _(lab):
    (lab.folder / "lora_lab" / "lora_lab").mkdir(parents=True)  # a clone, seen from the folder around it
    found = importlib.machinery.PathFinder.find_spec("lora_lab", [str(lab.folder)])
    return importlib.util.module_from_spec(found).LoRA


@mistake("cannot be used here")
def _(lab, right):
    load_pretrained(lab.saved(), device=None if right else "cuda:99")


# Loading a model


@mistake("There is no model", FileNotFoundError)
def _(lab, right):
    load_pretrained(lab.saved() if right else "HuggingFaceTB/SmolLM2-360M")


@mistake("lacks the file config.json", FileNotFoundError)
def _(lab, right):
    model, adapter = lab.adapted()
    if right:
        model, _ = load_pretrained(lab.saved())
        ll.load_adapter(model, adapter)
    else:
        load_pretrained(adapter)


@mistake("holds no file *.safetensors", FileNotFoundError)
def _(lab):
    folder = lab.foreign()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    load_pretrained(folder)


@mistake("lacks the file tokenizer.json", FileNotFoundError)
def _(lab, right):
    folder = lab.saved()
    if not right:
        (folder / "tokenizer.json").unlink()
    load_pretrained(folder)


@mistake("holds weights that are quantised")
def _(lab):
    load_pretrained(lab.foreign({"quantization_config": {"quant_method": "gptq"}}))


@mistake("is not a GGUF file or is truncated")
def _(lab, right):
    path = save_model(lab.llama(), lab.folder / "model.gguf", lab.tokenizer, format="gguf")
    if not right:
        path.write_bytes(path.read_bytes()[:3000])
    load_pretrained(path)


@mistake("are of two different saves")
def _(lab, right):
    folder, other = lab.saved(), lab.saved("other", max_position_embeddings=64)
    for path in other.iterdir():
        if right or path.name == "model.safetensors":
            shutil.copy(path, folder)
    load_pretrained(folder)


@mistake("holds numbers that are NaN or infinite")
def _(lab, right):
    path = lab.saved() / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1.0 if right else torch.nan
    save_file(tensors, path)
    load_pretrained(path.parent)


@mistake("The chat template refuses these messages")
def _(lab, right):
    template = lab.chatter.chat_template if right else "{{ raise_exception('no') }}"
    Tokenizer(lab.tokenizer.backend, eos_id=259, chat_template=template).chat([{"role": "user", "content": "a"}])


@mistake("it loses letters")
def _(lab, right):
    folder = lab.saved()
    if not right:
        edit(folder / "tokenizer.json", decoder=None)
    load_pretrained(folder)


@mistake("so it is incomplete")
def _(lab, right):
    path = lab.saved() / "model.safetensors"
    tensors = load_file(path)
    if not right:
        del tensors["model.norm.weight"]
    save_file(tensors, path)
    load_pretrained(path.parent)


# Loading an adapter


@mistake("There is no folder", FileNotFoundError)
def _(lab, right):
    _, adapter = lab.adapted()
    ll.load_adapter(lab.llama(), adapter if right else "a-name/of-the-hub")


@mistake("a pickle, which can run code and is not opened here", FileNotFoundError)
def _(lab):
    _, adapter = lab.adapted()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    ll.load_adapter(lab.llama(), adapter)


@mistake("that its target_modules match, such as", UserWarning)
def _(lab, right):
    _, adapter = lab.adapted()
    ll.load_adapter(lab.llama(num_hidden_layers=2 if right else 3), adapter)


@mistake("but the model has no such layer")
def _(lab, right):
    _, adapter = lab.adapted()
    ll.load_adapter(lab.llama(num_hidden_layers=2 if right else 1), adapter)


@mistake("is it the adapter's own base model?")
def _(lab, right):
    _, adapter = lab.adapted()
    ll.load_adapter(lab.llama() if right else lab.llama(hidden_size=64, head_dim=16), adapter)


def changed_adapter(**changes):
    def make(lab, right):
        model, adapter = lab.adapted()
        ll.merge(model)
        if not right:
            edit(adapter / "adapter_config.json", **changes)
        ll.load_adapter(model, adapter)

    return make


mistake("but only 'LORA' is read here")(changed_adapter(peft_type="IA3"))
mistake("which changes the result and is not supported here")(changed_adapter(layer_replication=[[0, 1]]))
mistake("weights and config are from two different saves")(changed_adapter(lora_alpha=99))


@mistake("The model already has adapters")
def _(lab, right):
    model, adapter = lab.adapted()
    if right:
        ll.merge(model)
    ll.load_adapter(model, adapter)


# Data


@mistake("There is no file", FileNotFoundError)
def _(lab, right):
    path = lab.file("mine.jsonl", lines(*({"prompt": f"{i}?", "answer": "a"} for i in range(10))))
    from_jsonl(lab.chatter, path if right else lab.folder / "nine.jsonl")


def from_lines(wrong, right_entry=None):
    """Ten good lines and one more."""

    def make(lab, right):
        good = lines(*({"prompt": f"{i}?", "answer": "a"} for i in range(10)))
        last = lines(right_entry or {"prompt": "b?", "answer": "b"}) if right else wrong
        content = good.encode() + (last if isinstance(last, bytes) else last.encode())
        from_jsonl(lab.chatter, lab.file("mine.jsonl", content))

    return make


mistake("malformed line")(from_lines('{"prompt": "b?", "answer": "b"\n'))
mistake("is not UTF-8")(from_lines('{"prompt": "b?", "answer": "\xfc"}\n'.encode("latin-1")))
mistake("which match no known form")(from_lines(lines({"q": "b?", "a": "b"})))
mistake("is a NoneType, not a string")(from_lines(lines({"prompt": "b?", "answer": None})))
mistake("which is half a character")(from_lines('{"prompt": "b?", "answer": "\\ud83d"}\n'))


@mistake("has no column")
def _(lab, right):
    path = lab.file("mine.csv", "text,answer\n" + "".join(f"{i} apples?,{i}\n" for i in range(10)))
    if right:  # both remedies
        from_table(lab.chatter, path, prompt="text")
        path.write_text(path.read_text(encoding="utf-8").replace("text,", "prompt,"), encoding="utf-8")
    from_table(lab.chatter, path)


@mistake("which the model reads as a special token")
def _(lab, right):
    path = lab.file("mine.txt", "\n\n".join(f"{i} red trees</s> in a row of them" for i in range(10)))
    from_text(lab.tokenizer, path, seq_len=4, allow_special=right)


@mistake("tokens, but max_tokens is")
def _(lab, right):
    from_pairs(lab.chatter, pairs(), max_tokens=99 if right else 9)


@mistake("too few for a")
def _(lab, right):
    path = lab.file("mine.txt", "\n\n".join(f"{i} red trees in a row of them" for i in range(10)))
    from_text(lab.tokenizer, path, seq_len=4 if right else 500)


@mistake("This tokenizer has no chat template")
def _(lab, right):
    if right:
        from_text(lab.tokenizer, lab.file("mine.txt", "\n\n".join(10 * ["red trees in a row"])), seq_len=4)
    else:
        from_pairs(lab.tokenizer, pairs())


# Training


@mistake("lower the learning rate, and reload the model", RuntimeError)
def _(lab, right):
    train(method=ll.FullFineTuning(), lr=1e-3 if right else 1e38, steps=9)


@mistake("before training), so no learning rate can help", RuntimeError)
def _(lab, right):
    model = DigitsMLP(width=8)
    if not right:
        torch.nn.init.constant_(model.head.bias, math.nan)
    train(model)


@mistake("The model has already been prepared for")
def _(lab, right):
    model, fresh = DigitsMLP(width=8), DigitsMLP(width=8)
    train(model, method=ll.FullFineTuning())
    fresh.load_state_dict(model.state_dict())
    train(fresh if right else model)


@mistake("holds every change of them already", UserWarning)
def _(lab, right):
    ll.inject(lab.llama(), ll.LoRAConfig(rank=32 if right else 33))


@mistake("has no option", TypeError)
def _(lab, right):
    train(**{"warmup" if right else "warmpu": 1})


@mistake("so the task was made with another tokenizer")
def _(lab, right):
    train(lab.llama(vocab_size=260 if right else 100), from_pairs(lab.chatter, pairs()))


@mistake("what it does with later tokens is not reliable", UserWarning)
def _(lab, right):
    train(lab.llama(max_position_embeddings=128 if right else 16), from_pairs(lab.chatter, pairs()))


@mistake("but there is no folder to write to")
def _(lab, right):
    train(checkpoint_every=1, checkpoint_dir=lab.folder if right else None)


@mistake("matches no module")
def _(lab, right):
    ll.inject(lab.llama(), ll.LoRAConfig(rank=2, targets="all-linear" if right else ["c_attn"]))


@mistake("is shared with another module")
def _(lab, right):
    ll.inject(lab.llama(), ll.LoRAConfig(rank=2, targets=["q_proj"] if right else ["lm_head"]))


@mistake("so training one trains the other")
def _(lab, right):
    names = ["lm_head", "model.embed_tokens"] if right else ["lm_head"]
    ll.PartialFineTuning(names).prepare(lab.llama(), seed=0)


@mistake("a side longer than")
def _(lab, right):
    ll.inject(lab.llama(), ll.LoRAConfig(rank=8 if right else 5000))


@mistake("counts in the loss")
def _(lab, right):
    task = dataclasses.replace(small_task(), unit="tokens")
    task.train.targets[: 8 if right else None] = IGNORE
    train(task=task, batch_size=12 if right else 4)


@mistake(", which matches no module; names here end in")
def _(lab, right):
    ll.inject(lab.llama(), ll.LoRAConfig(rank=2, exclude=["v_proj" if right else "v_porj"]))


@mistake("is from another run")
def _(lab, right):
    train(checkpoint_dir=lab.folder / "one", checkpoint_every=1)
    train(checkpoint_dir=lab.folder / ("two" if right else "one"), lr=2e-3)


@mistake("was made with other frozen weights")
def _(lab, right):
    train(checkpoint_dir=lab.folder / "one", checkpoint_every=1)
    train(DigitsMLP(width=8, seed=0 if right else 1), checkpoint_dir=lab.folder / "one")


@mistake("is of a run that started from other weights")
def _(lab, right):
    train(method=ll.FullFineTuning(), checkpoint_dir=lab.folder / "one", checkpoint_every=1)
    model = DigitsMLP(width=8, seed=0 if right else 1)
    train(model, method=ll.FullFineTuning(), checkpoint_dir=lab.folder / "one")


@mistake("were rounded by a lean step")
def _(lab, right):
    ids = random_ids(6, 9)
    data = ll.Task("text", *(Examples(part[:, :-1], part[:, 1:]) for part in (ids[:3], ids[3:4], ids[4:5], ids[5:])))
    model = lab.llama()
    with pytest.raises(ZeroDivisionError):
        train(model, data, lean=ll.Lean(torch.bfloat16), on_row=lambda row: 1 / 0)
    train(lab.llama() if right else model, data)


@mistake("was stopped before its first checkpoint")
def _(lab, right):
    def adapted():
        model = DigitsMLP(width=8)
        ll.inject(model, ll.LoRAConfig(2))
        return model

    def stop(row):
        if row["step"] == 1:
            raise KeyboardInterrupt

    model = adapted()
    with pytest.raises(KeyboardInterrupt):
        train(model, method=ll.ContinueLoRA(), checkpoint_dir=lab.folder, checkpoint_every=2, on_row=stop)
    train(adapted() if right else model, method=ll.ContinueLoRA(), checkpoint_dir=lab.folder)


@mistake("its last checkpoint is missing", UserWarning)
def _(lab):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    lab.patch.setattr(ll.checkpoint, "save", full)
    train(checkpoint_dir=lab.folder, checkpoint_every=2)


@mistake("does not match the checksum in the header")
def _(lab, right):
    train(checkpoint_dir=lab.folder, checkpoint_every=1)
    path = lab.folder / "checkpoint.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if right:
        path.unlink()
    train(checkpoint_dir=lab.folder)


@mistake("The lean step is built for")
def _(lab, right):
    train(lean=None if right else ll.Lean())


# Sweeps


def sweep(folder=None, **options):
    trials = ablation.Grid([2], [1e-3], range(2), steps=2, batch_size=4, alpha=4)
    return ablation.ablate(lambda: DigitsMLP(width=8), small_task(), trials, folder, progress=False, **options)


@mistake("is no result of ablate, or damaged")
def _(lab, right):
    sweep(lab.folder)
    damaged = min(lab.folder.glob("*.json"))
    damaged.write_text("{")
    if right:
        damaged.unlink()
    assert len(sweep(lab.folder)["key"].unique()) == 2


@mistake("belongs to the")
def _(lab, right):
    trial = ablation.Trial(ll.LoRA(2), lr=1e-3, steps=2, task=None if right else "digits")
    trial.bound("docs", "a model")


@mistake("so the numbers would be wrong")
def _(lab):
    with joblib.parallel_config(backend="threading", n_jobs=2):
        sweep()


@mistake("has the fingerprint", RuntimeError)
def _(lab, right):
    seeds = iter(range(99))
    trials = ablation.Grid([2], [1e-3], range(2), steps=2, batch_size=4, alpha=4)

    def make():
        return DigitsMLP(width=8, seed=0 if right else next(seeds))

    ablation.ablate(make, small_task(), trials, engine="separate", progress=False)


@mistake("compare only rows with equal values", UserWarning)
def _(lab, right):
    sweep(lab.folder / "one")
    trials = ablation.Grid([2], [1e-3], [0], steps=2, batch_size=4, alpha=4)
    folder = lab.folder / ("two" if right else "one")
    ablation.ablate(DigitsMLP(width=8, seed=1), small_task(), trials, folder, progress=False)
    ablation.load(lab.folder / "one")


@mistake("cannot be compared")
def _(lab, right):
    trials = ablation.Grid([1, 2], [1e-3], range(2), steps=2, batch_size=4, alpha=4)
    for seed in (0, 1):
        model = DigitsMLP(width=8, seed=seed)
        ablation.ablate(model, small_task(), trials, lab.folder, progress=False)
    frame = ablation.load(lab.folder)
    assert frame["model"].nunique() == 2
    if right:
        frame = frame[frame["model"] == frame["model"].iloc[0]]
    ablation.smallest_sufficient_rank(frame, margin=0.1)


# Saving


@mistake("could not be written", OSError)
def _(lab, right):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    _, adapter = lab.adapted()
    before = (adapter / "adapter_config.json").stat().st_ino
    with pytest.MonkeyPatch.context() as patch:
        if not right:
            patch.setattr(files, "_flush", full)
        try:
            lab.adapted()
        finally:
            assert ((adapter / "adapter_config.json").stat().st_ino == before) is not right


@mistake("cannot be written to", OSError)
def _(lab, right):
    lab.file("file", "mine")
    files.check_writable(lab.folder / ("results" if right else "file/results"))


@mistake("is a folder, but a file is to be written there", OSError)
def _(lab, right):
    (lab.folder / "history.json").mkdir()
    train().save(lab.folder / ("mine.json" if right else "history.json"))


@mistake("and transformers loads a model with the adapter that is in its folder")
def _(lab, right):
    model, adapter = lab.adapted()
    ll.merge(model)
    save_model(model, lab.folder / "whole" if right else adapter, lab.tokenizer)


@mistake("name another folder (--out), or pass --overwrite", OSError)
def _(lab):
    _, adapter = lab.adapted()
    finetune.run("style", ll.LoRA(rank=2), adapter)


@mistake("is in use by another run", OSError)
def _(lab, right):
    with files.claimed(lab.folder / "out"), files.claimed(lab.folder / ("another" if right else "out")):
        pass


@mistake("was not written by this command")
def _(lab, right):
    lab.file("result.json", '{"mine": 1}')
    files.check_replaceable(lab.folder / ("another/result.json" if right else "result.json"), ("method",))


@mistake("holds a save that was interrupted", OSError)
def _(lab, right):
    model, adapter = lab.adapted()
    (adapter / ".lora_lab-ready").mkdir()
    (adapter / ".lora_lab-ready" / "README.md").write_text("new")
    if not right:
        (adapter / "README.md").unlink()
        (adapter / "README.md").mkdir()
    ll.merge(model)
    ll.load_adapter(model, adapter)
    assert (adapter / "README.md").read_text() == "new"


@mistake("The model has adapters; merge(model) first")
def _(lab, right):
    model, _ = lab.adapted()
    if right:
        ll.merge(model)
    save_model(model, lab.folder / "whole", lab.tokenizer)


# The tests


HELPED = [words for words, (_, make) in MISTAKES.items() if make.__code__.co_argcount == 2]


def texts(source):
    """All texts of a source, those with placeholders in the parts between them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_row_of_the_tables_quotes_a_message_whose_mistake_is_made_here():
    assert len(QUOTED) == len(set(QUOTED))
    assert len(QUOTED) == sum(table.count("\n") for table in TABLES) - 1  # of one row the message is a verdict's
    assert {*QUOTED} == MISTAKES.keys() | NOT_MADE.keys()
    assert not MISTAKES.keys() & NOT_MADE.keys()


def perform(words, *arguments):
    """Make a mistake, or do it right; where the message is a warning, that is raised."""
    kind, make = MISTAKES[words]
    with warnings.catch_warnings():
        if issubclass(kind, Warning):
            warnings.simplefilter("error", kind)
        make(*arguments)


@pytest.mark.parametrize("words", MISTAKES)
def test_the_mistake_of_a_row_gets_the_message_that_is_quoted(lab, words):
    kind, _ = MISTAKES[words]
    with pytest.raises(kind) as caught:
        perform(words, lab, *([False] if words in HELPED else []))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert f"`{kind.__name__}`" in PAGE or issubclass(kind, Warning)


@pytest.mark.slow
@pytest.mark.parametrize("words", HELPED)
def test_what_helps_by_the_page_helps(lab, words):
    perform(words, lab, True)


def test_a_message_whose_mistake_is_not_made_here_is_in_the_package():
    source = {text for path in sorted((ROOT / "lora_lab").rglob("*.py")) for text in texts(path.read_text("utf-8"))}
    for words in NOT_MADE:
        assert any(words in text for text in source), words
    assert not any("is no file of a known kind here" in text for text in source)


def test_what_the_page_says_no_check_sees_is_seen_by_none(lab):
    model, adapter = lab.adapted()
    other = lab.llama(seed=2)
    assert ll.load_adapter(other, adapter)  # another base of equal shapes
    folder = lab.saved()
    shutil.copy(lab.saved("other", seed=2) / "model.safetensors", folder)  # weights of another model of equal shapes
    loaded, _ = load_pretrained(folder)
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    assert Tokenizer.load(folder).decode(Tokenizer.load(folder).encode("The")) == "the"
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(loaded(ids), other(ids))
        assert not torch.equal(loaded(ids), model(ids))
