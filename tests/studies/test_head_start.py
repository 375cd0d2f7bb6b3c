"""What `lora-lab record head_start` runs, with fewer cases, and what it writes, says and plans."""

import dataclasses
import io
import re
from contextlib import redirect_stdout
from functools import partial

import pandas
import pytest
import torch

from lora_lab import FullFineTuning, claims, cli, evaluate, fit, records, tasks
from lora_lab.ablation import studies
from lora_lab.models.digits import DigitsMLP
from lora_lab.models.llama import Llama
from lora_lab.studies import curves, recorder
from lora_lab.studies.claims.compared import DOCS, FINE_TUNED, FROM_SCRATCH, LONGER
from lora_lab.tasks.arrays import CHANGES
from tests.studies.conftest import counting_on

slow = pytest.mark.slow  # the first test takes no time

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REAL_PLAN = curves.plan_head_start


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
    of_eight = {"about": docs.about | {"n_train": 8}, "task": partial(curves.draw_text, 8)}
    return [
        dataclasses.replace(digits, setups=of_digits, **seeds),
        dataclasses.replace(docs, setups=of_docs, **of_eight, **seeds),
    ]


@pytest.fixture(scope="module")
def record(small_world, tiny_config):
    """One run of the command, in which the real model is a tiny one and its text counts on."""
    small_world.setattr(studies, "language_model", lambda device=None: Llama(tiny_config, seed=3))
    small_world.setattr(studies, "random_init", lambda device=None, seed=0: Llama(tiny_config, seed=100 + seed))
    small_world.setattr(studies, "docs_task", counting_on)
    small_world.setattr(curves, "TEXT_LENGTH", 9)
    made = recorder.record_sweeps("head_start", few)
    small_world.setattr(curves, "HEAD_START", made)
    with redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["record", "head_start", "--device", "cpu", "--out", "records"]) == 0
    (record,) = records.load_all("head_start", "records").values()
    assert re.search(r"inverted +MLP +from scratch, longer +judging .*n_train 40 +lr 0.00", printed.getvalue())
    assert [case["about"]["data"] for case in record.settings["cases"]] == ["inverted", DOCS]
    assert record.settings["cases"][0]["setups"][LONGER]["steps"] == 550
    return record


@slow
def test_a_row_is_what_fit_gives_for_its_start_pictures_rate_and_seed(record):
    frame = record.frame()
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


@slow
def test_the_ledger_reads_the_record(record):
    for claim in ("fine-tuning-beats-scratch", "never-train-from-scratch", "fine-tuning-needs-fewer-steps"):
        result = claims.verdict(claim, "records").result
        assert "docs" in result.measured or claim.endswith("steps")
        assert "inverted, MLP, 40" in result.measured


@slow
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


@slow
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_plan_compares_equal_steps_on_three_changes_two_nets_and_the_language_model(device):
    cases = list(REAL_PLAN(device))
    table = pandas.DataFrame([case.about for case in cases])
    digits = {(data, net): [10, 40, 160, 500] for data in CHANGES for net in ("transformer", "MLP")}
    docs = {(DOCS, "smollm2-135m"): [240 if device == CPU else 2400]}
    assert table.groupby(["data", "model"])["n_train"].apply(list).to_dict() == digits | docs
    for case in cases:
        trials = {setup: case.trial(setup, 1e-3, 0) for setup in case.setups}
        assert trials[FINE_TUNED] == trials[FROM_SCRATCH]
        assert not set(case.choosing) & set(case.judging)
        assert len(case.judging) >= 3
        assert trials[FINE_TUNED].batch_size <= case.about["n_train"]
        if case.about["data"] != DOCS:
            assert trials[LONGER].steps == 550 == 400 + trials[FINE_TUNED].steps
    assert cases[-1].starts.keys() == {FROM_SCRATCH}
