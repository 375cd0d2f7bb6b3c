"""What nbval does not notice by itself: each rule here was seen to pass silently when broken.

The last test changes the stored numbers and demands that nbval fails: the check of the check.
"""

import ast
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbval.plugin import get_sanitize_patterns

import lora_lab.course.exercises  # noqa: F401  # registers them
from lora_lab.course.exercise import EXERCISES, TIME
from lora_lab.studies import answers
from lora_lab.studies.claims import verdict
from lora_lab.studies.claims.deciding import IN_OUTPUT, read_claims
from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "docs"))  # a script, which is no package
import generate

LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IGNORED = "nbval-ignore-output"
HIDDEN = "hide-input"
PLAIN = "text/plain"
TEST = "test"
KNOWN_TAGS = {IGNORED, HIDDEN, TEST, "raises-exception", "slide"}
SANITIZE = get_sanitize_patterns((ROOT / "notebooks" / "nbval_sanitize.cfg").read_text(encoding="utf-8"))
SETTINGS = {"LORA_LAB_DEVICE", "LORA_LAB_EFFORT"}

each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
PLAIN_ONES = [path for path in LESSONS if "lessons.answer(" in path.read_text(encoding="utf-8")]
each_plain = pytest.mark.parametrize("path", PLAIN_ONES, ids=lambda path: path.stem)
each_chapter = pytest.mark.parametrize("path", LESSONS[1:], ids=lambda path: path.stem)  # 00 takes ten minutes


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def compared(cell, kinds="text/"):
    """The texts of a cell that nbval compares, as they are after its sanitizer."""
    if tags(cell) & {IGNORED, "raises-exception"}:
        return
    for output in cell.outputs:
        data = {PLAIN: output.text} if output.output_type == "stream" else output.get("data", {})
        for kind, text in data.items():
            if kind.startswith(kinds):
                for pattern, replacement in SANITIZE:
                    text = re.sub(pattern, replacement, text)
                yield text


def text_of(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def visible(notebook):
    return [cell for cell in code(notebook) if HIDDEN not in tags(cell)]


def solution(cell):
    return "### BEGIN SOLUTION" in cell.source


@each_lesson
def test_stored_outputs_and_metadata_are_of_one_run_from_top_to_bottom(path):
    notebook = read(path)
    cells = code(notebook)
    # An unrun cell is never compared, so a stripped notebook would pass.
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook.metadata.kernelspec.name == "python3"
    assert [cell.id for cell in notebook.cells] == [f"cell-{i:02d}" for i in range(1, len(notebook.cells) + 1)]
    for cell in notebook.cells:
        hidden = {"jupyter": {"source_hidden": True}} if HIDDEN in tags(cell) else {}
        stored = {key: value for key, value in cell.metadata.items() if key != "tags"}
        assert stored == hidden, "timings or widget state are stored"
        assert tags(cell) <= KNOWN_TAGS, "nbval ignores a tag that it does not know"
    for cell in cells:
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == ("raises-exception" in tags(cell)), cell.source
        assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.source
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        assert not any("widget" in kind for kind in kinds), "a widget is dead without its kernel"


@each_lesson
def test_stored_sources_avoid_what_fails_silently(path):
    for cell in code(read(path)):
        assert "NBVAL_" not in cell.source, "use tags, not comments"
        assert not cell.source.rstrip().endswith(";"), "a trailing ; is not honoured under nbval"
        assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE), "magics and shell lines may fail unnoticed"
        assert not re.search(r"except\s*:|except BaseException", cell.source), "would swallow nbval's time limit"
        assert not (SETTINGS & set(re.findall(r"\w+", cell.source))), "the environment is the reader's"


@each_lesson
def test_enough_is_compared(path):
    cells = code(read(path))
    digits = sum(len(re.findall(r"\d", text)) for cell in cells for text in compared(cell))
    assert digits >= 20, "hardly a number is compared"
    ignored = [i for i, cell in enumerate(cells) if IGNORED in tags(cell)]
    assert len(ignored) <= len(cells) // 2
    for i in ignored:  # numbers differ between machines, so it or the hidden one below asserts what does not
        below = [cell for cell in cells[i + 1 : i + 2] if {HIDDEN, TEST} & tags(cell)]
        sources = "\n".join(cell.source for cell in (cells[i], *below))
        assert re.search(r"^\s*assert |lessons\.claims\(", sources, re.MULTILINE), (
            f"asserts nothing:\n{cells[i].source}"
        )


@each_lesson
def test_the_lesson_has_one_title_which_is_its_question(path):
    titles = re.findall(r"^# (.+)$", text_of(read(path)), re.MULTILINE)
    assert len(titles) == 1
    assert titles[0].endswith("?")
    assert path.stat().st_size < 1_500_000


def outcomes(notebook):
    """The ids of the claims in a lesson's ``lessons.Outcome(ID, ...)``."""
    nodes = (node for cell in code(notebook) for node in ast.walk(ast.parse(cell.source)))
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "lessons.Outcome"]
    return [ast.literal_eval(call.args[0]) for call in calls]


@each_chapter
def test_a_lessons_claims_are_the_ledgers_are_stored_and_none_is_decided_by_another_lesson(path):
    notebook, every = read(path), read_claims()
    here = outcomes(notebook)
    assert len(set(here)) == len(here)
    assert set(here) <= every.keys()
    decided = {name for name in here if every[name].lesson or path in PLAIN_ONES}
    assert decided == {name for name, claim in every.items() if claim.lesson == path.stem}
    # nbval does not compare what is stored of them.
    stored = [output.get("metadata", {}).get(IN_OUTPUT) for cell in code(notebook) for output in cell.outputs]
    assert sorted(name for each in stored if each for name in each.results) == sorted(here)


@pytest.mark.slow
@each_chapter
def test_no_lesson_says_the_opposite_of_the_ledger(path):
    """It may leave open what the ledger decides, and decide for a small net what the ledger leaves open."""
    for cell in code(read(path)):
        for output in cell.outputs:
            for name, shown in output.get("metadata", {}).get(IN_OUTPUT, {}).get("results", {}).items():
                assert {shown["verdict"], verdict(name).result.verdict} != {"stands", "falls"}, name


@each_chapter
def test_the_readme_and_lesson_00_give_the_minutes_that_the_lesson_states(path):
    text = text_of(read(path))
    title = re.search(r"^# (.+)$", text, re.MULTILINE)[1]
    yours, machines = re.search(r"about (\d+) minutes for you, about ([\d½¾]+) for the machine", text).groups()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| [{path.stem}](notebooks/{path.name}) | {title} | {yours} | {machines} |" in readme
    assert f"]({path.name}) | {yours} |" in text_of(read(LESSONS[0]))


@each_lesson
def test_every_exercise_is_there_and_its_text_says_how_hard_and_how_long_it_is(path):
    cells = read(path).cells
    checked = [name for cell in cells for name in re.findall(r'^check\("(\w+)"', cell.source, re.MULTILINE)]
    assert sorted(set(checked)) == sorted(each.name for each in EXERCISES.values() if each.stated.lesson == path.stem)
    places = [number for number, cell in enumerate(cells) if solution(cell)]
    for start, end in itertools.pairwise([0, *places]):
        assert sum(len(TIME.findall(cell.source)) for cell in cells[start:end]) == 1, cells[end].source


@each_lesson
def test_cells_are_short(path):
    for cell in visible(read(path)):
        lines = [line for line in cell.source.splitlines() if line.strip() and "### " not in line]
        limit = 25 if solution(cell) else 12  # an exercise may be a class
        assert len(lines) <= limit, cell.source
        assert max(map(len, lines)) <= 90, cell.source


@each_chapter
def test_little_is_shown_at_once(path):
    """A cell prints at most 8 lines or one table, and at most three predictions and two helpers are in the way."""
    notebook = read(path)
    for cell in code(notebook):
        streams = [output.text for output in cell.outputs if output.output_type == "stream"]
        assert sum(len(text.splitlines()) for text in streams) <= 8, cell.source
        pages = [output.data["text/html"] for output in cell.outputs if "text/html" in output.get("data", {})]
        assert sum("<table" in page for page in pages) <= 1, cell.source
    sources = [cell.source for cell in visible(notebook) if not solution(cell)]
    assert sum(source.count("lessons.predict(") for source in sources) <= 3
    assert sum(len(re.findall(r"^\s*def ", source, re.MULTILINE)) for source in sources) <= 2, "move helpers away"


@each_chapter
def test_every_figure_has_a_text_for_readers_who_cannot_see_it(path):
    for cell in code(read(path)):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"].split()) >= 4, cell.source
                assert output.data["text/plain"] == output.metadata["image/png"]["alt"]


def is_silent(cell):
    """Whether a cell only asserts: it shows nothing, and neither imports nor defines anything that a learner uses."""
    kinds = (ast.Assert, ast.For, ast.With)
    return not cell.outputs and all(isinstance(node, kinds) for node in ast.parse(cell.source).body)


@each_lesson
def test_a_cell_that_only_asserts_is_in_no_learners_copy_and_no_other_cell_needs_it(path):
    cells, dropped = code(read(path)), set()
    for cell in cells:
        names = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)]
        made = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        if TEST in tags(cell):
            assert not cell.outputs, "a learner would miss what it shows"
            dropped |= made
        else:
            assert not {name.id for name in names if isinstance(name.ctx, ast.Load)} & dropped - made, cell.source
            assert path not in PLAIN_ONES or not is_silent(cell), cell.source


@each_plain
def test_a_lesson_begins_and_ends_with_its_answer_and_says_what_to_take_home_and_to_try(path):
    notebook = read(path)
    first, *_, last = (number for number, cell in enumerate(notebook.cells) if "lessons.answer(" in cell.source)
    assert first <= 2
    headings = re.findall(r"^## (.+)$", text_of(notebook), re.MULTILINE)
    assert headings[-2:] == ["What you take home", "What to try"]
    assert not {"Explain", "Claims", "Takeaways", "Recall", "Your turn"} & set(headings)
    home = "\n".join(cell.source for cell in notebook.cells[: last + 1])
    assert "\n## What you take home" in f"\n{home}"
    assert "\n## What to try" not in home
    linked = {answers.read_answers()[ask].link for ask in re.findall(r'lessons\.answer\("(\w+)"\)', home)}
    assert any(Path(link).stem == path.stem for link in linked)


def sentences(text):
    """The sentences of a Markdown text, without code, formulas, tables and folds."""
    for pattern in (r"<details>.*?</details>", r"```.*?```", r"\$\$.*?\$\$"):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        if not block.lstrip().startswith(("|", "#", "<")):
            yield from re.split(r"(?<=[.?!:])[*)_\"]*\s+(?=[*_\"(]*[A-Z])", " ".join(block.split()))


@each_plain
def test_there_is_little_to_read(path):
    notebook, reading = read(path), generate.read_lesson(path)
    assert reading.words <= 1500
    assert reading.all_words <= 2000
    assert reading.exercise_words <= 500
    assert len(re.findall(", importance [●○]{3}, about", text_of(notebook))) == len(TIME.findall(text_of(notebook)))
    for cell in notebook.cells:
        texts = [cell.source] if cell.cell_type == "markdown" else []
        texts += [
            output.data["text/markdown"]
            for output in cell.get("outputs", [])
            if "text/markdown" in output.get("data", {})
        ]
        for text in texts:
            plain = generate.TABLE.sub("", generate.FOLD.sub("", text))
            assert len(plain.split()) <= 120, text
            long = [each for each in sentences(text) if len(each.split()) > 40]
            assert long == []
    home = text_of(notebook).rpartition("## What you take home")[2].partition("## What to try")[0]
    points = re.findall(r"^(?:\d+\.|-) (.+?)(?=\n\S|\n\n|\Z)", home, re.MULTILINE | re.DOTALL)
    assert 1 <= len(points) <= 3
    assert all(len(point.split()) <= 30 for point in points)


@each_plain
def test_the_minutes_follow_the_rule(path):
    stated = re.search(r"about (\d+) minutes for you", text_of(read(path)))[1]
    assert int(stated) == generate.read_lesson(path).minutes


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Lesson -> code cell by number -> why nbval failed it, or None, for a copy with each compared number changed.

    The copy's cells show what is stored, so nothing is computed: make test has nbval run the lessons as they are.
    """
    folder = tmp_path_factory.mktemp("changed")
    for path in LESSONS:
        notebook = read(path)
        for cell in code(notebook):
            cell.source = showing(cell.outputs)
            for output in cell.outputs:
                data, key = (output, "text") if output.output_type == "stream" else (output.data, PLAIN)
                data[key] = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), data[key])
        nbformat.write(notebook, folder / path.name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={folder / 'report.xml'}"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    reasons = {path.stem: {} for path in LESSONS}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        lesson = next(path.stem for path in LESSONS if path.stem in case.get("classname"))
        failure = case.find("failure")
        reasons[lesson][int(case.get("name").removeprefix("Cell "))] = None if failure is None else failure.text
    return reasons


def showing(outputs):
    """The source of a cell with these outputs."""
    stored = [(output.get("name"), output.get("text") or output.get("data")) for output in outputs]
    return (
        f"import sys, IPython.display\nfor stream, shown in {json.loads(json.dumps(stored))!r}:\n"
        "    print(shown, end='', file=getattr(sys, stream)) if stream else IPython.display.display(shown, raw=True)"
    )


@pytest.mark.slow
@each_lesson
def test_nbval_notices_changed_numbers(path, failures):
    """In each cell in which it compares any; the others pass."""
    cells, reasons = code(read(path)), failures[path.stem]
    with_numbers = {i for i, cell in enumerate(cells) if any(re.search(r"\d", text) for text in compared(cell, PLAIN))}
    assert with_numbers, "no number is compared"
    assert reasons.keys() == set(range(len(cells)))
    failed = {i: reason for i, reason in reasons.items() if reason is not None}
    assert failed.keys() == with_numbers
    assert all("Cell outputs differ" in reason for reason in failed.values())
