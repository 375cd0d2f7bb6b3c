"""Verdicts on fine-tuning against training from scratch, from records with planted answers."""

import pytest
import torch

from lora_lab import claims, records
from lora_lab.studies.claims.head_start import FINE_TUNED, FROM_SCRATCH, LONGER, Gain, gains, table
from tests.helpers import COMMIT

SIZES = (10, 40, 160, 500)
HELPS = {10: 0.8, 40: 0.6, 160: 0.4, 500: 0.2}  # examples -> gain in nats
HURTS = {size: -gain for size, gain in HELPS.items()}


def rows(gained, longer=0.1, noise=0.01, seeds=5, edge="", docs=3.0, points=10):
    """The judged trials of some cases.

    Args:
        gained: (data, model) -> examples -> by how much the loss is lower after fine-tuning.
        longer: by how much it is lower still from scratch after a longer training.
        noise: a seed's own part of a gain.
        seeds: how many are judged.
        edge: of the grid of the MLP from scratch.
        docs: the gain of the language model, which is not trained longer.
        points: for each nat of the gain, by how many percentage points more are right.
    """
    every = {(*case, size): (gain, longer) for case, sizes in gained.items() for size, gain in sizes.items()}
    every["docs", "smollm2", 240] = (docs, None)
    result = []
    for (data, model, n_train), (gain, more) in every.items():
        for seed in range(3, 3 + seeds):
            losses = {FINE_TUNED: 1.0 + 0.3 * seed, FROM_SCRATCH: 1.0 + 0.3 * seed + gain + noise * (-1) ** seed}
            if more is not None:
                losses[LONGER] = losses[FROM_SCRATCH] - more
            for setup, loss in losses.items():
                row = {"data": data, "model": model, "n_train": n_train, "setup": setup, "stage": "judging"}
                row |= {"edge": edge if (model, setup) == ("MLP", FROM_SCRATCH) else "", "outcome": "done"}
                row["score_accuracy"] = None if more is None else 0.5 - points * (loss - seed * 0.3) / 100
                result.append(row | {"lr": 1e-3, "seed": seed, "step": 150, "steps": 150, "test_loss": loss})
                result.append(row | {"lr": 1e-3, "seed": 0, "stage": "choosing", "test_loss": 9.0})
    return result


@pytest.fixture
def record():
    def record(gained, **options):
        made = rows(gained, **options)
        return records.new("head_start", made, {}, "a test", torch.device("cpu"), COMMIT)

    return record


@pytest.fixture
def verdict(tmp_path, record):
    def verdict(claim_id, gained, **options):
        records.write(record(gained, **options), tmp_path)
        return claims.verdict(claim_id, tmp_path).result

    return verdict


CASES = {("moved", "transformer"): HELPS, ("moved", "MLP"): HELPS}
MIXED = {("moved", "transformer"): HELPS, ("inverted", "MLP"): HURTS}


def test_fine_tuning_wins_where_the_bounds_of_every_case_are_clear_of_zero(verdict):
    result = verdict("fine-tuning-beats-scratch", CASES)
    assert result.verdict == "stands"
    assert "moved, transformer, 10, 40, 160 examples: +0.40 to +0.80 nats" in result.measured
    assert "500" not in result.measured  # not few
    assert verdict("fine-tuning-beats-scratch", dict.fromkeys(CASES, HURTS), docs=-1.0).verdict == "falls"
    mixed = verdict("fine-tuning-beats-scratch", MIXED)
    assert str(mixed) == "depends on several conditions at once"  # both the net and the data differ
    other_data = {("moved", "MLP"): HELPS, ("inverted", "MLP"): HURTS}
    assert str(verdict("fine-tuning-beats-scratch", other_data)) == "depends on the change of the data"
    assert "yes: docs, smollm2, 240 examples: +3.00 nats" in mixed.measured
    assert "no: inverted, MLP, 10, 40, 160 examples: -0.80 to -0.40 nats" in mixed.measured


def test_one_case_refutes_what_is_said_of_all(verdict):
    assert verdict("never-train-from-scratch", CASES).verdict == "stands"
    only_with_many = {**CASES, ("other digits", "MLP"): {**HELPS, 500: -0.2}}
    result = verdict("never-train-from-scratch", only_with_many)
    assert result.verdict == "falls"
    assert "no: other digits, MLP, 500 examples" in result.measured
    assert verdict("fine-tuning-beats-scratch", only_with_many).verdict == "stands"


def test_bounds_hold_for_all_cases_together(record, verdict):
    one = record({("moved", "MLP"): {10: 0.02}}, noise=0.03)
    (gain, _) = gains(one)
    mean, lower, upper = gain.bounds(1)
    assert gain.values == pytest.approx([-0.01, 0.05, -0.01, 0.05, -0.01])
    assert mean == pytest.approx(0.014)
    assert lower < 0 < upper
    wider = gain.bounds(20)
    assert wider[0] == mean
    assert wider[1] < lower < upper < wider[2]
    assert gain.answer(1) is None
    hundred = {("moved", f"net {i}"): {10: 0.1} for i in range(100)}
    assert gains(record(hundred, noise=0.05))[0].answer(1) is True
    assert verdict("fine-tuning-beats-scratch", hundred, noise=0.05).verdict == "open"


def test_a_rate_at_an_edge_and_few_seeds_decide_nothing(verdict):
    result = verdict("fine-tuning-beats-scratch", CASES, edge="largest")
    assert result.verdict == "open"
    assert "not decided: moved, MLP, 10*, 40*, 160* examples" in result.measured
    assert result.measured.endswith("*: a rate is at the edge of its grid")
    few = verdict("fine-tuning-beats-scratch", CASES, seeds=2)
    assert few.verdict == "open"
    assert "fewer than 3 seeds" in few.measured


def test_a_lower_loss_with_worse_answers_decides_nothing(record, verdict):
    assert verdict("fine-tuning-beats-scratch", CASES, points=-10).verdict == "open"
    other = verdict("never-train-from-scratch", MIXED, points=-10)
    assert other.verdict == "open"
    assert "moved, transformer, 10**, 40**, 160**, 500** examples" in other.measured
    assert other.measured.endswith("**: the right answers differ the other way")
    (gain, docs) = gains(record({("moved", "MLP"): {10: 0.5}}))
    assert gain.right == pytest.approx([0.049, 0.051, 0.049, 0.051, 0.049])
    assert docs.right == []  # a loss alone decides
    assert docs.answer(2) is True


def test_answers_raise_doubt_with_the_bounds_of_one_case():
    loss, right = [0.99, 1.0, 1.01], [-0.05, -0.03, -0.04]
    (_, _, alone), (_, _, together) = (Gain("moved", "MLP", 10, right, False).bounds(cases) for cases in (1, 100))
    assert alone < 0 < together
    doubtful = Gain("moved", "MLP", 10, loss, False, right)
    assert doubtful.contradicted(100)
    assert doubtful.answer(100) is None
    assert Gain("moved", "MLP", 10, loss, False).answer(100) is True


def test_a_head_start_shrinks_if_it_is_worth_less_with_the_most_examples(verdict):
    both = verdict("head-start-shrinks-with-data", CASES)
    assert both.verdict == "stands"
    assert "moved, MLP: +0.60 nats" in both.measured
    assert "no gain" not in both.measured
    grows = {size: 0.9 - gain for size, gain in HELPS.items()}
    assert verdict("head-start-shrinks-with-data", dict.fromkeys(CASES, grows)).verdict == "falls"
    mixed = verdict("head-start-shrinks-with-data", {("moved", "MLP"): HELPS, ("inverted", "MLP"): grows})
    assert mixed.verdict == "depends"
    none = verdict("head-start-shrinks-with-data", dict.fromkeys(CASES, HURTS))
    assert none.verdict == "open"
    assert none.measured.endswith("no case was tried. no gain decided with 10: moved, MLP; moved, transformer")
    single = verdict("head-start-shrinks-with-data", {("moved", "MLP"): HELPS, ("inverted", "MLP"): HURTS})
    assert single.verdict == "open"
    assert "+0.60 nats" in single.measured
    assert "(a single case shows no rule)" in single.measured
    contradicted = verdict("head-start-shrinks-with-data", CASES, points=-10)
    assert contradicted.verdict == "open"


def test_fewer_steps_suffice_if_a_longer_training_from_scratch_is_still_worse(verdict):
    assert verdict("fine-tuning-needs-fewer-steps", CASES).verdict == "stands"
    assert verdict("fine-tuning-needs-fewer-steps", CASES, longer=5.0).verdict == "open"  # but not within as many steps
    assert verdict("fine-tuning-needs-fewer-steps", dict.fromkeys(CASES, HURTS)).verdict == "falls"
    mixed = verdict("fine-tuning-needs-fewer-steps", MIXED)
    assert mixed.verdict == "depends"
    assert "yes: moved, transformer, 10, 40, 160, 500 examples: +0.10 to +0.70 nats" in mixed.measured  # over longer
    assert "no: inverted, MLP, 10, 40, 160, 500 examples: -0.80 to -0.20 nats" in mixed.measured  # beside as long
    doubtful = verdict("fine-tuning-needs-fewer-steps", MIXED, points=-10)
    assert "inverted, MLP, 10**, 40**, 160**, 500** examples: -0.80 to -0.20 nats" in doubtful.measured


def test_the_table_holds_answers_and_bounds(record):
    rows = table([gain for gain in gains(record(MIXED)) if gain.data != "docs"])
    assert rows["answer"].tolist() == [True] * 4 + [False] * 4
    assert rows["mean"][4:].tolist() == pytest.approx([-0.8, -0.6, -0.4, -0.2], abs=0.01)
    assert ((rows["lower"] < rows["mean"]) & (rows["mean"] < rows["upper"])).all()
