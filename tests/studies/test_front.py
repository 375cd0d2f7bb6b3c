"""What the study of forgetting rehearses, measures and writes, in few steps of a small base."""

from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch

from lora_lab import FullFineTuning, LoRA, evaluate, fit, load_pretrained
from lora_lab.analysis.divergence import mean_divergence
from lora_lab.models.pretrained import load_tokenizer
from lora_lab.studies import front
from lora_lab.studies.front import Distance
from lora_lab.tasks.pages import corpora

CPU = torch.device("cpu")
BASE = "tiny-64-0"


@pytest.fixture(scope="module")
def task():
    return front.make_front_task(BASE, "no replay")


def test_all_rates_of_eight_seeds_are_measured_every_ten_steps():
    sweeps = list(front.plan_tiny_front(CPU))
    assert len({sweep.data for sweep in sweeps}) == len(sweeps) == 4 * 3
    for sweep in sweeps:
        assert not sweep.choosing
        assert len(sweep.judging) == 8
        assert sweep.about == {"data": sweep.data}
        for trial, lrs in sweep.setups.values():
            assert len(lrs) == 3
            assert (trial.steps, trial.eval_every, trial.eval_examples) == (240, 10, None)
    assert set(sweeps[0].setups) == {"full", "blocks", "r=8", "r=64"}


def test_rows_have_six_decimals_and_name_their_commit_once():
    rows = {"step": [0, 10], "steps": 10, "lr": 1.5e-3, "validation_loss": [3.06256398, 2.5], "commit": "abc"}
    shown = front.shorten(pandas.DataFrame(rows))
    assert shown["validation_loss"].tolist() == [3.062564, 2.5]
    assert shown["commit"].isna().tolist() == [True, False]
    assert shown["lr"].tolist() == [1.5e-3] * 2


def test_a_fifth_of_what_is_trained_on_is_rehearsed_and_judges_nothing(task):
    for replay, samples in (("replay of what it read", front.read(BASE)), ("replay of what it wrote", None)):
        rehearsed = front.make_front_task(BASE, replay)
        more = len(rehearsed.train) - len(task.train)
        assert more / len(rehearsed.train) == pytest.approx(0.2, abs=1e-3)
        added = {tuple(row) for row in rehearsed.train.inputs[len(task.train) :].tolist()}
        assert len(added) == 100
        assert not added & {tuple(row) for row in rehearsed.off_domain.inputs.tolist()}
        assert samples is None or added == {tuple(row) for row in samples.inputs.tolist()}


def test_what_is_read_is_of_pages_of_the_kind_that_the_base_knows():
    known = [page.text for page in corpora()["known"]]
    text = load_tokenizer(BASE).decode(front.read(BASE).inputs[0].tolist())
    assert sum(page.startswith(text) for page in known) == 1


def test_what_it_writes_is_likely_to_it():
    task = front.make_front_task(BASE, "no replay")
    model, own = load_pretrained(BASE)[0], front.write(BASE)
    random = torch.randint(0, 1024, own.inputs.shape, generator=torch.Generator().manual_seed(0))
    written, drawn, read = (
        evaluate(model, replace(task, off_domain=part), "off_domain")
        for part in (own, replace(own, targets=random), task.off_domain)
    )
    assert abs(written - read) < 1 < drawn - written


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(4, 8)], ids=["full", "LoRA"])
def test_the_judge_measures_how_far_a_model_has_moved(task, method):
    few = replace(task, validation=task.validation[:8], off_domain=task.off_domain[:8])
    model, base = load_pretrained(BASE)[0], load_pretrained(BASE)[0]
    scores = Distance(BASE)(model, few)
    assert (scores["size"], scores["divergence"]) == (0, pytest.approx(0, abs=1e-6))
    fit(model, few, method, lr=1e-2, steps=4, batch_size=8, eval_every=4, progress=False)
    scores = Distance(BASE)(model, few)
    assert scores["divergence"] == pytest.approx(mean_divergence(base, model, few), rel=1e-5)
    assert scores["divergence"] > 0.01
    assert ("new, 0.5" in scores) == isinstance(method, LoRA)
    if isinstance(method, LoRA):
        before, after = (evaluate(each, few, "off_domain") for each in (base, model))
        assert abs(scores["old, 0.25"] - before) < abs(scores["old, 0.75"] - before)
        assert abs(scores["old, 0.75"] - after) < abs(scores["old, 0.25"] - after)
    else:
        weights, old = model.state_dict(), base.state_dict()
        matrices = [name for name in weights if weights[name].ndim == 2 and name != "lm_head.weight"]
        square = sum(float((weights[name] - old[name]).square().sum()) for name in matrices)
        assert scores["size"] == pytest.approx(square**0.5, rel=1e-4)


@pytest.mark.slow
def test_rows_hold_a_curve_and_no_empty_columns(small_world):
    sweep = next(front.plan_tiny_front(CPU))
    setups = {
        name: (replace(trial, steps=4, eval_every=2, warmup=1), lrs[:1]) for name, (trial, lrs) in sweep.setups.items()
    }
    rows = list(replace(sweep, setups=setups, judging=[2]).rows(CPU, Path("runs")))
    assert [(row["setup"], row["step"]) for row in rows] == [(name, step) for name in setups for step in (0, 2, 4)]
    assert all(None not in row.values() for row in rows)
    assert ["commit" in row for row in rows] == [row["step"] == 4 for row in rows]
    last = {row["setup"]: row for row in rows if row["step"] == 4}
    assert "score_old, 0.25" in last["r=8"]
    assert "score_old, 0.25" not in last["full"]
    assert last["full"]["score_size"] > 0
