"""Each exercise: the solution is accepted, and each wrong answer is refused with its sentence.

``exercises.json`` holds, lesson by lesson, the source of helpers, and for each exercise an expression for the solution
and for each wrong answer. Nothing of it is read from the package.
"""

import functools
import json
from pathlib import Path

import pytest

from lora_lab.course import check
from lora_lab.course.exercise import EXERCISES as REGISTERED

LESSONS = json.loads(Path(__file__).with_name("exercises.json").read_text(encoding="utf-8"))
EXERCISES = {name: lesson for lesson, stored in LESSONS.items() for name in stored["exercises"]}
pytestmark = pytest.mark.usefixtures("quantiles_once")
each_exercise = pytest.mark.parametrize("name", EXERCISES)


@functools.cache
def names_of(lesson):
    """Return the names that the answers of a lesson use."""
    names = {"__name__": f"answers_{lesson}"}
    exec("\n".join(LESSONS[lesson]["helpers"]), names)
    return names


@pytest.fixture
def judge(capsys, monkeypatch):
    """Check the source of an answer, and return whether it is right and what the first line says."""
    monkeypatch.setattr("lora_lab.course.judge.SECONDS", 20.0)  # other tests run on the same cores

    def ask(name, source):
        answer = eval(source, names_of(EXERCISES[name]))
        capsys.readouterr()
        right = check(name, answer)
        return bool(right), capsys.readouterr().out.split("\n")[0]

    return ask


def stored(name):
    return LESSONS[EXERCISES[name]]["exercises"][name]


def test_each_exercise_has_wrong_answers_here():
    assert set(EXERCISES) == set(REGISTERED), "exercises.json holds each exercise of lora_lab/course/exercises/"
    assert min(sum(map(len, stored(name)["mistakes"].values())) for name in EXERCISES) >= 5


@each_exercise
def test_the_solution_is_accepted(name, judge):
    assert judge(name, stored(name)["solution"]) == (True, f"✓ Correct. {stored(name)['praise']}")


@each_exercise
def test_each_wrong_answer_is_refused_with_its_sentence(name, judge):
    expected = {answer: sentence for sentence, answers in stored(name)["mistakes"].items() for answer in answers}
    said = {answer: judge(name, answer) for answer in expected}
    assert said == {answer: (False, f"✗ Not yet. {sentence}") for answer, sentence in expected.items()}
