"""What the studies of tuned setups plan; what those of them that do more than tune make of small ones, and write."""

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from lora_lab import FullFineTuning, Llama, LoRA, evaluate, fit, inject, records
from lora_lab.ablation import materials
from lora_lab.ablation.compare import compare_losses
from lora_lab.ablation.rank_advice import SPECTRAL, UpdateRanks, assess
from lora_lab.models.shapes import config
from lora_lab.studies import steps, tuned
from lora_lab.studies.claims.measured import right_by_kind
from lora_lab.studies.recorder import BlockSweep, plan_setups, record_sweeps
from lora_lab.tasks import Pair, from_pairs
from lora_lab.tasks.sentences import COMBINATION, WORD, sentences
from tests.helpers import command
from tests.studies.conftest import sentences as random_ids

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def sweeps(plan, device=CPU):
    return {sweep.data: sweep for sweep in plan(device)}


def trials_of(sweep):
    return {setup: trial for setup, (trial, _) in sweep.setups.items()}


def count_trained(method):
    with torch.device("meta"):
        model = Llama(config("smollm2-135m"))
        inject(model, method)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# What is planned

PLANS = [tuned.plan_quality, tuned.plan_targets, tuned.plan_variants, tuned.plan_rates, tuned.plan_taught]


@pytest.mark.parametrize("plan", PLANS)
def test_seeds_that_judge_did_not_choose_and_a_gpu_does_more(plan):
    small, large = (sweeps(plan, device)["docs"] for device in (CPU, CUDA))
    assert small.setups.keys() == large.setups.keys()
    assert len(large.choosing) + len(large.judging) > len(small.choosing) + len(small.judging)
    assert len(small.choosing) >= 2
    assert len(small.judging) >= 3 or plan is tuned.plan_rates
    for sweep in (small, large):
        assert not set(sweep.choosing) & set(sweep.judging)
        factors = [high / low for lrs in sweep.lrs.values() for low, high in itertools.pairwise(lrs)]
        assert all(1.69 < factor < 2.01 for factor in factors)
        assert all(len(lrs) >= 3 or "as taught" in setup for setup, lrs in sweep.lrs.items())
        for trial in trials_of(sweep).values():
            assert trial.lean is None or trial.method != FullFineTuning()


def test_targets_have_as_many_parameters_to_within_two_percent():
    planned = trials_of(sweeps(tuned.plan_targets)["docs"])
    counts = {name: count_trained(trial.method) for name, trial in planned.items()}
    assert max(counts.values()) < 1.02 * min(counts.values())
    assert counts["q, v"] == 30 * 53 * (576 + 576 + 576 + 192)


def test_variants_differ_in_their_method_alone_and_have_one_base():
    trials = trials_of(sweeps(tuned.plan_variants)["docs"]).values()
    assert {type(trial.method).name for trial in trials} == {"lora", "rslora", "lora+", "pissa", "dora"}
    for trial in trials:
        assert trial.method.alpha == 2 * trial.method.rank
        assert trial.lean is None or trial.lean.base_dtype is None


def test_the_trials_that_choose_on_docs_are_those_of_the_record_of_rates():
    own, theirs = (sweeps(plan)["docs"] for plan in (tuned.plan_rank_advice, tuned.plan_rates))
    assert (own.chosen_on, own.block, list(own.choosing)) == (theirs.chosen_on, theirs.block, list(theirs.choosing))
    for rank in tuned.RANKS:
        (trial, lrs), (same, rates) = own.setups[f"r={rank}"], theirs.setups[f"r={rank}, alpha = 2r"]
        assert (trial, lrs) == (same, rates)
        assert trial != replace(same, steps=59)


def test_as_taught_both_methods_have_the_sources_settings_and_tuned_the_rates_alone_differ():
    for data, sweep in sweeps(tuned.plan_taught).items():
        for method in ("full", "LoRA"):
            (taught, rates), (trial, lrs) = (sweep.setups[f"{method}, {how}"] for how in ("as taught", "tuned"))
            assert replace(taught, lr=trial.lr) == trial
            assert rates == (tuned.LORA[data][1],)
            assert len(lrs) >= 3
            assert (trial.schedule, trial.warmup, trial.clip) == ("constant", 0, None)
            assert method == "full" or trial.method.alpha == {"sentiment": 1, "docs": 8}[data]
    assert round(count_trained(tuned.LORA["docs"][0]), -3) == 323_000  # the repository prints 322K


def test_translation_judges_every_example_of_the_test_parts(chatter):
    for data, sweep in sweeps(tuned.plan_translation).items():
        assert sweep.block == 1
        if data != tuned.NAMES:
            assert sweep.judged_on == {"test": len(sentences(chatter, data[-2:]).test)}
        assert set(sweep.setups) == {"LoRA r=8"}
        assert set(sweeps(tuned.plan_translation, CUDA)[data].setups) == {"LoRA r=8", "full"}


# Rank advice


def plan_few_ranks(device):
    """Ranks 1 and 64 for a moment, on one planted task and on few pictures of digits."""
    setups = plan_setups({f"r={rank}": (LoRA(rank, 2 * rank), (1e-2, 2e-2)) for rank in (1, 64)}, 6, 16)
    on = {"chosen_on": 40, "judged_on": {"validation": 40, "test": 60}, "widen": 1, "seq_len": None}
    rerun = UpdateRanks(tuned.RANKS, 40), tuned.advise
    sources = {"planted 2": partial(tuned.imitate, 2), "digits 100": partial(tuned.read_moved_digits, 100)}
    for data, source in sources.items():
        yield BlockSweep(setups, [0], [1, 2], data=data, source=source, rerun=rerun, **on)


@pytest.fixture(scope="module")
def advised(small_world):
    made = record_sweeps("rank_advice", plan_few_ranks)
    return list(made.rows(CPU)), made


def test_runs_at_the_highest_rank_are_those_of_its_rate_and_of_the_judging_seeds(advised):
    for data in ("planted 2", "digits 100"):
        of_task = [row for row in advised[0] if row["data"] == data]
        (lr,) = {row["lr"] for row in of_task if row["stage"] == "judging" and row["setup"] == "r=64"}
        high = [row for row in of_task if row["stage"] == "high rank"]
        assert [(row["lr"], row["seed"], row["rank"]) for row in high] == [(lr, 1, 64), (lr, 2, 64)]
        assert {row["margin"] for row in high} == {tuned.MARGINS[data.split()[0]]}
        for row in high:
            assert all(1 <= row[f"score_{name}"] <= 64 for name in SPECTRAL)


def test_the_loss_at_full_rank_is_that_of_the_run(advised):
    row = next(row for row in advised[0] if row["stage"] == "high rank" and row["data"] == "digits 100")
    model, task = tuned.read_moved_digits(100, CPU)
    fit(model, task, LoRA(64, 128), lr=row["lr"], seed=row["seed"], steps=6, batch_size=16, progress=False)
    losses = json.loads(row["score_truncated"])
    assert losses["64"] == pytest.approx(evaluate(model, task, limit=40), rel=1e-3)
    assert losses["1"] != pytest.approx(losses["64"], rel=1e-3)


def test_the_rows_can_be_assessed(advised):
    inside = [row | {"edge": ""} for row in advised[0]]  # so short a grid may end at an edge
    for row in inside:
        if row["stage"] == "judging" and row["setup"] == "r=1":
            row["score_test"] = "[0.0]"
    advice = assess(inside)
    assert advice.undecided == ()
    assert advice.errors["constant_error"].to_dict() == {"digits 100": 3.0}  # always 8, where 1 is enough
    assert advice.works is None


def test_a_stopped_record_goes_on(advised, no_trial_runs):
    before, made = advised
    again = list(made.rows(CPU))
    assert [row.get("score_truncated") for row in again] == [row.get("score_truncated") for row in before]


# Taught and translation, by a tiny model


class Costs:
    """A cost model of a machine on which every step takes as long."""

    def predict(self, factory, setups, batch_size, seq_len):
        return self

    def ratio(self, label):
        return 1.0


@pytest.fixture(scope="module")
def tiny(small_world, tiny_config):
    """The language model is tiny. Returns what makes any plan short and records it by the command."""
    small_world.setattr(materials, "language_model", lambda device, model=None: Llama(tiny_config, seed=3))
    small_world.setattr(materials, "docs_task", lambda seq_len, model=None: random_ids(tiny_config.vocab_size))
    small_world.setattr(steps, "random_model", lambda name: Llama(tiny_config, seed=3))
    small_world.setattr(tuned, "cost_model", lambda device: Costs())

    def record(name, tasks, judged_on, judging, after):
        real = getattr(tuned, f"plan_{name}")

        def plan(device):
            for sweep in real(device):
                few = {"steps": 2, "batch_size": 3, "eval_every": 2, "warmup": 0}
                setups = {setup: (replace(trial, **few), lrs) for setup, (trial, lrs) in sweep.setups.items()}
                own = {"choosing": [0], "judging": judging, "chosen_on": 3, "judged_on": judged_on(sweep.data)}
                yield replace(sweep, setups=setups, widen=0, seq_len=8, **own)

        small_world.setattr(materials, "_named_task", lambda name, model: tasks[name])
        small_world.setattr(tuned, f"plan_{name}", plan)
        small_world.setattr(tuned, name.upper(), record_sweeps(name, plan, after=after))
        assert command("record", name, "--device", "cpu", "--out", "records") == 0
        (made,) = records.load_all(name, "records").values()
        small_world.setattr(tuned, f"plan_{name}", real)
        return made

    return record


@pytest.fixture(scope="module")
def taught(tiny, chatter):
    pairs = [Pair(f"{i} apples?", ("good", "bad")[i % 2]) for i in range(40)]
    classes = from_pairs(chatter, pairs, metric="classification")
    parts = {"validation": 3, "test": 4}
    return tiny("taught", {"sentiment": classes}, lambda data: parts, [1, 2, 3], after=tuned.time_methods)


@pytest.mark.slow
def test_as_taught_is_judged_at_its_rate_and_tuned_where_validation_is_lowest(taught):
    frame = taught.frame()
    for data, (_, lr, _) in tuned.LORA.items():
        rows = frame[frame["data"] == data]
        at_once = rows[rows["setup"].str.endswith("as taught")]
        assert set(at_once["stage"]) == {"judging"}
        assert set(at_once["lr"]) == {lr}
        chosen = rows[(rows["stage"] == "choosing") & (rows["setup"] == "LoRA, tuned")]
        judged = rows[(rows["stage"] == "judging") & (rows["setup"] == "LoRA, tuned")]
        assert set(judged["lr"]) == {chosen.loc[chosen["validation_loss"].idxmin(), "lr"]}
        assert set(judged["seed"]) == {1, 2, 3}


@pytest.mark.slow
def test_accuracies_are_there_where_there_are_classes_and_times_of_both_methods(taught):
    frame = taught.frame()
    judged = frame[frame["stage"] == "judging"]
    assert judged["score_accuracy"].notna().tolist() == (judged["data"] == "sentiment").tolist()
    assert {len(json.loads(each)) for each in judged["score_accuracy"].dropna()} == {1}
    assert len(compare_losses(frame[frame["data"] == "sentiment"], "full, tuned", "accuracy")) == 4
    times = frame[frame["stage"] == "time"]
    assert times["setup"].tolist() == 2 * ["full", "LoRA r=4"]
    assert times["data"].tolist() == ["sentiment", "sentiment", "docs", "docs"]


@pytest.fixture(scope="module")
def translated(tiny, chatter):
    """English names in capitals, of which every second one is a word that the dictionary knows; and all sentences."""
    words = ("Red", "Tree", "House", "Big", "Sea", "Old", "Cat", "Sun", "Ship", "Fox")
    pairs = [Pair(f"Translate into French: {a} {b}", f"{a.lower()} {b.lower()}") for a in words for b in words[:5]]
    odd = [replace(pair, answer=pair.answer + "é") if i % 2 else pair for i, pair in enumerate(pairs)]
    tasks = {tuned.NAMES: from_pairs(chatter, odd, metric="translation")}
    tasks |= {f"sentences-{target}": sentences(chatter, target) for target in ("fr", "en")}
    return tiny("translation", tasks, lambda data: {"test": len(tasks[data].test)}, [1], after=tuned.list_examples)


@pytest.mark.slow
def test_each_judged_trial_has_an_answer_for_each_example_of_the_record(translated):
    frame = translated.frame()
    for data in tuned.SIZES:
        rows = frame[frame["data"] == data]
        examples = rows[rows["stage"] == "example"]
        assert examples["position"].tolist() == list(range(len(examples)))
        (judged,) = rows.loc[rows["stage"] == "judging", "score_accuracy"]
        assert len(json.loads(judged)) == len(examples)
        assert set(json.loads(judged)) <= {0, 1}


@pytest.mark.slow
def test_examples_are_marked_by_what_no_baseline_gets_right_and_by_what_training_shows(translated):
    frame = translated.frame()
    names = frame[(frame["stage"] == "example") & (frame["data"] == tuned.NAMES)]
    by_none = [pair.answer.endswith("é") for pair in materials._named_task(tuned.NAMES, "").pairs["test"]]
    assert 0 < sum(by_none) < len(names)
    assert (names["kind"] == tuned.BY_NONE).tolist() == by_none
    table = [*right_by_kind(translated, "sentences-fr", "LoRA r=8")]
    assert {row["kind"]: row["examples"] for row in table} == {COMBINATION: 100, WORD: 60}
    assert all(row["share"] == 0 for row in table)  # of an untrained model
