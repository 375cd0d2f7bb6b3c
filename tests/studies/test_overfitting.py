"""What `lora-lab record overfitting` runs, on a tiny model, and what it writes, says and plans."""

import dataclasses
import io
import shutil
from contextlib import redirect_stdout
from pathlib import Path
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

FOLDER = Path("runs/record-overfitting")
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
    assert own["planned_hours"] == overfitting.hours(CPU) > 0
    assert f"Planned: about {own['planned_hours']} hours" in whole[1]


# What fails, and what is stopped


def test_a_trial_that_failed_is_a_row_with_its_reason_and_its_setup_is_not_judged(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(overfitting, "CENTRES", CENTRES | {"full": 1e30})
    monkeypatch.setattr(overfitting, "plan", lambda device: Plan([*METHODS], {8: 4}, {}, judging=(2,), **SMALL))
    rows = list(overfitting.RECORDER.rows(CPU, tmp_path))
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
    rows = list(overfitting.RECORDER.rows(CPU, tmp_path))
    assert {(row["outcome"], row["stage"]) for row in rows} == {("failed", "choosing")}
    assert all(row["reason"] for row in rows)


def test_of_a_record_that_is_whole_nothing_is_run_again(whole, tmp_path, no_trial_runs):
    shutil.copytree(FOLDER, tmp_path / "trials")
    assert list(overfitting.RECORDER.rows(CPU, tmp_path / "trials")) == whole[0].rows
    next((tmp_path / "trials").glob("*.json")).unlink()
    with pytest.raises(AssertionError, match="a trial is run again"):
        list(overfitting.RECORDER.rows(CPU, tmp_path / "trials"))


# What is planned


@pytest.fixture
def real(monkeypatch):
    """The real plan, setups and rates again."""
    for name, value in {"plan": REAL_PLAN, "SETUPS": REAL_SETUPS, "CENTRES": REAL_CENTRES}.items():
        monkeypatch.setattr(overfitting, name, value)


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
    assert overfitting.hours(CPU) == pytest.approx(expected, abs=0.06)
    assert costs.asked == [(set(METHODS), 4, 9)]


def test_settings_that_no_record_can_hold_are_refused_before_anything_is_run(tiny, monkeypatch, capsys):
    begun = []

    def rows(device):
        begun.append(device)
        yield {"setup": "full"}

    recorder = dataclasses.replace(overfitting.RECORDER, rows=rows, settings=lambda device: {"sizes": (4, 8)})
    monkeypatch.setattr(overfitting, "RECORDER", recorder)
    assert cli.main(["record", "overfitting", "--device", "cpu", "--out", "refused"]) == 1
    assert ".sizes" in capsys.readouterr().err
    assert begun == []
