"""What `lora-lab record memory`, `record speed` and `speed` run, on small models, and what they print and refuse."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from lora_lab import FullFineTuning, LoRA, records, speed
from lora_lab.costs.bill import PARTS
from lora_lab.costs.setup import Setup
from lora_lab.costs.timing import CostModel
from lora_lab.models.llama import Llama
from lora_lab.studies import steps
from tests.helpers import command, llama_folder, printed_json

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture
def priced(monkeypatch):
    """A cost model by hand, because calibrating a real one takes seconds: a nanosecond a byte moved, ten a call."""
    costs = CostModel(lambda operation: 1e-9 * operation.moved_bytes + 1e-8)
    for module in (steps, speed):
        monkeypatch.setattr(module, "cost_model", lambda device: costs)


# Memory


def only(monkeypatch, *labels):
    """Measure these setups alone, on the small model."""
    cases = [case for case in steps.memory_cases(CPU) if case.model == "small" and {*case.setups} <= {*labels}]
    monkeypatch.setattr(steps, "memory_cases", lambda device: cases)
    return cases


def test_a_row_holds_parts_that_add_up_to_a_peak_that_was_predicted(small_is_tiny, monkeypatch):
    (case,) = only(monkeypatch, "LoRA r=8")
    row = steps.measure_case(case, "cpu")
    assert (row["model"], row["batch"], row["length"], row["setup"]) == ("small", 4, 128, "LoRA r=8")
    assert sum(row.get(part, 0) for part in PARTS) == row["measured_bytes"]
    assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.03)
    model = steps.random_model("small")
    assert row["frozen weights"] == 4 * sum(p.numel() for p in model.parameters())
    if row["process_bytes"] is not None:
        assert row["process_bytes"] > 0.5 * row["measured_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
def test_the_process_is_judged_by_its_steps_and_not_by_how_the_model_was_made(tiny_config):
    case = steps.Case("small", 1, 16, {"LoRA r=8": steps.memory_setups()["LoRA r=8"]})

    def lavish():
        torch.ones(2**26)  # 256 MiB for a moment
        return Llama(tiny_config)

    assert steps.process_bytes(lavish, case, CPU) < 64 * 2**20


def test_a_record_is_measured_checked_and_read(small_is_tiny, tmp_path, capsys, monkeypatch):
    only(monkeypatch, "full", "LoRA r=8")
    assert command("record", "memory", "--device", "cpu", "--models", "small", "--out", tmp_path, "--json") == 0
    document, printed = printed_json(capsys)
    ((path, record),) = ((path, records.load(path)) for path in tmp_path.glob("*.json"))
    assert document.pop("path") == str(path)
    assert document == json.loads(path.read_text(encoding="utf-8"))
    assert [row["setup"] for row in record.rows] == ["full", "LoRA r=8"]
    assert record.command.startswith("lora-lab record memory --device cpu --models small")
    assert record.settings["environment"] == steps.HEAP
    assert f"  measured_bytes {record.rows[0]['measured_bytes']:,}" in printed
    assert record.rows[0]["measured_bytes"] > record.rows[1]["measured_bytes"]
    assert [*records.load_all("memory", tmp_path)] == [path.stem]
    assert command("record", path, "--check") == 1
    assert str(path) in capsys.readouterr().err  # it is of some models alone, and perhaps of code that is no commit


def test_what_does_not_fit_into_memory_is_skipped_and_named(monkeypatch, small_is_tiny, priced, capsys):
    def measure(function, case, device, environment):
        if "full" in case.setups:
            raise MemoryError("too large")
        return case.key

    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError

    only(monkeypatch, "full", "LoRA r=8")
    monkeypatch.setattr(steps, "run_in_subprocess", measure)
    assert len(list(steps.record_memory(CPU, ["small"]))) == 1
    assert "skipped, because it does not fit into memory: full on small, 4 x 128" in capsys.readouterr().err
    case = steps.Case("small", 2, 8, {"full": Setup(FullFineTuning())}, 2)
    monkeypatch.setattr(steps, "speed_cases", lambda device: [case])
    monkeypatch.setattr(steps, "step_time", out_of_memory)
    assert list(steps.record_speed(CPU)) == []
    assert "skipped, because it does not fit into memory: full on small, 2 x 8" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["memory", "speed"])
def test_a_model_without_cases_is_refused_before_anything_is_measured(tmp_path, capsys, what, monkeypatch):
    monkeypatch.setattr(steps, "cost_model", lambda device: None)
    for name in ("compare_times", "run_in_subprocess"):
        monkeypatch.setattr(steps, name, lambda *arguments, **options: pytest.fail("measured"))
    assert command("record", what, "--device", "cpu", "--models", "gpt-5", "--out", tmp_path) == 1
    assert "There are no cases of 'gpt-5' on this device; there are of small, smollm2-135m" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_at_the_end_is_kept_in_another_folder(tmp_path, capsys, monkeypatch):
    out = tmp_path / "records"

    def measured(device, models):
        out.rmdir()
        out.write_text("in the way by now")
        yield {"model": "small", "setup": "full", "measured_bytes": 5}

    monkeypatch.setattr(steps, "MEMORY", replace(steps.MEMORY, rows=measured))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert command("record", "memory", "--device", "cpu", "--out", out) == 1
    (spare,) = tmp_path.glob("lora_lab-*")
    assert capsys.readouterr().err.endswith(f"The files are in {spare} instead.\n")
    (record,) = records.load_all("memory", spare).values()
    assert record.rows[0]["measured_bytes"] == 5


def test_a_part_does_not_take_the_place_of_the_whole_record(capsys):
    assert command("record", "memory", "--device", "cpu", "--models", "small") == 1
    assert "would replace that of all models; name another folder with --out" in capsys.readouterr().err


# Speed


def test_speed_rows_hold_what_was_measured_beside_what_was_predicted(small_is_tiny, priced, monkeypatch, tmp_path):
    setups = {"full": Setup(FullFineTuning()), "LoRA r=2": Setup(LoRA(2, 4))}
    monkeypatch.setattr(steps, "speed_cases", lambda device: [steps.Case("small", 2, 8, setups, 2)])
    assert command("record", "speed", "--device", "cpu", "--out", tmp_path) == 0
    (record,) = records.load_all("speed", tmp_path).values()
    full, lora = record.rows
    assert (full["setup"], full["ratio"], full["predicted_ratio"], full["verdict"]) == ("full", 1.0, 1.0, "")
    assert lora["verdict"] == "inconclusive after 2 rounds; take 6 or more"
    assert lora["tokens"] == 16
    assert full["rounds"] == lora["rounds"] == 2
    assert full["lower_quartile_seconds"] <= full["seconds"] <= full["upper_quartile_seconds"]
    assert lora["flops"] == speed.flops(lambda: Llama(steps._SMALL), LoRA(2, 4), 2, 8).total


def test_speed_as_json_has_what_is_counted_predicted_and_measured(priced, tmp_path, capsys, tiny_config, monkeypatch):
    folder = llama_folder(tmp_path, tiny_config)
    measured = []
    real = speed.step_time
    monkeypatch.setattr(speed, "step_time", lambda *a, **o: measured.append(real(*a, **o)) or measured[-1])
    arguments = ["--model", folder, "--batch", 2, "--seq", 8, "--rank", 2, 4, "--device", "cpu", "--json"]
    assert command("speed", *arguments, "--measure", 2) == 0
    document, rest = printed_json(capsys)
    assert "Device: cpu" in rest
    assert (document["batch_size"], document["seq_len"], document["device"]) == (2, 8, "cpu")
    variants = {"full": FullFineTuning(), "LoRA r=2": LoRA(2, 4), "LoRA r=4": LoRA(4, 8)}

    def model():
        return Llama(tiny_config)

    assert [entry["variant"] for entry in document["counted"]] == list(variants)
    for entry, method in zip(document["counted"], variants.values(), strict=True):
        flops = speed.flops(model, method, 2, 8)
        assert (entry["flops"], entry["flops_per_token"]) == (flops.total, flops.total / 16)
        counts = {(part, name): n for part, row in entry["flops_by_part_and_pass"].items() for name, n in row.items()}
        assert counts == dict(flops.counts)
    prediction = speed.cost_model(CPU).predict(model, variants, 2, 8)
    for entry, name in zip(document["predicted"]["variants"], variants, strict=True):
        assert (entry["variant"], entry["seconds_by_cause"]) == (name, pytest.approx(dict(prediction.seconds[name])))
        assert entry["seconds"] == pytest.approx(sum(prediction.seconds[name].values()))
        why = None if name == "full" else prediction.why(name)
        assert (entry["ratio"], entry["why"]) == (prediction.ratio(name), why)
    assert document["measured"]["rounds"] == 2
    for entry, name in zip(document["measured"]["variants"], variants, strict=True):
        first, second = measured[0].seconds[name]
        assert (entry["variant"], entry["seconds"]) == (name, pytest.approx((first + second) / 2))
        assert entry["lower_quartile_seconds"] < entry["seconds"] < entry["upper_quartile_seconds"]
    assert "2 rounds" in document["measured"]["variants"][1]["verdict"]
    assert command("speed", *arguments) == 0
    assert printed_json(capsys)[0]["measured"] is None


def test_speed_of_a_card_that_is_not_here_comes_from_its_datasheet(tmp_path, capsys, tiny_config, monkeypatch):
    monkeypatch.setattr(speed, "cost_model", lambda *_: pytest.fail("measured"))
    arguments = ["--model", llama_folder(tmp_path, tiny_config), "--batch", 2, "--seq", 8, "--card", "l40s", "--json"]
    assert command("speed", *arguments) == 0
    document, rest = printed_json(capsys)
    assert document["device"] == "NVIDIA L40S, from the datasheet, not measured"
    assert "NVIDIA L40S datasheet, 2023" in rest
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        variants = {"full": FullFineTuning(), "LoRA r=8": LoRA(8, 16)}
        costs = speed.cards.cost_model("l40s")
        found = costs.predict(lambda: Llama(tiny_config), variants, 2, 8, dtype=dtype)
        seconds[dtype] = [found.total_s(name) for name in variants]
    printed = [entry["seconds"] for entry in document["predicted"]["variants"]]
    assert printed == seconds[torch.bfloat16] != seconds[torch.float32]
    assert command("speed", *arguments, "--dtype", "float32") == 0
    printed = [entry["seconds"] for entry in printed_json(capsys)[0]["predicted"]["variants"]]
    assert printed == seconds[torch.float32]
