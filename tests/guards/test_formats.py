"""Each kind of file that lora_lab writes opens in every later version: here those that each version wrote.

``tests/data/formats`` has a folder for each version that changed a format, written by :func:`write` below. All its
numbers that matter are whole, so no processor rounds them. Files of 0.1.0 are in ``test_unmoved.py``.

What says which format a file has:

- a trial's result, a record: the entry ``schema``, 1.
- a checkpoint, and weights that wait for a judge: the entries of the header. A checkpoint without ``start``, or with
  ``history`` there, is older, and one without ``sha256`` too.
- a History: its entries and columns. One more or one less is refused.
- ``progress.json`` and ``.lora_lab_course.json``: their entries. Others are ignored.
- SmolLM2's blocks in the cache: the number in the folder's name. With another number they are written anew.
- a folder with a model or an adapter, a GGUF file: these are formats of Hugging Face, PEFT and llama.cpp. What lora_lab
  adds (hashes, ``lora_lab.block_kinds``, ``lora_lab.normalizer``, ``lora_lab.rope_scaling``) may be missing.

Lessons' stored outputs, the base's own replies and ``records/`` are in the repository, and other tests read them.

To change a format: teach its reader the old one and the new one; run ``python -m tests.guards.test_formats``, which
writes a folder with the version's name; and leave the folders that are there as they are.
"""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import nn
from torch.nn import functional as F

import lora_lab
from lora_lab import (
    FullFineTuning,
    Halving,
    History,
    Llama,
    LlamaConfig,
    LoRA,
    Task,
    Trial,
    ablate,
    checkpoint,
    load_adapter,
    load_pretrained,
    lora_layers,
    records,
    save_adapter,
    save_model,
)
from lora_lab.ablation import load
from lora_lab.course import copies, learner
from lora_lab.models import pretrained
from lora_lab.models.gguf_reader import read_gguf
from lora_lab.models.llama import RopeScaling
from lora_lab.system.files import write_json
from lora_lab.tasks import Examples

DATA = Path(__file__).parents[1] / "data" / "formats"
VERSIONS = sorted((path.name for path in DATA.iterdir()), key=lambda name: [int(part) for part in name.split(".")])
ALL = pytest.mark.parametrize("version", VERSIONS)

pytestmark = pytest.mark.usefixtures("one_thread")


# What the files hold


def whole(*shape, seed=0):
    """Whole numbers from -127 to 127; each 32 of them are one block of Q8_0 with the factor 1."""
    size = torch.Size(shape)
    numbers = ((torch.arange(size.numel()) * 37 + 11 * seed) % 255 - 127.0).view(size)
    numbers[..., ::32] = 127
    return numbers


@torch.no_grad()
def filled(model, scale=1.0):
    """The model with such numbers as its parameters."""
    for seed, parameter in enumerate(model.parameters()):
        parameter.copy_(scale * whole(*parameter.shape, seed=seed))
    return model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 4)
        filled(self, 2**-8)

    def forward(self, x):
        return self.head(F.relu(self.hidden(x)))


def shapes():
    def part(n, seed):
        return Examples(whole(n, 8, seed=seed) / 64, (torch.arange(n) + seed) % 4)

    return Task("shapes", part(14, 1), part(5, 2), part(4, 3), part(6, 4))


def llama(width, **options):
    sizes = {"hidden_size": width, "intermediate_size": width, "head_dim": width, "num_hidden_layers": 1}
    return filled(Llama(LlamaConfig(vocab_size=7, num_attention_heads=1, num_key_value_heads=1, **sizes, **options)))


def scaled():
    """With the rule of positions that a GGUF file has no entry for but ours."""
    return llama(32, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))


def tokenizer():
    tokens = {token: i for i, token in enumerate(["t", "h", "e", "th", "the"])}
    backend = Backend(models.BPE(tokens, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return lora_lab.models.tokenizer.Tokenizer(backend, bos_id=5, eos_id=6, chat_template="{{ messages[0].content }}")


def history(steps=2):
    about = {"name": "shapes", "fingerprint": "0123456789abcdef", "unit": "examples"}
    made = History(about, FullFineTuning().settings(), {"steps": 4, "lr": 0.5}, 82, 82, 672)
    made.start()
    made.add_evaluation("validation", 3.0)
    for step in range(1, steps + 1):
        made.add(step, train_loss=3.0 - step, lr=0.5, grad_norm=float("inf"), seconds=0.25, tokens=5)
    made.add_evaluation("validation", 1.5)
    made.add_evaluation("off_domain", 4.0)
    return made


def optimizer_of(model, seed):
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        moments = {name: seed * torch.ones_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(2.0), **moments}
    return optimizer


TRIAL = {"seed": 3, "steps": 4, "batch_size": 5, "eval_every": 1, "warmup": 0}
SWEEP = [Trial(LoRA(rank=2), lr, **TRIAL) for lr in (0.02, 1e-6, 1e30)]
RECORD = {
    "what": "memory",
    "device": "A card",
    "facts": {"python": "3.12.1"},
    "commit": "unknown",
    "date": "2026-11-27",
    "command": "lora-lab record memory",
    "settings": {"batch": [4, 128], "halves": None},
    "rows": [{"method": "LoRA", "peak_bytes": 123456789, "ratio": 0.5, "measured": True}],
}


def write(folder):
    """Write each kind of file."""
    history().save(folder / "history.json")
    net = filled(Net())
    torch.manual_seed(5)
    hashes = {"frozen": checkpoint.frozen_hash(net), "start": checkpoint.parameters_hash(net)}
    checkpoint.save(folder / "run", net, optimizer_of(net, 2), history(), hashes)
    rule = Halving(rungs=[0.5], cautious=False)
    ablate(Net(), shapes(), SWEEP, folder / "sweep", halving=rule, judge=lambda model, task: {"a": 1, "b": "c"})
    records.write(records.Record(**RECORD), folder / "records")
    adapted = Net()
    LoRA(rank=2, alpha=3.0, targets=["hidden"]).prepare(adapted, 0)
    for part in ("lora_A", "lora_B"):
        getattr(adapted.hidden, part).data = whole(*getattr(adapted.hidden, part).shape)
    save_adapter(adapted, folder / "adapter", base="a/model")
    save_model(llama(4), folder / "model", tokenizer())
    save_model(scaled(), folder / "model.gguf", tokenizer(), format="gguf", dtype="q8_0")
    (folder / "blocks").mkdir()
    pretrained._write_blocks(read_gguf(folder / "model.gguf"), folder / "blocks")
    (folder / "lessons").mkdir()
    write_json(folder / "lessons" / copies.MANIFEST, {"solved": False, "lessons": {"00_first_look.ipynb": "5a"}})
    write_json(folder / "lessons" / learner.PROGRESS, {"done": ["best_rank"], "tried": ["terms_for"]})


# Every version's are read


@pytest.fixture
def folder(version, tmp_path):
    """A copy of what a version wrote."""
    return Path(shutil.copytree(DATA / version, tmp_path / version))


@ALL
def test_a_history_is_read(folder):
    assert History.load(folder / "history.json") == history()
    assert History.load(folder / "history.json") != history(steps=3)


@ALL
def test_a_run_goes_on_from_a_checkpoint(folder):
    net, again = Net(), history(steps=1)
    optimizer = optimizer_of(net, 0)
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    torch.manual_seed(6)
    assert checkpoint.step_of(folder / "run") == 2
    assert checkpoint.resume(folder / "run", net, optimizer, again) == 2
    assert again == history()
    assert torch.equal(torch.get_rng_state(), expected)
    for value, twin in zip(net.parameters(), filled(Net()).parameters(), strict=True):
        assert torch.equal(value, twin)
        assert optimizer.state[value]["step"] == 2
        assert bool((optimizer.state[value]["exp_avg"] == 2).all())


@ALL
def test_a_sweep_is_read_and_not_run_again(folder, monkeypatch):
    monkeypatch.setattr("lora_lab.ablation.run.fit", None)
    monkeypatch.setattr("lora_lab.ablation.packed.fit_packed", None)
    stored = {path.stem: json.loads(path.read_text()) for path in (folder / "sweep").glob("*.json")}
    frame = load(folder / "sweep")
    assert frame.groupby("key")["outcome"].first().value_counts().to_dict() == {"done": 1, "failed": 1, "stopped": 1}
    for key, rows in frame[frame["outcome"] != "failed"].groupby("key"):
        losses = [row["validation_loss"] for row in stored[key]["history"]["rows"]]
        assert rows["validation_loss"].tolist() == losses
        assert rows["test_loss"].iloc[-1] == stored[key]["test_loss"] or stored[key]["outcome"] == "stopped"
        assert rows["reason"].iloc[-1] == (stored[key]["reason"] or "")
    scores = frame[["lr", "rank", "score_a", "score_b"]].dropna()
    assert scores.values.tolist() == [[1e-6, 2.0, 1.0, "c"]]
    assert ablate(Net(), shapes(), SWEEP[1:], folder / "sweep", progress=False)["key"].nunique() == 2


@ALL
def test_a_record_is_read(folder):
    assert records.load_all(folder=folder / "records") == {"a-card-memory": records.Record(**RECORD)}


@ALL
def test_an_adapter_is_read(folder):
    net = Net()
    load_adapter(net, folder / "adapter")
    assert list(lora_layers(net)) == ["hidden"]
    assert torch.equal(net.hidden.delta(), 1.5 * whole(6, 2) @ whole(2, 8))


@ALL
@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("model", lambda: llama(4), {}),
        ("model.gguf", scaled, {}),
        ("blocks", scaled, {}),
        ("blocks", scaled, {"keep_blocks": True}),
    ],
)
def test_a_model_is_read(folder, name, make, options):
    model, read = load_pretrained(folder / name, device="cpu", **options)
    expected = make()
    assert model.config.rope_scaling == expected.config.rope_scaling
    assert (model.config.rope_scaling is None) == (name == "model")
    for module, parameter in expected.named_parameters():
        assert torch.equal(model.get_submodule(module.rpartition(".")[0]).weight, parameter)
    assert read.encode("the")[-1] == 4
    assert read.eos_id == 6


@ALL
def test_what_a_learner_has_done_is_read(folder, monkeypatch):
    for name in ("_passed", "_tried"):
        monkeypatch.setattr(learner, name, set())
    monkeypatch.chdir(folder / "lessons")
    assert learner._remembered() == ({"best_rank"}, {"terms_for"}, "")
    with pytest.raises(ValueError, match="has the lessons without solutions"):
        copies.copy_lessons(folder / "lessons", solved=True)


# Today's are like those of the newest


def names_in(content):
    """The names in nested dicts; of a list those in its last entry."""
    if isinstance(content, dict):
        return {name: names_in(entry) for name, entry in content.items()}
    return [names_in(content[-1])] if isinstance(content, list) and content else None


def form(path):
    """What of a file makes up its format: the names of entries, and the names, types and shapes of tensors."""
    if path.suffix == ".json" and path.name != "tokenizer.json":  # that is the tokenizers library's
        return names_in(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".gguf":
        reader = gguf.GGUFReader(path)
        return {*reader.fields}, {(each.name, each.tensor_type, *each.shape) for each in reader.tensors}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {*file.metadata()}, {(name, each.get_dtype(), *each.get_shape()) for name, each in tensors.items()}
    return None


def forms(folder):
    return {str(path.relative_to(folder)): form(path) for path in folder.rglob("*") if path.is_file()}


def test_files_have_the_form_of_those_of_the_newest_version(tmp_path):
    write(tmp_path)
    assert forms(tmp_path) == forms(DATA / VERSIONS[-1]), "A format has changed; see the docstring of this file."


def test_an_entry_more_or_less_is_another_form(tmp_path):
    history().save(tmp_path / "history.json")
    before = forms(tmp_path)
    content = json.loads((tmp_path / "history.json").read_text())
    for change in ({"version": 2}, {"rows": [{"step": 0}]}):
        write_json(tmp_path / "history.json", content | change)
        assert forms(tmp_path) != before
    write_json(tmp_path / "history.json", content | {"trainable_parameters": 5})
    assert forms(tmp_path) == before


if __name__ == "__main__":
    write(DATA / lora_lab.__version__)
