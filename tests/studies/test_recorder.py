"""How records are made: what is planned and taken over, what a tuned study writes, and how long studies take."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_lab import FullFineTuning, LoRA, fit, records
from lora_lab.ablation import Trial, studies
from lora_lab.ablation.compare import compare_losses
from lora_lab.ablation.stats import BlockLosses, best_rate, block_losses_of, losses_by_rate
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import Llama
from lora_lab.studies import forgetting, recorder, tuned
from lora_lab.studies.recorder import BlockSweep, CurveSweep, find_recorder, plan_hours, take_over, tell_row
from lora_lab.studies.records import KINDS
from lora_lab.tasks import digits
from tests.helpers import COMMIT, command
from tests.studies.conftest import sentences

CPU = torch.device("cpu")


# A record that was begun in an earlier sitting, whose finished trials are committed


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


def test_trials_that_were_committed_are_taken_over_once_and_replace_none(begun):
    assert take_over("quality") == 0
    assert not Path("runs").exists()
    own = begun / "docs" / "choosing" / "b.json"
    own.parent.mkdir(parents=True)
    own.write_text('{"loss": 7}', encoding="utf-8")
    assert take_over("rates") == 1
    assert own.read_text(encoding="utf-8") == '{"loss": 7}'
    assert json.loads((begun / "digits" / "choosing" / "a.json").read_text(encoding="utf-8")) == {"loss": 1.5}
    assert take_over("rates") == 0


def test_the_command_goes_on_from_them_and_says_so(begun, monkeypatch, tmp_path, capsys):
    seen = []

    def rows(device):
        seen.extend(path.name for path in begun.rglob("*.json"))
        yield {"data": "docs"}

    made = replace(tuned.RATES, rows=rows, settings=lambda device: {}, line=str)
    monkeypatch.setattr(tuned, "RATES", made)
    assert command("record", "rates", "--device", "cpu", "--out", tmp_path / "out") == 0
    assert sorted(seen) == ["a.json", "b.json"]
    assert "2 trials of a record that was begun earlier need not be run again." in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", KINDS)
def test_a_record_can_hold_the_settings_of_every_study(name, device, monkeypatch):  # or hours would end in an error
    costs = SimpleNamespace(predict=lambda *arguments: SimpleNamespace(total_s=lambda label: 1.0))
    monkeypatch.setattr(recorder, "cost_model", lambda device: costs)
    settings = find_recorder(name).settings(torch.device(device))
    record = records.new(name, [{"a": 1}], settings, "a test", torch.device("cpu"), "unknown")
    assert record.settings == json.loads(json.dumps(settings))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "docs  r=1  rank 1  lr 0.001  seed 2: validation_loss 3.0000"),
        ({"outcome": "failed", "reason": "It diverged."}, "docs  r=1  rank 1  lr 0.001  seed 2: It diverged."),
        ({"step": 7}, None),
        ({"validation_loss": None}, None),
    ],
)
def test_a_trials_last_row_is_told_in_a_line(changes, told):
    row = {"data": "docs", "setup": "r=1", "rank": 1.0, "lr": 1e-3, "seed": 2, "outcome": "done", "step": 8, "steps": 8}
    assert tell_row(row | {"validation_loss": 3.0, "test_loss": None, "score_test": "[3.0]"} | changes) == told


# A sweep by blocks


def plan(device):
    for data, steps, size, on, seq_len in (("digits", 6, 16, 40, None), ("docs", 3, 4, 5, 8)):
        options = {"steps": steps, "batch_size": size, "eval_every": steps, "eval_examples": 4}
        lora = Trial(LoRA(1, 32), 1e-3, **options), (1e-2, 2e-2)
        setups = {"full": (Trial(FullFineTuning(), 1e-3, **options), (1e-3, 2e-3)), "r=1": lora, "again": lora}
        judged = {"chosen_on": on, "judged_on": {"validation": 4, "test": 6}, "widen": 1}
        yield BlockSweep(setups, [0, 1], [2, 3], data=data, seq_len=seq_len, **judged)


def predict(factory, setups, batch_size, seq_len):
    """Full fine-tuning takes 3 hours a step, and LoRA 2."""
    assert (batch_size, seq_len) == (4, 8)
    hours = {label: 3 if setup.method == FullFineTuning() else 2 for label, setup in setups.items()}
    return SimpleNamespace(total_s=lambda label: 3600 * hours[label])


@pytest.fixture(scope="module")
def tiny(small_world, tiny_config):
    """The language model is tiny, and `lora-lab record rates` runs the plan above."""
    small_world.setattr(studies, "language_model", lambda device, model=None: Llama(tiny_config, seed=3))
    small_world.setattr(studies, "docs_task", lambda seq_len, model=None: sentences(tiny_config.vocab_size))
    small_world.setattr(recorder, "cost_model", lambda device: SimpleNamespace(predict=predict))
    small_world.setattr(tuned, "RATES", recorder.record_sweeps("rates", plan))
    return tuned.RATES


@pytest.fixture(scope="module")
def record(tiny):
    assert command("record", "rates", "--device", "cpu", "--out", "records") == 0
    (record,) = records.load_all("rates", "records").values()
    return record


def test_a_record_has_every_trial_of_both_stages(record):
    frame = record.frame()
    for (_, stage, _), rows in frame.groupby(["data", "stage", "setup"]):
        tried = sorted(rows["lr"].unique())
        assert len(tried) in ((2, 3) if stage == "choosing" else (1,))
        assert len(rows) == 2 * len(tried)
    assert set(frame["data"]) == {"digits", "docs"}
    assert set(frame["setup"]) == {"full", "r=1", "again"}
    assert set(frame["commit"]) == {COMMIT}


def test_a_record_can_be_judged_as_the_table_itself(record):
    frame = record.frame()
    of_digits = frame[frame["data"] == "digits"]
    chosen = of_digits[(of_digits["stage"] == "choosing") & (of_digits["setup"] == "r=1")]
    assert math.isfinite(best_rate(losses_by_rate(chosen)).loss)
    table = compare_losses(of_digits, "full").set_index("setup")
    assert math.isfinite(table.loc["r=1", "difference"])
    assert table.loc["r=1", "difference"] == table.loc["again", "difference"] != 0


def test_a_row_is_what_fit_and_the_judge_give(record):
    frame = record.frame()
    row = frame[(frame["data"] == "digits") & (frame["setup"] == "r=1") & (frame["seed"] == 3)].iloc[0]
    model, task = studies.pretrained_digits(), digits()
    fit(model, task, LoRA(1, 32), lr=row["lr"], seed=3, steps=6, batch_size=16, progress=False)
    expected, untrained = (
        {"score_test": BlockLosses({"test": 6}, 4)(each, task)["test"]} for each in (model, DigitsMLP())
    )
    losses = block_losses_of(row, "test")
    assert losses == pytest.approx(block_losses_of(expected, "test"), rel=1e-4)
    assert losses != pytest.approx(block_losses_of(untrained, "test"), rel=1e-2)
    assert row["test_loss"] == pytest.approx(sum(losses) / len(losses))


def test_a_loss_that_the_judge_did_not_measure_is_not_recorded(record):
    frame = record.frame()
    assert frame.loc[frame["stage"] == "choosing", "test_loss"].isna().all()
    assert frame["validation_loss"].notna().all()


def test_a_record_says_how_its_rows_were_made(record):
    own = record.settings["docs"]
    assert own["setups"]["r=1"]["method"]["alpha"] == 32
    assert own["lrs"]["full"] == [1e-3, 2e-3]
    assert (own["choosing"], own["judging"], own["seq_len"]) == ([0, 1], [2, 3], 8)
    assert (own["chosen_on"], own["judged_on"]) == (5, {"validation": 4, "test": 6})


def test_planned_hours_count_steps_evaluations_and_what_is_judged(record):
    forward = 3 / 3 / 4  # hours an example
    own = 2 * 2 * 4 + 4  # before and after, two parts; the test part
    expected = 0.0
    for hours in (3, 2, 2):
        expected += 2 * 2 * (3 * hours + (own + 5) * forward) + 2 * (3 * hours + (own + 10) * forward)
    assert record.settings["planned_hours"] == pytest.approx(expected, abs=0.1)


def test_a_stopped_record_goes_on_where_it_was(record, tiny, no_trial_runs, capsys):
    again = list(tiny.rows(CPU))
    assert [row["validation_loss"] for row in again] == [row["validation_loss"] for row in record.rows]
    assert f"Planned: about {record.settings['planned_hours']} hours" in capsys.readouterr().out


def test_where_full_fine_tuning_is_compared_all_methods_multiply_in_bfloat16():
    sweeps = [*tuned.plan_quality(CPU), *tuned.plan_taught(CPU), *forgetting.plan_remedies(CPU)]
    trials = [trial for sweep in sweeps for trial, _ in sweep.setups.values()]
    assert {type(trial.method) for trial in trials} == {FullFineTuning, LoRA}
    for trial in trials:
        assert (trial.autocast or trial.lean.base_dtype) is torch.bfloat16, trial.method


# Hours, against sums worked by hand

OPTIONS = {"steps": 4, "batch_size": 2, "eval_every": 2, "eval_examples": 6}
FULL, ADAPTER = Trial(FullFineTuning(), 1e-3, **OPTIONS), Trial(LoRA(1, 2), 1e-3, **OPTIONS)


@pytest.fixture
def threads(monkeypatch):
    """Full fine-tuning takes 9 hours a step, LoRA 2; the threads for which costs were asked."""
    asked = []

    def predict(factory, setups, batch_size, seq_len):
        asked.append(torch.get_num_threads())
        hours = {label: 9 if setup.method == FullFineTuning() else 2 for label, setup in setups.items()}
        hours |= {label: 5 for label, setup in setups.items() if setup.autocast}
        return SimpleNamespace(total_s=lambda label: 3600 * hours[label])

    monkeypatch.setattr(recorder, "cost_model", lambda device: SimpleNamespace(predict=predict))
    monkeypatch.setattr(studies, "processes", lambda device: 1)
    return asked


def hours(*trials, **options):
    setups = {str(i): (trial, [1e-3]) for i, trial in enumerate(trials)}
    return plan_hours(CurveSweep(setups, [0], task=None, seq_len=8, **options), CPU)


def test_a_forward_pass_is_a_third_of_a_full_step_and_half_of_one_with_an_adapter(threads):
    examples = 3 * 2 * 6 + 6  # two parts before, in the middle and after; the test part
    assert hours(FULL) == pytest.approx(4 * 9 + examples / 2 * 9 / 3)
    assert hours(ADAPTER) == pytest.approx(4 * 2 + examples / 2 * 2 / 2)
    assert hours(FULL, ADAPTER) == pytest.approx(hours(FULL) + hours(ADAPTER))


def test_a_step_under_autocast_has_its_own_time(threads):
    halved = replace(FULL, autocast=torch.bfloat16)
    assert hours(FULL, FULL) - hours(FULL, halved) == pytest.approx(4 * (9 - 5))


def test_what_is_judged_and_a_short_off_domain_part_are_counted(threads):
    plain = hours(ADAPTER)
    assert hours(ADAPTER, chosen_on=10) == pytest.approx(plain + 10 / 2)
    assert hours(ADAPTER, off_domain=2) == pytest.approx(plain - 3 * 4 / 2)
    assert hours(ADAPTER, off_domain=100) == plain


def test_two_processes_with_a_thread_each_take_half_of_what_one_thread_takes(threads, monkeypatch):
    before = torch.get_num_threads()
    alone = hours(FULL, FULL)
    monkeypatch.setattr(studies, "processes", lambda device: 2)
    assert hours(FULL, FULL) == pytest.approx(alone / 2)
    assert threads == [before, 1]
    assert torch.get_num_threads() == before
