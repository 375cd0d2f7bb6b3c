"""What `lora-lab record ablation` runs, on a tiny model, and what it writes and refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_lab import Lean, LoRA, fit, records
from lora_lab.ablation import smallest_sufficient_rank
from lora_lab.studies import ablation
from tests.helpers import command

FOLDER = Path("runs/record-ablation")
CPU = torch.device("cpu")


def test_an_ablations_record_can_be_judged_as_the_table_itself(small_study, tmp_path, capsys):
    assert command("record", "ablation", "--device", "cpu", "--out", tmp_path / "records") == 0
    (record,) = records.load_all("ablation", tmp_path / "records").values()
    frame = record.frame()
    assert len(frame) == 2 * 2 * 2 * 2  # ranks, rates, seeds; before and after
    verdict = smallest_sufficient_rank(frame, margin=1.0)
    assert [one.rank for one in verdict.ranks] == [1, 4]
    assert len(verdict.seeds) == 2
    assert frame.test_loss.notna().sum() == 8
    assert record.settings["lrs"] == {"1": [1e-3, 1e-2], "4": [1e-3, 1e-2]}
    assert record.settings["study"] == "docs"
    printed = capsys.readouterr().out
    assert printed.count("test_loss ") == 8
    row = frame[(frame.step == 4) & (frame["rank"] == 4) & (frame.lr == 1e-2) & (frame.seed == 1)].iloc[0]
    assert f"validation_loss {row.validation_loss:.4f}  test_loss {row.test_loss:.4f}" in printed
    make, task = small_study
    history = fit(make(), task(), LoRA(4, 8), lr=1e-2, seed=1, steps=4, batch_size=4, eval_every=4, eval_examples=5)
    assert row.validation_loss == pytest.approx(history.rows[-1]["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("lean", [None, Lean(), Lean(torch.bfloat16)])
def test_every_trial_takes_the_step_that_is_asked_for(lean):  # or the record would be compared with itself
    planned = ablation.plan(CPU)
    made = ablation.trials(planned, lean)
    assert {trial.lean for trial in made} == {lean}
    assert len({trial.key for trial in made}) == len(made) == planned.seeds * sum(map(len, planned.lrs.values()))


def test_a_stopped_ablation_goes_on_where_it_was(small_study, tmp_path):
    first = list(ablation.RECORDER.rows(CPU))
    files = sorted((tmp_path / FOLDER).glob("*.json"))
    assert len(files) == 8
    files[0].unlink()
    kept = {path: path.stat().st_mtime_ns for path in files[1:]}
    again = list(ablation.RECORDER.rows(CPU))
    assert [row["lr"] for row in again] == [row["lr"] for row in first]
    assert files[0].is_file()
    assert {path: path.stat().st_mtime_ns for path in files[1:]} == kept


def test_a_failed_trial_is_a_row_with_its_reason(small_study, monkeypatch):
    plan = ablation.plan(CPU)
    monkeypatch.setattr(ablation, "plan", lambda device: _hot(plan))
    rows = list(ablation.RECORDER.rows(CPU))
    assert {row["outcome"] for row in rows} == {"failed"}
    assert all(row["test_loss"] is None and "lower the learning rate" in row["reason"] for row in rows)
    assert "lower the learning rate" in ablation.line(rows[0])
    records.new("ablation", rows, {}, "a test", CPU, "unknown")  # has no NaN in it


def _hot(plan):
    return replace(plan, lrs=dict.fromkeys(plan.lrs, (1e30,)), seeds=1)
