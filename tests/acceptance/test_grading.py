"""The whole of a teacher's path: a course is written, handed out, answered in many ways, graded, and exported.

nbgrader starts a kernel for each submission, so all are graded by one call: about a minute and a half.
"""

import copy
import csv
import json
import os
import subprocess
import sys

import nbformat
import pytest

from tests.acceptance import ROOT

api = pytest.importorskip("nbgrader.api", reason="the extra [teach] is not installed")
pytestmark = pytest.mark.slow
NAME = "01_low_rank"
RAISE = 'raise NotImplementedError("your code here")'  # what a learner replaces
STUDENTS = ["perfect", "wrong", "half", "patched", "returned", "hard-coded", "deleted", "altered", "endless"]
EXERCISES = ["largest_saving_rank", "best_rank", "terms_for", "gradient"]
MOST = [2, 3, 2, 3]  # points of each
RIGHT = {
    "largest_saving_rank": "return (m * n - 1) // (m + n)",
    "best_rank": "U, S, Vh = np.linalg.svd(M); return U[:, :r] * S[:r] @ Vh[:r]",
    "terms_for": "e = np.cumsum(S**2); return int(np.sum(e / e[-1] < share)) + 1",
    "gradient": "return delta.T @ z",
}
WRONG = {
    "largest_saving_rank": "return min(m, n)",
    "best_rank": "return M.copy()",
    "terms_for": "return int(np.sum(np.cumsum(S**2) / np.sum(S**2) < share))",
    "gradient": "return delta * z",
}
# Ties count as savings, the singular values are missing, one answer is not there, a mean in place of a sum.
HALF = {
    "largest_saving_rank": "return m * n // (m + n)",
    "best_rank": "U, S, Vh = np.linalg.svd(M); return U[:, :r] @ Vh[:r]",
    "gradient": "return delta.T @ z / len(z)",
}
RETURNED = {
    "largest_saving_rank": "return m",
    "best_rank": "return M",
    "terms_for": "return S",
    "gradient": "return delta",
}
# What the lesson shows: 418 for its matrix, three terms for its flower.
HARD_CODED = {
    "largest_saving_rank": "return 418",
    "best_rank": "return np.outer(np.arange(1, 10), np.arange(1, 7)) + np.eye(9, 6)",
    "terms_for": "return 3",
    "gradient": "return torch.ones(3, 5)",
}
PATCHES = """
import lora_lab.course.judge, lora_lab.course.learner
check = lora_lab.course.learner.check = lambda *_: print("Correct.")
lora_lab.course.learner.judge = lambda *_: lora_lab.course.judge.Verdict(True, "Correct.")
sum = all = abs = bool = close = points = lambda *_: True
np.array_equal = np.allclose = torch.equal = torch.allclose = lambda *_, **__: True
"""


def answered(release, answers):
    """A copy of the sheet with these bodies of functions."""
    result = copy.deepcopy(release)
    for cell in result.cells:
        if cell.id in answers:
            assert cell.source.count(RAISE) == 1
            cell.source = cell.source.replace(RAISE, answers[cell.id])
    return result


def submissions(release):
    """Student -> what is handed in."""
    result = {
        "perfect": answered(release, RIGHT),
        "wrong": answered(release, WRONG),
        "half": answered(release, HALF),
        "patched": answered(release, {}),
        "returned": answered(release, RETURNED),
        "hard-coded": answered(release, HARD_CODED),
        "deleted": answered(release, RIGHT),
        "altered": answered(release, {}),
        "endless": answered(release, RIGHT | {"best_rank": "while True: pass"}),
    }
    result["perfect"].cells[-1].source = "W stays as it is; the change is of low rank."
    result["patched"].cells[1].source += PATCHES
    # Tests without their answer, an answer without its tests, and both; with them the question's answer.
    gone = ("terms_for-points", "best_rank", "gradient", "gradient-points", "reflection")
    result["deleted"].cells = [cell for cell in result["deleted"].cells if cell.id not in gone]
    for cell in result["altered"].cells:
        if cell.id.endswith("-points"):
            cell.source = "100"
            cell.metadata.nbgrader |= {"points": 100, "locked": False}
    assert list(result) == STUDENTS
    return result


@pytest.fixture(scope="session")
def course(main, tmp_path_factory):
    """A graded course: its folder, and what nbgrader printed when it graded."""
    folder = tmp_path_factory.mktemp("class") / "course"
    assert main(["course", str(folder), "--grading", "--only", "01"]) == 0
    # As in a shell in which no environment is activated: alembic is not on the path.
    environment = os.environ | {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def nbgrader(*arguments):
        line = [sys.executable, "-m", "nbgrader", *arguments]
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return done.stderr

    nbgrader("generate_assignment", NAME)
    release = nbformat.read(folder / "release" / NAME / f"{NAME}.ipynb", as_version=4)
    for student, notebook in submissions(release).items():
        (folder / "submitted" / student / NAME).mkdir(parents=True)
        nbformat.write(notebook, folder / "submitted" / student / NAME / f"{NAME}.ipynb")
    printed = nbgrader("autograde", NAME, "--Execute.timeout=20")
    with api.Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as gradebook:  # as a person does in the browser
        grade = gradebook.find_grade("reflection", NAME, NAME, "perfect")
        assert grade.needs_manual_grade
        grade.manual_score, grade.needs_manual_grade = 3, False
        gradebook.db.commit()
    nbgrader("generate_feedback", NAME)
    nbgrader("export")
    return folder, printed


def points_of(course, student):
    """The points of each exercise."""
    with api.Gradebook(f"sqlite:///{course[0] / 'gradebook.db'}") as gradebook:
        return [gradebook.find_grade(f"{name}-points", NAME, NAME, student).auto_score for name in EXERCISES]


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("perfect", MOST),
        ("wrong", [0, 0, 0, 0]),
        ("half", [1, 1, 0, 1]),
        ("patched", [0, 0, 0, 0]),
        ("returned", [0, 0, 0, 0]),
        ("hard-coded", [0, 0, 0, 0]),
        ("deleted", [2, 0, 2, 0]),  # the tests are put back; an answer that is gone earns nothing
        ("altered", [0, 0, 0, 0]),
        ("endless", [2, 0, 2, 3]),
    ],
)
def test_each_copy_gets_exactly_the_points_that_it_earns(course, student, expected):
    assert points_of(course, student) == expected


def test_the_table_of_grades_adds_them_up_with_what_a_person_gave(course):
    with open(course[0] / "grades.csv", encoding="utf-8") as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    scores = {student: float(row["score"]) for student, row in rows.items()}
    expected = dict.fromkeys(STUDENTS, 0) | {"perfect": 13, "half": 3, "deleted": 4, "endless": 7}
    assert scores == expected
    assert {float(row["max_score"]) for row in rows.values()} == {14}


def test_a_question_without_an_answer_gets_nothing_and_waits_for_nobody(course):
    with api.Gradebook(f"sqlite:///{course[0] / 'gradebook.db'}") as gradebook:
        grades = {name: gradebook.find_grade("reflection", NAME, NAME, name) for name in ("half", "perfect")}
        assert (grades["half"].auto_score, grades["half"].needs_manual_grade) == (0, False)
        assert grades["perfect"].max_score == 4


def test_an_endless_loop_is_stopped_and_altered_cells_are_named(course):
    assert course[1].count("Timeout waiting for execute reply") == 1
    assert "Attribute 'points' for cell gradient-points has changed" in course[1]


def test_feedback_says_which_sentences_hold(course):
    page = (course[0] / "feedback" / "half" / NAME / f"{NAME}.html").read_text(encoding="utf-8")
    assert "holds:         From a single token the gradient is the outer product" in page
    assert "does not hold: The gradient from all tokens is the sum" in page


def test_what_is_handed_out_holds_no_solution_and_no_hidden_test(course):
    source, release = (
        nbformat.read(course[0] / kind / NAME / f"{NAME}.ipynb", as_version=4) for kind in ("source", "release")
    )
    assert [cell.id for cell in release.cells] == [cell.id for cell in source.cells]
    text = nbformat.writes(release)
    for cell in source.cells:
        lines = [line.strip() for line in cell.source.splitlines()]
        for begin, end in (
            ("### BEGIN SOLUTION", "### END SOLUTION"),
            ("### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"),
        ):
            hidden = lines[lines.index(begin) : lines.index(end)] if begin in lines else []
            assert not [
                line
                for line in hidden
                if len(line) > 12
                and not line.startswith(("import", "from"))
                and json.dumps(line, ensure_ascii=False)[1:-1] in text
            ]
    points = [cell for cell in release.cells if cell.id.endswith("-points")]
    assert [cell.metadata.nbgrader.points for cell in points] == MOST
    assert all(cell.metadata.nbgrader.locked and not cell.metadata.editable for cell in points)
    assert all(line.startswith("#") for cell in points for line in cell.source.splitlines())
