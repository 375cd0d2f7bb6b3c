"""Each hidden test by itself: the solution has all points, a planted mistake loses one, and nothing comes of nothing.

What is added to lora_lab/course/grading is tested here without a line more, but for its name in the list.
"""

import ast
import inspect
import re

import numpy as np
import pytest
import torch

import lora_lab.course.exercises
import lora_lab.course.grading  # noqa: F401
from lora_lab.course.exercise import EXERCISES
from lora_lab.course.grading.invariant import INVARIANTS, PREAMBLE, PROVIDED, REFLECTIONS, close, hidden_cell, points
from lora_lab.course.judge import judge
from tests.helpers import run_python

SEEDS = (1, 2, 3)
GRADED = [
    "one_line",
    "largest_saving_rank",
    "best_rank",
    "terms_for",
    "gradient",
    "head_start",
    "choose",
    "only",
    "forward",
    "start",
    "MyLoRALinear",
    "repair",
    "static_bytes",
    "peak",
    "saved_values",
    "longest",
    "multiply_adds",
    "break_even",
    "fair_ratio",
    "upper_bound",
    "smallest_enough",
    "seeds_needed",
    "alpha_for",
    "read_curve",
    "rig",
    "fair",
    "temperature",
    "equal_learning",
    "switch_adapter",
    "labels",
    "split",
    "guess_french",
    "RsLoRA",
    "LoRAFA",
    "one_number",
    "pissa_start",
    "dora_length",
    "noise_band",
    "phi",
    "svd_of_product",
    "intruders",
    "vertex",
    "next_rate",
    "power",
    "rate_for_alpha",
]
each_exercise = pytest.mark.parametrize("name", GRADED)
PLANTED = [
    pytest.param(name, answer, id=f"{name}-{number}")
    for name in GRADED
    for number, (answer, _) in enumerate(EXERCISES[name].mistakes)
]


def test_every_exercise_has_hidden_tests_and_every_lesson_a_reflection():
    assert INVARIANTS.keys() == set(GRADED) == EXERCISES.keys()
    assert REFLECTIONS.keys() == {exercise.lesson for exercise in EXERCISES.values()}


@each_exercise
def test_the_solution_has_all_points(name):
    for seed in SEEDS:
        assert points(EXERCISES[name].solution, INVARIANTS[name], seed) == len(INVARIANTS[name])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "answer"), PLANTED)
def test_a_planted_mistake_loses_a_point(name, answer):
    for seed in SEEDS:
        assert points(answer, INVARIANTS[name], seed) < len(INVARIANTS[name])


def solved(name, kind):
    """The solution with a result of another kind."""
    return lambda *arguments: kind(EXERCISES[name].solution(*arguments))


def best_rank_by_torch(M, r):
    U, S, Vh = torch.linalg.svd(torch.from_numpy(M), full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


def terms_for_shares_of_a_unit_vector(S, share):
    return int(np.argmax(np.cumsum((S / np.linalg.norm(S)) ** 2) >= share)) + 1


def start_of_parameters(out, inp, r, generator):
    return tuple(map(torch.nn.Parameter, EXERCISES["start"].solution(out, inp, r, generator)))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("best_rank", best_rank_by_torch),
        ("terms_for", terms_for_shares_of_a_unit_vector),
        ("start", start_of_parameters),
        ("choose", solved("choose", np.asarray)),
        ("smallest_enough", solved("smallest_enough", lambda rank: rank and np.int64(rank))),
        *((name, solved(name, kind)) for name in ("longest", "seeds_needed") for kind in (np.int64, torch.tensor)),
        *(("intruders", solved("intruders", kind)) for kind in (np.int64, torch.tensor)),
    ],
)
def test_an_answer_that_check_accepts_has_all_points(name, answer):
    assert judge(EXERCISES[name], answer).passed
    for seed in SEEDS:
        assert points(answer, INVARIANTS[name], seed) == len(INVARIANTS[name])


def split_with_siblings(groups, seed):
    """The first row of each group that judges is for training."""
    training, *others = EXERCISES["split"].solution(groups, seed)
    first = {groups.index(groups[row]) for part in others for row in part}
    return [[*training, *first], *([row for row in part if row not in first] for part in others)]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("saved_values", lambda d, m, r, t: (t != {"down"}) * d + 3 * m + (t == {"down"}) * m + r * len(t)),
        ("saved_values", lambda d, m, r, t: (t != {"down"}) * d + (3 + ("down" in t and len(t) != 2)) * m + r * len(t)),
        ("forward", lambda x, *others: EXERCISES["forward"].solution((x + x.detach()) / 2, *others)),
        ("split", split_with_siblings),
        ("smallest_enough", lambda table, margin: min((r for r in table if table[r][1] < 1), default=None)),
        ("dora_length", lambda x, *others: EXERCISES["dora_length"].solution(torch.eye(7), *others)),
    ],
)
def test_an_answer_that_is_wrong_in_some_cases_only_loses_a_point(name, answer):
    assert judge(EXERCISES[name], answer).passed is False
    for seed in SEEDS:
        assert points(answer, INVARIANTS[name], seed) < len(INVARIANTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GRADED if len(EXERCISES[name].mistakes) > 3])
def test_some_mistake_has_some_of_the_points(name):
    results = {points(mistake.answer, INVARIANTS[name], 1) for mistake in EXERCISES[name].mistakes}
    assert results & set(range(1, len(INVARIANTS[name])))


def nothing(count):
    """Answers that compute nothing."""

    def stub(*arguments):
        raise NotImplementedError("your code here")

    values = (None, 0, 1, 1.0, 3, "x", [1, 2], float("nan"), (0, 0), {}, {"LoRA": 1})
    return [
        stub,
        lambda *_: exit(),
        *(lambda *_, value=value: value for value in values),
        *(lambda *arguments, i=i: arguments[i] for i in range(count)),
    ]


@each_exercise
def test_an_answer_that_computes_nothing_has_no_points(name):
    solution = EXERCISES[name].solution
    for answer in nothing(len(inspect.signature(solution).parameters)):
        if not isinstance(solution, type):
            assert points(answer, INVARIANTS[name], 1) == 0


@each_exercise
def test_a_fixed_result_has_no_points(name):
    """As copied from an example: here the solution's result on one of the inputs of check."""
    exercise = EXERCISES[name]
    if exercise.inputs is not None:
        result = exercise.solution(*exercise.inputs(np.random.default_rng(5)))
        assert points(lambda *_: result, INVARIANTS[name], 1) == 0


@pytest.mark.slow
@each_exercise
def test_points_do_not_depend_on_what_ran_before(name):
    answers = [mistake.answer for mistake in EXERCISES[name].mistakes]
    first = [points(answer, INVARIANTS[name], 4) for answer in answers]
    state = torch.get_rng_state()
    torch.rand(3)
    assert [points(answer, INVARIANTS[name], 4) for answer in answers] == first
    torch.set_rng_state(state)
    points(answers[0], INVARIANTS[name], 4)
    assert torch.equal(torch.get_rng_state(), state)


@each_exercise
def test_texts_and_lengths_are_in_order(name):
    assert 2 <= len(INVARIANTS[name]) <= 5
    sentences = [invariant.__doc__ for invariant in INVARIANTS[name]]
    assert len(set(sentences)) == len(sentences)
    for invariant in INVARIANTS[name]:
        assert re.fullmatch(r"[^\n]{20,125}\.", invariant.__doc__), invariant.__doc__
        assert len(inspect.getsource(invariant).splitlines()) - 3 <= 18, invariant.__name__
    functions = [each.__name__ for each in (*INVARIANTS[name], *PROVIDED.get(name, []), close, points)]
    assert len(set(functions)) == len(functions)
    assert EXERCISES[name].solution.__name__ not in functions


@each_exercise
def test_a_hidden_cell_runs_by_itself_and_does_not_call_check(name):
    """Beside the answer it needs numpy and torch; a few exercises are about things of the package."""
    cell = hidden_cell(name, "answer", 7)
    tree = ast.parse(cell)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"check", "hint", "judge", "EXERCISES", "lora_lab", "ll"}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {
        "repair": {"lora_lab.models.digits"},
        "fair_ratio": {"lora_lab.course.exercises.speed"},
        "switch_adapter": {"lora_lab.lora"},
        "guess_french": {"lora_lab.tasks.datasets"},
    }
    assert modules - {"builtins", "torch", "torch.nn", "torch.overrides", "scipy.stats"} == allowed.get(name, set())
    solution = EXERCISES[name].solution
    namespace = {"answer": solution}
    *body, last = tree.body
    exec(compile(ast.Module(body, []), "cell", "exec"), namespace)
    assert eval(compile(ast.Expression(last.value), "cell", "eval"), namespace) == len(INVARIANTS[name])


@pytest.mark.slow
def test_names_that_a_learner_has_changed_do_not_matter():
    changed = "sum = abs = all = any = bool = len = print = isinstance = close = points = lambda *_, **__: True\n"
    script = f"{changed}def answer(delta, z):\n    return delta\n{hidden_cell('gradient', 'answer', 1)}"
    script = re.sub(r"\n(points\(.*)$", r"\nprint('points:', \1)", script)
    done = run_python(script)
    assert "points: 0" in done.stdout
    assert done.stderr == ""


def test_what_an_answer_prints_or_warns_of_does_not_reach_the_grade(capfd):
    """nbgrader takes anything on stderr for a failure, and the last value for the points."""

    def noisy(delta, z):
        import sys
        import warnings

        print("here")
        print("there", file=sys.stderr)
        warnings.warn("careful", stacklevel=1)
        return delta.T @ z

    assert points(noisy, INVARIANTS["gradient"], 1) == 3
    printed, errors = capfd.readouterr()
    assert errors == ""
    assert printed.splitlines() == [f"holds:         {each.__doc__}" for each in INVARIANTS["gradient"]]


def test_close_knows_shapes_kinds_and_nan():
    assert close(torch.ones(2, requires_grad=True), np.ones(2))
    assert close(1 + 1e-6, 1)
    assert not close(1.01, 1)
    for wrong in (1.0, np.ones((1, 2)), [True, True], ["1", "1"], np.full(2, np.nan), None, np.ones(2) * 1j):
        assert not close(wrong, np.ones(2)), wrong


def test_each_reflection_has_a_rubric():
    for reflection in REFLECTIONS.values():
        assert 3 <= len(reflection.rubric) <= 5
        assert all(sentence.endswith(".") for sentence in (*reflection.rubric, reflection.expected))


@pytest.mark.slow
def test_a_learners_session_imports_none_of_it():
    script = """
import sys
import lora_lab
from lora_lab import course
from lora_lab.course import check, hint, progress
check("gradient", lambda delta, z: delta.T @ z)
assert "grading" not in dir(course)
print(*[name for name in sys.modules if "grading" in name])
"""
    assert run_python(script).stdout.strip().splitlines()[-1].startswith("✓ Correct.")


def test_the_preamble_first_gives_the_builtins_back():
    assert PREAMBLE.startswith("from builtins import *\n")
