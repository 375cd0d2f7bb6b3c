"""The learner's copy of the lessons: no solution gets in, and nothing that the learner wrote is lost."""

import ast
import copy
import json
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lora_lab.course import copies, playground
from lora_lab.course.copies import CONFIG, MANIFEST, copy_lessons, student
from lora_lab.system.provenance import shipped_folder
from tests.helpers import command, error_line, names

SOLVED = '''def one_line(W, A, B, x, s):
    """The layer."""
    if s == 0:
        ### BEGIN SOLUTION
        return W @ x
        ### END SOLUTION
    ### BEGIN SOLUTION
    update = B @ (A @ x)
    return W @ x + s * update
    ### END SOLUTION
    ### STUB update = ____
    ### STUB return W @ x + s * ____


check("one_line", one_line)'''
OPEN = '''def one_line(W, A, B, x, s):
    """The layer."""
    if s == 0:
        raise NotImplementedError("your code here")
    update = ____
    return W @ x + s * ____


check("one_line", one_line)'''


def text_output(text):
    return new_output("stream", text=text)


def lesson(*sources):
    """A lesson that was run."""
    cells = [new_code_cell(source, outputs=[text_output("Correct.")], execution_count=1) for source in sources]
    return new_notebook(cells=[new_markdown_cell("# A lesson"), *cells])


def test_solutions_become_stubs_and_no_cell_has_been_run():
    before = lesson("x = 1", SOLVED, 'check("a", f)')
    original = copy.deepcopy(before)
    result = student(before)
    assert [cell.source for cell in result.cells[1:3]] == ["x = 1", OPEN]
    assert [cell.outputs for cell in result.cells[1:]] == [[], [], []]
    assert [cell.execution_count for cell in result.cells[1:]] == [None, None, None]
    assert before == original  # the lesson itself stays as it is
    nbformat.validate(result)


@pytest.mark.parametrize("marker", [copies.BEGIN, copies.END])
def test_a_solution_with_one_marker_alone_is_refused(marker):
    with pytest.raises(ValueError, match="Cell 3 needs"):
        student(lesson(SOLVED, f"def f():\n    {marker}\n    return 1"))


@pytest.mark.parametrize("path", sorted(shipped_folder("notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_the_learner_starts_from_is_python_and_does_not_stop_the_notebook(path):
    for cell in student(nbformat.read(path, as_version=4)).cells:
        assert copies.BEGIN not in cell.source, cell.source  # a marker without its other would leave a solution
        assert copies.END not in cell.source, cell.source
        if cell.cell_type == "code":
            tree = ast.parse(cell.source)
            inside = {node for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) for node in ast.walk(each)}
            assert not any(isinstance(node, ast.Raise) for node in {*ast.walk(tree)} - inside), cell.source


def solution_lines(source):
    """The lines between markers, without comments, that are long enough to be recognised."""
    blocks = re.findall(rf"^ *{copies.BEGIN}\n(.*?)^ *{copies.END}$", source, flags=re.DOTALL | re.MULTILINE)
    lines = {line.split("  #")[0].strip() for block in blocks for line in block.splitlines()}
    return {line for line in lines if len(line) > 12}


def leaks(folder, lines):
    """(file, line) for each of these lines that stands in a file of a folder, whatever the white space."""
    squeezed = {line: re.sub(r"\s", "", json.dumps(line, ensure_ascii=False)[1:-1]) for line in lines}
    files = {path: re.sub(r"\s", "", path.read_text(encoding="utf-8")) for path in folder.rglob("*") if path.is_file()}
    return {(path.name, line) for path, text in files.items() for line, short in squeezed.items() if short in text}


# Lines of solutions that a lesson shows in its own code or text, where they solve nothing.
SHOWN = {
    "01_low_rank.ipynb": {"U, S, Vh = np.linalg.svd(M, full_matrices=False)"},
    "03_lora_from_scratch.ipynb": {
        "for name, layer in list(model.named_children()):",  # the script to repair
        "loss = loss_of(model)",
        "loss.backward()",
        "model.requires_grad_(False)",
        "optimizer = torch.optim.Adam(trainable, lr=1e-2)",
        "optimizer.step()",
        "replace(model, name, ll.LoRALinear(layer, rank=4, alpha=8))",
        "return model, optimizer",
        "trainable = [p for p in model.parameters() if p.requires_grad]",
    },
    "05_speed.ipynb": {"device.synchronize()"},
}


@pytest.mark.slow
def test_no_line_of_a_solution_is_in_any_file_of_a_learners_folder(tmp_path):
    """In no cell, text, output, metadata or further file, of whichever lesson the solution is."""
    lines = set()
    for path in shipped_folder("notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            lines |= solution_lines(cell.source)
    assert len(lines) > 120
    copy_lessons(tmp_path)
    expected = {(name, line) for name, shown in SHOWN.items() for line in shown}
    assert leaks(tmp_path, lines) == expected
    for path in tmp_path.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert notebook.metadata.keys() <= {"kernelspec", "language_info"}
        for cell in notebook.cells:
            assert cell.metadata.keys() <= {"jupyter", "tags"}
            assert not cell.get("outputs")
            assert not cell.get("attachments")


def test_a_line_of_a_solution_would_be_found_in_a_cell_or_a_text_and_goes_with_outputs_and_metadata(lessons, tmp_path):
    line = "return W @ x + s * update"
    assert solution_lines(SOLVED) == {"update = B @ (A @ x)", line}
    for number, changes in enumerate(({"source": f"def f():\n    {line}"}, {"outputs": [text_output(line)]})):
        notebook = lesson(SOLVED, "x = 1")
        notebook.cells[2].update(changes)
        notebook.cells[2].metadata["widgets"] = notebook.metadata["widgets"] = {"state": [line]}
        nbformat.write(notebook, lessons / "00_first.ipynb")
        copy_lessons(tmp_path / str(number), only=["00"])
        found = leaks(tmp_path / str(number), solution_lines(SOLVED))
        assert found == ({("00_first.ipynb", line)} if "source" in changes else set())


# The folder


@pytest.fixture
def lessons(tmp_path, monkeypatch):
    """A folder with two small lessons, which takes the place of those that come with lora_lab."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(copies, "shipped_folder", lambda name: folder)
    for name in ("00_first", "01_second"):
        nbformat.write(lesson(SOLVED), folder / f"{name}.ipynb")
    (folder / "execute.py").write_text("", encoding="utf-8")
    return folder


def change(path, text="# mine"):
    """Write a cell into a lesson."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(new_markdown_cell(text))
    nbformat.write(notebook, path)
    return path.read_bytes()


def written(done):
    return [line.removeprefix("Written: ") for line in done if line.startswith("Written: ")]


def beside(done):
    return [line.removeprefix(f"{copies.BESIDE}: ") for line in done if line.startswith(copies.BESIDE)]


def test_the_learners_copy_has_stubs_and_the_solved_one_is_the_lesson(lessons, tmp_path):
    assert written(copy_lessons(tmp_path / "mine")) == ["00_first.ipynb", "01_second.ipynb"]
    assert nbformat.read(tmp_path / "mine" / "00_first.ipynb", as_version=4).cells[1].source == OPEN
    copy_lessons(tmp_path / "solved", solved=True)
    assert (tmp_path / "solved" / "00_first.ipynb").read_bytes() == (lessons / "00_first.ipynb").read_bytes()


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


def test_a_second_call_changes_nothing_and_an_untouched_lesson_is_replaced_by_a_newer_one(lessons, tmp_path):
    copy_lessons(tmp_path / "mine")
    before = contents(tmp_path / "mine")
    assert copy_lessons(tmp_path / "mine") == ["Already there: 2 lessons"]
    assert copy_lessons(tmp_path / "mine", only=["01"]) == ["Already there: 1 lesson"]
    assert contents(tmp_path / "mine") == before
    (tmp_path / "mine" / "01_second.ipynb").unlink()  # which comes back
    change(lessons / "00_first.ipynb", "newer")
    assert written(copy_lessons(tmp_path / "mine")) == ["00_first.ipynb", "01_second.ipynb"]
    assert "newer" in (tmp_path / "mine" / "00_first.ipynb").read_text(encoding="utf-8")


def test_a_touched_lesson_stays_and_the_newer_is_offered_beside_it_once_which_may_be_touched_too(lessons, tmp_path):
    mine = tmp_path / "mine"
    copy_lessons(mine)
    mine_of_old = change(mine / "00_first.ipynb")
    assert beside(copy_lessons(mine)) == []  # it is changed, but there is nothing newer
    change(lessons / "00_first.ipynb", "new")
    assert beside(copy_lessons(mine)) == ["00_first.new.ipynb"]
    (mine / "00_first.new.ipynb").unlink()  # declined
    assert beside(copy_lessons(mine)) == []
    assert names(mine) == [MANIFEST, "00_first.ipynb", "01_second.ipynb", playground.NAME]
    change(lessons / "00_first.ipynb", "newer")
    assert beside(copy_lessons(mine)) == ["00_first.new.ipynb"]
    assert (mine / "00_first.ipynb").read_bytes() == mine_of_old
    assert "newer" in (mine / "00_first.new.ipynb").read_text(encoding="utf-8")
    change(lessons / "00_first.ipynb", "newest")
    assert beside(copy_lessons(mine)) == ["00_first.new.ipynb"]  # nobody has touched the offer: it is replaced
    work = change(mine / "00_first.new.ipynb")
    change(lessons / "00_first.ipynb", "last")
    assert beside(copy_lessons(mine)) == ["00_first.new2.ipynb"]
    assert (mine / "00_first.new.ipynb").read_bytes() == work


def test_a_lesson_of_the_same_name_that_somebody_else_wrote_stays(lessons, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    nbformat.write(lesson("my own"), mine / "01_second.ipynb")
    work = (mine / "01_second.ipynb").read_bytes()
    done = copy_lessons(mine)
    assert (written(done), beside(done)) == (["00_first.ipynb"], ["01_second.new.ipynb"])
    assert (mine / "01_second.ipynb").read_bytes() == work


def test_a_choice_of_lessons_is_copied_and_others_can_follow(lessons, tmp_path):
    assert written(copy_lessons(tmp_path / "mine", only=["01"])) == ["01_second.ipynb"]
    assert names(tmp_path / "mine") == [MANIFEST, "01_second.ipynb", playground.NAME]
    work = change(tmp_path / "mine" / "01_second.ipynb")
    assert written(copy_lessons(tmp_path / "mine", only=["00", "01_sec"])) == ["00_first.ipynb"]
    assert (tmp_path / "mine" / "01_second.ipynb").read_bytes() == work


def test_what_is_no_folder_for_lessons_is_refused_and_stays_as_it_is(lessons, tmp_path):
    (tmp_path / "graded").mkdir()
    (tmp_path / "graded" / CONFIG).write_text("# nbgrader")
    refused = [
        ("mine", ["00", "7"], "no lesson '7'; choose from 00_first, 01_second, or by their numbers"),
        ("graded", (), rf"is a course to grade \(it holds {CONFIG}\); name another folder"),
    ]
    for folder, only, says in refused:
        with pytest.raises(ValueError, match=says):
            copy_lessons(tmp_path / folder, only=only)
    assert not (tmp_path / "mine").exists()
    assert names(tmp_path / "graded") == [CONFIG]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        copy_lessons(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


LINKS = "See [the second](01_second.ipynb), [the first](00_first.ipynb), [a page](https://a.b/c) and [x](x.ipynb)."


def text_of(path):
    return nbformat.read(path, as_version=4).cells[-1].source


@pytest.mark.parametrize("solved", [False, True])
def test_links_to_lessons_that_are_not_there_become_text_and_links_again_when_they_are(lessons, tmp_path, solved):
    change(lessons / "00_first.ipynb", LINKS)
    first = tmp_path / "mine" / "00_first.ipynb"
    copy_lessons(tmp_path / "mine", solved, only=["00"])
    assert text_of(first) == LINKS.replace("[the second](01_second.ipynb)", "the second")
    copy_lessons(tmp_path / "mine", solved, only=["01"])
    assert written(copy_lessons(tmp_path / "mine", solved, only=["00"])) == ["00_first.ipynb"]
    assert text_of(first) == LINKS


def test_a_lesson_that_was_changed_is_not_offered_again_for_its_links_alone(lessons, tmp_path):
    mine = tmp_path / "mine"
    change(lessons / "00_first.ipynb", LINKS)
    copy_lessons(mine, only=["00"])
    work = change(mine / "00_first.ipynb")
    for _ in range(2):
        assert beside(copy_lessons(mine)) == []
    assert (mine / "00_first.ipynb").read_bytes() == work
    change(lessons / "00_first.ipynb", "newer")
    assert beside(copy_lessons(mine)) == ["00_first.new.ipynb"]


def test_the_links_of_real_lessons_lead_to_lessons_of_the_folder(tmp_path):
    copy_lessons(tmp_path / "all")
    assert "(05_speed.ipynb)" in (tmp_path / "all" / "00_first_look.ipynb").read_text(encoding="utf-8")
    copy_lessons(tmp_path / "some", only=["00", "02", "03_"])
    links = []
    for path in (tmp_path / "some").glob("*.ipynb"):
        links += re.findall(r"[(/\"'](\w+\.ipynb)", path.read_text(encoding="utf-8"))
    assert set(links) == {"00_first_look.ipynb", "02_why_fine_tune.ipynb", "03_lora_from_scratch.ipynb"}


def test_solutions_are_never_written_over_a_learners_copy(lessons, tmp_path):
    for solved in (False, True):
        copy_lessons(tmp_path / str(solved), solved=not solved)
        with pytest.raises(ValueError, match="name another folder"):
            copy_lessons(tmp_path / str(solved), solved=solved)


def test_an_error_in_one_lesson_leaves_the_folder_as_it_was(lessons, tmp_path):
    copy_lessons(tmp_path / "mine")
    before = contents(tmp_path / "mine")
    change(lessons / "00_first.ipynb", "newer")
    (lessons / "01_second.ipynb").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="JSON"):
        copy_lessons(tmp_path / "mine")
    assert contents(tmp_path / "mine") == before


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "it must be a valid dictionary"),
        ("{}", "lacks the entry 'solved'"),
        ('{"solved": 0, "written": {}, "versions": {}}', "solved is 0, but it must be a valid boolean"),
        ('{"solved": false, "written": {"00_first.ipynb": 5}, "versions": {}}', "is 5, but it must be a valid string"),
    ],
)
def test_a_damaged_manifest_is_one_sentence_and_without_it_what_was_changed_stays(lessons, tmp_path, damage, says):
    mine = tmp_path / "mine"
    copy_lessons(mine)
    work = change(mine / "00_first.ipynb")
    (mine / MANIFEST).write_text(damage, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{MANIFEST}.*{says}.* Delete it; lessons that"):
        copy_lessons(mine)
    (mine / MANIFEST).unlink()
    assert beside(copy_lessons(mine)) == ["00_first.new.ipynb"]
    assert (mine / "00_first.ipynb").read_bytes() == work


def test_the_playground_lies_beside_them_and_one_that_was_changed_stays(lessons, tmp_path):
    page = tmp_path / "mine" / playground.NAME
    copy_lessons(tmp_path / "mine")
    assert page.read_text(encoding="utf-8") == playground.build()
    page.write_text("mine", encoding="utf-8")
    copy_lessons(tmp_path / "mine")
    assert page.read_text(encoding="utf-8") == "mine"
    page.unlink()
    copy_lessons(tmp_path / "mine")
    assert page.read_text(encoding="utf-8") == playground.build()


# The commands


def test_the_commands_take_a_choice_of_lessons(tmp_path, capsys):
    assert command("course", tmp_path / "my class", "--only", "03_", "01") == 0
    lessons = ["01_low_rank.ipynb", "03_lora_from_scratch.ipynb"]
    assert names(tmp_path / "my class") == [MANIFEST, *lessons, playground.NAME]
    # A path with a space is printed as a shell needs it.
    assert f"jupyter lab '{tmp_path / 'my class' / '01_low_rank.ipynb'}'" in capsys.readouterr().out


def test_files_of_the_class_are_copied_once_and_never_overwritten(tmp_path, capsys):
    config, tickets = tmp_path / "model" / "config.json", tmp_path / "tickets.jsonl"
    config.parent.mkdir()
    arguments = ("course", tmp_path / "mine", "--only", "03", "--add", config.parent, tickets)
    said = []
    for content in ("first", "second"):
        config.write_text(content)
        tickets.write_text(content)
        assert command(*arguments) == 0
        said.append(re.findall(r"^(Added|.* left as it is): (.+)$", capsys.readouterr().out, re.MULTILINE))
        for path in ("model/config.json", "tickets.jsonl"):
            assert (tmp_path / "mine" / path).read_text() == "first"
    both = ("model", "tickets.jsonl")
    there = "Already there, so left as it is"
    assert said == [[("Added", name) for name in both], [(there, name) for name in both]]
    for refused in (("other", "--add", tmp_path / "gone.csv"), ("graded", "--grading", "--add", config)):
        assert command("course", tmp_path / refused[0], *refused[1:]) == 1
        assert "--add" in (line := error_line(capsys)) or "gone.csv" in line
        assert not (tmp_path / refused[0]).exists()


@pytest.mark.parametrize("target", ["../secret", "..", ".", "gone"])
def test_a_folder_with_a_link_is_not_added(tmp_path, capsys, target):
    """Or what is handed out holds something that nobody chose."""
    (tmp_path / "secret").write_text("mine")
    data = tmp_path / "data"
    data.mkdir()
    (data / "link").symlink_to(target)
    assert command("course", tmp_path / "bad", "--add", data) == 1
    assert "link is a link; put a copy" in error_line(capsys)
    assert not (tmp_path / "bad").exists()
    with pytest.raises(ValueError, match="put a copy"):
        copies.add_files(tmp_path, [data])


def test_a_lesson_names_no_file_outside_its_folder():
    """So a copied folder works wherever it lies: models come from the cache, and records from the package."""
    for path in shipped_folder("notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert not re.search(r"[\"']\.\./|[\"'](/|~)\w|[\"'](records|notebooks|lora_lab)/", cell.source), (
                    cell.source
                )
