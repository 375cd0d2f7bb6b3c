"""Every exercise, checked and graded: its solution passes, and each wrong answer gets its sentence and loses a point.

An exercise that is added to lora_lab/course/exercises is tested here without a line more.
"""

import ast
import inspect
import itertools

import numpy as np
import pytest
import torch

from lora_lab.course.exercise import EXERCISES, REFLECTIONS
from lora_lab.course.judge import call, judge, untouched
from lora_lab.course.sheets import points
from tests.helpers import ROOT

pytestmark = pytest.mark.usefixtures("quantiles_once")
SAMPLES = 150  # of the inputs, to estimate how often two answers agree
SEEDS = (1, 2, 3)  # of hidden tests
LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


def earned(exercise, answer, seed=1):
    return points(answer, exercise.points, seed)


each_exercise = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
each_mistake = pytest.mark.parametrize(
    ("exercise", "answer", "sentence"),
    [
        pytest.param(exercise, answer, sentence, id=f"{exercise.name}-{number}")
        for exercise in EXERCISES.values()
        for number, (answer, sentence) in enumerate(exercise.mistakes)
    ],
)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr("lora_lab.course.judge.SECONDS", 20.0)  # other tests run on the same cores


@each_exercise
def test_the_solution_passes_and_has_all_points(exercise):
    for _ in range(4):  # inputs are drawn anew
        verdict = judge(exercise, exercise.solution)
        assert (verdict.passed, verdict.text) == (True, exercise.praise)
    assert [earned(exercise, exercise.solution, seed) for seed in SEEDS] == 3 * [len(exercise.points)]


@pytest.mark.slow
@each_mistake
def test_a_mistake_is_refused_with_its_sentence(exercise, answer, sentence):
    for _ in range(1 if exercise.inputs else 4):  # what inputs leave to chance is computed below
        verdict = judge(exercise, answer)
        assert (verdict.passed, verdict.text) == (False, sentence)


@pytest.mark.slow
@each_mistake
def test_a_mistake_loses_a_point(exercise, answer, sentence):
    assert max(earned(exercise, answer, seed) for seed in SEEDS) < len(exercise.points)


@pytest.mark.slow
@each_exercise
def test_points_are_spread_and_do_not_depend_on_what_ran_before(exercise):
    answers = [answer for answer, _ in exercise.mistakes]
    first = [earned(exercise, answer) for answer in answers]
    assert len(answers) < 4 or set(first) & set(range(1, len(exercise.points)))
    state = torch.get_rng_state()
    torch.rand(3)
    assert [earned(exercise, answer) for answer in answers] == first
    torch.set_rng_state(state)
    earned(exercise, answers[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("exercise", [each for each in EXERCISES.values() if each.inputs], ids=lambda each: each.name)
def test_a_check_tells_mistakes_apart(exercise):
    """From the solution and from each other: if not, the inputs are too special (rank 1, square) or too few.

    A mistake that agrees with another answer on a share p of inputs is misjudged in p ** draws of all checks.
    """
    names = list(inspect.signature(exercise.solution).parameters)
    known = [(answer, sentence) for answer, sentence in exercise.mistakes if sentence in exercise.wrong]
    answers = [(exercise.solution, exercise.praise), *known]
    rng = np.random.default_rng(0)
    cases = [exercise.inputs(rng) for _ in range(SAMPLES)]
    with untouched():
        behaviours = [[call(answer, case, names) for case in cases] for answer, _ in answers]
    texts = [[(repr(did.value), repr(did.error), did.changed) for did in behaviour] for behaviour in behaviours]
    for one, other in itertools.combinations(range(len(texts)), 2):
        assert texts[one] != texts[other], f"mistakes {one} and {other} coincide (0 is the solution)"
        agreement = np.mean([first == second for first, second in zip(texts[one], texts[other], strict=True)])
        if answers[one][1] != answers[other][1]:
            misjudged = agreement**exercise.draws
            assert misjudged < 1e-6, (
                f"mistakes {one} and {other} (0 is the solution) agree on {agreement:.0%} of the inputs, so that "
                f"{exercise.draws} draws confuse them in {misjudged:.1e} of all checks: raise draws"
            )


def silly_answers(count):
    """Name -> an answer that no exercise should accept, and that has no points."""
    values = (None, 0, 1, 1.0, 3, "x", [1, 2], [[1, 2], [3]], float("nan"), (0, 0), {}, {"LoRA": 1}, object)
    answers = {repr(value): lambda *_, value=value: value for value in values}
    answers |= {"division": lambda *_: 1 / 0, "exit": lambda *_: exit()}
    return answers | {f"argument {i}": lambda *arguments, i=i: arguments[i] for i in range(count)}


def as_class(function):
    """A class whose objects return what a function returns."""
    return type("Silly", (), {"__init__": lambda self, *_: None, "__call__": lambda self, *a: function(*a)})


@each_exercise
def test_silly_answers_are_refused_without_a_crash_and_have_no_points(exercise, monkeypatch):
    monkeypatch.setattr("lora_lab.course.nearly.find_change", lambda *_: None)  # none is near
    for name, answer in silly_answers(len(inspect.signature(exercise.solution).parameters)).items():
        verdict = judge(exercise, as_class(answer) if isinstance(exercise.solution, type) else answer)
        assert verdict.passed is False, name
        assert verdict.text
        assert isinstance(exercise.solution, type) or earned(exercise, answer) == 0, name
    if exercise.inputs:  # as copied from an example
        result = exercise.solution(*exercise.inputs(np.random.default_rng(5)))
        assert earned(exercise, lambda *_: result) == 0
    for value in (None, 0, "x", exercise.name, [1, 2]):  # a value in place of a function
        assert "without calling it" in judge(exercise, value).text


@each_exercise
def test_a_stub_counts_as_not_started(exercise):
    def stub(*arguments):
        raise NotImplementedError("your code here")

    class Stub:
        def __init__(self, *arguments):
            raise NotImplementedError("your code here")

    assert earned(exercise, stub) == 0
    if isinstance(exercise.solution, type) and not exercise.properties[0].holds(Stub, np.random.default_rng()):
        return  # what is written in the lesson around the hole decides, such as the name of the parent class
    assert judge(exercise, Stub if isinstance(exercise.solution, type) else stub).passed is None


@each_exercise
def test_each_sentence_and_point_is_needed(exercise):
    sentences, tests = {sentence for _, sentence in exercise.mistakes}, exercise.points
    assert {each.sentence for each in exercise.properties if each.sentence} <= sentences
    assert len({test.__doc__ for test in tests}) == len({test.__name__ for test in tests}) == len(tests) >= 2
    assert exercise.stated.function not in {test.__name__ for test in tests}
    assert all("\n" not in test.__doc__ for test in tests)  # a line of a sheet


@each_exercise
def test_no_hint_gives_a_whole_line_of_the_solution_away(exercise):
    functions = [node for node in ast.walk(ast.parse(exercise.stated.source)) if isinstance(node, ast.FunctionDef)]
    lines = {ast.unparse(statement) for node in functions for statement in node.body}
    lines |= {line.removeprefix("return ") for line in lines}
    for line in lines:
        assert not any(line.replace(" ", "") in text.replace(" ", "") for text in exercise.hints if len(line) > 12), (
            line
        )


def test_what_an_answer_prints_or_warns_of_does_not_reach_the_grade(capfd):
    """nbgrader takes anything on stderr for a failure, and the last value for the points."""

    def noisy(delta, z):
        import sys
        import warnings

        print("here")
        print("there", file=sys.stderr)
        warnings.warn("careful", stacklevel=1)
        return delta.T @ z

    assert earned(EXERCISES["gradient"], noisy) == 3
    printed, errors = capfd.readouterr()
    assert errors == ""
    assert printed.splitlines() == [f"holds:         {each.__doc__}" for each in EXERCISES["gradient"].points]


def test_every_lesson_has_exercises_and_a_reflection_with_a_rubric():
    assert sorted({exercise.stated.lesson for exercise in EXERCISES.values()}) == sorted(REFLECTIONS) == LESSONS
    assert all(reflection.rubric for reflection in REFLECTIONS.values())


@pytest.mark.parametrize(
    ("edit", "complaint"), [(("x + y", "x"), "'x \\+ y' is not in the solution of 'gradient'"), (("x",), "zip")]
)
def test_an_edit_that_changes_nothing_is_an_error(edit, complaint):
    with pytest.raises(ValueError, match=complaint):
        EXERCISES["gradient"].answer(edit)
