"""What recorders of tuned studies run, on tiny models, and what they write, print and plan."""

import itertools
import math

import pytest
import torch

from lora_lab import FullFineTuning, LoRA, fit, records
from lora_lab.ablation import Trial, studies
from lora_lab.ablation.compare import Study, compare_losses
from lora_lab.ablation.learning_rate import best_rate, losses_by_rate
from lora_lab.ablation.stats import BlockLosses, block_losses_of
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import Llama
from lora_lab.studies import planning, quality, rates, registry, remedies, targets, taught, tuned, variants
from lora_lab.studies.tuned import Planned
from lora_lab.tasks import digits
from tests.helpers import COMMIT, command
from tests.studies.conftest import sentences

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def a_study(steps, batch_size, chosen_on):
    options = {"steps": steps, "batch_size": batch_size, "eval_every": steps, "eval_examples": 4}
    setups = {
        "full": Trial(FullFineTuning(), 1e-3, **options),
        "r=1": Trial(LoRA(1, 32), 1e-3, **options),
        "again": Trial(LoRA(1, 32), 1e-3, **options),
    }
    lrs = {"full": (1e-3, 2e-3), "r=1": (1e-2, 2e-2), "again": (1e-2, 2e-2)}
    return Study(setups, lrs, [0, 1], [2, 3], chosen_on, {"validation": 4, "test": 6}, widen=1)


def plan(device):
    return {"digits": Planned(a_study(6, 16, 40)), "docs": Planned(a_study(3, 4, 5), seq_len=8)}


class Costs:
    """A cost model of a machine on which full fine-tuning takes 3 hours a step, and LoRA 2."""

    def predict(self, factory, setups, batch_size, seq_len):
        assert (batch_size, seq_len) == (4, 8)
        hours = {label: 3 if setup.method == FullFineTuning() else 2 for label, setup in setups.items()}
        return type("Costs", (), {"total_s": staticmethod(lambda label: 3600 * hours[label])})


@pytest.fixture(scope="module")
def tiny(small_world, tiny_config):
    """The language model is tiny, and `lora-lab record rates` runs the plan above."""
    small_world.setattr(studies, "language_model", lambda device, model=None: Llama(tiny_config, seed=3))
    small_world.setattr(studies, "docs_task", lambda seq_len, model=None: sentences(tiny_config.vocab_size))
    small_world.setattr(planning, "cost_model", lambda device: Costs())
    recorder = tuned.recorder("rates", plan)
    small_world.setattr(registry, "recorder", lambda name: recorder)
    return recorder


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


def test_hours_are_planned_for_one_batch_size_at_a_time():
    trials = [Trial(LoRA(), 1e-3, steps=1, batch_size=size) for size in (8, 32)]
    with pytest.raises(ValueError, match=r"the batch sizes \[8, 32\]"):
        planning.planned_hours(trials, 64, CPU)


def test_where_full_fine_tuning_is_compared_all_methods_multiply_in_bfloat16():
    cpu = torch.device("cpu")
    planned = [*quality.plan(cpu).values(), *taught.plan(cpu).values()]
    trials = [trial for each in planned for trial in each.study.setups.values()]
    plan = remedies.plan(cpu)
    trials += [trial for name in plan.setups for trial in plan.trials(name)]
    assert {type(trial.method) for trial in trials} == {FullFineTuning, LoRA}
    for trial in trials:
        assert (trial.autocast or trial.lean.base_dtype) is torch.bfloat16, trial.method


@pytest.mark.parametrize("module", [rates, quality, targets, variants, taught])
def test_seeds_that_judge_did_not_choose_and_a_gpu_does_more(module):
    small, large = (module.plan(device)["docs"].study for device in (CPU, CUDA))
    assert small.setups.keys() == large.setups.keys()
    assert len(large.choosing) + len(large.judging) > len(small.choosing) + len(small.judging)
    assert len(small.choosing) >= 2
    assert len(small.judging) >= 3 or module is rates
    for study in (small, large):
        factors = [high / low for lrs in study.lrs.values() for low, high in itertools.pairwise(lrs)]
        assert all(1.69 < factor < 2.01 for factor in factors)
        assert all(len(lrs) >= 3 or "as taught" in setup for setup, lrs in study.lrs.items())
        for trial in study.setups.values():
            assert trial.lean is None or trial.method != FullFineTuning()
