"""Sheets: what nbgrader reads, what a learner gets, and that nothing is lost or overwritten."""

import ast
import builtins
import itertools
import re

import nbformat
import pytest

from lora_lab.course.copies import BEGIN, END, copy_lessons
from lora_lab.course.exercise import EXERCISES, REFLECTIONS
from lora_lab.course.sheets import CONFIG, sheet, write_course
from lora_lab.system.provenance import shipped_folder
from tests.helpers import command, error_line

LESSONS = sorted(REFLECTIONS)
PEFT = {"LoraConfig", "TrainingArguments"}  # names of other packages, and below those in formulas
KNOWN = {
    "04_memory": {"down", "silu", "gate", "up"},
    "10_variants": PEFT,
    "12_which_rate": PEFT,
}
each_lesson = pytest.mark.parametrize("name", LESSONS)


def lesson(name):
    return nbformat.read(shipped_folder("notebooks") / f"{name}.ipynb", as_version=4)


def exercises(name):
    return [each for each in EXERCISES.values() if each.stated.lesson == name]


def marks(notebook):
    return {cell.id: cell.metadata.nbgrader for cell in notebook.cells if "nbgrader" in cell.metadata}


def test_a_lesson_that_no_sheet_can_be_made_of_is_refused():
    with pytest.raises(ValueError, match="99_none needs an exercise and a reflection"):
        sheet(lesson("01_low_rank"), "99_none", 3)
    bare = lesson("01_low_rank")
    for cell in bare.cells:
        cell.source = cell.source.replace("### Exercise", "### Something")
    with pytest.raises(ValueError, match=r"'### Exercise'.*'largest_saving_rank'"):
        sheet(bare, "01_low_rank", 3)


@each_lesson
def test_a_sheet_has_each_exercise_with_its_text_its_answer_and_its_tests(name):
    notebook = sheet(lesson(name), name, 3)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for each in exercises(name):
        place = ids.index(each.name)
        assert ids[place + 1] == f"{each.name}-points"
        assert ids[place - 1].startswith(f"{each.name}-")
        text = notebook.cells[ids.index(f"{each.name}-text-0")].source
        assert text.startswith("### Exercise")
        assert text.count("### ") == 1
    assert ids[-2:] == ["question", "reflection"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)


@each_lesson
def test_each_exercise_names_the_section_of_the_lesson_that_it_comes_from(name):
    headings = {
        heading: cell.source
        for cell in lesson(name).cells
        if cell.cell_type == "markdown"
        for heading in re.findall(r"^##+ (.+)$", cell.source, flags=re.MULTILINE)
    }
    sections = []
    for cell in sheet(lesson(name), name, 3).cells:
        if cell.id.endswith("-text-0"):
            (section,) = re.findall(rf'^From the section "(.+)" of the lesson {name}\.$', cell.source, re.MULTILINE)
            assert section in headings
            sections.append(section)
    assert len(sections) == len(exercises(name))
    assert name != "05_speed" or sections == ["Time it yourself", "Going deeper: two thirds, by hand"]


@each_lesson
def test_a_sheet_does_not_say_how_to_get_the_solutions(name):
    assert not [cell.id for cell in sheet(lesson(name), name, 3).cells if "--solved" in cell.source]


def unknown_names(text, code):
    """Names that calls and subscripts in a text use, and that the code of a sheet neither imports nor defines."""
    trees = list(map(ast.parse, code))
    nodes = [node for tree in trees for node in ast.walk(tree)]
    known = {*dir(builtins), *(node.arg for node in nodes if isinstance(node, ast.arg))}
    known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    known |= {node.id for node in nodes if isinstance(node, ast.Name)}
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    known |= {(alias.asname or alias.name).split(".")[0] for each in imports for alias in each.names}
    used = set()
    for fragment in re.findall(r"`([^`]*[(\[][^`]*)`", text):
        try:
            tree = ast.parse(fragment)
        except SyntaxError:
            continue  # a formula
        used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return used - known


def test_names_that_a_text_uses_without_their_definition_are_found():
    text = "Score `metrics.score(TASKS['a'], names)`, $B A$; `f(x)`; `len(x[:3])` is 3, and `other` a word."
    assert unknown_names(text, ["from a import metrics", "def f(x):\n    pass"]) == {"TASKS", "names"}


@each_lesson
def test_the_texts_use_no_name_that_only_the_lesson_defines(name):
    cells = sheet(lesson(name), name, 3).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    text = "\n".join(cell.source for cell in cells if cell.id.rpartition("-")[0].endswith("-text"))
    assert unknown_names(text, code) <= KNOWN.get(name, set())


@each_lesson
def test_its_metadata_is_what_nbgrader_wants(name):
    result = marks(sheet(lesson(name), name, 3))

    def mark(cell_id, points=None, **kind):
        entries = {"schema_version": 3, "grade_id": cell_id, "solution": False, "locked": False, "task": False}
        return {cell_id: entries | kind | ({"grade": False} if points is None else {"grade": True, "points": points})}

    expected = mark("question", locked=True) | mark("reflection", len(REFLECTIONS[name].rubric), solution=True)
    for each in exercises(name):
        expected |= mark(each.name, solution=True)
        expected |= mark(f"{each.name}-points", len(each.points), locked=True)
    assert result == expected


def earned(notebook):
    """Exercise -> points, when the cells of a sheet run in order; check is left out."""
    namespace, result = {}, {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            *body, last = ast.parse(cell.source).body
            if cell.id.endswith("-points"):
                exec(compile(ast.Module(body, []), cell.id, "exec"), namespace)
                value = eval(compile(ast.Expression(last.value), cell.id, "eval"), namespace)
                result[cell.id.removesuffix("-points")] = value
            else:
                nodes = body if cell.id in EXERCISES else [*body, last]
                exec(compile(ast.Module(nodes, []), cell.id, "exec"), namespace)
    return result


@each_lesson
def test_a_sheet_by_itself_gives_its_own_solutions_all_points(name):
    """Without the lesson, and without its model."""
    notebook = sheet(lesson(name), name, 5)
    assert earned(notebook) == {each.name: len(each.points) for each in exercises(name)}


def test_a_mistake_in_start_costs_nothing_in_the_layer_that_calls_it():
    notebook = sheet(lesson("03_lora_from_scratch"), "03_lora_from_scratch", 5)
    (cell,) = (cell for cell in notebook.cells if cell.id == "start")
    cell.source = "def start(out, inp, r, generator=None):\n    return None\n\n\ncheck('start', start)"
    lost = {name: len(EXERCISES[name].points) - points for name, points in earned(notebook).items()}
    assert lost == {"forward": 0, "start": len(EXERCISES["start"].points), "MyLoRALinear": 0, "repair": 0}


# Lines of solutions that the text or the code of an exercise shows anyway.
SHOWN = {
    "def start(out, inp, r, generator=None):",
    "device.synchronize()",
    "for name, layer in list(model.named_children()):",
    "loss = loss_of(model)",
    "loss.backward()",
    "optimizer.step()",
    "replace(model, name, ll.LoRALinear(layer, rank=4, alpha=8))",
    "return model, optimizer",
    "with torch.no_grad():",
}


def parts(cell):
    """The lines of a cell outside markers and those between them, without comments."""
    outside, between, hidden = [], [], False
    for line in map(str.strip, cell.source.splitlines()):
        if line in (BEGIN, "### BEGIN HIDDEN TESTS"):
            hidden = True
        elif line in (END, "### END HIDDEN TESTS"):
            hidden = False
        else:
            (between if hidden else outside).append(line if line.startswith("#") else line.split("  #")[0])
    assert not hidden
    return outside, between


@each_lesson
def test_all_that_is_secret_stands_between_markers_and_nowhere_else(name):
    """So nbgrader takes it out; the end-to-end test looks at what it hands out."""
    cells = sheet(lesson(name), name, 3).cells
    outside, between = (list(itertools.chain(*lines)) for lines in zip(*map(parts, cells), strict=True))
    secret = {line for line in between if len(line) > 12 and not line.startswith(("import", "from"))}
    assert len(secret) >= 2 * len(exercises(name))  # a line of each solution, and its points
    text = "\n".join([*outside, *(str(cell.metadata) for cell in cells)])
    assert {line for line in secret if line in text} <= SHOWN
    assert "### STUB" not in text
    for cell in cells:
        if cell.id.endswith("-points"):
            assert all(line.startswith("# ") for line in parts(cell)[0])


def test_seeds_differ_between_courses_and_stand_in_the_hidden_cell(tmp_path):
    cells = []
    for course in ("one", "other"):
        write_course(tmp_path / course, ["01"])
        path = tmp_path / course / "source" / "01_low_rank" / "01_low_rank.ipynb"
        cells.append({cell.id: cell.source for cell in nbformat.read(path, as_version=4).cells})
    changed = {name for name in cells[0] if cells[0][name] != cells[1][name]}
    assert changed == {name for name in cells[0] if name.endswith("-points")}
    fixed = [sheet(lesson("01_low_rank"), "01_low_rank", 3) for _ in range(2)]
    assert fixed[0] == fixed[1]


# The folder


def test_a_course_has_a_sheet_for_each_lesson(tmp_path):
    done = write_course(tmp_path / "course")
    lessons = sorted(path.stem for path in shipped_folder("notebooks").glob("[0-9]*.ipynb"))
    assert len(done) == len(lessons)
    assert lessons == LESSONS
    files = sorted(path.relative_to(tmp_path / "course").as_posix() for path in (tmp_path / "course").rglob("*.*"))
    assert files == [CONFIG, *(f"source/{name}/{name}.ipynb" for name in LESSONS)]


def test_a_second_call_adds_sheets_and_changes_nothing(tmp_path):
    write_course(tmp_path, ["01"])
    (tmp_path / CONFIG).write_text("# mine", encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    there, written = write_course(tmp_path, ["01", "03_"])
    assert there == "Already there, so left as it is: 01_low_rank"
    assert written.startswith("Written: ")
    assert written.endswith("03_lora_from_scratch.ipynb")
    assert {path: path.read_bytes() for path in before} == before


def test_an_unknown_lesson_and_a_learners_folder_are_refused_and_nothing_is_written(tmp_path, capsys):
    assert command("course", tmp_path / "course", "--grading", "--only", "01", "99") == 1
    assert "There is no lesson '99'; choose" in error_line(capsys)
    assert not (tmp_path / "course").exists()
    copy_lessons(tmp_path / "mine", only=["01"])
    assert command("course", tmp_path / "mine", "--grading") == 1
    assert "name another folder" in error_line(capsys)
    assert not (tmp_path / "mine" / "source").exists()
