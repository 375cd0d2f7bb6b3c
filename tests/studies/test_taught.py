"""What `lora-lab record taught` plans, runs on a tiny model, and writes."""

import json
from dataclasses import replace

import pytest
import torch

from lora_lab import records
from lora_lab.ablation import studies
from lora_lab.ablation.compare import compare_losses
from lora_lab.models.llama import Llama
from lora_lab.models.shapes import config
from lora_lab.studies import recorder, steps, taught
from lora_lab.studies.recorder import Planned, record_tuned
from lora_lab.tasks import Pair, from_pairs
from tests.helpers import command
from tests.studies.conftest import sentences

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PLAN = taught.plan


def test_as_taught_both_methods_have_the_sources_settings_and_tuned_the_rates_alone_differ():
    for data, planned in taught.plan(CPU).items():
        setups, lrs = planned.study.setups, planned.study.lrs
        assert lrs["full, as taught"] == lrs["LoRA, as taught"] == (taught.LRS[data],)
        for method in ("full", "LoRA"):
            assert setups[f"{method}, as taught"] == setups[f"{method}, tuned"]
            assert len(lrs[f"{method}, tuned"]) >= 3
        for trial in setups.values():
            assert (trial.schedule, trial.warmup, trial.clip) == ("constant", 0, None)
    assert {name: trial.method.alpha for name, trial in setups.items() if name.startswith("LoRA")} == {
        "LoRA, as taught": 8,
        "LoRA, tuned": 8,
    }


def test_lora_trains_as_many_parameters_as_the_repository_prints():
    with torch.device("meta"):
        model = Llama(config("smollm2-135m"))
        taught.LORA["docs"].prepare(model, 0)
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad), -3) == 323_000  # they print 322K


# A record of a tiny model


def small(device):
    plan = {}
    for data, planned in PLAN(device).items():
        setups = {
            name: replace(trial, steps=2, batch_size=3, eval_every=2) for name, trial in planned.study.setups.items()
        }
        parts = {"validation": 3, "test": 4}
        study = replace(
            planned.study, setups=setups, choosing=[0], judging=[1, 2, 3], judged_on=parts, chosen_on=3, widen=0
        )
        plan[data] = Planned(study, seq_len=8)
    return plan


class Costs:
    """A cost model of a machine on which every step takes an hour."""

    doubts = ()

    def predict(self, factory, setups, batch_size, seq_len):
        assert (batch_size, seq_len) == (3, 8)
        return self

    def total_s(self, label):
        return 3600

    def ratio(self, label):
        return 1.0


@pytest.fixture(scope="module")
def record(small_world, tiny_config, chatter):
    """Of one run of the command."""
    classes = from_pairs(
        chatter, [Pair(f"{i} apples?", ("good", "bad")[i % 2]) for i in range(40)], metric="classification"
    )
    small_world.setattr(studies, "language_model", lambda device, model=None: Llama(tiny_config, seed=3))
    small_world.setattr(studies, "docs_task", lambda seq_len, model=None: sentences(tiny_config.vocab_size))
    small_world.setattr(studies, "_named_task", lambda name, model: classes)
    for module in (recorder, taught):
        small_world.setattr(module, "cost_model", lambda device: Costs())
    small_world.setattr(steps, "random_model", lambda name: Llama(tiny_config, seed=3))
    about = {"line": taught.TAUGHT.line, "sources": taught.SOURCES, "changed": taught.CHANGED}
    small_world.setattr(taught, "TAUGHT", record_tuned("taught", small, after=taught.time_methods, **about))
    small_world.setattr(taught, "plan", small)
    assert command("record", "taught", "--device", "cpu", "--out", "records") == 0
    (record,) = records.load_all("taught", "records").values()
    return record


def test_as_taught_is_judged_at_its_rate_and_tuned_where_validation_is_lowest(record):
    frame = record.frame()
    for data, lr in taught.LRS.items():
        rows = frame[frame["data"] == data]
        at_once = rows[rows["setup"].str.endswith("as taught")]
        assert set(at_once["stage"]) == {"judging"}
        assert set(at_once["lr"]) == {lr}
        chosen = rows[(rows["stage"] == "choosing") & (rows["setup"] == "LoRA, tuned")]
        judged = rows[(rows["stage"] == "judging") & (rows["setup"] == "LoRA, tuned")]
        assert set(judged["lr"]) == {chosen.loc[chosen["validation_loss"].idxmin(), "lr"]}
        assert set(judged["seed"]) == {1, 2, 3}


def test_accuracies_are_there_where_there_are_classes_and_times_of_both_methods(record):
    frame = record.frame()
    judged = frame[frame["stage"] == "judging"]
    assert judged["score_accuracy"].notna().tolist() == (judged["data"] == "sentiment").tolist()
    assert {len(json.loads(each)) for each in judged["score_accuracy"].dropna()} == {1}
    assert len(compare_losses(frame[frame["data"] == "sentiment"], "full, tuned", "accuracy")) == 4
    times = frame[frame["stage"] == "time"]
    assert times["setup"].tolist() == 2 * ["full", "LoRA r=4"]
    assert times["data"].tolist() == ["sentiment", "sentiment", "docs", "docs"]


def test_a_record_says_what_differs_from_the_sources(record):
    assert record.settings["changed"].keys() == record.settings["sources"].keys() == taught.LORA.keys()
    assert record.settings["sentiment"]["answered"]
    assert record.settings["docs"]["lrs"]["full, as taught"] == [1e-4]
    assert record.settings["planned_hours"] > 0
