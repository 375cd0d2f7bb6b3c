"""Each command of ``lora-lab``: its help, and one real call on small input."""

import csv
import json
import subprocess
import sys

import gguf
import nbformat
import pytest
import torch
import transformers

import lora_lab as ll
from tests.acceptance import ROOT

COMMANDS = ["demo", "finetune", "chat", "export", "memory", "speed", "analyze", "ablate", "rank", "record"]
COMMANDS += ["answers", "claims", "course", "playground", "doctor", "fetch"]
WITH_JSON = ["memory", "speed", "analyze", "ablate", "rank", "finetune", "record", "answers", "claims", "doctor"]
CONFIGS = ROOT / "tests" / "data" / "configs"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help(main, capsys, name):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"lora-lab {name}" in printed
    assert ("--json" in printed) is (name in WITH_JSON)


def test_the_help_lists_exactly_these_commands(lora_lab):
    listed = [line.split()[0] for line in lora_lab().splitlines() if line[:4] == "    " and line[4:5].isalpha()]
    assert sorted(listed) == sorted(COMMANDS)


def test_the_command_runs_as_a_module_and_says_its_version():
    call = [sys.executable, "-m", "lora_lab", "--version"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lora-lab", ll.__version__]


def test_what_goes_wrong_is_one_line_and_a_status(main, capsys):
    assert main(["chat", "a", "--adapter", "nowhere"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("lora-lab: ")
    assert "nowhere" in printed.err
    assert printed.err.count("\n") == 1


# finetune, generate, chat, export: one adapter's life


def finetune(lora_lab, stranger, sums, *more):
    options = ["--steps", 6, "--batch", 4, "--eval-examples", 4, "--device", "cpu", "--out", "out"]
    return lora_lab("finetune", "--task", sums, "--model", stranger, *options, *more)


@pytest.mark.parametrize("method", ["lora", "rslora", "lora+", "lora-fa", "pissa", "dora", "full"])
def test_finetune_trains_evaluates_and_saves(lora_lab, stranger, sums, tmp_path, method):
    result = json.loads(finetune(lora_lab, stranger, sums, "--method", method, "--lr", 0.01, "--json"))
    assert result["after"]["validation_loss"] < result["before"]["validation_loss"]
    assert len(result["after"]["samples"]) == 3
    assert result["method"]["name"] == method
    assert result["settings"]["steps"] == 6
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    kept = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert saved >= {kept, "history.json", "result.json"}
    before, tokenizer = ll.load_pretrained(stranger, device="cpu")
    after, _ = ll.load_pretrained("out" if method == "full" else stranger, device="cpu")
    if method != "full":
        ll.load_adapter(after, "out")
    ids = torch.tensor([tokenizer.encode("3 plus one?")])
    assert not torch.equal(after(ids), before(ids))


def test_finetune_shows_what_a_model_reads_and_never_replaces_a_result(main, lora_lab, stranger, sums, tmp_path):
    printed = finetune(lora_lab, stranger, sums, "--preview")
    assert "plus one?" in printed
    assert not (tmp_path / "out").exists()
    finetune(lora_lab, stranger, sums)
    before = (tmp_path / "out" / "result.json").read_bytes()
    options = ["--steps", "1", "--device", "cpu", "--out", "out"]
    assert main(["finetune", "--task", str(sums), "--model", str(stranger), *options]) == 1
    assert (tmp_path / "out" / "result.json").read_bytes() == before
    finetune(lora_lab, stranger, sums, "--overwrite", "--rank", 2)
    assert (tmp_path / "out" / "result.json").read_bytes() != before


def test_plain_chat_writes_what_the_model_writes_with_and_without_the_adapter(lora_lab, stranger, adapter):
    greedy = ["--temperature", 0, "--repetition-penalty", 1]
    options = ["--plain", *greedy, "--tokens", 8, "--device", "cpu"]
    plain = lora_lab("chat", "1 plus", "--model", stranger, *options)
    adapted = lora_lab("chat", "1 plus", "--adapter", adapter, *options)
    assert plain != adapted
    model, tokenizer = ll.load_pretrained(stranger, device="cpu")
    ids = torch.tensor(tokenizer.encode("1 plus"))
    for folder, printed in ((None, plain), (adapter, adapted)):
        if folder:
            ll.load_adapter(model, folder)
        expected = tokenizer.decode(model.generate(ids, 8, tokenizer.eos_id).tolist())
        assert expected in printed


def test_chat_answers_lines_and_switches_the_adapter(lora_lab, adapter, monkeypatch):
    lines = iter(["one", "/strength 0.5", "one", "/off", "one"])

    def read(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    printed = lora_lab("chat", "--adapter", adapter, "--tokens", 4, "--temperature", 0, "--device", "cpu")
    assert next(lines, None) is None
    assert "0.5" in printed


def test_export_writes_an_adapter_and_a_whole_model(lora_lab, stranger, adapter):
    lora_lab("export", adapter, "--out", "adapter.gguf")
    fields = gguf.GGUFReader("adapter.gguf").fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.lora.alpha"].contents() == 8
    lora_lab("export", adapter, "--merged", "--out", "merged")
    model, tokenizer = ll.load_pretrained(stranger, device="cpu")
    ll.load_adapter(model, adapter)
    ids = torch.tensor([tokenizer.encode("1 plus")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


def test_analyze_writes_a_table_with_bands_of_noise(lora_lab, stranger, adapter, tmp_path):
    result = json.loads(lora_lab("analyze", adapter, "--base", stranger, "--out", "spectra", "--json"))
    with open(tmp_path / "spectra" / "layers.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [row["layer"] for row in result["layers"]]
    assert {row["rank"] for row in result["layers"]} == {2}
    assert all(row["stable_rank_low"] <= row["stable_rank_high"] for row in result["layers"])


# Costs


def test_memory_says_which_setups_fit(lora_lab, stranger):
    options = ["--model", stranger, "--seq", 64, "--device", "cpu", "--dtype", "float32", "--json"]
    setups = json.loads(lora_lab("memory", *options, "--budget", "700KiB"))["setups"]
    fits = {each["setup"]: each["fits"] for each in setups}
    assert {True, False} == set(fits.values()), {each["setup"]: each["peak_bytes"] for each in setups}
    for each in setups:
        assert each["peak_bytes"] == sum(each["bytes_by_part"].values())
        assert each["fits"] is (each["peak_bytes"] <= 700 * 2**10)


def test_speed_counts_and_predicts_for_a_card(lora_lab):
    options = ["--card", "l40s", "--model", CONFIGS / "gpt2.json", "--seq", 16, "--json"]
    result = json.loads(lora_lab("speed", *options))
    flops = {each["variant"]: each["flops"] for each in result["counted"]}
    assert 0.6 < flops["LoRA r=8"] / flops["full"] < 0.8
    assert all(each["seconds"] > 0 for each in result["predicted"]["variants"])


@pytest.mark.slow
def test_speed_measures_this_machine(lora_lab):
    options = ["--batch", 1, "--seq", 16, "--measure", 1, "--device", "cpu", "--json"]
    measured = json.loads(lora_lab("speed", *options))["measured"]
    assert all(each["seconds"] > 0 for each in measured["variants"])


# Sweeps, records, claims


def test_ablate_gives_a_verdict_and_goes_on_where_it_was_stopped(lora_lab, tmp_path):
    options = ["--task", "planted", "--ranks", 1, 2, "--lrs", "0.01", "--seeds", 2, "--steps", 4, "--jobs", 1]
    result = json.loads(lora_lab("ablate", *options, "--out", "sweep", "--json"))
    assert result["trials"] == 4
    assert {row["rank"] for row in result["verdict"]["ranks"]} == {1, 2}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "trials").iterdir()}
    again = json.loads(lora_lab("ablate", *options, "--out", "sweep", "--json"))
    assert again["evaluations"] == result["evaluations"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "trials").iterdir()} == before


def test_check_record_reads_a_record(lora_lab):
    assert "is whole" in lora_lab("record", ROOT / "records" / "amd-epyc-2-cores-speed.json", "--check")


def test_claims_explains_one(lora_lab):
    printed = lora_lab("claims", "attention-256-mlp-128")
    for text in ("attention alone at rank 256", "depends", "shown by"):
        assert text in printed
    (entry,) = json.loads(lora_lab("claims", "attention-256-mlp-128", "--json"))
    assert entry["verdict"] == "depends"
    assert entry["date"]


def test_answers_lists_all_and_explains_one(lora_lab):
    every = json.loads(lora_lab("answers", "--json"))
    assert len(every) >= 15
    (rank,) = json.loads(lora_lab("answers", "rank", "--json"))
    assert rank in every
    assert rank["rows"]["rank-one-suffices"].startswith("falls")
    printed = " ".join(lora_lab("answers", "rank").split())
    assert all(rank[name] in printed for name in ("question", "answer", "number", "do", "link"))


# Lessons, the machine, the model


def test_course_and_lessons_write_the_open_and_the_solved_copy(lora_lab, tmp_path):
    lora_lab("course", "mine", "--only", "01")
    lora_lab("course", "solved", "--solved", "--only", "01")
    opened, solved = (nbformat.read(tmp_path / f / "01_low_rank.ipynb", 4) for f in ("mine", "solved"))
    assert "return (m * n - 1) // (m + n)" in nbformat.writes(solved)
    assert "return (m * n - 1) // (m + n)" not in nbformat.writes(opened)


def test_doctor_says_which_device_is_used_and_why(lora_lab):
    result = json.loads(lora_lab("doctor", "--json"))
    assert result["lora_lab"] == ll.__version__
    assert result["device"] == "cpu"
    assert result["device_reason"]
    assert result["memory_total_bytes"] > result["memory_available_bytes"] > 0
    assert "model" in lora_lab("doctor")


def test_fetch_finds_the_model_in_the_cache(lora_lab):
    lora_lab("fetch")
    assert json.loads(lora_lab("doctor", "--json"))["model_is_cached"]


@pytest.mark.slow
def test_demo_sets_lora_beside_full_fine_tuning(lora_lab, tmp_path):
    printed = lora_lab("demo", "--steps", 1, "--device", "cpu", "--out", "demo")
    assert "LoRA r=8" in printed
    assert "full fine-tuning" in printed
    numbers = json.loads((tmp_path / "demo" / "demo.json").read_text(encoding="utf-8"))
    assert len(numbers["results"]) == 2
    assert (tmp_path / "demo" / "lora" / "adapter_model.safetensors").is_file()
    assert list((tmp_path / "demo").glob("*.html"))
