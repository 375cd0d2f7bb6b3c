"""Which function decides which claim, and the rules that all verdicts obey."""

import dataclasses
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lora_lab import lessons, records
from lora_lab.studies.claims import ledger
from lora_lab.studies.claims.deciding import (
    DECIDERS,
    Claim,
    Result,
    decide_cases,
    decides,
    find_turning_conditions,
    judge,
    near,
)
from tests.helpers import COMMIT

LESSON = "06_which_rank"
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
    result = decide_cases([(answer, f"case {i}") for i, answer in enumerate(answers)], "the case")
    assert result.verdict == verdict
    assert result.on == ("the case" if verdict == "depends" else "")
    assert all(f"case {i}" in result.measured for i in range(len(answers)))
    refuted = decide_cases([(answer, f"case {i}") for i, answer in enumerate(answers)], "the case", always=True)
    assert refuted.verdict == ("falls" if verdict == "depends" else verdict)


def test_an_answer_is_turned_by_what_alone_tells_two_cases_apart():
    def cases(*answers):
        return [(answer, {"the rank": rank, "the model": model}) for answer, rank, model in answers]

    same_rank = (True, 1, "a"), (False, 1, "b")
    assert find_turning_conditions(cases(*same_rank)) == "the model"
    assert find_turning_conditions(cases(*same_rank, (True, 8, "b"))) == "the rank and the model"
    assert find_turning_conditions(cases(*same_rank, (None, 8, "b"))) == "the model"
    assert find_turning_conditions(cases((True, 1, "a"), (False, 8, "b"))) == "several conditions at once"
    for undecided in ([], cases((True, 1, "a"), (True, 8, "b"))):  # it does not depend
        assert find_turning_conditions(undecided) == "several conditions at once"


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


def test_a_function_that_fails_for_another_reason_is_not_taken_for_a_record_that_lacks_something(registered, tmp_path):
    registered(CLAIM.id, record="trial")(lambda claim, record: Result("stands", sorted([1, None])))
    write(tmp_path, 1)
    with pytest.raises(TypeError, match="not supported between"):
        judge(CLAIM, tmp_path)


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


# From a lesson


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Writes a lesson whose last cell has shown outcomes, and returns its file."""

    def run(*outcomes):
        outputs = []
        monkeypatch.setattr(
            lessons,
            "display",
            lambda data, raw, metadata=None: outputs.append(new_output("display_data", data, metadata=metadata)),
        )
        lessons.claims(*outcomes)
        cells = [new_markdown_cell("## Claims"), new_code_cell("1"), new_code_cell("2", outputs=outputs)]
        nbformat.write(new_notebook(cells=cells), tmp_path / f"{LESSON}.ipynb")
        return tmp_path / f"{LESSON}.ipynb"

    return run


def test_a_lessons_stored_output_decides_and_another_one_turns_the_verdict(run, monkeypatch):
    measured = dataclasses.replace(CLAIM, lesson=LESSON)
    monkeypatch.setattr(ledger, "read_claims", lambda: {CLAIM.id: measured})
    path = run(lessons.Outcome(CLAIM.id, "depends", "digits, 5 seeds", True, "the rank"))
    result = judge(measured, lessons=path.parent)
    assert (result.verdict, result.measured, result.on) == ("depends", "digits, 5 seeds", "the rank")
    assert result.shown_by == f"lesson {LESSON}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result.date)
    assert result.machine.endswith("cores")
    stored = path.read_text(encoding="utf-8")
    assert stored.count('"verdict": "depends"') == stored.count('"on": "the rank"') == 1
    path.write_text(stored.replace('"depends"', '"falls"').replace('"on": "the rank"', '"on": ""'), encoding="utf-8")
    assert judge(measured, lessons=path.parent).verdict == "falls"


def test_what_a_lesson_has_not_shown_is_open(run):
    path = run(lessons.Outcome("two-real-knobs", "stands", "tried", True))
    result = judge(dataclasses.replace(CLAIM, lesson=LESSON), lessons=path.parent)
    assert (result.verdict, result.date, result.shown_by) == ("open", None, f"lesson {LESSON}")


def test_a_lesson_shows_that_it_decides_itself_whatever_its_last_run_stored(run, monkeypatch):
    monkeypatch.setattr(ledger, "read_claims", lambda: {CLAIM.id: dataclasses.replace(CLAIM, lesson=LESSON)})
    page = run(lessons.Outcome(CLAIM.id, "stands", "digits", True)).read_text(encoding="utf-8")
    assert "this lesson decides" in page


def test_a_damaged_lesson_is_told(tmp_path):
    (tmp_path / f"{LESSON}.ipynb").write_text("{}")
    with pytest.raises(ValueError, match=r"\.ipynb lacks the entry 'cells'"):
        judge(dataclasses.replace(CLAIM, lesson=LESSON), lessons=tmp_path)
