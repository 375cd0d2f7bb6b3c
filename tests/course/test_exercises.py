"""Every exercise, by itself: its solution passes, and each planted mistake is refused with its sentence.

An exercise that is added to lora_lab/course/exercises is tested here without a line more.
"""

import ast
import functools
import inspect
import itertools

import numpy as np
import pytest
from scipy.stats import t

import lora_lab.course.exercises  # noqa: F401
from lora_lab.course.calls import call, parameters_of, untouched
from lora_lab.course.exercise import EXERCISES
from lora_lab.course.judge import SECONDS, judge
from tests.helpers import ROOT

SAMPLES = 150  # of the inputs, to estimate how often two answers agree


def checks(exercise):
    """How often an answer is checked: with probes several times, since only this shows how much is left to chance.

    With them ``test_a_check_tells_mistakes_apart`` computes it: at most one of a million checks.
    """
    return range(2 if exercise.inputs else 8)


each_exercise = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
PLANTED = [
    pytest.param(exercise, answer, sentence, id=f"{exercise.name}-{number}")
    for exercise in EXERCISES.values()
    for number, (answer, sentence) in enumerate(exercise.mistakes)
]


@pytest.fixture(scope="module", autouse=True)
def quantiles_once():
    """Answers that try one number of seeds after another ask for thousands of quantiles, and scipy is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "ppf", functools.cache(t.ppf))
        yield


@each_exercise
def test_the_solution_passes(exercise):
    for _ in checks(exercise):
        verdict = judge(exercise, exercise.solution)
        assert verdict.passed, verdict.text
        assert verdict.text == exercise.praise


@pytest.mark.parametrize(("exercise", "answer", "sentence"), PLANTED)
def test_a_planted_mistake_is_refused_with_its_sentence(exercise, answer, sentence):
    for _ in checks(exercise):
        verdict = judge(exercise, answer)
        assert verdict.passed is False
        assert verdict.text == sentence


@pytest.mark.parametrize("exercise", [each for each in EXERCISES.values() if each.inputs], ids=lambda each: each.name)
def test_a_check_tells_mistakes_apart(exercise):
    """From the solution and from each other: if not, the inputs are too special (rank 1, square) or too few.

    A mistake that agrees with another answer on a share p of inputs is misjudged in p ** draws of all checks.
    """
    names = parameters_of(exercise.solution)
    sentences = [exercise.praise, *(sentence for _, sentence in exercise.mistakes)]
    answers = [exercise.solution, *(answer for answer, _ in exercise.mistakes)]
    rng = np.random.default_rng(0)
    cases = [exercise.inputs(rng) for _ in range(SAMPLES)]
    with untouched():
        behaviours = [[call(answer, case, names) for case in cases] for answer in answers]
    texts = [
        [(repr(outcome.value), repr(outcome.error), outcome.changed) for outcome in behaviour]
        for behaviour in behaviours
    ]
    for one, other in itertools.combinations(range(len(texts)), 2):
        assert texts[one] != texts[other], f"mistakes {one} and {other} coincide (0 is the solution)"
        agreement = np.mean([first == second for first, second in zip(texts[one], texts[other], strict=True)])
        if sentences[one] != sentences[other]:
            misjudged = agreement**exercise.draws
            assert misjudged < 1e-6, (
                f"mistakes {one} and {other} (0 is the solution) agree on {agreement:.0%} of the inputs, so that "
                f"{exercise.draws} draws confuse them in {misjudged:.1e} of all checks: raise draws"
            )


def silly_answers(exercise):
    """Name -> an answer that no exercise should accept."""

    def raising(*arguments):
        raise RuntimeError("no")

    answers = {
        "None": lambda *_: None,
        "0": lambda *_: 0,
        "1.0": lambda *_: 1.0,
        "text": lambda *_: "x",
        "nan": lambda *_: float("nan"),
        "ragged": lambda *_: [[1, 2], [3]],
        "class": lambda *_: object,
        "division": lambda *_: 1 / 0,
        "raising": raising,
    }
    count = len(parameters_of(exercise.solution))
    return answers | {f"argument {i}": lambda *arguments, i=i: arguments[i] for i in range(count)}


def as_class(function):
    """A class whose objects return what a function returns."""
    return type("Silly", (), {"__init__": lambda self, *_: None, "__call__": lambda self, *a: function(*a)})


@each_exercise
def test_silly_answers_are_refused_without_a_crash(exercise):
    for name, answer in silly_answers(exercise).items():
        verdict = judge(exercise, as_class(answer) if isinstance(exercise.solution, type) else answer)
        assert verdict.passed is False, name
        assert verdict.text
    for value in (None, 0, "x", exercise.solution.__name__, [1, 2]):  # a value in place of a function
        assert "without calling it" in judge(exercise, value).text


@each_exercise
def test_a_stub_counts_as_not_started(exercise):
    def stub(*arguments):
        raise NotImplementedError("your code here")

    class Stub:
        def __init__(self, *arguments):
            raise NotImplementedError("your code here")

    if isinstance(exercise.solution, type) and not exercise.properties[0].holds(Stub, np.random.default_rng()):
        return  # what is written in the lesson around the hole decides, such as the name of the parent class
    assert judge(exercise, Stub if isinstance(exercise.solution, type) else stub).passed is None


@each_exercise
def test_an_endless_answer_is_stopped(exercise, monkeypatch):
    def endless(*arguments):
        while True:
            pass

    monkeypatch.setattr("lora_lab.course.judge.SECONDS", 0.05)
    if not isinstance(exercise.solution, type):
        assert "still running" in judge(exercise, endless).text
    assert SECONDS <= 2


@each_exercise
def test_texts_and_numbers_are_in_order(exercise):
    sentences = [sentence for _, sentence in exercise.mistakes]
    for text in [*sentences, *exercise.hints, exercise.praise]:
        assert text.endswith("."), text
        assert len(text) <= 160, text
    assert len(set(sentences)) >= 3
    assert {each.sentence for each in exercise.properties if each.sentence} <= set(sentences)
    assert len(exercise.hints) == len(set(exercise.hints)) == 3
    assert 1 <= exercise.difficulty <= 3
    assert 2 <= exercise.minutes <= 30
    lesson_module = inspect.getmodule(exercise.properties[0].holds).__doc__
    assert f"lesson {exercise.lesson[:2]}" in lesson_module


@each_exercise
def test_no_hint_gives_a_whole_line_of_the_solution_away(exercise):
    tree = ast.parse(exercise.source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lines = {ast.unparse(statement) for node in functions for statement in node.body if not is_docstring(statement)}
    lines |= {line.removeprefix("return ") for line in lines}
    for line in lines:
        assert not any(line.replace(" ", "") in text.replace(" ", "") for text in exercise.hints if len(line) > 12), (
            line
        )


def is_docstring(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def test_lessons_of_exercises_are_known():
    """00 and 08 may be written later than their exercises."""
    lessons = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} | {"00_first_look", "08_forgetting"}
    assert {exercise.lesson for exercise in EXERCISES.values()} <= lessons
