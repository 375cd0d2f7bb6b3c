"""What `lora-lab record remedies` runs, on a tiny model, and what it writes, says and plans."""

import copy
import io
import json
from contextlib import redirect_stdout
from functools import partial
from types import SimpleNamespace

import pandas
import pytest
import torch

from lora_lab import FullFineTuning, LoRA, cli, evaluate, fit, lora_layers, merge, records
from lora_lab.ablation import studies
from lora_lab.ablation.overfitting import compare_over_rates, summarise_trials
from lora_lab.ablation.stats import rank_correlations
from lora_lab.models.llama import Llama
from lora_lab.studies import planning, remedies
from lora_lab.studies.remedies import DistanceFromBase, Setup, update_norm
from lora_lab.tasks import base_text
from tests.helpers import COMMIT
from tests.studies.conftest import counting_on

pytestmark = pytest.mark.slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REAL_PLAN = remedies.plan
SETUPS = {
    "LoRA r=8": Setup(LoRA(8, 16), (1e-2, 2e-2)),
    "LoRA r=1": Setup(LoRA(1, 2), (2e-2,)),
    "full": Setup(FullFineTuning(), (1e-3, 3e-3)),
    "weight decay": Setup(LoRA(8, 16), (2e-2,), weight_decay=10.0),
    "own replies": Setup(LoRA(8, 16), (2e-2,), partial(remedies.own_replies, 0.5)),
    "other text": Setup(LoRA(8, 16), (2e-2,), partial(remedies.other_text, 0.5)),
    "KL penalty": Setup(LoRA(8, 16), (2e-2,), partial(remedies.near_base, 1.0)),
}
PLAN = remedies.Plan(SETUPS, steps=10, batch_size=4, seeds=(0, 1), seq_len=9, eval_examples=6)


class Costs:
    """A cost model of a machine on which full fine-tuning takes 3 hours a step, and LoRA 2."""

    def predict(self, factory, setups, batch_size, seq_len):
        hours = {label: 3 if setup.method == FullFineTuning() else 2 for label, setup in setups.items()}
        return SimpleNamespace(total_s=lambda label: 3600 * hours[label])


@pytest.fixture(scope="module")
def tiny(small_world, tiny_config, tmp_path_factory):
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
    small_world.setattr(remedies, "base_replies", partial(base_text.base_replies, path))
    small_world.setattr(remedies, "on_base_text", partial(base_text.on_base_text, path=path))
    small_world.setattr(studies, "language_model", make)
    small_world.setattr(studies, "docs_task", counting_on)
    small_world.setattr(planning, "cost_model", lambda device: Costs())
    small_world.setattr(remedies, "plan", lambda device: PLAN)
    return make


@pytest.fixture(scope="module")
def whole(tiny):
    """(the record, what was printed) of one run of the command."""
    with redirect_stdout(io.StringIO()) as printed:
        status = cli.main(["record", "remedies", "--device", "cpu", "--out", "records"])
    assert status == 0
    (record,) = records.load_all("remedies", "records").values()
    return record, printed.getvalue()


def test_a_record_has_a_curve_for_each_setup_rate_and_seed_and_for_each_strength_of_the_adapter(whole):
    frame = whole[0].frame()
    expected = {(name, lr, seed) for name, setup in SETUPS.items() for lr in setup.lrs for seed in (0, 1)}
    expected |= {("LoRA r=8, scaled", lr, seed) for lr in (1e-2, 2e-2) for seed in (0, 1)}
    curves = dict([*frame.groupby(["setup", "lr", "seed"])])
    assert set(curves) == expected
    for (name, *_), curve in curves.items():
        steps = [0, 25, 50, 75, 100, 120] if name.endswith("scaled") else [*range(11)]
        assert curve["step"].tolist() == steps
        assert curve["score_divergence"].notna().tolist() == [step == 10 for step in steps]
    assert set(frame["commit"]) == {COMMIT}
    assert frame.loc[frame["setup"] == "full", "rank"].unique() == [576]
    assert whole[1].count("off_domain_loss") == len(expected) - 4
    assert whole[0].settings["planned_hours"] > 0


def test_a_row_is_what_fit_gives_on_the_changed_task(tiny, whole):
    frame = whole[0].frame()
    for name in ("own replies", "other text", "KL penalty", "weight decay", "full"):
        setup, options = SETUPS[name], {"steps": 10, "batch_size": 4, "schedule": "constant", "seed": 1}
        own = frame[(frame["setup"] == name) & (frame["seed"] == 1) & (frame["lr"] == setup.lrs[0])].set_index("step")
        options |= {"lr": setup.lrs[0], "weight_decay": setup.weight_decay, "eval_examples": 6}
        history = fit(tiny(), PLAN.task(setup.change), setup.method, progress=False, **options)
        table = history.frame().set_index("step")
        tolerance = 1e-4 if name == "full" else 3e-2  # over a base in bfloat16
        for loss in ("train_loss", "validation_loss", "off_domain_loss"):
            assert own[loss].tolist() == pytest.approx(table[loss].tolist(), rel=tolerance, nan_ok=True)
    ends = frame[(frame["step"] == 10) & (frame["lr"] == 2e-2)].groupby("setup")["off_domain_loss"].mean()
    assert len(set(ends)) == len(ends)


def test_replayed_replies_and_those_that_judge_have_no_prompt_in_common(tiny):
    task = PLAN.task(SETUPS["own replies"].change)
    replayed = {int(row[0]) for row in task.train.inputs[24:]}
    assert replayed == set(range(16, 28))  # of the 24 that are as many as the windows
    assert {int(row[0]) for row in task.off_domain.inputs} == set(range(16))


def test_scaling_goes_from_the_base_to_the_adapter_and_beyond(tiny, whole):
    frame = whole[0].frame()
    own = frame[(frame["lr"] == 2e-2) & (frame["seed"] == 0)]
    curve = own[own["setup"] == "LoRA r=8, scaled"].set_index("step")
    trained = own[own["setup"] == "LoRA r=8"].set_index("step")
    for loss in ("validation_loss", "off_domain_loss"):
        assert (curve.loc[0, loss], curve.loc[100, loss]) == (trained.loc[0, loss], trained.loc[10, loss])
        assert curve[loss].nunique() == 6
    model = tiny()
    fit(model, PLAN.task(None), LoRA(8, 16), steps=10, lr=2e-2, batch_size=4, schedule="constant", progress=False)
    for layer in lora_layers(model).values():
        layer.alpha *= 0.5
    merge(model)
    expected = evaluate(model, PLAN.task(None), "validation", limit=6)
    assert curve.loc[50, "validation_loss"] == pytest.approx(expected, rel=3e-2)


def test_what_a_judge_measures(tiny):
    base, task = tiny(), PLAN.task(None)
    model = copy.deepcopy(base)
    fit(model, task, FullFineTuning(), steps=3, lr=1e-3, batch_size=4, progress=False)
    scores = DistanceFromBase(9, 6, (0.5,))(model, task)
    assert scores.keys() == {"divergence", "size", "prose"}  # no adapter, no strengths
    flat = [torch.cat([p.flatten() for p in each.parameters()]) for each in (model, base)]
    assert scores["size"] == pytest.approx(float((flat[0] - flat[1]).detach().norm()), rel=1e-5)
    assert scores["divergence"] > 0
    still = DistanceFromBase(9, 6)(copy.deepcopy(base), task)
    assert still == pytest.approx({"divergence": 0, "size": 0, "prose": 0}, abs=1e-5)


def test_the_size_of_an_adapters_update_is_that_of_the_merged_model(tiny):
    base, model = tiny(), tiny()
    fit(model, PLAN.task(None), LoRA(2, 8), steps=3, lr=1e-2, batch_size=4, progress=False)
    size = update_norm(base, model)
    merge(model)
    assert size == pytest.approx(update_norm(base, model), rel=1e-4)
    assert size > 0.1


def test_a_record_can_be_compared_at_equal_learning_and_asked_what_predicts_forgetting(whole):
    frame = whole[0].frame()
    table = compare_over_rates(frame[frame["setup"] != "full"], "forgotten", "LoRA r=8", share=0.5).set_index("setup")
    assert set(table.index) == {*SETUPS, "LoRA r=8, scaled"} - {"LoRA r=8", "full"}
    assert table.loc["own replies", "pairs"] == 2
    trials = summarise_trials(frame[~frame["setup"].str.endswith("scaled")])
    trials = trials.merge(frame[["setup", "rank"]].drop_duplicates())
    predicted = rank_correlations(trials, "forgotten_at_last", ["score_divergence", "score_size", "rank", "lr"])
    assert predicted["correlation"].notna().all()


def test_a_stopped_record_goes_on_where_it_was(whole, no_trial_runs):
    assert list(remedies.RECORDER.rows(CPU)) == whole[0].rows


def test_the_real_plan_has_every_remedy_and_a_gpu_trains_longer():
    small, large = REAL_PLAN(CPU), REAL_PLAN(CUDA)
    assert large.steps > small.steps
    assert len(large.seeds) > len(small.seeds) >= 3
    changes = {setup.change.func for setup in small.setups.values() if setup.change}
    assert changes == {remedies.own_replies, remedies.other_text, remedies.near_base}
    assert {setup.weight_decay for setup in small.setups.values()} > {0.0}
    for name, setup in small.setups.items():
        for trial in small.trials(name):
            assert trial.schedule == "constant"
            assert (trial.lean is None) == (setup.method == FullFineTuning())
            assert trial.lr in setup.lrs
    names = [name for of_group in remedies.group_by_task(small).values() for name in of_group]
    assert sorted(names) == sorted(small.setups)


def test_planned_hours_count_steps_evaluations_and_the_judge(whole):
    forward = 3 / 3 / 4  # hours an example
    hours = {name: 3 if name == "full" else 2 for name in SETUPS}
    steps = sum(2 * len(setup.lrs) * 10 * hours[name] for name, setup in SETUPS.items())
    own = 2 * 11 * 6 + 6 + 3 * 6  # two parts at 11 evaluations, the test part, the judge
    alone, penalised = 2 * (2 + 1 + 2 + 1), 2
    examples = 18 * own + alone * 8 * 6 + penalised * 10 * 4
    assert whole[0].settings["planned_hours"] == pytest.approx(steps + examples * forward, rel=0.01)


def test_a_failed_trial_has_no_strengths(tiny, monkeypatch, tmp_path):
    hot = remedies.Plan({"LoRA r=8": Setup(LoRA(8, 16), (1e30,))}, 10, 4, (0,), 9, 6)
    monkeypatch.setattr(remedies, "plan", lambda device: hot)
    (row,) = remedies.RECORDER.rows(CPU, tmp_path)
    assert row["outcome"] == "failed"
    assert pandas.isna(row["step"])
