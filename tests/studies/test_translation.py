"""What `lora-lab record translation` plans, runs on a tiny model, and writes."""

import json
from dataclasses import replace

import pytest
import torch

from lora_lab import records
from lora_lab.ablation import studies
from lora_lab.models.llama import Llama
from lora_lab.studies import recorder, translation
from lora_lab.studies.claims.measured import right_by_kind
from lora_lab.studies.recorder import Planned, record_tuned
from lora_lab.tasks import Pair, from_pairs
from lora_lab.tasks.sentences import COMBINATION, WORD, sentences
from tests.helpers import command

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def names(chatter):
    """English names in capitals, of which every second one is a word that the dictionary knows."""
    words = ("Red", "Tree", "House", "Big", "Sea", "Old", "Cat", "Sun", "Ship", "Fox")
    pairs = [Pair(f"Translate into French: {a} {b}", f"{a.lower()} {b.lower()}") for a in words for b in words[:5]]
    odd = [replace(pair, answer=pair.answer + "é") if i % 2 else pair for i, pair in enumerate(pairs)]
    return from_pairs(chatter, odd, metric="translation")


@pytest.fixture(scope="module")
def record(small_world, tiny_config, chatter):
    """Of one run of the command, on names that are few and on the sentences themselves."""
    tasks = {translation.NAMES: names(chatter)}
    tasks |= {f"sentences-{target}": sentences(chatter, target, 512) for target in ("fr", "en")}

    def small(device):
        plan = {}
        for data, planned in translation.plan(device).items():
            setups = {
                name: replace(each, steps=1, warmup=0, batch_size=2, eval_every=1)
                for name, each in planned.study.setups.items()
            }
            sizes = {"test": len(tasks[data].test)}
            study = replace(
                planned.study, setups=setups, choosing=[0], judging=[1], judged_on=sizes, chosen_on=2, widen=0
            )
            plan[data] = Planned(study, seq_len=8)
        return plan

    small_world.setattr(studies, "language_model", lambda device, model=None: Llama(tiny_config, seed=3))
    small_world.setattr(studies, "_named_task", lambda name, model: tasks[name])
    small_world.setattr(recorder, "plan_hours", lambda *arguments: 1.0)
    made = record_tuned("translation", small, after=translation.all_examples, line=lambda row: None)
    small_world.setattr(translation, "TRANSLATION", made)
    assert command("record", "translation", "--device", "cpu", "--out", "records") == 0
    (record,) = records.load_all("translation", "records").values()
    return record


def test_the_real_plan_judges_every_example_of_the_test_parts(chatter):
    for data, planned in translation.plan(CPU).items():
        assert planned.study.block == 1
        if data != translation.NAMES:
            assert planned.study.judged_on == {"test": len(sentences(chatter, data[-2:], 512).test)}
    assert set(planned.study.setups) == {"LoRA r=8"}
    assert set(translation.plan(torch.device("cuda"))[data].study.setups) == {"LoRA r=8", "full"}


def test_each_judged_trial_has_an_answer_for_each_example_of_the_record(record):
    frame = record.frame()
    for data in translation.SIZES:
        rows = frame[frame["data"] == data]
        examples = rows[rows["stage"] == "example"]
        assert examples["position"].tolist() == list(range(len(examples)))
        (judged,) = rows.loc[rows["stage"] == "judging", "score_accuracy"]
        assert len(json.loads(judged)) == len(examples)
        assert set(json.loads(judged)) <= {0, 1}


def test_names_are_marked_by_what_no_baseline_gets_right(record):
    frame = record.frame()
    examples = frame[(frame["stage"] == "example") & (frame["data"] == translation.NAMES)]
    by_none = examples["reference"].str.endswith("é")
    assert 0 < by_none.sum() < len(examples)
    assert (examples["kind"] == translation.BY_NONE).tolist() == by_none.tolist()


def test_sentences_are_marked_by_what_training_shows_and_by_their_grammar(record):
    table = right_by_kind(record, "sentences-fr", "LoRA r=8")
    assert {row["kind"]: row["examples"] for row in table} == {COMBINATION: 100, WORD: 60}
    assert all(row["share"] == 0 for row in table)  # of an untrained model
    features = record.frame().query("data == 'sentences-fr' and stage == 'example'")["features"]
    assert {"feminine", "plural", "adjective after the noun", "elision"} <= set(", ".join(features).split(", "))
