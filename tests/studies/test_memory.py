"""What `lora-lab record memory` runs, on small models, and what it prints, writes and refuses."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from lora_lab import memory, records
from lora_lab.models import shapes
from lora_lab.models.llama import Llama, LlamaConfig
from lora_lab.studies import memory as recording
from lora_lab.studies import speed as speed_recording
from tests.helpers import command, printed_json

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def test_the_cases_cover_what_the_bill_is_checked_on():
    cases = recording.memory_cases(CPU)
    assert len(cases) >= 48
    assert [case.label for case in cases if case.model == "small"] == list(recording.memory_setups())
    for model in ("small", "smollm2-135m"):
        labels = {case.label for case in cases if case.model == model}
        assert len(labels) >= 16
        for words in (
            "r=1",
            "r=8",
            "r=64",
            "attention only",
            "LoRA-FA",
            "NF4",
            "bf16",
            "checkpointing",
            "lean",
            "full",
        ):
            assert any(words in label for label in labels), words
    lengths = {case.seq_len for case in cases if case.label == "LoRA r=8" and case.batch_size == 1}
    assert lengths == set(recording.CONTEXTS)
    assert {case.model for case in recording.memory_cases(CPU, ["small"])} == {"small"}


def test_a_gpu_is_given_larger_models_in_bfloat16():
    cases = recording.memory_cases(torch.device("cuda"))
    large = [case for case in cases if case.model in ("llama-3.2-1b", "llama-3-8b")]
    assert {case.model for case in large} == {"llama-3.2-1b", "llama-3-8b"}
    assert all(case.setup.dtype == torch.bfloat16 or case.setup.lean is not None for case in large)
    assert not any(case.model.startswith("llama") for case in recording.memory_cases(CPU))


def test_labels_say_what_the_setups_do():
    for label, setup in recording.memory_setups().items():
        assert ("bf16" in label) == (
            setup.dtype == torch.bfloat16 or getattr(setup.lean, "base_dtype", None) is not None
        )
        checkpoints = setup.gradient_checkpointing or (setup.lean is not None and setup.lean.checkpoint)
        assert ("checkpointing" in label) == checkpoints
        assert ("lean" in label) == (setup.lean is not None)
        assert ("NF4" in label) == setup.nf4
        assert ("SGD" in label) == (setup.optimizer == "sgd")
        if "r=" in label:
            assert f"r={setup.method.rank}" in label


def test_a_row_holds_parts_that_add_up_to_a_peak_that_was_predicted(small_is_tiny):
    (case,) = (case for case in recording.memory_cases(CPU, ["small"]) if case.label == "LoRA r=8")
    row = recording.measure_case(case, "cpu")
    assert (row["model"], row["batch"], row["length"], row["setup"]) == ("small", 4, 128, "LoRA r=8")
    parts = sum(row.get(part, 0) for part in memory.PARTS) + row["unexplained_bytes"]
    assert parts == row["measured_bytes"]
    assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.03)
    model = recording.random_model("small")
    assert row["frozen weights"] == 4 * sum(p.numel() for p in model.parameters())
    if row["process_bytes"] is not None:
        assert row["process_bytes"] > 0.5 * row["measured_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
def test_the_process_is_judged_by_its_steps_and_not_by_how_the_model_was_made(tiny_config):
    case = recording.Case("small", 1, 16, "LoRA r=8", recording.memory_setups()["LoRA r=8"])

    def lavish():
        torch.ones(2**26)  # 256 MiB for a moment
        return Llama(tiny_config)

    assert recording.process_bytes(lavish, case, CPU) < 64 * 2**20


def test_a_record_is_written_with_its_command_and_can_be_read(small_is_tiny, tmp_path, capsys, monkeypatch):
    some = [case for case in recording.memory_cases(CPU, ["small"]) if case.label in ("full", "LoRA r=8")]
    monkeypatch.setattr(recording, "memory_cases", lambda device, models: some)
    assert command("record", "memory", "--device", "cpu", "--models", "small", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    (record,) = records.load_all("memory", tmp_path).values()
    assert [row["setup"] for row in record.rows] == ["full", "LoRA r=8"]
    assert record.command == "lora-lab record memory --device cpu --models small"
    assert record.settings["environment"] == recording.HEAP
    assert f"{record.rows[0]['measured_bytes'] / 2**20:,.1f} MiB" in printed
    assert str(tmp_path) in printed
    assert record.rows[0]["measured_bytes"] > record.rows[1]["measured_bytes"]


def test_a_record_as_json_is_the_record_and_its_path(small_is_tiny, tmp_path, capsys, monkeypatch):
    some = [case for case in recording.memory_cases(CPU, ["small"]) if case.label == "LoRA r=8"]
    monkeypatch.setattr(recording, "memory_cases", lambda device, models: some)
    assert command("record", "memory", "--device", "cpu", "--models", "small", "--out", tmp_path, "--json") == 0
    document, rest = printed_json(capsys)
    (path,) = tmp_path.glob("*.json")
    assert document.pop("path") == str(path)
    assert document == json.loads(path.read_text(encoding="utf-8"))
    assert f"{document['rows'][0]['measured_bytes'] / 2**20:,.1f} MiB" in rest


def test_what_does_not_fit_into_memory_is_skipped_and_named(monkeypatch, small_is_tiny, capsys):
    def measure(function, case, device, environment):
        if case.label == "full":
            raise MemoryError("too large")
        return case.key

    monkeypatch.setattr(recording, "run_in_subprocess", measure)
    cases = recording.memory_cases(CPU, ["small"])
    labels = [row["setup"] for row in recording.rows(CPU, ["small"])]
    assert labels == [case.label for case in cases if case.label != "full"]
    assert "skipped, because it does not fit into memory: full on small, 4 x 128" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["memory", "speed"])
def test_a_model_without_cases_is_refused_before_anything_is_measured(tmp_path, capsys, what, monkeypatch):
    monkeypatch.setattr(speed_recording, "cost_model", lambda device: pytest.fail("measured"))
    assert command("record", what, "--device", "cpu", "--models", "gpt-5", "--out", tmp_path) == 1
    assert "There are no cases of 'gpt-5' on this device; there are of small, smollm2-135m" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_at_the_end_is_kept_in_another_folder(tmp_path, capsys, monkeypatch):
    out = tmp_path / "records"

    def measured(device, models):
        out.write_text("in the way by now")
        yield {"model": "small", "setup": "full", "measured_bytes": 5}

    recorder = replace(recording.RECORDER, rows=measured, line=lambda row: None)
    monkeypatch.setattr(recording, "RECORDER", recorder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert command("record", "memory", "--device", "cpu", "--out", out) == 1
    (spare,) = tmp_path.glob("lora_lab-*")
    assert capsys.readouterr().err.endswith(f"The files are in {spare} instead.\n")
    (record,) = records.load_all("memory", spare).values()
    assert record.rows[0]["measured_bytes"] == 5


def test_a_part_does_not_take_the_place_of_the_whole_record(capsys):
    assert command("record", "memory", "--device", "cpu", "--models", "small") == 1
    assert "would replace that of all models; name another folder with --out" in capsys.readouterr().err


def test_every_known_shape_makes_a_model():
    for name in shapes.TABLE:
        with torch.device("meta"):
            assert isinstance(recording.random_model(name).config, LlamaConfig)
