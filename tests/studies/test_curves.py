"""What `lora-lab record overfitting` and `head_start` run, on tiny models, and what they write and plan."""

import dataclasses
import io
import json
import re
import shutil
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pandas
import pytest
import torch

from lora_lab import (
    FullFineTuning,
    LoRA,
    PartialFineTuning,
    claims,
    cli,
    evaluate,
    fit,
    records,
    tasks,
)
from lora_lab.ablation import materials
from lora_lab.ablation.halving import Halving
from lora_lab.analysis import divergence
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import Llama
from lora_lab.models.shapes import config
from lora_lab.studies import curves, recorder
from lora_lab.studies.claims.compared import DOCS, FINE_TUNED, FROM_SCRATCH, LONGER
from tests.helpers import COMMIT
from tests.studies.conftest import counting_on

pytestmark = pytest.mark.slow

FOLDER = Path("runs/record-overfitting")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def make(small_world, tiny_config, tmp_path_factory):
    """The real model is a tiny one, its text counts on, and what it wrote are tokens drawn at random."""

    def make(device=None):
        return Llama(tiny_config, seed=3)

    draw = torch.Generator().manual_seed(0)
    replies = [
        {"prompt": [prompt, 1, 2], "reply": torch.randint(0, 260, (5,), generator=draw).tolist()}
        for prompt in range(32)
        for _ in range(2)
    ]
    path = tmp_path_factory.mktemp("replies") / "replies.json"
    path.write_text(json.dumps({"temperature": 1.0, "replies": replies}))
    small_world.setattr(divergence, "REPLIES", path)
    small_world.setattr(materials, "language_model", make)
    small_world.setattr(materials, "docs_task", counting_on)
    return make


def record_of(what):
    """(the record, what was printed) of one run of the command."""
    with redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["record", what, "--device", "cpu", "--out", "records"]) == 0
    (record,) = records.load_all(what, "records").values()
    return record, printed.getvalue()


# What is planned


@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
def test_each_planned_run_reads_its_examples_a_whole_number_of_times(device):
    constant, cosine = curves.epochs(device)
    for case in curves.plan_overfitting(device):
        size = case.about["n_train"]
        for setup, (trial, lrs) in case.setups.items():
            decays = setup.endswith(", cosine")
            assert trial.steps * trial.batch_size == (cosine if decays else constant)[size] * size
            assert trial.steps % trial.eval_every == 0
            assert trial.schedule == ("cosine" if decays else "constant")
            assert decays or trial.warmup == 8
            assert case.trial(setup, 1e-3, case.judging[0]).eval_examples == curves.JUDGED_ON > trial.eval_examples
            curves.HALVING.check([case.trial(setup, lr, 0) for lr in lrs])


def test_the_last_blocks_are_those_of_the_real_model():
    assert [f"model.layers.{i}" for i in (26, 27, 28, 29)] == curves.LAST_BLOCKS
    assert config("smollm2-135m").num_hidden_layers == 30


# Overfitting

METHODS = {
    "full": (FullFineTuning(), 1e-2),
    "LoRA r=8": (LoRA(8, 16), 3e-2),
    "last blocks": (PartialFineTuning(["model.layers.1"]), 1e-2),
}
SMALL = {"SEQ_LEN": 9, "SIZE": 4, "CHOSEN_ON": 6, "JUDGED_ON": 8, "WIDEN": 1, "METHODS": METHODS}
SMALL |= {"ON_TWO_CORES": (*METHODS,), "HALVING": Halving(rungs=(0.5,), best_so_far=True, slack=0.2)}
SMALL |= {"epochs": lambda device: ({4: 4, 8: 5}, {8: 4}), "on_base_text": lambda task: task}
OF_SIZE = {4: [*METHODS], 8: [*METHODS, *(f"{setup}, cosine" for setup in METHODS)]}


@pytest.fixture
def small(make, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(curves, name, value)
    return make


@pytest.fixture(scope="module")
def overfitted(make):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(curves, name, value)
        return record_of("overfitting")


def lowest(frame, size, setup):
    """The rate of the lowest mean over the choosing seeds, of those that were stopped on none, by pandas alone."""
    own = frame[(frame["n_train"] == size) & (frame["setup"] == setup) & (frame["stage"] == "choosing")]
    done = own[own["outcome"] == "done"].groupby(["lr", "seed"])["validation_loss"].min().unstack()
    return done[[0, 1]].dropna().mean(axis=1).idxmin()


def test_two_seeds_choose_each_setups_rate_for_each_size_and_schedule_and_others_are_judged_at_it(overfitted):
    frame = overfitted[0].frame()
    assert {(size, setup) for size, setups in OF_SIZE.items() for setup in setups} == set(
        frame[["n_train", "setup"]].itertuples(index=False, name=None)
    )
    for (size, setup), rows in frame.groupby(["n_train", "setup"]):
        choosing, judging = (rows[rows["stage"] == stage] for stage in ("choosing", "judging"))
        assert set(choosing["seed"]) == {0, 1}
        assert set(judging["seed"]) == {2, 3, 4}
        assert set(judging["lr"]) == {lowest(frame, size, setup)}
        assert choosing["lr"].nunique() in (5, 6)  # one may be added at an edge
        edges = {min(choosing["lr"]): "smallest", max(choosing["lr"]): "largest"}
        assert set(rows["edge"]) == {edges.get(lowest(frame, size, setup), "")}
        assert set(rows["schedule"]) == {"cosine" if setup.endswith(", cosine") else "constant"}
    stopped = frame[frame["outcome"] == "stopped"]  # far behind
    assert 0 < len(stopped) == (stopped["step"] < stopped["steps"]).sum()
    assert set(frame["commit"]) == {COMMIT}
    assert frame.loc[frame["stage"] == "choosing", "off_domain_loss"].isna().all()
    assert frame.loc[frame["stage"] == "judging", "off_domain_loss"].notna().all()


def test_a_row_is_what_fit_gives_for_its_setup_rate_and_seed(make, overfitted):
    frame = overfitted[0].frame()
    for setup, size, seed in (("full", 8, 2), ("LoRA r=8, cosine", 8, 3), ("last blocks", 4, 2)):
        own = frame[(frame["setup"] == setup) & (frame["n_train"] == size) & (frame["seed"] == seed)].set_index("step")
        model, task, epoch, cosine = make(), counting_on(9, size, seed), size // 4, setup.endswith("cosine")
        options = {"steps": epoch * (4 if cosine else {4: 4, 8: 5}[size]), "eval_every": epoch, "batch_size": 4}
        options |= {"schedule": "cosine"} if cosine else {"schedule": "constant", "warmup": epoch}
        method, _ = METHODS[setup.removesuffix(", cosine")]
        task = dataclasses.replace(task, off_domain=task.off_domain[::2])
        history = fit(model, task, method, lr=own["lr"].iloc[0], seed=seed, eval_examples=8, **options)
        table = history.frame().set_index("step").loc[list(own.index)]
        tolerance = 2e-2 if setup.startswith("LoRA") else 1e-4  # over a base in bfloat16
        for name in ("train_loss", "validation_loss", "off_domain_loss"):
            assert own[name].tolist() == pytest.approx(table[name].tolist(), rel=tolerance, nan_ok=True)
        assert own["test_loss"].iloc[-1] == pytest.approx(evaluate(model, task, "test", 4, 8), rel=tolerance)
        assert len(set(own["validation_loss"])) == len(own) > 2


@pytest.mark.parametrize("hot", [["full"], [*METHODS]])
def test_a_trial_that_failed_is_a_row_with_its_reason_and_its_setup_is_not_judged(small, monkeypatch, tmp_path, hot):
    methods = {name: (method, 1e30 if name in hot else lr) for name, (method, lr) in METHODS.items()}
    monkeypatch.setattr(curves, "METHODS", methods)
    monkeypatch.setattr(curves, "epochs", lambda device: ({8: 4}, {}))
    monkeypatch.chdir(tmp_path)
    rows = list(curves.OVERFITTING.rows(CPU))
    failed = [row for row in rows if row["outcome"] == "failed"]
    assert {row["setup"] for row in failed} == {*hot}
    assert {row["setup"] for row in rows if row["stage"] == "judging"} == METHODS.keys() - {*hot}
    for row in failed:
        assert "lower the learning rate" in row["reason"]
        assert row["step"] is row["validation_loss"] is row["gap"] is None
        assert recorder.tell_row(row).endswith(f"seed {row['seed']}: {row['reason']}")
    records.new("overfitting", rows, {}, "a test", CPU, "unknown")  # has no NaN in it


def test_of_a_record_that_is_overfitted_nothing_is_run_again(overfitted, tmp_path, no_trial_runs, small, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / FOLDER)
    monkeypatch.chdir(tmp_path)
    assert list(curves.OVERFITTING.rows(CPU)) == overfitted[0].rows
    next(FOLDER.glob("*.json")).unlink()
    with pytest.raises(AssertionError, match="a trial is run again"):
        list(curves.OVERFITTING.rows(CPU))


def test_settings_that_no_record_can_hold_are_refused_before_anything_is_run(monkeypatch, capsys):
    begun = []

    def rows(device):
        begun.append(device)
        yield {"setup": "full"}

    made = dataclasses.replace(curves.OVERFITTING, rows=rows, settings=lambda device: {"sizes": (4, 8)})
    monkeypatch.setattr(curves, "OVERFITTING", made)
    assert cli.main(["record", "overfitting", "--device", "cpu", "--out", "refused"]) == 1
    assert ".sizes" in capsys.readouterr().err
    assert begun == []


# Head start

REAL_PLAN, REAL_TEXTS = curves.plan_head_start, materials.docs_task


def few(device):
    """Two cases of the real plan, with fewer rates, seeds and steps."""
    (digits,) = (case for case in REAL_PLAN(CPU) if [*case.about.values()] == ["inverted", "MLP", 40])
    (docs,) = (case for case in REAL_PLAN(CPU) if case.about["data"] == DOCS)
    seeds = {"choosing": (0, 1), "judging": (2, 3, 4), "widen": 1}
    of_digits = {setup: (trial, (1e-3, 3e-3, 9e-3)) for setup, (trial, _) in digits.setups.items()}
    of_docs = {
        setup: (dataclasses.replace(trial, steps=4, warmup=None, eval_every=4), (1e-3, 1e-2))
        for setup, (trial, _) in docs.setups.items()
    }
    of_eight = {"about": docs.about | {"n_train": 8}, "task": partial(counting_on, 9, 8)}
    return [
        dataclasses.replace(digits, setups=of_digits, **seeds),
        dataclasses.replace(docs, setups=of_docs, **of_eight, **seeds),
    ]


def test_rates_are_chosen_by_the_loss_after_the_last_step_which_may_be_above_that_before_training(monkeypatch):
    after = {1e-3: (2.4, 2.4), 3e-3: (2.1, 2.1), 9e-3: (1.5, 8.0)}  # by seed; 2.0 before training

    def train(case, device, folder, seeds, lrs):
        common = {"setup": FROM_SCRATCH, "outcome": "done", "seed": seeds[0], "off_domain_loss": 1.0, "gap": 0.0}
        common |= {"steps": 150, "test_loss": 1.0, "reason": ""}
        return pandas.DataFrame(
            common | {"lr": lr, "step": step, "validation_loss": loss}
            for lr in lrs[FROM_SCRATCH]
            for step, loss in ((0, 2.0), (150, after[lr][seeds[0] % 2]))
        )

    monkeypatch.setattr(recorder.CurveSweep, "_train", train)
    case = next(iter(REAL_PLAN(CPU)))
    few = {"setups": {FROM_SCRATCH: (case.setups[FROM_SCRATCH][0], (*after,))}, "choosing": (0, 1), "judging": (2, 3)}
    rows = pandas.concat(dataclasses.replace(case, widen=0, **few).frames(CPU, Path("unused")))
    assert set(rows[rows["stage"] == "judging"]["lr"]) == {3e-3}
    assert set(rows["edge"]) == {""}


@pytest.fixture(scope="module")
def head_start(make, small_world, tiny_config):
    """One run of the command, in which the real model is a tiny one and its text counts on."""
    small_world.setattr(materials, "random_init", lambda device=None, seed=0: Llama(tiny_config, seed=100 + seed))
    small_world.setattr(curves, "TEXT_LENGTH", 9)
    small_world.setattr(curves, "HEAD_START", recorder.record_sweeps("head_start", few))
    record, printed = record_of("head_start")
    assert re.search(r"inverted +MLP +n_train 40 +judging +from scratch, longer .*lr 0.00", printed)
    assert [case["about"]["data"] for case in record.settings["cases"]] == ["inverted", DOCS]
    first = record.settings["cases"][0]
    assert (first["setups"][LONGER]["steps"], first["lrs"][LONGER]) == (550, [1e-3, 3e-3, 9e-3])
    assert (first["choosing"], first["judging"]) == ([0, 1], [2, 3, 4])
    return record


def test_a_row_is_what_fit_gives_for_its_start_pictures_rate_and_seed(head_start):
    frame = head_start.frame()
    task = tasks.digits("adapt", 3, change="inverted").limited(40, 3)
    learned = DigitsMLP(seed=3, dtype=torch.float64)
    before = {"steps": 400, "lr": 3e-3, "batch_size": 32, "seed": 3, "progress": False}
    fit(learned, tasks.digits("pretrain", 3, change="inverted"), FullFineTuning(), **before)
    scratch = DigitsMLP(seed=3, dtype=torch.float64)
    starts = {FINE_TUNED: (learned, 150), FROM_SCRATCH: (scratch, 150), LONGER: (scratch, 550)}
    own = frame[(frame["data"] == "inverted") & (frame["seed"] == 3)].set_index("setup")
    for setup, (start, steps) in starts.items():
        row = own.loc[setup]
        model = DigitsMLP(dtype=torch.float64)
        model.load_state_dict(start.state_dict())
        fit(
            model,
            task,
            FullFineTuning(),
            steps=steps,
            lr=row["lr"],
            batch_size=32,
            seed=3,
            eval_every=steps,
            progress=False,
        )
        assert row["test_loss"] == pytest.approx(evaluate(model, task, "test"), rel=1e-4)
        right = (model(task.test.inputs).argmax(-1) == task.test.targets).float().mean()
        assert row["score_accuracy"] == pytest.approx(float(right))


def test_the_ledger_reads_the_record(head_start):
    for claim in ("fine-tuning-beats-scratch", "fine-tuning-needs-fewer-steps"):
        result = claims.verdict(claim, "records").result
        assert "docs" in result.measured or claim.endswith("steps")
        assert "inverted, MLP, 40" in result.measured


def test_seeds_draw_the_pictures_the_pretraining_and_the_random_weights():
    case = few(CPU)[0]
    for setup in (FINE_TUNED, FROM_SCRATCH):
        first, again, other = (case.starts[setup](seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["head.weight"], other["head.weight"])
    assert case.task(0).fingerprint == case.task(0).fingerprint != case.task(1).fingerprint
    assert torch.equal(1 - case.task(0).train.inputs, (1 - case.task(0).train.inputs).clamp(0, 1))
    scratch, longer = (case.starts[setup](0).state_dict() for setup in (FROM_SCRATCH, LONGER))
    assert torch.equal(scratch["head.weight"], longer["head.weight"])


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_plan_compares_equal_steps_on_other_seeds_than_those_that_choose(device):
    cases = list(REAL_PLAN(device))
    for case in cases:
        trials = {setup: case.trial(setup, 1e-3, 0) for setup in case.setups}
        assert trials[FINE_TUNED] == trials[FROM_SCRATCH]
        assert not set(case.choosing) & set(case.judging)
        assert len(case.judging) >= 3
        assert trials[FINE_TUNED].batch_size <= case.about["n_train"]
        if case.about["data"] != DOCS:
            assert trials[LONGER].steps == 550 == 400 + trials[FINE_TUNED].steps
    assert cases[-1].starts.keys() == {FROM_SCRATCH}


def test_a_head_start_on_texts_evaluates_few_off_domain_texts(monkeypatch):
    monkeypatch.setattr(materials, "docs_task", REAL_TEXTS)
    *_, texts = curves.plan_head_start(torch.device("cpu"))
    assert len(texts.task(0).off_domain) == 4  # each evaluation of 128 would take as long as many steps
