"""What `lora-lab record elicitation` runs, on a tiny model and small tasks, and what it writes and prints."""

import dataclasses
import io
import statistics
from collections import Counter
from contextlib import redirect_stdout
from functools import cache

import pytest
import torch

from lora_lab import cli, records
from lora_lab.ablation import studies
from lora_lab.models.llama import Llama
from lora_lab.studies import downstream
from lora_lab.tasks.generate import answers
from lora_lab.tasks.metrics import score, trivial
from tests.helpers import enlarge, french, sentiment

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ASKED = {"SHOTS": {"sentiment": (1, 3), "translate-fr": (1, 2)}, "DRAWS": {"sentiment": 2, "translate-fr": 2}}
ASKED |= {"CHOSEN_ON": 3, "SHUFFLES": 4, "RESAMPLES": 25}  # scikit-learn takes milliseconds for each of the last
TRAINING = {"steps": {"sentiment": 5}, "seeds": 3, "batch_size": 4}
CALIBRATIONS = ("", "content-free", "validation texts")


@pytest.fixture(scope="module")
def tiny(small_world, tiny_config, chatter):
    """The real model is a tiny one with something to say, and its tasks are small."""
    config = dataclasses.replace(tiny_config, tie_word_embeddings=False, max_position_embeddings=1024)
    model = enlarge(Llama(config, seed=4), 5)
    small = {"sentiment": cache(sentiment), "translate-fr": cache(french)}
    small_world.setattr(studies, "language_model", lambda device: model)
    small_world.setattr(downstream, "TASKS", small)
    small_world.setattr(downstream, "load_pretrained", lambda name: (None, chatter))
    small_world.setattr(downstream, "plan", lambda device: TRAINING)
    for name, value in ASKED.items():
        small_world.setattr(downstream, name, value)
    return model


@pytest.fixture(scope="module")
def seen(tiny):
    """What each probe learned from: (states, labels)."""
    return []


@pytest.fixture(scope="module")
def whole(tiny, seen):
    """(the record, what was printed) of one run of the command."""
    probe = downstream.linear_probe

    def watched(states, labels, *validation):
        seen.append((states, list(labels)))
        return probe(states, labels, *validation)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(downstream, "linear_probe", watched)
        assert cli.main(["record", "elicitation", "--device", "cpu", "--out", "records"]) == 0
    (record,) = records.load_all("elicitation", "records").values()
    return record, printed.getvalue()


def results(record, **columns):
    return [row for row in record.rows if row["about"] == "result" and columns.items() <= row.items()]


def test_a_record_holds_each_setup_and_each_control(whole):
    record, _ = whole
    for task, shots in ASKED["SHOTS"].items():
        asked = results(record, task=task)
        counted = Counter((row["setup"], row.get("k"), row["control"]) for row in asked)
        each = 3 if task == "sentiment" else 1  # calibrations
        (best,) = {row["k"] for row in asked if row["setup"] == "few-shot" and row["control"]}
        expected = {("zero-shot", 0, False): each, ("few-shot", best, True): 2 * each}
        expected |= {("few-shot", k, False): 2 * each for k in shots}
        if task == "sentiment":
            expected |= {("probe", None, False): 3, ("probe", None, True): 4}
            assert {row["calibration"] for row in asked if row["setup"] != "probe"} == set(CALIBRATIONS)
        assert counted == expected


def test_the_control_has_the_number_of_examples_that_validation_chose(whole):
    record, _ = whole
    for task in ("sentiment", "translate-fr"):
        means = {
            k: max(
                statistics.fmean(row["validation"] for row in rows)
                for calibration in CALIBRATIONS
                if (rows := results(record, task=task, k=k, calibration=calibration, control=False))
            )
            for k in ASKED["SHOTS"][task]
        }
        (chosen,) = {row["k"] for row in results(record, task=task, setup="few-shot", control=True)}
        assert means[chosen] == max(means.values())


def test_zero_shot_has_the_scores_that_the_model_has_without_this_recorder(whole, tiny, chatter):
    record, _ = whole
    for task in (sentiment(chatter), french(chatter)):
        (row,) = results(record, task=task.name, setup="zero-shot", calibration="")
        expected = score(task, answers(tiny, task))
        assert {key: row[key] for key in expected} == expected


def test_an_interval_holds_the_score_and_has_no_width_where_all_answers_are_right(tiny, chatter):
    task = sentiment(chatter)
    right = [pair.answer for pair in task.pairs["test"]]
    validation = [pair.answer for pair in task.pairs["validation"]]
    perfect = downstream._result(task, {}, {"test": right, "validation": validation})
    assert [perfect[name] for name in ("lower", "accuracy", "upper", "validation")] == [1, 1, 1, 1]
    constant = downstream._result(task, {}, {"test": trivial(task), "validation": ["good"]})
    assert 0 <= constant["lower"] < constant["accuracy"] < constant["upper"] <= 1
    assert constant["validation"] == float(validation[0] == "good")


def test_a_probe_sees_the_training_examples_of_the_trial_with_its_seed(whole, seen, tiny, chatter):
    task = sentiment(chatter)
    labels = [pair.answer for pair in task.pairs["train"]]
    count = 5 * 4  # steps and batch
    assert len(seen) == 3 + 4
    for i, (states, learned) in enumerate(seen):
        seed, control = (i, False) if i < 3 else (i - 3, True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        assert len(states) == len(order) == count < len(labels)
        assert sorted(learned) == sorted(labels[row] for row in order)
        assert (learned == [labels[row] for row in order]) is not control
    assert torch.equal(seen[0][0], seen[3][0])
    assert not torch.equal(seen[0][0], seen[1][0])
