"""A record that was begun in an earlier sitting, whose finished trials are committed."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_lab import records
from lora_lab.studies import planning, rates, registry
from lora_lab.studies.recorder import take_over, tell_trial
from tests.helpers import command


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A working directory, and two trials of the record "rates" that were committed."""
    shipped = tmp_path / "records"
    for name, loss in (("digits/choosing/a", 1.5), ("docs/choosing/b", 2.5)):
        path = shipped / "unfinished" / "rates" / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"loss": loss}), encoding="utf-8")
    monkeypatch.setattr(records, "shipped", lambda: shipped)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Path("runs/record-rates")


def test_trials_that_were_committed_are_taken_over_once(begun):
    assert take_over("rates") == 2
    assert json.loads((begun / "docs" / "choosing" / "b.json").read_text(encoding="utf-8")) == {"loss": 2.5}
    assert take_over("rates") == 0


def test_what_is_there_already_stays(begun):
    own = begun / "docs" / "choosing" / "b.json"
    own.parent.mkdir(parents=True)
    own.write_text('{"loss": 7}', encoding="utf-8")
    assert take_over("rates") == 1
    assert own.read_text(encoding="utf-8") == '{"loss": 7}'


def test_of_another_record_nothing_is_taken(begun):
    assert take_over("quality") == 0
    assert not Path("runs").exists()


def test_the_command_goes_on_from_them_and_says_so(begun, monkeypatch, tmp_path, capsys):
    seen = []

    def rows(device):
        seen.extend(path.name for path in begun.rglob("*.json"))
        yield {"data": "docs"}

    monkeypatch.setattr(rates, "RECORDER", replace(rates.RECORDER, rows=rows, settings=lambda device: {}, line=str))
    assert command("record", "rates", "--device", "cpu", "--out", tmp_path / "out") == 0
    assert sorted(seen) == ["a.json", "b.json"]
    assert "2 trials of a record that was begun earlier need not be run again." in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", registry.NAMES)
def test_a_record_can_hold_the_settings_of_every_study(name, device, monkeypatch):  # or hours would end in an error
    costs = SimpleNamespace(predict=lambda *arguments: SimpleNamespace(total_s=lambda label: 1.0))
    monkeypatch.setattr(planning, "cost_model", lambda device: costs)
    settings = registry.recorder(name).settings(torch.device(device))
    record = records.new(name, [{"a": 1}], settings, "a test", torch.device("cpu"), "unknown")
    assert record.settings == json.loads(json.dumps(settings))


def test_a_trials_last_row_is_told_in_a_line():
    row = {"setup": "r=1", "lr": 1e-3, "seed": 2, "outcome": "done", "step": 8, "steps": 8}
    row |= {"validation_loss": 3.0, "test_loss": None}
    assert tell_trial(row, ["setup"]).split() == ["r=1", "lr", "0.001", "seed", "2:", "validation_loss", "3.0000"]
    assert tell_trial(row | {"outcome": "failed", "reason": "It diverged."}, ["setup"]).endswith("2: It diverged.")
    assert tell_trial(row | {"step": 7}, ["setup"]) is None
