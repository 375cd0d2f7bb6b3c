"""What `lora-lab record speed` and `lora-lab speed` run, on small models, and what they print and refuse."""

import pytest
import torch

from lora_lab import FullFineTuning, LoRA, records, speed
from lora_lab.costs.setup import Setup
from lora_lab.models.llama import Llama
from lora_lab.studies import memory as memory_recording
from lora_lab.studies import speed as recording
from tests.helpers import command, llama_folder, printed_json

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def test_the_speed_cases_cover_tokens_ranks_and_blocks():
    cases = recording.speed_cases(CPU)
    for model in ("small", "smollm2-135m"):
        own = [case for case in cases if case.model == model]
        assert {case.batch_size * case.seq_len for case in own} == {32, 128, 512, 2048, 4096}
        labels = {label for case in own for label in case.setups}
        assert {"full", "LoRA r=1", "LoRA r=8", "LoRA r=64", "LoRA r=256"} <= labels
        assert any("last 1 block" in label for label in labels)
        assert all(next(iter(case.setups)) == "full" for case in own)
    last = next(setup for label, setup in cases[0].setups.items() if label.endswith("last 1 block"))
    assert len(last.method.targets) == 7
    assert all(name.startswith("model.layers.7.") for name in last.method.targets)
    on_gpu = recording.speed_cases(torch.device("cuda"))
    assert {"llama-3.2-1b", "llama-3-8b"} <= {case.model for case in on_gpu}


@pytest.fixture
def priced(monkeypatch):
    """A cost model by hand, because calibrating a real one takes seconds: a nanosecond a byte moved, ten a call."""
    costs = speed.CostModel(lambda operation: 1e-9 * operation.moved_bytes + 1e-8)
    for module in (recording, speed):
        monkeypatch.setattr(module, "cost_model", lambda device: costs)


def test_speed_rows_hold_what_was_measured_beside_what_was_predicted(
    small_is_tiny, priced, monkeypatch, tmp_path, capsys
):
    setups = {"full": Setup(FullFineTuning()), "LoRA r=2": Setup(LoRA(2, 4))}
    monkeypatch.setattr(
        recording, "speed_cases", lambda device, models: [recording.Comparison("small", 2, 8, setups, 2)]
    )
    assert command("record", "speed", "--device", "cpu", "--out", tmp_path) == 0
    (record,) = records.load_all("speed", tmp_path).values()
    full, lora = record.rows
    assert (full["setup"], full["ratio"], full["predicted_ratio"], full["verdict"]) == ("full", 1.0, 1.0, "")
    assert lora["verdict"] == "inconclusive after 2 rounds; take 6 or more"
    assert lora["tokens"] == 16
    assert full["rounds"] == lora["rounds"] == 2
    assert full["lower_quartile_s"] <= full["seconds"] <= full["upper_quartile_s"]
    assert lora["predicted_ratio"] == pytest.approx(lora["predicted_seconds"] / full["predicted_seconds"])
    assert lora["flops"] == speed.flops(lambda: Llama(memory_recording._SMALL), LoRA(2, 4), 2, 8).total
    printed = capsys.readouterr().out
    assert f"ratio {lora['ratio']:.3f}" in printed
    assert f"predicted {lora['predicted_ratio']:.3f}" in printed


def test_large_comparisons_have_fewer_rounds_and_setups():
    cases = {(case.model, case.batch_size * case.seq_len): case for case in recording.speed_cases(CPU)}
    assert [cases["small", tokens].rounds for tokens in (32, 128, 512, 2048, 4096)] == [9, 9, 9, 6, 6]
    assert [cases["smollm2-135m", tokens].rounds for tokens in (32, 128, 512, 2048, 4096)] == [9, 9, 6, 3, 3]
    assert len(cases["smollm2-135m", 512].setups) == 7
    assert list(cases["smollm2-135m", 2048].setups) == ["full", "LoRA r=8", "LoRA r=256", "LoRA r=8, last 1 block"]


def test_a_comparison_that_does_not_fit_into_memory_is_skipped_and_named(small_is_tiny, priced, monkeypatch, capsys):
    case = recording.Comparison("small", 2, 8, {"full": Setup(FullFineTuning())}, 2)
    monkeypatch.setattr(recording, "speed_cases", lambda device, models: [case])

    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(recording, "step_time", out_of_memory)
    assert list(recording.rows(CPU)) == []
    assert capsys.readouterr().err == "skipped, because it does not fit into memory: small, 2 x 8\n"


def test_speed_prints_counts_a_prediction_with_its_reason_and_real_steps_if_asked(
    priced, tmp_path, capsys, tiny_config
):
    folder = llama_folder(tmp_path, tiny_config)
    arguments = ["--model", folder, "--batch", 2, "--seq", 8, "--rank", 2, 4, "--device", "cpu", "--measure", 2]
    assert command("speed", *arguments) == 0
    printed = capsys.readouterr().out
    for words in ("closed form", "Device: cpu", "LoRA r=2 takes", "LoRA r=4 takes", "multiplications of the adapters"):
        assert words in printed, words
    assert "of 2 rounds" in printed


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
        counts = {(part, name): n for part, row in entry["flops_by_part_and_pass"].items() for name, n in row.items()}
        assert counts == dict(flops.counts)
        assert (entry["flops"], entry["flops_per_token"]) == (sum(counts.values()), sum(counts.values()) / 16)
        assert entry["closed_form_flops_by_part"] == dict(flops.closed)
        assert (entry["causal_flops"], entry["fused_flops"]) == (flops.causal, flops.fused)
    prediction = speed.cost_model(CPU).predict(model, variants, 2, 8)
    assert document["predicted"]["tokens"] == 16
    for entry, name in zip(document["predicted"]["variants"], variants, strict=True):
        assert (entry["variant"], entry["seconds_by_cause"]) == (name, pytest.approx(dict(prediction.seconds[name])))
        assert entry["seconds"] == pytest.approx(sum(prediction.seconds[name].values()))
        assert entry["ratio"] == pytest.approx(entry["seconds"] / document["predicted"]["variants"][0]["seconds"])
        assert entry["why"] == (None if name == "full" else prediction.why(name))
    assert document["measured"]["rounds"] == 2
    for entry, name in zip(document["measured"]["variants"], variants, strict=True):
        first, second = measured[0].seconds[name]
        assert (entry["variant"], entry["seconds"]) == (name, pytest.approx((first + second) / 2))
        assert entry["lower_quartile_seconds"] < entry["seconds"] < entry["upper_quartile_seconds"]
        assert entry["tokens_per_second"] == pytest.approx(16 / entry["seconds"])
        assert entry["ratio_low"] is entry["ratio_high"] is None  # of two rounds
    assert document["measured"]["variants"][0]["verdict"] is None
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "gpt-5"], "There is no model 'gpt-5'"),
        (["--seq", 0], "seq_len is 0"),
        (["--rank", 0], "rank is 0"),
        (["--card", "l40"], "No card is known by the name 'l40'; use one of"),
        (
            ["--card", "l40s", "--measure", 2],
            "--card l40s predicts for another machine; leave out --measure and --device",
        ),
        (
            ["--card", "l40s", "--device", "cpu"],
            "--card l40s predicts for another machine; leave out --measure and --device",
        ),
        (["--dtype", "int8"], "--dtype is 'int8', but it must be bfloat16 or float32"),
    ],
)
def test_speed_refuses_what_makes_no_sense_in_one_sentence(capsys, arguments, says):
    assert command("speed", *arguments) == 1
    captured = capsys.readouterr()
    assert says in captured.err
    assert len(captured.err.strip().splitlines()) == 1
