"""What `lora-lab record downstream` and `elicitation` run, on a tiny model and small tasks, and what they write."""

import dataclasses
import io
import statistics
from collections import Counter
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import torch

from lora_lab import FullFineTuning, LoRA, cli, evaluate, fit, records
from lora_lab.ablation import materials
from lora_lab.models.llama import Llama
from lora_lab.studies import downstream
from lora_lab.studies.recorder import tell_row
from lora_lab.tasks import Pair, from_pairs
from lora_lab.tasks.generate import answers
from lora_lab.tasks.metrics import StyleJudge, score, trivial
from tests.helpers import COMMIT, enlarge, french, sentiment

pytestmark = pytest.mark.slow

FOLDER = Path("runs/record-downstream")
CPU = torch.device("cpu")
RATES = {"full": [1e-4, 1e-2], "LoRA r=8": [3e-2, 1e-3], "scratch": [1e-2, 1e-4]}
STEPS = {"sentiment": 5, "translate-fr": 3, "style": 4}
PLAN = {"steps": STEPS, "lrs": RATES, "seeds": 3, "batch_size": 4, "eval_examples": 3}
TRAINED = {"sentiment": {"full", "LoRA r=8", "scratch"}, "translate-fr": {"full", "LoRA r=8"}}
TRAINED["style"] = TRAINED["translate-fr"]
ASKED = {"SHOTS": {"sentiment": (1, 3), "translate-fr": (1, 2)}, "DRAWS": {"sentiment": 2, "translate-fr": 2}}
ASKED |= {"CHOSEN_ON": 3, "SHUFFLES": 4, "RESAMPLES": 25}  # scikit-learn takes milliseconds for each of the last
CALIBRATIONS = ("", "content-free", "validation texts")


def stories(tokenizer, variant="log"):
    """The same stories in a style and without it."""
    pairs = [
        Pair(f"Story {i}?", f"Wind {i}. Lamp lit." if variant == "log" else f"She went home at {i}.") for i in range(40)
    ]
    return from_pairs(
        tokenizer, pairs, name=f"style-{variant}", metric="style", about=f"stories, {variant}", licence="ours"
    )


@pytest.fixture(scope="module")
def tiny(small_world, tiny_config, chatter):
    """The real model is a tiny one with something to say, and its tasks are small."""
    config = dataclasses.replace(tiny_config, tie_word_embeddings=False, max_position_embeddings=1024)

    def make(device=None):
        return enlarge(Llama(config, seed=4), 5)

    small = {"sentiment": cache(sentiment), "translate-fr": cache(french), "style": cache(stories)}
    small_world.setattr(materials, "language_model", make)
    small_world.setattr(downstream, "TASKS", small)
    small_world.setattr(downstream, "style", small["style"])
    small_world.setattr(downstream, "load_pretrained", lambda name: (None, chatter))
    small_world.setattr(downstream, "plan", lambda device: PLAN)
    for name, value in ASKED.items():
        small_world.setattr(downstream, name, value)
    return make


@pytest.fixture(scope="module")
def whole(tiny):
    """(the record, its rows in the order in which they came, what was printed) of one run of the command."""
    found, whole = [], downstream.DOWNSTREAM

    def rows(device):
        for row in whole.rows(device):
            found.append(row)
            yield row

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(downstream, "DOWNSTREAM", dataclasses.replace(whole, rows=rows))
        status = cli.main(["record", "downstream", "--device", "cpu", "--out", "records"])
    assert status == 0
    (record,) = records.load_all("downstream", "records").values()
    return record, found, printed.getvalue()


def rows_of(rows, about, **columns):
    return [row for row in rows if row["about"] == about and all(row.get(k) == v for k, v in columns.items())]


def lowest(rows, task, setup):
    """The rate of the lowest validation loss of seed 0."""
    own = [row for row in rows if (row["task"], row.get("setup"), row.get("seed")) == (task, setup, 0)]
    return min(own, key=lambda row: row["validation_loss"])["lr"]


# What is recorded


def test_a_record_holds_each_task_its_baselines_every_rate_on_seed_0_and_the_best_one_on_all_seeds(whole):
    record, found, _ = whole
    assert record.rows == found
    assert [row["task"] for row in rows_of(found, "task")] == list(STEPS)
    for task in STEPS:
        setups = TRAINED[task]
        expected = Counter({("result", setup): 3 for setup in setups} | {("tuning", setup): 1 for setup in setups})
        expected |= {("result", "zero-shot"): 1} | ({} if task == "style" else {("result", "trivial"): 1})
        told = [row for row in found if row["task"] == task and row["about"] in ("result", "tuning")]
        assert Counter((row["about"], row["setup"]) for row in told) == expected
        for setup in setups:
            chosen = lowest(found, task, setup)
            results = rows_of(found, "result", task=task, setup=setup)
            assert {(row["lr"], row["seed"]) for row in results} == {(chosen, seed) for seed in range(3)}
            (left,) = rows_of(found, "tuning", task=task, setup=setup)
            assert (left["lr"], left["seed"]) == (next(lr for lr in RATES[setup] if lr != chosen), 0)
            assert {row["commit"] for row in results} == {COMMIT}
    assert any(lowest(found, task, setup) != RATES[setup][0] for task in STEPS for setup in TRAINED[task])
    assert len(list(FOLDER.glob("*.json"))) == (3 + 2 + 2) * (2 + 2)


def test_a_tasks_row_says_what_it_is_and_how_large(whole, chatter):
    made = {"sentiment": sentiment(chatter), "translate-fr": french(chatter), "style": stories(chatter)}
    for row in rows_of(whole[1], "task"):
        task = made[row["task"]]
        sizes = {part: len(task.parts[part].inputs) for part in ("train", "validation", "test", "off_domain")}
        assert {part: row[part] for part in sizes} == sizes
        assert row["fingerprint"] == task.fingerprint
    assert len({row["fingerprint"] for row in rows_of(whole[1], "task")}) == 3


def test_trivial_answers_are_scored_as_by_hand(whole, chatter):
    (found,) = rows_of(whole[1], "result", setup="trivial", task="sentiment")
    wanted = [pair.answer for pair in sentiment(chatter).pairs["test"]]
    right = sum(answer == "good" for answer in wanted) / len(wanted)  # half of all that is trained on
    f1 = 2 * right / (1 + right)  # precision is its share, recall 1; the other classes have none
    assert 0 < right < 1
    assert found["accuracy"] == right
    assert found["macro_f1"] == pytest.approx(f1 / len(set(wanted)))
    (found,) = rows_of(whole[1], "result", setup="trivial", task="translate-fr")
    task = french(chatter)
    assert found["exact"] == exact(trivial(task), task)
    assert 0 < found["exact"] < 1
    assert 0 < found["chrf"] < 100
    assert set(found) == {"about", "task", "setup", "exact", "chrf"}


def accuracy(said, task):
    return sum(own == pair.answer for own, pair in zip(said, task.pairs["test"], strict=True)) / len(said)


def exact(said, task):
    pairs = zip(said, task.pairs["test"], strict=True)
    return sum(own.strip().casefold() == pair.answer.casefold() for own, pair in pairs) / len(said)


def in_style(said, task):
    return StyleJudge(task, stories(task.tokenizer, "plain")).share(said)


SCORED = {"sentiment": (sentiment, "accuracy", accuracy), "translate-fr": (french, "exact", exact)}
SCORED["style"] = (stories, "in_style", in_style)


def kept(whole, task, name, setup):
    """The answers that the record keeps, which stand beside the first prompts and what was wanted."""
    told = rows_of(whole[1], "answer", task=name, setup=setup)
    wanted = [(pair.prompt, pair.answer) for pair in task.pairs["test"][:3]]
    assert [(row["prompt"], row["reference"]) for row in told] == wanted
    return [row["prediction"] for row in told]


@pytest.mark.parametrize("name", list(STEPS))
def test_the_zero_shot_row_is_the_model_as_it_is(whole, tiny, chatter, name):
    (found,) = rows_of(whole[1], "result", task=name, setup="zero-shot")
    make, number, judge = SCORED[name]
    task, model = make(chatter), tiny()
    assert "seed" not in found
    for part in ("validation", "off_domain", "test"):
        assert found[f"{part}_loss"] == evaluate(model, task, part, 4, 3)
    assert found["validation_loss"] != evaluate(model, task, "validation", 4)  # of three examples, not of all
    said = answers(model, task)
    assert len(said) == len(task.pairs["test"]) > 3
    assert found[number] == judge(said, task)
    assert kept(whole, task, name, "zero-shot") == said[:3]


@pytest.mark.parametrize("name", list(STEPS))
@pytest.mark.parametrize(("setup", "seed"), [("full", 0), ("full", 2), ("LoRA r=8", 1)])
def test_a_result_is_that_of_fit_at_the_chosen_rate_and_scored_on_the_whole_test_part(
    whole, tiny, chatter, name, setup, seed
):
    (found,) = rows_of(whole[1], "result", task=name, setup=setup, seed=seed)
    make, number, judge = SCORED[name]
    task, model, method = make(chatter), tiny(), {"full": FullFineTuning(), "LoRA r=8": LoRA(8, 16)}[setup]
    steps = STEPS[name]
    options = {"steps": steps, "batch_size": 4, "eval_every": steps, "eval_examples": 3, "seed": seed}
    history = fit(model, task, method, lr=found["lr"], **options)
    assert found["validation_loss"] == pytest.approx(history.rows[-1]["validation_loss"], rel=1e-5)
    assert found["off_domain_loss"] == pytest.approx(history.rows[-1]["off_domain_loss"], rel=1e-5)
    assert found["test_loss"] == pytest.approx(evaluate(model, task, "test", 4, 3), rel=1e-5)
    assert found["trainable_parameters"] == history.trainable_parameters
    said = answers(model, task)
    assert found[number] == judge(said, task)
    assert (kept(whole, task, name, setup) == said[:3]) or seed  # those of the first seed alone
    (before,) = rows_of(whole[1], "result", task=name, setup="zero-shot")
    assert found["validation_loss"] != pytest.approx(before["validation_loss"], rel=1e-3)


def test_from_scratch_another_model_is_trained_on_sentiment_alone(whole, tiny, chatter):
    found = rows_of(whole[1], "result", setup="scratch")
    assert [(row["task"], row["seed"]) for row in found] == [("sentiment", seed) for seed in range(3)]
    model, task = Llama(tiny().config, seed=0), sentiment(chatter)
    options = {"steps": 5, "batch_size": 4, "eval_every": 5, "eval_examples": 3, "seed": 1}
    history = fit(model, task, FullFineTuning(), lr=found[1]["lr"], **options)
    assert found[1]["validation_loss"] == pytest.approx(history.rows[-1]["validation_loss"], rel=1e-5)
    assert found[1]["accuracy"] == accuracy(answers(model, task), task)
    (full,) = rows_of(whole[1], "result", task="sentiment", setup="full", seed=1)
    assert full["validation_loss"] != pytest.approx(found[1]["validation_loss"], rel=1e-2)


def test_the_style_is_told_from_plain_stories(whole, chatter):
    assert StyleJudge(stories(chatter), stories(chatter, "plain")).accuracy > 0.9
    shares = {row["in_style"] for row in rows_of(whole[1], "result", task="style")}
    assert shares <= {i / 4 for i in range(5)}
    wanted = [pair.answer for pair in stories(chatter).pairs["test"]]
    assert downstream.scores(stories(chatter), wanted) == {"in_style": 1.0}
    plainly = [pair.answer for pair in stories(chatter, "plain").pairs["test"]]
    assert downstream.scores(stories(chatter), plainly) == {"in_style": 0.0}


# What fails, and what is stopped


def hot(monkeypatch, folder, *setups, steps=None):
    """The plan, for one task, with a rate at which nothing can be trained; for some methods there is no other."""
    monkeypatch.chdir(folder)
    rates = {setup: [1e30] if setup in setups else [*lrs, 1e30] for setup, lrs in RATES.items()}
    plan = PLAN | {"lrs": rates, "steps": steps or {"sentiment": 5}}
    monkeypatch.setattr(downstream, "plan", lambda device: plan)


def test_a_trial_that_failed_is_a_row_of_tuning_with_its_reason(tiny, monkeypatch, tmp_path):
    hot(monkeypatch, tmp_path, "full", "scratch")
    rows = list(downstream.DOWNSTREAM.rows(CPU))
    failed = [row for row in rows if row.get("outcome") == "failed"]
    assert [(row["about"], row["setup"], row["lr"], row["seed"]) for row in failed] == [
        ("tuning", setup, 1e30, 0) for setup in ("full", "LoRA r=8", "scratch")
    ]
    for row in failed:
        assert "lower the learning rate" in row["reason"]
        assert row["validation_loss"] is row["test_loss"] is None
        assert row["reason"] in tell_row(row)
    results = [row["setup"] for row in rows_of(rows, "result")]
    assert results == ["trivial", "zero-shot", *["LoRA r=8"] * 3]
    assert {row["setup"] for row in rows_of(rows, "answer")} == {"zero-shot", "LoRA r=8"}
    records.new("downstream", rows, {}, "a test", CPU, "unknown")  # has no NaN in it


def test_where_everything_failed_the_next_task_begins(tiny, monkeypatch, tmp_path):
    hot(monkeypatch, tmp_path, *RATES, steps={"sentiment": 5, "style": 4})
    rows = list(downstream.DOWNSTREAM.rows(CPU))
    assert [row["task"] for row in rows_of(rows, "task")] == ["sentiment", "style"]
    assert {row["setup"] for row in rows_of(rows, "result")} == {"trivial", "zero-shot"}
    assert [row["outcome"] for row in rows_of(rows, "tuning")] == ["failed"] * 5


# Elicitation


@pytest.fixture(scope="module")
def seen(tiny):
    """What each probe learned from: (states, labels)."""
    return []


@pytest.fixture(scope="module")
def asked(tiny, seen):
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


def test_a_record_holds_each_setup_and_each_control(asked):
    record, _ = asked
    for task, shots in ASKED["SHOTS"].items():
        rows = results(record, task=task)
        counted = Counter((row["setup"], row.get("k"), row["control"]) for row in rows)
        each = 3 if task == "sentiment" else 1  # calibrations
        (best,) = {row["k"] for row in rows if row["setup"] == "few-shot" and row["control"]}
        expected = {("zero-shot", 0, False): each, ("few-shot", best, True): 2 * each}
        expected |= {("few-shot", k, False): 2 * each for k in shots}
        if task == "sentiment":
            expected |= {("probe", None, False): 3, ("probe", None, True): 4}
            assert {row["calibration"] for row in rows if row["setup"] != "probe"} == set(CALIBRATIONS)
        assert counted == expected


def test_the_control_has_the_number_of_examples_that_validation_chose(asked):
    record, _ = asked
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


def test_zero_shot_has_the_scores_that_the_model_has_without_this_recorder(asked, tiny, chatter):
    record, _ = asked
    for task in (sentiment(chatter), french(chatter)):
        (row,) = results(record, task=task.name, setup="zero-shot", calibration="")
        expected = score(task, answers(tiny(), task))
        assert {key: row[key] for key in expected} == expected


def test_an_interval_holds_the_score_and_has_no_width_where_all_answers_are_right(tiny, chatter):
    task = sentiment(chatter)
    right = [pair.answer for pair in task.pairs["test"]]
    validation = [pair.answer for pair in task.pairs["validation"]]
    perfect = downstream._score(task, {}, {"test": right, "validation": validation})
    assert [perfect[name] for name in ("lower", "accuracy", "upper", "validation")] == [1, 1, 1, 1]
    constant = downstream._score(task, {}, {"test": trivial(task), "validation": ["good"]})
    assert 0 <= constant["lower"] < constant["accuracy"] < constant["upper"] <= 1
    assert constant["validation"] == float(validation[0] == "good")


def test_a_probe_sees_the_training_examples_of_the_trial_with_its_seed(asked, seen, tiny, chatter):
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
