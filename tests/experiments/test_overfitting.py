"""What `lora-lab record overfitting` runs, on a tiny model, and what it writes, says and plans."""

import dataclasses
import io
import shutil
from contextlib import redirect_stdout
from itertools import islice
from types import SimpleNamespace

import pandas
import pytest
import torch

from lora_lab import FullFineTuning, LoRA, PartialFineTuning, cli, evaluate, fit, records
from lora_lab.ablation import studies
from lora_lab.ablation.overfitting import at_best_rate, compare, summarise_trials
from lora_lab.costs import microbench as replay
from lora_lab.costs.cost_model import PHASES, CostModel
from lora_lab.experiments import overfitting, planning
from lora_lab.models.llama import Llama
from lora_lab.models.shapes import config
from lora_lab.tasks import Examples, Task
from tests.helpers import COMMIT

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REAL_PLAN, REAL_SETUPS = overfitting.plan, dict(overfitting.SETUPS)  # the fixture puts others in their places
RATES = {"full": (1e-3, 3e-2, 1e-2), "LoRA r=8": (1e-3, 1e-1), "last blocks": (1e-2, 1e-3)}
PLAN = overfitting.Plan((4, 8), RATES, 3, 4, 4, 9, 6)
METHODS = {"full": FullFineTuning(), "LoRA r=8": LoRA(8, 16), "last blocks": PartialFineTuning(["model.layers.1"])}


def counting_on(seq_len, n_train, seed):
    """Tokens that count on from a drawn one: learned in a few steps; off-domain they count down."""

    def part(n, draw, step):
        start = torch.randint(0, 260, (n, 1), generator=torch.Generator().manual_seed(draw))
        ids = (start + step * torch.arange(seq_len + 1)) % 260
        return Examples(ids[:, :-1], ids[:, 1:])

    task = Task("counting", part(24, 0, 1), part(9, 1, 1), part(7, 2, 1), part(8, 3, -1), unit="tokens")
    return task.limited(n_train, seed)


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
    """The real model is a tiny one, its text counts on, and its machine needs hours."""

    def make(device=None):
        return Llama(tiny_config, seed=3)

    small_world.setattr(studies, "language_model", make)
    small_world.setattr(studies, "docs_task", counting_on)
    small_world.setitem(overfitting.SETUPS, "last blocks", METHODS["last blocks"])
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


def lowest(rows, size, setup):
    """The rate of the lowest validation loss at any evaluation of seed 0."""
    own = [row for row in rows if (row["n_train"], row["setup"], row["seed"]) == (size, setup, 0)]
    return min(own, key=lambda row: row["validation_loss"])["lr"]


# What is recorded


def test_a_record_holds_every_evaluation_of_every_rate_on_seed_0_and_of_the_best_one_on_the_others(whole):
    record, printed = whole
    trials = 2 * (3 + 2 + 2 + 2 * 3)  # sizes; rates on seed 0, then three methods on two seeds
    assert len(record.rows) == trials * 5  # before training, and after each of four epochs
    chosen = {(size, setup): lowest(record.rows, size, setup) for size in (4, 8) for setup in RATES}
    assert any(lr != RATES[setup][0] for (_, setup), lr in chosen.items())
    expected = [
        (size, setup, lr, seed)
        for size in (4, 8)
        for seed in range(3)
        for setup, rates in RATES.items()
        for lr in (rates if seed == 0 else [chosen[size, setup]])
    ]
    frame = record.frame()
    found = frame[["n_train", "setup", "lr", "seed"]].drop_duplicates().itertuples(index=False, name=None)
    assert sorted(found) == sorted(expected)
    for (size, *_), own in frame.groupby(["n_train", "setup", "lr", "seed"]):
        assert own.step.tolist() == [size // 4 * epoch for epoch in range(5)]
        assert own.test_loss.notna().tolist() == [False] * 4 + [True]
        assert own.gap.notna().tolist() == own.train_loss.notna().tolist() == [False] + [True] * 4
    assert set(frame.commit) == {COMMIT}
    assert f"Planned: {trials} trials, about " in printed
    assert printed.count(" off_domain ") == trials
    row = frame[(frame.n_train == 8) & (frame.setup == "full") & (frame.seed == 2) & (frame.step == frame.steps)].iloc[
        0
    ]
    losses = f"train {row.train_loss:.4f}  validation {row.validation_loss:.4f}  off_domain {row.off_domain_loss:.4f}"
    assert f"    8 examples  full         lr {row.lr:<8g} seed 2: {losses}\n" in printed


def test_a_record_says_how_its_rows_were_made(whole):
    own = whole[0].settings
    assert {setup: setups["lrs"] for setup, setups in own["setups"].items()} == {
        setup: list(lrs) for setup, lrs in RATES.items()
    }
    assert own["setups"]["LoRA r=8"]["rank"] == 8
    assert own["setups"]["last blocks"]["modules"] == ["model.layers.1"]
    assert (own["sizes"], own["seeds"], own["epochs"], own["batch_size"]) == ([4, 8], 3, 4, 4)
    assert (own["seq_len"], own["eval_examples"]) == (9, 6)
    assert own["planned_hours"] == overfitting.planned_hours(CPU) > 0


def test_a_row_is_what_fit_gives_for_its_way_rate_and_seed(tiny, whole):
    frame = whole[0].frame()
    for setup, size, seed in (("full", 8, 2), ("LoRA r=8", 8, 0), ("last blocks", 4, 1)):
        own = frame[(frame.setup == setup) & (frame.n_train == size) & (frame.seed == seed)]
        model, task, epoch = tiny(), counting_on(9, size, seed), size // 4
        options = {"steps": 4 * epoch, "warmup": epoch, "eval_every": epoch, "batch_size": 4, "eval_examples": 6}
        lr = own.lr.iloc[0]
        own = own[own.lr == lr].set_index("step")
        history = fit(model, task, METHODS[setup], lr=lr, seed=seed, schedule="constant", **options)
        table = history.frame().set_index("step").loc[list(own.index)]
        for name in ("train_loss", "validation_loss", "off_domain_loss"):
            assert own[name].tolist() == pytest.approx(table[name].tolist(), rel=1e-4, nan_ok=True)
        assert own.test_loss.iloc[-1] == pytest.approx(evaluate(model, task, "test", 4, 6), rel=1e-4)
        assert own.gap.iloc[1:].tolist() == pytest.approx(history.curve("gap")[1], abs=1e-3)
        assert set(own.trainable_parameters) == {history.trainable_parameters}
        assert len(set(own.validation_loss)) == 5
    before = frame[frame.step == 0].validation_loss
    assert before.max() - before.min() < 1e-4  # one model, whatever is done with it
    assert frame[frame.step == frame.steps].validation_loss.nunique() > 20


def test_a_record_can_be_measured_tuned_and_compared(whole):
    frame = whole[0].frame()
    best = at_best_rate(summarise_trials(frame))
    assert len(best) == 2 * 3 * 3
    assert {(row.n_train, row.setup): row.lr for row in best.itertuples()} == {
        (size, setup): lowest(frame.to_dict("records"), size, setup) for size in (4, 8) for setup in RATES
    }
    table = compare(best, "overfit")
    assert set(table.seeds) == {3}
    assert table[table.setup != "full"].lower.notna().all()


# What fails, and what is stopped


def hot(monkeypatch, *setups):
    """The plan, with rates for some methods at which nothing can be trained."""
    rates = {setup: (1e30, 1e31) if setup in setups else lrs for setup, lrs in RATES.items()}
    monkeypatch.setattr(overfitting, "plan", lambda device: dataclasses.replace(PLAN, lrs=rates, sizes=(8,)))


def test_a_trial_that_failed_is_a_row_with_its_reason_and_its_way_is_not_run_on_other_seeds(
    tiny, monkeypatch, tmp_path
):
    hot(monkeypatch, "full")
    rows = list(overfitting.rows(CPU, tmp_path))
    failed = [row for row in rows if row["outcome"] == "failed"]
    assert [(row["setup"], row["lr"], row["seed"]) for row in failed] == [("full", 1e30, 0), ("full", 1e31, 0)]
    assert {row["setup"] for row in rows if row["seed"] > 0} == {"LoRA r=8", "last blocks"}
    for row in failed:
        assert "lower the learning rate" in row["reason"]
        assert row["step"] is row["validation_loss"] is row["gap"] is None
        said = f"    8 examples  full         lr {row['lr']:<8g} seed 0: {row['reason']}"
        assert overfitting.line(row) == said
    records.new("overfitting", rows, overfitting.settings(CPU), "a test", CPU, "unknown")  # has no NaN in it
    assert set(summarise_trials(pandas.DataFrame(rows)).setup) == {"LoRA r=8", "last blocks"}


def test_where_everything_failed_the_record_holds_the_reasons_and_ends(tiny, monkeypatch, tmp_path):
    hot(monkeypatch, *RATES)
    rows = list(overfitting.rows(CPU, tmp_path))
    assert len(rows) == 2 * 3
    assert {(row["outcome"], row["seed"]) for row in rows} == {("failed", 0)}
    assert all(row["reason"] for row in rows)


def test_a_line_is_said_for_the_last_evaluation_alone():
    row = {"n_train": 16, "setup": "LoRA r=64", "lr": 2e-4, "seed": 1, "steps": 20, "outcome": "done", "reason": ""}
    row |= {"train_loss": 1.25, "validation_loss": 2.5, "off_domain_loss": 3.00004}
    said = "   16 examples  LoRA r=64    lr 0.0002   seed 1: train 1.2500  validation 2.5000  off_domain 3.0000"
    assert overfitting.line({**row, "step": 20.0}) == said
    assert overfitting.line({**row, "step": 18.0}) is None
    assert overfitting.line({**row, "step": 0.0, "train_loss": None}) is None


def test_a_stopped_record_goes_on_where_it_was(tiny, whole, tmp_path):
    rows = overfitting.rows(CPU, tmp_path)
    first = list(islice(rows, 1))
    rows.close()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(kept) == 3 + 2 + 2  # of the first size, all rates on seed 0
    found = list(overfitting.rows(CPU, tmp_path))
    assert found[:1] == first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(tmp_path.glob("*.json"))) == 2 * (7 + 6)
    assert [row["lr"] for row in found] == [row["lr"] for row in whole[0].rows]


def test_of_a_record_that_is_whole_nothing_is_run_again(whole, tmp_path, no_trial_runs):
    shutil.copytree(overfitting.FOLDER, tmp_path / "trials")
    assert list(overfitting.rows(CPU, tmp_path / "trials")) == whole[0].rows
    next((tmp_path / "trials").glob("*.json")).unlink()
    with pytest.raises(AssertionError, match="a trial is run again"):
        list(overfitting.rows(CPU, tmp_path / "trials"))


# What is planned


def count(plan):
    return sum(len(lrs) + plan.seeds - 1 for lrs in plan.lrs.values()) * len(plan.sizes)


def test_a_gpu_is_given_a_larger_plan():
    small, large = REAL_PLAN(CPU), REAL_PLAN(CUDA)
    assert set(small.sizes) < set(large.sizes)
    assert set(small.lrs) < set(large.lrs)
    assert all(set(lrs) <= set(large.lrs[setup]) for setup, lrs in small.lrs.items())
    assert large.seeds > small.seeds >= 3
    assert (large.seq_len, large.eval_examples) > (small.seq_len, small.eval_examples)
    assert large.eval_examples > small.eval_examples
    assert count(large) > 4 * count(small)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
def test_each_planned_run_reads_its_examples_a_whole_number_of_times_and_is_evaluated_after_each(device):
    own = REAL_PLAN(device)
    assert set(own.lrs) <= set(REAL_SETUPS)
    assert own.epochs == 10
    for setup, lrs in own.lrs.items():
        assert list(lrs) == sorted(set(lrs))
        assert len(lrs) >= 3
        for size in own.sizes:
            trial = own.trial(setup, lrs[0], 2, size)
            assert trial.steps * trial.batch_size == own.epochs * size
            assert trial.eval_every * trial.batch_size == trial.warmup * trial.batch_size == size
            assert (trial.schedule, trial.seed, trial.lr) == ("constant", 2, lrs[0])
            assert trial.eval_examples == own.eval_examples
            assert trial.method == overfitting.SETUPS[setup]
    assert len({own.trial("full", own.lrs["full"][0], 0, size).key for size in own.sizes}) == len(own.sizes)


def test_the_last_blocks_are_those_of_the_real_model():
    assert list(REAL_SETUPS["last blocks"].modules) == [f"model.layers.{i}" for i in (26, 27, 28, 29)]
    assert config("smollm2-135m").num_hidden_layers == 30


@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
def test_a_record_can_hold_the_settings_of_the_real_plan(device, monkeypatch):  # or hours would end in an error
    monkeypatch.setattr(overfitting, "plan", REAL_PLAN)
    monkeypatch.setattr(overfitting, "SETUPS", REAL_SETUPS)
    monkeypatch.setattr(overfitting, "planned_hours", lambda device: 1.5)
    own = records.new("overfitting", [{"a": 1}], overfitting.settings(device), "a test", CPU, "unknown").settings
    assert own["setups"]["LoRA r=8"]["lrs"] == list(REAL_PLAN(device).lrs["LoRA r=8"])
    assert set(own["setups"]) == set(REAL_PLAN(device).lrs)


# How long it takes


def test_planned_hours_are_those_of_all_steps_and_evaluations(tiny, monkeypatch):
    costs = Costs()
    monkeypatch.setattr(planning, "cost_model", lambda device: costs)
    # An evaluation of two parts of 6 examples, in batches of 4, each for a third of full fine-tuning's 3 hours.
    look = 2 * 6 / 4 * 1.0
    expected = 0.0
    for epoch in (1, 2):  # steps of an epoch: sizes 4 and 8
        for setup, runs in (("full", 3 + 2), ("LoRA r=8", 2 + 2), ("last blocks", 2 + 2)):
            # Five evaluations, and the test part at the end, half as much as one.
            expected += runs * (4 * epoch * costs.hours[setup] + 5.5 * look)
    assert overfitting.planned_hours(CPU) == pytest.approx(expected, abs=0.06)
    assert costs.asked == [(set(METHODS), 4, 9)]
    assert overfitting.planned_hours(CPU) == overfitting.settings(CPU)["planned_hours"]
    assert len(costs.asked) == 1  # costs are measured once


def test_planned_hours_grow_with_epochs_sizes_and_seeds(tiny, monkeypatch):
    def hours(**changes):
        monkeypatch.setattr(overfitting, "plan", lambda device: dataclasses.replace(PLAN, **changes))
        overfitting.planned_hours.cache_clear()
        return overfitting.planned_hours(CPU)

    assert 0 < hours() < hours(epochs=5) < hours(epochs=50)
    assert hours(seeds=4) > hours()
    assert hours(sizes=(4, 8, 16)) > hours(sizes=(4, 16)) > hours()
    assert hours(eval_examples=12) > hours()
    assert hours(lrs={**RATES, "full": RATES["full"][:1]}) < hours()


def test_planned_hours_are_those_of_this_machines_cost_model(tiny, tiny_config, monkeypatch):
    monkeypatch.setattr(replay, "_SAMPLE_S", 1e-5)
    monkeypatch.setattr(replay, "ROUNDS", 1)
    costs = CostModel(replay.OperationTimer(CPU), dict.fromkeys(PHASES, (1e-4, 1e-6)))
    monkeypatch.setattr(planning, "cost_model", lambda device: costs)
    monkeypatch.setattr(planning, "random_model", lambda name: Llama(tiny_config))
    found = []
    for epochs in (10**6, 10**7):
        monkeypatch.setattr(overfitting, "plan", lambda device, epochs=epochs: dataclasses.replace(PLAN, epochs=epochs))
        overfitting.planned_hours.cache_clear()
        found.append(overfitting.planned_hours(CPU))
    assert found[0] > 1  # at a millisecond a step, and 33 million steps
    assert found[1] == pytest.approx(10 * found[0], rel=0.01)


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
