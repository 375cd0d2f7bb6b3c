"""Scores against cases by hand, and baselines that need no model."""

from typing import get_args

import pytest

from lora_lab.tasks import Pair, from_pairs
from lora_lab.tasks.instruction import Metric
from lora_lab.tasks.metrics import METRICS, score, trivial
from tests.helpers import sums

pytestmark = pytest.mark.usefixtures("one_thread")


def test_scores_are_those_of_hand_computed_cases():
    assert METRICS["classification"](["a", "b", "a", "a"], ["a", "b", "b", "a"]) == {
        "accuracy": 0.75,
        "macro_f1": pytest.approx((0.8 + 2 / 3) / 2),
    }
    assert METRICS["summary"](["the cat sat"], ["the cat sat"])["rouge_l"] == 1.0
    # of three words and four, two in a row: precision 2/3, recall 1/2
    assert METRICS["summary"](["the dog sat"], ["the cat sat down"])["rouge_l"] == pytest.approx(
        2 * 2 / 3 * 0.5 / (2 / 3 + 0.5)
    )
    found = METRICS["translation"](["Autriche", "Allemagne"], ["autriche", "France"])
    assert found["exact"] == 0.5
    assert 0 < found["chrf"] < 100
    assert METRICS["translation"](["Autriche"], ["Autriche"])["chrf"] == pytest.approx(100)


def test_a_score_of_what_cannot_be_scored_is_refused(chatter):
    task, named = from_pairs(chatter, sums()), from_pairs(chatter, sums(), metric="translation")
    for call, word in (
        (lambda: score(task, ["1"]), "metric is ''"),
        (lambda: trivial(task), "baseline"),
        (lambda: score(named, ["1"] * 99), "predictions has length 99"),
        (lambda: score(named, []), "predictions has length 0"),
        (lambda: score(named, "1"), "predictions"),
        *((lambda name=name: METRICS[name](["1"], ["1", "2"]), "argument|inconsistent") for name in METRICS),
        (lambda: score(named, ["1"], "off_domain"), "off_domain"),
        (lambda: trivial(named, "off_domain"), "off_domain"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


def test_a_task_takes_the_metrics_that_there_are():
    assert {*METRICS, "style", ""} == {*get_args(Metric)}


def test_the_dictionary_knows_what_training_pairs_say_word_for_word(chatter):
    def ask(name):
        return f"Translate into French: {name}"

    pairs = {
        "train": [
            Pair(ask("red house"), "rouge maison"),
            Pair(ask("red"), "rouge"),
            Pair(ask("big tree"), "un grand arbre"),
        ],
        "validation": [Pair(ask("blue"), "bleu")],
        "test": [Pair(ask("Red tree house"), "?")],
    }
    assert trivial(from_pairs(chatter, pairs, metric="translation")) == ["rouge tree maison"]
