"""How records are made: what is planned, and what a tuned study writes."""

import json
import math
from dataclasses import replace

import pytest
import torch

from lora_lab import FullFineTuning, LoRA, fit, records
from lora_lab.ablation import materials
from lora_lab.ablation.compare import compare_losses
from lora_lab.ablation.stats import BlockLosses, best_rate, block_losses_of, losses_by_rate
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import Llama
from lora_lab.studies import recorder, tuned
from lora_lab.studies.recorder import BlockSweep, find_recorder, plan_setups, tell_row
from lora_lab.studies.records import KINDS
from lora_lab.tasks import digits
from tests.helpers import COMMIT, command
from tests.studies.conftest import sentences

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", KINDS)
def test_a_record_can_hold_the_settings_of_every_study(name, device):  # or hours would end in an error
    settings = find_recorder(name).settings(torch.device(device))
    record = records.new(name, [{"a": 1}], settings, "a test", torch.device("cpu"), "unknown")
    assert record.settings == json.loads(json.dumps(settings))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "docs  r=1  lr 0.001  seed 2  step 8  steps 8  validation_loss 3.123"),
        ({"lr": None, "validation_loss": 2**20}, "docs  r=1  seed 2  step 8  steps 8  validation_loss 1,048,576"),
        ({"outcome": "failed", "reason": "It diverged."}, "r=1, lr 0.001, seed 2: It diverged."),
        ({"outcome": "failed", "reason": "So.", "setup": None, "rank": 8}, "r=8, lr 0.001, seed 2: So."),
        ({"step": 7}, None),
        ({"layer": "model.layers.0.mlp.up_proj"}, None),
        ({"prediction": "positive"}, None),
    ],
)
def test_a_trials_last_row_is_told_in_a_line(changes, told):
    row = {"data": "docs", "setup": "r=1", "lr": 1e-3, "seed": 2, "step": 8, "steps": 8, "validation_loss": 3.1234}
    assert tell_row(row | {"edge": "", "test_loss": None, "score_test": 50 * "3", "commit": COMMIT} | changes) == told


def test_what_is_of_no_setup_is_not_told():
    assert tell_row({"about": "task", "task": "style", "test": 4}) is None


# A sweep by blocks


def plan(device):
    for data, steps, size, on, seq_len in (("digits", 6, 16, 40, None), ("docs", 3, 4, 5, 8)):
        lora = LoRA(1, 32), (1e-2, 2e-2)
        methods = {"full": (FullFineTuning(), (1e-3, 2e-3)), "r=1": lora, "again": lora}
        setups = plan_setups(methods, steps, size)
        judged = {"chosen_on": on, "judged_on": {"validation": 4, "test": 6}, "widen": 1}
        yield BlockSweep(setups, [0, 1], [2, 3], data=data, seq_len=seq_len, **judged)


@pytest.fixture(scope="module")
def tiny(small_world, tiny_config):
    """The language model is tiny, and `lora-lab record rates` runs the plan above."""
    small_world.setattr(materials, "language_model", lambda device, model=None: Llama(tiny_config, seed=3))
    small_world.setattr(materials, "docs_task", lambda seq_len, model=None: sentences(tiny_config.vocab_size))
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
    for (data, setup), rows in frame.groupby(["data", "setup"]):
        stated = record.settings[data]["setups"][setup]  # a study may be about one of these
        assert [set(rows[name]) for name in ("schedule", "weight_decay")] == [
            {stated[name]} for name in ("schedule", "weight_decay")
        ]


def test_a_record_can_be_judged_as_the_table_itself(record):
    frame = record.frame()
    of_digits = frame[frame["data"] == "digits"]
    chosen = of_digits[(of_digits["stage"] == "choosing") & (of_digits["setup"] == "r=1")]
    assert best_rate(losses_by_rate(chosen)).tried in set(chosen["lr"])
    table = compare_losses(of_digits, "full").set_index("setup")
    assert math.isfinite(table.loc["r=1", "difference"])
    assert table.loc["r=1", "difference"] == table.loc["again", "difference"] != 0


def test_a_row_is_what_fit_and_the_judge_give(record):
    frame = record.frame()
    row = frame[(frame["data"] == "digits") & (frame["setup"] == "r=1") & (frame["seed"] == 3)].iloc[0]
    model, task = materials.pretrained_digits(), digits()
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


def test_a_stopped_record_goes_on_where_it_was(record, tiny, no_trial_runs):
    again = list(tiny.rows(CPU))
    assert [row["validation_loss"] for row in again] == [row["validation_loss"] for row in record.rows]


def test_where_full_fine_tuning_is_compared_all_methods_multiply_in_bfloat16():
    sweeps = tuned.plan_quality(CPU)
    trials = [trial for sweep in sweeps for trial, _ in sweep.setups.values()]
    assert {type(trial.method) for trial in trials} == {FullFineTuning, LoRA}
    for trial in trials:
        assert (trial.autocast or trial.lean.base_dtype) is torch.bfloat16, trial.method


# A record that grows


@pytest.fixture
def growing(record, monkeypatch, tmp_path):
    """What `lora-lab record rates` does with a record that grows, kept in "records" of a folder of its own."""
    monkeypatch.setitem(KINDS, "rates", KINDS["rates"]._replace(grows=True))
    monkeypatch.setattr(recorder, "destination", lambda: tmp_path)
    return lambda: command("record", "rates", "--device", "cpu", "--out", str(tmp_path))


def stop_at(data, monkeypatch):
    rows = BlockSweep.rows
    calls = []

    def stop(sweep, *where):
        calls.append(sweep.data)
        if sweep.data == data:
            raise KeyboardInterrupt
        yield from rows(sweep, *where)

    monkeypatch.setattr(BlockSweep, "rows", stop)
    return calls


def test_a_record_that_grows_holds_the_sweeps_that_have_ended(growing, record, monkeypatch, tmp_path):
    stop_at("docs", monkeypatch)
    assert growing() != 0
    (part,) = records.load_all("rates", tmp_path).values()
    assert part.settings == {"digits": record.settings["digits"]}
    assert [*part.frame()["data"].unique()] == ["digits"]


def test_a_record_that_grows_is_completed_and_no_sweep_is_measured_again(growing, record, monkeypatch, tmp_path):
    half = [row for row in record.rows if row["data"] == "digits"]
    marked = [row | {"reason": "as stored"} for row in half]
    marked.append(marked[-1] | {"data": "digits, merged"})  # of its trials that were judged again
    records.write(replace(record, rows=marked, settings={"digits": record.settings["digits"]}), tmp_path)
    calls = stop_at("", monkeypatch)
    assert growing() == 0
    (whole,) = records.load_all("rates", tmp_path).values()
    assert calls == ["docs"]
    assert whole.settings == record.settings
    assert [row for row in whole.rows if row["data"].startswith("digits")] == marked
    assert len(whole.rows) == len(record.rows) + 1


@pytest.mark.parametrize("same", [True, False])
def test_what_another_machine_has_measured_in_the_same_way_is_left_to_its_record(
    growing, record, monkeypatch, tmp_path, same
):
    settings = {"digits": record.settings["digits"] | ({} if same else {"widen": 7})}
    half = [row for row in record.rows if row["data"] == "digits"]
    records.write(replace(record, device="another", rows=half, settings=settings), tmp_path)
    calls = stop_at("", monkeypatch)
    assert growing() == 0
    (ours,) = (each for each in records.load_all("rates", tmp_path).values() if each.device != "another")
    assert calls == (["docs"] if same else ["digits", "docs"])
    assert {*ours.frame()["data"]} == {*calls}


def test_where_other_machines_have_measured_all_of_it_a_command_says_so(growing, record, tmp_path, capsys):
    records.write(replace(record, device="another"), tmp_path)
    assert growing() == 1
    assert "The records of other machines hold all of 'rates'; move them away" in capsys.readouterr().err
