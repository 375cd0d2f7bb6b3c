"""Which function decides which claim, and the rules that all verdicts obey."""

import dataclasses

import pytest

from lora_lab import records
from lora_lab.claims.deciding import DECIDERS, Result, decides, judge, near, over_cases
from lora_lab.claims.facts import Claim
from tests.helpers import COMMIT

CLAIM = Claim("for-a-test", "LoRA is good.", "A paper", "full text", "mechanism", "yes", "it is", "nothing")


@pytest.fixture
def registered():
    """Registers functions for the claim of this file, and forgets them."""
    yield decides
    DECIDERS.pop(CLAIM.id, None)


def write(folder, score, device="CPU A", date="2026-11-01"):
    record = records.Record("trial", device, {"cpu": "x"}, COMMIT, date, "a command", {}, [{"score": score}])
    records.write(record, folder)


def by_score(claim, record):
    score = record.rows[0]["score"]
    return Result("open" if score is None else "stands" if score > 0 else "falls", f"score {score}")


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ([True, True], "stands"),
        ([False, False], "falls"),
        ([True, False], "depends"),
        ([True, False, None], "depends"),
        ([False, None], "falls"),
        ([True, None], "open"),
        ([None], "open"),
        ([], "open"),
    ],
)
def test_cases_make_a_verdict(answers, verdict):
    result = over_cases([(answer, f"case {i}") for i, answer in enumerate(answers)], "the case")
    assert result.verdict == verdict
    assert result.on == ("the case" if verdict == "depends" else "")
    assert all(f"case {i}" in result.measured for i in range(len(answers)))


def test_numbers_are_near_within_a_share():
    assert near(109, 100)
    assert not near(111, 100)
    assert near(111, 100, 0.2)
    assert not near(-100, 100)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("wins", "x"), "must be one of stands"), (("depends", "x"), "has an 'on'"), (("falls", "x", "y"), "has an 'on'")],
)
def test_a_result_that_makes_no_sense_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        Result(*arguments)


def test_a_claim_is_decided_by_one_function(registered):
    registered(CLAIM.id)(lambda claim: Result("stands", "yes"))
    with pytest.raises(ValueError, match="'for-a-test' is decided twice"):
        registered(CLAIM.id)(lambda claim: Result("falls", "no"))


def test_a_function_that_counts_is_named_with_the_day(registered):
    @registered(CLAIM.id)
    def counts(claim):
        return Result("stands", claim.sentence)

    result = judge(CLAIM)
    assert (result.verdict, result.measured, result.machine) == ("stands", "LoRA is good.", "any")
    assert result.shown_by == f"{__name__}.counts"
    assert len(result.date) == 10


def test_a_record_that_changes_turns_the_verdict(registered, tmp_path):
    registered(CLAIM.id, record="trial")(by_score)
    for score, verdict in ((1, "stands"), (-1, "falls"), (None, "open")):
        write(tmp_path, score)
        result = judge(CLAIM, tmp_path)
        assert (result.verdict, result.measured) == (verdict, f"score {score}")
        assert (result.shown_by, result.date, result.machine) == ("record cpu-a-trial", "2026-11-01", "CPU A")


def test_without_its_record_a_claim_is_open(registered, tmp_path):
    registered(CLAIM.id, record="trial")(by_score)
    result = judge(CLAIM, tmp_path)
    assert (result.verdict, result.date, result.machine) == ("open", None, None)
    assert "no record 'trial'" in result.shown_by


def test_a_record_that_lacks_what_is_needed_decides_nothing(registered, tmp_path):
    registered(CLAIM.id, record="trial")(lambda claim, record: Result("stands", record.rows[0]["missing"]))
    write(tmp_path, 1)
    result = judge(CLAIM, tmp_path)
    assert (result.verdict, result.measured) == ("open", "this record lacks what is needed (KeyError: 'missing')")


@pytest.mark.parametrize(
    ("scores", "verdict", "machine"),
    [
        ((1, 1), "stands", "CPU B"),  # the newest
        ((1, -1), "depends", "CPU B"),
        ((1, None), "stands", "CPU A"),
        ((None, None), "open", "CPU B"),
    ],
)
def test_machines_that_disagree_are_what_it_depends_on(registered, tmp_path, scores, verdict, machine):
    registered(CLAIM.id, record="trial")(by_score)
    write(tmp_path, scores[0])
    write(tmp_path, scores[1], "CPU B", "2026-11-02")
    result = judge(CLAIM, tmp_path)
    assert (result.verdict, result.machine) == (verdict, machine)
    assert result.on == ("the machine" if verdict == "depends" else "")
    if verdict == "depends":
        assert "CPU A: stands, score 1; CPU B: falls, score -1" in result.measured


def test_what_nothing_decides_is_open_or_untestable_with_its_reason():
    waiting = dataclasses.replace(CLAIM, open="no data", record="rates")
    assert judge(waiting) == Result("open", "no data", shown_by="waits for the record 'rates'")
    assert judge(dataclasses.replace(CLAIM, open="no data")).shown_by == "no study is planned"
    assert judge(dataclasses.replace(CLAIM, untestable="no GPU")).verdict == "untestable"
