"""What `lora-lab record overfitting` runs, on a tiny model, and what it writes, says and plans."""

import dataclasses
import io
import json
import shutil
from contextlib import redirect_stdout
from itertools import islice
from types import SimpleNamespace

import pandas
import pytest
import torch

from lora_lab import FullFineTuning, LoRA, PartialFineTuning, cli, evaluate, fit, records
from lora_lab.ablation import studies
from lora_lab.ablation.halving import Halving
from lora_lab.ablation.overfitting import by_stopping_point, by_training_loss, summarise_trials
from lora_lab.models.llama import Llama
from lora_lab.models.shapes import config
from lora_lab.studies import overfitting, planning
from lora_lab.studies.overfitting import Plan
from tests.helpers import COMMIT
from tests.studies.conftest import counting_on

pytestmark = pytest.mark.slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REAL_PLAN, REAL_SETUPS, REAL_CENTRES = overfitting.plan, dict(overfitting.SETUPS), dict(overfitting.CENTRES)
METHODS = {"full": FullFineTuning(), "LoRA r=8": LoRA(8, 16), "last blocks": PartialFineTuning(["model.layers.1"])}
CENTRES = {"full": 1e-2, "LoRA r=8": 3e-2, "last blocks": 1e-2}
SMALL = {"seq_len": 9, "batch_size": 4, "chosen_on": 6, "judged_on": 8, "widen": 1}
PLAN = Plan([*METHODS], {4: 4, 8: 5}, {8: 4}, judging=(2, 3), **SMALL)
SETUPS = {4: [*METHODS], 8: [*METHODS, *(f"{setup}, cosine" for setup in METHODS)]}


class Costs:
    """A cost model of a machine that needs whole hours for a step."""

    def __init__(self):
        self.hours, self.asked = {"full": 3.0, "LoRA r=8": 2.0, "last blocks": 1.0}, []

    def predict(self, factory, setups, batch_size, seq_len):
        names = {label: next(name for name, method in METHODS.items() if method == setup.method)
                 for label, setup in setups.items()}  # fmt: skip
        self.asked.append((set(names.values()), batch_size, seq_len))
        return SimpleNamespace(total_s=lambda label: 3600 * self.hours[names[label]])


@pytest.fixture(scope="module")
def tiny(small_world, tiny_config):
    """The real model is a tiny one, its text counts on, it wrote what counts down, and its machine needs hours."""

    def make(device=None):
        return Llama(tiny_config, seed=3)

    small_world.setattr(studies, "language_model", make)
    small_world.setattr(studies, "docs_task", counting_on)
    small_world.setattr(overfitting, "on_base_text", lambda task: task)
    small_world.setattr(overfitting, "SETUPS", METHODS)
    small_world.setattr(overfitting, "CENTRES", CENTRES)
    small_world.setattr(overfitting, "HALVING", Halving(rungs=(0.5,), best_so_far=True, slack=0.2))
    small_world.setattr(planning, "cost_model", lambda device: Costs())
    small_world.setattr(overfitting, "plan", lambda device: PLAN)
    return make


@pytest.fixture(autouse=True)
def forget_hours():
    """They are kept for each device, while plans change from test to test."""
    overfitting.planned_hours.cache_clear()
    yield
    overfitting.planned_hours.cache_clear()


@pytest.fixture(scope="module")
def whole(tiny):
    """(the record, what was printed) of one run of the command."""
    with redirect_stdout(io.StringIO()) as printed:
        status = cli.main(["record", "overfitting", "--device", "cpu", "--out", "records"])
    assert status == 0
    (record,) = records.load_all("overfitting", "records").values()
    return record, printed.getvalue()


def lowest(frame, size, setup):
    """The rate of the lowest mean over the choosing seeds, of those that were stopped on none, by pandas alone."""
    own = frame[(frame["n_train"] == size) & (frame["setup"] == setup) & (frame["stage"] == "choosing")]
    done = own[own["outcome"] == "done"].groupby(["lr", "seed"])["validation_loss"].min().unstack()
    return done[[0, 1]].dropna().mean(axis=1).idxmin()


# What is recorded


def test_two_seeds_choose_each_setups_rate_for_each_size_and_schedule_and_others_are_judged_at_it(whole):
    frame = whole[0].frame()
    assert {(size, setup) for size, setups in SETUPS.items() for setup in setups} == set(
        frame[["n_train", "setup"]].itertuples(index=False, name=None)
    )
    for (size, setup), rows in frame.groupby(["n_train", "setup"]):
        choosing, judging = (rows[rows["stage"] == stage] for stage in ("choosing", "judging"))
        assert set(choosing["seed"]) == {0, 1}
        assert set(judging["seed"]) == {2, 3}
        assert set(judging["lr"]) == {lowest(frame, size, setup)}
        assert choosing["lr"].nunique() in (5, 6)  # one may be added at an edge
        edges = {min(choosing["lr"]): "smallest", max(choosing["lr"]): "largest"}
        assert set(rows["edge"]) == {edges.get(lowest(frame, size, setup), "")}
        assert set(rows["schedule"]) == {"cosine" if setup.endswith(", cosine") else "constant"}
    assert set(frame["commit"]) == {COMMIT}
    assert frame.loc[frame["stage"] == "choosing", "off_domain_loss"].isna().all()
    assert frame.loc[frame["stage"] == "judging", "off_domain_loss"].notna().all()


def test_rates_that_are_far_behind_are_stopped_and_not_tried_on_the_next_seed(whole):
    frame = whole[0].frame()
    stopped = frame[frame["outcome"] == "stopped"]
    assert len(stopped)
    for (size, setup, lr), rows in stopped.groupby(["n_train", "setup", "lr"]):
        assert rows["step"].max() < rows["steps"].max()
        if set(rows["seed"]) == {0}:
            again = frame[(frame["n_train"] == size) & (frame["setup"] == setup) & (frame["lr"] == lr)]
            assert set(again["seed"]) == {0}


def test_a_row_is_what_fit_gives_for_its_setup_rate_and_seed(tiny, whole):
    frame = whole[0].frame()
    for setup, size, seed in (("full", 8, 2), ("LoRA r=8, cosine", 8, 3), ("last blocks", 4, 2)):
        own = frame[(frame["setup"] == setup) & (frame["n_train"] == size) & (frame["seed"] == seed)].set_index("step")
        model, task, epoch, cosine = tiny(), counting_on(9, size, seed), size // 4, setup.endswith("cosine")
        options = {"steps": epoch * (4 if cosine else {4: 4, 8: 5}[size]), "eval_every": epoch, "batch_size": 4}
        options |= {"schedule": "cosine"} if cosine else {"schedule": "constant", "warmup": epoch}
        method = METHODS[setup.removesuffix(", cosine")]
        task = dataclasses.replace(task, off_domain=task.off_domain[::2])
        history = fit(model, task, method, lr=own["lr"].iloc[0], seed=seed, eval_examples=8, **options)
        table = history.frame().set_index("step").loc[list(own.index)]
        tolerance = 2e-2 if setup.startswith("LoRA") else 1e-4  # over a base in bfloat16
        for name in ("train_loss", "validation_loss", "off_domain_loss"):
            assert own[name].tolist() == pytest.approx(table[name].tolist(), rel=tolerance, nan_ok=True)
        assert own["test_loss"].iloc[-1] == pytest.approx(evaluate(model, task, "test", 4, 8), rel=tolerance)
        assert len(set(own["validation_loss"])) == len(own) > 2


def test_curves_of_one_schedule_compare_at_every_stopping_point_and_at_equal_training_loss(whole):
    frame = whole[0].frame()
    judged = frame[(frame["stage"] == "judging") & (frame["schedule"] == "constant")]
    rises = by_stopping_point(judged)
    assert set(rises["setup"]) == {"LoRA r=8", "last blocks"}
    assert set(rises["seeds"]) == {2}
    divergences = by_stopping_point(judged, "forgotten_at_last")
    assert divergences["difference"].tolist() != rises["difference"].tolist()
    last = judged[(judged["n_train"] == 8) & (judged["step"] == judged["steps"])]["train_loss"]
    assert len(by_training_loss(judged[judged["n_train"] == 8], [last.max() + 0.01]))
    with pytest.raises(ValueError, match="has the rates"):
        by_stopping_point(frame[frame["schedule"] == "constant"])  # those that chose are no part of it


def test_a_record_says_how_its_rows_were_made(whole):
    own = whole[0].settings
    assert own["setups"]["full"]["lrs"] == [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2]
    assert own["setups"]["LoRA r=8"]["rank"] == 8
    assert (own["sizes"], own["choosing"], own["judging"]) == ([4, 8], [0, 1], [2, 3])
    assert (own["epochs"], own["cosine_epochs"]) == ({"4": 4, "8": 5}, {"8": 4})
    assert own["halving"]["slack"] == 0.2
    assert own["planned_hours"] == overfitting.planned_hours(CPU) > 0
    assert f"Planned: about {own['planned_hours']} hours" in whole[1]


# What fails, and what is stopped


def test_a_trial_that_failed_is_a_row_with_its_reason_and_its_setup_is_not_judged(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(overfitting, "CENTRES", CENTRES | {"full": 1e30})
    monkeypatch.setattr(overfitting, "plan", lambda device: Plan([*METHODS], {8: 4}, {}, judging=(2,), **SMALL))
    rows = list(overfitting.rows(CPU, tmp_path))
    failed = [row for row in rows if row["outcome"] == "failed"]
    assert {row["setup"] for row in failed} == {"full"}
    assert {row["setup"] for row in rows if row["stage"] == "judging"} == {"LoRA r=8", "last blocks"}
    for row in failed:
        assert "lower the learning rate" in row["reason"]
        assert row["step"] is row["validation_loss"] is row["gap"] is None
        assert overfitting.line(row).endswith(f"seed {row['seed']}: {row['reason']}")
    records.new("overfitting", rows, overfitting.settings(CPU), "a test", CPU, "unknown")  # has no NaN in it
    assert set(summarise_trials(pandas.DataFrame(rows)).setup) == {"LoRA r=8", "last blocks"}


def test_where_everything_failed_the_record_holds_the_reasons_and_ends(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(overfitting, "CENTRES", dict.fromkeys(METHODS, 1e30))
    monkeypatch.setattr(overfitting, "plan", lambda device: Plan([*METHODS], {8: 4}, {}, judging=(2,), **SMALL))
    rows = list(overfitting.rows(CPU, tmp_path))
    assert {(row["outcome"], row["stage"]) for row in rows} == {("failed", "choosing")}
    assert all(row["reason"] for row in rows)


def test_a_line_is_printed_for_the_last_evaluation_alone():
    row = {"n_train": 64, "setup": "LoRA r=8, cosine", "lr": 2e-4, "seed": 2, "steps": 20, "outcome": "done"}
    row |= {"stage": "judging", "train_loss": 1.25, "validation_loss": 2.5, "off_domain_loss": 3.00004}
    start = "   64 examples  LoRA r=8, cosine lr 0.0002   seed 2: train 1.2500  validation 2.5000"
    assert overfitting.line({**row, "step": 20.0}) == f"{start}  off_domain 3.0000"
    assert overfitting.line({**row, "step": 20.0, "stage": "choosing", "off_domain_loss": None}) == start
    assert overfitting.line({**row, "step": 18.0}) is None
    assert overfitting.line({**row, "step": None, "outcome": "stopped"}) is None


def test_a_stopped_record_goes_on_where_it_was(tiny, whole, monkeypatch, tmp_path):
    monkeypatch.setattr(overfitting, "plan", lambda device: Plan([*METHODS], {4: 4}, {}, judging=(2, 3), **SMALL))
    rows = overfitting.rows(CPU, tmp_path)
    first = list(islice(rows, 1))
    rows.close()
    outcomes = {path: json.loads(path.read_text())["outcome"] for path in tmp_path.glob("*.json")}
    done = {path: path.stat().st_mtime_ns for path, outcome in outcomes.items() if outcome == "done"}
    assert len(done) > 10
    everything = list(overfitting.rows(CPU, tmp_path))
    assert everything[:1] == first
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert [row["lr"] for row in everything] == [row["lr"] for row in whole[0].rows if row["n_train"] == 4]


def test_of_a_record_that_is_whole_nothing_is_run_again(whole, tmp_path, no_trial_runs):
    shutil.copytree(overfitting.FOLDER, tmp_path / "trials")
    assert list(overfitting.rows(CPU, tmp_path / "trials")) == whole[0].rows
    next((tmp_path / "trials").glob("*.json")).unlink()
    with pytest.raises(AssertionError, match="a trial is run again"):
        list(overfitting.rows(CPU, tmp_path / "trials"))


# What is planned


@pytest.fixture
def real(monkeypatch):
    """The real plan, setups and rates again."""
    for name, value in {"plan": REAL_PLAN, "SETUPS": REAL_SETUPS, "CENTRES": REAL_CENTRES}.items():
        monkeypatch.setattr(overfitting, name, value)


def test_the_real_plan_has_three_sizes_five_rates_and_five_seeds_and_a_gpu_does_more(real):
    small, large = REAL_PLAN(CPU), REAL_PLAN(CUDA)
    assert [*small.epochs] == [*large.epochs] == [64, 256, 1024]
    assert set(small.setups) < set(large.setups) <= set(REAL_SETUPS) == set(REAL_CENTRES)
    assert set(small.cosine_epochs) < set(large.cosine_epochs)
    for own in (small, large):
        assert len(own.choosing) == 2
        assert len(own.judging) >= 3
        assert not set(own.choosing) & set(own.judging)
        assert own.judged_on >= 256
        assert all(len(lrs) == 5 for lrs in own.lrs(64).values())


@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
def test_each_planned_run_reads_its_examples_a_whole_number_of_times(real, device):
    own = REAL_PLAN(device)
    for size in own.epochs:
        for setup, lrs in own.lrs(size).items():
            trial = own.trial(setup, lrs[0], 2, size)
            cosine = setup.endswith(", cosine")
            epochs = (own.cosine_epochs if cosine else own.epochs)[size]
            assert trial.steps * trial.batch_size == epochs * size
            assert trial.steps % trial.eval_every == 0
            assert trial.schedule == ("cosine" if cosine else "constant")
            assert cosine or trial.warmup == 8
            assert trial.eval_examples == own.judged_on > own.trial(setup, lrs[0], 0, size).eval_examples
            overfitting.HALVING.check([own.trial(setup, lr, 0, size) for lr in lrs])


def test_the_last_blocks_are_those_of_the_real_model():
    assert list(REAL_SETUPS["last blocks"].modules) == [f"model.layers.{i}" for i in (26, 27, 28, 29)]
    assert config("smollm2-135m").num_hidden_layers == 30


@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
def test_a_record_can_hold_the_settings_of_the_real_plan(real, device, monkeypatch):  # or hours would end in an error
    monkeypatch.setattr(overfitting, "planned_hours", lambda device: 1.5)
    own = records.new("overfitting", [{"a": 1}], overfitting.settings(device), "a test", CPU, "unknown").settings
    assert set(own["setups"]) == set(REAL_PLAN(device).setups)


def test_planned_hours_are_those_of_all_steps_and_evaluations(tiny, monkeypatch):
    costs = Costs()
    monkeypatch.setattr(planning, "cost_model", lambda device: costs)
    forward, expected = 1.0 / 4, 0.0  # a third of full fine-tuning's 3 hours, for a batch of 4

    def hours(setup, steps, evaluations, examples):
        return steps * costs.hours[setup] + (2 * evaluations + 1) * examples * forward

    for size, steps in ((4, 4), (8, 10)):
        evaluations = steps // (size // 4) + 1
        for setup in METHODS:  # at three of five rates, for halving
            expected += 6 * hours(setup, steps, evaluations, 6) + 2 * hours(setup, steps, evaluations, 8)
    for setup in METHODS:  # under a cosine, at all rates
        expected += 10 * hours(setup, 8, 5, 6) + 2 * hours(setup, 8, 5, 8)
    assert overfitting.planned_hours(CPU) == pytest.approx(expected, abs=0.06)
    assert costs.asked == [(set(METHODS), 4, 9)]
    assert overfitting.planned_hours(CPU) == overfitting.settings(CPU)["planned_hours"]
    assert len(costs.asked) == 1  # costs are measured once


def test_settings_that_no_record_can_hold_are_refused_before_anything_is_run(tiny, monkeypatch, capsys):
    begun = []

    def rows(device):
        begun.append(device)
        yield {"setup": "full"}

    recorder = dataclasses.replace(overfitting.RECORDER, rows=rows, settings=lambda device: {"sizes": (4, 8)})
    monkeypatch.setattr(overfitting, "RECORDER", recorder)
    assert cli.main(["record", "overfitting", "--device", "cpu", "--out", "refused"]) == 1
    assert "settings are" in capsys.readouterr().err
    assert begun == []
