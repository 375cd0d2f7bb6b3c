"""What `lora-lab memory` prints and refuses."""

import pytest
import torch

from lora_lab import memory
from lora_lab.costs.memory import training_setups
from lora_lab.models.llama import Llama
from tests.helpers import command, llama_folder, printed_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bills(tiny_config):
    """The bill of each way, of two rows of 16 tokens."""
    return {
        label: memory.predict(lambda: Llama(tiny_config), setup, 2, 16, device="cpu")
        for label, setup in training_setups(4, torch.float32).items()
    }


def test_memory_prints_a_row_for_each_way_and_says_what_fits(bills, tmp_path, capsys, tiny_config):
    folder = llama_folder(tmp_path, tiny_config)
    arguments = ["--model", folder, "--batch", 2, "--seq", 16, "--rank", 4, "--dtype", "float32", "--device", "cpu"]
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
    every = memory.training_setups
    monkeypatch.setattr(
        memory, "training_setups", lambda rank, dtype, lean: {"LoRA r=8": every(rank, dtype)["LoRA r=8"]}
    )


def test_memory_as_json_has_the_bills_in_bytes_and_what_a_card_has_left(bills, tmp_path, capsys, tiny_config):
    folder = llama_folder(tmp_path, tiny_config)
    arguments = ["--model", folder, "--batch", 2, "--seq", 16, "--rank", 4, "--dtype", "float32", "--device", "cpu"]
    peaks = sorted(bill.peak_bytes for bill in bills.values())
    budget = 1024 * ((peaks[2] + peaks[3]) // 2048)
    assert command("memory", *arguments, "--budget", f"{budget // 1024}KiB", "--json") == 0
    document, rest = printed_json(capsys)
    assert "2 x 16 tokens" in rest
    setups = {entry["setup"]: entry for entry in document.pop("setups")}
    assert document == {
        "model": str(folder),
        "batch_size": 2,
        "seq_len": 16,
        "dtype": "float32",
        "device": "cpu",
        "budget_bytes": budget,
    }
    assert list(setups) == list(bills)
    for label, bill in bills.items():
        entry = setups[label]
        assert entry["bytes_by_part"] == dict(bill.parts)
        assert entry["peak_bytes"] == sum(bill.parts.values()) == budget - entry["free_bytes"]
        assert (entry["saved_bytes_by_kind"], entry["saved_bytes"]) == (dict(bill.saved), sum(bill.saved.values()))
        assert entry["fits"] == (bill.peak_bytes <= budget)
        assert (entry["moment"], entry["source"], entry["reserved_bytes"]) == (bill.moment, "predicted", None)
        assert (entry["largest_batch_size"], entry["largest_seq_len"]) == (None, None)
    assert {entry["fits"] for entry in setups.values()} == {True, False}


def test_memory_as_json_has_the_largest_size_if_it_was_asked_for(one_way, tmp_path, capsys, tiny_config):
    arguments = ["--model", llama_folder(tmp_path, tiny_config), "--dtype", "float32", "--device", "cpu", "--json"]
    setup = training_setups(8, torch.float32)["LoRA r=8"]
    for look_for, fixed in (("batch", ("seq", 16)), ("seq", ("batch", 2))):
        size = f"--{fixed[0]}", fixed[1]
        assert command("memory", *arguments, *size, "--budget", "1MiB", "--largest", look_for) == 0
        (entry,) = printed_json(capsys)[0]["setups"]
        name, other = f"{fixed[0]}_{'len' if fixed[0] == 'seq' else 'size'}", {"batch": "batch_size", "seq": "seq_len"}
        expected, _ = memory.largest(lambda: Llama(tiny_config), setup, 2**20, device="cpu", **{name: fixed[1]})
        assert entry[f"largest_{other[look_for]}"] == expected > 1
        assert entry[f"largest_{name}"] is None
    assert command("memory", *arguments, "--seq", 16) == 0
    document, _ = printed_json(capsys)
    assert document["budget_bytes"] is document["setups"][0]["fits"] is document["setups"][0]["free_bytes"] is None


def test_without_a_gpu_a_card_is_estimated_and_said_to_be(one_way, tmp_path, capsys, tiny_config):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command("memory", "--model", llama_folder(tmp_path, tiny_config), "--seq", 8) == 0
    printed = capsys.readouterr().out
    assert "estimated for CUDA, not measured" in printed
    assert "CUDA's own context" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "gpt-5"], "There is no model 'gpt-5'; use a folder"),
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
