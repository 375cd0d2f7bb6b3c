"""The demo on a tiny model in this process: what it prints, keeps and refuses."""

import base64
import json
import re

import pytest
import torch

from lora_lab import LoRAConfig, demo, evaluate, inject, load_adapter, load_pretrained, lora_layers, save_adapter
from lora_lab.history import COLUMNS, History
from lora_lab.models import pretrained
from lora_lab.tasks import docs
from tests.helpers import PNG, command, randomise


@pytest.fixture
def small_demo(tiny_smollm2, monkeypatch, tmp_path):
    """The demo with little to do, in this process."""
    load = pretrained.load_pretrained

    def on_the_asked_device(device):
        assert device == "cpu:0"
        return load(device=device)

    monkeypatch.setattr(demo, "load_pretrained", on_the_asked_device)
    voice, _ = load(device="cpu:0")
    inject(voice, LoRAConfig(rank=2))
    save_adapter(randomise(voice, size=3.0), tmp_path / "voice")

    def continued(model, tokenizer, prompt, **sampling):
        """As reply does, but greedily, and the tiny tokenizer has no chat template."""
        new = model.generate(torch.tensor(tokenizer.encode(prompt)), max_new_tokens=5)
        return tokenizer.decode(new.tolist())

    monkeypatch.setattr(demo, "reply", continued)
    monkeypatch.setattr(demo, "shipped", lambda name: {demo.VOICE: tmp_path / "voice"}[name])
    monkeypatch.setattr(demo, "SEQ_LEN", 16)
    monkeypatch.setattr(demo, "BATCH_SIZE", 2)
    monkeypatch.setattr(demo, "EVAL_EXAMPLES", 4)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 5)
    monkeypatch.setattr(demo, "run_in_subprocess", lambda function, *arguments: function(*arguments))
    return tiny_smollm2


def table_rows(printed):
    """Cells of the printed table by the name of their row."""
    lines = printed.partition("Side by side\n\n")[2].partition("\n\n")[0].splitlines()
    return {line[:20].strip(): [cell.strip() for cell in re.split(r" {2,}", line[20:].strip())] for line in lines}


def test_demo_fine_tunes_both_ways_and_keeps_what_it_says(small_demo, tmp_path, capsys):
    out = tmp_path / "results"
    arguments = ("--steps", 4, "--seed", 3, "--rank", 2, "--device", "cpu:0", "--out", out)
    assert command("demo", *arguments) == 0
    printed = capsys.readouterr().out
    for part in ("Device: cpu:0", "[2/4] LoRA r=2: 4 steps of 2 x 16 tokens", "[4/4] Side by side"):
        assert part in printed
    assert all(str(out / name) in printed for name in ("demo.html", "demo.png", "lora", "full", "demo.json"))
    assert printed.count(f"    | {demo.PROMPT}") == 3  # a sample before, and one after each training

    base = load_pretrained(small_demo, device="cpu")[0]
    total = sum(p.numel() for p in base.parameters())
    trained = sum(2 * (m.in_features + m.out_features) for n, m in base.named_modules() if n.endswith("_proj"))
    rows = table_rows(printed)
    assert rows[""] == ["LoRA r=2", "full fine-tuning"]
    assert rows["trained parameters"] == [f"{trained:,}", f"{total:,}"]
    files = [out / "lora" / "adapter_model.safetensors", out / "full" / "model.safetensors"]
    assert rows["file to keep, MB"] == [f"{path.stat().st_size / 1e6:.1f}" for path in files]
    assert (out / "demo.png").read_bytes().startswith(PNG)
    text = (out / "demo.html").read_text(encoding="utf-8")
    assert "With the adapter off the answer is\nthe same as before." in text
    assert base64.b64encode((out / "demo.png").read_bytes()).decode() in text
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)  # one file, which needs no other and no network
    answers = re.findall(r'class="who">(.+?)</div><blockquote>(.*?)</blockquote>', text, re.DOTALL)
    assert [who for who, _ in answers] == [
        *("base", "with the adapter", "adapter off"),
        *("before training", "LoRA r=2", "full fine-tuning"),
    ]
    assert answers[0][1] == answers[2][1] != answers[1][1]
    assert all(f"<td>{cell}</td>" in text for row in list(rows.values())[1:] for cell in row if "->" not in cell)
    histories = [History.load(out / name / "history.json") for name in ("lora", "full")]
    for history, method in zip(histories, ("lora", "full"), strict=True):
        assert history.method["name"] == method
        assert (history.settings["seed"], history.settings["steps"], len(history.rows)) == (3, 4, 5)
        assert history.task["name"] == "docs"
    assert histories[0].method["rank"] == 2
    assert histories[0].method["alpha"] == 4
    assert histories[0].rows[0]["validation_loss"] == histories[1].rows[0]["validation_loss"]  # the same start
    assert histories[0].rows[1]["train_loss"] == histories[1].rows[1]["train_loss"]  # the same first batch
    assert histories[0].task == histories[1].task
    ends = [f"{h.rows[0]['validation_loss']:.3f} -> {h.rows[-1]['validation_loss']:.3f}" for h in histories]
    assert rows["validation loss"] == ends
    assert histories[0].rows[-1]["validation_loss"] != histories[1].rows[-1]["validation_loss"]

    record = json.loads((out / "demo.json").read_text())
    assert record["machine"]["device"] == "cpu:0"
    assert [result["label"] for result in record["results"]] == ["LoRA r=2", "full fine-tuning"]
    for result, history in zip(record["results"], histories, strict=True):
        assert result["history"]["rows"] == history.rows
        memory = result["memory"]
        assert memory["optimiser state"] == history.optimizer_bytes > 0
        assert memory["trained weights"] == 4 * history.trainable_parameters
        assert memory["saved: MLP"] > 0
        assert memory["the rest: torch, Python, the heap"] > 0
        assert sum(memory.values()) == result["peak_bytes"]

    assert json.loads((out / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == "smollm2-135m"
    load_adapter(base, out / "lora")
    assert len(lora_layers(base)) == 14
    assert all(layer.lora_B.abs().max() > 0 for layer in lora_layers(base).values())
    full, _ = load_pretrained(out / "full", device="cpu")
    start = load_pretrained(small_demo, device="cpu")[0].state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in full.state_dict().items())
    task = docs(load_pretrained(small_demo, device="cpu")[1], seq_len=16)
    for model, result in zip((base, full), record["results"], strict=True):
        assert result["train_after"] == pytest.approx(evaluate(model, task, "train", 2, 4), rel=1e-5)
        assert result["train_after"] != pytest.approx(result["train_before"], rel=1e-5)


def result(label, lr, trained, before, after, seconds, peak, size):
    rows = [
        {**dict.fromkeys(COLUMNS), "step": 0, "validation_loss": before, "off_domain_loss": before + 1, "tokens": 0},
        *({**dict.fromkeys(COLUMNS), "step": i, "seconds": s, "tokens": 256} for i, s in enumerate(seconds, 1)),
    ]
    rows[-1] |= {"validation_loss": after, "off_domain_loss": after + 1}
    history = History({"name": "docs"}, {"name": label}, {"lr": lr}, trained, 134_515_008, rows=rows)
    return demo.Result(label, history, before - 0.1, after - 0.1, {"weights": peak - 5, "rest": 5}, peak, size, "text")


RESULTS = [
    result("LoRA r=8", 2e-3, 2_442_240, 3.25, 2.75, [1.0, 0.5, 2.0], 1900 * 2**20, 9_790_000),
    result("full fine-tuning", 2e-4, 134_515_008, 3.25, 2.5, [1.25, 1.5, 1.0], 3700 * 2**20 + 2**19 + 1, 538_090_408),
]


def test_lack_of_memory_comes_with_what_full_fine_tuning_needs(small_demo, tmp_path, capsys, monkeypatch):
    def ended(*arguments, **options):
        raise MemoryError("The subprocess was ended by the system; do something.")

    monkeypatch.setattr(demo, "train", ended)
    assert command("demo", "--steps", 1, "--device", "cpu:0", "--out", tmp_path) == 1
    says = "The subprocess was ended by the system; full fine-tuning of SmolLM2-135M needs about 4 GiB of free memory."
    assert capsys.readouterr().err == f"lora-lab: {says}\n"


def test_the_page_escapes_texts_and_says_if_the_base_is_not_back(tmp_path):
    answers = {"base": "<b>", "with the adapter": "a & b", "adapter off": "other"}
    start = {"before": "before", "answers": answers, "adapter_bytes": 1_200_000, "model_bytes": 538_000_000}
    picture = tmp_path / "demo.png"
    picture.write_bytes(PNG)
    text = demo.make_page(RESULTS, start, picture, {"cpu": "x"}, 4, 3)
    assert "<blockquote>&lt;b&gt;</blockquote>" in text
    assert "a &amp; b" in text
    assert "1.2 MB beside a model of\n538 MB" in text
    for numbers in ("2,442,240 134,515,008", "9.8 538.1", "1,900 3,701", "1.00 1.25", "256 205", "3.150 3.150"):
        assert all(f"<td>{number}" in text for number in numbers.split()), numbers
    assert "the answer is\nnot the same as before" in text
    assert "4 steps of 4 x 64 tokens of Python's manual for each method, seed 3" in text
