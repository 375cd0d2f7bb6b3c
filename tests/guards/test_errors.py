"""Each message that docs/errors.md quotes is the message of the mistake that it stands for."""

import re
import subprocess
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_lab as ll
from lora_lab import finetune
from lora_lab.models import pretrained
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import from_jsonl, from_text
from tests.helpers import ROOT, small_task

PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^\| `(.+?)` \|", PAGE[PAGE.index("## The errors that people meet") :], re.MULTILINE)
MISTAKES = {}


def mistake(quoted):
    """Register a function that makes the mistake behind a message."""
    return lambda make: MISTAKES.setdefault(quoted, make)


def train(method, model=None, task=None, **options):
    settings = {"steps": 2, "lr": 1e-2, "batch_size": 4} | options
    return ll.fit(model or DigitsMLP(width=8), task or small_task(), method, **settings)


@mistake("could not download")
def _(folder, tokenizer, monkeypatch):
    monkeypatch.setenv("LORA_LAB_CACHE", str(folder))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=1, stderr="no index"))
    pretrained.fetch_smollm2()


@mistake("There is no model")
def _(folder, tokenizer, monkeypatch):
    ll.load_pretrained("no-such-model")


@mistake("matches no module")
def _(folder, tokenizer, monkeypatch):
    ll.inject(DigitsMLP(), ll.LoRAConfig(targets=["q_porj"]))


@mistake("The model already has adapters")
def _(folder, tokenizer, monkeypatch):
    train(ll.LoRA(rank=2), model := DigitsMLP())
    train(ll.LoRA(rank=2), model)


@mistake("The model has already been prepared for")
def _(folder, tokenizer, monkeypatch):
    train(ll.FullFineTuning(), model := DigitsMLP())
    train(ll.LoRA(rank=2), model)


def save_adapter(folder):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    ll.inject(model, ll.LoRAConfig(rank=2, targets=["0"]))
    ll.save_adapter(model, folder / "adapter")


@mistake("but the model has no such layer")
def _(folder, tokenizer, monkeypatch):
    save_adapter(folder)
    ll.load_adapter(torch.nn.ModuleDict({"other": torch.nn.Linear(4, 4)}), folder / "adapter")


@mistake("holds numbers that are NaN or infinite")
def _(folder, tokenizer, monkeypatch):
    save_adapter(folder)
    path = folder / "adapter" / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor * torch.nan for name, tensor in load_file(path).items()}, path, metadata)
    ll.load_adapter(torch.nn.Sequential(torch.nn.Linear(4, 4)), folder / "adapter")


@mistake("which the model reads as a special token")
def _(folder, tokenizer, monkeypatch):
    (folder / "mine.txt").write_text("\n\n".join(f"{i} red trees</s> in a row of them" for i in range(10)))
    from_text(tokenizer, folder / "mine.txt", seq_len=4)


@mistake("malformed line")
def _(folder, tokenizer, monkeypatch):
    (folder / "mine.jsonl").write_text('{"prompt": "b?", "answer": "b"\n' * 20)
    from_jsonl(tokenizer, folder / "mine.jsonl")


@mistake("counts in the loss")
def _(folder, tokenizer, monkeypatch):
    (task := small_task()).train.targets[:] = -100
    train(ll.LoRA(rank=2), task=task)


@mistake("lower the learning rate, and reload the model")
def _(folder, tokenizer, monkeypatch):
    train(ll.FullFineTuning(), lr=1e38, steps=9)


@mistake("is from another run")
def _(folder, tokenizer, monkeypatch):
    train(ll.LoRA(rank=2), checkpoint_dir=folder, checkpoint_every=1)
    train(ll.LoRA(rank=2), checkpoint_dir=folder, lr=2e-3)


@mistake("name another folder (--out), or pass --overwrite")
def _(folder, tokenizer, monkeypatch):
    save_adapter(folder)
    finetune.run("style", ll.LoRA(rank=2), folder / "adapter")


def test_every_quoted_message_has_its_mistake():
    assert set(QUOTED) == set(MISTAKES)


@pytest.mark.parametrize("quoted", MISTAKES)
def test_the_mistake_gives_the_message_that_is_quoted(quoted, tmp_path, tiny_tokenizer, monkeypatch):
    with pytest.raises((ValueError, OSError, RuntimeError)) as raised:
        MISTAKES[quoted](tmp_path, tiny_tokenizer, monkeypatch)
    assert quoted in str(raised.value)
