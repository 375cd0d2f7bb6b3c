"""ablate: what it runs, what it keeps through kills and interrupts, and that where it runs changes no number."""

import copy
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn
from torch.nn import functional as F

from lora_lab import (
    DoRA,
    FullFineTuning,
    Lean,
    Llama,
    LoRA,
    adapter_state,
    evaluate,
    fit,
    quantize_nf4,
)
from lora_lab.ablation import Halving, packed, run, smallest_sufficient_rank
from lora_lab.ablation.grid import Grid, Trial
from lora_lab.ablation.results import load
from lora_lab.ablation.run import ablate, fingerprint
from lora_lab.models.digits import DigitsMLP
from lora_lab.tasks import Examples, Task, mean_squared_error
from lora_lab.train import in_autocast
from tests.helpers import small_task

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = functools.partial(DigitsMLP, width=16)
VARYING = ["seconds", "date", "engine", "commit"]  # the checkout may get a commit while the tests run


def grid(ranks=(1, 3), lrs=(0.01,), seeds=(0, 1), **options):
    return Grid(ranks, lrs, seeds, **{"steps": 6, "batch_size": 4, "alpha_per_rank": 2} | options)


def apart(trials, folder=None, task=None, model=MODEL, **options):
    return ablate(model, task or small_task(), trials, folder, **{"engine": "separate", "progress": False} | options)


def counting(monkeypatch):
    """The methods that ``fit`` is called with from now on."""
    called = []

    def counted(model, task, method, **options):
        called.append((method.rank, options["config"].seed))
        return fit(model, task, method, **options)

    monkeypatch.setattr(run, "fit", counted)
    return called


def same(frame, other):
    assert_frame_equal(frame.drop(columns=VARYING), other.drop(columns=VARYING))


# The table


def test_each_trial_is_what_fit_gives():
    methods = [LoRA(dropout=0.2), DoRA(), FullFineTuning()]
    frame = apart(grid(ranks=(1, 3), seeds=(5,), methods=methods, eval_every=2))
    assert len(frame) == 5 * 4
    for method in (LoRA(1, 2, 0.2), LoRA(3, 6, 0.2), DoRA(1, 2), DoRA(3, 6), FullFineTuning()):
        model = MODEL()
        history = fit(model, small_task(), method, steps=6, lr=0.01, batch_size=4, seed=5, eval_every=2)
        rank = getattr(method, "rank", math.nan)
        own = frame[(frame.method == method.name) & ((frame["rank"] == rank) | math.isnan(rank))]
        assert own.step.tolist() == [0, 2, 4, 6]
        expected = history.frame().set_index("step").loc[[0, 2, 4, 6]]
        for column in ("train_loss", "validation_loss", "off_domain_loss"):
            np.testing.assert_array_equal(own[column], expected[column])
        # Of the mean over the steps since the evaluation before, not over all.
        means = history.frame()["train_loss"][1:].to_numpy().reshape(3, 2).mean(1)
        assert math.isnan(own.gap.iloc[0])
        np.testing.assert_allclose(own.gap[1:], expected.validation_loss[1:] - means, rtol=1e-9)
        with torch.no_grad():
            test = small_task().test
            by_hand = F.cross_entropy(model.eval()(test.inputs), test.targets).item()
        assert own.test_loss.isna().tolist() == [True, True, True, False]
        assert own.test_loss.iloc[-1] == pytest.approx(by_hand, rel=1e-6)
        assert (own.trainable_parameters == history.trainable_parameters).all()
        assert own.seconds.iloc[0] == 0
        assert own.seconds.is_monotonic_increasing
        assert own.seconds.iloc[-1] > 0
    assert frame[frame.step == 6].test_loss.nunique() == 5


def test_the_table_says_what_was_run_and_where():
    frame = apart([Trial(LoRA(2, 4, targets=["hidden1", "head"]), 0.01, 3, steps=4, clip=None)])
    row = frame.iloc[-1]
    assert (row.method, row["rank"], row.alpha, row.targets, row.exclude) == ("lora", 2, 4, "hidden1, head", "")
    assert (row.lr, row.seed, row.steps, row.batch_size, row.warmup) == (0.01, 3, 4, 8, 0)
    assert math.isnan(row["clip"])
    assert (row.task, row.model) == (small_task().fingerprint, fingerprint(MODEL()))
    assert (row.outcome, row.reason, row.engine) == ("done", "", "separate")
    assert row.torch == torch.__version__
    assert row.device.endswith("cores")
    assert row.date.endswith("+00:00")


def test_eval_examples_limits_the_test_part_too():
    few, all_of_them = (apart(grid(ranks=(2,), seeds=(0,), eval_examples=n)) for n in (2, None))
    for n, frame in ((2, few), (5, all_of_them)):
        model = MODEL()
        fit(model, small_task(), LoRA(2, 4), steps=6, lr=0.01, batch_size=4)
        inputs, targets = small_task().test.inputs[:n], small_task().test.targets[:n]
        with torch.no_grad():
            assert frame.test_loss.iloc[-1] == pytest.approx(F.cross_entropy(model(inputs), targets).item(), rel=1e-6)


def test_order_and_repeats_of_trials_do_not_matter():
    trials = list(grid())
    same(apart(trials), apart(trials[::-1] + trials[:2]))


def test_a_model_serves_as_its_own_factory_and_stays_as_it_was():
    model = MODEL()
    before = copy.deepcopy(model.state_dict())
    same(apart(grid(), model=model), apart(grid()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "LoRA" not in repr(model)


@dataclasses.dataclass
class Smoothed:  # by its field it compares, so it cannot be hashed
    smoothing: float

    def __call__(self, model, inputs, targets):
        return F.cross_entropy(model(inputs), targets, label_smoothing=self.smoothing)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [Smoothed(0.1), lambda *batch: Smoothed(0.1)(*batch)], ids=["object", "lambda"])
def test_the_loss_may_be_anything_that_can_be_called_here_and_in_other_processes(loss, tmp_path, monkeypatch):
    def named(model, inputs, targets):
        return Smoothed(0.1)(model, inputs, targets)

    expected, task = apart(grid(), task=small_task(named)), small_task(loss)
    frame = apart(grid(seeds=(0,)), tmp_path, task=task, engine="auto")
    assert set(frame.engine) == {"separate"}  # for a pack it cannot be taken apart
    frame = apart(grid(), tmp_path, task=task, n_jobs=2)
    same(frame.drop(columns=["key", "task"]), expected.drop(columns=["key", "task"]))
    called = counting(monkeypatch)
    assert_frame_equal(apart(grid(), tmp_path, task=task), frame)
    assert called == []


def test_a_task_may_come_from_a_function_which_is_called_once():
    calls = []

    def make():
        calls.append(1)
        return small_task()

    same(apart(grid(), task=make), apart(grid()))
    assert len(calls) == 1


def test_ablate_neither_uses_nor_disturbs_the_global_generator():
    torch.manual_seed(1)
    first = apart(grid(methods=(LoRA(dropout=0.3),)))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    same(apart(grid(methods=(LoRA(dropout=0.3),))), first)
    assert torch.equal(torch.get_rng_state(), before)


# What the caller's judge says


def told(model, task):
    """A judge: a number and a text that tell models apart."""
    with torch.no_grad():
        said = model(task.test.inputs)  # (5, 10)
    return {"total": float(said.double().sum()), "classes": " ".join(map(str, said.argmax(1).tolist()))}


def by_hand(trial, model=MODEL, task=None):
    """What the judge says of the trial's model, trained here."""
    net, task = model(), task or small_task()
    fit(net, task, trial.method, config=trial)
    return told(net, task)


def test_a_judges_scores_are_those_of_the_trained_model_and_stand_in_its_last_row():
    trials = list(grid(ranks=(1, 3), lrs=(0.1,), eval_every=2))
    frame = apart(trials, judge=told)
    for trial in trials:
        own = frame[(frame["rank"] == trial.method.rank) & (frame.seed == trial.seed)]
        assert own.step.tolist() == [0, 2, 4, 6]
        for name, expected in by_hand(trial).items():
            assert own[f"score_{name}"].isna().tolist() == [True, True, True, False]
            assert own[f"score_{name}"].iloc[-1] == expected
    assert frame.score_total.dropna().nunique() == 4
    assert told(MODEL(), small_task())["total"] not in set(frame.score_total)
    columns = list(frame.columns)
    assert columns[columns.index("trainable_parameters") :][:4] == [
        "trainable_parameters",
        "score_classes",
        "score_total",
        "engine",
    ]


def test_scores_are_kept_in_the_folder_and_only_trials_that_lack_them_run_anew(tmp_path, monkeypatch):
    first = apart(grid(), tmp_path)
    called = counting(monkeypatch)
    assert_frame_equal(apart(grid(), tmp_path), first)
    assert called == []
    apart(grid(ranks=(1,)), tmp_path, judge=told)
    assert called == [(1, 0), (1, 1)]
    frame = apart(grid(ranks=(1, 3)), tmp_path, judge=told)
    assert called == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert_frame_equal(load(tmp_path), frame)
    last = frame[frame.step == frame.steps].set_index("key")
    for path in tmp_path.glob("*.json"):
        scores = json.loads(path.read_text())["scores"]
        assert scores == {"total": last.score_total[path.stem], "classes": last.score_classes[path.stem]}
    silent = lambda model, task: {}  # noqa: E731
    for judge in (told, None):  # who asks for none still sees what there is
        assert_frame_equal(apart(grid(), tmp_path, judge=judge), frame)
    assert len(called) == 4
    apart(grid(), tmp_path / "silent", judge=silent)
    apart(grid(), tmp_path / "silent", judge=lambda model, task: pytest.fail("asked again"))
    same(frame, apart(grid(), judge=told))


def test_a_judge_gives_numbers_and_texts_and_its_errors_stop_the_sweep(tmp_path):
    trials = grid(ranks=(1,), seeds=(0,))
    given = {"single": np.float32(0.5), "count": np.int64(7), "word": "yes", "none": None, "nan": math.nan}
    frame = apart(trials, tmp_path, judge=lambda model, task: given)
    assert frame.filter(like="score_").iloc[-1].dropna().to_dict() == {
        "score_single": 0.5,
        "score_count": 7,
        "score_word": "yes",
    }
    assert_frame_equal(load(tmp_path), frame)
    for wrong in ({"a": [1, 2]}, {1: 2}, {"a": 1j}):
        with pytest.raises(ValueError, match="what the judge gave"):
            apart(trials, judge=lambda model, task, wrong=wrong: wrong)

    def fails_on_three(model, task):
        if model.hidden1.rank == 3:
            raise KeyError("scores")
        return told(model, task)

    with pytest.raises(KeyError, match="scores"):
        apart(grid(), tmp_path / "runs", judge=fails_on_three)
    assert set(load(tmp_path / "runs")["rank"]) == {1}  # what has ended is kept


def test_scores_are_no_settings_to_a_verdict():
    frame = apart(grid(seeds=(0, 1, 2)), judge=told)
    bare = frame.drop(columns=["score_total", "score_classes"])
    assert smallest_sufficient_rank(frame, margin=0.5) == smallest_sufficient_rank(bare, margin=0.5)
    with pytest.raises(ValueError, match="The frame mixes total "):
        smallest_sufficient_rank(frame.rename(columns={"score_total": "total"}), margin=0.5)


# The folder


def test_one_file_a_trial_and_load_returns_the_same_table(tmp_path):
    frame = apart(grid(), tmp_path / "runs")
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {f"{key}.json" for key in frame.key.unique()}
    assert len(names) == 4
    assert_frame_equal(load(tmp_path / "runs"), frame)
    content = json.loads((tmp_path / "runs" / f"{frame.key[0]}.json").read_text())
    assert content["trial"]["method"]["rank"] == frame["rank"][0]
    assert [row["step"] for row in content["history"]["rows"]] == list(range(7))


def test_what_is_there_is_not_run_again_and_a_sweep_can_be_extended(tmp_path, monkeypatch):
    first = apart(grid(seeds=(0, 1)), tmp_path)
    called = counting(monkeypatch)
    assert_frame_equal(apart(grid(seeds=(0, 1)), tmp_path), first)
    assert called == []
    more = apart(grid(ranks=(1, 2, 3), seeds=(0, 1, 2)), tmp_path)
    assert sorted(called) == [(1, 2), (2, 0), (2, 1), (2, 2), (3, 2)]
    old = more[more.key.isin(first.key)].reset_index(drop=True)
    assert_frame_equal(old, first)  # dates and seconds too
    assert_frame_equal(load(tmp_path), more)
    assert_frame_equal(apart(grid(seeds=(0, 1)), tmp_path), first)  # of a larger folder, only what was asked for


def test_another_task_model_or_setting_is_another_trial(tmp_path, monkeypatch):
    apart(grid(ranks=(2,), seeds=(0,)), tmp_path)
    called = counting(monkeypatch)
    apart(grid(ranks=(2,), seeds=(0,)), tmp_path, model=functools.partial(DigitsMLP, width=16, seed=1))
    apart(grid(ranks=(2,), seeds=(0,)), tmp_path, task=small_task(n_train=11))
    apart(grid(ranks=(2,), seeds=(0,), clip=0.5), tmp_path)
    assert len(called) == 3
    assert len(list(tmp_path.glob("*.json"))) == 4


def test_a_folder_that_cannot_be_written_to_is_told_before_the_training_and_may_be_read(tmp_path, monkeypatch):
    frame = apart(grid(), tmp_path)

    def refuse(folder, **_):
        raise OSError(f"{folder} cannot be written to")

    monkeypatch.setattr("lora_lab.ablation.run.check_writable", refuse)
    assert_frame_equal(apart(grid(), tmp_path), frame)  # nothing is left to be trained
    next(tmp_path.glob("*.json")).unlink()
    monkeypatch.setattr("lora_lab.ablation.run.fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(OSError, match="cannot be written to"):
        apart(grid(), tmp_path)


def with_content(change):
    """A harm to a result: its content is changed."""

    def harm(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return harm


REFUSED_FILES = [
    (lambda path: path.write_text(path.read_text()[:200]), "is not JSON"),
    (lambda path: path.write_bytes(b"\xff\x00"), "is not JSON"),
    (lambda path: path.write_text("[" * 100_000), "is not JSON"),
    (lambda path: path.write_text("[]"), "must be a valid dictionary"),
    (lambda path: shutil.copy(path, path.with_stem(f"{path.stem} copy")), "do not belong together"),
    (with_content(lambda it: it["trial"].update(seed=7)), "do not belong together"),
    (with_content(lambda it: it["trial"]["method"].update(name="x")), "do not belong together"),
    (with_content(lambda it: it["trial"].update(lr=math.nan)), "JSON"),
    (with_content(lambda it: it.update(trial=None)), "trial is None"),
    (with_content(lambda it: it.update(outcome="banana")), "outcome is 'banana'"),
    (with_content(lambda it: it.update(outcome="failed")), "outcome is 'failed'"),
    (with_content(lambda it: it.update(outcome="stopped", reason="slow")), r"has \['history', 'reason', 'test_loss'\]"),
    (with_content(lambda it: it.update(history=None)), "outcome is 'done'"),
    (with_content(lambda it: it["history"]["rows"].pop()), "has 6 rows, but 6 steps make 7"),
    (with_content(lambda it: it["history"]["rows"][-1].update(validation_loss=None)), "has no validation_loss"),
    (with_content(lambda it: it.update(test_loss=math.nan)), "test_loss is nan"),
    (with_content(lambda it: it.pop("test_loss")), "test_loss"),
    (with_content(lambda it: it["history"]["rows"].pop(2)), "Row 2 is of step 3"),
    (with_content(lambda it: it.update(scores={"a": [1]})), "scores"),
    (with_content(lambda it: it.update(provenance={"torch": 2})), "provenance.torch is 2"),
]


def test_a_damaged_file_is_named_with_what_to_do_and_without_it_the_sweep_goes_on(tmp_path):
    frame = apart(grid(ranks=(1,)), tmp_path)
    path = tmp_path / f"{frame.key[0]}.json"
    whole = path.read_bytes()
    for harm, says in REFUSED_FILES:
        harm(path)
        with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.*{says}.*delete it"):
            load(tmp_path)
        for copy_of_it in tmp_path.glob("* copy.json"):
            copy_of_it.unlink()
        path.write_bytes(whole)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        apart(grid(ranks=(1,)), tmp_path)
    path.unlink()
    (tmp_path / ".0123-abc.json").write_text("{")  # of a killed write, which is passed over
    same(apart(grid(ranks=(1,)), tmp_path), frame)
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match=r"holds no results .* run ablate with this folder first"):
            load(folder)


# Trials that fail


def test_a_diverged_trial_is_recorded_with_its_reason_and_the_others_go_on(tmp_path, monkeypatch):
    trials = grid(lrs=(1e30, 0.01), seeds=(0,), warmup=0)
    frame = apart(trials, tmp_path)
    failed, done = frame[frame.outcome == "failed"], frame[frame.outcome == "done"]
    assert len(failed) == 2
    assert failed.lr.tolist() == [1e30, 1e30]
    assert failed.reason.str.contains("loss is (?:nan|inf) at step .*lower the learning rate").all()
    assert failed[["step", "validation_loss", "test_loss"]].isna().all(axis=None)
    same(done.reset_index(drop=True), apart(grid(lrs=(0.01,), seeds=(0,), warmup=0)))
    called = counting(monkeypatch)
    assert_frame_equal(apart(trials, tmp_path), frame)
    assert called == []  # a failure is a result
    for key in failed.key:
        (tmp_path / f"{key}.json").unlink()
    apart(trials, tmp_path)
    assert called == [(1, 0), (3, 0)]  # until its file is deleted


def test_a_loss_that_is_no_number_on_the_test_part_is_a_failure():
    task = small_task()
    task.test.inputs[0] = math.inf
    frame = apart(grid(seeds=(0,)), task=task)
    assert frame.outcome.tolist() == ["failed", "failed"]
    assert frame.reason.str.startswith("The test loss is nan").all()


def out_of_memory_of_python():
    raise MemoryError("Python's own")


def out_of_memory_of_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def out_of_memory_of_a_cpu():
    torch.empty(2**55)  # torch's own error, whatever it is


@pytest.mark.parametrize("exhaust", [out_of_memory_of_python, out_of_memory_of_a_gpu, out_of_memory_of_a_cpu])
def test_out_of_memory_is_recorded_and_the_others_go_on(exhaust, tmp_path, monkeypatch):
    def greedy(model, task, method, **options):
        if method.rank == 3:
            exhaust()
        return fit(model, task, method, **options)

    monkeypatch.setattr(run, "fit", greedy)
    frame = apart(grid(ranks=(1, 3, 5), seeds=(0,)), tmp_path)
    assert frame.groupby("rank").outcome.first().tolist() == ["done", "failed", "done"]
    assert frame[frame["rank"] == 3].reason.str.startswith("out of memory: ").all()


# Interrupts and kills


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("Ctrl-C"), TimeoutError("the disk is slow"), ValueError("another")], ids=repr
)
def test_what_stops_a_sweep_leaves_a_folder_that_goes_on(error, tmp_path, monkeypatch):
    whole = apart(grid())

    def interrupted(model, task, method, **options):
        if (method.rank, options["config"].seed) == (3, 0):
            raise error
        return fit(model, task, method, **options)

    monkeypatch.setattr(run, "fit", interrupted)
    with pytest.raises(type(error), match=str(error)):
        apart(grid(), tmp_path)
    assert len(load(tmp_path).key.unique()) == 2
    called = counting(monkeypatch)
    same(apart(grid(), tmp_path), whole)
    assert called == [(3, 0), (3, 1)]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def sweeping(folder, number, seconds):
    """A process of its own that runs eight trials in a folder, and lingers in the trial of a number for seconds.

    It lingers when that trial has been trained, but nothing of it is written.
    """
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.ablation.test_run import EIGHT, apart, fit, run

trained = []

def lingering(*arguments, **options):
    history = fit(*arguments, **options)
    trained.append(history)
    time.sleep({seconds} if len(trained) == {number} else 0)
    return history

run.fit = lingering
apart(EIGHT, {str(folder)!r})
"""
    return subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"})


EIGHT = grid(ranks=(1, 3), seeds=range(4))


@pytest.fixture(scope="module")
def eight():
    """The table of the eight trials."""
    return apart(EIGHT)


@pytest.mark.slow
def test_a_killed_process_loses_no_more_than_the_running_trial(eight, tmp_path, monkeypatch):
    process = sweeping(tmp_path, number=4, seconds=60)
    wait_for(lambda: len(list(tmp_path.glob("[!.]*.json"))) >= 3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = load(tmp_path)  # every file is whole
    count = left.key.nunique()
    assert count == 3
    called = counting(monkeypatch)
    frame = apart(EIGHT, tmp_path)
    assert len(called) == 8 - count
    assert_frame_equal(frame[frame.key.isin(left.key)].reset_index(drop=True), left)
    same(frame, eight)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot stop a process and let it go on")
def test_two_sweeps_at_once_in_one_folder_of_which_one_sleeps_lose_nothing(eight, tmp_path):
    sleeper = sweeping(tmp_path, number=3, seconds=2)  # time to stop it in
    wait_for(lambda: len(list(tmp_path.glob("[!.]*.json"))) >= 2)
    sleeper.send_signal(signal.SIGSTOP)
    assert len(load(tmp_path).key.unique()) == 2
    frame = apart(EIGHT, tmp_path)  # it waits for nobody
    same(frame, eight)
    sleeper.send_signal(signal.SIGCONT)
    assert sleeper.wait(timeout=60) == 0
    same(load(tmp_path), frame)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}


# Elsewhere


@pytest.mark.slow
def test_joblib_processes_give_the_same_numbers_as_this_one(tmp_path):
    here = os.getpid()

    def make():  # a function of a notebook: it travels by its value
        if os.getpid() != here:
            (tmp_path / f"pid{os.getpid()}").touch()
            time.sleep(0.1)  # so that no worker can do it all
        return small_task()

    def judge(model, task):
        return told(model.eval(), task)

    trials = grid(ranks=(1, 3), lrs=(0.01, 1e30), seeds=(0, 1), warmup=0, methods=[LoRA(dropout=0.2)])
    expected = apart(trials, task=make, judge=judge)
    assert not list(tmp_path.glob("pid*"))
    frame = apart(trials, tmp_path / "runs", task=make, n_jobs=2, judge=judge)
    same(frame, expected)
    assert_frame_equal(load(tmp_path / "runs"), frame)
    assert list(tmp_path.glob("pid*"))
    with joblib.parallel_config(backend="loky", n_jobs=2):
        same(apart(trials, task=make, judge=judge), expected)


def test_a_worker_computes_with_one_thread_and_this_process_with_its_own():
    seen = set()

    def loss(model, inputs, targets):
        seen.add(torch.get_num_threads())
        return F.cross_entropy(model(inputs), targets)

    task = small_task(loss)
    identity = {"task": task.fingerprint, "model": fingerprint(MODEL())}
    trial = dataclasses.replace(grid()[0], **identity)
    torch.set_num_threads(2)
    for home, threads in ((("another machine", os.getpid()), 1), ((run._here()[0], 0), 1), (run._here(), 2)):
        seen.clear()
        run._run(run._Job(MODEL, task, [trial], False, "separate", home))
        assert seen == {threads}
        assert torch.get_num_threads() == 2


def test_a_silent_worker_is_an_error_in_the_end(tmp_path):
    here = os.getpid()

    def make():
        if os.getpid() != here and (tmp_path / "go").exists():
            time.sleep(30)
        return MODEL()

    apart(grid(seeds=(0,)), tmp_path, model=make, n_jobs=2, timeout_s=30)
    (tmp_path / "go").touch()
    with pytest.raises(RuntimeError, match=r"No trial ended for 0\.5 s.*What has ended is kept"):
        apart(grid(), tmp_path, model=make, n_jobs=2, timeout_s=0.5)
    assert load(tmp_path).seed.unique().tolist() == [0]


@pytest.mark.slow
def test_a_worker_ended_by_the_system_is_told():
    here = os.getpid()

    def make():
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return MODEL()

    with pytest.raises(RuntimeError, match="The system ended a worker, most likely for lack of memory"):
        apart(grid(), model=make, n_jobs=2)


def test_two_trials_in_one_process_at_a_time_are_refused_however_they_came_there():
    trials = [dataclasses.replace(each, task="t", model="m") for each in grid()]
    work = run._Job(MODEL, small_task(), trials, False, "separate", run._here())
    with run._BUSY, pytest.raises(RuntimeError, match="Two trials were started at the same time"):
        run._run(work)
    with pytest.raises(RuntimeError, match="has the fingerprint"):  # and the lock is free again
        run._run(work)


def in_threads():
    with joblib.parallel_config(backend="threading", n_jobs=2):
        apart(grid())


def of_another_task():
    trial = dataclasses.replace(grid()[0], task=small_task(n_train=5).fingerprint, model=fingerprint(MODEL()))
    run._run(run._Job(MODEL, small_task(), [trial], False, "separate", run._here()))


def with_other_weights():
    seeds = iter(range(99))
    apart(grid(), model=lambda: DigitsMLP(width=16, seed=next(seeds)))


ELSEWHERE = [  # the call, the error, and what must be named
    (in_threads, ValueError, "ThreadingBackend .* use processes"),
    (of_another_task, RuntimeError, "'small' made here .* same files and versions"),
    (with_other_weights, RuntimeError, "The model made here .* seed what is random"),
]


@pytest.mark.parametrize(("call", "error", "named"), ELSEWHERE)
def test_what_would_be_other_numbers_elsewhere_is_refused(call, error, named):
    with pytest.raises(error, match=named):
        call()


@pytest.fixture(scope="module")
def cluster():
    """(cluster, client) of two worker processes."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, memory_limit=0
        ) as made,
        distributed.Client(made) as client,
    ):
        yield made, client


def on_dask(client, *arguments, **options):
    with joblib.parallel_config(backend="dask", client=client):
        return apart(*arguments, **options)


@pytest.mark.slow
def test_a_dask_cluster_loses_a_worker_in_mid_sweep_and_gives_every_result(cluster, tmp_path):
    _, client = cluster
    here, starts, runs = os.getpid(), tmp_path / "starts", tmp_path / "runs"
    starts.mkdir()
    client.wait_for_workers(2)
    victim = next(iter(client.run(os.getpid).values()))
    assert victim != here

    def make():
        if os.getpid() != here:
            (starts / f"{os.getpid()}-{time.time_ns()}").touch()
        if os.getpid() == victim:
            time.sleep(60)  # its first trial goes on until it is killed
        return MODEL()

    def kill():
        wait_for(lambda: list(starts.glob(f"{victim}-*")) and len(list(runs.glob("[!.]*.json"))) >= 2)
        os.kill(victim, signal.SIGKILL)

    trials = grid(ranks=(1, 3), seeds=range(4))
    expected = apart(trials)
    killer = threading.Thread(target=kill)
    killer.start()
    frame = on_dask(client, trials, runs, model=make)
    killer.join()
    same(frame, expected)
    assert_frame_equal(load(runs), frame)
    assert len(list(starts.iterdir())) == len(trials) + 1  # the lost trial, and no other, was started once more


# Packing


def fake_packs(monkeypatch, most=99, refuse=lambda trials: False):
    """A pack that runs its trials one by one, and the sizes of the packs that were asked for."""
    sizes = []

    def fit_packed(model, task, trials, **_):
        sizes.append(len(trials))
        if refuse(trials):
            raise packed.PackingError("these cannot be packed after all")
        if len(trials) > most:
            raise MemoryError(f"{len(trials)} are too many")
        results = []
        for one in trials:
            own = copy.deepcopy(model)
            try:
                history = fit(own, task, one.method, one)
            except run.DivergedError as error:
                results.append(packed.PackedResult(None, error))
            else:
                results.append(packed.PackedResult(history, adapter=adapter_state(own)))
        return results

    monkeypatch.setattr(packed, "fit_packed", fit_packed)
    return sizes


def test_auto_packs_what_agrees_and_runs_the_rest_apart(monkeypatch):
    trials = [
        *grid(ranks=(1, 3), seeds=(0, 1)),  # these four and
        *grid(ranks=(2,), lrs=(0.03, 1e30), seeds=(2,)),  # these two agree
        *grid(ranks=(1, 3), seeds=(0,), steps=4),
        *grid(ranks=(1, 3), seeds=(0,), methods=[LoRA(targets=["head"])]),
        *grid(ranks=(1,), seeds=(0,), methods=[DoRA(), LoRA(dropout=0.1), FullFineTuning()]),
        *grid(ranks=(2,), seeds=(0,), batch_size=3),  # alone
    ]
    expected = apart(trials)
    called, sizes = counting(monkeypatch), fake_packs(monkeypatch)
    monkeypatch.setattr(
        run, "fit", lambda model, task, method, **o: called.append(method) or fit(model, task, method, **o)
    )
    frame = apart(trials, engine="auto")
    same(frame, expected)
    assert sorted(sizes) == [2, 2, 6]
    assert len(called) == 4
    engines = frame.groupby("key").engine.first().value_counts().to_dict()
    assert engines == {"pack of 6": 6, "pack of 2": 4, "separate": 4}


@pytest.fixture
def free_bytes(monkeypatch):
    """Sets how much memory is free, for models of which none counts as small."""
    monkeypatch.setattr(run, "_SMALL", 0)
    return lambda count: monkeypatch.setattr(run.psutil, "virtual_memory", lambda: SimpleNamespace(available=count))


def test_packs_fit_half_of_the_free_memory_and_the_frozen_weights_count_once(free_bytes, monkeypatch):
    sizes = fake_packs(monkeypatch)
    trials = grid(ranks=(1, 4), seeds=range(6), steps=1)
    task, model = small_task(), MODEL()
    frozen = sum(p.numel() * p.element_size() for p in model.parameters())
    bill = run.predict(model, LoRA(4, 8), batch=(task.train.inputs[:4], task.train.targets[:4]))
    assert bill.parts["frozen weights"] == frozen
    own = bill.peak_bytes - frozen
    for count, expected in ((12, [12]), (11, [5, 7]), (5, [3, 4, 5]), (2, [2] * 6), (1, [])):
        sizes.clear()
        free_bytes(2 * (frozen + count * own))
        apart(trials, engine="auto")
        assert sizes == expected
    free_bytes(2 * (frozen + 2 * own - 1))
    apart(trials, engine="auto")
    assert sizes == []
    monkeypatch.setattr(run, "_SMALL", 100_000)
    apart(trials, engine="auto")
    assert sizes == [12]


def sizes_of(trials, workers=1, model=None):
    """How many trials each planned job has, a pack if there are several."""
    plan = run.plan(model or MODEL(), small_task(), list(trials), "auto", workers)
    assert sorted(trial.key for job, _ in plan for trial in job) == sorted(trial.key for trial in trials)
    assert all(together == (len(job) > 1) for job, together in plan)
    return [len(job) for job, _ in plan]


def test_a_pack_of_long_trials_is_small_unless_its_model_is(free_bytes, monkeypatch):
    def of_steps(steps, model=None):
        return sizes_of(grid(seeds=range(3), steps=steps), model=model)

    free_bytes(2**31)
    assert [of_steps(steps) for steps in (500, 1000, 1500, 5000)] == [[6], [3, 3], [2, 2, 2], [1] * 6]
    assert of_steps(5000, MODEL().to("meta")) == [6]  # as on a GPU, where an hour has far more steps
    monkeypatch.setattr(run, "_SMALL", 100_000)
    assert of_steps(5000) == [6]  # the whole study takes seconds


def test_packs_are_shared_among_workers_and_bounded():
    for count, workers, expected in (
        (12, 1, [12]),
        (12, 2, [5, 7]),  # of rank 4, and of both: about the same work
        (12, 5, [2, 2, 2, 3, 3]),
        (12, 12, [1] * 12),
        (100, 1, [22, 21, 27, 30]),
    ):
        assert sizes_of(grid(ranks=(1, 4), seeds=range(count // 2)), workers=workers) == expected
    plan = run.plan(MODEL(), small_task(), list(grid(ranks=(1, 4), seeds=range(6))), "auto", 2)
    ranks = [[trial.method.rank for trial in job] for job, _ in plan]
    assert ranks == [[4] * 5, [4] + [1] * 6]  # which pad each other little


def test_a_pack_too_large_for_the_memory_is_halved(monkeypatch):
    sizes = fake_packs(monkeypatch, most=2)
    same(apart(grid(seeds=range(4)), engine="auto"), apart(grid(seeds=range(4))))
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    fake_packs(monkeypatch, most=0)
    frame = apart(grid(), engine="packed")
    assert frame.reason.tolist() == ["out of memory: 1 are too many"] * 4


def test_what_only_the_attempt_shows_to_be_no_pack_runs_apart(monkeypatch):
    sizes = fake_packs(monkeypatch, refuse=lambda trials: True)
    frame = apart(grid(), engine="auto")
    same(frame, apart(grid()))
    assert sizes == [4]
    assert set(frame.engine) == {"separate"}
    with pytest.raises(ValueError, match="cannot be packed after all"):
        apart(grid(), engine="packed")


def test_packed_refuses_with_the_reason_and_packs_even_one():
    with pytest.raises(ValueError, match=r"engine is 'packed', but DoRA\(rank=1.* cannot be packed: Method 'dora'"):
        apart(grid(methods=[LoRA(), DoRA()]), engine="packed")
    frame = apart(grid(ranks=(2,), seeds=(0,)), engine="packed")
    assert set(frame.engine) == {"pack of 1"}


def double_task():
    task = small_task()
    parts = {
        part: Examples(examples.inputs.double(), F.one_hot(examples.targets, 10).double())
        for part, examples in task.parts.items()
    }
    return Task("double", **parts, loss=mean_squared_error)


def test_the_real_packs_give_the_numbers_and_scores_of_trials_run_apart(tmp_path):
    def make():
        return MODEL().double()

    trials = grid(ranks=(1, 3), lrs=(0.01, 1e200), seeds=(0, 1), steps=20, warmup=0)
    separate = apart(trials, task=double_task(), model=make, judge=told)
    together = apart(trials, tmp_path, task=double_task(), model=make, engine="packed", judge=told)
    assert set(together.engine) == {"pack of 8"}
    assert (separate.outcome == together.outcome).all()
    assert (separate.key == together.key).all()
    numbers = ["train_loss", "validation_loss", "off_domain_loss", "test_loss", "score_total"]
    np.testing.assert_allclose(together[numbers], separate[numbers], rtol=1e-9)
    assert together.score_classes.fillna("").tolist() == separate.score_classes.fillna("").tolist()
    assert_frame_equal(load(tmp_path), together, check_like=True)
    for name in ("test_loss", "score_total"):
        assert separate[separate.outcome == "done"].groupby("key")[name].last().nunique() == 4
    for trial in trials:
        if trial.lr < 1:
            own = together[(together["rank"] == trial.method.rank) & (together.seed == trial.seed)]
            expected = by_hand(trial, make, double_task())["total"]
            assert own.score_total.dropna().tolist() == pytest.approx([expected], rel=1e-9)


def language_model(config):
    return Llama(dataclasses.replace(config, hidden_size=64, intermediate_size=64, head_dim=16), seed=3)


def in_blocks(config):
    model = language_model(config)
    quantize_nf4(model)
    return model


def tokens():
    ids = torch.randint(0, 260, (20, 7), generator=torch.Generator().manual_seed(0))
    parts = {"train": slice(0, 12), "validation": slice(12, 15), "test": slice(15, 18), "off_domain": slice(18, 20)}
    return Task(
        "tokens", **{name: Examples(ids[rows, :-1], ids[rows, 1:]) for name, rows in parts.items()}, unit="tokens"
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [language_model, in_blocks])
@pytest.mark.parametrize(
    "step",
    [
        {"lean": Lean()},
        {"lean": Lean(torch.bfloat16, checkpoint=True, threads=2)},
        {"gradient_checkpointing": True},
    ],
    ids=["lean", "bfloat16", "checkpointing"],
)
def test_trials_take_the_steps_that_fit_takes(tiny_config, make, step, tmp_path):
    model, task = make(tiny_config), tokens()
    options = {"steps": 4, "batch_size": 4}  # the last step is of another epoch
    trials = [Trial(LoRA(rank, 2 * rank), 0.01, seed, **options, **step) for seed, rank in enumerate((1, 3))]
    frames = {
        engine: ablate(model, task, trials, tmp_path / engine, engine=engine, progress=False, judge=of_validation)
        for engine in ("separate", "packed")
    }
    tolerance = 2e-2 if step.get("lean") == Lean(torch.bfloat16, True, 2) and make is language_model else 1e-3
    for one in trials:
        twin = copy.deepcopy(model)
        history = fit(twin, task, one.method, lr=one.lr, seed=one.seed, **options, **step)
        for engine, frame in frames.items():
            stored = json.loads((tmp_path / engine / f"{frame.key.iloc[0]}.json").read_text())
            assert stored["history"]["settings"].get("lean") == history.settings.get("lean")
            rows = frame[(frame["rank"] == one.method.rank) & (frame.seed == one.seed)]
            exact = {"rtol": 0} if engine == "separate" else {"rtol": tolerance}
            np.testing.assert_allclose(rows.validation_loss, history.curve("validation_loss")[1], **exact)
            np.testing.assert_allclose(rows.score_loss.iloc[-1], rows.validation_loss.iloc[-1], rtol=tolerance)
            np.testing.assert_allclose(rows.test_loss.iloc[-1], evaluate(twin, task, "test", 4), **exact)
    assert set(frames["packed"].engine) == {"pack of 2"}


def test_trials_under_autocast_train_one_by_one_beside_packs(tiny_config, tmp_path):
    model, task = language_model(tiny_config), tokens()
    options = {"steps": 2, "batch_size": 4}
    trials = [Trial(LoRA(2), 0.01, seed, autocast=on, **options) for seed in (0, 1) for on in (None, torch.bfloat16)]
    frame = ablate(model, task, trials, tmp_path, progress=False, judge=of_validation).groupby("key").last()
    assert sorted(zip(frame.autocast, frame.engine, strict=True)) == [
        *[("none", "pack of 2")] * 2,
        *[("torch.bfloat16", "separate")] * 2,
    ]
    twin = copy.deepcopy(model)
    history = fit(twin, task, LoRA(2), lr=0.01, seed=1, autocast=torch.bfloat16, **options)
    found = frame[(frame.autocast == "torch.bfloat16") & (frame.seed == 1)]
    assert found.validation_loss.item() == history.rows[-1]["validation_loss"]
    halved = dataclasses.replace(task, loss=in_autocast(task.loss, trials[1].autocast))
    assert found.test_loss.item() == evaluate(twin, halved, "test", 4) != evaluate(twin, task, "test", 4)
    assert found.score_loss.item() == evaluate(twin, halved, "validation", 4)
    with pytest.raises(ValueError, match=r"engine is 'packed', but .* cannot be packed: .* without autocast"):
        ablate(model, task, trials, engine="packed", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("step", [{"lean": Lean(torch.bfloat16, threads=2)}, {"gradient_checkpointing": True}], ids=str)
def test_trials_of_every_step_pause_and_go_on_bit_for_bit(tiny_config, step, tmp_path, monkeypatch):
    model, task, pauses = language_model(tiny_config), tokens(), []
    save = run.checkpoint.save
    monkeypatch.setattr(run.checkpoint, "save", lambda *arguments: pauses.append(save(*arguments)))
    trials = grid(ranks=(2,), lrs=(0.01, 0.02), seeds=(0,), steps=4, eval_every=1, warmup=0, **step)
    whole = ablate(model, task, trials, engine="separate", progress=False)
    assert not pauses
    never_stopping = Halving(rungs=[0.5], slack=100)
    paused = ablate(model, task, trials, tmp_path, halving=never_stopping, progress=False)
    assert len(pauses) >= len(trials)
    losses = ["train_loss", "validation_loss", "test_loss"]
    assert_frame_equal(paused[losses], whole[losses])
    assert set(paused.outcome) == {"done"}
    assert paused.groupby("lr").validation_loss.last().nunique() == 2


def of_validation(model, task):
    return {"loss": evaluate(model, task, "validation", 4)}


# What a model is


def test_a_models_fingerprint_sees_every_weight_and_setting_and_no_more():
    class Net(nn.Module):
        def __init__(self, p=0.1):
            super().__init__()
            self.layer, self.drop, self.norm = nn.Linear(3, 2), nn.Dropout(p), nn.BatchNorm1d(2)
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.fill_(0.5)

    def of(change=lambda net: None, **options):
        net = Net(**options)
        change(net)
        return fingerprint(net)

    def nudge(net):
        with torch.no_grad():
            net.layer.weight[1, 2] = float(np.nextafter(np.float32(0.5), 1))

    others = [
        of(nudge),
        of(lambda net: net.double()),
        of(lambda net: net.bfloat16()),
        of(lambda net: net.norm.running_mean.add_(1)),
        of(lambda net: net.layer.requires_grad_(False)),
        of(lambda net: setattr(net, "drop", nn.AlphaDropout(0.1))),
        of(p=0.2),
    ]
    assert len({of(), *others}) == len(others) + 1
    assert of() == of(lambda net: net.eval()) == of(lambda net: net.layer.weight.sum().backward())


# Arguments


def test_arguments_of_wrong_values_are_refused(monkeypatch):
    called = counting(monkeypatch)
    refused = [
        ({"engine": "fast"}, "engine is 'fast'"),
        ({"engine": "packed", "halving": Halving()}, "engine is 'packed'"),
        ({"trials": []}, "number of trials is 0"),
        ({"trials": grid(lean=Lean())}, "The lean step is built for lora_lab's Llama"),
        ({"trials": grid(gradient_checkpointing=True)}, "has no method gradient_checkpointing_enable"),
    ]
    for changes, says in refused:
        with pytest.raises(ValueError, match=says):
            ablate(**{"model_factory": MODEL, "task": small_task(), "trials": grid(), **changes})
    assert not called


# What does not go together


def test_a_task_of_another_tokenizer_stops_a_sweep_before_it_begins(tiny_config, tmp_path):
    part = Examples(torch.full((4, 8), tiny_config.vocab_size), torch.zeros(4, 8, dtype=torch.long))
    task = Task("words", part, part, part, part, unit="tokens")
    with pytest.raises(ValueError, match="the token 260"):
        ablate(Llama(tiny_config), task, Grid([1], [1e-2], [0], steps=1), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_several_models_or_tasks_is_warned_of(tmp_path):
    for seed, count in ((0, 8), (0, 12), (1, 12)):
        trials = Grid([1], [1e-2], [0], steps=1, eval_examples=4)
        ablate(DigitsMLP(width=16, seed=seed), small_task().limited(count), trials, tmp_path / f"{seed}")
    with pytest.warns(UserWarning, match="0 holds results of 2 tasks; compare only rows with equal values in task"):
        assert load(tmp_path / "0").task.nunique() == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "1")
    for path in (tmp_path / "1").iterdir():
        path.rename(tmp_path / "0" / path.name)
    with pytest.warns(UserWarning, match="of 2 models; .* in model"), pytest.warns(UserWarning, match="of 2 tasks"):
        load(tmp_path / "0")
