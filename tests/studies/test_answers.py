"""Fifteen answers: each rests on rows whose verdicts it was written for, and what is computed follows them."""

import dataclasses
import json
import re
import statistics
import sys

import pytest

from lora_lab.studies import answers
from lora_lab.studies.claims import small
from lora_lab.studies.claims.deciding import Entry, Result, read_claims
from lora_lab.studies.records import load_all
from tests.helpers import ROOT, command, error_line, printed_json

sys.path.insert(0, str(ROOT / "docs"))  # a script, which is no package
import generate

FROZEN = json.loads((ROOT / "tests/acceptance/claims.json").read_text(encoding="utf-8"))
ASKED = ["rank", "rate", "alpha", "layers", "full", "faster", "memory", "fit", "data", "overfitting", "forgetting"]
ASKED += ["variants", "bits", "merge", "batch"]
LESSONS = ["adapter", "why", "pretrained", "layer", "file", "score", "written"]
BUILT = ["adapter", "layer", "file"]  # by a lesson, whatever any row says


@pytest.fixture(scope="module")
def found():
    return answers.load()


def with_row(answer, name, **result):
    """The same answer with another result of one of its rows."""
    entry = answer.rows[name]
    changed = dataclasses.replace(entry, result=dataclasses.replace(entry.result, **result))
    return dataclasses.replace(answer, rows={**answer.rows, name: changed})


# What a person wrote


def test_there_are_fifteen_and_those_of_lessons_and_each_says_what_its_rows_say_today(found):
    assert list(found) == ASKED + LESSONS
    assert [name for name, answer in found.items() if not answer.rows] == BUILT
    assert {name: answer.faults for name, answer in found.items() if answer.faults} == {}
    for answer in found.values():
        assert {name: FROZEN[name]["verdict"] for name in answer.rows} == answer.answer.rows
        assert (ROOT / answer.answer.link.partition("#")[0]).is_file()


SENTENCE, DO = (answers.read_answers()["rank"].answer, answers.read_answers()["rank"].do)
REFUSED = [
    (SENTENCE, f"{' '.join(['Word'] * 20)} more.", "it has 21 words"),
    (DO, f"{DO} {'word ' * 20}end.", "at most 40 are read"),
    (SENTENCE, "start with 16.", "answer"),
    ('question = "Which rank should I use?"', 'question = "Which rank."', "question"),
    ('rank-one-suffices = "falls"', 'rank-one-suffices = "true"', "rows"),
    ('ask = "rank"', 'ask = "rank"\nverdict = "stands"', "verdict"),
]


@pytest.mark.parametrize(("old", "new", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_what_is_too_long_unknown_or_of_another_form_is_refused(tmp_path, old, new, says):
    text, path = answers.SHIPPED.read_text(encoding="utf-8"), tmp_path / "answers.toml"
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        answers.read_answers(path)


def test_a_sentence_of_20_words_is_accepted(tmp_path):
    text, path = answers.SHIPPED.read_text(encoding="utf-8"), tmp_path / "answers.toml"
    path.write_text(text.replace(SENTENCE, f"{'Word ' * 19}end."), encoding="utf-8")
    assert answers.read_answers(path)["rank"].answer == f"{'Word ' * 19}end."


# What is computed


def test_a_changed_verdict_asks_for_the_sentence_to_be_read_again_and_stops_the_page(found, monkeypatch):
    changed = with_row(found["rank"], "rank-one-suffices", verdict="stands")
    assert changed.faults == ["rank-one-suffices was falls, and now stands"]
    assert "read again: rank-one-suffices was falls" in " ".join(changed.explained().split())
    assert "(read again: rank-one-suffices was falls, and now stands)" in answers.table({"rank": changed})
    monkeypatch.setattr(answers, "load", lambda: {**found, "rank": changed})
    with pytest.raises(ValueError, match=r"Read the answer 'rank' .* again: rank-one-suffices was falls"):
        generate.write_answers()


def test_what_rests_on_open_rows_must_say_that_it_is_not_settled_and_nothing_else_may(found):
    for name, answer in found.items():
        if name in BUILT:
            assert answer.dots == ""
            continue
        undecided = all(FROZEN[row]["verdict"] in ("open", "untestable") for row in answer.rows)
        assert answer.answer.answer.startswith("Not settled here: ") == undecided == (answer.dots == "○○○"), name
    opened = with_row(found["fit"], "quiz-8b-in-6-gb", verdict="open")
    opened = with_row(opened, "qlora-65b-in-48-gb", verdict="open")
    sentence = dataclasses.replace(found["rank"].answer, answer="Not settled here: it depends.")
    for answer in (opened, dataclasses.replace(found["rank"], answer=sentence)):
        assert "it must begin with 'Not settled here: ' if, and only if" in answer.faults[-1]


OWN = "our own question"


@pytest.mark.parametrize(
    ("rows", "dots", "scope"),  # scale, verdict, how the source was read
    [
        ([("SmolLM2-135M", "open", "full text")], "○○○", ""),
        ([("", "untestable", "full text")], "○○○", ""),
        ([("digits", "falls", OWN)], "●○○", "Measured on small models."),
        ([("small bases, three", "stands", OWN)], "●○○", "Measured on small models."),
        ([("counted", "falls", "full text")], "●○○", "Counted, not measured."),
        ([("counted", "stands", "full text")], "●●○", "Counted, not measured. Others report on larger models, too."),
        ([("SmolLM2-135M", "depends", "full text")], "●●○", "Measured on SmolLM2."),
        ([("two models, CPU", "stands", OWN)], "●●○", "Measured on SmolLM2."),
        ([("SmolLM2-135M", "stands", "second-hand")], "●●○", "Measured on SmolLM2."),
        ([("SmolLM2-135M", "stands", "full text")], "●●●", "Measured on SmolLM2. Others report on larger models, too."),
        ([("digits", "falls", OWN), ("SmolLM2-135M", "falls", OWN)], "●●○", "Measured on SmolLM2 and small models."),
        (
            [("SmolLM2-135M", "falls", OWN), ("published, GPUs", "depends", OWN)],
            "●●●",
            "Measured on SmolLM2. Others report on larger models, too.",
        ),
        ([("SmolLM2-135M", "falls", OWN), ("published, GPUs", "open", OWN)], "●●○", "Measured on SmolLM2."),
        ([("published, GPUs", "falls", OWN)], "●○○", "Measured by others."),
    ],
)
def test_dots_and_scope_follow_the_scales_of_the_rows_that_are_decided(found, rows, dots, scope):
    claim = read_claims()["two-real-knobs"]
    entries = {
        str(i): Entry(dataclasses.replace(claim, scale=scale, read=read), Result(verdict, "so"), "", "")
        for i, (scale, verdict, read) in enumerate(rows)
    }
    answer = dataclasses.replace(found["rank"], rows=entries)
    assert (answer.dots, answer.scope) == (dots, scope)


def test_the_scope_names_that_of_the_number_even_if_its_row_is_open(found):
    written = found["written"]
    assert written.rows[written.answer.of].result.verdict == "open"
    assert written.scope == "Measured on SmolLM2 and small models."
    elsewhere = dataclasses.replace(written.answer, of="low-energy-rank-is-learning")
    assert dataclasses.replace(written, answer=elsewhere).scope == "Measured on small models."


def test_numbers_are_those_of_the_rows(found):
    seen = 0
    for name, answer in found.items():
        assert re.search(r"\d", answer.number), name
        assert not set("{}") & set(answer.number), name
        if of := answer.answer.of:
            said = FROZEN[of]["shown_by"] + read_claims()[of].number
            values = re.findall(r"[+-]?\d+\.\d+", answer.number)
            assert all(value in said for value in values), name
            seen += len(values)
    assert seen > 15


def test_what_is_counted_is_counted_on_the_models_that_are_named(found):
    """SmolLM2: 30 blocks of (in, out) below, 576 numbers for each of 49,152 tokens, and the weights of norms."""
    shapes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    every = 49_152 * 576 + 30 * (sum(m * n for m, n in shapes) + 2 * 576) + 576
    trained = 30 * 8 * sum(m + n for m, n in shapes)
    assert found["layer"].number.split(" numbers")[0].endswith(f" {trained:,}")
    assert f" {every:,}: {100 * trained / every:.1f} %" in found["layer"].number
    assert f" {4 * trained / 1e6:.0f} MB" in found["file"].number
    assert found["adapter"].number == f"The file here holds {trained // 4:,} numbers, and the model {every:,}."


def test_a_number_follows_its_row_and_is_missed_where_the_row_says_it_in_other_words(found):
    rank = found["rank"]
    measured = rank.rows["rank-one-suffices"].result.measured
    for words, number in ((measured.replace("+0.040", "+0.123"), "+0.123 nats of test loss"), ("no words", "")):
        changed = with_row(rank, "rank-one-suffices", measured=words)
        said = answers._say_number(rank.answer, changed.rows, {})
        assert number in said
        assert bool(said) == bool(number)
        faults = dataclasses.replace(changed, number=said).faults
        assert faults == ([] if number else ["its number is not where it was"])
    assert answers._say_number(found["overfitting"].answer, found["overfitting"].rows, {}) == ""


def test_passes_and_their_rates_are_the_records(found):
    once, again = (small.best_rates(*load_all(kind).values()) for kind in ("tiny_rank", "tiny_repeats"))
    ratios = [
        statistics.geometric_mean(
            rate / once[base, "r=8, 60 steps"] for (base, name), rate in again.items() if name == runs
        )
        for runs in ("r=8, 240 steps", "r=8, 720 steps")
    ]
    assert f"four want about {ratios[0]:.1f} times the rate of one (rank 8, small models)" in found["data"].answer.do
    assert ratios[1] < ratios[0] / 3


def test_the_loss_at_equal_fit_is_the_records(found):
    assert "256 examples, LoRA r=8: more at 2." in FROZEN["better-at-equal-fit"]["shown_by"]
    difference, lower, upper = map(float, re.findall(r"[+-]\d+\.\d+", found["overfitting"].number))
    assert 0 < lower < difference < upper


# The command and the page


def test_the_command_lists_all_and_explains_one(found, capsys):
    assert command("answers") == 0
    printed = capsys.readouterr().out
    for answer in found.values():
        assert f"{answer.dots} {answer.answer.question}\n{16 * ' '} {answer.answer.answer}" in printed
    assert command("answers", "faster") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    flat, faster = " ".join(printed.split()), found["faster"]
    for text in (faster.answer.answer, faster.number, faster.dots, faster.answer.do, faster.answer.link):
        assert text in flat
    assert all(f"{name} ({entry.verdict})" in flat for name, entry in faster.rows.items())
    assert command("answers", "faster", "--json") == 0
    (document,) = printed_json(capsys)[0]
    assert document == json.loads(json.dumps(faster.to_dict()))
    assert (document["strength"], document["read_again"]) == (faster.dots.count("●"), [])
    assert command("answers", "quicker") == 1
    assert "'quicker'; there are rank, rate" in error_line(capsys)


def test_the_page_has_each_answer_in_bold_with_its_number_and_rows(found):
    page = " ".join((ROOT / "docs" / "answers.md").read_text(encoding="utf-8").split())
    for answer in found.values():
        said = answer.answer
        text = f"## {said.question} **{said.answer}** {answer.dots} {answer.number} {said.do}"
        assert " ".join(text.split()) in page
        assert all(f"`{name}` {entry.verdict}" in page for name, entry in answer.rows.items())


def test_there_are_at_most_eleven_guides_beside_the_generated_pages():
    assert len({path.name for path in (ROOT / "docs").glob("*.md")} - {"answers.md", "commands.md"}) <= 11
