"""What `lora-lab record` and `lora-lab memory` run, on small models, and what they print, write and refuse."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from lora_lab import FullFineTuning, LoRA, cli, memory, records, speed
from lora_lab.costs import memory_report
from lora_lab.costs.memory_report import training_setups
from lora_lab.costs.setup import Setup
from lora_lab.experiments import step_memory as recording
from lora_lab.experiments import step_speed
from lora_lab.experiments.registry import NAMES, recorders
from lora_lab.models import shapes
from lora_lab.models.llama import Llama, LlamaConfig

CPU = torch.device("cpu")


def command(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def tiny(monkeypatch, tiny_config):
    """ "small" is a tiny model, and cases run in this process."""
    monkeypatch.setattr(recording, "_SMALL", tiny_config)
    monkeypatch.setattr(recording, "run_in_subprocess", lambda function, *arguments, environment: function(*arguments))


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


def test_a_row_holds_parts_that_add_up_to_a_peak_that_was_predicted(tiny):
    (case,) = (case for case in recording.memory_cases(CPU, ["small"]) if case.label == "LoRA r=8")
    row = recording.memory_row(case, "cpu")
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


def test_a_record_is_written_with_its_command_and_can_be_read(tiny, tmp_path, capsys, monkeypatch):
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


def test_what_does_not_fit_into_memory_is_left_out_and_named(monkeypatch, tiny, capsys):
    def apart(function, case, device, environment):
        if case.label == "full":
            raise MemoryError("too large")
        return case.key

    monkeypatch.setattr(recording, "run_in_subprocess", apart)
    cases = recording.memory_cases(CPU, ["small"])
    labels = [row["setup"] for row in recording.memory(CPU, ["small"])]
    assert labels == [case.label for case in cases if case.label != "full"]
    assert "left out, for it does not fit into memory: full on small, 4 x 128" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["memory", "speed"])
def test_a_model_without_cases_is_refused_before_anything_is_measured(tmp_path, capsys, what, monkeypatch):
    monkeypatch.setattr(step_speed, "cost_model", lambda device: pytest.fail("measured"))
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
    assert capsys.readouterr().err.endswith(f"What was to be kept is in {spare} instead.\n")
    (record,) = records.load_all("memory", spare).values()
    assert record.rows[0]["measured_bytes"] == 5


def test_a_part_does_not_take_the_place_of_the_whole_record(capsys):
    assert command("record", "memory", "--device", "cpu", "--models", "small") == 1
    assert "would take the place of the whole one; name another folder with --out" in capsys.readouterr().err


def test_the_speed_cases_cover_tokens_ranks_and_blocks():
    cases = step_speed.speed_cases(CPU)
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
    on_gpu = step_speed.speed_cases(torch.device("cuda"))
    assert {"llama-3.2-1b", "llama-3-8b"} <= {case.model for case in on_gpu}


@pytest.fixture
def priced(monkeypatch):
    """A cost model by hand, for calibrating a real one takes seconds: a nanosecond a byte moved, ten a call."""
    costs = speed.CostModel(
        lambda operation: 1e-9 * operation.moved_bytes, dict.fromkeys(("forward", "backward"), (0.0, 1e-8))
    )
    for module in (step_speed, speed):
        monkeypatch.setattr(module, "cost_model", lambda device: costs)


def test_speed_rows_hold_what_was_measured_beside_what_was_predicted(tiny, priced, monkeypatch, tmp_path, capsys):
    setups = {"full": Setup(FullFineTuning()), "LoRA r=2": Setup(LoRA(2, 4))}
    monkeypatch.setattr(
        step_speed, "speed_cases", lambda device, models: [step_speed.Comparison("small", 2, 8, setups, 2)]
    )
    assert command("record", "speed", "--device", "cpu", "--out", tmp_path) == 0
    (record,) = records.load_all("speed", tmp_path).values()
    full, lora = record.rows
    assert (full["setup"], full["ratio"], full["predicted_ratio"], full["verdict"]) == ("full", 1.0, 1.0, "")
    assert lora["verdict"] == "inconclusive after 2 rounds; take 6 or more"
    assert lora["tokens"] == 16
    assert full["lower_quartile_s"] <= full["seconds"] <= full["upper_quartile_s"]
    assert lora["predicted_ratio"] == pytest.approx(lora["predicted_seconds"] / full["predicted_seconds"])
    assert lora["flops"] == speed.flops(lambda: Llama(recording._SMALL), LoRA(2, 4), 2, 8).total
    printed = capsys.readouterr().out
    assert f"ratio {lora['ratio']:.3f}" in printed
    assert f"predicted {lora['predicted_ratio']:.3f}" in printed


def test_only_what_has_a_recorder_can_be_recorded(capsys):
    assert tuple(recorders()) == NAMES
    with pytest.raises(SystemExit):
        command("record", "taste")
    assert "invalid choice: 'taste'" in capsys.readouterr().err


def test_speed_prints_counts_a_prediction_with_its_reason_and_real_steps_if_asked(
    priced, tmp_path, capsys, tiny_config
):
    folder = folder_of(tmp_path, tiny_config)
    arguments = ["--model", folder, "--batch", 2, "--seq", 8, "--rank", 2, 4, "--device", "cpu", "--measure", 2]
    assert command("speed", *arguments) == 0
    printed = capsys.readouterr().out
    for words in ("closed form", "Device: cpu", "LoRA r=2 takes", "LoRA r=4 takes", "small products with the adapters"):
        assert words in printed, words
    assert "of 2 rounds" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--model", "gpt-5"], "No shape is known"), (["--seq", 0], "seq_len is 0"), (["--rank", 0], "rank is 0")],
)
def test_speed_refuses_what_makes_no_sense_in_one_sentence(capsys, arguments, says):
    assert command("speed", *arguments) == 1
    captured = capsys.readouterr()
    assert says in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_the_bar_says_which_case_runs_only_where_a_person_looks(monkeypatch, capsys):
    cases = recording.memory_cases(CPU, ["small"])[:2]
    assert list(recording.with_bar(cases)) == cases
    assert capsys.readouterr().err == ""


# lora-lab memory


def folder_of(tmp_path, config):
    heads = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    stored = {name: value for name, value in vars(config).items() if value is not None} | heads
    (tmp_path / "config.json").write_text(json.dumps(stored | {"model_type": "llama"}))
    return tmp_path


def test_memory_prints_a_row_for_each_way_and_says_what_fits(tmp_path, capsys, tiny_config):
    folder = folder_of(tmp_path, tiny_config)
    arguments = ["--model", folder, "--batch", 2, "--seq", 16, "--rank", 4, "--dtype", "float32", "--device", "cpu"]
    bills = {
        label: memory.predict(lambda: Llama(tiny_config), setup, 2, 16, device="cpu")
        for label, setup in training_setups(4, torch.float32).items()
    }
    peaks = sorted(bill.peak_bytes for bill in bills.values())
    budget = (peaks[2] + peaks[3]) // 2
    assert command("memory", *arguments, "--budget", f"{budget / 2**10}KiB", "--bills") == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "2 x 16 tokens" in lines[0]
    assert "predicted" in lines[0]
    for label, bill in bills.items():
        (line,) = (line for line in lines if line.startswith(f"{label}  "))
        assert ("yes" in line) == (bill.peak_bytes <= budget), label
        assert str(bill) in printed
    assert "CUDA" not in printed


@pytest.fixture
def one_way(monkeypatch):
    """Only one of the six ways, for time's sake."""
    every = memory_report.training_setups
    monkeypatch.setattr(
        memory_report, "training_setups", lambda rank, dtype: {"LoRA r=8": every(rank, dtype)["LoRA r=8"]}
    )


def test_memory_looks_for_the_largest_batch(one_way, tmp_path, capsys, tiny_config):
    folder = folder_of(tmp_path, tiny_config)
    arguments = ["--model", folder, "--seq", 16, "--dtype", "float32", "--device", "cpu"]
    assert command("memory", *arguments, "--budget", "1MiB", "--largest", "batch") == 0
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row.startswith("LoRA r=8  ")
    found = int(row.split()[-1])
    setup = training_setups(8, torch.float32)["LoRA r=8"]

    def peak(batch):
        return memory.predict(lambda: Llama(tiny_config), setup, batch, 16, device="cpu").peak_bytes

    assert peak(found) <= 2**20 < peak(found + 1)


def test_without_a_gpu_a_card_is_estimated_and_said_to_be(one_way, tmp_path, capsys, tiny_config):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command("memory", "--model", folder_of(tmp_path, tiny_config), "--seq", 8) == 0
    printed = capsys.readouterr().out
    assert "estimated for CUDA, not measured" in printed
    assert "CUDA's own context" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "gpt-5"], "No shape is known by the name 'gpt-5'; use one of: smollm2-135m"),
        (["--budget", "24"], "'24' is no size; write a number with its unit"),
        (["--batch", 0], "batch_size is 0"),
        (["--seq", 0], "seq_len is 0"),
        (["--rank", 0], "rank is 0"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--largest", "batch"], "--largest needs --budget"),
        (["--device", "banana"], "banana"),
    ],
)
def test_memory_refuses_what_makes_no_sense_in_one_sentence(capsys, arguments, says):
    assert command("memory", *arguments) == 1
    captured = capsys.readouterr()
    assert says in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


def test_a_folder_without_a_config_is_refused(tmp_path, capsys):
    assert command("memory", "--model", tmp_path) == 1
    assert "config.json" in capsys.readouterr().err


def test_every_known_shape_makes_a_model():
    for name in shapes.names():
        with torch.device("meta"):
            assert isinstance(recording.random_model(name).config, LlamaConfig)
